//! Attention: masks, scales, heads and the online softmax.

use fathom_conformance::case_file::CaseFile;
use fathom_numerics::elementary::{exp, log};
use fathom_numerics::gemm::Accumulate;
use fathom_numerics::reduce::RowTree;
use fathom_reference::Tensor;
use fathom_reference::ops::attention::{Attention, Heads};
use ndarray::{Array2, ArrayView2, s};

use super::Fault;
use super::data::{Random, bf16_tensor, case_file, product_bf16, rounded};

pub const FAULTS: &[Fault] = &[
    Fault {
        name: "the causal mask starts at the top left where there are more keys than queries",
        seen: "Dao-AILab/flash-attention #282",
        plant: top_left,
        named: &["mask* top|left|align*|upper", "mask* offset|first quer*|key*"],
        place: None,
    },
    Fault {
        name: "KV blocks are counted from the first row of the query tile, not the last",
        seen: "ROCm/rocMLIR #2165",
        plant: blocks_of_the_first_row,
        named: &[
            "kv|key* block* last|left|skipped|missing|fewer|not|without",
            "mask*|kv|key* tile* first row*",
        ],
        place: None,
    },
    Fault {
        name: "the softmax scale is that of another width",
        seen: "ollama/ollama #13893",
        plant: other_scale,
        named: &["scale* 0.102*|0.125|other|another|different|wrong"],
        place: None,
    },
    Fault {
        name: "lse is a logarithm to base 2",
        seen: "sgl-project/sglang #33064",
        plant: base_two,
        named: &["lse|logarithm base 2|two", "lse|log log2|log2e"],
        place: None,
    },
    Fault {
        name: "query head h reads key head h mod kv_heads",
        seen: "ekzhang/jax-js #180",
        plant: heads_by_modulo,
        named: &["head* mod|modulo|tile*|interleav*|wrong|remainder"],
        place: None,
    },
    Fault {
        name: "the output is not rescaled where a later KV block raises the maximum",
        seen: "after Dao-AILab/flash-attention #2174",
        plant: not_rescaled,
        named: &["rescal*", "maximum|max not|stale|previous|old|without"],
        place: None,
    },
];

const HEADS: Heads = Heads { heads: 4, kv_heads: 2, qk: 64, v: 32 };
const BLOCK: usize = 32;

/// What a fault changes.
struct Kernel {
    /// How many keys query row i sees, given how many the contract lets it see.
    seen: fn(i: usize, contract: usize) -> usize,
    scale: f32,
    kv_head: fn(usize) -> usize,
    rescale: bool,
    lse_factor: f32,
}

const RIGHT: Kernel = Kernel {
    seen: |_, contract| contract,
    scale: 0.125,
    kv_head: |h| h / 2,
    rescale: true,
    lse_factor: 1.0,
};

impl Kernel {
    /// One head: `o` and `lse` of every query; queries are the last rows of the keys.
    fn head(
        &self,
        q: ArrayView2<'_, f32>,
        k: ArrayView2<'_, f32>,
        v: ArrayView2<'_, f32>,
    ) -> (Array2<f32>, Vec<f32>) {
        let (t, keys) = (q.nrows(), k.nrows());
        let mut o = Array2::zeros((t, v.ncols()));
        let (mut top, mut sum) = (vec![f32::NEG_INFINITY; t], vec![0.0f32; t]);
        for kv in (0..keys).step_by(BLOCK) {
            let own = s![kv..(kv + BLOCK).min(keys), ..];
            let mut p = Array2::zeros((t, (kv + BLOCK).min(keys) - kv));
            product_bf16(q, k.slice(own), &mut p, Accumulate::Overwrite);
            for i in 0..t {
                let seen = (self.seen)(i, keys - t + i + 1).saturating_sub(kv).min(p.ncols());
                let mut p = p.row_mut(i);
                p.slice_mut(s![seen..]).fill(0.0);
                if seen == 0 {
                    continue;
                }
                let p = &mut p.as_slice_mut().unwrap()[..seen];
                p.iter_mut().for_each(|s| *s *= self.scale);
                let new = p.iter().fold(top[i], |top, &s| top.max(s));
                p.iter_mut().for_each(|s| *s = exp(*s - new));
                let alpha = exp(top[i] - new);
                sum[i] = sum[i] * alpha + RowTree::new(16, 16).sum(p);
                top[i] = new;
                if self.rescale {
                    o.row_mut(i).mapv_inplace(|o: f32| o * alpha);
                }
            }
            product_bf16(p.view(), v.slice(own).t(), &mut o, Accumulate::Chain);
        }
        o.rows_mut().into_iter().zip(&sum).for_each(|(mut o, &sum)| o /= sum);
        let lse = (0..t).map(|i| (top[i] + log(sum[i])) * self.lse_factor).collect();
        (o, lse)
    }

