//! multimem: one address, a copy of the memory on each of several devices (PTX ISA, "multimem").
//!
//! Copies are visited in the order of their devices. Sums are rounded after each addition, to the
//! type of the elements or (`.acc::f32`) to f32 and once to their type; hardware's order is not
//! told.

use fathom_ptx::ast::Instruction;
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Flag, Op, Rounding, Type};

use super::atomic::Combine;
use super::load_store::{elements, gather, scatter, strength, target};
use crate::error::Ub;
use crate::exec::arith::cvt::{Format, round};
use crate::exec::arith::float::canon;
use crate::exec::arith::half::HalfFormat;
use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::access::Words;
use crate::machine::checks::global::Strength;
use crate::machine::cx::Cx;
use crate::machine::op::{Class, Step};
use crate::machine::registers::LANES;
use crate::memory::Allocation;

/// What an instruction does with the copies.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Load,
    Store,
    Reduce,
}

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let Some(ty) = ins.mods.types().last() else { return unsupported(mnemonic(ins)) };
    let (kind, address) = match ins.op {
        Opcode::MultimemLdReduce => (Kind::Load, 1),
        Opcode::MultimemSt => (Kind::Store, 0),
        Opcode::MultimemRed => (Kind::Reduce, 0),
        _ => return unsupported(mnemonic(ins)),
    };
    // FP8 is of sm_100.
    if !matches!(ty.bits(), 16 | 32 | 64) || (ty.is_float() && !is_known(ty)) {
        return unsupported(mnemonic(ins));
    }
    let strength = match strength(ins) {
        // A reduction is relaxed where nothing is said.
        Strength::Weak if kind == Kind::Reduce => Strength::Relaxed,
        strength => strength,
    };
    let op = ins.mods.op();
    let wide_sum = ins.mods.has(Flag::AccF32);
    let addr = l.addr(&ins.operands[address])?;
    let list = elements(&ins.operands[1 - address]);
    let (mut targets, mut sources) = (Vec::new(), Vec::new());
    for operand in list {
        match kind {
            Kind::Load => targets.push(target(l, operand, ty)?),
            _ => sources.push(l.src(operand, ty)?),
        }
    }
    let count = list.len();
    let bytes = ty.bytes() as usize * count;
    if bytes > 16 {
        return unsupported(mnemonic(ins));
    }
    l.emit_action(Class::Multimem, move |cx| {
        let addresses = cx.addresses(addr);
        let mut words = match kind {
            Kind::Load => [[0; LANES]; 4],
            _ => gather(cx, &sources, ty),
        };
        for lane in cx.lanes() {
            let one = of_lane(&words, lane);
            let access = Access { kind, op, ty, count, strength, wide_sum };
            match access.run(cx, lane, addresses[lane], bytes, one) {
                Ok(result) => (0..4).for_each(|k| words[k][lane] = result[k]),
                Err(step) => return step,
            }
        }
        for (k, target) in targets.iter().enumerate() {
            scatter(cx, *target, ty, &words, k);
        }
        Step::Next
    });
    Ok(())
}

fn is_known(ty: Type) -> bool {
    use Type::*;
    matches!(ty, F16 | F16x2 | Bf16 | Bf16x2 | F32 | F64)
}

fn of_lane(words: &Words, lane: usize) -> [u32; 4] {
    std::array::from_fn(|k| words[k][lane])
}

/// An access of one lane.
struct Access {
    kind: Kind,
    op: Option<Op>,
    ty: Type,
    count: usize,
    strength: Strength,
    wide_sum: bool,
}

