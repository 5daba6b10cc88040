//! f32 and f64 arithmetic (PTX ISA, "Floating Point Instructions").
//!
//! IEEE operations are the host's, in the rounding asked for. A NaN result in f32 is 0x7fffffff.
//! Approximate instructions give the correctly rounded result and are counted.

use fathom_ptx::ast::Instruction;
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Flag, Rounding, Type};

use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::alu::{self, bin, tri, un};
use crate::machine::cx::Cx;
use crate::machine::op::{Class, MicroOp, OpFn, Step};
use crate::machine::plain;

/// The NaN of the hardware.
pub const NAN: f32 = f32::from_bits(0x7fff_ffff);

/// NaNs become the one NaN.
#[inline(always)]
pub fn canon(v: f32) -> f32 {
    if v.is_nan() { NAN } else { v }
}

/// As [`canon`], seen in the bits: behind a square root the compiler folds the comparison away and
/// leaves the host's NaN.
#[inline(always)]
fn canon_bits(v: f32) -> f32 {
    if v.to_bits() & 0x7fff_ffff > 0x7f80_0000 { NAN } else { v }
}

/// Subnormals become zeros of the same sign.
#[inline(always)]
pub fn flush(v: f32) -> f32 {
    if v.to_bits() & 0x7f80_0000 == 0 { f32::from_bits(v.to_bits() & 0x8000_0000) } else { v }
}

#[inline(always)]
fn input<const FTZ: bool>(v: f32) -> f32 {
    if FTZ { flush(v) } else { v }
}

#[inline(always)]
fn output<const FTZ: bool, const SAT: bool>(v: f32) -> f32 {
    let v = if FTZ { flush(v) } else { v };
    if SAT {
        // NaN becomes +0.
        if v > 0.0 { v.min(1.0) } else { 0.0 }
    } else {
        canon(v)
    }
}

/// A directed rounding of the exact value `s + e`, where `s` is near and `e` is far below it.
fn directed32(s: f64, e: f64, mode: Rounding) -> f32 {
    if s.is_nan() {
        return NAN;
    }
    let near = s as f32;
    if s.is_infinite() {
        return near;
    }
    // Where the exact value lies beside the single.
    let rest = f64::from(near);
    let above = if rest.is_infinite() { near > 0.0 } else { (rest - s) - e > 0.0 };
    let below = if rest.is_infinite() { near < 0.0 } else { (rest - s) - e < 0.0 };
    let down = |v: f32| if v == 0.0 { -f32::from_bits(1) } else { v.next_down() };
    let up = |v: f32| if v == 0.0 { f32::from_bits(1) } else { v.next_up() };
    let positive = s > 0.0 || s == 0.0 && e > 0.0;
    match mode {
        Rounding::Rm if above => down(near),
        Rounding::Rp if below => up(near),
        Rounding::Rz if positive && above => down(near),
        Rounding::Rz if !positive && below => up(near),
        _ => near,
    }
}

/// s + e = a + b exactly (Knuth's TwoSum).
fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let s = a + b;
    let t = s - a;
    (s, (a - (s - t)) + (b - t))
}

/// The zero that a sum of zeros or of opposite values gives.
fn zero_sum(a: f64, b: f64, mode: Rounding) -> f64 {
    let both_negative = a.is_sign_negative() && b.is_sign_negative();
    let opposite = a.is_sign_negative() != b.is_sign_negative();
    if both_negative || opposite && mode == Rounding::Rm { -0.0 } else { 0.0 }
}

fn add32(a: f32, b: f32, mode: Rounding) -> f32 {
    let (a, b) = (f64::from(a), f64::from(b));
    let (s, e) = two_sum(a, b);
    if s == 0.0 && e == 0.0 {
        return zero_sum(a, b, mode) as f32;
    }
    directed32(s, if s.is_finite() { e } else { 0.0 }, mode)
}

fn mul32(a: f32, b: f32, mode: Rounding) -> f32 {
    directed32(f64::from(a) * f64::from(b), 0.0, mode)
}

