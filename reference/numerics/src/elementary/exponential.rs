//! Steps of exp2, exp, sigmoid, SiLU and tanh. All share one exponential that keeps about 30 bits:
//! e^r on |r| <= ln(2)/2 as an unevaluated sum `high + low`, and a power of two beside it.
//!
//! Mirrored by `gpu/kernels/common/elementary.cuh`: a change here is a change there.

use super::nan_if;

/// 1.5 * 2^23: adding it to |x| < 2^22 rounds x to an integer, which the low bits then hold.
const MAGIC: f32 = f32::from_bits(0x4B40_0000);
const LOG2_E: f32 = f32::from_bits(0x3FB8_AA3B);
/// ln 2 to 16 bits, so that its products with integers below 256 are exact; and the rest of it.
const LN2_HIGH: f32 = f32::from_bits(0x3F31_7200);
const LN2_LOW: f32 = f32::from_bits(0x35BF_BE8E);
/// ln 2 to 24 bits, and the rest of it.
const LN2: f32 = f32::from_bits(0x3F31_7218);
const LN2_REST: f32 = f32::from_bits(0xB102_E308);
/// e^r = 1 + r + r^2 Q(r) on |r| <= 0.3467; relative error of the polynomial 2^-28.2.
const Q: [f32; 5] = [
    f32::from_bits(0x3EFF_FFFE),
    f32::from_bits(0x3E2A_AA46),
    f32::from_bits(0x3D2A_AC2C),
    f32::from_bits(0x3C09_1EE4),
    f32::from_bits(0x3AB5_6268),
];
/// tanh x = x + x^3 T(x^2) on |x| <= 0.625; relative error of the polynomial 2^-27.7.
const T: [f32; 5] = [
    f32::from_bits(0xBEAA_AA99),
    f32::from_bits(0x3E08_837B),
    f32::from_bits(0xBD5C_1AD2),
    f32::from_bits(0x3CA8_FC67),
    f32::from_bits(0xBBBA_8671),
];

/// y * 2^n for |n| <= 250, in two multiplications, of which only the second can round.
#[inline(always)]
fn scale(y: f32, n: i32) -> f32 {
    let half = n >> 1;
    let rest = n.wrapping_sub(half);
    let a = f32::from_bits((half.wrapping_add(127) as u32) << 23);
    let b = f32::from_bits((rest.wrapping_add(127) as u32) << 23);
    y * a * b
}

/// e^(r + r_low) as `(high, low)`; |r| <= 0.3467, |r_low| <= 2^-25.
#[inline(always)]
fn exp_reduced(r: f32, r_low: f32) -> (f32, f32) {
    let q = Q[4];
    let q = q.mul_add(r, Q[3]);
    let q = q.mul_add(r, Q[2]);
    let q = q.mul_add(r, Q[1]);
    let q = q.mul_add(r, Q[0]);
    let r2 = r * r;
    let sum = 1.0 + r;
    let rest = r - (sum - 1.0);
    let rest = r_low.mul_add(sum, rest);
    let tail = r2.mul_add(q, rest);
    let high = sum + tail;
    let low = tail - (high - sum);
    (high, low)
}

/// e^x = (high + low) * 2^n for |x| <= 110.
#[inline(always)]
fn exp_parts(x: f32) -> (f32, f32, i32) {
    let shifted = x.mul_add(LOG2_E, MAGIC);
    let n = (shifted.to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32);
    let whole = shifted - MAGIC;
    let near = (-whole).mul_add(LN2_HIGH, x);
    let r = (-whole).mul_add(LN2_LOW, near);
    let r_low = (-whole).mul_add(LN2_LOW, near - r);
    let (high, low) = exp_reduced(r, r_low);
    (high, low, n)
}

