//! A run on many ranks, with the bits of one process: what `docs/distributed.md` describes.
//!
//! [`RankTrainer`] is one rank. `world` is its place, `data` brings it its sequences,
//! `pipeline` executes its instructions, `pieces` and `zero` are ZeRO-1, `report` adds up
//! losses and loads, `trace` draws what was executed, `culprit` finds where a value that
//! is not finite arose. [`run`] starts ranks as threads.

mod culprit;
mod data;
mod pieces;
mod pipeline;
mod report;
pub mod run;
mod trace;
mod world;
mod zero;

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use fathom_schedule::perfetto::{COMMUNICATION, COMPUTE};
use fathom_trace::Parallel;

use self::data::StepData;
pub(crate) use self::pipeline::first_in_first_out as in_order;
pub use self::trace::Timeline;
pub(crate) use self::world::{period, stages};

use self::pieces::Pieces;
use self::pipeline::{Executed, Executor, Links, first_in_first_out};
use self::trace::Traced;
use self::world::World;
use self::zero::Routes;
use super::Runner;
use super::config::{Plan, Schedules};
use super::schedule::Point;
use super::state::Header;
use super::taken::Taken;
use super::trainer::{StepLog, StepOutcome, ValidationLog, validate};
use super::{TrainConfig, TrainError};
use crate::Tensor;
use crate::backend::Backend;
use crate::backend::direct::Direct;
use crate::checkpoint::HfCheckpoint;
use crate::checkpoint::training::{self, Part, Saved};
use crate::data::{Loader, LoaderState, Tokenizer};
use crate::exchange::Exchange;
use crate::exchange::backend::{Arriving, Ranked, Travelling};
use crate::exchange::clock::{Clock, Timed, Waits};
use crate::layers::{Gradients, Weights};
use crate::model::routing::move_biases;
use crate::model::{Batch, Model, ParamKind, ParamSpec, Params, convert};
use crate::optim::ema::Ema;
use crate::optim::{Clip, NonFinite, Optimizer, scalar};

/// A run on one rank: its share of everything that a step changes.
pub struct RankTrainer<B: Backend> {
    backend: Ranked<B>,
    clock: Arc<Clock>,
    /// Where the timeline goes, and, on rank 0, the steps so far.
    timeline: Timeline,
    traced: Vec<Traced>,
    config: TrainConfig,
    world: World,
    links: Links,
    /// The model as one process has it: names, order and shapes.
    whole: Model,
    pieces: Pieces,
    routes: Routes,
    /// This rank's pieces as a model's list of parameters.
    owned: Model,
    /// Masters of this rank's pieces.
    params: Params<Ranked<B>>,
    optimizer: Optimizer<Ranked<B>>,
    ema: Option<Ema>,
    /// On the ranks that read the data.
    loader: Option<Arc<Mutex<Loader>>>,
    place: LoaderState,
    tokenizer: Tokenizer,
    validation: Vec<Batch>,
    schedules: Schedules,
    steps: u64,
    tokens: u64,
}

/// What all ranks of a process share: read once.
#[derive(Clone)]
pub struct Shared {
    /// The data; the ranks of a process read it in turns.
    pub loader: Arc<Mutex<Loader>>,
    /// The run's configuration, with what follows from the data.
    pub config: TrainConfig,
    /// The checkpoint that the run goes on from.
    pub saved: Option<Arc<Saved>>,
    /// What is written of the executed timeline at the end of the run.
    pub timeline: Timeline,
}

