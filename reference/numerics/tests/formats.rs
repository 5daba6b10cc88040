//! Formats against rustc_apfloat and against exact search: every code, every rounding boundary.

use fathom_numerics::formats::{
    Class, E2M1, E4M3, E5M2, E5M6, Format, Layout, Overflow, Rounding, Tf32, UE8M0, bf16, f16,
    to_bf16, to_f16,
};
use rustc_apfloat::ieee::{
    BFloat, Double, Float8E4M3FN, Float8E5M2, Half, IeeeFloat, Semantics, Single,
};
use rustc_apfloat::{Float, FloatConvert, Round};

const ROUNDINGS: [(Rounding, Round); 4] = [
    (Rounding::NearestEven, Round::NearestTiesToEven),
    (Rounding::TowardZero, Round::TowardZero),
    (Rounding::Down, Round::TowardNegative),
    (Rounding::Up, Round::TowardPositive),
];

struct E5M6S;
impl Semantics for E5M6S {
    const BITS: usize = 12;
    const EXP_BITS: usize = 5;
}

struct Tf32S;
impl Semantics for Tf32S {
    const BITS: usize = 19;
    const EXP_BITS: usize = 8;
}

struct E8M13S;
impl Semantics for E8M13S {
    const BITS: usize = 22;
    const EXP_BITS: usize = 8;
}

/// The next FP64 above or below, for positive numbers.
fn neighbour(x: f64, up: bool) -> f64 {
    f64::from_bits(if up { x.to_bits() + 1 } else { x.to_bits() - 1 })
}

/// The points at which rounding between two neighbouring values can change, and their neighbours.
fn boundary(low: f64, high: f64) -> impl Iterator<Item = f64> {
    let middle = low + (high - low) / 2.0;
    let quarter = low + (high - low) / 4.0;
    let near = |x: f64| [x, neighbour(x, true), if x > 0.0 { neighbour(x, false) } else { x }];
    near(low).into_iter().chain(near(middle)).chain([quarter])
}

/// Decodes and encodes the codes of `layout` and the boundaries between codes, both signs, with
/// every
/// rounding, and compares with rustc_apfloat's `F`: all of them up to 16 bits, every 61st above.
fn agrees_with_apfloat<F: Float + FloatConvert<Double>>(layout: Layout)
where
    Double: FloatConvert<F>,
{
    let sign_bit = 1u32 << (layout.bits() - 1);
    let reference =
        |code: u32| -> Double { F::from_bits(u128::from(code)).convert(&mut false).value };
    let encode = |x: f64| {
        for (rounding, round) in ROUNDINGS {
            // Negative numbers by their mirror image: apfloat forgets the sign where a directed
            // rounding overflows into E4M3's NaN.
            let mirrored = if x.is_sign_negative() { -round } else { round };
            let magnitude = Double::from_bits(u128::from(x.abs().to_bits()));
            let want: F = magnitude.convert_r(mirrored, &mut false).value;
            let want = if x.is_sign_negative() { -want } else { want };
            let got = layout.from_f64(x, rounding, Overflow::Ieee);
            if want.is_nan() {
                assert_eq!(got, layout.nan(), "{x:e} {rounding:?}");
            } else {
                assert_eq!(u128::from(got), want.to_bits(), "{x:e} {rounding:?}");
            }
            if x.abs() <= layout.to_f64(layout.max_code()) {
                assert_eq!(layout.from_f64(x, rounding, Overflow::Saturate), got, "{x:e}");
                assert_eq!(layout.from_f64(x, rounding, Overflow::Infinity), got, "{x:e}");
            }
        }
    };
    let step = if layout.bits() <= 16 { 1 } else { 61 };
    let codes =
        (0..1u32 << layout.bits()).step_by(step).chain(layout.max_code() - 1..=layout.nan());
    for code in codes {
        let want = reference(code);
        let got = layout.to_f64(code);
        if want.is_nan() {
            assert!(got.is_nan() && layout.unpack(code).class == Class::Nan, "{code:#x}");
            continue;
        }
        assert_eq!(u128::from(got.to_bits()), want.to_bits(), "{code:#x}");
        if got.is_finite() && code & sign_bit == 0 {
            let next = if code == layout.max_code() {
                // Where the next value would be, were there one.
                got + (got - layout.to_f64(code - 1))
            } else {
                layout.to_f64(code + 1)
            };
            boundary(got, next).chain(boundary(next, 2.0 * next)).for_each(|x| {
                encode(x);
                encode(-x);
            });
        }
    }
    [f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 1e300, -1e300, 5e-324]
        .into_iter()
        .for_each(encode);
}

