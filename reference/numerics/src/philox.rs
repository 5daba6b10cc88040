//! Counter-based random numbers: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, 'Parallel random
//! numbers: as easy as 1, 2, 3', SC 2011).
//!
//! Number `i` of a stream is a pure function of (seed, stream, i), so results do not depend on
//! threads, ranks or the order of calls. The layout is that of cuRAND's Philox: the key is the
//! seed, the counter's low half the block, its high half the stream, low words first.
//!
//! ```
//! use fathom_numerics::philox::Philox;
//! let noise = Philox::new(42, 7);
//! let mut xs = [0.0; 10];
//! noise.normals(100, &mut xs);
//! assert_eq!(xs[3], noise.normal(103));
//! ```

use crate::elementary::{log, log_slice, sin_cos, sin_cos_slice};
use crate::isa::{Isa, multiversion};

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// Weyl increments of the key: the golden ratio and sqrt(3) - 1.
const INCREMENTS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;
/// Words that one evaluation yields.
const WORDS: usize = 4;
/// Blocks that the slice forms evaluate side by side.
const BATCH: usize = 32;
/// 2 pi to 24 bits.
const TWO_PI: f32 = f32::from_bits(0x40C9_0FDB);
const TWO_TO_MINUS_24: f32 = f32::from_bits(0x3380_0000);
const TWO_TO_MINUS_32: f32 = f32::from_bits(0x2F80_0000);
const TWO_TO_MINUS_33: f32 = f32::from_bits(0x2F00_0000);

/// Philox4x32-10 of one counter under one key.
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let mut c = counter.map(|word| [word]);
    rounds(&mut c, key);
    c.map(|word| word[0])
}

/// The ten rounds on `N` counters at once, word by word.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // four words in step: indices are what vectorises
fn rounds<const N: usize>(c: &mut [[u32; N]; 4], mut key: [u32; 2]) {
    for _ in 0..ROUNDS {
        for l in 0..N {
            let p0 = u64::from(MULTIPLIERS[0]).wrapping_mul(u64::from(c[0][l]));
            let p1 = u64::from(MULTIPLIERS[1]).wrapping_mul(u64::from(c[2][l]));
            c[0][l] = (p1 >> 32) as u32 ^ c[1][l] ^ key[0];
            c[1][l] = p1 as u32;
            c[2][l] = (p0 >> 32) as u32 ^ c[3][l] ^ key[1];
            c[3][l] = p0 as u32;
        }
        key = [key[0].wrapping_add(INCREMENTS[0]), key[1].wrapping_add(INCREMENTS[1])];
    }
}

/// One stream of random numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Philox {
    seed: u64,
    stream: u64,
}

impl Philox {
    /// Stream `stream` under `seed`; streams and seeds are independent of each other.
    pub fn new(seed: u64, stream: u64) -> Philox {
        Philox { seed, stream }
    }

    /// The four words of block `counter`: numbers `4 counter` to `4 counter + 3`.
    pub fn block(self, counter: u64) -> [u32; 4] {
        let [c, s, k] = [counter, self.stream, self.seed].map(|x| [x as u32, (x >> 32) as u32]);
        philox4x32_10([c[0], c[1], s[0], s[1]], k)
    }

    /// Word `index` of the stream.
    pub fn word(self, index: u64) -> u32 {
        self.block(index / WORDS as u64)[(index % WORDS as u64) as usize]
    }

    /// Number `index`, uniform in [0, 1): the top 24 bits of its word times 2^-24.
    pub fn uniform(self, index: u64) -> f32 {
        uniform_of(self.word(index))
    }

