//! Hypotheses as tables: a row says what a kernel does otherwise than the contract, in words and as
//! a change of the op's settings.
//!
//! A family of hypotheses (one per op, or for a few) has a `Variant`: everything about the op that
//! may deviate, as plain data. A [`Row`] changes one field of it. To add a hypothesis, copy a row;
//! where no field of the variant fits, add one and read it where the family evaluates.

use fathom_reference::Tensor;
use serde::Serialize;

/// The axis of hypotheses about the output as a whole.
pub const OUTPUT: &str = "the output";

/// One kind of deviation, possibly with a parameter: a row of a family's table.
pub struct Row<C: 'static, V: 'static> {
    /// What the deviation is about; two deviations of one axis are never combined.
    pub axis: &'static str,
    /// Short name, which reads well alone; each `{}` stands for a part of the parameter.
    pub name: &'static str,
    /// One sentence: what such a kernel does.
    pub meaning: &'static str,
    /// Where public code did that, as repository and number; empty where none is known to us.
    pub seen: &'static str,
    /// The changes that the row stands for in a given case; none where it makes no sense there.
    pub changes: fn(&C) -> Vec<Change<V>>,
}

/// What a row does to the settings, for one value of its parameter.
pub struct Change<V> {
    parameter: String,
    set: Box<dyn Fn(&mut V) + Send + Sync>,
}

/// The changes of a row without a parameter: one, by `set`.
pub fn one<V: 'static>(set: fn(&mut V)) -> Vec<Change<V>> {
    vec![Change { parameter: String::new(), set: Box::new(set) }]
}

/// The changes of a row without a parameter that makes sense only in some cases: one, or none.
pub fn one_if<V: 'static>(sense: bool, set: fn(&mut V)) -> Vec<Change<V>> {
    if sense { one(set) } else { Vec::new() }
}

/// The changes of a row with a parameter: one for each value that makes sense.
pub fn each<V: 'static, P>(
    parameters: impl IntoIterator<Item = P>,
    set: fn(&mut V, P),
) -> Vec<Change<V>>
where
    P: std::fmt::Display + Clone + Send + Sync + 'static,
{
    let change = |p: P| Change {
        parameter: p.to_string(),
        set: Box::new(move |v: &mut V| set(v, p.clone())) as Box<dyn Fn(&mut V) + Send + Sync>,
    };
    parameters.into_iter().map(change).collect()
}

/// A row of a table with its parameter filled in.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Hypothesis {
    /// What the deviation is about, as [`Row::axis`].
    #[serde(skip)]
    pub axis: &'static str,
    /// Short name, as [`Row::name`] with the parameter in its place.
    pub name: String,
    /// What such a kernel does, as [`Row::meaning`].
    pub meaning: &'static str,
    /// Where public code did that, as [`Row::seen`].
    pub seen: &'static str,
}

/// The rows of a table that make sense for a case, and what is given.
pub struct Expanded<V> {
    /// The hypotheses, in the order of the table.
    pub hypotheses: Vec<Hypothesis>,
    changes: Vec<Change<V>>,
    given: V,
}

impl<V: Clone + PartialEq> Expanded<V> {
    /// Expands a table for a case; what the case states already, or an earlier row does, is left
    /// out.
    pub fn new<'a, C: 'static>(
        rows: impl IntoIterator<Item = &'a Row<C, V>>,
        case: &C,
        given: V,
    ) -> Expanded<V>
    where
        V: 'static,
    {
        let mut all = Expanded { hypotheses: Vec::new(), changes: Vec::new(), given };
        let mut seen = vec![all.given.clone()];
        for row in rows {
            for change in (row.changes)(case) {
                let mut variant = all.given.clone();
                (change.set)(&mut variant);
                if seen.contains(&variant) {
                    continue;
                }
                seen.push(variant);
                // Parts of a parameter are separated by a bar.
                let parts = change.parameter.split('|');
                let name = parts.fold(row.name.to_owned(), |name, p| name.replacen("{}", p, 1));
                all.hypotheses.push(Hypothesis {
                    axis: row.axis,
                    name,
                    meaning: row.meaning,
                    seen: row.seen,
                });
                all.changes.push(change);
            }
        }
        all
    }

