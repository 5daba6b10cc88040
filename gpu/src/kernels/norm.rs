//! RMSNorm and SwiGLU with their gradients, by the kernels of `gpu/kernels/norm`.

use fathom_reference::op::codes::{stored_as, stored_columns};
use fathom_reference::ops::quantize_tile::QuantizeTile;
use fathom_reference::ops::rms_norm::{RmsNorm, RmsNormBackward, RmsNormWgrad};
use fathom_reference::ops::rms_norm_quantize::RmsNormQuantize;
use fathom_reference::ops::swiglu::{Swiglu, SwigluBackward};
use fathom_trace::{DType, TensorMeta};

use super::quant::{format_code, scale_code};
use super::{Kernel, ROW_THREADS, half_warps, is_bf16, mandatory, roles};
use crate::compile::{Source, source};
use crate::device::{Gpu, GpuError};
use crate::launch::{Arg, LaunchConfig};
use crate::tensor::DeviceTensor;

/// Entry `rms_norm`; constants `X_BF16`, `Y_BF16`, `STAGED`, `TILE`, `FORMAT`, `SCALE`, `KEEP`.
const RMS_NORM: Source<'static> = source!("norm/rms_norm.cu");
/// Entries `rms_norm_backward`, `rms_norm_wgrad`; constants `X_BF16`, `DX_BF16`, `DY_BF16`,
/// `R_BF16`.
const GRADIENTS: Source<'static> = source!("norm/rms_norm_gradients.cu");
/// Entries `swiglu`, `swiglu_backward`; constants `X_BF16`, `Y_BF16`, `DY_BF16`.
const SWIGLU: Source<'static> = source!("norm/swiglu.cu");

/// The columns of `x` that a norm takes: rows, columns, first, how many.
fn columns(x: &DeviceTensor, offset: usize, width: usize) -> [Arg<'static>; 4] {
    let (rows, columns) = x.rows_columns();
    [rows, columns, offset, width].map(|n| Arg::U32(n as u32))
}

/// The constants of `rms_norm_gradients.cu`.
fn constants(of: [u64; 4]) -> [(&'static str, u64); 4] {
    let [x, dx, dy, residual] = of;
    [("X_BF16", x), ("DX_BF16", dx), ("DY_BF16", dy), ("R_BF16", residual)]
}

/// Bytes of a row from which on it is kept in shared memory: shorter ones stay in the first-level
/// cache until they are read again.
const LONG_ROW: usize = 2048;
/// Dynamic shared memory for two such rows.
const STAGED_BYTES: u32 = 96 * 1024;

/// Elements between two rows of `width` in shared memory: half warps at the same place of both read
/// the two halves of the banks.
fn stride(width: usize, bytes: usize) -> usize {
    let [banks, half] = [128 / bytes, 64 / bytes];
    width.saturating_sub(half).next_multiple_of(banks) + half
}

/// The norm's result (none of its rows where it is not to be kept), codes and scales of its cast
/// (empty without one), and one over the root mean square of every row.
fn rms_norm(
    gpu: &Gpu,
    norm: &RmsNorm,
    cast: Option<&QuantizeTile>,
    keep: bool,
    inputs: Vec<Option<DeviceTensor>>,
) -> Result<[DeviceTensor; 4], GpuError> {
    let [x, weight] = roles(inputs);
    let (x, weight) = (mandatory(x), mandatory(weight));
    let (rows, width) = (x.shape()[0], norm.width);
    let y = gpu.tensor(norm.out, &[if keep { rows } else { 0 }, width])?;
    let rstd = gpu.tensor(DType::F32, &[rows])?;
    let (dtype, tile) = cast.map_or((DType::U8, 0), |cast| (stored_as(cast.format), cast.tile));
    let (codes, tiles) = match cast {
        Some(_) => (stored_columns(dtype, width), width.div_ceil(tile)),
        None => (0, 0),
    };
    let q = gpu.tensor(dtype, &[rows, codes])?;
    let scale = gpu.tensor(DType::F32, &[rows, tiles])?;

    let bytes = x.dtype().size();
    let stride = stride(width, bytes);
    let shared_bytes = 2 * stride * bytes;
    let staged = width * bytes >= LONG_ROW && shared_bytes <= STAGED_BYTES as usize;
    let defines = [
        ("X_BF16", is_bf16(&x)),
        ("Y_BF16", is_bf16(&y)),
        ("STAGED", u64::from(staged)),
        ("TILE", tile as u64),
        ("FORMAT", cast.map_or(0, |cast| format_code(cast.format))),
        ("SCALE", cast.map_or(0, |cast| scale_code(cast.scale))),
        ("KEEP", u64::from(keep)),
    ];
    let (most, shared_bytes, rows_of_cta) = match staged {
        true => (STAGED_BYTES, shared_bytes as u32, 2),
        false => (0, 0, ROW_THREADS as usize / 16),
    };
    let kernel = gpu.kernel(RMS_NORM, "rms_norm", &defines, most)?;
    let outputs = [&y, &q, &scale, &rstd].map(Arg::Tensor);
    let mut args = vec![Arg::Tensor(&x), Arg::Tensor(&weight)];
    args.extend(outputs);
    args.extend(columns(&x, norm.offset, width));
    args.extend([
        Arg::U32(stride as u32),
        Arg::F32(norm.eps as f32),
        Arg::F32(cast.map_or(0.0, |cast| cast.amax_floor)),
    ]);
    let config = LaunchConfig::new(rows.div_ceil(rows_of_cta), ROW_THREADS);
    gpu.launch(&kernel, &LaunchConfig { shared_bytes, ..config }, &args)?;
    Ok([y, q, scale, rstd])
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
        let [y, _, _, rstd] = rms_norm(gpu, self, None, true, inputs)?;
        Ok(vec![y, rstd])
    }
}

impl Kernel for RmsNormQuantize {
    fn covers(&self, inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        let [Some(x), _] = inputs else { unreachable!("mandatory") };
        let y = TensorMeta { dtype: self.norm.out, ..x.clone() };
        self.cast.covers(&[Some(y)])
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        rms_norm(gpu, &self.norm, Some(&self.cast), self.keep, inputs).map(Vec::from)
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
        let kernel = gpu.kernel(GRADIENTS, "rms_norm_backward", &defines, 0)?;
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
        let kernel = gpu.kernel(GRADIENTS, "rms_norm_wgrad", &defines, 0)?;
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
