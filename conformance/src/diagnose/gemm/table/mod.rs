//! The table of what GEMMs do otherwise: `core`, `scales`, `operands`, `epilogue`, and the
//! changes that several rows are made of.

mod core;
mod epilogue;
mod operands;
mod scales;

use fathom_numerics::mma::{Accumulator, Output};

use super::problem::{Operand, Problem};
use super::variant::{Dealt, End, Narrow, ScaleOf, Split, Variant};
use crate::diagnose::hypothesis::{Change, Row, each};

/// The table, for documentation.
pub(in crate::diagnose) fn table() -> Vec<[&'static str; 3]> {
    rows().map(|r| [r.name, r.meaning, r.seen]).collect()
}

/// All rows, in the order in which ties are named.
pub(super) fn rows() -> impl Iterator<Item = &'static Row<Problem, Variant>> {
    [core::ROWS, scales::ROWS, operands::ROWS, epilogue::ROWS].into_iter().flatten()
}

type Rows = Vec<Change<Variant>>;

/// A choice with its name, for a row's parameter.
#[derive(Clone)]
struct Named<T>(String, T);

impl<T> std::fmt::Display for Named<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

const OPERANDS: [&str; 2] = ["a", "b"];

fn operand(p: &Problem, which: usize) -> &Operand {
    if which == 0 { &p.a } else { &p.b }
}

/// A change of the scales of either operand, where it has more than one.
fn scales(p: &Problem, set: fn(&mut ScaleOf)) -> Rows {
    scales_where(p, |_| true, set)
}

fn scales_where(p: &Problem, sense: fn(&Operand) -> bool, set: fn(&mut ScaleOf)) -> Rows {
    let which = [0, 1].into_iter().filter(|&w| p.is_fp8() && sense(operand(p, w)));
    let named = which.map(|w| Named(OPERANDS[w].to_owned(), (w, set)));
    each(named, |v, Named(_, (w, set))| set(&mut v.scales[w]))
}

/// A change of the scales of either operand for each parameter that the operand gives.
fn scales_each<P: Clone + Send + Sync + 'static>(
    p: &Problem,
    parameters: fn(&Operand, &Problem) -> Vec<(String, P)>,
    set: fn(&mut ScaleOf, P),
) -> Rows {
    let of = |w: usize| {
        let named = parameters(operand(p, w), p).into_iter();
        named.map(move |(words, x)| Named(format!("{}|{words}", OPERANDS[w]), (w, x, set)))
    };
    let all = [0, 1].into_iter().filter(|_| p.is_fp8()).flat_map(of);
    each(all.collect::<Vec<_>>(), |v, Named(_, (w, x, set))| set(&mut v.scales[w], x))
}

/// One change of both operands' scales.
fn both(v: &mut Variant, set: impl Fn(&mut ScaleOf)) {
    v.scales.iter_mut().for_each(set);
}

/// A change of how either operand is read.
fn operands<P: Copy + Send + Sync + 'static>(
    parameters: impl Fn(usize) -> Vec<(&'static str, P)>,
    set: fn(&mut Variant, usize, P),
) -> Rows {
    let of = |w: usize| {
        let all = parameters(w).into_iter();
        all.map(move |(words, x)| Named(format!("{}|{words}", OPERANDS[w]), (w, x, set)))
    };
    let all: Vec<_> = [0, 1].into_iter().flat_map(of).collect();
    each(all, |v, Named(_, (w, x, set))| set(v, w, x))
}

fn many_blocks(x: &Operand) -> bool {
    x.scale_columns > 1
}

fn many_rows(x: &Operand) -> bool {
    x.scale_rows > 1
}

fn accumulator(bits: u32) -> Accumulator {
    let output = if bits < 23 { Output::F32 { fraction_bits: bits } } else { Output::FULL };
    Accumulator::tensor_core(32, bits, output)
}

/// Promotion intervals that make sense and the scales they would need.
fn spanning(p: &Problem, end: End) -> Rows {
    let intervals = [256, 384, 512, 1024].into_iter().filter(|&i| i < p.k && !p.uniform_over(i));
    let named = intervals.map(|i| Named(i.to_string(), (i, end)));
    let mut all: Vec<_> = named.collect();
    if !p.uniform_over(p.k) {
        all.push(Named("all of K".into(), (p.k, end)));
    }
    let usable = p.is_fp8();
    each(all.into_iter().filter(|_| usable), |v, Named(_, (i, end))| {
        v.core.interval = i;
        v.end = end;
    })
}

fn numbered(blocks: usize) -> std::ops::Range<usize> {
    0..blocks.min(64)
}

fn unaligned(p: &Problem, to: &[usize]) -> Vec<usize> {
    to.iter().copied().filter(|t| !p.k.is_multiple_of(*t) && p.k > *t).collect()
}

/// Quotients of an extent by its number of blocks that are not the block itself.
fn quotients(extent: usize, blocks: usize, block: usize) -> Vec<usize> {
    let mut all = vec![extent / blocks.max(1), extent.div_ceil(blocks.max(1))];
    all.dedup();
    all.retain(|q| *q != block && *q > 0 && blocks > 1);
    all
}

fn narrow() -> [Named<Narrow>; 2] {
    [("BF16", Narrow::Bf16), ("FP16", Narrow::F16)].map(|(n, t)| Named(n.to_owned(), t))
}

/// Split-K by any number of parts and any way to deal out K blocks.
fn splits(p: &Problem, (part, sum): (Narrow, Narrow), descending: bool) -> Rows {
    let blocks = p.k.div_ceil(p.interval);
    let numbers = (2..=16).chain([18, 20, 24, 28, 32]).filter(|n| *n <= blocks);
    let ways = [
        ("", Dealt::Ceil),
        (" (the last part longest)", Dealt::Floor),
        (" (parts of nearly equal length)", Dealt::Even),
        (" (K blocks dealt out in turn)", Dealt::InTurn),
    ];
    // Each way once: they differ only where the parts do not divide the blocks.
    let order: Vec<usize> = (0..blocks).collect();
    let mut all = Vec::new();
    for n in numbers.filter(|n| *n > 2 || !descending) {
        let mut seen = Vec::new();
        for (words, dealt) in ways {
            let parts = dealt.parts(&order, n);
            if !seen.contains(&parts) {
                seen.push(parts);
                let split = Split { parts: n, part, sum, descending, dealt };
                all.push(Named(format!("{n}|{words}"), split));
            }
        }
    }
    each(all, |v, Named(_, split)| v.split = split)
}
