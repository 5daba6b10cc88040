//! A permutation of document numbers that is computed, not stored.
//!
//! A balanced Feistel network of four rounds over the smallest even number of bits that holds
//! `0..n`; numbers at or above `n` are walked on along their cycle until one is below. Round
//! function: Philox of (seed, stream), so every (seed, epoch, source) has its own order. Source:
//! Luby and Rackoff, 'How to construct pseudorandom permutations', 1988; Black and Rogaway,
//! 'Ciphers with arbitrary finite domains', 2002 (cycle walking).

use fathom_numerics::philox::Philox;

const ROUNDS: u64 = 4;

/// Place `i` of the permutation of `0..n` that `noise` selects.
///
/// # Panics
/// Where `i` is not below `n`.
pub(super) fn permute(noise: Philox, i: u64, n: u64) -> u64 {
    assert!(i < n, "place {i} of {n}");
    let bits = (u64::BITS - (n - 1).leading_zeros()).max(2).div_ceil(2);
    let mask = (1u64 << bits) - 1;
    let mut x = i;
    loop {
        let (mut left, mut right) = (x >> bits, x & mask);
        for round in 0..ROUNDS {
            let words = noise.block((right * ROUNDS) | round);
            let f = u64::from(words[0]) | u64::from(words[1]) << 32;
            (left, right) = (right, left ^ (f & mask));
        }
        x = left << bits | right;
        if x < n {
            return x;
        }
    }
}

/// What a stream of random numbers is for; its top byte.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose {
    /// Order of blocks in an epoch.
    Blocks = 1,
    /// Order of documents inside a block.
    Documents = 2,
    /// Fill-in-the-middle of a document.
    Fim = 3,
    /// Splitting of a document's joined tokens.
    Split = 4,
}

/// The stream of (purpose, source, epoch, block or document): 8, 8, 16 and 32 bits.
pub(super) fn noise(seed: u64, purpose: Purpose, source: usize, epoch: u64, item: u64) -> Philox {
    let stream = (purpose as u64) << 56
        | (source as u64 & 0xFF) << 48
        | (epoch & 0xFFFF) << 32
        | (item & 0xFFFF_FFFF);
    Philox::new(seed, stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_once() {
        for n in [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097] {
            let mut seen = vec![false; n as usize];
            for i in 0..n {
                let at = permute(noise(7, Purpose::Documents, 0, 3, 0), i, n) as usize;
                assert!(!std::mem::replace(&mut seen[at], true), "{at} twice of {n}");
            }
        }
    }

    #[test]
    fn epochs_differ_and_orders_are_not_the_identity() {
        let order = |epoch| {
            let noise = noise(7, Purpose::Documents, 0, epoch, 0);
            (0..1000).map(|i| permute(noise, i, 1000)).collect::<Vec<_>>()
        };
        let fixed = |a: &[u64], b: &[u64]| a.iter().zip(b).filter(|(a, b)| a == b).count();
        let identity: Vec<u64> = (0..1000).collect();
        // Two random orders agree in one place on average; twelve is beyond one in 10^9.
        assert!(fixed(&order(0), &order(1)) < 12);
        assert!(fixed(&order(0), &identity) < 12);
    }

    #[test]
    fn streams_do_not_meet() {
        let words = |p, s, e, i| noise(1, p, s, e, i).block(0);
        let mut all: Vec<_> = [
            words(Purpose::Fim, 0, 0, 0),
            words(Purpose::Split, 0, 0, 0),
            words(Purpose::Fim, 1, 0, 0),
            words(Purpose::Fim, 0, 1, 0),
            words(Purpose::Fim, 0, 0, 1),
        ]
        .to_vec();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 5);
    }
}
