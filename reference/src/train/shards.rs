//! A step's gradient from its shards: micro-batches chained within a shard, shards added by the
//! binary tree of neighbours.
//!
//! Where sequences lie in parts (`context_shards`), a shard has an accumulator for each part, and
//! these are neighbouring leaves of the tree.
//!
//! `expert_union` neighbouring shards bring their j-th micro-batches to the routed experts
//! together, in all their parts. Experts then have one accumulator a union, which stands in the
//! tree at the union's first leaf; where a node of the tree has one side only, that side moves up
//! unchanged.

use std::collections::{BTreeMap, BTreeSet};

use crate::backend::{Backend, Place, Result};
use crate::layers::{Gradients, Weights};
use crate::model::{DeviceBatch, Model, StepReport, StepSettings};
use crate::ops::add::Add;

use super::TrainConfig;
use super::trainer::StepBatches;

/// The gradient of a step in one process, and its report; `None` once `stop`, which is asked before
/// every micro-batch, says yes. A leaf is added as soon as its neighbour is there, so that no more
/// than log2(leaves) + 1 sets of accumulators live at a time, and those of a union.
pub(super) fn accumulate<B: Backend>(
    backend: &B,
    model: &Model,
    weights: &Weights<B>,
    batches: &StepBatches,
    config: &TrainConfig,
    stop: &dyn Fn() -> bool,
) -> Result<Option<(Gradients<B>, StepReport)>> {
    let (union, parts) = (config.expert_union, config.sequence_parts());
    let per_shard = batches.shards.first().map_or(0, Vec::len);
    let lanes = per_shard * batches.shards.len() * parts.count;
    let mut reports = vec![StepReport::default(); lanes];
    // Complete subtrees, the largest first, with the number of their leaves.
    let mut subtrees: Vec<(usize, Gradients<B>)> = Vec::new();
    for (first, shards) in batches.shards.chunks(union).enumerate() {
        let zeros = |i| model.zero_gradients_in_union(backend, i);
        let leaves = 0..shards.len() * parts.count;
        let mut gradients = leaves.map(zeros).collect::<Result<Vec<_>>>()?;
        for j in 0..per_shard {
            if stop() {
                return Ok(None);
            }
            let number = |i: usize| (first * union + i) * per_shard + j;
            let (mut lanes, mut settings, mut places) = (Vec::new(), Vec::new(), Vec::new());
            for (i, shard) in shards.iter().enumerate() {
                let micro_batch = Some(number(i));
                lanes.extend(model.parts(backend, &shard[j], parts)?);
                for part in 0..parts.count {
                    settings.push(StepSettings { micro_batch, ..batches.settings.clone() });
                    places.push(number(i) * parts.count + part);
                }
            }
            let lanes: Vec<(&DeviceBatch<B>, _)> = lanes.iter().zip(&settings).collect();
            let of = model.step_together(backend, weights, &lanes, &mut gradients)?;
            places.into_iter().zip(of).for_each(|(place, of)| reports[place] = of);
        }
        for leaf in gradients {
            let mut tree = (1, model.finish_gradients(backend, leaf)?);
            while subtrees.last().is_some_and(|(size, _)| *size == tree.0) {
                let (size, left) = subtrees.pop().expect("just seen");
                tree = (size + tree.0, add(backend, model, left, tree.1)?);
            }
            subtrees.push(tree);
        }
    }
    // What is left moves up unchanged until it has a neighbour.
    let (_, mut sum) = subtrees.pop().expect("at least one shard");
    while let Some((_, left)) = subtrees.pop() {
        sum = add(backend, model, left, sum)?;
    }
    let mut report = StepReport::default();
    reports.into_iter().for_each(|of| report.add(of));
    Ok(Some((sum, report)))
}

