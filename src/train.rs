//! `fathom train`: a run in a folder, with a progress bar, logs and checkpoints.

use std::error::Error;
use std::io::Read;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fathom_gpu::backend::{Plan, Rehearsal};
use fathom_gpu::nccl::{self, Nccl};
use fathom_gpu::{Cuda, Gpu};
use fathom_reference::backend::{Backend, Reference};
use fathom_reference::exchange::environment::Environment;
use fathom_reference::exchange::launch;
use fathom_reference::exchange::processes::Transport;
use fathom_reference::files;
use fathom_reference::train::{
    CONFIG, Event, RunFolder, Setting, StepLog, TrainConfig, TrainError, Trainer, ranks,
    resumed_config, run,
};
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use serde_json::json;

use crate::backend::BackendArgs;
use crate::output::{self, Outcome};
use crate::record::RecordArgs;

/// Train a model: data, optimizer, checkpoints and logs in one folder
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom train                                   the built-in preset on the built-in text
  fathom train --steps 100 --precision bf16 --out runs/bf16
  fathom train --data book.txt --validate 0.02 --out runs/book
  fathom train --config run.toml --out runs/a
  fathom train --out runs/a --resume             go on where it stopped, to the bit
  fathom train --backend emulated --steps 2      our CUDA kernels, without a GPU: the same bits
  fathom train --set recipe.fp8.gradient_block=[128,128] --set optim.clip=0.5
  fathom train --ranks 4 --set parallel.dp=2 --set parallel.pp=2 --set grad_shards=2
                                                 ranks as threads, with the bits of one process
  fathom train --ranks 4 --processes ...         the same ranks as processes of this machine
  fathom train --ranks 4 --backend cuda ...      a GPU a rank; ranks share them where they are fewer
  fathom train --ranks 8 --backend cuda --transport peer ...
                                                 from GPU to GPU by kernels of ours, on one node
  torchrun --nnodes 2 --nproc-per-node 8 --no-python fathom train ...
  srun --ntasks 16 fathom train ...              ranks started by others: docs/distributed.md

Ctrl-C writes a checkpoint and stops. DIR gets train.jsonl, tensorboard/, checkpoints/ and, at the
end, model/ for `fathom eval` and `fathom generate`. All keys of run.toml: docs/training.md.

Exit codes: 0 trained to the end, or stopped with a checkpoint; 1 loss or gradient was not finite;
2 bad input.")]
pub struct Args {
    /// Folder of the run
    #[arg(long, value_name = "DIR", default_value = "fathom-run")]
    out: PathBuf,
    /// Go on with the run in the folder: its run.toml, its newest checkpoint. Where there is no run
    /// yet, --config or --preset begins one
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    flags: RunFlags,
    /// Ranks of the run, each a thread: those of its layout (section `[parallel]`), which no bit
    /// depends on
    #[arg(long, value_name = "N")]
    ranks: Option<usize>,
    /// Each rank is a process of this machine. Where torchrun, mpirun or srun has started this
    /// process as one of several, it is a rank without this flag
    #[arg(long)]
    processes: bool,
    /// What carries the messages of processes [default: mpi where mpirun started them and the
    /// program was built with it, else tcp], or nccl, peer: what lies on GPUs goes from one to the
    /// other
    #[arg(long, value_name = "NAME")]
    transport: Option<TransportName>,
    /// Write the executed timeline of all ranks for Perfetto, as `fathom simulate --trace` does
    #[arg(long, value_name = "FILE.json")]
    trace: Option<PathBuf>,
    /// Write the mean times of what the ranks computed, a table for `fathom simulate
    /// --kernel-times`
    #[arg(long, value_name = "FILE.csv")]
    kernel_times: Option<PathBuf>,
    /// Seed of initial weights and data order
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Print one JSON document at the end, and nothing else, on stdout
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    backend: BackendArgs,
    #[command(flatten)]
    record: RecordArgs,
}

/// A transport by its name on the command line.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum TransportName {
    /// Sockets between processes; needs nothing
    Tcp,
    /// MPI; needs a program built with --features mpi
    Mpi,
    /// NCCL between GPUs, beside what carries messages where nothing is named; a GPU a rank
    Nccl,
    /// Kernels of ours over peer memory (NVLink), between the GPUs of ranks that are threads; a GPU
    /// a rank
    Peer,
}

