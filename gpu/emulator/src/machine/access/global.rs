//! Global memory: allocations of the device, in words that all threads share.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::{Layout, Span, Words, gather, gather_bytes, layout, settled};
use crate::error::Ub;
use crate::machine::cx::Cx;
use crate::machine::op::Step;
use crate::machine::registers::LANES;
use crate::memory::CHUNK_BYTES;

#[inline(always)]
fn atomic_words<const N: usize>(words: &[AtomicU32], index: usize) -> [u32; N] {
    let words: &[AtomicU32; N] = words[index..].first_chunk().expect("the span lies in memory");
    let mut out = [0; N];
    for k in 0..N {
        out[k] = words[k].load(Relaxed);
    }
    out
}

/// Overwrites the bits of `mask`.
fn merge(word: &AtomicU32, value: u32, mask: u32) {
    if mask == !0 {
        word.store(value, Relaxed);
    } else {
        let merged = |old: u32| Some(old & !mask | value & mask);
        word.fetch_update(Relaxed, Relaxed, merged).expect("always Some");
    }
}

/// End of the 2 MiB chunk that holds an offset.
fn chunk_end(offset: u64) -> u64 {
    (offset / CHUNK_BYTES + 1) * CHUNK_BYTES
}

impl Cx<'_> {
    /// The fault for the first lane whose range is in no live allocation.
    fn unmapped(&mut self, addresses: &[u64; LANES], bytes: u64) -> Step {
        let view = &self.grid.view;
        let bad = self.lanes().find(|&l| view.locate(addresses[l], bytes).is_none());
        let lane = bad.expect("some lane is out of bounds");
        self.global_fault(lane, addresses[lane], bytes)
    }

    /// The fault for a range that is in no live allocation.
    pub fn global_fault(&mut self, lane: usize, address: u64, bytes: u64) -> Step {
        let view = self.grid.view.clone();
        let nearest = view.nearest(address);
        let freed = view.find(address).is_some_and(|a| a.is_freed());
        let kind = if freed { Ub::UseAfterFree } else { Ub::OutOfBounds };
        let message = format!("{bytes} bytes of global memory");
        let step = self.fail(kind, Some(lane), Some(address), message);
        if let Some(fault) = &mut self.fault {
            fault.allocation = Some(nearest);
        }
        step
    }

    #[inline(always)]
    pub(super) fn load_global(
        &mut self,
        addresses: &[u64; LANES],
        bytes: u32,
        out: &mut Words,
    ) -> Result<(), Step> {
        let bytes = u64::from(bytes);
        let settled = settled(addresses, self.mask);
        let Span { lo, hi, all } = Span::of(&settled, bytes);
        if all & (bytes - 1) != 0 {
            return Err(self.misaligned(addresses, bytes));
        }
        self.count_global(addresses, bytes, false);
        self.order_global(addresses, bytes, false);
        let grid = self.grid;
        if let Some(found) = grid.view.locate_near(self.place(), lo, hi - lo) {
            let start = lo - found.base();
            if grid.settings.checks.uninit {
                self.check_written(addresses, bytes);
            }
            let Some((words, first)) = found.words(start) else {
                if start + (hi - lo) <= chunk_end(start) {
                    *out = [[0; LANES]; 4];
                    return Ok(());
                }
                return self.load_lanes(addresses, bytes, out);
            };
            let origin = found.base() + first;
            if hi - origin <= words.len() as u64 * 4 {
                gather_bytes!(&settled, origin, bytes, out, atomic_words(words));
                return Ok(());
            }
        }
        self.load_lanes(addresses, bytes, out)
    }

    /// Where the present operation remembers which allocation it met last.
    fn place(&mut self) -> &mut u32 {
        &mut self.w.places[self.pc as usize % crate::machine::warp::PLACES]
    }

    /// Lane by lane, for addresses in several allocations or chunks.
    fn load_lanes(
        &mut self,
        addresses: &[u64; LANES],
        bytes: u64,
        out: &mut Words,
    ) -> Result<(), Step> {
        let view = &self.grid.view;
        for lane in self.lanes() {
            let Some(found) = view.locate(addresses[lane], bytes) else {
                return Err(self.unmapped(addresses, bytes));
            };
            let mut buffer = [0; 16];
            found.load(addresses[lane] - found.base(), &mut buffer[..bytes as usize]);
            for k in 0..bytes.div_ceil(4) as usize {
                out[k][lane] = u32::from_le_bytes(buffer[4 * k..4 * k + 4].try_into().expect("4"));
            }
        }
        Ok(())
    }

    #[inline(always)]
    pub(super) fn store_global(
        &mut self,
        addresses: &[u64; LANES],
        bytes: u32,
        values: &Words,
    ) -> Result<(), Step> {
        let bytes = u64::from(bytes);
        let Span { lo, hi, all } = Span::of(&settled(addresses, self.mask), bytes);
        if all & (bytes - 1) != 0 {
            return Err(self.misaligned(addresses, bytes));
        }
        self.count_global(addresses, bytes, true);
        self.order_global(addresses, bytes, true);
        let grid = self.grid;
        if let Some(found) = grid.view.locate_near(self.place(), lo, hi - lo)
            && !found.tracked()
        {
            let (words, first) = found.words_mut(lo - found.base());
            let origin = found.base() + first;
            if hi - origin <= words.len() as u64 * 4 {
                self.scatter(addresses, origin, bytes, values, words);
                return Ok(());
            }
        }
        self.store_lanes(addresses, bytes, values)
    }

    /// Stores to words of which the first lies at `origin`. Neighbours that write parts of one word
    /// write it together.
    #[inline(always)]
    fn scatter(
        &self,
        addresses: &[u64; LANES],
        origin: u64,
        bytes: u64,
        values: &Words,
        words: &[AtomicU32],
    ) {
        if bytes == 4 && self.mask == !0 && matches!(layout(addresses), Layout::Run) {
            let first = (addresses[0].wrapping_sub(origin) / 4) as usize;
            for (word, value) in words[first..].iter().zip(&values[0]) {
                word.store(*value, Relaxed);
            }
            return;
        }
        if bytes >= 4 {
            for lane in self.lanes() {
                let index = (addresses[lane].wrapping_sub(origin) / 4) as usize;
                for (word, value) in words[index..].iter().zip(&values[..(bytes / 4) as usize]) {
                    word.store(value[lane], Relaxed);
                }
            }
            return;
        }
        let low = (1u32 << (8 * bytes)) - 1;
        let (mut at, mut value, mut mask) = (0, 0, 0);
        for lane in self.lanes() {
            let offset = addresses[lane].wrapping_sub(origin);
            let (index, shift) = ((offset / 4) as usize, 8 * (offset % 4) as u32);
            if index != at && mask != 0 {
                merge(&words[at], value, mask);
                mask = 0;
            }
            let own = low << shift;
            (at, mask) = (index, mask | own);
            value = value & !own | values[0][lane] << shift & own;
        }
        if mask != 0 {
            merge(&words[at], value, mask);
        }
    }

    /// Lane by lane, for addresses in several allocations or chunks, or whose writes are tracked.
    fn store_lanes(
        &mut self,
        addresses: &[u64; LANES],
        bytes: u64,
        values: &Words,
    ) -> Result<(), Step> {
        for lane in self.lanes() {
            let Some(found) = self.grid.view.locate(addresses[lane], bytes) else {
                return Err(self.unmapped(addresses, bytes));
            };
            let mut buffer = [0; 16];
            for k in 0..4 {
                buffer[4 * k..4 * k + 4].copy_from_slice(&values[k][lane].to_le_bytes());
            }
            found.store(addresses[lane] - found.base(), &buffer[..bytes as usize]);
        }
        Ok(())
    }

    fn check_written(&mut self, addresses: &[u64; LANES], bytes: u64) {
        for lane in self.lanes() {
            let Some(found) = self.grid.view.locate(addresses[lane], bytes) else { continue };
            let offset = addresses[lane] - found.base();
            let idle = |at: u64| self.idle_bytes.checked_shr((at - offset) as u32).unwrap_or(0) & 1;
            let end = offset + bytes;
            let mut unwritten = found.first_unwritten(offset, bytes);
            while let Some(at) = unwritten.filter(|&at| idle(at) != 0) {
                unwritten = found.first_unwritten(at + 1, end - at - 1);
            }
            if let Some(at) = unwritten {
                let about = format!("{at} bytes into {}", found.describe());
                let address = Some(found.base() + at);
                let message = "global memory that nobody wrote".to_owned();
                self.report_about(Ub::Uninitialized, Some(lane), address, Some(about), message);
                return;
            }
        }
    }

    /// Reads a range of global memory for an asynchronous copy.
    pub fn read_global(&mut self, lane: usize, address: u64, out: &mut [u8]) -> Result<(), Step> {
        let grid = self.grid;
        let Some(found) = grid.view.locate(address, out.len() as u64) else {
            return Err(self.global_fault(lane, address, out.len() as u64));
        };
        if grid.settings.checks.uninit {
            let mut one = [0; LANES];
            one[lane] = address;
            let mask = std::mem::replace(&mut self.mask, 1 << lane);
            self.check_written(&one, out.len() as u64);
            self.mask = mask;
        }
        self.copied(address, out.len() as u64, false);
        self.order_range(lane, address, out.len() as u64, false);
        found.load(address - found.base(), out);
        Ok(())
    }

    /// Writes a range of global memory for an asynchronous copy.
    pub fn write_global(&mut self, lane: usize, address: u64, data: &[u8]) -> Result<(), Step> {
        *self.changes += 1;
        let grid = self.grid;
        let Some(found) = grid.view.locate(address, data.len() as u64) else {
            return Err(self.global_fault(lane, address, data.len() as u64));
        };
        self.copied(address, data.len() as u64, true);
        self.order_range(lane, address, data.len() as u64, true);
        found.store(address - found.base(), data);
        Ok(())
    }

    /// Counts what an asynchronous copy read or wrote.
    pub fn copied(&mut self, address: u64, bytes: u64, write: bool) {
        let (total, sectors) = if write {
            (&mut self.stats.global_bytes_written, &mut self.stats.sectors_written)
        } else {
            self.stats.copied_bytes += bytes;
            (&mut self.stats.global_bytes_read, &mut self.stats.sectors_read)
        };
        *total += bytes;
        if self.grid.settings.profile {
            sectors.touch(address, bytes);
        }
    }

    fn count_global(&mut self, addresses: &[u64; LANES], bytes: u64, write: bool) {
        if !self.grid.settings.profile {
            return;
        }
        let mut sectors = [0; LANES * 2];
        let mut n = 0;
        for lane in self.lanes() {
            sectors[n] = addresses[lane] / 32;
            sectors[n + 1] = (addresses[lane] + bytes - 1) / 32;
            n += 2;
        }
        sectors[..n].sort_unstable();
        let distinct = 1 + sectors[..n].windows(2).filter(|w| w[0] != w[1]).count();
        self.stats.global_transactions += 1;
        self.stats.global_sectors += distinct as u64;
        let total = bytes * u64::from(self.mask.count_ones());
        let touched = if write {
            self.stats.global_bytes_written += total;
            &mut self.stats.sectors_written
        } else {
            self.stats.global_bytes_read += total;
            &mut self.stats.sectors_read
        };
        let cache = &mut self.cluster.ctas[self.cta].cache;
        for same in sectors[..n].chunk_by(|a, b| a == b) {
            touched.touch(same[0] * 32, 1);
            if !write && cache.misses(same[0]) {
                self.stats.fetched_sectors += 1;
            }
        }
    }
}
