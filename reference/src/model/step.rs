//! A micro-batch through the model: forward with losses, input-backward, weight-backward.

use std::cell::RefCell;
use std::rc::Rc;

use fathom_trace::{DType, GroupKind};

use crate::Tensor;
use crate::backend::{Backend, Place, Result};
use crate::layers::context::Rows;
use crate::layers::linear::NormKept;
use crate::layers::{Balance, Capacity, Context, Cx, Gradients, Weights, rope};
use crate::model::Model;
use crate::model::layer::LayerKept;
use crate::model::mtp::MtpKept;
use crate::model::stage::{Lane, StageKept, StageReport};
use crate::model::tail::{Losses, Tail};
use crate::ops::gemm::{Gemm, Layout};
use crate::parallel;
use fathom_config::MtpKind;

/// A micro-batch on the host: one row per token, all sequences one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token of each row.
    pub tokens: Vec<u32>,
    /// Token that each row is to predict; -1 where there is none.
    pub targets: Vec<i32>,
    /// Lengths of the segments that attention stays inside (sequences, or documents where samples
    /// are masked from each other); positions begin at 0 in each.
    pub segments: Vec<usize>,
}

impl Batch {
    /// A micro-batch of whole sequences: each row predicts the next token, the last of a sequence
    /// none.
    pub fn from_sequences(sequences: &[Vec<u32>]) -> Batch {
        let mut batch = Batch::default();
        for sequence in sequences.iter().filter(|s| !s.is_empty()) {
            batch.tokens.extend(sequence);
            batch.targets.extend(sequence[1..].iter().map(|&t| t as i32));
            batch.targets.push(-1);
            batch.segments.push(sequence.len());
        }
        batch
    }

    /// One micro-batch of several, their rows one after the other.
    pub fn join(sequences: &[Batch]) -> Batch {
        let mut batch = Batch::default();
        for sequence in sequences {
            batch.tokens.extend(&sequence.tokens);
            batch.targets.extend(&sequence.targets);
            batch.segments.extend(&sequence.segments);
        }
        batch
    }

    /// Rows that have a target: what the main loss is a mean over.
    pub fn predicted(&self) -> usize {
        self.targets.iter().filter(|&&t| t >= 0).count()
    }

    /// Rows of MTP module `depth` (from 1) that have a target.
    pub fn predicted_mtp(&self, depth: usize) -> usize {
        self.mtp_rows(depth, MtpKind::Sequential).targets.iter().filter(|&&t| t >= 0).count()
    }

    /// The rows of the main model.
    fn main_rows(&self) -> StreamRows {
        StreamRows {
            tokens: self.tokens.iter().map(|&t| t as i32).collect(),
            targets: self.targets.clone(),
            positions: self.segments.iter().flat_map(|&n| 0..n as i32).collect(),
            segments: self.segments.clone(),
            previous: Vec::new(),
            origins: (0..self.tokens.len()).collect(),
        }
    }

    /// The rows of MTP module `depth`. Those of a sequential module stand at the position of the
    /// token that joins them and follow on the rows of the module before; those of a parallel head
    /// are rows of the main model.
    fn mtp_rows(&self, depth: usize, kind: MtpKind) -> StreamRows {
        let mut rows = StreamRows::default();
        let (mut start, mut before) = (0, 0);
        for &length in &self.segments {
            if length > depth {
                let own = start + depth..start + length;
                rows.tokens.extend(self.tokens[own.clone()].iter().map(|&t| t as i32));
                rows.targets.extend(&self.targets[own]);
                let (first, previous) = match kind {
                    MtpKind::Sequential => (depth, before),
                    MtpKind::Parallel => (0, start),
                };
                let rows_of = |first: usize| (first..first + length - depth).map(|i| i as i32);
                rows.positions.extend(rows_of(first));
                rows.previous.extend(rows_of(previous));
                rows.origins.extend(start..start + length - depth);
                rows.segments.push(length - depth);
            }
            start += length;
            before += (length + 1).saturating_sub(depth);
        }
        rows
    }
}

/// In how many parts sequences lie, and how long they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceParts {
    /// Parts of a sequence (`context_shards`).
    pub count: usize,
    /// Rows of a sequence; a multiple of the parts.
    pub length: usize,
}

impl SequenceParts {
    /// The part in which a row of the main model is.
    fn of(self, row: usize) -> usize {
        row % self.length / (self.length / self.count)
    }
}