fn fma32(a: f32, b: f32, c: f32, mode: Rounding) -> f32 {
    let (p, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let (s, e) = two_sum(p, c);
    if s == 0.0 && e == 0.0 {
        return zero_sum(p, c, mode) as f32;
    }
    directed32(s, if s.is_finite() { e } else { 0.0 }, mode)
}

fn div32(a: f32, b: f32, mode: Rounding) -> f32 {
    let near = f64::from(a) / f64::from(b);
    if near.is_nan() || near.is_infinite() || near == 0.0 {
        return canon(near as f32);
    }
    // The remainder's sign tells on which side of the quotient the exact value lies.
    let rest = (-near).mul_add(f64::from(b), f64::from(a));
    let e = if rest == 0.0 { 0.0 } else { (rest / f64::from(b)).signum() * near.abs() * 1e-17 };
    directed32(near, e, mode)
}

fn sqrt32(a: f32, mode: Rounding) -> f32 {
    let near = f64::from(a).sqrt();
    if near.is_nan() || near.is_infinite() || near == 0.0 {
        return canon(near as f32);
    }
    let rest = (-near).mul_add(near, f64::from(a));
    let e = if rest == 0.0 { 0.0 } else { rest.signum() * near * 1e-17 };
    directed32(near, e, mode)
}

/// Moves an f64 result one step where the rounding asks for it; `above` and `below` say where the
/// near result lies beside the exact one.
fn directed64(near: f64, error: f64, mode: Rounding) -> f64 {
    // error = exact - near
    if near.is_nan() {
        return near;
    }
    let (below, above) = (error > 0.0, error < 0.0);
    match mode {
        Rounding::Rm if above => near.next_down(),
        Rounding::Rp if below => near.next_up(),
        Rounding::Rz if near > 0.0 && above => near.next_down(),
        Rounding::Rz if near < 0.0 && below => near.next_up(),
        _ => near,
    }
}

/// The error of an overflowed result: the exact value is finite.
fn overflow_error(near: f64, finite: bool) -> f64 {
    if near.is_infinite() && finite { -near.signum() } else { 0.0 }
}

fn add64(a: f64, b: f64, mode: Rounding) -> f64 {
    let (s, e) = two_sum(a, b);
    if s == 0.0 && e == 0.0 {
        return zero_sum(a, b, mode);
    }
    let finite = a.is_finite() && b.is_finite();
    let e = if s.is_finite() { e } else { overflow_error(s, finite) };
    directed64(s, e, mode)
}

fn fma64(a: f64, b: f64, c: f64, mode: Rounding) -> f64 {
    let near = a.mul_add(b, c);
    let finite = a.is_finite() && b.is_finite() && c.is_finite();
    if near.is_infinite() || near.is_nan() {
        return directed64(near, overflow_error(near, finite), mode);
    }
    let error = fma_error(a, b, c, near);
    // Exactly zero: of zeros, or by cancellation (then -0 toward minus infinity).
    if near == 0.0 && error == 0.0 {
        let exact = a == 0.0 || b == 0.0;
        return if exact { zero_sum(a * b, c, mode) } else { zero_sum(-c, c, mode) };
    }
    directed64(near, error, mode)
}

/// The sign of a*b + c - near, by integers: exact for every finite value.
fn fma_error(a: f64, b: f64, c: f64, near: f64) -> f64 {
    let split = |v: f64| {
        let bits = v.to_bits();
        let exponent = (bits >> 52 & 0x7ff) as i32;
        let fraction = bits & ((1 << 52) - 1);
        let (m, e) =
            if exponent == 0 { (fraction, -1074) } else { (fraction | 1 << 52, exponent - 1075) };
        (v.is_sign_negative(), u128::from(m), e)
    };
    let (sa, ma, ea) = split(a);
    let (sb, mb, eb) = split(b);
    let (sc, mc, ec) = split(c);
    let (sn, mn, en) = split(near);
    let terms = [(sa ^ sb, ma * mb, ea + eb), (sc, mc, ec), (!sn, mn, en)];
    // A sum of three terms over a common scale, in words of 32 bits.
    let lowest = terms.iter().filter(|t| t.1 != 0).map(|t| t.2).min().unwrap_or(0);
    let mut sum = [0i64; 160];
    for (negative, m, e) in terms {
        if m == 0 {
            continue;
        }
        let shift = (e - lowest) as usize;
        let (word, bit) = (shift / 32, shift % 32);
        for k in 0..4 {
            let part = ((m >> (32 * k)) as u32 as u64) << bit;
            let sign = if negative { -1 } else { 1 };
            sum[word + k] += sign * (part & 0xffff_ffff) as i64;
            sum[word + k + 1] += sign * (part >> 32) as i64;
        }
    }
    for k in 0..sum.len() - 1 {
        sum[k + 1] += sum[k] >> 32;
        sum[k] &= 0xffff_ffff;
    }
    if *sum.last().expect("words") < 0 {
        return -1.0;
    }
    if sum.iter().all(|&w| w == 0) { 0.0 } else { 1.0 }
}

fn mul64(a: f64, b: f64, mode: Rounding) -> f64 {
    let near = a * b;
    if near == 0.0 && (a == 0.0 || b == 0.0) || near.is_nan() {
        return near;
    }
    let finite = a.is_finite() && b.is_finite();
    if near.is_infinite() {
        return directed64(near, overflow_error(near, finite), mode);
    }
    let error = fma_error(a, b, 0.0, near);
    if near == 0.0 {
        // An underflowed product: one step away from zero where its side is asked for.
        let tiny = f64::from_bits(1);
        return match mode {
            Rounding::Rp if error > 0.0 => tiny,
            Rounding::Rm if error < 0.0 => -tiny,
            _ => near,
        };
    }
    directed64(near, error, mode)
}

fn div64(a: f64, b: f64, mode: Rounding) -> f64 {
    let near = a / b;
    if near.is_infinite() && a.is_finite() && b != 0.0 {
        return directed64(near, overflow_error(near, true), mode);
    }
    if near == 0.0 && a != 0.0 && b.is_finite() {
        // An underflowed quotient: one step away from zero where its side is asked for.
        let negative = near.is_sign_negative();
        return match mode {
            Rounding::Rp if !negative => f64::from_bits(1),
            Rounding::Rm if negative => -f64::from_bits(1),
            _ => near,
        };
    }
    if near.is_nan() || near.is_infinite() || near == 0.0 {
        return near;
    }
    // a - near * b, seen from the quotient.
    let rest = -fma_error(near, b, 0.0, a);
    directed64(near, rest * b.signum(), mode)
}

fn sqrt64(a: f64, mode: Rounding) -> f64 {
    let near = a.sqrt();
    if near.is_nan() || near.is_infinite() || near == 0.0 {
        return near;
    }
    directed64(near, -fma_error(near, near, 0.0, a), mode)
}

macro_rules! rounded {
    ($mode:expr, |$m:ident| $e:expr, $rn:expr) => {
        match $mode {
            Rounding::Rz => {
                const $m: Rounding = Rounding::Rz;
                $e
            }
            Rounding::Rm => {
                const $m: Rounding = Rounding::Rm;
                $e
            }
            Rounding::Rp => {
                const $m: Rounding = Rounding::Rp;
                $e
            }
            _ => $rn,
        }
    };
}

/// Picks the version for `.ftz` and `.sat`.
macro_rules! flags {
    ($ftz:expr, $sat:expr, |$f:ident, $s:ident| $e:expr) => {
        match ($ftz, $sat) {
            (false, false) => {
                const $f: bool = false;
                const $s: bool = false;
                $e
            }
            (true, false) => {
                const $f: bool = true;
                const $s: bool = false;
                $e
            }
            (false, true) => {
                const $f: bool = false;
                const $s: bool = true;
                $e
            }
            (true, true) => {
                const $f: bool = true;
                const $s: bool = true;
                $e
            }
        }
    };
}

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let ty = ins.mods.types().last().unwrap_or(Type::F32);
    let approximate = ins.mods.has(Flag::Approx) || ins.mods.has(Flag::Full);
    let count = ins.operands.len() - 1;
    let found = match ty {
        Type::F32 => f32_op(ins, count),
        Type::F64 => f64_op(ins, count),
        _ => None,
    };
    if ins.op == Opcode::Testp {
        return testp(l, ins, ty);
    }
    let Some((class, run)) = found else { return unsupported(mnemonic(ins)) };
    let mut regs = [0; 3];
    for (reg, operand) in regs.iter_mut().zip(&ins.operands[1..]) {
        *reg = l.src(operand, ty)?;
    }
    let d = l.dst(&ins.operands[0])?;
    if approximate {
        l.approximate(ins);
    }
    let op = l.emit(class, run, d, regs[0], regs[1], regs[2]);
    op.fmas = u8::from(is_plain_fma(ins));
    Ok(())
}

