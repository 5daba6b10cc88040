//! Which K blocks a difference comes from.
//!
//! An element of the contract's output is a sum of one contribution a K block, `p_b` (scales times
//! partial sum). Where the file's output differs by a wrong weight of some blocks, the difference
//! is `sum_b c_b p_b` with few `c_b` other than zero: -1 where a block is missing, +1 where it
//! counts twice, `used / right - 1` where its scale is another. The `c_b` are found by least
//! squares, over all differing elements at once, else row by row (A's scales) or column by column
//! (B's). Where weights do not account for the difference but those of a few blocks stand out,
//! these blocks hold something else, and their groups of 32 are fitted.

use super::GemmFamily;
use super::partials::{Grid, intervals};
use super::problem::Operand;
use super::variant::Variant;
use crate::diagnose::hypothesis::{Family, KBlocks, spread};

/// K blocks beyond which the equations are not set up.
const MOST_BLOCKS: usize = 512;
/// Share of the difference that must be accounted for before anything is claimed.
const ENOUGH: f64 = 0.98;
/// Smallest coefficient that is taken as a deviation, and how many standard errors it must have.
const NOTICED: f64 = 0.02;
const OUTSTANDING: f64 = 8.0;
/// Lines (rows or columns) that are looked at one by one.
const LINES: usize = 6;
/// Rows within a block of columns that are looked at one by one.
const PATCHES: usize = 8;
/// Blocks that may stand out where the difference is not accounted for.
const FEW: usize = 4;

/// Contributions of each block and the difference, element by element.
struct Equations {
    /// Unknowns: blocks, or groups of 32 of some blocks.
    unknowns: usize,
    places: Vec<(usize, usize)>,
    contributions: Vec<f64>,
    differences: Vec<f64>,
    /// The file's elements.
    files: Vec<f64>,
}

/// Coefficients, and the share of the difference that they account for.
#[derive(Clone)]
struct Fit {
    coefficients: Vec<f64>,
    /// Their standard errors.
    errors: Vec<f64>,
    accounts_for: f64,
}

pub(super) fn along_k(
    family: &GemmFamily,
    file: &[u64],
    contract: &[u64],
    differing: &[usize],
) -> Option<KBlocks> {
    let p = &family.problem;
    let blocks = p.k_blocks();
    if !(2..=MOST_BLOCKS).contains(&blocks) || file.is_empty() || differing.is_empty() {
        return None;
    }
    debug_assert_eq!(file.len(), contract.len());
    let count = (8 * blocks).max(1024) * 2;
    let chosen = family.choose(differing, p.m * p.n, count);
    let whole: Vec<usize> = (0..blocks).collect();
    let rough = equations(family, &chosen, 128, &whole)?.fit(|_| true);
    let uniform = rough.as_ref().filter(|f| f.accounts_for >= ENOUGH);
    let (fit, words) = match uniform {
        Some(fit) => (fit.clone(), uniform_words(&fit.coefficients, p.k)),
        None => match super::stages::along_k(family, differing) {
            Some(replaced) => return Some(replaced),
            None => by_lines(family, differing).or_else(|| by_tiles(family, differing)),
        }
        .or_else(|| {
            let rough = rough.as_ref()?;
            let (accounts_for, words) = outstanding(family, rough, &chosen)?;
            Some((Fit { accounts_for, ..rough.clone() }, words))
        })?,
    };
    let least = |b: usize| NOTICED.max(OUTSTANDING * fit.errors[b]);
    let off: Vec<usize> = (0..blocks).filter(|&b| fit.coefficients[b].abs() > least(b)).collect();
    if off.is_empty() || words.is_empty() {
        return None;
    }
    Some(KBlocks {
        block: 128,
        coefficients: fit.coefficients,
        off,
        accounts_for: fit.accounts_for,
        words,
    })
}