fn add<B: Backend>(
    backend: &B,
    model: &Model,
    left: Gradients<B>,
    right: Gradients<B>,
) -> Result<Gradients<B>> {
    backend.at(Place::default());
    let op = model.gradient_sum();
    let pair = |(a, b): (Option<B::Buffer>, Option<B::Buffer>)| match (a, b) {
        (Some(a), Some(b)) => backend.add(&op, &a, &b, None).map(Some),
        (a, b) => Ok(a.or(b)),
    };
    let pairs = left.buffers.into_iter().zip(right.buffers);
    Ok(Gradients { buffers: pairs.map(pair).collect::<Result<_>>()? })
}

/// The sum of the tree over `leaves`, by `add`; none where all leaves are absent. It is the tree of
/// [`accumulate`], for who has all leaves at once.
pub(super) fn tree<T, E>(
    mut leaves: Vec<Option<T>>,
    add: &mut dyn FnMut(T, T) -> Result<T, E>,
) -> Result<Option<T>, E> {
    while leaves.len() > 1 {
        let mut level = Vec::with_capacity(leaves.len().div_ceil(2));
        let mut rest = leaves.into_iter();
        while let Some(left) = rest.next() {
            level.push(match (left, rest.next().flatten()) {
                (Some(left), Some(right)) => Some(add(left, right)?),
                (left, right) => left.or(right),
            });
        }
        leaves = level;
    }
    Ok(leaves.pop().flatten())
}

/// An accumulator whose shards a rank may add up before it sends anything: all uses of its
/// parameter are on one stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Its place in a set of accumulators.
    pub slot: usize,
    /// Its leaves of the tree are the multiples of this: unions of experts, else all.
    pub step: usize,
    /// The set in which a leaf's accumulator is, counted from the leaf's own.
    pub offset: usize,
}

/// A rank's finished accumulators, added up as far as the tree's neighbours are on it: the sum of a
/// subtree stands at its first leaf.
#[derive(Debug)]
pub(crate) struct Subtrees<B: Backend> {
    /// By `dir` and leaf.
    pub sets: BTreeMap<(usize, usize), Gradients<B>>,
    leaves: usize,
}

impl<B: Backend> Subtrees<B> {
    /// None yet, of so many leaves.
    pub fn new(leaves: usize) -> Subtrees<B> {
        Subtrees { sets: BTreeMap::new(), leaves }
    }

    /// Puts the accumulators of a leaf in and adds what has found its neighbour.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn insert(
        &mut self,
        backend: &B,
        op: &Add,
        ((dir, own), slots): ((usize, usize), &[Slot]),
        gradients: Gradients<B>,
    ) -> Result<()> {
        self.sets.insert((dir, own), gradients);
        backend.at(Place::default());
        for &Slot { slot, step, offset } in slots {
            let Some(leaf) = own.checked_sub(offset).filter(|leaf| leaf % step == 0) else {
                continue;
            };
            let here = |leaf: usize| self.sets.contains_key(&(dir, leaf + offset));
            let possible = sums((self.leaves, step), leaf, &here);
            for (left, right) in possible {
                let mut take = |leaf: usize| {
                    let set = self.sets.get_mut(&(dir, leaf + offset)).expect("it is here");
                    set.buffers[slot].take().expect("a subtree's sum is at its first leaf")
                };
                let (a, b) = (take(left), take(right));
                let sum = Some(backend.add(op, &a, &b, None)?);
                self.sets.get_mut(&(dir, left + offset)).expect("just seen").buffers[slot] = sum;
            }
        }
        Ok(())
    }
}

/// The sums of the tree, by the first leaves of both sides, that `leaf` makes possible where the
/// leaves that are `here` came before it. Leaves are the multiples of `step` below `shards`.
fn sums(
    (shards, step): (usize, usize),
    leaf: usize,
    here: &dyn Fn(usize) -> bool,
) -> Vec<(usize, usize)> {
    let leaves = |node: usize, size: usize| {
        let range = node * size..shards.min((node + 1) * size);
        range.filter(|leaf| leaf % step == 0)
    };
    let (mut sums, mut size) = (Vec::new(), 1);
    while size < shards {
        let (own, beside) = (leaf / size, (leaf / size) ^ 1);
        if !leaves(beside, size).all(here) {
            break;
        }
        // A side that has no leaf lets the other one move up.
        if let (Some(own), Some(other)) = (leaves(own, size).next(), leaves(beside, size).next()) {
            sums.push((own.min(other), own.max(other)));
        }
        size *= 2;
    }
    sums
}

