//! Casts by the kernels of `gpu/kernels/quant` with blocks of any shape: `quantize_block`,
//! `quantize_weight`, `transpose_quantize`; back: `dequantize`; and `quantize_delayed`.

use fathom_numerics::formats::Format;
use fathom_numerics::quant::delayed::AmaxAlgorithm;
use fathom_numerics::quant::{QuantConfig, ScaleKind};
use fathom_reference::op::codes::{Block, scales, stored_as};
use fathom_reference::ops::dequantize::Dequantize;
use fathom_reference::ops::quantize_block::QuantizeBlock;
use fathom_reference::ops::quantize_delayed::QuantizeDelayed;
use fathom_reference::ops::quantize_weight::QuantizeWeight;
use fathom_reference::ops::transpose_quantize::TransposeQuantize;
use fathom_trace::{DType, TensorMeta};

use super::{Kernel, is_bf16, mandatory, require, roles};
use crate::compile::{Source, source};
use crate::device::{Gpu, GpuError};
use crate::launch::{Arg, LaunchConfig};
use crate::tensor::DeviceTensor;

/// Entry `quantize_block`; constants `KIND`, `TURNED`, `BOTH`, `FORMAT`, `SCALE`.
const BLOCKS: Source<'static> = source!("quant/quantize_block.cu");
/// Entry `transpose_quantize`; constants `KIND`, `FORMAT`, `SCALE`.
const TRANSPOSED: Source<'static> = source!("quant/transpose_quantize.cu");
/// Entry `dequantize`; constants `KIND`, `Y_BF16`.
const VALUES: Source<'static> = source!("quant/dequantize.cu");
/// Entries `cast_delayed` and `next_scale`; constants `X_BF16`, `FORMAT`, `NEWEST`.
const DELAYED: Source<'static> = source!("quant/quantize_delayed.cu");

/// Threads of a CTA.
const THREADS: u32 = 256;
/// The longest tile of `transpose_quantize`'s own kernel, and the columns that a CTA of it takes.
const DEPTH: usize = 128;
const SIDE: usize = 32;
/// CTAs an SM of it that keep the GPU busy.
const BUSY_CTAS: usize = 4;

/// An extent above every dimension.
const WHOLE: u32 = 1 << 30;

/// The constant `FORMAT` of a cast.
pub(super) fn format_code(format: Format) -> u64 {
    match format {
        Format::E5M2 => 1,
        Format::E5M6 => 2,
        _ => 0,
    }
}

/// The constant `SCALE` of a cast.
pub(super) fn scale_code(scale: ScaleKind) -> u64 {
    match scale {
        ScaleKind::F32 => 0,
        ScaleKind::Pow2 => 1,
        ScaleKind::Mx => 2,
    }
}

/// A matrix of plain floats, or of codes with a scale a block.
pub(super) struct Kept<'a> {
    pub codes: &'a DeviceTensor,
    pub scales: Option<&'a DeviceTensor>,
    pub columns: usize,
    pub block: Block,
}

impl<'a> Kept<'a> {
    /// A matrix of plain floats.
    pub fn plain(x: &'a DeviceTensor) -> Kept<'a> {
        Kept { codes: x, scales: None, columns: x.rows_columns().1, block: [None; 2] }
    }

    /// The constant `KIND`.
    pub fn kind(&self) -> u64 {
        match self.codes.dtype() {
            DType::BF16 => 1,
            DType::F8E4M3 => 2,
            DType::F8E5M2 => 3,
            DType::U32 => 4,
            _ => 0,
        }
    }

    /// Codes, scales, columns, and the extents of a block.
    pub fn args(&self) -> [Arg<'a>; 5] {
        let [rows, columns] = self.block.map(|extent| Arg::U32(clamped(extent)));
        let codes = Arg::Tensor(self.codes);
        [codes, Arg::OptionalTensor(self.scales), Arg::U32(self.columns as u32), rows, columns]
    }
}

/// An extent as a kernel takes it: the whole dimension is longer than any, and a dimension beside
/// it still fits 32 bits.
fn clamped(extent: Option<usize>) -> u32 {
    extent.map_or(WHOLE, |n| n.min(WHOLE as usize) as u32)
}

/// Begin and end of the blocks of `extent` into which segments of these lengths are cut.
fn bounds(segments: &[usize], extent: Option<usize>) -> Vec<i32> {
    let mut bounds = Vec::new();
    let mut begin = 0;
    for length in segments {
        let end = begin + length;
        while begin < end {
            let next = extent.map_or(end, |extent| end.min(begin.saturating_add(extent)));
            bounds.extend([begin as i32, next as i32]);
            begin = next;
        }
    }
    bounds
}

/// Where a cast's results go: strides of rows, columns and matrices in elements.
struct To<'a> {
    tensor: &'a DeviceTensor,
    strides: [usize; 3],
}

