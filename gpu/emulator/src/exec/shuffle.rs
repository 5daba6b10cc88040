//! Exchange between the lanes of a warp: shfl, vote, match, redux, activemask, elect.

use fathom_ptx::ast::{Instruction, Operand};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Flag, Op, Type};

use super::mov;
use crate::lower::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::cx::{Cx, PRED_SINK};
use crate::machine::lane::{LANES, Lane, Reg};
use crate::machine::op::{Class, Step};

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    match ins.op {
        Opcode::Shfl => shfl(l, ins),
        Opcode::Vote => vote(l, ins),
        Opcode::Match => matching(l, ins),
        Opcode::Redux => redux(l, ins),
        Opcode::Activemask => {
            let d = l.dst(&ins.operands[0])?;
            l.emit_action(Class::Vote, move |cx| {
                let mask = cx.mask;
                mov::broadcast(cx, d, false, u64::from(mask));
                Step::Next
            });
            Ok(())
        }
        Opcode::Elect => elect(l, ins),
        _ => unsupported(mnemonic(ins)),
    }
}

/// Destination and optional predicate `d|p`.
fn pair(l: &mut Lower<'_>, operand: &Operand, sink: Reg) -> Lowered<(Reg, Reg)> {
    Ok(match operand {
        Operand::Pair(d, p) => (l.dst(d)?, l.dst_pred(p)?),
        d => (l.dst(d)?, sink),
    })
}

/// Runs `f` for the executing lanes that name one member mask after the other; lanes of a warp may
/// name several, each the lanes it exchanges with. `f` sees the lanes of one in `cx.mask`.
pub fn by_members(cx: &mut Cx<'_>, mask: Option<Reg>, f: impl Fn(&mut Cx<'_>, u32)) -> Step {
    let all = cx.mask;
    let named = match mask {
        Some(reg) => u32::read(cx, reg),
        None => [all; LANES],
    };
    let needed = cx.lanes().fold(0, |m, lane| m | named[lane]);
    if let Some(step) = cx.converge(needed) {
        return step;
    }
    let mut left = all;
    while left != 0 {
        let members = named[left.trailing_zeros() as usize];
        cx.mask = left;
        cx.mask = cx.lanes().filter(|&lane| named[lane] == members).fold(0, |m, i| m | 1 << i);
        left &= !cx.mask;
        cx.are_members(members);
        f(cx, members);
    }
    cx.mask = all;
    Step::Next
}

fn shfl(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let (d, p) = pair(l, &ins.operands[0], PRED_SINK)?;
    let a = l.src(&ins.operands[1], Type::B32)?;
    let b = l.src(&ins.operands[2], Type::B32)?;
    let c = l.src(&ins.operands[3], Type::B32)?;
    let mask = match ins.operands.get(4) {
        Some(o) => Some(l.src(o, Type::B32)?),
        None => None,
    };
    let mode = ins
        .mods
        .flags()
        .find(|f| matches!(f, Flag::Up | Flag::Down | Flag::Bfly | Flag::Idx))
        .unwrap_or(Flag::Idx);
    l.emit_action(Class::Shuffle, move |cx| {
        // What a lane reads does not depend on its mask; one may be read and written at once.
        let (x, b, c) = (u32::read(cx, a), u32::read(cx, b), u32::read(cx, c));
        let (mut out, mut valid) = ([0; LANES], 0);
        for lane in 0..LANES {
            let (from, ok) = source(mode, lane as u32, b[lane], c[lane]);
            out[lane] = x[from as usize];
            valid |= u32::from(ok) << lane;
        }
        by_members(cx, mask, |cx, _| {
            u32::write(cx, d, out);
            cx.set_pred(p, valid);
        })
    });
    Ok(())
}

/// The lane read, and whether it is in range (PTX ISA, "shfl.sync", pseudo-code).
fn source(mode: Flag, lane: u32, b: u32, c: u32) -> (u32, bool) {
    let (b, segment, clamp) = (b & 31, c >> 8 & 31, c & 31);
    let high = lane & segment | clamp & !segment;
    let low = lane & segment;
    let (j, ok) = match mode {
        Flag::Up => {
            let j = lane as i32 - b as i32;
            (j, j >= high as i32)
        }
        Flag::Down => ((lane + b) as i32, lane + b <= high),
        Flag::Bfly => ((lane ^ b) as i32, (lane ^ b) <= high),
        _ => {
            let j = low | b & !segment;
            (j as i32, j <= high)
        }
    };
    (if ok { j as u32 & 31 } else { lane }, ok)
}

