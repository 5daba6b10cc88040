//! Whole training runs: a backend against the reference.
//!
//! A run is compared twice. In the first step every op runs on both backends in [`Lockstep`]: the
//! layers' forward and backward, losses, clipping, optimizer. Then each backend trains the run by
//! itself, and what comes of it is compared bit for bit: what every step reports, and every file
//! of the checkpoint, with master weights, both moments and the average.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fs, io};

use fathom_config::KeyError;
use fathom_reference::EngineError;
use fathom_reference::backend::{Backend, Reference};
use fathom_reference::checkpoint::tensors::{TensorsError, TensorsFile};
use fathom_reference::precision::{Mode, Recipe};
use fathom_reference::train::run;
use fathom_reference::train::{
    Event, RunFolder, Setting, StepLog, TrainConfig, TrainConfigError, TrainError, Trainer,
};
use serde::Serialize;
use tempfile::TempDir;

use crate::compare::compare;
use crate::github::Annotation;
use crate::junit::{self, TestCase};
use crate::lockstep::{Compared, Lockstep, OpTimes};

/// The built-in run, in TOML; it reads [`lines`] from a file beside it.
const BUILT_IN: &str = include_str!("model.toml");

/// Documents of a few tokens each, so that a sequence has several.
fn lines() -> String {
    (0..400).map(|i| format!("line {i} of {}\n", i * i % 97)).collect()
}

/// A run and what it is called.
pub struct Run {
    /// Mode, and whether activations are recomputed: `fp8, recomputed`.
    pub name: String,
    config: TrainConfig,
}

/// The verdict on a run.
#[derive(Debug, Serialize)]
pub struct ModelReport {
    /// Mode, and whether activations are recomputed.
    pub run: String,
    /// Op calls of the first step, each compared on both backends.
    pub calls: usize,
    /// Elements of their outputs.
    pub elements: usize,
    /// Steps that each backend trained by itself.
    pub steps: u64,
    /// Files of the checkpoint that were compared.
    pub files: usize,
    /// Bytes of those files.
    pub bytes: u64,
    /// What differs first; nothing is compared after it.
    pub failure: Option<String>,
    /// What the ops of a step took, by their names, where that was asked for; no part of the JSON,
    /// as the next.
    #[serde(skip)]
    pub ops: BTreeMap<&'static str, OpTimes>,
    /// How long it took.
    #[serde(skip)]
    pub time: Duration,
}

/// The reports as a suite of JUnit tests, one test a run.
pub fn junit(reports: &[ModelReport]) -> junit::Suite {
    let test = |report: &ModelReport| TestCase {
        class: "fathom conform --model".to_owned(),
        name: report.run.clone(),
        file: None,
        time: report.time,
        outcome: report.failure.clone().map_or(junit::Outcome::Pass, junit::Outcome::Failure),
    };
    let tests = reports.iter().map(test).collect();
    junit::Suite { name: "fathom conform --model".to_owned(), tests }
}

/// A GitHub annotation for every run that disagrees.
pub fn annotations(reports: &[ModelReport]) -> Vec<Annotation> {
    let annotation = |report: &ModelReport| {
        let title = format!("the run '{}' disagrees with the reference's", report.run);
        Some(Annotation { file: None, title, message: report.failure.clone()? })
    };
    reports.iter().filter_map(annotation).collect()
}

/// Why runs could not be compared.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The run cannot be trained, on the reference either.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// The scratch folder cannot be used, or a file in it.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A file of a checkpoint cannot be read back.
    #[error(transparent)]
    Tensors(#[from] TensorsError),
}

