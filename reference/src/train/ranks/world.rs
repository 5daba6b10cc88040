//! A rank's place among the others: its communicators, and the stages that each rank holds.

use std::sync::Arc;

use fathom_schedule::{Geometry, Shape};
use fathom_trace::{GroupKind, Parallel};

use crate::exchange::{Communicator, Exchange};
use crate::model::{BuildError, Model};
use crate::parallel::{Coordinates, coordinates};
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
    /// The ranks of this one's pipeline; the first reads the data.
    pub pipeline: Communicator,
    /// The ranks that read the data: the first of each pipeline; none where this one does not.
    pub readers: Option<Communicator>,
    /// The same, for messages between two.
    pub relay: Option<Communicator>,
}

impl World {
    pub fn new(config: &TrainConfig, exchange: Arc<dyn Exchange>) -> Result<World, BuildError> {
        let sizes = config.parallel.sizes();
        let rank = exchange.rank();
        let at = coordinates(sizes, rank)?;
        let all: Vec<usize> = (0..exchange.world()).collect();
        let first: Vec<usize> = (0..sizes.dp).collect();
        let pipeline: Vec<usize> = (0..sizes.pp).map(|pp| pp * sizes.dp + at.dp).collect();
        let reads = |name| (at.pp == 0).then(|| Communicator::new(&exchange, name, &first));
        Ok(World {
            rank,
            at,
            sizes,
            geometry: config.parallel.geometry(),
            shares: Shares::of(config),
            all: Communicator::new(&exchange, "all ranks", &all),
            between: Communicator::new(&exchange, "between ranks", &all),
            pipeline: Communicator::new(&exchange, "pipeline", &pipeline),
            readers: reads("readers"),
            relay: reads("relay"),
            exchange,
        })
    }

    /// The groups of the ops, those of several members.
    pub fn groups(&self) -> Vec<(GroupKind, Communicator)> {
        let Parallel { ep, .. } = self.sizes;
        if ep == 1 {
            return Vec::new();
        }
        let first = self.rank / ep * ep;
        let members: Vec<usize> = (first..first + ep).collect();
        vec![(GroupKind::Ep, Communicator::new(&self.exchange, "experts", &members))]
    }

    /// The direction of the micro-batches that pass a rank's stage of `dir`.
    pub fn direction(&self, dir: usize) -> usize {
        if self.geometry.shape == Shape::TwoWay { dir } else { 0 }
    }

    /// The world's number of data parallel rank `dp` of pipeline rank `pp`.
    pub fn number(&self, pp: usize, dp: usize) -> usize {
        pp * self.sizes.dp + dp
    }
}

/// The models of the stages that pipeline rank `pp` holds, by `dir`, with the experts of expert
/// parallel rank `ep`.
pub(crate) fn stages(config: &TrainConfig, pp: usize, ep: usize) -> Result<Vec<Model>, BuildError> {
    let geometry = config.parallel.geometry();
    let parallel = Parallel { pp: geometry.stages, ..config.parallel.sizes() };
    let layers = config.stage_layers();
    let stage = |dir: usize| {
        let stage = geometry.stage(pp, dir as u8);
        let rank = stage * parallel.dp + ep;
        Model::stage(&config.model, config.recipe.clone(), parallel, rank, layers[stage].clone())
    };
    (0..geometry.dirs()).map(stage).collect()
}
