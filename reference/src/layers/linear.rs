//! Linear and RMSNorm: a parameter and the three ops over it (fprop, dgrad, wgrad).

use fathom_numerics::formats::Format;
use fathom_trace::DType;

use crate::backend::{Backend, Result};
use crate::layers::Cx;
use crate::layers::delayed::{CastSite, Side};
use crate::layers::operand::{Codes, Operand, Weight};
use crate::layers::residual::{Residual, ResidualGradient};
use crate::model::params::ParamId;
use crate::ops::add::Add;
use crate::ops::add_rms_norm::{AddRmsNorm, AddRmsNormQuantize};
use crate::ops::gemm::{Gemm, Layout};
use crate::ops::gemm_fp8::GemmFp8;
use crate::ops::grouped_gemm::GroupedGemm;
use crate::ops::grouped_gemm_fp8::GroupedGemmFp8;
use crate::ops::quantize_tile::QuantizeTile;
use crate::ops::rms_norm::{RmsNorm, RmsNormBackward, RmsNormWgrad};
use crate::ops::rms_norm_backward_quantize::RmsNormBackwardQuantize;
use crate::ops::rms_norm_quantize::RmsNormQuantize;
use crate::ops::wgrad_fp8::WgradFp8;

/// `y = x w^T` with `w` \[n, k\].
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// The weight \[n, k\]: n outputs, k inputs.
    pub weight: ParamId,
}

const ONE_RECIPE: &str = "operands and weights are of one recipe";

impl Linear {
    /// `x w^T`: x \[rows, k\] gives \[rows, n\] in the element type of activations.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn fprop<B: Backend>(&self, cx: &Cx<'_, B>, x: &Operand<B>) -> Result<B::Buffer> {
        match (x, cx.weight(self.weight)) {
            (Operand::Plain(x), Weight::Plain(w)) => {
                let op = Gemm { layout: Layout::Nt, out: cx.activation(), segments: Vec::new() };
                cx.backend.gemm(&op, x, w, None)
            }
            (Operand::Codes(x), Weight::Codes { q, scale, .. }) => product(cx, x, q, scale),
            _ => panic!("{ONE_RECIPE}"),
        }
    }

    /// The gradient of x, `dy w`: dy \[rows, n\], cast first in mode `fp8`, gives \[rows, k\].
    ///
    /// # Errors
    /// Those of the backend.
    pub fn dgrad<B: Backend>(&self, cx: &Cx<'_, B>, dy: &B::Buffer) -> Result<B::Buffer> {
        self.dgrad_of(cx, &cx.gradient(dy, self.weight)?)
    }

    /// The same, of a `dy` that has been cast.
    pub(super) fn dgrad_of<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        dy: &Operand<B>,
    ) -> Result<B::Buffer> {
        match (dy, cx.weight(self.weight)) {
            (Operand::Plain(dy), Weight::Plain(w)) => {
                let op = Gemm { layout: Layout::Nn, out: cx.activation(), segments: Vec::new() };
                cx.backend.gemm(&op, dy, w, None)
            }
            (Operand::Codes(dy), Weight::Codes { q_t, scale_t, .. }) => {
                product(cx, dy, q_t, scale_t)
            }
            _ => panic!("{ONE_RECIPE}"),
        }
    }

    /// Adds `dy^T x` to the weight's gradient, segment after segment of the rows.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn wgrad<B: Backend>(&self, cx: &Cx<'_, B>, x: &Operand<B>, dy: &B::Buffer) -> Result<()> {
        if let Weight::Codes { .. } = cx.weight(self.weight) {
            let dy = Operand::Plain(dy.clone());
            return wgrad_fp8(cx, self.weight, x, &dy, &cx.rows.segments, false);
        }
        let Operand::Plain(x) = x else { panic!("{ONE_RECIPE}") };
        let op = Gemm {
            layout: Layout::Tn,
            out: cx.recipe.master(),
            segments: cx.tensor_core_segments(),
        };
        cx.accumulate(self.weight, |acc| cx.backend.gemm(&op, dy, x, Some(acc)))
    }
}

/// FP8 product of an operand with a weight \[n, k\].
fn product<B: Backend>(
    cx: &Cx<'_, B>,
    x: &Codes<B>,
    w: &B::Buffer,
    w_scale: &B::Buffer,
) -> Result<B::Buffer> {
    let (m, shape) = (cx.backend.shape(&x.q)[0], cx.backend.shape(w));
    let op = GemmFp8 {
        a_tile: x.block,
        b_block: cx.recipe.fp8.weight_block,
        promotion_interval: cx.recipe.fp8.promotion_interval,
        ..GemmFp8::hopper(m, shape[0], shape[1], Format::Bf16)
    };
    cx.backend.gemm_fp8(&op, &x.q, &x.scale, w, w_scale, None)
}

