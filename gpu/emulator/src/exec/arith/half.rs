//! f16 and bf16 arithmetic, packed or not (PTX ISA, "Half Precision Floating Point Instructions").
//!
//! Each result is rounded once from the exact value. A NaN result is 0x7fff.

use fathom_ptx::ast::Instruction;
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Flag, Type};

use super::cvt::{Format, round};
use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::lane::Lane;
use crate::machine::op::{Class, Step};

/// The NaN of both 16-bit formats.
pub const NAN: u16 = 0x7fff;

/// A 16-bit float format of register values.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HalfFormat {
    F16,
    Bf16,
}

impl HalfFormat {
    /// The kind of a PTX type, packed or not.
    pub fn of(ty: Type) -> Option<HalfFormat> {
        match ty {
            Type::F16 | Type::F16x2 => Some(HalfFormat::F16),
            Type::Bf16 | Type::Bf16x2 => Some(HalfFormat::Bf16),
            _ => None,
        }
    }

    /// The value of a code.
    pub fn value(self, code: u16) -> f64 {
        match self {
            HalfFormat::F16 => half::f16::from_bits(code).to_f64(),
            HalfFormat::Bf16 => half::bf16::from_bits(code).to_f64(),
        }
    }

    fn subnormal(self, code: u16) -> bool {
        match self {
            HalfFormat::F16 => code & 0x7c00 == 0,
            HalfFormat::Bf16 => code & 0x7f80 == 0,
        }
    }

    fn one(self) -> u16 {
        match self {
            HalfFormat::F16 => 0x3c00,
            HalfFormat::Bf16 => 0x3f80,
        }
    }

    /// Rounds `s + e` to nearest even; `e` is far below `s`.
    fn nearest(self, s: f64, e: f64) -> u16 {
        if s.is_nan() {
            return NAN;
        }
        // To odd first: the sum in f64 keeps a sticky bit, so the second rounding is right.
        let odd = if e != 0.0 && s.to_bits() & 1 == 0 {
            let away = (s > 0.0) == (e > 0.0);
            f64::from_bits(if away { s.to_bits() + 1 } else { s.to_bits() - 1 })
        } else {
            s
        };
        let format = match self {
            HalfFormat::F16 => Format::F16,
            HalfFormat::Bf16 => Format::BF16,
        };
        round(odd, format, fathom_ptx::types::Rounding::Rn, false) as u16
    }
}

fn is_nan(kind: HalfFormat, code: u16) -> bool {
    match kind {
        HalfFormat::F16 => code & 0x7fff > 0x7c00,
        HalfFormat::Bf16 => code & 0x7fff > 0x7f80,
    }
}

#[derive(Clone, Copy)]
struct How {
    op: Opcode,
    kind: HalfFormat,
    ftz: bool,
    sat: bool,
    relu: bool,
    nan: bool,
    xorsign: bool,
}

impl How {
    fn flush(self, code: u16) -> u16 {
        if self.ftz && self.kind.subnormal(code) { code & 0x8000 } else { code }
    }

    /// The result of one lane's element, from codes to a code.
    fn compute(self, a: u16, b: u16, c: u16) -> u16 {
        use Opcode::*;
        let (a, b, c) = (self.flush(a), self.flush(b), self.flush(c));
        let k = self.kind;
        let (x, y, z) = (k.value(a), k.value(b), k.value(c));
        let out = match self.op {
            // Sums and products of 16-bit values are exact in f64 or off by one sticky bit.
            Add => Self::sum(k, x, y),
            Sub => Self::sum(k, x, -y),
            Mul => k.nearest(x * y, 0.0),
            Fma | Mad => Self::sum(k, x * y, z),
            Neg => a ^ 0x8000,
            Abs => a & 0x7fff,
            Min | Max => return self.min_max(a, b),
            Ex2 => k.nearest(x.exp2(), 0.0),
            Tanh => k.nearest(x.tanh(), 0.0),
            _ => unreachable!("lower lets no other through"),
        };
        let out = self.flush(out);
        if self.sat {
            if is_nan(k, out) || out & 0x8000 != 0 {
                return 0;
            }
            return out.min(k.one());
        }
        if self.relu && !is_nan(k, out) && out & 0x8000 != 0 {
            return 0;
        }
        out
    }

