//! `diagnose` on faults planted by arithmetic written out here, without the code that looks for
//! them: what kernels of the field did wrong, what no hypothesis covers, and what must give no
//! lead.

use std::collections::BTreeMap;

use fathom_conformance::case_file::CaseFile;
use fathom_conformance::diagnose::{Diagnosis, diagnose, page};
use fathom_numerics::formats::{E4M3, Overflow, Rounding, bf16, to_bf16, to_f16};
use fathom_numerics::gemm::{self, Fp8Operand, GemmConfig, ScaleBlock};
use fathom_numerics::quant::{self, QuantConfig, Quantized};
use fathom_reference::ops::{ReferenceEngine, op_from};
use fathom_reference::{Case, Engine, Tensor};
use fathom_trace::DType;
use ndarray::{Array2, s};
use serde_json::{Value, json};

/// Standard normal numbers (sum of twelve uniforms), reproducible.
fn normal(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..count).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
}

fn matrix(m: usize, k: usize, seed: u64) -> Array2<f32> {
    Array2::from_shape_vec((m, k), normal(m * k, seed)).unwrap()
}

fn codes(q: &Quantized) -> Tensor {
    Tensor::from_array(q.codes.clone()).reinterpret(DType::F8E4M3)
}

fn bf16s(d: &Array2<f32>) -> Tensor {
    Tensor::from_array(d.mapv(to_bf16))
}

fn found(op: &str, params: &Value, inputs: &[(&str, Tensor)], out: &[(&str, Tensor)]) -> Diagnosis {
    let map = |all: &[(&str, Tensor)]| -> BTreeMap<String, Tensor> {
        all.iter().map(|(role, t)| ((*role).to_owned(), t.clone())).collect()
    };
    let case = Case { op: op_from(op, params).unwrap(), inputs: map(inputs) };
    let file = CaseFile { case, expected: map(out), metadata: BTreeMap::new() };
    let found = diagnose(&file, &|_| ()).unwrap();
    // The hypotheses' own arithmetic without a deviation is the contract's.
    let given = found.hypotheses.iter().find(|h| h.deviations.is_empty()).unwrap();
    if found.examined == found.elements {
        assert_eq!(given.agree, found.elements - found.mismatches, "{op}: {}", found.verdict);
    }
    found
}

/// The cause is named by these words, and all elements are explained.
fn named(found: &Diagnosis, words: &str) {
    assert!(found.mismatches > 0, "the fault must show: {words}");
    assert!(found.explained, "{words}: {}", found.verdict);
    assert!(found.verdict.contains(words), "expected '{words}' in: {}", found.verdict);
    assert!(found.cause.is_some(), "{}", found.verdict);
}

/// An FP8 GEMM with BF16 output, and its partial sums block by block.
struct Gemm {
    m: usize,
    n: usize,
    k: usize,
    a: Quantized,
    b: Quantized,
    partials: Vec<Array2<f32>>,
}

type Scales<'a> = &'a dyn Fn(usize, usize, usize) -> (f32, f32);

impl Gemm {
    fn new(m: usize, n: usize, k: usize) -> Gemm {
        // Rows and K blocks of different magnitude, so that no two scales are alike.
        let uneven = |(i, k): (usize, usize)| 1.0 + (i % 7) as f32 * 0.3 + (k / 128 % 5) as f32;
        let x = matrix(m, k, 1) * Array2::from_shape_fn((m, k), uneven);
        let w = matrix(n, k, 2)
            * Array2::from_shape_fn((n, k), |(j, k)| 0.02 * (1 + j / 128 + 2 * (k / 128)) as f32);
        let a = quant::quantize_tile(x.view(), 128, &QuantConfig::default()).unwrap();
        let b = quant::quantize_block(w.view(), &QuantConfig::default()).unwrap();
        let partials = partials(&a.codes, &b.codes, 128);
        Gemm { m, n, k, a, b, partials }
    }

    fn own(&self, i: usize, j: usize, b: usize) -> (f32, f32) {
        (self.a.scales[[i, b]], self.b.scales[[j / 128, b]])
    }

    /// The promoted sums, with these scales of (row, column, K block).
    fn sums(&self, scales: Scales<'_>) -> Array2<f32> {
        Array2::from_shape_fn((self.m, self.n), |(i, j)| {
            let partials = self.partials.iter().enumerate();
            partials.fold(0.0f32, |acc, (b, p)| {
                let (x, y) = scales(i, j, b);
                (x * y).mul_add(p[[i, j]], acc)
            })
        })
    }

    fn right(&self) -> Array2<f32> {
        self.sums(&|i, j, b| self.own(i, j, b))
    }

    fn found(&self, d: Tensor) -> Diagnosis {
        let params = json!({"arch": "sm_90", "m": self.m, "n": self.n, "k": self.k,
            "promotion_interval": 128, "a_tile": [1, 128], "b_block": [128, 128], "d": "bf16"});
        let inputs = [
            ("a", codes(&self.a)),
            ("a_scale", Tensor::from_array(self.a.scales.clone())),
            ("b", codes(&self.b)),
            ("b_scale", Tensor::from_array(self.b.scales.clone())),
        ];
        found("gemm_fp8", &params, &inputs, &[("d", d)])
    }

