//! Casts against their rule written out plainly, and the identities between their forms.

use fathom_numerics::formats::{E5M6, Format, Overflow, Rounding, bf16, packed};
use fathom_numerics::gemm::ScaleBlock;
use fathom_numerics::quant::delayed::{AmaxAlgorithm, DelayedScaling};
use fathom_numerics::quant::e5m6::quantize_tile_e5m6;
use fathom_numerics::quant::{
    QuantConfig, QuantError, ScaleKind, dequantize, next_power_of_two, quantize, quantize_block,
    quantize_tile, transpose_quantize,
};
use ndarray::{Array2, ArrayView2, s};
use proptest::prelude::*;

/// E4M3 with power-of-two scales and DeepSeek's floor.
const POW2: QuantConfig =
    QuantConfig { format: Format::E4M3, scale: ScaleKind::Pow2, amax_floor: 1e-4 };

/// The scale and codes of one block, by the rule's words; codes in order of `x`.
fn rule(x: &[f32], format: Format, config: &QuantConfig) -> (f32, Vec<u32>) {
    let finite_or_infinite = x.iter().filter(|x| !x.is_nan());
    let amax = finite_or_infinite.fold(0.0f32, |amax, x| amax.max(x.abs()));
    let mut scale = amax.max(config.amax_floor) / format.max();
    if config.scale == ScaleKind::Pow2 {
        let mut power = f64::from(f32::MIN_POSITIVE);
        while power < f64::from(scale) {
            power *= 2.0;
        }
        scale = power as f32; // 2^128 and infinity alike become infinity
    }
    let code =
        |x: &f32| format.layout().from_f32(x / scale, Rounding::NearestEven, Overflow::Saturate);
    (scale, x.iter().map(code).collect())
}

fn assert_is_the_rule(x: ArrayView2<'_, f32>, block: ScaleBlock, config: &QuantConfig) {
    let q = quantize(x, block, config).unwrap();
    let (rows, k) = x.dim();
    assert_eq!(q.scales.dim(), block.scales(rows, k));
    for ((i, j), scale) in q.scales.indexed_iter() {
        let range = |at: usize, extent: usize, end: usize| {
            at * extent.min(end)..(at + 1).saturating_mul(extent).min(end)
        };
        let (r, c) = (range(i, block.rows, rows), range(j, block.k, k));
        let part = x.slice(s![r.clone(), c.clone()]);
        let values: Vec<f32> = part.iter().copied().collect();
        let (want_scale, want) = rule(&values, config.format, config);
        assert_eq!(scale.to_bits(), want_scale.to_bits(), "scale [{i}, {j}]");
        let got: Vec<u32> = q.codes.slice(s![r, c]).iter().map(|&c| u32::from(c)).collect();
        assert_eq!(got, want, "block [{i}, {j}], scale {scale:e}");
    }
}

/// Values of many magnitudes, now and then zero, subnormal, infinite or NaN.
fn value() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => (-1f32..1.0, -30i32..30).prop_map(|(x, e)| x * 2f32.powi(e)),
        4 => -448f32..448.0,
        1 => prop_oneof![Just(0.0), Just(-0.0), any::<u32>().prop_map(f32::from_bits)],
    ]
}

fn matrix(rows: usize, k: usize) -> impl Strategy<Value = Array2<f32>> {
    proptest::collection::vec(value(), rows * k)
        .prop_map(move |x| Array2::from_shape_vec((rows, k), x).unwrap())
}

