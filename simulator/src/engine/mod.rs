//! The engine: plays instruction streams with the cost model's times ([`events`], [`chunk`]), sums
//! up a step and its memory, bounds what a step takes before it is played, and searches over
//! layouts.

pub mod bound;
pub mod chunk;
pub mod events;
pub mod exposure;
pub mod memory;
pub mod search;
pub mod step;