impl TransportName {
    /// What carries the messages of processes.
    fn of_messages(name: Option<TransportName>, environment: &Environment) -> Transport {
        match name {
            Some(TransportName::Tcp) => Transport::Tcp,
            Some(TransportName::Mpi) => Transport::Mpi,
            Some(TransportName::Nccl | TransportName::Peer) | None => Transport::of(environment),
        }
    }
}

/// What a run is made of: shared with `fathom sweep`.
#[derive(clap::Args)]
pub struct RunFlags {
    /// The run (TOML)
    #[arg(long, value_name = "FILE.toml", conflicts_with = "preset")]
    config: Option<PathBuf>,
    /// Built-in run: tiny, deepseek-v3, deepseek-v3-32k, deepseek-v3-128k or deepseek-v3-sft
    /// [default: tiny]
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Steps of the run
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Precision mode: fp8, bf16, fp32 or f64
    #[arg(long, value_name = "MODE")]
    precision: Option<String>,
    /// Text, JSONL or Parquet to train on, by the file's extension; folders are searched for text
    #[arg(long, value_name = "FILE", num_args = 1..)]
    data: Vec<PathBuf>,
    /// Measure the loss on what training never sees: a share of the documents (0.02), or files
    #[arg(long, value_name = "SHARE|FILE", num_args = 1..)]
    validate: Vec<PathBuf>,
    /// Override a key of the run, for instance optim.clip=0.5; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl RunFlags {
    /// What the flags set, then `more`; the later wins.
    pub fn settings(&self, more: &[Setting]) -> Vec<Setting> {
        let mut set = Vec::new();
        set.extend(self.steps.map(|n| Setting::flag("--steps", "steps", n)));
        set.extend(self.precision.as_ref().map(|m| Setting::flag("--precision", "recipe.mode", m)));
        set.extend(self.set.iter().map(|assignment| Setting::set(assignment)));
        set.extend(more.iter().cloned());
        set
    }

    /// The run of the file or preset that the flags name, with `set` over it; `None` where they
    /// name neither.
    pub fn named(&self, set: &[Setting]) -> Option<Result<TrainConfig, TrainError>> {
        let config = match (&self.config, &self.preset) {
            (Some(path), _) => TrainConfig::read(path, set),
            (None, Some(name)) => TrainConfig::preset(name, set),
            (None, None) => return None,
        };
        Some(config.map_err(TrainError::from).and_then(|config| self.with_data(config)))
    }

    /// A configuration with the data that the flags name.
    pub fn with_data(&self, config: TrainConfig) -> Result<TrainConfig, TrainError> {
        Ok(config.with_files(&self.data)?.with_validation(&self.validate)?)
    }

    /// The run of the file or preset that the flags name, else of `tiny`.
    pub fn configuration(&self, set: &[Setting]) -> Result<TrainConfig, TrainError> {
        let tiny = || self.with_data(TrainConfig::preset("tiny", set)?);
        self.named(set).unwrap_or_else(tiny)
    }
}

/// Runs the command, on a thread of the pool: a small parallel loop then begins at once, where one
/// from outside would be handed over and waited for.
pub fn run(args: &Args) -> output::Result {
    Ok(rayon::scope(|_| train(args).map_err(|error| error.to_string()))?)
}

