//! A multi-token-prediction module: predicts one token further than the module before it.
//!
//! Row i of module d joins `enorm(embedding of token i + d)` and `hnorm(hidden state of row i)` -
//! in this order, as released checkpoints lay `eh_proj` out; equation 21 of the report writes it
//! the other way round -, projects to the residual's width, runs one layer at RoPE positions i + d
//! and a norm; the shared head then predicts token i + d + 1. The hidden state is that after the
//! norm of the main model (or of the module before): the causal chain is kept. Source: arXiv
//! 2412.19437, section 2.2.

use fathom_trace::{Component, Phase};

use crate::backend::{Backend, Result};
use crate::layers::linear::NormKept;
use crate::layers::operand::Operand;
use crate::layers::{Cx, Linear, Norm};
use crate::model::layer::{Layer, LayerKept};
use crate::ops::elementwise::{ConcatColumns, SliceColumns};

/// One MTP module.
#[derive(Clone, Debug)]
pub struct MtpModule {
    /// Which one, counted from 1: it predicts token i + depth + 1.
    pub depth: usize,
    /// Norm of the token's embedding.
    pub enorm: Norm,
    /// Norm of the hidden state.
    pub hnorm: Norm,
    /// From both to the residual's width.
    pub eh_proj: Linear,
    /// The decoder layer.
    pub layer: Layer,
    /// Norm before the shared head.
    pub norm: Norm,
}

/// What its backward needs.
#[derive(Debug)]
pub struct MtpKept<B: Backend> {
    enorm: NormKept<B>,
    hnorm: NormKept<B>,
    joined: Operand<B>,
    /// The layer's.
    pub layer: LayerKept<B>,
    norm: NormKept<B>,
    dx: Option<B::Buffer>,
}

impl MtpModule {
    fn at<B: Backend>(&self, cx: &Cx<'_, B>, phase: Phase) {
        cx.at(Some(self.layer.index), Component::Mtp, phase);
    }

    /// The module's hidden state after its norm.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn forward<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        embedding: &B::Buffer,
        hidden: &B::Buffer,
    ) -> Result<(B::Buffer, MtpKept<B>)> {
        self.at(cx, Phase::F);
        let (e, enorm) = self.enorm.fprop(cx, embedding)?;
        let (h, hnorm) = self.hnorm.fprop(cx, hidden)?;
        let joined = cx.backend.concat_columns(&ConcatColumns {}, &e, &h, None)?;
        let joined = cx.operand(&joined)?;
        let x = self.eh_proj.fprop(cx, &joined)?;
        let (y, layer) = self.layer.forward(cx, &x)?;
        self.at(cx, Phase::F);
        let (out, norm) = self.norm.fprop(cx, &y)?;
        Ok((out, MtpKept { enorm, hnorm, joined, layer, norm, dx: None }))
    }

    /// The gradients of the embedding and of the hidden state.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn backward_input<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        kept: &mut MtpKept<B>,
        dout: B::Buffer,
    ) -> Result<[B::Buffer; 2]> {
        self.at(cx, Phase::B);
        let dy = self.norm.dgrad(cx, &mut kept.norm, dout, None)?;
        let dx = self.layer.backward_input(cx, &mut kept.layer, dy)?;
        self.at(cx, Phase::B);
        let djoined = self.eh_proj.dgrad(cx, &dx)?;
        kept.dx = Some(dx);
        let width = self.enorm.width;
        let half = |offset| cx.backend.slice_columns(&SliceColumns { offset, width }, &djoined);
        let de = self.enorm.dgrad(cx, &mut kept.enorm, half(0)?, None)?;
        let dh = self.hnorm.dgrad(cx, &mut kept.hnorm, half(width)?, None)?;
        Ok([de, dh])
    }

    /// Adds to the weights' gradients.
    ///
    /// # Errors
    /// Those of the backend.
    ///
    /// # Panics
    /// Before the input-backward.
    pub fn backward_weight<B: Backend>(&self, cx: &Cx<'_, B>, kept: MtpKept<B>) -> Result<()> {
        self.at(cx, Phase::W);
        let dx = kept.dx.expect("input-backward comes first");
        self.norm.wgrad(cx, &kept.norm)?;
        self.eh_proj.wgrad(cx, &kept.joined, &dx)?;
        self.enorm.wgrad(cx, &kept.enorm)?;
        self.hnorm.wgrad(cx, &kept.hnorm)?;
        self.layer.backward_weight(cx, kept.layer)
    }
}
