//! What a rank of a layout holds in a step, told without running it.
//!
//! The rank's instructions are walked in order, with the model's own code, on the backend that
//! counts and computes nothing. Of the trainer's executor nothing is used, so that what a rank was
//! seen to hold is compared with something else.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use fathom_schedule::{Chunk, Geometry, Op, Shape};
use serde::Serialize;

use super::MemoryError;
use crate::backend::{Backend, Ledger, Load, Meta};
use crate::layers::{Gradients, Weights};
use crate::model::{
    Batch, DeviceBatch, Lane, Model, PairedBackward, ParamKind, ParamSpec, SequenceParts,
    StageKept, StepSettings,
};
use crate::optim::MomentType;
use crate::parallel::Parallel;
use crate::precision::Mode;
use crate::train::TrainConfig;
use crate::train::parallel::Shares;
use crate::train::ranks::{in_order, stages};
use crate::train::shards::{Slot, Subtrees};

/// Bytes that a rank holds when it holds most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RankMemory {
    /// Masters, moments and average of its share of the parameters (ZeRO-1).
    pub states: u64,
    /// The weights of its stages as ops read them.
    pub weights: u64,
    /// The sums of gradients that it has once its instructions are through: of a shard, or of those
    /// that are neighbours.
    pub gradients: u64,
    /// What is there on top at the peak: what forwards keep, and what an op works on.
    pub activations: u64,
}

impl RankMemory {
    /// All of it.
    pub fn sum(&self) -> u64 {
        self.states + self.weights + self.gradients + self.activations
    }
}

type Counting = Ledger<Meta>;

/// What a rank holds in a step of `batch` sequences: that of the pipeline's place `pp`, among the
/// data and context parallel ones the first of each expert parallel group, among the tensor
/// parallel ones any. Rows fall evenly on experts.
///
/// # Errors
/// [`MemoryError`]; also where a rank brings several shards of a union, or several parts of a
/// sequence, whose rows the host puts together by their values.
///
/// # Panics
/// Where the configuration is none that training takes.
pub fn rank(config: &TrainConfig, pp: usize, batch: usize) -> Result<RankMemory, MemoryError> {
    let backend = Ledger::new(Meta::new(0, Load::Balanced));
    let models = stages(config, pp, (0, 0))?;
    let weights = models.iter().map(|model| {
        let params = model.shapes(&backend)?;
        model.training_weights(&backend, params)
    });
    let weights = weights.collect::<Result<Vec<Weights<Counting>>, _>>()?;
    let of_weights = backend.alive().bytes;
    let shares = Shares::of(config);
    let shared = shared(config)?;
    let host = Batch::from_sequences(&vec![vec![0; config.seq_len]; config.micro_batch]);
    let mut walk = Walk {
        backend: &backend,
        models: &models,
        weights: &weights,
        geometry: config.parallel.geometry(),
        slots: models.iter().map(|model| slots(model, &shared, shares.union_leaves())).collect(),
        shares,
        per_shard: (batch / config.grad_shards).div_ceil(config.micro_batch),
        parts: config.sequence_parts(),
        settings: StepSettings::of(&host, config.model.mtp_depth, 0.3),
        host,
        flights: BTreeMap::new(),
        chains: BTreeMap::new(),
        done: Subtrees::new(shares.leaves()),
    };
    backend.reset_peak();
    let schedule = config.pipeline(batch).expect("a configuration that was checked");
    for op in in_order(&schedule.ranks[pp]) {
        walk.step(op)?;
    }
    assert!(walk.flights.is_empty() && walk.chains.is_empty(), "every chunk is through");
    let gradients = backend.alive().bytes - of_weights;
    Ok(RankMemory {
        states: states(config, pp)?,
        weights: of_weights,
        gradients,
        activations: backend.alive().peak - of_weights - gradients,
    })
}

/// Parameters that several stages use, whose gradients stay apart.
fn shared(config: &TrainConfig) -> Result<BTreeSet<String>, MemoryError> {
    let mut names = BTreeSet::new();
    for pp in 0..config.parallel.pp {
        for model in stages(config, pp, (0, 0))? {
            let uses = model.uses_elsewhere();
            names.extend(uses.into_iter().map(|(_, id)| model.specs[id.0].name.clone()));
        }
    }
    Ok(names)
}

/// The accumulators of a stage that are added up over the rank's shards.
fn slots(model: &Model, shared: &BTreeSet<String>, union: usize) -> Vec<Slot> {
    let own = model.specs.iter().enumerate();
    let own = own.filter(|(_, spec)| spec.trained() && !shared.contains(&spec.name));
    let slot = |(slot, spec): (usize, &ParamSpec)| {
        let step = if spec.kind == ParamKind::Experts { union } else { 1 };
        Slot { slot, step, offset: 0 }
    };
    own.map(slot).collect()
}

