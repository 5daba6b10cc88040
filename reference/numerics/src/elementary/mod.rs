//! Elementary functions on f32 from IEEE operations only: `exp2`, `exp`, `log2`, `log`, `sigmoid`,
//! `silu`, `rsqrt`, `tanh`, `sin`, `cos`.
//!
//! Every function is a fixed sequence of IEEE-754 binary32 add, multiply, divide, square root and
//! fused multiply-add, each rounded to nearest even, and of integer operations; nothing is
//! approximate, nothing is flushed to zero. `gpu/kernels/common/elementary.cuh` takes the same
//! steps line by line, so host and device agree to the bit. A NaN result is always [`F32_NAN`].
//! Steps, coefficients and measured errors: `docs/elementary.md`.
//!
//! Each function comes as a scalar (`exp(x)`) and as a slice kernel (`exp_slice(&mut xs)`). The
//! slice kernels compile the same branch-free steps for AVX-512, for AVX2 with FMA and for any
//! other machine, and choose at run time; the bits are the same on all three.
//!
//! ```
//! use fathom_numerics::elementary::{exp, exp_slice};
//! let mut xs = [0.0, 1.0, f32::NEG_INFINITY];
//! exp_slice(&mut xs);
//! assert_eq!(xs, [1.0, exp(1.0), 0.0]);
//! ```

mod exponential;
mod logarithm;
mod root;
mod trigonometric;

pub use crate::gemm::Isa;
use crate::isa::{self, Steps};

use crate::formats::F32_NAN;

/// Canonical NaN where `is_nan`, else `y`.
#[inline(always)]
fn nan_if(is_nan: bool, y: f32) -> f32 {
    if is_nan { F32_NAN } else { y }
}

