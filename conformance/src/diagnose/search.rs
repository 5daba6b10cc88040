//! The search: every hypothesis on a sample, pairs of the best, the best of all on many elements.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use fathom_trace::DType;
use rayon::prelude::*;
use serde::Serialize;

use super::hypothesis::{Family, Hypothesis, OUTPUT, Sample, spread};
use crate::compare;

/// What one hypothesis may cost in a stage of the search: multiply-adds, and elements.
struct Budget {
    products: u64,
    elements: u64,
}
const PAIRING: Budget = Budget { products: 1 << 19, elements: 256 };
const SCREENING: Budget = Budget { products: 1 << 23, elements: 4096 };
const CONFIRMING: Budget = Budget { products: 1 << 26, elements: 1 << 16 };
/// Single deviations that are combined into pairs: the best by agreement, and by distance.
const PAIRED: (usize, usize) = (8, 6);
/// Hypotheses that are reported.
const BEST: usize = 12;
/// Hypotheses that are counted on more elements than the screening's.
const CONFIRMED: usize = 8;
/// How likely an agreement may be by chance and still be offered as a lead.
const BY_CHANCE: f64 = 1e-3;
/// The least share of the differing elements, beyond chance, that a lead agrees with.
const LEAST_EXCESS: f64 = 0.2;

/// A hypothesis, or two at once, and how far it agrees.
#[derive(Clone, Debug, Serialize)]
pub struct Ranked {
    /// Names of the deviations from the case file's parameters; empty: as given.
    pub deviations: Vec<String>,
    /// What the deviations mean and where they were seen.
    pub hypotheses: Vec<Hypothesis>,
    /// Elements examined that agree with the file's.
    pub agree: usize,
    /// Of the elements that disagree with the parameters as given, those that agree with this.
    pub agree_of_mismatched: usize,
    /// Share of those that would agree if its deviations fell on them at random.
    pub chance: f64,
    #[serde(skip)]
    distance: f64,
    #[serde(skip)]
    choice: Choice,
}

/// A family's number and its hypotheses' numbers.
#[derive(Clone, Debug, PartialEq)]
struct Choice {
    family: usize,
    chosen: Vec<usize>,
}

impl Ranked {
    /// The deviations in words.
    pub fn words(&self) -> String {
        match &self.deviations[..] {
            [] => "the parameters as given".to_owned(),
            // What stands in the output whatever the op computes leaves nothing as given.
            [one] if self.hypotheses[0].axis == OUTPUT => one.clone(),
            deviations => format!("{}, the rest as given", deviations.join(" and ")),
        }
    }

    /// Whether so many of the differing elements would hardly agree by chance, for the best of
    /// `tried` hypotheses: the Chernoff bound of the binomial tail.
    pub fn beyond_chance(&self, mismatched: usize, tried: usize) -> bool {
        let n = mismatched as f64;
        let share = self.agree_of_mismatched as f64 / n;
        // Of few elements, chance cannot be measured below one in the pairs of them.
        let p = self.chance.max(0.5 / (n * (n - 1.0)).max(0.5));
        if mismatched < 2 || share <= p {
            return false;
        }
        let term = |x: f64, y: f64| if x > 0.0 { x * (x / y).ln() } else { 0.0 };
        let divergence = term(share, p) + term(1.0 - share, 1.0 - p);
        (tried as f64).ln() - n * divergence < BY_CHANCE.ln()
    }

    /// Whether it is worth following: beyond chance, and by much.
    pub fn is_lead(&self, mismatched: usize, tried: usize) -> bool {
        let share = self.agree_of_mismatched as f64 / mismatched.max(1) as f64;
        let excess = (share - self.chance) / (1.0 - self.chance).max(1e-9);
        excess >= LEAST_EXCESS && self.beyond_chance(mismatched, tried)
    }
}

/// What a search compares with.
pub(super) struct Search<'a> {
    /// The op's own hypotheses first, where it has some.
    pub(super) families: &'a [Box<dyn Family + 'a>],
    /// The file's and the contract's bits, outputs one after the other.
    pub(super) file: &'a [u64],
    pub(super) contract: &'a [u64],
    /// Number of elements and dtype of each output.
    pub(super) dtypes: Vec<(usize, DType)>,
    pub(super) progress: &'a (dyn Fn(usize) + Sync),
}

/// What a search found.
pub(super) struct Found {
    /// The best first.
    pub(super) ranked: Vec<Ranked>,
    pub(super) examined: usize,
    /// Of those, the ones that differ from the contract.
    pub(super) mismatched: usize,
    pub(super) tried: usize,
}