    /// Number `index` of a standard normal distribution.
    ///
    /// Box-Muller on pairs of words (a, b), with [`log`] and [`sin_cos`] of this crate: radius
    /// `sqrt(-2 log(u))`, u = a * 2^-32 + 2^-33 in (0, 1] (a rounded to f32); angle
    /// `2 pi (b >> 8) 2^-24`. The even number is radius * cos(angle), the odd one radius *
    /// sin(angle). At most 6.77 in magnitude.
    pub fn normal(self, index: u64) -> f32 {
        let words = self.block(index / WORDS as u64);
        let pair = (index % WORDS as u64 / 2) as usize * 2;
        let radius = (-2.0 * log(radius_argument(words[pair]))).sqrt();
        let (sine, cosine) = sin_cos(angle(words[pair + 1]));
        radius * if index.is_multiple_of(2) { cosine } else { sine }
    }

    /// Words `first`, `first + 1`, ... of the stream.
    pub fn words(self, first: u64, out: &mut [u32]) {
        self.words_on(Isa::best(), first, out)
    }

    /// [`Philox::words`] with a chosen instruction set.
    pub fn words_on(self, isa: Isa, first: u64, out: &mut [u32]) {
        let head = ((WORDS as u64 - first % WORDS as u64) % WORDS as u64) as usize;
        let (head, whole) = out.split_at_mut(head.min(out.len()));
        for (i, word) in head.iter_mut().enumerate() {
            *word = self.word(first + i as u64);
        }
        let mut counter = (first + head.len() as u64) / WORDS as u64;
        for batch in whole.chunks_mut(BATCH * WORDS) {
            let mut words = [0; BATCH * WORDS];
            blocks(isa, self, counter, &mut words);
            batch.copy_from_slice(&words[..batch.len()]);
            counter = counter.wrapping_add(BATCH as u64);
        }
    }

    /// Uniform numbers `first`, `first + 1`, ... of the stream.
    pub fn uniforms(self, first: u64, out: &mut [f32]) {
        let mut words = [0; BATCH * WORDS];
        let mut index = first;
        for chunk in out.chunks_mut(BATCH * WORDS) {
            let words = &mut words[..chunk.len()];
            self.words(index, words);
            for (x, &word) in chunk.iter_mut().zip(&*words) {
                *x = uniform_of(word);
            }
            index += chunk.len() as u64;
        }
    }

    /// Normal numbers `first`, `first + 1`, ... of the stream: the bits of [`Philox::normal`].
    pub fn normals(self, first: u64, out: &mut [f32]) {
        let head = (first % 2) as usize;
        let (head, whole) = out.split_at_mut(head.min(out.len()));
        for x in head.iter_mut() {
            *x = self.normal(first);
        }
        let mut index = first + head.len() as u64;
        for chunk in whole.chunks_mut(BATCH * WORDS) {
            let mut words = [0; BATCH * WORDS];
            let pairs = chunk.len().div_ceil(2);
            self.words(index, &mut words[..2 * pairs]);
            let [mut radii, mut sines, mut cosines] = [[0.0; BATCH * WORDS / 2]; 3];
            for (p, words) in words.as_chunks::<2>().0[..pairs].iter().enumerate() {
                radii[p] = radius_argument(words[0]);
                sines[p] = angle(words[1]);
            }
            log_slice(&mut radii[..pairs]);
            sin_cos_slice(&mut sines[..pairs], &mut cosines[..pairs]);
            for (i, x) in chunk.iter_mut().enumerate() {
                let radius = (-2.0 * radii[i / 2]).sqrt();
                *x = radius * if i % 2 == 0 { cosines[i / 2] } else { sines[i / 2] };
            }
            index += chunk.len() as u64;
        }
    }
}

multiversion! {
    /// The words of `BATCH` blocks from `counter` on.
    fn blocks(philox: Philox, counter: u64, words: &mut [u32; BATCH * WORDS]) {
        let counters: [u64; BATCH] = std::array::from_fn(|l| counter.wrapping_add(l as u64));
        let mut c = [
            counters.map(|c| c as u32),
            counters.map(|c| (c >> 32) as u32),
            [philox.stream as u32; BATCH],
            [(philox.stream >> 32) as u32; BATCH],
        ];
        rounds(&mut c, [philox.seed as u32, (philox.seed >> 32) as u32]);
        for l in 0..BATCH {
            for w in 0..WORDS {
                words[l * WORDS + w] = c[w][l];
            }
        }
    }
}