/// The rows of the main model or of an MTP module, on the host.
#[derive(Clone, Default)]
struct StreamRows {
    tokens: Vec<i32>,
    targets: Vec<i32>,
    positions: Vec<i32>,
    segments: Vec<usize>,
    /// Each row's row in the module before (the main model comes first), or in the main model; none
    /// in the main model.
    previous: Vec<i32>,
    /// Each row's row in the main model, whose hidden state it goes on from: the row's part is that
    /// row's.
    origins: Vec<usize>,
}

impl StreamRows {
    /// Each row's place among those of its part.
    fn places(&self, parts: SequenceParts) -> Vec<i32> {
        let mut next = vec![0; parts.count];
        let place = |&origin: &usize| {
            let next = &mut next[parts.of(origin)];
            *next += 1;
            *next - 1
        };
        self.origins.iter().map(place).collect()
    }

    /// The rows of each part. Segments are cut where a part ends; `places` are those of the rows
    /// to which `previous` points.
    fn cut(&self, parts: SequenceParts, places: &[i32]) -> Vec<StreamRows> {
        let mut cut = vec![StreamRows::default(); parts.count];
        let mut row = 0;
        for &length in &self.segments {
            let mut before = None;
            for i in row..row + length {
                let part = parts.of(self.origins[i]);
                let own = &mut cut[part];
                own.tokens.push(self.tokens[i]);
                own.targets.push(self.targets[i]);
                own.positions.push(self.positions[i]);
                own.origins.push(self.origins[i]);
                own.previous.extend(self.previous.get(i).map(|&row| places[row as usize]));
                if before != Some(part) {
                    own.segments.push(0);
                    before = Some(part);
                }
                *own.segments.last_mut().expect("just pushed") += 1;
            }
            row += length;
        }
        cut
    }
}

/// The rows of the main model or of an MTP module, on the backend.
#[derive(Clone, Debug)]
pub struct Stream<B: Backend> {
    /// Segments, positions and RoPE tables of the rows.
    pub rows: Rows<B>,
    /// Token of each row, I32 \[t\].
    pub ids: B::Buffer,
    /// Target of each row, I32 \[t\], -1 for none.
    pub targets: B::Buffer,
    /// Row in the stream before, I32 \[t\] (of a parallel head, row in the main stream); none for
    /// the main model.
    pub previous: Option<B::Buffer>,
}

/// A micro-batch on the backend.
#[derive(Clone, Debug)]
pub struct DeviceBatch<B: Backend> {
    /// The main model's rows.
    pub main: Stream<B>,
    /// Rows of each MTP module; none where no sequence is long enough, and then the module runs all
    /// the same, since its experts may have rows of other micro-batches.
    pub mtp: Vec<Stream<B>>,
}

/// What a micro-batch must know of its step: normalisers and weights of the losses.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepSettings {
    /// Optimizer step, for op records and error reports only.
    pub step: u64,
    /// Micro-batch of the step, for op records and error reports only.
    pub micro_batch: Option<usize>,
    /// Weight of each row's main loss: one over the predicted tokens of the whole step.
    pub main_scale: f64,
    /// Weight of each row's loss of each MTP module: lambda over their number over the rows that
    /// the module predicts in the whole step. Modules without an entry do not run.
    pub mtp_scales: Vec<f64>,
    /// The balance losses of the MoE layers, with their weights.
    pub balance: Vec<Balance>,
    /// Room for tokens in the MoE layers; none: no token is dropped.
    pub capacity: Option<Capacity>,
}

impl StepSettings {
    /// The settings of a step that is this one micro-batch; `lambda` weighs the mean of the MTP
    /// losses.
    pub fn of(batch: &Batch, mtp_depth: usize, lambda: f64) -> StepSettings {
        let over = |weight: f64, n: usize| if n == 0 { 0.0 } else { weight / n as f64 };
        let mtp = |d| over(lambda / mtp_depth as f64, batch.predicted_mtp(d));
        StepSettings {
            main_scale: over(1.0, batch.predicted()),
            mtp_scales: (1..=mtp_depth).map(mtp).collect(),
            ..StepSettings::default()
        }
    }
}

