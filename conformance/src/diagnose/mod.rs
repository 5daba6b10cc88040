//! Which arithmetic produced this output?
//!
//! A [`Family`] lists, for one op, the axes along which kernels deviate from the contract and, an
//! axis, the alternatives. The search recomputes the output with every single deviation, then with
//! every pair among those that helped, and ranks them by the elements that agree. Where nothing
//! explains all elements, [`localise`] says where the others lie.
//!
//! To add a hypothesis: add an alternative to an axis in `gemm.rs`, `mma.rs` or `quantize.rs`.

mod gemm;
pub mod localise;
mod mma;
mod page;
mod quantize;

use fathom_reference::ops::gemm_fp8::GemmFp8;
use fathom_reference::ops::mma::Mma;
use fathom_reference::ops::quantize::{QuantizeBlock, QuantizeTile};
use fathom_reference::{EngineError, Op, Tensor};
use fathom_trace::DType;
use rayon::prelude::*;
use serde::Serialize;

use crate::case_file::{CaseFile, OUT};
use crate::compare;
use localise::Region;
pub use page::page;

/// One way in which kernels deviate: alternatives besides what the case file states.
pub struct Axis {
    /// What varies: `promotion interval`.
    pub name: &'static str,
    /// The deviations, named so that they read well alone: `promotion interval 64`.
    pub alternatives: Vec<String>,
}

/// The hypotheses about one case: a choice is an alternative (or none) for each axis.
pub trait Family: Sync {
    /// The axes, in order.
    fn axes(&self) -> &[Axis];

    /// The output's bits at the given elements (row-major, outputs one after the other); `None`
    /// where the choice is not defined for this case. `choice` has an entry an axis.
    fn evaluate(&self, choice: &[Option<usize>], elements: &[usize]) -> Option<Vec<u64>>;

    /// Multiply-adds that one element costs, for the budget.
    fn cost_per_element(&self) -> u64;
}

/// A hypothesis and how far it agrees.
#[derive(Clone, Debug, Serialize)]
pub struct Ranked {
    /// The deviations from the case file's parameters; empty: as given.
    pub deviations: Vec<String>,
    /// Elements examined that agree.
    pub agree: usize,
    /// Of the elements that disagree with the parameters as given, those that agree with this.
    pub agree_of_mismatched: usize,
    #[serde(skip)]
    choice: Vec<Option<usize>>,
}

impl Ranked {
    /// The deviations in words.
    pub fn words(&self) -> String {
        match &self.deviations[..] {
            [] => "the parameters as given".to_owned(),
            deviations => format!("{}, the rest as given", deviations.join(" and ")),
        }
    }
}

/// What was found about a case file's expected output.
#[derive(Debug, Serialize)]
pub struct Diagnosis {
    /// The op.
    pub op: String,
    /// Expected elements in the file.
    pub elements: usize,
    /// Elements on which hypotheses were compared; fewer than all where all would take too long.
    pub examined: usize,
    /// Elements, of all, that differ from the contract's output.
    pub mismatches: usize,
    /// The answer in one sentence.
    pub verdict: String,
    /// Whether a hypothesis agrees with every element examined.
    pub explained: bool,
    /// Hypotheses, the best first.
    pub hypotheses: Vec<Ranked>,
    /// Hypotheses tried.
    pub tried: usize,
    /// Where the elements lie that differ from the contract's output; `None` where all agree.
    pub region: Option<Region>,
    /// Distances of the differing elements: `(largest ulp of the bucket, elements)`.
    pub ulp_histogram: Vec<(u64, usize)>,
    /// The differing elements of the (first) output, for a picture.
    #[serde(skip)]
    pub map: Map,
}

/// Which elements of a matrix differ.
#[derive(Debug, Default)]
pub struct Map {
    /// Name of the tensor.
    pub tensor: String,
    /// Rows; leading dimensions folded.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// Row-major, whether the element differs.
    pub differs: Vec<bool>,
}

