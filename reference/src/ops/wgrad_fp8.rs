//! `wgrad_fp8`: `d += dy^T x` of transposed casts; over k's segments as one chain, or with
//! `grouped` one result a segment (an expert). The arithmetic is `fathom_numerics::gemm::grouped`
//! (DeepSeek-V3 report, section 3.3).

use fathom_numerics::gemm::{Accumulate, GemmConfig, grouped};
use fathom_trace::{DType, OpClass, TensorMeta};
use ndarray::{ArrayViewMut2, ArrayViewMut3};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::codes::{Block, FP8, extents, operand, scales, undefined};
use crate::op::compute_type::Real;
use crate::op::example::{Example, ceil, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// Weight gradients from transposed casts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WgradFp8 {
    /// Lengths that cut k; scales begin anew in each.
    pub segments: Vec<usize>,
    /// Whether each segment (expert) has a result of its own.
    pub grouped: bool,
    /// Which elements of `dy` share a scale: rows of it, elements along k.
    pub dy_block: Block,
    /// Which elements of `x` share a scale.
    pub x_block: Block,
    /// Elements of k summed on the tensor core before promotion; `null`: all.
    pub promotion_interval: Option<usize>,
}

impl Op for WgradFp8 {
    const NAME: &'static str = "wgrad_fp8";
    const INPUTS: &'static [Role] =
        &[input("dy"), input("dy_scale"), input("x"), input("x_scale"), input("acc")];
    const OUTPUTS: &'static [&'static str] = &["d"];
    const CLASS: OpClass = OpClass::WeightGradient;

    fn example() -> Example {
        let (m, n, k, tiles) = (3, 4, 170, 3);
        let (dy_block, x_block) = ([1, 128], [1, 128]);
        Example::new(WgradFp8 {
            segments: vec![130, 40],
            grouped: false,
            dy_block: dy_block.map(Some),
            x_block: x_block.map(Some),
            promotion_interval: Some(128),
        })
        .input("dy", DType::F8E4M3, shape![m, k])
        .positive("dy_scale", DType::F32, shape![ceil(m, dy_block[0]), tiles])
        .input("x", DType::F8E4M3, shape![n, k])
        .positive("x_scale", DType::F32, shape![ceil(n, x_block[0]), tiles])
        .input("acc", DType::F32, shape![m, n])
        .output("d", shape![m, n])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(dy), Some(dy_scale), Some(x), Some(x_scale), Some(acc)] = inputs else {
            unreachable!("mandatory")
        };
        extents(Self::NAME, &[("dy_block", self.dy_block), ("x_block", self.x_block)])?;
        let k: usize = self.segments.iter().sum();
        for (codes, scale, block) in [(dy, dy_scale, self.dy_block), (x, x_scale, self.x_block)] {
            rules::dtype(codes, FP8)?;
            rules::rank(codes, 2, "[rows, k]")?;
            rules::shape(codes, &[codes.shape[0], k])?;
            rules::dtype(scale, &[DType::F32])?;
            let rows = codes.shape[0];
            let columns = self.segments.iter().map(|&n| scales(block, rows, n)[1]).sum();
            rules::shape(scale, &[scales(block, rows, 1)[0], columns])?;
        }
        let mut shape = vec![dy.shape[0], x.shape[0]];
        if self.grouped {
            shape.insert(0, self.segments.len());
        }
        rules::dtype(acc, &[DType::F32])?;
        rules::shape(acc, &shape)?;
        Ok(vec![rules::meta("d", DType::F32, &shape)])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let [Some(dy), _, Some(x), ..] = inputs else { unreachable!("mandatory") };
        2 * (dy.shape[0] * dy.shape[1]) as u64 * x.shape[0] as u64
    }

    fn run(&self, mut inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let acc = inputs.pop().flatten().expect("mandatory");
        let [Some(dy), Some(dy_scale), Some(x), Some(x_scale)] = &inputs[..] else {
            unreachable!("mandatory")
        };
        let config =
            GemmConfig { promotion_interval: self.promotion_interval, ..GemmConfig::default() };
        let a = operand(dy, dy_scale, self.dy_block);
        let b = operand(x, x_scale, self.x_block);
        let shape = acc.shape().to_vec();
        let (m, n) = (dy.shape()[0], x.shape()[0]);
        let mut d = acc.into_vec::<f32>();
        let chain = Accumulate::Chain;
        let result = if self.grouped {
            let d = ArrayViewMut3::from_shape((self.segments.len(), m, n), &mut d[..]);
            grouped::gemm_fp8_grouped_k(&a, &b, &self.segments, d.expect("dense"), chain, &config)
        } else {
            let d = ArrayViewMut2::from_shape((m, n), &mut d[..]);
            grouped::gemm_fp8_segmented_k(&a, &b, &self.segments, d.expect("dense"), chain, &config)
        };
        result.map_err(|e| undefined(Self::NAME, &e))?;
        Ok(vec![f32::store(d, &shape, DType::F32)])
    }
}
