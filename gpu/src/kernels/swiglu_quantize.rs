//! SwiGLU and its gradient with the casts around them, by `gpu/kernels/norm/swiglu_quantize.cu`.
//!
//! The gradient's rows lie in shared memory; where two are too long for that, the ops that it
//! stands for are launched one after the other.

use fathom_reference::op::codes::{stored_as, stored_columns};
use fathom_reference::ops::dequantize::Dequantize;
use fathom_reference::ops::quantize_tile::QuantizeTile;
use fathom_reference::ops::swiglu_quantize::{SwigluBackwardQuantize, SwigluQuantize};
use fathom_trace::{DType, TensorMeta};

use super::attention::SHARED_LIMIT;
use super::quant::{Kept, format_code, scale_code};
use super::{Kernel, is_bf16, mandatory, roles};
use crate::compile::{Source, source};
use crate::device::{Gpu, GpuError};
use crate::launch::{Arg, LaunchConfig};
use crate::tensor::DeviceTensor;

/// Entries `swiglu_quantize`, `swiglu_backward_quantize`; constants `KIND`, `V_BF16`, `Y_BF16`,
/// `DY_BF16`, `TILE`, `FORMAT`, `SCALE`.
const SOURCE: Source<'static> = source!("norm/swiglu_quantize.cu");

/// Threads of a CTA that casts a tile a warp.
const TILE_THREADS: u32 = 128;
/// Rows of a CTA of the backward, and the columns of a row that a warp of it is for.
const ROWS: usize = 2;
const WARP_COLUMNS: usize = 64;

fn input<'a>(
    x: &'a DeviceTensor,
    x_scale: Option<&'a DeviceTensor>,
    kept: Option<&Dequantize>,
) -> Kept<'a> {
    match kept {
        None => Kept::plain(x),
        Some(kept) => Kept { codes: x, scales: x_scale, columns: kept.columns, block: kept.block },
    }
}

