//! Integer arithmetic and bit operations (PTX ISA, "Integer Arithmetic Instructions" to "Logic and
//! Shift Instructions").

use fathom_ptx::ast::Instruction;
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Flag, MulPart, Type};

use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::alu::{self, bin, tri, un};
use crate::machine::cx::Cx;
use crate::machine::lane::{self, Lane};
use crate::machine::op::{Class, MicroOp, OpFn, Step};
use crate::machine::registers::LANES;

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let ty = ins.mods.ty(0).unwrap_or(Type::B32);
    if let Some(run) = one(ins, ty) {
        let a = l.src(&ins.operands[1], ty)?;
        let d = l.dst(&ins.operands[0])?;
        l.emit(Class::Alu, run, d, a, 0, 0);
        return Ok(());
    }
    if let Some((run, tb)) = two(ins, ty) {
        let a = l.src(&ins.operands[1], ty)?;
        let b = l.src(&ins.operands[2], tb)?;
        let d = l.dst(&ins.operands[0])?;
        l.emit(Class::Alu, run, d, a, b, 0);
        return Ok(());
    }
    if let Some((run, [ta, tb, tc])) = three(ins, ty) {
        let a = l.src(&ins.operands[1], ta)?;
        let b = l.src(&ins.operands[2], tb)?;
        let c = l.src(&ins.operands[3], tc)?;
        let d = l.dst(&ins.operands[0])?;
        l.emit(Class::Alu, run, d, a, b, c);
        return Ok(());
    }
    match ins.op {
        Opcode::Add | Opcode::Sub | Opcode::Addc | Opcode::Subc | Opcode::Mad | Opcode::Madc => {
            carry(l, ins, ty)
        }
        Opcode::Bfi => {
            let wide = ty.bits() == 64;
            let a = l.src(&ins.operands[1], ty)?;
            let b = l.src(&ins.operands[2], ty)?;
            let c = l.src(&ins.operands[3], Type::U32)?;
            let len = l.src(&ins.operands[4], Type::U32)?;
            let d = l.dst(&ins.operands[0])?;
            let run = if wide { bfi64 } else { bfi32 };
            l.emit(Class::Alu, run, d, a, b, c).x = u32::from(len);
            Ok(())
        }
        Opcode::Lop3 => lop3(l, ins),
        _ => unsupported(mnemonic(ins)),
    }
}

fn one(ins: &Instruction, ty: Type) -> Option<OpFn> {
    use Opcode::*;
    use Type::*;
    Some(match (ins.op, ty) {
        (Not, B16) => un!(u16 => u16, |a| !a),
        (Not, B32) => un!(u32 => u32, |a| !a),
        (Not, B64) => un!(u64 => u64, |a| !a),
        (Cnot, B16) => un!(u16 => u16, |a| u16::from(a == 0)),
        (Cnot, B32) => un!(u32 => u32, |a| u32::from(a == 0)),
        (Cnot, B64) => un!(u64 => u64, |a| u64::from(a == 0)),
        (Neg, S16) => un!(i16 => i16, |a| a.wrapping_neg()),
        (Neg, S32) => un!(i32 => i32, |a| a.wrapping_neg()),
        (Neg, S64) => un!(i64 => i64, |a| a.wrapping_neg()),
        (Abs, S16) => un!(i16 => i16, |a| a.wrapping_abs()),
        (Abs, S32) => un!(i32 => i32, |a| a.wrapping_abs()),
        (Abs, S64) => un!(i64 => i64, |a| a.wrapping_abs()),
        (Popc, B32) => un!(u32 => u32, |a| a.count_ones()),
        (Popc, B64) => un!(u64 => u32, |a| a.count_ones()),
        (Clz, B32) => un!(u32 => u32, |a| a.leading_zeros()),
        (Clz, B64) => un!(u64 => u32, |a| a.leading_zeros()),
        (Brev, B32) => un!(u32 => u32, |a| a.reverse_bits()),
        (Brev, B64) => un!(u64 => u64, |a| a.reverse_bits()),
        (Bfind, _) => bfind(ty, ins.mods.has(Flag::Shiftamt))?,
        _ => return None,
    })
}

