//! `transpose_quantize`: x \[r, columns\] (F32, BF16; or codes with scales, dequantised to F32
//! first) to its transpose \[columns, r\] with a scale for every `block` of the output. The r rows
//! are cut into segments (sequences, experts); scales begin anew in each: 128x1 tiles of the
//! report's wgrad.
//!
//! The arithmetic is `fathom_numerics::quant::transpose_quantize` (DeepSeek-V3 report, section
//! 3.3).

use fathom_numerics::formats::Format;
use fathom_numerics::quant::{self, QuantConfig, ScaleKind};
use fathom_trace::{DType, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::codes::{
    Block, extent, extents, kept, one_of, outputs, scales, stored_as, undefined, values,
};
use crate::op::example::{Example, ceil, shape};
use crate::op::{Op, OpError, Role, input, optional, rules};

/// Transposes and casts, segment by segment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TransposeQuantize {
    /// Columns of `x`.
    pub columns: usize,
    /// Which elements of `x` share a scale, where it is codes.
    pub from: Block,
    /// Rows and columns of the output that share a scale.
    pub block: Block,
    /// Output format: `e4m3` or `e5m2`.
    #[schemars(extend("enum" = ["e4m3", "e5m2"]))]
    pub format: Format,
    /// Any FP32, powers of two, or the rule of MX formats.
    pub scale: ScaleKind,
    /// Lengths that cut the rows; rows behind them are left out.
    pub segments: Vec<usize>,
}

impl TransposeQuantize {
    fn scale_columns(&self) -> usize {
        self.segments.iter().map(|&rows| scales(self.block, self.columns, rows)[1]).sum()
    }
}

impl Op for TransposeQuantize {
    const NAME: &'static str = "transpose_quantize";
    const INPUTS: &'static [Role] = &[input("x"), optional("x_scale")];
    const OUTPUTS: &'static [&'static str] = &["q", "scale"];
    const CLASS: OpClass = OpClass::Convert;

    fn example() -> Example {
        let (r, columns, from, block) = (6, 4, [1, 2], [1, 2]);
        let (taken, tiles) = (5, 3);
        Example::new(TransposeQuantize {
            columns,
            from: from.map(Some),
            block: block.map(Some),
            format: Format::E4M3,
            scale: ScaleKind::Pow2,
            segments: vec![3, 2],
        })
        .input("x", DType::F8E4M3, shape![r, columns])
        .positive("x_scale", DType::F32, shape![ceil(r, from[0]), ceil(columns, from[1])])
        .output("q", shape![columns, taken])
        .output("scale", shape![ceil(columns, block[0]), tiles])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x), scale] = inputs else { unreachable!("mandatory") };
        one_of(Self::NAME, "format", self.format, &[Format::E4M3, Format::E5M2])?;
        extents(Self::NAME, &[("from", self.from), ("block", self.block)])?;
        let [rows, columns] = kept(x, scale.as_ref(), self.columns, self.from)?;
        let taken: usize = self.segments.iter().sum();
        if taken > rows {
            let message = format!("segments {:?} exceed the {rows} rows", self.segments);
            return Err(OpError::Undefined { op: Self::NAME, message });
        }
        let scale_rows = scales(self.block, columns, 1)[0];
        Ok(vec![
            rules::meta("q", stored_as(self.format), &[columns, taken]),
            rules::meta("scale", DType::F32, &[scale_rows, self.scale_columns()]),
        ])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        2 * (self.columns * self.segments.iter().sum::<usize>()) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(x), scale] = &inputs[..] else { unreachable!("mandatory") };
        let x = values(x, scale.as_ref(), self.columns, self.from);
        let config =
            QuantConfig { format: self.format, scale: self.scale, ..QuantConfig::default() };
        quant::transpose_quantize(x.view(), &self.segments, extent(self.block), &config)
            .map(outputs)
            .map_err(|e| undefined(Self::NAME, &e))
    }
}
