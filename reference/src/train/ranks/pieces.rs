//! ZeRO-1: masters, moments and average of every parameter are cut into pieces, each owned by one
//! of the ranks that hold the parameter.
//!
//! A piece is a block of the whole parameter as one process has it (`sum_of_squares::BLOCK`
//! elements), so that its share of the gradient norm is the contract's, whatever the layout. What a
//! rank computes of a gradient are [`Contribution`]s: parts of whole parameters, by leaf of the
//! tree of shards. They travel to the owners of the pieces unchanged, and are added there.
//!
//! Tensor parallel ranks hold rows or columns of some parameters, and the whole of others, whose
//! gradient has the same bits on each of them: an owner is then given it by ranks of its own `tp`.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::world::{World, period, stages};
use crate::model::{BuildError, Model, ParamId, ParamKind, ParamSpec};
use crate::ops::sum_of_squares::BLOCK;
use crate::parallel::{Coordinates, Parallel};
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

/// A parameter of a stage, as parts of the whole one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub param: usize,
    /// In the order in which the rank has them.
    pub regions: Vec<Region>,
}

/// Elements of a whole parameter that lie side by side on a rank: rows, or a block of columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    /// The first element, counted in the whole parameter.
    start: usize,
    /// Elements of a run.
    run: usize,
    /// From the beginning of a run to that of the next, in the whole parameter.
    stride: usize,
    runs: usize,
    /// Where the region begins on the rank.
    local: usize,
    /// Whether the tensor parallel ranks share it out.
    split: bool,
}

impl Region {
    /// Its elements before element `whole` of the parameter.
    fn before(&self, whole: usize) -> usize {
        let behind = whole.saturating_sub(self.start);
        let runs = (behind / self.stride).min(self.runs);
        if runs == self.runs {
            return runs * self.run;
        }
        runs * self.run + (behind % self.stride).min(self.run)
    }

    /// Behind its last element, in the whole parameter.
    fn end(&self) -> usize {
        self.start + (self.runs - 1) * self.stride + self.run
    }
}

/// What a rank holds of a parameter: `own` of the `whole`, told by the shapes of the checkpoint
/// tensors that both consist of.
fn regions(whole: &ParamSpec, own: &ParamSpec, at: Coordinates) -> Vec<Region> {
    let rows = |start: usize, local: usize, elements: usize, split: bool| Region {
        start,
        run: elements,
        stride: elements,
        runs: 1,
        local,
        split,
    };
    if own.kind == ParamKind::Experts {
        return vec![rows(at.ep * own.elements(), 0, own.elements(), false)];
    }
    let (mut start, mut local) = (0, 0);
    let mut regions: Vec<Region> = Vec::new();
    for (all, part) in whole.parts.iter().zip(&own.parts) {
        let [all_elements, elements] = [all, part].map(|p| p.shape.iter().product::<usize>());
        let region = match (&all.shape[..], &part.shape[..]) {
            (&[_, stride], &[runs, run]) if run < stride => {
                let start = start + at.tp * run;
                Region { start, run, stride, runs, local, split: true }
            }
            (all, part) if all != part => rows(start + at.tp * elements, local, elements, true),
            _ => rows(start, local, elements, false),
        };
        match regions.last_mut() {
            Some(last) if !last.split && !region.split => {
                *last = rows(last.start, last.local, last.run + elements, false)
            }
            _ => regions.push(region),
        }
        (start, local) = (start + all_elements, local + elements);
    }
    regions
}

/// A gradient that a rank has once a union of shards is through one of its stages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Contribution {
    /// The parts of the whole parameter.
    pub held: Held,
    /// The leaf at whose place in the tree it stands: its own, or the first of those that the rank
    /// has added up.
    pub leaf: usize,
    /// Uses of a shared parameter are added in this order before the tree.
    pub part: usize,
    /// The stage (by `dir`), the leaf and the accumulator that it is read from.
    pub source: Source,
}

/// Where a contribution is on its rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Source {
    pub dir: usize,
    pub leaf: usize,
    pub slot: usize,
}

/// Part of a piece, and of what overlaps it.
#[derive(Clone, Debug)]
pub(super) struct Overlap<T> {
    /// The piece, by its place in [`Pieces::all`].
    pub piece: usize,
    /// The elements in common, counted on the rank that holds them.
    pub range: Range<usize>,
    region: Region,
    pub of: T,
}

impl<T> Overlap<T> {
    /// The same overlap, of something else.
    pub fn of<U>(self, of: U) -> Overlap<U> {
        let Overlap { piece, range, region, .. } = self;
        Overlap { piece, range, region, of }
    }

