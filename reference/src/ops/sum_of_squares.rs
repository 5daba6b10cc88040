//! `sum_of_squares`: the squares of a tensor added up by a fixed tree, for the global norm.

use fathom_numerics::reduce::{RowTree, tensor_sum_of_squares, tree_sum};
use fathom_trace::{DType, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::compute_type::{REALS, Real, compute_dtype, in_real};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// Elements whose squares one row of the tree adds up.
pub const BLOCK: usize = 1 << 16;

/// Element `slot` of `partials` becomes the sum of the squares of x: blocks of 65,536 elements,
/// each over 256 lanes of 4 (`RowTree::cta(256).with_vector(4)`, chains of fma), the blocks' sums
/// by the halving tree.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SumOfSquares {
    /// Which partial sum.
    pub slot: usize,
}

/// The tree of [`SumOfSquares`] in either real type; f32 has a vectorised form of the same bits.
fn sum_of_squares<R: Real>(x: &Tensor) -> R {
    let row = RowTree::cta(256).with_vector(4);
    if x.dtype() != DType::F64 {
        return R::from_f64(tensor_sum_of_squares(&f32::load(x), BLOCK, row).into());
    }
    let square = |acc: f64, x: f64| x.mul_add(x, acc);
    let sum = |x: &[f64]| row.fold(x.len(), |acc, i| square(acc, x[i]));
    R::from_f64(tree_sum(&mut x.as_slice::<f64>().chunks(BLOCK).map(sum).collect::<Vec<_>>()))
}

impl Op for SumOfSquares {
    const NAME: &'static str = "sum_of_squares";
    const INPUTS: &'static [Role] = &[input("x"), input("partials")];
    const OUTPUTS: &'static [&'static str] = &["partials"];
    const CLASS: OpClass = OpClass::Stream;

    fn example() -> Example {
        let (n, tensors) = (20, 3);
        Example::new(SumOfSquares { slot: 1 })
            .input("x", DType::F32, shape![n])
            .positive("partials", DType::F32, shape![tensors])
            .output("partials", shape![tensors])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x), Some(partials)] = inputs else { unreachable!("mandatory") };
        rules::dtype(x, REALS)?;
        rules::dtype(partials, &[compute_dtype(x.dtype)])?;
        rules::rank(partials, 1, "[tensors]")?;
        if self.slot >= partials.shape[0] {
            let message = format!("slot {} of {} partial sums", self.slot, partials.shape[0]);
            return Err(OpError::Undefined { op: Self::NAME, message });
        }
        Ok(vec![partials.clone()])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        2 * inputs[0].as_ref().expect("mandatory").elements()
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let Ok([Some(x), Some(partials)]) = <[_; 2]>::try_from(inputs) else {
            unreachable!("mandatory")
        };
        Ok(in_real!(x.dtype(), R => {
            let (dtype, shape) = (partials.dtype(), partials.shape().to_vec());
            let mut partials = partials.into_vec::<R>();
            partials[self.slot] = sum_of_squares::<R>(&x);
            vec![R::store(partials, &shape, dtype)]
        }))
    }
}
