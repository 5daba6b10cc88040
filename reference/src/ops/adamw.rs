//! `adamw`: a step of AdamW (arXiv 1711.05101; BF16 moments and FP32 masters: DeepSeek-V3 report,
//! section 3.3.3).
//!
//! Arithmetic is in F32 (F64 for F64 masters), every operation rounded by itself to nearest even:
//! no fma. Numbers that a schedule or a step count gives (`decay`, `step_size`, ...) are computed
//! in F64 on the host and rounded once.

use fathom_trace::{DType, OpClass, TensorMeta};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::compute_type::{FLOATS, REALS, Real, in_real};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// Elements that a thread updates at a time; no bit depends on it.
const CHUNK: usize = 1 << 14;

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
        15 * inputs[0].as_ref().expect("mandatory").elements()
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
            let [mut m, mut v] = [m, v].map(R::load_owned);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn f32s(values: &[f32]) -> Option<Tensor> {
        Some(Tensor::from_vec(&[values.len()], values.to_vec()))
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
}