/// Bit position from the least significant bit, or the shift that would bring it to the top.
fn bfind(ty: Type, shiftamt: bool) -> Option<OpFn> {
    use Type::*;
    Some(match (ty, shiftamt) {
        (U32, false) => un!(u32 => u32, |a| if a == 0 { !0 } else { 31 - a.leading_zeros() }),
        (U32, true) => un!(u32 => u32, |a| if a == 0 { !0 } else { a.leading_zeros() }),
        (S32, false) => un!(u32 => u32, |a| {
            let a = if (a as i32) < 0 { !a } else { a };
            if a == 0 { !0 } else { 31 - a.leading_zeros() }
        }),
        (S32, true) => un!(u32 => u32, |a| {
            let a = if (a as i32) < 0 { !a } else { a };
            if a == 0 { !0 } else { a.leading_zeros() }
        }),
        (U64, false) => un!(u64 => u32, |a| if a == 0 { !0 } else { 63 - a.leading_zeros() }),
        (U64, true) => un!(u64 => u32, |a| if a == 0 { !0 } else { a.leading_zeros() }),
        (S64, false) => un!(u64 => u32, |a| {
            let a = if (a as i64) < 0 { !a } else { a };
            if a == 0 { !0 } else { 63 - a.leading_zeros() }
        }),
        (S64, true) => un!(u64 => u32, |a| {
            let a = if (a as i64) < 0 { !a } else { a };
            if a == 0 { !0 } else { a.leading_zeros() }
        }),
        _ => return None,
    })
}

