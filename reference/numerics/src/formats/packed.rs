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

/// Packs E2M1 codes two a byte, the first in the low nibble. An odd last code gets a zero beside
/// it.
pub fn pack_e2m1(codes: &[E2M1]) -> Vec<u8> {
    codes
        .chunks(2)
        .map(|pair| (pair[0].0 & 0xF) | pair.get(1).map_or(0, |high| (high.0 & 0xF) << 4))
        .collect()
}

/// The inverse of [`pack_e2m1`]: two codes a byte.
pub fn unpack_e2m1(bytes: &[u8]) -> Vec<E2M1> {
    bytes.iter().flat_map(|b| [E2M1(b & 0xF), E2M1(b >> 4)]).collect()
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
        let codes = [E2M1(0x1), E2M1(0xF), E2M1(0x7)];
        assert_eq!(pack_e2m1(&codes), [0xF1, 0x07]);
        assert_eq!(unpack_e2m1(&[0xF1, 0x07]), [E2M1(1), E2M1(15), E2M1(7), E2M1(0)]);
    }
}