impl<'a> To<'a> {
    fn args(&self) -> [Arg<'a>; 4] {
        let [row, column, matrix] = self.strides.map(|stride| Arg::U64(stride as u64));
        [Arg::Tensor(self.tensor), row, column, matrix]
    }
}

/// One launch of `quantize_block`.
struct BlockCast<'a> {
    x: Kept<'a>,
    /// Whether the matrix that is cast is the transpose of `x`.
    turned: bool,
    /// Matrices that lie one after the other, and the rows of one.
    matrices: usize,
    rows: usize,
    block_rows: Option<usize>,
    bounds: Vec<i32>,
    config: QuantConfig,
}

impl BlockCast<'_> {
    fn launch(&self, gpu: &Gpu, q: &To<'_>, scale: &To<'_>) -> Result<(), GpuError> {
        self.launch_both(gpu, (q, scale), None)
    }

    /// The same with codes and scales of the transpose, each in its own order.
    fn launch_both(
        &self,
        gpu: &Gpu,
        (q, scale): (&To<'_>, &To<'_>),
        transpose: Option<[&DeviceTensor; 2]>,
    ) -> Result<(), GpuError> {
        let defines = [
            ("KIND", self.x.kind()),
            ("TURNED", u64::from(self.turned)),
            ("BOTH", u64::from(transpose.is_some())),
            ("FORMAT", format_code(self.config.format)),
            ("SCALE", scale_code(self.config.scale)),
        ];
        let kernel = gpu.kernel(BLOCKS, "quantize_block", &defines, 0)?;
        let bounds = gpu.constants(&self.bounds)?;
        let across = self.bounds.len() / 2;
        let down = scales([self.block_rows, None], self.rows, 1)[0];
        let matrix_bytes = self.x.codes.bytes() / self.matrices.max(1);
        let mut args = self.x.args().to_vec();
        args.push(Arg::U64(matrix_bytes as u64));
        args.extend(q.args());
        args.extend(scale.args());
        args.extend([0, 1].map(|at| Arg::OptionalTensor(transpose.map(|tensors| tensors[at]))));
        args.extend([
            Arg::Tensor(&bounds),
            Arg::U32(self.rows as u32),
            Arg::U32(clamped(self.block_rows)),
            Arg::U32(across as u32),
            Arg::F32(self.config.amax_floor),
        ]);
        gpu.launch(&kernel, &LaunchConfig::new(self.matrices * down * across, THREADS), &args)
    }
}

impl Kernel for QuantizeBlock {
    fn covers(&self, inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        let [Some(x)] = inputs else { unreachable!("mandatory") };
        require(&[(x.dtype != DType::F16, "x of F32 or BF16")])
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [x] = roles(inputs);
        let x = mandatory(x);
        let (m, k) = x.rows_columns();
        let [down, across] = scales(self.block, m, k);
        let q = gpu.tensor(stored_as(self.format), &[m, k])?;
        let scale = gpu.tensor(DType::F32, &[down, across])?;
        let QuantizeBlock { format, scale: kind, amax_floor, .. } = *self;
        let cast = BlockCast {
            x: Kept::plain(&x),
            turned: false,
            matrices: 1,
            rows: m,
            block_rows: self.block[0],
            bounds: bounds(&[k], self.block[1]),
            config: QuantConfig { format, scale: kind, amax_floor },
        };
        let to_scale = To { tensor: &scale, strides: [across, 1, 0] };
        cast.launch(gpu, &To { tensor: &q, strides: [k, 1, 0] }, &to_scale)?;
        Ok(vec![q, scale])
    }
}