/// Whether an instruction is [`plain::FMA`].
fn is_plain_fma(ins: &Instruction) -> bool {
    let (m, ty) = (&ins.mods, ins.mods.types().last());
    matches!(ins.op, Opcode::Fma | Opcode::Mad)
        && ty.is_none_or(|ty| ty == Type::F32)
        && m.rounding().unwrap_or(Rounding::Rn) == Rounding::Rn
        && !m.has(Flag::Ftz)
        && !m.has(Flag::Sat)
}

fn f32_op(ins: &Instruction, count: usize) -> Option<(Class, OpFn)> {
    use Opcode::*;
    let mode = ins.mods.rounding().unwrap_or(Rounding::Rn);
    let ftz = ins.mods.has(Flag::Ftz);
    let sat = ins.mods.has(Flag::Sat);
    let run = match (ins.op, count) {
        (Add, 2) => flags!(ftz, sat, |F, S| rounded!(
            mode,
            |M| bin!(f32, f32 => f32, |a, b| {
                output::<F, S>(add32(input::<F>(a), input::<F>(b), M))
            }),
            bin!(f32, f32 => f32, |a, b| output::<F, S>(input::<F>(a) + input::<F>(b)))
        )),
        (Sub, 2) => flags!(ftz, sat, |F, S| rounded!(
            mode,
            |M| bin!(f32, f32 => f32, |a, b| {
                output::<F, S>(add32(input::<F>(a), -input::<F>(b), M))
            }),
            bin!(f32, f32 => f32, |a, b| output::<F, S>(input::<F>(a) - input::<F>(b)))
        )),
        (Mul, 2) => flags!(ftz, sat, |F, S| rounded!(
            mode,
            |M| bin!(f32, f32 => f32, |a, b| {
                output::<F, S>(mul32(input::<F>(a), input::<F>(b), M))
            }),
            bin!(f32, f32 => f32, |a, b| output::<F, S>(input::<F>(a) * input::<F>(b)))
        )),
        (Fma | Mad, 3) if is_plain_fma(ins) => plain::FMA,
        (Fma | Mad, 3) => flags!(ftz, sat, |F, S| rounded!(
            mode,
            |M| tri!(f32, f32, f32 => f32, |a, b, c| {
                output::<F, S>(fma32(input::<F>(a), input::<F>(b), input::<F>(c), M))
            }),
            tri!(f32, f32, f32 => f32, |a, b, c| {
                output::<F, S>(input::<F>(a).mul_add(input::<F>(b), input::<F>(c)))
            })
        )),
        (Div, 2) => flags!(ftz, false, |F, S| rounded!(
            mode,
            |M| bin!(f32, f32 => f32, |a, b| {
                output::<F, S>(div32(input::<F>(a), input::<F>(b), M))
            }),
            bin!(f32, f32 => f32, |a, b| output::<F, S>(input::<F>(a) / input::<F>(b)))
        )),
        (Rcp, 1) => flags!(ftz, false, |F, S| rounded!(
            mode,
            |M| un!(f32 => f32, |a| output::<F, S>(div32(1.0, input::<F>(a), M))),
            un!(f32 => f32, |a| output::<F, S>(1.0 / input::<F>(a)))
        )),
        (Sqrt, 1) => flags!(ftz, false, |F, S| rounded!(
            mode,
            |M| un!(f32 => f32, |a| canon_bits(output::<F, S>(sqrt32(input::<F>(a), M)))),
            un!(f32 => f32, |a| canon_bits(output::<F, S>(input::<F>(a).sqrt())))
        )),
        (Min | Max, 2) => return min_max(ins).map(|run| (Class::Alu, run)),
        (Abs, 1) if ftz => un!(f32 => f32, |a| flush(a).abs()),
        (Abs, 1) => un!(f32 => f32, |a| a.abs()),
        (Neg, 1) if ftz => un!(f32 => f32, |a| -flush(a)),
        (Neg, 1) => un!(f32 => f32, |a| -a),
        (Copysign, 2) => bin!(f32, f32 => f32, |a, b| b.copysign(a)),
        (op, 1) => return special(op, ftz).map(|run| (Class::Sfu, run)),
        _ => return None,
    };
    let class = match ins.op {
        Div | Rcp | Sqrt => Class::Sfu,
        Add | Sub | Mul | Fma | Mad => Class::Fma,
        _ => Class::Alu,
    };
    Some((class, run))
}