    fn names(&self, scales: Scales<'_>, words: &str) {
        named(&self.found(bf16s(&self.sums(scales))), words);
    }
}

/// Unscaled partial sums of each interval of K.
fn partials(a: &Array2<u8>, b: &Array2<u8>, interval: usize) -> Vec<Array2<f32>> {
    let k = a.ncols();
    let cut = |begin: usize| {
        let end = (begin + interval).min(k);
        let (a, b) = (a.slice(s![.., begin..end]), b.slice(s![.., begin..end]));
        let one = Array2::from_elem((1, 1), 1.0f32);
        let operand = |codes| Fp8Operand::e4m3(codes, one.view(), ScaleBlock::PER_TENSOR);
        let config = GemmConfig { promotion_interval: None, ..GemmConfig::default() };
        gemm::gemm_fp8(&operand(a), &operand(b), &config).unwrap()
    };
    (0..k).step_by(interval).map(cut).collect()
}

#[test]
fn the_contract_is_told_as_such() {
    let g = Gemm::new(96, 200, 600);
    let found = g.found(bf16s(&g.right()));
    assert_eq!((found.mismatches, found.cause), (0, None), "{}", found.verdict);
}

#[test]
fn scales_of_other_blocks_are_named() {
    let g = Gemm::new(64, 448, 520);
    let last = g.partials.len() - 1;
    g.names(
        &|i, j, b| (g.a.scales[[i, b]], g.b.scales[[j / 112, b]]),
        "b_scale mapped to blocks of 112 rows",
    );
    let tail = |b: usize| if b == last { 0 } else { b };
    g.names(
        &|i, j, b| (g.a.scales[[i, tail(b)]], g.own(i, j, b).1),
        "last K block with a_scale of block 0",
    );
    g.names(
        &|i, j, b| (g.own(i, j, b).0, g.b.scales[[j / 128, tail(b)]]),
        "last K block with b_scale of block 0",
    );
    g.names(
        &|i, j, b| (g.a.scales[[i, tail(b)]], g.b.scales[[j / 128, tail(b)]]),
        "last K block with both scales of block 0",
    );
    g.names(
        &|i, j, b| (g.a.scales[[i, 0]], g.own(i, j, b).1),
        "a_scale of the first K block everywhere",
    );
    g.names(
        &|i, j, b| (g.a.scales[[0, b]], g.own(i, j, b).1),
        "a_scale of the first row everywhere",
    );
    g.names(&|i, j, b| (g.a.scales[[0, 0]], g.own(i, j, b).1), "one a_scale for all");
    g.names(
        &|i, j, b| (g.a.scales[[i, b / 4 * 4]], g.own(i, j, b).1),
        "a_scale of the first of every 4 blocks",
    );
}

#[test]
fn promotion_over_several_blocks_is_named() {
    let g = Gemm::new(96, 200, 600);
    let wide = partials(&g.a.codes, &g.b.codes, 256);
    let planted = |block: &dyn Fn(usize) -> usize| {
        let sum = |(i, j)| {
            wide.iter().enumerate().fold(0.0f32, |acc, (t, p): (usize, &Array2<f32>)| {
                let (x, y) = g.own(i, j, block(t).min(4));
                (x * y).mul_add(p[[i, j]], acc)
            })
        };
        g.found(bf16s(&Array2::from_shape_fn((g.m, g.n), sum)))
    };
    named(&planted(&|t| 2 * t), "promotion interval 256 with the first block's scales");
    named(&planted(&|t| 2 * t + 1), "promotion interval 256 with the last block's scales");
    named(&planted(&|t| t), "promotion interval 256 with its number as the scales' index");
}

