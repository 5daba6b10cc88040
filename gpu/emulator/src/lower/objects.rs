//! Which variable in shared or local memory a register points into, where one can tell.
//!
//! A register that is computed from the address of exactly one variable points into it: compilers
//! do not step from one variable into another. Copies of different origin make it unknown.

use fathom_ptx::ast::{Body, Instruction, Module, Operand, Symbol};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::Space;

use super::registers::effects;

/// What a register points into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Points {
    /// Nothing that writes the register has been looked at yet.
    #[default]
    Unset,
    /// A number without a known origin.
    Plain,
    /// An address inside this variable.
    To(Symbol),
    /// One of several variables, or of unknown ones: nothing can be held against it.
    Many,
}

impl Points {
    /// Of a sum: an address and numbers.
    fn sum(self, other: Points) -> Points {
        use Points::*;
        match (self, other) {
            (Unset | Plain, x) => x,
            (x, Unset | Plain) => x,
            (To(a), To(b)) if a == b => self,
            _ => Many,
        }
    }

    /// Of one or the other.
    fn either(self, other: Points) -> Points {
        use Points::*;
        match (self, other) {
            (Unset, x) | (x, Unset) => x,
            (a, b) if a == b => a,
            _ => Many,
        }
    }
}

/// What each register of a body points into.
pub fn points(body: &Body, module: &Module) -> Vec<Points> {
    let mut out = vec![Points::Unset; body.registers.len()];
    let list: Vec<_> = body
        .instructions()
        .map(|(_, ins)| (ins, effects(ins).0))
        .filter(|i| !i.1.is_empty())
        .collect();
    // The lattice has four levels: this ends soon.
    loop {
        let mut changed = false;
        for (ins, defs) in &list {
            let value = result(ins, &out, body, module);
            for d in defs {
                let new = out[d.index()].either(value);
                changed |= new != out[d.index()];
                out[d.index()] = new;
            }
        }
        if !changed {
            return out;
        }
    }
}

fn result(ins: &Instruction, known: &[Points], body: &Body, module: &Module) -> Points {
    use Opcode::*;
    let of = |o: &Operand| operand(o, known, body, module);
    let sources = ins.operands.iter().skip(1);
    match ins.op {
        Add | Sub | Mad | Mov | Cvt | Cvta | Mapa | Or | And | Shfl => {
            sources.map(of).fold(Points::Unset, Points::sum)
        }
        Selp => ins.operands[1..3].iter().map(of).fold(Points::Unset, Points::either),
        _ => Points::Plain,
    }
}

fn operand(o: &Operand, known: &[Points], body: &Body, module: &Module) -> Points {
    match o {
        Operand::Reg(r) => known[r.index()],
        Operand::Symbol(symbol, _) => {
            let variable = match symbol {
                Symbol::Variable(v) => &module.variables[v.index()],
                Symbol::Local(v) => &body.variables[v.index()],
                _ => return Points::Many,
            };
            let held = matches!(
                variable.space,
                Space::Shared | Space::SharedCta | Space::SharedCluster | Space::Local
            );
            if held && variable.bytes() > 0 { Points::To(*symbol) } else { Points::Many }
        }
        _ => Points::Plain,
    }
}
