//! Ops of the optimizer: `sum_of_squares`, `clip_factor`, `adamw`, `ema`.
//!
//! Arithmetic is in F32 (F64 for F64 masters), every operation rounded by itself to nearest even:
//! no fma. Numbers that a schedule or a step count gives (`decay`, `step_size`, ...) are computed
//! in F64 on the host and rounded once. Sources: AdamW, arXiv 1711.05101; BF16 moments and FP32
//! masters, DeepSeek-V3 report, section 3.3.3; clipping by global norm, arXiv 1211.5063.

use fathom_numerics::reduce::{RowTree, tensor_sum_of_squares, tree_sum};
use fathom_trace::{DType, OpClass, TensorMeta};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::example::{Example, shape};
use super::real::{FLOATS, REALS, Real, compute_dtype, in_real};
use super::{Op, OpError, Role, input, rules};
use crate::Tensor;

/// Elements whose squares one row of the tree adds up.
const BLOCK: usize = 1 << 16;

/// Elements that a thread updates at a time; no bit depends on it.
const CHUNK: usize = 1 << 14;

/// Element `slot` of `partials` becomes the sum of the squares of x: blocks of 65,536 elements,
/// each over 256 lanes of 4 (`RowTree::cta(256).with_vector(4)`, chains of fma), the blocks' sums
/// by the halving tree.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SumOfSquares {
    /// Which partial sum.
    pub slot: usize,
}

/// The norm of all tensors and what gradients are multiplied by: `norm` = root of the halving
/// tree's sum over `partials`, `factor` = min(1, max_norm / (norm + 1e-6)); NaN where the norm is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClipFactor {
    /// Largest norm that is left as it is; none: the factor is 1 for every finite norm.
    pub max_norm: Option<f64>,
}

/// A step of AdamW:
///
/// ```text
/// g  = grad * factor
/// m' = beta1 * m + (1 - beta1) * g
/// v' = beta2 * v + (1 - beta2) * (g * g)
/// w' = decay * w - step_size * (m' / (sqrt(v') / correction + eps))
/// ```
///
/// m' and v' enter w' as computed and are rounded to their tensors' type when stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// 1 - learning rate * weight decay; 1 for tensors that do not decay.
    pub decay: f64,
    /// Learning rate / (1 - beta1^t), t counted from 1.
    pub step_size: f64,
    /// sqrt(1 - beta2^t).
    pub correction: f64,
}

/// `e' = e + rate * (w - e)`: an exponential moving average with decay 1 - rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Ema {
    /// Share of the new value.
    pub rate: f64,
}

fn elements(tensor: Option<&TensorMeta>) -> u64 {
    tensor.expect("mandatory").shape.iter().map(|&d| d as u64).product()
}

/// The tree of [`SumOfSquares`] in either real type; f32 has a vectorised form of the same bits.
fn sum_of_squares<R: Real>(x: &Tensor) -> R {
    let row = RowTree::cta(256).with_vector(4);
    if x.dtype() != DType::F64 {
        return R::from_f64(tensor_sum_of_squares(&f32::load(x), BLOCK, row).into());
    }
    let square = |acc: f64, x: f64| x.mul_add(x, acc);
    let sum = |x: &[f64]| row.fold(x.len(), |acc, i| square(acc, x[i]));
    R::from_f64(tree_sum(&mut x.as_slice::<f64>().chunks(BLOCK).map(sum).collect::<Vec<_>>()))
}

impl Op for SumOfSquares {
    const NAME: &'static str = "sum_of_squares";
    const INPUTS: &'static [Role] = &[input("x"), input("partials")];
    const OUTPUTS: &'static [&'static str] = &["partials"];
    const CLASS: OpClass = OpClass::Stream;

    fn example() -> Example {
        let (n, tensors) = (20, 3);
        Example::new(SumOfSquares { slot: 1 })
            .input("x", DType::F32, shape![n])
            .positive("partials", DType::F32, shape![tensors])
            .output("partials", shape![tensors])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x), Some(partials)] = inputs else { unreachable!("mandatory") };
        rules::dtype(x, REALS)?;
        rules::dtype(partials, &[compute_dtype(x.dtype)])?;
        rules::rank(partials, 1, "[tensors]")?;
        if self.slot >= partials.shape[0] {
            let message = format!("slot {} of {} partial sums", self.slot, partials.shape[0]);
            return Err(OpError::Undefined { op: Self::NAME, message });
        }
        Ok(vec![partials.clone()])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        2 * elements(inputs[0].as_ref())
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let Ok([Some(x), Some(partials)]) = <[_; 2]>::try_from(inputs) else {
            unreachable!("mandatory")
        };
        Ok(in_real!(x.dtype(), R => {
            let (dtype, shape) = (partials.dtype(), partials.shape().to_vec());
            let mut partials = partials.into_vec::<R>();
            partials[self.slot] = sum_of_squares::<R>(&x);
            vec![R::store(partials, &shape, dtype)]
        }))
    }
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
        elements(inputs[0].as_ref())
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

