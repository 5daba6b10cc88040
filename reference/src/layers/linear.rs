//! Linear and RMSNorm: a parameter and the three ops over it (fprop, dgrad, wgrad).

use crate::backend::{Backend, Result};
use crate::layers::Cx;
use crate::model::params::ParamId;
use crate::ops::gemm::{Gemm, Layout};
use crate::ops::grouped_gemm::GroupedGemm;
use crate::ops::rms_norm::{RmsNorm, RmsNormBackward, RmsNormWgrad};

/// `y = x w^T` with `w` \[n, k\].
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// The weight.
    pub weight: ParamId,
}

/// An activation in the form in which GEMMs read it, and in which it is kept for wgrad.
#[derive(Debug)]
pub enum Operand<B: Backend> {
    /// As it is.
    Plain(B::Buffer),
}

impl<B: Backend> Clone for Operand<B> {
    fn clone(&self) -> Self {
        let Operand::Plain(x) = self;
        Operand::Plain(x.clone())
    }
}

impl<B: Backend> Cx<'_, B> {
    /// Prepares an activation or gradient as a GEMM operand.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn operand(&self, x: &B::Buffer) -> Result<Operand<B>> {
        Ok(Operand::Plain(x.clone()))
    }
}

impl Linear {
    /// `x w^T`.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn fprop<B: Backend>(&self, cx: &Cx<'_, B>, x: &Operand<B>) -> Result<B::Buffer> {
        let Operand::Plain(x) = x;
        let op = Gemm { layout: Layout::Nt, out: cx.activation(), segments: Vec::new() };
        cx.backend.gemm(&op, x, cx.master(self.weight), None)
    }

    /// `dy w`.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn dgrad<B: Backend>(&self, cx: &Cx<'_, B>, dy: &B::Buffer) -> Result<B::Buffer> {
        let op = Gemm { layout: Layout::Nn, out: cx.activation(), segments: Vec::new() };
        cx.backend.gemm(&op, dy, cx.master(self.weight), None)
    }

    /// Adds `dy^T x` to the weight's gradient.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn wgrad<B: Backend>(&self, cx: &Cx<'_, B>, x: &Operand<B>, dy: &B::Buffer) -> Result<()> {
        let Operand::Plain(x) = x;
        let op = Gemm { layout: Layout::Tn, out: cx.recipe.master(), segments: Vec::new() };
        cx.accumulate(self.weight, |acc| cx.backend.gemm(&op, dy, x, Some(acc)))
    }
}

/// One Linear an expert: `w` \[experts, n, k\]; rows in order of expert.
#[derive(Clone, Copy, Debug)]
pub struct GroupedLinear {
    /// The stacked weights.
    pub weight: ParamId,
}

impl GroupedLinear {
    /// `x w_e^T` for expert e's rows.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn fprop<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        x: &Operand<B>,
        counts: &[usize],
    ) -> Result<B::Buffer> {
        let Operand::Plain(x) = x;
        let op = self.op(Layout::Nt, cx.activation(), counts);
        cx.backend.grouped_gemm(&op, x, cx.master(self.weight), None)
    }

    /// `dy w_e` for expert e's rows.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn dgrad<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        dy: &Operand<B>,
        counts: &[usize],
    ) -> Result<B::Buffer> {
        let Operand::Plain(dy) = dy;
        let op = self.op(Layout::Nn, cx.activation(), counts);
        cx.backend.grouped_gemm(&op, dy, cx.master(self.weight), None)
    }

    /// Adds `dy_e^T x_e` to each expert's gradient.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn wgrad<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        x: &Operand<B>,
        dy: &Operand<B>,
        counts: &[usize],
    ) -> Result<()> {
        let (Operand::Plain(x), Operand::Plain(dy)) = (x, dy);
        let op = self.op(Layout::Tn, cx.recipe.master(), counts);
        cx.accumulate(self.weight, |acc| cx.backend.grouped_gemm(&op, dy, x, Some(acc)))
    }

    fn op(&self, layout: Layout, out: fathom_trace::DType, counts: &[usize]) -> GroupedGemm {
        GroupedGemm { layout, out, counts: counts.to_vec() }
    }
}

/// RMSNorm of columns `offset .. offset + width`.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    /// The weight \[width\].
    pub weight: ParamId,
    /// Added to the mean square.
    pub eps: f64,
    /// First column.
    pub offset: usize,
    /// How many columns.
    pub width: usize,
}

/// What a norm's backward needs.
#[derive(Clone, Debug)]
pub struct NormKept<B: Backend> {
    /// The input, which the layer keeps anyway.
    pub x: B::Buffer,
    /// One over the root mean square, a row.
    pub rstd: B::Buffer,
    /// The gradient of the output, from input-backward to weight-backward.
    pub dy: Option<B::Buffer>,
}

impl Norm {
    /// The normalised columns, and what the backward needs.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn fprop<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        x: &B::Buffer,
    ) -> Result<(B::Buffer, NormKept<B>)> {
        let Norm { eps, offset, width, .. } = *self;
        let op = RmsNorm { eps, offset, width, out: cx.activation() };
        let [y, rstd] = cx.backend.rms_norm(&op, x, cx.master(self.weight))?;
        Ok((y, NormKept { x: x.clone(), rstd, dy: None }))
    }

    /// The input's gradient, added to `residual`; keeps `dy` for the weight.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn dgrad<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        kept: &mut NormKept<B>,
        dy: B::Buffer,
        residual: Option<&B::Buffer>,
    ) -> Result<B::Buffer> {
        let Norm { offset, width, .. } = *self;
        let op = RmsNormBackward { offset, width, out: cx.activation() };
        let weight = cx.master(self.weight);
        let dx = cx.backend.rms_norm_backward(&op, &dy, &kept.x, weight, &kept.rstd, residual)?;
        kept.dy = Some(dy);
        Ok(dx)
    }

    /// Adds to the weight's gradient.
    ///
    /// # Errors
    /// Those of the backend.
    ///
    /// # Panics
    /// Before [`Norm::dgrad`].
    pub fn wgrad<B: Backend>(&self, cx: &Cx<'_, B>, kept: &NormKept<B>) -> Result<()> {
        let Norm { offset, width, .. } = *self;
        let dy = kept.dy.as_ref().expect("input-backward comes first");
        let op = RmsNormWgrad { offset, width };
        cx.accumulate(self.weight, |acc| {
            cx.backend.rms_norm_wgrad(&op, dy, &kept.x, &kept.rstd, acc)
        })
    }
}
