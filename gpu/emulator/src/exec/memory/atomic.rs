//! Atomic read-modify-write: atom and red. Lanes take effect in lane order.

use fathom_ptx::ast::{Instruction, Operand};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Op, Rounding, Type};

use super::load_store::{space_of, strength};
use crate::error::Ub;
use crate::exec::arith::cvt::{Format, round};
use crate::exec::arith::float::{canon, flush};
use crate::exec::arith::half::HalfFormat;
use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::access::{Where, window};
use crate::machine::cx::Cx;
use crate::machine::lane::{self, Lane};
use crate::machine::op::{Class, Step};
use crate::machine::registers::{LANES, Reg};

impl Cx<'_> {
    /// Replaces `bytes` (up to 16) at an address by a function of them; returns the old ones.
    pub fn modify(
        &mut self,
        space: Where,
        lane: usize,
        address: u64,
        bytes: usize,
        f: impl FnOnce(u128) -> u128,
    ) -> Result<u128, Step> {
        let (space, address) = match space {
            Where::Generic => {
                let (space, base) = window(address);
                (space, address - base)
            }
            other => (other, address),
        };
        if address % bytes as u64 != 0 {
            let message = format!("an atomic of {bytes} bytes");
            return Err(self.fail(Ub::Misaligned, Some(lane), Some(address), message));
        }
        let mut buffer = [0; 16];
        let old;
        match space {
            Where::Global => {
                let Some(found) = self.grid.view.locate(address, bytes as u64).cloned() else {
                    return Err(self.global_fault(lane, address, bytes as u64));
                };
                self.with_sanitizer(|s, who| s.atomic(who.warp));
                self.order_atomic(lane, address, bytes as u64);
                let offset = address - found.base();
                found.load(offset, &mut buffer[..bytes]);
                old = u128::from_le_bytes(buffer);
                let new = f(old);
                if new != old {
                    *self.changes += 1;
                }
                found.store(offset, &new.to_le_bytes()[..bytes]);
            }
            Where::Shared => {
                let (cta, offset) = self.shared_place(lane, address, bytes as u64)?;
                self.cluster.ctas[cta].touch(offset, bytes);
                self.sanitize_atomic(lane, address, bytes as u64);
                let memory = &mut self.shared_bytes(cta)[offset..offset + bytes];
                buffer[..bytes].copy_from_slice(memory);
                old = u128::from_le_bytes(buffer);
                let new = f(old);
                memory.copy_from_slice(&new.to_le_bytes()[..bytes]);
                if new != old {
                    *self.changes += 1;
                }
            }
            _ => {
                let message = "an atomic outside of global and shared memory";
                return Err(self.fail(Ub::OutOfBounds, Some(lane), Some(address), message));
            }
        }
        Ok(old)
    }
}

/// How an atomic or a reduction combines what memory holds with what it brings.
#[derive(Clone, Copy, Debug)]
pub struct Combine {
    pub op: Op,
    pub ty: Type,
    /// Subnormals of f32 sums are flushed (global memory).
    pub flush: bool,
}

impl Combine {
    /// The new value of one element.
    pub fn apply(self, old: u64, b: u64, c: u64) -> u64 {
        let bits = self.ty.bits();
        if matches!(self.ty, Type::F16x2 | Type::Bf16x2) {
            let one =
                Combine { ty: if self.ty == Type::F16x2 { Type::F16 } else { Type::Bf16 }, ..self };
            let low = one.apply(old & 0xffff, b & 0xffff, 0);
            return low | one.apply(old >> 16 & 0xffff, b >> 16 & 0xffff, 0) << 16;
        }
        if self.ty.is_float() && matches!(self.op, Op::Add | Op::Min | Op::Max) {
            return self.float(old, b);
        }
        let shift = 64 - bits.min(64);
        let signed = |v: u64| (v << shift) as i64 >> shift;
        let new = match self.op {
            Op::Exch => b,
            Op::Cas => {
                if old == b {
                    c
                } else {
                    old
                }
            }
            Op::And => old & b,
            Op::Or => old | b,
            Op::Xor => old ^ b,
            Op::Add => old.wrapping_add(b),
            Op::Inc => {
                if old >= b {
                    0
                } else {
                    old + 1
                }
            }
            Op::Dec => {
                if old == 0 || old > b {
                    b
                } else {
                    old - 1
                }
            }
            Op::Min if self.ty.is_signed() => signed(old).min(signed(b)) as u64,
            Op::Max if self.ty.is_signed() => signed(old).max(signed(b)) as u64,
            Op::Min => old.min(b),
            _ => old.max(b),
        };
        if bits >= 64 { new } else { new & ((1 << bits) - 1) }
    }

