//! A micro-batch through the model: forward with losses, input-backward, weight-backward.

use std::cell::RefCell;

use fathom_trace::{Component, DType, GroupKind, Phase};

use crate::backend::{Backend, Place, Result};
use crate::layers::context::Rows;
use crate::layers::linear::NormKept;
use crate::layers::{Balance, Capacity, Context, Cx, Gradients, Weights, rope};
use crate::model::Model;
use crate::model::layer::LayerKept;
use crate::model::mtp::{MtpGradients, MtpKept};
use crate::model::params::ParamId;
use crate::ops::cross_entropy::{CrossEntropy, CrossEntropyBackward};
use crate::ops::gather_rows::GatherRows;
use crate::ops::gemm::{Gemm, Layout};
use crate::ops::scatter_add_rows::ScatterAddRows;
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
    /// Rows of each MTP module; shorter than the model's list where no sequence is long enough.
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

/// The loss of each row, and what its backward needs.
#[derive(Debug)]
pub struct Losses<B: Backend> {
    /// Cross-entropy of each row \[t\] in nats, 0 where it has no target.
    pub loss: B::Buffer,
    lse: B::Buffer,
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

/// What the forward behind the last layer keeps.
pub(super) struct Tail<B: Backend> {
    hidden: B::Buffer,
    losses: Losses<B>,
    norm: NormKept<B>,
    mtp: Vec<(B::Buffer, Losses<B>, MtpKept<B>)>,
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
    /// Rows that each expert of this rank got: layer (MTP modules follow the last) and counts.
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
            if rows.tokens.is_empty() {
                break;
            }
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

    pub(super) fn embed<B: Backend>(&self, cx: &Cx<'_, B>, ids: &B::Buffer) -> Result<B::Buffer> {
        cx.at(None, Component::Embedding, Phase::F);
        let table = cx.master(self.embedding.expect("this stage has the embedding"));
        cx.backend.gather_rows(&GatherRows { out: cx.activation() }, table, ids)
    }

