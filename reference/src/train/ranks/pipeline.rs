//! Executes a rank's instructions of a pipeline schedule: every op on the stage that it names, with
//! hidden states and their gradients from and to the neighbouring stages.
//!
//! What is sent does not wait for its receiver. A micro-batch's backward adds to the accumulators
//! of its shard in the order of the shard's micro-batches, which every schedule keeps.

use std::cell::RefCell;
use std::collections::BTreeMap;

use fathom_schedule::{Chunk, Op};

use super::data::StepData;
use super::world::World;
use crate::backend::{Backend, Result};
use crate::exchange::Communicator;
use crate::exchange::backend::Travelling;
use crate::exchange::clock::{Clock, INTO_STAGE};
use crate::layers::{Gradients, Weights};
use crate::model::{
    DeviceBatch, Lane, Model, PairedBackward, SequenceParts, StageKept, StageReport, StepSettings,
};
use crate::train::shards::{Slot, Subtrees};

/// Which way something passes between stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Forward,
    Backward,
}

/// What enters a stage: hidden states from the stage before, or gradients from the one behind.
type Entry = (Way, usize, usize);

/// The connections to the neighbouring stages on other ranks.
pub(super) struct Links {
    of: BTreeMap<Entry, Communicator>,
}

impl Links {
    /// Those of a rank. An entry is named by way, the stage that is entered, and direction.
    pub fn new(world: &World) -> Links {
        let mut of = BTreeMap::new();
        let (geometry, pp) = (&world.geometry, world.at.pp);
        let mut link = |way, stage, direction, from: usize, to: usize| {
            if from == to {
                return;
            }
            let name = format!("{INTO_STAGE} {stage}, {way:?}, direction {direction}");
            let data = world.data(world.at);
            let members = [from, to].map(|pp| world.number(pp, data, world.at.tp));
            let communicator = Communicator::new(&world.exchange, &name, &members);
            of.insert((way, stage, direction), communicator);
        };
        for dir in 0..geometry.dirs() {
            let (stage, direction) = (geometry.stage(pp, dir as u8), world.direction(dir));
            if let Some((next, _)) = geometry.deeper(pp, dir as u8) {
                link(Way::Forward, stage + 1, direction, pp, next);
                link(Way::Backward, stage, direction, next, pp);
            }
            if let Some((before, _)) = geometry.shallower(pp, dir as u8) {
                link(Way::Forward, stage, direction, before, pp);
                link(Way::Backward, stage - 1, direction, pp, before);
            }
        }
        Links { of }
    }

    /// All of them, in an order that ranks have in common.
    pub fn all(&self) -> Vec<&Communicator> {
        self.of.values().collect()
    }
}

/// A lane's report of one stage.
pub(super) struct Reported {
    /// Number of the lane in the step: micro-batches in order, each by parts.
    pub lane: usize,
    pub stage: usize,
    pub report: StageReport,
}

/// What a rank has once its instructions are through.
pub(super) struct Executed<B: Backend> {
    /// The accumulators of shards that are through.
    pub gradients: Subtrees<B>,
    pub reports: Vec<Reported>,
}

/// What a step's instructions work on.
pub(super) struct Executor<'a, B: Backend> {
    pub world: &'a World,
    pub links: &'a Links,
    pub backend: &'a B,
    /// The rank's stages and their weights, by `dir`.
    pub models: &'a [Model],
    pub weights: &'a [Weights<B>],
    /// The accumulators that the rank adds up over its shards, by `dir`.
    pub slots: &'a [Vec<Slot>],
    pub data: &'a StepData,
    pub settings: &'a StepSettings,
    /// Micro-batches of a shard.
    pub per_shard: usize,
    pub parts: SequenceParts,
    pub clock: &'a Clock,
}

/// Micro-batches between their forward and the end of their backward.
struct Flight<B: Backend> {
    batches: Vec<DeviceBatch<B>>,
    settings: Vec<StepSettings>,
    kept: StageKept<B>,
}

impl<B: Backend> Flight<B> {
    fn lanes<'f>(&'f self, accumulators: &'f [RefCell<Gradients<B>>]) -> Vec<Lane<'f, B>> {
        let lanes = self.batches.iter().zip(&self.settings).zip(accumulators);
        let lane = |((batch, settings), cell)| Lane { batch, settings, gradients: Some(cell) };
        lanes.map(lane).collect()
    }
}