    fn float(self, old: u64, b: u64) -> u64 {
        match self.ty {
            Type::F64 => (f64::from_bits(old) + f64::from_bits(b)).to_bits(),
            Type::F32 if self.op == Op::Add => {
                let (x, y) = (f32::from_bits(old as u32), f32::from_bits(b as u32));
                let sum = if self.flush { flush(flush(x) + flush(y)) } else { x + y };
                u64::from(canon(sum).to_bits())
            }
            _ => {
                let kind = HalfFormat::of(self.ty).unwrap_or(HalfFormat::F16);
                let (x, y) = (kind.value(old as u16), kind.value(b as u16));
                let v = match self.op {
                    // A sum of two 16-bit values that f64 does not hold exactly is decided by
                    // the larger one alone.
                    Op::Add => x + y,
                    Op::Min if x.is_nan() || y < x => y,
                    Op::Max if x.is_nan() || y > x => y,
                    _ => x,
                };
                let format = if kind == HalfFormat::F16 { Format::F16 } else { Format::BF16 };
                round(v, format, Rounding::Rn, false)
            }
        }
    }
}

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let returns = ins.op == Opcode::Atom;
    let first = usize::from(returns);
    let (Some(op), Some(ty)) = (ins.mods.op(), ins.mods.types().last()) else {
        return unsupported(mnemonic(ins));
    };
    let space = space_of(l, ins.mods.space(), &ins.operands[first]);
    let addr = l.addr(&ins.operands[first])?;
    let list = |o: &Operand| match o {
        Operand::Vector(list) => list.to_vec(),
        one => vec![one.clone()],
    };
    let mut b = Vec::new();
    for operand in list(&ins.operands[first + 1]) {
        b.push(l.src(&operand, ty)?);
    }
    let c = match (op, ins.operands.get(first + 2)) {
        (Op::Cas, Some(o)) => l.src(o, ty)?,
        _ => b[0],
    };
    let mut d: Vec<Option<Reg>> = Vec::new();
    if returns {
        for operand in list(&ins.operands[0]) {
            let sink = matches!(operand, Operand::Sink);
            d.push(if sink { None } else { Some(l.dst(&operand)?) });
        }
    }
    let strength = strength(ins);
    if ty.bits() == 128 {
        return atom128(l, op, space, addr, [d.first().copied().flatten().unwrap_or(0), b[0], c]);
    }
    let wide = ty.bits() == 64;
    let bytes = ty.bytes() as usize;
    l.emit_action(Class::Atomic, move |cx| {
        let addresses = cx.addresses(addr);
        cx.within(addr, &addresses, (bytes * b.len()) as u64);
        let b: Vec<[u64; LANES]> = b.iter().map(|&r| lane::read(cx, r, wide)).collect();
        let c = lane::read(cx, c, wide);
        let mut out = vec![[0; LANES]; b.len()];
        for lane in cx.lanes() {
            for (k, b) in b.iter().enumerate() {
                let address = addresses[lane] + (k * bytes) as u64;
                let global = space == Where::Global
                    || space == Where::Generic && window(address).0 == Where::Global;
                let combine = Combine { op, ty, flush: global };
                cx.strength = strength;
                let old = cx.modify(space, lane, address, bytes, |old| {
                    u128::from(combine.apply(old as u64, b[lane], c[lane]))
                });
                match old {
                    Ok(old) => out[k][lane] = old as u64,
                    Err(step) => return step,
                }
            }
        }
        for (d, out) in d.iter().zip(out) {
            if let Some(d) = *d {
                lane::write(cx, d, wide, out);
            }
        }
        Step::Next
    });
    Ok(())
}

fn atom128(
    l: &mut Lower<'_>,
    op: Op,
    space: Where,
    addr: crate::machine::access::Addr,
    [d, b, c]: [Reg; 3],
) -> Lowered {
    l.emit_action(Class::Atomic, move |cx| {
        let addresses = cx.addresses(addr);
        let pair = |cx: &Cx<'_>, r: Reg, lane: usize| {
            u128::from(u64::read(cx, r + 1)[lane]) << 64 | u128::from(u64::read(cx, r)[lane])
        };
        let mut out = [[0; LANES]; 2];
        for lane in cx.lanes() {
            let (b, c) = (pair(cx, b, lane), pair(cx, c, lane));
            let new = move |old| match op {
                Op::Cas if old == b => c,
                Op::Cas => old,
                _ => b,
            };
            match cx.modify(space, lane, addresses[lane], 16, new) {
                Ok(old) => {
                    out[0][lane] = old as u64;
                    out[1][lane] = (old >> 64) as u64;
                }
                Err(step) => return step,
            }
        }
        u64::write(cx, d, out[0]);
        u64::write(cx, d + 1, out[1]);
        Step::Next
    });
    Ok(())
}