/// 2 to the power of x, from IEEE add, mul and fma alone.
#[inline(always)]
pub(super) fn exp2(x: f32) -> f32 {
    let c = if x > 130.0 { 130.0 } else { x };
    let c = if c < -152.0 { -152.0 } else { c };
    let shifted = c + MAGIC;
    let n = (shifted.to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32);
    let fraction = c - (shifted - MAGIC);
    let r = fraction * LN2;
    let r_low = fraction.mul_add(LN2, -r);
    let r_low = fraction.mul_add(LN2_REST, r_low);
    let (high, _) = exp_reduced(r, r_low);
    nan_if(x.is_nan(), scale(high, n))
}

/// e to the power of x, as 2 to the power of x log2 e.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    let c = if x > 90.0 { 90.0 } else { x };
    let c = if c < -110.0 { -110.0 } else { c };
    let (high, _, n) = exp_parts(c);
    nan_if(x.is_nan(), scale(high, n))
}

/// sigmoid(x) = (high + low) * 2^n: 1/(1+e) for x >= 0, e/(1+e) below, where e = e^-|x|. The
/// quotient is refined by its exact remainder, which also takes in the low part of e and the
/// rounding of 1+e.
#[inline(always)]
fn sigmoid_parts(x: f32) -> (f32, f32, i32) {
    let a = x.abs();
    let a = if a > 110.0 { 110.0 } else { a };
    let (high, low, n) = exp_parts(-a);
    let e = scale(high, n);
    let e_low = scale(low, n);
    let sum = 1.0 + e;
    let sum_low = (e - (sum - 1.0)) + e_low;
    let below = x < 0.0;
    let numerator = if below { high } else { 1.0 };
    let numerator_low = if below { low } else { 0.0 };
    let n = if below { n } else { 0 };
    let inverse = 1.0 / sum;
    let quotient = numerator * inverse;
    let remainder = (-quotient).mul_add(sum, numerator);
    let remainder = (-quotient).mul_add(sum_low, remainder + numerator_low);
    (quotient, remainder * inverse, n)
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    let (high, low, n) = sigmoid_parts(x);
    nan_if(x.is_nan(), scale(high + low, n))
}

/// x * sigmoid(x), scaled by the power of two last, so that only the result can be subnormal.
#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    let (high, low, n) = sigmoid_parts(x);
    let a = x.abs();
    let c = if a > 110.0 { 110.0 } else { a };
    let product = c * high;
    let product_low = c.mul_add(high, -product);
    let product_low = c.mul_add(low, product_low);
    let y = scale(product + product_low, n);
    let y = f32::from_bits(y.to_bits() | (x.to_bits() & 0x8000_0000));
    let y = if x > 110.0 { x } else { y };
    nan_if(x.is_nan(), y)
}

/// tanh: the polynomial below 0.625, 1 - 2 / (e^2x + 1) above, where one bit at most cancels.
#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    let a = x.abs();
    let c = if a > 10.0 { 10.0 } else { a };
    let z = c * c;
    let t = T[4];
    let t = t.mul_add(z, T[3]);
    let t = t.mul_add(z, T[2]);
    let t = t.mul_add(z, T[1]);
    let t = t.mul_add(z, T[0]);
    let near = (c * z).mul_add(t, c);
    let (high, _, n) = exp_parts(c + c);
    let far = 1.0 - 2.0 / (scale(high, n) + 1.0);
    let y = if c < 0.625 { near } else { far };
    let y = f32::from_bits(y.to_bits() | (x.to_bits() & 0x8000_0000));
    nan_if(x.is_nan(), y)
}

#[cfg(test)]
mod tests {
    use super::super::polynomial_error;
    use super::*;

    #[test]
    fn polynomials_are_as_close_as_stated() {
        let e =
            polynomial_error(&Q, (-0.3467, 0.3467), |r| r, |r, q| 1.0 + r + r * r * q, f64::exp);
        assert!(e < 2f64.powf(-28.2) && e > 2f64.powf(-28.4), "e^r: 2^{:.2}", e.log2());
        let e =
            polynomial_error(&T, (-0.625, 0.625), |x| x * x, |x, t| x + x.powi(3) * t, f64::tanh);
        assert!(e < 2f64.powf(-27.7) && e > 2f64.powf(-27.9), "tanh: 2^{:.2}", e.log2());
    }
}
