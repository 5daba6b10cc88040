//! Conversions (PTX ISA, "Data Movement and Conversion Instructions: cvt").
//!
//! Floating values pass through f64, which holds every narrower format exactly; [`round`] then
//! rounds once. 64-bit integers go by their own way.

use fathom_ptx::ast::{Instruction, Operand};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Flag, Rounding, Type};

use super::float::{NAN, canon, flush};
use super::half::HalfFormat;
use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::alu::{self, bin, un};
use crate::machine::cx::Cx;
use crate::machine::lane::{self, Lane};
use crate::machine::op::{Class, MicroOp, OpFn, Step};
use crate::machine::registers::LANES;

/// A binary floating-point format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Bits of the exponent.
    pub exponent: u32,
    /// Bits of the fraction.
    pub fraction: u32,
    /// Code of the largest finite magnitude.
    pub max: u64,
    /// Code of infinity, where there is one.
    pub infinity: Option<u64>,
    /// Code of NaN, where there is one.
    pub nan: Option<u64>,
}

impl Format {
    pub const F32: Format = Format {
        exponent: 8,
        fraction: 23,
        max: 0x7f7f_ffff,
        infinity: Some(0x7f80_0000),
        nan: Some(0x7fff_ffff),
    };
    /// TF32 in the high bits of a single.
    pub const TF32: Format = Format {
        exponent: 8,
        fraction: 10,
        max: 0x3fbff,
        infinity: Some(0x3fc00),
        nan: Some(0x3ffff),
    };
    pub const F16: Format = Format {
        exponent: 5,
        fraction: 10,
        max: 0x7bff,
        infinity: Some(0x7c00),
        nan: Some(0x7fff),
    };
    pub const BF16: Format =
        Format { exponent: 8, fraction: 7, max: 0x7f7f, infinity: Some(0x7f80), nan: Some(0x7fff) };
    pub const E4M3: Format =
        Format { exponent: 4, fraction: 3, max: 0x7e, infinity: None, nan: Some(0x7f) };
    pub const E5M2: Format =
        Format { exponent: 5, fraction: 2, max: 0x7b, infinity: Some(0x7c), nan: Some(0x7f) };

    fn bias(self) -> i32 {
        (1 << (self.exponent - 1)) - 1
    }

    fn sign(self) -> u64 {
        1 << (self.exponent + self.fraction)
    }
}

/// Rounds an f64 to a format. What is too large becomes infinity (or the largest value where the
/// rounding is towards zero, where the format has no infinity, or with `saturate`).
pub fn round(v: f64, to: Format, mode: Rounding, saturate: bool) -> u64 {
    let sign = if v.is_sign_negative() { to.sign() } else { 0 };
    if v.is_nan() {
        return to.nan.expect("formats without NaN have their own way");
    }
    if v.is_infinite() {
        return match to.infinity {
            Some(code) if !saturate => sign | code,
            _ if saturate => sign | to.max,
            _ => to.nan.expect("a format without infinity has NaN"),
        };
    }
    if v == 0.0 {
        return sign;
    }
    let bits = v.abs().to_bits();
    let raw = (bits >> 52) as i32;
    let (mut exponent, mut m) = (raw - 1023, bits & ((1 << 52) - 1) | 1 << 52);
    if raw == 0 {
        let shift = (m & !(1 << 52)).leading_zeros() - 11;
        m = (m & !(1 << 52)) << shift;
        exponent = -1022 - shift as i32;
    }
    // Below the smallest normal exponent the fraction shortens.
    let least = 1 - to.bias();
    let drop = 52 - to.fraction as i32 + (least - exponent).max(0);
    let (kept, rest, half) = if drop >= 64 {
        (0, 1, 2)
    } else if drop == 0 {
        (m, 0, 1)
    } else {
        let drop = drop as u32;
        let rest = if drop >= 64 { m } else { m & ((1u64 << drop) - 1) };
        (m.checked_shr(drop).unwrap_or(0), rest, 1u64 << (drop - 1))
    };
    let up = match mode {
        Rounding::Rz => false,
        Rounding::Rm => sign != 0 && rest != 0,
        Rounding::Rp => sign == 0 && rest != 0,
        Rounding::Rna => rest >= half,
        _ => rest > half || rest == half && kept & 1 != 0,
    };
    let kept = kept + u64::from(up);
    let base = if exponent >= least { ((exponent - least) as u64) << to.fraction } else { 0 };
    // The hidden bit of a normal value carries into the exponent field.
    let code = base + kept;
    if code > to.max {
        let toward_max = match mode {
            Rounding::Rz => true,
            Rounding::Rm => sign == 0,
            Rounding::Rp => sign != 0,
            _ => false,
        };
        return match to.infinity {
            _ if saturate || toward_max => sign | to.max,
            Some(code) => sign | code,
            None => sign | to.nan.expect("a format without infinity has NaN"),
        };
    }
    sign | code
}

