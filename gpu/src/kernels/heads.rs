//! What attention's heads are made of, by the kernels of `gpu/kernels/attention`: `rope`, `mla_kv`
//! with its gradient, and the absorbed projections of decoding.

use fathom_reference::ops::mla_absorb::{MlaAbsorbQuery, MlaAbsorbValue};
use fathom_reference::ops::mla_kv::{MlaKv, MlaKvBackward};
use fathom_reference::ops::rope::Rope;
use fathom_trace::TensorMeta;

use super::{Kernel, is_bf16, mandatory, roles};
use crate::compile::{Source, source};
use crate::device::{Gpu, GpuError};
use crate::launch::{Arg, LaunchConfig};
use crate::tensor::DeviceTensor;

/// Entry `rope`; constants `X_BF16`, `INTERLEAVED`, `INVERSE`.
const ROPE: Source<'static> = source!("attention/rope.cu");
/// Entries `mla_kv`, `shared_key`, `mla_kv_backward`, `shared_gradient`; constants `X_BF16`,
/// `INTERLEAVED`.
const MLA_KV: Source<'static> = source!("attention/mla_kv.cu");
/// Entries `mla_absorb_query`, `mla_absorb_value`; constant `X_BF16`.
const MLA_ABSORB: Source<'static> = source!("attention/mla_absorb.cu");

fn u32s<const N: usize>(numbers: [usize; N]) -> [Arg<'static>; N] {
    numbers.map(|n| Arg::U32(n as u32))
}

/// CTAs that share out the `work` threads of each of `tokens` tokens: as few as keep the GPU busy,
/// since each fetches the token's angles. The launch, and how many of them a token has.
fn token_parts(gpu: &Gpu, tokens: usize, work: usize) -> (LaunchConfig, usize) {
    let most = work.div_ceil(TOKEN_THREADS as usize).max(1);
    let busy = BUSY_CTAS * gpu.description().sm_count as usize;
    let parts = busy.div_ceil(tokens.max(1)).min(most);
    (LaunchConfig::new(tokens * parts, TOKEN_THREADS), parts)
}

/// Threads of a CTA that has one token, and CTAs an SM that keep it busy.
const TOKEN_THREADS: u32 = 256;
const BUSY_CTAS: usize = 2;

impl Kernel for Rope {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [x, cos, sin, positions] = roles(inputs);
        let (cos, sin, positions) = (mandatory(cos), mandatory(sin), mandatory(positions));
        let x = gpu.writable(mandatory(x))?;
        let heads = x.shape()[1] / self.head_dim;
        let rotated = self.head_dim - self.start;
        let units = self.start + rotated.div_ceil(2);
        let defines = [
            ("X_BF16", is_bf16(&x)),
            ("INTERLEAVED", u64::from(self.interleaved)),
            ("INVERSE", u64::from(self.inverse)),
        ];
        let kernel = gpu.kernel(ROPE, "rope", &defines, 0)?;
        let (config, parts) = token_parts(gpu, x.shape()[0], heads * units);
        let mut args = vec![Arg::Tensor(&x), Arg::Tensor(&cos), Arg::Tensor(&sin)];
        args.push(Arg::Tensor(&positions));
        let length = cos.shape()[0];
        args.extend(u32s([parts, heads, self.head_dim, self.start, rotated / 2, units, length]));
        gpu.launch(&kernel, &config, &args)?;
        Ok(vec![x])
    }
}

impl Kernel for MlaKv {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [kv, latent, cos, sin, positions] = roles(inputs);
        let (kv, latent) = (mandatory(kv), mandatory(latent));
        let (cos, sin, positions) = (mandatory(cos), mandatory(sin), mandatory(positions));
        let MlaKv { heads, nope, rope, v: v_dim, offset, interleaved } = *self;
        let t = kv.shape()[0];
        let k = gpu.tensor(kv.dtype(), &[t, heads * (nope + rope)])?;
        let v = gpu.tensor(kv.dtype(), &[t, heads * v_dim])?;
        let defines = [("X_BF16", is_bf16(&kv)), ("INTERLEAVED", u64::from(interleaved))];
        let own = gpu.kernel(MLA_KV, "mla_kv", &defines, 0)?;
        let n = Arg::U64(kv.len() as u64);
        let mut args = vec![Arg::Tensor(&kv), Arg::Tensor(&k), Arg::Tensor(&v), n];
        args.extend(u32s([nope, rope, v_dim]));
        gpu.launch(&own, &LaunchConfig::elements(kv.len()), &args)?;
        let shared = gpu.kernel(MLA_KV, "shared_key", &defines, 0)?;
        let (config, parts) = token_parts(gpu, t, heads * rope);
        let mut args = vec![Arg::Tensor(&latent), Arg::Tensor(&cos), Arg::Tensor(&sin)];
        args.extend([Arg::Tensor(&positions), Arg::Tensor(&k)]);
        let (wide, length) = (latent.shape()[1], cos.shape()[0]);
        args.extend(u32s([parts, heads, nope, rope, offset, wide, length]));
        gpu.launch(&shared, &config, &args)?;
        Ok(vec![k, v])
    }
}