impl Kernel for QuantizeWeight {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    /// The codes of the transpose are those of the matrix, and written by the same launch;
    /// `transpose_anew` casts the transpose in blocks of its own.
    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [w] = roles(inputs);
        let w = mandatory(w);
        let [leading @ .., n, k] = w.shape() else { unreachable!("infer accepted it") };
        let (n, k) = (*n, *k);
        let shape = |last: [usize; 2]| [leading, &last[..]].concat();
        let [down, across] = scales(self.block, n, k);
        let [down_t, across_t] =
            if self.transpose_anew { scales(self.block, k, n) } else { [across, down] };
        let q = gpu.tensor(DType::F8E4M3, w.shape())?;
        let scale = gpu.tensor(DType::F32, &shape([down, across]))?;
        let q_t = gpu.tensor(DType::F8E4M3, &shape([k, n]))?;
        let scale_t = gpu.tensor(DType::F32, &shape([down_t, across_t]))?;
        let config = QuantConfig { scale: self.scale, ..QuantConfig::default() };
        let matrices: usize = leading.iter().product();
        let cast = BlockCast {
            x: Kept::plain(&w),
            turned: false,
            matrices,
            rows: n,
            block_rows: self.block[0],
            bounds: bounds(&[k], self.block[1]),
            config,
        };
        let to = To { tensor: &q, strides: [k, 1, n * k] };
        let to_scale = To { tensor: &scale, strides: [across, 1, down * across] };
        if !self.transpose_anew {
            cast.launch_both(gpu, (&to, &to_scale), Some([&q_t, &scale_t]))?;
            return Ok(vec![q, scale, q_t, scale_t]);
        }
        cast.launch(gpu, &to, &to_scale)?;
        let anew = BlockCast { turned: true, rows: k, bounds: bounds(&[n], self.block[1]), ..cast };
        let to = To { tensor: &q_t, strides: [n, 1, n * k] };
        let to_scale = To { tensor: &scale_t, strides: [across_t, 1, down_t * across_t] };
        anew.launch(gpu, &to, &to_scale)?;
        Ok(vec![q, scale, q_t, scale_t])
    }
}

impl Kernel for TransposeQuantize {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [x, x_scale] = roles(inputs);
        let x = mandatory(x);
        let columns = self.columns;
        let taken: usize = self.segments.iter().sum();
        let bounds = bounds(&self.segments, self.block[1]);
        let (down, tiles) = (scales(self.block, columns, 1)[0], bounds.len() / 2);
        let q = gpu.tensor(stored_as(self.format), &[columns, taken])?;
        let scale = gpu.tensor(DType::F32, &[down, tiles])?;
        let x = Kept { codes: &x, scales: x_scale.as_ref(), columns, block: self.from };
        let config =
            QuantConfig { format: self.format, scale: self.scale, ..QuantConfig::default() };
        let longest = bounds.chunks(2).map(|b| (b[1] - b[0]) as usize).max().unwrap_or(0);
        if self.block[0] != Some(1) || longest > DEPTH {
            let rows = columns;
            let block_rows = self.block[0];
            let cast = BlockCast { x, turned: true, matrices: 1, rows, block_rows, bounds, config };
            let to_scale = To { tensor: &scale, strides: [tiles, 1, 0] };
            cast.launch(gpu, &To { tensor: &q, strides: [taken, 1, 0] }, &to_scale)?;
            return Ok(vec![q, scale]);
        }
        let defines = [
            ("KIND", x.kind()),
            ("FORMAT", format_code(self.format)),
            ("SCALE", scale_code(self.scale)),
        ];
        let kernel = gpu.kernel(TRANSPOSED, "transpose_quantize", &defines, 0)?;
        let bounds = gpu.constants(&bounds)?;
        let mut args = x.args().to_vec();
        // As many columns a CTA as keep the GPU busy, the same to every CTA.
        let sides = columns.div_ceil(SIDE);
        let busy = BUSY_CTAS * gpu.description().sm_count as usize;
        let span = (sides * tiles / busy).clamp(1, sides.max(1));
        args.extend([
            Arg::Tensor(&q),
            Arg::Tensor(&scale),
            Arg::Tensor(&bounds),
            Arg::U32(taken as u32),
            Arg::U32(tiles as u32),
            Arg::U32(span as u32),
            Arg::F32(config.amax_floor),
        ]);
        let ctas = sides.div_ceil(span) * tiles;
        gpu.launch(&kernel, &LaunchConfig::new(ctas, THREADS), &args)?;
        Ok(vec![q, scale])
    }
}

