//! The tensor-core model against exact arithmetic written a second time: rationals of a fixed
//! denominator in big integers, rustc_apfloat for the last rounding; and small cases worked by
//! hand.

use fathom_numerics::formats::{Class, Format, Layout, Overflow, Rounding, f16};
use fathom_numerics::mma::{
    Accumulator, Arch, BlockScale, Fraction, Instr, Mma, Operand, Output, TABLE, Terms,
};
use proptest::prelude::*;
use rustc_apfloat::ieee::{Double, Half, IeeeFloat, Quad, Semantics, Single};
use rustc_apfloat::{Float, FloatConvert, Round};

struct E8M13S;
impl Semantics for E8M13S {
    const BITS: usize = 22;
    const EXP_BITS: usize = 8;
}

/// A finite number as the model sees it: value times 2^60, and its nominal exponent.
#[derive(Clone, Copy, Debug)]
struct Exact {
    scaled: i128,
    exponent: i32,
}

const SCALE: i32 = 60;

/// `code` of `format` from its value alone: FP64 holds it, its exponent is clamped from below.
fn exact(format: Format, code: u32) -> Exact {
    let value = match format {
        Format::Tf32 => f64::from(f32::from_bits(code & !0x1FFF)),
        _ => format.layout().to_f64(code),
    };
    let scaled = value * 2f64.powi(SCALE);
    assert_eq!(scaled.trunc(), scaled, "{value} is a multiple of 2^-60");
    let min_exponent = match format {
        Format::E4M3 => -6,
        Format::E5M2 | Format::F16 => -14,
        _ => -126,
    };
    let exponent =
        if value == 0.0 { -126 } else { (value.abs().log2().floor() as i32).max(min_exponent) };
    Exact { scaled: scaled as i128, exponent }
}

/// `x / 2^bits` rounded to an integer.
fn divide(x: i128, bits: i32, rounding: Rounding) -> i128 {
    if bits <= 0 {
        return if x == 0 { 0 } else { x << -bits };
    }
    let (floor, unit) = (x >> bits, 1i128 << bits);
    let rest = x - (floor << bits);
    let up = match rounding {
        Rounding::Down => false,
        Rounding::Up => rest > 0,
        Rounding::TowardZero => x < 0 && rest > 0,
        Rounding::NearestEven => 2 * rest > unit || (2 * rest == unit && floor & 1 == 1),
    };
    floor + i128::from(up)
}

fn apfloat_round(rounding: Rounding) -> Round {
    match rounding {
        Rounding::NearestEven => Round::NearestTiesToEven,
        Rounding::TowardZero => Round::TowardZero,
        Rounding::Down => Round::TowardNegative,
        Rounding::Up => Round::TowardPositive,
    }
}

/// `sum * 2^-weight` in the output format, by rustc_apfloat.
fn output(sum: i128, weight: i32, accumulator: &Accumulator) -> u32 {
    let exact = Quad::from_i128(sum).value.scalbn(-weight);
    assert_eq!(exact.scalbn(weight).to_i128(127).value, sum, "113 bits suffice");
    let round = apfloat_round(accumulator.round);
    // A tensor core's overflow is infinity, whatever the rounding; `limit` is where it begins.
    fn to<F: Float>(exact: Quad, round: Round, limit: i32) -> u32
    where
        Quad: FloatConvert<F>,
    {
        let rounded: F = exact.convert_r(round, &mut false).value;
        let infinity = if exact.is_negative() { -F::INFINITY } else { F::INFINITY };
        let overflow = !exact.is_zero() && exact.ilogb() >= limit;
        (if overflow { infinity } else { rounded }).to_bits() as u32
    }
    match accumulator.output {
        Output::F16 => positive_zero(to::<Half>(exact, round, 16), 0x8000),
        Output::F32 { fraction_bits: 13 } => {
            positive_zero(to::<IeeeFloat<E8M13S>>(exact, round, 128) << 10, 0x8000_0000)
        }
        Output::F32 { .. } => positive_zero(to::<Single>(exact, round, 128), 0x8000_0000),
    }
}

