//! `ema`: an exponential moving average of a parameter. Arithmetic is in F32 (F64 for F64 masters),
//! every operation rounded by itself to nearest even: no fma.

use fathom_trace::{DType, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::compute_type::{REALS, Real, in_real};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// `e' = e + rate * (w - e)`: an exponential moving average with decay 1 - rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Ema {
    /// Share of the new value.
    pub rate: f64,
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
        3 * inputs[0].as_ref().expect("mandatory").elements()
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
    fn an_average_moves_by_its_rate() {
        let out = Op::run(&Ema { rate: 0.25 }, vec![f32s(&[1.0, 0.0]), f32s(&[3.0, -4.0])]);
        assert_eq!(out.unwrap()[0].as_slice::<f32>(), [1.5, -1.0]);
    }
}