fn train(args: &Args) -> output::Result {
    let config = configuration(args)?;
    let world = config.parallel.world();
    if let Some(asked) = args.ranks.filter(|&asked| asked != world) {
        let p = &config.parallel;
        return Err(format!(
            "--ranks {asked}: expected {world}, the ranks of the layout (parallel.tp = {} x \
             parallel.cp = {} x parallel.pp = {} x parallel.dp = {}); set these, or leave --ranks \
             out",
            p.tp, p.cp, p.pp, p.dp
        )
        .into());
    }
    let flags = &args.flags;
    let inputs = flags.data.iter().chain(&flags.config).chain(&flags.validate);
    files::keep_apart(inputs, args.record.outputs().chain(&args.trace).chain(&args.kernel_times))?;
    for (flag, file) in [("--trace", &args.trace), ("--kernel-times", &args.kernel_times)] {
        if file.is_some() && world == 1 {
            let layout = "set parallel.pp, parallel.dp, parallel.cp, parallel.tp";
            let message = format!("{flag}: expected a run on several ranks, found one; {layout}");
            return Err(message.into());
        }
    }
    if world > 1 && args.record.outputs().next().is_some() {
        return Err(format!("--record and --op-trace take one rank, found {world}").into());
    }
    let environment = Environment::read()?;
    let by_peers = matches!(args.transport, Some(TransportName::Peer));
    if by_peers && (args.processes || environment.is_some()) {
        let expected = "expected ranks that are threads of one process, --ranks N alone";
        return Err(format!("--transport peer: {expected}, found processes; use nccl").into());
    }
    if args.processes && environment.is_none() && world > 1 {
        return launch(world);
    }
    // The ranks of this process, by their number on this machine.
    let here = environment.as_ref().map_or(0..world, |e| e.local_rank..e.local_rank + 1);
    let ranks = here.len();
    let by_nccl = matches!(args.transport, Some(TransportName::Nccl));
    match args.backend.open_for(here)? {
        None if by_nccl || by_peers => {
            let name = if by_nccl { "nccl" } else { "peer" };
            let expected = "expected --backend cuda or emulated, whose ranks compute on GPUs";
            Err(format!("--transport {name}: {expected}, found reference").into())
        }
        None => train_on(args, config, environment, vec![Reference; ranks], None),
        Some(gpus) => {
            planned(&config)?;
            compile(&config, &gpus[0])?;
            let nccl = by_nccl.then(|| Nccl::open(&nccl::find())).transpose()?;
            let on = |gpu| match &nccl {
                Some(nccl) => Cuda::new(gpu).with_nccl(Arc::clone(nccl)),
                None if by_peers => Cuda::new(gpu).with_peers(config.parallel.comm_sms),
                None => Cuda::new(gpu),
            };
            let cudas: Vec<Cuda> = gpus.into_iter().map(on).collect();
            let first = cudas[0].clone();
            let waits = || first.gpu().waits();
            train_on(args, config, environment, cudas, Some(&waits))
        }
    }
}

/// Refuses a run of which a step needs what no kernel covers.
fn planned(config: &TrainConfig) -> Result<(), Box<dyn Error>> {
    match Trainer::rehearse(config.clone(), Plan::new())?.missing() {
        None => Ok(()),
        Some(missing) => Err(format!(
            "a step of this run needs what our kernels do not cover:\n{missing}\n\
             --backend reference computes all of it"
        )
        .into()),
    }
}

/// Compiles the kernels of a step that are not in the cache, several at a time.
fn compile(config: &TrainConfig, gpu: &Gpu) -> Result<(), Box<dyn Error>> {
    let rehearsal = Trainer::rehearse(config.clone(), Rehearsal::new(gpu))?;
    let missing = rehearsal.gpu().uncompiled();
    let bar = output::progress(missing.len(), "compiling kernels");
    gpu.compile(&missing, &|| bar.inc(1))?;
    bar.finish_and_clear();
    Ok(())
}

/// Runs this command line once a rank.
fn launch(world: usize) -> output::Result {
    let program = std::env::current_exe()?;
    let command = || {
        let mut command = Command::new(&program);
        command.args(std::env::args_os().skip(1));
        Ok(command)
    };
    let interrupts = interrupts()?;
    let threads = (rayon::current_num_threads() / world).max(1);
    let ended = launch::run(command, (world, threads), &|| interrupts.stopped())?;
    for (rank, code) in ended.codes.iter().enumerate() {
        match ended.killed.contains(&rank) {
            true => {
                errln!("error: rank {rank} did not end after another had failed; it was killed")
            }
            false if code.is_none() => errln!("error: rank {rank} was ended by a signal"),
            false => {}
        }
    }
    let all = |most: i32| ended.codes.iter().all(|code| code.is_some_and(|code| code <= most));
    Ok(match (all(0), all(1)) {
        (true, _) => Outcome::Holds,
        (false, true) => Outcome::Fails,
        (false, false) => Outcome::BadInput,
    })
}

/// A rank that was launched stops with a checkpoint when its standard input ends.
fn obey(launcher: impl Read + Send + 'static, interrupts: &Arc<Interrupts>) {
    let interrupts = Arc::clone(interrupts);
    let mut launcher = launcher;
    std::thread::spawn(move || {
        // An error is an end too.
        let _ = std::io::copy(&mut launcher, &mut std::io::sink());
        interrupts.stop.store(true, Ordering::SeqCst);
    });
}

