//! `diagnose` on planted faults of casts, grouped and plain products, RMSNorm, SwiGLU, attention
//! and any output, each planted without the code that looks for it.

mod planted;

use std::collections::BTreeMap;

use fathom_numerics::formats::{E4M3, to_bf16, to_f16};
use fathom_numerics::gemm::{self, GemmConfig};
use fathom_numerics::quant::{self, QuantConfig, Quantized};
use fathom_reference::op::{ReferenceEngine, op_from};
use fathom_reference::{Case, Engine, Tensor};
use fathom_trace::DType;
use ndarray::{Array2, s};
use planted::{bf16s, codes, found, matrix, named, normal};
use serde_json::{Value, json};

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
