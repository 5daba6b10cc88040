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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, Reference};

    /// Packed codes with scales for blocks of several rows, as those of one byte: what each row
    /// gives with the scales of its own blocks.
    #[test]
    fn packed_codes_have_scales_of_any_block() {
        let (rows, columns) = (5, 11);
        let words: Vec<u32> = (0..rows * 6).map(|i| (i as u32).wrapping_mul(0x9E37_79B1)).collect();
        let q = Tensor::from_vec(&[rows, 6], words.clone());
        for block in [[Some(2), Some(4)], [None, Some(8)], [Some(3), None], [None, None]] {
            let [down, across] = crate::op::codes::scales(block, rows, columns);
            let scales: Vec<f32> = (1..=down * across).map(|i| i as f32 * 0.75).collect();
            let scale = Tensor::from_vec(&[down, across], scales.clone());
            let op = Dequantize { columns, block, out: DType::F32 };
            let found = Reference.dequantize(&op, &q, &scale).unwrap();
            let height = block[0].unwrap_or(rows);
            for row in 0..rows {
                let own = &scales[row / height * across..][..across];
                let scale = Tensor::from_vec(&[1, across], own.to_vec());
                let q = Tensor::from_vec(&[1, 6], words[row * 6..][..6].to_vec());
                let op = Dequantize { block: [Some(1), block[1]], ..op.clone() };
                let expected = Reference.dequantize(&op, &q, &scale).unwrap();
                let bytes = 4 * columns;
                assert_eq!(found.bytes()[row * bytes..][..bytes], *expected.bytes(), "{block:?}");
            }
        }
    }
}
