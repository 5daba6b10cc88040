//! `diagnose` on faults of FP8 GEMMs, planted by arithmetic written out here, without the code that
//! looks for them: what kernels of the field did wrong, what no hypothesis covers, and what must
//! give no lead. Other ops: `diagnose_ops.rs`.

mod planted;

use fathom_conformance::diagnose::{Diagnosis, page};
use fathom_numerics::formats::{E4M3, Overflow, Rounding, bf16, to_bf16};
use fathom_numerics::gemm::{self, Fp8Operand, GemmConfig, ScaleBlock};
use fathom_numerics::quant::{self, QuantConfig, Quantized};
use fathom_reference::Tensor;
use ndarray::{Array2, s};
use planted::{bf16s, codes, found, matrix, named, normal};
use serde_json::json;

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
    let words = "in K block 2, elements 320..=383 of K count 0.00 times";
    assert!(found.verdict.contains(words), "{}", found.verdict);
    assert!(found.verdict.contains("r / 16 % 4 = 1 only"), "{}", found.verdict);
    // Other elements in a block's place, in one tile.
    let found = with(&|i, k| if i >= 64 && k / 128 == 7 { a[[i, 1919 - k]] } else { a[[i, k]] });
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
fn data_of_other_stages_and_tiles_is_named() {
    let g = Gemm::new(160, 256, 640);
    let (a, b) = (&g.a.codes, &g.b.codes);
    // The tile of these rows and columns from other codes, all others as they should be.
    let tile = |a: &Array2<u8>, b: &Array2<u8>, rows: [usize; 2], columns: [usize; 2]| {
        let other = Gemm { partials: partials(a, b, 128), ..Gemm::new(g.m, g.n, g.k) };
        let (mut d, other) = (g.right(), other.right());
        let own = s![rows[0]..rows[1], columns[0]..columns[1]];
        d.slice_mut(own).assign(&other.slice(own));
        g.found(bf16s(&d))
    };
    let says = |found: Diagnosis, words: &str| {
        assert!(found.verdict.contains(words), "expected '{words}' in: {}", found.verdict);
    };
    let stage = |x: &Array2<u8>, from: usize, to: usize| {
        let in_stage = |k: usize| if k / 128 == to { k % 128 + from * 128 } else { k };
        Array2::from_shape_fn(x.dim(), |(i, k)| x[[i, in_stage(k)]])
    };
    says(
        tile(&stage(a, 0, 4), &stage(b, 0, 4), [0, 64], [128, 256]),
        "in K block 4 (elements 512..=639 of K) the data of A and B is stale, of block 0",
    );
    says(
        tile(a, &stage(b, 3, 2), [64, 128], [0, 128]),
        "in K block 2 (elements 256..=383 of K) the data of B is ahead, already of block 3",
    );
    // The first stage still holds the tile before: its columns' last K block.
    let before =
        |j: usize, k: usize| if k < 128 && j >= 128 { b[[j - 128, 512 + k]] } else { b[[j, k]] };
    let held = Array2::from_shape_fn(b.dim(), |(j, k)| before(j, k));
    says(
        tile(&stage(a, 4, 0), &held, [0, 160], [128, 256]),
        "the data of B is another tile's, 128 columns before, of its block 4",
    );
    let rows = Array2::from_shape_fn(a.dim(), |(i, k)| {
        if k / 128 == 1 && i >= 64 { a[[i - 64, k]] } else { a[[i, k]] }
    });
    says(
        tile(&rows, b, [64, 128], [0, 256]),
        "in K block 1 (elements 128..=255 of K) the data of A is another tile's, 64 rows before",
    );
    // A tile's accumulators from the tile of rows before.
    let mut d = g.right();
    let first = d.slice(s![..64, ..]).to_owned();
    let mut second = d.slice_mut(s![64..128, ..]);
    second += &first;
    says(g.found(bf16s(&d)), "the sum added is that of 64 rows before");
}

#[test]
fn scales_are_looked_up_among_all_rows() {
    let g = Gemm::new(96, 256, 640);
    // Rows of activations gathered, their scales not.
    let moved = |i: usize| (i * 5 + 3) % 96;
    let found = g.found(bf16s(&g.sums(&|i, j, b| (g.a.scales[[moved(i), b]], g.own(i, j, b).1))));
    assert!(found.verdict.contains("the a_scale used, row by row"), "{}", found.verdict);
    // Both scales of the tile that another order of launch would have.
    let tile = |i: usize, j: usize| (i / 32 + j / 128 + 1) % 3 * 32 + i % 32;
    let d = g.sums(&|i, j, b| (g.a.scales[[tile(i, j), b]], g.b.scales[[1 - j / 128, b]]));
    let found = g.found(bf16s(&d));
    assert!(found.verdict.contains("those of another place"), "{}", found.verdict);
    g.names(&|i, j, b| g.own(i & !8, j, b), "a_scale of row r for rows r and r + 8");
    g.names(
        &|i, j, b| g.own(i, j, if b == 1 { 2 } else { b }),
        "both scales of block 2 in block 1",
    );
    g.names(&|i, j, b| g.own(i, j, b % 3), "both scales of the K block modulo 3");
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
