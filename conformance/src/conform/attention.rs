//! Cases of the attention ops: packed segments, more keys than queries, grouped heads, widths of
//! heads that are no multiple of anything, and values that 0 times them is not 0.

use fathom_reference::Tensor;
use fathom_reference::op::Op;
use fathom_reference::ops::attention::{Attention, AttentionBackward, Heads};
use fathom_reference::ops::attention_cached::AttentionCached;
use fathom_reference::ops::attention_latent::AttentionLatent;
use fathom_trace::DType;
use proptest::collection::vec;
use proptest::prelude::{any, prop_oneof};
use proptest::sample::select;
use proptest::strategy::{BoxedStrategy, Just, Strategy};

use super::draw::{Draw, float, size};
use super::values::Values;
use super::{Drawn, Suite};

/// The suites of this file.
pub const SUITES: &[Suite] = &[
    Suite { op: "attention", strategy: attention },
    Suite { op: "attention_backward", strategy: attention_backward },
    Suite { op: "attention_cached", strategy: attention_cached },
    Suite { op: "attention_latent", strategy: attention_latent },
];

/// Rows of a block of keys, the recipe's.
const BLOCK_KV: usize = 64;

/// Key heads with up to three queries each, and columns of a head: any, or those of models; in two
/// cases of finite values wider than what a CTA computes of a gradient.
fn heads(index: usize) -> impl Strategy<Value = Heads> {
    let models = select(vec![(64, 64), (192, 128), (128, 128), (24, 16)]);
    let columns = match index % 24 {
        8 => Just((200, 72)).boxed(),
        20 => Just((72, 200)).boxed(),
        _ => prop_oneof![1 => (1usize..=80, 1usize..=80), 2 => models].boxed(),
    };
    (1usize..=2, 1usize..=3, columns).prop_map(|(kv_heads, group, (qk, v))| Heads {
        heads: kv_heads * group,
        kv_heads,
        qk,
        v,
    })
}

/// Queries of each segment, with the keys in front of them: some more blocks than a ring has
/// stages, and some in every segment of the cases with infinities.
fn segments(index: usize) -> BoxedStrategy<Vec<[usize; 2]>> {
    let few = || size(1, 130).boxed();
    let (before, least) = match has_infinities(index) {
        true => (few(), 1),
        false => (prop_oneof![4 => Just(0), 1 => few(), 1 => size(260, 330)].boxed(), 0),
    };
    let segment = (size(least, 140), before).prop_map(|(queries, before)| [queries, before]);
    vec(segment, 1 + least..=3).boxed()
}

/// An attention with its queries and keys; those with infinities in F32 and BF16 in turns, those
/// with wide heads in BF16.
fn drawn(index: usize) -> impl Strategy<Value = (Attention, DType, u64)> {
    let dtype = match index % 24 {
        6 => Just(DType::F32).boxed(),
        0 | 8 | 12 | 18 | 20 => Just(DType::BF16).boxed(),
        _ => float().boxed(),
    };
    (heads(index), segments(index), dtype, any::<u64>()).prop_map(
        |(shape, segments, dtype, seed)| {
            let packed = segments.iter().all(|&[_, before]| before == 0);
            let keys = if packed { vec![] } else { segments.iter().map(|[q, b]| q + b).collect() };
            let segments = segments.into_iter().map(|[queries, _]| queries).collect();
            let scale = (shape.qk as f64).powf(-0.5);
            (Attention { shape, scale, segments, keys, block_kv: BLOCK_KV }, dtype, seed)
        },
    )
}

/// Keys or values: in rounds of ordinary ones with infinities in the last row of each segment,
/// which only its last query sees, or the first of the last segment, which none of those before
/// sees.
fn with_hidden(draw: Draw, stream: u64, dtype: DType, columns: usize, op: &Attention) -> Tensor {
    let lengths = key_rows(op);
    let mut rows: Vec<usize> = ends(lengths).map(|end| end - 1).collect();
    if let [.., before, last] = &mut rows[..] {
        *last = *before + 1;
    }
    let shape = [lengths.iter().sum(), columns];
    draw.infinite_at(stream, dtype, &shape, in_columns(rows, columns))
}

/// A place in each of these rows, each in a column of its own where there are as many: a segment's
/// own infinity leaves NaNs that would hide what another's does.
fn in_columns(
    rows: impl IntoIterator<Item = usize>,
    columns: usize,
) -> impl Iterator<Item = usize> {
    let place = move |(i, row): (usize, usize)| row * columns + i.min(columns - 1);
    rows.into_iter().enumerate().map(place)
}

/// Whether a case is of ordinary values with infinities.
fn has_infinities(index: usize) -> bool {
    index.is_multiple_of(6)
}

/// Gradients of outputs: in one round of ordinary ones with an infinity in the first row of each
/// segment, which keys behind its block of queries must not see.
fn output_gradients(index: usize, draw: Draw, dtype: DType, op: &Attention) -> Tensor {
    let columns = op.shape.heads * op.shape.v;
    let shape = [op.segments.iter().sum(), columns];
    match index % 12 {
        6 => {
            let starts = ends(&op.segments).zip(op.segments.iter().filter(|length| **length > 0));
            let starts = starts.map(|(end, length)| end - length);
            draw.infinite_at(3, dtype, &shape, in_columns(starts, columns))
        }
        _ => draw.floats(3, dtype, &shape),
    }
}

/// Where the segments that have rows end.
fn ends(lengths: &[usize]) -> impl Iterator<Item = usize> {
    let sums = lengths.iter().scan(0, |end, &length| {
        *end += length;
        Some((*end, length))
    });
    sums.filter(|(_, length)| *length > 0).map(|(end, _)| end)
}