/// The value of an E4M3 code.
pub fn e4m3(code: u8) -> f64 {
    let magnitude = code & 0x7f;
    let value = match magnitude {
        0x7f => f64::NAN,
        m if m < 8 => f64::from(m) / 512.0,
        m => (1.0 + f64::from(m & 7) / 8.0) * f64::from(i32::from(m >> 3) - 7).exp2(),
    };
    if code & 0x80 != 0 { -value } else { value }
}

/// The value of an E5M2 code: the high byte of an f16.
pub fn e5m2(code: u8) -> f64 {
    half::f16::from_bits(u16::from(code) << 8).to_f64()
}

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    if ins.op == Opcode::CvtPack {
        return pack(l, ins);
    }
    let (Some(to), Some(from)) = (ins.mods.ty(0), ins.mods.ty(1)) else {
        return unsupported(mnemonic(ins));
    };
    if l.dst_bits(&ins.operands[0], to.bits()) > 64 {
        return unsupported(format!("{} to a register of 128 bits", mnemonic(ins)));
    }
    if let Some(run) = fast(ins, to, from) {
        let a = l.src(&ins.operands[1], from)?;
        let d = l.dst(&ins.operands[0])?;
        if l.dst_bits(&ins.operands[0], to.bits()) <= 32 || to.bits() == 64 {
            l.emit(Class::Convert, run, d, a, 0, 0);
            return Ok(());
        }
    }
    if to.bits() >= 16 && is_packed(to) || is_packed(from) {
        return packed(l, ins, to, from);
    }
    scalar(l, ins, to, from)
}

fn is_packed(ty: Type) -> bool {
    use Type::*;
    matches!(ty, F16x2 | Bf16x2 | E4m3x2 | E5m2x2 | E2m1x2 | E2m3x2 | E3m2x2 | Ue8m0x2 | S2f6x2)
}

/// The common conversions as plain loops.
fn fast(ins: &Instruction, to: Type, from: Type) -> Option<OpFn> {
    use Type::*;
    let ftz = ins.mods.has(Flag::Ftz);
    let sat = ins.mods.has(Flag::Sat) || ins.mods.has(Flag::Satfinite);
    let relu = ins.mods.has(Flag::Relu);
    if ftz || sat || relu {
        return None;
    }
    let rn = matches!(ins.mods.rounding(), None | Some(Rounding::Rn));
    Some(match (to, from) {
        (F32, Bf16) => un!(u32 => f32, |a| canon(f32::from_bits(a << 16))),
        (F32, F16) => un!(half::f16 => f32, |a| canon(a.to_f32())),
        (Bf16, F32) if rn => un!(f32 => u32, |a| u32::from(bf16_nearest(a))),
        (F16, F32) if rn => un!(f32 => u32, |a| {
            u32::from(if a.is_nan() { 0x7fff } else { half::f16::from_f32(a).to_bits() })
        }),
        (U16, U32 | S32) => un!(u32 => u16, |a| a as u16),
        (S16, U32 | S32) => un!(u32 => i16, |a| a as i16),
        (U16, U64 | S64) => un!(u64 => u16, |a| a as u16),
        (U32 | S32, U16) => un!(u16 => u32, u32::from),
        (U32 | S32, S16) => un!(i16 => i32, i32::from),
        (U32 | S32, U8) => un!(u8 => u32, u32::from),
        (U64 | S64, U16) => un!(u16 => u64, u64::from),
        (U64 | S64, U32) => un!(u32 => u64, u64::from),
        (U64 | S64, S32) => un!(i32 => i64, i64::from),
        (U32 | S32, U64 | S64) => un!(u64 => u32, |a| a as u32),
        (U32 | S32, U32 | S32) => un!(u32 => u32, |a| a),
        (U64 | S64, U64 | S64) => un!(u64 => u64, |a| a),
        (F32, S32) if rn => un!(i32 => f32, |a| a as f32),
        (F32, U32) if rn => un!(u32 => f32, |a| a as f32),
        (F64, F32) => un!(f32 => f64, f64::from),
        (F32, F64) if rn => un!(f64 => f32, |a| canon(a as f32)),
        (F64, S32) => un!(i32 => f64, f64::from),
        (F64, U32) => un!(u32 => f64, f64::from),
        _ => return None,
    })
}

