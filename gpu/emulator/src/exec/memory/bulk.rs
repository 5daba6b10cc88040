//! Bulk copies of plain bytes and asynchronous stores: cp.async.bulk and its reductions, st.async,
//! red.async (PTX ISA, "Data Movement and Conversion Instructions: Bulk copy"). Tensor copies stand
//! in [`tma`](super::tma) and share the helpers here.

use fathom_ptx::ast::{Instruction, Operand};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Flag, Op, Space, Type};

use super::atomic::Combine;
use crate::error::Ub;
use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::access::Addr;
use crate::machine::checks::global::Strength;
use crate::machine::cx::Cx;
use crate::machine::lane::{self, Lane};
use crate::machine::op::{Class, Step};
use crate::machine::registers::LANES;
use crate::memory::{SHARED_WINDOW, WINDOW_BYTES};

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    use Opcode::*;
    match ins.op {
        CpAsyncBulk | CpReduceAsyncBulk => bulk(l, ins),
        CpAsyncBulkCommitGroup => {
            l.emit_action(Class::Tma, |cx| {
                cx.commit_bulk();
                Step::Next
            });
            Ok(())
        }
        CpAsyncBulkWaitGroup => {
            let Some(left) = l.literal(&ins.operands[0]) else { return unsupported(mnemonic(ins)) };
            l.emit_action(Class::Tma, move |cx| {
                cx.wait_bulk(left as usize);
                Step::Next
            });
            Ok(())
        }
        CpAsyncBulkPrefetch | CpAsyncBulkPrefetchTensor => {
            l.emit_action(Class::Tma, |_| Step::Next);
            Ok(())
        }
        StAsync | RedAsync => store_async(l, ins),
        _ => unsupported(mnemonic(ins)),
    }
}

/// A shared address without its generic window.
pub(super) fn shared(address: u64) -> u64 {
    if address.wrapping_sub(SHARED_WINDOW) < WINDOW_BYTES {
        address - SHARED_WINDOW
    } else {
        address
    }
}

/// The operand at a place, if it is there.
pub(super) fn present(ins: &Instruction, i: usize) -> Option<&Operand> {
    ins.operands.get(i).filter(|o| !matches!(o, Operand::None))
}

impl Cx<'_> {
    /// The same offset in each CTA of a multicast mask, or the place itself.
    pub(super) fn copies_of(
        &mut self,
        lane: usize,
        address: u64,
        mask: Option<u64>,
    ) -> Result<Vec<u64>, Step> {
        let Some(mask) = mask else { return Ok(vec![address]) };
        let count = self.cluster.ctas.len();
        if mask == 0 || mask >> count != 0 {
            let message = format!("multicast mask {mask:#x} in a cluster of {count} CTAs");
            return Err(self.fail(Ub::BadDescriptor, Some(lane), Some(address), message));
        }
        let offset = address & 0xff_ffff;
        Ok((0..count as u64).filter(|r| mask >> r & 1 != 0).map(|r| r << 24 | offset).collect())
    }

    pub(super) fn aligned(
        &mut self,
        lane: usize,
        address: u64,
        align: u64,
        what: &str,
    ) -> Result<(), Step> {
        if address.is_multiple_of(align) {
            return Ok(());
        }
        let message = format!("{what} needs an address that is a multiple of {align}");
        Err(self.fail(Ub::Misaligned, Some(lane), Some(address), message))
    }

    /// Writes bytes to shared memory of any CTA of the cluster, as the asynchronous proxy.
    pub(super) fn put_shared(
        &mut self,
        lane: usize,
        address: u64,
        data: &[u8],
        mbarrier: Option<u64>,
    ) -> Result<(), Step> {
        let (cta, offset) = self.shared_place(lane, address, data.len() as u64)?;
        self.async_writes_shared(lane, address, data.len() as u64, mbarrier);
        self.cluster.ctas[cta].touch(offset, data.len());
        self.shared_bytes(cta)[offset..offset + data.len()].copy_from_slice(data);
        *self.changes += 1;
        Ok(())
    }

    /// Reads bytes of this CTA's shared memory, as the asynchronous proxy.
    pub(super) fn get_shared(
        &mut self,
        lane: usize,
        address: u64,
        bytes: u64,
        group: bool,
    ) -> Result<Vec<u8>, Step> {
        let (cta, offset) = self.shared_place(lane, address, bytes)?;
        self.async_reads_shared(lane, address, bytes, group);
        Ok(self.shared_bytes(cta)[offset..offset + bytes as usize].to_vec())
    }
}

/// Combines element-wise what lies at the target with what is copied.
pub(super) fn combine(op: Op, ty: Type, old: &mut [u8], new: &[u8]) {
    let bytes = ty.bytes() as usize;
    let word = |b: &[u8]| b.iter().rev().fold(0u64, |v, &x| v << 8 | u64::from(x));
    let how = Combine { op, ty, flush: false };
    for (old, new) in old.chunks_mut(bytes).zip(new.chunks(bytes)) {
        let value = how.apply(word(old), word(new), 0);
        old.copy_from_slice(&value.to_le_bytes()[..bytes]);
    }
}