fn two(ins: &Instruction, ty: Type) -> Option<(OpFn, Type)> {
    use Opcode::*;
    use Type::*;
    if ins.mods.has(Flag::Cc) {
        return None;
    }
    let sat = ins.mods.has(Flag::Sat);
    let relu = ins.mods.has(Flag::Relu);
    let part = ins.mods.part();
    let run = match (ins.op, ty) {
        (Add, S32) if sat => bin!(i32, i32 => i32, |a, b| a.saturating_add(b)),
        (Sub, S32) if sat => bin!(i32, i32 => i32, |a, b| a.saturating_sub(b)),
        (Add, U16 | S16) => bin!(u16, u16 => u16, |a, b| a.wrapping_add(b)),
        (Add, U32 | S32 | B32) => bin!(u32, u32 => u32, |a, b| a.wrapping_add(b)),
        (Add, U64 | S64) => bin!(u64, u64 => u64, |a, b| a.wrapping_add(b)),
        (Add, U16x2 | S16x2) => bin!(u32, u32 => u32, |a, b| {
            a.wrapping_add(b) & 0xffff | (a & !0xffff).wrapping_add(b & !0xffff)
        }),
        (Sub, U16 | S16) => bin!(u16, u16 => u16, |a, b| a.wrapping_sub(b)),
        (Sub, U32 | S32) => bin!(u32, u32 => u32, |a, b| a.wrapping_sub(b)),
        (Sub, U64 | S64) => bin!(u64, u64 => u64, |a, b| a.wrapping_sub(b)),
        (Mul, _) => return mul(ty, part).map(|run| (run, ty)),
        (Mul24, U32) if part == Some(MulPart::Lo) => {
            bin!(u32, u32 => u32, |a, b| (a & 0xff_ffff).wrapping_mul(b & 0xff_ffff))
        }
        (Mul24, U32) => bin!(u32, u32 => u32, |a, b| {
            (u64::from(a & 0xff_ffff) * u64::from(b & 0xff_ffff) >> 16) as u32
        }),
        (Mul24, S32) if part == Some(MulPart::Lo) => {
            bin!(i32, i32 => i32, |a, b| (a << 8 >> 8).wrapping_mul(b << 8 >> 8))
        }
        (Mul24, S32) => bin!(i32, i32 => i32, |a, b| {
            (i64::from(a << 8 >> 8) * i64::from(b << 8 >> 8) >> 16) as i32
        }),
        // Division by zero gives all ones, as the hardware's sequence does.
        (Div, U16) => bin!(u16, u16 => u16, |a, b| a.checked_div(b).unwrap_or(!0)),
        (Div, U32) => bin!(u32, u32 => u32, |a, b| a.checked_div(b).unwrap_or(!0)),
        (Div, U64) => bin!(u64, u64 => u64, |a, b| a.checked_div(b).unwrap_or(!0)),
        (Div, S16) => bin!(i16, i16 => i16, |a, b| if b == 0 { -1 } else { a.wrapping_div(b) }),
        (Div, S32) => bin!(i32, i32 => i32, |a, b| if b == 0 { -1 } else { a.wrapping_div(b) }),
        (Div, S64) => bin!(i64, i64 => i64, |a, b| if b == 0 { -1 } else { a.wrapping_div(b) }),
        (Rem, U16) => bin!(u16, u16 => u16, |a, b| a.checked_rem(b).unwrap_or(a)),
        (Rem, U32) => bin!(u32, u32 => u32, |a, b| a.checked_rem(b).unwrap_or(a)),
        (Rem, U64) => bin!(u64, u64 => u64, |a, b| a.checked_rem(b).unwrap_or(a)),
        (Rem, S16) => bin!(i16, i16 => i16, |a, b| if b == 0 { a } else { a.wrapping_rem(b) }),
        (Rem, S32) => bin!(i32, i32 => i32, |a, b| if b == 0 { a } else { a.wrapping_rem(b) }),
        (Rem, S64) => bin!(i64, i64 => i64, |a, b| if b == 0 { a } else { a.wrapping_rem(b) }),
        (Min, S32) if relu => bin!(i32, i32 => i32, |a, b| a.min(b).max(0)),
        (Max, S32) if relu => bin!(i32, i32 => i32, |a, b| a.max(b).max(0)),
        (Min, U16) => bin!(u16, u16 => u16, |a, b| a.min(b)),
        (Min, U32) => bin!(u32, u32 => u32, |a, b| a.min(b)),
        (Min, U64) => bin!(u64, u64 => u64, |a, b| a.min(b)),
        (Min, S16) => bin!(i16, i16 => i16, |a, b| a.min(b)),
        (Min, S32) => bin!(i32, i32 => i32, |a, b| a.min(b)),
        (Min, S64) => bin!(i64, i64 => i64, |a, b| a.min(b)),
        (Max, U16) => bin!(u16, u16 => u16, |a, b| a.max(b)),
        (Max, U32) => bin!(u32, u32 => u32, |a, b| a.max(b)),
        (Max, U64) => bin!(u64, u64 => u64, |a, b| a.max(b)),
        (Max, S16) => bin!(i16, i16 => i16, |a, b| a.max(b)),
        (Max, S32) => bin!(i32, i32 => i32, |a, b| a.max(b)),
        (Max, S64) => bin!(i64, i64 => i64, |a, b| a.max(b)),
        (Min, U16x2) => bin!(u32, u32 => u32, |a, b| halves(a, b, |x, y| x.min(y))),
        (Max, U16x2) => bin!(u32, u32 => u32, |a, b| halves(a, b, |x, y| x.max(y))),
        (Min, S16x2) if relu => bin!(u32, u32 => u32, |a, b| {
            halves(a, b, |x, y| (x as i16).min(y as i16).max(0) as u16)
        }),
        (Max, S16x2) if relu => bin!(u32, u32 => u32, |a, b| {
            halves(a, b, |x, y| (x as i16).max(y as i16).max(0) as u16)
        }),
        (Min, S16x2) => {
            bin!(u32, u32 => u32, |a, b| halves(a, b, |x, y| (x as i16).min(y as i16) as u16))
        }
        (Max, S16x2) => {
            bin!(u32, u32 => u32, |a, b| halves(a, b, |x, y| (x as i16).max(y as i16) as u16))
        }
        (And, B16 | B32) => bin!(u32, u32 => u32, |a, b| a & b),
        (Or, B16 | B32) => bin!(u32, u32 => u32, |a, b| a | b),
        (Xor, B16 | B32) => bin!(u32, u32 => u32, |a, b| a ^ b),
        (And, B64) => bin!(u64, u64 => u64, |a, b| a & b),
        (Or, B64) => bin!(u64, u64 => u64, |a, b| a | b),
        (Xor, B64) => bin!(u64, u64 => u64, |a, b| a ^ b),
        (Shl | Shr, _) => return shift(ins.op, ty).map(|run| (run, U32)),
        (Szext, U32) => {
            let wrap = ins.mods.has(Flag::Wrap);
            if wrap {
                bin!(u32, u32 => u32, |a, b| zero_extend(a, b & 31))
            } else {
                bin!(u32, u32 => u32, |a, b| zero_extend(a, b.min(32)))
            }
        }
        (Szext, S32) => {
            let wrap = ins.mods.has(Flag::Wrap);
            if wrap {
                bin!(u32, u32 => u32, |a, b| sign_extend(a, b & 31))
            } else {
                bin!(u32, u32 => u32, |a, b| sign_extend(a, b.min(32)))
            }
        }
        (Bmsk, _) if ins.mods.has(Flag::Wrap) => bin!(u32, u32 => u32, |a, b| mask(a & 31, b & 31)),
        (Bmsk, _) => bin!(u32, u32 => u32, |a, b| mask(a.min(32), b.min(32))),
        _ => return None,
    };
    Some((run, ty))
}

fn zero_extend(a: u32, n: u32) -> u32 {
    (u64::from(a) & ((1u64 << n) - 1)) as u32
}

fn sign_extend(a: u32, n: u32) -> u32 {
    if n == 0 { 0 } else { ((a << (32 - n)) as i32 >> (32 - n)) as u32 }
}

fn mask(position: u32, width: u32) -> u32 {
    (((1u64 << width) - 1) << position) as u32
}

