//! K blocks multiplied from another K block's data: a stage of the pipeline that is stale, or that
//! was overwritten too early.
//!
//! If K block `b` of an element's row and column is replaced by blocks `f` of A and `g` of B, the
//! element differs by `scale_b (a_f . b_g - a_b . b_b)`: no unknown is left to fit. All `b`, `f`
//! and `g` of which one is right or both are the same are tried on a sample of differing elements,
//! and those of tiles so many rows or columns away; as long as the rest becomes smaller, another
//! such replacement is taken.

use rayon::prelude::*;

use super::GemmFamily;
use super::problem::{Codes, Operand};
use super::variant::Variant;
use crate::diagnose::hypothesis::{KBlocks, spread};

/// K blocks beyond which pairs are too many.
const MOST_BLOCKS: usize = 64;
/// Differing elements that are looked at, and the fewest that say something.
const SAMPLE: usize = 32;
const FEWEST: usize = 16;
/// Blocks that may be replaced.
const MOST_REPLACED: usize = 8;
/// Share of the difference's square that may be left.
const LEFT: f64 = 0.01;

/// Where the data of a K block comes from.
#[derive(Clone, Copy)]
enum From {
    /// These blocks of A and of B.
    Blocks([usize; 2]),
    /// A block of both, the rows being those of the numbered tile.
    Tile(usize, usize),
}

/// A K block with other data than its own.
#[derive(Clone, Copy)]
struct Replaced {
    block: usize,
    from: From,
}

/// Another tile: whose rows (A's, else B's) are how far away.
#[derive(Clone, Copy)]
struct Tile {
    of_a: bool,
    by: isize,
}

/// One differing element.
struct Element {
    difference: f64,
    /// Products of its two scales, block by block.
    scales: Vec<f64>,
    /// Dot products of block f of A with block g of B, `[f][g]`.
    dots: Vec<f64>,
    /// Those of block f of both with the rows of each other tile, `[tile][f]`; NaN outside.
    others: Vec<f64>,
    /// One over the sum of the squared contributions: elements of any size count alike.
    weight: f64,
}

impl Element {
    fn change(&self, of: Replaced) -> f64 {
        let n = self.scales.len();
        let own = self.dots[of.block * n + of.block];
        let other = match of.from {
            From::Blocks([f, g]) => self.dots[f * n + g],
            From::Tile(tile, f) => self.others[tile * n + f],
        };
        self.scales[of.block] * (other - own)
    }
}

pub(super) fn along_k(family: &GemmFamily, differing: &[usize]) -> Option<KBlocks> {
    let p = &family.problem;
    let blocks = p.k_blocks();
    if !(2..=MOST_BLOCKS).contains(&blocks) {
        return None;
    }
    let chosen: Vec<usize> = spread(differing.len(), SAMPLE).map(|i| differing[i]).collect();
    let tiles = tiles(p.m, p.n);
    let of = |e: &usize| element(family, &tiles, e / p.n, e % p.n);
    let mut elements: Vec<Element> = chosen.par_iter().filter_map(of).collect();
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
        let all: Vec<Replaced> = open.flat_map(|b| replacements(b, blocks, tiles.len())).collect();
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
    let words: Vec<String> = found.iter().map(|f| words(*f, &tiles, p.k)).collect();
    Some(KBlocks {
        block: 128,
        coefficients: (0..blocks).map(coefficient).collect(),
        off,
        accounts_for: 1.0 - square(&elements) / whole,
        words: words.join("; "),
    })
}

/// Another block of A, of B, or the same other block of both; or any block of another tile's.
fn replacements(block: usize, blocks: usize, tiles: usize) -> impl Iterator<Item = Replaced> {
    let others = (0..blocks).filter(move |&f| f != block);
    let each = move |f| [[f, block], [block, f], [f, f]];
    let of_tiles = (0..tiles).flat_map(move |t| (0..blocks).map(move |f| From::Tile(t, f)));
    let all = others.flat_map(each).map(From::Blocks).chain(of_tiles);
    all.map(move |from| Replaced { block, from })
}