/// cp.async.bulk between global memory and shared memory of the cluster.
fn bulk(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let to = l.addr(&ins.operands[0])?;
    let from = l.addr(&ins.operands[1])?;
    let size = l.src(&ins.operands[2], Type::U32)?;
    let spaces: Vec<Space> = ins.mods.spaces().collect();
    let to_global = spaces.first() == Some(&Space::Global);
    let from_global = spaces.get(1) == Some(&Space::Global);
    let barrier = match present(ins, 3) {
        Some(o @ Operand::Address(_)) => Some(l.addr(o)?),
        _ => None,
    };
    let mask = match ins.named("mask") {
        Some(o) if ins.mods.has(Flag::MulticastCluster) => Some(l.src(o, Type::U32)?),
        _ => None,
    };
    if ins.mods.has(Flag::CpMask) {
        return unsupported(mnemonic(ins));
    }
    let reduce = match (ins.op, ins.mods.op(), ins.mods.types().last()) {
        (Opcode::CpReduceAsyncBulk, Some(op), Some(ty)) => Some((op, ty)),
        _ => None,
    };
    l.emit_action(Class::Tma, move |cx| {
        let (targets, sources) = (cx.addresses(to), cx.addresses(from));
        let sizes = u32::read(cx, size);
        let barriers = barrier.map(|b| cx.addresses(b));
        let masks = mask.map(|m| u32::read(cx, m));
        for lane in cx.lanes() {
            let n = u64::from(sizes[lane]);
            let one = Bulk {
                lane,
                bytes: n,
                to: targets[lane],
                from: sources[lane],
                barrier: barriers.map(|b| shared(b[lane])),
                mask: masks.map(|m| u64::from(m[lane] & 0xffff)),
            };
            if to_global {
                cx.within_one(from, lane, one.from, n)
            } else {
                cx.within_one(to, lane, one.to, n)
            }
            if let Err(step) = one.run(cx, to_global, from_global, reduce) {
                return step;
            }
        }
        Step::Next
    });
    Ok(())
}

struct Bulk {
    lane: usize,
    bytes: u64,
    to: u64,
    from: u64,
    barrier: Option<u64>,
    mask: Option<u64>,
}

impl Bulk {
    fn run(
        &self,
        cx: &mut Cx<'_>,
        to_global: bool,
        from_global: bool,
        reduce: Option<(Op, Type)>,
    ) -> Result<(), Step> {
        let (lane, n) = (self.lane, self.bytes);
        for (address, what) in [(self.to, "the target"), (self.from, "the source")] {
            cx.aligned(lane, address, 16, &format!("{what} of a bulk copy"))?;
        }
        cx.aligned(lane, n, 16, "the size of a bulk copy")?;
        let data = if from_global {
            let mut data = vec![0; n as usize];
            cx.read_global(lane, self.from, &mut data)?;
            cx.stats.tma_bytes_read += n;
            data
        } else {
            cx.get_shared(lane, shared(self.from), n, to_global)?
        };
        if to_global {
            cx.stats.tma_bytes_written += n;
            let data = match reduce {
                Some((op, ty)) => {
                    let mut old = vec![0; n as usize];
                    cx.strength = Strength::Relaxed;
                    cx.read_global(lane, self.to, &mut old)?;
                    combine(op, ty, &mut old, &data);
                    old
                }
                None => data,
            };
            let outcome = cx.write_global(lane, self.to, &data);
            cx.strength = Strength::Weak;
            return outcome;
        }
        let targets = cx.copies_of(lane, shared(self.to), self.mask)?;
        for target in targets {
            let at = self.barrier.map(|barrier| match self.mask {
                Some(_) => target & !0xff_ffff | barrier & 0xff_ffff,
                None => barrier,
            });
            match reduce {
                Some((op, ty)) => {
                    let (cta, offset) = cx.shared_place(lane, target, n)?;
                    let mut old = cx.shared_bytes(cta)[offset..offset + n as usize].to_vec();
                    combine(op, ty, &mut old, &data);
                    cx.put_shared(lane, target, &old, at)?;
                }
                None => cx.put_shared(lane, target, &data, at)?,
            }
            if let Some(at) = at {
                cx.complete_tx(lane, at, n)?;
            }
        }
        Ok(())
    }
}

/// st.async and red.async: into shared memory of the cluster, with a transaction on an mbarrier.
fn store_async(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let ty = ins.mods.types().last().unwrap_or(Type::B32);
    let to = l.addr(&ins.operands[0])?;
    let Some(barrier) = ins.operands.get(2) else { return unsupported(mnemonic(ins)) };
    let barrier: Addr = l.addr(barrier)?;
    let sources: Vec<Operand> = match &ins.operands[1] {
        Operand::Vector(list) => list.to_vec(),
        one => vec![one.clone()],
    };
    let mut regs = Vec::new();
    for o in &sources {
        regs.push(l.src(o, ty)?);
    }
    let reduce = if ins.op == Opcode::RedAsync { ins.mods.op() } else { None };
    let (bytes, wide) = (ty.bytes() as usize, ty.bits() == 64);
    l.emit_action(Class::Tma, move |cx| {
        let (targets, barriers) = (cx.addresses(to), cx.addresses(barrier));
        let values: Vec<[u64; LANES]> = regs.iter().map(|&r| lane::read(cx, r, wide)).collect();
        for lane in cx.lanes() {
            let target = shared(targets[lane]);
            let mut data = Vec::new();
            for v in &values {
                data.extend_from_slice(&v[lane].to_le_bytes()[..bytes]);
            }
            let n = data.len() as u64;
            let outcome = (|| {
                cx.aligned(lane, target, n, "an asynchronous store")?;
                if let Some(op) = reduce {
                    let (cta, offset) = cx.shared_place(lane, target, n)?;
                    let mut old = cx.shared_bytes(cta)[offset..offset + n as usize].to_vec();
                    combine(op, ty, &mut old, &data);
                    data = old;
                }
                let at = shared(barriers[lane]);
                cx.put_shared(lane, target, &data, Some(at))?;
                cx.complete_tx(lane, at, n)
            })();
            if let Err(step) = outcome {
                return step;
            }
        }
        Step::Next
    });
    Ok(())
}
