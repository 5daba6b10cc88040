//! The engine: plays instruction streams with the cost model's times ([`events`], [`chunk`]), sums
//! up a step and its memory, and searches over layouts.

pub mod chunk;
pub mod events;
pub mod exposure;
pub mod memory;
pub mod search;
pub mod step;
