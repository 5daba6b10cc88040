//! A pipeline stage's share of micro-batches: forward, input-backward, weight-backward, for
//! micro-batches side by side. A model of one stage is the whole model.

use std::cell::RefCell;

use crate::backend::{Backend, Result};
use crate::layers::{Cx, Gradients, Weights};
use crate::model::Model;
use crate::model::layer::LayerKept;
use crate::model::mtp::MtpKept;
use crate::model::step::{DeviceBatch, StepSettings, host_sum};
use crate::model::tail::{Losses, Tail};

/// One of the micro-batches that run side by side.
#[derive(Debug)]
pub struct Lane<'a, B: Backend> {
    /// The micro-batch, on the backend.
    pub batch: &'a DeviceBatch<B>,
    /// What it knows of its step.
    pub settings: &'a StepSettings,
    /// The accumulators of its shard; none in a forward.
    pub gradients: Option<&'a RefCell<Gradients<B>>>,
}

impl<B: Backend> Clone for Lane<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Lane<'_, B> {}

/// What a stage keeps of micro-batches for their backward.
#[derive(Debug)]
pub struct StageKept<B: Backend> {
    /// Of each layer, what each micro-batch keeps.
    pub layers: Vec<Vec<LayerKept<B>>>,
    /// Of each micro-batch what the end of the model keeps; none on other stages.
    pub tails: Vec<Tail<B>>,
}

impl<B: Backend> StageKept<B> {
    /// What is left where the rest was taken.
    pub fn empty() -> StageKept<B> {
        StageKept { layers: Vec::new(), tails: Vec::new() }
    }
}

/// The backward of a pair.
pub struct PairedBackward<'a, B: Backend> {
    /// The model of the stage to which it belongs.
    pub model: &'a Model,
    /// The stage's weights.
    pub weights: &'a Weights<B>,
    /// The micro-batches, with accumulators.
    pub lanes: &'a [Lane<'a, B>],
    /// What their forward kept.
    pub kept: StageKept<B>,
    /// Gradients of the stage's output; none behind the last layer.
    pub dy: Option<Vec<B::Buffer>>,
}

/// Losses and loads of a micro-batch on one stage.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StageReport {
    /// Sum of the main losses over the rows; 0 on all stages but the last.
    pub main: f64,
    /// Sum of each MTP module's losses over its rows.
    pub mtp: Vec<f64>,
    /// The balance losses of the stage's layers, in order.
    pub balance: Vec<f64>,
    /// Choices of experts that were dropped for want of room.
    pub dropped: usize,
    /// Rows that each expert of a layer got of the micro-batch's tokens.
    pub loads: Vec<(usize, Vec<usize>)>,
}

