//! A fixed-point accumulator wide enough for every sum of the tensor core: exact at any width.

/// Two's complement, 832 bits, the lowest of weight 2^-400: products of BF16 (down to 2^-266) and
/// block-scaled FP8 (2^-286 to 2^286) with room for 2^64 of them.
pub(super) struct Wide {
    limbs: [u64; LIMBS],
}

const LIMBS: usize = 13;
const LSB_EXPONENT: i32 = -400;

impl Wide {
    pub(super) const ZERO: Wide = Wide { limbs: [0; LIMBS] };

    /// Adds `(-1)^negative * magnitude * 2^lsb_exponent`.
    pub(super) fn add(&mut self, negative: bool, magnitude: u64, lsb_exponent: i32) {
        if magnitude == 0 {
            return;
        }
        let position = usize::try_from(lsb_exponent - LSB_EXPONENT)
            .expect("no operand format has bits below 2^-400");
        let (limb, offset) = (position / 64, position % 64);
        let wide = u128::from(magnitude) << offset;
        let mut term = [0u64; LIMBS];
        term[limb] = wide as u64;
        term[limb + 1] = (wide >> 64) as u64;
        if negative {
            negate(&mut term);
        }
        let mut carry = false;
        for (limb, term) in self.limbs.iter_mut().zip(term) {
            let (sum, c0) = limb.overflowing_add(term);
            let (sum, c1) = sum.overflowing_add(u64::from(carry));
            *limb = sum;
            carry = c0 || c1;
        }
    }

    /// Sign, leading 64 bits (or fewer) and the exponent of their lowest; bits below them are
    /// folded into the lowest (sticky).
    pub(super) fn leading_bits(&self) -> (bool, u64, i32) {
        let negative = self.limbs[LIMBS - 1] >> 63 == 1;
        let mut limbs = self.limbs;
        if negative {
            negate(&mut limbs);
        }
        let Some(top) = limbs.iter().rposition(|&l| l != 0) else {
            return (false, 0, LSB_EXPONENT);
        };
        if top == 0 {
            return (negative, limbs[0], LSB_EXPONENT);
        }
        let shift = limbs[top].leading_zeros();
        let pair = u128::from(limbs[top]) << 64 | u128::from(limbs[top - 1]);
        let lead = (pair << shift >> 64) as u64;
        let rest = (pair << shift) as u64 != 0 || limbs[..top - 1].iter().any(|&l| l != 0);
        let lsb = LSB_EXPONENT + 64 * top as i32 - shift as i32;
        (negative, lead | u64::from(rest), lsb)
    }
}

fn negate(limbs: &mut [u64; LIMBS]) {
    let mut carry = true;
    for limb in limbs {
        let (negated, c) = (!*limb).overflowing_add(u64::from(carry));
        *limb = negated;
        carry = c;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_both_signs_and_far_apart() {
        let mut sum = Wide::ZERO;
        sum.add(false, 3, -286);
        sum.add(true, 1, 300);
        assert_eq!(sum.leading_bits(), (true, u64::MAX, 300 - 64));
        sum.add(false, 1, 300);
        assert_eq!(sum.leading_bits(), (false, 3 << 62, -286 - 62));
        sum.add(true, 3, -286);
        assert_eq!(sum.leading_bits().1, 0);
    }
}
