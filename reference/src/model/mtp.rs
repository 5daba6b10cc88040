//! A multi-token-prediction (MTP) module: predicts tokens further ahead than the next.
//!
//! Sequential modules (DeepSeek-V3). Row i of module d joins `enorm(embedding of token i + d)` and
//! `hnorm(hidden state of row i)` - in this order, as released checkpoints lay `eh_proj` out;
//! equation 21 of the report writes it the other way round -, projects to the residual's width,
//! runs one layer at RoPE positions i + d and a norm; the shared head then predicts token
//! i + d + 1. The hidden state is that after the norm of the main model (or of the module before):
//! the causal chain is kept. Source: arXiv 2412.19437, section 2.2.
//!
//! Parallel heads (the baseline). Row i of head d is the last layer's output of row i: one layer at
//! position i and a norm, then the shared head predicts token i + d + 1. Heads neither see each
//! other nor further tokens. Source: arXiv 2404.19737, section 2.

use fathom_trace::{Component, Phase};

use crate::backend::{Backend, Result};
use crate::layers::linear::NormKept;
use crate::layers::operand::Operand;
use crate::layers::{Cx, Linear, Norm};
use crate::model::layer::{Layer, LayerKept};
use crate::ops::concat_columns::ConcatColumns;
use crate::ops::slice_columns::SliceColumns;

/// One MTP module: an optional join, a decoder layer and a norm before the shared head.
#[derive(Clone, Debug)]
pub struct MtpModule {
    /// Which one, counted from 1: it predicts token i + depth + 1.
    pub depth: usize,
    /// What joins token and hidden state; none of a parallel head.
    pub join: Option<Join>,
    /// The module's own decoder layer.
    pub layer: Layer,
    /// Norm before the shared head.
    pub norm: Norm,
}

/// Joins a token's embedding and a hidden state: norms of both, side by side, projected to the
/// residual's width.
#[derive(Clone, Debug)]
pub struct Join {
    /// Norm of the token's embedding.
    pub enorm: Norm,
    /// Norm of the hidden state.
    pub hnorm: Norm,
    /// Projection of both together: weight \[hidden, 2 hidden\].
    pub eh_proj: Linear,
}

/// What an MTP module's backward needs of its forward.
#[derive(Debug)]
pub struct MtpKept<B: Backend> {
    join: Option<JoinKept<B>>,
    /// What the decoder layer keeps.
    pub layer: LayerKept<B>,
    norm: NormKept<B>,
}

#[derive(Debug)]
struct JoinKept<B: Backend> {
    enorm: NormKept<B>,
    hnorm: NormKept<B>,
    joined: Operand<B>,
    dx: Option<B::Buffer>,
}

/// Gradients that a module gives back.
pub(super) struct MtpGradients<B: Backend> {
    /// Of the token's embedding; none of a parallel head.
    pub embedding: Option<B::Buffer>,
    /// Of the hidden state.
    pub hidden: B::Buffer,
}

impl Join {
    fn forward<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        embedding: &B::Buffer,
        hidden: &B::Buffer,
    ) -> Result<(B::Buffer, JoinKept<B>)> {
        let (e, enorm) = self.enorm.fprop(cx, embedding)?;
        let (h, hnorm) = self.hnorm.fprop(cx, hidden)?;
        let joined = cx.backend.concat_columns(&ConcatColumns {}, &e, &h, None)?;
        let joined = cx.operand(&joined, self.eh_proj.weight)?;
        let x = self.eh_proj.fprop(cx, &joined)?;
        Ok((x, JoinKept { enorm, hnorm, joined, dx: None }))
    }

    fn backward_input<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        kept: &mut JoinKept<B>,
        dx: B::Buffer,
    ) -> Result<MtpGradients<B>> {
        let djoined = self.eh_proj.dgrad(cx, &dx)?;
        kept.dx = Some(dx);
        let width = self.enorm.width;
        let half = |offset| cx.backend.slice_columns(&SliceColumns { offset, width }, &djoined);
        let embedding = self.enorm.dgrad(cx, &mut kept.enorm, half(0)?, None)?;
        let hidden = self.hnorm.dgrad(cx, &mut kept.hnorm, half(width)?, None)?;
        Ok(MtpGradients { embedding: Some(embedding), hidden })
    }

    fn backward_weight<B: Backend>(&self, cx: &Cx<'_, B>, kept: JoinKept<B>) -> Result<()> {
        let dx = kept.dx.expect("input-backward comes first");
        self.eh_proj.wgrad(cx, &kept.joined, &dx)?;
        self.enorm.wgrad(cx, &kept.enorm)?;
        self.hnorm.wgrad(cx, &kept.hnorm)
    }
}