impl<B: Backend> RankTrainer<B> {
    /// A rank of a run at its beginning, or where `shared.saved` was written, on whatever layout.
    ///
    /// # Errors
    /// [`TrainError`].
    pub fn new(
        shared: &Shared,
        backend: B,
        exchange: Arc<dyn Exchange>,
    ) -> Result<RankTrainer<B>, TrainError> {
        let Shared { loader, config, saved, timeline } = shared;
        let config = config.clone();
        let schedules =
            config.schedules().map_err(|(key, message)| TrainError::Setting { key, message })?;
        let clock = Arc::new(Clock::new(timeline.is_asked_for()));
        let exchange = Arc::new(Timed { inner: exchange, clock: Arc::clone(&clock) });
        let world = World::new(&config, exchange)?;
        let (place, tokenizer, held_out) = {
            let loader = loader.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let held_out = if world.rank == 0 { loader.held_out()? } else { Vec::new() };
            (loader.state(), loader.tokenizer().clone(), held_out)
        };
        agree(&world, &config, &place, &tokenizer)?;
        let links = Links::new(&world);
        let mut backend = Ranked::new(backend, world.groups(), Arc::clone(&clock));
        let mut connected = links.all();
        connected.push(&world.between);
        backend.connect_devices(&connected)?;
        let whole = Model::new(&config.model, config.recipe.clone(), Parallel::default(), 0)?;
        let pieces = Pieces::new(&config, &whole, &world)?;
        let routes = Routes::new(&pieces, &world);
        let owned = owned(&whole, &pieces, &routes);
        let validation = held_out.chunks(config.micro_batch).map(Batch::join).collect();
        let optimizer = Optimizer::new(&config.optim, &owned, &backend)?;
        let mut trainer = RankTrainer {
            backend,
            clock,
            timeline: timeline.clone(),
            traced: Vec::new(),
            links,
            loader: world.readers.is_some().then(|| Arc::clone(loader)),
            world,
            whole,
            pieces,
            routes,
            owned,
            params: Params { buffers: Vec::new() },
            optimizer,
            ema: None,
            place,
            tokenizer,
            validation,
            schedules,
            steps: 0,
            tokens: 0,
            config,
        };
        match saved {
            Some(saved) => trainer.take(saved)?,
            None => trainer.begin()?,
        }
        Ok(trainer)
    }

    /// Initial values of this rank's pieces.
    fn begin(&mut self) -> Result<(), TrainError> {
        let mut own = Vec::with_capacity(self.routes.own.len());
        let mut needed: Vec<usize> =
            self.routes.own.iter().map(|&i| self.pieces.all[i].param).collect();
        needed.dedup();
        let checkpoint =
            self.config.checkpoint.initial.as_ref().map(|f| HfCheckpoint::open(f)).transpose()?;
        if let Some(checkpoint) = &checkpoint {
            checkpoint.check(&self.whole)?;
        }
        for param in needed {
            // A part of the model, so that nothing else is asked of the checkpoint.
            let parallel = Parallel { dp: self.world.all.size() + 1, ..Parallel::default() };
            let specs = vec![self.whole.specs[param].clone()];
            let part = Model { specs, parallel, ..self.whole.clone() };
            let values = match &checkpoint {
                Some(checkpoint) => checkpoint.load(&part, &self.backend)?,
                None => part.init(&self.backend, self.config.seed)?,
            };
            let values = self.backend.download(&values.buffers[0])?;
            own.extend(self.slices(param, &values));
        }
        self.start_ema(own.clone());
        let upload = |t| self.backend.upload(t);
        self.params = Params { buffers: own.into_iter().map(upload).collect::<Result<_, _>>()? };
        Ok(())
    }

    /// This rank's pieces of a whole parameter.
    fn slices(&self, param: usize, values: &Tensor) -> Vec<Tensor> {
        let size = values.dtype().size();
        let own = |&&i: &&usize| self.pieces.all[i].param == param;
        let slice = |&i: &usize| {
            let range = &self.pieces.all[i].range;
            let bytes = &values.bytes()[range.start * size..range.end * size];
            Tensor::from_bytes(values.dtype(), &[range.len()], bytes)
        };
        self.routes.own.iter().filter(own).map(slice).collect()
    }

