//! Matrix instructions: fragments, products of a warp and of a warpgroup.

pub mod matrix;
pub mod mma;
pub mod operand;
pub mod wgmma;
pub mod wmma;