/// Applies a function to both halves.
pub fn halves(a: u32, b: u32, f: impl Fn(u16, u16) -> u16) -> u32 {
    u32::from(f(a as u16, b as u16)) | u32::from(f((a >> 16) as u16, (b >> 16) as u16)) << 16
}

fn mul(ty: Type, part: Option<MulPart>) -> Option<OpFn> {
    use MulPart::*;
    use Type::*;
    Some(match (ty, part.unwrap_or(Lo)) {
        (U16 | S16, Lo) => bin!(u16, u16 => u16, |a, b| a.wrapping_mul(b)),
        (U32 | S32, Lo) => bin!(u32, u32 => u32, |a, b| a.wrapping_mul(b)),
        (U64 | S64, Lo) => bin!(u64, u64 => u64, |a, b| a.wrapping_mul(b)),
        (U16, Hi) => bin!(u16, u16 => u16, |a, b| (u32::from(a) * u32::from(b) >> 16) as u16),
        (S16, Hi) => bin!(i16, i16 => i16, |a, b| (i32::from(a) * i32::from(b) >> 16) as i16),
        (U32, Hi) => bin!(u32, u32 => u32, |a, b| (u64::from(a) * u64::from(b) >> 32) as u32),
        (S32, Hi) => bin!(i32, i32 => i32, |a, b| (i64::from(a) * i64::from(b) >> 32) as i32),
        (U64, Hi) => bin!(u64, u64 => u64, |a, b| (u128::from(a) * u128::from(b) >> 64) as u64),
        (S64, Hi) => bin!(i64, i64 => i64, |a, b| (i128::from(a) * i128::from(b) >> 64) as i64),
        (U16, Wide) => bin!(u16, u16 => u32, |a, b| u32::from(a) * u32::from(b)),
        (S16, Wide) => bin!(i16, i16 => i32, |a, b| i32::from(a) * i32::from(b)),
        (U32, Wide) => bin!(u32, u32 => u64, |a, b| u64::from(a) * u64::from(b)),
        (S32, Wide) => bin!(i32, i32 => i64, |a, b| i64::from(a) * i64::from(b)),
        _ => return None,
    })
}

/// Shift amounts beyond the width are clamped.
fn shift(op: Opcode, ty: Type) -> Option<OpFn> {
    use Opcode::*;
    use Type::*;
    Some(match (op, ty) {
        (Shl, B16) => {
            bin!(u16, u32 => u16, |a, b| if b > 15 { 0 } else { a << b })
        }
        (Shl, B32) => bin!(u32, u32 => u32, |a, b| if b > 31 { 0 } else { a << (b & 31) }),
        (Shl, B64) => bin!(u64, u32 => u64, |a, b| if b > 63 { 0 } else { a << (b & 63) }),
        (Shr, U16 | B16) => bin!(u16, u32 => u16, |a, b| if b > 15 { 0 } else { a >> b }),
        (Shr, U32 | B32) => bin!(u32, u32 => u32, |a, b| if b > 31 { 0 } else { a >> (b & 31) }),
        (Shr, U64 | B64) => bin!(u64, u32 => u64, |a, b| if b > 63 { 0 } else { a >> (b & 63) }),
        (Shr, S16) => bin!(i16, u32 => i16, |a, b| a >> b.min(15)),
        (Shr, S32) => bin!(i32, u32 => i32, |a, b| a >> b.min(31)),
        (Shr, S64) => bin!(i64, u32 => i64, |a, b| a >> b.min(63)),
        _ => return None,
    })
}