#[test]
fn e4m3() {
    agrees_with_apfloat::<Float8E4M3FN>(Layout::E4M3);
}

#[test]
fn e5m2() {
    agrees_with_apfloat::<Float8E5M2>(Layout::E5M2);
}

#[test]
fn e5m6() {
    agrees_with_apfloat::<IeeeFloat<E5M6S>>(Layout::E5M6);
}

#[test]
fn bf16_codes() {
    agrees_with_apfloat::<BFloat>(Layout::BF16);
}

#[test]
fn f16_codes() {
    agrees_with_apfloat::<Half>(Layout::F16);
}

#[test]
fn tf32_codes() {
    agrees_with_apfloat::<IeeeFloat<Tf32S>>(Layout::TF32);
}

#[test]
fn e8m13_codes() {
    agrees_with_apfloat::<IeeeFloat<E8M13S>>(Layout::e8(13));
}

#[test]
fn f32_values_pass_through() {
    for bits in (0..=u32::MAX).step_by(9973) {
        let x = f32::from_bits(bits);
        let got = Layout::F32.from_f32(x, Rounding::NearestEven, Overflow::Ieee);
        assert_eq!(got, if x.is_nan() { 0x7FFF_FFFF } else { bits });
        let want = Single::from_bits(u128::from(bits));
        let wide: Double = want.convert(&mut false).value;
        if !x.is_nan() {
            assert_eq!(u128::from(Layout::F32.to_f64(bits).to_bits()), wide.to_bits());
        }
    }
}

/// The nearest code by exact search over all values, ties to the even code, saturating.
fn nearest_by_search(values: &[f64], x: f64) -> usize {
    let distance = |i: usize| (values[i] - x).abs();
    let best = (0..values.len()).map(distance).fold(f64::INFINITY, f64::min);
    let nearest: Vec<usize> = (0..values.len()).filter(|&i| distance(i) == best).collect();
    *nearest.iter().find(|&&i| i % 2 == 0).unwrap_or(&nearest[0])
}

#[test]
fn e2m1_is_its_table() {
    let values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    for (code, value) in values.iter().enumerate() {
        assert_eq!(E2M1(code as u8).to_f64(), *value);
        assert_eq!(E2M1(code as u8 | 8).to_f64(), -*value);
    }
    for step in 0..2048 {
        let x = f64::from(step) / 128.0;
        let want = nearest_by_search(&values, x) as u8;
        assert_eq!(E2M1::from_f64(x, Rounding::NearestEven, Overflow::Saturate).0, want, "{x}");
        assert_eq!(E2M1::from_f64(-x, Rounding::NearestEven, Overflow::Saturate).0, want | 8);
        let below = values.iter().rposition(|v| *v <= x).unwrap() as u8;
        assert_eq!(E2M1::from_f64(x, Rounding::TowardZero, Overflow::Saturate).0, below);
    }
    assert_eq!(E2M1::from_f64(f64::NAN, Rounding::NearestEven, Overflow::Saturate).0, 7);
}

#[test]
fn ue8m0_is_powers_of_two() {
    for code in 0..=254u8 {
        let value = 2f64.powi(i32::from(code) - 127);
        assert_eq!(UE8M0(code).to_f64(), value);
        let encode = |x, rounding| UE8M0::from_f64(x, rounding, Overflow::Saturate).0;
        for (_, rounding) in ROUNDINGS.iter().map(|(r, _)| ((), *r)) {
            assert_eq!(encode(value, rounding), code);
        }
        let next = code.saturating_add(1).min(254);
        assert_eq!(encode(value * 1.25, Rounding::Up), next);
        assert_eq!(encode(value * 1.25, Rounding::TowardZero), code);
        assert_eq!(encode(value * 1.49, Rounding::NearestEven), code);
        assert_eq!(encode(value * 1.51, Rounding::NearestEven), next);
    }
    assert!(UE8M0(255).is_nan());
    assert_eq!(UE8M0::from_f32(-1.0, Rounding::NearestEven, Overflow::Saturate), UE8M0::NAN);
    assert_eq!(UE8M0::from_f32(0.0, Rounding::NearestEven, Overflow::Saturate), UE8M0(0));
}

#[test]
fn ue4m3_is_e4m3_without_sign() {
    for code in 0..=255u32 {
        let (unsigned, signed) = (Format::UE4M3.unpack(code), Format::E4M3.unpack(code & 0x7F));
        assert_eq!(unsigned, signed, "{code:#x}");
    }
}

