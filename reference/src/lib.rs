//! DeepSeek-V3 itself: the op table, quantisation, layers, model, checkpoints, data, optimizer,
//! training and generation, written once over the trait `Backend`.
//!
//! - [`op`]: what an op is, and the table of them; everything that is generic over ops goes through
//!   it.
//! - [`ops`]: the ops themselves, one a file: parameters, roles, shape rules, cost and arithmetic.
//! - [`tensor`]: the tensors that ops take and give on the host.
//!
//! This room wraps the exact arithmetic of `fathom-numerics` and has none of its own; it knows no
//! GPU, no simulator and no command line.
// Not `forbid`: the slicing macro of ndarray expands to an `unsafe` of its own, which it allows.
#![deny(unsafe_code)]

pub mod backend;
pub mod checkpoint;
pub mod data;
pub mod eval;
pub mod exchange;
pub mod files;
pub mod generate;
pub mod inspect;
pub mod layers;
pub mod memory;
pub mod model;
pub mod op;
pub mod ops;
pub mod optim;
pub mod parallel;
pub mod precision;
pub mod tensor;
pub mod train;

pub use op::{Case, DynOp, Engine, EngineError, Op, OpError, Outputs};
pub use tensor::{Element, Tensor};