/// The runs that are compared: of `config`, or of the built-in run (whose files go to `scratch`),
/// with `steps` steps in modes fp8, bf16 and fp32, with and without recomputation.
///
/// # Errors
/// [`ModelError`].
pub fn runs(config: Option<&Path>, steps: u64, scratch: &Path) -> Result<Vec<Run>, ModelError> {
    let path = match config {
        Some(path) => path.to_owned(),
        None => {
            let (run, text) = (scratch.join("run.toml"), scratch.join("lines.txt"));
            for (path, content) in [(&run, BUILT_IN), (&text, &lines())] {
                fs::write(path, content).map_err(of(path))?;
            }
            run
        }
    };
    let set = [
        Setting::flag("--steps", "steps", steps),
        Setting::set("checkpoint.export=false"),
        Setting::set("log.tensorboard=false"),
        Setting::set("log.sample_every=0"),
    ];
    let config = TrainConfig::read(&path, &set).map_err(TrainError::from)?;
    let mut runs = Vec::new();
    for mode in [Mode::Fp8, Mode::Bf16, Mode::Fp32] {
        for recompute in [true, false] {
            let recipe = Recipe {
                mode,
                recompute_norms: recompute,
                recompute_up_projections: recompute,
                recompute_swiglu: recompute,
                ..config.recipe.clone()
            };
            let config = TrainConfig { recipe, ..config.clone() };
            config.check().map_err(|(key, message)| {
                let place = path.display().to_string();
                TrainError::from(TrainConfigError::Key(KeyError { place, key, message }))
            })?;
            let kept = if recompute { "recomputed" } else { "kept" };
            runs.push(Run { name: format!("{}, {kept}", mode.name()), config });
        }
    }
    Ok(runs)
}

/// A folder for the runs, removed when dropped unless it is kept.
///
/// # Errors
/// [`ModelError::Io`].
pub fn scratch() -> Result<TempDir, ModelError> {
    let named = tempfile::Builder::new().prefix("fathom-conform-").tempdir();
    named.map_err(of(&std::env::temp_dir()))
}

fn of(path: &Path) -> impl Fn(io::Error) -> ModelError {
    let path = path.to_owned();
    move |source| ModelError::Io { path: path.clone(), source }
}

/// Compares a run on `device` with the reference's; its folders go to `scratch`, and `progress` is
/// called after every step. `timed`: also fills [`ModelReport::ops`].
///
/// # Errors
/// [`ModelError`]; a disagreement, or a device that fails, is none.
pub fn check<B: Backend + Clone>(
    run: &Run,
    device: &B,
    timed: bool,
    scratch: &Path,
    progress: &dyn Fn(),
) -> Result<ModelReport, ModelError> {
    let begin = Instant::now();
    let mut report = ModelReport {
        run: run.name.clone(),
        calls: 0,
        elements: 0,
        steps: 0,
        files: 0,
        bytes: 0,
        failure: None,
        ops: BTreeMap::new(),
        time: Duration::ZERO,
    };
    report.failure = compared(run, device, timed, scratch, progress, &mut report)?;
    report.time = begin.elapsed();
    Ok(report)
}

/// Fills the report as far as everything agrees; says what does not.
fn compared<B: Backend + Clone>(
    run: &Run,
    device: &B,
    timed: bool,
    scratch: &Path,
    progress: &dyn Fn(),
    report: &mut ModelReport,
) -> Result<Option<String>, ModelError> {
    let both = Lockstep::new(Reference, device.clone());
    match in_lockstep(&run.config, both, timed) {
        Ok((Compared { calls, elements }, ops)) => {
            (report.calls, report.elements, report.ops) = (calls, elements, ops);
        }
        Err(error) => return failure(error).map(Some),
    }
    progress();
    let folder = scratch.join(run.name.replace(", ", "-"));
    let [expected, found] = ["reference", "device"].map(|side| folder.join(side));
    let expected_steps = train(&run.config, Reference, &expected, progress)?;
    let found_steps = match train(&run.config, device.clone(), &found, progress) {
        Ok(steps) => steps,
        Err(error) => return failure(error).map(Some),
    };
    for (expected, found) in expected_steps.iter().zip(&found_steps) {
        if expected != found {
            return Ok(Some(step_difference(expected, found)));
        }
        report.steps += 1;
    }
    match same_checkpoints(&expected, &found)? {
        Ok(Same { files, bytes }) => (report.files, report.bytes) = (files, bytes),
        Err(difference) => return Ok(Some(difference)),
    }
    Ok(None)
}

/// A step on both in lockstep; where they are asked for, the times of a second one, for which
/// every kernel is compiled and all memory has been used before.
fn in_lockstep<B: Backend>(
    config: &TrainConfig,
    both: Lockstep<Reference, B>,
    timed: bool,
) -> Result<(Compared, BTreeMap<&'static str, OpTimes>), TrainError> {
    let mut trainer = Trainer::new(config.clone(), both)?;
    // A step that both leave out is compared up to there.
    trainer.step(&|| false)?;
    let compared = trainer.backend.compared();
    trainer.backend.take_times();
    if timed {
        trainer.step(&|| false)?;
    }
    Ok((compared, trainer.backend.take_times()))
}

