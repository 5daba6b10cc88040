//! `grouped_gemm` by the kernels of [`super::gemm`]: the rows of experts, or their ranges of k, are
//! bounds that the kernel finds its tile in.

use fathom_reference::ops::gemm::{GemmShape, Layout};
use fathom_reference::ops::grouped_gemm::GroupedGemm;
use fathom_trace::TensorMeta;

use super::gemm::{self, Grouping, Ranges};
use super::{Kernel, mandatory, roles};
use crate::device::{Gpu, GpuError};
use crate::tensor::DeviceTensor;

impl Kernel for GroupedGemm {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [a, b, c] = roles(inputs);
        let (a, b) = (mandatory(a), mandatory(b));
        let (rows, columns) = a.rows_columns();
        let (n, experts) = match self.layout {
            Layout::Nt => (b.shape()[1], b.shape()[0]),
            Layout::Nn => (b.shape()[2], b.shape()[0]),
            Layout::Tn => (b.shape()[1], self.counts.len()),
        };
        let lengths = self.counts.clone();
        let (ranges, shape) = if self.layout == Layout::Tn {
            let shape = GemmShape { m: columns, n, k: rows };
            let grouping = Grouping::GroupDepth;
            (Ranges { grouping, lengths, shape }, vec![experts, columns, n])
        } else {
            let shape = GemmShape { m: rows, n, k: columns };
            (Ranges { grouping: Grouping::Rows, lengths, shape }, vec![rows, n])
        };
        Ok(vec![gemm::launch(gpu, self.layout, &ranges, [&a, &b], c, (self.out, &shape))?])
    }
}