#[inline(always)]
fn uniform_of(word: u32) -> f32 {
    (word >> 8) as f32 * TWO_TO_MINUS_24
}

#[inline(always)]
fn radius_argument(word: u32) -> f32 {
    // The product with a power of two is exact: contracting it to an fma would change nothing.
    word as f32 * TWO_TO_MINUS_32 + TWO_TO_MINUS_33
}

#[inline(always)]
fn angle(word: u32) -> f32 {
    uniform_of(word) * TWO_PI
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `kat_vectors` of the Random123 distribution, lines `philox4x32 10`.
    #[test]
    fn known_answers() {
        let ones = u32::MAX;
        let pi = [0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344];
        for (counter, key, want) in [
            ([0; 4], [0; 2], [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]),
            ([ones; 4], [ones; 2], [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]),
            (pi, [0xA409_3822, 0x299F_31D0], [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1]),
        ] {
            assert_eq!(philox4x32_10(counter, key), want, "counter {counter:08X?}");
        }
        let philox = Philox::new(0x299F_31D0_A409_3822, 0x0370_7344_1319_8A2E);
        let block = philox.block(0x85A3_08D3_243F_6A88);
        assert_eq!(block, [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1]);
    }

    #[test]
    fn slices_have_the_bits_of_single_numbers() {
        let philox = Philox::new(3, u64::MAX - 1);
        for first in [0, 1, 2, 3, 126, (1 << 34) - 5] {
            for len in [0, 1, 2, 5, 127, 128, 129, 1000] {
                let at = |i: usize| first + i as u64;
                let want: Vec<u32> = (0..len).map(|i| philox.word(at(i))).collect();
                for isa in Isa::available() {
                    let mut words = vec![0; len];
                    philox.words_on(isa, first, &mut words);
                    assert_eq!(words, want, "{isa:?} from {first}");
                }
                let [mut uniforms, mut normals] = [vec![0.0; len], vec![0.0; len]];
                philox.uniforms(first, &mut uniforms);
                philox.normals(first, &mut normals);
                for i in 0..len {
                    assert_eq!(uniforms[i].to_bits(), philox.uniform(at(i)).to_bits());
                    assert_eq!(normals[i].to_bits(), philox.normal(at(i)).to_bits());
                }
            }
        }
    }

    #[test]
    fn ends_of_the_ranges() {
        assert_eq!(uniform_of(0), 0.0);
        assert_eq!(uniform_of(u32::MAX), 1.0 - 2f32.powi(-24));
        assert_eq!((radius_argument(0), radius_argument(u32::MAX)), (2f32.powi(-33), 1.0));
    }

    /// Moments and tails of a million numbers, within five standard errors; the numbers are fixed.
    #[test]
    fn distributions() {
        const N: usize = 1 << 20;
        let n = N as f64;
        let mut xs = vec![0.0; N];
        Philox::new(1, 2).uniforms(0, &mut xs);
        let mean = xs.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        assert!((mean - 0.5).abs() < 5.0 / (12.0 * n).sqrt(), "mean of uniforms {mean}");
        Philox::new(1, 2).normals(0, &mut xs);
        let moment = |p: i32| xs.iter().map(|&x| f64::from(x).powi(p)).sum::<f64>() / n;
        for (p, want, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)] {
            let got = moment(p);
            assert!((got - want).abs() < 5.0 * (variance / n).sqrt(), "moment {p}: {got}");
        }
        let beyond_3 = xs.iter().filter(|x| x.abs() > 3.0).count() as f64;
        let expected = 0.002_699_796 * n;
        assert!((beyond_3 - expected).abs() < 5.0 * expected.sqrt(), "{beyond_3} beyond 3 sigma");
    }
}
