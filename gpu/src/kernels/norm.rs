//! RMSNorm (with the sum before it and the cast behind it) and SwiGLU, each with its gradient, by
//! the kernels of `gpu/kernels/norm`.

use fathom_reference::op::codes::{stored_as, stored_columns};
use fathom_reference::ops::add_rms_norm::{AddRmsNorm, AddRmsNormQuantize};
use fathom_reference::ops::quantize_tile::QuantizeTile;
use fathom_reference::ops::rms_norm::{RmsNorm, RmsNormBackward, RmsNormWgrad};
use fathom_reference::ops::rms_norm_backward_quantize::RmsNormBackwardQuantize;
use fathom_reference::ops::rms_norm_quantize::RmsNormQuantize;
use fathom_reference::ops::swiglu::{Swiglu, SwigluBackward};
use fathom_trace::{DType, TensorMeta};

use super::attention::SHARED_LIMIT;
use super::quant::{format_code, scale_code};
use super::{Kernel, half_warps, is_bf16, mandatory, roles};
use crate::compile::{Source, source};
use crate::device::{Gpu, GpuError};
use crate::launch::{Arg, LaunchConfig};
use crate::tensor::DeviceTensor;

/// Entry `rms_norm`; constants `X_BF16`, `Y_BF16`, `ADD`, with it `B_BF16`, `C_BF16`, `H_BF16`;
/// `STAGED`, `TILE`, `FORMAT`, `SCALE`, `KEEP`.
const RMS_NORM: Source<'static> = source!("norm/rms_norm.cu");
/// Entry `rms_norm_backward`; constants `X_BF16`, `DX_BF16`, `DY_BF16`, `R_BF16`, `STAGED`, `TILE`,
/// `FORMAT`, `SCALE`.
const BACKWARD: Source<'static> = source!("norm/rms_norm_backward.cu");
/// Entry `rms_norm_wgrad`; constants `X_BF16`, `DY_BF16`.
const WGRAD: Source<'static> = source!("norm/rms_norm_wgrad.cu");
/// Entries `swiglu`, `swiglu_backward`; constants `X_BF16`, `Y_BF16`, `DY_BF16`.
const SWIGLU: Source<'static> = source!("norm/swiglu.cu");

/// The columns of `x` that a norm takes: rows, columns, first, how many.
fn columns(x: &DeviceTensor, offset: usize, width: usize) -> [Arg<'static>; 4] {
    let (rows, columns) = x.rows_columns();
    [rows, columns, offset, width].map(|n| Arg::U32(n as u32))
}

/// Most rows that a CTA takes at a time, and the elements of them that a thread of it is for.
const MOST_ROWS: usize = 16;
const THREAD_ELEMENTS: usize = 8;
/// Shared memory for staged rows: what a CTA may have, but for what kernels declare themselves.
const STAGED_LIMIT: usize = SHARED_LIMIT - 256;

/// Elements between two rows of `width` in shared memory: half warps at the same place of both read
/// the two halves of the banks.
fn stride(width: usize, bytes: usize) -> usize {
    let [banks, half] = [128 / bytes, 64 / bytes];
    width.saturating_sub(half).next_multiple_of(banks) + half
}

/// How CTAs, at most one an SM, share out rows of `width` columns of which they keep `row_bytes`
/// each in shared memory.
struct Staging {
    /// Whether a row fits.
    staged: bool,
    /// Rows that a CTA takes at a time.
    each: usize,
    config: LaunchConfig,
}

impl Staging {
    fn new(gpu: &Gpu, rows: usize, width: usize, row_bytes: usize) -> Staging {
        let weights = 4 * width.next_multiple_of(32);
        let fitting = STAGED_LIMIT.saturating_sub(weights) / row_bytes;
        let staged = fitting > 0;
        let sms = gpu.description().sm_count as usize;
        let most = if staged { fitting.min(MOST_ROWS) } else { 2 };
        let each = rows.div_ceil(sms).clamp(1, most);
        let warps = (each * width).div_ceil(32 * THREAD_ELEMENTS).clamp(each.div_ceil(2), 32);
        let shared = if staged { weights + each * row_bytes } else { 0 };
        let config = LaunchConfig {
            shared_bytes: shared as u32,
            ..LaunchConfig::new(rows.div_ceil(each).min(sms), 32 * warps as u32)
        };
        Staging { staged, each, config }
    }

    /// Shared memory for any number of rows.
    fn most_bytes(&self) -> u32 {
        if self.staged { STAGED_LIMIT as u32 } else { 0 }
    }
}