/// The functions of the special-function unit, correctly rounded by way of f64.
fn special(op: Opcode, ftz: bool) -> Option<OpFn> {
    use Opcode::*;
    Some(match (op, ftz) {
        (Ex2, false) => un!(f32 => f32, |a| canon(f64::from(a).exp2() as f32)),
        (Ex2, true) => un!(f32 => f32, |a| canon(flush(f64::from(flush(a)).exp2() as f32))),
        (Lg2, false) => un!(f32 => f32, |a| canon(f64::from(a).log2() as f32)),
        (Lg2, true) => un!(f32 => f32, |a| canon(flush(f64::from(flush(a)).log2() as f32))),
        (Sin, false) => un!(f32 => f32, |a| canon(f64::from(a).sin() as f32)),
        (Sin, true) => un!(f32 => f32, |a| canon(flush(f64::from(flush(a)).sin() as f32))),
        (Cos, false) => un!(f32 => f32, |a| canon(f64::from(a).cos() as f32)),
        (Cos, true) => un!(f32 => f32, |a| canon(flush(f64::from(flush(a)).cos() as f32))),
        (Tanh, _) => un!(f32 => f32, |a| canon(f64::from(a).tanh() as f32)),
        (Rsqrt, false) => un!(f32 => f32, |a| canon((1.0 / f64::from(a).sqrt()) as f32)),
        (Rsqrt, true) => {
            un!(f32 => f32, |a| canon(flush((1.0 / f64::from(flush(a)).sqrt()) as f32)))
        }
        _ => return None,
    })
}

