//! The CUDA backend: run-time compilation of the kernels in `gpu/kernels`, launches, tensor maps,
//! one host file per kernel. It meets the emulated driver only as a libcuda, never as a crate.
//!
//! - [`compile`]: CUDA C++ to PTX, cached by content.
//! - [`driver`]: which libcuda is loaded, NVIDIA's or the emulated one, and its devices.
//! - [`device`]: a GPU with its memory and its compiled kernels.
//! - [`tensor`], `memory`: what lies in its memory, and who holds how much of that.
//! - [`kernels`]: the host files, their table, and the engine over them.
//! - [`backend`]: the same as the backend that the model runs on.
//! - [`launch`]: the launch with its attributes, tensor maps; the only `unsafe` calls on a device.
//! - [`nccl`], [`peer`]: how ranks' devices reach each other, by NCCL or by kernels of ours; on a
//!   `lane`, a stream of its own.
//! - [`nvrtc`], [`nvdisasm`]: where NVIDIA's run-time compiler and its disassembler are, and
//!   fetching them once.
//! - [`assembly`]: kernels in machine code, with what the assembler says of them.

pub mod assembly;
pub mod backend;
pub mod compile;
pub mod device;
pub mod driver;
pub mod kernels;
mod lane;
pub mod launch;
mod memory;
pub mod nccl;
pub mod nvdisasm;
pub mod nvrtc;
pub mod peer;
pub mod tensor;
mod wheel;

pub use backend::Cuda;
pub use device::{DeviceKind, Gpu, GpuError};
pub use kernels::CudaEngine;
pub use tensor::DeviceTensor;