fn three(ins: &Instruction, ty: Type) -> Option<(OpFn, [Type; 3])> {
    use MulPart::*;
    use Opcode::*;
    use Type::*;
    if ins.mods.has(Flag::Cc) {
        return None;
    }
    let part = ins.mods.part().unwrap_or(Lo);
    let same = [ty; 3];
    let run = match (ins.op, ty, part) {
        (Mad, S32, Hi) if ins.mods.has(Flag::Sat) => tri!(i32, i32, i32 => i32, |a, b, c| {
            ((i64::from(a) * i64::from(b) >> 32) as i32).saturating_add(c)
        }),
        (Mad, U16 | S16, Lo) => {
            tri!(u16, u16, u16 => u16, |a, b, c| a.wrapping_mul(b).wrapping_add(c))
        }
        (Mad, U32 | S32, Lo) => {
            tri!(u32, u32, u32 => u32, |a, b, c| a.wrapping_mul(b).wrapping_add(c))
        }
        (Mad, U64 | S64, Lo) => {
            tri!(u64, u64, u64 => u64, |a, b, c| a.wrapping_mul(b).wrapping_add(c))
        }
        (Mad, U16, Hi) => tri!(u16, u16, u16 => u16, |a, b, c| {
            ((u32::from(a) * u32::from(b) >> 16) as u16).wrapping_add(c)
        }),
        (Mad, S16, Hi) => tri!(i16, i16, i16 => i16, |a, b, c| {
            ((i32::from(a) * i32::from(b) >> 16) as i16).wrapping_add(c)
        }),
        (Mad, U32, Hi) => tri!(u32, u32, u32 => u32, |a, b, c| {
            ((u64::from(a) * u64::from(b) >> 32) as u32).wrapping_add(c)
        }),
        (Mad, S32, Hi) => tri!(i32, i32, i32 => i32, |a, b, c| {
            ((i64::from(a) * i64::from(b) >> 32) as i32).wrapping_add(c)
        }),
        (Mad, U64, Hi) => tri!(u64, u64, u64 => u64, |a, b, c| {
            ((u128::from(a) * u128::from(b) >> 64) as u64).wrapping_add(c)
        }),
        (Mad, S64, Hi) => tri!(i64, i64, i64 => i64, |a, b, c| {
            ((i128::from(a) * i128::from(b) >> 64) as i64).wrapping_add(c)
        }),
        (Mad, U16, Wide) => {
            let run = tri!(u16, u16, u32 => u32, |a, b, c| {
                (u32::from(a) * u32::from(b)).wrapping_add(c)
            });
            return Some((run, [ty, ty, U32]));
        }
        (Mad, S16, Wide) => {
            let run = tri!(i16, i16, i32 => i32, |a, b, c| {
                (i32::from(a) * i32::from(b)).wrapping_add(c)
            });
            return Some((run, [ty, ty, S32]));
        }
        (Mad, U32, Wide) => {
            let run = tri!(u32, u32, u64 => u64, |a, b, c| {
                (u64::from(a) * u64::from(b)).wrapping_add(c)
            });
            return Some((run, [ty, ty, U64]));
        }
        (Mad, S32, Wide) => {
            let run = tri!(i32, i32, i64 => i64, |a, b, c| {
                (i64::from(a) * i64::from(b)).wrapping_add(c)
            });
            return Some((run, [ty, ty, S64]));
        }
        (Mad24, U32, Lo) => tri!(u32, u32, u32 => u32, |a, b, c| {
            (a & 0xff_ffff).wrapping_mul(b & 0xff_ffff).wrapping_add(c)
        }),
        (Mad24, S32, Lo) => tri!(i32, i32, i32 => i32, |a, b, c| {
            (a << 8 >> 8).wrapping_mul(b << 8 >> 8).wrapping_add(c)
        }),
        (Mad24, U32, _) => tri!(u32, u32, u32 => u32, |a, b, c| {
            ((u64::from(a & 0xff_ffff) * u64::from(b & 0xff_ffff) >> 16) as u32).wrapping_add(c)
        }),
        (Mad24, S32, _) if ins.mods.has(Flag::Sat) => tri!(i32, i32, i32 => i32, |a, b, c| {
            ((i64::from(a << 8 >> 8) * i64::from(b << 8 >> 8) >> 16) as i32).saturating_add(c)
        }),
        (Mad24, S32, _) => tri!(i32, i32, i32 => i32, |a, b, c| {
            ((i64::from(a << 8 >> 8) * i64::from(b << 8 >> 8) >> 16) as i32).wrapping_add(c)
        }),
        (Sad, U16, _) => tri!(u16, u16, u16 => u16, |a, b, c| c.wrapping_add(a.abs_diff(b))),
        (Sad, U32, _) => tri!(u32, u32, u32 => u32, |a, b, c| c.wrapping_add(a.abs_diff(b))),
        (Sad, U64, _) => tri!(u64, u64, u64 => u64, |a, b, c| c.wrapping_add(a.abs_diff(b))),
        (Sad, S16, _) => {
            tri!(i16, i16, u16 => u16, |a, b, c| c.wrapping_add(a.abs_diff(b)))
        }
        (Sad, S32, _) => {
            tri!(i32, i32, u32 => u32, |a, b, c| c.wrapping_add(a.abs_diff(b)))
        }
        (Sad, S64, _) => {
            tri!(i64, i64, u64 => u64, |a, b, c| c.wrapping_add(a.abs_diff(b)))
        }
        (Bfe, _, _) => return bfe(ty).map(|run| (run, [ty, U32, U32])),
        (Fns, _, _) => {
            return Some((tri!(u32, u32, i32 => u32, find_nth_set), [U32, U32, S32]));
        }
        (Shf, _, _) => return funnel(ins).map(|run| (run, [U32; 3])),
        (Dp4a | Dp2a, _, _) => return dot(ins).map(|run| (run, [U32; 3])),
        _ => return None,
    };
    Some((run, same))
}