    /// This rank's pieces of a checkpoint.
    fn take(&mut self, saved: &Saved) -> Result<(), TrainError> {
        let header = Header::of(saved)?;
        let mut taken = Taken::new(saved);
        let master = self.whole.recipe.master();
        let moment = Optimizer::<B>::moment_dtype(&self.config.optim, &self.whole);
        let averages = self.config.optim.ema_decay > 0.0;
        let (mut weights, mut average) = (Vec::new(), Vec::new());
        let (mut first, mut second) = (Vec::new(), Vec::new());
        // Every rank looks at every tensor, so that one that is missing is missed by all.
        for (param, spec) in self.whole.specs.iter().enumerate() {
            let values = taken.take("weights", spec, master)?;
            for piece in self.slices(param, &values) {
                weights.push(self.backend.upload(piece)?);
            }
            for (kind, moments) in [("first", &mut first), ("second", &mut second)] {
                if !spec.trained() {
                    moments.extend(self.slices(param, &values).iter().map(|_| None));
                    continue;
                }
                for piece in self.slices(param, &taken.take(kind, spec, moment)?) {
                    moments.push(Some(self.backend.upload(piece)?));
                }
            }
            if averages {
                average.extend(self.slices(param, &taken.take("average", spec, master)?));
            }
        }
        self.params = Params { buffers: weights };
        let (updates, config) = (header.updates, self.config.optim.clone());
        self.optimizer = Optimizer { config, updates, first, second };
        self.start_ema(average);
        (self.steps, self.tokens, self.place) = (saved.step, header.tokens, header.data);
        if let Some(loader) = &self.loader {
            // Only to see that the place is one of this data.
            let mut loader = loader.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            loader.restore(&self.place)?;
        }
        Ok(())
    }

    fn start_ema(&mut self, average: Vec<Tensor>) {
        let decay = self.config.optim.ema_decay;
        self.ema = (decay > 0.0).then(|| Ema::new(average, decay));
    }

    /// The connections between devices, for who is to give them up.
    fn devices(&self) -> Vec<Rc<dyn Direct<B::Buffer>>> {
        self.backend.devices()
    }

    fn plan(&self) -> Plan {
        self.schedules.at(Point { step: self.steps + 1, tokens: self.tokens })
    }

    fn zero(&self) -> (&World, &Pieces, &Routes) {
        (&self.world, &self.pieces, &self.routes)
    }

    /// The masters of this rank's pieces, on the host.
    fn own(&self) -> Result<Vec<Tensor>, TrainError> {
        let buffers = self.params.buffers.iter();
        Ok(buffers.map(|b| self.backend.download(b)).collect::<Result<_, _>>()?)
    }

    /// The weights of this rank's stages.
    fn weights<R>(&self, backend: &R) -> Result<Vec<Weights<R>>, TrainError>
    where
        R: Travelling<Buffer = Arriving<B>>,
    {
        let what = format!("weights for step {}", self.steps + 1);
        let params = match backend.connects(&self.world.between) {
            true => zero::gather_by_devices(self.zero(), backend, &self.params.buffers, &what)?,
            false => zero::gather(self.zero(), backend, &self.own()?, &what)?,
        };
        let models = self.pieces.models(&self.world, self.world.rank);
        let weights = |(model, params)| Model::training_weights(model, backend, params);
        Ok(models.iter().zip(params).map(weights).collect::<Result<_, _>>()?)
    }

    /// Forwards and backwards of a step on this rank.
    fn execute<R>(
        &self,
        backend: &R,
        plan: Plan,
        data: &StepData,
    ) -> Result<Executed<R>, TrainError>
    where
        R: Travelling<Buffer = Arriving<B>>,
    {
        let setting = |(key, message)| TrainError::Setting { key, message };
        let schedule = self.config.pipeline(plan.batch).map_err(setting)?;
        let settings = data.counts.settings(&self.config, plan, self.steps + 1);
        let begin = self.clock.now();
        let weights = self.weights(backend)?;
        self.clock.tail(COMMUNICATION, "parameter gather", begin);
        let executor = Executor {
            clock: &self.clock,
            world: &self.world,
            links: &self.links,
            backend,
            models: self.pieces.models(&self.world, self.world.rank),
            weights: &weights,
            slots: &self.routes.slots,
            data,
            settings: &settings,
            per_shard: (plan.batch / self.config.grad_shards).div_ceil(self.config.micro_batch),
            parts: self.config.sequence_parts(),
        };
        Ok(executor.run(&schedule.ranks[self.world.at.pp])?)
    }

