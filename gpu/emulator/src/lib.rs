//! The machine that executes PTX: grids, clusters, warps, memory spaces, sanitizers, kernel
//! records.
//!
//! ```no_run
//! use fathom_emulator::{Device, LaunchConfig, Module, Params, Preset};
//! # fn main() -> Result<(), fathom_emulator::Error> {
//! let device = Device::new(Preset::named("h800")?);
//! let module = Module::load(&device, &std::fs::read_to_string("add.ptx").unwrap())?;
//! let x = device.upload(&[1.0f32, 2.0])?;
//! let params = Params::new().with(x).with(2u32).into_bytes();
//! let config = LaunchConfig::new([1, 1, 1], [32, 1, 1], params);
//! let report = device.launch(&module.function("double")?, &config)?;
//! assert!(report.findings.is_empty());
//! println!("{:?}", device.download::<f32>(x, 2)?);
//! # Ok(()) }
//! ```
//!
//! It knows devices and kernels, not the CUDA driver API; that stands in `fathom-libcuda`. What
//! PTX text means comes from `fathom-ptx`, what a tensor core computes from `fathom-numerics`.
//!
//! Where to look, from the top. [`Device`], [`Module`] and [`LaunchConfig`] are the way in.
//! `lower` drives the way from PTX text to micro-operations; `exec` has one file a class of
//! instructions, which says what each is lowered to and what that does; `lower::builder` is what
//! they build with. `machine` runs warps, CTAs and clusters of micro-operations, whatever those
//! are, and `machine::checks` watches. Imports lead down this list only; `tests/tidy.rs` of the
//! workspace has it as a table.

// Bit fields and 32-lane loops read better without these.
#![allow(clippy::precedence, clippy::needless_range_loop, clippy::neg_cmp_op_on_partial_ord)]

mod config;
mod device;
mod engine;
mod error;
mod exec;
mod heap;
mod launch;
mod lower;
mod machine;
pub mod memory;
mod memory_host;
mod module;
mod preset;
mod program;
mod report;
pub mod run;
mod tensormap;
pub mod texture;

pub use config::Tell;
pub use device::{Checks, Device, Settings};
pub use error::{Error, Finding, MemoryError, SourceLine, Ub, Unsupported};
pub use fathom_trace::KernelRecord;
pub use launch::{
    CLUSTER, COOPERATIVE_GRID, Joining, Launch, LaunchConfig, LaunchReport, More, Params,
    check_launch, launch_joining, launch_together,
};
pub use memory::Memory;
pub use module::{Attributes, Function, Image, Managed, Module, Param, Symbol};
pub use preset::Preset;
pub use tensormap::{MapElement, Mode, TensorMap, TensorMapError};