    /// The settings of the case with the chosen hypotheses, by their place in the list.
    pub fn variant(&self, chosen: &[usize]) -> V {
        let mut variant = self.given.clone();
        chosen.iter().for_each(|&c| (self.changes[c].set)(&mut variant));
        variant
    }
}

/// Elements of the outputs (row-major, outputs one after the other) on which variants are compared.
pub struct Sample {
    /// Tells samples apart, for caches.
    pub id: usize,
    /// Numbers of the elements, ascending.
    pub elements: Vec<usize>,
}

/// The hypotheses about one case, and the outputs that follow from them.
pub trait Family: Sync {
    /// All hypotheses about the case.
    fn hypotheses(&self) -> &[Hypothesis];

    /// The outputs' bits at the sampled elements under the chosen hypotheses (none: as given);
    /// `None` where the choice is not defined for this case.
    fn evaluate(&self, chosen: &[usize], sample: &Sample) -> Option<Vec<u64>>;

    /// Multiply-adds that one element costs, for the budget.
    fn cost_per_element(&self) -> u64;

    /// Elements to look at: about `count`, as many of the differing ones as fit half of that.
    fn choose(&self, differing: &[usize], all: usize, count: usize) -> Vec<usize> {
        let mut chosen: Vec<usize> =
            spread(differing.len(), count / 2).map(|i| differing[i]).collect();
        chosen.extend(spread(all, count.saturating_sub(chosen.len())));
        chosen
    }

    /// Where along K the difference arises, where the op has a K: see [`KBlocks`].
    fn along_k(&self, _file: &[u64], _contract: &[u64], _differing: &[usize]) -> Option<KBlocks> {
        None
    }

    /// A cause that follows from where the differing elements lie, whatever they hold; and where.
    fn by_place(&self, _differing: &[usize]) -> Option<(Hypothesis, String)> {
        None
    }
}

/// `count` of the numbers below `n`, evenly spread.
pub fn spread(n: usize, count: usize) -> impl Iterator<Item = usize> {
    let count = count.min(n);
    (0..count).map(move |i| i * n / count)
}

/// The share of each K block in the difference between the file's output and the contract's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KBlocks {
    /// Elements of K in a block.
    pub block: usize,
    /// What the file holds of each block's contribution beyond the contract's: -1 missing, +1
    /// twice, another number for a scale of that factor too much; 0 as it should be.
    pub coefficients: Vec<f64>,
    /// The blocks that are off.
    pub off: Vec<usize>,
    /// Share of the difference's square that these coefficients account for, up to 1.
    pub accounts_for: f64,
    /// The finding in words.
    pub words: String,
}

/// Bits of a tensor's elements as numbers; NaN where the element type has no numbers.
pub fn values(x: &Tensor) -> Vec<f32> {
    let value = |i| crate::compare::value(x.dtype(), x.bits(i)).unwrap_or(f64::NAN) as f32;
    (0..x.len()).map(value).collect()
}

/// Elements of a few whole rows: of some differing elements' rows, and others evenly spread. The
/// first `rows_end` elements are a matrix of that width; one element a row follows.
pub fn whole_rows(
    differing: &[usize],
    all: usize,
    width: usize,
    rows_end: usize,
    count: usize,
) -> Vec<usize> {
    let row = |e: usize| if e < rows_end { e / width } else { e - rows_end };
    let rows = (rows_end / width).max(all - rows_end);
    let wanted = (count / width.min(512)).clamp(8, 512).min(rows);
    let mut chosen: Vec<usize> =
        spread(differing.len(), wanted / 2).map(|i| row(differing[i])).collect();
    chosen.sort_unstable();
    chosen.dedup();
    let missing = wanted - chosen.len();
    chosen.extend(spread(rows, missing));
    chosen.sort_unstable();
    chosen.dedup();
    let columns: Vec<usize> = spread(width, 512).collect();
    let of = |r: usize| columns.iter().map(move |c| r * width + c).filter(|e| *e < rows_end);
    let elements = chosen.iter().flat_map(|&r| of(r));
    let kept = chosen.iter().map(|r| rows_end + r).filter(|e| *e < all);
    // The differing elements themselves, which the spread of columns may miss.
    let own = spread(differing.len(), count / 8).map(|i| differing[i]);
    elements.chain(kept).chain(own).collect()
}
