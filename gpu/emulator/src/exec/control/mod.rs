//! Control flow, and how threads wait for and talk to one another.

pub mod argument;
pub mod barrier;
pub mod branch;
pub mod builtin;
pub mod call;
pub mod fence;
pub mod mbarrier;
pub mod members;
pub mod printf;
pub mod shuffle;