/// Sets up an equation for each chosen element that differs by a finite number; the unknowns are
/// the given units of K, of so many elements each.
fn equations(
    family: &GemmFamily,
    chosen: &[usize],
    unit: usize,
    units: &[usize],
) -> Option<Equations> {
    let p = &family.problem;
    let mut elements: Vec<usize> = chosen.to_vec();
    elements.sort_unstable();
    elements.dedup();
    let v = Variant::given(p);
    // Promotion intervals longer than a block are cut to blocks: the sums differ by roundings only.
    let mut core = v.core.clone();
    core.interval = if unit.is_multiple_of(core.interval) { core.interval } else { unit.min(p.k) };
    let grid = Grid::new(&elements, p.n);
    let partials = super::partials::computed(p, &grid, &core);
    let intervals = intervals(&core);
    let number: std::collections::HashMap<usize, usize> =
        units.iter().enumerate().map(|(i, &u)| (u, i)).collect();
    let mut equations = Equations {
        unknowns: units.len(),
        places: Vec::new(),
        contributions: Vec::new(),
        differences: Vec::new(),
        files: Vec::new(),
    };
    for &place in &grid.places {
        let (r, c) = (place / grid.columns.len(), place % grid.columns.len());
        let (row, column) = (grid.rows[r], grid.columns[c]);
        let difference =
            f64::from(p.file[row * p.n + column]) - f64::from(p.contract[row * p.n + column]);
        let expert = v.core.expert.of(p, row);
        if !difference.is_finite() || difference == 0.0 || expert.is_none() {
            continue;
        }
        let mut contributions = vec![0.0; units.len()];
        for (t, &interval) in intervals.iter().enumerate() {
            let a = family.scale(&v, 0, expert, row, interval);
            let b = family.scale(&v, 1, expert, column, interval);
            let scale = f64::from(a) * f64::from(b);
            if let Some(&number) = number.get(&(interval.0 / unit)) {
                contributions[number] += scale * f64::from(partials[t * grid.len() + place]);
            }
        }
        if contributions.iter().all(|x| x.is_finite()) {
            equations.places.push((row, column));
            equations.contributions.extend(contributions);
            equations.differences.push(difference);
            equations.files.push(f64::from(p.file[row * p.n + column]));
        }
    }
    (!equations.places.is_empty()).then_some(equations)
}

impl Equations {
    /// Least squares over the elements that are kept, normal equations by Cholesky.
    fn fit(&self, keep: impl Fn((usize, usize)) -> bool) -> Option<Fit> {
        let n = self.unknowns;
        let kept: Vec<usize> = (0..self.places.len()).filter(|&i| keep(self.places[i])).collect();
        if kept.len() < n + n / 2 + 4 {
            return None;
        }
        let mut matrix = vec![0.0; n * n];
        let mut right = vec![0.0; n];
        let (mut total, mut of_file) = (0.0, 0.0);
        for &e in &kept {
            let p = &self.contributions[e * n..(e + 1) * n];
            // Elements of any size count alike.
            let size: f64 = p.iter().map(|x| x * x).sum::<f64>().max(f64::MIN_POSITIVE);
            let (w, d) = (1.0 / size, self.differences[e]);
            total += w * d * d;
            of_file += w * self.files[e] * self.files[e];
            for i in 0..n {
                right[i] += w * p[i] * d;
                for j in 0..=i {
                    matrix[i * n + j] += w * p[i] * p[j];
                }
            }
        }
        let diagonal: Vec<f64> = (0..n).map(|i| matrix[i * n + i]).collect();
        let coefficients = cholesky(matrix, right, n)?;
        let rest: f64 = kept
            .iter()
            .map(|&e| {
                let p = &self.contributions[e * n..(e + 1) * n];
                let size: f64 = p.iter().map(|x| x * x).sum::<f64>().max(f64::MIN_POSITIVE);
                let d: f64 = p.iter().zip(&coefficients).map(|(p, c)| p * c).sum();
                (self.differences[e] - d).powi(2) / size
            })
            .sum();
        // What is left must be small against the file's elements too: a file that has nothing of
        // the product differs by the whole of it. As many coefficients as blocks explain some of
        // anything: counted off.
        let free = (kept.len() - n) as f64 / kept.len() as f64;
        let whole = (total.min(of_file) * free).max(f64::MIN_POSITIVE);
        let variance = rest / (kept.len() - n) as f64;
        let error = |d: &f64| (variance / d.max(f64::MIN_POSITIVE)).sqrt();
        let errors = diagonal.iter().map(error).collect();
        Some(Fit { coefficients, errors, accounts_for: 1.0 - rest / whole })
    }
}

