//! `fathom sweep`: a training run for every point of a grid, one table and one picture.

use std::path::PathBuf;

use fathom_reference::backend::Reference;
use fathom_reference::train::compare::{Run, Spread};
use fathom_reference::train::sweep::{self, Axis, Planned, SweepPoint};
use fathom_reference::train::{Event, RunFolder, TrainError, ranks, resumed_config};
use serde_json::json;

use crate::output::{self, Outcome};
use crate::train::{self, RunFlags};

/// Train over a grid of settings, and compare the losses
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom sweep --grid schedule.learning_rate=3e-4,1e-3,3e-3 --steps 200 --validate 0.05
  fathom sweep --grid schedule.learning_rate=1e-3,3e-3 --grid optim.clip=0.5,1 --seeds 1,2
  fathom sweep --config run.toml --grid recipe.mode='\"fp8\",\"bf16\"' --out sweeps/precision

Every run has a folder below DIR, as of `fathom train`. Ctrl-C stops with a checkpoint; the same
command goes on where it stopped. DIR gets sweep.svg and sweep.json.

Exit codes: 0 every run came to its end, 1 a run diverged, 2 bad input.")]
pub struct Args {
    /// A key of run.toml and its values; several span a grid
    #[arg(long, value_name = "KEY=V1,V2,...", required = true)]
    grid: Vec<Axis>,
    /// Seeds, each a run of every point
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', default_value = "1")]
    seeds: Vec<u64>,
    #[command(flatten)]
    flags: RunFlags,
    /// Folder of the sweep
    #[arg(long, value_name = "DIR", default_value = "fathom-sweep")]
    out: PathBuf,
    /// Steps at the end over which the loss is averaged
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    last: u32,
    /// Print one JSON document instead of a table
    #[arg(long)]
    json: bool,
}

/// Runs the command, on a thread of the pool, as `fathom train` does.
pub fn run(args: &Args) -> output::Result {
    Ok(rayon::scope(|_| sweep(args).map_err(|error| error.to_string()))?)
}

fn sweep(args: &Args) -> output::Result {
    let planned = sweep::plan(&args.out, &args.grid, &args.seeds);
    // All configurations are read before the first run, so that a bad value stops at once.
    let configured =
        |run: &Planned| args.flags.configuration(&args.flags.settings(&run.settings(&args.grid)));
    let configs = planned.iter().map(configured).collect::<Result<Vec<_>, _>>()?;
    let interrupts = train::interrupts()?;
    let total: u64 = configs.iter().filter_map(|c| c.steps).sum();
    let bar = output::progress(total as usize, "sweep");
    let mut done = 0;
    for (run, config) in planned.iter().zip(configs) {
        let asked = config.clone();
        let resume = resumed_config(&run.out, |_| Ok(asked))?.is_some();
        let before = Run::read(&run.out).ok();
        let steps = config.steps.unwrap_or(0);
        if before.is_some_and(|r| r.ended || r.diverged.is_some()) {
            done += steps;
            bar.set_position(done);
            continue;
        }
        bar.set_message(run.name.clone());
        let folder = RunFolder { out: run.out.clone(), resume };
        let mut tell = |event: &Event| {
            interrupts.hear(event);
            if let Event::Step(log) = event {
                bar.set_position(done + log.step);
            }
        };
        let stopped = || interrupts.stopped();
        let timeline = ranks::Timeline::default();
        let calls: ranks::run::Calls<'_> = (&stopped, &mut tell);
        match ranks::run::run(config, |_| Reference, &folder, &timeline, calls) {
            Ok(summary) if summary.stopped => {
                bar.finish_and_clear();
                errln!("stopped; the same command goes on where it stopped");
                return Ok(Outcome::Holds);
            }
            Ok(_) => {}
            Err(TrainError::Diverged(found)) => bar.suspend(|| errln!("{}: {found}", run.name)),
            Err(error) => return Err(format!("{}: {error}", run.name).into()),
        }
        done += steps;
        bar.set_position(done);
    }
    bar.finish_and_clear();
    report(args, &sweep::rows(&planned, args.last as usize)?)
}

fn report(args: &Args, rows: &[SweepPoint]) -> output::Result {
    let best = sweep::best(rows);
    let document = json!({
        "axes": args.grid,
        "last_steps": args.last,
        "rows": rows,
        "best": best.map(|i| &rows[i]),
    });
    let text = serde_json::to_string_pretty(&document)?;
    output::write_file(&args.out.join("sweep.json"), text.as_bytes())?;
    let picture = sweep::svg(&args.grid, rows);
    output::write_file(&args.out.join("sweep.svg"), picture.as_bytes())?;
    let diverged = rows.iter().any(|row| row.diverged > 0);
    let outcome = if diverged { Outcome::Fails } else { Outcome::Holds };
    if args.json {
        output::print_json(&document)?;
        return Ok(outcome);
    }
    let numbers = |spread: Option<Spread>| match spread {
        Some(s) => [s.mean, s.min, s.max].map(|x| format!("{x:.4}")),
        None => ["-".into(), String::new(), String::new()],
    };
    let cells = rows.iter().enumerate().map(|(i, row)| {
        let mut cells = row.values.clone();
        cells.push(row.seeds.len().to_string());
        cells.extend(numbers(row.loss));
        cells.extend(numbers(row.validation));
        cells.push(match (Some(i) == best, row.diverged) {
            (true, 0) => "best".into(),
            (_, 0) => String::new(),
            (_, n) => format!("{n} diverged"),
        });
        cells
    });
    let mut header: Vec<&str> = args.grid.iter().map(|axis| axis.key.as_str()).collect();
    header.extend(["seeds", "loss", "min", "max", "held out", "min", "max", ""]);
    let right: Vec<usize> = (0..header.len() - 1).collect();
    outln!("{}", output::table(&header, &right, cells.collect()));
    outln!("loss: mean of the last {} steps; mean, smallest and largest seed", args.last);
    outln!("picture {}", args.out.join("sweep.svg").display());
    Ok(outcome)
}