    fn sum(k: HalfFormat, x: f64, y: f64) -> u16 {
        let s = x + y;
        if !s.is_finite() {
            return k.nearest(s, 0.0);
        }
        let t = s - x;
        let e = (x - (s - t)) + (y - t);
        k.nearest(s, e)
    }

    fn min_max(self, a: u16, b: u16) -> u16 {
        let k = self.kind;
        let (nan_a, nan_b) = (is_nan(k, a), is_nan(k, b));
        let sign = if self.xorsign { (a ^ b) & 0x8000 } else { 0 };
        if self.nan && (nan_a || nan_b) || nan_a && nan_b {
            return NAN;
        }
        let (a, b) = if self.xorsign { (a & 0x7fff, b & 0x7fff) } else { (a, b) };
        let least = self.op == Opcode::Min;
        let out = if nan_a {
            b
        } else if nan_b {
            a
        } else {
            // Order of codes as sign and magnitude, so that -0 < +0.
            let key = |v: u16| if v & 0x8000 != 0 { !i32::from(v & 0x7fff) } else { i32::from(v) };
            if (key(a) < key(b)) == least { a } else { b }
        };
        if self.xorsign { out & 0x7fff | sign } else { out }
    }
}

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    if ins.mods.has(Flag::Oob) {
        return unsupported(mnemonic(ins));
    }
    use Opcode::*;
    let types: Vec<Type> = ins.mods.types().collect();
    let ty = types[types.len() - 1];
    let (Some(kind), 1) = (HalfFormat::of(ty), types.len()) else {
        return unsupported(mnemonic(ins));
    };
    if !matches!(ins.op, Add | Sub | Mul | Fma | Mad | Neg | Abs | Min | Max | Ex2 | Tanh) {
        return unsupported(mnemonic(ins));
    }
    let how = How {
        op: ins.op,
        kind,
        ftz: ins.mods.has(Flag::Ftz),
        sat: ins.mods.has(Flag::Sat),
        relu: ins.mods.has(Flag::Relu),
        nan: ins.mods.has(Flag::Nan),
        xorsign: ins.mods.has(Flag::Xorsign),
    };
    let packed = matches!(ty, Type::F16x2 | Type::Bf16x2);
    let mut regs = [0; 3];
    let count = ins.operands.len() - 1;
    for (reg, operand) in regs.iter_mut().zip(&ins.operands[1..]) {
        *reg = l.src(operand, ty)?;
    }
    for i in count..3 {
        regs[i] = regs[0];
    }
    let d = l.dst(&ins.operands[0])?;
    if ins.mods.has(Flag::Approx) {
        l.approximate(ins);
    }
    l.emit_action(Class::Half, move |cx| {
        let [a, b, c] = regs.map(|r| u32::read(cx, r));
        let mut out = [0; 32];
        for lane in cx.lanes() {
            let low = how.compute(a[lane] as u16, b[lane] as u16, c[lane] as u16);
            let mut value = u32::from(low);
            if packed {
                let part = |v: u32| (v >> 16) as u16;
                let high = how.compute(part(a[lane]), part(b[lane]), part(c[lane]));
                value |= u32::from(high) << 16;
            }
            out[lane] = value;
        }
        u32::write(cx, d, out);
        Step::Next
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fused_sums_round_once() {
        let how = How {
            op: Opcode::Fma,
            kind: HalfFormat::F16,
            ftz: false,
            sat: false,
            relu: false,
            nan: false,
            xorsign: false,
        };
        // 2048 + 1 * 1 is a tie to even; a little more goes up.
        let f = |v: f64| half::f16::from_f64(v).to_bits();
        assert_eq!(how.compute(f(1.0), f(1.0), f(2048.0)), f(2048.0));
        assert_eq!(how.compute(f(1.0), f(1.001), f(2048.0)), f(2050.0));
        assert_eq!(how.compute(f(65504.0), f(2.0), f(0.0)), 0x7c00);
        assert_eq!(how.compute(NAN, f(1.0), f(0.0)), NAN);
        let bf = How { kind: HalfFormat::Bf16, ..how };
        let b = |v: f32| half::bf16::from_f32(v).to_bits();
        assert_eq!(bf.compute(b(1.0), b(1.0), b(1e-30)), b(1.0));
        assert_eq!(bf.compute(b(3.0), b(5.0), b(-15.0)), 0);
    }
}
