//! `fathom train`: a run in a folder, with a progress bar, logs and checkpoints.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use fathom_reference::backend::Reference;
use fathom_reference::train::run::{self, Event, Place};
use fathom_reference::train::{StepLog, TrainConfig, TrainError};
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use crate::output::{self, Outcome};
use crate::record::RecordArgs;

/// Train a model: data, optimizer, checkpoints and logs in one folder
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom train                                   the built-in preset on the built-in text
  fathom train --steps 100 --precision bf16 --out runs/bf16
  fathom train --data book.txt --out runs/book
  fathom train --config run.toml --out runs/a
  fathom train --out runs/a --resume             go on where it stopped, to the bit
  fathom train --set recipe.fp8.gradient_block=[128,128] --set optim.clip=0.5

Ctrl-C writes a checkpoint and stops. DIR gets train.jsonl, tensorboard/, checkpoints/ and, at the
end, model/ for `fathom eval` and `fathom generate`. All keys of run.toml: docs/training.md.

Exit codes: 0 trained to the end, or stopped with a checkpoint; 1 loss or gradient was not finite;
2 bad input.")]
pub struct Args {
    /// The run (TOML)
    #[arg(long, value_name = "FILE.toml", conflicts_with = "preset")]
    config: Option<PathBuf>,
    /// Built-in run: tiny, deepseek-v3, deepseek-v3-32k, deepseek-v3-128k or deepseek-v3-sft
    /// [default: tiny]
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Folder of the run
    #[arg(long, value_name = "DIR", default_value = "fathom-run")]
    out: PathBuf,
    /// Go on from the newest checkpoint in the folder (begin where there is none)
    #[arg(long)]
    resume: bool,
    /// Steps of the run
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Precision mode: fp8, bf16, fp32 or f64
    #[arg(long, value_name = "MODE")]
    precision: Option<String>,
    /// Seed of initial weights and data order
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Text, JSONL or Parquet to train on, by the file's extension; folders are searched for text
    #[arg(long, value_name = "FILE", num_args = 1..)]
    data: Vec<PathBuf>,
    /// Override a key of the run, for instance optim.clip=0.5; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print one JSON document at the end, and nothing else, on stdout
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    record: RecordArgs,
}

/// Runs the command, on a thread of the pool: a small parallel loop then begins at once, where one
/// from outside would be handed over and waited for.
pub fn run(args: &Args) -> output::Result {
    Ok(rayon::scope(|_| train(args).map_err(|error| error.to_string()))?)
}

fn train(args: &Args) -> output::Result {
    let config = configuration(args)?;
    let stop = interrupts()?;
    let mut screen = Screen::new(args.json);
    let place = Place { out: args.out.clone(), resume: args.resume };
    let stopped = || stop.load(Ordering::Relaxed) > 0;
    let recording = args.record.open()?;
    let backend = recording.wrap(Reference);
    let result = run::run(config, backend, &place, &stopped, &mut |event| screen.show(event));
    screen.finish();
    args.record.close(&recording)?;
    let summary = match result {
        Err(TrainError::Diverged(found)) => {
            eprintln!("error: {found}");
            return Ok(Outcome::Fails);
        }
        result => result?,
    };
    if args.json {
        output::print_json(&summary)?;
        return Ok(Outcome::Holds);
    }
    let end = if summary.stopped { "stopped after" } else { "trained" };
    println!("{end} {} steps, {} tokens", summary.steps, summary.tokens);
    if let (Some(first), Some(last)) = (summary.first_loss, summary.last_loss) {
        let speed = summary.tokens_per_second;
        println!("loss {first:.4} at first, {last:.4} over the last 50 steps; {speed:.0} tokens/s");
    }
    if let Some(model) = &summary.model {
        println!("model      {}", model.display());
    }
    if let Some(checkpoint) = &summary.checkpoint {
        println!("checkpoint {}", checkpoint.display());
    }
    if summary.stopped {
        println!("go on with --out {} --resume", args.out.display());
    }
    Ok(Outcome::Holds)
}

/// The run: of the file or preset named, else of the checkpoint to go on from, else `tiny`.
fn configuration(args: &Args) -> Result<TrainConfig, TrainError> {
    let mut set = Vec::new();
    set.extend(args.steps.map(|n| format!("steps={n}")));
    set.extend(args.precision.as_ref().map(|mode| format!("recipe.mode={mode:?}")));
    set.extend(args.seed.map(|n| format!("seed={n}")));
    set.extend(args.set.iter().cloned());
    let config = match (&args.config, &args.preset) {
        (Some(path), _) => TrainConfig::read(path, &set)?,
        (None, Some(name)) => TrainConfig::preset(name, &set)?,
        (None, None) => match args.resume.then(|| run::saved_config(&args.out)).transpose()? {
            Some(Some(config)) => config.with(&set)?,
            _ => TrainConfig::preset("tiny", &set)?,
        },
    };
    Ok(config.with_files(&args.data))
}

/// Counts Ctrl-C and SIGTERM; the second one ends the process at once.
fn interrupts() -> Result<Arc<AtomicUsize>, ctrlc::Error> {
    let count = Arc::new(AtomicUsize::new(0));
    let handler = Arc::clone(&count);
    ctrlc::set_handler(move || {
        if handler.fetch_add(1, Ordering::Relaxed) > 0 {
            std::process::exit(130);
        }
        eprintln!("stopping with a checkpoint; once more ends at once");
    })?;
    Ok(count)
}

/// What is shown while the run goes on: a bar on a terminal, lines now and then elsewhere.
struct Screen {
    bar: ProgressBar,
    json: bool,
    length: Option<u64>,
}

/// Steps between two lines where there is no terminal.
const LINE_EVERY: u64 = 10;

impl Screen {
    fn new(json: bool) -> Screen {
        Screen { bar: ProgressBar::hidden(), json, length: None }
    }

    fn say(&self, text: &str) {
        if self.bar.is_hidden() {
            if !self.json {
                eprintln!("{text}");
            }
        } else {
            self.bar.println(text);
        }
    }

    fn show(&mut self, event: &Event<'_>) {
        match event {
            Event::Start { step, steps, parameters, data } => {
                self.start(*step, *steps);
                let from =
                    if *step > 0 { format!(", on after step {step}") } else { String::new() };
                self.say(&format!("{parameters} parameters, data {}{from}", &data[..12]));
            }
            Event::Refused { path, reason } => {
                eprintln!("warning: checkpoint {} is not used: {reason}", path.display());
            }
            Event::Step(log) => self.step(log),
            Event::Skipped(found) => eprintln!("warning: update skipped: {found}"),
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
        let text = format!("loss {:.4}{mtp} {:.0} tokens/s", log.loss, log.tokens_per_second);
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
