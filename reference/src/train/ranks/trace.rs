//! The executed timeline, as the simulator draws its own: instructions, parts of layers on the
//! streams of computation and communication, arrows between ranks.

use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;

use fathom_schedule::Schedule;
use fathom_schedule::draw::{arrows, op_text};
use fathom_schedule::perfetto::{self, INSTRUCTIONS};

use crate::exchange::clock::{Part, StepSpans};
use crate::files;

/// A step with the spans of every rank of its first pipeline, or of all.
pub(super) struct Traced {
    /// The instructions as they were executed, by rank of the world.
    pub schedule: Schedule,
    /// By rank of the world.
    pub spans: Vec<StepSpans>,
}

/// Writes the steps to a file, on the ranks of `dp` data parallel pipelines.
///
/// # Errors
/// Those of the file system; nothing half-written is then left.
pub(super) fn write(
    path: &Path,
    steps: &[Traced],
    dp: usize,
    stages: &[Range<usize>],
) -> io::Result<()> {
    files::replace(path, |file, _| {
        let mut out = io::BufWriter::new(file);
        write_to(&mut out, steps, dp, stages)?;
        out.flush()
    })
}

fn write_to(
    out: &mut dyn Write,
    steps: &[Traced],
    dp: usize,
    stages: &[Range<usize>],
) -> io::Result<()> {
    let begins = steps.iter().flat_map(|s| &s.spans).filter_map(first);
    let zero = begins.min().unwrap_or_default();
    let seconds = |(begin, end): (u64, u64)| {
        let second = |ns: u64| ns.saturating_sub(zero) as f64 / 1e9;
        (second(begin), second(end))
    };
    let ranks = steps.first().map_or(0, |s| s.spans.len());
    perfetto::begin(out, ranks)?;
    let mut id = 0;
    for Traced { schedule, spans } in steps {
        for (rank, spans) in spans.iter().enumerate() {
            let ops = &schedule.ranks[rank / dp];
            for (&op, &span) in ops.iter().zip(&spans.instructions) {
                let place = (rank, INSTRUCTIONS);
                let name = op_text(op);
                perfetto::complete(out, place, (&name, op.name()), seconds(span), &[])?;
            }
            for (thread, name, span) in &spans.tail {
                perfetto::complete(out, (rank, *thread), (name, "tail"), seconds(*span), &[])?;
            }
            for part in &spans.parts {
                let Part { thread, name, span, .. } = part;
                let args = args(part, stages);
                perfetto::complete(out, (rank, *thread), (name, "part"), seconds(*span), &args)?;
            }
        }
        for pipeline in 0..dp {
            let of = |rank: usize| {
                let spans = &spans[rank * dp + pipeline].instructions;
                spans.iter().map(|&span| seconds(span)).collect::<Vec<_>>()
            };
            let of_ranks: Vec<_> = (0..schedule.ranks.len()).map(of).collect();
            for arrow in arrows(schedule, &of_ranks) {
                let [from, to] = [arrow.from.0, arrow.to.0].map(|rank| rank * dp + pipeline);
                // What is sent may be used a moment before its sender notes that it has ended.
                let sent = arrow.from.1.min(arrow.to.1);
                perfetto::arrow(out, (arrow.name, id), (from, sent), (to, arrow.to.1))?;
                id += 1;
            }
        }
    }
    perfetto::end(out)
}

/// When a rank's step begins.
fn first(spans: &StepSpans) -> Option<u64> {
    let instructions = spans.instructions.iter().map(|span| span.0);
    let tail = spans.tail.iter().map(|(.., span)| span.0);
    instructions.chain(tail).chain(spans.parts.iter().map(|part| part.span.0)).min()
}

/// Stage, layer of the stage, micro-batch. MTP modules follow the last stage's layers; embedding
/// and head have no layer.
fn args(part: &Part, stages: &[Range<usize>]) -> Vec<(&'static str, usize)> {
    let mut args = Vec::new();
    if let Some(layer) = part.layer {
        let stage = stages.iter().position(|s| s.contains(&layer)).unwrap_or(stages.len() - 1);
        args.extend([("stage", stage), ("layer", layer - stages[stage].start)]);
    }
    args.push(("micro_batch", part.micro_batch));
    args
}