#[test]
fn scale_values_are_named() {
    let g = Gemm::new(96, 200, 600);
    let up = |s: f32| s.log2().ceil().exp2();
    let down = |s: f32| s.log2().floor().exp2();
    let near = |s: f32| s.log2().round().exp2();
    let bf16 = |s: f32| to_bf16(s).to_f32();
    type Value<'a> = &'a dyn Fn(f32) -> f32;
    let values: [(Value<'_>, &str); 4] = [
        (&up, "rounded up to a power of two"),
        (&down, "rounded down to a power of two"),
        (&near, "rounded to the nearest power of two"),
        (&bf16, "rounded to BF16"),
    ];
    for (value, words) in values {
        let both = |i, j, b| {
            let (x, y) = g.own(i, j, b);
            (value(x), value(y))
        };
        g.names(&both, &format!("both scales {words}"));
        let one = |i, j, b| (value(g.own(i, j, b).0), g.own(i, j, b).1);
        g.names(&one, &format!("a_scale {words}"));
    }
}

#[test]
fn converted_operands_and_parts_of_k_are_named() {
    let g = Gemm::new(96, 200, 600);
    let e5m2 = |codes: &Array2<u8>| {
        // To E5M2 and back: E4M3's exponents lie within E5M2's, so two fraction bits remain.
        let to = |c: &u8| {
            let x = E4M3(*c).to_f32();
            let y = fathom_numerics::formats::E5M2::from_f32(
                x,
                Rounding::NearestEven,
                Overflow::Saturate,
            );
            E4M3::from_f32(y.to_f32(), Rounding::NearestEven, Overflow::Saturate).0
        };
        codes.map(to)
    };
    let with = |a: &Array2<u8>, b: &Array2<u8>| {
        let other = Gemm { partials: partials(a, b, 128), ..Gemm::new(g.m, g.n, g.k) };
        g.found(bf16s(&other.right()))
    };
    named(&with(&e5m2(&g.a.codes), &g.b.codes), "values of a converted to E5M2 first");
    let mut cut = g.a.codes.clone();
    cut.slice_mut(s![.., 576..]).fill(0);
    named(&with(&cut, &g.b.codes), "the tail of K below a multiple of 32 dropped");
    let mut cut = g.a.codes.clone();
    cut.slice_mut(s![.., 592..]).fill(0);
    named(&with(&cut, &g.b.codes), "the tail of K below a multiple of 16 dropped");
    // The memory of b, [n, k], taken as [k, n].
    let flat: Vec<u8> = g.b.codes.iter().copied().collect();
    let transposed = Array2::from_shape_fn((g.n, g.k), |(j, k)| flat[k * g.n + j]);
    named(&with(&g.a.codes, &transposed), "b transposed in memory");

    let twice = Array2::from_shape_fn((g.m, g.n), |(i, j)| {
        [0, 1, 2, 2, 3, 4].iter().fold(0.0f32, |acc, &b| {
            let (x, y) = g.own(i, j, b);
            (x * y).mul_add(g.partials[b][[i, j]], acc)
        })
    });
    named(&g.found(bf16s(&twice)), "K block 2 counted twice");
}

#[test]
fn slips_of_the_main_loop_are_named() {
    let g = Gemm::new(96, 200, 640);
    let with = |a: &dyn Fn(usize, usize) -> u8| {
        let a = Array2::from_shape_fn((g.m, g.k), |(i, k)| a(i, k));
        let other = Gemm { partials: partials(&a, &g.b.codes, 128), ..Gemm::new(g.m, g.n, g.k) };
        g.found(bf16s(&other.right()))
    };
    let a = &g.a.codes;
    // 16-byte chunks of 128-byte rows, exchanged by the row's number modulo 8.
    let swizzled = |i: usize, k: usize| {
        let (chunk, byte) = (k % 128 / 16, k % 16);
        a[[i, k / 128 * 128 + (chunk ^ (i % 8)) * 16 + byte]]
    };
    named(&with(&swizzled), "a with a swizzle of 128 bytes");
    named(&with(&|i, k| a[[i, k / 128 * 128 + k % 32]]), "a read at the first 32 elements");
    named(&with(&|i, k| if k % 128 < 96 { 0 } else { a[[i, k]] }), "only elements 96 to 127");
    let stale = |i: usize, k: usize| a[[i, if k >= 256 { k - 256 } else { k }]];
    named(&with(&stale), "a read two blocks too early along K");

    // Sums of all K so far, from one chain of the tensor core that is never cleared.
    let so_far: Vec<Array2<f32>> = (1..=5)
        .map(|blocks| {
            let end = blocks * 128;
            let (a, b) = (a.slice(s![.., ..end]), g.b.codes.slice(s![.., ..end]));
            partials(&a.to_owned(), &b.to_owned(), end).remove(0)
        })
        .collect();
    let sums = Gemm { partials: so_far, ..Gemm::new(g.m, g.n, g.k) }.right();
    named(&g.found(bf16s(&sums)), "the tensor core's sum not cleared between intervals");

    let right = g.right();
    let shuffled = Array2::from_shape_fn(right.dim(), |(i, j)| right[[i, (7 * j + 3) % g.n]]);
    named(&g.found(bf16s(&shuffled)), "columns in another order");
}

#[test]
fn split_k_is_named() {
    let g = Gemm::new(96, 200, 1280);
    let part = |i: usize, j: usize, blocks: std::ops::Range<usize>| {
        blocks.fold(0.0f32, |acc, b| {
            let (x, y) = g.own(i, j, b);
            (x * y).mul_add(g.partials[b][[i, j]], acc)
        })
    };
    let round = |x: f32| to_bf16(x).to_f32();
    let planted = |f: &dyn Fn(usize, usize) -> f32| {
        g.found(bf16s(&Array2::from_shape_fn((g.m, g.n), |(i, j)| f(i, j))))
    };
    let in_bf16 = planted(&|i, j| {
        let parts = [0..4, 4..8, 8..10].map(|b| round(part(i, j, b)));
        round(round(parts[0] + parts[1]) + parts[2])
    });
    named(&in_bf16, "split-K by 3, parts added in BF16");
    let in_turn = planted(&|i, j| {
        let parts = [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 10]].map(|blocks| {
            let blocks = blocks.into_iter().filter(|b| *b < 10);
            round(blocks.fold(0.0, |acc, b| {
                let (x, y) = g.own(i, j, b);
                (x * y).mul_add(g.partials[b][[i, j]], acc)
            }))
        });
        round(round(parts[0] + parts[1]) + parts[2])
    });
    named(&in_turn, "split-K by 3, parts added in BF16 (K blocks dealt out in turn)");
    let workspace = planted(&|i, j| {
        let parts = [0..5, 5..10].map(|b| round(part(i, j, b)));
        parts[0] + parts[1]
    });
    named(&workspace, "split-K by 2, parts in BF16 added in FP32");
}