fn least<const FTZ: bool, const NAN_WINS: bool>(a: f32, b: f32) -> f32 {
    let (a, b) = (input::<FTZ>(a), input::<FTZ>(b));
    if NAN_WINS && (a.is_nan() || b.is_nan()) || a.is_nan() && b.is_nan() {
        NAN
    } else if b.is_nan() || a < b || a == b && a.is_sign_negative() {
        a
    } else {
        b
    }
}

fn most<const FTZ: bool, const NAN_WINS: bool>(a: f32, b: f32) -> f32 {
    let (a, b) = (input::<FTZ>(a), input::<FTZ>(b));
    if NAN_WINS && (a.is_nan() || b.is_nan()) || a.is_nan() && b.is_nan() {
        NAN
    } else if b.is_nan() || a > b || a == b && a.is_sign_positive() {
        a
    } else {
        b
    }
}

/// `.xorsign.abs`: of the magnitudes, with the sign of the product.
fn xorsign(a: f32, b: f32, f: impl Fn(f32, f32) -> f32) -> f32 {
    let sign = (a.to_bits() ^ b.to_bits()) & 0x8000_0000;
    f32::from_bits(f(a.abs(), b.abs()).to_bits() & 0x7fff_ffff | sign)
}

fn min_max(ins: &Instruction) -> Option<OpFn> {
    let least_of = ins.op == Opcode::Min;
    let ftz = ins.mods.has(Flag::Ftz);
    let nan = ins.mods.has(Flag::Nan);
    if ins.mods.has(Flag::Xorsign) {
        return Some(flags!(ftz, nan, |F, N| if least_of {
            bin!(f32, f32 => f32, |a, b| xorsign(a, b, least::<F, N>))
        } else {
            bin!(f32, f32 => f32, |a, b| xorsign(a, b, most::<F, N>))
        }));
    }
    Some(flags!(ftz, nan, |F, N| if least_of {
        bin!(f32, f32 => f32, least::<F, N>)
    } else {
        bin!(f32, f32 => f32, most::<F, N>)
    }))
}

