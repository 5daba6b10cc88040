//! A rank's place among the others: its communicators, and the stages that each rank holds.

use std::sync::Arc;

use fathom_schedule::{Geometry, Shape};
use fathom_trace::{GroupKind, Parallel};

use crate::exchange::{Communicator, Exchange};
use crate::model::{BuildError, Model};
use crate::parallel::{Coordinates, LayoutError, coordinates};
use crate::train::TrainConfig;
use crate::train::parallel::Shares;

/// A rank's place.
pub(super) struct World {
    pub exchange: Arc<dyn Exchange>,
    pub rank: usize,
    pub at: Coordinates,
    pub sizes: Parallel,
    pub geometry: Geometry,
    pub shares: Shares,
    /// The group of every rank.
    pub all: Communicator,
    /// Every rank, for messages between two.
    pub between: Communicator,
    /// The ranks of this one's replica: its pipeline, with all context and tensor parallel ranks of
    /// every stage; the first reads the data.
    pub replica: Communicator,
    /// The ranks that read the data: the first of each replica; none where this one does not.
    pub readers: Option<Communicator>,
    /// The same, for messages between two.
    pub relay: Option<Communicator>,
}

impl World {
    pub fn new(config: &TrainConfig, exchange: Arc<dyn Exchange>) -> Result<World, BuildError> {
        let sizes = config.parallel.sizes();
        let rank = exchange.rank();
        let at = place(sizes, rank)?;
        let all: Vec<usize> = (0..exchange.world()).collect();
        let first: Vec<usize> =
            (0..sizes.dp).map(|dp| number(sizes, 0, dp * sizes.cp, 0)).collect();
        let of_replica = |rank: &usize| rank / (sizes.tp * sizes.cp) % sizes.dp == at.dp;
        let replica: Vec<usize> = all.iter().copied().filter(of_replica).collect();
        let is_first = at.pp == 0 && at.tp == 0 && at.cp == 0;
        let reads = |name| is_first.then(|| Communicator::new(&exchange, name, &first));
        Ok(World {
            rank,
            at,
            sizes,
            geometry: config.parallel.geometry(),
            shares: Shares::of(config),
            all: Communicator::new(&exchange, "all ranks", &all),
            between: Communicator::new(&exchange, "between ranks", &all),
            replica: Communicator::new(&exchange, "replica", &replica),
            readers: reads("readers"),
            relay: reads("relay"),
            exchange,
        })
    }

    /// The groups of the ops, those of several members.
    pub fn groups(&self) -> Vec<(GroupKind, Communicator)> {
        let (Parallel { ep, tp, cp, .. }, at) = (self.sizes, self.at);
        let mut groups = Vec::new();
        let neighbours = |ranks: usize| {
            let first = self.data(at) / ranks * ranks;
            (first..first + ranks).map(|data| self.number(at.pp, data, at.tp)).collect::<Vec<_>>()
        };
        if ep > 1 {
            let group = Communicator::new(&self.exchange, "experts", &neighbours(ep));
            groups.push((GroupKind::Ep, group));
        }
        if cp > 1 {
            let group = Communicator::new(&self.exchange, "context parallel", &neighbours(cp));
            groups.push((GroupKind::Cp, group));
        }
        if tp > 1 {
            let number = |tp| self.number(at.pp, self.data(at), tp);
            let members: Vec<usize> = (0..tp).map(number).collect();
            let group = Communicator::new(&self.exchange, "tensor parallel", &members);
            groups.push((GroupKind::Tp, group));
        }
        groups
    }

    /// The coordinates of any rank.
    pub fn place(&self, rank: usize) -> Coordinates {
        place(self.sizes, rank).expect("a rank of a layout that stands")
    }

    /// The direction of the micro-batches that pass a rank's stage of `dir`.
    pub fn direction(&self, dir: usize) -> usize {
        if self.geometry.shape == Shape::TwoWay { dir } else { 0 }
    }

    /// A rank's place among the data and context parallel ones: those of a replica are neighbours.
    pub fn data(&self, at: Coordinates) -> usize {
        at.dp * self.sizes.cp + at.cp
    }

    /// How many of these there are.
    pub fn data_ranks(&self) -> usize {
        self.sizes.dp * self.sizes.cp
    }

    /// The world's number of tensor parallel rank `tp` at place `data` among the data and context
    /// parallel ones of pipeline rank `pp`.
    pub fn number(&self, pp: usize, data: usize, tp: usize) -> usize {
        number(self.sizes, pp, data, tp)
    }
}

fn number(sizes: Parallel, pp: usize, data: usize, tp: usize) -> usize {
    tp + sizes.tp * (data + sizes.dp * sizes.cp * pp)
}

/// A rank's coordinates. Expert parallel ranks are neighbours among the data and context parallel
/// ones of one tensor parallel rank, since the others of these have the same tokens.
fn place(sizes: Parallel, rank: usize) -> Result<Coordinates, LayoutError> {
    let at = coordinates(sizes, rank)?;
    Ok(Coordinates { ep: (at.dp * sizes.cp + at.cp) % sizes.ep, ..at })
}

/// How many neighbours among the data and context parallel ranks hold different things, so that
/// those behind them begin anew: an expert parallel group, or the context parallel ranks.
pub(crate) fn period(sizes: Parallel) -> usize {
    sizes.ep.max(sizes.cp)
}

/// The models of the stages that pipeline rank `pp` holds, by `dir`, with the experts and parts of
/// the rank at place `data` among the data and context parallel ones, and the heads and columns of
/// tensor parallel rank `tp`.
pub(crate) fn stages(
    config: &TrainConfig,
    pp: usize,
    (data, tp): (usize, usize),
) -> Result<Vec<Model>, BuildError> {
    let geometry = config.parallel.geometry();
    let parallel = Parallel { pp: geometry.stages, ..config.parallel.sizes() };
    let layers = config.stage_layers();
    let stage = |dir: usize| {
        let stage = geometry.stage(pp, dir as u8);
        let rank = number(parallel, stage, data, tp);
        let at = place(parallel, rank)?;
        let recipe = config.recipe.clone();
        Model::placed(&config.model, recipe, parallel, (rank, at), layers[stage].clone())
    };
    (0..geometry.dirs()).map(stage).collect()
}