#[test]
fn epilogues_are_named() {
    let g = Gemm::new(96, 200, 600);
    let right = g.right();
    named(&g.found(bf16s(&right.mapv(|x| x * 0.5))), "output times 0.5");
    named(&g.found(bf16s(&right.mapv(|x| x * (1.0 / 448.0)))), "output times 0.0022321");
    named(&g.found(bf16s(&right.mapv(|x| x.max(0.0)))), "ReLU");
    let transposed: Vec<f32> = right.t().iter().copied().collect();
    let transposed = Array2::from_shape_vec((g.m, g.n), transposed).unwrap();
    named(&g.found(bf16s(&transposed)), "output transposed");
    named(&g.found(bf16s(&right.mapv(|_| 0.0))), "all zero");
    let bias = normal(g.n, 9);
    let biased = Array2::from_shape_fn(right.dim(), |(i, j)| right[[i, j]] + 5.0 + bias[j]);
    named(&g.found(bf16s(&biased)), "a value added to each column");
    named(&g.found(bf16s(&right.mapv(|x| x * 1.2345))), "output times one factor");
    let weights = Array2::from_shape_fn(right.dim(), |(i, j)| right[[i, j]] * (1.5 + i as f32));
    named(&g.found(bf16s(&weights)), "each row times a factor");
}

#[test]
fn what_padding_rows_hold_is_said() {
    let g = Gemm::new(96, 200, 600);
    let right = g.right().mapv(to_bf16);
    let with = |row: &dyn Fn(usize, usize) -> bf16| {
        let d = Array2::from_shape_fn(
            right.dim(),
            |(i, j)| {
                if i < 80 { right[[i, j]] } else { row(i, j) }
            },
        );
        g.found(Tensor::from_array(d))
    };
    for (found, words) in [
        (with(&|_, _| bf16::from_bits(0x7FC0)), "all NaN"),
        (with(&|_, _| bf16::from_bits(0)), "all zero"),
        (with(&|_, _| bf16::from_bits(0xCDCD)), "0xcdcd"),
        (with(&|i, j| right[[i - 80, j]]), "equal to rows 0..=15 of the output"),
    ] {
        assert!(found.verdict.contains(words), "{words}: {}", found.verdict);
        assert!(found.verdict.contains("rows 80..=95"), "{}", found.verdict);
    }
    // Rows of an earlier call, which stand nowhere in the file: the place is all that can be said.
    let earlier = matrix(16, 200, 77).mapv(to_bf16);
    let found = with(&|i, j| earlier[[i - 80, j]]);
    assert!(!found.explained && found.verdict.contains("rows 80..=95"), "{}", found.verdict);
    assert_eq!(found.cause, None, "{}", found.verdict);
}

#[test]
fn a_misread_format_that_gives_nan_is_named() {
    // Each row's largest code, 448, is a NaN of E5M2.
    let g = Gemm::new(96, 200, 600);
    let found = g.found(bf16s(&g.right().mapv(|_| f32::NAN)));
    assert!(found.explained, "{}", found.verdict);
    assert!(found.verdict.contains("a read as e5m2"), "{}", found.verdict);
    assert!(found.verdict.contains("all NaN"), "{}", found.verdict);
}