fn f64_op(ins: &Instruction, count: usize) -> Option<(Class, OpFn)> {
    use Opcode::*;
    let mode = ins.mods.rounding().unwrap_or(Rounding::Rn);
    let run = match (ins.op, count) {
        (Add, 2) => rounded!(
            mode,
            |M| bin!(f64, f64 => f64, |a, b| add64(a, b, M)),
            bin!(f64, f64 => f64, |a, b| a + b)
        ),
        (Sub, 2) => rounded!(
            mode,
            |M| bin!(f64, f64 => f64, |a, b| add64(a, -b, M)),
            bin!(f64, f64 => f64, |a, b| a - b)
        ),
        (Mul, 2) => rounded!(
            mode,
            |M| bin!(f64, f64 => f64, |a, b| mul64(a, b, M)),
            bin!(f64, f64 => f64, |a, b| a * b)
        ),
        (Fma | Mad, 3) => rounded!(
            mode,
            |M| tri!(f64, f64, f64 => f64, |a, b, c| fma64(a, b, c, M)),
            tri!(f64, f64, f64 => f64, |a, b, c| a.mul_add(b, c))
        ),
        (Div, 2) => rounded!(
            mode,
            |M| bin!(f64, f64 => f64, |a, b| div64(a, b, M)),
            bin!(f64, f64 => f64, |a, b| a / b)
        ),
        // The gross approximation has the low half of its result zero.
        (Rcp, 1) if ins.mods.has(Flag::Approx) => {
            un!(f64 => f64, |a| f64::from_bits((1.0 / flush64(a)).to_bits() & !0xffff_ffff))
        }
        (Rsqrt, 1) if ins.mods.has(Flag::Ftz) => {
            un!(f64 => f64, |a| f64::from_bits((1.0 / flush64(a).sqrt()).to_bits() & !0xffff_ffff))
        }
        (Rsqrt, 1) => un!(f64 => f64, |a| 1.0 / a.sqrt()),
        (Rcp, 1) => {
            rounded!(mode, |M| un!(f64 => f64, |a| div64(1.0, a, M)), un!(f64 => f64, |a| 1.0 / a))
        }
        (Sqrt, 1) => {
            rounded!(mode, |M| un!(f64 => f64, |a| sqrt64(a, M)), un!(f64 => f64, |a| a.sqrt()))
        }
        (Min, 2) => bin!(f64, f64 => f64, |a, b| {
            if b.is_nan() || a < b || a == b && a.is_sign_negative() { a } else { b }
        }),
        (Max, 2) => bin!(f64, f64 => f64, |a, b| {
            if b.is_nan() || a > b || a == b && a.is_sign_positive() { a } else { b }
        }),
        (Abs, 1) => un!(f64 => f64, |a| a.abs()),
        (Neg, 1) => un!(f64 => f64, |a| -a),
        (Copysign, 2) => bin!(f64, f64 => f64, |a, b| b.copysign(a)),
        _ => return None,
    };
    Some((Class::Fp64, run))
}

fn flush64(v: f64) -> f64 {
    if v.is_subnormal() { 0.0f64.copysign(v) } else { v }
}