fn config() -> impl Strategy<Value = QuantConfig> {
    let format = prop_oneof![Just(Format::E4M3), Just(Format::E5M2)];
    let scale = prop_oneof![Just(ScaleKind::F32), Just(ScaleKind::Pow2)];
    (format, scale).prop_map(|(format, scale)| QuantConfig { format, scale, amax_floor: 1e-4 })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn tiles_and_blocks_are_the_rule(
        x in (1usize..40, 1usize..300).prop_flat_map(|(m, k)| matrix(m, k)),
        rows in prop_oneof![Just(1usize), 1usize..50, Just(128), Just(usize::MAX)],
        k in prop_oneof![Just(128usize), 1usize..300, Just(usize::MAX)],
        config in config(),
    ) {
        assert_is_the_rule(x.view(), ScaleBlock { rows, k }, &config);
    }

    #[test]
    fn transposed_forms_commute(
        x in matrix(140, 50),
        rows in prop_oneof![Just(1usize), 1usize..20],
        config in config(),
    ) {
        // Casting the transpose is transposing the cast with the block turned.
        let block = ScaleBlock { rows, k: 128 };
        let direct = transpose_quantize(x.view(), &[140], block, &config).unwrap();
        let turned = quantize(x.view(), ScaleBlock { rows: 128, k: rows }, &config).unwrap();
        prop_assert_eq!(&direct, &turned.transposed());
    }

    #[test]
    fn e5m6_is_the_rule(x in matrix(3, 139), config in config(), tile in 1usize..150) {
        let q = quantize_tile_e5m6(x.view(), tile, &config).unwrap();
        prop_assert_eq!(q.words.dim(), (3, 54));
        let codes = q.codes();
        for i in 0..3 {
            for (j, begin) in (0..139).step_by(tile).enumerate() {
                let part = x.slice(s![i, begin..(begin + tile).min(139)]).to_vec();
                let (scale, want) = rule(&part, Format::E5M6, &config);
                prop_assert_eq!(q.scales[[i, j]].to_bits(), scale.to_bits());
                let got = codes.slice(s![i, begin..begin + part.len()]);
                prop_assert_eq!(got.iter().map(|c| u32::from(c.0)).collect::<Vec<_>>(), want);
            }
        }
        // The tail of the last group of eight is zeros.
        let last = packed::unpack_e5m6(std::array::from_fn(|w| q.words[[0, 51 + w]]));
        prop_assert_eq!(&last[3..], &[E5M6(0); 5]);
    }

    #[test]
    fn mx_scales_are_the_powers_of_their_rule(x in matrix(2, 75)) {
        for format in [Format::E4M3, Format::E5M2] {
            let config = QuantConfig { format, scale: ScaleKind::Mx, ..QuantConfig::default() };
            let q = quantize_tile(x.view(), 32, &config).unwrap();
            for i in 0..2 {
                for (j, begin) in (0..75).step_by(32).enumerate() {
                    let part = x.slice(s![i, begin..(begin + 32).min(75)]).to_vec();
                    let numbers = part.iter().filter(|x| !x.is_nan());
                    let amax = numbers.fold(0.0f32, |amax, x| amax.max(x.abs()));
                    let scale = q.scales[[i, j]];
                    if amax.is_infinite() {
                        prop_assert_eq!(scale.to_bits(), 0x7FFF_FFFF);
                        continue;
                    }
                    let (scale, amax) = (f64::from(scale), f64::from(amax));
                    prop_assert!(scale.log2() == scale.log2().floor());
                    let emax = f64::from(format.max()).log2().floor().exp2();
                    let clamped = scale == 2f64.powi(-127);
                    prop_assert!(clamped || scale * emax <= amax);
                    prop_assert!(amax < 2.0 * scale * emax);
                    for (l, x) in part.iter().enumerate() {
                        let want = format.layout().from_f64(
                            f64::from(*x) / scale, Rounding::NearestEven, Overflow::Saturate);
                        prop_assert_eq!(u32::from(q.codes[[i, begin + l]]), want);
                    }
                }
            }
        }
    }
}

/// Scales of single magnitudes, worked out by hand: 448 is 2^8 and more, 57344 is 2^15 and more.
#[test]
fn mx_scales_at_the_edges() {
    let scale = |amax: f32, format| {
        let config = QuantConfig { format, scale: ScaleKind::Mx, ..QuantConfig::default() };
        quantize_tile(Array2::from_elem((1, 1), amax).view(), 32, &config).unwrap().scales[[0, 0]]
    };
    for (amax, e4m3, e5m2) in [
        (1.0, -8, -15),
        (448.0, 0, -7),
        (511.0, 0, -7),
        (512.0, 1, -6),
        (f32::MAX, 119, 112),
        (f32::MIN_POSITIVE, -127, -127),
        (f32::from_bits(1), -127, -127),
        (0.0, -127, -127),
    ] {
        assert_eq!(scale(amax, Format::E4M3), 2f32.powi(e4m3), "{amax:e}");
        assert_eq!(scale(amax, Format::E5M2), 2f32.powi(e5m2), "{amax:e}");
    }
}

