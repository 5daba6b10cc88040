//! A run on ranks that are threads of this process.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use super::{RankTrainer, Shared};
use crate::backend::Backend;
use crate::exchange::threads::{self, End};
use crate::memory;
use crate::train::{Divergence, Event, RunFolder, Summary, TrainConfig, TrainError, Trainer, run};

/// Runs `config` on the ranks of its layout, each a thread with a backend of its own, as
/// [`run::run`] does in one process; one rank is one process.
///
/// # Errors
/// [`TrainError`]; that of the rank that failed first, or what every rank says.
pub fn run<B: Backend + 'static>(
    config: TrainConfig,
    backend: impl Fn(usize) -> B + Send + Sync + 'static,
    folder: &RunFolder,
    stop: &dyn Fn() -> bool,
    tell: &mut dyn FnMut(&Event),
) -> Result<Summary, TrainError> {
    if config.parallel.world() == 1 {
        return run::run(config, backend(0), folder, stop, tell);
    }
    memory::training(&config)?.check()?;
    let (claimed, saved) = folder.claim(tell)?;
    let resumed_from = saved.as_ref().map(|s| s.step);
    let shared = Shared::open(config, saved.map(Arc::new))?;
    let world = shared.config.parallel.world();
    let timeout = Duration::from_secs_f64(shared.config.parallel.timeout_seconds);
    let (sender, events) = mpsc::channel::<Event>();
    let (sender, claimed) = (Mutex::new(Some(sender)), Mutex::new(Some(claimed)));
    let stopped = Arc::new(AtomicBool::new(false));
    // One a rank, so that a checkpoint is let go once every rank has taken its share.
    let shares = Mutex::new(vec![Some(shared); world]);
    let (asked, folder) = (Arc::clone(&stopped), folder.clone());
    let main = move |exchange: Arc<dyn crate::exchange::Exchange>| {
        let rank = exchange.rank();
        let speaks = rank == 0;
        let take = || sender.lock().ok()?.take();
        let sender = speaks.then(take).flatten();
        let claimed = speaks.then(|| claimed.lock().ok()?.take()).flatten();
        let shared = shares.lock().unwrap_or_else(PoisonError::into_inner)[rank].take();
        // The receiver is there until every rank has ended or was given up.
        let mut tell = |event: &Event| {
            if let Some(sender) = &sender {
                let _ = sender.send(event.clone());
            }
        };
        let shared = shared.expect("every rank begins once");
        let trainer = RankTrainer::new(&shared, backend(rank), exchange)?;
        drop(shared);
        let lock = claimed.map(|claimed| claimed.hold(&folder, &mut tell)).transpose()?;
        let stop = || asked.load(Ordering::SeqCst);
        // All ranks see a divergence, so that none is to be ended by another's.
        match run::go(trainer, &folder, resumed_from, lock, &stop, &mut tell) {
            Err(TrainError::Diverged(found)) => Ok(Err(found)),
            ended => ended.map(Ok),
        }
    };
    let mut tick = || {
        events.try_iter().for_each(|event| tell(&event));
        if stop() {
            stopped.store(true, Ordering::SeqCst);
        }
    };
    summary(threads::run(world, timeout, main, &mut tick))
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
    pub fn open(
        config: TrainConfig,
        saved: Option<Arc<crate::checkpoint::training::Saved>>,
    ) -> Result<Shared, TrainError> {
        // A run without values: it checks configuration, data and model.
        let prepared = Trainer::prepare(config, crate::backend::Reference)?;
        let loader = Arc::new(Mutex::new(prepared.loader));
        Ok(Shared { loader, config: prepared.config, saved })
    }
}
