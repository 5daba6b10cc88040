//! `diagnose` names the cause of planted deviations.
//!
//! Each deviation is planted without the code that looks for it: through the GEMM's own knobs,
//! through changed inputs, or by arithmetic written out here.

use std::collections::BTreeMap;

use fathom_conformance::case_file::{self, CaseFile};
use fathom_conformance::diagnose::{Diagnosis, diagnose, page};
use fathom_numerics::formats::{E4M3, Overflow, Rounding, bf16, to_bf16};
use fathom_numerics::gemm::{self, Fp8Operand, GemmConfig, Promote, ScaleBlock};
use fathom_numerics::mma::{Accumulator, Output};
use fathom_numerics::quant::{self, QuantConfig};
use fathom_reference::op::{ReferenceEngine, op_from};
use fathom_reference::{Case, Engine, Tensor};
use fathom_trace::DType;
use ndarray::{Array2, Axis, concatenate, s};
use serde_json::{Value, json};

const M: usize = 32;
const N: usize = 136;
const K: usize = 512;

/// Standard normal numbers (sum of twelve uniforms), reproducible.
fn normal(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..count).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
}

struct Gemm {
    a: quant::Quantized,
    b: quant::Quantized,
    params: Value,
}

impl Gemm {
    fn new() -> Gemm {
        let matrix = |m, seed| Array2::from_shape_vec((m, K), normal(m * K, seed)).unwrap();
        // Rows and K blocks of different magnitude, so that no two scales are alike.
        let uneven =
            Array2::from_shape_fn((M, K), |(i, k)| 1.0 + (i % 7) as f32 + (k / 128) as f32);
        let a = quant::quantize_tile((matrix(M, 1) * uneven).view(), 128, &QuantConfig::default());
        let b = quant::quantize_block(matrix(N, 2).view(), &QuantConfig::default());
        let params = json!({"arch": "sm_90", "m": M, "n": N, "k": K, "promotion_interval": 128,
            "a_tile": [1, 128], "b_block": [128, 128], "d": "f32"});
        Gemm { a: a.unwrap(), b: b.unwrap(), params }
    }

    /// One scale an operand, so that every promotion interval is defined.
    fn per_tensor() -> Gemm {
        let mut gemm = Gemm::new();
        let one = |q: &mut quant::Quantized| {
            q.block = ScaleBlock::PER_TENSOR;
            q.scales = Array2::from_elem((1, 1), 0.0123);
        };
        one(&mut gemm.a);
        one(&mut gemm.b);
        gemm.params["a_tile"] = json!([null, null]);
        gemm.params["b_block"] = json!([null, null]);
        gemm
    }

    fn with(&self, config: GemmConfig) -> Array2<f32> {
        gemm::gemm_fp8(&self.a.operand(), &self.b.operand(), &config).unwrap()
    }

    fn diagnose(&self, d: Tensor) -> Diagnosis {
        let fp8 =
            |q: &quant::Quantized| Tensor::from_array(q.codes.clone()).reinterpret(DType::F8E4M3);
        let inputs = BTreeMap::from([
            ("a".to_owned(), fp8(&self.a)),
            ("b".to_owned(), fp8(&self.b)),
            ("a_scale".to_owned(), Tensor::from_array(self.a.scales.clone())),
            ("b_scale".to_owned(), Tensor::from_array(self.b.scales.clone())),
        ]);
        let case = Case { op: op_from("gemm_fp8", &self.params).unwrap(), inputs };
        diagnosis(case, "d", d)
    }

    /// The planted output is explained, and by these words.
    fn names(&self, d: Array2<f32>, words: &str) {
        let found = self.diagnose(Tensor::from_array(d));
        assert!(found.explained, "{words}: {}", found.verdict);
        assert!(found.verdict.contains(words), "expected '{words}' in: {}", found.verdict);
        assert!(found.mismatches > 0, "the deviation must show: {words}");
    }
}

fn diagnosis(case: Case, role: &str, output: Tensor) -> Diagnosis {
    let expected = BTreeMap::from([(role.to_owned(), output)]);
    let file = CaseFile { case, expected, metadata: BTreeMap::new() };
    diagnose(&file, &|_| ()).unwrap()
}

