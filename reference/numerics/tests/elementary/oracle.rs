//! What the elementary functions should be: f64 from the standard library, and 192-bit floats where
//! a verdict is closer to the bound than f64 can tell.

use astro_float_num::{BigFloat, Consts, RoundingMode};
use fathom_numerics::elementary::{Function, Isa};
use fathom_numerics::formats::F32_NAN;

/// Verdicts this close to the bound, in ulp, are taken again in high precision. The f64 functions
/// err
/// by less than 2^-50 of the result, which is below 2^-25 ulp of f32.
const F64_DOUBT_ULP: f64 = 1e-6;
const PRECISION_BITS: usize = 192;
const ROUNDING: RoundingMode = RoundingMode::ToEven;

/// One function over a range of inputs.
#[derive(Clone, Copy, Debug)]
pub struct Worst {
    pub inputs: u64,
    /// Results that are the exact value rounded to nearest even.
    pub correctly_rounded: u64,
    pub max_ulp: f64,
    /// Bits of the input at which `max_ulp` was found.
    pub at: u32,
    /// Verdicts that f64 could not give.
    pub high_precision: u64,
}

impl Worst {
    pub const NONE: Worst =
        Worst { inputs: 0, correctly_rounded: 0, max_ulp: -1.0, at: 0, high_precision: 0 };

    /// Of two ranges; the lower input wins a tie, so the result does not depend on the split.
    pub fn merge(self, other: Worst) -> Worst {
        let ahead = self.max_ulp > other.max_ulp
            || (self.max_ulp == other.max_ulp && self.at <= other.at && self.inputs > 0);
        let (max_ulp, at) = if ahead { (self.max_ulp, self.at) } else { (other.max_ulp, other.at) };
        Worst {
            inputs: self.inputs + other.inputs,
            correctly_rounded: self.correctly_rounded + other.correctly_rounded,
            max_ulp,
            at,
            high_precision: self.high_precision + other.high_precision,
        }
    }

    /// Takes in the result `got` at `x`.
    pub fn add(&mut self, f: Function, x: f32, got: f32) {
        let exact = in_f64(f, f64::from(x));
        let mut ulp = error_ulp(got, exact);
        if (ulp - f.bound_ulp()).abs() < F64_DOUBT_ULP {
            ulp = error_ulp_high_precision(f, x, got);
            self.high_precision += 1;
        }
        self.inputs += 1;
        self.correctly_rounded +=
            u64::from(got == exact as f32 || (got.is_nan() && exact.is_nan()));
        if ulp > self.max_ulp {
            self.max_ulp = ulp;
            self.at = x.to_bits();
        }
    }
}

/// The function in f64, from the standard library.
pub fn in_f64(f: Function, x: f64) -> f64 {
    match f {
        Function::Exp2 => x.exp2(),
        Function::Exp => x.exp(),
        Function::Log2 => x.log2(),
        Function::Log => x.ln(),
        Function::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Function::Silu if x == f64::NEG_INFINITY => -0.0,
        Function::Silu => x / (1.0 + (-x).exp()),
        Function::Rsqrt => 1.0 / x.sqrt(),
        Function::Tanh => x.tanh(),
        Function::Sin => x.sin(),
        Function::Cos => x.cos(),
    }
}

/// The spacing of f32 at `exact`, subnormals and the overflow range (2^104) included.
fn ulp_of(exact: f64) -> f64 {
    let exponent = ((exact.to_bits() >> 52) & 0x7FF) as i64 - 1023;
    let exponent = exponent.clamp(-126, 127) - 23;
    f64::from_bits(((exponent + 1023) as u64) << 52)
}

/// |got - exact| in units of f32's last place at `exact`. An infinite result counts as 2^128;
/// infinity where a NaN is not canonical, missing or unexpected, or a zero has the wrong sign.
pub fn error_ulp(got: f32, exact: f64) -> f64 {
    if exact.is_nan() || got.is_nan() {
        let right = exact.is_nan() && got.to_bits() == F32_NAN.to_bits();
        return if right { 0.0 } else { f64::INFINITY };
    }
    if got.is_sign_negative() != exact.is_sign_negative() {
        return f64::INFINITY;
    }
    let (got, exact) = (f64::from(got.abs()), exact.abs());
    let top = 2f64.powi(128);
    if got >= top && exact >= top {
        return 0.0;
    }
    (got.min(top) - exact).abs() / ulp_of(exact)
}

/// [`error_ulp`] with the exact value to 192 bits, for finite `x` and `got` and nonzero results.
pub fn error_ulp_high_precision(f: Function, x: f32, got: f32) -> f64 {
    let mut consts = Consts::new().expect("constants cache");
    let (p, rm, cc) = (PRECISION_BITS, ROUNDING, &mut consts);
    let v = BigFloat::from_f64(f64::from(x), p);
    let one = BigFloat::from_f64(1.0, p);
    let exact = match f {
        Function::Exp2 => BigFloat::from_f64(2.0, p).pow(&v, p, rm, cc),
        Function::Exp => v.exp(p, rm, cc),
        Function::Log2 => v.log2(p, rm, cc),
        Function::Log => v.ln(p, rm, cc),
        Function::Sigmoid => one.div(&one.add(&v.neg().exp(p, rm, cc), p, rm), p, rm),
        Function::Silu => v.div(&one.add(&v.neg().exp(p, rm, cc), p, rm), p, rm),
        Function::Rsqrt => one.div(&v.sqrt(p, rm), p, rm),
        Function::Tanh => v.tanh(p, rm, cc),
        Function::Sin => v.sin(p, rm, cc),
        Function::Cos => v.cos(p, rm, cc),
    };
    let ulp = BigFloat::from_f64(ulp_of(in_f64(f, f64::from(x))), p);
    let difference = BigFloat::from_f64(f64::from(got), p).sub(&exact, p, rm);
    let error = difference.div(&ulp, p, rm).abs();
    // Decimal text is the library's only way out to f64.
    error.to_string().parse().expect("a decimal number")
}

/// Results at `inputs` (bits of f32), with the widest instructions of this machine.
pub fn sweep(f: Function, isa: Isa, inputs: &[u32]) -> Worst {
    let mut ys: Vec<f32> = inputs.iter().map(|&bits| f32::from_bits(bits)).collect();
    f.apply(isa, &mut ys);
    let mut worst = Worst::NONE;
    for (&bits, &y) in inputs.iter().zip(&ys) {
        worst.add(f, f32::from_bits(bits), y);
    }
    worst
}