/// The leaves at which sums are left once all of `own` are in: those that a rank sends.
pub(crate) fn left_over((shards, step): (usize, usize), own: &BTreeSet<usize>) -> BTreeSet<usize> {
    let (mut here, mut left) = (BTreeSet::new(), BTreeSet::new());
    for &leaf in own {
        here.insert(leaf);
        left.insert(leaf);
        for (_, gone) in sums((shards, step), leaf, &|other| here.contains(&other)) {
            left.remove(&gone);
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What ranks add before they send, whoever has which leaf and in whatever order they come.
    #[test]
    fn subtrees_that_ranks_add_are_those_of_the_tree() {
        let mut random = 0x2545_F491_4F6C_DD1Du64;
        let mut next = |n: usize| {
            random = random.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
            (random >> 33) as usize % n
        };
        let add = |a: String, b: String| format!("({a}+{b})");
        for (shards, step) in (1..=12).flat_map(|n| [(n, 1), (n, 2), (n, 3), (n, 4)]) {
            let mut order: Vec<usize> = (0..shards).step_by(step).collect();
            let whole: Vec<Option<String>> =
                (0..shards).map(|i| (i % step == 0).then(|| i.to_string())).collect();
            let whole = tree(whole, &mut |a, b| Ok::<_, ()>(add(a, b))).unwrap();
            for ranks in 1..4 {
                let owner: Vec<usize> = (0..shards).map(|_| next(ranks)).collect();
                for i in (1..order.len()).rev() {
                    order.swap(i, next(i + 1));
                }
                let mut sent: Vec<Option<String>> = vec![None; shards];
                for rank in 0..ranks {
                    let mut have: BTreeMap<usize, String> = BTreeMap::new();
                    let mut here = BTreeSet::new();
                    for &leaf in order.iter().filter(|&&leaf| owner[leaf] == rank) {
                        here.insert(leaf);
                        have.insert(leaf, leaf.to_string());
                        for (a, b) in sums((shards, step), leaf, &|leaf| here.contains(&leaf)) {
                            let (left, right) =
                                (have.remove(&a).unwrap(), have.remove(&b).unwrap());
                            have.insert(a, add(left, right));
                        }
                    }
                    let left = left_over((shards, step), &here);
                    assert!(left.iter().eq(have.keys()), "{shards} {step} {here:?}");
                    have.into_iter().for_each(|(leaf, sum)| sent[leaf] = Some(sum));
                }
                let found = tree(sent, &mut |a, b| Ok::<_, ()>(add(a, b))).unwrap();
                assert_eq!(found, whole, "{shards} {step} {owner:?}");
            }
        }
    }

    #[test]
    fn the_tree_adds_neighbours_and_moves_the_odd_one_up() {
        let words = |present: &[bool]| {
            let leaf = |(i, here): (usize, &bool)| here.then(|| i.to_string());
            let leaves = present.iter().enumerate().map(leaf).collect();
            let mut add = |a: String, b: String| Ok::<_, ()>(format!("({a}+{b})"));
            tree(leaves, &mut add).unwrap()
        };
        assert_eq!(words(&[true; 1]).unwrap(), "0");
        assert_eq!(words(&[true; 5]).unwrap(), "(((0+1)+(2+3))+4)");
        assert_eq!(words(&[true; 6]).unwrap(), "(((0+1)+(2+3))+(4+5))");
        assert_eq!(words(&[true; 7]).unwrap(), "(((0+1)+(2+3))+((4+5)+6))");
        // Unions of two: the first shard of each has the experts' accumulator.
        let unions = [true, false, true, false, true, false];
        assert_eq!(words(&unions).unwrap(), "((0+2)+4)");
        assert_eq!(words(&[false; 4]), None);
    }
}