/// The instructions with the backwards of each `dir` in the order of micro-batches, in which shards
/// are chained. That is how every schedule has them but GPipe, whose backwards run the last first;
/// they take as long the other way round, and all ranks turn them.
pub(crate) fn first_in_first_out(ops: &[Op]) -> Vec<Op> {
    let mut order: BTreeMap<u8, Vec<u32>> = BTreeMap::new();
    for b in ops.iter().filter_map(|op| op.backward()) {
        order.entry(b.dir).or_default().push(b.mb);
    }
    let turned = |chunk: Chunk| {
        let order = &order[&chunk.dir];
        let place = order.iter().position(|&mb| mb == chunk.mb).expect("it has a backward");
        let mut sorted = order.clone();
        sorted.sort_unstable();
        Chunk { mb: sorted[place], ..chunk }
    };
    let op = |op: &Op| match *op {
        Op::F(f) => Op::F(f),
        Op::B(b) => Op::B(turned(b)),
        Op::Bi(b) => Op::Bi(turned(b)),
        Op::W(b) => Op::W(turned(b)),
        Op::FB { f, b } => Op::FB { f, b: turned(b) },
    };
    if order.values().all(|of_dir| of_dir.is_sorted()) {
        return ops.to_vec();
    }
    ops.iter().map(op).collect()
}

/// Micro-batches of a forward.
fn lanes<'f, B: Backend>(
    batches: &'f [DeviceBatch<B>],
    settings: &'f [StepSettings],
) -> Vec<Lane<'f, B>> {
    let lane = |(batch, settings)| Lane { batch, settings, gradients: None };
    batches.iter().zip(settings).map(lane).collect()
}

/// The accumulators of a union's shards on one stage, and how many micro-batches they have seen.
struct Chain<B: Backend> {
    accumulators: Vec<RefCell<Gradients<B>>>,
    seen: usize,
}

struct Running<'a, B: Backend> {
    executor: &'a Executor<'a, B>,
    flights: BTreeMap<Chunk, Flight<B>>,
    chains: BTreeMap<(usize, usize), Chain<B>>,
    /// What passes between two stages of this rank, by entry and micro-batch.
    local: BTreeMap<(Entry, u32), Vec<B::Buffer>>,
    /// When the instruction's inputs were there.
    began: u64,
    done: Executed<B>,
}

impl<B: Travelling> Executor<'_, B> {
    /// Runs the instructions.
    ///
    /// # Errors
    /// Those of backend and exchange.
    ///
    /// # Panics
    /// Where the instructions are none that `fathom_schedule::check` proves executable.
    pub fn run(&self, ops: &[Op]) -> Result<Executed<B>> {
        let gradients = Subtrees::new(self.world.shares.leaves());
        let done = Executed { gradients, reports: Vec::new() };
        let mut running = Running {
            executor: self,
            flights: BTreeMap::new(),
            chains: BTreeMap::new(),
            local: BTreeMap::new(),
            began: 0,
            done,
        };
        for op in first_in_first_out(ops) {
            running.began = self.clock.now();
            match op {
                Op::F(f) => running.forward(f)?,
                Op::B(b) => running.backward(b)?,
                Op::Bi(b) => running.backward_input(b)?,
                Op::W(b) => running.backward_weight(b)?,
                Op::FB { f, b } => running.pair(f, b)?,
            }
            self.clock.instruction(running.began);
        }
        assert!(running.flights.is_empty() && running.chains.is_empty(), "every chunk is through");
        Ok(running.done)
    }
}