impl Op for AdamW {
    const NAME: &'static str = "adamw";
    const INPUTS: &'static [Role] =
        &[input("w"), input("m"), input("v"), input("grad"), input("factor")];
    const OUTPUTS: &'static [&'static str] = &["w", "m", "v"];
    const CLASS: OpClass = OpClass::Stream;

    fn example() -> Example {
        let n = 20;
        let (beta1, beta2, eps, decay) = (0.9, 0.95, 1e-8, 0.9999);
        Example::new(AdamW { beta1, beta2, eps, decay, step_size: 1e-3, correction: 0.5 })
            .input("w", DType::F32, shape![n])
            .input("m", DType::BF16, shape![n])
            .positive("v", DType::BF16, shape![n])
            .input("grad", DType::F32, shape![n])
            .positive("factor", DType::F32, shape![1])
            .output("w", shape![n])
            .output("m", shape![n])
            .output("v", shape![n])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(w), Some(m), Some(v), Some(grad), Some(factor)] = inputs else {
            unreachable!("mandatory")
        };
        rules::dtype(w, REALS)?;
        let moments: &[DType] = if w.dtype == DType::F64 { &[DType::F64] } else { &FLOATS[..2] };
        for moment in [m, v] {
            rules::dtype(moment, moments)?;
            rules::shape(moment, &w.shape)?;
        }
        rules::dtype(grad, &[w.dtype])?;
        rules::shape(grad, &w.shape)?;
        rules::dtype(factor, &[w.dtype])?;
        rules::shape(factor, &[1])?;
        Ok(vec![w.clone(), m.clone(), v.clone()])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        15 * elements(inputs[0].as_ref())
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let Ok([Some(w), Some(m), Some(v), Some(grad), Some(factor)]) = <[_; 5]>::try_from(inputs)
        else {
            unreachable!("mandatory")
        };
        let (shape, dtype) = (w.shape().to_vec(), w.dtype());
        let types = [m.dtype(), v.dtype()];
        Ok(in_real!(dtype, R => {
            let mut w = w.into_vec::<R>();
            let [mut m, mut v] = [m, v].map(|t| R::load(&t).into_owned());
            let (grad, factor) = (grad.as_slice::<R>(), factor.as_slice::<R>()[0]);
            let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
            let rows = w.par_chunks_mut(CHUNK).zip(moments).zip(grad.par_chunks(CHUNK));
            rows.for_each(|((w, (m, v)), grad)| self.update(w, m, v, grad, factor));
            vec![
                R::store(w, &shape, dtype),
                R::store(m, &shape, types[0]),
                R::store(v, &shape, types[1]),
            ]
        }))
    }
}

impl AdamW {
    fn update<R: Real>(&self, w: &mut [R], m: &mut [R], v: &mut [R], grad: &[R], factor: R) {
        let of = |x: f64| R::from_f64(x);
        let (beta1, new1) = (of(self.beta1), of(1.0 - self.beta1));
        let (beta2, new2) = (of(self.beta2), of(1.0 - self.beta2));
        let (eps, decay, correction) = (of(self.eps), of(self.decay), of(self.correction));
        let step_size = of(self.step_size);
        for (((w, m), v), &grad) in w.iter_mut().zip(m).zip(v).zip(grad) {
            let g = grad * factor;
            *m = beta1 * *m + new1 * g;
            *v = beta2 * *v + new2 * (g * g);
            *w = decay * *w - step_size * (*m / (v.sqrt() / correction + eps));
        }
    }
}

impl Op for Ema {
    const NAME: &'static str = "ema";
    const INPUTS: &'static [Role] = &[input("e"), input("w")];
    const OUTPUTS: &'static [&'static str] = &["e"];
    const CLASS: OpClass = OpClass::Stream;

    fn example() -> Example {
        let n = 20;
        Example::new(Ema { rate: 0.25 })
            .input("e", DType::F32, shape![n])
            .input("w", DType::F32, shape![n])
            .output("e", shape![n])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(e), Some(w)] = inputs else { unreachable!("mandatory") };
        rules::dtype(e, REALS)?;
        rules::dtype(w, &[e.dtype])?;
        rules::shape(w, &e.shape)?;
        Ok(vec![e.clone()])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        3 * elements(inputs[0].as_ref())
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let Ok([Some(e), Some(w)]) = <[_; 2]>::try_from(inputs) else { unreachable!("mandatory") };
        let (shape, dtype) = (e.shape().to_vec(), e.dtype());
        Ok(in_real!(dtype, R => {
            let rate = R::from_f64(self.rate);
            let mut e = e.into_vec::<R>();
            e.iter_mut().zip(w.as_slice::<R>()).for_each(|(e, &w)| *e += rate * (w - *e));
            vec![R::store(e, &shape, dtype)]
        }))
    }
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn the_first_step_moves_by_the_learning_rate_and_decays() {
        // t = 1: m' / (1 - beta1) = g and sqrt(v' / (1 - beta2)) = |g|, all exact here.
        let op = AdamW {
            beta1: 0.5,
            beta2: 0.75,
            eps: 0.0,
            decay: 1.0 - 0.25 * 0.5,
            step_size: 0.25 / 0.5,
            correction: 0.5,
        };
        let zeros = || Some(Tensor::zeros(DType::BF16, &[2]));
        let inputs = vec![f32s(&[1.0, -2.0]), zeros(), zeros(), f32s(&[8.0, -4.0]), f32s(&[0.5])];
        let out = Op::run(&op, inputs).unwrap();
        assert_eq!(out[0].as_slice::<f32>(), [0.875 - 0.25, -1.75 + 0.25]);
        assert_eq!(out[1].dtype(), DType::BF16);
        assert_eq!(f32::load(&out[1])[..], [2.0, -1.0]);
        assert_eq!(f32::load(&out[2])[..], [4.0, 1.0]);
    }

    #[test]
    fn an_average_moves_by_its_rate() {
        let out = Op::run(&Ema { rate: 0.25 }, vec![f32s(&[1.0, 0.0]), f32s(&[3.0, -4.0])]);
        assert_eq!(out.unwrap()[0].as_slice::<f32>(), [1.5, -1.0]);
    }
}