/// Round to nearest even, NaN to 0x7fff.
#[inline(always)]
fn bf16_nearest(v: f32) -> u16 {
    let bits = v.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if v.is_nan() { 0x7fff } else { rounded as u16 }
}

/// A single to FP8 with `F` bits of fraction, of which `MAX` is the largest code: to nearest even,
/// saturating, NaN to 0x7f, as [`round`] does it.
#[inline(always)]
fn fp8_nearest<const F: u32, const MAX: u32>(v: f32) -> u32 {
    let exponent = 7 - F;
    let bias = (1u32 << (exponent - 1)) - 1;
    let (sign, bits) = (v.to_bits() >> 31 << 7, v.to_bits() & 0x7fff_ffff);
    // Codes and singles differ by the bias and the bits that are cut off.
    let (cut, behind) = (23 - F, (127 - bias) << F);
    let most = (MAX + behind) << cut;
    let least = (128 - bias) << 23;
    let capped = if bits > most { most } else { bits };
    let normal = (capped.wrapping_add((1 << (cut - 1)) - 1 + (capped >> cut & 1)) >> cut)
        .wrapping_sub(behind);
    // To the place of the smallest code, by the addition of what has its last place there.
    let anchor = f32::from_bits((128 - bias + cut) << 23);
    let tiny = (f32::from_bits(capped) + anchor).to_bits().wrapping_sub(anchor.to_bits());
    let code = if bits < least { tiny } else { normal };
    if bits > 0x7f80_0000 { 0x7f } else { sign | code }
}

/// An E4M3 code as an f16, which holds all of them as normal values.
#[inline(always)]
fn e4m3_to_f16(code: u32) -> u32 {
    let magnitude = code & 0x7f;
    let value = f32::from_bits(magnitude << 20) * f32::from_bits((120 + 127) << 23);
    let half = if magnitude == 0 { 0 } else { (value.to_bits() >> 13).wrapping_sub(112 << 10) };
    if magnitude == 0x7f { 0x7fff } else { (code & 0x80) << 8 | half }
}

#[derive(Clone, Copy)]
enum Value {
    Float(f64),
    Int(i128),
}

fn read_scalar(ty: Type, bits: u64, ftz: bool) -> Value {
    use Type::*;
    Value::Float(match ty {
        F64 => f64::from_bits(bits),
        F32 | Tf32 => {
            let v = f32::from_bits(bits as u32);
            f64::from(if ftz { flush(v) } else { v })
        }
        F16 => HalfFormat::F16.value(bits as u16),
        Bf16 => HalfFormat::Bf16.value(bits as u16),
        E4m3 => e4m3(bits as u8),
        E5m2 => e5m2(bits as u8),
        U8 | U16 | U32 | U64 => return Value::Int(i128::from(truncate(bits, ty.bits()))),
        _ => {
            let shift = 64 - ty.bits();
            return Value::Int(i128::from((bits << shift) as i64 >> shift));
        }
    })
}

