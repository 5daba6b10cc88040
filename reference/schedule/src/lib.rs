//! Pipeline schedules as explicit instruction streams, one list a rank.
//!
//! One file a schedule, each straight-line code with its phases titled; `Stream` is the pen they
//! write with. [`Geometry`] says which stages a rank holds and where a micro-batch goes next,
//! [`check`] proves a stream executable, [`timeline`] plays it with chunk durations, [`compare`]
//! sets all kinds side by side, [`draw`] draws, [`perfetto`] writes what ran when.
//! The simulator plays the same streams with the times of every layer's parts, and the trainer
//! executes them: this room knows neither.
//!
//! To add a schedule: copy a neighbour's file, add its kind to [`ScheduleKind`] and write what does
//! not compile without it.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};

mod chimera;
mod dualpipe;
mod dualpipev;
mod geometry;
mod gpipe;
mod interleaved;
mod one_f_one_b;
mod zb1p;
mod zb_v;

pub mod check;
pub mod compare;
pub mod draw;
pub mod perfetto;
pub mod timeline;

pub use geometry::{Geometry, Shape};

/// The pipeline schedules: in which order a rank runs the forwards and backwards of its stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ScheduleKind {
    /// All forwards, then all backwards (Huang et al. 2019).
    #[serde(rename = "gpipe")]
    GPipe,
    /// One forward, one backward (PipeDream-flush, Narayanan et al. 2021).
    #[serde(rename = "1f1b")]
    OneFOneB,
    /// 1F1B with several stages a rank in a loop (Megatron-LM, Narayanan et al. 2021).
    #[serde(rename = "interleaved")]
    Interleaved,
    /// ZB-H1: 1F1B's memory, weight gradients fill the drain (Qi et al. 2023).
    #[serde(rename = "zb1p")]
    Zb1p,
    /// Zero bubble with two stages a rank in a V (Qi et al. 2024).
    #[serde(rename = "zb-v")]
    ZbV,
    /// Two directions over two copies of the weights (Li and Hoefler 2021).
    #[serde(rename = "chimera")]
    Chimera,
    /// DeepSeek's bidirectional schedule with overlapped forward-backward pairs (DeepSeek-V3
    /// report, 3.2.1).
    #[serde(rename = "dualpipe")]
    DualPipe,
    /// DualPipe cut in half: a V on half the ranks.
    #[serde(rename = "dualpipev")]
    DualPipeV,
}

impl ScheduleKind {
    /// All kinds, in the order of the comparison table.
    pub const ALL: [ScheduleKind; 8] = [
        ScheduleKind::GPipe,
        ScheduleKind::OneFOneB,
        ScheduleKind::Interleaved,
        ScheduleKind::Zb1p,
        ScheduleKind::ZbV,
        ScheduleKind::Chimera,
        ScheduleKind::DualPipe,
        ScheduleKind::DualPipeV,
    ];

    /// The name on the command line and in TOML.
    pub fn name(self) -> &'static str {
        match self {
            ScheduleKind::GPipe => "gpipe",
            ScheduleKind::OneFOneB => "1f1b",
            ScheduleKind::Interleaved => "interleaved",
            ScheduleKind::Zb1p => "zb1p",
            ScheduleKind::ZbV => "zb-v",
            ScheduleKind::Chimera => "chimera",
            ScheduleKind::DualPipe => "dualpipe",
            ScheduleKind::DualPipeV => "dualpipev",
        }
    }

    /// The kind of that [`name`](Self::name).
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// How stages lie on ranks.
    pub fn shape(self) -> Shape {
        match self {
            ScheduleKind::GPipe | ScheduleKind::OneFOneB | ScheduleKind::Zb1p => Shape::Line,
            ScheduleKind::Interleaved => Shape::Loop,
            ScheduleKind::ZbV | ScheduleKind::DualPipeV => Shape::V,
            ScheduleKind::Chimera | ScheduleKind::DualPipe => Shape::TwoWay,
        }
    }

    /// Whether the schedule pairs a forward with a backward chunk to overlap their communication.
    pub fn overlaps_pairs(self) -> bool {
        match self {
            ScheduleKind::DualPipe | ScheduleKind::DualPipeV => true,
            ScheduleKind::GPipe
            | ScheduleKind::OneFOneB
            | ScheduleKind::Interleaved
            | ScheduleKind::Zb1p
            | ScheduleKind::ZbV
            | ScheduleKind::Chimera => false,
        }
    }

    /// The fewest micro-batches with which the streams of `stages` stages close.
    fn fewest_micro_batches(self, stages: usize) -> (usize, &'static str) {
        match self {
            ScheduleKind::DualPipe => (2 * stages, "2P"),
            ScheduleKind::DualPipeV => (stages, "P"),
            ScheduleKind::GPipe
            | ScheduleKind::OneFOneB
            | ScheduleKind::Interleaved
            | ScheduleKind::Zb1p
            | ScheduleKind::ZbV
            | ScheduleKind::Chimera => (1, "1"),
        }
    }
}

