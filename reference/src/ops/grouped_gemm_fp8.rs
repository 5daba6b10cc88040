//! `grouped_gemm_fp8`: rows of a belong to experts in order; each expert's are op `gemm_fp8` with
//! weights of its own. The arithmetic is `fathom_numerics::gemm::grouped` (DeepSeek-V3 report,
//! section 3.3).

use fathom_numerics::gemm::{Fp8Operand, GemmConfig, grouped};
use fathom_trace::{DType, OpClass, TensorMeta};
use ndarray::{Array2, ArrayView2};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::codes::{Block, FP8, extent, extents, fp8_format, operand, scales, undefined};
use crate::op::compute_type::{Real, stored};
use crate::op::example::{Example, ceil, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// One FP8 product an expert: rows of a in order of expert.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GroupedGemmFp8 {
    /// Rows of each expert; rows behind them give zeros.
    pub counts: Vec<usize>,
    /// Which elements of a share a scale; one row, or all of them.
    pub a_tile: Block,
    /// Which elements of an expert's b share a scale.
    pub b_block: Block,
    /// Elements of k summed on the tensor core before promotion; `null`: all.
    pub promotion_interval: Option<usize>,
    /// Element type of d.
    pub out: DType,
}

impl Op for GroupedGemmFp8 {
    const NAME: &'static str = "grouped_gemm_fp8";
    const INPUTS: &'static [Role] = &[input("a"), input("a_scale"), input("b"), input("b_scale")];
    const OUTPUTS: &'static [&'static str] = &["d"];
    const CLASS: OpClass = OpClass::GroupedGemm;

    fn example() -> Example {
        let (rows, experts, n, k) = (6, 3, 4, 160);
        let (a_tile, b_block) = ([1, 128], [128, 128]);
        Example::new(GroupedGemmFp8 {
            counts: vec![2, 0, 3],
            a_tile: a_tile.map(Some),
            b_block: b_block.map(Some),
            promotion_interval: Some(128),
            out: DType::BF16,
        })
        .input("a", DType::F8E4M3, shape![rows, k])
        .positive("a_scale", DType::F32, shape![ceil(rows, a_tile[0]), ceil(k, a_tile[1])])
        .input("b", DType::F8E4M3, shape![experts, n, k])
        .positive("b_scale", DType::F32, shape![experts, ceil(n, b_block[0]), ceil(k, b_block[1])])
        .output("d", shape![rows, n])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(a), Some(a_scale), Some(b), Some(b_scale)] = inputs else {
            unreachable!("mandatory")
        };
        extents(Self::NAME, &[("a_tile", self.a_tile), ("b_block", self.b_block)])?;
        stored(Self::NAME, self.out, DType::F32)?;
        rules::dtype(a, FP8)?;
        rules::rank(a, 2, "[rows, k]")?;
        rules::dtype(b, FP8)?;
        rules::rank(b, 3, "[experts, n, k]")?;
        let (rows, k, n) = (a.shape[0], a.shape[1], b.shape[1]);
        rules::shape(b, &[self.counts.len(), n, k])?;
        rules::dtype(a_scale, &[DType::F32])?;
        rules::shape(a_scale, &scales(self.a_tile, rows, k))?;
        rules::dtype(b_scale, &[DType::F32])?;
        let [x, y] = scales(self.b_block, n, k);
        rules::shape(b_scale, &[self.counts.len(), x, y])?;
        if self.counts.iter().sum::<usize>() > rows {
            let message = format!("counts add up to more than the {rows} rows of a");
            return Err(OpError::Undefined { op: Self::NAME, message });
        }
        if matches!(self.a_tile[0], Some(2..)) {
            let message =
                "experts share out the rows of a: a_tile must be of 1 row or of all".into();
            return Err(OpError::Undefined { op: Self::NAME, message });
        }
        Ok(vec![rules::meta("d", self.out, &[rows, n])])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let b = inputs[2].as_ref().expect("mandatory");
        2 * self.counts.iter().sum::<usize>() as u64 * (b.shape[1] * b.shape[2]) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(a), Some(a_scale), Some(b), Some(b_scale)] = &inputs[..] else {
            unreachable!("mandatory")
        };
        let (rows, n, k) = (a.shape()[0], b.shape()[1], b.shape()[2]);
        let config =
            GemmConfig { promotion_interval: self.promotion_interval, ..GemmConfig::default() };
        let [x, y] = scales(self.b_block, n, k);
        let experts: Vec<Fp8Operand<'_>> = (0..self.counts.len())
            .map(|e| {
                let codes = &b.bytes()[e * n * k..(e + 1) * n * k];
                let scales = &b_scale.as_slice::<f32>()[e * x * y..(e + 1) * x * y];
                Fp8Operand {
                    codes: ArrayView2::from_shape((n, k), codes).expect("dense"),
                    scales: ArrayView2::from_shape((x, y), scales).expect("dense"),
                    format: fp8_format(b.dtype()),
                    block: extent(self.b_block),
                }
            })
            .collect();
        let mut d = Array2::zeros((rows, n));
        let a = operand(a, a_scale, self.a_tile);
        grouped::gemm_fp8_grouped_m(&a, &experts, &self.counts, d.view_mut(), &config)
            .map_err(|e| undefined(Self::NAME, &e))?;
        Ok(vec![f32::store(d.into_raw_vec_and_offset().0, &[rows, n], self.out)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Weights without elements were no experts at all: "m_sizes is \[2\]: expected \[0\]".
    #[test]
    fn empty_weights_are_experts_all_the_same() {
        for (n, k) in [(0, 130), (3, 0), (0, 0)] {
            let op = GroupedGemmFp8 {
                counts: vec![2, 1],
                a_tile: [Some(1), Some(128)],
                b_block: [Some(128), Some(128)],
                promotion_interval: Some(128),
                out: DType::F32,
            };
            let [x, y] = scales(op.b_block, n, k);
            let inputs = [
                Tensor::zeros(DType::F8E4M3, &[4, k]),
                Tensor::zeros(DType::F32, &[4, k.div_ceil(128)]),
                Tensor::zeros(DType::F8E4M3, &[2, n, k]),
                Tensor::zeros(DType::F32, &[2, x, y]),
            ];
            let d = Op::run(&op, inputs.map(Some).to_vec()).unwrap();
            assert!(d[0] == Tensor::zeros(DType::F32, &[4, n]), "{n} x {k}");
        }
    }
}