fn truncate(bits: u64, width: u32) -> u64 {
    if width >= 64 { bits } else { bits & ((1 << width) - 1) }
}

#[derive(Clone, Copy)]
struct How {
    to: Type,
    from: Type,
    mode: Option<Rounding>,
    ftz: bool,
    sat: bool,
    satfinite: bool,
    relu: bool,
}

impl How {
    fn of(ins: &Instruction, to: Type, from: Type) -> How {
        How {
            to,
            from,
            mode: ins.mods.rounding(),
            ftz: ins.mods.has(Flag::Ftz),
            sat: ins.mods.has(Flag::Sat),
            satfinite: ins.mods.has(Flag::Satfinite),
            relu: ins.mods.has(Flag::Relu),
        }
    }

    fn convert(self, bits: u64) -> u64 {
        match read_scalar(self.from, bits, self.ftz) {
            Value::Float(v) if self.to.is_float() => self.to_float(v),
            Value::Float(v) => self.to_int(v),
            Value::Int(v) if self.to.is_float() => self.int_to_float(v),
            Value::Int(v) => self.int_to_int(v),
        }
    }

    fn to_int(self, v: f64) -> u64 {
        let bits = self.to.bits();
        if v.is_nan() {
            // Where either side has 64 bits the most negative pattern, else zero.
            return if bits == 64 || self.from == Type::F64 { 1 << (bits - 1) } else { 0 };
        }
        let v = integral(v, self.mode.unwrap_or(Rounding::Rzi));
        let (low, high) = limits(self.to);
        let value = if v <= low as f64 {
            low
        } else if v >= high as f64 {
            high
        } else {
            v as i128
        };
        truncate(value as u64, bits)
    }

    fn int_to_int(self, v: i128) -> u64 {
        let (low, high) = limits(self.to);
        let v = if self.sat { v.clamp(low, high) } else { v };
        truncate(v as u64, self.to.bits())
    }

    fn int_to_float(self, v: i128) -> u64 {
        let mode = self.mode.unwrap_or(Rounding::Rn);
        if self.to == Type::F64 {
            return integer_to_f64(v, mode);
        }
        // Of more than 53 bits, the last one that is kept stands for what is cut off.
        let magnitude = v.unsigned_abs();
        let excess = (128 - magnitude.leading_zeros()).saturating_sub(53);
        let cut = magnitude & ((1 << excess) - 1) != 0;
        let kept = (magnitude >> excess) | u128::from(cut);
        let x = kept as f64 * f64::from(excess).exp2();
        self.to_float(if v < 0 { -x } else { x })
    }

    fn to_float(self, v: f64) -> u64 {
        let integral_mode = matches!(
            self.mode,
            Some(Rounding::Rni | Rounding::Rzi | Rounding::Rmi | Rounding::Rpi)
        );
        let v = match self.mode {
            Some(mode) if integral_mode => integral(v, mode),
            _ => v,
        };
        let mode = if integral_mode { Rounding::Rn } else { self.mode.unwrap_or(Rounding::Rn) };
        let v = if self.sat { if v > 0.0 { v.min(1.0) } else { 0.0 } } else { v };
        // relu also takes NaN to the canonical NaN, which rounding does.
        let v = if self.relu && v <= 0.0 { 0.0 } else { v };
        let s = self.satfinite;
        match self.to {
            Type::F64 => v.to_bits(),
            Type::F32 => {
                let code = round(v, Format::F32, mode, s) as u32;
                let out = f32::from_bits(code);
                u64::from(if self.ftz { flush(out) } else { out }.to_bits())
            }
            Type::Tf32 => round(v, Format::TF32, mode, s) << 13,
            Type::F16 => round(v, Format::F16, mode, s),
            Type::Bf16 => round(v, Format::BF16, mode, s),
            // The FP8 formats always saturate here.
            Type::E4m3 => round(v, Format::E4M3, mode, true),
            Type::E5m2 => round(v, Format::E5M2, mode, true),
            _ => u64::from(NAN.to_bits()),
        }
    }
}

