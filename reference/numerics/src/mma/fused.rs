//! The fused dot-product-add (arXiv 2511.10909, section on NVIDIA tensor cores), for any width,
//! rounding and group size.
//!
//! How the largest exponent is found, and what zeros, subnormals, infinities and NaNs do:
//!
//! - a product's exponent is the sum of its factors' nominal exponents (and of its scales'), not of
//!   the normalised product; a subnormal's nominal exponent is the smallest normal one, a zero's is
//!   -126 whatever its format;
//! - a NaN anywhere, an infinity times zero, or infinities of both signs give 0x7FFFFFFF (F16:
//!   0x7FFF); else an infinity gives that infinity;
//! - a sum that overflows gives infinity, though the rounding is toward zero;
//! - a zero result is +0, also where a negative sum is truncated to zero.

use super::wide::Wide;
use crate::formats::layout::round_shift;
use crate::formats::{Class, Format, Layout, Overflow, Rounding};

/// How far below the largest exponent the terms are kept.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Fraction {
    /// That many fraction bits below the largest exponent.
    Bits(u32),
    /// All of them: the sum is exact.
    Exact,
}

/// The format that the accumulator is held in between steps.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Output {
    /// FP32's exponent with that many fraction bits, stored as FP32: 23 is FP32, 13 is E8M13.
    F32 {
        /// Fraction bits, 1 to 23.
        fraction_bits: u32,
    },
    /// FP16, for instructions whose D is F16.
    F16,
}

impl Output {
    /// FP32 with its full fraction.
    pub const FULL: Output = Output::F32 { fraction_bits: 23 };
    /// FP32 of which 13 fraction bits are kept.
    pub const E8M13: Output = Output::F32 { fraction_bits: 13 };

    /// The format of the stored code.
    pub const fn format(self) -> Format {
        match self {
            Output::F32 { .. } => Format::F32,
            Output::F16 => Format::F16,
        }
    }
}

/// A tensor core's arithmetic: how many products share a step and how a step rounds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Accumulator {
    /// Products a step; K is worked off in steps of that many, ascending, each adding to the
    /// accumulator that the last one left. A last step may be shorter.
    pub group: usize,
    /// Where aligned terms are cut.
    pub fraction: Fraction,
    /// How they are cut. Hardware truncates.
    pub align: Rounding,
    /// What the accumulator is held in.
    pub output: Output,
    /// How the sum is rounded to it.
    pub round: Rounding,
}

const fn hardware(group: usize, fraction_bits: u32, output: Output) -> Accumulator {
    let round = match output {
        Output::F32 { .. } => Rounding::TowardZero,
        Output::F16 => Rounding::NearestEven,
    };
    let fraction = Fraction::Bits(fraction_bits);
    Accumulator { group, fraction, align: Rounding::TowardZero, output, round }
}

impl Accumulator {
    /// A tensor core: truncating alignment; FP32 results truncated, FP16 results to nearest even.
    pub const fn tensor_core(group: usize, fraction_bits: u32, output: Output) -> Accumulator {
        hardware(group, fraction_bits, output)
    }

    /// Hopper's wgmma on FP8: 32 products a step, 13 bits, E8M13.
    pub const HOPPER_FP8: Accumulator = hardware(32, 13, Output::E8M13);
    /// Hopper's mma and wgmma on BF16 and FP16: 16 products a step, 25 bits.
    pub const HOPPER_16BIT: Accumulator = hardware(16, 25, Output::FULL);
    /// Hopper's mma and wgmma on TF32: 8 products a step, 25 bits.
    pub const HOPPER_TF32: Accumulator = hardware(8, 25, Output::FULL);
    /// Blackwell's tcgen05 on FP8: 32 products a step, 25 bits, full FP32.
    pub const BLACKWELL_FP8: Accumulator = hardware(32, 25, Output::FULL);
    /// What the DeepSeek-V3 report (section 3.5.2) asks hardware for: 34-bit accumulation of
    /// 32 FP8 products, one bit before the point and 33 after it, held in FP32.
    pub const DEEPSEEK_34_BIT: Accumulator = hardware(32, 33, Output::FULL);
    /// Every group of 32 summed exactly with the accumulator, rounded once to nearest FP32.
    pub const EXACT: Accumulator = Accumulator {
        fraction: Fraction::Exact,
        round: Rounding::NearestEven,
        ..hardware(32, 0, Output::FULL)
    };
    /// One FP32 `fma` a product, in order: what a CUDA core does.
    pub const FP32_FMA: Accumulator = Accumulator { group: 1, ..Accumulator::EXACT };
}

/// An operand or scale, decoded.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// Signed significand, an integer: the value is `significand * 2^(exponent - fraction_bits)`.
    pub significand: i32,
    /// Nominal exponent; -126 for zero.
    pub exponent: i32,
    /// Finite, infinite or NaN. An infinity's significand is its sign.
    pub class: Class,
}

