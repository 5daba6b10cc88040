//! Exchanges between ranks. Each names its group; with one member it is the identity, and only
//! then can the host compute it. `meta` records them for any group.

use fathom_trace::{DType, Group, GroupKind, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::example::{Example, Shape, ceil, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// Refuses groups that a single process cannot serve.
pub(super) fn alone(op: &'static str, group: Group) -> Result<(), OpError> {
    if group.size == 1 {
        return Ok(());
    }
    let message = format!(
        "a group of {} ranks ({:?}) cannot be computed by one process; use backend meta",
        group.size, group.kind
    );
    Err(OpError::Undefined { op, message })
}

macro_rules! collectives {
    ($($(#[$doc:meta])* $name:ident $op:literal $shape:expr, $sent:expr, $y:expr;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            /// The ranks that take part.
            pub group: Group,
        }

        impl Op for $name {
            const NAME: &'static str = $op;
            const CLASS: OpClass = OpClass::Collective;
            const INPUTS: &'static [Role] = &[input("x")];
            const OUTPUTS: &'static [&'static str] = &["y"];

            fn example() -> Example {
                let (rows, columns, size) = (3, 4, 1);
                let y: fn(usize, usize, usize) -> Shape = $y;
                Example::new($name { group: Group { kind: GroupKind::Dp, size } })
                    .input("x", DType::BF16, shape![rows, columns])
                    .output("y", y(rows, columns, size))
            }

            fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
                let [Some(x)] = inputs else { unreachable!("mandatory") };
                rules::at_least_one(Self::NAME, "group.size", self.group.size)?;
                let rows: fn(usize, usize) -> usize = $shape;
                let Some((&first, rest)) = x.shape.split_first() else {
                    return rules::rank(x, 1, "at least one dimension").map(|()| Vec::new());
                };
                let first = rows(first, self.group.size);
                let shape: Vec<usize> = [&[first], rest].concat();
                Ok(vec![rules::meta("y", x.dtype, &shape)])
            }

            fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
                0
            }

            fn bytes_sent(&self, inputs: &[Option<TensorMeta>]) -> u64 {
                let x = inputs[0].as_ref().expect("mandatory");
                let sent: fn(u64, u64) -> u64 = $sent;
                sent(x.bytes(), self.group.size as u64)
            }

            fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
                alone(Self::NAME, self.group)?;
                Ok(inputs.into_iter().flatten().collect())
            }
        }
    )*};
}

collectives! {
    /// Every rank gets the sum over ranks (a ring sends 2 (n - 1) / n of the bytes).
    AllReduce "all_reduce" |rows, _| rows, |bytes, n| 2 * bytes * (n - 1) / n,
        |rows, columns, _| shape![rows, columns];
    /// Every rank gets its share of the sum's rows.
    ReduceScatter "reduce_scatter" |rows, n| rows.div_ceil(n), |bytes, n| bytes * (n - 1) / n,
        |rows, columns, size| shape![ceil(rows, size), columns];
    /// Every rank gets the rows of all, in order of rank.
    AllGather "all_gather" |rows, n| rows * n, |bytes, n| bytes * (n - 1),
        |rows, columns, size| shape![rows * size, columns];
    /// To the next pipeline stage (or the one before, in the backward).
    Send "send" |rows, _| rows, |bytes, n| if n > 1 { bytes } else { 0 },
        |rows, columns, _| shape![rows, columns];
    /// From the pipeline stage before; `x` gives the shape that arrives.
    Recv "recv" |rows, _| rows, |_, _| 0,
        |rows, columns, _| shape![rows, columns];
}