/// Declares scalar and slice forms of one-argument functions, and the table [`Function`].
macro_rules! functions {
    ($($(#[$doc:meta])* $variant:ident, $name:ident, $slice:ident, $ulp:literal, $steps:path;)*) => {
        $(
            $(#[$doc])*
            pub fn $name(x: f32) -> f32 {
                isa::one(x, steps::$variant)
            }

            #[doc = concat!("[`", stringify!($name), "`] of every element, in place, with the widest instructions of this machine.")]
            pub fn $slice(xs: &mut [f32]) {
                isa::map(Isa::best(), xs, steps::$variant)
            }
        )*

        /// One type a function, to hand its steps to loops.
        mod steps {
            use super::*;

            $(
                #[derive(Clone, Copy)]
                pub(super) struct $variant;

                impl Steps<f32> for $variant {
                    #[inline(always)]
                    fn at(self, x: f32) -> f32 {
                        $steps(x)
                    }
                }
            )*
        }

        /// The one-argument functions of this module as a table, for sweeps, tests and benches.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Function {
            $(
                #[doc = concat!("[`", stringify!($name), "`]")]
                $variant,
            )*
        }

        impl Function {
            /// Every function, in the order of the documentation.
            pub const ALL: &[Function] = &[$(Function::$variant),*];

            /// Its name in Rust; in CUDA `fathom_` stands before it.
            pub fn name(self) -> &'static str {
                match self { $(Function::$variant => stringify!($name)),* }
            }

            /// The promised bound on the error, in units in the last place of the exact result.
            pub fn bound_ulp(self) -> f64 {
                match self { $(Function::$variant => $ulp),* }
            }

            /// The function at `x`.
            pub fn eval(self, x: f32) -> f32 {
                match self { $(Function::$variant => $name(x)),* }
            }

            /// The function of every element, in place, with a chosen instruction set.
            ///
            /// # Panics
            /// If this machine does not have the instructions of `isa`.
            pub fn apply(self, isa: Isa, xs: &mut [f32]) {
                match self { $(Function::$variant => isa::map(isa, xs, steps::$variant)),* }
            }
        }
    };
}

functions! {
    /// 2^x. Subnormal results are rounded once more; 2^-inf is +0.
    Exp2, exp2, exp2_slice, 1.0, exponential::exp2;
    /// e to the power of x.
    Exp, exp, exp_slice, 1.0, exponential::exp;
    /// The binary logarithm: exact at powers of two, -inf at either zero, NaN below zero.
    Log2, log2, log2_slice, 1.0, logarithm::log2;
    /// The natural logarithm: -inf at either zero, NaN below zero.
    Log, log, log_slice, 1.0, logarithm::log;
    /// 1 / (1 + e^-x).
    Sigmoid, sigmoid, sigmoid_slice, 2.0, exponential::sigmoid;
    /// x * sigmoid(x), rounded as one function: the result is right where sigmoid alone underflows.
    /// At -inf it is -0.
    Silu, silu, silu_slice, 2.0, exponential::silu;
    /// 1 / sqrt(x): +-inf at +-0, NaN below zero.
    Rsqrt, rsqrt, rsqrt_slice, 1.0, root::rsqrt;
    /// The hyperbolic tangent.
    Tanh, tanh, tanh_slice, 2.0, exponential::tanh;
    /// Sine of `x` radians, for every finite `x`; NaN at infinity.
    Sin, sin, sin_slice, 1.0, trigonometric::sin;
    /// Cosine of `x` radians, for every finite `x`; NaN at infinity.
    Cos, cos, cos_slice, 1.0, trigonometric::cos;
}

/// The steps of [`sin_cos`].
#[derive(Clone, Copy)]
struct SinCos;

impl Steps<(f32, f32)> for SinCos {
    #[inline(always)]
    fn at(self, x: f32) -> (f32, f32) {
        trigonometric::sin_cos(x)
    }
}

/// Sine and cosine of `x` radians with one argument reduction; the bits of [`sin`] and [`cos`].
pub fn sin_cos(x: f32) -> (f32, f32) {
    isa::one(x, SinCos)
}

/// [`sin_cos`] of every angle: `xs` becomes the sines, `cosines` the cosines.
///
/// # Panics
/// If the lengths differ.
pub fn sin_cos_slice(xs: &mut [f32], cosines: &mut [f32]) {
    assert_eq!(
        xs.len(),
        cosines.len(),
        "sin_cos_slice: {} angles, {} cosines",
        xs.len(),
        cosines.len()
    );
    isa::map_pair(Isa::best(), xs, cosines, SinCos)
}

/// The largest relative error over `points` of a polynomial with f32 coefficients, lowest first, as
/// `approximation(x, p(argument(x)))`, against `exact`; in f64. What the coefficients' comments
/// state.
#[cfg(test)]
fn polynomial_error(
    coefficients: &[f32],
    (low, high): (f64, f64),
    argument: impl Fn(f64) -> f64,
    approximation: impl Fn(f64, f64) -> f64,
    exact: impl Fn(f64) -> f64,
) -> f64 {
    const POINTS: i32 = 20_001;
    let error = |i: i32| {
        let x = low + (high - low) * f64::from(i) / f64::from(POINTS - 1);
        let z = argument(x);
        let p = coefficients.iter().rev().fold(0.0, |p, &c| p * z + f64::from(c));
        // Below this, f64 itself decides the quotient.
        if x.abs() < 1e-3 { 0.0 } else { (approximation(x, p) / exact(x) - 1.0).abs() }
    };
    (0..POINTS).map(error).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Inputs whose results are fixed: (input bits, result bits) of one function.
    fn exact(f: Function, cases: &[(u32, u32)]) {
        for &(x, want) in cases {
            let got = f.eval(f32::from_bits(x)).to_bits();
            assert_eq!(
                got,
                want,
                "{}(0x{x:08X}): got 0x{got:08X}, expected 0x{want:08X}",
                f.name()
            );
        }
    }

    const NAN: u32 = 0x7FFF_FFFF;
    const INF: u32 = 0x7F80_0000;
    const NEG_INF: u32 = 0xFF80_0000;
    const NEG_ZERO: u32 = 0x8000_0000;
    const ONE: u32 = 0x3F80_0000;

    #[test]
    fn special_values() {
        use Function::*;
        for &f in Function::ALL {
            exact(f, &[(0x7FC0_0000, NAN), (0xFFC0_1234, NAN), (0x7F80_0001, NAN)]);
        }
        for f in [Exp2, Exp] {
            exact(f, &[(0, ONE), (NEG_ZERO, ONE), (INF, INF), (NEG_INF, 0), (1, ONE)]);
        }
        for f in [Log2, Log, Rsqrt] {
            exact(f, &[(NEG_INF, NAN), (0xBF80_0000, NAN), (0x8000_0001, NAN)]);
        }
        for f in [Log2, Log] {
            exact(f, &[(0, NEG_INF), (NEG_ZERO, NEG_INF), (INF, INF), (ONE, 0)]);
        }
        exact(
            Rsqrt,
            &[(0, INF), (NEG_ZERO, NEG_INF), (INF, 0), (ONE, ONE), (0x4080_0000, 0x3F00_0000)],
        );
        exact(Sigmoid, &[(0, 0x3F00_0000), (NEG_ZERO, 0x3F00_0000), (INF, ONE), (NEG_INF, 0)]);
        exact(Silu, &[(0, 0), (NEG_ZERO, NEG_ZERO), (INF, INF), (NEG_INF, NEG_ZERO)]);
        exact(Silu, &[(0x7F7F_FFFF, 0x7F7F_FFFF), (0xFF7F_FFFF, NEG_ZERO)]);
        exact(Tanh, &[(0, 0), (NEG_ZERO, NEG_ZERO), (INF, ONE), (NEG_INF, 0xBF80_0000), (1, 1)]);
        exact(Sin, &[(0, 0), (NEG_ZERO, NEG_ZERO), (INF, NAN), (NEG_INF, NAN), (1, 1)]);
        exact(Cos, &[(0, ONE), (NEG_ZERO, ONE), (INF, NAN), (NEG_INF, NAN)]);
    }

    #[test]
    fn exp2_and_log2_are_exact_at_powers_of_two() {
        for n in -149..=127 {
            let power = 2f64.powi(n) as f32;
            assert_eq!(exp2(n as f32).to_bits(), power.to_bits(), "exp2({n})");
            assert_eq!(log2(power).to_bits(), (n as f32).to_bits(), "log2(2^{n})");
        }
        assert_eq!(exp2(128.0), f32::INFINITY);
        assert_eq!(exp2(-150.0), 0.0, "half the smallest subnormal rounds to even");
    }

    #[test]
    fn sin_cos_has_the_bits_of_sin_and_cos() {
        let mut xs: Vec<f32> = (0..4099).map(|i| i as f32 * 31.97 - 700.0).collect();
        let angles = xs.clone();
        let mut cosines = vec![0.0; xs.len()];
        sin_cos_slice(&mut xs, &mut cosines);
        for ((angle, s), c) in angles.into_iter().zip(xs).zip(cosines) {
            assert_eq!((s, c), (sin(angle), cos(angle)), "at {angle}");
            assert_eq!((s, c), sin_cos(angle), "at {angle}");
        }
    }
}
