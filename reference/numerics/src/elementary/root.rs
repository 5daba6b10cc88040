//! Steps of rsqrt: IEEE square root and division, then one correction by their exact remainders.
//!
//! Mirrored by `gpu/kernels/common/elementary.cuh`: a change here is a change there.

use crate::formats::F32_NAN;

/// 1 / sqrt(x).
#[inline(always)]
pub(super) fn rsqrt(x: f32) -> f32 {
    // 2^-100: below it the remainder of the root would be subnormal.
    let small = x < f32::from_bits(0x0D80_0000);
    let scaled = if small { x * f32::from_bits(0x5780_0000) } else { x };
    let root = scaled.sqrt();
    let y = 1.0 / root;
    let root_remainder = (-root).mul_add(root, scaled);
    let remainder = (-y).mul_add(root, 1.0);
    let half = 0.5 * (root_remainder * y * y);
    let y = y.mul_add(remainder - half, y);
    let y = if small { y * f32::from_bits(0x4B80_0000) } else { y };
    let y = if x == f32::INFINITY { 0.0 } else { y };
    let y = if x == 0.0 { 1.0 / x } else { y };
    if x >= 0.0 { y } else { F32_NAN }
}