fn positive_zero(code: u32, negative_zero: u32) -> u32 {
    if code == negative_zero { 0 } else { code }
}

/// The fused dot-product-add by its definition, one step.
fn step(accumulator: &Accumulator, formats: (Format, Format), a: &[u32], b: &[u32], c: u32) -> u32 {
    let format = accumulator.output.format();
    if format.unpack(c).class == Class::Infinite {
        return c; // all products are finite here
    }
    let c = exact(format, c);
    let products = a.iter().zip(b).map(|(&a, &b)| {
        let (a, b) = (exact(formats.0, a), exact(formats.1, b));
        // Both factors are multiples of 2^-30 here, so that the product keeps the scale.
        let scaled = (a.scaled >> 30) * (b.scaled >> 30);
        assert_eq!((a.scaled >> 30) << 30, a.scaled);
        assert_eq!((b.scaled >> 30) << 30, b.scaled);
        Exact { scaled, exponent: a.exponent + b.exponent }
    });
    let terms: Vec<Exact> = products.chain([c]).collect();
    let Fraction::Bits(bits) = accumulator.fraction else {
        return output(terms.iter().map(|t| t.scaled).sum(), SCALE, accumulator);
    };
    let max = terms.iter().map(|t| t.exponent).max().unwrap();
    let weight = bits as i32 - max;
    let cut = |t: &Exact| {
        let magnitude_rounding = accumulator.align;
        divide(t.scaled, SCALE - weight, magnitude_rounding)
    };
    output(terms.iter().map(cut).sum(), weight, accumulator)
}

fn chain(
    accumulator: &Accumulator,
    formats: (Format, Format),
    a: &[u32],
    b: &[u32],
    c: u32,
) -> u32 {
    let steps = a.chunks(accumulator.group).zip(b.chunks(accumulator.group));
    steps.fold(c, |c, (a, b)| step(accumulator, formats, a, b, c))
}

/// Finite codes of `format` that are multiples of 2^-30 and below 2^17, so that i128 is exact.
fn code(format: Format) -> BoxedStrategy<u32> {
    let within =
        |range: std::ops::RangeInclusive<i32>, fraction_bits: u32, bias: i32, shift: u32| {
            (any::<bool>(), range, 0..1u32 << fraction_bits, 0..8u32).prop_map(
                move |(s, e, f, zero)| {
                    let magnitude =
                        if zero == 0 { 0 } else { ((e + bias) as u32) << fraction_bits | f };
                    let width = fraction_bits + if bias == 127 { 8 } else { 5 };
                    (magnitude | u32::from(s) << width) << shift
                },
            )
        };
    match format {
        Format::E4M3 => {
            any::<u8>().prop_filter("finite", |c| c & 0x7F != 0x7F).prop_map(u32::from).boxed()
        }
        Format::E5M2 => {
            any::<u8>().prop_filter("finite", |c| c & 0x7C != 0x7C).prop_map(u32::from).boxed()
        }
        Format::F16 => {
            any::<u16>().prop_filter("finite", |c| c & 0x7C00 != 0x7C00).prop_map(u32::from).boxed()
        }
        Format::Bf16 => within(-15..=14, 7, 127, 0).boxed(),
        Format::Tf32 => within(-15..=14, 10, 127, 13).boxed(),
        _ => within(-20..=30, 23, 127, 0).boxed(),
    }
}

/// A C for the output: sometimes zero, sometimes tiny or large.
fn c_code(output: Output) -> BoxedStrategy<u32> {
    match output {
        Output::F16 => code(Format::F16),
        Output::F32 { .. } => code(Format::F32),
    }
}

fn decode(format: Format, codes: &[u32]) -> Vec<Operand> {
    codes.iter().map(|&c| Operand::decode(format, c)).collect()
}

fn accumulate(x: &Accumulator, formats: (Format, Format), a: &[u32], b: &[u32], c: u32) -> u32 {
    let (a, b) = (decode(formats.0, a), decode(formats.1, b));
    let (fraction_a, fraction_b) =
        (formats.0.layout().fraction_bits, formats.1.layout().fraction_bits);
    x.chain(&Terms { a: &a, b: &b, scale_a: &[], scale_b: &[], fraction_a, fraction_b }, c)
}

