//! The exact GEMMs on every instruction set against the specification, bit for bit.

use fathom_numerics::formats::Format;
use fathom_numerics::formats::Rounding;
use fathom_numerics::gemm::tensor_core::TensorCore;
use fathom_numerics::gemm::{
    Accumulate, Fp8Operand, GemmConfig, Isa, Promote, ScaleBlock, gemm_fp8_on, gemm_unscaled_on,
};
use fathom_numerics::mma::{Accumulator, Fraction, Output};
use ndarray::Array2;

/// A small generator of its own, so that the tests depend on nothing.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// How codes are drawn.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Every finite code alike.
    Uniform,
    /// Roughly a bell curve that fills the format, as quantised activations do.
    Bell,
    /// Mostly zeros of both signs and subnormals.
    Sparse,
    /// Pairs of opposite terms, so that sums cancel.
    Cancelling,
    /// All one exponent but rare outliers at the top.
    Outlier,
    /// Every code, NaN and (E5M2) infinity included, specials rare.
    Special,
}

const KINDS: [Kind; 6] =
    [Kind::Uniform, Kind::Bell, Kind::Sparse, Kind::Cancelling, Kind::Outlier, Kind::Special];

fn codes(kind: Kind, format: Format, rows: usize, k: usize, random: &mut Random) -> Array2<u8> {
    let top = if format == Format::E4M3 { 0x7Fu64 } else { 0x7C };
    let mut out = Array2::zeros((rows, k));
    for mut row in out.rows_mut() {
        for i in 0..k {
            let sign = (random.below(2) * 0x80) as u8;
            row[i] = match kind {
                Kind::Uniform => sign | random.below(top) as u8,
                Kind::Bell => {
                    let sum: f64 = (0..6).map(|_| random.next() as f64 / 2f64.powi(31) - 0.5).sum();
                    let max = format.max();
                    let layout = format.layout();
                    layout.from_f32(
                        sum as f32 / 3.0 * max,
                        fathom_numerics::formats::Rounding::NearestEven,
                        fathom_numerics::formats::Overflow::Saturate,
                    ) as u8
                }
                Kind::Sparse => match random.below(8) {
                    0 => sign | random.below(0x10) as u8,
                    1 => sign | random.below(8) as u8,
                    _ => sign,
                },
                Kind::Cancelling if i % 2 == 1 => row[i - 1] ^ (0x80 * (random.below(8) > 0) as u8),
                Kind::Cancelling => sign | (0x30 + random.below(0x40)) as u8,
                Kind::Outlier if random.below(40) == 0 => sign | (top - 1 - random.below(4)) as u8,
                Kind::Outlier => sign | (0x18 + random.below(16)) as u8,
                Kind::Special if random.below(150) == 0 => sign | (0x7C + random.below(4)) as u8,
                Kind::Special => sign | random.below(top) as u8,
            };
        }
    }
    out
}

fn scales(shape: (usize, usize), random: &mut Random) -> Array2<f32> {
    Array2::from_shape_simple_fn(shape, || {
        f32::from_bits(0x3A00_0000 + (random.next() as u32 & 0x03FF_FFFF))
    })
}

