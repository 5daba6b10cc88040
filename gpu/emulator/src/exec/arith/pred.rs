//! Comparison and selection, and logic on predicates.

use fathom_ptx::ast::{Instruction, Operand};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Cmp, Flag, Op, Type};

use super::float::flush;
use super::half::HalfFormat;
use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::alu::{self, Combine, cmp, pack_setp};
use crate::machine::cx::{Cx, PRED_SINK, PRED_TRUE};
use crate::machine::lane::{self, Lane};
use crate::machine::op::{Class, MicroOp, OpFn, Step};
use crate::machine::registers::LANES;

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    match ins.op {
        Opcode::Setp => setp(l, ins),
        Opcode::Set => set(l, ins),
        Opcode::Selp => selp(l, ins),
        Opcode::Slct => slct(l, ins),
        _ => unsupported(mnemonic(ins)),
    }
}

/// and, or, xor, not on predicates.
pub fn logic(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let d = l.dst_pred(&ins.operands[0])?;
    let (a, not_a) = l.pred(&ins.operands[1])?;
    let (b, not_b) = match ins.operands.get(2) {
        Some(o) => l.pred(o)?,
        None => (a, not_a),
    };
    fn run(cx: &mut Cx<'_>, op: &MicroOp) -> Step {
        let a = cx.pred(op.a) ^ if op.x & 1 != 0 { !0 } else { 0 };
        let b = cx.pred(op.b) ^ if op.x & 2 != 0 { !0 } else { 0 };
        let value = match op.x >> 2 {
            0 => a & b,
            1 => a | b,
            2 => a ^ b,
            _ => !a,
        };
        cx.set_pred(op.d, value);
        Step::Next
    }
    let kind = match ins.op {
        Opcode::And => 0,
        Opcode::Or => 1,
        Opcode::Xor => 2,
        _ => 3,
    };
    l.emit(Class::Alu, run, d, a, b, 0).x = u32::from(not_a) | u32::from(not_b) << 1 | kind << 2;
    Ok(())
}

/// The comparison as a micro-operation that writes predicates.
fn comparison(c: Cmp, ty: Type, ftz: bool) -> Option<OpFn> {
    use Type::*;
    // Unsigned spellings of the ordered comparisons.
    let unsigned = matches!(c, Cmp::Lo | Cmp::Ls | Cmp::Hi | Cmp::Hs);
    let c = match c {
        Cmp::Lo => Cmp::Lt,
        Cmp::Ls => Cmp::Le,
        Cmp::Hi => Cmp::Gt,
        Cmp::Hs => Cmp::Ge,
        other => other,
    };
    macro_rules! ordered {
        ($t:ty) => {
            match c {
                Cmp::Eq => cmp!($t, |a, b| a == b),
                Cmp::Ne => cmp!($t, |a, b| a != b),
                Cmp::Lt => cmp!($t, |a, b| a < b),
                Cmp::Le => cmp!($t, |a, b| a <= b),
                Cmp::Gt => cmp!($t, |a, b| a > b),
                Cmp::Ge => cmp!($t, |a, b| a >= b),
                _ => return None,
            }
        };
    }
    macro_rules! float {
        ($t:ty, $in:expr) => {
            match c {
                Cmp::Eq => cmp!($t, |a, b| $in(a) == $in(b)),
                // Ordered: false where an operand is NaN.
                Cmp::Ne => cmp!($t, |a, b| $in(a) < $in(b) || $in(a) > $in(b)),
                Cmp::Lt => cmp!($t, |a, b| $in(a) < $in(b)),
                Cmp::Le => cmp!($t, |a, b| $in(a) <= $in(b)),
                Cmp::Gt => cmp!($t, |a, b| $in(a) > $in(b)),
                Cmp::Ge => cmp!($t, |a, b| $in(a) >= $in(b)),
                Cmp::Equ => cmp!($t, |a, b| !($in(a) < $in(b) || $in(a) > $in(b))),
                Cmp::Neu => cmp!($t, |a, b| $in(a) != $in(b)),
                Cmp::Ltu => cmp!($t, |a, b| !($in(a) >= $in(b))),
                Cmp::Leu => cmp!($t, |a, b| !($in(a) > $in(b))),
                Cmp::Gtu => cmp!($t, |a, b| !($in(a) <= $in(b))),
                Cmp::Geu => cmp!($t, |a, b| !($in(a) < $in(b))),
                Cmp::Num => cmp!($t, |a, b| !a.is_nan() && !b.is_nan()),
                Cmp::Nan => cmp!($t, |a, b| a.is_nan() || b.is_nan()),
                _ => return None,
            }
        };
    }
    fn same64(v: f64) -> f64 {
        v
    }
    fn same32(v: f32) -> f32 {
        v
    }
    Some(match ty {
        B16 | U16 => ordered!(u16),
        S16 if unsigned => ordered!(u16),
        S16 => ordered!(i16),
        B32 | U32 => ordered!(u32),
        S32 if unsigned => ordered!(u32),
        S32 => ordered!(i32),
        B64 | U64 => ordered!(u64),
        S64 if unsigned => ordered!(u64),
        S64 => ordered!(i64),
        F32 if ftz => float!(f32, flush),
        F32 => float!(f32, same32),
        F64 => float!(f64, same64),
        _ => return None,
    })
}