/// A device that fails, or that differs, is a verdict; everything else is an error.
fn failure(error: TrainError) -> Result<String, ModelError> {
    match error {
        TrainError::Engine(error @ EngineError::Failed { .. }) => Ok(error.to_string()),
        TrainError::Diverged(found) => Ok(found.to_string()),
        other => Err(other.into()),
    }
}

/// Trains the run in a folder; what each step reports, without its times.
fn train<B: Backend>(
    config: &TrainConfig,
    backend: B,
    folder: &Path,
    progress: &dyn Fn(),
) -> Result<Vec<StepLog>, TrainError> {
    let mut steps = Vec::new();
    let place = RunFolder { out: folder.to_owned(), resume: false };
    run::run(config.clone(), backend, &place, &|| false, &mut |event| {
        if let Event::Step(log) = event {
            steps.push(StepLog { seconds: 0.0, tokens_per_second: 0.0, ..StepLog::clone(log) });
            progress();
        }
    })?;
    Ok(steps)
}

/// The fields of two steps' reports that differ.
fn step_difference(expected: &StepLog, found: &StepLog) -> String {
    let [expected, found] =
        [expected, found].map(|log| serde_json::to_value(log).expect("numbers and names"));
    let fields = expected.as_object().expect("a struct");
    let differing = fields.iter().filter(|(key, value)| found[key.as_str()] != **value);
    let words = differing.map(|(key, value)| {
        format!("{key} is {value} on the reference and {} here", found[key.as_str()])
    });
    format!("step {}: {}", expected["step"], words.collect::<Vec<_>>().join(", "))
}

/// Files that agree in every byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Same {
    /// Files of the checkpoints.
    pub files: usize,
    /// Bytes of those files.
    pub bytes: u64,
}

/// Compares the checkpoints in the folders of two runs, the reference's first: what agrees, or what
/// differs first.
///
/// # Errors
/// [`ModelError`] where a file cannot be read.
pub fn same_checkpoints(expected: &Path, found: &Path) -> Result<Result<Same, String>, ModelError> {
    let [ours, theirs] = [files(expected)?, files(found)?];
    if !ours.keys().eq(theirs.keys()) {
        let names = |files: &BTreeMap<PathBuf, PathBuf>| files.keys().cloned().collect::<Vec<_>>();
        return Ok(Err(format!(
            "checkpoint files are {:?} on the reference and {:?} here",
            names(&ours),
            names(&theirs)
        )));
    }
    let mut same = Same::default();
    // Files of tensors first: which of them differs says more than a digest that does.
    let tensors = |name: &Path| name.extension().is_some_and(|e| e == "safetensors");
    let mut files: Vec<(&PathBuf, &PathBuf)> = ours.iter().collect();
    files.sort_by_key(|(name, _)| !tensors(name));
    for (name, path) in files {
        let [a, b] = [path, &theirs[name]];
        let bytes = fs::read(a).map_err(of(a))?;
        if bytes != fs::read(b).map_err(of(b))? {
            return file_difference(name, a, b).map(Err);
        }
        same.files += 1;
        same.bytes += bytes.len() as u64;
    }
    Ok(Ok(same))
}

/// The first tensor that differs in two files, where they hold tensors.
fn file_difference(name: &Path, a: &Path, b: &Path) -> Result<String, ModelError> {
    let mut words = format!("{} differs", name.display());
    if name.extension().is_some_and(|extension| extension == "safetensors") {
        let [a, b] = [TensorsFile::open(a)?, TensorsFile::open(b)?];
        let pairs = a.entries.keys().filter_map(|n| Some((n, a.tensor(n)?, b.tensor(n)?)));
        let differences = pairs
            .filter(|(_, x, y)| x.dtype() == y.dtype() && x.shape() == y.shape())
            .map(|(name, x, y)| compare(name, [("contract", &x), ("kernel", &y)]));
        if let Some(first) = differences.into_iter().find(|d| d.mismatches > 0) {
            words = format!("{words}: {}", first.words());
        }
    }
    Ok(words)
}