/// Why a case cannot be diagnosed.
#[derive(Debug, thiserror::Error)]
pub enum DiagnoseError {
    /// The file holds no expected output.
    #[error("expected an output tensor ('out.<role>') to explain, found none")]
    NothingExpected,
    /// No family of hypotheses exists for the op.
    #[error(
        "no hypotheses for op '{0}'; there are some for gemm_fp8, mma, quantize_block, \
             quantize_tile. `fathom check` compares any op"
    )]
    Op(String),
    /// The reference could not compute the case.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Multiply-adds that one hypothesis may cost while the search is on.
const SCREENING_BUDGET: u64 = 1 << 19;
/// Multiply-adds that the final count of one of the best hypotheses may cost.
const CONFIRMING_BUDGET: u64 = 1 << 26;
/// Single deviations that are combined into pairs, and hypotheses that are reported.
const BEST: usize = 12;
/// Hypotheses that are counted on more elements than the screening's.
const CONFIRMED: usize = 4;

/// Finds the arithmetic behind a case file's expected outputs; `progress` is called with the
/// number of hypotheses tried so far.
///
/// # Errors
/// [`DiagnoseError`] where there is nothing to explain or no hypothesis for the op.
pub fn diagnose(
    file: &CaseFile,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Diagnosis, DiagnoseError> {
    use fathom_reference::{Engine, ops::ReferenceEngine};
    if file.expected.is_empty() {
        return Err(DiagnoseError::NothingExpected);
    }
    let any = file.case.op.as_any();
    let family: Box<dyn Family> = if let Some(op) = any.downcast_ref::<GemmFp8>() {
        Box::new(gemm::GemmFamily::new(op, &file.case))
    } else if let Some(op) = any.downcast_ref::<Mma>() {
        Box::new(mma::MmaFamily::new(op, &file.case))
    } else if let Some(op) = any.downcast_ref::<QuantizeTile>() {
        Box::new(quantize::QuantizeFamily::tile(op, file))
    } else if let Some(op) = any.downcast_ref::<QuantizeBlock>() {
        Box::new(quantize::QuantizeFamily::block(op, file))
    } else {
        return Err(DiagnoseError::Op(file.case.op.name().to_owned()));
    };

    // Expected and contract's outputs, one after the other in the order of the op's roles.
    let outputs = ReferenceEngine.run(&file.case)?;
    let roles = file.case.op.outputs().iter().filter(|r| file.expected.contains_key(**r));
    let pairs: Vec<(&str, &Tensor, &Tensor)> =
        roles.map(|r| (*r, &file.expected[*r], &outputs[*r])).collect();
    let bits = |pick: fn(&(&str, &Tensor, &Tensor)) -> Tensor| -> Vec<u64> {
        pairs
            .iter()
            .flat_map(|p| {
                let t = pick(p);
                (0..t.len()).map(move |i| t.bits(i))
            })
            .collect()
    };
    let expected = bits(|p| p.1.clone());
    let contract = bits(|p| p.2.clone());
    let differing: Vec<usize> =
        (0..expected.len()).filter(|&i| expected[i] != contract[i]).collect();

    let search = Search { family: &*family, expected: &expected, contract: &contract, progress };
    let (hypotheses, examined, tried) = search.run(&differing);
    let (role, first_expected, first_contract) = pairs[0];
    let map = map(role, first_expected, first_contract);
    let region = Region::of(&map);
    let explained = hypotheses[0].agree == examined;
    Ok(Diagnosis {
        op: file.case.op.name().to_owned(),
        elements: expected.len(),
        examined,
        mismatches: differing.len(),
        verdict: verdict(&hypotheses, examined, expected.len(), differing.len(), region.as_ref()),
        explained,
        hypotheses,
        tried,
        region,
        ulp_histogram: histogram(&pairs),
        map,
    })
}

struct Search<'a> {
    family: &'a dyn Family,
    expected: &'a [u64],
    contract: &'a [u64],
    progress: &'a (dyn Fn(usize) + Sync),
}