    /// The gradient of this rank's pieces, and the whole gradient's norm.
    fn reduce<R: Travelling>(
        &self,
        backend: &R,
        executed: &mut Executed<R>,
    ) -> Result<(Gradients<R>, Clip<R>), TrainError> {
        let step = self.steps + 1;
        let gradients = zero::reduce(self.zero(), &self.whole, backend, executed, step)?;
        let max_norm = self.config.optim.clip;
        let clip = zero::clip(
            (&self.world, &self.pieces),
            &self.whole,
            backend,
            &gradients,
            (max_norm, step),
        )?;
        Ok((gradients, clip))
    }

    /// Moves the selection biases among this rank's pieces.
    fn move_biases(&mut self, loads: &[(usize, Vec<u64>)], gamma: f32) -> Result<(), TrainError> {
        for (buffer, &i) in self.params.buffers.iter_mut().zip(&self.routes.own) {
            let piece = &self.pieces.all[i];
            let spec = &self.whole.specs[piece.param];
            let loads = loads.iter().find(|(layer, _)| Some(*layer) == spec.layer);
            let (ParamKind::SelectionBias, Some((_, loads))) = (spec.kind, loads) else { continue };
            let master = self.whole.recipe.master();
            let own = convert(self.backend.download(buffer)?, fathom_trace::DType::F32);
            let mut biases = vec![0.0; loads.len()];
            biases[piece.range.clone()].copy_from_slice(own.as_slice::<f32>());
            move_biases(&mut biases, loads, gamma);
            let moved = biases[piece.range.clone()].to_vec();
            let moved = convert(Tensor::from_vec(&[moved.len()], moved), master);
            *buffer = self.backend.upload(moved)?;
        }
        Ok(())
    }

    /// Values of this rank's pieces under a kind: what its part of a checkpoint holds.
    fn parts(&self, kind: &str, values: Vec<Option<Tensor>>) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        for (&i, tensor) in self.routes.own.iter().zip(values) {
            let Some(tensor) = tensor else { continue };
            let piece = &self.pieces.all[i];
            let spec = &self.whole.specs[piece.param];
            let name = format!("{kind}/{}", spec.name);
            match parts.last_mut() {
                Some(last)
                    if last.name == name && last.offset + last.elements() == piece.range.start =>
                {
                    last.lists.push(tensor);
                }
                _ => parts.push(Part {
                    name,
                    shape: spec.shape.clone(),
                    offset: piece.range.start,
                    lists: vec![tensor],
                }),
            }
        }
        parts
    }
}

/// This rank's pieces as a model's list of parameters.
fn owned(whole: &Model, pieces: &Pieces, routes: &Routes) -> Model {
    let spec = |&i: &usize| {
        let piece = &pieces.all[i];
        let shape = vec![piece.range.len()];
        ParamSpec { shape, parts: Vec::new(), ..whole.specs[piece.param].clone() }
    };
    Model { specs: routes.own.iter().map(spec).collect(), ..whole.clone() }
}

/// Refuses ranks of another program, with another configuration or other data.
fn agree(
    world: &World,
    config: &TrainConfig,
    place: &LoaderState,
    tokenizer: &Tokenizer,
) -> Result<(), TrainError> {
    let words = format!(
        "version {}\n{}data {}\ntokenizer {}\n",
        env!("CARGO_PKG_VERSION"),
        config.to_toml(),
        place.data,
        tokenizer.digest()
    );
    let own = words.into_bytes();
    let tensor = Tensor::from_vec(&[own.len()], own.clone());
    for (rank, other) in world.all.all_gather("configuration", vec![tensor])?.iter().enumerate() {
        if other[0].bytes() == own {
            continue;
        }
        let [own, other] = [&own[..], other[0].bytes()].map(String::from_utf8_lossy);
        let line = own.lines().zip(other.lines()).find(|(a, b)| a != b);
        let (own, other) = line.unwrap_or(("a configuration", "a longer or shorter one"));
        let message = format!("rank {} has '{own}', rank {rank} has '{other}'", world.rank);
        return Err(TrainError::Setting { key: "ranks disagree".into(), message });
    }
    Ok(())
}

impl<B: Backend> Runner for RankTrainer<B> {
    type Backend = Ranked<B>;

    fn backend(&self) -> &Ranked<B> {
        &self.backend
    }