fn testp(l: &mut Lower<'_>, ins: &Instruction, ty: Type) -> Lowered {
    let a = l.src(&ins.operands[1], ty)?;
    let p = l.dst_pred(&ins.operands[0])?;
    let flags: Vec<Flag> = ins.mods.flags().collect();
    let kind = flags.first().copied().unwrap_or(Flag::Finite);
    let matches = move |class: std::num::FpCategory| {
        use std::num::FpCategory::*;
        match kind {
            Flag::Finite => !matches!(class, Nan | Infinite),
            Flag::Infinite => class == Infinite,
            Flag::Number => class != Nan,
            Flag::NotANumber => class == Nan,
            Flag::Normal => class == Normal,
            _ => class == Subnormal,
        }
    };
    let wide = ty == Type::F64;
    l.emit_action(Class::Alu, move |cx| {
        use crate::machine::lane::Lane;
        let mut mask = 0;
        for lane in cx.lanes() {
            let class = if wide {
                f64::read(cx, a)[lane].classify()
            } else {
                f32::read(cx, a)[lane].classify()
            };
            mask |= u32::from(matches(class)) << lane;
        }
        cx.set_pred(p, mask);
        Step::Next
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODES: [Rounding; 3] = [Rounding::Rz, Rounding::Rm, Rounding::Rp];

    /// Directed rounding by search: the largest single not above (or smallest not below).
    fn oracle(exact_sign_vs: impl Fn(f32) -> std::cmp::Ordering, near: f32, mode: Rounding) -> f32 {
        use std::cmp::Ordering::*;
        let order = exact_sign_vs(near);
        let positive = exact_sign_vs(0.0) == Greater;
        match (mode, order) {
            (_, Equal) => near,
            (Rounding::Rm, Less) => near.next_down(),
            (Rounding::Rp, Greater) => near.next_up(),
            (Rounding::Rz, Less) if positive => near.next_down(),
            (Rounding::Rz, Greater) if !positive => near.next_up(),
            _ => near,
        }
    }

    #[test]
    fn directed_products_agree_with_integers() {
        let values = [1.0f32, 3.3e-5, -7.77e12, 1.1754944e-38, 6.5e-39, -1.0000001, 2.5e38];
        for a in values {
            for b in values {
                let exact = f64::from(a) * f64::from(b);
                if exact.abs() > f64::from(f32::MAX) || exact.abs() < 1e-44 {
                    continue;
                }
                let compare = |v: f32| exact.partial_cmp(&f64::from(v)).unwrap();
                for mode in MODES {
                    let expected = oracle(compare, exact as f32, mode);
                    assert_eq!(mul32(a, b, mode).to_bits(), expected.to_bits(), "{a} {b} {mode}");
                }
            }
        }
    }

    #[test]
    fn directed_sums_see_what_lies_far_below() {
        assert_eq!(add32(1.0, 1e-30, Rounding::Rp), 1.0f32.next_up());
        assert_eq!(add32(1.0, -1e-30, Rounding::Rz), 1.0f32.next_down());
        assert_eq!(add32(1.0, -1e-30, Rounding::Rp), 1.0);
        assert_eq!(add32(f32::MAX, f32::MAX, Rounding::Rz), f32::MAX);
        assert_eq!(add32(1.0, -1.0, Rounding::Rm).to_bits(), (-0.0f32).to_bits());
        assert_eq!(fma32(1.0, 1.0, 1e-30, Rounding::Rp), 1.0f32.next_up());
        assert_eq!(div32(1.0, 3.0, Rounding::Rp), (1.0f32 / 3.0).next_up().min(0.333_333_34));
        assert_eq!(sqrt32(3.0, Rounding::Rz), 1.732_050_8);
    }

    #[test]
    fn directed_doubles() {
        assert_eq!(fma64(1.0, 1.0, 1e-300, Rounding::Rp), 1.0f64.next_up());
        assert_eq!(fma64(1.0, 1.0, 1e-300, Rounding::Rm), 1.0);
        assert_eq!(mul64(0.1, 0.1, Rounding::Rp), (0.1f64 * 0.1).max(0.010_000_000_000_000_002));
        assert_eq!(div64(1.0, 3.0, Rounding::Rp), (1.0f64 / 3.0).next_up());
        assert_eq!(div64(1.0, 3.0, Rounding::Rz), 1.0 / 3.0);
        assert_eq!(sqrt64(2.0, Rounding::Rm), 2.0f64.sqrt().next_down());
        assert_eq!(mul64(1e-200, 1e-200, Rounding::Rp), f64::from_bits(1));
        assert_eq!(add64(f64::MAX, f64::MAX, Rounding::Rz), f64::MAX);
    }

    #[test]
    fn minimum_and_maximum_know_nan_and_signed_zero() {
        assert_eq!(least::<false, false>(f32::NAN, 2.0), 2.0);
        assert_eq!(least::<false, true>(f32::NAN, 2.0).to_bits(), 0x7fff_ffff);
        assert!(least::<false, false>(0.0, -0.0).is_sign_negative());
        assert!(most::<false, false>(-0.0, 0.0).is_sign_positive());
        assert_eq!(xorsign(-3.0, 2.0, most::<false, false>), -3.0);
    }
}