/// Distances at which kernels' other tiles begin.
fn tiles(m: usize, n: usize) -> Vec<Tile> {
    let mut all = Vec::new();
    for (of_a, extent) in [(true, m), (false, n)] {
        let near = [16, 48].into_iter().chain((32..=256).step_by(32));
        for by in near.chain((384..=2048).step_by(128)).filter(|&by| by < extent) {
            all.extend([-(by as isize), by as isize].map(|by| Tile { of_a, by }));
        }
    }
    all
}

fn words(of: Replaced, tiles: &[Tile], k: usize) -> String {
    let block = of.block;
    let stage = |from: usize| if from < block { "stale, of" } else { "ahead, already of" };
    let data = match of.from {
        From::Blocks([f, g]) if g == block => format!("A is {} block {f}", stage(f)),
        From::Blocks([f, g]) if f == block => format!("B is {} block {g}", stage(g)),
        From::Blocks([f, _]) => format!("A and B is {} block {f}", stage(f)),
        From::Tile(tile, f) => {
            let Tile { of_a, by } = tiles[tile];
            let (whose, lines) = if of_a { ("A", "rows") } else { ("B", "columns") };
            let side = if by < 0 { "before" } else { "behind" };
            let both = if f == block { "" } else { ", as the other operand" };
            format!(
                "{whose} is another tile's, {} {lines} {side}, of its block {f}{both}",
                by.unsigned_abs()
            )
        }
    };
    let (first, last) = (block * 128, (block * 128 + 127).min(k - 1));
    format!(
        "in K block {block} (elements {first}..={last} of K) the data of {data}; its scales are \
         its own"
    )
}

/// A row's elements as numbers, block by block of 128.
fn blocks_of(x: &Operand, row: usize, k: usize) -> Vec<Vec<f32>> {
    let row = row * k..(row + 1) * k;
    let values: Vec<f32> = match &x.codes {
        Codes::Fp8(codes, format) => {
            let of = |code: usize| format.layout().to_f32(code as u32);
            let table: [f32; 256] = std::array::from_fn(of);
            codes[row].iter().map(|&code| table[usize::from(code)]).collect()
        }
        Codes::Bf16(codes) => {
            codes[row].iter().map(|&c| f32::from_bits(u32::from(c) << 16)).collect()
        }
        Codes::F32(values) => values[row].to_vec(),
    };
    values.chunks(128).map(<[f32]>::to_vec).collect()
}

/// Eight sums side by side, which is faster; a block of the tail is shorter: what it would read of
/// a longer one is cut.
fn dot(x: &[f32], y: &[f32]) -> f64 {
    let mut sums = [0.0f32; 8];
    for (x, y) in x.chunks(8).zip(y.chunks(8)) {
        for (sum, (x, y)) in sums.iter_mut().zip(x.iter().zip(y)) {
            *sum += x * y;
        }
    }
    sums.iter().map(|&s| f64::from(s)).sum()
}

fn element(family: &GemmFamily, tiles: &[Tile], row: usize, column: usize) -> Option<Element> {
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
    let a = blocks_of(&p.a, row, p.k);
    let b = blocks_of(&p.b, expert * p.n + column, p.k);
    let dots: Vec<f64> = a.iter().flat_map(|x| b.iter().map(|y| dot(x, y))).collect();
    let of_tile = |tile: &Tile| -> Vec<f64> {
        let (line, extent) = if tile.of_a { (row, p.m) } else { (column, p.n) };
        let Some(line) = line.checked_add_signed(tile.by).filter(|l| *l < extent) else {
            return vec![f64::NAN; n];
        };
        let (x, row) = if tile.of_a { (&p.a, line) } else { (&p.b, expert * p.n + line) };
        let own = if tile.of_a { &b } else { &a };
        blocks_of(x, row, p.k).iter().zip(own).map(|(x, y)| dot(x, y)).collect()
    };
    let others = tiles.iter().flat_map(of_tile).collect();
    let size: f64 = (0..n).map(|b| (scales[b] * dots[b * n + b]).powi(2)).sum();
    let usable = difference.is_finite() && size.is_finite() && size > 0.0;
    usable.then(|| Element { difference, scales, dots, others, weight: 1.0 / size })
}
