//! `clip_factor`: the norm of all gradients and what they are multiplied by: clipping by global
//! norm (arXiv 1211.5063). Arithmetic is in F32 (F64 for F64 masters), every operation rounded by
//! itself to nearest even: no fma.

use fathom_numerics::reduce::tree_sum;
use fathom_trace::{DType, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::compute_type::{REALS, Real};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// The norm of all tensors and what gradients are multiplied by: `norm` = root of the halving
/// tree's sum over `partials`, `factor` = min(1, max_norm / (norm + 1e-6)); NaN where the norm is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClipFactor {
    /// Largest norm that is left as it is; none: the factor is 1 for every finite norm.
    pub max_norm: Option<f64>,
}

impl Op for ClipFactor {
    const NAME: &'static str = "clip_factor";
    const INPUTS: &'static [Role] = &[input("partials")];
    const OUTPUTS: &'static [&'static str] = &["norm", "factor"];
    const CLASS: OpClass = OpClass::Stream;

    fn example() -> Example {
        let tensors = 3;
        Example::new(ClipFactor { max_norm: Some(0.125) })
            .positive("partials", DType::F32, shape![tensors])
            .output("norm", shape![1])
            .output("factor", shape![1])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(partials)] = inputs else { unreachable!("mandatory") };
        rules::dtype(partials, REALS)?;
        rules::rank(partials, 1, "[tensors]")?;
        let scalar = |role| rules::meta(role, partials.dtype, &[1]);
        Ok(vec![scalar("norm"), scalar("factor")])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        inputs[0].as_ref().expect("mandatory").elements()
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let partials = inputs.into_iter().flatten().next().expect("mandatory");
        let dtype = partials.dtype();
        let [norm, factor] = match dtype {
            DType::F64 => {
                let norm = tree_sum(&mut partials.into_vec::<f64>()).sqrt();
                [norm, self.factor(norm)]
            }
            _ => {
                let norm = tree_sum(&mut partials.into_vec::<f32>()).sqrt();
                [f64::from(norm), f64::from(self.factor(norm))]
            }
        };
        let scalar = |x: f64| f64::store(vec![x], &[1], dtype);
        Ok(vec![scalar(norm), scalar(factor)])
    }
}

impl ClipFactor {
    fn factor<R: Real>(&self, norm: R) -> R {
        let Some(max) = self.max_norm else {
            return if norm.is_nan() { norm } else { R::ONE };
        };
        let factor = R::from_f64(max) / (norm + R::from_f64(1e-6));
        if factor > R::ONE { R::ONE } else { factor }
    }
}

#[cfg(test)]
mod tests {
    use fathom_numerics::reduce::RowTree;

    use super::super::sum_of_squares::{BLOCK, SumOfSquares};
    use super::*;

    fn f32s(values: &[f32]) -> Option<Tensor> {
        Some(Tensor::from_vec(&[values.len()], values.to_vec()))
    }

    #[test]
    fn the_norm_is_the_documented_tree_and_clips() {
        let x: Vec<f32> = (0..70_000).map(|i| ((i * 37 % 101) as f32 - 50.0) * 1e-3).collect();
        let partials = f32s(&[0.0, 9.0]);
        let out = Op::run(&SumOfSquares { slot: 0 }, vec![f32s(&x), partials]).unwrap();
        let row = RowTree::cta(256).with_vector(4);
        let blocks = [&x[..BLOCK], &x[BLOCK..]]
            .map(|x| row.fold(x.len(), |acc: f32, i| x[i].mul_add(x[i], acc)));
        assert_eq!(out[0].as_slice::<f32>(), [blocks[0] + blocks[1], 9.0]);
        let clip = |partials: &[f32], max_norm| {
            let out = Op::run(&ClipFactor { max_norm }, vec![f32s(partials)]).unwrap();
            [out[0].as_slice::<f32>()[0], out[1].as_slice::<f32>()[0]]
        };
        assert_eq!(clip(&[9.0, 16.0], Some(1.0)), [5.0, 1.0 / (5.0 + 1e-6f32)]);
        assert_eq!(clip(&[9.0, 16.0], Some(6.0)), [5.0, 1.0]);
        assert_eq!(clip(&[9.0, 16.0], None), [5.0, 1.0]);
        assert!(clip(&[f32::NAN], Some(1.0))[1].is_nan());
    }
}
