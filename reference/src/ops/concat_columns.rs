//! `concat_columns`: two or three matrices of as many rows side by side.

use fathom_trace::{DType, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, optional, rules};

/// `y` \[t, columns of a, b and c side by side\], one element type.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConcatColumns {}

impl Op for ConcatColumns {
    const NAME: &'static str = "concat_columns";
    const INPUTS: &'static [Role] = &[input("a"), input("b"), optional("c")];
    const OUTPUTS: &'static [&'static str] = &["y"];
    const CLASS: OpClass = OpClass::Stream;

    fn example() -> Example {
        let (t, a, b, c) = (2, 3, 1, 4);
        Example::new(ConcatColumns {})
            .input("a", DType::BF16, shape![t, a])
            .input("b", DType::BF16, shape![t, b])
            .input("c", DType::BF16, shape![t, c])
            .output("y", shape![t, a + b + c])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(a), ..] = inputs else { unreachable!("mandatory") };
        let mut columns = 0;
        for part in inputs.iter().flatten() {
            rules::dtype(part, &[a.dtype])?;
            rules::rank(part, 2, "[t, columns]")?;
            rules::shape(part, &[a.shape[0], part.shape[1]])?;
            columns += part.shape[1];
        }
        Ok(vec![rules::meta("y", a.dtype, &[a.shape[0], columns])])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        0
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let parts: Vec<Tensor> = inputs.into_iter().flatten().collect();
        let (dtype, t) = (parts[0].dtype(), parts[0].shape()[0]);
        let columns: usize = parts.iter().map(|p| p.shape()[1]).sum();
        let y = Tensor::filled(dtype, &[t, columns], |mut y| {
            for row in 0..t {
                for part in &parts {
                    let width = part.shape()[1] * dtype.size();
                    let (to, rest) = y.split_at_mut(width);
                    to.copy_from_slice(&part.bytes()[row * width..][..width]);
                    y = rest;
                }
            }
        });
        Ok(vec![y])
    }
}
