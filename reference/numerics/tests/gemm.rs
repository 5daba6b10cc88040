//! GEMMs against the tensor-core instructions of the table, one element at a time, and the
//! identities
//! between their forms.

use fathom_numerics::formats::{Format, bf16, canonical_f32, f16};
use fathom_numerics::gemm::grouped::{
    gemm_fp8_grouped_k, gemm_fp8_grouped_m, gemm_fp8_segmented_k,
};
use fathom_numerics::gemm::{
    Accumulate, Fp8Operand, GemmConfig, GemmError, Isa, Promote, ScaleBlock, cast_bf16,
    gemm_bf16_into, gemm_f16_into, gemm_fp8, gemm_fp8_into, gemm_fp8_on, gemm_unscaled_on,
};
use fathom_numerics::mma::{Accumulator, Arch, Fraction, Instr, Mma, Output};
use fathom_numerics::quant::{QuantConfig, Quantized, quantize, quantize_block, quantize_tile};
use ndarray::{Array2, Array3, ArrayView2, Axis, concatenate, s};
use proptest::prelude::*;

/// Pseudo-random values of a seed, with outliers.
fn values(rows: usize, k: usize, seed: u64) -> Array2<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    Array2::from_shape_simple_fn((rows, k), || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let unit = (state >> 40) as f32 / (1 << 24) as f32 - 0.5;
        if state >> 33 & 31 == 0 { unit * 300.0 } else { unit }
    })
}

fn tile(rows: usize, k: usize, seed: u64) -> Quantized {
    quantize_tile(values(rows, k, seed).view(), 128, &QuantConfig::default()).unwrap()
}

fn weights(rows: usize, k: usize, seed: u64) -> Quantized {
    quantize_block(values(rows, k, seed).view(), &QuantConfig::default()).unwrap()
}

fn bits(x: &Array2<f32>) -> Array2<u32> {
    x.map(|x| x.to_bits())
}

/// One element by chained instructions: `k` elements from zero in groups of the instruction's k.
fn chained(mma: &Mma, a: &[u32], b: &[u32], start: u32) -> u32 {
    let depth = mma.shape.k;
    let pad =
        |x: &[u32]| -> Vec<u32> { (0..depth).map(|k| x.get(k).copied().unwrap_or(0)).collect() };
    a.chunks(depth).zip(b.chunks(depth)).fold(start, |c, (a, b)| mma.dot(&pad(a), &pad(b), c))
}

