//! Activations, gradients and weights in the forms in which GEMMs read them and backwards keep
//! them.

use fathom_numerics::formats::Format;
use fathom_numerics::quant::ScaleKind;
use fathom_trace::DType;

use crate::Tensor;
use crate::backend::{Backend, Result};
use crate::layers::Cx;
use crate::layers::delayed::{CastSite, Side, StepScales};
use crate::model::params::ParamId;
use crate::op::codes::Block;
use crate::ops::dequantize::Dequantize;
use crate::ops::gather_rows::GatherRows;
use crate::ops::quantize_block::QuantizeBlock;
use crate::ops::quantize_tile::QuantizeTile;
use crate::ops::transpose_codes::TransposeCodes;
use crate::ops::transpose_quantize::TransposeQuantize;
use crate::precision::Mode;

/// An activation or gradient as GEMMs read it, and as it is kept for wgrad.
#[derive(Debug)]
pub enum Operand<B: Backend> {
    /// The values themselves.
    Plain(B::Buffer),
    /// Codes with scales.
    Codes(Codes<B>),
}

/// Codes with scales: element (i, j) is its code times the scale of its block.
#[derive(Debug)]
pub struct Codes<B: Backend> {
    /// FP8 codes \[rows, columns\], or packed E5M6.
    pub q: B::Buffer,
    /// F32 scales, one a block.
    pub scale: B::Buffer,
    /// Elements of a row; packed codes have fewer words than that.
    pub columns: usize,
    /// Which elements share a scale.
    pub block: Block,
    /// What scales may be; a re-tiled copy follows.
    pub kind: ScaleKind,
}

/// A weight as GEMMs read it.
#[derive(Debug)]
pub enum Weight<B: Backend> {
    /// In one element type for both products.
    Plain(B::Buffer),
    /// FP8, in both orientations.
    Codes {
        /// Codes \[n, k\] for fprop.
        q: B::Buffer,
        /// The F32 scales of `q`, one a block.
        scale: B::Buffer,
        /// Codes \[k, n\] for dgrad.
        q_t: B::Buffer,
        /// The F32 scales of `q_t`.
        scale_t: B::Buffer,
    },
}

impl<B: Backend> Operand<B> {
    /// What `cast` gave of a matrix of so many columns.
    pub(super) fn of_cast(cast: &QuantizeTile, columns: usize, [q, scale]: [B::Buffer; 2]) -> Self {
        let block = [Some(1), Some(cast.tile)];
        Operand::Codes(Codes { q, scale, columns, block, kind: cast.scale })
    }
}

impl<B: Backend> Clone for Operand<B> {
    fn clone(&self) -> Self {
        match self {
            Operand::Plain(x) => Operand::Plain(x.clone()),
            Operand::Codes(codes) => {
                Operand::Codes(Codes { q: codes.q.clone(), scale: codes.scale.clone(), ..*codes })
            }
        }
    }
}

/// The lower bound of a block's amax, as in the numerics contract.
const AMAX_FLOOR: f32 = 1e-4;

/// One scale for a whole tensor.
const WHOLE: Block = [None, None];

/// The tile of the report's activations.
const TILE: usize = 128;

