//! Cases of what attention's heads are made of: rotation, keys and values of latent attention, the
//! absorbed projections.

use fathom_reference::Tensor;
use fathom_reference::ops::mla_absorb::{MlaAbsorbQuery, MlaAbsorbValue};
use fathom_reference::ops::mla_kv::{MlaKv, MlaKvBackward};
use fathom_reference::ops::rope::Rope;
use fathom_trace::DType;
use proptest::prelude::any;
use proptest::strategy::{BoxedStrategy, Strategy};

use super::draw::{Draw, columns, float, rows, size};
use super::{Drawn, Suite};

/// The suites of this file.
pub const SUITES: &[Suite] = &[
    Suite { op: "mla_absorb_query", strategy: mla_absorb_query },
    Suite { op: "mla_absorb_value", strategy: mla_absorb_value },
    Suite { op: "mla_kv", strategy: mla_kv },
    Suite { op: "mla_kv_backward", strategy: mla_kv_backward },
    Suite { op: "rope", strategy: rope },
];

/// Cosines, sines and positions for `t` tokens and `rotated` columns.
fn tables(draw: Draw, t: usize, rotated: usize, length: usize) -> [(&'static str, Tensor); 3] {
    [
        ("cos", draw.floats(10, DType::F32, &[length, rotated / 2])),
        ("sin", draw.floats(11, DType::F32, &[length, rotated / 2])),
        ("positions", draw.indices(12, &[t], length)),
    ]
}

fn with_tables(
    inputs: [(&'static str, Tensor); 2],
    tables: [(&'static str, Tensor); 3],
) -> Vec<(&'static str, Option<Tensor>)> {
    inputs.into_iter().chain(tables).map(|(role, tensor)| (role, Some(tensor))).collect()
}

/// The case with so many tokens that a CTA has all of one, and so many heads that it has to come
/// back for more of them.
const MANY: usize = 6;
const MANY_TOKENS: usize = 270;
const MANY_HEADS: usize = 12;
/// Columns of a head, at least, of that case.
const MANY_COLUMNS: usize = 24;

fn rope(index: usize) -> BoxedStrategy<Drawn> {
    let head = (size(0, 20), columns(index, 0, 64), 1usize..=5);
    (rows(index, 0, 40), head, size(1, 30), float(), any::<([bool; 2], u64)>())
        .prop_map(move |(t, (start, rotated, heads), length, dtype, (flags, seed))| {
            let draw = Draw::new(index, seed);
            let (t, start, heads) = match index {
                MANY => (t + MANY_TOKENS, start + MANY_COLUMNS, MANY_HEADS),
                _ => (t, start, heads),
            };
            let head_dim = (start + rotated).max(1);
            let [interleaved, inverse] = flags;
            let op = Rope { head_dim, start: start.min(head_dim), interleaved, inverse };
            let x = draw.floats(0, dtype, &[t, heads * head_dim]);
            let [cos, sin, positions] = tables(draw, t, head_dim - op.start, length);
            let inputs = [("x", x), cos, sin, positions];
            draw.case(op, inputs.map(|(role, tensor)| (role, Some(tensor))))
        })
        .boxed()
}

fn mla_kv(index: usize) -> BoxedStrategy<Drawn> {
    let head = (1usize..=4, columns(index, 0, 40), size(0, 34), columns(index, 1, 40));
    (
        rows(index, 0, 30),
        head,
        [size(0, 20), size(0, 9), size(1, 30)],
        float(),
        any::<(bool, u64)>(),
    )
        .prop_map(move |(t, (heads, nope, rope, v), sizes, dtype, (interleaved, seed))| {
            let [offset, behind, length] = sizes;
            let draw = Draw::new(index, seed);
            let (t, heads, rope) = match index {
                MANY => (t + MANY_TOKENS, MANY_HEADS, rope + MANY_COLUMNS),
                _ => (t, heads, rope),
            };
            let kv = draw.floats(0, dtype, &[t, heads * (nope + v)]);
            let latent = draw.floats(1, dtype, &[t, offset + rope + behind]);
            let op = MlaKv { heads, nope, rope, v, offset, interleaved };
            let tables = tables(draw, t, rope, length);
            draw.case(op, with_tables([("kv", kv), ("latent", latent)], tables))
        })
        .boxed()
}

fn mla_kv_backward(index: usize) -> BoxedStrategy<Drawn> {
    let head = (1usize..=6, columns(index, 0, 40), size(1, 34), columns(index, 0, 40));
    (rows(index, 0, 30), head, size(1, 30), float(), any::<(bool, u64)>())
        .prop_map(move |(t, (heads, nope, rope, v), length, dtype, (interleaved, seed))| {
            let draw = Draw::new(index, seed);
            let dk = draw.floats(0, dtype, &[t, heads * (nope + rope)]);
            let dv = draw.floats(1, dtype, &[t, heads * v]);
            let op = MlaKvBackward { heads, nope, rope, v, interleaved };
            let tables = tables(draw, t, rope, length);
            draw.case(op, with_tables([("dk", dk), ("dv", dv)], tables))
        })
        .boxed()
}

fn mla_absorb_query(index: usize) -> BoxedStrategy<Drawn> {
    let head = (1usize..=3, size(0, 33), size(0, 17), size(0, 17), size(0, 40));
    (size(0, 20), head, float(), any::<u64>())
        .prop_map(move |(t, (heads, nope, rope, v, r), dtype, seed)| {
            let draw = Draw::new(index, seed);
            let q = draw.floats(0, dtype, &[t, heads * (nope + rope)]);
            let w = draw.floats(1, DType::F32, &[heads * (nope + v), r]);
            let op = MlaAbsorbQuery { heads, nope, rope, v };
            draw.case(op, [("q", Some(q)), ("w", Some(w))])
        })
        .boxed()
}

fn mla_absorb_value(index: usize) -> BoxedStrategy<Drawn> {
    let head = (1usize..=3, size(0, 17), size(0, 33), size(0, 40));
    (size(0, 20), head, float(), any::<u64>())
        .prop_map(move |(t, (heads, nope, v, r), dtype, seed)| {
            let draw = Draw::new(index, seed);
            let o = draw.floats(0, dtype, &[t, heads * r]);
            let w = draw.floats(1, DType::F32, &[heads * (nope + v), r]);
            let op = MlaAbsorbValue { heads, nope, v };
            draw.case(op, [("o", Some(o)), ("w", Some(w))])
        })
        .boxed()
}
