//! Cases of the ops that move and add elements: `add`, `cast`, slices, concatenations, rows by
//! index, exchanges within a group of one.

use fathom_reference::ops::add::Add;
use fathom_reference::ops::cast::Cast;
use fathom_reference::ops::collective::{AllGather, AllReduce, Recv, ReduceScatter, Send};
use fathom_reference::ops::concat_columns::ConcatColumns;
use fathom_reference::ops::concat_rows::ConcatRows;
use fathom_reference::ops::context_exchange::{ContextExchange, Turn};
use fathom_reference::ops::gather_rows::GatherRows;
use fathom_reference::ops::scatter_add_rows::ScatterAddRows;
use fathom_reference::ops::slice_columns::SliceColumns;
use fathom_reference::ops::slice_rows::SliceRows;
use fathom_trace::{DType, Group, GroupKind};
use proptest::prelude::any;
use proptest::sample::select;
use proptest::strategy::{BoxedStrategy, Strategy};

use super::draw::{Draw, columns, float, rows, size};
use super::values::Values;
use super::{Drawn, Suite};

/// The suites of this file.
pub const SUITES: &[Suite] = &[
    Suite { op: "add", strategy: add },
    Suite { op: "all_gather", strategy: all_gather },
    Suite { op: "all_reduce", strategy: all_reduce },
    Suite { op: "cast", strategy: cast },
    Suite { op: "concat_columns", strategy: concat_columns },
    Suite { op: "concat_rows", strategy: concat_rows },
    Suite { op: "context_exchange", strategy: context_exchange },
    Suite { op: "gather_rows", strategy: gather_rows },
    Suite { op: "recv", strategy: recv },
    Suite { op: "reduce_scatter", strategy: reduce_scatter },
    Suite { op: "scatter_add_rows", strategy: scatter_add_rows },
    Suite { op: "send", strategy: send },
    Suite { op: "slice_columns", strategy: slice_columns },
    Suite { op: "slice_rows", strategy: slice_rows },
];

/// What ops that only move bits are given.
fn any_type() -> impl Strategy<Value = DType> {
    select(vec![DType::F32, DType::BF16, DType::F8E4M3, DType::I32])
}

/// A matrix of any type.
fn bits(draw: Draw, stream: u64, dtype: DType, shape: [usize; 2]) -> fathom_reference::Tensor {
    let words = draw.words(stream, shape[0] * shape[1]);
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let len = shape[0] * shape[1] * dtype.size();
    fathom_reference::Tensor::from_bytes(dtype, &shape, &bytes[..len])
}

fn add(index: usize) -> BoxedStrategy<Drawn> {
    let types = [float(), float(), float(), float()];
    (rows(index, 0, 40), columns(index, 0, 200), types, any::<(bool, u64)>())
        .prop_map(move |(t, columns, [a, b, c, out], (three, seed))| {
            let (draw, shape) = (Draw::new(index, seed), [t, columns]);
            // Beside zeros a number that lies midway between two BF16 stays there.
            let midway = draw.values == Values::Bits;
            let beside = if midway { Values::Zeros } else { draw.values };
            let (a, out) = if midway { (DType::F32, DType::BF16) } else { (a, out) };
            let beside = Draw { values: beside, ..draw };
            draw.case(
                Add { out },
                [
                    ("a", Some(draw.floats(0, a, &shape))),
                    ("b", Some(beside.floats(1, b, &shape))),
                    ("c", three.then(|| beside.floats(2, c, &shape))),
                ],
            )
        })
        .boxed()
}

fn cast(index: usize) -> BoxedStrategy<Drawn> {
    (rows(index, 0, 60), columns(index, 0, 300), float(), float(), any::<u64>())
        .prop_map(move |(t, columns, x, out, seed)| {
            let draw = Draw::new(index, seed);
            draw.case(Cast { out }, [("x", Some(draw.floats(0, x, &[t, columns])))])
        })
        .boxed()
}

fn concat_columns(index: usize) -> BoxedStrategy<Drawn> {
    (rows(index, 0, 40), [0; 3].map(|_| columns(index, 0, 90)), any_type(), any::<(bool, u64)>())
        .prop_map(move |(t, [a, b, c], dtype, (three, seed))| {
            let draw = Draw::new(index, seed);
            let part = |stream, columns| Some(bits(draw, stream, dtype, [t, columns]));
            let third = if three { part(2, c) } else { None };
            draw.case(ConcatColumns {}, [("a", part(0, a)), ("b", part(1, b)), ("c", third)])
        })
        .boxed()
}