impl Kernel for MlaKvBackward {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [dk, dv, cos, sin, positions] = roles(inputs);
        let (dk, dv) = (mandatory(dk), mandatory(dv));
        let (cos, sin, positions) = (mandatory(cos), mandatory(sin), mandatory(positions));
        let MlaKvBackward { heads, nope, rope, v: v_dim, interleaved } = *self;
        let t = dk.shape()[0];
        let dkv = gpu.tensor(dk.dtype(), &[t, heads * (nope + v_dim)])?;
        let dshared = gpu.tensor(dk.dtype(), &[t, rope])?;
        let defines = [("X_BF16", is_bf16(&dk)), ("INTERLEAVED", u64::from(interleaved))];
        let own = gpu.kernel(MLA_KV, "mla_kv_backward", &defines, 0)?;
        let n = Arg::U64(dkv.len() as u64);
        let mut args = vec![Arg::Tensor(&dk), Arg::Tensor(&dv), Arg::Tensor(&dkv), n];
        args.extend(u32s([nope, rope, v_dim]));
        gpu.launch(&own, &LaunchConfig::elements(dkv.len()), &args)?;
        let shared = gpu.kernel(MLA_KV, "shared_gradient", &defines, 0)?;
        let n = t * rope.div_ceil(2);
        let mut args = vec![Arg::Tensor(&dk), Arg::Tensor(&cos), Arg::Tensor(&sin)];
        args.extend([Arg::Tensor(&positions), Arg::Tensor(&dshared), Arg::U64(n as u64)]);
        args.extend(u32s([heads, nope, rope, cos.shape()[0]]));
        gpu.launch(&shared, &LaunchConfig::elements(n), &args)?;
        Ok(vec![dkv, dshared])
    }
}

impl Kernel for MlaAbsorbQuery {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [q, w] = roles(inputs);
        let (q, w) = (mandatory(q), mandatory(w));
        let MlaAbsorbQuery { heads, nope, rope, v } = *self;
        let r = w.shape()[1];
        let y = gpu.tensor(q.dtype(), &[q.shape()[0], heads * (r + rope)])?;
        let kernel = gpu.kernel(MLA_ABSORB, "mla_absorb_query", &[("X_BF16", is_bf16(&q))], 0)?;
        let n = Arg::U64(y.len() as u64);
        let mut args = vec![Arg::Tensor(&q), Arg::Tensor(&w), Arg::Tensor(&y), n];
        args.extend(u32s([heads, nope, rope, v, r]));
        gpu.launch(&kernel, &LaunchConfig::elements(y.len()), &args)?;
        Ok(vec![y])
    }
}

impl Kernel for MlaAbsorbValue {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [o, w] = roles(inputs);
        let (o, w) = (mandatory(o), mandatory(w));
        let MlaAbsorbValue { heads, nope, v } = *self;
        let y = gpu.tensor(o.dtype(), &[o.shape()[0], heads * v])?;
        let kernel = gpu.kernel(MLA_ABSORB, "mla_absorb_value", &[("X_BF16", is_bf16(&o))], 0)?;
        let n = Arg::U64(y.len() as u64);
        let mut args = vec![Arg::Tensor(&o), Arg::Tensor(&w), Arg::Tensor(&y), n];
        args.extend(u32s([heads, nope, v, w.shape()[1]]));
        gpu.launch(&kernel, &LaunchConfig::elements(y.len()), &args)?;
        Ok(vec![y])
    }
}
