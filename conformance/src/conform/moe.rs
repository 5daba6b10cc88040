//! Cases of routing and of tokens' ways to experts and back: ties, empty experts, all tokens on
//! one, dropped slots.

use fathom_config::Score;
use fathom_reference::Tensor;
use fathom_reference::ops::balance::BalanceLoss;
use fathom_reference::ops::dispatch::{Combine, Dispatch, DispatchCodes, DispatchPlan};
use fathom_reference::ops::drop_tokens::DropTokens;
use fathom_reference::ops::router::{Router, RouterBackward};
use fathom_trace::{DType, Group, GroupKind};
use proptest::prelude::any;
use proptest::sample::select;
use proptest::strategy::{BoxedStrategy, Strategy};

use super::draw::{Draw, columns, float, rows, size};
use super::values::Values;
use super::{Drawn, Suite};

/// The suites of this file.
pub const SUITES: &[Suite] = &[
    Suite { op: "balance_loss", strategy: balance_loss },
    Suite { op: "combine", strategy: combine },
    Suite { op: "dispatch", strategy: dispatch },
    Suite { op: "dispatch_codes", strategy: dispatch_codes },
    Suite { op: "dispatch_plan", strategy: dispatch_plan },
    Suite { op: "drop_tokens", strategy: drop_tokens },
    Suite { op: "router", strategy: router },
    Suite { op: "router_backward", strategy: router_backward },
];

const ALONE: Group = Group { kind: GroupKind::Ep, size: 1 };

/// Experts of slots; `crowd`: all on one, else any of `experts`, now and then dropped (-1).
fn experts_of(draw: Draw, shape: [usize; 2], experts: usize, crowd: bool, drops: bool) -> Tensor {
    let words = draw.words(30, shape[0] * shape[1]);
    let one = |w: &u32| match w % 8 {
        0 if drops => -1,
        _ if crowd => (experts / 2) as i32,
        _ => ((w >> 8) as usize % experts) as i32,
    };
    Tensor::from_vec(&shape, words.iter().map(one).collect())
}

/// A permutation of 0..n.
fn permutation(draw: Draw, n: usize) -> Vec<i32> {
    let words = draw.words(31, n);
    let mut order: Vec<i32> = (0..n as i32).collect();
    order.sort_by_key(|&i| words[i as usize]);
    order
}

fn dispatch_plan(index: usize) -> BoxedStrategy<Drawn> {
    (rows(index, 0, 300), size(0, 8), size(1, 40), any::<([bool; 2], u64)>())
        .prop_map(move |(t, top_k, experts, ([crowd, drops], seed))| {
            let draw = Draw::new(index, seed);
            let indices = experts_of(draw, [t, top_k], experts, crowd, drops);
            draw.case(DispatchPlan { experts }, [("indices", Some(indices))])
        })
        .boxed()
}

/// The case whose rows name some slots twice and others not at all.
const TWICE: usize = 9;

/// The slot of each row: each slot once, but in case [`TWICE`].
fn slots_of(draw: Draw, index: usize, slots: usize) -> Vec<i32> {
    if index == TWICE && slots > 0 {
        return draw.words(21, slots).iter().map(|w| (*w as usize % slots) as i32).collect();
    }
    permutation(draw, slots)
}

fn dispatch(index: usize) -> BoxedStrategy<Drawn> {
    let dtype = select(vec![DType::F32, DType::BF16, DType::F8E4M3]);
    (rows(index, 0, 60), size(1, 8), columns(index, 0, 70), dtype, any::<([bool; 2], u64)>())
        .prop_map(move |(t, top_k, columns, dtype, ([slots, all], seed))| {
            let draw = Draw::new(index, seed);
            let columns = if slots { top_k } else { columns };
            let words = draw.words(0, t * columns);
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            let x = Tensor::from_bytes(dtype, &[t, columns], &bytes[..t * columns * dtype.size()]);
            let rows = slots_of(draw, index, t * top_k);
            let received = if all { rows.len() } else { rows.len() / 2 };
            let (copies_sent, group, sent) = (0, ALONE, Vec::new());
            let op = Dispatch { top_k, received, copies_sent, slots, group, sent };
            draw.case(op, [("x", Some(x)), ("rows", Some(Tensor::from_vec(&[t * top_k], rows)))])
        })
        .boxed()
}

fn dispatch_codes(index: usize) -> BoxedStrategy<Drawn> {
    let codes = select(vec![DType::F8E4M3, DType::F8E5M2]);
    let widths = (columns(index, 0, 140), size(0, 5));
    (rows(index, 0, 60), size(1, 8), widths, codes, any::<(bool, u64)>())
        .prop_map(move |(t, top_k, (columns, tiles), dtype, (all, seed))| {
            let draw = Draw::new(index, seed);
            let words = draw.words(0, t * columns);
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            let q = Tensor::from_bytes(dtype, &[t, columns], &bytes[..t * columns]);
            let scale = draw.floats(1, DType::F32, &[t, tiles]);
            let rows = slots_of(draw, index, t * top_k);
            let received = if all { rows.len() } else { rows.len() / 2 };
            let (copies_sent, group, sent) = (0, ALONE, Vec::new());
            let rows = Tensor::from_vec(&[t * top_k], rows);
            draw.case(
                DispatchCodes { top_k, received, copies_sent, group, sent },
                [("q", Some(q)), ("scale", Some(scale)), ("rows", Some(rows))],
            )
        })
        .boxed()
}