#[test]
fn unknown_faults_point_at_k_blocks() {
    let g = Gemm::new(96, 200, 1280);
    // A block of K weighs 1.37 times, in the last tile of rows alone.
    let weight = |i: usize, b: usize| if b == 6 && i >= 64 { 1.37 } else { 1.0 };
    let d = g.sums(&|i, j, b| (g.own(i, j, b).0 * weight(i, b), g.own(i, j, b).1));
    let found = g.found(bf16s(&d));
    let k = found.k_blocks.as_ref().expect(&found.verdict);
    assert_eq!(k.off, [6], "{}", found.verdict);
    assert!((k.coefficients[6] - 0.37).abs() < 0.01, "{}", found.verdict);
    let region = found.region.as_ref().unwrap();
    assert_eq!(region.rows, (64, 95));
    assert!(found.verdict.contains("K block 6 (elements 768..=895 of K)"), "{}", found.verdict);
    let html = page("planted.safetensors", &found);
    assert!(html.contains("weight of each K block") && html.contains("K block 6: 1.3"));

    // Half of a block missing in one warp's rows: which elements of K, and whose rows.
    let with = |a: &dyn Fn(usize, usize) -> u8| {
        let a = Array2::from_shape_fn((g.m, g.k), |(i, k)| a(i, k));
        let other = Gemm { partials: partials(&a, &g.b.codes, 128), ..Gemm::new(g.m, g.n, g.k) };
        g.found(bf16s(&other.right()))
    };
    let a = &g.a.codes;
    let cut = |i: usize, k: usize| i / 16 % 4 == 1 && (320..384).contains(&k);
    let found = with(&|i, k| if cut(i, k) { 0 } else { a[[i, k]] });
    let words =
        "elements 320..=351 of K count 0.00 times; elements 352..=383 of K count 0.00 times";
    assert!(found.verdict.contains(words), "{}", found.verdict);
    assert!(found.verdict.contains("r / 16 % 4 = 1 only"), "{}", found.verdict);
    // Another block's elements in a block's place, in one tile.
    let found = with(&|i, k| if i >= 64 && k / 128 == 7 { a[[i, k - 640]] } else { a[[i, k]] });
    let words = "K block 7 (elements 896..=1023 of K) does not enter, but something else";
    assert!(found.verdict.contains(words), "{}", found.verdict);
    assert_eq!(found.region.unwrap().rows, (64, 95));

    // Another block's scale, which differs from row to row.
    let from = |b: usize| if b == 4 { 7 } else { b };
    let d = g.sums(&|i, j, b| (g.a.scales[[i, from(b)]], g.own(i, j, b).1));
    let found = g.found(bf16s(&d));
    let words = "in K block 4 (elements 512..=639 of K) the a_scale used is that of K block 7";
    assert!(found.verdict.contains(words), "{}", found.verdict);
}

#[test]
fn what_is_no_arithmetic_gives_no_lead() {
    let g = Gemm::new(96, 200, 600);
    let right = g.right().mapv(to_bf16);
    let random = matrix(96, 200, 5).mapv(|x| to_bf16(x * 30.0));
    let found = g.found(Tensor::from_array(random));
    assert!(!found.explained && found.cause.is_none(), "{}", found.verdict);
    assert!(found.verdict.contains("is a lead") && found.verdict.contains("by chance"));
    for bit in [0, 6, 14] {
        let mut flipped = right.clone();
        flipped[[17, 33]] = bf16::from_bits(flipped[[17, 33]].to_bits() ^ (1 << bit));
        let found = g.found(Tensor::from_array(flipped));
        assert!(!found.explained && found.cause.is_none(), "bit {bit}: {}", found.verdict);
        assert!(found.verdict.contains("[17, 33]"), "{}", found.verdict);
        assert!(found.verdict.contains("by one bit"), "{}", found.verdict);
    }
    // One unit in the last place, up or down, in a third of the elements.
    let noise = normal(96 * 200, 8);
    let noisy = Array2::from_shape_fn(right.dim(), |(i, j)| {
        let n = noise[i * 200 + j];
        let by = if n > 1.0 {
            1
        } else if n < -1.0 {
            -1
        } else {
            0i16
        };
        bf16::from_bits(right[[i, j]].to_bits().wrapping_add_signed(by))
    });
    let found = g.found(Tensor::from_array(noisy));
    assert!(!found.explained && found.cause.is_none(), "{}", found.verdict);
}

#[test]
fn casts_are_named() {
    let (m, k) = (32, 456);
    let x = matrix(m, k, 3);
    let params = json!({"format": "e4m3", "tile": 128, "scale": "pow2", "amax_floor": 1e-4});
    let amax = |i: usize, begin: usize, end: usize| {
        x.slice(s![i, begin..end.min(k)]).iter().fold(0.0f32, |a, x| a.max(x.abs()))
    };
    type Scale<'a> = &'a dyn Fn(usize, usize) -> f32;
    let cast = |params: &Value, scale: Scale<'_>, used: Scale<'_>| {
        let q = Array2::from_shape_fn((m, k), |(i, j)| {
            E4M3::saturating(x[[i, j]] / used(i, j / 128)).0
        });
        let scales = Array2::from_shape_fn((m, 4), |(i, t)| scale(i, t));
        let q = Tensor::from_array(q).reinterpret(DType::F8E4M3);
        let outputs = [("q", q), ("scale", Tensor::from_array(scales))];
        found("quantize_tile", params, &[("x", Tensor::from_array(x.clone()))], &outputs)
    };
    let own = |i: usize, t: usize| amax(i, t * 128, t * 128 + 128) / 448.0;
    let up = |s: f32| s.log2().ceil().exp2();
    let down = |i: usize, t: usize| own(i, t).log2().floor().exp2();
    named(&cast(&params, &down, &down), "power-of-two scales, rounded down");
    let ocp = |i: usize, t: usize| (own(i, t) * 448.0).log2().floor().exp2() / 256.0;
    named(&cast(&params, &ocp, &ocp), "amax's exponent (OCP MX)");
    named(&cast(&params, &|i, t| up(own(i, t)), &own), "codes by the unrounded scale");
    let params = json!({"format": "e4m3", "tile": 128, "scale": "f32", "amax_floor": 1e-4});
    named(&cast(&params, &|i, t| 1.0 / own(i, t), &own), "the reciprocal of the scale stored");
    let largest = |i: usize, t: usize| amax(i, t * 128, t * 128 + 128);
    named(&cast(&params, &largest, &own), "amax stored for the scale");
    let before = |i: usize, t: usize| own(i, t.saturating_sub(1));
    named(&cast(&params, &own, &before), "codes by the scale of the tile before");
    let whole = |i: usize, _: usize| amax(i, 0, k) / 448.0;
    named(&cast(&params, &whole, &whole), "amax over 1 x all");
    // Four tiles of 114 columns, the dimension divided by their number.
    let by_114 = |i: usize, t: usize| amax(i, t * 114, t * 114 + 114) / 448.0;
    let q =
        Array2::from_shape_fn((m, k), |(i, j)| E4M3::saturating(x[[i, j]] / by_114(i, j / 114)).0);
    let scales = Array2::from_shape_fn((m, 4), |(i, t)| by_114(i, t));
    let outputs = [
        ("q", Tensor::from_array(q).reinterpret(DType::F8E4M3)),
        ("scale", Tensor::from_array(scales)),
    ];
    let x = [("x", Tensor::from_array(x.clone()))];
    named(&found("quantize_tile", &params, &x, &outputs), "amax over 1 x 114");
}