fn bfe(ty: Type) -> Option<OpFn> {
    // Position and length are taken modulo 256; the field is cut at the top.
    Some(match ty {
        Type::U32 => tri!(u32, u32, u32 => u32, |a, pos, len| {
            bfe_unsigned(u64::from(a), pos & 255, len & 255, 32) as u32
        }),
        Type::U64 => {
            tri!(u64, u32, u32 => u64, |a, pos, len| bfe_unsigned(a, pos & 255, len & 255, 64))
        }
        Type::S32 => tri!(u32, u32, u32 => u32, |a, pos, len| {
            bfe_signed(a as i32 as i64, pos & 255, len & 255, 32) as u32
        }),
        Type::S64 => tri!(u64, u32, u32 => u64, |a, pos, len| {
            bfe_signed(a as i64, pos & 255, len & 255, 64) as u64
        }),
        _ => return None,
    })
}

fn bfe_unsigned(a: u64, pos: u32, len: u32, bits: u32) -> u64 {
    if pos >= bits || len == 0 {
        return 0;
    }
    let field = a >> pos;
    if len >= 64 { field } else { field & ((1 << len) - 1) }
}

fn bfe_signed(a: i64, pos: u32, len: u32, bits: u32) -> i64 {
    if len == 0 {
        return 0;
    }
    // Beyond the top the sign bit of the source is repeated.
    let field = a >> pos.min(bits - 1).min(63);
    let len = if pos >= bits { 1 } else { len.min(bits - pos) };
    field << (64 - len) >> (64 - len)
}

fn find_nth_set(mask: u32, base: u32, offset: i32) -> u32 {
    if base > 31 {
        return !0;
    }
    let base = base as i32;
    if offset == 0 {
        return if mask >> base & 1 != 0 { base as u32 } else { !0 };
    }
    let step = offset.signum();
    let mut left = offset.unsigned_abs() - 1;
    let mut at = base;
    while (0..32).contains(&at) {
        if mask >> at & 1 != 0 {
            if left == 0 {
                return at as u32;
            }
            left -= 1;
        }
        at += step;
    }
    !0
}

fn funnel(ins: &Instruction) -> Option<OpFn> {
    let left = ins.mods.has(Flag::Left);
    let clamp = ins.mods.has(Flag::Clamp);
    Some(match (left, clamp) {
        (true, true) => tri!(u32, u32, u32 => u32, |lo, hi, n| {
            let n = n.min(32);
            ((u64::from(hi) << 32 | u64::from(lo)) << n >> 32) as u32
        }),
        (true, false) => tri!(u32, u32, u32 => u32, |lo, hi, n| {
            ((u64::from(hi) << 32 | u64::from(lo)) << (n & 31) >> 32) as u32
        }),
        (false, true) => tri!(u32, u32, u32 => u32, |lo, hi, n| {
            ((u64::from(hi) << 32 | u64::from(lo)) >> n.min(32)) as u32
        }),
        (false, false) => tri!(u32, u32, u32 => u32, |lo, hi, n| {
            ((u64::from(hi) << 32 | u64::from(lo)) >> (n & 31)) as u32
        }),
    })
}

fn byte(a: u32, i: usize, signed: bool) -> i32 {
    let b = (a >> (8 * i)) as u8;
    if signed { i32::from(b as i8) } else { i32::from(b) }
}

fn dp4a(a: u32, b: u32, c: u32, sa: bool, sb: bool) -> u32 {
    (0..4).fold(c, |sum, i| sum.wrapping_add((byte(a, i, sa) * byte(b, i, sb)) as u32))
}

fn dp2a(a: u32, b: u32, c: u32, sa: bool, sb: bool, hi: bool) -> u32 {
    (0..2).fold(c, |sum, i| {
        let half = (a >> (16 * i)) as u16;
        let x = if sa { i32::from(half as i16) } else { i32::from(half) };
        let y = byte(b, i + if hi { 2 } else { 0 }, sb);
        sum.wrapping_add(x.wrapping_mul(y) as u32)
    })
}