/// FP32 values around every rounding boundary of a format, specials, and a sweep over all codes.
fn f32_probes(layout: Layout) -> impl Iterator<Item = f32> {
    let boundaries = (0..=layout.max_code()).flat_map(move |code| {
        let low = layout.to_f64(code) as f32;
        let high = layout.to_f64(code + 1) as f32;
        let high = if high.is_finite() { high } else { low * 1.25 };
        let middle = low + (high - low) / 2.0;
        let near =
            |x: f32| (-1..=1).map(move |d| f32::from_bits((x.to_bits() as i32 + d).max(0) as u32));
        near(low).chain(near(middle)).collect::<Vec<f32>>()
    });
    let sweep = (0..=0x7FFF_FFFFu32).step_by(4099).map(f32::from_bits);
    let specials =
        [f32::INFINITY, f32::NAN, f32::MAX, f32::from_bits(1), f32::from_bits(0x7F80_0001)];
    boundaries.chain(sweep).chain(specials).flat_map(|x| [x, -x])
}

#[test]
fn fast_saturating_casts_are_the_exact_ones() {
    let cast = |layout: Layout, x| layout.from_f32(x, Rounding::NearestEven, Overflow::Saturate);
    for x in f32_probes(Layout::E4M3) {
        assert_eq!(u32::from(E4M3::saturating(x).0), cast(Layout::E4M3, x), "{x:e}");
    }
    for x in f32_probes(Layout::E5M2) {
        assert_eq!(u32::from(E5M2::saturating(x).0), cast(Layout::E5M2, x), "{x:e}");
    }
    for x in f32_probes(Layout::E5M6) {
        assert_eq!(u32::from(E5M6::saturating(x).0), cast(Layout::E5M6, x), "{x:e}");
    }
    for x in f32_probes(Layout::E2M1) {
        assert_eq!(u32::from(E2M1::saturating(x).0), cast(Layout::E2M1, x), "{x:e}");
    }
    for x in f32_probes(Layout::BF16) {
        let want = Layout::BF16.from_f32(x, Rounding::NearestEven, Overflow::Ieee);
        assert_eq!(u32::from(to_bf16(x).to_bits()), want, "{x:e}");
    }
    for x in f32_probes(Layout::F16) {
        let want = Layout::F16.from_f32(x, Rounding::NearestEven, Overflow::Ieee);
        assert_eq!(u32::from(to_f16(x).to_bits()), want, "{x:e}");
    }
}

#[test]
fn saturation_and_overflow_as_each_format_defines_them() {
    let rne = Rounding::NearestEven;
    let e4m3 = |x, overflow| Layout::E4M3.from_f32(x, rne, overflow);
    assert_eq!(e4m3(f32::INFINITY, Overflow::Saturate), 0x7E);
    assert_eq!(e4m3(f32::NEG_INFINITY, Overflow::Saturate), 0xFE);
    assert_eq!(e4m3(f32::INFINITY, Overflow::Ieee), 0x7F);
    assert_eq!(e4m3(464.0, Overflow::Ieee), 0x7E, "a tie between 448 and the NaN above it");
    assert_eq!(e4m3(464.1, Overflow::Ieee), 0x7F);
    assert_eq!(e4m3(f32::NAN, Overflow::Saturate), 0x7F);
    let e5m2 = |x, rounding, overflow| Layout::E5M2.from_f32(x, rounding, overflow);
    assert_eq!(e5m2(61440.0, rne, Overflow::Ieee), 0x7C);
    assert_eq!(e5m2(61440.0, rne, Overflow::Saturate), 0x7B);
    assert_eq!(e5m2(1e9, Rounding::TowardZero, Overflow::Ieee), 0x7B);
    assert_eq!(e5m2(-1e9, Rounding::TowardZero, Overflow::Infinity), 0xFC);
    assert_eq!(E5M6::MAX.to_f32(), 65024.0);
    assert_eq!((E5M6::NAN.0, E5M2::NAN.0, UE8M0::NAN.0), (0x7FF, 0x7F, 0xFF));
}

#[test]
fn tf32_truncation_and_rounding() {
    let x = f32::from_bits(0x3F80_1FFF);
    assert_eq!(Tf32::truncate(x).to_f32(), 1.0);
    assert_eq!(Tf32::from_f32(x, Rounding::NearestEven, Overflow::Ieee).to_bits(), 0x3F80_2000);
    assert_eq!(Tf32::truncate(f32::from_bits(0x7F80_0001)).to_f32(), f32::INFINITY);
}

#[test]
fn half_decodes_as_we_do() {
    for code in 0..=u16::MAX {
        let (ours, theirs) = (Layout::F16.to_f32(code.into()), f16::from_bits(code).to_f32());
        assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()));
        let (ours, theirs) = (Layout::BF16.to_f32(code.into()), bf16::from_bits(code).to_f32());
        assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()));
    }
}