fn constants(
    x: &Kept<'_>,
    kept: Option<&Dequantize>,
    [y, dy]: [u64; 2],
    cast: &QuantizeTile,
) -> [(&'static str, u64); 7] {
    [
        ("KIND", x.kind()),
        ("V_BF16", u64::from(kept.is_some_and(|kept| kept.out == DType::BF16))),
        ("Y_BF16", y),
        ("DY_BF16", dy),
        ("TILE", cast.tile as u64),
        ("FORMAT", format_code(cast.format)),
        ("SCALE", scale_code(cast.scale)),
    ]
}

/// Codes and scales of a cast of so many rows and columns.
fn codes(
    gpu: &Gpu,
    cast: &QuantizeTile,
    rows: usize,
    columns: usize,
) -> Result<[DeviceTensor; 2], GpuError> {
    let dtype = stored_as(cast.format);
    let q = gpu.tensor(dtype, &[rows, stored_columns(dtype, columns)])?;
    Ok([q, gpu.tensor(DType::F32, &[rows, columns.div_ceil(cast.tile)])?])
}

/// The ops that the fused gradient stands for, one after the other.
fn apart(
    op: &SwigluBackwardQuantize,
    gpu: &Gpu,
    [dy, x, x_scale, weight]: [Option<DeviceTensor>; 4],
) -> Result<Vec<DeviceTensor>, GpuError> {
    let x = match &op.kept {
        None => x,
        Some(kept) => kept.launch(gpu, vec![x, x_scale])?.pop(),
    };
    let [dx, dweight] = outputs(op.swiglu.launch(gpu, vec![dy, x, weight])?);
    let [q, scale] = outputs(op.cast.launch(gpu, vec![Some(dx.clone())])?);
    Ok(vec![dx, q, scale, dweight])
}

/// What a launch gives, one an output.
fn outputs<const N: usize>(outputs: Vec<DeviceTensor>) -> [DeviceTensor; N] {
    outputs.try_into().expect("one entry an output")
}

/// Bytes of shared memory in which the backward keeps its rows.
fn shared_bytes(columns: usize, out: DType, weighted: bool) -> usize {
    ROWS * columns * (2 * out.size() + if weighted { 4 } else { 0 })
}

impl Kernel for SwigluQuantize {
    fn covers(&self, inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        let [Some(x), ..] = inputs else { unreachable!("mandatory") };
        self.cast.covers(&[Some(TensorMeta { dtype: self.swiglu.out, ..x.clone() })])
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [x, x_scale, weight] = roles(inputs);
        let x = mandatory(x);
        let x = input(&x, x_scale.as_ref(), self.kept.as_ref());
        let (rows, columns) = (x.codes.shape()[0], x.columns / 2);
        let [q, scale] = codes(gpu, &self.cast, rows, columns)?;
        let y = u64::from(self.swiglu.out == DType::BF16);
        let defines = constants(&x, self.kept.as_ref(), [y, 0], &self.cast);
        let kernel = gpu.kernel(SOURCE, "swiglu_quantize", &defines, 0)?;
        let mut args = x.args().to_vec();
        args.extend([
            Arg::OptionalTensor(weight.as_ref()),
            Arg::Tensor(&q),
            Arg::Tensor(&scale),
            Arg::U32(rows as u32),
            Arg::U32(columns as u32),
            Arg::F32(self.cast.amax_floor),
        ]);
        // A warp for every tile, at most 16 CTAs an SM.
        let ctas = scale.len().div_ceil(TILE_THREADS as usize / 32);
        let most = 16 * gpu.description().sm_count as usize;
        gpu.launch(&kernel, &LaunchConfig::new(ctas.min(most), TILE_THREADS), &args)?;
        Ok(vec![q, scale])
    }
}

impl Kernel for SwigluBackwardQuantize {
    fn covers(&self, inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        let [Some(dy), ..] = inputs else { unreachable!("mandatory") };
        self.cast.covers(&[Some(TensorMeta { dtype: self.swiglu.out, ..dy.clone() })])
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [dy, x, x_scale, weight] = roles(inputs);
        let columns = dy.as_ref().map_or(0, |dy| dy.shape()[1]);
        let shared_bytes = shared_bytes(columns, self.swiglu.out, weight.is_some());
        if shared_bytes > SHARED_LIMIT {
            return apart(self, gpu, [dy, x, x_scale, weight]);
        }
        let (dy, x) = (mandatory(dy), mandatory(x));
        let x = input(&x, x_scale.as_ref(), self.kept.as_ref());
        let (rows, columns) = dy.rows_columns();
        let dx = gpu.tensor(self.swiglu.out, &[rows, 2 * columns])?;
        let [q, scale] = codes(gpu, &self.cast, rows, 2 * columns)?;
        let dweight = gpu.tensor(DType::F32, &[weight.as_ref().map_or(0, |_| rows)])?;
        let defines = constants(&x, self.kept.as_ref(), [is_bf16(&dx), is_bf16(&dy)], &self.cast);
        let kernel =
            gpu.kernel(SOURCE, "swiglu_backward_quantize", &defines, SHARED_LIMIT as u32)?;
        let mut args = vec![Arg::Tensor(&dy)];
        args.extend(x.args());
        args.extend([
            Arg::OptionalTensor(weight.as_ref()),
            Arg::Tensor(&dx),
            Arg::Tensor(&q),
            Arg::Tensor(&scale),
            Arg::Tensor(&dweight),
            Arg::U32(rows as u32),
            Arg::U32(columns as u32),
            Arg::F32(self.cast.amax_floor),
        ]);
        let shared_bytes = shared_bytes as u32;
        let warps = (ROWS * columns).div_ceil(WARP_COLUMNS).clamp(1, 8) as u32;
        let config = LaunchConfig::new(rows.div_ceil(ROWS), 32 * warps);
        gpu.launch(&kernel, &LaunchConfig { shared_bytes, ..config }, &args)?;
        Ok(vec![dx, q, scale, dweight])
    }
}
