//! The event engine: plays the instruction streams of all ranks on their compute and communication
//! streams.
//!
//! An instruction starts when both streams of its rank are free and its inputs have arrived from
//! the neighbouring stages; inside it every layer's parts run as [`chunk`] says. After the last
//! instruction gradients are reduced, all ranks meet for the gradient norm, then the optimizer
//! runs. Every second of every rank is booked once: as one of the instruction kinds, the tail, or
//! idle; the means over ranks are the step's [`Breakdown`].

pub mod chunk;

use fathom_schedule::check::{Fault, check};
use fathom_schedule::{Chunk, Op, Schedule};
use fathom_trace::{Component, Phase};
use serde::Serialize;

use crate::times::{LayerTimes, StageTimes, StepTimes, TailTimes};
use chunk::{ChunkTime, PartSpan, Side, Weights};

/// Where the time of a step goes, means over ranks, seconds; the entries sum to the step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Breakdown {
    /// Forward instructions (F) that are in no pair.
    pub forward: f64,
    /// Idle: before the first instruction, between instructions, and waiting for the last rank.
    pub bubble: f64,
    /// Backward instructions (B, and Bi for the input only) that are in no pair.
    pub backward: f64,
    /// Weight-gradient instructions (W).
    pub weight: f64,
    /// Overlapped pairs of a forward and a backward.
    pub forward_backward: f64,
    /// Gradient reduction and optimizer, with the wait for the gradient norm left to `bubble`.
    pub optimizer: f64,
    /// The rest: gathering updated parameters.
    pub other: f64,
}

impl Breakdown {
    /// Sum of all entries: the step.
    pub fn total(&self) -> f64 {
        self.forward
            + self.bubble
            + self.backward
            + self.weight
            + self.forward_backward
            + self.optimizer
            + self.other
    }
}

/// The all-to-alls of a step, means over ranks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct AllToAll {
    /// Share of the communication stream's busy time under which the compute stream works too; 1
    /// without any.
    pub hidden_fraction: f64,
    /// Seconds of a step in which communication runs while the compute stream waits.
    pub exposed_s: f64,
    /// Seconds of a step in which the communication stream is busy.
    pub busy_s: f64,
}

/// What one rank did in a step.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RankTime {
    /// Start and end of every instruction, seconds from the start of the step.
    pub instructions: Vec<(f64, f64)>,
    /// Where its time went; its entries sum to the step.
    pub breakdown: Breakdown,
    /// Seconds in which its compute stream is busy with instructions.
    pub compute_s: f64,
    /// Seconds in which its communication stream is busy.
    pub comm_s: f64,
    /// Seconds in which its communication runs while its compute stream waits.
    pub exposed_s: f64,
    /// Start of gradient reduction, start of the optimizer, start of the parameter gather, their
    /// end, seconds.
    pub tail: [f64; 4],
}

/// One part on a rank's stream, in seconds from the start of the step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Event {
    /// Pipeline rank on whose stream it ran.
    pub rank: u32,
    /// Place of its instruction in the rank's instruction stream.
    pub instruction: u32,
    /// Stage whose layer it is.
    pub stage: u32,
    /// Micro-batch, direction 1's of a two-way schedule counted after direction 0's.
    pub micro_batch: u32,
    /// The part, its times from the start of the step.
    pub part: PartSpan,
}

/// A step that was played.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepOutcome {
    /// From the first instruction to the last rank's updated parameters, seconds.
    pub step_time_s: f64,
    /// Where the step's time goes, means over ranks.
    pub breakdown: Breakdown,
    /// The step's all-to-alls, means over ranks.
    pub all_to_all: AllToAll,
    /// What each pipeline rank did.
    pub ranks: Vec<RankTime>,
    /// Parts, sends and tail operations played.
    pub events: u64,
    /// Every part, in the order played; empty unless asked for.
    pub parts: Vec<Event>,
}

/// How much of a step is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// Instructions of every rank, and totals.
    Instructions,
    /// Every part of every layer too, for drawing.
    Parts,
    /// Totals only: for searches.
    Totals,
}