/// A micro-batch on one of a rank's stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Chunk {
    /// Which of the rank's stages; see [`Shape`].
    pub dir: u8,
    /// Micro-batch, counted per direction where the shape is [`Shape::TwoWay`].
    pub mb: u32,
}

/// One instruction of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    /// Forward of a micro-batch through one of the rank's stages.
    F(Chunk),
    /// Full backward: gradients of input and weights.
    B(Chunk),
    /// Backward for the input only; its weight gradient is queued.
    Bi(Chunk),
    /// The oldest queued weight gradient.
    W(Chunk),
    /// A forward and a full backward, overlapped.
    FB {
        /// The chunk that runs forward.
        f: Chunk,
        /// The chunk that runs backward.
        b: Chunk,
    },
}

impl Op {
    /// The chunk that this op runs forward.
    pub fn forward(self) -> Option<Chunk> {
        match self {
            Op::F(f) | Op::FB { f, .. } => Some(f),
            _ => None,
        }
    }

    /// The chunk whose input gradient this op produces.
    pub fn backward(self) -> Option<Chunk> {
        match self {
            Op::B(b) | Op::Bi(b) | Op::FB { b, .. } => Some(b),
            _ => None,
        }
    }

    /// The chunk whose weight gradient this op produces.
    pub fn weight(self) -> Option<Chunk> {
        match self {
            Op::B(b) | Op::W(b) | Op::FB { b, .. } => Some(b),
            _ => None,
        }
    }

    /// The name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Op::F(_) => "F",
            Op::B(_) => "B",
            Op::Bi(_) => "Bi",
            Op::W(_) => "W",
            Op::FB { .. } => "FB",
        }
    }
}

impl Serialize for Op {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("op", self.name())?;
        match *self {
            Op::F(c) | Op::B(c) | Op::Bi(c) | Op::W(c) => {
                map.serialize_entry("dir", &c.dir)?;
                map.serialize_entry("mb", &c.mb)?;
            }
            Op::FB { f, b } => {
                map.serialize_entry("f_dir", &f.dir)?;
                map.serialize_entry("f_mb", &f.mb)?;
                map.serialize_entry("b_dir", &b.dir)?;
                map.serialize_entry("b_mb", &b.mb)?;
            }
        }
        map.end()
    }
}

/// What to schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScheduleShape {
    /// Pipeline stages `P`.
    pub stages: usize,
    /// Micro-batches of a step; both directions together where there are two.
    pub micro_batches: usize,
    /// Stages a rank holds in [`ScheduleKind::Interleaved`]; ignored elsewhere.
    pub interleave: usize,
}

/// Sizes with which a schedule cannot be built; the sentence gives the reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ScheduleError(pub String);

/// The instruction streams of all ranks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Schedule {
    /// `ranks[r]`: the ops of rank `r` in the order in which it runs them.
    pub ranks: Vec<Vec<Op>>,
    /// Which schedule this is.
    #[serde(skip)]
    pub kind: ScheduleKind,
    /// Where its stages lie.
    #[serde(skip)]
    pub geometry: Geometry,
    /// Micro-batches of the step, both directions together.
    #[serde(skip)]
    pub micro_batches: usize,
}

impl Schedule {
    /// Builds the streams of `kind`.
    ///
    /// # Errors
    /// [`ScheduleError`] for an illegal number of stages or micro-batches, with the reason.
    pub fn new(kind: ScheduleKind, shape: ScheduleShape) -> Result<Self, ScheduleError> {
        let mut schedule = Self::empty(kind, shape)?;
        let (p, n, m) = (shape.stages, schedule.ranks.len(), shape.micro_batches);
        for (r, ops) in schedule.ranks.iter_mut().enumerate() {
            *ops = match kind {
                ScheduleKind::GPipe => gpipe::stream(m),
                ScheduleKind::OneFOneB => one_f_one_b::stream(p, r, m),
                ScheduleKind::Interleaved => interleaved::stream(n, shape.interleave, r, m),
                ScheduleKind::Zb1p => zb1p::stream(p, r, m),
                ScheduleKind::ZbV => zb_v::stream(n, r, m),
                ScheduleKind::Chimera => chimera::stream(p, r, m),
                ScheduleKind::DualPipe => dualpipe::stream(p, r, m),
                ScheduleKind::DualPipeV => dualpipev::stream(n, r, m),
            };
        }
        Ok(schedule)
    }

