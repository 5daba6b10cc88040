//! `attention_latent` by the kernels of [`super::attention`]: one key head, a row of the cache,
//! whose first columns are the values.

use fathom_reference::ops::attention::Heads;
use fathom_reference::ops::attention_latent::AttentionLatent;
use fathom_trace::TensorMeta;

use super::attention::{self, Operands, Segments};
use super::{Kernel, mandatory, roles};
use crate::device::{Gpu, GpuError};
use crate::tensor::DeviceTensor;

/// The heads of the absorbed form, on a cache of so many columns.
fn heads(op: &AttentionLatent, columns: usize) -> Heads {
    Heads { heads: op.heads, kv_heads: 1, qk: columns, v: op.rank }
}

impl Kernel for AttentionLatent {
    fn covers(&self, inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        let cache = inputs[1].as_ref().expect("mandatory");
        attention::covers(heads(self, cache.shape[1]), self.block_kv, cache.dtype)
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [q, cache] = roles(inputs).map(mandatory);
        let shape = heads(self, cache.shape()[1]);
        let operands = Operands { shape, q: &q, k: &cache, v: &cache, first_v: 0 };
        let segments = Segments::new(&[q.shape()[0]], &[cache.shape()[0]]);
        Ok(vec![attention::forward(gpu, &operands, &segments, self.scale, false)?.0])
    }
}