/// What a forward gives and keeps for its backward.
#[derive(Debug)]
pub struct Forward<B: Backend> {
    /// Hidden state of the main model after the final norm, \[t, hidden\].
    pub hidden: B::Buffer,
    /// Each layer's output \[t, hidden\], where asked for.
    pub outputs: Vec<B::Buffer>,
    /// The main model's losses.
    pub losses: Losses<B>,
    /// What each layer keeps, in order.
    pub layers: Vec<LayerKept<B>>,
    norm: NormKept<B>,
    /// Of each MTP module: hidden states after its norm, losses, and what it keeps.
    pub mtp: Vec<(B::Buffer, Losses<B>, MtpKept<B>)>,
}

/// Losses and loads of a micro-batch, or of a whole step once they are added up.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepReport {
    /// Sum of the main losses over the rows, without `main_scale`.
    pub main: f64,
    /// Sum of each MTP module's losses over its rows.
    pub mtp: Vec<f64>,
    /// Sum of the balance losses, with their weights.
    pub balance: f64,
    /// Choices of experts that were dropped for want of room.
    pub dropped: usize,
    /// Rows that each expert got of these tokens: layer (MTP modules follow the last) and counts.
    pub loads: Vec<(usize, Vec<usize>)>,
}

impl Model {
    /// Brings a micro-batch of whole sequences to the backend.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn batch<B: Backend>(&self, backend: &B, batch: &Batch) -> Result<DeviceBatch<B>> {
        let [cos, sin] = self.tables(backend, batch)?;
        let stream = |rows, previous| upload_stream(backend, (&cos, &sin), rows, previous, None);
        let main = stream(batch.main_rows(), false)?;
        let modules = self.mtp.iter().map(|m| batch.mtp_rows(m.depth, self.config.mtp_kind));
        let mtp = modules.map(|rows| stream(rows, true)).collect::<Result<_>>()?;
        Ok(DeviceBatch { main, mtp })
    }

    /// Brings a micro-batch to the backend in those of its `parts` that this rank has, each a lane:
    /// an even share of them, in the order of the context parallel ranks.
    ///
    /// # Errors
    /// Those of the backend.
    ///
    /// # Panics
    /// Where parts and ranks, or rows and parts, do not divide.
    pub fn parts<B: Backend>(
        &self,
        backend: &B,
        batch: &Batch,
        parts: SequenceParts,
    ) -> Result<Vec<DeviceBatch<B>>> {
        if parts.count == 1 {
            return Ok(vec![self.batch(backend, batch)?]);
        }
        let ranks = parallel::group(self.parallel, GroupKind::Cp).size;
        assert!(parts.count.is_multiple_of(ranks), "{parts:?} over {ranks} ranks");
        let whole = batch.tokens.len().is_multiple_of(parts.length);
        assert!(whole && parts.length.is_multiple_of(parts.count), "{parts:?} of {batch:?}");
        let [cos, sin] = self.tables(backend, batch)?;
        let mut lanes: Vec<Vec<Stream<B>>> = (0..parts.count / ranks).map(|_| Vec::new()).collect();
        let main = batch.main_rows();
        let trunk = main.places(parts);
        let mut before = trunk.clone();
        let modules = self.mtp.iter().map(|m| batch.mtp_rows(m.depth, self.config.mtp_kind));
        for (depth, rows) in std::iter::once(main).chain(modules).enumerate() {
            let places = match self.config.mtp_kind {
                MtpKind::Sequential => std::mem::replace(&mut before, rows.places(parts)),
                MtpKind::Parallel => trunk.clone(),
            };
            let context = Rc::new(self.context(backend, &rows, parts)?);
            let own = rows.cut(parts, &places).into_iter().skip(self.at.cp * lanes.len());
            for (lane, rows) in lanes.iter_mut().zip(own) {
                let context = Some(Rc::clone(&context));
                lane.push(upload_stream(backend, (&cos, &sin), rows, depth > 0, context)?);
            }
        }
        let lane = |mut streams: Vec<Stream<B>>| {
            let main = streams.remove(0);
            DeviceBatch { main, mtp: streams }
        };
        Ok(lanes.into_iter().map(lane).collect())
    }

    /// How the parts of these rows join.
    fn context<B: Backend>(
        &self,
        backend: &B,
        rows: &StreamRows,
        parts: SequenceParts,
    ) -> Result<Context<B>> {
        let group = parallel::group(self.parallel, GroupKind::Cp);
        let each = parts.count / group.size;
        let mut counts = vec![0; parts.count];
        rows.origins.iter().for_each(|&origin| counts[parts.of(origin)] += 1);
        let first = |part: usize| counts[..part].iter().sum::<usize>() as i32;
        let placed = rows.origins.iter().zip(rows.places(parts));
        let order: Vec<i32> = placed.map(|(&o, place)| first(parts.of(o)) + place).collect();
        let order = match order.is_sorted() {
            true => None,
            false => {
                let mut back = vec![0; order.len()];
                (0..).zip(&order).for_each(|(row, &place)| back[place as usize] = row);
                Some([upload(backend, order)?, upload(backend, back)?])
            }
        };
        Ok(Context {
            group,
            member: self.at.cp,
            parts: counts[self.at.cp * each..][..each].to_vec(),
            rows: counts.chunks(each).map(|of_rank| of_rank.iter().sum()).collect(),
            segments: rows.segments.clone(),
            order,
        })
    }

    /// Cosines and sines of the positions of a micro-batch.
    fn tables<B: Backend>(&self, backend: &B, batch: &Batch) -> Result<[B::Buffer; 2]> {
        let longest = batch.segments.iter().copied().max().unwrap_or(0);
        let master = self.recipe.master();
        let [cos, sin] = rope::tables(&self.config.rope, self.rotated(), longest, master);
        Ok([backend.upload(cos)?, backend.upload(sin)?])
    }

    pub(super) fn cx<'a, B: Backend>(
        &'a self,
        backend: &'a B,
        weights: &'a Weights<B>,
        rows: &'a Rows<B>,
        settings: &'a StepSettings,
        gradients: Option<&'a RefCell<Gradients<B>>>,
    ) -> Cx<'a, B> {
        let (step, micro_batch) = (settings.step, settings.micro_batch);
        let place = Place { step, micro_batch, ..Place::default() };
        let tp = parallel::group(self.parallel, GroupKind::Tp);
        let (recipe, balance) = (&self.recipe, &settings.balance[..]);
        let capacity = settings.capacity.clone();
        Cx { backend, recipe, weights, tp, balance, capacity, rows, place, gradients }
    }

    /// Logits \[t, vocab\] of hidden states after their norm, in master precision: for evaluation;
    /// training never makes them all.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn logits<B: Backend>(
        &self,
        backend: &B,
        weights: &Weights<B>,
        hidden: &B::Buffer,
    ) -> Result<B::Buffer> {
        let out = self.recipe.master();
        let head = weights.head(self.head.expect("this stage has the head"));
        let op = Gemm { layout: Layout::Nt, out, segments: Vec::new() };
        backend.gemm(&op, hidden, head, None)
    }

    /// The forward of a micro-batch on a model of one stage; MTP modules run where `settings` has a
    /// scale for them. `outputs` keeps every layer's output.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn forward<B: Backend>(
        &self,
        backend: &B,
        weights: &Weights<B>,
        batch: &DeviceBatch<B>,
        settings: &StepSettings,
        outputs: bool,
    ) -> Result<Forward<B>> {
        let lanes = [Lane { batch, settings, gradients: None }];
        let mut all = Vec::new();
        let each = |ys: &[B::Buffer]| all.extend(outputs.then(|| ys[0].clone()));
        let (_, kept) = self.stage_forward_with(backend, weights, &lanes, None, each)?;
        let StageKept { layers, mut tails } = kept;
        let Tail { hidden, losses, norm, mtp } = tails.remove(0);
        let layers = layers.into_iter().map(|mut lanes| lanes.remove(0)).collect();
        Ok(Forward { hidden, outputs: all, losses, layers, norm, mtp })
    }

    /// Input-backward and weight-backward of a micro-batch: adds to `gradients` and gives them
    /// back.
    ///
    /// # Errors
    /// Those of the backend.
    ///
    /// # Panics
    /// Where the model is not of one stage.
    pub fn backward<B: Backend>(
        &self,
        backend: &B,
        weights: &Weights<B>,
        batch: &DeviceBatch<B>,
        settings: &StepSettings,
        forward: Forward<B>,
        gradients: Gradients<B>,
    ) -> Result<Gradients<B>> {
        let gradients = RefCell::new(gradients);
        let lanes = [Lane { batch, settings, gradients: Some(&gradients) }];
        let Forward { hidden, losses, layers, norm, mtp, .. } = forward;
        let tails = vec![Tail { hidden, losses, norm, mtp }];
        let layers = layers.into_iter().map(|kept| vec![kept]).collect();
        self.stage_backward(backend, weights, &lanes, StageKept { layers, tails }, None)?;
        Ok(gradients.into_inner())
    }

    /// Forward and backward of a micro-batch: adds to `gradients`, and reads losses and loads back.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn step<B: Backend>(
        &self,
        backend: &B,
        weights: &Weights<B>,
        batch: &DeviceBatch<B>,
        settings: &StepSettings,
        gradients: &mut Gradients<B>,
    ) -> Result<StepReport> {
        let batches = [(batch, settings)];
        Ok(self
            .step_together(backend, weights, &batches, std::slice::from_mut(gradients))?
            .remove(0))
    }

    /// As [`Model::step`] for micro-batches side by side, whose rows are one call of the routed
    /// experts: dense weights add to the accumulators of their own micro-batch, experts to those of
    /// the first.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn step_together<B: Backend>(
        &self,
        backend: &B,
        weights: &Weights<B>,
        batches: &[(&DeviceBatch<B>, &StepSettings)],
        gradients: &mut [Gradients<B>],
    ) -> Result<Vec<StepReport>> {
        let cells: Vec<_> = gradients.iter_mut().map(|g| RefCell::new(std::mem::take(g))).collect();
        let lane = |(&(batch, settings), cell): (&(_, _), _)| Lane {
            batch,
            settings,
            gradients: Some(cell),
        };
        let lanes: Vec<Lane<'_, B>> = batches.iter().zip(&cells).map(lane).collect();
        let (_, kept) = self.stage_forward(backend, weights, &lanes, None)?;
        let reports = self.stage_reports(backend, &kept)?;
        self.stage_backward(backend, weights, &lanes, kept, None)?;
        drop(lanes);
        for (gradients, cell) in gradients.iter_mut().zip(cells) {
            *gradients = cell.into_inner();
        }
        Ok(reports.into_iter().map(|part| StepReport::of_stages([part])).collect())
    }

    /// Reads the losses and loads of a forward back to the host.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn report<B: Backend>(&self, backend: &B, forward: &Forward<B>) -> Result<StepReport> {
        let tail = (&forward.losses, &forward.mtp[..]);
        let part = self.stage_report(backend, forward.layers.iter(), Some(tail))?;
        Ok(StepReport::of_stages([part]))
    }
}

