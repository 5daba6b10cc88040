//! Every shared case file of this crate's arithmetic, bit for bit.

mod files;
mod gemm;
mod mma;
mod quant;
