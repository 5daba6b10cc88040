//! A step's gradient from its shards: micro-batches chained within a shard, shards added by the
//! binary tree of neighbours.
//!
//! `expert_union` neighbouring shards bring their j-th micro-batches to the routed experts
//! together. Experts then have one accumulator a union, which stands in the tree at the union's
//! first shard; where a node of the tree has one side only, that side moves up unchanged.

use crate::backend::{Backend, Place, Result};
use crate::layers::{Gradients, Weights};
use crate::model::{DeviceBatch, Model, StepReport, StepSettings};
use crate::ops::add::Add;

use super::trainer::StepBatches;

/// The gradient of a step in one process, and its report; `None` once `stop`, which is asked before
/// every micro-batch, says yes. A shard is added as soon as its neighbour is there, so that no more
/// than log2(shards) + 1 sets of accumulators live at a time, and those of a union.
pub(super) fn accumulate<B: Backend>(
    backend: &B,
    model: &Model,
    weights: &Weights<B>,
    batches: &StepBatches,
    union: usize,
    stop: &dyn Fn() -> bool,
) -> Result<Option<(Gradients<B>, StepReport)>> {
    let per_shard = batches.shards.first().map_or(0, Vec::len);
    let mut reports = vec![StepReport::default(); per_shard * batches.shards.len()];
    // Complete subtrees, the largest first, with the number of their shards.
    let mut subtrees: Vec<(usize, Gradients<B>)> = Vec::new();
    for (first, shards) in batches.shards.chunks(union).enumerate() {
        let zeros = |i| model.zero_gradients_in_union(backend, i);
        let mut gradients = (0..shards.len()).map(zeros).collect::<Result<Vec<_>>>()?;
        for j in 0..per_shard {
            if stop() {
                return Ok(None);
            }
            let number = |i: usize| (first * union + i) * per_shard + j;
            let settings: Vec<StepSettings> = (0..shards.len())
                .map(|i| StepSettings { micro_batch: Some(number(i)), ..batches.settings.clone() })
                .collect();
            let upload = |shard: &Vec<_>| model.batch(backend, &shard[j]);
            let lanes = shards.iter().map(upload).collect::<Result<Vec<DeviceBatch<B>>>>()?;
            let lanes: Vec<_> = lanes.iter().zip(&settings).collect();
            let of = model.step_together(backend, weights, &lanes, &mut gradients)?;
            of.into_iter().enumerate().for_each(|(i, of)| reports[number(i)] = of);
        }
        for shard in gradients {
            let mut tree = (1, model.finish_gradients(backend, shard)?);
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
    let op = Add { out: model.recipe.master() };
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

#[cfg(test)]
mod tests {
    use super::*;

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