    /// The schedule without its instructions: its legality, and which stage lies where.
    ///
    /// # Errors
    /// As [`Schedule::new`].
    pub fn empty(kind: ScheduleKind, shape: ScheduleShape) -> Result<Self, ScheduleError> {
        let ScheduleShape { stages: p, micro_batches: m, interleave } = shape;
        let legal = |ok: bool, rule: &str| {
            let what = format!("{} with {p} stages, {m} micro-batches", kind.name());
            if ok { Ok(()) } else { Err(ScheduleError(format!("{what}: {rule}"))) }
        };
        legal(p >= 1 && m >= 1, "both must be at least 1")?;
        legal(p <= 4096 && m <= 1 << 20, "at most 4096 and 1048576")?;
        legal(p * m <= 1 << 21, "stages times micro-batches are at most 2097152")?;
        match kind.shape() {
            Shape::Line => {}
            Shape::Loop => {
                let rule =
                    "a rank holds 2 to 255 stages, and the stages must be a multiple of that";
                legal((2..=255).contains(&interleave) && p % interleave.max(1) == 0, rule)?;
                let ranks = p / interleave;
                let rule = format!("micro-batches must be a multiple of the {ranks} ranks");
                legal(m % ranks == 0, &rule)?;
            }
            Shape::V => legal(p % 2 == 0, "stages must be even")?,
            Shape::TwoWay => {
                legal(p % 2 == 0, "stages must be even")?;
                legal(m % 2 == 0, "micro-batches must be even, half for each direction")?;
            }
        }
        let (fewest, words) = kind.fewest_micro_batches(p);
        legal(m >= fewest, &format!("micro-batches must be at least {words} = {fewest}"))?;
        let geometry = Geometry::of_stages(kind.shape(), p, interleave);
        let ranks = vec![Vec::new(); geometry.ranks];
        Ok(Schedule { ranks, kind, geometry, micro_batches: m })
    }

    /// Micro-batches that pass a rank's stage of one `dir`.
    pub fn micro_batches_per_dir(&self) -> usize {
        match self.geometry.shape {
            Shape::TwoWay => self.micro_batches / 2,
            Shape::Line | Shape::Loop | Shape::V => self.micro_batches,
        }
    }

    /// The number of a chunk's micro-batch in the step.
    pub fn micro_batch(&self, chunk: Chunk) -> usize {
        let first = match self.geometry.shape {
            Shape::TwoWay => chunk.dir as usize * self.micro_batches_per_dir(),
            Shape::Line | Shape::Loop | Shape::V => 0,
        };
        first + chunk.mb as usize
    }
}

/// The pen of the schedules: appends ops and counts micro-batches, one counter a direction for
/// forwards and one for backwards, and a first-in-first-out queue of weight gradients.
#[derive(Debug, Default)]
struct Stream {
    ops: Vec<Op>,
    next_f: Vec<u32>,
    next_b: Vec<u32>,
    queue: VecDeque<Chunk>,
    /// Exclusive-or of every `dir`: 1 on the second half of DualPipe's ranks, whose phase 0 is
    /// direction 1.
    flip: u8,
}

impl Stream {
    fn new(dirs: usize, flip: bool) -> Self {
        Stream {
            next_f: vec![0; dirs],
            next_b: vec![0; dirs],
            flip: flip as u8,
            ..Stream::default()
        }
    }

    fn take(counter: &mut [u32], dir: u8) -> Chunk {
        let mb = counter[dir as usize];
        counter[dir as usize] += 1;
        Chunk { dir, mb }
    }

    /// Forward of the next micro-batch.
    fn f(&mut self, phase: u8) {
        let chunk = Self::take(&mut self.next_f, phase ^ self.flip);
        self.ops.push(Op::F(chunk));
    }

    /// Full backward of the next micro-batch.
    fn b(&mut self, phase: u8) {
        let chunk = Self::take(&mut self.next_b, phase ^ self.flip);
        self.ops.push(Op::B(chunk));
    }

    /// Backward for the input of the next micro-batch; its weight gradient goes to the queue.
    fn bi(&mut self, phase: u8) {
        let chunk = Self::take(&mut self.next_b, phase ^ self.flip);
        self.queue.push_back(chunk);
        self.ops.push(Op::Bi(chunk));
    }

    /// The oldest queued weight gradient.
    fn w(&mut self) {
        let chunk = self.queue.pop_front().expect("a schedule pops only queued weight gradients");
        self.ops.push(Op::W(chunk));
    }

    /// An overlapped pair.
    fn fb(&mut self, phase_f: u8, phase_b: u8) {
        let f = Self::take(&mut self.next_f, phase_f ^ self.flip);
        let b = Self::take(&mut self.next_b, phase_b ^ self.flip);
        self.ops.push(Op::FB { f, b });
    }

    /// The ops; every queued weight gradient must have been popped.
    fn finish(self) -> Vec<Op> {
        assert!(self.queue.is_empty(), "weight gradients left in the queue: {:?}", self.queue);
        self.ops
    }
}
