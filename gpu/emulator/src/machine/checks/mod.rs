//! The sanitizer: what is wrong with a program whose values are right.
//!
//! [`sanitizer`] knows shared memory, barriers and registers in flight, [`global`] the races
//! between CTAs, [`lanes`] the order within a warp; none knows the machine. [`shared`] and
//! [`order`] are what instructions tell them, as methods of the context that micro-operations have,
//! and where findings are made.

pub mod global;
pub mod lanes;
mod order;
pub mod sanitizer;
mod shared;