impl<B: Travelling> Running<'_, B> {
    /// Direction, stage, union and place in it of a chunk.
    fn place(&self, chunk: Chunk) -> (usize, usize, usize, usize) {
        let Executor { world, per_shard, .. } = self.executor;
        let dir = chunk.dir as usize;
        let stage = world.geometry.stage(world.at.pp, chunk.dir);
        let mb = chunk.mb as usize;
        (world.direction(dir), stage, mb / per_shard, mb % per_shard)
    }

    fn what(&self, stage: usize, chunk: Chunk) -> String {
        let step = self.executor.settings.step;
        format!("stage {stage}, micro-batch {} of its direction, step {step}", chunk.mb)
    }

    fn give(&mut self, entry: Entry, chunk: Chunk, buffers: Vec<B::Buffer>) -> Result<()> {
        let Executor { links, backend, .. } = self.executor;
        let Some(link) = links.of.get(&entry) else {
            self.local.insert((entry, chunk.mb), buffers);
            return Ok(());
        };
        backend.send_to(link, &self.what(entry.1, chunk), 1, buffers)
    }

    fn receive(&mut self, entry: Entry, chunk: Chunk) -> Result<Vec<B::Buffer>> {
        let Executor { links, backend, clock, .. } = self.executor;
        let Some(link) = links.of.get(&entry) else {
            let own = self.local.remove(&(entry, chunk.mb));
            return Ok(own.expect("the other stage of this rank comes first"));
        };
        let buffers = backend.receive_from(link, &self.what(entry.1, chunk), 0)?;
        self.began = clock.now();
        Ok(buffers)
    }

    /// A chunk's micro-batches, or this rank's parts of them, each with what it knows of its step.
    #[allow(clippy::type_complexity)]
    fn batches(&self, chunk: Chunk) -> Result<(Vec<DeviceBatch<B>>, Vec<StepSettings>)> {
        let Executor { world, backend, models, data, settings, per_shard, parts, .. } =
            self.executor;
        let (direction, _, union, j) = self.place(chunk);
        let model = &models[chunk.dir as usize];
        let (mut batches, mut of_step) = (Vec::new(), Vec::new());
        for shard in world.shares.shards(world.at.dp, direction, union) {
            batches.extend(model.parts(*backend, &data.shards[&shard][j], *parts)?);
            let micro_batch = Some(shard * per_shard + j);
            of_step.resize(batches.len(), StepSettings { micro_batch, ..(*settings).clone() });
        }
        Ok((batches, of_step))
    }

    fn input(&mut self, chunk: Chunk) -> Result<Option<Vec<B::Buffer>>> {
        let (direction, stage, ..) = self.place(chunk);
        (stage > 0).then(|| self.receive((Way::Forward, stage, direction), chunk)).transpose()
    }

    /// Ends a forward: reports, output to the next stage.
    fn forwarded(
        &mut self,
        chunk: Chunk,
        (batches, settings): (Vec<DeviceBatch<B>>, Vec<StepSettings>),
        (output, kept): (Vec<B::Buffer>, StageKept<B>),
    ) -> Result<()> {
        let Executor { world, backend, models, .. } = self.executor;
        let (direction, stage, ..) = self.place(chunk);
        let reports = models[chunk.dir as usize].stage_reports(*backend, &kept)?;
        let shares = &world.shares;
        for (i, (settings, report)) in settings.iter().zip(reports).enumerate() {
            let micro_batch = settings.micro_batch.expect("in a step it has a number");
            let part = world.at.cp * shares.parts() + i % shares.parts();
            let lane = micro_batch * shares.context_shards + part;
            self.done.reports.push(Reported { lane, stage, report });
        }
        if stage + 1 < world.geometry.stages {
            self.give((Way::Forward, stage + 1, direction), chunk, output)?;
        }
        self.flights.insert(chunk, Flight { batches, settings, kept });
        Ok(())
    }

    fn forward(&mut self, chunk: Chunk) -> Result<()> {
        let Executor { backend, models, weights, .. } = self.executor;
        let dir = chunk.dir as usize;
        let (batches, settings) = self.batches(chunk)?;
        let input = self.input(chunk)?;
        let lanes = lanes(&batches, &settings);
        let done = models[dir].stage_forward(*backend, &weights[dir], &lanes, input)?;
        drop(lanes);
        self.forwarded(chunk, (batches, settings), done)
    }

    /// A forward and a backward, interleaved. What they need has come before either begins.
    fn pair(&mut self, f: Chunk, b: Chunk) -> Result<()> {
        let Executor { backend, models, weights, .. } = self.executor;
        let [dir, dir_b] = [f.dir, b.dir].map(|dir| dir as usize);
        let (batches, settings) = self.batches(f)?;
        let input = self.input(f)?;
        let dy = self.output_gradient(b)?;
        let chain = self.chain(b)?;
        let mut flight = self.flights.remove(&b).expect("its forward comes first");
        let kept = std::mem::replace(&mut flight.kept, StageKept::empty());
        let (forward, back) = (lanes(&batches, &settings), flight.lanes(&chain.accumulators));
        let (model, weights_b) = (&models[dir_b], &weights[dir_b]);
        let backward = PairedBackward { model, weights: weights_b, lanes: &back, kept, dy };
        let of_forward = (&weights[dir], &forward[..], input);
        let (done, dx) = models[dir].stage_pair(*backend, of_forward, backward)?;
        drop((forward, back));
        self.chained(b, chain)?;
        self.give_back(b, dx)?;
        self.forwarded(f, (batches, settings), done)
    }

    /// The accumulators that a chunk's backward adds to.
    fn chain(&mut self, chunk: Chunk) -> Result<Chain<B>> {
        let (_, _, union, _) = self.place(chunk);
        let dir = chunk.dir as usize;
        if let Some(chain) = self.chains.remove(&(dir, union)) {
            return Ok(chain);
        }
        let Executor { world, backend, models, .. } = self.executor;
        let zeros = |i| models[dir].zero_gradients_in_union(*backend, i).map(RefCell::new);
        let lanes = 0..world.shares.side_by_side() * world.shares.parts();
        Ok(Chain { accumulators: lanes.map(zeros).collect::<Result<_>>()?, seen: 0 })
    }

    /// Puts the accumulators back once a chunk's weight gradients are in them, or, behind the last
    /// micro-batch, finishes them.
    fn chained(&mut self, chunk: Chunk, mut chain: Chain<B>) -> Result<()> {
        let (direction, _, union, j) = self.place(chunk);
        let dir = chunk.dir as usize;
        assert_eq!(chain.seen, j, "a shard's micro-batches are chained in order: {chunk:?}");
        chain.seen += 1;
        let Executor { world, backend, models, slots, per_shard, .. } = self.executor;
        if chain.seen < *per_shard {
            self.chains.insert((dir, union), chain);
            return Ok(());
        }
        let leaves = world.shares.lanes((world.at.dp, world.at.cp), direction, union);
        for (leaf, gradients) in leaves.into_iter().zip(chain.accumulators) {
            let finished = models[dir].finish_gradients(*backend, gradients.into_inner())?;
            let (op, of) = (models[dir].gradient_sum(), ((dir, leaf), &slots[dir][..]));
            self.done.gradients.insert(*backend, &op, of, finished)?;
        }
        Ok(())
    }

    fn output_gradient(&mut self, chunk: Chunk) -> Result<Option<Vec<B::Buffer>>> {
        let (direction, stage, ..) = self.place(chunk);
        let last = stage + 1 == self.executor.world.geometry.stages;
        let entry = (Way::Backward, stage, direction);
        (!last).then(|| self.receive(entry, chunk)).transpose()
    }

    fn give_back(&mut self, chunk: Chunk, dx: Vec<B::Buffer>) -> Result<()> {
        let (direction, stage, ..) = self.place(chunk);
        match stage {
            0 => Ok(()),
            _ => self.give((Way::Backward, stage - 1, direction), chunk, dx),
        }
    }

    fn backward(&mut self, chunk: Chunk) -> Result<()> {
        let Executor { backend, models, weights, .. } = self.executor;
        let dir = chunk.dir as usize;
        let dy = self.output_gradient(chunk)?;
        let chain = self.chain(chunk)?;
        let mut flight = self.flights.remove(&chunk).expect("forward comes first");
        let kept = std::mem::replace(&mut flight.kept, StageKept::empty());
        let lanes = flight.lanes(&chain.accumulators);
        let dx = models[dir].stage_backward(*backend, &weights[dir], &lanes, kept, dy)?;
        drop(lanes);
        self.chained(chunk, chain)?;
        self.give_back(chunk, dx)
    }

    fn backward_input(&mut self, chunk: Chunk) -> Result<()> {
        let Executor { backend, models, weights, .. } = self.executor;
        let dir = chunk.dir as usize;
        let dy = self.output_gradient(chunk)?;
        let chain = self.chain(chunk)?;
        let mut flight = self.flights.remove(&chunk).expect("forward comes first");
        let mut kept = std::mem::replace(&mut flight.kept, StageKept::empty());
        let lanes = flight.lanes(&chain.accumulators);
        let dx =
            models[dir].stage_backward_input(*backend, &weights[dir], &lanes, &mut kept, dy)?;
        drop(lanes);
        flight.kept = kept;
        self.flights.insert(chunk, flight);
        let (_, _, union, _) = self.place(chunk);
        self.chains.insert((dir, union), chain);
        self.give_back(chunk, dx)
    }

    fn backward_weight(&mut self, chunk: Chunk) -> Result<()> {
        let Executor { backend, models, weights, .. } = self.executor;
        let dir = chunk.dir as usize;
        let chain = self.chain(chunk)?;
        let mut flight = self.flights.remove(&chunk).expect("input-backward comes first");
        let kept = std::mem::replace(&mut flight.kept, StageKept::empty());
        let lanes = flight.lanes(&chain.accumulators);
        models[dir].stage_backward_weight(*backend, &weights[dir], &lanes, kept)?;
        drop(lanes);
        self.chained(chunk, chain)
    }
}
