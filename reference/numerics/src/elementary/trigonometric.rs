//! Steps of sin and cos. The argument is reduced exactly in integers (Payne and Hanek, 'Radian
//! reduction for trigonometric functions', SIGNUM 1983): x * 2/pi modulo 4 from a 96-bit window of
//! 2/pi, so every finite f32 is treated alike.
//!
//! Mirrored by `gpu/kernels/common/elementary.cuh`: a change here is a change there.

use super::nan_if;

/// A word of zeros, then the first 224 bits of 2/pi, most significant first.
const TWO_OVER_PI: [u32; 8] = [
    0x0000_0000,
    0xA2F9_836E,
    0x4E44_1529,
    0xFC27_57D1,
    0xF534_DDC0,
    0xDB62_9599,
    0x3C43_9041,
    0xFE51_63AB,
];
/// pi/2 to 24 bits, and the rest of it.
const PI_2: f32 = f32::from_bits(0x3FC9_0FDB);
const PI_2_REST: f32 = f32::from_bits(0xB33B_BD2E);
/// The largest f32 below pi/4.
const PI_4_BITS: u32 = 0x3F49_0FDA;
/// sin r = r + r^3 S(r^2) on |r| <= pi/4; relative error of the polynomial 2^-32.5.
const S: [f32; 4] = [
    f32::from_bits(0xBE2A_AAAB),
    f32::from_bits(0x3C08_88BA),
    f32::from_bits(0xB950_2CAA),
    f32::from_bits(0x363E_1627),
];
/// cos r = 1 - r^2/2 + r^4 C(r^2) on |r| <= pi/4; relative error of the polynomial 2^-32.9.
const C: [f32; 3] =
    [f32::from_bits(0x3D2A_AAA5), f32::from_bits(0xBAB6_0614), f32::from_bits(0x37CC_F406)];

/// Word `word` of it, by selection: a table in memory would be a gather a lane.
#[inline(always)]
fn two_over_pi(word: u32) -> u32 {
    let [b0, b1, b2] = [word & 1 != 0, word & 2 != 0, word & 4 != 0];
    let w01 = if b0 { TWO_OVER_PI[1] } else { TWO_OVER_PI[0] };
    let w23 = if b0 { TWO_OVER_PI[3] } else { TWO_OVER_PI[2] };
    let w45 = if b0 { TWO_OVER_PI[5] } else { TWO_OVER_PI[4] };
    let w67 = if b0 { TWO_OVER_PI[7] } else { TWO_OVER_PI[6] };
    let w03 = if b1 { w23 } else { w01 };
    let w47 = if b1 { w67 } else { w45 };
    if b2 { w47 } else { w03 }
}

/// |x| = quadrant * pi/2 + r + r_low modulo 2 pi, with |r| <= pi/4; from the bits of |x|.
#[inline(always)]
fn reduce(magnitude: u32) -> (f32, f32, u32) {
    // |x| = m * 2^(exponent - 150). Bits of 2/pi whose product with it is a multiple of 4 are
    // skipped.
    let exponent = magnitude >> 23;
    let m = u64::from((magnitude & 0x007F_FFFF) | 0x0080_0000);
    let start = if exponent < 126 { 6 } else { exponent.wrapping_sub(120) };
    let word = start >> 5;
    let left = start & 31;
    let right = 31 - left;
    let t0 = two_over_pi(word);
    let t1 = two_over_pi(word.wrapping_add(1));
    let t2 = two_over_pi(word.wrapping_add(2));
    let t3 = two_over_pi(word.wrapping_add(3));
    let w0 = u64::from(t0.wrapping_shl(left) | (t1 >> 1).wrapping_shr(right));
    let w1 = u64::from(t1.wrapping_shl(left) | (t2 >> 1).wrapping_shr(right));
    let w2 = u64::from(t2.wrapping_shl(left) | (t3 >> 1).wrapping_shr(right));
    // |x| * 2/pi modulo 4, as an integer over 2^62.
    let product = (m.wrapping_mul(w0) << 32)
        .wrapping_add(m.wrapping_mul(w1))
        .wrapping_add(m.wrapping_mul(w2) >> 32);
    let quadrant = (product.wrapping_add(1 << 61) >> 62) as u32;
    // The signed distance to that quadrant, over 2^64, as three exact floats.
    let fraction = product << 2;
    let high = (((fraction >> 32) as u32 as i32) >> 8) as f32 * f32::from_bits(0x3380_0000);
    let middle =
        (((fraction >> 16) as u32 & 0x00FF_FFFF) as i32) as f32 * f32::from_bits(0x2780_0000);
    let low = ((fraction as u32 & 0xFFFF) as i32) as f32 * f32::from_bits(0x1F80_0000);
    let h = high + middle;
    let l = (middle - (h - high)) + low;
    let r = h * PI_2;
    let r_low = h.mul_add(PI_2, -r);
    let r_low = h.mul_add(PI_2_REST, r_low);
    let r_low = l.mul_add(PI_2, r_low);
    // Below pi/4 the argument is its own remainder.
    let near = magnitude <= PI_4_BITS;
    let r = if near { f32::from_bits(magnitude) } else { r };
    let r_low = if near { 0.0 } else { r_low };
    let quadrant = if near { 0 } else { quadrant };
    (r, r_low, quadrant)
}