fn combine(op: Option<Op>) -> Combine {
    match op {
        Some(Op::Or) => Combine::Or,
        Some(Op::Xor) => Combine::Xor,
        _ => Combine::And,
    }
}

fn setp(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let ty = ins.mods.types().last().unwrap_or(Type::B32);
    let Some(c) = ins.mods.cmp() else { return unsupported(mnemonic(ins)) };
    let (p, q) = match &ins.operands[0] {
        Operand::Pair(p, q) => (l.dst_pred(p)?, l.dst_pred(q)?),
        p => (l.dst_pred(p)?, PRED_SINK),
    };
    let a = l.src(&ins.operands[1], ty)?;
    let b = l.src(&ins.operands[2], ty)?;
    let (c_pred, negated) = match ins.operands.get(3) {
        Some(o) => l.pred(o)?,
        None => (PRED_TRUE, false),
    };
    let how = combine(ins.mods.op());
    let x = pack_setp(q, negated, how);
    if let Some(kind) = HalfFormat::of(ty) {
        return setp_half(l, ins, kind, c, [p, q, a, b, c_pred], negated, how);
    }
    let Some(run) = comparison(c, ty, ins.mods.has(Flag::Ftz)) else {
        return unsupported(mnemonic(ins));
    };
    l.emit(Class::Alu, run, p, a, b, c_pred).x = x;
    Ok(())
}

/// Compares two floats as a PTX operator says.
pub fn compare_floats(c: Cmp, a: f64, b: f64) -> bool {
    let nan = a.is_nan() || b.is_nan();
    match c {
        Cmp::Eq => a == b,
        Cmp::Ne => a != b && !nan,
        Cmp::Lt => a < b,
        Cmp::Le => a <= b,
        Cmp::Gt => a > b,
        Cmp::Ge => a >= b,
        Cmp::Equ => a == b || nan,
        Cmp::Neu => a != b || nan,
        Cmp::Ltu => a < b || nan,
        Cmp::Leu => a <= b || nan,
        Cmp::Gtu => a > b || nan,
        Cmp::Geu => a >= b || nan,
        Cmp::Num => !nan,
        _ => nan,
    }
}

/// Half precision; packed compares put the low half's result in p and the high half's in q.
fn setp_half(
    l: &mut Lower<'_>,
    ins: &Instruction,
    kind: HalfFormat,
    c: Cmp,
    [p, q, a, b, c_pred]: [u16; 5],
    negated: bool,
    how: Combine,
) -> Lowered {
    let packed = ins.mods.types().last().is_some_and(|t| t.bits() == 32);
    let ftz = ins.mods.has(Flag::Ftz);
    l.emit_action(Class::Half, move |cx| {
        let (x, y) = (u32::read(cx, a), u32::read(cx, b));
        let value = |v: u32| {
            let v = kind.value(v as u16);
            if ftz && kind == HalfFormat::F16 && v.abs() < 6.103515625e-5 { 0.0 } else { v }
        };
        let (mut low, mut high) = (0, 0);
        for i in 0..LANES {
            low |= u32::from(compare_floats(c, value(x[i]), value(y[i]))) << i;
            high |= u32::from(compare_floats(c, value(x[i] >> 16), value(y[i] >> 16))) << i;
        }
        let third = cx.pred(c_pred) ^ if negated { !0 } else { 0 };
        let join = |m: u32| match how {
            Combine::And => m & third,
            Combine::Or => m | third,
            Combine::Xor => m ^ third,
        };
        cx.set_pred(p, join(low));
        cx.set_pred(q, join(if packed { high } else { !low }));
        Step::Next
    });
    Ok(())
}