fn concat_rows(index: usize) -> BoxedStrategy<Drawn> {
    (rows(index, 0, 60), size(0, 60), columns(index, 0, 130), any_type(), any::<u64>())
        .prop_map(move |(a, b, columns, dtype, seed)| {
            let draw = Draw::new(index, seed);
            let part = |stream, rows| Some(bits(draw, stream, dtype, [rows, columns]));
            draw.case(ConcatRows {}, [("a", part(0, a)), ("b", part(1, b))])
        })
        .boxed()
}

fn slice_columns(index: usize) -> BoxedStrategy<Drawn> {
    (rows(index, 0, 60), [60, 120, 60].map(|n| columns(index, 0, n)), any_type(), any::<u64>())
        .prop_map(move |(t, [offset, width, rest], dtype, seed)| {
            let draw = Draw::new(index, seed);
            let x = bits(draw, 0, dtype, [t, offset + width + rest]);
            draw.case(SliceColumns { offset, width }, [("x", Some(x))])
        })
        .boxed()
}

fn slice_rows(index: usize) -> BoxedStrategy<Drawn> {
    (
        columns(index, 0, 130),
        (size(0, 60), rows(index, 0, 120), size(0, 60)),
        any_type(),
        any::<u64>(),
    )
        .prop_map(move |(columns, (offset, rows, rest), dtype, seed)| {
            let draw = Draw::new(index, seed);
            let x = bits(draw, 0, dtype, [offset + rows + rest, columns]);
            draw.case(SliceRows { offset, rows }, [("x", Some(x))])
        })
        .boxed()
}

fn gather_rows(index: usize) -> BoxedStrategy<Drawn> {
    (rows(index, 0, 60), size(1, 40), columns(index, 0, 200), float(), float(), any::<u64>())
        .prop_map(move |(t, height, columns, table, out, seed)| {
            let draw = Draw::new(index, seed);
            let ids = draw.indices(1, &[t], height);
            let table = draw.floats(0, table, &[height, columns]);
            draw.case(GatherRows { out }, [("table", Some(table)), ("ids", Some(ids))])
        })
        .boxed()
}

/// Few rows take many tokens, so that the order of additions shows.
fn scatter_add_rows(index: usize) -> BoxedStrategy<Drawn> {
    (
        rows(index, 0, 100),
        size(1, 20),
        columns(index, 0, 200),
        [0; 3].map(|_| float()),
        any::<u64>(),
    )
        .prop_map(move |(t, height, columns, [x, acc, out], seed)| {
            let draw = Draw::new(index, seed);
            draw.case(
                ScatterAddRows { out },
                [
                    ("x", Some(draw.floats(0, x, &[t, columns]))),
                    ("ids", Some(draw.indices(1, &[t], height))),
                    ("acc", Some(draw.floats(2, acc, &[height, columns]))),
                ],
            )
        })
        .boxed()
}

macro_rules! exchanges {
    ($($name:ident $op:ident;)*) => {$(
        fn $name(index: usize) -> BoxedStrategy<Drawn> {
            (size(1, 60), size(0, 120), any_type(), any::<u64>())
                .prop_map(move |(t, columns, dtype, seed)| {
                    let draw = Draw::new(index, seed);
                    let group = Group { kind: GroupKind::Dp, size: 1 };
                    draw.case($op { group }, [("x", Some(bits(draw, 0, dtype, [t, columns])))])
                })
                .boxed()
        }
    )*};
}

exchanges! {
    all_gather AllGather;
    all_reduce AllReduce;
    recv Recv;
    reduce_scatter ReduceScatter;
    send Send;
}

fn context_exchange(index: usize) -> BoxedStrategy<Drawn> {
    let turns = select(vec![Turn::ToHeads, Turn::ToRows, Turn::Gather]);
    (size(1, 60), size(0, 120), any_type(), turns, any::<u64>())
        .prop_map(move |(t, columns, dtype, turn, seed)| {
            let draw = Draw::new(index, seed);
            let group = Group { kind: GroupKind::Cp, size: 1 };
            let op = ContextExchange { group, member: 0, rows: vec![t], turn };
            draw.case(op, [("x", Some(bits(draw, 0, dtype, [t, columns])))])
        })
        .boxed()
}