/// Solves a symmetric positive definite system, given its lower triangle.
fn cholesky(mut m: Vec<f64>, mut x: Vec<f64>, n: usize) -> Option<Vec<f64>> {
    let ridge = 1e-12 * (0..n).map(|i| m[i * n + i]).fold(0.0, f64::max);
    for i in 0..n {
        for j in 0..=i {
            let sum: f64 = (0..j).map(|k| m[i * n + k] * m[j * n + k]).sum();
            if i == j {
                m[i * n + i] = (m[i * n + i] + ridge - sum).sqrt();
                if m[i * n + i].is_nan() || m[i * n + i] == 0.0 {
                    return None;
                }
            } else {
                m[i * n + j] = (m[i * n + j] - sum) / m[j * n + j];
            }
        }
    }
    for i in 0..n {
        let sum: f64 = (0..i).map(|k| m[i * n + k] * x[k]).sum();
        x[i] = (x[i] - sum) / m[i * n + i];
    }
    for i in (0..n).rev() {
        let sum: f64 = (i + 1..n).map(|k| m[k * n + i] * x[k]).sum();
        x[i] = (x[i] - sum) / m[i * n + i];
    }
    Some(x)
}

fn span(block: usize, k: usize) -> String {
    format!("K block {block} (elements {}..={} of K)", block * 128, (block * 128 + 127).min(k - 1))
}

/// What coefficients that hold for all elements say.
fn uniform_words(coefficients: &[f64], k: usize) -> String {
    let of = |what: &dyn Fn(f64) -> bool| -> Vec<usize> {
        (0..coefficients.len()).filter(|&b| what(coefficients[b])).collect()
    };
    let near = |to: f64| move |c: f64| (c - to).abs() < 0.05;
    let off = of(&|c| c.abs() > NOTICED);
    let same = off.iter().all(|&b| near(coefficients[off[0]])(coefficients[b]));
    if off.len() == coefficients.len() && same {
        let factor = 1.0 + coefficients.iter().sum::<f64>() / coefficients.len() as f64;
        return format!("all K blocks count {factor:.4} times what they should");
    }
    let list = |blocks: &[usize]| match blocks {
        [one] => span(*one, k),
        [one, other] => format!("K blocks {one} and {other}"),
        [first, .., last] if last - first + 1 == blocks.len() => {
            format!("K blocks {first} to {last}")
        }
        many => {
            let shown: Vec<String> = many.iter().take(8).map(usize::to_string).collect();
            let more = if many.len() > 8 { ", ..." } else { "" };
            format!("K blocks {}{more}", shown.join(", "))
        }
    };
    let missing = of(&near(-1.0));
    let twice = of(&near(1.0));
    let others: Vec<usize> =
        off.iter().copied().filter(|b| !missing.contains(b) && !twice.contains(b)).collect();
    let mut words = Vec::new();
    if !missing.is_empty() {
        let verb = if missing.len() == 1 { "does" } else { "do" };
        words.push(format!("{} {verb} not enter", list(&missing)));
    }
    if !twice.is_empty() {
        let verb = if twice.len() == 1 { "counts" } else { "count" };
        words.push(format!("{} {verb} twice", list(&twice)));
    }
    for b in others.iter().take(4) {
        words.push(format!("{} counts {:.4} times", list(&[*b]), 1.0 + coefficients[*b]));
    }
    if others.len() > 4 {
        words.push(format!("{} further K blocks are off", others.len() - 4));
    }
    words.join("; ")
}

