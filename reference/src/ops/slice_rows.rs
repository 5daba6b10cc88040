//! `slice_rows`: some rows of a matrix; a cache is cut back.

use fathom_trace::{DType, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// Rows `offset .. offset + rows` of `x`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SliceRows {
    /// The first row that is taken.
    pub offset: usize,
    /// How many rows are taken.
    pub rows: usize,
}

impl Op for SliceRows {
    const NAME: &'static str = "slice_rows";
    const INPUTS: &'static [Role] = &[input("x")];
    const OUTPUTS: &'static [&'static str] = &["y"];
    const CLASS: OpClass = OpClass::Stream;

    fn example() -> Example {
        let (height, rows, columns) = (5, 2, 4);
        Example::new(SliceRows { offset: 1, rows })
            .input("x", DType::BF16, shape![height, columns])
            .output("y", shape![rows, columns])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x)] = inputs else { unreachable!("mandatory") };
        rules::rank(x, 2, "[rows, columns]")?;
        if x.shape[0] < self.offset + self.rows {
            let expected = format!("[{} + {} or more, columns]", self.offset, self.rows);
            return Err(OpError::Shape { role: "x".into(), expected, found: x.shape.clone() });
        }
        Ok(vec![rules::meta("y", x.dtype, &[self.rows, x.shape[1]])])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        0
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(x)] = &inputs[..] else { unreachable!("mandatory") };
        let row = x.shape()[1] * x.dtype().size();
        let bytes = &x.bytes()[self.offset * row..][..self.rows * row];
        Ok(vec![Tensor::from_bytes(x.dtype(), &[self.rows, x.shape()[1]], bytes)])
    }
}
