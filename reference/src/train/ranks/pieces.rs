//! ZeRO-1: masters, moments and average of every parameter are cut into pieces, each owned by one
//! of the ranks that hold the parameter.
//!
//! A piece is a block of the whole parameter as one process has it (`sum_of_squares::BLOCK`
//! elements), so that its share of the gradient norm is the contract's, whatever the layout. What a
//! rank computes of a gradient are [`Contribution`]s: intervals of whole parameters, by leaf of the
//! tree of shards. They travel to the owners of the pieces unchanged, and are added there.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::world::{World, stages};
use crate::model::{BuildError, Model, ParamId, ParamKind, ParamSpec};
use crate::ops::sum_of_squares::BLOCK;
use crate::train::TrainConfig;
use crate::train::shards::{Slot, left_over};

/// A block of a whole parameter, and the rank that owns it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// The parameter, by its place in the whole model's list.
    pub param: usize,
    /// Its elements in row-major order.
    pub range: Range<usize>,
    pub owner: usize,
}

/// A parameter of a stage, as an interval of the whole one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub param: usize,
    pub range: Range<usize>,
}

/// A gradient that a rank has once a union of shards is through one of its stages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Contribution {
    /// The interval of the whole parameter.
    pub held: Held,
    /// The shard at whose place in the tree it stands: its own, or the first of those that the rank
    /// has added up.
    pub leaf: usize,
    /// Uses of a shared parameter are added in this order before the tree.
    pub part: usize,
    /// The stage (by `dir`), the shard and the accumulator that it is read from.
    pub source: Source,
}

/// Where a contribution is on its rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Source {
    pub dir: usize,
    pub shard: usize,
    pub slot: usize,
}

/// Part of a piece, and of what overlaps it.
#[derive(Clone, Debug)]
pub(super) struct Overlap<T> {
    /// The piece, by its place in [`Pieces::all`].
    pub piece: usize,
    /// The elements in common, counted in the whole parameter.
    pub range: Range<usize>,
    pub of: T,
}

/// All pieces of a model on a layout; every rank has the same list.
pub(super) struct Pieces {
    /// In order of parameter and place.
    pub all: Vec<Piece>,
    /// The pieces of each parameter.
    pub of_param: Vec<Range<usize>>,
    /// The stages that each pipeline rank holds, by expert parallel rank.
    held: BTreeMap<(usize, usize), Vec<Vec<Held>>>,
    models: BTreeMap<(usize, usize), Vec<Model>>,
}

impl Pieces {
    /// The pieces of the `whole` model.
    pub fn new(config: &TrainConfig, whole: &Model, world: &World) -> Result<Pieces, BuildError> {
        let names: BTreeMap<&str, usize> =
            whole.specs.iter().enumerate().map(|(i, s)| (s.name.as_str(), i)).collect();
        let (mut held, mut models) = (BTreeMap::new(), BTreeMap::new());
        for pp in 0..world.sizes.pp {
            for ep in 0..world.sizes.ep {
                let stages = stages(config, pp, ep)?;
                let of = |model: &Model| {
                    let of = |spec: &ParamSpec| {
                        let first = match spec.kind {
                            ParamKind::Experts => ep * spec.elements(),
                            _ => 0,
                        };
                        let range = first..first + spec.elements();
                        Held { param: names[spec.name.as_str()], range }
                    };
                    model.specs.iter().map(of).collect::<Vec<_>>()
                };
                held.insert((pp, ep), stages.iter().map(of).collect::<Vec<_>>());
                models.insert((pp, ep), stages);
            }
        }
        let mut pieces = Pieces { all: Vec::new(), of_param: Vec::new(), held, models };
        pieces.cut(whole, world);
        Ok(pieces)
    }

    /// Cuts every parameter into blocks, and deals the blocks of all parameters that the same ranks
    /// hold to these ranks, as many elements to each as blocks allow.
    fn cut(&mut self, whole: &Model, world: &World) {
        let holders: Vec<Vec<usize>> =
            (0..whole.specs.len()).map(|param| self.holders(param, world)).collect();
        let mut totals: BTreeMap<&Vec<usize>, usize> = BTreeMap::new();
        for (spec, holders) in whole.specs.iter().zip(&holders) {
            *totals.entry(holders).or_default() += spec.elements();
        }
        let mut dealt: BTreeMap<&Vec<usize>, usize> = BTreeMap::new();
        for (param, (spec, holders)) in whole.specs.iter().zip(&holders).enumerate() {
            let first = self.all.len();
            for start in (0..spec.elements()).step_by(BLOCK) {
                let range = start..(start + BLOCK).min(spec.elements());
                let before = dealt.entry(holders).or_default();
                let owner = holders[*before * holders.len() / totals[holders]];
                *before += range.len();
                self.all.push(Piece { param, range, owner });
            }
            self.of_param.push(first..self.all.len());
        }
    }

    /// The ranks that hold a parameter or part of it.
    fn holders(&self, param: usize, world: &World) -> Vec<usize> {
        let mut ranks = Vec::new();
        for (&(pp, ep), stages) in &self.held {
            if stages.iter().flatten().any(|held| held.param == param) {
                let dps = (ep..world.sizes.dp).step_by(world.sizes.ep);
                ranks.extend(dps.map(|dp| world.number(pp, dp)));
            }
        }
        ranks.sort_unstable();
        ranks
    }

    /// The models of the stages of a rank.
    pub fn models(&self, world: &World, rank: usize) -> &[Model] {
        &self.models[&place(world, rank)]
    }