impl Search<'_> {
    /// Singles on a sample, pairs of the best on the sample, the best of all on many elements.
    fn run(&self, differing: &[usize]) -> (Vec<Ranked>, usize, usize) {
        let axes = self.family.axes();
        let none = vec![None; axes.len()];
        let mut choices = vec![none.clone()];
        for (axis, alternatives) in axes.iter().enumerate() {
            for alternative in 0..alternatives.alternatives.len() {
                let mut choice = none.clone();
                choice[axis] = Some(alternative);
                choices.push(choice);
            }
        }
        let sample = self.sample(differing, SCREENING_BUDGET);
        let mut ranked = self.rank(&choices, &sample, 0);
        let mut tried = choices.len();
        let explained = |r: &[Ranked], of: usize| r[0].agree == of;
        if !explained(&ranked, sample.len()) {
            let pairs = self.pairs(&ranked, &choices);
            tried += pairs.len();
            ranked.extend(self.rank(&pairs, &sample, choices.len()));
            sort(&mut ranked);
        }
        let given = ranked.iter().position(|r| r.deviations.is_empty()).expect("always tried");
        if given >= BEST {
            ranked.swap(given, BEST - 1);
        }
        ranked.truncate(BEST);
        let many = self.sample(differing, CONFIRMING_BUDGET);
        if many.len() > sample.len() {
            // The parameters as given stay in the list: their misses are the yardstick.
            let best = ranked.iter().take(CONFIRMED).map(|r| r.choice.clone());
            let best: Vec<_> = best.filter(|c| *c != none).chain([none.clone()]).collect();
            ranked = self.rank(&best, &many, tried);
            return (ranked, many.len(), tried);
        }
        (ranked, sample.len(), tried)
    }

    /// The best singles, each combined with every alternative of the other axes.
    fn pairs(&self, ranked: &[Ranked], singles: &[Vec<Option<usize>>]) -> Vec<Vec<Option<usize>>> {
        let mut pairs = Vec::new();
        let chosen = |c: &[Option<usize>]| c.iter().position(Option::is_some);
        for best in ranked.iter().filter(|r| !r.deviations.is_empty()).take(BEST) {
            let at = chosen(&best.choice).expect("one deviation");
            for single in singles {
                let Some(other) = chosen(single) else { continue };
                if other == at {
                    continue;
                }
                let mut pair = best.choice.clone();
                pair[other] = single[other];
                if !pairs.contains(&pair) {
                    pairs.push(pair);
                }
            }
        }
        pairs
    }

    fn rank(
        &self,
        choices: &[Vec<Option<usize>>],
        elements: &[usize],
        before: usize,
    ) -> Vec<Ranked> {
        let done = std::sync::atomic::AtomicUsize::new(before);
        let mut ranked: Vec<Ranked> = choices
            .par_iter()
            .filter_map(|choice| {
                let bits = self.family.evaluate(choice, elements);
                let done = done.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                (self.progress)(done + 1);
                let bits = bits?;
                let mut agree = 0;
                let mut agree_of_mismatched = 0;
                for (&element, &bits) in elements.iter().zip(&bits) {
                    let same = bits == self.expected[element];
                    agree += usize::from(same);
                    let mismatched = self.expected[element] != self.contract[element];
                    agree_of_mismatched += usize::from(same && mismatched);
                }
                let named =
                    |(axis, &c): (&Axis, &Option<usize>)| c.map(|c| axis.alternatives[c].clone());
                let deviations = self.family.axes().iter().zip(choice).filter_map(named).collect();
                Some(Ranked { deviations, agree, agree_of_mismatched, choice: choice.clone() })
            })
            .collect();
        sort(&mut ranked);
        ranked
    }

    /// Elements to look at within a budget: half of them differing, the rest spread evenly.
    fn sample(&self, differing: &[usize], budget: u64) -> Vec<usize> {
        let all = self.expected.len();
        let count = (budget / self.family.cost_per_element().max(1)).max(256) as usize;
        if count >= all {
            return (0..all).collect();
        }
        let spread = |n: usize, count: usize| (0..count.min(n)).map(move |i| i * n / count.min(n));
        let mut sample: Vec<usize> =
            spread(differing.len(), count / 2).map(|i| differing[i]).collect();
        sample.extend(spread(all, count - sample.len()));
        sample.sort_unstable();
        sample.dedup();
        sample
    }
}