impl Search<'_> {
    pub(super) fn run(&self, differing: &[usize]) -> Found {
        let none = Choice { family: 0, chosen: Vec::new() };
        let mut singles = vec![none.clone()];
        for (family, f) in self.families.iter().enumerate() {
            let all = 0..f.hypotheses().len();
            singles.extend(all.map(|h| Choice { family, chosen: vec![h] }));
        }
        let sample = self.sample(0, differing, &SCREENING);
        let mismatched =
            |s: &Sample| s.elements.iter().filter(|&&e| self.file[e] != self.contract[e]).count();
        let of_sample = mismatched(&sample);
        let mut ranked = self.rank(&singles, &sample, 0);
        let mut tried = singles.len();
        let settled = |r: &[Ranked]| {
            r[0].agree == sample.elements.len()
                || r.iter().any(|r| {
                    r.agree_of_mismatched == of_sample && r.beyond_chance(of_sample, singles.len())
                })
        };
        if of_sample > 0 && !settled(&ranked) {
            let pairs = self.pairs(&ranked);
            let small = self.sample(1, differing, &PAIRING);
            let best = self.rank(&pairs, &small, tried);
            tried += pairs.len();
            let best: Vec<Choice> = best.into_iter().take(2 * BEST).map(|r| r.choice).collect();
            ranked.extend(self.rank(&best, &sample, tried));
            sort(&mut ranked);
        }
        keep_best(&mut ranked);
        let many = self.sample(2, differing, &CONFIRMING);
        if many.elements.len() > sample.elements.len() {
            // The parameters as given stay in the list: their misses are the yardstick.
            let best = ranked.iter().take(CONFIRMED).map(|r| r.choice.clone());
            let mut best: Vec<_> = best.filter(|c| *c != none).collect();
            let region = region_of(&ranked).map(|at| ranked[at].choice.clone());
            best.extend(region.filter(|c| *c != none && !best.contains(c)));
            best.push(none);
            ranked = self.rank(&best, &many, tried);
            let (examined, mismatched) = (many.elements.len(), mismatched(&many));
            return Found { ranked, examined, mismatched, tried };
        }
        Found { ranked, examined: sample.elements.len(), mismatched: of_sample, tried }
    }

    /// The best singles of the op's own family, each with every hypothesis of another axis.
    fn pairs(&self, ranked: &[Ranked]) -> Vec<Choice> {
        let hypotheses = self.families[0].hypotheses();
        let own = || ranked.iter().filter(|r| r.choice.family == 0 && r.choice.chosen.len() == 1);
        let mut near: Vec<&Ranked> = own().collect();
        near.sort_by(|x, y| x.distance.total_cmp(&y.distance));
        let best = own().take(PAIRED.0).chain(near.into_iter().take(PAIRED.1));
        let mut pairs = std::collections::BTreeSet::new();
        for at in best.map(|r| r.choice.chosen[0]) {
            for other in 0..hypotheses.len() {
                if hypotheses[other].axis != hypotheses[at].axis {
                    pairs.insert((at.min(other), at.max(other)));
                }
            }
        }
        let choice = |(x, y)| Choice { family: 0, chosen: vec![x, y] };
        pairs.into_iter().map(choice).collect()
    }

    fn rank(&self, choices: &[Choice], sample: &Sample, before: usize) -> Vec<Ranked> {
        let done = AtomicUsize::new(before);
        let evaluate = |choice: &Choice| {
            let family = &self.families[choice.family];
            let bits = family.evaluate(&choice.chosen, sample);
            (self.progress)(done.fetch_add(1, Ordering::Relaxed) + 1);
            Some(self.compared(choice, &bits?, sample))
        };
        let mut ranked: Vec<Ranked> = choices.par_iter().filter_map(evaluate).collect();
        sort(&mut ranked);
        ranked
    }

    fn compared(&self, choice: &Choice, bits: &[u64], sample: &Sample) -> Ranked {
        let (mut agree, mut agree_of_mismatched, mut mismatched) = (0usize, 0usize, 0usize);
        let mut distance = 0.0;
        // How often each deviation from the contract occurs, in the file and in the hypothesis.
        let mut deviations: HashMap<i128, (usize, usize)> = HashMap::new();
        for (&e, &bits) in sample.elements.iter().zip(bits) {
            let (file, contract, dtype) = (self.file[e], self.contract[e], self.dtype(e));
            // A NaN that the contract does not have may have any bits.
            let nan = |bits| compare::value(dtype, bits).is_some_and(f64::is_nan);
            let same = bits == file || (nan(bits) && nan(file) && !nan(contract));
            agree += usize::from(same);
            if !same {
                let ulp = compare::ulp_distance(dtype, bits, file);
                distance += (1.0 + ulp as f64).log2();
            }
            if file != contract {
                mismatched += 1;
                agree_of_mismatched += usize::from(same);
                let from = position(dtype, contract);
                deviations.entry(position(dtype, file) - from).or_default().0 += 1;
                deviations.entry(position(dtype, bits) - from).or_default().1 += 1;
            }
        }
        let pairs: usize = deviations.values().map(|(f, h)| f * h).sum();
        let others = (mismatched * mismatched.saturating_sub(1)) as f64;
        // Equal everywhere and by far, as NaN for zeros, they say nothing about chance.
        let constant = deviations.len() == 1 && deviations.keys().all(|d| d.unsigned_abs() > 2);
        let by_chance =
            if constant { 0.0 } else { pairs.saturating_sub(agree_of_mismatched) as f64 / others };
        let all = self.families[choice.family].hypotheses();
        let hypotheses: Vec<Hypothesis> = choice.chosen.iter().map(|&h| all[h].clone()).collect();
        Ranked {
            deviations: hypotheses.iter().map(|h| h.name.clone()).collect(),
            hypotheses,
            agree,
            agree_of_mismatched,
            chance: if mismatched < 2 { 1.0 } else { by_chance },
            distance,
            choice: choice.clone(),
        }
    }

    fn dtype(&self, mut element: usize) -> DType {
        for &(len, dtype) in &self.dtypes {
            if element < len {
                return dtype;
            }
            element -= len;
        }
        unreachable!("an element of some output")
    }

    fn sample(&self, id: usize, differing: &[usize], budget: &Budget) -> Sample {
        let all = self.file.len();
        let cost = self.families[0].cost_per_element().max(1);
        let count = (budget.products / cost).clamp(64, budget.elements) as usize;
        let mut elements = if count >= all {
            (0..all).collect()
        } else {
            self.families[0].choose(differing, all, count)
        };
        // The first of the differing ones are always looked at, so that no few are overlooked.
        if count < all && differing.len() <= 8 {
            elements.extend(spread(differing.len(), 8).map(|i| differing[i]));
        }
        elements.sort_unstable();
        elements.dedup();
        Sample { id, elements }
    }
}