    fn config(&self) -> &TrainConfig {
        &self.config
    }

    fn model(&self) -> &Model {
        &self.whole
    }

    fn progress(&self) -> (u64, u64) {
        (self.steps, self.tokens)
    }

    fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    fn data_digest(&self) -> String {
        self.place.data.clone()
    }

    fn speaks(&self) -> bool {
        self.world.rank == 0
    }

    fn step(&mut self, stop: &dyn Fn() -> bool) -> Result<StepOutcome, TrainError> {
        let (begin, step) = (Instant::now(), self.steps + 1);
        let plan = self.plan();
        let asked = Tensor::from_vec(&[1], vec![u8::from(self.world.rank == 0 && stop())]);
        let what = format!("whether step {step} begins");
        let asked = self.world.all.broadcast(&what, 0, vec![asked])?;
        if asked[0].bytes() != [0] {
            return Ok(StepOutcome::Interrupted);
        }
        let of = (step, plan.batch);
        let data = data::read(&self.world, &self.config, self.loader.as_ref(), &self.place, of)?;
        let mut executed = self.execute(&self.backend, plan, &data)?;
        let report = report::gather(&self.world, &executed.reports, step)?;
        let reduces = self.clock.now();
        let (gradients, clip) = self.reduce(&self.backend, &mut executed)?;
        drop(executed);
        self.clock.tail(COMMUNICATION, "gradient reduction", reduces);
        let updates = self.clock.now();
        let mut log = data.counts.log(plan, step, self.tokens, &report);
        log.gradient_norm = scalar(&self.backend.download(&clip.norm)?);
        let found = match log.finite() {
            true => {
                let rate = (&clip, plan.learning_rate);
                let Self { optimizer, owned, backend, params, .. } = self;
                optimizer.update(owned, backend, params, gradients, rate)?;
                if plan.bias_update_speed as f32 != 0.0 {
                    self.move_biases(&log.expert_load, plan.bias_update_speed as f32)?;
                }
                if let Some(ema) = &self.ema {
                    ema.update(self.own()?);
                }
                self.clock.tail(COMPUTE, "optimizer", updates);
                None
            }
            false => Some(culprit::find(self, plan, &data, &log)?),
        };
        if let Some(found) = found {
            if self.config.optim.non_finite == NonFinite::Stop {
                return Err(TrainError::Diverged(Box::new(found)));
            }
            log.skipped = true;
            self.finish(&mut log, begin, data.place)?;
            return Ok(StepOutcome::Skipped(Box::new(log), Box::new(found)));
        }
        self.finish(&mut log, begin, data.place)?;
        Ok(StepOutcome::Done(Box::new(log)))
    }

    fn validate(&mut self) -> Result<Option<ValidationLog>, TrainError> {
        if !self.config.data.validation.is_on() {
            return Ok(None);
        }
        let begin = Instant::now();
        let Some(params) = self.whole_params(false)? else { return Ok(None) };
        let here = |buffer| self.backend.here(buffer);
        let params = Params::<B> {
            buffers: params.buffers.into_iter().map(here).collect::<Result<_, _>>()?,
        };
        let found = validate(&self.whole, self.backend.inner(), &params, &self.validation)?;
        Ok(found.map(|log| ValidationLog {
            step: self.steps,
            seconds: begin.elapsed().as_secs_f64(),
            ..log
        }))
    }

    fn averages(&self) -> bool {
        self.ema.is_some()
    }

    fn whole_params(&mut self, average: bool) -> Result<Option<Params<Ranked<B>>>, TrainError> {
        let own = match (&self.ema, average) {
            (Some(ema), true) => ema.read(),
            _ => self.own()?,
        };
        let what = format!("the whole model after step {}", self.steps);
        let Some(tensors) =
            zero::gather_whole((&self.world, &self.pieces), &self.whole, &own, &what)?
        else {
            return Ok(None);
        };
        let upload = |t| self.backend.upload(t);
        Ok(Some(Params { buffers: tensors.into_iter().map(upload).collect::<Result<_, _>>()? }))
    }