impl Operand {
    /// Decodes a code of `format`, which may be a scale's.
    #[inline]
    pub fn decode(format: Format, code: u32) -> Operand {
        let u = format.unpack(code);
        let magnitude = match u.class {
            Class::Finite => u.significand as i32,
            Class::Infinite | Class::Nan => 1,
        };
        Operand {
            significand: if u.negative { -magnitude } else { magnitude },
            exponent: if magnitude == 0 { -126 } else { u.exponent },
            class: u.class,
        }
    }
}

/// The operands of a chain of steps, and the fraction bits of their significands.
#[derive(Clone, Copy)]
pub struct Terms<'a> {
    /// Elements of A's row.
    pub a: &'a [Operand],
    /// Elements of B's column, as many.
    pub b: &'a [Operand],
    /// A's scales, one a block; empty where the instruction has none.
    pub scale_a: &'a [Operand],
    /// B's scales, as many.
    pub scale_b: &'a [Operand],
    /// Fraction bits of A's format.
    pub fraction_a: u32,
    /// Fraction bits of B's format.
    pub fraction_b: u32,
}

/// A term to be aligned: `significand * 2^(exponent - fraction_bits)`.
struct Term {
    significand: i64,
    exponent: i32,
}

/// Above this many fraction bits a sum may need more than 64 bits.
const NARROW_FRACTION_BITS: u32 = 40;

impl Accumulator {
    /// The chain of steps over all of K, starting from the code `c` of the output's format; returns
    /// such a code. With no products it returns `c`.
    pub fn chain(&self, terms: &Terms<'_>, c: u32) -> u32 {
        assert_eq!(terms.a.len(), terms.b.len(), "as many elements of a as of b");
        assert!(self.group > 0, "a step has at least one product");
        let steps = terms.a.chunks(self.group).zip(terms.b.chunks(self.group));
        steps.fold(c, |c, (a, b)| self.step(a, b, terms.fraction_a + terms.fraction_b, c))
    }

    /// One step: `a . b + c`.
    fn step(&self, a: &[Operand], b: &[Operand], product_fraction: u32, c: u32) -> u32 {
        let acc = Operand::decode(self.output.format(), c);
        if let Some(special) = special_sum(a, b, acc) {
            return self.special(special);
        }
        let products = || {
            a.iter().zip(b).map(|(a, b)| Term {
                significand: i64::from(a.significand) * i64::from(b.significand),
                exponent: a.exponent + b.exponent,
            })
        };
        self.sum(products, product_fraction, acc)
    }

    /// A block-scaled instruction, one step over all of K (the instruction's k is one group).
    ///
    /// With one scale for all of K (k = 32, MXFP8) a product's exponent includes its elements'. The
    /// FP4 kinds (k = 64) first sum 16 products exactly, and such a sum's exponent is its scales'
    /// alone.
    pub(super) fn block_scaled(&self, terms: &Terms<'_>, scale: super::BlockScale, c: u32) -> u32 {
        let acc = Operand::decode(self.output.format(), c);
        let scales = terms.scale_a.iter().chain(terms.scale_b);
        if scales.clone().any(|s| s.class == Class::Nan) {
            return self.special(f32::NAN);
        }
        if let Some(special) = special_sum(terms.a, terms.b, acc) {
            return self.special(special);
        }
        let scale_fraction = 2 * scale.format.layout().fraction_bits;
        let fraction = terms.fraction_a + terms.fraction_b + scale_fraction;
        let scale_at = |k: usize| {
            let (a, b) = (terms.scale_a[k / scale.block], terms.scale_b[k / scale.block]);
            (i64::from(a.significand) * i64::from(b.significand), a.exponent + b.exponent)
        };
        if terms.a.len() == scale.block {
            let (factor, shift) = scale_at(0);
            let products = || {
                terms.a.iter().zip(terms.b).map(|(a, b)| Term {
                    significand: i64::from(a.significand) * i64::from(b.significand) * factor,
                    exponent: a.exponent + b.exponent + shift,
                })
            };
            return self.sum(products, fraction, acc);
        }
        let fixed = |o: &Operand| i64::from(o.significand) << o.exponent.max(0);
        let sixteens = || {
            terms.a.chunks(16).zip(terms.b.chunks(16)).enumerate().map(|(i, (a, b))| {
                let (factor, exponent) = scale_at(16 * i);
                let dot: i64 = a.iter().zip(b).map(|(a, b)| fixed(a) * fixed(b)).sum();
                Term { significand: dot * factor, exponent }
            })
        };
        self.sum(sixteens, fraction, acc)
    }