/// Adds `dy^T x` to a gradient: both transposed and cast, k cut into `segments`.
fn wgrad_fp8<B: Backend>(
    cx: &Cx<'_, B>,
    weight: ParamId,
    x: &Operand<B>,
    dy: &Operand<B>,
    segments: &[usize],
    grouped: bool,
) -> Result<()> {
    let fp8 = &cx.recipe.fp8;
    let (dy_block, x_block) = (fp8.gradient_block, fp8.activation_block);
    let site = |side| CastSite { weight, side };
    let [dy, dy_scale] = cx.transposed(dy, segments, site(Side::Gradient))?;
    let [x, x_scale] = cx.transposed(x, segments, site(Side::Activation))?;
    let segments = segments.to_vec();
    let promotion_interval = fp8.promotion_interval;
    let op = WgradFp8 { segments, grouped, dy_block, x_block, promotion_interval };
    cx.accumulate(weight, |acc| cx.backend.wgrad_fp8(&op, &dy, &dy_scale, &x, &x_scale, acc))
}

/// One Linear an expert: `w` \[experts, n, k\]; rows in order of expert.
#[derive(Clone, Copy, Debug)]
pub struct GroupedLinear {
    /// The experts' weights, stacked.
    pub weight: ParamId,
}

impl GroupedLinear {
    /// `x w_e^T` for the rows of each expert e, `counts[e]` of them.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn fprop<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        x: &Operand<B>,
        counts: &[usize],
    ) -> Result<B::Buffer> {
        match (x, cx.weight(self.weight)) {
            (Operand::Plain(x), Weight::Plain(w)) => {
                let op = grouped(Layout::Nt, cx.activation(), counts);
                cx.backend.grouped_gemm(&op, x, w, None)
            }
            (Operand::Codes(x), Weight::Codes { q, scale, .. }) => {
                grouped_product(cx, x, q, scale, counts)
            }
            _ => panic!("{ONE_RECIPE}"),
        }
    }

    /// The gradient of x: `dy w_e` for the rows of each expert e, `counts[e]` of them.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn dgrad<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        dy: &Operand<B>,
        counts: &[usize],
    ) -> Result<B::Buffer> {
        match (dy, cx.weight(self.weight)) {
            (Operand::Plain(dy), Weight::Plain(w)) => {
                let op = grouped(Layout::Nn, cx.activation(), counts);
                cx.backend.grouped_gemm(&op, dy, w, None)
            }
            (Operand::Codes(dy), Weight::Codes { q_t, scale_t, .. }) => {
                grouped_product(cx, dy, q_t, scale_t, counts)
            }
            _ => panic!("{ONE_RECIPE}"),
        }
    }

    /// Adds `dy_e^T x_e` to each expert's gradient, from its `counts[e]` rows.
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
        if let Weight::Codes { .. } = cx.weight(self.weight) {
            return wgrad_fp8(cx, self.weight, x, dy, counts, true);
        }
        let (Operand::Plain(x), Operand::Plain(dy)) = (x, dy) else { panic!("{ONE_RECIPE}") };
        let op = grouped(Layout::Tn, cx.recipe.master(), counts);
        cx.accumulate(self.weight, |acc| cx.backend.grouped_gemm(&op, dy, x, Some(acc)))
    }
}

fn grouped(layout: Layout, out: DType, counts: &[usize]) -> GroupedGemm {
    GroupedGemm { layout, out, counts: counts.to_vec() }
}

fn grouped_product<B: Backend>(
    cx: &Cx<'_, B>,
    x: &Codes<B>,
    w: &B::Buffer,
    w_scale: &B::Buffer,
    counts: &[usize],
) -> Result<B::Buffer> {
    let op = GroupedGemmFp8 {
        counts: counts.to_vec(),
        a_tile: x.block,
        b_block: cx.recipe.fp8.weight_block,
        promotion_interval: cx.recipe.fp8.promotion_interval,
        out: cx.activation(),
    };
    cx.backend.grouped_gemm_fp8(&op, &x.q, &x.scale, w, w_scale)
}
/// RMSNorm of columns `offset .. offset + width`.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    /// The weight \[width\].
    pub weight: ParamId,
    /// Added to the mean square.
    pub eps: f64,
    /// First of the input's columns that are normalised.
    pub offset: usize,
    /// How many columns are.
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

