//! `scatter_add_rows`: rows added onto those of a table by index, in ascending order; the
//! embedding's gradient. Sums are rounded once, to nearest even.

use fathom_trace::{DType, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::gather_rows::row_ids;
use crate::Tensor;
use crate::op::compute_type::{FLOATS, Real, compute_dtype, in_real, loaded, stored};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// Row `ids[t]` of the result gets row t of `x` added, t ascending, from `acc`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScatterAddRows {
    /// Element type of the result; the sums are rounded to it once.
    pub out: DType,
}

impl Op for ScatterAddRows {
    const NAME: &'static str = "scatter_add_rows";
    const INPUTS: &'static [Role] = &[input("x"), input("ids"), input("acc")];
    const OUTPUTS: &'static [&'static str] = &["y"];
    const CLASS: OpClass = OpClass::Scatter;

    fn example() -> Example {
        let (t, rows, columns) = (3, 4, 5);
        Example::new(ScatterAddRows { out: DType::F32 })
            .input("x", DType::BF16, shape![t, columns])
            .indices("ids", shape![t], &[1, 3, 1])
            .input("acc", DType::F32, shape![rows, columns])
            .output("y", shape![rows, columns])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x), Some(ids), Some(acc)] = inputs else { unreachable!("mandatory") };
        rules::dtype(x, FLOATS)?;
        rules::rank(x, 2, "[t, columns]")?;
        rules::dtype(ids, &[DType::I32])?;
        rules::shape(ids, &x.shape[..1])?;
        let compute = compute_dtype(x.dtype);
        loaded(acc, compute)?;
        rules::rank(acc, 2, "[rows, columns]")?;
        rules::shape(acc, &[acc.shape[0], x.shape[1]])?;
        stored(Self::NAME, self.out, compute)?;
        Ok(vec![rules::meta("y", self.out, &acc.shape)])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        inputs[0].as_ref().expect("mandatory").elements()
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [x, ids, acc] = inputs.try_into().expect("three roles");
        let (x, acc) = (x.expect("mandatory"), acc.expect("mandatory"));
        let (height, width) = (acc.shape()[0], acc.shape()[1]);
        let ids = row_ids(Self::NAME, &ids.expect("mandatory"), height)?;
        let compute = compute_dtype(x.dtype());
        Ok(in_real!(compute, R => {
            let mut y = if acc.dtype() == compute {
                acc.into_vec::<R>()
            } else {
                R::load(&acc).into_owned()
            };
            for (x, id) in R::load(&x).chunks(width.max(1)).zip(ids) {
                y[id * width..][..width].iter_mut().zip(x).for_each(|(y, &x)| *y += x);
            }
            vec![R::store(y, &[height, width], self.out)]
        }))
    }
}