impl Model {
    pub(super) fn cxs<'a, B: Backend>(
        &'a self,
        backend: &'a B,
        weights: &'a Weights<B>,
        lanes: &[Lane<'a, B>],
    ) -> Vec<Cx<'a, B>> {
        let cx = |lane: &Lane<'a, B>| {
            let Lane { batch, settings, gradients } = *lane;
            self.cx(backend, weights, &batch.main.rows, settings, gradients)
        };
        lanes.iter().map(cx).collect()
    }

    /// The forward of this stage. The first stage embeds, the others are given `input`, the hidden
    /// states \[t, hidden\] of each micro-batch; what comes out goes to the next stage, and is not
    /// used behind the last, whose losses are in what is kept.
    ///
    /// # Errors
    /// Those of the backend.
    ///
    /// # Panics
    /// Where `input` is missing.
    pub fn stage_forward<B: Backend>(
        &self,
        backend: &B,
        weights: &Weights<B>,
        lanes: &[Lane<'_, B>],
        input: Option<Vec<B::Buffer>>,
    ) -> Result<(Vec<B::Buffer>, StageKept<B>)> {
        self.stage_forward_with(backend, weights, lanes, input, |_| ())
    }

    /// As [`Model::stage_forward`]; `each` sees every layer's outputs.
    pub(super) fn stage_forward_with<B: Backend>(
        &self,
        backend: &B,
        weights: &Weights<B>,
        lanes: &[Lane<'_, B>],
        input: Option<Vec<B::Buffer>>,
        mut each: impl FnMut(&[B::Buffer]),
    ) -> Result<(Vec<B::Buffer>, StageKept<B>)> {
        let cxs = self.cxs(backend, weights, lanes);
        let mut xs = match self.at.pp {
            0 => self.embed_all(&cxs, lanes)?,
            _ => input.expect("a later stage receives its input"),
        };
        let mut layers = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let (ys, kept) = layer.forward(&cxs, xs)?;
            xs = ys;
            each(&xs);
            layers.push(kept);
        }
        let tails = match self.norm {
            Some(_) => self.tail_forward(&cxs, lanes, &xs)?,
            None => Vec::new(),
        };
        Ok((xs, StageKept { layers, tails }))
    }

    pub(super) fn embed_all<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        lanes: &[Lane<'_, B>],
    ) -> Result<Vec<B::Buffer>> {
        cxs.iter().zip(lanes).map(|(cx, lane)| self.embed(cx, &lane.batch.main.ids)).collect()
    }

    /// The gradients of this stage's output: of the losses behind the last layer, else `dy`, what
    /// the next stage gives back.
    pub(super) fn output_gradients<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        lanes: &[Lane<'_, B>],
        kept: &mut StageKept<B>,
        dy: Option<Vec<B::Buffer>>,
    ) -> Result<Vec<B::Buffer>> {
        match self.norm {
            Some(_) => self.tail_backward(cxs, lanes, std::mem::take(&mut kept.tails)),
            None => Ok(dy.expect("an earlier stage receives its output's gradient")),
        }
    }

    /// On the first stage the embedding's gradient; on the others nothing is left to do.
    pub(super) fn input_gradients<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        lanes: &[Lane<'_, B>],
        dxs: &[B::Buffer],
    ) -> Result<()> {
        if self.at.pp > 0 {
            return Ok(());
        }
        let slot = self.embedding.expect("the first stage has the embedding").0;
        for ((cx, lane), dx) in cxs.iter().zip(lanes).zip(dxs) {
            self.embed_backward(cx, dx, &lane.batch.main.ids, slot)?;
        }
        Ok(())
    }

    /// Input- and weight-backward of this stage, layer by layer: the gradients of its input. All
    /// but the last stage are given those of their output.
    ///
    /// # Errors
    /// Those of the backend.
    ///
    /// # Panics
    /// Where `dy` is missing, or a lane has no accumulators.
    pub fn stage_backward<B: Backend>(
        &self,
        backend: &B,
        weights: &Weights<B>,
        lanes: &[Lane<'_, B>],
        mut kept: StageKept<B>,
        dy: Option<Vec<B::Buffer>>,
    ) -> Result<Vec<B::Buffer>> {
        let cxs = self.cxs(backend, weights, lanes);
        let mut dxs = self.output_gradients(&cxs, lanes, &mut kept, dy)?;
        for (layer, mut kept) in self.layers.iter().zip(kept.layers).rev() {
            dxs = layer.backward_input(&cxs, &mut kept, dxs)?;
            layer.backward_weight(&cxs, kept)?;
        }
        self.input_gradients(&cxs, lanes, &dxs)?;
        Ok(dxs)
    }

    /// Input-backward of this stage alone: its layers' weight gradients are left to
    /// [`Model::stage_backward_weight`]. Those of embedding, head and MTP modules are made here.
    ///
    /// # Errors
    /// As [`Model::stage_backward`].
    ///
    /// # Panics
    /// As [`Model::stage_backward`].
    pub fn stage_backward_input<B: Backend>(
        &self,
        backend: &B,
        weights: &Weights<B>,
        lanes: &[Lane<'_, B>],
        kept: &mut StageKept<B>,
        dy: Option<Vec<B::Buffer>>,
    ) -> Result<Vec<B::Buffer>> {
        let cxs = self.cxs(backend, weights, lanes);
        let mut dxs = self.output_gradients(&cxs, lanes, kept, dy)?;
        for (layer, kept) in self.layers.iter().zip(&mut kept.layers).rev() {
            dxs = layer.backward_input(&cxs, kept, dxs)?;
        }
        self.input_gradients(&cxs, lanes, &dxs)?;
        Ok(dxs)
    }

    /// Weight-backward of this stage's layers; input-backward comes first.
    ///
    /// # Errors
    /// Those of the backend.
    ///
    /// # Panics
    /// Before the input-backward.
    pub fn stage_backward_weight<B: Backend>(
        &self,
        backend: &B,
        weights: &Weights<B>,
        lanes: &[Lane<'_, B>],
        kept: StageKept<B>,
    ) -> Result<()> {
        let cxs = self.cxs(backend, weights, lanes);
        for (layer, kept) in self.layers.iter().zip(kept.layers).rev() {
            layer.backward_weight(&cxs, kept)?;
        }
        Ok(())
    }

    /// A forward and a full backward of other micro-batches, on this stage or (`of_backward`) on
    /// another of the rank, interleaved layer by layer in the four parts that DualPipe overlaps:
    /// the forward's output and what it keeps, and the gradients of the backward's input. The order
    /// is that in which the simulator plays a pair.
    ///
    /// # Errors
    /// As [`Model::stage_backward`].
    ///
    /// # Panics
    /// As [`Model::stage_forward`] and [`Model::stage_backward`].
    #[allow(clippy::type_complexity)]
    pub fn stage_pair<B: Backend>(
        &self,
        backend: &B,
        (weights, lanes, input): (&Weights<B>, &[Lane<'_, B>], Option<Vec<B::Buffer>>),
        of_backward: PairedBackward<'_, B>,
    ) -> Result<((Vec<B::Buffer>, StageKept<B>), Vec<B::Buffer>)> {
        let PairedBackward { model: other, weights: other_weights, lanes: back, mut kept, dy } =
            of_backward;
        let cxs = self.cxs(backend, weights, lanes);
        let cxs_b = other.cxs(backend, other_weights, back);
        let mut dxs = other.output_gradients(&cxs_b, back, &mut kept, dy)?;
        let mut xs = match self.at.pp {
            0 => self.embed_all(&cxs, lanes)?,
            _ => input.expect("a later stage receives its input"),
        };
        let mut layers = Vec::with_capacity(self.layers.len());
        let mut forwards = self.layers.iter();
        let mut backwards = other.layers.iter().zip(kept.layers).rev();
        loop {
            match (forwards.next(), backwards.next()) {
                (Some(f), Some((b, kept))) => {
                    let (mut attention_b, mut mlp_b) = LayerKept::split(kept);
                    let rows = b.combines_b(&cxs_b, &mlp_b, &dxs)?;
                    let (hs, attention) = f.attentions_f(&cxs, xs)?;
                    let gradients = b.mlp_b(&cxs_b, &mut mlp_b, &dxs, rows)?;
                    let (dispatched, mut mlp) = f.dispatches_f(&cxs, hs)?;
                    let dhs = b.dispatches_b(&cxs_b, &mut mlp_b, dxs, gradients)?;
                    b.mlps_w(&cxs_b, mlp_b)?;
                    let outputs = f.mlp_f(&cxs, &dispatched, &mut mlp)?;
                    dxs = b.attentions_b(&cxs_b, &mut attention_b, dhs)?;
                    b.attentions_w(&cxs_b, attention_b)?;
                    xs = f.combines_f(&cxs, outputs, &mlp)?;
                    layers.push(LayerKept::join(attention, mlp));
                }
                (Some(f), None) => {
                    let (ys, kept) = f.forward(&cxs, xs)?;
                    xs = ys;
                    layers.push(kept);
                }
                (None, Some((b, mut kept))) => {
                    dxs = b.backward_input(&cxs_b, &mut kept, dxs)?;
                    b.backward_weight(&cxs_b, kept)?;
                }
                (None, None) => break,
            }
        }
        other.input_gradients(&cxs_b, back, &dxs)?;
        let tails = match self.norm {
            Some(_) => self.tail_forward(&cxs, lanes, &xs)?,
            None => Vec::new(),
        };
        Ok(((xs, StageKept { layers, tails }), dxs))
    }

    /// Reads losses and loads of each micro-batch back to the host.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn stage_reports<B: Backend>(
        &self,
        backend: &B,
        kept: &StageKept<B>,
    ) -> Result<Vec<StageReport>> {
        let lanes = kept.tails.len().max(kept.layers.first().map_or(0, Vec::len));
        let report = |i: usize| {
            let layers = kept.layers.iter().map(|lanes| &lanes[i]);
            let tail = kept.tails.get(i).map(|tail| (&tail.losses, &tail.mtp[..]));
            self.stage_report(backend, layers, tail)
        };
        (0..lanes).map(report).collect()
    }

    #[allow(clippy::type_complexity)]
    pub(super) fn stage_report<'k, B: Backend + 'k>(
        &self,
        backend: &B,
        layers: impl Iterator<Item = &'k LayerKept<B>>,
        tail: Option<(&Losses<B>, &'k [(B::Buffer, Losses<B>, MtpKept<B>)])>,
    ) -> Result<StageReport> {
        let mut report = StageReport::default();
        let sum = |x: &B::Buffer| Result::<_>::Ok(host_sum(&backend.download(x)?));
        let mut modules: &[_] = &[];
        if let Some((losses, mtp)) = tail {
            report.main = sum(&losses.loss)?;
            report.mtp = mtp.iter().map(|(_, l, _)| sum(&l.loss)).collect::<Result<_>>()?;
            modules = mtp;
        }
        let mtp_layers = self.mtp.iter().map(|m| m.layer.index);
        let indices = self.layers.iter().map(|l| l.index).chain(mtp_layers);
        for (index, kept) in indices.zip(layers.chain(modules.iter().map(|(.., k)| &k.layer))) {
            let Some(moe) = &kept.mlp.moe else { continue };
            report.loads.push((index, moe.plan.chosen.clone()));
            for loss in &moe.balance.losses {
                report.balance.push(sum(loss)?);
            }
            if let Some(of_devices) = &moe.dropped {
                let of_devices = backend.download(of_devices)?;
                let counts = of_devices.as_slice::<i32>().iter();
                report.dropped += counts.map(|&n| n as usize).sum::<usize>();
            }
        }
        Ok(report)
    }
}