/// A row's dot, a and b of the instruction's length.
#[derive(Debug)]
struct Dot {
    mma: Mma,
    a: Vec<u32>,
    b: Vec<u32>,
    c: u32,
}

/// Any plain instruction of the table with any operands.
fn any_dot() -> impl Strategy<Value = Dot> {
    let mut all = Vec::new();
    for arch in Arch::ALL {
        for (instr, qualifier) in QUALIFIERS {
            all.extend(Mma::find(arch, *instr, qualifier));
        }
    }
    assert!(all.len() > 50, "the qualifiers below cover the table: {}", all.len());
    proptest::sample::select(all).prop_flat_map(|mma| {
        let k = mma.shape.k;
        let a = proptest::collection::vec(code(mma.types.a), k);
        let b = proptest::collection::vec(code(mma.types.b), k);
        (a, b, c_code(mma.row.accumulator.output)).prop_map(move |(a, b, c)| Dot { mma, a, b, c })
    })
}

const QUALIFIERS: &[(Instr, &str)] = &[
    (Instr::MmaSync, "m8n8k4.f32.f16.f16.f32"),
    (Instr::MmaSync, "m8n8k4.f16.f16.f16.f16"),
    (Instr::MmaSync, "m16n8k8.f32.f16.f16.f32"),
    (Instr::MmaSync, "m16n8k8.f16.f16.f16.f16"),
    (Instr::MmaSync, "m16n8k16.f32.f16.f16.f32"),
    (Instr::MmaSync, "m16n8k16.f16.f16.f16.f16"),
    (Instr::MmaSync, "m16n8k8.f32.bf16.bf16.f32"),
    (Instr::MmaSync, "m16n8k16.f32.bf16.bf16.f32"),
    (Instr::MmaSync, "m16n8k4.f32.tf32.tf32.f32"),
    (Instr::MmaSync, "m16n8k8.f32.tf32.tf32.f32"),
    (Instr::MmaSync, "m16n8k16.f32.e4m3.e4m3.f32"),
    (Instr::MmaSync, "m16n8k32.f32.e4m3.e5m2.f32"),
    (Instr::MmaSync, "m16n8k32.f16.e5m2.e5m2.f16"),
    (Instr::MmaSync, "m16n8k32.f32.e5m2.e4m3.f32"),
    (Instr::MmaSync, "m16n8k16.f16.e4m3.e5m2.f16"),
    (Instr::Wgmma, "m64n8k32.f32.e4m3.e4m3"),
    (Instr::Wgmma, "m64n8k32.f32.e5m2.e4m3"),
    (Instr::Wgmma, "m64n8k32.f16.e5m2.e5m2"),
    (Instr::Wgmma, "m64n8k16.f32.bf16.bf16"),
    (Instr::Wgmma, "m64n8k16.f32.f16.f16"),
    (Instr::Wgmma, "m64n8k16.f16.f16.f16"),
    (Instr::Wgmma, "m64n8k8.f32.tf32.tf32"),
    (Instr::Tcgen05, "m64n8k32.f32.e4m3.e5m2"),
    (Instr::Tcgen05, "m64n8k32.f16.e4m3.e4m3"),
    (Instr::Tcgen05, "m64n8k16.f32.bf16.f16"),
    (Instr::Tcgen05, "m64n8k16.f16.f16.f16"),
    (Instr::Tcgen05, "m64n8k8.f32.tf32.tf32"),
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_row_is_the_exact_definition(dot in any_dot()) {
        let Dot { mma, a, b, c } = dot;
        let accumulator = &mma.row.accumulator;
        let formats = (mma.types.a, mma.types.b);
        let fp8_on_sm90 = mma.row.arch == Arch::Sm90
            && mma.row.instr == Instr::MmaSync
            && matches!(mma.types.a, Format::E4M3 | Format::E5M2);
        let want = if fp8_on_sm90 {
            // ptxas converts both operands to F16, then issues F16 HMMAs.
            let half = |format: Format, x: &[u32], odd: usize| -> Vec<u32> {
                let quads = x.chunks(4).flat_map(|four| [four[2 * odd], four[2 * odd + 1]]);
                let value = |code| format.layout().to_f32(code);
                quads.map(|code| f16::from_f32(value(code)).to_bits().into()).collect()
            };
            let hmma = |odd: usize, c: u32| {
                let (a, b) = (half(formats.0, &a, odd), half(formats.1, &b, odd));
                chain(accumulator, (Format::F16, Format::F16), &a, &b, c)
            };
            let sum = hmma(1, hmma(0, 0));
            let added = |format: Format| {
                let value = |x| Double::from_bits(u128::from(format.layout().to_f64(x).to_bits()));
                (value(sum) + value(c)).value
            };
            match mma.types.d {
                Format::F16 => {
                    let rounded: Half = added(Format::F16).convert(&mut false).value;
                    rounded.to_bits() as u32
                }
                _ => (Single::from_bits(sum.into()) + Single::from_bits(c.into())).value.to_bits() as u32,
            }
        } else {
            chain(accumulator, formats, &a, &b, c)
        };
        prop_assert_eq!(mma.dot(&a, &b, c), want, "{} {:?}", mma.row.arch, mma.types);
    }

    #[test]
    fn any_accumulator_is_the_exact_definition(
        bits in prop_oneof![0u32..=50, Just(u32::MAX)],
        group in 1usize..40,
        align in 0usize..4,
        round in 0usize..4,
        narrow in 0usize..3,
        a in proptest::collection::vec(code(Format::E5M2), 40),
        b in proptest::collection::vec(code(Format::E4M3), 40),
        c in code(Format::F32),
    ) {
        let roundings = [Rounding::TowardZero, Rounding::NearestEven, Rounding::Down, Rounding::Up];
        let output = [Output::FULL, Output::E8M13, Output::F16][narrow];
        let fraction = if bits == u32::MAX { Fraction::Exact } else { Fraction::Bits(bits) };
        let accumulator =
            Accumulator { group, fraction, align: roundings[align], output, round: roundings[round] };
        // E8M13's C is an FP32 of 13 fraction bits; FP16's a code of its own.
        let c = match output {
            Output::F16 => Layout::F16.from_f32(f32::from_bits(c) / 65536.0, Rounding::TowardZero, Overflow::Saturate),
            _ => c,
        };
        let formats = (Format::E5M2, Format::E4M3);
        let want = chain(&accumulator, formats, &a, &b, c);
        prop_assert_eq!(accumulate(&accumulator, formats, &a, &b, c), want);
    }
}

