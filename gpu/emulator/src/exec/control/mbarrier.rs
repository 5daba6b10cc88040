//! mbarrier objects (PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier").

use fathom_ptx::ast::{Instruction, Operand};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Flag, Type};

use crate::error::Ub;
use crate::exec::memory::load_store::space_of;
use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::access::{Addr, Where, window};
use crate::machine::cx::Cx;
use crate::machine::lane::{self, Lane};
use crate::machine::mbarrier::{COUNT, Mbarrier};
use crate::machine::op::{Class, Step};
use crate::machine::registers::{LANES, Reg};
use crate::machine::warp::Wait;

impl Cx<'_> {
    /// Changes the mbarrier at a shared address; `f` says what is wrong, if anything.
    pub fn mbarrier(
        &mut self,
        lane: usize,
        address: u64,
        f: impl FnOnce(&mut Mbarrier) -> Result<(), String>,
    ) -> Result<Mbarrier, Step> {
        let (cta, offset) = self.shared_place(lane, address, 8)?;
        if offset % 8 != 0 {
            let message = "an mbarrier lies at a multiple of 8";
            return Err(self.fail(Ub::Misaligned, Some(lane), Some(address), message));
        }
        self.mbarrier_used(lane, address);
        let memory = &mut self.shared_bytes(cta)[offset..offset + 8];
        let before = Mbarrier::unpack(u64::from_le_bytes(memory.try_into().expect("8 bytes")));
        let mut after = before;
        let outcome =
            if before.valid { f(&mut after) } else { Err("it was not initialised".into()) };
        memory.copy_from_slice(&after.pack().to_le_bytes());
        *self.changes += 1;
        if after.phase != before.phase {
            self.with_sanitizer(|s, _| s.flip(address));
        }
        if let Err(what) = outcome {
            let message = format!("mbarrier {before:?}: {what}");
            return Err(self.fail(Ub::MbarrierMisuse, Some(lane), Some(address), message));
        }
        Ok(before)
    }

    /// Bytes of an asynchronous copy have arrived at the mbarrier.
    pub fn complete_tx(&mut self, lane: usize, address: u64, bytes: u64) -> Result<(), Step> {
        self.with_sanitizer(|s, _| s.completed(address));
        self.mbarrier(lane, address, |b| {
            b.transactions -= bytes as i64;
            if b.transactions < -(COUNT as i64) {
                return Err("its transaction count leaves -(2^20 - 1) to 2^20 - 1".into());
            }
            b.settle();
            Ok(())
        })?;
        Ok(())
    }
}

/// Arrivals that `drop` takes from the coming phases too.
fn arrive(b: &mut Mbarrier, count: u64, expect: u64, drop: bool) -> Result<(), String> {
    b.transactions += expect as i64;
    if b.transactions > COUNT as i64 {
        return Err("its transaction count leaves -(2^20 - 1) to 2^20 - 1".into());
    }
    if b.pending < count {
        return Err(format!("{count} more arrivals than it expects"));
    }
    b.pending -= count;
    if drop {
        b.expected -= count;
    }
    b.settle();
    Ok(())
}

/// Offset of a shared address; generic ones lose their window.
fn shared_address(space: Where, address: u64) -> u64 {
    if space == Where::Generic { address - window(address).1 } else { address }
}

