//! Liveness, and slots for registers: a PTX function may name 40,000 registers of which a few
//! hundred are live at once.

use fathom_ptx::ast::{Base, Body, Instruction, Operand, RegId, Statement};
use fathom_ptx::table::{Opcode, OperandKind};
use fathom_ptx::types::Type;

use super::cfg::Cfg;
use crate::machine::registers::{Reg, SINK_SLOTS, WIDE};

/// Where each register of a function lies, and how large its frame is.
#[derive(Clone, Debug, Default)]
pub struct Registers {
    /// First slot, or number of the predicate, of each register.
    pub slot: Vec<Reg>,
    /// Slots of either file up to the last register; temporaries follow.
    pub slots: u32,
    pub wide_slots: u32,
    pub predicates: u32,
    /// Most registers live at one place, in units of 32 bits.
    pub pressure: u32,
}

fn registers_in(operand: &Operand, out: &mut Vec<RegId>) {
    match operand {
        Operand::Reg(r)
        | Operand::Component(r, _)
        | Operand::Selected(r, _)
        | Operand::Negated(r, _)
        | Operand::Not(r) => out.push(*r),
        Operand::Vector(list) => list.iter().for_each(|o| registers_in(o, out)),
        Operand::List(list) => list.iter().for_each(|o| registers_in(o, out)),
        Operand::Address(a) => out.extend(base_register(&a.base)),
        Operand::Tensor(a, list) => {
            out.extend(base_register(&a.base));
            list.iter().for_each(|o| registers_in(o, out));
        }
        Operand::Pair(a, b) => {
            registers_in(a, out);
            registers_in(b, out);
        }
        _ => {}
    }
}

/// The registers of an operand as the program names them: what the sanitizers go by, since a slot
/// serves one register after another.
pub fn names(operand: &Operand) -> Vec<u32> {
    let mut registers = Vec::new();
    registers_in(operand, &mut registers);
    registers.into_iter().map(|r| r.index() as u32).collect()
}

fn base_register(base: &Base) -> Option<RegId> {
    if let Base::Reg(r) = base { Some(*r) } else { None }
}

/// Registers that an instruction writes and reads, as the slots of its form say.
pub fn effects(ins: &Instruction) -> (Vec<RegId>, Vec<RegId>) {
    let (mut defs, mut uses) = (Vec::new(), Vec::new());
    uses.extend(ins.guard.map(|g| g.reg));
    if let Some(call) = ins.call() {
        call.returns.iter().for_each(|o| registers_in(o, &mut defs));
        call.args.iter().chain([call.target]).for_each(|o| registers_in(o, &mut uses));
    }
    for (slot, operand) in ins.form.form().slots.iter().zip(&ins.operands) {
        let written = slot.kind == OperandKind::Dst;
        if written {
            registers_in(operand, &mut defs);
        }
        if !written || slot.read_too {
            registers_in(operand, &mut uses);
        }
    }
    (defs, uses)
}

/// Whether each register is read anywhere in a function.
pub fn read(body: &Body) -> Vec<bool> {
    let mut read = vec![false; body.registers.len()];
    for (_, ins) in body.instructions() {
        effects(ins).1.into_iter().for_each(|r| read[r.index()] = true);
    }
    read
}

/// Units of 32 bits that a register of this type takes; 0 for predicates.
pub fn width(ty: Type) -> u32 {
    match ty.bits() {
        1 => 0,
        b if b <= 32 => 1,
        64 => 2,
        _ => 4,
    }
}

type Bits = Vec<u64>;

fn set(bits: &mut Bits, i: usize) {
    bits[i / 64] |= 1 << (i % 64);
}

fn has(bits: &Bits, i: usize) -> bool {
    bits[i / 64] >> (i % 64) & 1 != 0
}

