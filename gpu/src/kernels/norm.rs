//! RMSNorm and SwiGLU with their gradients, by the kernels of `gpu/kernels/norm`.

use fathom_reference::ops::rms_norm::{RmsNorm, RmsNormBackward, RmsNormWgrad};
use fathom_reference::ops::swiglu::{Swiglu, SwigluBackward};
use fathom_trace::{DType, TensorMeta};

use super::{Kernel, half_warps, is_bf16, mandatory, roles};
use crate::compile::{Source, source};
use crate::device::{Gpu, GpuError};
use crate::launch::{Arg, LaunchConfig};
use crate::tensor::DeviceTensor;

/// Entries `rms_norm`, `rms_norm_backward`, `rms_norm_wgrad`; constants `X_BF16`, `Y_BF16`,
/// `DY_BF16`, `R_BF16`.
const RMS_NORM: Source<'static> = source!("norm/rms_norm.cu");
/// Entries `swiglu`, `swiglu_backward`; constants `X_BF16`, `Y_BF16`, `DY_BF16`.
const SWIGLU: Source<'static> = source!("norm/swiglu.cu");

/// The columns of `x` that a norm takes: rows, columns, first, how many.
fn columns(x: &DeviceTensor, offset: usize, width: usize) -> [Arg<'static>; 4] {
    let (rows, columns) = x.rows_columns();
    [rows, columns, offset, width].map(|n| Arg::U32(n as u32))
}

/// The constants of `rms_norm.cu`.
fn constants(of: [u64; 4]) -> [(&'static str, u64); 4] {
    let [x, y, dy, residual] = of;
    [("X_BF16", x), ("Y_BF16", y), ("DY_BF16", dy), ("R_BF16", residual)]
}

impl Kernel for RmsNorm {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [x, weight] = roles(inputs);
        let (x, weight) = (mandatory(x), mandatory(weight));
        let rows = x.shape()[0];
        let y = gpu.tensor(self.out, &[rows, self.width])?;
        let rstd = gpu.tensor(DType::F32, &[rows])?;
        let defines = constants([is_bf16(&x), is_bf16(&y), 0, 0]);
        let kernel = gpu.kernel(RMS_NORM, "rms_norm", &defines, 0)?;
        let mut args =
            vec![Arg::Tensor(&x), Arg::Tensor(&weight), Arg::Tensor(&y), Arg::Tensor(&rstd)];
        args.extend(columns(&x, self.offset, self.width));
        args.push(Arg::F32(self.eps as f32));
        gpu.launch(&kernel, &half_warps(rows), &args)?;
        Ok(vec![y, rstd])
    }
}

impl Kernel for RmsNormBackward {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [dy, x, weight, rstd, residual] = roles(inputs);
        let (dy, x) = (mandatory(dy), mandatory(x));
        let (weight, rstd) = (mandatory(weight), mandatory(rstd));
        let rows = x.shape()[0];
        let dx = gpu.tensor(self.out, &[rows, self.width])?;
        let of_residual = residual.as_ref().map_or(0, is_bf16);
        let defines = constants([is_bf16(&x), is_bf16(&dx), is_bf16(&dy), of_residual]);
        let kernel = gpu.kernel(RMS_NORM, "rms_norm_backward", &defines, 0)?;
        let mut args = vec![
            Arg::Tensor(&dy),
            Arg::Tensor(&x),
            Arg::Tensor(&weight),
            Arg::Tensor(&rstd),
            Arg::OptionalTensor(residual.as_ref()),
            Arg::Tensor(&dx),
        ];
        args.extend(columns(&x, self.offset, self.width));
        gpu.launch(&kernel, &half_warps(rows), &args)?;
        Ok(vec![dx])
    }
}

impl Kernel for RmsNormWgrad {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [dy, x, rstd, acc] = roles(inputs);
        let (dy, x, rstd) = (mandatory(dy), mandatory(x), mandatory(rstd));
        let dw = gpu.writable(mandatory(acc))?;
        let defines = constants([is_bf16(&x), 0, is_bf16(&dy), 0]);
        let kernel = gpu.kernel(RMS_NORM, "rms_norm_wgrad", &defines, 0)?;
        let mut args =
            vec![Arg::Tensor(&dy), Arg::Tensor(&x), Arg::Tensor(&rstd), Arg::Tensor(&dw)];
        args.extend(columns(&x, self.offset, self.width));
        gpu.launch(&kernel, &LaunchConfig::elements(self.width), &args)?;
        Ok(vec![dw])
    }
}

impl Kernel for Swiglu {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [x, weight] = roles(inputs);
        let x = mandatory(x);
        let (rows, columns) = (x.shape()[0], x.shape()[1] / 2);
        let y = gpu.tensor(self.out, &[rows, columns])?;
        let defines = [("X_BF16", is_bf16(&x)), ("Y_BF16", is_bf16(&y)), ("DY_BF16", 0)];
        let kernel = gpu.kernel(SWIGLU, "swiglu", &defines, 0)?;
        let args = [
            Arg::Tensor(&x),
            Arg::OptionalTensor(weight.as_ref()),
            Arg::Tensor(&y),
            Arg::U64(y.len() as u64),
            Arg::U32(columns as u32),
        ];
        gpu.launch(&kernel, &LaunchConfig::elements(y.len()), &args)?;
        Ok(vec![y])
    }
}

impl Kernel for SwigluBackward {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [dy, x, weight] = roles(inputs);
        let (dy, x) = (mandatory(dy), mandatory(x));
        let (rows, columns) = (x.shape()[0], x.shape()[1] / 2);
        let dx = gpu.tensor(self.out, x.shape())?;
        let dweight = gpu.tensor(DType::F32, &[weight.as_ref().map_or(0, |_| rows)])?;
        let defines =
            [("X_BF16", is_bf16(&x)), ("Y_BF16", is_bf16(&dx)), ("DY_BF16", is_bf16(&dy))];
        let kernel = gpu.kernel(SWIGLU, "swiglu_backward", &defines, 0)?;
        let args = [
            Arg::Tensor(&dy),
            Arg::Tensor(&x),
            Arg::OptionalTensor(weight.as_ref()),
            Arg::Tensor(&dx),
            Arg::Tensor(&dweight),
            Arg::U32(rows as u32),
            Arg::U32(columns as u32),
        ];
        gpu.launch(&kernel, &half_warps(rows), &args)?;
        Ok(vec![dx, dweight])
    }
}
