//! Instructions that touch registers of wgmmas whose group is not committed yet.
//!
//! ptxas gives every read of an accumulator the value after the product, and every write comes
//! after it, wherever they stand: it injects the wait (C7517) or serialises the wgmmas (C7513,
//! C7515). Here products are computed when their group is committed, so the emulator has to
//! compute them before such an instruction.

use std::collections::BTreeMap;

use fathom_ptx::ast::{Body, Instruction, RegId, Statement};
use fathom_ptx::table::Opcode;

use super::cfg::Cfg;
use super::registers::{effects, names};

/// Registers of issued wgmmas, as sets of numbers of the body's wgmma registers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Open {
    /// Accumulators: neither read nor written by others.
    accumulators: Vec<u64>,
    /// A's registers: not written.
    inputs: Vec<u64>,
}

/// The body's registers that wgmmas use, numbered.
struct Numbers(BTreeMap<u32, usize>);

impl Numbers {
    fn empty(&self) -> Open {
        let blank = vec![0; self.0.len().div_ceil(64)];
        Open { accumulators: blank.clone(), inputs: blank }
    }

    fn any_in(&self, registers: &[RegId], set: &[u64]) -> bool {
        let numbers = registers.iter().filter_map(|r| self.0.get(&(r.index() as u32)));
        numbers.into_iter().any(|&n| set[n / 64] >> (n % 64) & 1 != 0)
    }

    fn add(&self, registers: &[u32], set: &mut [u64]) {
        for n in registers.iter().filter_map(|r| self.0.get(r)) {
            set[n / 64] |= 1 << (n % 64);
        }
    }

    /// Whether the products must be computed before this instruction.
    fn clashes(&self, ins: &Instruction, open: &Open) -> bool {
        let (defs, uses) = effects(ins);
        match ins.op {
            op if op.is_wgmma() => {
                let a: Vec<RegId> = names(&ins.operands[1]).into_iter().map(RegId).collect();
                self.any_in(&a, &open.accumulators)
            }
            Opcode::Call | Opcode::Ret => open.accumulators.iter().any(|&word| word != 0),
            _ => {
                self.any_in(&defs, &open.accumulators)
                    || self.any_in(&uses, &open.accumulators)
                    || self.any_in(&defs, &open.inputs)
            }
        }
    }

    /// What is open behind this instruction.
    fn step(&self, ins: &Instruction, open: &mut Open) {
        let ends = matches!(ins.op, Opcode::WgmmaCommitGroup | Opcode::WgmmaWaitGroup);
        if ends || self.clashes(ins, open) {
            *open = self.empty();
        }
        if ins.op.is_wgmma() {
            self.add(&names(&ins.operands[0]), &mut open.accumulators);
            self.add(&names(&ins.operands[1]), &mut open.inputs);
        }
    }
}

impl Open {
    /// Adds what is open on another path; whether that was new.
    fn join(&mut self, other: &Open) -> bool {
        let mut new = false;
        let pairs = self.accumulators.iter_mut().zip(&other.accumulators);
        for (to, from) in pairs.chain(self.inputs.iter_mut().zip(&other.inputs)) {
            new |= from & !*to != 0;
            *to |= from;
        }
        new
    }
}

/// The statements before which issued wgmmas must be computed.
pub fn statements(body: &Body, cfg: &Cfg) -> Vec<bool> {
    let mut numbers = Numbers(BTreeMap::new());
    for (_, ins) in body.instructions().filter(|(_, i)| i.op.is_wgmma()) {
        for register in ins.operands.iter().take(2).flat_map(names) {
            let next = numbers.0.len();
            numbers.0.entry(register).or_insert(next);
        }
    }
    let mut early = vec![false; body.statements.len()];
    let mut entry = vec![numbers.empty(); cfg.blocks.len()];
    let mut queue: Vec<usize> = (0..cfg.blocks.len()).rev().collect();
    while let Some(b) = queue.pop() {
        let block = &cfg.blocks[b];
        let mut open = entry[b].clone();
        for s in block.start..block.end {
            let Statement::Instruction(ins) = &body.statements[s] else { continue };
            early[s] |= numbers.clashes(ins, &open);
            numbers.step(ins, &mut open);
        }
        for &next in &block.successors {
            if entry[next].join(&open) && !queue.contains(&next) {
                queue.push(next);
            }
        }
    }
    early
}