impl MtpModule {
    fn at<B: Backend>(&self, cx: &Cx<'_, B>, phase: Phase) {
        cx.at(Some(self.layer.index), Component::Mtp, phase);
    }

    /// The module's hidden states after its norm, and what the backward needs, for micro-batches
    /// side by side; a sequential module needs the embeddings.
    pub(super) fn forward<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        inputs: Vec<(Option<B::Buffer>, B::Buffer)>,
    ) -> Result<Vec<(B::Buffer, MtpKept<B>)>> {
        let (mut xs, mut joins) = (Vec::new(), Vec::new());
        for (cx, (embedding, hidden)) in cxs.iter().zip(inputs) {
            self.at(cx, Phase::F);
            let (x, join) = match &self.join {
                Some(join) => {
                    let embedding = embedding.expect("a sequential module sees the next token");
                    let (x, kept) = join.forward(cx, &embedding, &hidden)?;
                    (x, Some(kept))
                }
                None => (hidden, None),
            };
            xs.push(x);
            joins.push(join);
        }
        let (ys, layers) = self.layer.forward(cxs, xs)?;
        let mut outputs = Vec::with_capacity(cxs.len());
        for (((cx, y), join), layer) in cxs.iter().zip(ys).zip(joins).zip(layers) {
            self.at(cx, Phase::F);
            let (out, norm) = self.norm.fprop(cx, &y)?;
            outputs.push((out, MtpKept { join, layer, norm }));
        }
        Ok(outputs)
    }

    /// The gradients of embedding and hidden state; adds to the weights' gradients.
    pub(super) fn backward<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        kept: Vec<MtpKept<B>>,
        douts: Vec<B::Buffer>,
    ) -> Result<Vec<MtpGradients<B>>> {
        let (mut layers, mut norms, mut joins) = (Vec::new(), Vec::new(), Vec::new());
        let mut dys = Vec::with_capacity(cxs.len());
        for ((cx, MtpKept { join, layer, mut norm }), dout) in cxs.iter().zip(kept).zip(douts) {
            self.at(cx, Phase::B);
            dys.push(self.norm.dgrad(cx, &mut norm, dout, None)?);
            layers.push(layer);
            norms.push(norm);
            joins.push(join);
        }
        let dxs = self.layer.backward_input(cxs, &mut layers, dys)?;
        let mut gradients = Vec::with_capacity(cxs.len());
        for ((cx, join), dx) in cxs.iter().zip(&mut joins).zip(dxs) {
            self.at(cx, Phase::B);
            gradients.push(match (&self.join, join) {
                (Some(join), Some(kept)) => join.backward_input(cx, kept, dx)?,
                _ => MtpGradients { embedding: None, hidden: dx },
            });
        }
        // W follows B at once: a tail has no other work to hide, and its operands are freed early.
        for ((cx, norm), join) in cxs.iter().zip(norms).zip(joins) {
            self.at(cx, Phase::W);
            self.norm.wgrad(cx, &norm)?;
            if let (Some(join), Some(kept)) = (&self.join, join) {
                join.backward_weight(cx, kept)?;
            }
        }
        self.layer.backward_weight(cxs, layers)?;
        Ok(gradients)
    }
}