/// `backends` has one for each rank of this process. `waits`: how often the host has waited for the
/// first one's device so far.
fn train_on<B: Backend + Clone + Send + Sync + 'static>(
    args: &Args,
    config: TrainConfig,
    environment: Option<Environment>,
    backends: Vec<B>,
    waits: Option<&dyn Fn() -> u64>,
) -> output::Result {
    let world = config.parallel.world();
    let interrupts = interrupts()?;
    if std::env::var_os(launch::LAUNCHED).is_some() {
        obey(std::io::stdin(), &interrupts);
    }
    let mut screen = Screen::new(args.json);
    let folder = RunFolder { out: args.out.clone(), resume: args.resume };
    let stopped = || interrupts.stopped();
    let (mut before, mut waits_per_step) = (0, None);
    // Ranks are told of beside their steps, not between them.
    let waits = waits.filter(|_| world == 1);
    let mut tell = |event: &Event| {
        interrupts.hear(event);
        screen.show(event);
        if let Some(waits) = waits {
            let step = matches!(event, Event::Step(_)).then(|| waits() - before);
            waits_per_step = step.or(waits_per_step);
            before = waits();
        }
    };
    let timeline =
        ranks::Timeline { trace: args.trace.clone(), kernel_times: args.kernel_times.clone() };
    let speaks = environment.as_ref().is_none_or(|e| e.rank == 0);
    let result = if let Some(environment) = &environment {
        let transport = TransportName::of_messages(args.transport, environment);
        let (of, backend) = ((environment, transport), backends[0].clone());
        let calls: ranks::run::Calls<'_> = (&stopped, &mut tell);
        let backend = || backend;
        let result = ranks::run::run_process(config, backend, &folder, &timeline, of, calls);
        screen.finish();
        result
    } else if world > 1 {
        let calls: ranks::run::Calls<'_> = (&stopped, &mut tell);
        let backend = move |rank: usize| backends[rank].clone();
        let result = ranks::run::run(config, backend, &folder, &timeline, calls);
        screen.finish();
        result
    } else {
        let recording = args.record.open()?;
        let backend = recording.wrap(backends[0].clone());
        let result = run::run(config, backend, &folder, &stopped, &mut tell);
        screen.finish();
        args.record.close(&recording)?;
        result
    };
    let summary = match result {
        Err(TrainError::Diverged(found)) => {
            if speaks {
                errln!("error: {found}");
            }
            return Ok(Outcome::Fails);
        }
        result => result?,
    };
    if !speaks {
        return Ok(Outcome::Holds);
    }
    if args.json {
        let mut document = json!(summary);
        // What a step's host waited for: losses, norm, counts of experts' rows.
        if let Some(waits) = waits_per_step {
            document["waits_per_step"] = json!(waits);
        }
        output::print_json(&document)?;
        return Ok(Outcome::Holds);
    }
    let end = if summary.stopped { "stopped after" } else { "trained" };
    outln!("{end} {} steps, {} tokens", summary.steps, summary.tokens);
    if let (Some(first), Some(last)) = (summary.first_loss, summary.last_loss) {
        let speed = summary.tokens_per_second;
        outln!("loss {first:.4} at first, {last:.4} over the last 50 steps; {speed:.0} tokens/s");
    }
    if let Some(loss) = summary.validation_loss {
        outln!("loss {loss:.4} on what is held out");
    }
    if let Some(model) = &summary.model {
        outln!("model      {}", model.display());
    }
    if let Some(checkpoint) = &summary.checkpoint {
        outln!("checkpoint {}", checkpoint.display());
    }
    if summary.stopped {
        outln!("go on with --out {} --resume", args.out.display());
    }
    Ok(Outcome::Holds)
}

/// The run of the flags; with `--resume` that of the folder, which the flags must not contradict.
fn configuration(args: &Args) -> Result<TrainConfig, TrainError> {
    let seed = args.seed.map(|n| Setting::flag("--seed", "seed", n));
    let (flags, set) = (&args.flags, args.flags.settings(seed.as_slice()));
    if args.resume {
        let of_folder = |saved: &TrainConfig| flags.with_data(saved.with(&set)?);
        let asked = |saved: &TrainConfig| flags.named(&set).unwrap_or_else(|| of_folder(saved));
        if let Some(config) = resumed_config(&args.out, asked)? {
            return Ok(config);
        }
        if flags.named(&set).is_none() {
            let message = format!(
                "expected a run to go on with ({}), found none; begin one without --resume, or name \
                 what to begin with --config or --preset",
                CONFIG
            );
            return Err(TrainError::Folder { path: args.out.clone(), message });
        }
    }
    flags.configuration(&set)
}

/// Signals of one request that arrive within this time count as one: `timeout` signals the process
/// and then its group, and some terminals do likewise.
const ONE_REQUEST: Duration = Duration::from_secs(1);