/// An integer of at most 64 bits, rounded to f64.
fn integer_to_f64(v: i128, mode: Rounding) -> u64 {
    let magnitude = v.unsigned_abs() as u64;
    let near = magnitude as f64;
    let exact = near as u128;
    let up = exact > u128::from(magnitude);
    let down = exact < u128::from(magnitude);
    let away = |x: f64| x.next_up();
    let toward = |x: f64| x.next_down();
    let negative = v < 0;
    let out = match mode {
        Rounding::Rz if up => toward(near),
        Rounding::Rm if !negative && up => toward(near),
        Rounding::Rm if negative && down => away(near),
        Rounding::Rp if !negative && down => away(near),
        Rounding::Rp if negative && up => toward(near),
        _ => near,
    };
    (if negative { -out } else { out }).to_bits()
}

fn integral(v: f64, mode: Rounding) -> f64 {
    match mode {
        Rounding::Rni | Rounding::Rn => v.round_ties_even(),
        Rounding::Rmi | Rounding::Rm => v.floor(),
        Rounding::Rpi | Rounding::Rp => v.ceil(),
        _ => v.trunc(),
    }
}

fn limits(ty: Type) -> (i128, i128) {
    let bits = ty.bits();
    if ty.is_signed() {
        (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1)
    } else {
        (0, (1i128 << bits) - 1)
    }
}

fn scalar(l: &mut Lower<'_>, ins: &Instruction, to: Type, from: Type) -> Lowered {
    use Type::*;
    let known = |t: Type| {
        matches!(
            t,
            U8 | S8
                | U16
                | S16
                | U32
                | S32
                | U64
                | S64
                | F16
                | Bf16
                | F32
                | F64
                | Tf32
                | E4m3
                | E5m2
        )
    };
    if !known(to) || !known(from) || ins.operands.len() != 2 {
        return unsupported(mnemonic(ins));
    }
    let how = How::of(ins, to, from);
    let wide_from = from.bits() == 64;
    let a = l.src(&ins.operands[1], from)?;
    let d = l.dst(&ins.operands[0])?;
    let register_bits = l.dst_bits(&ins.operands[0], to.bits());
    l.emit_action(Class::Convert, move |cx| {
        let a = lane::read(cx, a, wide_from);
        let mut out = [0; LANES];
        for lane in cx.lanes() {
            let value = how.convert(a[lane]);
            // A narrow signed result fills a wider register with its sign.
            let shift = 64 - to.bits();
            out[lane] =
                if to.is_signed() { ((value << shift) as i64 >> shift) as u64 } else { value };
        }
        lane::write(cx, d, register_bits > 32, out);
        Step::Next
    });
    Ok(())
}

fn element(ty: Type) -> Option<Type> {
    use Type::*;
    Some(match ty {
        F16x2 => F16,
        Bf16x2 => Bf16,
        E4m3x2 => E4m3,
        E5m2x2 => E5m2,
        _ => return None,
    })
}

