//! A run on ranks that are threads of this process, or of which this process is one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use super::{RankTrainer, Shared, Timeline};
use crate::Tensor;
use crate::backend::Backend;
use crate::checkpoint::training::{self, Saved};
use crate::exchange::environment::Environment;
use crate::exchange::processes::{self, Transport};
use crate::exchange::threads::{self, End};
use crate::exchange::{Communicator, Exchange, one};
use crate::memory;
use crate::train::folder::Claim;
use crate::train::{Divergence, Event, RunFolder, Summary, TrainConfig, TrainError, Trainer, run};

/// Whether a run is to stop, and who is told of what it does.
pub type Calls<'a> = (&'a dyn Fn() -> bool, &'a mut dyn FnMut(&Event));

/// Runs `config` on the ranks of its layout, each a thread with a backend of its own, as
/// [`run::run`] does in one process; one rank is one process. `timeline` says what is written of
/// what was executed when.
///
/// # Errors
/// [`TrainError`]; that of the rank that failed first, or what every rank says.
pub fn run<B: Backend + 'static>(
    config: TrainConfig,
    backend: impl Fn(usize) -> B + Send + Sync + 'static,
    folder: &RunFolder,
    timeline: &Timeline,
    (stop, tell): Calls<'_>,
) -> Result<Summary, TrainError> {
    if config.parallel.world() == 1 {
        return run::run(config, backend(0), folder, stop, tell);
    }
    memory::training(&config)?.check()?;
    let (claimed, saved) = folder.claim(tell)?;
    let resumed_from = saved.as_ref().map(|s| s.step);
    let mut shared = Shared::open(config, saved.map(Arc::new))?;
    shared.timeline = timeline.clone();
    let world = shared.config.parallel.world();
    let timeout = Duration::from_secs_f64(shared.config.parallel.timeout_seconds);
    let (sender, events) = mpsc::channel::<Event>();
    let (sender, claimed) = (Mutex::new(Some(sender)), Mutex::new(Some(claimed)));
    let stopped = Arc::new(AtomicBool::new(false));
    // One a rank, so that a checkpoint is let go once every rank has taken its share.
    let shares = Mutex::new(vec![Some(shared); world]);
    let (asked, folder) = (Arc::clone(&stopped), folder.clone());
    let main = move |exchange: Arc<dyn Exchange>| {
        let rank = exchange.rank();
        let speaks = rank == 0;
        let sender = speaks.then(|| sender.lock().ok()?.take()).flatten();
        let claimed = speaks.then(|| claimed.lock().ok()?.take()).flatten();
        let shared = shares.lock().unwrap_or_else(PoisonError::into_inner)[rank].take();
        let shared = shared.expect("every rank begins once");
        let begun = Begun { claimed, resumed_from, sender };
        let trainer = RankTrainer::new(&shared, backend(rank), exchange)?;
        drop(shared);
        begun.go(trainer, &folder, &asked)
    };
    let mut tick = || {
        events.try_iter().for_each(|event| tell(&event));
        if stop() {
            stopped.store(true, Ordering::SeqCst);
        }
    };
    summary(threads::run(world, timeout, main, &mut tick))
}

/// What a rank needs of its run beside its trainer.
struct Begun {
    /// The run's folder, on the rank that speaks.
    claimed: Option<Claim>,
    resumed_from: Option<u64>,
    /// Takes what the rank that speaks tells.
    sender: Option<Sender<Event>>,
}

impl Begun {
    /// The run to its end, on the rank's thread.
    fn go<B: Backend>(
        self,
        trainer: RankTrainer<B>,
        folder: &RunFolder,
        asked: &AtomicBool,
    ) -> Result<RankEnd, TrainError> {
        let Begun { claimed, resumed_from, sender } = self;
        // They outlive the trainer, so that no device waits for a rank that has failed.
        let devices = trainer.devices();
        // The receiver is there until every rank has ended or was given up.
        let mut tell = |event: &Event| {
            if let Some(sender) = &sender {
                let _ = sender.send(event.clone());
            }
        };
        let lock = claimed.map(|claimed| claimed.hold(folder, &mut tell)).transpose()?;
        let stop = || asked.load(Ordering::SeqCst);
        // All ranks see a divergence, so that none is to be ended by another's.
        match run::go(trainer, folder, resumed_from, lock, &stop, &mut tell) {
            Err(TrainError::Diverged(found)) => Ok(Err(found)),
            Err(error) => {
                devices.iter().for_each(|device| device.give_up());
                Err(error)
            }
            Ok(summary) => Ok(Ok(summary)),
        }
    }
}