fn fp8_by_instructions(a: &Quantized, b: &Quantized, interval: usize) -> Array2<f32> {
    let qualifier = format!("m64n8k32.f32.{}.{}", a.format, b.format);
    let wgmma = Mma::find(Arch::Sm90, Instr::Wgmma, &qualifier).unwrap();
    let k = a.codes.ncols();
    let (a, b) = (a.operand(), b.operand());
    Array2::from_shape_fn((a.rows(), b.rows()), |(i, j)| {
        let codes = |x: &Fp8Operand<'_>, row: usize, begin: usize| -> Vec<u32> {
            let end = (begin + interval).min(k);
            x.codes.slice(s![row, begin..end]).iter().map(|&c| u32::from(c)).collect()
        };
        let acc = (0..k).step_by(interval).fold(0f32, |acc, begin| {
            let partial = chained(&wgmma, &codes(&a, i, begin), &codes(&b, j, begin), 0);
            (a.scale(i, begin) * b.scale(j, begin)).mul_add(f32::from_bits(partial), acc)
        });
        canonical_f32(acc)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn fp8_is_promoted_wgmma(
        m in 1usize..20, n in 1usize..20, k in 1usize..400, seed: u64,
        interval in prop_oneof![Just(32usize), Just(64), Just(128)],
        wgrad: bool, e5m2: bool,
    ) {
        let a = tile(m, k, seed);
        let format = if e5m2 { Format::E5M2 } else { Format::E4M3 };
        let block = if wgrad { ScaleBlock::TILE_1X128 } else { ScaleBlock::BLOCK_128X128 };
        let b = quantize(values(n, k, seed ^ 5).view(), block, &QuantConfig { format, ..QuantConfig::default() }).unwrap();
        let config = GemmConfig { promotion_interval: Some(interval), ..GemmConfig::default() };
        let got = gemm_fp8(&a.operand(), &b.operand(), &config).unwrap();
        prop_assert_eq!(bits(&got), bits(&fp8_by_instructions(&a, &b, interval)));
    }

    #[test]
    fn fp8_of_any_codes(codes in proptest::collection::vec(any::<u8>(), 4 * 160), scale in any::<u32>()) {
        // NaNs, both zeros, saturated codes, and scales that are infinite, negative or NaN.
        let x = Array2::from_shape_vec((4, 160), codes).unwrap();
        let scales = Array2::from_shape_fn((2, 2), |(i, j)| {
            if (i, j) == (0, 1) { f32::from_bits(scale) } else { 0.5 }
        });
        let a = Quantized { codes: x.slice(s![..2, ..]).to_owned(), scales: scales.clone(), format: Format::E4M3, block: ScaleBlock::TILE_1X128 };
        let b = Quantized { codes: x.slice(s![2.., ..]).to_owned(), scales, ..a.clone() };
        let got = gemm_fp8(&a.operand(), &b.operand(), &GemmConfig::default()).unwrap();
        prop_assert_eq!(bits(&got), bits(&fp8_by_instructions(&a, &b, 128)));
    }

    #[test]
    fn plain_accumulators_are_the_specification(
        m in 1usize..9, n in 1usize..9, k in 1usize..300, seed: u64,
        group in prop_oneof![Just(1usize), 2usize..64], e5m2: bool, interval: bool, form in 0usize..3,
        codes in proptest::collection::vec(any::<u8>(), 8),
    ) {
        let format = if e5m2 { Format::E5M2 } else { Format::E4M3 };
        let config = QuantConfig { format, ..QuantConfig::default() };
        let mut a = quantize_tile(values(m, k, seed).view(), 128, &config).unwrap();
        let b = tile(n, k, seed ^ 3);
        // Any codes at the start of a row: NaN, infinity, both zeros.
        a.codes.iter_mut().zip(&codes).for_each(|(x, code)| *x = *code);
        let config = GemmConfig {
            accumulator: Accumulator { group, ..Accumulator::EXACT },
            promotion_interval: Some(if interval { 64 } else { 128 }),
            ..GemmConfig::default()
        };
        let form = [Accumulate::Overwrite, Accumulate::Chain, Accumulate::AddAtEnd][form];
        let run = |isa| {
            let mut d = values(m, n, seed ^ 11);
            gemm_fp8_on(isa, &a.operand(), &b.operand(), d.view_mut(), form, &config).unwrap();
            bits(&d)
        };
        prop_assert_eq!(run(Isa::best()), run(Isa::Portable));
    }

    #[test]
    fn bf16_f16_and_tf32_are_chained_instructions(m in 1usize..8, n in 1usize..8, k in 1usize..80, seed: u64) {
        let (a, b) = (values(m, k, seed), values(n, k, seed ^ 9));
        let by_instructions = |qualifier: &str, a: Array2<u32>, b: Array2<u32>| {
            let mma = Mma::find(Arch::Sm90, Instr::Wgmma, qualifier).unwrap();
            Array2::from_shape_fn((m, n), |(i, j)| chained(&mma, &a.row(i).to_vec(), &b.row(j).to_vec(), 0))
        };
        let (form, hopper) = (Accumulate::Overwrite, Accumulator::HOPPER_16BIT);
        let (x, y) = (a.map(|x| bf16::from_f32(*x)), b.map(|x| bf16::from_f32(*x)));
        let code = |x: &bf16| u32::from(x.to_bits());
        let mut d = Array2::zeros((m, n));
        gemm_bf16_into(x.view(), y.view(), d.view_mut(), form, &hopper).unwrap();
        prop_assert_eq!(bits(&d), by_instructions("m64n8k16.f32.bf16.bf16", x.map(code), y.map(code)));
        let (x, y) = (a.map(|x| f16::from_f32(*x)), b.map(|x| f16::from_f32(*x)));
        let code = |x: &f16| u32::from(x.to_bits());
        gemm_f16_into(x.view(), y.view(), d.view_mut(), form, &hopper).unwrap();
        prop_assert_eq!(bits(&d), by_instructions("m64n8k16.f32.f16.f16", x.map(code), y.map(code)));
        let (a, b, tf32) = (a.map(|x| x.to_bits()), b.map(|x| x.to_bits()), Accumulator::HOPPER_TF32);
        gemm_unscaled_on(Isa::best(), Format::Tf32, a.view(), b.view(), d.view_mut(), form, &tf32).unwrap();
        prop_assert_eq!(bits(&d), by_instructions("m64n8k8.f32.tf32.tf32", a, b));
    }
}

#[test]
fn a_chained_gradient_does_not_see_the_cut() {
    let (a, b) = (values(9, 512, 1), values(7, 512, 2));
    let q = |x: ArrayView2<'_, f32>| quantize_tile(x, 128, &QuantConfig::default()).unwrap();
    let config = GemmConfig::default();
    let whole = gemm_fp8(&q(a.view()).operand(), &q(b.view()).operand(), &config).unwrap();
    for form in [Accumulate::Chain, Accumulate::AddAtEnd] {
        let mut grad = Array2::zeros((9, 7));
        let mut parts = Vec::new();
        for cut in [s![.., ..256], s![.., 256..]] {
            let (a, b) = (q(a.slice(cut)), q(b.slice(cut)));
            gemm_fp8_into(&a.operand(), &b.operand(), grad.view_mut(), form, &config).unwrap();
            parts.push(gemm_fp8(&a.operand(), &b.operand(), &config).unwrap());
        }
        match form {
            Accumulate::Chain => assert_eq!(bits(&grad), bits(&whole)),
            _ => {
                assert_eq!(bits(&grad), bits(&(&parts[0] + &parts[1])));
                assert_ne!(bits(&grad), bits(&whole), "the two forms differ");
            }
        }
    }
    let (x, y) = (a.map(|x| bf16::from_f32(*x)), b.map(|x| bf16::from_f32(*x)));
    let hopper = Accumulator::HOPPER_16BIT;
    let mut grad = Array2::zeros((9, 7));
    for cut in [s![.., ..256], s![.., 256..]] {
        gemm_bf16_into(x.slice(cut), y.slice(cut), grad.view_mut(), Accumulate::Chain, &hopper)
            .unwrap();
    }
    let mut whole = Array2::zeros((9, 7));
    gemm_bf16_into(x.view(), y.view(), whole.view_mut(), Accumulate::Overwrite, &hopper).unwrap();
    assert_eq!(bits(&grad), bits(&whole));
}

#[test]
fn intervals_above_a_block_need_equal_scales() {
    let (a, b) = (tile(3, 384, 3), weights(5, 384, 4));
    let config = |interval| GemmConfig { promotion_interval: interval, ..GemmConfig::default() };
    let error = gemm_fp8(&a.operand(), &b.operand(), &config(None)).unwrap_err();
    assert!(
        matches!(error, GemmError::UnequalScales { interval: 384, operand: "a", row: 0, .. }),
        "{error}"
    );
    let error = gemm_fp8(&a.operand(), &b.operand(), &config(Some(48))).unwrap_err();
    assert!(
        matches!(error, GemmError::Interval { interval: 48, operand: "a", block: 128 }),
        "{error}"
    );
    assert_eq!(
        gemm_fp8(&a.operand(), &b.operand(), &config(Some(0))).unwrap_err(),
        GemmError::Zero("promotion_interval")
    );
    // The same scale in every block is as good as one scale.
    let equal = |q: &Quantized, s: f32| Quantized { scales: q.scales.mapv(|_| s), ..q.clone() };
    let (a, b) = (equal(&a, 0.25), equal(&b, 3.0));
    let per_tensor = |q: &Quantized| Quantized {
        scales: q.scales.slice(s![..1, ..1]).to_owned(),
        block: ScaleBlock::PER_TENSOR,
        ..q.clone()
    };
    for interval in [Some(256), None] {
        let got = gemm_fp8(&a.operand(), &b.operand(), &config(interval)).unwrap();
        assert_eq!(bits(&got), bits(&fp8_by_instructions(&a, &b, interval.unwrap_or(384))));
        let one = gemm_fp8(&per_tensor(&a).operand(), &per_tensor(&b).operand(), &config(interval))
            .unwrap();
        assert_eq!(bits(&got), bits(&one));
    }
}

#[test]
fn every_knob_shows() {
    let (a, b) = (tile(8, 512, 11), weights(8, 512, 12));
    let run = |config: GemmConfig| bits(&gemm_fp8(&a.operand(), &b.operand(), &config).unwrap());
    let base = GemmConfig::default();
    let knobs = [
        GemmConfig { promotion_interval: Some(64), ..base },
        GemmConfig { promote: Promote::MulAdd, ..base },
        GemmConfig { promote: Promote::ScalesInTurn, ..base },
        GemmConfig { accumulator: Accumulator::BLACKWELL_FP8, ..base },
        GemmConfig { accumulator: Accumulator::FP32_FMA, ..base },
        GemmConfig { accumulator: Accumulator { group: 16, ..Accumulator::HOPPER_FP8 }, ..base },
    ];
    let outputs: Vec<_> = std::iter::once(base).chain(knobs).map(run).collect();
    for i in 0..outputs.len() {
        for j in 0..i {
            assert_ne!(outputs[i], outputs[j], "knobs {j} and {i} give the same bits");
        }
    }
}

#[test]
fn groups_along_m() {
    let (sizes, config) = ([16, 0, 15], GemmConfig::default());
    let whole = quantize(
        values(40, 256, 21).view(),
        ScaleBlock { rows: usize::MAX, k: 128 },
        &QuantConfig::default(),
    )
    .unwrap();
    let experts: Vec<Quantized> = (0..3).map(|g| weights(12, 256, 30 + g)).collect();
    let b: Vec<_> = experts.iter().map(Quantized::operand).collect();
    for a in [tile(40, 256, 21), whole] {
        let mut d = Array2::from_elem((40, 12), 7.0);
        gemm_fp8_grouped_m(&a.operand(), &b, &sizes, d.view_mut(), &config).unwrap();
        for (g, rows) in [(0, 0..16), (2, 16..31)] {
            let alone = gemm_fp8(&a.operand(), &b[g], &config).unwrap();
            assert_eq!(d.slice(s![rows.clone(), ..]), alone.slice(s![rows, ..]), "group {g}");
        }
        assert!(d.slice(s![31.., ..]).iter().all(|x| x.to_bits() == 0), "nobody's rows are +0");
        let mut grouped = |b, sizes: &[usize]| {
            gemm_fp8_grouped_m(&a.operand(), b, sizes, d.view_mut(), &config).unwrap_err()
        };
        assert!(matches!(grouped(&b, &[16, 10, 15]), GemmError::GroupSizes { .. }));
        assert!(matches!(grouped(&b[..2], &sizes), GemmError::Shape { what: "m_sizes", .. }));
    }
    // Rows that share a scale with some others cannot be dealt out.
    let shared = quantize_block(values(256, 256, 3).view(), &QuantConfig::default()).unwrap();
    let mut d = Array2::zeros((256, 12));
    let error = gemm_fp8_grouped_m(&shared.operand(), &b, &sizes, d.view_mut(), &config);
    assert!(matches!(error, Err(GemmError::Scales { operand: "a", .. })), "{error:?}");
}

#[test]
fn groups_along_k() {
    let sizes = [128, 0, 200, 64];
    let part = |rows, seed: u64| -> Vec<Quantized> {
        sizes.iter().enumerate().map(|(g, &k)| tile(rows, k, seed + g as u64)).collect()
    };
    let (a_parts, b_parts) = (part(5, 60), part(6, 70));
    let joined = |parts: &[Quantized]| {
        let codes: Vec<_> = parts.iter().map(|q| q.codes.view()).collect();
        let scales: Vec<_> = parts.iter().map(|q| q.scales.view()).collect();
        Quantized {
            codes: concatenate(Axis(1), &codes).unwrap(),
            scales: concatenate(Axis(1), &scales).unwrap(),
            ..parts[0].clone()
        }
    };
    let (a, b) = (joined(&a_parts), joined(&b_parts));
    let config = GemmConfig::default();
    let old = Array3::from_shape_fn((4, 5, 6), |(g, i, j)| (g * 30 + i * 6 + j) as f32 / 7.0);
    for form in [Accumulate::Overwrite, Accumulate::Chain, Accumulate::AddAtEnd] {
        let mut d = old.clone();
        gemm_fp8_grouped_k(&a.operand(), &b.operand(), &sizes, d.view_mut(), form, &config)
            .unwrap();
        for g in 0..4 {
            let mut alone = old.index_axis(Axis(0), g).to_owned();
            gemm_fp8_into(
                &a_parts[g].operand(),
                &b_parts[g].operand(),
                alone.view_mut(),
                form,
                &config,
            )
            .unwrap();
            assert_eq!(d.index_axis(Axis(0), g), alone, "group {g}, {form:?}");
        }
        if form != Accumulate::Overwrite {
            assert_eq!(d.index_axis(Axis(0), 1), old.index_axis(Axis(0), 1), "an empty group");
        }
        // As segments of one K they are one chain.
        let mut d = old.index_axis(Axis(0), 0).to_owned();
        let mut chain = d.clone();
        let (a, b) = (a.operand(), b.operand());
        gemm_fp8_segmented_k(&a, &b, &sizes, d.view_mut(), form, &config).unwrap();
        for (g, (a, b)) in a_parts.iter().zip(&b_parts).enumerate() {
            let form = if g == 0 { form } else { Accumulate::Chain };
            let (a, b) = (a.operand(), b.operand());
            gemm_fp8_into(&a, &b, chain.view_mut(), form, &config).unwrap();
        }
        assert_eq!(bits(&d), bits(&chain), "{form:?}");
    }
}

#[test]
fn shapes_that_disagree_are_named() {
    let (a, b) = (tile(3, 256, 1), weights(5, 128, 2));
    let message = |r: Result<Array2<f32>, GemmError>| r.unwrap_err().to_string();
    let config = GemmConfig::default();
    assert_eq!(
        message(gemm_fp8(&a.operand(), &b.operand(), &config)),
        "a is (3, 256) and b is (5, 128): expected the same K (second dimension) in both"
    );
    let cut = Quantized { scales: a.scales.slice(s![.., ..1]).to_owned(), ..a.clone() };
    assert_eq!(
        message(gemm_fp8(&cut.operand(), &a.operand(), &config)),
        "a_scale is (3, 1): expected (3, 2), one scale for every 1 x 128 of a (3, 256)"
    );
    let mut d = Array2::zeros((2, 2));
    let error = gemm_fp8_into(&a.operand(), &a.operand(), d.view_mut(), Accumulate::Chain, &config);
    assert_eq!(error.unwrap_err().to_string(), "d is [2, 2]: expected [3, 3]");
}

#[test]
fn accumulators_are_checked() {
    let (a, b) = (tile(3, 64, 1), tile(3, 64, 2));
    let run = |accumulator| {
        let config = GemmConfig { accumulator, ..GemmConfig::default() };
        gemm_fp8(&a.operand(), &b.operand(), &config)
    };
    let hopper = Accumulator::HOPPER_FP8;
    let error = run(Accumulator { output: Output::F32 { fraction_bits: 24 }, ..hopper });
    assert_eq!(error.unwrap_err(), GemmError::OutputBits { found: 24 });
    let error = run(Accumulator { group: 0, ..hopper });
    assert_eq!(error.unwrap_err(), GemmError::Zero("accumulator.group"));
    let empty = Quantized { block: ScaleBlock { rows: 1, k: 0 }, ..a.clone() };
    let error = gemm_fp8(&a.operand(), &empty.operand(), &GemmConfig::default());
    assert_eq!(error.unwrap_err(), GemmError::Zero("k of a scale block"));
    // More bits than any sum has are the exact sum.
    let wide = Accumulator { fraction: Fraction::Bits(u32::MAX), ..Accumulator::EXACT };
    assert_eq!(bits(&run(wide).unwrap()), bits(&run(Accumulator::EXACT).unwrap()));
}

#[test]
fn empty_products_are_zero() {
    let config = GemmConfig::default();
    let d = gemm_fp8(&tile(3, 0, 1).operand(), &weights(4, 0, 2).operand(), &config).unwrap();
    assert_eq!(bits(&d), Array2::<u32>::zeros((3, 4)));
    assert_eq!(
        gemm_fp8(&tile(0, 5, 1).operand(), &weights(4, 5, 2).operand(), &config).unwrap().dim(),
        (0, 4)
    );
}

#[test]
fn threads_do_not_show() {
    let (a, b) = (tile(65, 384, 5), weights(70, 384, 6));
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| gemm_fp8(&a.operand(), &b.operand(), &GemmConfig::default()).unwrap())
    };
    assert_eq!(bits(&run(1)), bits(&run(3)));
    assert_eq!(cast_bf16(run(1).view()), run(2).map(|x| bf16::from_f32(*x)));
}
