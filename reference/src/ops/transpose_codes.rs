//! `transpose_codes`: FP8 codes of one scale, transposed as they are: the operands of wgrad where
//! a cast chose one scale for a whole tensor, so that no second rounding is needed.
//!
//! The rows are cut into segments, as `transpose_quantize` cuts them; since a product takes a scale
//! a segment, each that is not empty gets a copy of the one scale.

use fathom_trace::{DType, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::codes::FP8;
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// The transpose of codes that share one scale.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TransposeCodes {
    /// Lengths that cut the rows; rows behind them are left out.
    pub segments: Vec<usize>,
}

impl TransposeCodes {
    /// How many copies of the scale there are: one a segment that has rows.
    pub fn scales(&self) -> usize {
        self.segments.iter().filter(|&&rows| rows > 0).count()
    }
}

impl Op for TransposeCodes {
    const NAME: &'static str = "transpose_codes";
    const INPUTS: &'static [Role] = &[input("q"), input("scale")];
    const OUTPUTS: &'static [&'static str] = &["q_t", "scale_t"];
    const CLASS: OpClass = OpClass::Stream;

    fn example() -> Example {
        let (rows, columns, taken) = (6, 4, 5);
        Example::new(TransposeCodes { segments: vec![3, 2] })
            .input("q", DType::F8E4M3, shape![rows, columns])
            .positive("scale", DType::F32, shape![1, 1])
            .output("q_t", shape![columns, taken])
            .output("scale_t", shape![1, 2])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(q), Some(scale)] = inputs else { unreachable!("mandatory") };
        rules::dtype(q, FP8)?;
        rules::rank(q, 2, "[rows, columns]")?;
        rules::dtype(scale, &[DType::F32])?;
        rules::shape(scale, &[1, 1])?;
        let taken: usize = self.segments.iter().sum();
        if taken > q.shape[0] {
            let message = format!("segments {:?} exceed the {} rows", self.segments, q.shape[0]);
            return Err(OpError::Undefined { op: Self::NAME, message });
        }
        Ok(vec![
            rules::meta("q_t", q.dtype, &[q.shape[1], taken]),
            rules::meta("scale_t", DType::F32, &[1, self.scales()]),
        ])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        0
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(q), Some(scale)] = &inputs[..] else { unreachable!("mandatory") };
        let (columns, taken) = (q.shape()[1], self.segments.iter().sum());
        let codes = q.bytes();
        let transposed: Vec<u8> =
            (0..columns).flat_map(|j| (0..taken).map(move |i| codes[i * columns + j])).collect();
        let scales = vec![scale.as_slice::<f32>()[0]; self.scales()];
        Ok(vec![
            Tensor::from_bytes(q.dtype(), &[columns, taken], &transposed),
            Tensor::from_vec(&[1, scales.len()], scales),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_move_and_every_segment_with_rows_has_the_scale() {
        for dtype in FP8 {
            let q = Tensor::from_bytes(*dtype, &[3, 2], &[1, 2, 3, 4, 5, 6]);
            let scale = Tensor::from_vec(&[1, 1], vec![0.25f32]);
            let op = TransposeCodes { segments: vec![1, 0, 1] };
            let out = op.run(vec![Some(q), Some(scale)]).unwrap();
            assert_eq!((out[0].dtype(), out[0].shape()), (*dtype, &[2, 2][..]));
            // The third row is behind the segments.
            assert_eq!(out[0].bytes(), [1, 3, 2, 4]);
            assert_eq!(out[1].as_slice::<f32>(), [0.25, 0.25]);
        }
        assert_eq!(TransposeCodes { segments: vec![1] }.flops(&[]), 0);
    }
}