/// Two values at once: `cvt.rn.f16x2.f32 d, a, b` puts a into the high half.
fn packed(l: &mut Lower<'_>, ins: &Instruction, to: Type, from: Type) -> Lowered {
    let Some(to_one) = element(to) else { return unsupported(mnemonic(ins)) };
    let d = l.dst(&ins.operands[0])?;
    let width = to_one.bits();
    if let Some(from_one) = element(from) {
        let how = How::of(ins, to_one, from_one);
        let a = l.src(&ins.operands[1], from)?;
        if from == Type::E4m3x2 && to == Type::F16x2 && !how.relu {
            let run = un!(u32 => u32, |a| e4m3_to_f16(a & 0xff) | e4m3_to_f16(a >> 8 & 0xff) << 16);
            l.emit(Class::Convert, run, d, a, 0, 0);
            return Ok(());
        }
        let part = from_one.bits();
        l.emit_action(Class::Convert, move |cx| {
            let a = u32::read(cx, a);
            let mut out = [0; LANES];
            for lane in cx.lanes() {
                let low = how.convert(truncate(u64::from(a[lane]), part));
                let high = how.convert(truncate(u64::from(a[lane] >> part), part));
                out[lane] = (low | high << width) as u32;
            }
            u32::write(cx, d, out);
            Step::Next
        });
        return Ok(());
    }
    if from != Type::F32 || ins.operands.len() != 3 {
        return unsupported(mnemonic(ins));
    }
    let how = How::of(ins, to_one, from);
    let high = l.src(&ins.operands[1], from)?;
    let low = l.src(&ins.operands[2], from)?;
    let plain = how.mode == Some(Rounding::Rn) && !how.relu && !how.satfinite && !how.sat;
    if plain && to == Type::Bf16x2 {
        fn run(cx: &mut Cx<'_>, op: &MicroOp) -> Step {
            alu::binary::<f32, f32, u32, _>(cx, op, |hi, lo| {
                u32::from(bf16_nearest(hi)) << 16 | u32::from(bf16_nearest(lo))
            })
        }
        l.emit(Class::Convert, run, d, high, low, 0);
        return Ok(());
    }
    let fp8 = match to {
        _ if how.mode != Some(Rounding::Rn) || how.relu => None,
        Type::E4m3x2 => Some(bin!(f32, f32 => u32, |hi, lo| {
            fp8_nearest::<3, 0x7e>(hi) << 8 | fp8_nearest::<3, 0x7e>(lo)
        })),
        Type::E5m2x2 => Some(bin!(f32, f32 => u32, |hi, lo| {
            fp8_nearest::<2, 0x7b>(hi) << 8 | fp8_nearest::<2, 0x7b>(lo)
        })),
        _ => None,
    };
    if let Some(run) = fp8 {
        l.emit(Class::Convert, run, d, high, low, 0);
        return Ok(());
    }
    l.emit_action(Class::Convert, move |cx| {
        let (hi, lo) = (u32::read(cx, high), u32::read(cx, low));
        let mut out = [0; LANES];
        for lane in cx.lanes() {
            let h = how.convert(u64::from(hi[lane]));
            let w = how.convert(u64::from(lo[lane]));
            out[lane] = (w | h << width) as u32;
        }
        u32::write(cx, d, out);
        Step::Next
    });
    Ok(())
}

