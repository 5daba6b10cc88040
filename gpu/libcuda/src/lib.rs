//! The CUDA driver API over the emulator, as a Rust library and as a drop-in shared library.
//!
//! In layers, the lowest first (`tests/tidy.rs` holds them):
//!
//! - words: `abi` and `results` (cuda.h's types and numbers), `machine` (which devices a process
//!   sees, where memory lies), [`Choices`], [`Summary`], `say` (what the user is told), `image`
//!   (what a client may hand over as a module: PTX text, a fatbinary that carries it), `link`
//!   (several PTX texts into one).
//! - `objects/`: what stands behind the handles of clients, as data; `queue`: what streams have
//!   been given to do, and who runs it.
//! - `driver/`: the one driver of the process, and what it does with them.
//! - `api/`: the entry points of cuda.h, a file a subject, each a few lines over the driver;
//!   `standins`: NVRTC and nvJitLink as they must answer here, with PTX.
//!   `nvml`: what programs ask libnvidia-ml about the devices.
//! - [`prepare`]: the folder in which the library is called libcuda, and running a command with it.
//!
//! Translation only: handles, error codes, streams, events. Execution stands in `fathom-emulator`.

mod abi;
mod api;
mod choices;
mod driver;
mod driver_check;
mod image;
mod link;
mod machine;
mod nvml;
mod objects;
pub mod prepare;
mod queue;
mod results;
mod say;
#[cfg(all(target_os = "linux", target_env = "gnu", target_arch = "x86_64"))]
mod standins;
mod summary;

pub use choices::{Choices, MOST_DEVICES, OnFinding};
pub use prepare::{PrepareError, Prepared};
pub use summary::Summary;

/// By this symbol a program can tell the emulated driver from NVIDIA's.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static fathom_emulated_driver: u32 = 1;
