//! The cost model: what a kernel takes, fitted on measurements ([`calibrate`], [`kineto`]), and
//! what the parts of a layer take ([`first_principles`]).

pub mod calibrate;
pub mod first_principles;
pub mod kernel_time;
pub mod kineto;
pub mod times;