/// One random case: the specification, then every other instruction set.
fn check(kind: Kind, (m, n, k): (usize, usize, usize), config: &GemmConfig, seed: u64) {
    let mut random = Random(seed * 977 + 5);
    let formats = [Format::E4M3, Format::E5M2];
    let (fa, fb) = match kind {
        Kind::Special | Kind::Uniform => {
            (formats[seed as usize % 2], formats[seed as usize / 2 % 2])
        }
        _ => (Format::E4M3, formats[usize::from(seed.is_multiple_of(5))]),
    };
    let a = codes(kind, fa, m, k, &mut random);
    let b = codes(kind, fb, n, k, &mut random);
    let long = config.promotion_interval.is_none_or(|interval| interval > 128);
    let (block_a, block_b) = if long {
        (ScaleBlock::PER_ROW, ScaleBlock::PER_TENSOR)
    } else {
        (ScaleBlock::TILE_1X128, ScaleBlock::BLOCK_128X128)
    };
    let scale_a = scales(block_a.scales(m, k), &mut random);
    let scale_b = scales(block_b.scales(n, k), &mut random);
    let a = Fp8Operand { codes: a.view(), scales: scale_a.view(), format: fa, block: block_a };
    let b = Fp8Operand { codes: b.view(), scales: scale_b.view(), format: fb, block: block_b };
    let old = scales((m, n), &mut random);
    for accumulate in [Accumulate::Overwrite, Accumulate::Chain, Accumulate::AddAtEnd] {
        let mut want = old.clone();
        gemm_fp8_on(Isa::Portable, &a, &b, want.view_mut(), accumulate, config).unwrap();
        for isa in Isa::available() {
            let mut got = old.clone();
            gemm_fp8_on(isa, &a, &b, got.view_mut(), accumulate, config).unwrap();
            for (index, got) in got.indexed_iter() {
                let want = want[index];
                assert_eq!(
                    got.to_bits(),
                    want.to_bits(),
                    "{isa:?} {kind:?} {m} x {n} x {k} {accumulate:?} {config:?} at {index:?}: {got:e}, not {want:e}"
                );
            }
        }
    }
}

#[test]
fn every_kind_of_data_every_path() {
    let config = GemmConfig::default();
    for seed in 0..12 {
        for kind in KINDS {
            check(kind, (9, 37, 256), &config, seed);
        }
    }
}

#[test]
fn shapes_that_are_multiples_of_nothing() {
    for (seed, shape) in
        [(1, 1, 1), (3, 33, 31), (16, 32, 128), (17, 65, 129), (70, 5, 300), (4, 31, 1000)]
            .into_iter()
            .enumerate()
    {
        check(Kind::Bell, shape, &GemmConfig::default(), seed as u64);
        check(Kind::Uniform, shape, &GemmConfig::default(), seed as u64);
    }
}

#[test]
fn intervals_and_promotions() {
    let intervals = [Some(16), Some(32), Some(64), Some(128), Some(256), None];
    for (seed, promotion_interval) in intervals.into_iter().enumerate() {
        for promote in [Promote::Fma, Promote::MulAdd, Promote::ScalesInTurn] {
            let config = GemmConfig { promotion_interval, promote, ..GemmConfig::default() };
            check(Kind::Bell, (8, 40, 1280), &config, seed as u64);
            check(Kind::Outlier, (5, 20, 200), &config, seed as u64);
        }
    }
}

#[test]
fn threads_change_no_bit() {
    let mut random = Random(3);
    let (m, n, k) = (150, 170, 384);
    let a = codes(Kind::Bell, Format::E4M3, m, k, &mut random);
    let b = codes(Kind::Bell, Format::E4M3, n, k, &mut random);
    let scale_a = scales((m, 3), &mut random);
    let scale_b = scales((2, 3), &mut random);
    let a = Fp8Operand::tile_1x128(a.view(), scale_a.view());
    let b = Fp8Operand::block_128x128(b.view(), scale_b.view());
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut d = Array2::<f32>::zeros((m, n));
        let config = GemmConfig::default();
        let overwrite = Accumulate::Overwrite;
        pool.install(|| gemm_fp8_on(Isa::best(), &a, &b, d.view_mut(), overwrite, &config))
            .unwrap();
        d
    };
    let one = run(1);
    for threads in [2, 3, 7] {
        assert_eq!(run(threads), one, "{threads} threads");
    }
}