fn dot(ins: &Instruction) -> Option<OpFn> {
    let sa = ins.mods.ty(0)?.is_signed();
    let sb = ins.mods.ty(1)?.is_signed();
    let hi = ins.mods.part() == Some(MulPart::Hi);
    Some(match (ins.op, sa, sb, hi) {
        (Opcode::Dp4a, false, false, _) => {
            tri!(u32, u32, u32 => u32, |a, b, c| dp4a(a, b, c, false, false))
        }
        (Opcode::Dp4a, false, true, _) => {
            tri!(u32, u32, u32 => u32, |a, b, c| dp4a(a, b, c, false, true))
        }
        (Opcode::Dp4a, true, false, _) => {
            tri!(u32, u32, u32 => u32, |a, b, c| dp4a(a, b, c, true, false))
        }
        (Opcode::Dp4a, true, true, _) => {
            tri!(u32, u32, u32 => u32, |a, b, c| dp4a(a, b, c, true, true))
        }
        (_, false, false, false) => {
            tri!(u32, u32, u32 => u32, |a, b, c| dp2a(a, b, c, false, false, false))
        }
        (_, false, false, true) => {
            tri!(u32, u32, u32 => u32, |a, b, c| dp2a(a, b, c, false, false, true))
        }
        (_, false, true, false) => {
            tri!(u32, u32, u32 => u32, |a, b, c| dp2a(a, b, c, false, true, false))
        }
        (_, false, true, true) => {
            tri!(u32, u32, u32 => u32, |a, b, c| dp2a(a, b, c, false, true, true))
        }
        (_, true, false, false) => {
            tri!(u32, u32, u32 => u32, |a, b, c| dp2a(a, b, c, true, false, false))
        }
        (_, true, false, true) => {
            tri!(u32, u32, u32 => u32, |a, b, c| dp2a(a, b, c, true, false, true))
        }
        (_, true, true, false) => {
            tri!(u32, u32, u32 => u32, |a, b, c| dp2a(a, b, c, true, true, false))
        }
        (_, true, true, true) => {
            tri!(u32, u32, u32 => u32, |a, b, c| dp2a(a, b, c, true, true, true))
        }
    })
}

fn bfi32(cx: &mut Cx<'_>, op: &MicroOp) -> Step {
    let len = u32::read(cx, op.x as u16);
    let (a, b, c) = (u32::read(cx, op.a), u32::read(cx, op.b), u32::read(cx, op.c));
    let d = std::array::from_fn(|i| {
        insert(u64::from(a[i]), u64::from(b[i]), c[i] & 255, len[i] & 255, 32) as u32
    });
    u32::write(cx, op.d, d);
    Step::Next
}

fn bfi64(cx: &mut Cx<'_>, op: &MicroOp) -> Step {
    let len = u32::read(cx, op.x as u16);
    let (a, b, c) = (u64::read(cx, op.a), u64::read(cx, op.b), u32::read(cx, op.c));
    let d = std::array::from_fn(|i| insert(a[i], b[i], c[i] & 255, len[i] & 255, 64));
    u64::write(cx, op.d, d);
    Step::Next
}

fn insert(a: u64, b: u64, pos: u32, len: u32, bits: u32) -> u64 {
    if pos >= bits || len == 0 {
        return b;
    }
    let field = if len >= 64 { !0 } else { (1u64 << len) - 1 } << pos;
    b & !field | a << pos & field
}

fn lop3(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let n = ins.operands.len();
    let with_pred = ins.mods.op();
    // lop3.BoolOp d|p, a, b, c, lut, q
    let table = if with_pred.is_some() { n - 2 } else { n - 1 };
    let Some(table_bits) = l.literal(&ins.operands[table]) else {
        return unsupported("lop3 with a table that is no literal");
    };
    let [a, b, c] = [
        l.src(&ins.operands[1], Type::B32)?,
        l.src(&ins.operands[2], Type::B32)?,
        l.src(&ins.operands[3], Type::B32)?,
    ];
    let (d, p) = match &ins.operands[0] {
        fathom_ptx::ast::Operand::Pair(d, p) => (l.dst(d)?, Some(l.dst_pred(p)?)),
        d => (l.dst(d)?, None),
    };
    l.emit(Class::Alu, lop3_op, d, a, b, c).x = table_bits as u32;
    if let (Some(p), Some(op)) = (p, with_pred) {
        let (q, negated) = l.pred(&ins.operands[n - 1])?;
        let and = op == fathom_ptx::types::Op::And;
        l.emit_action(Class::Alu, move |cx| {
            let d = u32::read(cx, d);
            let q = cx.pred(q) ^ if negated { !0 } else { 0 };
            let mut some = 0;
            for (i, v) in d.iter().enumerate() {
                some |= u32::from(*v != 0) << i;
            }
            cx.set_pred(p, if and { some & q } else { some | q });
            Step::Next
        });
    }
    Ok(())
}