    /// The same elements in the whole parameter, run by run.
    pub fn runs(&self) -> impl Iterator<Item = Range<usize>> {
        let Region { start, run, stride, local, .. } = self.region;
        let (mut next, end) = (self.range.start - local, self.range.end - local);
        std::iter::from_fn(move || {
            let length = (run - next % run).min(end - next);
            let first = start + next / run * stride + next % run;
            next += length;
            (length > 0).then(|| first..first + length)
        })
    }

    /// The same elements run by run: on the rank that holds them, and in the whole parameter.
    pub fn both(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let mut next = self.range.start;
        self.runs().map(move |run| {
            let own = next..next + run.len();
            next = own.end;
            (own, run)
        })
    }
}

/// All pieces of a model on a layout; every rank has the same list.
pub(super) struct Pieces {
    /// In order of parameter and place.
    pub all: Vec<Piece>,
    /// The pieces of each parameter.
    pub of_param: Vec<Range<usize>>,
    /// The stages that each rank holds, by its place.
    held: BTreeMap<Place, Vec<Vec<Held>>>,
    models: BTreeMap<Place, Vec<Model>>,
}

/// Pipeline rank, place in the period of data and context parallel ranks, tensor parallel rank:
/// those of one place hold the same.
type Place = (usize, usize, usize);

