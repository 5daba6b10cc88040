//! `attention_cached` by the kernels of [`super::attention`]: keys and values lie side by side in
//! the rows of the cache.

use fathom_reference::ops::attention_cached::AttentionCached;
use fathom_trace::TensorMeta;

use super::attention::{self, Operands, Segments};
use super::{Kernel, mandatory, roles};
use crate::device::{Gpu, GpuError};
use crate::tensor::DeviceTensor;

impl Kernel for AttentionCached {
    fn covers(&self, inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        attention::covers(self.shape, self.block_kv, inputs[0].as_ref().expect("mandatory").dtype)
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [q, cache] = roles(inputs).map(mandatory);
        let first_v = self.shape.kv_heads * self.shape.qk;
        let operands = Operands { shape: self.shape, q: &q, k: &cache, v: &cache, first_v };
        let segments = Segments::new(&[q.shape()[0]], &[cache.shape()[0]]);
        Ok(vec![attention::forward(gpu, &operands, &segments, self.scale, false)?.0])
    }
}
