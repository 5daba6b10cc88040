//! Instructions that read and write memory: loads and stores, atomics, asynchronous copies.

pub mod atomic;
pub mod bulk;
pub mod cp_async;
pub mod load_store;
pub mod multimem;
pub mod tensormap;
pub mod texture;
pub mod tma;
