//! A micro-batch through the model: forward with losses, input-backward, weight-backward.

use std::cell::RefCell;

use fathom_trace::{DType, GroupKind};

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
use crate::{EngineError, Tensor};
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

    /// The rows of MTP module `depth`. Those of a sequential module stand at the position of the
    /// token that joins them and follow on the rows of the module before; those of a parallel head
    /// are rows of the main model.
    fn mtp_rows(&self, depth: usize, kind: MtpKind) -> MtpRows {
        let mut rows = MtpRows::default();
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
                rows.segments.push(length - depth);
            }
            start += length;
            before += (length + 1).saturating_sub(depth);
        }
        rows
    }
}

/// The rows of an MTP module.
#[derive(Default)]
struct MtpRows {
    tokens: Vec<i32>,
    targets: Vec<i32>,
    positions: Vec<i32>,
    segments: Vec<usize>,
    /// Each row's row in the module before (the main model comes first), or in the main model.
    previous: Vec<i32>,
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
    /// Brings a micro-batch to the backend. Under context parallelism it holds this rank's part of
    /// one sequence, all parts being of one length.
    ///
    /// # Errors
    /// Those of the backend; [`EngineError::Unsupported`] for parts of several sequences.
    pub fn batch<B: Backend>(&self, backend: &B, batch: &Batch) -> Result<DeviceBatch<B>> {
        let group = parallel::group(self.parallel, GroupKind::Cp);
        if group.size > 1 && batch.segments.len() != 1 {
            return Err(EngineError::Unsupported {
                engine: backend.name(),
                op: "all_gather".into(),
                reason: "context parallelism takes one sequence a micro-batch".into(),
            });
        }
        let longest = group.size * batch.segments.iter().copied().max().unwrap_or(0);
        let master = self.recipe.master();
        let [cos, sin] = rope::tables(&self.config.rope, self.rotated(), longest, master);
        let (cos, sin) = (backend.upload(cos)?, backend.upload(sin)?);
        let upload = |values: Vec<i32>| backend.upload(Tensor::from_vec(&[values.len()], values));
        let stream = |ids, targets, positions, segments, previous: Option<Vec<i32>>| {
            let (positions, context) = self.place_in_context(backend, positions)?;
            Result::<_>::Ok(Stream {
                rows: Rows { segments, positions, cos: cos.clone(), sin: sin.clone(), context },
                ids: upload(ids)?,
                targets: upload(targets)?,
                previous: previous.map(upload).transpose()?,
            })
        };
        let ids = batch.tokens.iter().map(|&t| t as i32).collect();
        let positions = batch.segments.iter().flat_map(|&n| 0..n as i32).collect();
        let (targets, segments) = (batch.targets.clone(), batch.segments.clone());
        let main = stream(ids, targets, positions, segments, None)?;
        let mut mtp = Vec::new();
        for module in &self.mtp {
            let rows = batch.mtp_rows(module.depth, self.config.mtp_kind);
            let MtpRows { tokens, targets, positions, segments, previous } = rows;
            mtp.push(stream(tokens, targets, positions, segments, Some(previous))?);
        }
        Ok(DeviceBatch { main, mtp })
    }

    /// Positions of this rank's rows, given those in its part; and what it sees of the sequence.
    fn place_in_context<B: Backend>(
        &self,
        backend: &B,
        own: Vec<i32>,
    ) -> Result<(B::Buffer, Option<Context<B>>)> {
        let upload = |values: Vec<i32>| backend.upload(Tensor::from_vec(&[values.len()], values));
        let group = parallel::group(self.parallel, GroupKind::Cp);
        if group.size == 1 {
            return Ok((upload(own)?, None));
        }
        let (length, begin) = (own.len() as i32, own.first().copied().unwrap_or(0));
        let before = self.at.cp as i32 * length;
        let keys = before + length;
        let positions = upload((begin..begin + keys).collect())?;
        let own = upload(own.into_iter().map(|p| p + before).collect())?;
        Ok((own, Some(Context { group, keys: keys as usize, positions })))
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
