//! `grouped_gemm_fp8` by the kernel of [`super::fp8`]: the rows of experts are bounds that the
//! kernel finds its tile in.

use fathom_numerics::gemm::Accumulate;
use fathom_reference::ops::gemm::GemmShape;
use fathom_reference::ops::grouped_gemm_fp8::GroupedGemmFp8;
use fathom_trace::TensorMeta;

use super::gemm::{Grouping, Ranges};
use super::{Kernel, fp8, mandatory, roles};
use crate::device::{Gpu, GpuError};
use crate::tensor::DeviceTensor;

impl Kernel for GroupedGemmFp8 {
    fn covers(&self, inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        let k = inputs[0].as_ref().expect("mandatory").shape[1];
        fp8::covers(self.promotion_interval, k, [self.a_tile, self.b_block])
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [a, a_scale, b, b_scale] = roles(inputs).map(mandatory);
        let shape = GemmShape { m: a.shape()[0], n: b.shape()[1], k: a.shape()[1] };
        let product = fp8::Product {
            ranges: Ranges { grouping: Grouping::Rows, lengths: self.counts.clone(), shape },
            a: fp8::Operand { codes: &a, scales: &a_scale, block: self.a_tile },
            b: fp8::Operand { codes: &b, scales: &b_scale, block: self.b_block },
            promotion_interval: self.promotion_interval,
            accumulate: Accumulate::Overwrite,
            out: self.out,
        };
        Ok(vec![product.launch(gpu, None, &[shape.m, shape.n])?])
    }
}
