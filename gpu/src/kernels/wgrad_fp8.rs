//! `wgrad_fp8` by the kernel of [`super::fp8`]: k in segments that are chained into one gradient,
//! or in ranges of experts with a gradient each; the sums start from the old gradient.

use fathom_numerics::gemm::Accumulate;
use fathom_reference::ops::gemm::GemmShape;
use fathom_reference::ops::wgrad_fp8::WgradFp8;
use fathom_trace::{DType, TensorMeta};

use super::gemm::{Grouping, Ranges};
use super::{Kernel, fp8, mandatory, roles};
use crate::device::{Gpu, GpuError};
use crate::tensor::DeviceTensor;

impl Kernel for WgradFp8 {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        let longest = self.segments.iter().copied().max().unwrap_or(0);
        fp8::covers(self.promotion_interval, longest, [self.dy_block, self.x_block])
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [dy, dy_scale, x, x_scale, acc] = roles(inputs).map(mandatory);
        let shape = GemmShape { m: dy.shape()[0], n: x.shape()[0], k: dy.shape()[1] };
        let grouping = if self.grouped { Grouping::GroupDepth } else { Grouping::Depth };
        let product = fp8::Product {
            ranges: Ranges { grouping, lengths: self.segments.clone(), shape },
            a: fp8::Operand { codes: &dy, scales: &dy_scale, block: self.dy_block },
            b: fp8::Operand { codes: &x, scales: &x_scale, block: self.x_block },
            promotion_interval: self.promotion_interval,
            accumulate: Accumulate::Chain,
            out: DType::F32,
        };
        let like = acc.shape().to_vec();
        Ok(vec![product.launch(gpu, Some(acc), &like)?])
    }
}