/// cvt.pack.sat: two integers saturated and packed, with a third register's bits above.
fn pack(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let types: Vec<Type> = ins.mods.types().collect();
    let (to, from) = (types[0], types[1]);
    let a = l.src(&ins.operands[1], from)?;
    let b = l.src(&ins.operands[2], from)?;
    let c = match ins.operands.get(3) {
        Some(o) => Some(l.src(o, Type::B32)?),
        None => None,
    };
    if matches!(ins.operands[0], Operand::Sink) {
        return Ok(());
    }
    let d = l.dst(&ins.operands[0])?;
    l.emit_action(Class::Convert, move |cx| {
        let (x, y) = (i32::read(cx, a), i32::read(cx, b));
        let rest = c.map_or([0; LANES], |c| u32::read(cx, c));
        let (low, high) = limits(to);
        let bits = to.bits();
        let one = |v: i32| truncate(i128::from(v).clamp(low, high) as u64, bits) as u32;
        let out = std::array::from_fn(|i| {
            let above = rest[i].checked_shl(2 * bits).unwrap_or(0);
            above | one(x[i]) << bits | one(y[i])
        });
        u32::write(cx, d, out);
        Step::Next
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_agrees_with_half_on_every_f16_neighbourhood() {
        for code in 0..0x7c00u16 {
            let v = half::f16::from_bits(code).to_f64();
            for x in [v, v * 1.0002, v * 0.9999, v + 1e-9, v * (1.0 + 1.0 / 2048.0)] {
                let expected = half::f16::from_f64(x).to_bits();
                assert_eq!(round(x, Format::F16, Rounding::Rn, false) as u16, expected, "{x}");
                let single = x as f32;
                let b = half::bf16::from_f32(single).to_bits();
                let got = round(f64::from(single), Format::BF16, Rounding::Rn, false);
                assert_eq!(got as u16, b, "{single}");
                let s = round(x, Format::F32, Rounding::Rn, false) as u32;
                assert_eq!(s, (x as f32).to_bits(), "{x}");
            }
        }
    }

    #[test]
    fn fp8_codes_come_back_and_saturate() {
        for code in 0..=255u8 {
            if code & 0x7f == 0x7f {
                continue;
            }
            assert_eq!(round(e4m3(code), Format::E4M3, Rounding::Rn, true) as u8, code);
            if code & 0x7c != 0x7c {
                assert_eq!(round(e5m2(code), Format::E5M2, Rounding::Rn, true) as u8, code);
            }
        }
        assert_eq!(round(1e9, Format::E4M3, Rounding::Rn, true), 0x7e);
        assert_eq!(round(f64::NEG_INFINITY, Format::E5M2, Rounding::Rn, true), 0xfb);
        assert_eq!(round(f64::NAN, Format::E4M3, Rounding::Rn, true), 0x7f);
    }

    #[test]
    fn fp8_by_integers_is_fp8_by_rounding() {
        // Every 61st single, and all beside each code and beside the middle of each pair.
        let codes = (0..=0x7bu8).flat_map(|c| [e4m3(c), e5m2(c), e4m3(c) + 0.5 * e4m3(1)]);
        let middles = (1..=0x7bu8).flat_map(|c| {
            [(e4m3(c) + e4m3(c - 1)) / 2.0, (e5m2(c) + e5m2(c - 1)) / 2.0, 448.0, 464.0, 65536.0]
        });
        let near = codes.chain(middles).flat_map(|v| {
            let bits = (v as f32).to_bits();
            [bits.saturating_sub(1), bits, bits + 1]
        });
        for bits in (0..=0x7fff_ffffu32).step_by(61).chain(near).chain([0x7f80_0000, 0x7fff_ffff]) {
            for v in [f32::from_bits(bits), f32::from_bits(bits | 1 << 31)] {
                let expected = |to| round(f64::from(v), to, Rounding::Rn, true) as u32;
                assert_eq!(fp8_nearest::<3, 0x7e>(v), expected(Format::E4M3), "{v:e}");
                assert_eq!(fp8_nearest::<2, 0x7b>(v), expected(Format::E5M2), "{v:e}");
            }
        }
    }

    #[test]
    fn every_e4m3_code_as_f16() {
        for code in 0..=255u8 {
            let expected = round(e4m3(code), Format::F16, Rounding::Rn, false) as u32;
            assert_eq!(e4m3_to_f16(u32::from(code)), expected, "{code:#x}");
        }
    }

    #[test]
    fn integers_and_back() {
        let how = |to, from, mode| How {
            to,
            from,
            mode: Some(mode),
            ftz: false,
            sat: false,
            satfinite: false,
            relu: false,
        };
        let f = how(Type::F32, Type::S64, Rounding::Rn);
        for v in [i64::MIN, -1, 0, 1, (1 << 53) + 1, i64::MAX, 0x7fff_ffbf_ffff_ffff] {
            assert_eq!(f.convert(v as u64) as u32, (v as f32).to_bits(), "{v}");
        }
        let d = how(Type::F64, Type::U64, Rounding::Rz);
        assert_eq!(f64::from_bits(d.convert(u64::MAX)), 18446744073709549568.0);
        let i = how(Type::S32, Type::F32, Rounding::Rni);
        assert_eq!(i.convert(u64::from(2.5f32.to_bits())) as u32, 2);
        assert_eq!(i.convert(u64::from(1e20f32.to_bits())) as u32, i32::MAX as u32);
        assert_eq!(i.convert(u64::from(f32::NAN.to_bits())) as u32, 0);
        let u = how(Type::U8, Type::F32, Rounding::Rzi);
        assert_eq!(u.convert(u64::from((-3.0f32).to_bits())), 0);
    }
}