#[test]
fn experts_are_told_apart() {
    let counts = [40usize, 0, 57, 23];
    let (rows, n, k) = (136, 136, 384);
    let x = matrix(rows, k, 11);
    let a = quant::quantize_tile(x.view(), 128, &QuantConfig::default()).unwrap();
    let weights: Vec<Quantized> = (0..4)
        .map(|e| {
            let w = matrix(n, k, 20 + e) * (0.1 * (1 + e) as f32);
            quant::quantize_block(w.view(), &QuantConfig::default()).unwrap()
        })
        .collect();
    let products: Vec<Array2<f32>> = weights
        .iter()
        .map(|w| gemm::gemm_fp8(&a.operand(), &w.operand(), &GemmConfig::default()).unwrap())
        .collect();
    let stack = |of: &dyn Fn(&Quantized) -> Vec<u8>| weights.iter().flat_map(of).collect();
    let b: Vec<u8> = stack(&|w| w.codes.iter().copied().collect());
    let b_scale: Vec<f32> = weights.iter().flat_map(|w| w.scales.iter().copied()).collect();
    let inputs = [
        ("a", codes(&a)),
        ("a_scale", Tensor::from_array(a.scales.clone())),
        ("b", Tensor::from_vec(&[4, n, k], b).reinterpret(DType::F8E4M3)),
        ("b_scale", Tensor::from_vec(&[4, 2, 3], b_scale)),
    ];
    let params = json!({"counts": counts, "a_tile": [1, 128], "b_block": [128, 128],
        "promotion_interval": 128, "out": "BF16"});
    let planted = |expert: &dyn Fn(usize) -> Option<usize>, padding: f32| {
        let d = Array2::from_shape_fn((rows, n), |(i, j)| match expert(i) {
            Some(e) => products[e][[i, j]],
            None => padding,
        });
        found("grouped_gemm_fp8", &params, &inputs, &[("d", bf16s(&d))])
    };
    let own = |i: usize| match i {
        0..40 => Some(0),
        40..97 => Some(2),
        97..120 => Some(3),
        _ => None,
    };
    assert_eq!(planted(&own, 0.0).mismatches, 0);
    let next = |i| own(i).map(|e| (e + 1) % 4);
    named(&planted(&next, 0.0), "weights of the next expert");
    let late = |i: usize| own(i).and_then(|_| own(i.saturating_sub(1)));
    named(&planted(&late, 0.0), "groups begin 1 row too late");
    let early = |i: usize| own(i).map(|_| own(i + 1).unwrap_or(3));
    named(&planted(&early, 0.0), "groups begin 1 row too early");
    let found = planted(&own, f32::NAN);
    let words = "the 2,176 differing elements agree with: all NaN";
    assert!(found.verdict.contains(words), "{}", found.verdict);
    assert!(found.verdict.contains("rows 120..=135"), "{}", found.verdict);
    let owned = |i| own(i).or(Some(3));
    named(&planted(&owned, 0.0), "padding rows computed as the last expert's");
}

