//! The optimizer by `gpu/kernels/optim/optim.cu`: `adamw`, `ema`, `sum_of_squares`, `clip_factor`.

use fathom_reference::ops::adamw::AdamW;
use fathom_reference::ops::clip_factor::ClipFactor;
use fathom_reference::ops::ema::Ema;
use fathom_reference::ops::sum_of_squares::SumOfSquares;
use fathom_trace::{DType, TensorMeta};

use super::{Kernel, is_bf16, mandatory, roles, rows};
use crate::compile::{Source, source};
use crate::device::{Gpu, GpuError};
use crate::launch::{Arg, LaunchConfig};
use crate::tensor::DeviceTensor;

/// Entries `adamw`, `ema`, `block_squares`, `tree`, `factor`; constants `M_BF16`, `V_BF16`.
const SOURCE: Source<'static> = source!("optim/optim.cu");

/// Elements whose squares one CTA adds up.
const BLOCK: usize = 65536;

/// The constants of the entries that know nothing of moments.
const NO_MOMENTS: [(&str, u64); 2] = [("M_BF16", 0), ("V_BF16", 0)];

/// The sum of `values` by the halving tree to the one element of `sum`; `values` are overwritten.
fn tree(gpu: &Gpu, values: &DeviceTensor, sum: &DeviceTensor) -> Result<(), GpuError> {
    let kernel = gpu.kernel(SOURCE, "tree", &NO_MOMENTS, 0)?;
    let args = [Arg::Tensor(values), Arg::Tensor(sum), Arg::U32(values.len() as u32)];
    gpu.launch(&kernel, &LaunchConfig::new(1, 1024), &args)
}

impl Kernel for AdamW {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [w, m, v, grad, factor] = roles(inputs);
        let (grad, factor) = (mandatory(grad), mandatory(factor));
        let w = gpu.writable(mandatory(w))?;
        let (m, v) = (gpu.writable(mandatory(m))?, gpu.writable(mandatory(v))?);
        let defines = [("M_BF16", is_bf16(&m)), ("V_BF16", is_bf16(&v))];
        let kernel = gpu.kernel(SOURCE, "adamw", &defines, 0)?;
        let mut args = vec![Arg::Tensor(&w), Arg::Tensor(&m), Arg::Tensor(&v), Arg::Tensor(&grad)];
        args.extend([Arg::Tensor(&factor), Arg::U64(w.len() as u64)]);
        let numbers = [
            self.beta1,
            1.0 - self.beta1,
            self.beta2,
            1.0 - self.beta2,
            self.eps,
            self.decay,
            self.step_size,
            self.correction,
        ];
        args.extend(numbers.map(|x| Arg::F32(x as f32)));
        gpu.launch(&kernel, &LaunchConfig::elements(w.len()), &args)?;
        Ok(vec![w, m, v])
    }
}

impl Kernel for Ema {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [e, w] = roles(inputs);
        let (e, w) = (gpu.writable(mandatory(e))?, mandatory(w));
        let kernel = gpu.kernel(SOURCE, "ema", &NO_MOMENTS, 0)?;
        let (n, rate) = (Arg::U64(e.len() as u64), Arg::F32(self.rate as f32));
        let args = [Arg::Tensor(&e), Arg::Tensor(&w), n, rate];
        gpu.launch(&kernel, &LaunchConfig::elements(e.len()), &args)?;
        Ok(vec![e])
    }
}

impl Kernel for SumOfSquares {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [x, partials] = roles(inputs);
        let (x, partials) = (mandatory(x), gpu.writable(mandatory(partials))?);
        rows::canonical(gpu, &partials)?;
        let blocks = x.len().div_ceil(BLOCK);
        let sums = gpu.tensor(DType::F32, &[blocks])?;
        let kernel = gpu.kernel(SOURCE, "block_squares", &NO_MOMENTS, 0)?;
        let args = [Arg::Tensor(&x), Arg::Tensor(&sums), Arg::U64(x.len() as u64)];
        gpu.launch(&kernel, &LaunchConfig::new(blocks, 256), &args)?;
        let slot = partials.clone().reshape(&[partials.len(), 1]).rows(self.slot, self.slot + 1);
        tree(gpu, &sums, &slot)?;
        Ok(vec![partials])
    }
}

impl Kernel for ClipFactor {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [partials] = roles(inputs);
        let partials = gpu.writable(mandatory(partials))?;
        let scalar = || gpu.tensor(DType::F32, &[1]);
        let (sum, norm, factor) = (scalar()?, scalar()?, scalar()?);
        tree(gpu, &partials, &sum)?;
        let kernel = gpu.kernel(SOURCE, "factor", &NO_MOMENTS, 0)?;
        let args = [
            Arg::Tensor(&sum),
            Arg::Tensor(&norm),
            Arg::Tensor(&factor),
            Arg::F32(self.max_norm.unwrap_or(0.0) as f32),
            Arg::U32(u32::from(self.max_norm.is_some())),
        ];
        gpu.launch(&kernel, &LaunchConfig::new(1, 1), &args)?;
        Ok(vec![norm, factor])
    }
}