/// Runs `config` as the one rank that this process is among those of its layout. The others are
/// processes too; all have the same configuration and see the same folder.
///
/// # Errors
/// [`TrainError`]; it says of which rank it is.
pub fn run_process<B: Backend + Send + 'static>(
    config: TrainConfig,
    backend: impl FnOnce() -> B + Send + 'static,
    folder: &RunFolder,
    timeline: &Timeline,
    (environment, transport): (&Environment, Transport),
    (stop, tell): Calls<'_>,
) -> Result<Summary, TrainError> {
    let world = config.parallel.world();
    if environment.world != world {
        let message = format!(
            "expected {} ranks, those of the environment ({environment}), found {world} (tp x pp x dp)",
            environment.world
        );
        return Err(TrainError::Setting { key: "parallel".into(), message });
    }
    if environment.on_one_machine() && environment.rank == 0 {
        memory::training(&config)?.check()?;
    }
    let timeout = Duration::from_secs_f64(config.parallel.timeout_seconds);
    let process = processes::connect(environment, transport, timeout)?;
    let (sender, events) = mpsc::channel::<Event>();
    let stopped = Arc::new(AtomicBool::new(false));
    let (asked, folder) = (Arc::clone(&stopped), folder.clone());
    let timeline = timeline.clone();
    let main = move |exchange: Arc<dyn Exchange>| {
        let (claimed, saved) = first_claims(&folder, &exchange, &sender)?;
        let resumed_from = saved.as_ref().map(|s| s.step);
        let sender = (exchange.rank() == 0).then_some(sender);
        let mut shared = Shared::open(config, saved.map(Arc::new))?;
        shared.timeline = timeline;
        let trainer = RankTrainer::new(&shared, backend(), exchange)?;
        drop(shared);
        Begun { claimed, resumed_from, sender }.go(trainer, &folder, &asked)
    };
    let mut tick = || {
        events.try_iter().for_each(|event| tell(&event));
        if stop() {
            stopped.store(true, Ordering::SeqCst);
        }
    };
    let rank = environment.rank;
    match processes::run(process, environment.threads(), main, &mut tick) {
        End::Returned(Ok(Ok(summary))) => Ok(summary),
        End::Returned(Ok(Err(found))) => Err(TrainError::Diverged(found)),
        End::Returned(Err(error)) => Err(TrainError::Ranks(vec![format!("rank {rank}: {error}")])),
        End::Panicked(message) => {
            Err(TrainError::Ranks(vec![format!("rank {rank} panicked: {message}")]))
        }
        End::Hangs => {
            let words = "another has failed, and it still computes; it ends without a result";
            Err(TrainError::Ranks(vec![format!("rank {rank}: {words}")]))
        }
    }
}

/// Rank 0 claims the folder, and tells the others from which checkpoint to go on.
fn first_claims(
    folder: &RunFolder,
    exchange: &Arc<dyn Exchange>,
    sender: &Sender<Event>,
) -> Result<(Option<Claim>, Option<Saved>), TrainError> {
    let members: Vec<usize> = (0..exchange.world()).collect();
    let all = Communicator::new(exchange, "start", &members);
    let what = "the checkpoint to go on from";
    if exchange.rank() == 0 {
        let mut tell = |event: &Event| {
            // The receiver is there until this rank has ended.
            let _ = sender.send(event.clone());
        };
        let (claimed, saved) = folder.claim(&mut tell)?;
        let step: Vec<i64> = saved.iter().map(|saved| saved.step as i64).collect();
        all.broadcast(what, 0, vec![Tensor::from_vec(&[step.len()], step)])?;
        return Ok((Some(claimed), saved));
    }
    let step = one(all.broadcast(what, 0, Vec::new())?);
    let read =
        |step: &i64| training::read(&training::path(&folder.out.join("checkpoints"), *step as u64));
    Ok((None, step.as_slice::<i64>().first().map(read).transpose()?))
}

/// How a rank ended that nothing went wrong on.
type RankEnd = Result<Summary, Box<Divergence>>;

/// The summary of the rank that speaks, or the error of the one that failed first.
fn summary(ends: Vec<End<RankEnd, TrainError>>) -> Result<Summary, TrainError> {
    let (mut first, mut words, mut hangs) = (None, Vec::new(), false);
    for (rank, end) in ends.into_iter().enumerate() {
        match end {
            End::Returned(Ok(Ok(summary))) => {
                first.get_or_insert(summary);
            }
            // One report: every rank has the same.
            End::Returned(Ok(Err(found))) => return Err(TrainError::Diverged(found)),
            End::Returned(Err(error)) => words.push((secondary(&error), format!("{error}"))),
            End::Panicked(message) => {
                words.push((false, format!("rank {rank} panicked: {message}")))
            }
            End::Hangs => {
                hangs = true;
                words.push((false, format!("rank {rank} still computes; it is left to itself")));
            }
        }
    }
    if words.is_empty() {
        return Ok(first.expect("a run has a rank"));
    }
    // Those that ended because another had are told only where nobody else tells anything.
    let primary: Vec<String> =
        words.iter().filter(|(secondary, _)| !secondary).map(|(_, w)| w.clone()).collect();
    let all = || words.iter().map(|(_, w)| w.clone()).collect();
    let told = if primary.is_empty() || hangs { all() } else { primary };
    Err(TrainError::Ranks(told))
}

/// Whether a rank's error is that of another.
fn secondary(error: &TrainError) -> bool {
    error.to_string().contains(" has ended (")
}

impl Shared {
    /// Opens the data of a run once for all ranks of this process.
    ///
    /// # Errors
    /// [`TrainError`].
    pub fn open(config: TrainConfig, saved: Option<Arc<Saved>>) -> Result<Shared, TrainError> {
        // A run without values: it checks configuration, data and model.
        let prepared = Trainer::prepare(config, crate::backend::Reference)?;
        let loader = Arc::new(Mutex::new(prepared.loader));
        Ok(Shared { loader, config: prepared.config, saved, timeline: Timeline::default() })
    }
}
