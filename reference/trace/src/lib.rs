//! The records by which the rooms talk: op records and kernel records, as versioned JSON Lines.
//!
//! - [`OpRecord`]: one op of the model, with shapes, dtypes, FLOPs, bytes and its place in the
//!   step. `meta` and every recording backend write it, the simulator reads it.
//! - [`KernelRecord`]: what one kernel launch executed. The emulator writes it, the simulator's
//!   kernel-time model reads it.
//! - [`jsonl`]: the file format of both. `schema/` holds their JSON schemas.
//! - [`input`]: how every room reads input files, of these and all other formats.
//!
//! This room depends on no other room of the workspace and knows no arithmetic.
#![forbid(unsafe_code)]

mod dtype;
pub mod input;
pub mod jsonl;
mod kernel;
mod op;
pub mod shared;

pub use dtype::DType;
pub use jsonl::TraceError;
pub use kernel::{KernelRecord, KernelTotals, RoleRecord};
pub use op::{Component, Group, GroupKind, OpClass, OpRecord, Parallel, Phase, TensorMeta};