    /// Aligns the terms and the accumulator to the largest exponent, cuts, sums and rounds.
    fn sum<I: Iterator<Item = Term>>(
        &self,
        terms: impl Fn() -> I,
        term_fraction: u32,
        acc: Operand,
    ) -> u32 {
        let acc_fraction = self.output.format().layout().fraction_bits;
        let max_exponent = terms().map(|t| t.exponent).fold(acc.exponent, i32::max);
        match self.fraction {
            Fraction::Bits(bits) if bits <= NARROW_FRACTION_BITS => {
                let cut = max_exponent - bits as i32;
                let align = |significand: i64, exponent: i32, fraction: u32| -> i64 {
                    let drop = cut - (exponent - fraction as i32);
                    let negative = significand < 0;
                    let kept =
                        round_shift(significand.unsigned_abs(), drop, negative, self.align) as i64;
                    if negative { -kept } else { kept }
                };
                let sum: i64 =
                    terms().map(|t| align(t.significand, t.exponent, term_fraction)).sum();
                let sum = sum + align(i64::from(acc.significand), acc.exponent, acc_fraction);
                self.output_code(sum < 0, sum.unsigned_abs(), cut)
            }
            Fraction::Bits(bits) => {
                // No operand has bits a thousand places below another: that many are exact.
                self.wide_sum(terms, term_fraction, acc, max_exponent - bits.min(1000) as i32)
            }
            Fraction::Exact => self.wide_sum(terms, term_fraction, acc, i32::MIN / 2),
        }
    }

    /// [`Accumulator::sum`] for any width, `2^cut` being the last bit kept.
    fn wide_sum<I: Iterator<Item = Term>>(
        &self,
        terms: impl Fn() -> I,
        term_fraction: u32,
        acc: Operand,
        cut: i32,
    ) -> u32 {
        let align = |significand: i64, exponent: i32, fraction: u32| {
            let lsb = exponent - fraction as i32;
            let drop = (cut - lsb).max(0);
            let negative = significand < 0;
            let kept = round_shift(significand.unsigned_abs(), drop, negative, self.align);
            (negative, kept, lsb + drop)
        };
        let acc_fraction = self.output.format().layout().fraction_bits;
        let acc = align(i64::from(acc.significand), acc.exponent, acc_fraction);
        let aligned = || {
            let products = terms().map(|t| align(t.significand, t.exponent, term_fraction));
            products.chain([acc]).filter(|(_, kept, _)| *kept != 0)
        };
        let floor = aligned().map(|(_, _, lsb)| lsb).min().unwrap_or(0);
        let top = aligned().map(|(_, kept, lsb)| lsb + 64 - kept.leading_zeros() as i32).max();
        let mut sum = Wide::ZERO;
        if top.unwrap_or(0) - floor <= 96 {
            // They nearly always fit 128 bits, with room for 2^31 of them.
            let narrow: i128 = aligned()
                .map(|(negative, kept, lsb)| {
                    let term = i128::from(kept) << (lsb - floor);
                    if negative { -term } else { term }
                })
                .sum();
            let magnitude = narrow.unsigned_abs();
            let excess = 64u32.saturating_sub(magnitude.leading_zeros());
            let rest = magnitude & ((1 << excess) - 1) != 0;
            let leading = (magnitude >> excess) as u64 | u64::from(rest);
            return self.output_code(narrow < 0, leading, floor + excess as i32);
        }
        aligned().for_each(|(negative, kept, lsb)| sum.add(negative, kept, lsb));
        let (negative, magnitude, lsb) = sum.leading_bits();
        self.output_code(negative, magnitude, lsb)
    }

    /// Rounds a finite sum to the accumulator's format.
    fn output_code(&self, negative: bool, magnitude: u64, lsb_exponent: i32) -> u32 {
        let encode = |layout: Layout| {
            layout.encode(negative, magnitude, lsb_exponent, self.round, Overflow::Infinity)
        };
        let (code, sign_bit) = match self.output {
            Output::F32 { fraction_bits } => {
                (encode(Layout::e8(fraction_bits)) << (23 - fraction_bits), 0x8000_0000)
            }
            Output::F16 => (encode(Layout::F16), 0x8000),
        };
        if code == sign_bit { 0 } else { code }
    }

    /// The code of an infinite or NaN result.
    fn special(&self, x: f32) -> u32 {
        let layout = self.output.format().layout();
        layout.from_f32(x, Rounding::NearestEven, Overflow::Ieee)
    }
}

/// The infinity or NaN that the operands force, if any.
#[inline]
fn special_sum(a: &[Operand], b: &[Operand], c: Operand) -> Option<f32> {
    let all_finite = c.class == Class::Finite
        && a.iter().zip(b).all(|(a, b)| a.class == Class::Finite && b.class == Class::Finite);
    if all_finite {
        return None;
    }
    let value = |o: &Operand| match o.class {
        Class::Nan => f32::NAN,
        Class::Infinite => f32::INFINITY.copysign(o.significand as f32),
        // Only zero, positive or negative matters beside an infinity.
        Class::Finite => o.significand.signum() as f32,
    };
    let finite_is_zero = |x: f32| if x.is_finite() { 0.0 } else { x };
    let products = a.iter().zip(b).map(|(a, b)| finite_is_zero(value(a) * value(b)));
    Some(products.sum::<f32>() + finite_is_zero(value(&c)))
}