/// What a norm gives that is cast on its way out.
pub(super) struct Normed<B: Backend> {
    /// The normalised columns, where an op reads them as they are.
    pub y: Option<B::Buffer>,
    /// The same as products read them.
    pub operand: Operand<B>,
    /// What the norm's backward needs.
    pub kept: NormKept<B>,
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
        let [y, rstd] = cx.backend.rms_norm(&self.op(cx), x, cx.master(self.weight))?;
        Ok((y, NormKept { x: x.clone(), rstd, dy: None }))
    }

    /// The same of a residual, which is added up first where it is not yet.
    pub(super) fn of_residual<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        residual: &Residual<B>,
    ) -> Result<(B::Buffer, NormKept<B>)> {
        let (a, b) = match residual {
            Residual::Sum(x) => return self.fprop(cx, x),
            Residual::Terms(a, b) => (a, b),
        };
        let op = AddRmsNorm { add: Add { out: cx.activation() }, norm: self.op(cx) };
        let [h, y, rstd] = cx.backend.add_rms_norm(&op, a, b, None, cx.master(self.weight))?;
        Ok((y, NormKept { x: h, rstd, dy: None }))
    }

    fn op<B: Backend>(&self, cx: &Cx<'_, B>) -> RmsNorm {
        let Norm { eps, offset, width, .. } = *self;
        RmsNorm { eps, offset, width, out: cx.activation() }
    }

    /// The normalised columns as the Linear with the weight `reader` reads them, and what the
    /// backward needs.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn operand<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        x: &B::Buffer,
        reader: ParamId,
    ) -> Result<(Operand<B>, NormKept<B>)> {
        let Some(cast) = cx.fused_cast(Side::Activation, cx.recipe.fp8.scale) else {
            let (y, kept) = self.fprop(cx, x)?;
            return Ok((cx.operand(&y, reader)?, kept));
        };
        let x = Residual::Sum(x.clone());
        let Normed { operand, kept, .. } = self.fused(cx, &x, &cast, false)?;
        Ok((operand, kept))
    }

    /// Norm and cast as one op, with the sum before them where the residual is not added up yet;
    /// the normalised columns too where `keep` says so.
    pub(super) fn fused<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        residual: &Residual<B>,
        cast: &QuantizeTile,
        keep: bool,
    ) -> Result<Normed<B>> {
        let (norm, weight) = (self.op(cx), cx.master(self.weight));
        let [h, y, q, scale, rstd] = match residual {
            Residual::Sum(x) => {
                let op = RmsNormQuantize { norm, cast: cast.clone(), keep };
                let [y, q, scale, rstd] = cx.backend.rms_norm_quantize(&op, x, weight)?;
                [x.clone(), y, q, scale, rstd]
            }
            Residual::Terms(a, b) => {
                let add = Add { out: cx.activation() };
                let op = AddRmsNormQuantize { add, norm, cast: cast.clone(), keep };
                cx.backend.add_rms_norm_quantize(&op, a, b, None, weight)?
            }
        };
        let operand = Operand::of_cast(cast, self.width, [q, scale]);
        let kept = NormKept { x: h, rstd, dy: None };
        Ok(Normed { y: keep.then_some(y), operand, kept })
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

    /// The same as the attention before it takes it: cast on its way out where ops are fused.
    pub(super) fn dgrad_of_residual<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        kept: &mut NormKept<B>,
        dy: B::Buffer,
        residual: &B::Buffer,
    ) -> Result<ResidualGradient<B>> {
        let Some(cast) = cx.fused_cast(Side::Gradient, cx.recipe.fp8.scale) else {
            let dh = self.dgrad(cx, kept, dy, Some(residual))?;
            return Ok(ResidualGradient { dh, operand: None });
        };
        let Norm { offset, width, .. } = *self;
        let norm = RmsNormBackward { offset, width, out: cx.activation() };
        let op = RmsNormBackwardQuantize { norm, cast };
        let (x, weight, rstd) = (&kept.x, cx.master(self.weight), &kept.rstd);
        let [dh, q, scale] =
            cx.backend.rms_norm_backward_quantize(&op, &dy, x, weight, rstd, Some(residual))?;
        kept.dy = Some(dy);
        let operand = Operand::of_cast(&op.cast, width, [q, scale]);
        Ok(ResidualGradient { dh, operand: Some(operand) })
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