/// Plays `schedule` with `times`. A schedule that cannot be executed is a [`Fault`].
///
/// `times` must have an entry per stage and a tail per rank; anything else is a bug of the caller.
pub fn play(schedule: &Schedule, times: &StepTimes, detail: Detail) -> Result<StepOutcome, Fault> {
    let order = check(schedule)?.order;
    Ok(play_in_order(schedule, &order, times, detail))
}

/// [`play`] for a schedule whose `order` of (rank, index of its instruction) is known from an
/// earlier check: every instruction stands behind those whose results it needs.
pub fn play_in_order(
    schedule: &Schedule,
    order: &[(u32, u32)],
    times: &StepTimes,
    detail: Detail,
) -> StepOutcome {
    assert_eq!(times.stages.len(), schedule.geometry.stages, "an entry a stage");
    assert_eq!(times.tail.len(), schedule.ranks.len(), "a tail a rank");
    assert_eq!(
        times.p2p_s.len() + 1,
        schedule.geometry.stages.max(1),
        "an entry a boundary between stages"
    );
    let mut engine = Engine::new(schedule, times, detail);
    for &(rank, index) in order {
        engine.instruction(rank as usize, index as usize);
    }
    engine.finish()
}

/// Plays instructions in an order in which their inputs are ready: ends of chunks, and what the
/// ranks have done.
struct Engine<'a> {
    schedule: &'a Schedule,
    times: &'a StepTimes,
    detail: Detail,
    mbs: usize,
    dirs: usize,
    forward_end: Vec<f64>,
    backward_end: Vec<f64>,
    /// By rank and direction: where the ends of the stage before and of the stage behind begin, and
    /// the seconds of the hop from there.
    shallower: Vec<Option<(usize, f64)>>,
    deeper: Vec<Option<(usize, f64)>>,
    free: Vec<f64>,
    /// First layer of each stage in `times.expert_load`.
    first_layer: Vec<usize>,
    /// Instructions worked out before: by rank, op kind and directions; only where the load is
    /// balanced.
    known: Vec<Option<(ChunkTime, u64)>>,
    scratch: Vec<PartSpan>,
    /// `times.expert_load` by micro-batch, then by layer.
    load: Vec<f32>,
    out: StepOutcome,
}

impl<'a> Engine<'a> {
    fn new(schedule: &'a Schedule, times: &'a StepTimes, detail: Detail) -> Self {
        let (ranks, dirs, mbs) =
            (schedule.ranks.len(), schedule.geometry.dirs(), schedule.micro_batches_per_dir());
        let mut first_layer = vec![0];
        for stage in &times.stages {
            assert_eq!(
                stage.alone.len(),
                stage.overlapped.len(),
                "both lists hold the same layers"
            );
            first_layer.push(first_layer.last().unwrap_or(&0) + stage.alone.len());
        }
        let geometry = &schedule.geometry;
        let places = (0..ranks).flat_map(|rank| (0..dirs as u8).map(move |dir| (rank, dir)));
        let ends = |(rank, dir): (usize, u8)| (rank * dirs + dir as usize) * mbs;
        let shallower = places.clone().map(|(rank, dir)| {
            let (from, dir) = geometry.shallower(rank, dir)?;
            Some((ends((from, dir)), times.p2p_s[geometry.stage(from, dir)]))
        });
        let deeper = places.map(|(rank, dir)| {
            let hop_s = times.p2p_s.get(geometry.stage(rank, dir));
            Some((ends(geometry.deeper(rank, dir)?), *hop_s?))
        });
        let (shallower, deeper) = (shallower.collect(), deeper.collect());
        let rank_time = |r: &Vec<Op>| RankTime {
            instructions: vec![(0.0, 0.0); if detail == Detail::Totals { 0 } else { r.len() }],
            ..RankTime::default()
        };
        let memo = if detail != Detail::Parts && times.expert_load.is_empty() {
            ranks * dirs * 5
        } else {
            0
        };
        Engine {
            schedule,
            times,
            detail,
            mbs,
            dirs,
            forward_end: vec![0.0; ranks * dirs * mbs],
            backward_end: vec![0.0; ranks * dirs * mbs],
            shallower,
            deeper,
            free: vec![0.0; ranks],
            first_layer,
            known: vec![None; memo],
            scratch: Vec::new(),
            load: by_micro_batch(&times.expert_load),
            out: StepOutcome {
                ranks: schedule.ranks.iter().map(rank_time).collect(),
                ..StepOutcome::default()
            },
        }
    }