#[test]
fn other_accumulators() {
    let wide = |fraction, round| Accumulator {
        fraction: Fraction::Bits(fraction),
        round,
        ..Accumulator::HOPPER_16BIT
    };
    let accumulators = [
        Accumulator::BLACKWELL_FP8,
        Accumulator::DEEPSEEK_34_BIT,
        Accumulator::EXACT,
        Accumulator { group: 64, ..Accumulator::HOPPER_FP8 },
        Accumulator { fraction: Fraction::Bits(14), ..Accumulator::HOPPER_FP8 },
        Accumulator { output: Output::F32 { fraction_bits: 10 }, ..Accumulator::HOPPER_FP8 },
        wide(22, Rounding::NearestEven),
        wide(40, Rounding::TowardZero),
    ];
    for (seed, accumulator) in accumulators.into_iter().enumerate() {
        let config = GemmConfig { accumulator, ..GemmConfig::default() };
        for kind in [Kind::Bell, Kind::Uniform, Kind::Special] {
            check(kind, (6, 35, 200), &config, seed as u64);
        }
    }
}

/// Codes of a 16-bit format or TF32: bell-shaped, wide, sparse with subnormals, or with specials.
fn words(format: Format, kind: u64, rows: usize, k: usize, random: &mut Random) -> Array2<u32> {
    let bits = if format == Format::Tf32 { 32 } else { 16 };
    Array2::from_shape_simple_fn((rows, k), || {
        let any = ((random.next() << 31 ^ random.next()) & ((1 << bits) - 1)) as u32;
        let value = |scale: i32, random: &mut Random| {
            let x = (random.next() as f64 / 2f64.powi(30) - 1.0) * 2f64.powi(scale);
            let (x, even) = (x as f32, Rounding::NearestEven);
            match format {
                Format::Tf32 => x.to_bits(),
                _ => format.layout().from_f32(x, even, fathom_numerics::formats::Overflow::Ieee),
            }
        };
        match kind {
            0 => value(0, random),
            1 => value(random.below(30) as i32 - 20, random),
            2 if random.below(3) > 0 => any & (1 << (bits - 1)),
            2 => any & ((1 << (bits - 1)) | if bits == 32 { 0x00FF_FFFF } else { 0xFF }),
            3 => value(if format == Format::F16 { 14 } else { 120 }, random),
            _ => any,
        }
    })
}

#[test]
fn sixteen_bit_and_tf32() {
    let cases = [
        (Format::Bf16, Accumulator::HOPPER_16BIT),
        (Format::F16, Accumulator::HOPPER_16BIT),
        (Format::Tf32, Accumulator::HOPPER_TF32),
    ];
    for (format, accumulator) in cases {
        for kind in 0..5 {
            let mut random = Random(kind + 77);
            let (m, n, k) = (10, 37, 530 - 100 * kind as usize);
            let (a, b) =
                (words(format, kind, m, k, &mut random), words(format, kind, n, k, &mut random));
            let old = scales((m, n), &mut random);
            for accumulate in [Accumulate::Overwrite, Accumulate::Chain, Accumulate::AddAtEnd] {
                let run = |isa| {
                    let mut d = old.clone();
                    let (a, b) = (a.view(), b.view());
                    gemm_unscaled_on(isa, format, a, b, d.view_mut(), accumulate, &accumulator)
                        .unwrap();
                    d.mapv(f32::to_bits)
                };
                let want = run(Isa::Portable);
                for isa in Isa::available() {
                    assert_eq!(run(isa), want, "{isa:?} {format:?} kind {kind} {accumulate:?}");
                }
            }
        }
    }
}

