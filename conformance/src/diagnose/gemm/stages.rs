//! K blocks multiplied from another K block's data: a stage of the pipeline that is stale, or that
//! was overwritten too early.
//!
//! If K block `b` of an element's row and column is replaced by blocks `f` of A and `g` of B, the
//! element differs by `scale_b (a_f . b_g - a_b . b_b)`: no unknown is left to fit. All `b`, `f`
//! and `g` of which one is right or both are the same are tried on a sample of differing elements,
//! and as long as the rest becomes smaller, another such replacement is taken.

use rayon::prelude::*;

use super::GemmFamily;
use super::problem::{Codes, Operand};
use super::variant::Variant;
use crate::diagnose::hypothesis::{KBlocks, spread};

/// K blocks beyond which pairs are too many.
const MOST_BLOCKS: usize = 64;
/// Differing elements that are looked at, and the fewest that say something.
const SAMPLE: usize = 64;
const FEWEST: usize = 16;
/// Blocks that may be replaced.
const MOST_REPLACED: usize = 8;
/// Share of the difference's square that may be left.
const LEFT: f64 = 0.01;

/// A K block and the blocks that its data of A and of B come from.
#[derive(Clone, Copy)]
struct Replaced {
    block: usize,
    from: [usize; 2],
}

/// One differing element.
struct Element {
    difference: f64,
    /// Products of its two scales, block by block.
    scales: Vec<f64>,
    /// Dot products of block f of A with block g of B, `[f][g]`.
    dots: Vec<f64>,
    /// One over the sum of the squared contributions: elements of any size count alike.
    weight: f64,
}

impl Element {
    fn change(&self, of: Replaced) -> f64 {
        let (n, [f, g]) = (self.scales.len(), of.from);
        let own = self.dots[of.block * n + of.block];
        self.scales[of.block] * (self.dots[f * n + g] - own)
    }
}

pub(super) fn along_k(family: &GemmFamily, differing: &[usize]) -> Option<KBlocks> {
    let p = &family.problem;
    let blocks = p.k_blocks();
    if !(2..=MOST_BLOCKS).contains(&blocks) {
        return None;
    }
    let chosen: Vec<usize> = spread(differing.len(), SAMPLE).map(|i| differing[i]).collect();
    let mut elements: Vec<Element> =
        chosen.par_iter().filter_map(|&e| element(family, e / p.n, e % p.n)).collect();
    if elements.len() < FEWEST {
        return None;
    }
    let square = |all: &[Element]| -> f64 {
        all.iter().map(|e| e.weight * e.difference * e.difference).sum()
    };
    let whole = square(&elements);
    let mut found: Vec<Replaced> = Vec::new();
    while square(&elements) > LEFT * whole {
        let left = |of: Replaced| -> f64 {
            elements.iter().map(|e| e.weight * (e.difference - e.change(of)).powi(2)).sum()
        };
        let open = (0..blocks).filter(|b| found.iter().all(|f| f.block != *b));
        let all: Vec<Replaced> = open.flat_map(|block| replacements(block, blocks)).collect();
        let lefts: Vec<f64> = all.par_iter().map(|&of| left(of)).collect();
        let best = (0..all.len()).min_by(|&x, &y| lefts[x].total_cmp(&lefts[y]))?;
        // A replacement that leaves most of the difference is none.
        if found.len() == MOST_REPLACED || lefts[best] > 0.95 * square(&elements) {
            return None;
        }
        for e in &mut elements {
            e.difference -= e.change(all[best]);
        }
        found.push(all[best]);
    }
    found.sort_by_key(|f| f.block);
    let off: Vec<usize> = found.iter().map(|f| f.block).collect();
    let coefficient = |b: usize| if off.contains(&b) { -1.0 } else { 0.0 };
    let words: Vec<String> = found.iter().map(|f| words(*f, p.k)).collect();
    Some(KBlocks {
        block: 128,
        coefficients: (0..blocks).map(coefficient).collect(),
        off,
        accounts_for: 1.0 - square(&elements) / whole,
        words: words.join("; "),
    })
}

/// Another block of A, of B, or the same other block of both.
fn replacements(block: usize, blocks: usize) -> impl Iterator<Item = Replaced> {
    let others = (0..blocks).filter(move |&f| f != block);
    let each = move |f| [[f, block], [block, f], [f, f]];
    others.flat_map(each).map(move |from| Replaced { block, from })
}

fn words(of: Replaced, k: usize) -> String {
    let [f, g] = of.from;
    let (from, whose) = match (f != of.block, g != of.block) {
        (true, true) => (f, "A and B"),
        (true, false) => (f, "A"),
        _ => (g, "B"),
    };
    let when = if from < of.block { "stale, of block" } else { "ahead, already of block" };
    let blocks = format!(
        "K block {} (elements {}..={} of K)",
        of.block,
        of.block * 128,
        (of.block * 128 + 127).min(k - 1)
    );
    format!("in {blocks} the data of {whose} is {when} {from}, its scales are its own")
}

/// A row's block of 128 elements as numbers.
fn block_of(x: &Operand, row: usize, block: usize, k: usize) -> Vec<f64> {
    let value = |kk: usize| {
        let code = x.codes.at(row * k + kk);
        f64::from(match &x.codes {
            Codes::F32(_) => f32::from_bits(code),
            codes => codes.format().layout().to_f32(code),
        })
    };
    (block * 128..(block * 128 + 128).min(k)).map(value).collect()
}

fn element(family: &GemmFamily, row: usize, column: usize) -> Option<Element> {
    let p = &family.problem;
    let v = Variant::given(p);
    let at = row * p.n + column;
    let difference = f64::from(p.file[at]) - f64::from(p.contract[at]);
    let expert = v.core.expert.of(p, row)?;
    let n = p.k_blocks();
    let scales: Vec<f64> = (0..n)
        .map(|b| {
            let interval = (b * 128, (b * 128 + 128).min(p.k));
            let of = |which, line| family.scale(&v, which, Some(expert), line, interval);
            f64::from(of(0, row)) * f64::from(of(1, column))
        })
        .collect();
    let blocks = |x: &Operand, row: usize| -> Vec<Vec<f64>> {
        (0..n).map(|b| block_of(x, row, b, p.k)).collect()
    };
    let (a, b) = (blocks(&p.a, row), blocks(&p.b, expert * p.n + column));
    // The tail's block is shorter: what it would read of a longer one is cut.
    let dot = |x: &[f64], y: &[f64]| -> f64 { x.iter().zip(y).map(|(x, y)| x * y).sum() };
    let dots: Vec<f64> = a.iter().flat_map(|x| b.iter().map(|y| dot(x, y))).collect();
    let size: f64 = (0..n).map(|b| (scales[b] * dots[b * n + b]).powi(2)).sum();
    let usable = difference.is_finite() && size.is_finite() && size > 0.0;
    usable.then(|| Element { difference, scales, dots, weight: 1.0 / size })
}
