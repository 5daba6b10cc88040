//! Control flow, and how threads wait for and talk to one another.

pub mod barrier;
pub mod branch;
pub mod fence;
pub mod mbarrier;
pub mod members;
pub mod shuffle;
