//! What stands around the layers: embedding, final norm, head with its loss, and MTP modules.

use fathom_trace::{Component, Phase};

use crate::backend::{Backend, Result};
use crate::layers::Cx;
use crate::layers::Weights;
use crate::layers::linear::NormKept;
use crate::model::Model;
use crate::model::mtp::{MtpGradients, MtpKept};
use crate::model::params::ParamId;
use crate::model::stage::Lane;
use crate::ops::cross_entropy::{CrossEntropy, CrossEntropyBackward};
use crate::ops::gather_rows::GatherRows;
use crate::ops::scatter_add_rows::ScatterAddRows;
use fathom_config::MtpKind;

/// The loss of each row, and what its backward needs.
#[derive(Debug)]
pub struct Losses<B: Backend> {
    /// Cross-entropy of each row \[t\] in nats, 0 where it has no target.
    pub loss: B::Buffer,
    pub(super) lse: B::Buffer,
}

/// What the forward behind the last layer keeps of a micro-batch.
#[derive(Debug)]
pub struct Tail<B: Backend> {
    pub(super) hidden: B::Buffer,
    pub(super) losses: Losses<B>,
    pub(super) norm: NormKept<B>,
    pub(super) mtp: Vec<(B::Buffer, Losses<B>, MtpKept<B>)>,
}