/// Live ranges in statement order, as (first, last) positions; defs at odd, uses at even ones.
fn ranges(body: &Body, cfg: &Cfg) -> Vec<Option<(u32, u32)>> {
    let n = body.registers.len();
    let words = n.div_ceil(64);
    let blocks = cfg.blocks.len();
    let mut reads = vec![vec![0u64; words]; blocks];
    let mut kills = vec![vec![0u64; words]; blocks];
    let mut out: Vec<Option<(u32, u32)>> = vec![None; n];
    let widen = |out: &mut Vec<Option<(u32, u32)>>, r: usize, at: u32| {
        let (a, b) = out[r].unwrap_or((at, at));
        out[r] = Some((a.min(at), b.max(at)));
    };
    for (b, block) in cfg.blocks.iter().enumerate() {
        for s in block.start..block.end {
            let Statement::Instruction(ins) = &body.statements[s] else { continue };
            let (defs, uses) = effects(ins);
            for r in uses {
                if !has(&kills[b], r.index()) {
                    set(&mut reads[b], r.index());
                }
                widen(&mut out, r.index(), 2 * s as u32);
            }
            for r in defs {
                // A guarded write leaves the other lanes as they were.
                if ins.guard.is_none() {
                    set(&mut kills[b], r.index());
                } else if !has(&kills[b], r.index()) {
                    set(&mut reads[b], r.index());
                }
                widen(&mut out, r.index(), 2 * s as u32 + 1);
            }
        }
    }
    let mut live_in = reads.clone();
    let mut live_out = vec![vec![0u64; words]; blocks];
    let mut changed = true;
    while changed {
        changed = false;
        for b in (0..blocks).rev() {
            for s in 0..cfg.blocks[b].successors.len() {
                let successor = cfg.blocks[b].successors[s];
                for w in 0..words {
                    let new = live_in[successor][w] & !live_out[b][w];
                    if new != 0 {
                        live_out[b][w] |= new;
                        let into = new & !kills[b][w] & !live_in[b][w];
                        live_in[b][w] |= into;
                        changed = true;
                    }
                }
            }
        }
    }
    for (b, block) in cfg.blocks.iter().enumerate() {
        for (live, at) in
            [(&live_in[b], 2 * block.start as u32), (&live_out[b], 2 * block.end as u32 - 1)]
        {
            for w in 0..words {
                let mut word = live[w];
                while word != 0 {
                    widen(&mut out, w * 64 + word.trailing_zeros() as usize, at);
                    word &= word - 1;
                }
            }
        }
    }
    hold_until_committed(body, &mut out);
    out
}

/// A wgmma is computed when its group is committed: its registers keep their slots until then,
/// whether anything reads them later or not.
fn hold_until_committed(body: &Body, ranges: &mut [Option<(u32, u32)>]) {
    let mut until = 2 * body.statements.len() as u32;
    for (s, statement) in body.statements.iter().enumerate().rev() {
        let Statement::Instruction(ins) = statement else { continue };
        if ins.op == Opcode::WgmmaCommitGroup {
            until = 2 * s as u32;
        }
        if !ins.op.is_wgmma() {
            continue;
        }
        for operand in ins.operands.iter().take(2) {
            for r in names(operand) {
                if let Some((_, last)) = &mut ranges[r as usize] {
                    *last = until.max(*last);
                }
            }
        }
    }
}

/// Assigns slots by linear scan over the live ranges.
pub fn allocate(body: &Body, cfg: &Cfg) -> Registers {
    let ranges = ranges(body, cfg);
    let mut order: Vec<usize> = (0..ranges.len()).filter(|&r| ranges[r].is_some()).collect();
    order.sort_by_key(|&r| ranges[r]);
    // One pool a width: predicates, registers of 32 bits, of 64, of 128.
    let mut pools = [const { Pool::new() }; 4];
    let mut place = vec![(0usize, 0u32); ranges.len()];
    let (mut live, mut pressure) = (0u32, 0u32);
    let mut ends: std::collections::BinaryHeap<std::cmp::Reverse<(u32, usize)>> =
        Default::default();
    for r in order {
        let (start, end) = ranges[r].expect("only registers with a range");
        while let Some(&std::cmp::Reverse((last, other))) = ends.peek() {
            if last >= start {
                break;
            }
            ends.pop();
            let (pool, index) = place[other];
            pools[pool].free.push(index);
            live -= width(body.registers[other].ty);
        }
        let slots = width(body.registers[r].ty);
        let pool = match slots {
            0 => 0,
            1 => 1,
            2 => 2,
            _ => 3,
        };
        place[r] = (pool, pools[pool].take());
        live += slots;
        pressure = pressure.max(live);
        ends.push(std::cmp::Reverse((end, r)));
    }
    let (n32, n64, n128) = (pools[1].count, pools[2].count, pools[3].count);
    let slot = place.iter().map(|&(pool, index)| match pool {
        0 => index as Reg,
        1 => (SINK_SLOTS + index) as Reg,
        2 => (SINK_SLOTS + index) as Reg | WIDE,
        _ => (SINK_SLOTS + n64 + 2 * index) as Reg | WIDE,
    });
    Registers {
        slot: slot.collect(),
        slots: SINK_SLOTS + n32,
        wide_slots: SINK_SLOTS + n64 + 2 * n128,
        predicates: pools[0].count,
        pressure,
    }
}

struct Pool {
    free: Vec<u32>,
    count: u32,
}

impl Pool {
    const fn new() -> Pool {
        Pool { free: Vec::new(), count: 0 }
    }

    fn take(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.count += 1;
            self.count - 1
        })
    }
}