impl Access {
    fn run(
        &self,
        cx: &mut Cx<'_>,
        lane: usize,
        address: u64,
        bytes: usize,
        given: [u32; 4],
    ) -> Result<[u32; 4], Step> {
        let grid = cx.grid;
        if !address.is_multiple_of(bytes as u64) {
            let message = format!("{bytes} bytes of multicast memory");
            return Err(cx.fail(Ub::Misaligned, Some(lane), Some(address), message));
        }
        let Some(range) = grid.view.multicast(address, bytes as u64) else {
            let message = "an address that is no multicast address";
            return Err(cx.fail(Ub::OutOfBounds, Some(lane), Some(address), message));
        };
        let offset = address - range.base();
        let mut sum: Option<Vec<u64>> = None;
        for copy in range.copies() {
            self.order(cx, lane, copy, offset, bytes as u64);
            let mut data = [0; 16];
            match self.kind {
                Kind::Store => copy.store(offset, &bytes_of(given)[..bytes]),
                Kind::Load => {
                    copy.load(offset, &mut data[..bytes]);
                    let found = self.parts(data);
                    sum = Some(match sum {
                        None => found.iter().map(|&v| self.begin(v)).collect(),
                        Some(sum) => sum
                            .iter()
                            .zip(found)
                            .map(|(&s, v)| self.add(s, self.begin(v)))
                            .collect(),
                    });
                }
                Kind::Reduce => {
                    copy.load(offset, &mut data[..bytes]);
                    let (old, new) = (self.parts(data), self.parts(bytes_of(given)));
                    let combined: Vec<u64> =
                        old.iter().zip(new).map(|(&old, new)| self.combine(old, new)).collect();
                    copy.store(offset, &self.join(&combined)[..bytes]);
                }
            }
        }
        if self.kind != Kind::Load {
            *cx.changes += 1;
            return Ok(given);
        }
        let sum: Vec<u64> = sum.unwrap_or_default().into_iter().map(|v| self.end(v)).collect();
        let data = self.join(&sum);
        Ok(std::array::from_fn(|k| {
            u32::from_le_bytes(data[4 * k..4 * k + 4].try_into().expect("4 bytes"))
        }))
    }

    /// Tells the check of order, by the address that other accesses of the copy have.
    fn order(&self, cx: &mut Cx<'_>, lane: usize, copy: &Allocation, offset: u64, bytes: u64) {
        if cx.global.is_none() {
            return;
        }
        let Some(home) = cx.grid.view.home(copy, offset) else { return };
        cx.strength = self.strength;
        if self.kind == Kind::Reduce {
            cx.order_atomic(lane, home, bytes);
        } else {
            let mask = std::mem::replace(&mut cx.mask, 1 << lane);
            cx.order_global(&[home; LANES], bytes, self.kind == Kind::Store);
            cx.mask = mask;
        }
        cx.strength = Strength::Weak;
    }

    /// The elements of what memory holds.
    fn parts(&self, data: [u8; 16]) -> Vec<u64> {
        let width = self.ty.bytes() as usize;
        let part = |k: usize| {
            let mut word = [0; 8];
            word[..width].copy_from_slice(&data[k * width..][..width]);
            u64::from_le_bytes(word)
        };
        (0..self.count).map(part).collect()
    }

    fn join(&self, parts: &[u64]) -> [u8; 16] {
        let width = self.ty.bytes() as usize;
        let mut data = [0; 16];
        for (k, part) in parts.iter().enumerate() {
            data[k * width..][..width].copy_from_slice(&part.to_le_bytes()[..width]);
        }
        data
    }

    fn combine(&self, old: u64, new: u64) -> u64 {
        let op = self.op.unwrap_or(Op::Add);
        Combine { op, ty: self.ty, flush: false }.apply(old, new, 0)
    }

    /// Whether sums are kept as singles, of pairs two in 64 bits.
    fn is_wide(&self) -> bool {
        self.wide_sum && self.op == Some(Op::Add)
    }

    fn half(&self) -> Option<HalfFormat> {
        HalfFormat::of(self.ty)
    }

    fn is_pair(&self) -> bool {
        matches!(self.ty, Type::F16x2 | Type::Bf16x2)
    }

    /// An element as the sum is kept.
    fn begin(&self, element: u64) -> u64 {
        let (true, Some(format)) = (self.is_wide(), self.half()) else { return element };
        let single = |code: u64| u64::from((format.value(code as u16) as f32).to_bits());
        match self.is_pair() {
            true => single(element & 0xffff) | single(element >> 16) << 32,
            false => single(element),
        }
    }

    fn add(&self, sum: u64, element: u64) -> u64 {
        if !self.is_wide() {
            return self.combine(sum, element);
        }
        let single = |a: u64, b: u64| {
            let sum = f32::from_bits(a as u32) + f32::from_bits(b as u32);
            u64::from(canon(sum).to_bits())
        };
        match self.is_pair() {
            true => single(sum, element) | single(sum >> 32, element >> 32) << 32,
            false => single(sum, element),
        }
    }

    fn end(&self, sum: u64) -> u64 {
        let (true, Some(format)) = (self.is_wide(), self.half()) else { return sum };
        let format = if format == HalfFormat::F16 { Format::F16 } else { Format::BF16 };
        let code =
            |bits: u64| round(f64::from(f32::from_bits(bits as u32)), format, Rounding::Rn, false);
        match self.is_pair() {
            true => code(sum) | code(sum >> 32) << 16,
            false => code(sum),
        }
    }
}

fn bytes_of(words: [u32; 4]) -> [u8; 16] {
    let mut data = [0; 16];
    for (to, word) in data.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *to = word.to_le_bytes();
    }
    data
}