/// Bytes of a rank's share of masters, moments and average.
fn states(config: &TrainConfig, pp: usize) -> Result<u64, MemoryError> {
    let parallel = &config.parallel;
    let mut holders: BTreeMap<String, usize> = BTreeMap::new();
    for other in 0..parallel.pp {
        let mut names: Vec<String> = stages(config, other, (0, 0))?
            .iter()
            .flat_map(|model| model.specs.iter().map(|spec| spec.name.clone()))
            .collect();
        names.sort_unstable();
        names.dedup();
        names.into_iter().for_each(|name| *holders.entry(name).or_default() += 1);
    }
    let master = config.recipe.master().size();
    let moments = match (config.recipe.mode, config.optim.moments) {
        (Mode::F64, _) => 16,
        (_, MomentType::Fp32) => 8,
        (_, MomentType::Bf16) => 4,
    };
    let average = if config.optim.ema_decay > 0.0 { master } else { 0 };
    let whole = Model::new(&config.model, config.recipe.clone(), Parallel::default(), 0)?;
    let elements: BTreeMap<&str, usize> =
        whole.specs.iter().map(|spec| (spec.name.as_str(), spec.elements())).collect();
    let mut bytes = BTreeMap::new();
    for spec in stages(config, pp, (0, 0))?.iter().flat_map(|model| &model.specs) {
        // All ranks of the stages that have a parameter, or part of it, share out the whole of it.
        let ways = parallel.dp * parallel.cp * parallel.tp * holders[&spec.name];
        let of_moments = if spec.trained() { moments } else { 0 };
        let whole = elements[spec.name.as_str()] * (master + average + of_moments);
        bytes.insert(spec.name.clone(), whole / ways);
    }
    Ok(bytes.values().map(|&bytes| bytes as u64).sum())
}

/// Micro-batches between their forward and the end of their backward.
struct Flight {
    batches: Vec<DeviceBatch<Counting>>,
    kept: StageKept<Counting>,
}

struct Walk<'a> {
    backend: &'a Counting,
    models: &'a [Model],
    weights: &'a [Weights<Counting>],
    geometry: Geometry,
    shares: Shares,
    slots: Vec<Vec<Slot>>,
    per_shard: usize,
    parts: SequenceParts,
    host: Batch,
    settings: StepSettings,
    flights: BTreeMap<Chunk, Flight>,
    /// Accumulators of a union's shards, by `dir` and number of the union, and how many
    /// micro-batches are in them.
    chains: BTreeMap<(u8, usize), (Chain, usize)>,
    done: Subtrees<Counting>,
}

type Chain = Vec<RefCell<Gradients<Counting>>>;

type Buffers = Vec<<Counting as Backend>::Buffer>;

