//! The folder of a run: claiming it, going on in it, and what a new run must not overwrite.

use std::fs;
use std::path::{Path, PathBuf};

use super::event::Event;
use super::lock::Lock;
use super::parallel::ParallelConfig;
use super::{TrainConfig, TrainError};
use crate::checkpoint::training::{self, Saved};
use crate::precision::Recipe;

/// The folder of a run, and whether it goes on there.
#[derive(Clone, Debug)]
pub struct RunFolder {
    /// The run's folder.
    pub out: PathBuf,
    /// Go on from its newest checkpoint, where there is one.
    pub resume: bool,
}

impl RunFolder {
    /// Claims the folder of a run where it is there, and reads the checkpoint to go on from.
    ///
    /// # Errors
    /// [`TrainError`]; bad data or a bad model leaves no folder behind: a new one is made once the
    /// trainer stands ([`Claim::hold`]).
    pub(super) fn claim(
        &self,
        tell: &mut dyn FnMut(&Event),
    ) -> Result<(Claim, Option<Saved>), TrainError> {
        let out = &self.out;
        let lock = if out.is_dir() { Some(Lock::acquire(out)?) } else { None };
        let saved = if self.resume {
            training::latest(&out.join("checkpoints"), &mut |path, reason| {
                tell(&Event::Refused { path: path.to_owned(), reason: reason.to_string() });
            })?
        } else {
            expect_no_run(out)?;
            None
        };
        Ok((Claim(lock), saved))
    }
}

/// A run's folder before the run stands: locked where it is there.
pub(super) struct Claim(Option<Lock>);

impl Claim {
    /// Makes the folder where there is none yet, and locks it.
    pub(super) fn hold(
        self,
        folder: &RunFolder,
        tell: &mut dyn FnMut(&Event),
    ) -> Result<Lock, TrainError> {
        let out = &folder.out;
        let lock = match self.0 {
            Some(lock) => lock,
            None => {
                fs::create_dir_all(out).map_err(|e| in_folder(out, &e))?;
                let lock = Lock::acquire(out)?;
                expect_no_run(out)?;
                lock
            }
        };
        if let Some(claim) = &lock.stale {
            tell(&Event::TakenOver { claim: claim.clone() });
        }
        Ok(lock)
    }
}

/// Refuses a folder that holds a run, which a new one would overwrite.
fn expect_no_run(out: &Path) -> Result<(), TrainError> {
    let holds = match training::list(&out.join("checkpoints"))?.first() {
        Some((step, _)) => format!("a run's checkpoints up to step {step}"),
        None if out.join(CONFIG).exists() => format!("a run ({CONFIG}, no checkpoint yet)"),
        None => return Ok(()),
    };
    let message = format!("holds {holds}; go on with --resume or name another folder with --out");
    Err(TrainError::Folder { path: out.to_owned(), message })
}

/// Name of the configuration in a run's folder.
pub const CONFIG: &str = "run.toml";

/// The configuration with which the run in `out` goes on: that of its `run.toml`, `None` where
/// there is none. `asked` makes the configuration that the caller asks for from it; it must be the
/// same but for what changes no bit, the layout without `tp` and `recipe.fused`, which are those
/// asked for.
///
/// # Errors
/// [`TrainError::Folder`] with every key that differs and both values.
pub fn resumed_config(
    out: &Path,
    asked: impl FnOnce(&TrainConfig) -> Result<TrainConfig, TrainError>,
) -> Result<Option<TrainConfig>, TrainError> {
    let path = out.join(CONFIG);
    if !path.exists() {
        return Ok(None);
    }
    let config = TrainConfig::read(&path, &[])?;
    let asked = asked(&config)?;
    // Layout and fused ops change no bit, so a run may go on with others.
    let recipe = Recipe { fused: asked.recipe.fused, ..config.recipe };
    let parallel = ParallelConfig { tp: config.parallel.tp, ..asked.parallel.clone() };
    let config = TrainConfig { parallel, recipe, ..config };
    let differences = config.differences(&asked);
    if differences.is_empty() {
        return Ok(Some(config));
    }
    let words = differences
        .iter()
        .map(|(key, own, asked)| format!("{key} is {own} there and {asked} on the command line"));
    let message = format!(
        "--resume goes on with this file, but {}; leave the flags out, or edit the file to change \
         the run",
        words.collect::<Vec<_>>().join(", ")
    );
    Err(TrainError::Folder { path, message })
}

/// What the file system says of a run's folder, or of a file in it.
pub(super) fn in_folder(path: &Path, error: &std::io::Error) -> TrainError {
    TrainError::Folder { path: path.to_owned(), message: error.to_string() }
}
