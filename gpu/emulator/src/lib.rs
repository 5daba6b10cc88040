//! The machine that executes PTX: grids, clusters, warps, memory spaces, sanitizers, kernel records.
//!
//! It knows devices and kernels, not the CUDA driver API; that stands in `fathom-libcuda`.