impl Pieces {
    /// The pieces of the `whole` model.
    pub fn new(config: &TrainConfig, whole: &Model, world: &World) -> Result<Pieces, BuildError> {
        let names: BTreeMap<&str, usize> =
            whole.specs.iter().enumerate().map(|(i, s)| (s.name.as_str(), i)).collect();
        let (mut held, mut models) = (BTreeMap::new(), BTreeMap::new());
        let Parallel { pp, tp, .. } = world.sizes;
        let places = (0..pp).flat_map(|pp| (0..period(world.sizes)).map(move |data| (pp, data)));
        for (pp, data, tp) in places.flat_map(|(pp, data)| (0..tp).map(move |tp| (pp, data, tp))) {
            let stages = stages(config, pp, (data, tp))?;
            let of = |model: &Model| {
                let of = |spec: &ParamSpec| {
                    let param = names[spec.name.as_str()];
                    Held { param, regions: regions(&whole.specs[param], spec, model.at) }
                };
                model.specs.iter().map(of).collect::<Vec<_>>()
            };
            held.insert((pp, data, tp), stages.iter().map(of).collect::<Vec<_>>());
            models.insert((pp, data, tp), stages);
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
        for (&(pp, data, tp), stages) in &self.held {
            if stages.iter().flatten().any(|held| held.param == param) {
                let places = (data..world.data_ranks()).step_by(period(world.sizes));
                ranks.extend(places.map(|data| world.number(pp, data, tp)));
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
        let (shares, at) = (&world.shares, world.place(rank));
        let mut found = Vec::new();
        for (dir, (model, held)) in models.iter().zip(held).enumerate() {
            let of_union = |u| shares.lanes((at.dp, at.cp), world.direction(dir), u);
            let lanes: Vec<usize> = (0..shares.unions()).flat_map(of_union).collect();
            for (slot, part, id) in slots(model) {
                let (step, offset) = leaves(model, id, world, rank);
                let leaf = |&lane: &usize| lane.checked_sub(offset).filter(|l| l % step == 0);
                let mut own: BTreeSet<usize> = lanes.iter().filter_map(leaf).collect();
                if !self.is_shared(held[id.0].param) {
                    own = left_over((shares.leaves(), step), &own);
                }
                for leaf in own {
                    let source = Source { dir, leaf: leaf + offset, slot };
                    found.push(Contribution { held: held[id.0].clone(), leaf, part, source });
                }
            }
        }
        found.sort_by_key(|c| (c.held.param, c.leaf, c.part, c.source));
        found
    }

    /// The pieces that a parameter of a rank overlaps, with the elements in common.
    pub fn overlaps<T: Clone>(&self, held: &Held, of: T) -> Vec<Overlap<T>> {
        let first = self.of_param[held.param].start;
        let mut found = Vec::new();
        for &region in &held.regions {
            for piece in region.start / BLOCK..region.end().div_ceil(BLOCK) {
                let piece = first + piece;
                let own = &self.all[piece].range;
                let [start, end] = [own.start, own.end].map(|i| region.local + region.before(i));
                if start < end {
                    found.push(Overlap { piece, range: start..end, region, of: of.clone() });
                }
            }
        }
        found
    }

    /// The overlaps of a contribution of `rank` that it sends: of what all tensor parallel ranks
    /// have alike, those with the pieces of owners that are the same one among them.
    pub fn sent<T: Clone>(
        &self,
        world: &World,
        rank: usize,
        held: &Held,
        of: T,
    ) -> Vec<Overlap<T>> {
        let tp = |rank| world.place(rank).tp;
        let mut found = self.overlaps(held, of);
        found.retain(|o| o.region.split || tp(self.all[o.piece].owner) == tp(rank));
        found
    }
}

fn place(world: &World, rank: usize) -> Place {
    let at = world.place(rank);
    (at.pp, world.data(at) % period(world.sizes), at.tp)
}

/// The distance of a parameter's leaves in the tree, and how far behind its leaf the rank's
/// accumulator of a union is: experts have one a union, at the first of the lanes that the rank
/// brings.
fn leaves(model: &Model, id: ParamId, world: &World, rank: usize) -> (usize, usize) {
    let (at, shares) = (world.place(rank), &world.shares);
    match model.specs[id.0].kind {
        ParamKind::Experts => {
            let first = shares.lanes((at.dp, at.cp), 0, 0)[0];
            (shares.union_leaves(), first % shares.union_leaves())
        }
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
    use crate::model::params::Part;

    #[test]
    fn overlaps_are_cut_at_blocks() {
        let all: Vec<Piece> = (0..3)
            .map(|i| Piece { param: 0, range: i * BLOCK..((i + 1) * BLOCK).min(140_000), owner: i })
            .collect();
        let (held, models) = (BTreeMap::new(), BTreeMap::new());
        let pieces = Pieces { all, of_param: vec![Range { start: 0, end: 3 }], held, models };
        let found = |start: usize, run: usize, stride: usize, runs: usize| {
            let region = Region { start, run, stride, runs, local: 7, split: true };
            let mut elements: Vec<(usize, usize)> = Vec::new();
            for overlap in pieces.overlaps(&Held { param: 0, regions: vec![region] }, ()) {
                let length: usize = overlap.runs().map(|run| run.len()).sum();
                assert_eq!(length, overlap.range.len());
                let block = |run: &Range<usize>| (run.start / BLOCK, (run.end - 1) / BLOCK);
                let piece = overlap.piece;
                assert!(overlap.runs().all(|run| block(&run) == (piece, piece)));
                elements.extend(overlap.range.clone().zip(overlap.runs().flatten()));
            }
            elements
        };
        for (start, run, stride, runs) in [
            (65_000, 70_000, 70_000, 1),
            (131_072, 1, 1, 1),
            (3, 7, 20, 6_999),
            (65_530, 1, 1_000, 74),
            (12, 1, 100_000, 2),
        ] {
            let whole = (0..runs).flat_map(|i| (0..run).map(move |j| start + i * stride + j));
            let expected: Vec<_> = (7..).zip(whole).collect();
            assert_eq!(found(start, run, stride, runs), expected, "{start} {run} {stride} {runs}");
        }
    }

    /// Gate and up by rows, down by columns, a latent's projection on every rank, experts by `ep`.
    #[test]
    fn tensor_parallel_ranks_hold_rows_and_columns_of_the_whole() {
        let part = |name: &str, shape: &[usize]| Part { name: name.into(), shape: shape.to_vec() };
        let spec = |kind, parts: &[Part]| {
            let name = "a parameter".to_owned();
            let rows = parts.iter().map(|p| p.shape[0]).sum();
            let shape = [&[rows], &parts[0].shape[1..]].concat();
            ParamSpec { name, kind, shape, parts: parts.to_vec(), layer: None }
        };
        let at = Coordinates { tp: 1, cp: 0, dp: 3, pp: 0, ep: 1 };
        let elements = |kind, whole: &[Part], own: &[Part]| {
            let mut elements = Vec::new();
            for region in regions(&spec(kind, whole), &spec(kind, own), at) {
                assert_eq!(region.local, elements.len());
                let range = region.local..region.local + region.run * region.runs;
                elements.extend(Overlap { piece: 0, range, region, of: () }.runs().flatten());
            }
            elements
        };
        let gate_up = [part("gate", &[4, 2]), part("up", &[4, 2])];
        let own = [part("gate", &[2, 2]), part("up", &[2, 2])];
        let found = elements(ParamKind::Linear, &gate_up, &own);
        assert_eq!(found, [4, 5, 6, 7, 12, 13, 14, 15]);
        let found = elements(ParamKind::Linear, &[part("down", &[2, 4])], &[part("d", &[2, 2])]);
        assert_eq!(found, [2, 3, 6, 7]);
        let latent = [part("q_a", &[2, 3]), part("kv_a", &[1, 3])];
        let found = elements(ParamKind::Linear, &latent, &latent);
        assert_eq!(found, (0..9).collect::<Vec<_>>());
        let mixed = [part("q", &[2, 3]), part("kv_a", &[1, 3])];
        let own = [part("q", &[1, 3]), part("kv_a", &[1, 3])];
        assert_eq!(elements(ParamKind::Linear, &mixed, &own), [3, 4, 5, 6, 7, 8]);
        let experts: Vec<Part> = (0..4).map(|_| part("expert", &[1, 2])).collect();
        let found = elements(ParamKind::Experts, &experts, &experts[2..]);
        assert_eq!(found, [4, 5, 6, 7]);
    }
}
