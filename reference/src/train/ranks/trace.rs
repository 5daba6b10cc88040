//! The executed timeline, as the simulator draws its own: instructions, parts of layers on the
//! streams of computation and communication, arrows between ranks.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use fathom_config::ModelConfig;
use fathom_schedule::Schedule;
use fathom_schedule::draw::{arrows, op_text};
use fathom_schedule::perfetto::{self, COMPUTE, INSTRUCTIONS};

use crate::exchange::clock::{Part, StepSpans};
use crate::files;
use crate::train::{TrainConfig, TrainError};

/// The files that the executed timeline is written to.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    /// All of it, for Perfetto.
    pub trace: Option<PathBuf>,
    /// Mean times of its parts, for the simulator.
    pub kernel_times: Option<PathBuf>,
}

impl Timeline {
    pub(super) fn is_asked_for(&self) -> bool {
        self.trace.is_some() || self.kernel_times.is_some()
    }

    /// Writes what was asked for of a run's steps.
    pub(super) fn write(&self, steps: &[Traced], config: &TrainConfig) -> Result<(), TrainError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |e: io::Error| TrainError::Folder {
                path,
                message: format!("cannot be written: {e}"),
            }
        };
        if let Some(path) = &self.trace {
            let (layers, parallel) = (config.stage_layers(), &config.parallel);
            let width = parallel.dp * parallel.cp * parallel.tp;
            write(path, steps, width, &layers).map_err(failed(path))?;
        }
        if let Some(path) = &self.kernel_times {
            let together = config.parallel.cp * config.parallel.tp;
            write_times(path, steps, (&config.model, together)).map_err(failed(path))?;
        }
        Ok(())
    }
}

/// A step with the spans of every rank of its first pipeline, or of all.
pub(super) struct Traced {
    /// The instructions as they were executed, by rank of the world.
    pub schedule: Schedule,
    /// By rank of the world.
    pub spans: Vec<StepSpans>,
}

/// Writes the steps to a file, on stages of `width` ranks: so many pipelines lie side by side.
///
/// # Errors
/// Those of the file system; nothing half-written is then left.
fn write(path: &Path, steps: &[Traced], width: usize, stages: &[Range<usize>]) -> io::Result<()> {
    files::replace(path, |file, _| {
        let mut out = io::BufWriter::new(file);
        write_to(&mut out, steps, width, stages)?;
        out.flush()
    })
}

fn write_to(
    out: &mut dyn Write,
    steps: &[Traced],
    width: usize,
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
            let ops = &schedule.ranks[rank / width];
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
        for pipeline in 0..width {
            let of = |rank: usize| {
                let spans = &spans[rank * width + pipeline].instructions;
                spans.iter().map(|&span| seconds(span)).collect::<Vec<_>>()
            };
            let of_ranks: Vec<_> = (0..schedule.ranks.len()).map(of).collect();
            for arrow in arrows(schedule, &of_ranks) {
                let [from, to] = [arrow.from.0, arrow.to.0].map(|rank| rank * width + pipeline);
                // What is sent may be used a moment before its sender notes that it has ended.
                let sent = arrow.from.1.min(arrow.to.1);
                perfetto::arrow(out, (arrow.name, id), (from, sent), (to, arrow.to.1))?;
                id += 1;
            }
        }
    }
    perfetto::end(out)
}

/// What the table calls the times that a step has beside its layers.
const STEP: &str = "step";

/// Mean times of the parts of layers and of what a step has beside them, as the table that
/// `fathom simulate --kernel-times` reads: of a rank, where so many compute a micro-batch together.
/// The first of several steps is not counted.
///
/// # Errors
/// Those of the file system; nothing half-written is then left.
fn write_times(path: &Path, steps: &[Traced], run: (&ModelConfig, usize)) -> io::Result<()> {
    let counted = if steps.len() > 1 { &steps[1..] } else { steps };
    let mut text = "op,shape,mean_us\n".to_owned();
    for ((op, shape), seconds) in means(counted, run) {
        text += &format!("{op},{shape},{:.3}\n", 1e6 * seconds);
    }
    files::replace(path, |file, _| file.write_all(text.as_bytes()))
}

/// Mean seconds by component and phase, and kind of layer.
fn means(
    steps: &[Traced],
    (model, together): (&ModelConfig, usize),
) -> BTreeMap<(String, &'static str), f64> {
    let dense = model.moe.map_or(model.layers, |moe| moe.first_dense.min(model.layers));
    let kind = |part: &Part| match part.layer {
        None if part.name.starts_with("embedding") => ("embedding", 1),
        None => ("head", 1),
        Some(layer) if layer < dense => ("dense", dense),
        Some(layer) if layer < model.layers => ("moe", model.layers - dense),
        Some(_) => ("mtp", model.mtp_depth),
    };
    let span_s = |(begin, end): (u64, u64)| end.saturating_sub(begin) as f64 / 1e9;
    let mut means: BTreeMap<(String, &'static str), f64> = BTreeMap::new();
    for Traced { spans, .. } in steps {
        let computed = || spans.iter().flat_map(|s| &s.parts).filter(|p| p.thread == COMPUTE);
        let micro_batches: BTreeSet<usize> = computed().map(|p| p.micro_batch).collect();
        let mut within = 0.0;
        for part in computed() {
            let ((kind, layers), seconds) = (kind(part), span_s(part.span));
            let share = seconds / (layers * micro_batches.len() * together * steps.len()) as f64;
            *means.entry((part.name.clone(), kind)).or_default() += share;
            within += seconds;
        }
        let instructions = || spans.iter().flat_map(|s| &s.instructions);
        let all: f64 = instructions().map(|&span| span_s(span)).sum();
        let mut step = |what, seconds: f64| {
            *means.entry((STEP.to_owned(), what)).or_default() += seconds / steps.len() as f64;
        };
        step("instruction", (all - within).max(0.0) / instructions().count().max(1) as f64);
        // What every rank waits for the last of them is the pipeline's bubble.
        for what in ["parameter gather", "gradient reduction", "optimizer"] {
            let of_rank = |s: &StepSpans| {
                let own = s.tail.iter().filter(|(_, name, _)| name == what);
                own.map(|(.., span)| span_s(*span)).sum::<f64>()
            };
            step(what, spans.iter().map(of_rank).fold(f64::INFINITY, f64::min));
        }
    }
    means
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
