//! Arithmetic, exact to the bit: number formats and rounding, the tensor-core model, every exact
//! GEMM, elementary functions from IEEE operations, fixed reduction trees, Philox.
//!
//! This room knows numbers and arrays. It may not know ops, models, files or devices. The contract
//! it implements is `docs/numerics.md`; ops wrap it in `fathom-reference`.

pub mod elementary;
pub mod formats;
pub mod gemm;
mod isa;
pub mod mma;
pub mod philox;
pub mod quant;
pub mod reduce;
