//! The CUDA driver API over the emulator, as a Rust library and as a drop-in shared library.
//!
//! Translation only: handles, error codes, streams, events. Execution stands in `fathom-emulator`.