fn with_accumulator(change: impl Fn(&mut Accumulator)) -> GemmConfig {
    let mut config = GemmConfig::default();
    change(&mut config.accumulator);
    config
}

#[test]
fn the_contract_is_recognised() {
    let gemm = Gemm::new();
    let found = gemm.diagnose(Tensor::from_array(gemm.with(GemmConfig::default())));
    assert_eq!(found.mismatches, 0);
    assert!(found.verdict.starts_with("all 4,352 elements agree with: the parameters as given"));
}

#[test]
fn accumulators_are_told_apart() {
    let gemm = Gemm::new();
    let e8m = |bits| Accumulator::tensor_core(32, bits, Output::F32 { fraction_bits: bits });
    for (accumulator, words) in [
        (e8m(14), "accumulator of 14 fraction bits"),
        (e8m(22), "accumulator of 22 fraction bits"),
        (Accumulator::BLACKWELL_FP8, "accumulator of 25 fraction bits"),
        (Accumulator::EXACT, "exact accumulator"),
        (Accumulator::FP32_FMA, "one fma a product"),
    ] {
        gemm.names(gemm.with(with_accumulator(|a| *a = accumulator)), words);
    }
    gemm.names(gemm.with(with_accumulator(|a| a.group = 16)), "groups of 16 products");
    let nearest = with_accumulator(|a| a.round = Rounding::NearestEven);
    gemm.names(gemm.with(nearest), "group results to nearest");
}

#[test]
fn promotion_is_recognised() {
    let gemm = Gemm::new();
    let interval = |i| GemmConfig { promotion_interval: i, ..GemmConfig::default() };
    gemm.names(gemm.with(interval(Some(64))), "promotion interval 64");
    gemm.names(gemm.with(interval(Some(32))), "promotion interval 32");
    let promote = |promote| GemmConfig { promote, ..GemmConfig::default() };
    gemm.names(gemm.with(promote(Promote::MulAdd)), "separate multiply and add");
    gemm.names(gemm.with(promote(Promote::ScalesInTurn)), "both scales in turn");

    let per_tensor = Gemm::per_tensor();
    per_tensor.names(per_tensor.with(interval(None)), "no promotion");
    per_tensor.names(per_tensor.with(interval(Some(256))), "promotion interval 256");
}

#[test]
fn two_deviations_at_once_are_found_as_a_pair() {
    let gemm = Gemm::new();
    let config = GemmConfig {
        promotion_interval: Some(64),
        promote: Promote::MulAdd,
        ..GemmConfig::default()
    };
    let found = gemm.diagnose(Tensor::from_array(gemm.with(config)));
    assert!(found.explained, "{}", found.verdict);
    assert_eq!(
        found.hypotheses[0].deviations,
        ["promotion interval 64", "promotion by separate multiply and add"]
    );
}

#[test]
fn scales_in_the_wrong_place_are_recognised() {
    let gemm = Gemm::new();
    let planted = |change: &dyn Fn(&mut Gemm)| {
        let mut wrong = Gemm::new();
        change(&mut wrong);
        wrong.with(GemmConfig::default())
    };
    let roll = |x: &Array2<f32>| {
        let last = x.slice(s![.., -1..]);
        concatenate(Axis(1), &[x.slice(s![.., 1..]), last]).unwrap()
    };
    gemm.names(planted(&|g| g.a.scales = roll(&g.a.scales)), "a_scale shifted to the next K block");
    gemm.names(planted(&|g| g.b.scales = roll(&g.b.scales)), "b_scale shifted to the next K block");
    let transposed = |x: &Array2<f32>| {
        // The memory of [rows, columns] read as if it were [columns, rows].
        let (rows, columns) = x.dim();
        let flat: Vec<f32> = x.iter().copied().collect();
        Array2::from_shape_fn((rows, columns), |(r, c)| flat[c * rows + r])
    };
    gemm.names(planted(&|g| g.a.scales = transposed(&g.a.scales)), "a_scale transposed");
    gemm.names(planted(&|g| g.b.scales = transposed(&g.b.scales)), "b_scale transposed");
    gemm.names(planted(&|g| g.b.scales.fill(1.0)), "b_scale ignored");
    let by_64 = planted(&|g| {
        let coarse = g.b.scales.clone();
        g.b.block = ScaleBlock { rows: 64, k: 128 };
        g.b.scales = Array2::from_shape_fn((3, 4), |(r, c)| coarse[[r.min(1), c]]);
    });
    gemm.names(by_64, "b_scale mapped to blocks of 64 rows");
}