#[test]
fn segments_start_their_blocks_anew() {
    let x = Array2::from_shape_fn((153, 9), |(i, k)| ((i * 9 + k) as f32).cos() * 7.0);
    let (segments, config) = ([20, 0, 130], POW2);
    let kept = dequantize(&quantize_tile(x.view(), 128, &config).unwrap());
    for (block, bands) in [(ScaleBlock { rows: 1, k: 128 }, 9), (ScaleBlock::BLOCK_128X128, 1)] {
        for x in [&x, &kept] {
            let cut = transpose_quantize(x.view(), &segments, block, &config).unwrap();
            assert_eq!((cut.codes.dim(), cut.scales.dim()), ((9, 150), (bands, 3)));
            for (rows, columns) in [(0..20, 0..1), (20..150, 1..3)] {
                let alone = quantize(x.slice(s![rows.clone(), ..]).t(), block, &config).unwrap();
                assert_eq!(cut.codes.slice(s![.., rows]), alone.codes);
                assert_eq!(cut.scales.slice(s![.., columns]), alone.scales);
            }
            let error = transpose_quantize(x.view(), &[20, 134], block, &config).unwrap_err();
            assert_eq!(error, QuantError::Segments { expected: 153, found: vec![20, 134] });
        }
    }
}

#[test]
fn what_is_not_finite() {
    let x = Array2::from_shape_vec(
        (2, 4),
        vec![f32::NAN, 1.0, -2.0, 0.0, f32::INFINITY, 1.0, -1.0, f32::NAN],
    )
    .unwrap();
    let q = quantize_tile(x.view(), 128, &QuantConfig::default()).unwrap();
    assert_eq!(q.scales[[0, 0]], 2.0 / 448.0, "a NaN does not enter amax");
    assert_eq!(q.codes.row(0).to_vec(), [0x7F, 0x76, 0xFE, 0x00]);
    assert_eq!(q.scales[[1, 0]], f32::INFINITY);
    assert_eq!(q.codes.row(1).to_vec(), [0x7F, 0x00, 0x80, 0x7F]);
    let values = dequantize(&q);
    assert!(values.iter().filter(|x| x.is_nan()).all(|x| x.to_bits() == 0x7FFF_FFFF));
}

#[test]
fn a_block_of_zeros_takes_the_floor() {
    let q = quantize_block(Array2::<f32>::zeros((130, 5)).view(), &QuantConfig::default()).unwrap();
    assert_eq!(q.scales.dim(), (2, 1));
    assert!(q.scales.iter().all(|s| s.to_bits() == (1e-4f32 / 448.0).to_bits()));
    assert!(q.codes.iter().all(|&c| c == 0));
    let refused =
        |config| quantize_block(Array2::<f32>::zeros((1, 1)).view(), &config).unwrap_err();
    let floor = QuantConfig { amax_floor: 0.0, ..QuantConfig::default() };
    assert_eq!(refused(floor), QuantError::AmaxFloor { found: 0.0 });
    let format = QuantConfig { format: Format::E5M6, ..QuantConfig::default() };
    assert_eq!(refused(format), QuantError::Format { found: Format::E5M6 });
}

#[test]
fn empty_matrices() {
    for dim in [(0, 5), (5, 0), (0, 0)] {
        let q =
            quantize_tile(Array2::<f32>::zeros(dim).view(), 128, &QuantConfig::default()).unwrap();
        assert_eq!((q.codes.dim(), q.scales.dim()), (dim, (dim.0, dim.1.div_ceil(128))));
        assert_eq!(dequantize(&q).dim(), dim);
    }
}

