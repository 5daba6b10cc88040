//! The CUDA driver API over the emulator, as a Rust library and as a drop-in shared library.
//!
//! - `api/`: the entry points of cuda.h, a file a subject, each a few lines over [`state`].
//! - [`state`]: devices, handles, streams, the emulated clock, what the run did.
//! - `image`: what a client may hand over as a module - PTX text, a fatbinary that carries it.
//! - `link`: several PTX texts into one.
//! - [`private`]: the folder in which the library is called libcuda, and running a command with it.
//!
//! - `queue`: what streams have been given to do, and who runs it; `operation`: what that is, in a
//!   stream or as a node of a `graph`.
//! - `machine`: words for the devices that a process sees and the places of memory.
//! - `program`: modules, libraries and their functions.
//! - `standins`: NVRTC and nvJitLink as they must answer here, with PTX.
//!
//! Translation only: handles, error codes, streams, events. Execution stands in `fathom-emulator`.

mod abi;
mod api;
mod driver_check;
mod graph;
mod image;
mod link;
mod machine;
mod operation;
pub mod private;
mod program;
mod queue;
mod results;
mod say;
#[cfg(all(target_os = "linux", target_env = "gnu", target_arch = "x86_64"))]
mod standins;
pub mod state;

pub use private::{Choices, OnFinding, PrepareError, Prepared, Summary};

/// By this symbol a program can tell the emulated driver from NVIDIA's.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static fathom_emulated_driver: u32 = 1;