    /// A case of `queries` rows that are the last of `keys`.
    fn file(&self, seed: u64, queries: usize, keys: usize) -> CaseFile {
        let Heads { heads, kv_heads, qk, v } = HEADS;
        let mut random = Random::new(seed);
        let mut draw = |rows, columns| {
            let of_column = random.magnitudes(columns);
            let x = Array2::from_shape_vec((rows, columns), random.normals(rows * columns));
            let mut x: Array2<f32> = x.unwrap();
            x.columns_mut().into_iter().zip(of_column).for_each(|(mut x, of)| x *= of);
            rounded(&x)
        };
        let qs = draw(queries, heads * qk);
        let (ks, vs) = (draw(keys, kv_heads * qk), draw(keys, kv_heads * v));
        let (mut o, mut lse) =
            (Array2::zeros((queries, heads * v)), Array2::zeros((queries, heads)));
        for h in 0..heads {
            let kv = (self.kv_head)(h);
            let (own, sums) = self.head(
                qs.slice(s![.., h * qk..(h + 1) * qk]),
                ks.slice(s![.., kv * qk..(kv + 1) * qk]),
                vs.slice(s![.., kv * v..(kv + 1) * v]),
            );
            o.slice_mut(s![.., h * v..(h + 1) * v]).assign(&own);
            lse.column_mut(h).assign(&ndarray::Array1::from(sums));
        }
        let op = Attention {
            shape: HEADS,
            scale: 0.125,
            segments: vec![queries],
            keys: vec![keys],
            block_kv: BLOCK,
        };
        let inputs = [("q", bf16_tensor(&qs)), ("k", bf16_tensor(&ks)), ("v", bf16_tensor(&vs))];
        let outputs = [("o", bf16_tensor(&o)), ("lse", Tensor::from_array(lse))];
        case_file(op, &inputs, &outputs)
    }
}

/// The contract's output, by this file's loops.
pub fn without_fault() -> CaseFile {
    RIGHT.file(940, 70, 110)
}

fn top_left() -> CaseFile {
    Kernel { seen: |i, _| i + 1, ..RIGHT }.file(141, 64, 128)
}

/// Query tiles of 64 rows: the KV blocks up to that of the tile's first row.
fn blocks_of_the_first_row() -> CaseFile {
    let seen = |i: usize, contract: usize| {
        let first = contract - i % 64;
        contract.min(first.next_multiple_of(BLOCK))
    };
    Kernel { seen, ..RIGHT }.file(142, 128, 128)
}

/// 1 / sqrt(64 + 32) for 1 / sqrt(64).
fn other_scale() -> CaseFile {
    Kernel { scale: 1.0 / 96f32.sqrt(), ..RIGHT }.file(143, 96, 96)
}

fn base_two() -> CaseFile {
    Kernel { lse_factor: std::f32::consts::LOG2_E, ..RIGHT }.file(144, 96, 96)
}

fn heads_by_modulo() -> CaseFile {
    Kernel { kv_head: |h| h % 2, ..RIGHT }.file(145, 96, 96)
}

fn not_rescaled() -> CaseFile {
    Kernel { rescale: false, ..RIGHT }.file(146, 96, 96)
}