/// A cast's constants.
fn cast_constants(cast: Option<&QuantizeTile>) -> [(&'static str, u64); 3] {
    [
        ("TILE", cast.map_or(0, |cast| cast.tile as u64)),
        ("FORMAT", cast.map_or(0, |cast| format_code(cast.format))),
        ("SCALE", cast.map_or(0, |cast| scale_code(cast.scale))),
    ]
}

/// Codes and scales of a cast of so many rows and columns; of no column without one.
fn codes(
    gpu: &Gpu,
    cast: Option<&QuantizeTile>,
    rows: usize,
    columns: usize,
) -> Result<[DeviceTensor; 2], GpuError> {
    let (dtype, codes, tiles) = match cast {
        Some(cast) => {
            let dtype = stored_as(cast.format);
            (dtype, stored_columns(dtype, columns), columns.div_ceil(cast.tile))
        }
        None => (DType::U8, 0, 0),
    };
    Ok([gpu.tensor(dtype, &[rows, codes])?, gpu.tensor(DType::F32, &[rows, tiles])?])
}

/// What stands around a norm: the sum before it, the cast behind it, and whether its result is to
/// be kept.
struct Around<'a> {
    sum: Option<Sum<'a>>,
    cast: Option<&'a QuantizeTile>,
    keep: bool,
}

/// The second and third term of a sum, and the element type of `h`.
struct Sum<'a> {
    b: &'a DeviceTensor,
    c: Option<&'a DeviceTensor>,
    out: DType,
}

/// The sum (nothing without one), the norm's result (none of its rows where it is not to be kept),
/// codes and scales of its cast (empty without one), and one over the root mean square of every
/// row.
fn rms_norm(
    gpu: &Gpu,
    norm: &RmsNorm,
    Around { sum, cast, keep }: &Around<'_>,
    x: &DeviceTensor,
    weight: &DeviceTensor,
) -> Result<[DeviceTensor; 5], GpuError> {
    let (rows, width) = (x.shape()[0], norm.width);
    let kept = sum.as_ref().map_or(x.dtype(), |sum| sum.out);
    let h = gpu.tensor(kept, &[if sum.is_some() { rows } else { 0 }, width])?;
    let y = gpu.tensor(norm.out, &[if *keep { rows } else { 0 }, width])?;
    let rstd = gpu.tensor(DType::F32, &[rows])?;
    let [q, scale] = codes(gpu, *cast, rows, width)?;
    let [b, c] = [sum.as_ref().map(|sum| sum.b), sum.as_ref().and_then(|sum| sum.c)];

    let stride = stride(width, kept.size());
    let staging = Staging::new(gpu, rows, width, stride * kept.size());
    let mut defines = vec![
        ("X_BF16", is_bf16(x)),
        ("Y_BF16", is_bf16(&y)),
        ("ADD", u64::from(sum.is_some())),
        ("STAGED", u64::from(staging.staged)),
        ("KEEP", u64::from(*keep)),
    ];
    defines.extend(cast_constants(*cast));
    if sum.is_some() {
        let [b, c] = [b, c].map(|term| term.map_or(0, is_bf16));
        defines.extend([("B_BF16", b), ("C_BF16", c), ("H_BF16", is_bf16(&h))]);
    }
    let kernel = gpu.kernel(RMS_NORM, "rms_norm", &defines, staging.most_bytes())?;
    let mut args = vec![Arg::Tensor(x), Arg::OptionalTensor(b), Arg::OptionalTensor(c)];
    args.extend([weight, &h, &y, &q, &scale, &rstd].map(Arg::Tensor));
    args.extend(columns(x, norm.offset, width));
    args.extend([
        Arg::U32(stride as u32),
        Arg::U32(staging.each as u32),
        Arg::F32(norm.eps as f32),
        Arg::F32(cast.map_or(0.0, |cast| cast.amax_floor)),
    ]);
    gpu.launch(&kernel, &staging.config, &args)?;
    Ok([h, y, q, scale, rstd])
}

/// Whether the cast of a norm's result is covered.
fn covers_cast(cast: &QuantizeTile, of: &TensorMeta, out: DType) -> Result<(), String> {
    cast.covers(&[Some(TensorMeta { dtype: out, ..of.clone() })])
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
        let [x, weight] = roles(inputs).map(mandatory);
        let around = Around { sum: None, cast: None, keep: true };
        let [_, y, _, _, rstd] = rms_norm(gpu, self, &around, &x, &weight)?;
        Ok(vec![y, rstd])
    }
}

