//! Kernel time from first principles: tiles, waves, tensor-core rate, bytes, launches.