impl Walk<'_> {
    fn step(&mut self, op: Op) -> Result<(), MemoryError> {
        match op {
            Op::F(f) => self.forward(f),
            Op::B(b) => self.backward(b),
            Op::Bi(b) => self.backward_input(b),
            Op::W(b) => self.backward_weight(b),
            Op::FB { f, b } => self.pair(f, b),
        }
    }

    fn model(&self, chunk: Chunk) -> (&Model, &Weights<Counting>) {
        (&self.models[chunk.dir as usize], &self.weights[chunk.dir as usize])
    }

    fn is_last(&self, model: &Model) -> bool {
        model.at.pp + 1 == self.geometry.stages
    }

    /// Hidden states of each micro-batch, or their gradients, as they come from another stage.
    fn hidden(&self, model: &Model) -> Result<Buffers, MemoryError> {
        let rows = self.host.segments.iter().sum::<usize>() / self.parts.count;
        let dtype = model.recipe.activation();
        let one = |_| self.backend.zeros(dtype, &[rows, model.config.hidden_size]);
        Ok((0..self.lanes()).map(one).collect::<Result<_, _>>()?)
    }

    fn batches(&self, model: &Model) -> Result<Vec<DeviceBatch<Counting>>, MemoryError> {
        let mut lanes = Vec::with_capacity(self.lanes());
        for _ in 0..self.shares.side_by_side() {
            lanes.extend(model.parts(self.backend, &self.host, self.parts)?);
        }
        Ok(lanes)
    }

    /// Lanes that the rank has side by side.
    fn lanes(&self) -> usize {
        self.shares.side_by_side() * self.shares.parts()
    }

    fn input(&self, model: &Model) -> Result<Option<Buffers>, MemoryError> {
        (model.at.pp > 0).then(|| self.hidden(model)).transpose()
    }

    fn output_gradient(&self, model: &Model) -> Result<Option<Buffers>, MemoryError> {
        (!self.is_last(model)).then(|| self.hidden(model)).transpose()
    }

    /// Makes a union's accumulators where its first backward is.
    fn chain(&mut self, chunk: Chunk) -> Result<(u8, usize), MemoryError> {
        let key = (chunk.dir, chunk.mb as usize / self.per_shard);
        if !self.chains.contains_key(&key) {
            let (model, _) = self.model(chunk);
            let zeros = |i| model.zero_gradients_in_union(self.backend, i).map(RefCell::new);
            let chain = (0..self.lanes()).map(zeros).collect::<Result<_, _>>()?;
            self.chains.insert(key, (chain, 0));
        }
        Ok(key)
    }

    /// Counts a micro-batch; behind the last the union's accumulators are finished.
    fn chained(&mut self, chunk: Chunk) -> Result<(), MemoryError> {
        let key = self.chain(chunk)?;
        let (_, seen) = self.chains.get_mut(&key).expect("just made");
        *seen += 1;
        if *seen < self.per_shard {
            return Ok(());
        }
        let (chain, _) = self.chains.remove(&key).expect("just seen");
        let (dir, union) = (key.0 as usize, key.1);
        let direction = if self.geometry.shape == Shape::TwoWay { dir } else { 0 };
        let (models, slots) = (self.models, &self.slots[dir][..]);
        for (leaf, set) in self.shares.lanes((0, 0), direction, union).into_iter().zip(chain) {
            let finished = models[dir].finish_gradients(self.backend, set.into_inner())?;
            let of = ((dir, leaf), slots);
            self.done.insert(self.backend, &models[dir].gradient_sum(), of, finished)?;
        }
        Ok(())
    }

    fn forward(&mut self, chunk: Chunk) -> Result<(), MemoryError> {
        let (model, weights) = self.model(chunk);
        let batches = self.batches(model)?;
        let input = self.input(model)?;
        let lanes = lanes(&batches, &self.settings, None);
        let (_, kept) = model.stage_forward(self.backend, weights, &lanes, input)?;
        drop(lanes);
        self.flights.insert(chunk, Flight { batches, kept });
        Ok(())
    }

    fn backward(&mut self, chunk: Chunk) -> Result<(), MemoryError> {
        let chain = self.chain(chunk)?;
        let Flight { batches, kept } = self.flights.remove(&chunk).expect("forward comes first");
        let (model, weights) = self.model(chunk);
        let dy = self.output_gradient(model)?;
        let lanes = lanes(&batches, &self.settings, Some(&self.chains[&chain].0));
        model.stage_backward(self.backend, weights, &lanes, kept, dy)?;
        drop(lanes);
        self.chained(chunk)
    }

    fn backward_input(&mut self, chunk: Chunk) -> Result<(), MemoryError> {
        let chain = self.chain(chunk)?;
        let Flight { batches, mut kept } =
            self.flights.remove(&chunk).expect("forward comes first");
        let (model, weights) = self.model(chunk);
        let dy = self.output_gradient(model)?;
        let lanes = lanes(&batches, &self.settings, Some(&self.chains[&chain].0));
        model.stage_backward_input(self.backend, weights, &lanes, &mut kept, dy)?;
        drop(lanes);
        self.flights.insert(chunk, Flight { batches, kept });
        Ok(())
    }

    fn backward_weight(&mut self, chunk: Chunk) -> Result<(), MemoryError> {
        let chain = self.chain(chunk)?;
        let Flight { batches, kept } = self.flights.remove(&chunk).expect("forward comes first");
        let (model, weights) = self.model(chunk);
        let lanes = lanes(&batches, &self.settings, Some(&self.chains[&chain].0));
        model.stage_backward_weight(self.backend, weights, &lanes, kept)?;
        drop(lanes);
        self.chained(chunk)
    }

    fn pair(&mut self, f: Chunk, b: Chunk) -> Result<(), MemoryError> {
        let chain = self.chain(b)?;
        let Flight { batches: back, kept } = self.flights.remove(&b).expect("forward comes first");
        let ((model, weights), (model_b, weights_b)) = (self.model(f), self.model(b));
        let batches = self.batches(model)?;
        let (input, dy) = (self.input(model)?, self.output_gradient(model_b)?);
        let of_forward = lanes(&batches, &self.settings, None);
        let of_backward = lanes(&back, &self.settings, Some(&self.chains[&chain].0));
        let backward =
            PairedBackward { model: model_b, weights: weights_b, lanes: &of_backward, kept, dy };
        let of_f = (weights, &of_forward[..], input);
        let ((_, kept), _) = model.stage_pair(self.backend, of_f, backward)?;
        drop((of_forward, of_backward));
        self.flights.insert(f, Flight { batches, kept });
        self.chained(b)
    }
}

fn lanes<'f>(
    batches: &'f [DeviceBatch<Counting>],
    settings: &'f StepSettings,
    accumulators: Option<&'f Chain>,
) -> Vec<Lane<'f, Counting>> {
    let lane = |(i, batch)| Lane { batch, settings, gradients: accumulators.map(|all| &all[i]) };
    batches.iter().enumerate().map(lane).collect()
}
