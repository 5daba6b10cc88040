//! Steps of log2 and log: x = 2^e * m with m in [sqrt(1/2), sqrt(2)), f = m - 1 exactly, then
//! log(m) = f - f^2/2 + f^3 P(f). What the first sums round off is carried to the last addition.
//!
//! Mirrored by `gpu/kernels/common/elementary.cuh`: a change here is a change there.

use crate::formats::F32_NAN;

/// ln 2 to 16 bits, so that its products with integers below 256 are exact; and the rest of it.
const LN2_HIGH: f32 = f32::from_bits(0x3F31_7200);
const LN2_LOW: f32 = f32::from_bits(0x35BF_BE8E);
/// log2(e) to 24 bits, and the rest of it.
const LOG2_E: f32 = f32::from_bits(0x3FB8_AA3B);
const LOG2_E_REST: f32 = f32::from_bits(0x32A5_7060);
/// log(1 + f) = f - f^2/2 + f^3 P(f) on [sqrt(1/2) - 1, sqrt(2) - 1]; relative error of the
/// polynomial 2^-29.8.
const P: [f32; 9] = [
    f32::from_bits(0x3EAA_AAA3),
    f32::from_bits(0xBE80_0008),
    f32::from_bits(0x3E4C_D2A6),
    f32::from_bits(0xBE2A_AD4D),
    f32::from_bits(0x3E11_9686),
    f32::from_bits(0xBDFE_1A2A),
    f32::from_bits(0x3DF3_BB41),
    f32::from_bits(0xBDEF_1FF1),
    f32::from_bits(0x3D89_BAC6),
];
const SQRT_HALF_BITS: u32 = 0x3F35_04F3;
const ONE_BITS: u32 = 0x3F80_0000;

/// log(x) = e ln 2 + high + low, for positive finite x; f - f^2/2 is kept exactly.
#[inline(always)]
fn log_parts(x: f32) -> (f32, f32, f32) {
    let subnormal = x < f32::MIN_POSITIVE;
    let scaled = if subnormal { x * 8388608.0 } else { x };
    let offset = if subnormal { 150 } else { 127 };
    let shifted = scaled.to_bits().wrapping_add(ONE_BITS - SQRT_HALF_BITS);
    let e = ((shifted >> 23) as i32).wrapping_sub(offset) as f32;
    let f = f32::from_bits((shifted & 0x007F_FFFF).wrapping_add(SQRT_HALF_BITS)) - 1.0;
    let p = P[8];
    let p = p.mul_add(f, P[7]);
    let p = p.mul_add(f, P[6]);
    let p = p.mul_add(f, P[5]);
    let p = p.mul_add(f, P[4]);
    let p = p.mul_add(f, P[3]);
    let p = p.mul_add(f, P[2]);
    let p = p.mul_add(f, P[1]);
    let p = p.mul_add(f, P[0]);
    let half = (0.5 * f) * f;
    let half_low = (0.5 * f).mul_add(f, -half);
    let cube = (f * f) * f;
    let tail = cube.mul_add(p, -half_low);
    let high = f - half;
    let low = ((f - high) - half) + tail;
    (e, high, low)
}

/// The values outside (0, inf): -inf at either zero, inf at inf, NaN below zero and at NaN.
#[inline(always)]
fn specials(x: f32, y: f32) -> f32 {
    let y = if x == f32::INFINITY { x } else { y };
    let y = if x == 0.0 { f32::NEG_INFINITY } else { y };
    if x >= 0.0 { y } else { F32_NAN }
}

/// log2(x) = e + (high + low) log2(e).
#[inline(always)]
pub(super) fn log2(x: f32) -> f32 {
    let (e, high, low) = log_parts(x);
    let product = high * LOG2_E;
    let rest = high.mul_add(LOG2_E, -product);
    let rest = high.mul_add(LOG2_E_REST, rest);
    let rest = low.mul_add(LOG2_E, rest);
    let sum = e + product;
    let carried = product - (sum - e);
    specials(x, sum + (carried + rest))
}

/// log(x) = e ln 2 + high + low.
#[inline(always)]
pub(super) fn log(x: f32) -> f32 {
    let (e, high, low) = log_parts(x);
    let whole = e * LN2_HIGH;
    let rest = e.mul_add(LN2_LOW, low);
    let sum = whole + high;
    let carried = high - (sum - whole);
    specials(x, sum + (carried + rest))
}

#[cfg(test)]
mod tests {
    use super::super::polynomial_error;
    use super::*;

    #[test]
    fn polynomials_are_as_close_as_stated() {
        let range = (0.5f64.sqrt() - 1.0, 2f64.sqrt() - 1.0);
        let near = |f: f64, p: f64| f - f * f / 2.0 + f.powi(3) * p;
        let e = polynomial_error(&P, range, |f| f, near, f64::ln_1p);
        assert!(e < 2f64.powf(-29.8) && e > 2f64.powf(-30.0), "log(1 + f): 2^{:.2}", e.log2());
    }
}