/// A few blocks whose weights stand out although weights do not account for the difference: their
/// products are replaced or cut. Says which groups of 32 elements, where that is clear, and how
/// much of the difference that accounts for.
fn outstanding(family: &GemmFamily, rough: &Fit, chosen: &[usize]) -> Option<(f64, String)> {
    let k = family.problem.k;
    let stands_out = |b: &usize| {
        let c = rough.coefficients[*b].abs();
        c > 0.1 && c > OUTSTANDING * rough.errors[*b]
    };
    let off: Vec<usize> = (0..rough.coefficients.len()).filter(stands_out).collect();
    if off.is_empty() || off.len() > FEW || off.len() * 2 > rough.coefficients.len() {
        return None;
    }
    let groups: Vec<usize> =
        off.iter().flat_map(|b| (0..4).map(move |g| 4 * b + g)).filter(|g| g * 32 < k).collect();
    let fine = equations(family, chosen, 32, &groups).and_then(|e| e.fit(|_| true));
    if let Some(fine) = fine.filter(|f| f.accounts_for >= ENOUGH) {
        // Rounded first, so that no zero is negative; neighbours of one weight are one run.
        let weight = |c: &f64| ((1.0 + c) * 100.0).round() / 100.0 + 0.0;
        let off = groups.iter().zip(&fine.coefficients).filter(|(_, c)| c.abs() > 5.0 * NOTICED);
        let all: Vec<(usize, f64)> = off.map(|(&g, c)| (g, weight(c))).collect();
        let runs = all.chunk_by(|x, y| x.0 + 1 == y.0 && x.0 / 4 == y.0 / 4 && x.1 == y.1);
        let words = runs.map(|run| {
            let (first, last) = (run[0].0, run[run.len() - 1].0);
            format!(
                "in K block {}, elements {}..={} of K count {:.2} times",
                first / 4,
                first * 32,
                (last * 32 + 31).min(k - 1),
                run[0].1
            )
        });
        return Some((fine.accounts_for, words.collect::<Vec<_>>().join("; ")));
    }
    let words = off.iter().map(|&b| {
        let weight = 1.0 + rough.coefficients[b];
        if weight.abs() < 0.1 {
            format!("{} does not enter, but something else in its place", span(b, k))
        } else {
            format!("{} counts {weight:.2} times, and something else besides", span(b, k))
        }
    });
    Some((rough.accounts_for, words.collect::<Vec<_>>().join("; ")))
}

/// Fits of single rows, else of single columns: a wrong scale differs from line to line.
fn by_lines(family: &GemmFamily, differing: &[usize]) -> Option<(Fit, String)> {
    let p = &family.problem;
    for which in [0, 1] {
        let line = |e: usize| if which == 0 { e / p.n } else { e % p.n };
        let mut lines: Vec<usize> = differing.iter().map(|&e| line(e)).collect();
        lines.sort_unstable();
        lines.dedup();
        let lines: Vec<usize> = spread(lines.len(), LINES).map(|i| lines[i]).collect();
        let across = if which == 0 { p.n } else { p.m };
        let most = (12 * p.k_blocks()).max(512);
        let others: Vec<usize> = spread(across, most).collect();
        let place = |l: usize, o: usize| if which == 0 { l * p.n + o } else { o * p.n + l };
        let chosen: Vec<usize> =
            lines.iter().flat_map(|&l| others.iter().map(move |&o| place(l, o))).collect();
        let whole: Vec<usize> = (0..p.k_blocks()).collect();
        let Some(all) = equations(family, &chosen, 128, &whole) else { continue };
        let fits: Vec<(usize, Fit)> = lines
            .iter()
            .filter_map(|&l| {
                let fit = all.fit(|(r, c)| if which == 0 { r == l } else { c == l })?;
                Some((l, fit))
            })
            .filter(|(_, f)| f.accounts_for >= ENOUGH)
            .collect();
        if fits.len() * 2 <= lines.len() || fits.is_empty() {
            continue;
        }
        let words = line_words(family, which, &fits);
        let blocks = p.k_blocks();
        // For the picture: the largest deviation of any line in each block.
        let largest = |b: usize| {
            let of = fits.iter().map(|f| f.1.coefficients[b]);
            of.max_by(|x, y| x.abs().total_cmp(&y.abs())).expect("some line")
        };
        let accounts_for = fits.iter().map(|f| f.1.accounts_for).sum::<f64>() / fits.len() as f64;
        let coefficients = (0..blocks).map(largest).collect();
        let errors = vec![0.0; blocks];
        return Some((Fit { coefficients, errors, accounts_for }, words));
    }
    None
}