impl<B: Backend> Cx<'_, B> {
    fn fp8(&self) -> bool {
        self.recipe.mode == Mode::Fp8
    }

    fn cast(
        &self,
        x: &B::Buffer,
        format: Format,
        block: Block,
        kind: ScaleKind,
    ) -> Result<Operand<B>> {
        let columns = self.backend.shape(x)[1];
        if let [Some(1), Some(tile)] = block {
            let op = QuantizeTile { format, tile, scale: kind, amax_floor: AMAX_FLOOR };
            return Ok(Operand::of_cast(&op, columns, self.backend.quantize_tile(&op, x)?));
        }
        let op = QuantizeBlock { format, block, scale: kind, amax_floor: AMAX_FLOOR };
        let [q, scale] = self.backend.quantize_block(&op, x)?;
        Ok(Operand::Codes(Codes { q, scale, columns, block, kind }))
    }

    /// Whether ops that follow each other run as one where there is an op for both.
    pub(super) fn fuses(&self) -> bool {
        self.recipe.fused.unwrap_or_else(|| self.backend.fuses())
    }

    /// The cast, in tiles of rows, of what a fused op casts on its way out; none where ops are not
    /// fused, or where a scale is not of one row's values: it spans rows or comes from the steps
    /// before.
    pub(super) fn fused_cast(&self, side: Side, kind: ScaleKind) -> Option<QuantizeTile> {
        let fp8 = &self.recipe.fp8;
        let (format, block) = match side {
            Side::Activation => (Format::E4M3, fp8.activation_block),
            Side::Gradient => (fp8.gradient_format, fp8.gradient_block),
        };
        match block {
            [Some(1), Some(tile)]
                if self.fuses() && self.fp8() && self.weights.delayed.is_none() =>
            {
                Some(QuantizeTile { format, tile, scale: kind, amax_floor: AMAX_FLOOR })
            }
            _ => None,
        }
    }

    /// The step's scales where they are delayed, for a matrix that has rows; a cast of none has no
    /// amax, nor a scale.
    fn delayed_scales(&self, x: &B::Buffer) -> Option<&StepScales<B>> {
        self.weights.delayed.as_ref().filter(|_| self.backend.shape(x)[0] > 0)
    }

    /// The cast of what a Linear reads: by the scale of its site where scales are delayed, else by
    /// what is cast.
    fn cast_at(
        &self,
        x: &B::Buffer,
        site: CastSite,
        (block, kind): (Block, ScaleKind),
    ) -> Result<Operand<B>> {
        let format = match site.side {
            Side::Activation => Format::E4M3,
            Side::Gradient => self.recipe.fp8.gradient_format,
        };
        let Some(scales) = self.delayed_scales(x) else {
            return self.cast(x, format, block, kind);
        };
        let columns = self.backend.shape(x)[1];
        let [q, scale] = scales.cast(self.backend, site, format, x)?;
        Ok(Operand::Codes(Codes { q, scale, columns, block: WHOLE, kind }))
    }

    /// An operand whose rows experts share out: where several rows have one scale, each row gets it
    /// for itself, since the rows of a block may go to different experts.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn by_row(&self, operand: Operand<B>) -> Result<Operand<B>> {
        match operand {
            Operand::Codes(codes @ Codes { block: [Some(2..), _], .. }) => {
                let [block_rows, block_columns] = codes.block;
                let block_rows = block_rows.expect("matched");
                let rows = self.backend.shape(&codes.q)[0];
                let ids: Vec<i32> = (0..rows).map(|row| (row / block_rows) as i32).collect();
                let ids = self.backend.upload(Tensor::from_vec(&[rows], ids))?;
                let op = GatherRows { out: DType::F32 };
                let scale = self.backend.gather_rows(&op, &codes.scale, &ids)?;
                Ok(Operand::Codes(Codes { scale, block: [Some(1), block_columns], ..codes }))
            }
            other => Ok(other),
        }
    }

    /// An activation as an operand of the Linear with this `weight`.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn operand(&self, x: &B::Buffer, weight: ParamId) -> Result<Operand<B>> {
        if !self.fp8() {
            return Ok(Operand::Plain(x.clone()));
        }
        let fp8 = &self.recipe.fp8;
        let site = CastSite { weight, side: Side::Activation };
        self.cast_at(x, site, (fp8.activation_block, fp8.scale))
    }

    /// An activation that is dispatched to the experts of this `weight`: power-of-two scales.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn dispatch_operand(&self, x: &B::Buffer, weight: ParamId) -> Result<Operand<B>> {
        if !self.fp8() {
            return Ok(Operand::Plain(x.clone()));
        }
        let block = self.recipe.fp8.activation_block;
        let site = CastSite { weight, side: Side::Activation };
        self.by_row(self.cast_at(x, site, (block, self.recipe.dispatch_scale))?)
    }

    /// The gradient of what the Linear with this `weight` gives, as an operand.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn gradient(&self, dy: &B::Buffer, weight: ParamId) -> Result<Operand<B>> {
        if !self.fp8() {
            return Ok(Operand::Plain(dy.clone()));
        }
        let fp8 = &self.recipe.fp8;
        let site = CastSite { weight, side: Side::Gradient };
        self.cast_at(dy, site, (fp8.gradient_block, fp8.scale))
    }

    /// A gradient that is dispatched back to the experts of this `weight`: power-of-two scales.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn dispatch_gradient(&self, dy: &B::Buffer, weight: ParamId) -> Result<Operand<B>> {
        if !self.fp8() {
            return Ok(Operand::Plain(dy.clone()));
        }
        let block = self.recipe.fp8.gradient_block;
        let site = CastSite { weight, side: Side::Gradient };
        self.by_row(self.cast_at(dy, site, (block, self.recipe.dispatch_scale))?)
    }

    /// The attention's output as it is kept: E5M6 where the recipe says so.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn keep_attention_output(&self, o: &B::Buffer) -> Result<Operand<B>> {
        if !self.fp8() || !self.recipe.keep_attention_output_e5m6 {
            return Ok(Operand::Plain(o.clone()));
        }
        let columns = self.backend.shape(o)[1];
        let (format, scale) = (Format::E5M6, self.recipe.dispatch_scale);
        let op = QuantizeTile { format, tile: TILE, scale, amax_floor: AMAX_FLOOR };
        Ok(Operand::of_cast(&op, columns, self.backend.quantize_tile(&op, o)?))
    }

    /// SwiGLU's input as it is kept: FP8 where the recipe says so.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn keep_swiglu_input(&self, x: &B::Buffer) -> Result<Operand<B>> {
        if !self.fp8() || !self.recipe.keep_swiglu_input_fp8 {
            return Ok(Operand::Plain(x.clone()));
        }
        let fp8 = &self.recipe.fp8;
        self.cast(x, Format::E4M3, fp8.activation_block, fp8.scale)
    }

    /// The values of an operand \[rows, columns\], dequantised where it has codes.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn values(&self, operand: &Operand<B>) -> Result<B::Buffer> {
        match operand {
            Operand::Plain(x) => Ok(x.clone()),
            Operand::Codes(Codes { q, scale, columns, block, .. }) => {
                let op = Dequantize { columns: *columns, block: *block, out: self.activation() };
                self.backend.dequantize(&op, q, scale)
            }
        }
    }

    /// An operand transposed and cast along the rows' `segments`, for wgrad. Where scales are
    /// delayed the codes that the other product reads are transposed as they are.
    pub(super) fn transposed(
        &self,
        operand: &Operand<B>,
        segments: &[usize],
        site: CastSite,
    ) -> Result<[B::Buffer; 2]> {
        let segments = segments.to_vec();
        let fp8 = &self.recipe.fp8;
        let (format, block) = match site.side {
            Side::Activation => (Format::E4M3, fp8.activation_block),
            Side::Gradient => (fp8.gradient_format, fp8.gradient_block),
        };
        let (Operand::Plain(rows) | Operand::Codes(Codes { q: rows, .. })) = operand;
        if self.delayed_scales(rows).is_some() {
            let cast = match operand {
                Operand::Codes(Codes { block: WHOLE, .. }) => operand.clone(),
                kept => self.cast_at(&self.values(kept)?, site, (block, fp8.scale))?,
            };
            let Operand::Codes(Codes { q, scale, .. }) = cast else { unreachable!("it is cast") };
            return self.backend.transpose_codes(&TransposeCodes { segments }, &q, &scale);
        }
        match operand {
            Operand::Plain(x) => {
                let columns = self.backend.shape(x)[1];
                let (from, scale) = ([Some(1), Some(TILE)], fp8.scale);
                let op = TransposeQuantize { columns, from, block, format, scale, segments };
                self.backend.transpose_quantize(&op, x, None)
            }
            Operand::Codes(Codes { q, scale, columns, block: from, kind }) => {
                let (columns, from, kind) = (*columns, *from, *kind);
                let op = TransposeQuantize { columns, from, block, format, scale: kind, segments };
                self.backend.transpose_quantize(&op, q, Some(scale))
            }
        }
    }
}