/// Rows of keys of each segment.
fn key_rows(op: &Attention) -> &[usize] {
    if op.keys.is_empty() { &op.segments } else { &op.keys }
}

/// Rows of queries and of keys.
fn rows(op: &Attention) -> [usize; 2] {
    [op.segments.iter().sum(), key_rows(op).iter().sum()]
}

fn attention(index: usize) -> BoxedStrategy<Drawn> {
    drawn(index)
        .prop_map(move |(op, dtype, seed)| {
            let (draw, [t, s]) = (Draw::new(index, seed), rows(&op));
            let Heads { heads, kv_heads, qk, v } = op.shape;
            if index % 12 == 10 {
                return faint(draw, op);
            }
            let values = match has_infinities(index) {
                true => with_hidden(draw, 2, dtype, kv_heads * v, &op),
                false => draw.floats(2, dtype, &[s, kv_heads * v]),
            };
            draw.case(
                op,
                [
                    ("q", Some(draw.floats(0, dtype, &[t, heads * qk]))),
                    ("k", Some(draw.floats(1, dtype, &[s, kv_heads * qk]))),
                    ("v", Some(values)),
                ],
            )
        })
        .boxed()
}

/// Two of three keys have scores 88 to 101 below the others', whose probabilities are subnormal
/// beside theirs, and values so large that they count all the same.
fn faint(draw: Draw, op: Attention) -> Drawn {
    let ([t, s], Heads { heads, kv_heads, qk, v }) = (rows(&op), op.shape);
    let numbers = Draw { values: Values::Normal, ..draw };
    let (mut keys, mut values) =
        (vec![0.0; s * kv_heads * qk], numbers.floats(2, DType::F32, &[s, kv_heads * v]));
    let words = draw.words(20, s);
    for (key, word) in words.iter().enumerate().filter(|(_, word)| *word % 3 > 0) {
        let score = -88.0 - (word >> 8) as f64 % 14.0;
        keys[key * kv_heads * qk..][..kv_heads * qk].fill((score / (qk as f64 * op.scale)) as f32);
        let row = &mut values.as_mut_slice::<f32>()[key * kv_heads * v..][..kv_heads * v];
        row.iter_mut().for_each(|x| *x *= 5e37);
    }
    let queries = Tensor::from_vec(&[t, heads * qk], vec![1.0f32; t * heads * qk]);
    let keys = Tensor::from_vec(&[s, kv_heads * qk], keys);
    draw.case(op, [("q", Some(queries)), ("k", Some(keys)), ("v", Some(values))])
}

/// The output and sums are those of the forward, so that probabilities are such.
fn attention_backward(index: usize) -> BoxedStrategy<Drawn> {
    drawn(index)
        .prop_map(move |(op, dtype, seed)| {
            let (draw, [t, s]) = (Draw::new(index, seed), rows(&op));
            let Heads { heads, kv_heads, qk, v } = op.shape;
            let queries = draw.floats(0, dtype, &[t, heads * qk]);
            let keys = match index % 12 {
                0 => with_hidden(draw, 1, dtype, kv_heads * qk, &op),
                _ => draw.floats(1, dtype, &[s, kv_heads * qk]),
            };
            let values = draw.floats(2, dtype, &[s, kv_heads * v]);
            let inputs = [&queries, &keys, &values].map(|x| Some(x.clone())).to_vec();
            let forward = Op::run(&op, inputs).expect("the shapes fit");
            let d_o = output_gradients(index, draw, dtype, &op);
            let Attention { shape, scale, segments, keys: key_rows, block_kv } = op;
            draw.case(
                AttentionBackward { shape, scale, segments, keys: key_rows, block_kv },
                [
                    ("q", Some(queries)),
                    ("k", Some(keys)),
                    ("v", Some(values)),
                    ("o", Some(forward[0].clone())),
                    ("lse", Some(forward[1].clone())),
                    ("do", Some(d_o)),
                ],
            )
        })
        .boxed()
}

fn attention_cached(index: usize) -> BoxedStrategy<Drawn> {
    let queries = prop_oneof![2 => 1usize..=4, 1 => size(0, 140)];
    (heads(index), queries, size(0, 300), float(), any::<u64>())
        .prop_map(move |(shape, t, before, dtype, seed)| {
            let (draw, s) = (Draw::new(index, seed), t + before);
            let Heads { heads, kv_heads, qk, v } = shape;
            let scale = (qk as f64).powf(-0.5);
            draw.case(
                AttentionCached { shape, scale, block_kv: BLOCK_KV },
                [
                    ("q", Some(draw.floats(0, dtype, &[t, heads * qk]))),
                    ("cache", Some(draw.floats(1, dtype, &[s, kv_heads * (qk + v)]))),
                ],
            )
        })
        .boxed()
}

fn attention_latent(index: usize) -> BoxedStrategy<Drawn> {
    let queries = prop_oneof![2 => 1usize..=4, 1 => size(0, 140)];
    let columns = prop_oneof![
        1 => (1usize..=150, 0usize..=40),
        2 => select(vec![(128, 16), (512, 64)]),
    ];
    (1usize..=3, columns, queries, size(0, 300), float(), any::<u64>())
        .prop_map(move |(heads, (rank, rope), t, before, dtype, seed)| {
            let (draw, s) = (Draw::new(index, seed), t + before);
            let width = rank + rope;
            let scale = (width as f64).powf(-0.5);
            draw.case(
                AttentionLatent { heads, rank, scale, block_kv: BLOCK_KV },
                [
                    ("q", Some(draw.floats(0, dtype, &[t, heads * width]))),
                    ("cache", Some(draw.floats(1, dtype, &[s, width]))),
                ],
            )
        })
        .boxed()
}