/// What Ctrl-C and SIGTERM ask for, and whether they may have it at once.
#[derive(Default)]
pub struct Interrupts {
    /// The run is to stop with a checkpoint.
    stop: AtomicBool,
    /// A checkpoint is being written, which nothing interrupts.
    saving: AtomicBool,
}

impl Interrupts {
    /// Whether the run is to stop.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Hears of what the run does: while a checkpoint is being written, nothing interrupts it.
    pub fn hear(&self, event: &Event) {
        match event {
            Event::Saving => self.saving.store(true, Ordering::SeqCst),
            Event::Checkpoint { .. } => self.saving.store(false, Ordering::SeqCst),
            _ => {}
        }
    }
}

/// Listens for Ctrl-C and SIGTERM: the first stops with a checkpoint; one that comes later, while
/// no checkpoint is being written, ends the process at once.
pub fn interrupts() -> Result<Arc<Interrupts>, ctrlc::Error> {
    let interrupts = Arc::new(Interrupts::default());
    let handler = Arc::clone(&interrupts);
    let mut first: Option<Instant> = None;
    ctrlc::set_handler(move || {
        handler.stop.store(true, Ordering::SeqCst);
        match first {
            None => {
                first = Some(Instant::now());
                errln!("stopping with a checkpoint; once more ends at once");
            }
            Some(first) if first.elapsed() < ONE_REQUEST => {}
            Some(_) if handler.saving.load(Ordering::SeqCst) => {
                errln!("the checkpoint is being written; the run ends when it is there");
            }
            Some(_) => std::process::exit(130),
        }
    })?;
    Ok(interrupts)
}

/// What is shown while the run goes on: a bar on a terminal, lines now and then elsewhere.
struct Screen {
    bar: ProgressBar,
    json: bool,
    length: Option<u64>,
    /// The newest loss on what is held out, in words.
    held_out: String,
}

/// Steps between two lines where there is no terminal.
const LINE_EVERY: u64 = 10;

impl Screen {
    fn new(json: bool) -> Screen {
        Screen { bar: ProgressBar::hidden(), json, length: None, held_out: String::new() }
    }

    fn say(&self, text: &str) {
        if self.bar.is_hidden() {
            if !self.json {
                errln!("{text}");
            }
        } else {
            self.bar.println(text);
        }
    }

    fn show(&mut self, event: &Event) {
        match event {
            Event::Start { step, steps, parameters, data } => {
                self.start(*step, *steps);
                let from =
                    if *step > 0 { format!(", on after step {step}") } else { String::new() };
                self.say(&format!("{parameters} parameters, data {}{from}", &data[..12]));
            }
            Event::TakenOver { claim } => {
                errln!("warning: the lock of {claim}, which has ended, is taken over");
            }
            Event::Refused { path, reason } => {
                errln!("warning: checkpoint {} is not used: {reason}", path.display());
            }
            Event::Step(log) => self.step(log),
            Event::Skipped(found) => errln!("warning: update skipped: {found}"),
            Event::Validation(log) => {
                self.held_out = format!(" held out {:.4}", log.loss);
                self.say(&format!("step {}: loss {:.4} on what is held out", log.step, log.loss));
            }
            Event::Saving => {}
            Event::Sample { step, text } => self.say(&format!("step {step}: {text:?}")),
            Event::Checkpoint { step, path } => {
                self.say(&format!("step {step}: checkpoint {}", path.display()));
            }
        }
    }

    fn start(&mut self, step: u64, steps: Option<u64>) {
        self.length = steps;
        self.bar = match steps {
            Some(steps) => ProgressBar::new(steps),
            None => ProgressBar::no_length(),
        };
        let template = "{bar:24} {pos}/{len} {wide_msg}";
        self.bar.set_style(ProgressStyle::with_template(template).expect("a constant template"));
        self.bar.set_position(step);
    }

    fn step(&mut self, log: &StepLog) {
        let mtp: String = log.mtp_loss.iter().map(|loss| format!(" mtp {loss:.3}")).collect();
        let (loss, held_out) = (log.loss, &self.held_out);
        let text = format!("loss {loss:.4}{mtp}{held_out} {:.0} tokens/s", log.tokens_per_second);
        if self.bar.is_hidden() {
            if log.step == 1 || log.step.is_multiple_of(LINE_EVERY) {
                self.say(&format!("step {} {text}", log.step));
            }
            return;
        }
        self.bar.set_position(log.step);
        self.bar.set_message(format!("{text} ETA {}", HumanDuration(self.bar.eta())));
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