/// Fits of single rows within the columns that share b's scales: whose scales is each tile's
/// product made of, where both may be another's?
fn by_tiles(family: &GemmFamily, differing: &[usize]) -> Option<(Fit, String)> {
    let p = &family.problem;
    let (a, b) = (&p.a, &p.b);
    if !p.is_fp8() || !p.counts.is_empty() || a.scale_columns < 2 || b.scale_columns < 2 {
        return None;
    }
    let width = b.block[0].min(p.n);
    let mut patches: Vec<(usize, usize)> = spread(differing.len(), 64)
        .map(|i| (differing[i] / p.n, differing[i] % p.n / width))
        .collect();
    patches.sort_unstable();
    patches.dedup();
    let patches: Vec<(usize, usize)> = spread(patches.len(), PATCHES).map(|i| patches[i]).collect();
    let columns = |j: usize| j * width..((j + 1) * width).min(p.n);
    let places = |&(i, j): &(usize, usize)| columns(j).map(move |c| i * p.n + c);
    let chosen: Vec<usize> = patches.iter().flat_map(places).collect();
    let whole: Vec<usize> = (0..p.k_blocks()).collect();
    let all = equations(family, &chosen, 128, &whole)?;
    let (mut words, mut last) = (Vec::new(), None);
    for &(i, j) in &patches {
        let fit = all.fit(|(r, c)| r == i && columns(j).contains(&c))?;
        if fit.accounts_for < ENOUGH {
            return None;
        }
        let (r, s) = scales_taken(family, (i, j), &fit)?;
        words.push(format!(
            "row {i} in columns {}..={} takes row {r} of a_scale and row {s} of b_scale",
            columns(j).start,
            columns(j).end - 1
        ));
        last = Some(fit);
    }
    words.truncate(4);
    let words = format!(
        "in all K blocks the scales used, tile by tile, are those of another place: {}",
        words.join("; ")
    );
    Some((last?, words))
}

/// The rows of a's and b's scales whose products a patch's fit has in every K block, if just one
/// pair of rows has.
fn scales_taken(family: &GemmFamily, (i, j): (usize, usize), fit: &Fit) -> Option<(usize, usize)> {
    let (a, b) = (&family.problem.a, &family.problem.b);
    let at = |x: &Operand, row: usize, block: usize| {
        let column = (block * 128 / x.block[1]).min(x.scale_columns - 1);
        f64::from(x.scales[row * x.scale_columns + column])
    };
    let own = ((i / a.block[0]).min(a.scale_rows - 1), j.min(b.scale_rows - 1));
    let is = |(r, s): (usize, usize)| {
        fit.coefficients.iter().zip(&fit.errors).enumerate().all(|(block, (c, error))| {
            let right = at(a, own.0, block) * at(b, own.1, block);
            let ratio = at(a, r, block) * at(b, s, block) / right;
            (ratio - (1.0 + c)).abs() < 0.005 * (1.0 + c).abs() + OUTSTANDING * error + 1e-4
        })
    };
    let pairs = (0..a.scale_rows).flat_map(|r| (0..b.scale_rows).map(move |s| (r, s)));
    let mut found = pairs.filter(|pair| is(*pair));
    found.next().filter(|_| found.next().is_none())
}