fn upload<B: Backend>(backend: &B, values: Vec<i32>) -> Result<B::Buffer> {
    backend.upload(Tensor::from_vec(&[values.len()], values))
}

fn upload_stream<B: Backend>(
    backend: &B,
    (cos, sin): (&B::Buffer, &B::Buffer),
    rows: StreamRows,
    has_previous: bool,
    context: Option<Rc<Context<B>>>,
) -> Result<Stream<B>> {
    let StreamRows { tokens, targets, positions, segments, previous, .. } = rows;
    let positions = upload(backend, positions)?;
    Ok(Stream {
        rows: Rows { segments, positions, cos: cos.clone(), sin: sin.clone(), context },
        ids: upload(backend, tokens)?,
        targets: upload(backend, targets)?,
        previous: has_previous.then(|| upload(backend, previous)).transpose()?,
    })
}

impl StepReport {
    /// A micro-batch's report of the reports of its stages, in order.
    pub fn of_stages(parts: impl IntoIterator<Item = StageReport>) -> StepReport {
        let mut report = StepReport::default();
        for part in parts {
            report.main += part.main;
            report.mtp.extend(part.mtp);
            report.dropped += part.dropped;
            part.balance.iter().for_each(|x| report.balance += x);
            report.loads.extend(part.loads);
        }
        report
    }

    /// Adds a micro-batch's sums to the step's.
    pub fn add(&mut self, of: StepReport) {
        self.main += of.main;
        self.balance += of.balance;
        self.dropped += of.dropped;
        self.mtp.resize(self.mtp.len().max(of.mtp.len()), 0.0);
        self.mtp.iter_mut().zip(of.mtp).for_each(|(sum, x)| *sum += x);
        for (layer, loads) in of.loads {
            match self.loads.iter_mut().find(|(index, _)| *index == layer) {
                Some((_, sum)) => sum.iter_mut().zip(loads).for_each(|(sum, n)| *sum += n),
                None => self.loads.push((layer, loads)),
            }
        }
    }
}

/// Sum of a tensor's elements in F64, in order.
pub(crate) fn host_sum(tensor: &Tensor) -> f64 {
    match tensor.dtype() {
        DType::F64 => tensor.as_slice::<f64>().iter().sum(),
        _ => tensor.as_slice::<f32>().iter().map(|&x| f64::from(x)).sum(),
    }
}
