//! Loads and stores of a warp: addresses of 32 lanes to words, in every state space.
//!
//! Values travel as up to four 32-bit words a lane, low word first; narrower ones lie in the low
//! bits of word 0. Bounds and alignment are checked always: global and shared accesses that fail
//! stop the launch, as on hardware.
//!
//! `unsafe` here is the call of functions compiled for CPU features that were detected.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::cx::Cx;
use super::lane::Lane;
use super::op::Step;
use super::registers::{LANES, Reg};
use crate::error::Ub;
use crate::memory::{CHUNK_BYTES, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW_BYTES};

/// An address operand, `[reg + offset]`, as the machine computes it in each lane.
#[derive(Clone, Copy, Debug)]
pub struct Addr {
    pub reg: Reg,
    /// The register has 64 bits.
    pub wide: bool,
    pub offset: i64,
    /// The base is a shared variable: the CTA's rank is added.
    pub own_shared: bool,
    /// The variable that it points into, where that is known: index into [`super::op::Code`]'s.
    pub object: Option<u16>,
}

/// The space of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Where {
    Global,
    Shared,
    Local,
    Param,
    Generic,
}

/// Up to 16 bytes a lane.
pub type Words = [[u32; LANES]; 4];

/// What the executing lanes address as a whole.
struct Span {
    lo: u64,
    /// End of the highest.
    hi: u64,
    /// Bits that are set in any address.
    all: u64,
}

impl Span {
    /// Of accesses of `bytes` bytes in lanes of which the idle ones are settled.
    #[inline(always)]
    fn of(settled: &[u64; LANES], bytes: u64) -> Span {
        let (mut lo, mut hi, mut all) = (u64::MAX, 0, 0);
        for a in settled {
            lo = lo.min(*a);
            hi = hi.max(*a);
            all |= a;
        }
        Span { lo, hi: hi.saturating_add(bytes), all }
    }
}

/// The addresses, with that of an executing lane in place of those of idle ones: all 32 can then be
/// treated alike.
#[inline(always)]
fn settled(addresses: &[u64; LANES], mask: u32) -> [u64; LANES] {
    if mask == !0 {
        return *addresses;
    }
    let some = addresses[(mask.trailing_zeros() as usize).min(LANES - 1)];
    let mut out = [some; LANES];
    for i in 0..LANES {
        out[i] = if mask >> i & 1 != 0 { addresses[i] } else { some };
    }
    out
}

/// `N` words a lane, from words of which the first lies at `origin`.
#[inline(always)]
fn gather<const N: usize>(
    addresses: &[u64; LANES],
    origin: u64,
    out: &mut Words,
    words: impl Fn(usize) -> [u32; N],
) {
    let mut rows = [[0; N]; LANES];
    for lane in 0..LANES {
        rows[lane] = words((addresses[lane].wrapping_sub(origin) / 4) as usize);
    }
    for k in 0..N {
        for lane in 0..LANES {
            out[k][lane] = rows[lane][k];
        }
    }
}

/// 1 to 16 bytes a lane; `$read` reads as many of the words as are asked for.
macro_rules! gather_bytes {
    ($addresses:expr, $origin:expr, $bytes:expr, $out:expr, $read:ident($words:ident)) => {
        match $bytes {
            4 => gather::<1>($addresses, $origin, $out, |at| $read($words, at)),
            8 => gather::<2>($addresses, $origin, $out, |at| $read($words, at)),
            16 => gather::<4>($addresses, $origin, $out, |at| $read($words, at)),
            bytes => {
                gather::<1>($addresses, $origin, $out, |at| $read($words, at));
                let low = (1u32 << (8 * bytes)) - 1;
                for lane in 0..LANES {
                    let shift = 8 * ($addresses[lane].wrapping_sub($origin) % 4) as u32;
                    $out[0][lane] = $out[0][lane] >> shift & low;
                }
            }
        }
    };
}

/// `N` words from an index on, which the caller has checked.
#[inline(always)]
fn plain_words<const N: usize>(words: &[u32], index: usize) -> [u32; N] {
    *words[index..].first_chunk().expect("the span lies in memory")
}

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

