//! `dequantize`: codes with scales to their values `q * scale`, one multiplication in F32, rounded
//! to `out`. The arithmetic is `fathom_numerics::quant::dequantize`.

use fathom_trace::{DType, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::codes::{Block, extents, kept, values};
use crate::op::compute_type::{FLOATS, Real};
use crate::op::example::{Example, ceil, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// The values of codes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Dequantize {
    /// Columns of the result.
    pub columns: usize,
    /// Which elements share a scale.
    pub block: Block,
    /// Element type of the result.
    pub out: DType,
}

impl Op for Dequantize {
    const NAME: &'static str = "dequantize";
    const INPUTS: &'static [Role] = &[input("q"), input("scale")];
    const OUTPUTS: &'static [&'static str] = &["x"];
    const CLASS: OpClass = OpClass::Convert;

    fn example() -> Example {
        let (r, columns, block) = (3, 6, [1, 4]);
        Example::new(Dequantize { columns, block: block.map(Some), out: DType::BF16 })
            .input("q", DType::F8E4M3, shape![r, columns])
            .positive("scale", DType::F32, shape![ceil(r, block[0]), ceil(columns, block[1])])
            .output("x", shape![r, columns])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(q), scale] = inputs else { unreachable!("mandatory") };
        extents(Self::NAME, &[("block", self.block)])?;
        let shape = kept(q, scale.as_ref(), self.columns, self.block)?;
        rules::dtype(&rules::meta("out", self.out, &[]), &FLOATS[..2])?;
        Ok(vec![rules::meta("x", self.out, &shape)])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        (inputs[0].as_ref().expect("mandatory").shape[0] * self.columns) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(q), scale] = &inputs[..] else { unreachable!("mandatory") };
        let x = values(q, scale.as_ref(), self.columns, self.block);
        let shape = [x.nrows(), x.ncols()];
        let x = x.as_standard_layout().into_owned().into_raw_vec_and_offset().0;
        Ok(vec![f32::store(x, &shape, self.out)])
    }
}