    /// The parameters of a rank's stages, by `dir` and [`ParamId`].
    pub fn held(&self, world: &World, rank: usize) -> &[Vec<Held>] {
        &self.held[&place(world, rank)]
    }

    /// The accumulators of a rank's stages that it adds up over its shards, by `dir`: those of
    /// parameters whose uses are all on one stage.
    pub fn slots(&self, world: &World, rank: usize) -> Vec<Vec<Slot>> {
        let (models, held) = (self.models(world, rank), self.held(world, rank));
        let of_stage = |(model, held): (&Model, &Vec<Held>)| {
            let alone =
                slots(model).into_iter().filter(|(.., id)| !self.is_shared(held[id.0].param));
            let slot = |(slot, _, id): (usize, usize, ParamId)| {
                let (step, offset) = leaves(model, id, world, rank);
                Slot { slot, step, offset }
            };
            alone.map(slot).collect()
        };
        models.iter().zip(held).map(of_stage).collect()
    }

    /// Whether a parameter is used on several stages.
    fn is_shared(&self, param: usize) -> bool {
        self.models.iter().any(|(place, models)| {
            let of = |(model, held): (&Model, &Vec<Held>)| {
                model.uses_elsewhere().iter().any(|(_, id)| held[id.0].param == param)
            };
            models.iter().zip(&self.held[place]).any(of)
        })
    }

    /// What a rank contributes to a step's gradient, in the order in which it is sent.
    pub fn contributions(&self, world: &World, rank: usize) -> Vec<Contribution> {
        let (models, held) = (self.models(world, rank), self.held(world, rank));
        let (shares, dp) = (&world.shares, rank % world.sizes.dp);
        let mut found = Vec::new();
        for (dir, (model, held)) in models.iter().zip(held).enumerate() {
            let unions = (0..shares.unions()).map(|u| shares.shards(dp, world.direction(dir), u));
            let shards: Vec<usize> = unions.flatten().collect();
            for (slot, part, id) in slots(model) {
                let (step, offset) = leaves(model, id, world, rank);
                let leaf = |&shard: &usize| shard.checked_sub(offset).filter(|l| l % step == 0);
                let mut own: BTreeSet<usize> = shards.iter().filter_map(leaf).collect();
                if !self.is_shared(held[id.0].param) {
                    own = left_over((shares.grad_shards, step), &own);
                }
                for leaf in own {
                    let source = Source { dir, shard: leaf + offset, slot };
                    found.push(Contribution { held: held[id.0].clone(), leaf, part, source });
                }
            }
        }
        found.sort_by_key(|c| (c.held.param, c.leaf, c.part, c.source));
        found
    }

    /// The pieces that an interval of a parameter overlaps, with the elements in common.
    pub fn overlaps<T: Clone>(&self, held: &Held, of: T) -> Vec<Overlap<T>> {
        let common = |piece: usize| {
            let own = &self.all[piece].range;
            let range = own.start.max(held.range.start)..own.end.min(held.range.end);
            (!range.is_empty()).then(|| Overlap { piece, range, of: of.clone() })
        };
        let all = self.of_param[held.param].clone();
        let first = all.start + held.range.start / BLOCK;
        (first..all.end).map_while(common).collect()
    }
}

fn place(world: &World, rank: usize) -> (usize, usize) {
    (rank / world.sizes.dp, rank % world.sizes.dp % world.sizes.ep)
}

/// The distance of a parameter's leaves in the tree, and how far behind its leaf the rank's
/// accumulator of a union is: experts have one a union, at the first of the shards that the rank
/// brings.
fn leaves(model: &Model, id: ParamId, world: &World, rank: usize) -> (usize, usize) {
    let member = rank % world.sizes.dp % world.sizes.ep;
    match model.specs[id.0].kind {
        ParamKind::Experts => (world.shares.expert_union, member * world.shares.side_by_side()),
        _ => (1, 0),
    }
}

/// The accumulators of a stage that hold something once its shards are through, with the number of
/// the parameter's use and the parameter. Where the stage has all uses they are one by then.
fn slots(model: &Model) -> Vec<(usize, usize, ParamId)> {
    let mut found = Vec::new();
    for (slot, spec) in model.specs.iter().enumerate() {
        let elsewhere = model.embedding == Some(ParamId(slot)) && model.at.pp > 0;
        if spec.trained() && !elsewhere {
            found.push((slot, 0, ParamId(slot)));
        }
    }
    found.extend(
        model.uses_elsewhere().into_iter().enumerate().map(|(i, (slot, id))| (slot, i + 1, id)),
    );
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlaps_are_cut_at_blocks() {
        let all: Vec<Piece> = (0..3)
            .map(|i| Piece { param: 0, range: i * BLOCK..((i + 1) * BLOCK).min(140_000), owner: i })
            .collect();
        let (held, models) = (BTreeMap::new(), BTreeMap::new());
        let pieces = Pieces { all, of_param: vec![Range { start: 0, end: 3 }], held, models };
        let found = pieces.overlaps(&Held { param: 0, range: 65_000..135_000 }, ());
        let ranges: Vec<_> = found.iter().map(|o| (o.piece, o.range.clone())).collect();
        assert_eq!(ranges, [(0, 65_000..65_536), (1, 65_536..131_072), (2, 131_072..135_000)]);
        let found = pieces.overlaps(&Held { param: 0, range: 131_072..131_073 }, ());
        assert_eq!(found.iter().map(|o| o.piece).collect::<Vec<_>>(), [2]);
    }
}