#[test]
fn plain_products_are_told_apart() {
    let (m, n, k) = (48, 40, 200);
    for (dtype, out) in [(DType::BF16, "BF16"), (DType::BF16, "F32"), (DType::F32, "F32")] {
        let input = |shape: &[usize], seed| {
            let x = matrix(shape[..shape.len() - 1].iter().product(), shape[shape.len() - 1], seed);
            let x = if dtype == DType::BF16 { bf16s(&x) } else { Tensor::from_array(x) };
            x.reshape(shape)
        };
        let run = |op: &str, params: &Value, inputs: &[(&str, Tensor)]| {
            let inputs = inputs.iter().map(|(r, t)| ((*r).to_owned(), t.clone())).collect();
            let case = Case { op: op_from(op, params).unwrap(), inputs };
            ReferenceEngine.run(&case).unwrap().remove("d").unwrap()
        };
        // The last 8 elements of K left out, where a tile of 32 does not fit.
        let cut = |x: &Tensor| {
            let width = x.bytes().len() / x.len();
            let mut bytes = x.bytes().to_vec();
            for row in bytes.chunks_mut(k * width) {
                row[192 * width..].fill(0);
            }
            Tensor::from_bytes(x.dtype(), x.shape(), &bytes)
        };
        let params = json!({"layout": "nt", "out": out});
        let inputs = [("a", input(&[m, k], 71)), ("b", input(&[n, k], 72))];
        let right = run("gemm", &params, &inputs);
        assert_eq!(found("gemm", &params, &inputs, &[("d", right)]).mismatches, 0);
        let wrong = run("gemm", &params, &[("a", cut(&inputs[0].1)), inputs[1].clone()]);
        let found_cut = found("gemm", &params, &inputs, &[("d", wrong)]);
        named(&found_cut, "the tail of K below a multiple of 16 dropped");

        let params = json!({"layout": "nn", "out": out, "counts": [20, 25]});
        let inputs = [("a", input(&[m, k], 73)), ("b", input(&[2, k, n], 74))];
        let shifted = json!({"layout": "nn", "out": out, "counts": [21, 24]});
        let wrong = run("grouped_gemm", &shifted, &inputs);
        let found_late = found("grouped_gemm", &params, &inputs, &[("d", wrong)]);
        named(&found_late, "groups begin 1 row too late");
    }
}

#[test]
fn tiles_across_blocks_of_scales_are_named() {
    let g = Gemm::new(64, 448, 520);
    g.names(
        &|i, j, b| (g.own(i, j, b).0, g.b.scales[[j / 112 * 112 / 128, b]]),
        "b_scale of the first of each tile of 112 rows",
    );
    // Two deviations at once: powers of two for scales, and parts of K in BF16.
    let down = |s: f32| s.log2().floor().exp2();
    let d = Array2::from_shape_fn((g.m, g.n), |(i, j)| {
        let parts = [0..3, 3..5].map(|blocks| {
            let sum = blocks.fold(0.0f32, |acc, b| {
                let (x, y) = g.own(i, j, b);
                (down(x) * down(y)).mul_add(g.partials[b][[i, j]], acc)
            });
            to_bf16(sum).to_f32()
        });
        parts[0] + parts[1]
    });
    let found = g.found(bf16s(&d));
    named(&found, "both scales rounded down to a power of two");
    named(&found, "split-K by 2");
}

/// Sum of sixteen chains, then halves: the tree of the contract, written out.
fn tree(terms: impl Iterator<Item = f32>) -> f32 {
    let mut lanes = [0.0f32; 16];
    terms.enumerate().for_each(|(i, x)| lanes[i % 16] += x);
    for half in [8, 4, 2, 1] {
        (0..half).for_each(|i| lanes[i] += lanes[i + half]);
    }
    lanes[0]
}

#[test]
fn norms_are_named() {
    let (t, w) = (24, 320);
    let x = matrix(t, w, 31).mapv(to_bf16);
    let weight: Vec<f32> = normal(w, 32).iter().map(|x| 1.0 + 0.1 * x).collect();
    let params = json!({"eps": 1e-3, "offset": 0, "width": w, "out": "BF16"});
    let planted = |root: &dyn Fn(f32) -> f32, y: &dyn Fn(f32, f32, f32) -> f32| {
        let y = Array2::from_shape_fn((t, w), |(i, j)| {
            let mean = tree(x.row(i).iter().map(|x| x.to_f32() * x.to_f32())) / w as f32;
            to_bf16(y(x[[i, j]].to_f32(), root(mean), weight[j]))
        });
        let inputs = [
            ("x", Tensor::from_array(x.clone())),
            ("weight", Tensor::from_vec(&[w], weight.clone())),
        ];
        found("rms_norm", &params, &inputs, &[("y", Tensor::from_array(y))])
    };
    let root = |mean: f32| 1.0 / (mean + 1e-3).sqrt();
    let given = planted(&root, &|x, r, w| (x * r) * w);
    assert_eq!(given.mismatches, 0, "{}", given.verdict);
    named(&planted(&|m| 1.0 / (m.sqrt() + 1e-3), &|x, r, w| (x * r) * w), "eps outside the root");
    named(&planted(&root, &|x, r, w| (x * r) * (1.0 + w)), "weight plus one");
    let between = |x: f32, r: f32, w: f32| to_bf16(x * r).to_f32() * w;
    named(&planted(&root, &between), "the cast before the weight");
    let padded = |m: f32| 1.0 / (m * w as f32 / 512.0 + 1e-3).sqrt();
    named(&planted(&padded, &|x, r, w| (x * r) * w), "sum divided by 512");
    named(&planted(&root, &|x, r, _| x * r), "weight ignored");
}