/// The files below a run's checkpoints: name below it, and path.
fn files(run: &Path) -> Result<BTreeMap<PathBuf, PathBuf>, ModelError> {
    let root = run.join("checkpoints");
    let (mut found, mut folders) = (BTreeMap::new(), vec![root.clone()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(of(&folder))? {
            let path = entry.map_err(of(&folder))?.path();
            match path.is_dir() {
                true => folders.push(path),
                false => {
                    let name = path.strip_prefix(&root).expect("it lies below").to_owned();
                    found.insert(name, path);
                }
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use fathom_reference::data::Loader;
    use fathom_reference::{DynOp, Tensor};
    use fathom_trace::DType;

    use super::*;

    #[test]
    fn the_built_in_run_has_what_the_command_promises() {
        let scratch = scratch().unwrap();
        let runs = runs(None, 3, scratch.path()).unwrap();
        let names: Vec<_> = runs.iter().map(|run| run.name.as_str()).collect();
        assert_eq!(names[..3], ["fp8, recomputed", "fp8, kept", "bf16, recomputed"]);
        let config = &runs[0].config;
        assert!(config.model.rope.yarn.is_some() && config.model.mtp_depth == 1);
        assert!(config.recipe.recompute_norms && !runs[1].config.recipe.recompute_norms);
        let mut loader = Loader::open(&config.data, config.seq_len, config.seed).unwrap();
        let several = (0..20).filter(|_| loader.next().unwrap().segments.len() >= 2).count();
        assert!(several >= 18, "{several} of 20 sequences have two segments or more");
    }

    /// The reference, but from its call `from` on `adamw` leaves the weights as they are.
    #[derive(Clone)]
    struct Idle {
        calls: Rc<Cell<usize>>,
        from: usize,
    }

    impl Backend for Idle {
        type Buffer = <Reference as Backend>::Buffer;

        fn name(&self) -> String {
            "idle".to_owned()
        }

        fn execute(
            &self,
            op: &dyn DynOp,
            inputs: Vec<Option<Self::Buffer>>,
        ) -> fathom_reference::backend::Result<Vec<Self::Buffer>> {
            let weights = inputs[0].clone().filter(|_| op.name() == "adamw");
            let mut outputs = Reference.execute(op, inputs)?;
            if let Some(weights) = weights {
                if self.calls.get() >= self.from {
                    outputs[0] = weights;
                }
                self.calls.set(self.calls.get() + 1);
            }
            Ok(outputs)
        }

        fn upload(&self, tensor: Tensor) -> fathom_reference::backend::Result<Self::Buffer> {
            Reference.upload(tensor)
        }

        fn download(&self, buffer: &Self::Buffer) -> fathom_reference::backend::Result<Tensor> {
            Reference.download(buffer)
        }

        fn dtype(&self, buffer: &Self::Buffer) -> DType {
            Reference.dtype(buffer)
        }

        fn shape(&self, buffer: &Self::Buffer) -> Vec<usize> {
            Reference.shape(buffer)
        }
    }

    /// One that is wrong from the first step on, in a later step, or in the last update.
    #[test]
    fn a_device_that_does_otherwise_is_found_op_by_op_by_its_steps_or_by_its_files() {
        let scratch = scratch().unwrap();
        let run = &runs(None, 2, scratch.path()).unwrap()[4];
        let idle = |from| {
            let _ = fs::remove_dir_all(scratch.path().join("fp32-recomputed"));
            let device = Idle { calls: Rc::default(), from };
            let report = check(run, &device, false, scratch.path(), &|| ()).unwrap();
            (report, device.calls.get())
        };
        let (right, calls) = idle(usize::MAX);
        assert_eq!((&right.failure, right.steps), (&None, 2));
        assert!(right.calls > 500 && right.files >= 2, "{right:?}");
        let step = calls / 3;
        let (report, _) = idle(0);
        let failure = report.failure.expect("the first op that differs");
        assert!(failure.contains("adamw: outside the layers, optimizer, F: w: "), "{failure}");
        let (report, _) = idle(step);
        let failure = report.failure.expect("the second step differs");
        assert!(failure.starts_with("step 2: ") && failure.contains("loss is"), "{failure}");
        let (report, _) = idle(2 * step);
        let failure = report.failure.expect("the weights differ");
        assert!(failure.contains("safetensors differs: "), "{failure}");
    }
}