impl Kernel for RmsNormQuantize {
    fn covers(&self, inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        let [Some(x), _] = inputs else { unreachable!("mandatory") };
        covers_cast(&self.cast, x, self.norm.out)
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [x, weight] = roles(inputs).map(mandatory);
        let around = Around { sum: None, cast: Some(&self.cast), keep: self.keep };
        let [_, outputs @ ..] = rms_norm(gpu, &self.norm, &around, &x, &weight)?;
        Ok(outputs.into())
    }
}

impl Kernel for AddRmsNorm {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [a, b, c, weight] = roles(inputs);
        let (a, b, weight) = (mandatory(a), mandatory(b), mandatory(weight));
        let sum = Some(Sum { b: &b, c: c.as_ref(), out: self.add.out });
        let around = Around { sum, cast: None, keep: true };
        let [h, y, _, _, rstd] = rms_norm(gpu, &self.norm, &around, &a, &weight)?;
        Ok(vec![h, y, rstd])
    }
}

impl Kernel for AddRmsNormQuantize {
    fn covers(&self, inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        let [Some(a), ..] = inputs else { unreachable!("mandatory") };
        covers_cast(&self.cast, a, self.norm.out)
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [a, b, c, weight] = roles(inputs);
        let (a, b, weight) = (mandatory(a), mandatory(b), mandatory(weight));
        let sum = Some(Sum { b: &b, c: c.as_ref(), out: self.add.out });
        let around = Around { sum, cast: Some(&self.cast), keep: self.keep };
        rms_norm(gpu, &self.norm, &around, &a, &weight).map(Vec::from)
    }
}

/// The gradient, and codes and scales of its cast (empty without one).
fn rms_norm_backward(
    gpu: &Gpu,
    norm: &RmsNormBackward,
    cast: Option<&QuantizeTile>,
    inputs: Vec<Option<DeviceTensor>>,
) -> Result<[DeviceTensor; 3], GpuError> {
    let [dy, x, weight, rstd, residual] = roles(inputs);
    let (dy, x) = (mandatory(dy), mandatory(x));
    let (weight, rstd) = (mandatory(weight), mandatory(rstd));
    let (rows, width) = (x.shape()[0], norm.width);
    let dx = gpu.tensor(norm.out, &[rows, width])?;
    let [q, scale] = codes(gpu, cast, rows, width)?;
    let sizes = [&x, &dy].map(|t| t.dtype().size());
    let strides = sizes.map(|bytes| stride(width, bytes));
    let row_bytes = strides[0] * sizes[0] + strides[1] * sizes[1];
    let staging = Staging::new(gpu, rows, width, row_bytes);
    let mut defines = vec![
        ("X_BF16", is_bf16(&x)),
        ("DX_BF16", is_bf16(&dx)),
        ("DY_BF16", is_bf16(&dy)),
        ("R_BF16", residual.as_ref().map_or(0, is_bf16)),
        ("STAGED", u64::from(staging.staged)),
    ];
    defines.extend(cast_constants(cast));
    let kernel = gpu.kernel(BACKWARD, "rms_norm_backward", &defines, staging.most_bytes())?;
    let mut args = [&dy, &x, &weight, &rstd].map(Arg::Tensor).to_vec();
    args.push(Arg::OptionalTensor(residual.as_ref()));
    args.extend([&dx, &q, &scale].map(Arg::Tensor));
    args.extend(columns(&x, norm.offset, width));
    args.extend([strides[0], strides[1], staging.each].map(|n| Arg::U32(n as u32)));
    args.push(Arg::F32(cast.map_or(0.0, |cast| cast.amax_floor)));
    gpu.launch(&kernel, &staging.config, &args)?;
    Ok([dx, q, scale])
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
        let [dx, ..] = rms_norm_backward(gpu, self, None, inputs)?;
        Ok(vec![dx])
    }
}

impl Kernel for RmsNormBackwardQuantize {
    fn covers(&self, inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        let [Some(dy), ..] = inputs else { unreachable!("mandatory") };
        covers_cast(&self.cast, dy, self.norm.out)
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        rms_norm_backward(gpu, &self.norm, Some(&self.cast), inputs).map(Vec::from)
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
        let defines = [("X_BF16", is_bf16(&x)), ("DY_BF16", is_bf16(&dy))];
        let kernel = gpu.kernel(WGRAD, "rms_norm_wgrad", &defines, 0)?;
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