fn wgmma(qualifier: &str) -> Mma {
    Mma::find(Arch::Sm90, Instr::Wgmma, qualifier).unwrap()
}

/// `a` and `b` padded with zeros to the instruction's k.
fn dot(mma: Mma, a: &[u32], b: &[u32], c: u32) -> u32 {
    let padded = |x: &[u32]| -> Vec<u32> {
        (0..mma.shape.k).map(|k| x.get(k).copied().unwrap_or(0)).collect()
    };
    mma.dot(&padded(a), &padded(b), c)
}

#[test]
fn hopper_keeps_thirteen_bits_of_fp8() {
    let mma = wgmma("m64n8k32.f32.e4m3.e4m3");
    let (one, two_to_8, tiny) = (0x38, 0x78, 0x01); // 1, 256, 2^-9
    // 256 * 256 = 2^16 leaves bits down to 2^3: seven products of 1 are lost one by one.
    let (a, b) = ([two_to_8, one, one, one, one], [two_to_8, one, one, one, one]);
    assert_eq!(f32::from_bits(dot(mma, &a, &b, 0)), 65536.0);
    // Among themselves they count, whatever their order.
    assert_eq!(f32::from_bits(dot(mma, &[one; 5], &[one; 5], 0)), 5.0);
    // 1 + 2^-9 * 1 + 2^-9 * 2^-9: the last is below 2^-13.
    let sum = dot(mma, &[one, tiny, tiny], &[one, one, tiny], 0);
    assert_eq!(f32::from_bits(sum), 1.0 + 2f32.powi(-9));
    // An accumulator of 24 bits comes out with 13.
    let c = 1.0 + 2f32.powi(-13) + 2f32.powi(-14);
    assert_eq!(f32::from_bits(dot(mma, &[], &[], c.to_bits())), 1.0 + 2f32.powi(-13));
}

