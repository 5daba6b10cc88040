//! Formats narrower than a byte or between bytes, as they lie in memory.

use super::{E2M1, E5M6};

/// Packs 8 E5M6 codes into three 32-bit words, the first code in the top bits: the 96 bits read
/// from the top of word 0 to the bottom of word 2 are the codes in order. This is the order of
/// DeepSeek's TileKernels (`per_token_cast_to_e5m6`).
#[inline]
pub fn pack_e5m6(codes: [E5M6; 8]) -> [u32; 3] {
    let wide = codes.iter().fold(0u128, |acc, c| acc << 12 | u128::from(c.0 & 0xFFF));
    [(wide >> 64) as u32, (wide >> 32) as u32, wide as u32]
}

/// The inverse of [`pack_e5m6`].
#[inline]
pub fn unpack_e5m6(words: [u32; 3]) -> [E5M6; 8] {
    let wide = words.iter().fold(0u128, |acc, &w| acc << 32 | u128::from(w));
    std::array::from_fn(|i| E5M6((wide >> (84 - 12 * i)) as u16 & 0xFFF))
}

/// The two E2M1 codes of a byte, the first in the low nibble.
#[inline]
pub fn unpack_e2m1(byte: u8) -> [E2M1; 2] {
    [E2M1(byte & 0xF), E2M1(byte >> 4)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e5m6_words_hold_the_codes_from_the_top() {
        let codes = [0x123, 0x456, 0x789, 0xABC, 0xDEF, 0x012, 0x345, 0x678].map(E5M6);
        let words = pack_e5m6(codes);
        assert_eq!(words, [0x1234_5678, 0x9ABC_DEF0, 0x1234_5678]);
        assert_eq!(unpack_e5m6(words), codes);
    }

    #[test]
    fn every_e5m6_code_survives_every_position() {
        for code in 0..4096 {
            for position in 0..8 {
                let mut codes = [E5M6(0xFFF ^ code); 8];
                codes[position] = E5M6(code);
                assert_eq!(unpack_e5m6(pack_e5m6(codes)), codes);
            }
        }
    }

    #[test]
    fn e2m1_low_nibble_first() {
        assert_eq!(unpack_e2m1(0xF1), [E2M1(1), E2M1(15)]);
    }
}