fn vote(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let ballot = ins.mods.has(Flag::Ballot);
    let (d, p) = match &ins.operands[0] {
        o if ballot => (l.dst(o)?, PRED_SINK),
        o => (0, l.dst_pred(o)?),
    };
    let (a, negated) = l.pred(&ins.operands[1])?;
    let mask = match ins.operands.get(2) {
        Some(o) => Some(l.src(o, Type::B32)?),
        None => None,
    };
    let (all, any) = (ins.mods.has(Flag::All), ins.mods.has(Flag::Any));
    l.emit_action(Class::Vote, move |cx| {
        by_members(cx, mask, |cx, need| {
            let who = cx.mask & need;
            let yes = (cx.pred(a) ^ if negated { !0 } else { 0 }) & who;
            if ballot {
                mov::broadcast(cx, d, false, u64::from(yes));
                return;
            }
            let result = match (all, any) {
                (true, _) => yes == who,
                (_, true) => yes != 0,
                _ => yes == who || yes == 0,
            };
            cx.set_pred(p, if result { !0 } else { 0 });
        })
    });
    Ok(())
}

fn matching(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let (d, p) = pair(l, &ins.operands[0], PRED_SINK)?;
    let ty = ins.mods.ty(0).unwrap_or(Type::B32);
    let wide = ty.bits() == 64;
    let a = l.src(&ins.operands[1], ty)?;
    let mask = l.src(&ins.operands[2], Type::B32)?;
    let all = ins.mods.has(Flag::All);
    l.emit_action(Class::Vote, move |cx| {
        by_members(cx, Some(mask), |cx, need| {
            let who = cx.mask & need;
            let value = mov::read(cx, a, wide);
            let equal_to = |x: u64| {
                (0..LANES).fold(0u32, |m, i| m | u32::from(who >> i & 1 != 0 && value[i] == x) << i)
            };
            if all {
                let same = equal_to(value[cx.leader()]) == who;
                mov::broadcast(cx, d, false, if same { u64::from(who) } else { 0 });
                cx.set_pred(p, if same { !0 } else { 0 });
            } else {
                let out = std::array::from_fn(|i| equal_to(value[i]));
                u32::write(cx, d, out);
            }
        })
    });
    Ok(())
}

fn redux(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let d = l.dst(&ins.operands[0])?;
    let a = l.src(&ins.operands[1], Type::B32)?;
    let mask = l.src(&ins.operands[2], Type::B32)?;
    let (Some(op), Some(ty)) = (ins.mods.op(), ins.mods.ty(0)) else {
        return unsupported(mnemonic(ins));
    };
    if ty == Type::F32 {
        return unsupported(mnemonic(ins));
    }
    let signed = ty.is_signed();
    l.emit_action(Class::Vote, move |cx| {
        let combine = |x: u32, y: u32| match op {
            Op::Add => x.wrapping_add(y),
            Op::And => x & y,
            Op::Or => x | y,
            Op::Xor => x ^ y,
            Op::Min if signed => (x as i32).min(y as i32) as u32,
            Op::Max if signed => (x as i32).max(y as i32) as u32,
            Op::Min => x.min(y),
            _ => x.max(y),
        };
        by_members(cx, Some(mask), |cx, _| {
            let value = u32::read(cx, a);
            let result = cx.lanes().map(|i| value[i]).reduce(combine).expect("a lane executes");
            mov::broadcast(cx, d, false, u64::from(result));
        })
    });
    Ok(())
}

fn elect(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let Operand::Pair(d, p) = &ins.operands[0] else { return unsupported(mnemonic(ins)) };
    let sink = matches!(**d, Operand::Sink);
    let (d, p) = (l.dst(d)?, l.dst_pred(p)?);
    let mask = l.src(&ins.operands[1], Type::B32)?;
    l.emit_action(Class::Vote, move |cx| {
        by_members(cx, Some(mask), |cx, need| {
            let leader = (need & cx.mask).trailing_zeros();
            if !sink {
                mov::broadcast(cx, d, false, u64::from(leader));
            }
            cx.set_pred(p, 1u32.checked_shl(leader).unwrap_or(0));
        })
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_of_a_shuffle() {
        assert_eq!(source(Flag::Bfly, 5, 16, 31), (21, true));
        assert_eq!(source(Flag::Up, 1, 2, 0), (1, false));
        assert_eq!(source(Flag::Up, 9, 2, 0), (7, true));
        assert_eq!(source(Flag::Down, 30, 4, 31), (30, false));
        // Segments of eight lanes.
        assert_eq!(source(Flag::Idx, 13, 2, 0x181f), (10, true));
        assert_eq!(source(Flag::Down, 14, 2, 0x181f), (14, false));
    }
}