/// The product of a range of K alone.
fn part(gemm: &Gemm, blocks: std::ops::Range<usize>) -> Array2<f32> {
    let k = blocks.start * 128..blocks.end * 128;
    let cut = |q: &quant::Quantized| quant::Quantized {
        codes: q.codes.slice(s![.., k.clone()]).to_owned(),
        scales: q.scales.slice(s![.., blocks.clone()]).to_owned(),
        ..q.clone()
    };
    gemm::gemm_fp8(&cut(&gemm.a).operand(), &cut(&gemm.b).operand(), &GemmConfig::default())
        .unwrap()
}

#[test]
fn the_order_of_k_is_recognised() {
    let gemm = Gemm::new();
    gemm.names(part(&gemm, 0..2) + part(&gemm, 2..4), "split-K by 2");
    // Blocks 3, 2, 1, 0: the same GEMM on reversed blocks.
    let mut reversed = Gemm::new();
    for q in [&mut reversed.a, &mut reversed.b] {
        let (codes, scales) = (q.codes.clone(), q.scales.clone());
        q.codes =
            Array2::from_shape_fn(codes.dim(), |(r, k)| codes[[r, (3 - k / 128) * 128 + k % 128]]);
        q.scales = Array2::from_shape_fn(scales.dim(), |(r, c)| scales[[r, 3 - c]]);
    }
    gemm.names(reversed.with(GemmConfig::default()), "K blocks descending");
    let mut missing = Gemm::new();
    missing.a.codes.slice_mut(s![.., 128..256]).fill(0);
    gemm.names(missing.with(GemmConfig::default()), "K block 1 missing");
}

#[test]
fn rounding_on_the_way_is_recognised() {
    let mut gemm = Gemm::new();
    let d = gemm.with(GemmConfig::default());
    gemm.names(d.mapv(|x| to_bf16(x).to_f32()), "output rounded to BF16 on the way");
    // The accumulator kept in BF16: a chain of one-block products.
    let mut acc = Array2::<f32>::zeros((M, N));
    for block in 0..4 {
        let k = block * 128..(block + 1) * 128;
        let codes = |q: &quant::Quantized| q.codes.slice(s![.., k.clone()]).to_owned();
        let scales = |q: &quant::Quantized| q.scales.slice(s![.., block..=block]).to_owned();
        let (ac, bc, asc, bsc) = (codes(&gemm.a), codes(&gemm.b), scales(&gemm.a), scales(&gemm.b));
        let a = Fp8Operand::tile_1x128(ac.view(), asc.view());
        let b = Fp8Operand::block_128x128(bc.view(), bsc.view());
        let chain = gemm::Accumulate::Chain;
        gemm::gemm_fp8_into(&a, &b, acc.view_mut(), chain, &GemmConfig::default()).unwrap();
        acc.mapv_inplace(|x| to_bf16(x).to_f32());
    }
    gemm.names(acc, "accumulator kept in BF16");

    // A BF16 output truncated instead of rounded.
    gemm.params["d"] = json!("bf16");
    let truncated = d.mapv(|x| bf16::from_bits((x.to_bits() >> 16) as u16));
    let found = gemm.diagnose(Tensor::from_array(truncated));
    assert!(
        found.explained && found.verdict.contains("output truncated to BF16"),
        "{}",
        found.verdict
    );
}