    fn head_weight<'a, B: Backend>(&self, cx: &Cx<'a, B>) -> &'a B::Buffer {
        cx.weights.head(self.head.expect("this stage has the head"))
    }

    fn losses<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        x: &B::Buffer,
        targets: &B::Buffer,
    ) -> Result<Losses<B>> {
        cx.at(None, Component::Head, Phase::F);
        let head = self.head_weight(cx);
        let [loss, lse] = cx.backend.cross_entropy(&CrossEntropy {}, x, head, targets)?;
        Ok(Losses { loss, lse })
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
        let cx = self.cx(backend, weights, &batch.main.rows, settings, None);
        let x = self.embed(&cx, &batch.main.ids)?;
        let mut all = Vec::new();
        let (x, layers) =
            self.layers_forward(&cx, x, |y| all.extend(outputs.then(|| y.clone())))?;
        let Tail { hidden, losses, norm, mtp } = self.tail_forward(&cx, batch, settings, &x)?;
        Ok(Forward { hidden, outputs: all, losses, layers, norm, mtp })
    }

    /// The forward of this stage's layers; `each` sees every output.
    pub(super) fn layers_forward<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        mut x: B::Buffer,
        mut each: impl FnMut(&B::Buffer),
    ) -> Result<(B::Buffer, Vec<LayerKept<B>>)> {
        let mut layers = Vec::new();
        for layer in &self.layers {
            let (y, kept) = layer.forward(cx, &x)?;
            x = y;
            each(&x);
            layers.push(kept);
        }
        Ok((x, layers))
    }

    /// Final norm, loss and MTP modules.
    pub(super) fn tail_forward<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        batch: &DeviceBatch<B>,
        settings: &StepSettings,
        x: &B::Buffer,
    ) -> Result<Tail<B>> {
        let backend = cx.backend;
        cx.at(None, Component::Head, Phase::F);
        let norm = self.norm.expect("this stage has the final norm");
        let (hidden, norm) = norm.fprop(cx, x)?;
        let losses = self.losses(cx, &hidden, &batch.main.targets)?;
        let mut mtp: Vec<(B::Buffer, Losses<B>, MtpKept<B>)> = Vec::new();
        for (module, stream) in self.mtp.iter().zip(&batch.mtp).take(settings.mtp_scales.len()) {
            let mut cx = self.cx(backend, cx.weights, &stream.rows, settings, cx.gradients);
            let lengths = &batch.main.rows.segments;
            cx.capacity = cx.capacity.map(|c| c.of_longer_than(module.depth, lengths));
            let embedding =
                module.join.as_ref().map(|_| self.embed(&cx, &stream.ids)).transpose()?;
            let before = match self.config.mtp_kind {
                MtpKind::Sequential => mtp.last().map_or(&hidden, |(hidden, ..)| hidden),
                MtpKind::Parallel => x,
            };
            cx.at(Some(module.layer.index), Component::Mtp, Phase::F);
            let previous = stream.previous.as_ref().expect("an MTP stream has one");
            let op = GatherRows { out: cx.activation() };
            let before = backend.gather_rows(&op, before, previous)?;
            let (out, kept) = module.forward(&cx, embedding.as_ref(), &before)?;
            let losses = self.losses(&cx, &out, &stream.targets)?;
            mtp.push((out, losses, kept));
        }
        Ok(Tail { hidden, losses, norm, mtp })
    }

    /// Gradient of the hidden state through the head, and of the head into accumulator `slot`.
    fn losses_backward<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        (x, losses): (&B::Buffer, &Losses<B>),
        targets: &B::Buffer,
        scale: f64,
        slot: usize,
    ) -> Result<B::Buffer> {
        cx.at(None, Component::Head, Phase::B);
        let segments = cx.rows.segments.clone();
        let op = CrossEntropyBackward { scale, out: cx.activation(), segments };
        let head = self.head_weight(cx);
        let mut dx = None;
        cx.accumulate(ParamId(slot), |acc| {
            let [d, dw] =
                cx.backend.cross_entropy_backward(&op, x, head, targets, &losses.lse, acc)?;
            dx = Some(d);
            Ok(dw)
        })?;
        Ok(dx.expect("the head has a gradient"))
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
        let Forward { hidden, losses, layers, norm, mtp, .. } = forward;
        let cx = self.cx(backend, weights, &batch.main.rows, settings, Some(&gradients));
        let tail = Tail { hidden, losses, norm, mtp };
        let dx = self.tail_backward(&cx, batch, settings, tail)?;
        let dx = self.layers_backward(&cx, layers, dx)?;
        let slot = self.embedding.expect("this stage has the embedding").0;
        self.embed_backward(&cx, &dx, &batch.main.ids, slot)?;
        Ok(gradients.into_inner())
    }

    /// Backward of MTP modules, loss and final norm: the gradient of the last layer's output.
    pub(super) fn tail_backward<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        batch: &DeviceBatch<B>,
        settings: &StepSettings,
        tail: Tail<B>,
    ) -> Result<B::Buffer> {
        let Tail { hidden, losses, norm: mut norm_kept, mtp } = tail;
        let backend = cx.backend;
        // The modules run last to first, as their chain ran first to last: what module d + 1 gives
        // for its input is a part of the gradient of module d's output. `states[d + 1]` is the
        // output of module d, `states[0]` that of the main model, since each head's backward
        // computes its logits again.
        let mut states = vec![hidden];
        states.extend(mtp.iter().map(|(out, ..)| out.clone()));
        let mut later: Option<B::Buffer> = None;
        let mut of_trunk: Vec<(usize, B::Buffer)> = Vec::new();
        for (d, (_, losses, mut kept)) in mtp.into_iter().enumerate().rev() {
            let (module, stream) = (&self.mtp[d], &batch.mtp[d]);
            let cx = self.cx(backend, cx.weights, &stream.rows, settings, cx.gradients);
            let slots = self.mtp_slots(d);
            let (scale, state) = (settings.mtp_scales[d], (&states[d + 1], &losses));
            // Two gradients meet in the module's output: that of its own loss and, row by row, that
            // of the module after it, whose rows are a subset of these.
            let mut dout = self.losses_backward(&cx, state, &stream.targets, scale, slots.head)?;
            if let Some(later) = later.take() {
                let previous = batch.mtp[d + 1].previous.as_ref().expect("an MTP stream has one");
                let op = ScatterAddRows { out: cx.activation() };
                dout = backend.scatter_add_rows(&op, &later, previous, dout)?;
            }
            let MtpGradients { embedding, hidden } = module.backward_input(&cx, &mut kept, dout)?;
            // W follows B at once: a tail has no other work to hide, and its operands are freed
            // early.
            module.backward_weight(&cx, kept)?;
            // Each use of the shared embedding and head has an accumulator of its own, so that it
            // is one chain over sequences however they are grouped into micro-batches.
            if let Some(embedding) = embedding {
                self.embed_backward(&cx, &embedding, &stream.ids, slots.embedding)?;
            }
            // A sequential module read the output of the one before it; a parallel head read the
            // last layer's output before the final norm, whose gradient is made below.
            match self.config.mtp_kind {
                MtpKind::Sequential => later = Some(hidden),
                MtpKind::Parallel => of_trunk.push((d, hidden)),
            }
        }
        let (state, slot) = ((&states[0], &losses), self.head_slot());
        let mut dx =
            self.losses_backward(cx, state, &batch.main.targets, settings.main_scale, slot)?;
        if let Some(later) = later {
            let previous = batch.mtp[0].previous.as_ref().expect("an MTP stream has one");
            let op = ScatterAddRows { out: cx.activation() };
            dx = backend.scatter_add_rows(&op, &later, previous, dx)?;
        }
        // Up to here `dx` is the gradient of the normalised hidden state, which the main head and
        // the first sequential module read; from here on that of the last layer's output.
        let norm = self.norm.expect("this stage has the final norm");
        dx = norm.dgrad(cx, &mut norm_kept, dx, None)?;
        norm.wgrad(cx, &norm_kept)?;
        for (d, of_head) in of_trunk {
            let previous = batch.mtp[d].previous.as_ref().expect("an MTP stream has one");
            let op = ScatterAddRows { out: cx.activation() };
            dx = backend.scatter_add_rows(&op, &of_head, previous, dx)?;
        }
        Ok(dx)
    }

    /// Backward of this stage's layers: the gradient of their input.
    pub(super) fn layers_backward<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        layers: Vec<LayerKept<B>>,
        mut dx: B::Buffer,
    ) -> Result<B::Buffer> {
        for (layer, mut kept) in self.layers.iter().zip(layers).rev() {
            dx = layer.backward_input(cx, &mut kept, dx)?;
            layer.backward_weight(cx, kept)?;
        }
        Ok(dx)
    }

    pub(super) fn embed_backward<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        dx: &B::Buffer,
        ids: &B::Buffer,
        slot: usize,
    ) -> Result<()> {
        cx.at(None, Component::Embedding, Phase::W);
        let op = ScatterAddRows { out: cx.recipe.master() };
        cx.accumulate(ParamId(slot), |acc| cx.backend.scatter_add_rows(&op, dx, ids, acc))
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
        let forward = self.forward(backend, weights, batch, settings, false)?;
        let report = self.report(backend, &forward)?;
        let before = std::mem::take(gradients);
        *gradients = self.backward(backend, weights, batch, settings, forward, before)?;
        Ok(report)
    }

    /// Reads the losses and loads of a forward back to the host.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn report<B: Backend>(&self, backend: &B, forward: &Forward<B>) -> Result<StepReport> {
        let sum = |losses: &Losses<B>| Result::<_>::Ok(host_sum(&backend.download(&losses.loss)?));
        let mtp_layers = self.mtp.iter().map(|m| m.layer.index);
        let indices = self.layers.iter().map(|l| l.index).chain(mtp_layers);
        let kept = forward.layers.iter().chain(forward.mtp.iter().map(|(_, _, kept)| &kept.layer));
        let load = |(index, kept): (usize, &LayerKept<B>)| {
            kept.mlp.moe.as_ref().map(|moe| (index, moe.plan.counts.clone()))
        };
        let mtp_kept = || forward.mtp.iter().map(|(_, _, kept)| &kept.layer);
        let (mut balance, mut dropped) = (0.0, 0);
        for kept in forward.layers.iter().chain(mtp_kept()) {
            if let Some(moe) = &kept.mlp.moe {
                for loss in &moe.balance.losses {
                    balance += host_sum(&backend.download(loss)?);
                }
                if let Some(of_devices) = &moe.dropped {
                    let of_devices = backend.download(of_devices)?;
                    dropped +=
                        of_devices.as_slice::<i32>().iter().map(|&n| n as usize).sum::<usize>();
                }
            }
        }
        Ok(StepReport {
            balance,
            dropped,
            main: sum(&forward.losses)?,
            mtp: forward.mtp.iter().map(|(_, losses, _)| sum(losses)).collect::<Result<_>>()?,
            loads: indices.zip(kept).filter_map(load).collect(),
        })
    }
}

/// Sum of a tensor's elements in F64, in order.
pub(crate) fn host_sum(tensor: &Tensor) -> f64 {
    match tensor.dtype() {
        DType::F64 => tensor.as_slice::<f64>().iter().sum(),
        _ => tensor.as_slice::<f32>().iter().map(|&x| f64::from(x)).sum(),
    }
}
