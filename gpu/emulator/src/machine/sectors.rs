//! Which sectors of global memory a launch touched, and which a cache would have spared it, for its
//! record where a profile is wanted.

use std::collections::{HashMap, HashSet, VecDeque};

/// Bytes of a sector, the unit in which hardware moves global memory.
pub const BYTES: u64 = 32;
/// Sectors of a page: a bit each in [`WORDS`] words.
const PAGE: u64 = 4096;
const WORDS: usize = PAGE as usize / 64;

/// A set of sectors; however often one is touched, it counts once.
#[derive(Clone, Debug, Default)]
pub struct Sectors(HashMap<u64, Box<[u64; WORDS]>>);

impl Sectors {
    /// The sectors of `bytes` bytes from `address` on are touched.
    pub fn touch(&mut self, address: u64, bytes: u64) {
        if bytes == 0 {
            return;
        }
        for sector in address / BYTES..=(address + bytes - 1) / BYTES {
            let page = self.0.entry(sector / PAGE).or_insert_with(|| Box::new([0; WORDS]));
            let bit = sector % PAGE;
            page[bit as usize / 64] |= 1 << (bit % 64);
        }
    }

    /// How many sectors were touched.
    pub fn count(&self) -> u64 {
        self.0.values().flat_map(|page| page.iter()).map(|word| u64::from(word.count_ones())).sum()
    }

    /// Adds the sectors that others touched.
    pub fn merge(&mut self, other: Sectors) {
        for (at, page) in other.0 {
            match self.0.get_mut(&at) {
                Some(own) => own.iter_mut().zip(page.iter()).for_each(|(a, b)| *a |= b),
                None => drop(self.0.insert(at, page)),
            }
        }
    }
}

/// A CTA's share of its SM's first-level cache, by sectors; the oldest one makes room. Lines, sets
/// and what other CTAs bring in are left out.
#[derive(Debug, Default)]
pub struct Cache {
    held: HashSet<u64>,
    order: VecDeque<u64>,
    most: usize,
}

impl Cache {
    /// A cache of so many bytes.
    pub fn new(bytes: u32) -> Cache {
        Cache { most: bytes as usize / BYTES as usize, ..Cache::default() }
    }

    /// Whether a read of this sector has to fetch it; it is held from then on.
    pub fn misses(&mut self, sector: u64) -> bool {
        if !self.held.insert(sector) {
            return false;
        }
        self.order.push_back(sector);
        if self.order.len() > self.most
            && let Some(oldest) = self.order.pop_front()
        {
            self.held.remove(&oldest);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_counts_once_however_often_and_by_whomever_it_is_touched() {
        let (mut one, mut other) = (Sectors::default(), Sectors::default());
        one.touch(31, 2);
        one.touch(0, 4);
        one.touch(7, 0);
        assert_eq!(one.count(), 2);
        // The last sector of a page, the first of the next, and one that both touched.
        other.touch(32 * PAGE - 1, 2);
        other.touch(32, 32);
        one.merge(other);
        assert_eq!(one.count(), 4);
    }

    #[test]
    fn a_cache_forgets_its_oldest_sector() {
        let mut cache = Cache::new(64);
        let misses = [1, 2, 1, 3, 2, 1].map(|sector| cache.misses(sector));
        assert_eq!(misses, [true, true, false, true, false, true]);
        assert!(Cache::new(0).misses(1));
    }
}
