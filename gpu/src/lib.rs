//! The CUDA backend: run-time compilation of the kernels in `gpu/kernels`, launches, tensor maps, one
//! host file per kernel. It meets the emulated driver only as a libcuda, never as a crate.