    fn checkpoint(&mut self, folder: &Path) -> Result<PathBuf, TrainError> {
        let (rank, all) = (self.world.rank, self.world.all.clone());
        let what = format!("checkpoint of step {}", self.steps);
        if rank == 0 {
            training::begin(folder, self.steps)?;
        }
        all.barrier(&what)?;
        let host = |buffers: &[Option<_>]| {
            let download = |b: &Option<_>| b.as_ref().map(|b| self.backend.download(b)).transpose();
            buffers.iter().map(download).collect::<Result<Vec<Option<Tensor>>, _>>()
        };
        let mut parts = self.parts("weights", self.own()?.into_iter().map(Some).collect());
        parts.extend(self.parts("first", host(&self.optimizer.first)?));
        parts.extend(self.parts("second", host(&self.optimizer.second)?));
        if let Some(ema) = &self.ema {
            parts.extend(self.parts("average", ema.read().into_iter().map(Some).collect()));
        }
        let shard_bytes = self.config.checkpoint.shard_bytes;
        let listed = training::write_parts(folder, self.steps, rank, &parts, shard_bytes)?;
        let listed = serde_json::to_vec(&listed).expect("plain data");
        let all_listed = all.all_gather(&what, vec![Tensor::from_vec(&[listed.len()], listed)])?;
        let path = training::path(folder, self.steps);
        if rank == 0 {
            let files = all_listed.iter().flat_map(|of_rank| {
                serde_json::from_slice::<Vec<_>>(of_rank[0].bytes()).expect("the rank's own JSON")
            });
            let header = Header {
                tokens: self.tokens,
                updates: self.optimizer.updates,
                config: self.config.saved(),
                data: self.place.clone(),
            };
            let header = serde_json::to_value(header).expect("plain data");
            training::commit(folder, self.steps, header, files.collect())?;
        }
        all.barrier(&what)?;
        Ok(path)
    }

    fn end(&mut self) -> Result<(), TrainError> {
        match self.world.rank {
            0 => self.timeline.write(&self.traced, &self.config),
            _ => Ok(()),
        }
    }
}

impl<B: Backend> RankTrainer<B> {
    /// Ends a step: its place, its times, and what every rank waited for.
    fn finish(
        &mut self,
        log: &mut StepLog,
        begin: Instant,
        place: LoaderState,
    ) -> Result<(), TrainError> {
        let new = log.tokens - self.tokens;
        (self.steps, self.tokens, self.place) = (log.step, log.tokens, place);
        log.seconds = begin.elapsed().as_secs_f64();
        log.tokens_per_second = new as f64 / log.seconds;
        let Waits { stage_s, rest_s } = self.clock.take_waits();
        let what = format!("times of step {}", log.step);
        let own = Tensor::from_vec(&[2], vec![stage_s, rest_s]);
        let all = self.world.all.all_gather(&what, vec![own])?;
        let mean = |i: usize| {
            let sum: f64 = all.iter().map(|of_rank| of_rank[0].as_slice::<f64>()[i]).sum();
            Some(sum / all.len() as f64)
        };
        (log.bubble_seconds, log.exposed_seconds) = (mean(0), mean(1));
        if self.clock.traces() {
            self.gather_spans(log.batch, &what)?;
        }
        Ok(())
    }

    /// The spans of all ranks, to rank 0.
    fn gather_spans(&mut self, batch: usize, what: &str) -> Result<(), TrainError> {
        let json = serde_json::to_vec(&self.clock.take_spans()).expect("plain data");
        let own = Tensor::from_vec(&[json.len()], json);
        let all = self.world.all.all_gather(what, vec![own])?;
        if self.world.rank == 0 {
            let setting = |(key, message)| TrainError::Setting { key, message };
            let mut schedule = self.config.pipeline(batch).map_err(setting)?;
            schedule.ranks.iter_mut().for_each(|ops| *ops = first_in_first_out(ops));
            let read = |t: Vec<Tensor>| serde_json::from_slice(t[0].bytes());
            let spans = all.into_iter().map(read).collect::<Result<_, _>>();
            self.traced.push(Traced { schedule, spans: spans.expect("the ranks' own JSON") });
        }
        Ok(())
    }
}