    fn slot(&self, rank: usize, dir: u8, mb: u32) -> usize {
        (rank * self.dirs + dir as usize) * self.mbs + mb as usize
    }

    /// When the inputs of an op have arrived: a forward waits for the activation of the stage
    /// before, a backward for the gradient of the stage behind, each after its hop over the
    /// network.
    fn inputs_at(&mut self, rank: usize, op: Op) -> f64 {
        let mut at = 0.0f64;
        if let Some(f) = op.forward()
            && let Some((ends, hop_s)) = self.shallower[rank * self.dirs + f.dir as usize]
        {
            at = at.max(self.forward_end[ends + f.mb as usize] + hop_s);
            self.out.events += 1;
        }
        if let Some(b) = op.backward()
            && let Some((ends, hop_s)) = self.deeper[rank * self.dirs + b.dir as usize]
        {
            at = at.max(self.backward_end[ends + b.mb as usize] + hop_s);
            self.out.events += 1;
        }
        at
    }

    // An instruction holds both streams of its rank from start to end: parts overlap inside it
    // only.
    fn instruction(&mut self, rank: usize, index: usize) {
        let op = self.schedule.ranks[rank][index];
        let start = self.inputs_at(rank, op).max(self.free[rank]);
        let (time, events) = self.chunk(rank, op);
        let end = start + time.span_s;
        if let Some(f) = op.forward() {
            let slot = self.slot(rank, f.dir, f.mb);
            self.forward_end[slot] = end;
        }
        if let Some(b) = op.backward() {
            let slot = self.slot(rank, b.dir, b.mb);
            self.backward_end[slot] = end;
        }
        self.free[rank] = end;
        self.out.events += events;
        self.keep_parts(rank, index, op, start);
        let r = &mut self.out.ranks[rank];
        if let Some(slot) = r.instructions.get_mut(index) {
            *slot = (start, end);
        }
        r.compute_s += time.compute_s;
        r.comm_s += time.comm_s;
        r.exposed_s += time.exposed_s;
        let entry = match op {
            Op::F(_) => &mut r.breakdown.forward,
            Op::B(_) | Op::Bi(_) => &mut r.breakdown.backward,
            Op::W(_) => &mut r.breakdown.weight,
            Op::FB { .. } => &mut r.breakdown.forward_backward,
        };
        *entry += time.span_s;
    }

    /// Plays the parts of one instruction.
    fn chunk(&mut self, rank: usize, op: Op) -> (ChunkTime, u64) {
        let key = (!self.known.is_empty()).then(|| self.memo_key(rank, op));
        if let Some(known) = key.and_then(|k| self.known[k]) {
            return known;
        }
        let (schedule, times) = (self.schedule, self.times);
        let stage_of = |c: Chunk| schedule.geometry.stage(rank, c.dir);
        let (first_layer, loads) = (&self.first_layer, &self.load);
        let layers = times.expert_load.len();
        let load_of = |c: Chunk| -> &[f32] {
            let (stage, mb) = (stage_of(c), schedule.micro_batch(c));
            let held = first_layer[stage]..first_layer[stage + 1];
            if layers == 0 { &[] } else { &loads[mb * layers..][held] }
        };
        self.scratch.clear();
        let spans = (self.detail == Detail::Parts).then_some(&mut self.scratch);
        let overhead = times.instruction_overhead_s;
        let alone = |c: Chunk| -> &[LayerTimes] { &times.stages[stage_of(c)].alone };
        let played = match op {
            Op::F(c) => chunk::forward(alone(c), load_of(c), overhead, spans),
            Op::B(c) => {
                let weights = Weights::of(times.wgrad_under_exchanges);
                chunk::backward(alone(c), weights, load_of(c), overhead, spans)
            }
            Op::Bi(c) => chunk::backward(alone(c), Weights::Later, load_of(c), overhead, spans),
            Op::W(c) => chunk::weight(alone(c), load_of(c), overhead, spans),
            Op::FB { f, b } => {
                let side = |c: Chunk| {
                    let StageTimes { overlapped, alone } = &times.stages[stage_of(c)];
                    Side { overlapped, alone, load: load_of(c) }
                };
                chunk::pair(side(f), side(b), overhead, spans)
            }
        };
        if let Some(key) = key {
            self.known[key] = Some(played);
        }
        played
    }

