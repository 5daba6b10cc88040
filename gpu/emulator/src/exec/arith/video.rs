//! SIMD video instructions: two half-words or four bytes at a time (PTX ISA, "SIMD Video
//! Instructions").
//!
//! Each source is two or four elements chosen from both registers `a` and `b`; the elements that
//! the mask of `d` names are results, the others those of `c`, or the results are added to `c`.

use fathom_ptx::ast::{Instruction, Operand, Selector};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Cmp, Flag, Op, Type};

use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::lane::Lane;
use crate::machine::op::{Class, Step};
use crate::machine::registers::LANES;

/// Whether a comparison of whole numbers holds.
pub(super) fn holds<T: Ord>(cmp: Cmp, a: T, b: T) -> bool {
    match cmp {
        Cmp::Eq => a == b,
        Cmp::Ne => a != b,
        Cmp::Lt => a < b,
        Cmp::Le => a <= b,
        Cmp::Gt => a > b,
        _ => a >= b,
    }
}

/// What is done with a pair of elements.
#[derive(Clone, Copy)]
enum Action {
    Add,
    Sub,
    Average,
    AbsoluteDifference,
    Min,
    Max,
    Compare(Cmp),
}

/// An instruction with its selectors.
#[derive(Clone, Copy)]
struct Video {
    action: Action,
    /// Elements of a register.
    count: usize,
    /// Whether the elements of each source and of the result have a sign.
    signed: [bool; 2],
    result_signed: bool,
    saturate: bool,
    accumulate: bool,
    /// Which of the eight bytes or four half-words of a and b are the elements, lowest first.
    chosen: [[u8; 4]; 2],
    /// The elements that are written.
    mask: [bool; 4],
}

impl Action {
    fn of(ins: &Instruction) -> Option<Action> {
        use Opcode::*;
        Some(match ins.op {
            Vadd2 | Vadd4 => Action::Add,
            Vsub2 | Vsub4 => Action::Sub,
            Vavrg2 | Vavrg4 => Action::Average,
            Vabsdiff2 | Vabsdiff4 => Action::AbsoluteDifference,
            Vmin2 | Vmin4 => Action::Min,
            Vmax2 | Vmax4 => Action::Max,
            Vset2 | Vset4 => Action::Compare(ins.mods.cmp()?),
            _ => return None,
        })
    }

    fn on(self, a: i32, b: i32) -> i32 {
        match self {
            Action::Add => a + b,
            Action::Sub => a - b,
            // To the nearest, halves away from zero.
            Action::Average => (a + b + i32::from(a + b >= 0)) >> 1,
            Action::AbsoluteDifference => (a - b).abs(),
            Action::Min => a.min(b),
            Action::Max => a.max(b),
            Action::Compare(cmp) => i32::from(holds(cmp, a, b)),
        }
    }
}

impl Video {
    fn bits(self) -> u32 {
        32 / self.count as u32
    }

    /// Element `at` of a and b side by side, extended.
    fn element(self, registers: [u32; 2], at: u8, signed: bool) -> i32 {
        let register = registers[usize::from(at) / self.count];
        let up = 32 - self.bits();
        let word = register >> (self.bits() * (u32::from(at) % self.count as u32)) << up;
        if signed { word as i32 >> up } else { (word >> up) as i32 }
    }

    fn run(self, a: u32, b: u32, c: u32) -> u32 {
        let range = 1i32 << self.bits();
        let (low, high) =
            if self.result_signed { (-range / 2, range / 2 - 1) } else { (0, range - 1) };
        let mut out = c;
        for i in 0..self.count {
            if !self.mask[i] {
                continue;
            }
            let [x, y] = [0, 1].map(|s| self.element([a, b], self.chosen[s][i], self.signed[s]));
            let value = self.action.on(x, y);
            if self.accumulate {
                out = out.wrapping_add(value as u32);
                continue;
            }
            let value = if self.saturate { value.clamp(low, high) } else { value };
            let (shift, all) = (self.bits() * i as u32, (range - 1) as u32);
            out = out & !(all << shift) | (value as u32 & all) << shift;
        }
        out
    }
}

/// The elements of a source, lowest first: as selected, or its register's own.
fn chosen(operand: &Operand, nth: usize, count: usize) -> [u8; 4] {
    match operand {
        Operand::Selected(_, Selector { parts, .. }) => {
            std::array::from_fn(|i| if i < count { parts[count - 1 - i] } else { 0 })
        }
        _ => std::array::from_fn(|i| (nth * count + i) as u8),
    }
}

/// The register of an operand with its selector left out.
fn whole(operand: &Operand) -> Operand {
    match operand {
        Operand::Selected(r, _) => Operand::Reg(*r),
        other => other.clone(),
    }
}

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let (Some(action), [d, a, b, c]) = (Action::of(ins), &ins.operands[..]) else {
        return unsupported(mnemonic(ins));
    };
    let count = if ins.op.text().ends_with('2') { 2 } else { 4 };
    let types: Vec<Type> = ins.mods.types().collect();
    let [.., of_a, of_b] = types[..] else { return unsupported(mnemonic(ins)) };
    let mask = match d {
        Operand::Selected(_, Selector { parts, count, .. }) => {
            std::array::from_fn(|i| parts[..usize::from(*count)].contains(&(i as u8)))
        }
        _ => [true; 4],
    };
    let video = Video {
        action,
        count,
        signed: [of_a.is_signed(), of_b.is_signed()],
        result_signed: types.len() == 3 && types[0].is_signed(),
        saturate: ins.mods.has(Flag::Sat),
        accumulate: ins.mods.op() == Some(Op::Add),
        chosen: [chosen(a, 0, count), chosen(b, 1, count)],
        mask,
    };
    let [x, y, z] = [a, b, c].map(whole);
    let (x, y, z) = (l.src(&x, Type::B32)?, l.src(&y, Type::B32)?, l.src(&z, Type::B32)?);
    let d = l.dst(&whole(d))?;
    l.emit_action(Class::Alu, move |cx| {
        let (a, b, c) = (u32::read(cx, x), u32::read(cx, y), u32::read(cx, z));
        let out: [u32; LANES] = std::array::from_fn(|i| video.run(a[i], b[i], c[i]));
        u32::write(cx, d, out);
        Step::Next
    });
    Ok(())
}
