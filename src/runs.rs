//! `fathom runs`: training runs beside each other.

use std::path::PathBuf;

use fathom_reference::files;
use fathom_reference::train::compare::{self, Run, Spread};
use serde_json::json;

use crate::output::{self, Outcome};

/// Compare training runs: loss at the end over seeds, difference to a baseline, curves
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom runs runs/*
  fathom runs runs/* --baseline bf16 --svg loss.svg

Runs of one name (`name` in run.toml) are one line, their seeds apart; the difference to the baseline
is taken seed by seed.")]
pub struct Args {
    /// Folders of `fathom train`
    #[arg(required = true, value_name = "DIR")]
    runs: Vec<PathBuf>,
    /// Steps at the end over which the loss is averaged
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    last: u32,
    /// Name of the runs that the others are compared with
    #[arg(long, value_name = "NAME")]
    baseline: Option<String>,
    /// Write the curves as a picture
    #[arg(long, value_name = "FILE.svg")]
    svg: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    let logs: Vec<PathBuf> = args.runs.iter().map(|folder| folder.join("train.jsonl")).collect();
    files::keep_apart(&logs, &args.svg)?;
    let runs = args.runs.iter().map(|folder| Run::read(folder)).collect::<Result<Vec<_>, _>>()?;
    let rows = compare::compare(&runs, args.last as usize, args.baseline.as_deref())?;
    if let Some(path) = &args.svg {
        output::write_file(path, compare::svg(&runs).as_bytes())?;
    }
    if args.json {
        output::print_json(&json!({
            "last_steps": args.last,
            "baseline": args.baseline,
            "runs": rows,
        }))?;
        return Ok(Outcome::Holds);
    }
    let percent = |spread: Option<Spread>| match spread {
        Some(s) => [s.mean, s.min, s.max].map(|p| format!("{p:+.3} %")),
        None => [String::from("-"), String::new(), String::new()],
    };
    let cells = rows.iter().map(|row| {
        let loss = [row.loss.mean, row.loss.min, row.loss.max].map(|x| format!("{x:.4}"));
        let mut cells = vec![row.name.clone(), row.seeds.len().to_string(), row.steps.to_string()];
        cells.extend(loss);
        cells.extend(percent(row.to_baseline_percent));
        cells
    });
    let against = args.baseline.as_ref().map_or("-".into(), |name| format!("to {name}"));
    let header = ["run", "seeds", "steps", "loss", "min", "max", against.as_str(), "min", "max"];
    outln!("{}", output::table(&header, &[1, 2, 3, 4, 5, 6, 7, 8], cells.collect()));
    outln!("loss: mean of the last {} steps; mean, smallest and largest seed", args.last);
    Ok(Outcome::Holds)
}
