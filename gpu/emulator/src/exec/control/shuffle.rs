//! Exchange between the lanes of a warp: shfl, vote, match, redux, activemask, elect.

use fathom_ptx::ast::{Instruction, Operand};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Flag, Op, Type};

use super::members::exchange;
use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::cx::{Cx, PRED_SINK};
use crate::machine::lane::{self, Lane};
use crate::machine::meeting::{Answer, Brought};
use crate::machine::op::{Class, Step};
use crate::machine::registers::{LANES, Reg};

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
                lane::broadcast(cx, d, false, u64::from(mask));
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
    let bring = move |cx: &Cx<'_>| Brought {
        words: [u32::read(cx, a), u32::read(cx, b), u32::read(cx, c)],
        predicate: 0,
    };
    // What a lane reads does not depend on its mask.
    let answer = move |brought: &Brought, _, _| {
        let [x, b, c] = &brought.words;
        let mut answer = Answer::default();
        for lane in 0..LANES {
            let (from, ok) = source(mode, lane as u32, b[lane], c[lane]);
            answer.word[lane] = x[from as usize];
            answer.predicate |= u32::from(ok) << lane;
        }
        answer
    };
    exchange(l, ins, Class::Shuffle, mask, bring, answer, move |cx, answer| {
        u32::write(cx, d, answer.word);
        cx.set_pred(p, answer.predicate);
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
    let bring = move |cx: &Cx<'_>| {
        let predicate = cx.pred(a) ^ if negated { !0 } else { 0 };
        Brought { words: [[0; LANES]; 3], predicate }
    };
    let answer = move |brought: &Brought, who: u32, members: u32| {
        let who = who & members;
        let yes = brought.predicate & who;
        let holds = match (all, any) {
            (true, _) => yes == who,
            (_, true) => yes != 0,
            _ => yes == who || yes == 0,
        };
        Answer { word: [yes; LANES], predicate: if holds { !0 } else { 0 } }
    };
    exchange(l, ins, Class::Vote, mask, bring, answer, move |cx, answer| {
        if ballot {
            u32::write(cx, d, answer.word);
        } else {
            cx.set_pred(p, answer.predicate);
        }
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
    let bring = move |cx: &Cx<'_>| {
        let value = lane::read(cx, a, wide);
        let halves = [value.map(|v| v as u32), value.map(|v| (v >> 32) as u32)];
        Brought { words: [halves[0], halves[1], [0; LANES]], predicate: 0 }
    };
    let answer = move |brought: &Brought, who: u32, members: u32| {
        let who = who & members;
        let [low, high, _] = &brought.words;
        let equal_to = |other: usize| {
            let equal = |i: usize| low[i] == low[other] && high[i] == high[other];
            (0..LANES).fold(0u32, |m, i| m | u32::from(who >> i & 1 != 0 && equal(i)) << i)
        };
        if all {
            let first = who.trailing_zeros() as usize % LANES;
            let same = equal_to(first) == who;
            let [word, predicate] = if same { [who, !0] } else { [0; 2] };
            return Answer { word: [word; LANES], predicate };
        }
        Answer { word: std::array::from_fn(equal_to), predicate: 0 }
    };
    exchange(l, ins, Class::Vote, Some(mask), bring, answer, move |cx, answer| {
        u32::write(cx, d, answer.word);
        if all {
            cx.set_pred(p, answer.predicate);
        }
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
    let combine = move |x: u32, y: u32| match op {
        Op::Add => x.wrapping_add(y),
        Op::And => x & y,
        Op::Or => x | y,
        Op::Xor => x ^ y,
        Op::Min if signed => (x as i32).min(y as i32) as u32,
        Op::Max if signed => (x as i32).max(y as i32) as u32,
        Op::Min => x.min(y),
        _ => x.max(y),
    };
    let bring = move |cx: &Cx<'_>| Brought {
        words: [u32::read(cx, a), [0; LANES], [0; LANES]],
        predicate: 0,
    };
    let answer = move |brought: &Brought, who: u32, _| {
        let values = (0..LANES).filter(|lane| who >> lane & 1 != 0).map(|i| brought.words[0][i]);
        let result = values.reduce(combine).expect("a lane executes");
        Answer { word: [result; LANES], predicate: 0 }
    };
    exchange(l, ins, Class::Vote, Some(mask), bring, answer, move |cx, answer| {
        u32::write(cx, d, answer.word);
    });
    Ok(())
}

fn elect(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let Operand::Pair(d, p) = &ins.operands[0] else { return unsupported(mnemonic(ins)) };
    let sink = matches!(**d, Operand::Sink);
    let (d, p) = (l.dst(d)?, l.dst_pred(p)?);
    let mask = l.src(&ins.operands[1], Type::B32)?;
    let answer = |_: &Brought, who: u32, members: u32| {
        let leader = (who & members).trailing_zeros();
        Answer { word: [leader; LANES], predicate: 1u32.checked_shl(leader).unwrap_or(0) }
    };
    exchange(
        l,
        ins,
        Class::Vote,
        Some(mask),
        |_| Brought::NOTHING,
        answer,
        move |cx, answer| {
            if !sink {
                u32::write(cx, d, answer.word);
            }
            cx.set_pred(p, answer.predicate);
        },
    );
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
