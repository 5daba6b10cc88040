//! `slice_columns`: some columns of a matrix.

use fathom_trace::{DType, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// `y` is columns `offset .. offset + width` of `x`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SliceColumns {
    /// The first column that is taken.
    pub offset: usize,
    /// How many columns are taken.
    pub width: usize,
}

impl Op for SliceColumns {
    const NAME: &'static str = "slice_columns";
    const INPUTS: &'static [Role] = &[input("x")];
    const OUTPUTS: &'static [&'static str] = &["y"];
    const CLASS: OpClass = OpClass::Stream;

    fn example() -> Example {
        let (t, columns, width) = (2, 7, 3);
        Example::new(SliceColumns { offset: 2, width })
            .input("x", DType::BF16, shape![t, columns])
            .output("y", shape![t, width])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x)] = inputs else { unreachable!("mandatory") };
        rules::rank(x, 2, "[t, columns]")?;
        if x.shape[1] < self.offset + self.width {
            let expected = format!("[t, columns], columns >= {} + {}", self.offset, self.width);
            return Err(OpError::Shape { role: "x".into(), expected, found: x.shape.clone() });
        }
        Ok(vec![rules::meta("y", x.dtype, &[x.shape[0], self.width])])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        0
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(x)] = &inputs[..] else { unreachable!("mandatory") };
        let (t, size) = (x.shape()[0], x.dtype().size());
        let (from, to) = ((x.shape()[1] * size).max(1), (self.width * size).max(1));
        let y = Tensor::filled(x.dtype(), &[t, self.width], |y| {
            for (y, row) in y.chunks_exact_mut(to).zip(x.bytes().chunks_exact(from)) {
                y.copy_from_slice(&row[self.offset * size..][..self.width * size]);
            }
        });
        Ok(vec![y])
    }
}
