//! The CUDA backend: run-time compilation of the kernels in `gpu/kernels`, launches, tensor maps,
//! one
//! host file per kernel. It meets the emulated driver only as a libcuda, never as a crate.
//!
//! - [`compile`]: CUDA C++ to PTX, cached by content.
//! - [`driver`]: which libcuda is loaded, NVIDIA's or the emulated one, and its devices.
//! - [`nvrtc`]: where NVIDIA's run-time compiler is, and fetching it once.

pub mod compile;
pub mod driver;
pub mod nvrtc;