/// sin and cos of r + r_low on |r| <= pi/4.
#[inline(always)]
fn reduced(r: f32, r_low: f32) -> (f32, f32) {
    let z = r * r;
    let half = 0.5 * z;
    let w = 1.0 - half;
    let s = S[3];
    let s = s.mul_add(z, S[2]);
    let s = s.mul_add(z, S[1]);
    let s = s.mul_add(z, S[0]);
    let sine = r + (r * z).mul_add(s, r_low * w);
    let c = C[2];
    let c = c.mul_add(z, C[1]);
    let c = c.mul_add(z, C[0]);
    let z_low = r.mul_add(r, -z);
    let rest = z_low.mul_add(-0.5, (1.0 - w) - half);
    let cosine = w + (rest + (z * z).mul_add(c, -(r * r_low)));
    (sine, cosine)
}

/// (sin x, cos x).
#[inline(always)]
pub(super) fn sin_cos(x: f32) -> (f32, f32) {
    let magnitude = x.to_bits() & 0x7FFF_FFFF;
    let (r, r_low, quadrant) = reduce(magnitude);
    let (sine, cosine) = reduced(r, r_low);
    let odd = (quadrant & 1) != 0;
    let s = if odd { cosine } else { sine };
    let c = if odd { sine } else { cosine };
    let s_sign = ((quadrant & 2) << 30) ^ (x.to_bits() & 0x8000_0000);
    let c_sign = (quadrant.wrapping_add(1) & 2) << 30;
    let not_finite = magnitude >= 0x7F80_0000;
    (
        nan_if(not_finite, f32::from_bits(s.to_bits() ^ s_sign)),
        nan_if(not_finite, f32::from_bits(c.to_bits() ^ c_sign)),
    )
}

/// The sine of x, in radians.
#[inline(always)]
pub(super) fn sin(x: f32) -> f32 {
    sin_cos(x).0
}

/// The cosine of x, in radians.
#[inline(always)]
pub(super) fn cos(x: f32) -> f32 {
    sin_cos(x).1
}

#[cfg(test)]
mod tests {
    use super::super::polynomial_error;
    use super::*;

    #[test]
    fn polynomials_are_as_close_as_stated() {
        use std::f64::consts::FRAC_PI_4;
        let range = (-FRAC_PI_4, FRAC_PI_4);
        let e = polynomial_error(&S, range, |r| r * r, |r, s| r + r.powi(3) * s, f64::sin);
        assert!(e < 2f64.powf(-32.5) && e > 2f64.powf(-32.7), "sin: 2^{:.2}", e.log2());
        let near = |r: f64, c: f64| 1.0 - r * r / 2.0 + r.powi(4) * c;
        let e = polynomial_error(&C, range, |r| r * r, near, f64::cos);
        assert!(e < 2f64.powf(-32.9) && e > 2f64.powf(-33.1), "cos: 2^{:.2}", e.log2());
    }

    /// The words of 2/pi times pi are two, to 192 bits after the point.
    #[test]
    fn table_is_two_over_pi() {
        // pi to 224 bits after the point.
        let pi: [u64; 8] = [
            0x3, 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0, 0x082EFA98,
        ];
        // table * pi = 2: schoolbook product, most significant word first.
        let mut product = [0u64; 16];
        for (i, &t) in TWO_OVER_PI.iter().enumerate().rev() {
            let mut carry = 0;
            for (j, &p) in pi.iter().enumerate().rev() {
                let sum = product[i + j + 1] + u64::from(t) * p + carry;
                product[i + j + 1] = sum & 0xFFFF_FFFF;
                carry = sum >> 32;
            }
            product[i] += carry;
        }
        // Truncation leaves it just below two: 1.FFFFFF...
        assert_eq!(product[..2], [0, 1]);
        assert!(product[2..8].iter().all(|&w| w == 0xFFFF_FFFF), "{product:08X?}");
    }
}
