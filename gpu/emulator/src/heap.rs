//! The heap of `malloc` and `free` in kernels: ranges of one allocation a device. Not for
//! `cuMemAlloc`, which is [`crate::memory`]'s.

use std::collections::BTreeMap;

/// Alignment of what `malloc` returns, in bytes.
const ALIGN: u64 = 16;

/// Ranges given out of `base..base + bytes`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heap {
    base: u64,
    bytes: u64,
    /// Bytes that were given out at least once.
    top: u64,
    /// Length of each live range by its address.
    live: BTreeMap<u64, u64>,
    /// Freed ranges by length.
    free: BTreeMap<u64, Vec<u64>>,
}

impl Heap {
    /// A heap over a range of device memory.
    pub fn new(base: u64, bytes: u64) -> Heap {
        Heap { base, bytes, top: 0, live: BTreeMap::new(), free: BTreeMap::new() }
    }

    /// A range of at least `bytes`; 0 where none is left, as C's `malloc` has it. Freed ranges of
    /// the same length come back only with `reuse`.
    pub fn malloc(&mut self, bytes: u64, reuse: bool) -> u64 {
        if bytes == 0 || bytes > self.bytes {
            return 0;
        }
        let length = bytes.next_multiple_of(ALIGN);
        let again = if reuse { self.free.get_mut(&length).and_then(Vec::pop) } else { None };
        let address = match again {
            Some(address) => address,
            None if self.top + length <= self.bytes => {
                self.top += length;
                self.base + self.top - length
            }
            None => return 0,
        };
        self.live.insert(address, length);
        address
    }

    /// Takes a range back; false where nothing live starts there. 0 is allowed.
    pub fn free(&mut self, address: u64) -> bool {
        if address == 0 {
            return true;
        }
        let Some(length) = self.live.remove(&address) else { return false };
        self.free.entry(length).or_default().push(address);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_apart_and_come_back() {
        let mut heap = Heap::new(0x1000, 100);
        let (a, b) = (heap.malloc(1, true), heap.malloc(17, true));
        assert_eq!((a, b), (0x1000, 0x1010));
        assert_eq!((heap.malloc(100, true), heap.malloc(0, true)), (0, 0));
        assert!(heap.free(b) && !heap.free(b) && !heap.free(a + 4) && heap.free(0));
        assert_eq!(heap.malloc(20, true), b);
        assert!(heap.free(b));
        assert_eq!(heap.malloc(20, false), b + 32);
    }
}