impl Model {
    pub(super) fn embed<B: Backend>(&self, cx: &Cx<'_, B>, ids: &B::Buffer) -> Result<B::Buffer> {
        cx.at(None, Component::Embedding, Phase::F);
        let table = cx.master(self.embedding.expect("this stage has the embedding"));
        cx.backend.gather_rows(&GatherRows { out: cx.activation() }, table, ids)
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

    /// How many MTP modules a micro-batch runs: those that `settings` has a scale for and that have
    /// rows.
    fn modules<B: Backend>(lane: &Lane<'_, B>) -> usize {
        lane.batch.mtp.len().min(lane.settings.mtp_scales.len())
    }

    /// The lanes that run MTP module `d` (from 0), and the module's context of each.
    fn module_cxs<'a, B: Backend>(
        &'a self,
        backend: &'a B,
        weights: &'a Weights<B>,
        lanes: &[Lane<'a, B>],
        d: usize,
    ) -> (Vec<usize>, Vec<Cx<'a, B>>) {
        let runs = |i: &usize| Model::modules(&lanes[*i]) > d;
        let own: Vec<usize> = (0..lanes.len()).filter(runs).collect();
        let cx = |&i: &usize| {
            let Lane { batch, settings, gradients } = lanes[i];
            let mut cx = self.cx(backend, weights, &batch.mtp[d].rows, settings, gradients);
            let (lengths, depth) = (&batch.main.rows.segments, self.mtp[d].depth);
            cx.capacity = cx.capacity.map(|c| c.of_longer_than(depth, lengths));
            cx
        };
        let cxs = own.iter().map(cx).collect();
        (own, cxs)
    }

    /// Final norm, loss and MTP modules of micro-batches side by side, given the last layer's
    /// outputs.
    pub(super) fn tail_forward<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        lanes: &[Lane<'_, B>],
        xs: &[B::Buffer],
    ) -> Result<Vec<Tail<B>>> {
        let (backend, weights) = (cxs[0].backend, cxs[0].weights);
        let norm = self.norm.expect("this stage has the final norm");
        let mut tails = Vec::with_capacity(lanes.len());
        for ((cx, lane), x) in cxs.iter().zip(lanes).zip(xs) {
            cx.at(None, Component::Head, Phase::F);
            let (hidden, norm) = norm.fprop(cx, x)?;
            let losses = self.losses(cx, &hidden, &lane.batch.main.targets)?;
            tails.push(Tail { hidden, losses, norm, mtp: Vec::new() });
        }
        for (d, module) in self.mtp.iter().enumerate() {
            let (own, cxs) = self.module_cxs(backend, weights, lanes, d);
            if own.is_empty() {
                break;
            }
            let mut inputs = Vec::with_capacity(own.len());
            for (cx, &i) in cxs.iter().zip(&own) {
                let (stream, tail) = (&lanes[i].batch.mtp[d], &tails[i]);
                let embedding =
                    module.join.as_ref().map(|_| self.embed(cx, &stream.ids)).transpose()?;
                let before = match self.config.mtp_kind {
                    MtpKind::Sequential => tail.mtp.last().map_or(&tail.hidden, |m| &m.0),
                    MtpKind::Parallel => &xs[i],
                };
                cx.at(Some(module.layer.index), Component::Mtp, Phase::F);
                let previous = stream.previous.as_ref().expect("an MTP stream has one");
                let op = GatherRows { out: cx.activation() };
                inputs.push((embedding, backend.gather_rows(&op, before, previous)?));
            }
            let outputs = module.forward(&cxs, inputs)?;
            for ((cx, &i), (out, kept)) in cxs.iter().zip(&own).zip(outputs) {
                let losses = self.losses(cx, &out, &lanes[i].batch.mtp[d].targets)?;
                tails[i].mtp.push((out, losses, kept));
            }
        }
        Ok(tails)
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

    /// Backward of MTP modules, loss and final norm: the gradient of the last layer's output, of
    /// micro-batches side by side.
    pub(super) fn tail_backward<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        lanes: &[Lane<'_, B>],
        tails: Vec<Tail<B>>,
    ) -> Result<Vec<B::Buffer>> {
        let mut flows: Vec<TailFlow<B>> = tails.into_iter().map(TailFlow::of).collect();
        for d in (0..self.mtp.len()).rev() {
            self.module_backward((cxs[0].backend, cxs[0].weights), lanes, d, &mut flows)?;
        }
        let mut dxs = Vec::with_capacity(flows.len());
        for ((cx, lane), flow) in cxs.iter().zip(lanes).zip(flows) {
            dxs.push(self.main_backward(cx, lane, flow)?);
        }
        Ok(dxs)
    }

    /// Backward of MTP module `d` on the lanes that ran it.
    fn module_backward<B: Backend>(
        &self,
        (backend, weights): (&B, &Weights<B>),
        lanes: &[Lane<'_, B>],
        d: usize,
        flows: &mut [TailFlow<B>],
    ) -> Result<()> {
        let (own, cxs) = self.module_cxs(backend, weights, lanes, d);
        if own.is_empty() {
            return Ok(());
        }
        let (module, slots) = (&self.mtp[d], self.mtp_slots(d));
        let (mut kepts, mut douts) = (Vec::new(), Vec::new());
        for (cx, &i) in cxs.iter().zip(&own) {
            let (batch, flow) = (lanes[i].batch, &mut flows[i]);
            let (losses, kept) = flow.modules.pop().expect("it ran forward");
            let (scale, state) = (lanes[i].settings.mtp_scales[d], (&flow.states[d + 1], &losses));
            // Two gradients meet in the module's output: that of its own loss and, row by row, that
            // of the module after it, whose rows are a subset of these.
            let targets = &batch.mtp[d].targets;
            let mut dout = self.losses_backward(cx, state, targets, scale, slots.head)?;
            if let Some(later) = flow.later.take() {
                let previous = batch.mtp[d + 1].previous.as_ref().expect("an MTP stream has one");
                let op = ScatterAddRows { out: cx.activation() };
                dout = backend.scatter_add_rows(&op, &later, previous, dout)?;
            }
            kepts.push(kept);
            douts.push(dout);
        }
        let gradients = module.backward(&cxs, kepts, douts)?;
        for ((cx, &i), MtpGradients { embedding, hidden }) in cxs.iter().zip(&own).zip(gradients) {
            // Each use of the shared embedding and head has an accumulator of its own, so that it
            // is one chain over sequences however they are grouped into micro-batches.
            if let Some(embedding) = embedding {
                let ids = &lanes[i].batch.mtp[d].ids;
                self.embed_backward(cx, &embedding, ids, slots.embedding)?;
            }
            // A sequential module read the output of the one before it; a parallel head read the
            // last layer's output before the final norm, whose gradient is made later.
            match self.config.mtp_kind {
                MtpKind::Sequential => flows[i].later = Some(hidden),
                MtpKind::Parallel => flows[i].of_trunk.push((d, hidden)),
            }
        }
        Ok(())
    }

    /// Backward of the main loss and the final norm.
    fn main_backward<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        lane: &Lane<'_, B>,
        mut flow: TailFlow<B>,
    ) -> Result<B::Buffer> {
        let (backend, batch) = (cx.backend, lane.batch);
        let (state, slot) = ((&flow.states[0], &flow.losses), self.head_slot());
        let scale = lane.settings.main_scale;
        let mut dx = self.losses_backward(cx, state, &batch.main.targets, scale, slot)?;
        if let Some(later) = flow.later {
            let previous = batch.mtp[0].previous.as_ref().expect("an MTP stream has one");
            let op = ScatterAddRows { out: cx.activation() };
            dx = backend.scatter_add_rows(&op, &later, previous, dx)?;
        }
        // Up to here `dx` is the gradient of the normalised hidden state, which the main head and
        // the first sequential module read; from here on that of the last layer's output.
        let norm = self.norm.expect("this stage has the final norm");
        dx = norm.dgrad(cx, &mut flow.norm, dx, None)?;
        norm.wgrad(cx, &flow.norm)?;
        for (d, of_head) in flow.of_trunk {
            let previous = batch.mtp[d].previous.as_ref().expect("an MTP stream has one");
            let op = ScatterAddRows { out: cx.activation() };
            dx = backend.scatter_add_rows(&op, &of_head, previous, dx)?;
        }
        Ok(dx)
    }
}

/// A tail on its way back. The modules run last to first, as their chain ran first to last: what
/// module d + 1 gives for its input is a part of the gradient of module d's output.
struct TailFlow<B: Backend> {
    /// `states[d + 1]` is the output of module d, `states[0]` that of the main model, since each
    /// head's backward computes its logits again.
    states: Vec<B::Buffer>,
    losses: Losses<B>,
    norm: NormKept<B>,
    /// Losses of the modules and what they keep, those still to come.
    modules: Vec<(Losses<B>, MtpKept<B>)>,
    /// Gradient that the module behind gives for its input.
    later: Option<B::Buffer>,
    /// Gradients that parallel heads give for the last layer's output.
    of_trunk: Vec<(usize, B::Buffer)>,
}

impl<B: Backend> TailFlow<B> {
    fn of(tail: Tail<B>) -> TailFlow<B> {
        let Tail { hidden, losses, norm, mtp } = tail;
        let mut states = vec![hidden];
        let mut modules = Vec::with_capacity(mtp.len());
        for (out, losses, kept) in mtp {
            states.push(out);
            modules.push((losses, kept));
        }
        TailFlow { states, losses, norm, modules, later: None, of_trunk: Vec::new() }
    }
}
