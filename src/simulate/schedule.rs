//! `fathom simulate schedule`: a pipeline schedule as streams, drawing, checks and comparison.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use fathom_schedule::compare::{self, ScheduleRow};
use fathom_schedule::timeline::{ChunkDurations, Timeline, play};
use fathom_schedule::{Schedule, ScheduleKind, ScheduleShape, draw};

use crate::output::{self, Outcome};

/// Print, draw, check and compare pipeline schedules
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom simulate schedule --kind dualpipe --stages 8 --micro-batches 20
  fathom simulate schedule --kind dualpipev --stages 8 --micro-batches 10 --json
  fathom simulate schedule --kind zb1p --stages 4 --micro-batches 8 --f 1 --b 2 --w 1 --svg zb1p.svg

--json: per rank, in order, {op: F|B|Bi|W, dir, mb} and {op: FB, f_dir, f_mb, b_dir, b_mb}.
B is a full backward, Bi its input part, W the oldest queued weight gradient, FB an overlapped pair.")]
pub struct Args {
    /// Schedule
    #[arg(long, value_name = "KIND", value_parser = kinds())]
    kind: ScheduleKind,
    /// Pipeline stages (zb-v and dualpipev have half as many ranks)
    #[arg(long, value_name = "P")]
    stages: usize,
    /// Micro-batches of a step, both directions together
    #[arg(long, value_name = "M")]
    micro_batches: usize,
    /// Stages a rank holds in the interleaved schedule
    #[arg(long, value_name = "V", default_value_t = 2)]
    interleave: usize,
    /// Duration of a forward chunk
    #[arg(long, default_value_t = 1.0)]
    f: f64,
    /// Duration of a full backward chunk
    #[arg(long, default_value_t = 2.0)]
    b: f64,
    /// Duration of the weight part of a backward
    #[arg(long, default_value_t = 1.0)]
    w: f64,
    /// Duration of an overlapped pair [default: F + B]
    #[arg(long)]
    fb: Option<f64>,
    /// Print the streams as one JSON document
    #[arg(long)]
    json: bool,
    /// List every op of every rank
    #[arg(long)]
    ops: bool,
    /// Write the drawing as SVG
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Columns of the text drawing
    #[arg(long, value_name = "N", default_value_t = 150)]
    columns: usize,
}

/// The schedules by their names.
fn kinds() -> impl TypedValueParser<Value = ScheduleKind> {
    PossibleValuesParser::new(ScheduleKind::ALL.map(ScheduleKind::name))
        .map(|name| ScheduleKind::from_name(&name).expect("one of the names"))
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    let Args { stages, micro_batches, interleave, .. } = *args;
    let shape = ScheduleShape { stages, micro_batches, interleave };
    let durations =
        ChunkDurations { f: args.f, b: args.b, w: args.w, fb: args.fb.unwrap_or(args.f + args.b) };
    durations.validate()?;
    let schedule = Schedule::new(args.kind, shape)?;
    let timeline = play(&schedule, durations)?;
    if let Some(path) = &args.svg {
        output::write_file(path, draw::svg(&schedule, &timeline).as_bytes())?;
    }
    if args.json {
        outln!("{}", serde_json::to_string(&schedule)?);
        return Ok(Outcome::Holds);
    }
    print(args, &schedule, &timeline);
    outln!("\nAll schedules with {stages} stages and {micro_batches} micro-batches:\n");
    print_comparison(&compare::table(shape, durations));
    Ok(Outcome::Holds)
}

fn print(args: &Args, schedule: &Schedule, timeline: &Timeline) {
    outln!("{}", draw::text(schedule, timeline, args.columns));
    outln!("{}", draw::LEGEND);
    if args.ops {
        outln!("\n{}", draw::ops_text(schedule));
    }
    let span = |v: &[f64]| {
        let low = v.iter().copied().fold(f64::INFINITY, f64::min);
        (low, v.iter().copied().fold(0.0, f64::max))
    };
    let (low, high) = span(&timeline.bubble);
    outln!("\nchecked: every chunk runs once, inputs come first, no deadlock");
    outln!("makespan {}, bubble {low:.4} to {high:.4} a rank", timeline.makespan);
    outln!("activations alive, most at once, by rank: {:?}", timeline.activations_peak);
}

fn print_comparison(rows: &[ScheduleRow]) {
    let header = [
        "schedule",
        "ranks",
        "weights",
        "activations",
        "bubble",
        "formula",
        "by formula",
        "makespan",
        "idle %",
    ];
    let cells = |r: &ScheduleRow| match &r.refused {
        Some(reason) => {
            let mut cells = vec![r.kind.to_owned()];
            cells.resize(header.len() - 1, "-".to_owned());
            cells.push(reason.clone());
            cells
        }
        None => vec![
            r.kind.to_owned(),
            r.ranks.to_string(),
            format!("{}x", r.parameters),
            r.activations.to_string(),
            format!("{:.3}", r.bubble),
            r.formula.unwrap_or("-").to_owned(),
            r.bubble_formula.map_or("-".to_owned(), |b| format!("{b:.3}")),
            format!("{:.3}", r.makespan),
            format!("{:.1}", 100.0 * r.bubble_fraction),
        ],
    };
    outln!("{}", output::table(&header, &[1, 2, 3, 4, 6, 7], rows.iter().map(cells).collect()));
    outln!("\nweights: stages a rank holds; activations: chunks alive on the fullest rank.");
}
