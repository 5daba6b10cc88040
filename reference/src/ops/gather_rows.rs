//! `gather_rows`: rows of a table by index, the embedding.

use fathom_trace::{DType, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::cast::Cast;
use crate::Tensor;
use crate::op::compute_type::{FLOATS, castable};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// Row t of `y` is row `ids[t]` of `table`: an embedding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GatherRows {
    /// Element type of `y`.
    pub out: DType,
}

/// The ids as row numbers of a table of `height` rows.
///
/// # Errors
/// [`OpError::Undefined`] naming the first id outside the table.
pub(super) fn row_ids(
    op: &'static str,
    ids: &Tensor,
    height: usize,
) -> Result<Vec<usize>, OpError> {
    let row = |(t, &id): (usize, &i32)| {
        usize::try_from(id).ok().filter(|&id| id < height).ok_or_else(|| OpError::Undefined {
            op,
            message: format!("id {id} at position {t} is outside the table of {height} rows"),
        })
    };
    ids.as_slice::<i32>().iter().enumerate().map(row).collect()
}

impl Op for GatherRows {
    const NAME: &'static str = "gather_rows";
    const INPUTS: &'static [Role] = &[input("table"), input("ids")];
    const OUTPUTS: &'static [&'static str] = &["y"];
    const CLASS: OpClass = OpClass::Gather;

    fn example() -> Example {
        let (t, rows, columns) = (3, 4, 5);
        Example::new(GatherRows { out: DType::F32 })
            .input("table", DType::BF16, shape![rows, columns])
            .indices("ids", shape![t], &[3, 0, 3])
            .output("y", shape![t, columns])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(table), Some(ids)] = inputs else { unreachable!("mandatory") };
        rules::dtype(table, FLOATS)?;
        rules::rank(table, 2, "[rows, columns]")?;
        rules::dtype(ids, &[DType::I32])?;
        rules::rank(ids, 1, "[t]")?;
        castable(Self::NAME, table.dtype, self.out)?;
        Ok(vec![rules::meta("y", self.out, &[ids.shape[0], table.shape[1]])])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        0
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(table), Some(ids)] = &inputs[..] else { unreachable!("mandatory") };
        let (height, width) = (table.shape()[0], table.shape()[1]);
        let ids = row_ids(Self::NAME, ids, height)?;
        let bytes = width * table.dtype().size();
        let y = Tensor::filled(table.dtype(), &[ids.len(), width], |y| {
            for (y, &id) in y.chunks_exact_mut(bytes.max(1)).zip(&ids) {
                y.copy_from_slice(&table.bytes()[id * bytes..][..bytes]);
            }
        });
        Op::run(&Cast { out: self.out }, vec![Some(y)])
    }
}
