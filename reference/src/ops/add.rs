//! `add`: a sum of two or three tensors, element by element, rounded once to nearest even.

use fathom_trace::{DType, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::compute_type::{FLOATS, Real, compute_dtype, in_real, loaded, stored};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, optional, rules};

/// `y = (a + b) + c`, the sums in F32 (F64), rounded to `out` once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Add {
    /// Element type of `y`.
    pub out: DType,
}

impl Op for Add {
    const NAME: &'static str = "add";
    const INPUTS: &'static [Role] = &[input("a"), input("b"), optional("c")];
    const OUTPUTS: &'static [&'static str] = &["y"];
    const CLASS: OpClass = OpClass::Stream;

    fn example() -> Example {
        let (t, columns) = (3, 5);
        let x = || shape![t, columns];
        Example::new(Add { out: DType::BF16 })
            .input("a", DType::BF16, x())
            .input("b", DType::BF16, x())
            .input("c", DType::BF16, x())
            .output("y", x())
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(a), b, c] = inputs else { unreachable!("mandatory") };
        rules::dtype(a, FLOATS)?;
        let compute = compute_dtype(a.dtype);
        for other in [b, c].into_iter().flatten() {
            loaded(other, compute)?;
            rules::shape(other, &a.shape)?;
        }
        stored(Self::NAME, self.out, compute)?;
        Ok(vec![rules::meta("y", self.out, &a.shape)])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let a = inputs[0].as_ref().expect("mandatory");
        a.elements() * (inputs.iter().flatten().count() as u64 - 1)
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let mut inputs = inputs.into_iter().flatten();
        let a = inputs.next().expect("mandatory");
        let shape = a.shape().to_vec();
        Ok(in_real!(a.dtype(), R => {
            let mut sum = match a.dtype() {
                DType::BF16 => R::load(&a).into_owned(),
                _ => a.into_vec::<R>(),
            };
            for other in inputs {
                sum.iter_mut().zip(&*R::load(&other)).for_each(|(s, &o)| *s += o);
            }
            vec![R::store(sum, &shape, self.out)]
        }))
    }
}
