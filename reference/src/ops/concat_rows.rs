//! `concat_rows`: matrices one above the other; a cache grows.

use fathom_trace::{DType, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// Rows of `a`, then rows of `b`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConcatRows {}

impl Op for ConcatRows {
    const NAME: &'static str = "concat_rows";
    const INPUTS: &'static [Role] = &[input("a"), input("b")];
    const OUTPUTS: &'static [&'static str] = &["y"];
    const CLASS: OpClass = OpClass::Stream;

    fn example() -> Example {
        let (a, b, columns) = (3, 1, 4);
        Example::new(ConcatRows {})
            .input("a", DType::BF16, shape![a, columns])
            .input("b", DType::BF16, shape![b, columns])
            .output("y", shape![a + b, columns])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(a), Some(b)] = inputs else { unreachable!("mandatory") };
        rules::rank(a, 2, "[rows, columns]")?;
        rules::dtype(b, &[a.dtype])?;
        rules::rank(b, 2, "[rows, columns]")?;
        rules::shape(b, &[b.shape[0], a.shape[1]])?;
        Ok(vec![rules::meta("y", a.dtype, &[a.shape[0] + b.shape[0], a.shape[1]])])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        0
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(a), Some(b)] = &inputs[..] else { unreachable!("mandatory") };
        let shape = [a.shape()[0] + b.shape()[0], a.shape()[1]];
        let y = Tensor::filled(a.dtype(), &shape, |y| {
            let (upper, lower) = y.split_at_mut(a.bytes().len());
            upper.copy_from_slice(a.bytes());
            lower.copy_from_slice(b.bytes());
        });
        Ok(vec![y])
    }
}