#[test]
fn special_values() {
    let mma = wgmma("m64n8k16.f32.bf16.bf16");
    let (inf, nan, one) = (0x7F80, 0xFFC1, 0x3F80);
    let minus = 0x8000;
    let nan_out = 0x7FFF_FFFF;
    assert_eq!(dot(mma, &[nan], &[one], 0), nan_out, "NaN, its payload and sign dropped");
    assert_eq!(dot(mma, &[inf], &[0], 0), nan_out, "infinity times zero");
    assert_eq!(dot(mma, &[inf, inf], &[one, one | minus], 0), nan_out, "infinities of both signs");
    assert_eq!(dot(mma, &[inf], &[one | minus], 0), 0xFF80_0000);
    assert_eq!(dot(mma, &[one], &[one], 0xFF80_0000), 0xFF80_0000, "C infinite");
    assert_eq!(dot(mma, &[one], &[one], 0x7F80_0001), nan_out, "C a signalling NaN");
    // 2^127 * 2 overflows to infinity although results are truncated.
    assert_eq!(dot(mma, &[0x7F00], &[0x4000], 0), 0x7F80_0000);
    // Zeros: the result is +0 whatever the signs.
    assert_eq!(dot(mma, &[minus], &[one], 0x8000_0000), 0);
    // -2^-150 truncates to +0.
    let small = dot(mma, &[0x0020 | minus], &[0x1A80], 0);
    assert_eq!(small, 0);
    let half = wgmma("m64n8k16.f16.f16.f16");
    assert_eq!(dot(half, &[0x7BFF], &[0x7BFF], 0), 0x7C00);
    assert_eq!(dot(half, &[0x7E01], &[0x3C00], 0), 0x7FFF);
}

#[test]
fn a_zero_factor_has_exponent_minus_126() {
    // 0 * 2^127 counts as 2^1 when the largest exponent is sought: C = 2^-25 falls below the cut.
    let mma = wgmma("m64n8k16.f32.bf16.bf16");
    assert_eq!(dot(mma, &[0], &[0x7F00], 2f32.powi(-25).to_bits()), 0);
    assert_eq!(dot(mma, &[0], &[0x3F80], 2f32.powi(-25).to_bits()), 2f32.powi(-25).to_bits());
}

#[test]
fn block_scales() {
    let ones = [0x38u32; 32];
    let mx =
        Mma::find(Arch::Sm100, Instr::Tcgen05BlockScale, "m128n8k32.block32.f32.e4m3.e4m3.ue8m0")
            .unwrap();
    let got = |sa, sb| mx.dot_scaled(&ones, &ones, &[sa], &[sb], 0);
    assert_eq!(f32::from_bits(got(127, 127)), 32.0);
    assert_eq!(f32::from_bits(got(130, 126)), 128.0);
    assert_eq!(got(255, 127), 0x7FFF_FFFF, "a NaN scale");
    assert_eq!(got(254, 254), 0x7F80_0000, "2^254 overflows");
    let nv =
        Mma::find(Arch::Sm120, Instr::MmaBlockScale, "m16n8k64.block16.f32.e2m1.e2m1.f32.ue4m3")
            .unwrap();
    assert_eq!(nv.scale, Some(BlockScale { format: Format::UE4M3, block: 16 }));
    let sixes = [0x7u32; 64];
    // 16 * 36 a block; scales 1, 1.5, 2, 0 against 1; a sign bit in a scale is ignored.
    let scales = [0x38, 0xBC, 0x40, 0x00];
    let got = nv.dot_scaled(&sixes, &sixes, &scales, &[0x38; 4], 1f32.to_bits());
    assert_eq!(f32::from_bits(got), 576.0 * 4.5 + 1.0);
    let infinite = nv.dot_scaled(&sixes, &sixes, &scales, &[0x38; 4], 0x7F80_0000);
    assert_eq!(infinite, 0x7F80_0000, "C infinite");
}