fn each_lane(
    cx: &mut Cx<'_>,
    space: Where,
    addr: Addr,
    mut f: impl FnMut(&mut Cx<'_>, usize, u64) -> Result<(), Step>,
) -> Step {
    let addresses = cx.addresses(addr);
    for lane in cx.lanes() {
        if let Err(step) = f(cx, lane, shared_address(space, addresses[lane])) {
            return step;
        }
    }
    Step::Next
}

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    use Opcode::*;
    match ins.op {
        MbarrierInit | MbarrierInval | MbarrierExpectTx | MbarrierCompleteTx => simple(l, ins),
        MbarrierArrive | MbarrierArriveDrop => lower_arrive(l, ins),
        MbarrierTestWait | MbarrierTryWait => wait(l, ins),
        MbarrierPendingCount => {
            let a = l.src(&ins.operands[1], Type::B64)?;
            let d = l.dst(&ins.operands[0])?;
            l.emit_action(Class::Mbarrier, move |cx| {
                let out = u64::read(cx, a).map(|s| Mbarrier::unpack(s).pending as u32);
                u32::write(cx, d, out);
                Step::Next
            });
            Ok(())
        }
        CpAsyncMbarrierArrive => {
            let space = space_of(l, ins.mods.space(), &ins.operands[0]);
            let addr = l.addr(&ins.operands[0])?;
            let counted = ins.mods.has(Flag::Noinc);
            l.emit_action(Class::Mbarrier, move |cx| {
                cx.copies_arrive();
                each_lane(cx, space, addr, |cx, lane, address| {
                    // Without .noinc the arrival was added to the pending ones first.
                    let count = u64::from(counted);
                    cx.mbarrier_arrived(lane, address);
                    cx.mbarrier(lane, address, |b| arrive(b, count, 0, false)).map(drop)
                })
            });
            Ok(())
        }
        _ => unsupported(mnemonic(ins)),
    }
}

fn simple(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let space = space_of(l, ins.mods.space(), &ins.operands[0]);
    let addr = l.addr(&ins.operands[0])?;
    let value = match ins.operands.get(1) {
        Some(o) => l.src(o, Type::U32)?,
        None => 0,
    };
    let op = ins.op;
    l.emit_action(Class::Mbarrier, move |cx| {
        let values = if op == Opcode::MbarrierInval { [0; LANES] } else { u32::read(cx, value) };
        each_lane(cx, space, addr, |cx, lane, address| {
            let n = u64::from(values[lane]);
            match op {
                Opcode::MbarrierInit => init(cx, lane, address, n),
                Opcode::MbarrierInval => {
                    let end = |b: &mut Mbarrier| {
                        b.valid = false;
                        Ok(())
                    };
                    cx.mbarrier(lane, address, end)?;
                    cx.mbarrier_ended(address);
                    Ok(())
                }
                Opcode::MbarrierExpectTx => {
                    cx.mbarrier(lane, address, |b| arrive(b, 0, n, false)).map(drop)
                }
                _ => cx.complete_tx(lane, address, n),
            }
        })
    });
    Ok(())
}

fn init(cx: &mut Cx<'_>, lane: usize, address: u64, count: u64) -> Result<(), Step> {
    let (cta, offset) = cx.shared_place(lane, address, 8)?;
    if count == 0 || count > COUNT || offset % 8 != 0 {
        let message = format!("mbarrier.init of {count} arrivals at {address:#x}");
        return Err(cx.fail(Ub::MbarrierMisuse, Some(lane), Some(address), message));
    }
    let fresh =
        Mbarrier { expected: count, pending: count, transactions: 0, phase: 0, valid: true };
    cx.mbarrier_initialised(lane, address);
    cx.shared_bytes(cta)[offset..offset + 8].copy_from_slice(&fresh.pack().to_le_bytes());
    *cx.changes += 1;
    Ok(())
}

/// `arrive{.expect_tx} d, [a]{, count or bytes}`; the first operand may be `_`.
fn lower_arrive(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let operands: Vec<&Operand> =
        ins.operands.iter().filter(|o| !matches!(o, Operand::None)).collect();
    let at = operands.iter().position(|o| matches!(o, Operand::Address(_)));
    let Some(at) = at else { return unsupported(mnemonic(ins)) };
    let d = match operands.first() {
        Some(o @ Operand::Reg(_)) => Some(l.dst(o)?),
        _ => None,
    };
    let space = space_of(l, ins.mods.space(), operands[at]);
    let addr = l.addr(operands[at])?;
    let value = match operands.get(at + 1) {
        Some(o) => Some(l.src(o, Type::U32)?),
        None => None,
    };
    let expect = ins.mods.has(Flag::ExpectTx);
    let dropping = ins.op == Opcode::MbarrierArriveDrop;
    let no_complete = ins.mods.has(Flag::NoComplete);
    l.emit_action(Class::Mbarrier, move |cx| {
        let values: Option<[u32; LANES]> = value.map(|v| u32::read(cx, v));
        let mut states = [0; LANES];
        let step = each_lane(cx, space, addr, |cx, lane, address| {
            let n = values.map_or(1, |v| u64::from(v[lane]));
            let (count, bytes) = if expect { (1, n) } else { (n, 0) };
            cx.mbarrier_arrived(lane, address);
            let before = cx.mbarrier(lane, address, |b| {
                if no_complete && b.pending <= count && b.transactions == 0 {
                    return Err("arrive.noComplete that completes the phase".into());
                }
                arrive(b, count, bytes, dropping)
            })?;
            states[lane] = before.pack();
            Ok(())
        });
        if let (Step::Next, Some(d)) = (step, d) {
            u64::write(cx, d, states);
        }
        step
    });
    Ok(())
}

