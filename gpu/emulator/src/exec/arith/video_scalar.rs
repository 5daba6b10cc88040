//! Scalar video instructions: a byte, a half-word or a word of each source, extended by its type
//! (PTX ISA, "Scalar Video Instructions").
//!
//! The result is saturated to the part of `d` that it is for, then combined with `c` (add, min,
//! max) or put into `c` in place of that part. Intermediate results are wider than any of them
//! here: the ISA gives them 33 or 34 bits, which only shows where a shift by 32 is not saturated.
//! ptxas takes a third source that is neither combined nor merged, and does nothing with it.

use fathom_ptx::ast::{Instruction, Operand, Selector};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Cmp, Flag, Op, Type};

use super::video::holds;
use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::lane::Lane;
use crate::machine::op::{Class, Step};
use crate::machine::registers::{LANES, Reg};

/// Part of a register: bits and the lowest of them.
#[derive(Clone, Copy)]
struct Part {
    bits: u32,
    shift: u32,
}

const WHOLE: Part = Part { bits: 32, shift: 0 };

impl Part {
    fn of(selector: Selector) -> Part {
        let bits = if selector.halves { 16 } else { 8 };
        Part { bits, shift: bits * u32::from(selector.parts[0]) }
    }

    fn mask(self) -> u32 {
        (u32::MAX >> (32 - self.bits)) << self.shift
    }

    /// The part of a word, extended.
    fn extract(self, word: u32, signed: bool) -> i128 {
        let up = word << (32 - self.bits - self.shift);
        let down = 32 - self.bits;
        if signed { i128::from(up as i32 >> down) } else { i128::from(up >> down) }
    }

    /// The nearest value that the part can hold.
    fn clamp(self, value: i128, signed: bool) -> i128 {
        let range = 1i128 << self.bits;
        match signed {
            true => value.clamp(-range / 2, range / 2 - 1),
            false => value.clamp(0, range - 1),
        }
    }
}

/// A source: its register, which part of it, whether it has a sign and is negated.
#[derive(Clone, Copy)]
struct Source {
    reg: Reg,
    part: Part,
    signed: bool,
    negated: bool,
}

fn source(l: &mut Lower<'_>, operand: &Operand, signed: bool) -> Lowered<Source> {
    let (register, selector, negated) = match operand {
        Operand::Selected(r, selector) => (Operand::Reg(*r), Some(*selector), false),
        Operand::Negated(r, selector) => (Operand::Reg(*r), *selector, true),
        other => (other.clone(), None, false),
    };
    let reg = l.src(&register, Type::B32)?;
    Ok(Source { reg, part: selector.map_or(WHOLE, Part::of), signed, negated })
}

/// What is done with both sources.
#[derive(Clone, Copy)]
enum Action {
    Add,
    Sub,
    AbsoluteDifference,
    Min,
    Max,
    ShiftLeft { wrap: bool },
    ShiftRight { wrap: bool },
    Compare(Cmp),
}

impl Action {
    fn of(ins: &Instruction) -> Option<Action> {
        let wrap = ins.mods.has(Flag::Wrap);
        Some(match ins.op {
            Opcode::Vadd => Action::Add,
            Opcode::Vsub => Action::Sub,
            Opcode::Vabsdiff => Action::AbsoluteDifference,
            Opcode::Vmin => Action::Min,
            Opcode::Vmax => Action::Max,
            Opcode::Vshl => Action::ShiftLeft { wrap },
            Opcode::Vshr => Action::ShiftRight { wrap },
            Opcode::Vset => Action::Compare(ins.mods.cmp()?),
            _ => return None,
        })
    }

