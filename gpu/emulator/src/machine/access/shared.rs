//! Shared memory: that of the warp's own CTA and of the others of its cluster.

use super::{Layout, Span, Words, gather, gather_bytes, layout, settled};
use crate::error::Ub;
use crate::machine::cx::Cx;
use crate::machine::op::Step;
use crate::machine::registers::LANES;

/// `N` words from an index on, which the caller has checked.
#[inline(always)]
fn plain_words<const N: usize>(words: &[u32], index: usize) -> [u32; N] {
    *words[index..].first_chunk().expect("the span lies in memory")
}

impl Cx<'_> {
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
    pub(super) fn load_shared(
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
    pub(super) fn store_shared(
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
            let cta = &mut self.cluster.ctas[rank];
            let first = (lo & 0xff_ffff) as usize;
            cta.touch(first, (hi - lo) as usize);
            if bytes == 4 && self.mask == !0 && matches!(layout(&settled), Layout::Run) {
                cta.shared[first / 4..][..LANES].copy_from_slice(&values[0]);
                return Ok(());
            }
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
}
