//! `cast`: a tensor in another element type, rounded once to nearest even.

use fathom_trace::{DType, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::compute_type::{FLOATS, Real, castable, in_real};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// `y` is `x` in another element type.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cast {
    /// Element type of `y`.
    pub out: DType,
}

impl Op for Cast {
    const NAME: &'static str = "cast";
    const INPUTS: &'static [Role] = &[input("x")];
    const OUTPUTS: &'static [&'static str] = &["y"];
    const CLASS: OpClass = OpClass::Stream;

    fn example() -> Example {
        let (t, columns) = (3, 5);
        Example::new(Cast { out: DType::BF16 })
            .input("x", DType::F32, shape![t, columns])
            .output("y", shape![t, columns])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x)] = inputs else { unreachable!("mandatory") };
        rules::dtype(x, FLOATS)?;
        castable(Self::NAME, x.dtype, self.out)?;
        Ok(vec![rules::meta("y", self.out, &x.shape)])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        0
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let x = inputs.into_iter().flatten().next().expect("mandatory");
        if x.dtype() == self.out {
            return Ok(vec![x]);
        }
        let wider = if self.out == DType::F64 { DType::F64 } else { x.dtype() };
        Ok(in_real!(wider, R => vec![R::store(R::load(&x).into_owned(), x.shape(), self.out)]))
    }
}