/// Where a code lies on the number line, every NaN in one place; codes of no number by their bits.
fn position(dtype: DType, bits: u64) -> i128 {
    if compare::value(dtype, bits).is_some_and(f64::is_nan) {
        return 1 << 64;
    }
    let width = 8 * dtype.size() as u32;
    let magnitude = i128::from(bits & ((1 << (width - 1)) - 1));
    if bits >> (width - 1) == 1 { -1 - magnitude } else { magnitude }
}

/// The hypothesis that agrees with the most differing elements; of equals one about the output as a
/// whole, which says less of the op, else the first.
fn region_of(ranked: &[Ranked]) -> Option<usize> {
    let most = ranked.iter().map(|r| r.agree_of_mismatched).max()?;
    let equal = |r: &&Ranked| r.agree_of_mismatched == most;
    let of_output = |r: &Ranked| r.hypotheses.first().is_some_and(|h| h.axis == OUTPUT);
    let found = ranked.iter().position(|r| equal(&r) && of_output(r));
    found.or_else(|| ranked.iter().position(|r| equal(&r)))
}

/// Keeps the best, among them the one with the most differing elements, and the parameters as
/// given.
fn keep_best(ranked: &mut Vec<Ranked>) {
    // A pair that does no better than one of its two says nothing more.
    let singles: Vec<(Choice, usize)> = ranked
        .iter()
        .filter(|r| r.choice.chosen.len() == 1)
        .map(|r| (r.choice.clone(), r.agree))
        .collect();
    ranked.retain(|r| {
        let part = |s: &(Choice, usize)| {
            s.0.family == r.choice.family && r.choice.chosen.contains(&s.0.chosen[0])
        };
        r.choice.chosen.len() < 2 || singles.iter().all(|s| !part(s) || s.1 < r.agree)
    });
    let region = region_of(ranked).expect("some are tried");
    let given = ranked.iter().position(|r| r.deviations.is_empty()).expect("always tried");
    let mut number = 0;
    ranked.retain(|_| {
        number += 1;
        number <= BEST - 2 || number - 1 == region || number - 1 == given
    });
}

/// The most agreement first; among equals the fewest deviations, then the order of the tables.
fn sort(ranked: &mut [Ranked]) {
    ranked.sort_by_key(|r| (std::cmp::Reverse(r.agree), r.deviations.len()));
}
