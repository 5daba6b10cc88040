//! Memory of one lane, and the kernel's parameters, which all lanes read.

use super::Words;
use crate::error::Ub;
use crate::machine::cx::Cx;
use crate::machine::op::Step;
use crate::machine::registers::LANES;

impl Cx<'_> {
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

    pub(super) fn load_local(
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

    pub(super) fn store_local(
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

    pub(super) fn load_param(
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