impl Kernel for Dequantize {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [q, scale] = roles(inputs);
        let q = mandatory(q);
        let y = gpu.tensor(self.out, &[q.rows_columns().0, self.columns])?;
        let x =
            Kept { codes: &q, scales: scale.as_ref(), columns: self.columns, block: self.block };
        let defines = [("KIND", x.kind()), ("Y_BF16", is_bf16(&y))];
        let kernel = gpu.kernel(VALUES, "dequantize", &defines, 0)?;
        let [codes, scales, columns, rows, across] = x.args();
        let n = Arg::U64(y.len() as u64);
        let args = [codes, scales, Arg::Tensor(&y), n, columns, rows, across];
        gpu.launch(&kernel, &LaunchConfig::elements(y.len()), &args)?;
        Ok(vec![y])
    }
}

impl Kernel for QuantizeDelayed {
    fn covers(&self, inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        let [Some(x), ..] = inputs else { unreachable!("mandatory") };
        require(&[(x.dtype != DType::F16, "x of F32 or BF16")])
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [x, history, scale] = roles(inputs);
        let (x, history, scale) = (mandatory(x), mandatory(history), mandatory(scale));
        let q = gpu.tensor(stored_as(self.format), x.shape())?;
        let scale_inv = gpu.tensor(DType::F32, &[1, 1])?;
        let new_history = gpu.tensor(DType::F32, history.shape())?;
        let new_scale = gpu.tensor(DType::F32, &[1])?;
        let newest = u64::from(self.amax == AmaxAlgorithm::MostRecent);
        let defines =
            [("X_BF16", is_bf16(&x)), ("FORMAT", format_code(self.format)), ("NEWEST", newest)];
        let most = 4 * gpu.description().sm_count as usize;
        let ctas = x.len().div_ceil(THREADS as usize).min(most);
        let maxima = gpu.tensor(DType::F32, &[ctas])?;
        let cast = gpu.kernel(DELAYED, "cast_delayed", &defines, 0)?;
        let args = [
            Arg::Tensor(&x),
            Arg::Tensor(&scale),
            Arg::Tensor(&q),
            Arg::Tensor(&maxima),
            Arg::U64(x.len() as u64),
        ];
        gpu.launch(&cast, &LaunchConfig::new(ctas, THREADS), &args)?;
        let next = gpu.kernel(DELAYED, "next_scale", &defines, 0)?;
        let args = [
            Arg::Tensor(&maxima),
            Arg::Tensor(&history),
            Arg::Tensor(&scale),
            Arg::Tensor(&new_history),
            Arg::Tensor(&new_scale),
            Arg::Tensor(&scale_inv),
            Arg::U32(ctas as u32),
            Arg::U32(history.len() as u32),
            Arg::F32(2.0f32.powi(i32::from(self.margin))),
        ];
        gpu.launch(&next, &LaunchConfig::new(1, 32), &args)?;
        Ok(vec![q, scale_inv, new_history, new_scale])
    }
}