#[test]
fn powers_of_two_round_up() {
    for (x, want) in [(1.0, 1.0), (1.0000001, 2.0), (0.75, 1.0), (3e38, f32::INFINITY)] {
        assert_eq!(next_power_of_two(x), want);
    }
    let tiny = f32::from_bits;
    assert_eq!(next_power_of_two(tiny(5)), tiny(8));
    assert_eq!(next_power_of_two(tiny(0x0060_0000)), f32::MIN_POSITIVE);
}

#[test]
fn sources_and_strides_agree() {
    let x = Array2::from_shape_fn((37, 200), |(i, k)| {
        bf16::from_f32(((i * 31 + k * 7) % 97) as f32 / 13.0 - 3.0)
    });
    let config = POW2;
    let wide = x.map(|x| x.to_f32());
    let from_bf16 = quantize_tile(x.view(), 128, &config).unwrap();
    assert_eq!(from_bf16, quantize_tile(wide.view(), 128, &config).unwrap());
    let turned = x.t().as_standard_layout().into_owned();
    assert_eq!(from_bf16, quantize_tile(turned.t(), 128, &config).unwrap());
}

#[test]
fn threads_do_not_show() {
    let x = Array2::from_shape_fn((300, 257), |(i, k)| ((i * 257 + k) as f32).sin());
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let config = QuantConfig::default();
            let tile = quantize_tile(x.view(), 128, &config).unwrap();
            let (values, block) = (dequantize(&tile), ScaleBlock::TILE_1X128);
            let retiled = transpose_quantize(values.view(), &[100, 200], block, &config).unwrap();
            let whole = quantize(x.view(), ScaleBlock::PER_TENSOR, &config).unwrap();
            (tile, retiled, whole)
        })
    };
    assert_eq!(run(1), run(5));
}

#[test]
fn delayed_scaling_follows_the_history() {
    let scaling = DelayedScaling { format: Format::E4M3, margin: 0, algorithm: AmaxAlgorithm::Max };
    let (mut history, mut scale) = (vec![0.0; 3], 1.0);
    let mut step = |x: f32| {
        let x = Array2::from_elem((2, 3), -x);
        let (cast, amax) = scaling.quantize(x.view(), scale).unwrap();
        scale = scaling.next_scale(&mut history, amax, scale);
        (cast, scale, history.clone())
    };
    let (first, scale, _) = step(7.0);
    assert_eq!(first.scales[[0, 0]], 1.0, "the first step has no history");
    assert!(first.codes.iter().all(|&c| c == 0xCE));
    assert_eq!(scale, 64.0, "448 / 7");
    let (second, scale, _) = step(3.5);
    assert_eq!(second.scales[[0, 0]], 1.0 / 64.0);
    assert_eq!(dequantize(&second), Array2::from_elem((2, 3), -3.5));
    assert_eq!(scale, 64.0, "7 is still in the history");
    assert_eq!(step(3.5).2, [3.5, 3.5, 7.0]);
    assert_eq!(step(3.5).1, 128.0, "7 has left it");
    assert_eq!(step(f32::INFINITY).1, 128.0, "an infinite amax changes nothing");
    let algorithm = AmaxAlgorithm::MostRecent;
    let recent = DelayedScaling { margin: 1, algorithm, ..scaling };
    assert_eq!(recent.next_scale(&mut [9.0, 8.0], 7.0, 5.0), 32.0, "448 / 7 / 2");
    assert_eq!(recent.next_scale(&mut [9.0, 8.0], 0.0, 5.0), 5.0, "nor does zero");
    let next = recent.next_scale(&mut [0.0], 1e-38, 5.0);
    assert_eq!(next, f32::MAX, "an infinite scale is the largest number");
    let packed = DelayedScaling { format: Format::E5M6, ..scaling };
    let error = packed.quantize(Array2::from_elem((1, 1), 1.0f32).view(), 1.0).unwrap_err();
    assert_eq!(error, QuantError::Format { found: Format::E5M6 });
}