    fn on(self, a: i128, b: i128) -> i128 {
        let by = |wrap: bool| if wrap { b & 31 } else { b.min(32) };
        match self {
            Action::Add => a + b,
            Action::Sub => a - b,
            Action::AbsoluteDifference => (a - b).abs(),
            Action::Min => a.min(b),
            Action::Max => a.max(b),
            Action::ShiftLeft { wrap } => a << by(wrap),
            Action::ShiftRight { wrap } => a >> by(wrap),
            Action::Compare(cmp) => i128::from(holds(cmp, a, b)),
        }
    }
}

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    if ins.op == Opcode::Vmad {
        return multiply_add(l, ins);
    }
    let Some(action) = Action::of(ins) else { return unsupported(mnemonic(ins)) };
    // vset has no type of its result, which is unsigned.
    let types: Vec<Type> = ins.mods.types().collect();
    let [.., of_a, of_b] = types[..] else { return unsupported(mnemonic(ins)) };
    let signed = types.len() == 3 && types[0].is_signed();
    let a = source(l, &ins.operands[1], of_a.is_signed())?;
    let b = source(l, &ins.operands[2], of_b.is_signed())?;
    let c = match ins.operands.get(3) {
        Some(operand) => Some(l.src(operand, Type::B32)?),
        None => None,
    };
    let (d, part) = match &ins.operands[0] {
        Operand::Selected(r, selector) => (l.dst(&Operand::Reg(*r))?, Part::of(*selector)),
        other => (l.dst(other)?, WHOLE),
    };
    let (saturate, combine) = (ins.mods.has(Flag::Sat), ins.mods.op());
    if part.bits < 32 && (combine.is_some() || c.is_none()) {
        return unsupported(format!("{} into a part of d", mnemonic(ins)));
    }
    l.emit_action(Class::Alu, move |cx| {
        let (x, y) = (u32::read(cx, a.reg), u32::read(cx, b.reg));
        let c = c.map_or([0; LANES], |c| u32::read(cx, c));
        let one = |i: usize| {
            let result = action.on(a.part.extract(x[i], a.signed), b.part.extract(y[i], b.signed));
            let result = if saturate { part.clamp(result, signed) } else { result };
            let extended = WHOLE.extract(c[i], signed);
            match combine {
                Some(Op::Add) => (result + extended) as u32,
                Some(Op::Min) => result.min(extended) as u32,
                Some(_) => result.max(extended) as u32,
                None => (result as u32) << part.shift & part.mask() | c[i] & !part.mask(),
            }
        };
        u32::write(cx, d, std::array::from_fn(one));
        Step::Next
    });
    Ok(())
}

/// vmad: the ISA's 128 bits, one's complements and a carry in.
fn multiply_add(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let types: Vec<Type> = ins.mods.types().collect();
    let [_, of_a, of_b] = types[..] else { return unsupported(mnemonic(ins)) };
    let a = source(l, &ins.operands[1], of_a.is_signed())?;
    let b = source(l, &ins.operands[2], of_b.is_signed())?;
    let c = source(l, &ins.operands[3], false)?;
    let d = l.dst(&ins.operands[0])?;
    let (plus_one, saturate) = (ins.mods.has(Flag::PlusOne), ins.mods.has(Flag::Sat));
    let scale = match () {
        () if ins.mods.has(Flag::Shr7) => 7,
        () if ins.mods.has(Flag::Shr15) => 15,
        () => 0,
    };
    let negated = a.negated != b.negated;
    if negated && c.negated {
        return unsupported(format!("{} with both product and sum negated", mnemonic(ins)));
    }
    let signed = a.signed || b.signed || negated || c.negated;
    l.emit_action(Class::Alu, move |cx| {
        let [x, y, z] = [a, b, c].map(|s| u32::read(cx, s.reg));
        let one = |i: usize| {
            let product = a.part.extract(x[i], a.signed) * b.part.extract(y[i], b.signed);
            let (product, addend, carry) = match () {
                () if plus_one => (product, z[i], 1),
                () if negated => (!product, z[i], 1),
                () if c.negated => (product, !z[i], 1),
                () => (product, z[i], 0),
            };
            let sum = (product + WHOLE.extract(addend, signed) + carry) >> scale;
            (if saturate { WHOLE.clamp(sum, signed) } else { sum }) as u32
        };
        u32::write(cx, d, std::array::from_fn(one));
        Step::Next
    });
    Ok(())
}
