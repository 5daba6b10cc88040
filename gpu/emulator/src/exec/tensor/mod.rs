//! Matrix instructions: fragments, products of a warp and of a warpgroup.

pub mod block_scale;
pub mod matrix;
pub mod mma;
pub mod operand;
pub mod sparse;
pub mod wgmma;
pub mod wmma;