/// Calls the function that is compiled for the machine's vectors, or else the method that both are.
macro_rules! twice {
    ($cx:ident, $simd:ident($($arg:expr),*), $body:ident) => {{
        #[cfg(target_arch = "x86_64")]
        if $cx.grid.simd {
            // SAFETY: `simd` is only set where `alu::available` found every feature.
            return unsafe { $simd($cx, $($arg),*) };
        }
        $cx.$body($($arg),*)
    }};
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512cd,fma,bmi1,bmi2,lzcnt,popcnt")]
fn load_simd(
    cx: &mut Cx<'_>,
    space: Where,
    addresses: &[u64; LANES],
    bytes: u32,
    out: &mut Words,
) -> Result<(), Step> {
    cx.load_body(space, addresses, bytes, out)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512cd,fma,bmi1,bmi2,lzcnt,popcnt")]
fn store_simd(
    cx: &mut Cx<'_>,
    space: Where,
    addresses: &[u64; LANES],
    bytes: u32,
    values: &Words,
) -> Result<(), Step> {
    cx.store_body(space, addresses, bytes, values)
}

impl Cx<'_> {
    /// The addresses of an operand.
    #[inline]
    pub fn addresses(&self, a: Addr) -> [u64; LANES] {
        let mut out = if a.wide {
            <u64 as Lane>::read(self, a.reg)
        } else {
            <u32 as Lane>::read(self, a.reg).map(u64::from)
        };
        let rank = if a.own_shared { u64::from(self.rank()) << 24 } else { 0 };
        let offset = (a.offset as u64).wrapping_add(rank);
        if offset != 0 {
            let wrap = if a.wide { u64::MAX } else { u64::from(u32::MAX) };
            for address in &mut out {
                *address = address.wrapping_add(offset) & wrap;
            }
        }
        out
    }

    /// The address of the first executing lane.
    pub fn address(&self, a: Addr) -> u64 {
        self.addresses(a)[self.leader()]
    }

    /// Reads `bytes` (1 to 16, a power of two) a lane; what idle lanes get means nothing.
    pub fn load(
        &mut self,
        space: Where,
        addresses: &[u64; LANES],
        bytes: u32,
        out: &mut Words,
    ) -> Result<(), Step> {
        twice!(self, load_simd(space, addresses, bytes, out), load_body)
    }

    #[inline(always)]
    fn load_body(
        &mut self,
        space: Where,
        addresses: &[u64; LANES],
        bytes: u32,
        out: &mut Words,
    ) -> Result<(), Step> {
        match space {
            Where::Global => self.load_global(addresses, bytes, out),
            Where::Shared => self.load_shared(addresses, bytes, out),
            Where::Local => self.load_local(addresses, bytes, out),
            Where::Param => self.load_param(addresses, bytes, out),
            Where::Generic => self.by_window(addresses, |cx, space, offsets| {
                let mut part: Words = [[0; LANES]; 4];
                cx.load(space, offsets, bytes, &mut part)?;
                for lane in cx.lanes() {
                    for k in 0..4 {
                        out[k][lane] = part[k][lane];
                    }
                }
                Ok(())
            }),
        }
    }

    /// Writes `bytes` (1 to 16, a power of two) a lane.
    pub fn store(
        &mut self,
        space: Where,
        addresses: &[u64; LANES],
        bytes: u32,
        values: &Words,
    ) -> Result<(), Step> {
        twice!(self, store_simd(space, addresses, bytes, values), store_body)
    }

    #[inline(always)]
    fn store_body(
        &mut self,
        space: Where,
        addresses: &[u64; LANES],
        bytes: u32,
        values: &Words,
    ) -> Result<(), Step> {
        *self.changes += 1;
        match space {
            Where::Global => self.store_global(addresses, bytes, values),
            Where::Shared => self.store_shared(addresses, bytes, values),
            Where::Local => self.store_local(addresses, bytes, values),
            Where::Param => Err(self.fail(
                Ub::OutOfBounds,
                Some(self.leader()),
                Some(addresses[self.leader()]),
                "store to kernel parameters, which are constant",
            )),
            Where::Generic => self
                .by_window(addresses, |cx, space, offsets| cx.store(space, offsets, bytes, values)),
        }
    }

    /// Splits generic addresses by the window they lie in.
    pub fn by_window(
        &mut self,
        addresses: &[u64; LANES],
        mut f: impl FnMut(&mut Self, Where, &[u64; LANES]) -> Result<(), Step>,
    ) -> Result<(), Step> {
        let mask = self.mask;
        let mut left = mask;
        while left != 0 {
            let first = left.trailing_zeros() as usize;
            let (space, base) = window(addresses[first]);
            let mut same = 0;
            let mut offsets = [0; LANES];
            for lane in 0..LANES {
                if left >> lane & 1 != 0 && window(addresses[lane]).0 == space {
                    same |= 1 << lane;
                    offsets[lane] = addresses[lane] - base;
                }
            }
            left &= !same;
            self.mask = same;
            let result = f(self, space, &offsets);
            self.mask = mask;
            result?;
        }
        Ok(())
    }

    fn misaligned(&mut self, addresses: &[u64; LANES], bytes: u64) -> Step {
        let bad = self.lanes().find(|&l| !addresses[l].is_multiple_of(bytes));
        let lane = bad.expect("some lane is misaligned");
        let message =
            format!("an access of {bytes} bytes needs an address that is a multiple of it");
        self.fail(Ub::Misaligned, Some(lane), Some(addresses[lane]), message)
    }

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
    fn load_global(
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
    fn store_global(
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
            if let Some(at) = found.first_unwritten(addresses[lane] - found.base(), bytes) {
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

    /// Counts the wavefronts of a shared access: 32 banks of 4 bytes; lanes that read the same
    /// word share it; 8-byte accesses go by half warps, 16-byte ones by quarters.
    fn count_shared(&mut self, addresses: &[u64; LANES], bytes: u64) {
        if !self.grid.settings.profile {
            return;
        }
        self.stats.shared_requests += 1;
        let phases = (bytes / 4).max(1) as usize;
        let lanes_a_phase = LANES / phases;
        for phase in 0..phases {
            let mut words: Vec<u64> = Vec::with_capacity(LANES);
            for lane in phase * lanes_a_phase..(phase + 1) * lanes_a_phase {
                if self.mask >> lane & 1 != 0 {
                    words.extend((0..phases as u64).map(|k| addresses[lane] / 4 + k));
                }
            }
            words.sort_unstable();
            words.dedup();
            let mut banks = [0u64; 32];
            words.iter().for_each(|w| banks[(w % 32) as usize] += 1);
            let worst = banks.iter().copied().max().unwrap_or(0);
            self.stats.bank_conflicts += worst.saturating_sub(1);
        }
    }

    /// The CTA and byte offset of a shared address of `bytes` bytes.
    pub fn shared_place(
        &mut self,
        lane: usize,
        address: u64,
        bytes: u64,
    ) -> Result<(usize, usize), Step> {
        let rank = (address >> 24) as usize;
        let offset = address & 0x00ff_ffff;
        let end = u64::from(self.grid.shared_end);
        let begin = u64::from(self.grid.preset.shared_bytes_reserved);
        if rank < self.cluster.ctas.len() && offset >= begin && offset + bytes <= end {
            self.was_asked_for(lane, address, bytes);
            return Ok((rank, offset as usize));
        }
        let message = if rank >= self.cluster.ctas.len() {
            let count = self.cluster.ctas.len();
            format!("shared memory of CTA rank {rank} in a cluster of {count}")
        } else {
            format!("{bytes} bytes of shared memory, which spans {begin:#x} to {end:#x}")
        };
        Err(self.fail(Ub::OutOfBounds, Some(lane), Some(address), message))
    }

    /// Reports bytes of shared memory that are there only because it is allocated in whole units.
    fn was_asked_for(&mut self, lane: usize, address: u64, bytes: u64) {
        let end = u64::from(self.grid.shared_asked);
        if (address & 0xff_ffff) + bytes <= end || !self.grid.settings.checks.memory {
            return;
        }
        let message = format!(
            "{bytes} bytes of shared memory, of which the launch asks for no more than up to \
             {end:#x}; hardware has the rest of a unit of 128 bytes"
        );
        self.report(Ub::OutOfBounds, Some(lane), Some(address), message);
    }

    /// The CTA whose shared memory all executing lanes address, where that is one, and their span.
    #[inline(always)]
    fn shared_span(
        &mut self,
        addresses: &[u64; LANES],
        settled: &[u64; LANES],
        bytes: u64,
    ) -> Result<(Option<usize>, Span), Step> {
        let span = Span::of(settled, bytes);
        if span.all & (bytes - 1) != 0 {
            return Err(self.misaligned(addresses, bytes));
        }
        let rank = (span.lo >> 24) as usize;
        let fits = span.lo & 0xff_ffff >= u64::from(self.grid.preset.shared_bytes_reserved)
            && span.hi <= ((rank as u64) << 24) + u64::from(self.grid.shared_end)
            && rank < self.cluster.ctas.len();
        if fits && span.hi & 0xff_ffff > u64::from(self.grid.shared_asked) {
            for lane in self.lanes() {
                self.was_asked_for(lane, addresses[lane], bytes);
            }
        }
        Ok((fits.then_some(rank), span))
    }

    #[inline(always)]
    fn load_shared(
        &mut self,
        addresses: &[u64; LANES],
        bytes: u32,
        out: &mut Words,
    ) -> Result<(), Step> {
        let bytes = u64::from(bytes);
        let settled = settled(addresses, self.mask);
        let (rank, _) = self.shared_span(addresses, &settled, bytes)?;
        self.count_shared(addresses, bytes);
        self.sanitize_shared(addresses, bytes, None)?;
        if let Some(rank) = rank {
            let words = &self.cluster.ctas[rank].shared;
            gather_bytes!(&settled, (rank as u64) << 24, bytes, out, plain_words(words));
            return Ok(());
        }
        self.load_peers(addresses, bytes, out)
    }

    /// Lane by lane, for addresses in several CTAs, or beyond.
    fn load_peers(
        &mut self,
        addresses: &[u64; LANES],
        bytes: u64,
        out: &mut Words,
    ) -> Result<(), Step> {
        for lane in self.lanes() {
            let (cta, offset) = self.shared_place(lane, addresses[lane], bytes)?;
            let words = &self.cluster.ctas[cta].shared;
            let index = offset / 4;
            if bytes >= 4 {
                for k in 0..(bytes / 4) as usize {
                    out[k][lane] = words[index + k];
                }
            } else {
                out[0][lane] = words[index] >> (8 * (offset % 4)) & ((1 << (8 * bytes)) - 1);
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn store_shared(
        &mut self,
        addresses: &[u64; LANES],
        bytes: u32,
        values: &Words,
    ) -> Result<(), Step> {
        let bytes = u64::from(bytes);
        let settled = settled(addresses, self.mask);
        let (rank, Span { lo, hi, .. }) = self.shared_span(addresses, &settled, bytes)?;
        self.count_shared(addresses, bytes);
        self.sanitize_shared(addresses, bytes, Some(values))?;
        if let Some(rank) = rank {
            self.cluster.ctas[rank].touch((lo & 0xff_ffff) as usize, (hi - lo) as usize);
        }
        for lane in self.lanes() {
            let (cta, offset) = match rank {
                Some(rank) => (rank, (addresses[lane] & 0xff_ffff) as usize),
                None => self.shared_place(lane, addresses[lane], bytes)?,
            };
            if rank.is_none() {
                self.cluster.ctas[cta].touch(offset, bytes as usize);
            }
            let words = &mut self.cluster.ctas[cta].shared;
            let index = offset / 4;
            if bytes >= 4 {
                let words = words[index..].iter_mut();
                for (word, value) in words.zip(&values[..(bytes / 4) as usize]) {
                    *word = value[lane];
                }
            } else {
                let shift = 8 * (offset % 4);
                let keep = !(((1u32 << (8 * bytes)) - 1) << shift);
                let value = values[0][lane] << shift & !keep;
                words[index] = words[index] & keep | value;
            }
        }
        Ok(())
    }

    /// All of a CTA's shared memory as bytes.
    pub fn shared_bytes(&mut self, cta: usize) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.cluster.ctas[cta].shared)
    }

    fn local_index(&mut self, lane: usize, address: u64, bytes: u64) -> Result<usize, Step> {
        let end = self.w.local_words as u64 * 4;
        if address + bytes > end {
            let message = format!("{bytes} bytes of local memory, which has {end}");
            return Err(self.fail(Ub::OutOfBounds, Some(lane), Some(address), message));
        }
        if !address.is_multiple_of(bytes) {
            let mut one = [0; LANES];
            one[lane] = address;
            self.mask = 1 << lane;
            return Err(self.misaligned(&one, bytes));
        }
        Ok((address / 4) as usize * LANES + lane)
    }

    fn load_local(
        &mut self,
        addresses: &[u64; LANES],
        bytes: u32,
        out: &mut Words,
    ) -> Result<(), Step> {
        let bytes = u64::from(bytes);
        for lane in self.lanes() {
            let index = self.local_index(lane, addresses[lane], bytes)?;
            if bytes >= 4 {
                for k in 0..(bytes / 4) as usize {
                    out[k][lane] = self.w.local[index + k * LANES];
                }
            } else {
                let shift = 8 * (addresses[lane] % 4);
                out[0][lane] = self.w.local[index] >> shift & ((1 << (8 * bytes)) - 1);
            }
        }
        Ok(())
    }

    fn store_local(
        &mut self,
        addresses: &[u64; LANES],
        bytes: u32,
        values: &Words,
    ) -> Result<(), Step> {
        let bytes = u64::from(bytes);
        for lane in self.lanes() {
            let index = self.local_index(lane, addresses[lane], bytes)?;
            if bytes >= 4 {
                for k in 0..(bytes / 4) as usize {
                    self.w.local[index + k * LANES] = values[k][lane];
                }
            } else {
                let shift = 8 * (addresses[lane] % 4);
                let keep = !(((1u32 << (8 * bytes)) - 1) << shift);
                let word = &mut self.w.local[index];
                *word = *word & keep | values[0][lane] << shift & !keep;
            }
        }
        Ok(())
    }

    fn load_param(
        &mut self,
        addresses: &[u64; LANES],
        bytes: u32,
        out: &mut Words,
    ) -> Result<(), Step> {
        let params = &self.grid.config.params;
        for lane in self.lanes() {
            let at = addresses[lane] as usize;
            let Some(range) = params.get(at..at + bytes as usize) else {
                let message = format!("{bytes} bytes of parameters, which have {}", params.len());
                return Err(self.fail(Ub::OutOfBounds, Some(lane), Some(addresses[lane]), message));
            };
            let mut buffer = [0; 16];
            buffer[..range.len()].copy_from_slice(range);
            for k in 0..4 {
                out[k][lane] = u32::from_le_bytes(buffer[4 * k..4 * k + 4].try_into().expect("4"));
            }
        }
        Ok(())
    }
}

/// End of the 2 MiB chunk that holds an offset.
fn chunk_end(offset: u64) -> u64 {
    (offset / CHUNK_BYTES + 1) * CHUNK_BYTES
}

/// The space that a generic address lies in, and where its window starts.
pub fn window(address: u64) -> (Where, u64) {
    for (start, space) in
        [(SHARED_WINDOW, Where::Shared), (LOCAL_WINDOW, Where::Local), (PARAM_WINDOW, Where::Param)]
    {
        if address.wrapping_sub(start) < WINDOW_BYTES {
            return (space, start);
        }
    }
    (Where::Global, 0)
}