/// `test_wait` and `try_wait`: p = whether the phase of a state, or of a parity, is complete.
fn wait(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let p = match &ins.operands[0] {
        o @ Operand::Reg(_) => l.dst_pred(o)?,
        _ => return unsupported(mnemonic(ins)),
    };
    let space = space_of(l, ins.mods.space(), &ins.operands[1]);
    let addr = l.addr(&ins.operands[1])?;
    let parity = ins.mods.has(Flag::Parity);
    let value = l.src(&ins.operands[2], if parity { Type::U32 } else { Type::B64 })?;
    let tries = ins.op == Opcode::MbarrierTryWait;
    l.emit_action(Class::Mbarrier, move |cx| wait_now(cx, space, addr, (value, parity), p, tries));
    Ok(())
}

fn wait_now(
    cx: &mut Cx<'_>,
    space: Where,
    addr: Addr,
    (value, parity): (Reg, bool),
    p: Reg,
    tries: bool,
) -> Step {
    let addresses = cx.addresses(addr);
    let values = lane::read(cx, value, !parity);
    let mut done = 0;
    let mut missing = None;
    for lane in cx.lanes() {
        let address = shared_address(space, addresses[lane]);
        let before = match peek(cx, lane, address) {
            Ok(b) => b,
            Err(step) => return step,
        };
        let phase = if parity { values[lane] & 1 } else { values[lane] >> 63 };
        if before.phase != phase {
            done |= 1 << lane;
        } else {
            missing = Some((address, phase as u32));
        }
    }
    if let Some((address, parity)) = missing
        && tries
        && !cx.stalled
    {
        return cx.block(Wait::Mbarrier { address, parity });
    }
    for lane in 0..LANES {
        if done >> lane & 1 != 0 {
            cx.mbarrier_waited(lane, shared_address(space, addresses[lane]));
        }
    }
    cx.set_pred(p, done);
    if missing.is_some() { Step::Yield } else { Step::Next }
}

fn peek(cx: &mut Cx<'_>, lane: usize, address: u64) -> Result<Mbarrier, Step> {
    let (cta, offset) = cx.shared_place(lane, address, 8)?;
    cx.mbarrier_used(lane, address);
    let memory = &cx.shared_bytes(cta)[offset..offset + 8];
    let b = Mbarrier::unpack(u64::from_le_bytes(memory.try_into().expect("8 bytes")));
    if !b.valid {
        let message = "a wait on an mbarrier that was not initialised";
        return Err(cx.fail(Ub::MbarrierMisuse, Some(lane), Some(address), message));
    }
    Ok(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_may_come_before_they_are_announced() {
        let mut b = Mbarrier { expected: 1, pending: 1, transactions: 0, phase: 0, valid: true };
        b.transactions -= 4096;
        b.settle();
        assert_eq!(Mbarrier::unpack(b.pack()), b);
        assert_eq!(b.phase, 0);
        arrive(&mut b, 1, 4096, false).unwrap();
        assert_eq!((b.phase, b.pending, b.transactions), (1, 1, 0));
        assert!(arrive(&mut b, 2, 0, false).is_err());
    }
}