/// set: like setp into a register: all ones or 1.0.
fn set(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let types: Vec<Type> = ins.mods.types().collect();
    let (Some(c), [to, from]) = (ins.mods.cmp(), &types[..]) else {
        return unsupported(mnemonic(ins));
    };
    let (to, from) = (*to, *from);
    let a = l.src(&ins.operands[1], from)?;
    let b = l.src(&ins.operands[2], from)?;
    let (third, negated) = match ins.operands.get(3) {
        Some(o) => l.pred(o)?,
        None => (PRED_TRUE, false),
    };
    let how = combine(ins.mods.op());
    let d = l.dst(&ins.operands[0])?;
    let ftz = ins.mods.has(Flag::Ftz);
    let wide = from.bits() == 64;
    let halves = if from.bits() == 32 && HalfFormat::of(from).is_some() { 2 } else { 1 };
    l.emit_action(Class::Alu, move |cx| {
        let (x, y) = (lane::read(cx, a, wide), lane::read(cx, b, wide));
        let third = cx.pred(third) ^ if negated { !0 } else { 0 };
        let mut out = [0u32; LANES];
        for lane in cx.lanes() {
            for h in 0..halves {
                let yes = compare_bits(c, from, x[lane] >> (16 * h), y[lane] >> (16 * h), ftz);
                let t = third >> lane & 1 != 0;
                let yes = match how {
                    Combine::And => yes && t,
                    Combine::Or => yes || t,
                    Combine::Xor => yes ^ t,
                };
                let one = match (to, halves) {
                    (Type::F32, _) => 0x3f80_0000,
                    (Type::F16 | Type::F16x2, _) => 0x3c00,
                    (Type::Bf16 | Type::Bf16x2, _) => 0x3f80,
                    (_, 2) => 0xffff,
                    (t, _) if t.bits() == 16 => 0xffff,
                    _ => u32::MAX,
                };
                out[lane] |= if yes { one << (16 * h) } else { 0 };
            }
        }
        u32::write(cx, d, out);
        Step::Next
    });
    Ok(())
}

fn compare_bits(c: Cmp, ty: Type, a: u64, b: u64, ftz: bool) -> bool {
    if let Some(kind) = HalfFormat::of(ty) {
        return compare_floats(c, kind.value(a as u16), kind.value(b as u16));
    }
    match ty {
        Type::F32 => {
            let value = |v: u64| {
                let v = f32::from_bits(v as u32);
                f64::from(if ftz { flush(v) } else { v })
            };
            compare_floats(c, value(a), value(b))
        }
        Type::F64 => compare_floats(c, f64::from_bits(a), f64::from_bits(b)),
        _ => {
            let shift = 64 - ty.bits();
            let signed = ty.is_signed() && !matches!(c, Cmp::Lo | Cmp::Ls | Cmp::Hi | Cmp::Hs);
            let key = |v: u64| {
                if signed {
                    i128::from((v << shift) as i64 >> shift)
                } else {
                    i128::from(v << shift >> shift)
                }
            };
            let (a, b) = (key(a), key(b));
            match c {
                Cmp::Eq => a == b,
                Cmp::Ne => a != b,
                Cmp::Lt | Cmp::Lo => a < b,
                Cmp::Le | Cmp::Ls => a <= b,
                Cmp::Gt | Cmp::Hi => a > b,
                _ => a >= b,
            }
        }
    }
}

fn selp(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let ty = ins.mods.ty(0).unwrap_or(Type::B32);
    let a = l.src(&ins.operands[1], ty)?;
    let b = l.src(&ins.operands[2], ty)?;
    let (c, negated) = l.pred(&ins.operands[3])?;
    let d = l.dst(&ins.operands[0])?;
    fn run32(cx: &mut Cx<'_>, op: &MicroOp) -> Step {
        alu::select::<u32, _>(cx, op, |c, a, b| if c { a } else { b })
    }
    fn run64(cx: &mut Cx<'_>, op: &MicroOp) -> Step {
        alu::select::<u64, _>(cx, op, |c, a, b| if c { a } else { b })
    }
    let run = if ty.bits() == 64 { run64 } else { run32 };
    l.emit(Class::Alu, run, d, a, b, c).x = u32::from(negated);
    Ok(())
}

/// slct: d = c >= 0 ? a : b.
fn slct(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let ty = ins.mods.ty(0).unwrap_or(Type::B32);
    let float = ins.mods.ty(1) == Some(Type::F32);
    let ftz = ins.mods.has(Flag::Ftz);
    let a = l.src(&ins.operands[1], ty)?;
    let b = l.src(&ins.operands[2], ty)?;
    let c = l.src(&ins.operands[3], Type::B32)?;
    let d = l.dst(&ins.operands[0])?;
    let wide = ty.bits() == 64;
    l.emit_action(Class::Alu, move |cx| {
        let (x, y) = (lane::read(cx, a, wide), lane::read(cx, b, wide));
        let z = u32::read(cx, c);
        let out = std::array::from_fn(|i| {
            let first = if float {
                let v = f32::from_bits(z[i]);
                (if ftz { flush(v) } else { v }) >= 0.0
            } else {
                z[i] as i32 >= 0
            };
            if first { x[i] } else { y[i] }
        });
        lane::write(cx, d, wide, out);
        Step::Next
    });
    Ok(())
}