/// FP8 codes without scales, chained onto whatever stands in D: beyond the range of the f32 lanes
/// too, at the start and on the way.
#[test]
fn eight_bit_codes() {
    let hopper = Accumulator::HOPPER_FP8;
    let mut random = Random(5);
    let formats = [Format::E4M3, Format::E5M2];
    for (round, kind) in KINDS.iter().cycle().take(4 * KINDS.len()).enumerate() {
        let format = formats[round % 2];
        let (m, n, k) = (9, 35, [30, 700][round / 2 % 2]);
        let (a, b) =
            (codes(*kind, format, m, k, &mut random), codes(*kind, format, n, k, &mut random));
        let (a, b) = (a.mapv(u32::from), b.mapv(u32::from));
        let mut old = scales((m, n), &mut random);
        if round % 3 == 0 {
            old.mapv_inplace(|x| x * 1e30);
        }
        for accumulate in [Accumulate::Overwrite, Accumulate::Chain, Accumulate::AddAtEnd] {
            let run = |isa| {
                let mut d = old.clone();
                let d_view = d.view_mut();
                gemm_unscaled_on(isa, format, a.view(), b.view(), d_view, accumulate, &hopper)
                    .unwrap();
                d.mapv(f32::to_bits)
            };
            let want = run(Isa::Portable);
            for isa in Isa::available() {
                assert_eq!(run(isa), want, "{isa:?} {format:?} {kind:?} {accumulate:?} K {k}");
            }
        }
    }
    // The largest products, so many that their sum leaves that range.
    let largest = Array2::from_elem((1, 1 << 14), Format::E5M2.layout().max_code());
    let run = |isa| {
        let (mut d, form) = (Array2::zeros((1, 1)), Accumulate::Overwrite);
        let (a, b) = (largest.view(), largest.view());
        gemm_unscaled_on(isa, Format::E5M2, a, b, d.view_mut(), form, &hopper).unwrap();
        d[[0, 0]]
    };
    for isa in Isa::available() {
        assert_eq!(run(isa), run(Isa::Portable), "{isa:?}");
    }
}

#[test]
fn tiles_with_every_incoming_accumulator() {
    let mut random = Random(11);
    for round in 0..24u64 {
        let formats = [Format::E4M3, Format::E5M2];
        let (fa, fb) = (formats[round as usize % 2], formats[round as usize / 2 % 2]);
        let kind = KINDS[round as usize % KINDS.len()];
        let (m, n, k) = (64, 40, if round % 3 == 0 { 128 } else { 32 });
        let (a, b) = (codes(kind, fa, m, k, &mut random), codes(kind, fb, n, k, &mut random));
        let c = Array2::from_shape_fn((m, n), |(i, _)| {
            let any = f32::from_bits((random.next() << 31 ^ random.next()) as u32);
            match i / 8 {
                0 => 0.0,
                1 => -0.0,
                2 => any,
                3 => any.clamp(-1e5, 1e5),
                4 => f32::from_bits(any.to_bits() & 0x80FF_FFFF),
                5 => f32::from_bits(0x3000_0000 | any.to_bits() & 0x8FFF_FFFF),
                6 => any.signum() * 1e-9,
                _ => [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1.0][any.to_bits() as usize % 4],
            }
        });
        for accumulate in [false, true] {
            let run = |isa| {
                let core = TensorCore::on(isa, Accumulator::HOPPER_FP8, fa, fb).unwrap();
                let (a, b) = (core.pack_a(a.view()), core.pack_b(b.view()));
                let mut d = c.clone();
                core.multiply_add(&a, &b, d.view_mut(), accumulate);
                d.mapv(f32::to_bits)
            };
            let want = run(Isa::Portable);
            for isa in Isa::available() {
                assert_eq!(run(isa), want, "{isa:?} {kind:?} {fa} {fb} K {k}");
            }
        }
    }
    // 16-bit operands on the same interface.
    let (a, b) =
        (words(Format::Bf16, 0, 64, 16, &mut random), words(Format::Bf16, 1, 24, 16, &mut random));
    let c = scales((64, 24), &mut random);
    let run = |isa| {
        let core =
            TensorCore::on(isa, Accumulator::HOPPER_16BIT, Format::Bf16, Format::Bf16).unwrap();
        let (a, b) = (core.pack_a(a.mapv(|x| x as u16).view()), core.pack_b(b.view()));
        let mut d = c.clone();
        core.multiply_add(&a, &b, d.view_mut(), true);
        d
    };
    let want = run(Isa::Portable);
    for isa in Isa::available() {
        assert_eq!(run(isa), want, "{isa:?}");
    }
    assert!(
        TensorCore::new(Accumulator::tensor_core(32, 13, Output::F16), Format::E4M3, Format::E4M3)
            .is_none()
    );
}
