//! `quantize_weight`: w \[.., n, k\] F32 to codes with a scale for every `block`, and their
//! transpose with its scales, which dgrad reads. With blocks of as many rows as columns both are
//! the same codes and nothing is rounded twice.
//!
//! The arithmetic is `fathom_numerics::quant` (DeepSeek-V3 report, section 3.3.2).

use fathom_numerics::quant::{self, QuantConfig, ScaleKind};
use fathom_trace::{DType, OpClass, TensorMeta};
use ndarray::ArrayView2;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::codes::{Block, extent, extents, scales, undefined};
use crate::op::example::{Example, ceil, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// Weights as both GEMMs read them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QuantizeWeight {
    /// Rows and columns that share a scale.
    pub block: Block,
    /// Any FP32, powers of two, or the rule of MX formats.
    pub scale: ScaleKind,
    /// Cast the transpose from the values, in blocks of its own, instead of transposing the codes:
    /// for blocks that are not as many rows as columns, whose transpose no GEMM takes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub transpose_anew: bool,
}

impl Op for QuantizeWeight {
    const NAME: &'static str = "quantize_weight";
    const INPUTS: &'static [Role] = &[input("w")];
    const OUTPUTS: &'static [&'static str] = &["q", "scale", "q_t", "scale_t"];
    const CLASS: OpClass = OpClass::Convert;

    fn example() -> Example {
        let (n, k, block) = (3, 6, [2, 4]);
        Example::new(QuantizeWeight {
            block: block.map(Some),
            scale: ScaleKind::Pow2,
            transpose_anew: false,
        })
        .input("w", DType::F32, shape![n, k])
        .output("q", shape![n, k])
        .output("scale", shape![ceil(n, block[0]), ceil(k, block[1])])
        .output("q_t", shape![k, n])
        .output("scale_t", shape![ceil(k, block[1]), ceil(n, block[0])])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(w)] = inputs else { unreachable!("mandatory") };
        extents(Self::NAME, &[("block", self.block)])?;
        rules::dtype(w, &[DType::F32])?;
        let [leading @ .., n, k] = &w.shape[..] else {
            return rules::rank(w, 2, "[n, k] or [experts, n, k]").map(|()| Vec::new());
        };
        let shape = |last: [usize; 2]| [leading, &last[..]].concat();
        let [a, b] = scales(self.block, *n, *k);
        let [a_t, b_t] = if self.transpose_anew { scales(self.block, *k, *n) } else { [b, a] };
        Ok(vec![
            rules::meta("q", DType::F8E4M3, &w.shape),
            rules::meta("scale", DType::F32, &shape([a, b])),
            rules::meta("q_t", DType::F8E4M3, &shape([*k, *n])),
            rules::meta("scale_t", DType::F32, &shape([a_t, b_t])),
        ])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        2 * inputs[0].as_ref().expect("mandatory").shape.iter().product::<usize>() as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let outputs = Op::infer(self, &[inputs[0].as_ref().map(|w| w.meta("w"))])?;
        let [Some(w)] = &inputs[..] else { unreachable!("mandatory") };
        let [.., n, k] = w.shape()[..] else { unreachable!("checked") };
        let config = QuantConfig { scale: self.scale, ..QuantConfig::default() };
        let (mut q, mut scale) = (Vec::<u8>::with_capacity(w.len()), Vec::<f32>::new());
        let (mut q_t, mut scale_t) = (Vec::<u8>::with_capacity(w.len()), Vec::<f32>::new());
        for w in w.as_slice::<f32>().chunks((n * k).max(1)) {
            let w = ArrayView2::from_shape((n, k), w).expect("dense");
            let one = quant::quantize(w, extent(self.block), &config)
                .map_err(|e| undefined(Self::NAME, &e))?;
            let other = match self.transpose_anew {
                true => quant::quantize(w.t(), extent(self.block), &config)
                    .map_err(|e| undefined(Self::NAME, &e))?,
                false => one.transposed(),
            };
            q.extend(one.codes.iter());
            scale.extend(one.scales.iter());
            q_t.extend(other.codes.iter());
            scale_t.extend(other.scales.iter());
        }
        Ok(vec![
            Tensor::from_vec(&outputs[0].shape, q).reinterpret(DType::F8E4M3),
            Tensor::from_vec(&outputs[1].shape, scale),
            Tensor::from_vec(&outputs[2].shape, q_t).reinterpret(DType::F8E4M3),
            Tensor::from_vec(&outputs[3].shape, scale_t),
        ])
    }
}