    /// Instructions with the same key take the same time where loads are balanced. In a pair the
    /// backward's direction is the other one of two.
    fn memo_key(&self, rank: usize, op: Op) -> usize {
        let (kind, dir) = match op {
            Op::F(c) => (0, c.dir),
            Op::B(c) => (1, c.dir),
            Op::Bi(c) => (2, c.dir),
            Op::W(c) => (3, c.dir),
            Op::FB { f, b } => {
                debug_assert_ne!(f.dir, b.dir, "a pair's chunks run in different directions");
                (4, f.dir)
            }
        };
        (rank * self.dirs + dir as usize) * 5 + kind
    }

    fn keep_parts(&mut self, rank: usize, index: usize, op: Op, start: f64) {
        if self.detail != Detail::Parts {
            return;
        }
        for part in self.scratch.drain(..) {
            let chunk =
                if part.phase == Phase::F { op.forward() } else { op.backward().or(op.weight()) };
            let chunk = chunk.expect("a part belongs to one of the op's chunks");
            self.out.parts.push(Event {
                rank: rank as u32,
                instruction: index as u32,
                stage: self.schedule.geometry.stage(rank, chunk.dir) as u32,
                micro_batch: self.schedule.micro_batch(chunk) as u32,
                part: PartSpan { start_s: start + part.start_s, end_s: start + part.end_s, ..part },
            });
        }
    }

    /// Ends the step: every rank reduces its gradients, all meet for the gradient norm, then each
    /// runs its optimizer and gathers parameters. What is booked nowhere is the bubble.
    fn finish(mut self) -> StepOutcome {
        let tail = &self.times.tail;
        let met =
            self.free.iter().zip(tail).map(|(end, t)| end + t.grad_reduce_s).fold(0.0, f64::max);
        let done = |t: &TailTimes| met + t.optimizer_s + t.param_gather_s;
        let step = tail.iter().map(done).fold(0.0, f64::max);
        let n = self.free.len() as f64;
        let out = &mut self.out;
        for (rank, r) in out.ranks.iter_mut().enumerate() {
            let t = &tail[rank];
            let optimizer_end = met + t.optimizer_s;
            r.tail = [self.free[rank], met, optimizer_end, optimizer_end + t.param_gather_s];
            r.breakdown.optimizer = t.grad_reduce_s + t.optimizer_s;
            r.breakdown.other = t.param_gather_s;
            r.breakdown.bubble = step - r.breakdown.total();
            out.events += 3;
            let (b, s) = (&r.breakdown, &mut out.breakdown);
            s.forward += b.forward / n;
            s.bubble += b.bubble / n;
            s.backward += b.backward / n;
            s.weight += b.weight / n;
            s.forward_backward += b.forward_backward / n;
            s.optimizer += b.optimizer / n;
            s.other += b.other / n;
            out.all_to_all.busy_s += r.comm_s / n;
            out.all_to_all.exposed_s += r.exposed_s / n;
        }
        let a = &mut out.all_to_all;
        a.hidden_fraction = if a.busy_s > 0.0 { 1.0 - a.exposed_s / a.busy_s } else { 1.0 };
        out.step_time_s = step;
        self.out
    }
}

/// Rows by layer as one list by micro-batch.
fn by_micro_batch(rows: &[Vec<f32>]) -> Vec<f32> {
    let micro_batches = 0..rows.first().map_or(0, Vec::len);
    micro_batches.flat_map(|mb| rows.iter().map(move |row| row[mb])).collect()
}

/// The name of a part for people: `attention F`.
pub fn part_name(component: Component, phase: Phase) -> String {
    let component = match component {
        Component::Attention => "attention",
        Component::Dispatch => "dispatch",
        Component::Mlp => "mlp",
        Component::Combine => "combine",
        other => return format!("{other:?} {phase:?}"),
    };
    format!("{component} {phase:?}")
}