#[test]
fn another_format_is_recognised() {
    let gemm = Gemm::new();
    let mut wrong = Gemm::new();
    wrong.a.format = fathom_numerics::formats::Format::E5M2;
    // E5M2 has NaNs and infinities among these codes; they are part of the bits.
    gemm.names(wrong.with(GemmConfig::default()), "a read as e5m2 and b as e4m3");
}

fn quantised(params: &Value, x: &Array2<f32>, q: Tensor) -> Diagnosis {
    let inputs = BTreeMap::from([("x".to_owned(), Tensor::from_array(x.clone()))]);
    diagnosis(Case { op: op_from("quantize_tile", params).unwrap(), inputs }, "q", q)
}

#[test]
fn casts_are_recognised() {
    let (m, k) = (32, 384);
    let normals = Array2::from_shape_vec((m, k), normal(m * k, 3)).unwrap();
    // Quotients that are ties of E4M3, by scales that are no powers of two: there a reciprocal's
    // rounding shows.
    let ties = Array2::from_shape_fn((m, k), |(i, j)| {
        let scale = (513 + 2 * (3 * i + j / 128)) as f32 / 4096.0;
        scale * if j % 128 == 0 { 448.0 } else { (17 + 2 * (j % 8)) as f32 }
    });
    let params = json!({"format": "e4m3", "tile": 128, "scale": "f32", "amax_floor": 1e-4});
    let amax = |x: &Array2<f32>, row: usize, t: usize| {
        x.slice(s![row, t * 128..(t + 1) * 128]).iter().fold(0.0f32, |a, x| a.max(x.abs()))
    };
    let planted = |x: &Array2<f32>, code: &dyn Fn(f32, f32) -> E4M3| {
        let q = Array2::from_shape_fn((m, k), |(i, j)| code(x[[i, j]], amax(x, i, j / 128)).0);
        Tensor::from_array(q).reinterpret(DType::F8E4M3)
    };
    let rz = |x: f32| E4M3::from_f32(x, Rounding::TowardZero, Overflow::Saturate);
    let pow2 = |s: f32| f32::exp2(s.log2().ceil());
    type Cast<'a> = &'a dyn Fn(f32, f32) -> E4M3;
    let casts: [(&Array2<f32>, Cast<'_>, &str); 6] = [
        (&ties, &|x, amax| E4M3::saturating(x * (1.0 / (amax / 448.0))), "reciprocal"),
        (&ties, &|x, amax| E4M3::saturating(x * (448.0 / amax)), "max_of_format / amax"),
        (&normals, &|x, amax| rz(x / (amax / 448.0)), "the cast truncates"),
        (&normals, &|x, amax| E4M3::saturating(x / (amax / 240.0)), "largest value of 240"),
        (&normals, &|x, amax| E4M3::saturating(x / pow2(amax / 448.0)), "power-of-two scales"),
        (
            &normals,
            &|x, amax| E4M3::saturating(to_bf16(x).to_f32() / (to_bf16(amax).to_f32() / 448.0)),
            "x rounded to BF16 first",
        ),
    ];
    for (x, cast, words) in casts {
        let found = quantised(&params, x, planted(x, cast));
        assert!(found.mismatches > 0, "the deviation must show: {words}");
        assert!(found.explained, "{words}: {}", found.verdict);
        assert!(found.verdict.contains(words), "expected '{words}' in: {}", found.verdict);
    }
    let wide = quant::quantize_tile(normals.view(), 64, &QuantConfig::default()).unwrap();
    let found =
        quantised(&params, &normals, Tensor::from_array(wide.codes).reinterpret(DType::F8E4M3));
    assert!(found.explained && found.verdict.contains("amax over 1 x 64"), "{}", found.verdict);
}

#[test]
fn a_tensor_core_is_recognised() {
    let params = json!({"arch": "sm_90", "instr": "wgmma", "qualifier": "m64n8k32.f32.e4m3.e4m3",
        "m": 64, "n": 8, "k": 32, "a": "e4m3", "b": "e4m3", "d": "f32"});
    let codes =
        |n, seed| -> Vec<u8> { normal(n, seed).iter().map(|&x| E4M3::saturating(x).0).collect() };
    let fp8 = |shape: &[usize], seed| {
        let len = shape.iter().product();
        Tensor::from_vec(shape, codes(len, seed)).reinterpret(DType::F8E4M3)
    };
    let inputs = BTreeMap::from([
        ("a".to_owned(), fp8(&[64, 32], 4)),
        ("b".to_owned(), fp8(&[32, 8], 5)),
        ("c".to_owned(), Tensor::from_vec(&[64, 8], normal(512, 6))),
    ]);
    let ada = json!({"arch": "sm_100", "instr": "tcgen05.mma", "qualifier": "m64n8k32.f32.e4m3.e4m3",
        "m": 64, "n": 8, "k": 32, "a": "e4m3", "b": "e4m3", "d": "f32"});
    let case =
        |params: &Value| Case { op: op_from("mma", params).unwrap(), inputs: inputs.clone() };
    let d = ReferenceEngine.run(&case(&ada)).unwrap().remove("d").unwrap();
    let found = diagnosis(case(&params), "d", d);
    assert!(found.explained, "{}", found.verdict);
    assert!(found.verdict.contains("sm_100 tcgen05.mma"), "{}", found.verdict);
}

#[test]
fn what_nothing_explains_is_localised() {
    let gemm = Gemm::new();
    let mut d = gemm.with(GemmConfig::default());
    // Noise in one quad of lanes of rows 16..32: no arithmetic does that.
    for (n, value) in d.slice_mut(s![16..32, ..]).indexed_iter_mut() {
        if n.1 / 2 % 4 == 3 {
            *value += 1.0 + (n.0 * 31 + n.1) as f32 / 7.0;
        }
    }
    let found = gemm.diagnose(Tensor::from_array(d));
    assert!(!found.explained);
    let region = found.region.as_ref().unwrap();
    assert_eq!((region.rows, region.elements), ((16, 31), 16 * N / 4));
    let words = region.words();
    assert!(words.contains("quads of lanes, c / 2 % 4 = 3 only"), "{words}");
    let html = page("planted.safetensors", &found);
    assert!(html.contains("quads of lanes") && html.contains("<svg") && !html.contains("http"));
}

#[test]
fn a_cause_that_holds_in_a_region_is_named_for_it() {
    let gemm = Gemm::new();
    let good = gemm.with(GemmConfig::default());
    let bad = gemm.with(GemmConfig { promotion_interval: Some(64), ..GemmConfig::default() });
    let mixed = |(i, j): (usize, usize)| if i < 16 { bad[[i, j]] } else { good[[i, j]] };
    let found = gemm.diagnose(Tensor::from_array(Array2::from_shape_fn((M, N), mixed)));
    assert!(found.verdict.contains("promotion interval 64"), "{}", found.verdict);
    assert!(found.verdict.contains("the others with the parameters as given"), "{}", found.verdict);
}

/// Case files found by trying, with causes that their README states: each is named.
#[test]
fn causes_of_the_found_files_are_named() {
    let Some(folder) = fathom_trace::shared::need("found/diagnose") else { return };
    let causes = [
        ("1_group_size", "b_scale mapped to blocks of 112 rows"),
        ("2_zero_tile", "no floor of amax"),
        ("6_tail_scale", "last K block with a_scale of block 0"),
        ("7_tiny_amax", "no floor of amax"),
        ("01-interval256-last-scale", "promotion interval 256 with the last block's scales"),
        ("03d-a-converted-to-e5m2", "values of a converted to E5M2 first"),
        ("24-alpha2", "output times 2"),
        ("25-d-transposed-view", "output transposed"),
        ("27-all-zero", "all zero"),
    ];
    for (name, words) in causes {
        let file = case_file::read(&folder.join(format!("{name}.safetensors"))).unwrap();
        let found = diagnose(&file, &|_| ()).unwrap();
        assert!(found.explained, "{name}: {}", found.verdict);
        assert!(
            found.cause.as_ref().is_some_and(|c| c.name.contains(words)),
            "{name}: expected '{words}' in: {}",
            found.verdict
        );
    }
}