#[test]
fn fp32_fma_is_a_chain_of_fma() {
    let mut seed = 1u32;
    let mut next = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    for _ in 0..200 {
        let a: Vec<f32> =
            (0..20).map(|_| fathom_numerics::formats::to_bf16(next()).to_f32()).collect();
        let b: Vec<f32> =
            (0..20).map(|_| fathom_numerics::formats::to_bf16(next()).to_f32()).collect();
        let c = next();
        let want = a.iter().zip(&b).fold(c, |c, (a, b)| a.mul_add(*b, c));
        let codes = |x: &[f32]| -> Vec<u32> { x.iter().map(|x| x.to_bits() >> 16).collect() };
        let formats = (Format::Bf16, Format::Bf16);
        let got = accumulate(&Accumulator::FP32_FMA, formats, &codes(&a), &codes(&b), c.to_bits());
        assert_eq!(f32::from_bits(got).to_bits(), want.to_bits());
    }
}

#[test]
fn thirty_four_bits_make_thirty_two_fp8_products_exact_where_they_span_them() {
    // Terms of 2^15 that cancel, and thirty of 2^-18, the smallest product of E4M3, beside them.
    let mut a = [0x01u32; 32]; // 2^-9
    let mut b = [0x01u32; 32];
    (a[0], b[0], a[1], b[1]) = (0x70, 0x78, 0xF0, 0x78); // 128 * 256 and -128 * 256
    let formats = (Format::E4M3, Format::E4M3);
    let exact = accumulate(&Accumulator::EXACT, formats, &a, &b, 0);
    assert_eq!(f32::from_bits(exact), 30.0 * 2f32.powi(-18));
    assert_eq!(accumulate(&Accumulator::DEEPSEEK_34_BIT, formats, &a, &b, 0), exact);
    assert_eq!(accumulate(&Accumulator::HOPPER_FP8, formats, &a, &b, 0), 0);
}

#[test]
fn every_row_is_reachable_and_first() {
    // No row is shadowed by an earlier one, and every row has a consistent accumulator.
    for (i, row) in TABLE.iter().enumerate() {
        let formats = match row.operands {
            fathom_numerics::mma::table::Operands::Same(f) => f,
            fathom_numerics::mma::table::Operands::Mixed(f) => f,
        };
        for &k in row.k {
            for &format in formats {
                let shape = fathom_numerics::mma::MmaShape { m: 16, n: 8, k };
                let types =
                    fathom_numerics::mma::Types { a: format, b: format, c: row.d, d: row.d };
                let scales: Vec<Option<BlockScale>> = match row.scales {
                    [] => vec![None],
                    scales => scales.iter().map(|s| Some(*s)).collect(),
                };
                for scale in scales {
                    let found = Mma::with_types(row.arch, row.instr, shape, types, scale).unwrap();
                    assert!(
                        std::ptr::eq(found.row, row),
                        "row {i} is shadowed at k = {k}, {format}"
                    );
                    assert_eq!(row.accumulator.output.format(), row.d);
                }
            }
        }
    }
}

#[test]
fn unknown_instructions_are_named() {
    let message =
        |arch, instr, qualifier| Mma::find(arch, instr, qualifier).unwrap_err().to_string();
    let wrong = message(Arch::Sm80, Instr::Wgmma, "m64n8k32.f32.e4m3.e4m3");
    assert_eq!(
        wrong,
        "no tensor-core model for wgmma m64n8k32.f32.e4m3.e4m3 on sm_80; sm_80 has mma"
    );
    let wrong = message(Arch::Sm90, Instr::Wgmma, "m64n8k16.f32.e4m3.e4m3");
    assert!(wrong.contains("k [32] of e4m3/e5m2 into f32"), "{wrong}");
    let wrong = message(Arch::Sm90, Instr::Wgmma, "m64n8k32.f32.e4m3");
    assert!(wrong.contains("expected B's type, found 'the end'"), "{wrong}");
    assert!(Arch::parse("sm_90a").is_ok() && Arch::parse("sm_91").is_err());
    assert_eq!(Format::F16.unpack(0x7E00).class, Class::Nan);
}