fn combine(index: usize) -> BoxedStrategy<Drawn> {
    (
        rows(index, 0, 60),
        size(1, 8),
        columns(index, 0, 70),
        float(),
        float(),
        any::<([bool; 2], u64)>(),
    )
        .prop_map(move |(tokens, top_k, columns, y, out, ([slots, all], seed))| {
            let draw = Draw::new(index, seed);
            let inverse = permutation(draw, tokens * top_k);
            let rows = if all { inverse.len() } else { inverse.len() / 2 };
            let shape = [rows, columns];
            let y = draw.floats(0, y, if slots { &shape[..1] } else { &shape[..] });
            let (copies_sent, group, sent) = (0, ALONE, Vec::new());
            let op = Combine { top_k, tokens, copies_sent, slots, out, group, sent };
            let inverse = Tensor::from_vec(&[tokens * top_k], inverse);
            draw.case(op, [("y", Some(y)), ("inverse", Some(inverse))])
        })
        .boxed()
}

/// Affinities are numbers: an order with NaN among them no contract states.
fn drop_tokens(index: usize) -> BoxedStrategy<Drawn> {
    let room = select(vec![0.0, 0.5, 1.0, 1.25, 8.0]);
    let experts = (1usize..=6, select(vec![1usize, 2, 4, 8]));
    ((rows(index, 0, 100), size(1, 6)), experts, room, 1usize..=4, any::<([bool; 2], u64)>())
        .prop_map(move |((t, top_k), (share, devices), factor, parts, ([crowd, ties], seed))| {
            let draw = Draw::new(index, seed);
            let numbers = Draw { values: Values::Normal, seed };
            let experts = share * devices;
            let mut scores = numbers.positive(1, DType::F32, &[t, experts]);
            if ties {
                scores.as_mut_slice::<f32>().iter_mut().for_each(|s| *s = (*s * 1e3).round());
            }
            let indices = experts_of(draw, [t, top_k], experts, crowd, false);
            let exempt = (0..parts).filter(|s| draw.words(2, parts)[*s].is_multiple_of(3));
            let (segments, exempt) = (draw.segments(20, parts, t), exempt.collect());
            let op = DropTokens { devices, factor, segments, exempt };
            draw.case(op, [("indices", Some(indices)), ("scores", Some(scores))])
        })
        .boxed()
}

fn score() -> impl Strategy<Value = Score> {
    select(vec![Score::Sigmoid, Score::Softmax])
}

/// Logits of a kind of values; `ties`: rounded, so that many are equal.
fn logits(draw: Draw, shape: &[usize], ties: bool) -> Tensor {
    let mut logits = draw.floats(0, DType::F32, shape);
    if ties {
        logits.as_mut_slice::<f32>().iter_mut().for_each(|x| *x = x.round());
    }
    logits
}

fn router(index: usize) -> BoxedStrategy<Drawn> {
    let groups = (select(vec![1usize, 1, 2, 4, 8]), columns(index, 1, 34), 1usize..=8, size(0, 3));
    let rest = (size(0, 8), score(), select(vec![1.0, 2.5]));
    (rows(index, 0, 40), groups, rest, any::<([bool; 3], u64)>())
        .prop_map(move |(t, (n_group, width, kept, best), rest, (flags, seed))| {
            let ([ties, biased, normalize], (top_k, score, scale)) = (flags, rest);
            let draw = Draw::new(index, seed);
            let (experts, topk_group) = (n_group * width, kept.min(n_group));
            let mut logits = logits(draw, &[t, experts], ties);
            if seed % 3 == 0 {
                // Every second token has affinities of zero, where they are sigmoids.
                let cold = logits.as_mut_slice::<f32>().chunks_mut(experts).step_by(2);
                cold.for_each(|token| token.fill(-200.0));
            }
            let mut bias = draw.floats(1, DType::F32, &[experts]);
            if seed % 2 == 0 {
                // Below zero with any affinity.
                bias.as_mut_slice::<f32>().iter_mut().for_each(|b| *b = -2.0 - b.abs());
            }
            let op = Router {
                top_k: top_k.min(width * topk_group),
                n_group,
                topk_group,
                group_top: best.min(width),
                score,
                normalize,
                scale,
            };
            draw.case(op, [("logits", Some(logits)), ("bias", biased.then_some(bias))])
        })
        .boxed()
}

fn router_backward(index: usize) -> BoxedStrategy<Drawn> {
    let rest = (score(), select(vec![1.0, 2.5]));
    (rows(index, 0, 40), columns(index, 1, 70), size(1, 8), rest, any::<([bool; 2], u64)>())
        .prop_map(move |(t, experts, top_k, (score, scale), ([normalize, dscores], seed))| {
            let draw = Draw::new(index, seed);
            draw.case(
                RouterBackward { score, normalize, scale },
                [
                    ("dweights", Some(draw.floats(0, DType::F32, &[t, top_k]))),
                    ("scores", Some(draw.positive(1, DType::F32, &[t, experts]))),
                    ("indices", Some(draw.indices(2, &[t, top_k], experts))),
                    ("dscores", dscores.then(|| draw.floats(3, DType::F32, &[t, experts]))),
                ],
            )
        })
        .boxed()
}

fn balance_loss(index: usize) -> BoxedStrategy<Drawn> {
    let experts = (1usize..=8, select(vec![1usize, 2, 8, 16]));
    let rest = (select(vec![1e-4, 0.5]), 1usize..=4);
    (rows(index, 0, 120), experts, size(0, 8), rest, any::<(bool, u64)>())
        .prop_map(move |(t, (share, devices), top_k, (weight, parts), (routed, seed))| {
            let draw = Draw::new(index, seed);
            let experts = share * devices;
            let segments = draw.segments(20, parts, t);
            let indices = routed.then(|| experts_of(draw, [t, top_k], experts, false, false));
            draw.case(
                BalanceLoss { top_k, weight, segments, devices },
                [
                    ("scores", Some(draw.positive(0, DType::F32, &[t, experts]))),
                    ("indices", indices),
                ],
            )
        })
        .boxed()
}