/// The most agreement first; among equals the fewest deviations, then the order of the axes.
fn sort(ranked: &mut [Ranked]) {
    ranked.sort_by_key(|r| (std::cmp::Reverse(r.agree), r.deviations.len()));
}

fn verdict(
    ranked: &[Ranked],
    examined: usize,
    elements: usize,
    mismatches: usize,
    region: Option<&Region>,
) -> String {
    let best = &ranked[0];
    let sampled = if examined < elements {
        format!(" (of {} in the file; the others were not examined)", grouped(elements))
    } else {
        String::new()
    };
    if best.agree == examined {
        let like: Vec<_> = ranked[1..]
            .iter()
            .filter(|r| r.agree == examined && r.deviations.len() == best.deviations.len())
            .map(|r| r.deviations.join(" and "))
            .collect();
        let also = match &like[..] {
            [] => String::new(),
            like => format!("; on this input the same bits as: {}", like.join("; ")),
        };
        return format!(
            "all {} elements{sampled} agree with: {}{also}",
            grouped(examined),
            best.words()
        );
    }
    let place = region.map_or(String::new(), |r| format!("; the differing elements {}", r.words()));
    let by_region = ranked
        .iter()
        .max_by_key(|r| (r.agree_of_mismatched, std::cmp::Reverse(r.deviations.len())));
    let examined_mismatched =
        examined - ranked.iter().find(|r| r.deviations.is_empty()).map_or(0, |r| r.agree);
    if let Some(part) = by_region
        && examined_mismatched > 0
        && part.agree_of_mismatched == examined_mismatched
    {
        return format!(
            "the {} differing elements{sampled} agree with: {}; the others with the parameters as \
             given{place}",
            grouped(examined_mismatched),
            part.words()
        );
    }
    format!(
        "no hypothesis explains all {} elements{sampled}: {} differ from the contract; nearest is {} \
         with {} agreeing{place}",
        grouped(examined),
        grouped(mismatches),
        best.words(),
        grouped(best.agree)
    )
}

/// A number with thousands separators.
pub fn grouped(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

fn map(role: &str, expected: &Tensor, contract: &Tensor) -> Map {
    let (rows, columns) = match expected.shape() {
        [] => (1, 1),
        _ => expected.rows_columns(),
    };
    let differs = (0..expected.len()).map(|i| expected.bits(i) != contract.bits(i)).collect();
    Map { tensor: format!("{OUT}{role}"), rows, columns, differs }
}

/// Differing elements by distance, in buckets of powers of two.
fn histogram(pairs: &[(&str, &Tensor, &Tensor)]) -> Vec<(u64, usize)> {
    let mut buckets = std::collections::BTreeMap::new();
    for (_, expected, contract) in pairs {
        let dtype: DType = expected.dtype();
        for i in 0..expected.len() {
            let distance = compare::ulp_distance(dtype, expected.bits(i), contract.bits(i));
            if distance > 0 {
                let bucket = distance.checked_next_power_of_two().unwrap_or(u64::MAX);
                *buckets.entry(bucket).or_insert(0) += 1;
            }
        }
    }
    buckets.into_iter().collect()
}

/// Builds an axis while dropping alternatives that are what the case file already states.
fn axis<T: PartialEq>(
    name: &'static str,
    given: &T,
    alternatives: Vec<(String, T)>,
) -> (Axis, Vec<T>) {
    let (names, values) = alternatives.into_iter().filter(|(_, v)| v != given).unzip();
    (Axis { name, alternatives: names }, values)
}

/// The value that a choice picks on an axis, else what is given.
fn pick<T: Copy>(values: &[T], choice: Option<usize>, given: T) -> T {
    choice.map_or(given, |c| values[c])
}

/// The name of an op that has hypotheses.
pub const OPS: [&str; 4] = [GemmFp8::NAME, Mma::NAME, QuantizeBlock::NAME, QuantizeTile::NAME];