/// Whether every line takes the scales of one other row of scales, in all K blocks: which.
fn other_rows(x: &Operand, name: &str, line: &str, fits: &[(usize, Fit)]) -> Option<String> {
    if x.scale_columns < 2 {
        return None;
    }
    let at = |r: usize, c: usize| f64::from(x.scales[r * x.scale_columns + c]);
    let taken = |(l, fit): &(usize, Fit)| -> Option<(usize, usize)> {
        let row = (l / x.block[0]).min(x.scale_rows - 1);
        let fits_in = |r: usize| {
            fit.coefficients.iter().zip(&fit.errors).enumerate().all(|(b, (c, error))| {
                let column = (b * 128 / x.block[1]).min(x.scale_columns - 1);
                let ratio = at(r, column) / at(row, column);
                (ratio - (1.0 + c)).abs() < 0.005 * (1.0 + c).abs() + OUTSTANDING * error + 1e-4
            })
        };
        let mut all = (0..x.scale_rows).filter(|&r| r != row && fits_in(r));
        // Rows with the same scales tell nothing.
        all.next().filter(|_| all.next().is_none()).map(|r| (row, r))
    };
    let mut rows = fits.iter().map(taken).collect::<Option<Vec<_>>>()?;
    rows.dedup();
    let shown: Vec<String> =
        rows.iter().take(4).map(|(row, r)| format!("row {row} of it takes row {r}")).collect();
    let same = rows.iter().all(|r| r.1 == rows[0].1);
    let how = if same && rows.len() > 1 {
        format!("row {} of it stands for all", rows[0].1)
    } else {
        shown.join(", ")
    };
    Some(format!(
        "in all K blocks the {name} used, {line} by {line}, is that of another row, as if its rows \
         were in another order: {how}"
    ))
}

/// What differs from row to row (or column to column) is a scale: whose?
fn line_words(family: &GemmFamily, which: usize, fits: &[(usize, Fit)]) -> String {
    let p = &family.problem;
    let (x, name, line) =
        if which == 0 { (&p.a, "a_scale", "row") } else { (&p.b, "b_scale", "column") };
    if let Some(words) = other_rows(x, name, line, fits) {
        return words;
    }
    let mut votes: std::collections::BTreeMap<(usize, String), usize> = Default::default();
    let mut off = std::collections::BTreeSet::new();
    for (l, fit) in fits {
        let row = (l / x.block[0]).min(x.scale_rows - 1);
        for (b, c) in fit.coefficients.iter().enumerate().filter(|(_, c)| c.abs() > NOTICED) {
            off.insert(b);
            let column = (b * 128 / x.block[1]).min(x.scale_columns - 1);
            let at = |r: usize, c: usize| f64::from(x.scales[r * x.scale_columns + c]);
            let used = at(row, column) * (1.0 + c);
            let tolerance = 0.01 + 0.005 / (1.0 + c).abs().max(0.05);
            let is = |r: usize, c: usize| (at(r, c) / used - 1.0).abs() < tolerance;
            let same_row = (0..x.scale_columns).filter(|&c| c != column && is(row, c));
            for c in same_row {
                *votes
                    .entry((b, format!("that of K block {}", c * x.block[1] / 128)))
                    .or_default() += 1;
            }
            for by in [-1isize, 1] {
                let other = row.saturating_add_signed(by);
                if other != row && other < x.scale_rows && is(other, column) {
                    let side = if by < 0 { "the one before" } else { "the next" };
                    *votes.entry((b, format!("that of {side} of its rows"))).or_default() += 1;
                }
            }
            if (used - 1.0).abs() < tolerance {
                *votes.entry((b, "1".to_owned())).or_default() += 1;
            }
        }
    }
    let mut words = Vec::new();
    for &b in off.iter().take(4) {
        let best = votes.iter().filter(|((block, _), _)| *block == b).max_by_key(|v| v.1);
        words.push(match best {
            Some(((_, what), &n)) if n * 2 > fits.len() => {
                format!("in {} the {name} used is {what}", span(b, p.k))
            }
            _ => format!("in {} the {name} used is another, {line} by {line}", span(b, p.k)),
        });
    }
    if off.len() > 4 {
        words.push(format!("{} further K blocks are off", off.len() - 4));
    }
    words.join("; ")
}