/// Any function of three bits, by its truth table (PTX ISA, "lop3").
fn lop3_op(cx: &mut Cx<'_>, op: &MicroOp) -> Step {
    let table = op.x;
    alu::ternary::<u32, u32, u32, u32, _>(cx, op, move |a, b, c| {
        let mut d = 0;
        for row in 0..8 {
            if table >> row & 1 != 0 {
                let x = if row & 4 != 0 { a } else { !a };
                let y = if row & 2 != 0 { b } else { !b };
                let z = if row & 1 != 0 { c } else { !c };
                d |= x & y & z;
            }
        }
        d
    })
}

/// add.cc, addc and their kin: the carry of each lane lives in the warp.
fn carry(l: &mut Lower<'_>, ins: &Instruction, ty: Type) -> Lowered {
    use Opcode::*;
    let sets = ins.mods.has(Flag::Cc);
    let reads = matches!(ins.op, Addc | Subc | Madc);
    let minus = matches!(ins.op, Sub | Subc);
    let product = matches!(ins.op, Mad | Madc);
    let part = ins.mods.part();
    let wide = ty.bits() == 64;
    let signed = ty.is_signed();
    let a = l.src(&ins.operands[1], ty)?;
    let b = l.src(&ins.operands[2], ty)?;
    let c = if product { l.src(&ins.operands[3], ty)? } else { 0 };
    let d = l.dst(&ins.operands[0])?;
    l.emit_action(Class::Alu, move |cx| {
        let (mut x, mut y) = (lane::read(cx, a, wide), lane::read(cx, b, wide));
        if product {
            let z = lane::read(cx, c, wide);
            for i in 0..LANES {
                x[i] = multiply_part(x[i], y[i], part, wide, signed);
                y[i] = z[i];
            }
        }
        // Subtraction adds the complement, and the flag is that addition's carry: 1 where nothing
        // was borrowed. Mixed sequences (sub.cc, then addc) show it; 128-bit division has them.
        let carry_in = if reads { cx.w.carry } else { 0u32.wrapping_sub(u32::from(minus)) };
        let (bits, all) = if wide { (64, u64::MAX) } else { (32, u64::from(u32::MAX)) };
        let (mut out, mut carry) = ([0u64; LANES], 0u32);
        for i in 0..LANES {
            let cin = u128::from(carry_in >> i & 1);
            let y = if minus { !y[i] & all } else { y[i] };
            let sum = u128::from(x[i]) + u128::from(y) + cin;
            carry |= ((sum >> bits & 1) as u32) << i;
            out[i] = sum as u64;
        }
        if sets {
            cx.w.carry = cx.w.carry & !cx.mask | carry & cx.mask;
        }
        lane::write(cx, d, wide, out);
        Step::Next
    });
    Ok(())
}

fn multiply_part(x: u64, y: u64, part: Option<MulPart>, wide: bool, signed: bool) -> u64 {
    let bits = if wide { 64 } else { 32 };
    let product = match (wide, signed) {
        (true, true) => (i128::from(x as i64) * i128::from(y as i64)) as u128,
        (false, true) => (i128::from(x as i32) * i128::from(y as i32)) as u128,
        _ => u128::from(x) * u128::from(y),
    };
    let value = if part == Some(MulPart::Hi) { product >> bits } else { product };
    if wide { value as u64 } else { u64::from(value as u32) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bit_fields_at_the_edges() {
        assert_eq!(bfe_unsigned(0xabcd_1234, 8, 8, 32), 0x12);
        assert_eq!(bfe_unsigned(0xabcd_1234, 28, 20, 32), 0xa);
        assert_eq!(bfe_unsigned(1, 32, 8, 32), 0);
        assert_eq!(bfe_signed(0xffff_8000u32 as i32 as i64, 15, 1, 32), -1);
        assert_eq!(bfe_signed(i64::from(i32::MIN), 40, 4, 32), -1);
        assert_eq!(bfe_signed(0x7f, 0, 7, 32), -1);
        assert_eq!(insert(0xf, 0, 30, 8, 32), 0x3c0000000);
        assert_eq!(find_nth_set(0b1011_0000, 0, 2), 5);
        assert_eq!(find_nth_set(0b1011_0000, 7, -2), 5);
        assert_eq!(find_nth_set(0, 0, 1), !0);
        assert_eq!(mask(4, 8), 0xff0);
        assert_eq!(sign_extend(0x80, 8), 0xffff_ff80);
    }

    #[test]
    fn dot_products_of_bytes() {
        assert_eq!(dp4a(0xff01_0203, 0x0101_0101, 10, false, false), 10 + 255 + 1 + 2 + 3);
        assert_eq!(dp4a(0xff01_0203, 0x0101_0101, 10, true, false), 10 - 1 + 1 + 2 + 3);
        assert_eq!(dp2a(0x0002_0001, 0x0403_0201, 0, false, false, true), 3 + 2 * 4);
    }
}
