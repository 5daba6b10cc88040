//! Arithmetic, comparisons, conversions and moves: registers in, registers out.

pub mod cvt;
pub mod float;
pub mod half;
pub mod int;
pub mod mov;
pub mod pred;
pub mod video;
pub mod video_scalar;