#[test]
fn swiglu_is_named() {
    let (rows, i) = (16, 96);
    let x = matrix(rows, 2 * i, 41) * 4.0;
    let params = json!({"out": "BF16"});
    let run = |x: &Array2<f32>, params: &Value| {
        let inputs = BTreeMap::from([("x".to_owned(), Tensor::from_array(x.clone()))]);
        let case = Case { op: op_from("swiglu", params).unwrap(), inputs };
        ReferenceEngine.run(&case).unwrap().remove("y").unwrap()
    };
    let planted =
        |y: Tensor| found("swiglu", &params, &[("x", Tensor::from_array(x.clone()))], &[("y", y)]);
    let moved = |from: &dyn Fn(usize) -> usize| {
        run(&Array2::from_shape_fn(x.dim(), |(r, c)| x[[r, from(c)]]), &params)
    };
    named(&planted(moved(&|c| (c + i) % (2 * i))), "gate and up exchanged");
    named(&planted(moved(&|c| if c < i { 2 * c } else { 2 * (c - i) + 1 })), "interleaved");
    let bound = |(r, c): (usize, usize)| {
        let x = x[[r, c]];
        if c < i { x.min(7.0) } else { x.clamp(-7.0, 7.0) }
    };
    let clamped = run(&Array2::from_shape_fn(x.dim(), bound), &params);
    named(&planted(clamped), "clamped at 7");
    // silu alone is SwiGLU with up = 1.
    let ones = Array2::from_shape_fn(x.dim(), |(r, c)| if c < i { x[[r, c]] } else { 1.0 });
    let silu = run(&ones, &json!({"out": "F32"}));
    let silu = silu.matrix::<f32>();
    let rounded = |round: &dyn Fn(f32) -> f32| {
        let y = |(r, c)| to_bf16(round(silu[[r, c]]) * x[[r, i + c]]);
        planted(Tensor::from_array(Array2::from_shape_fn((rows, i), y)))
    };
    named(&rounded(&|s| to_bf16(s).to_f32()), "silu rounded to BF16 before up");
    named(&rounded(&|s| to_f16(s).to_f32()), "silu rounded to FP16 before up");
}

#[test]
fn attention_is_named() {
    let (queries, keys) = (40, 72);
    let heads = json!({"heads": 4, "kv_heads": 2, "qk": 32, "v": 16});
    let params = |scale: f64, block_kv: usize| {
        json!({"shape": heads, "scale": scale, "segments": [queries], "keys": [keys],
            "block_kv": block_kv})
    };
    for dtype in [DType::BF16, DType::F32] {
        let input = |rows, columns, seed| {
            let x = matrix(rows, columns, seed);
            if dtype == DType::BF16 { bf16s(&x) } else { Tensor::from_array(x) }
        };
        let inputs = [
            ("q", input(queries, 128, 51)),
            ("k", input(keys, 64, 52)),
            ("v", input(keys, 32, 53)),
        ];
        let run = |params: &Value, inputs: &[(&str, Tensor)]| {
            let inputs = inputs.iter().map(|(r, t)| ((*r).to_owned(), t.clone())).collect();
            let case = Case { op: op_from("attention", params).unwrap(), inputs };
            ReferenceEngine.run(&case).unwrap()
        };
        let given = params(0.17, 32);
        let planted = |outputs: &BTreeMap<String, Tensor>| {
            let outputs = [("o", outputs["o"].clone()), ("lse", outputs["lse"].clone())];
            found("attention", &given, &inputs, &outputs)
        };
        let agrees = planted(&run(&given, &inputs));
        assert_eq!(agrees.mismatches, 0, "{}", agrees.verdict);
        named(&planted(&run(&params(1.0, 32), &inputs)), "softmax scale missing");
        named(&planted(&run(&params(0.17, 64), &inputs)), "KV blocks of 64 rows");
        // The first keys only, as many as queries: the mask aligned top-left.
        let first = |t: &Tensor| {
            let bytes = t.bytes().len() / keys * queries;
            Tensor::from_bytes(t.dtype(), &[queries, t.shape()[1]], &t.bytes()[..bytes])
        };
        let short = [inputs[0].clone(), ("k", first(&inputs[1].1)), ("v", first(&inputs[2].1))];
        let alone = json!({"shape": heads, "scale": 0.17, "segments": [queries], "block_kv": 32});
        named(&planted(&run(&alone, &short)), "causal mask aligned top-left");
    }
}

#[test]
fn any_op_has_hypotheses_about_its_output() {
    let x = matrix(48, 32, 61);
    let inputs = [("a", Tensor::from_array(x.clone())), ("b", Tensor::from_array(x.clone()))];
    let shifted =
        Array2::from_shape_fn(x.dim(), |(i, j)| if i == 0 { 0.0 } else { 2.0 * x[[i - 1, j]] });
    let output = [("y", Tensor::from_array(shifted))];
    let found = found("add", &json!({"out": "F32"}), &inputs, &output);
    named(&found, "rows one too late");
}
