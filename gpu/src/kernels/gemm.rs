//! `gemm` by `gpu/kernels/gemm/fp32_gemm.cu` on F32 and `gpu/kernels/gemm/sm90_bf16_gemm.cu` on
//! BF16, and what it shares with `grouped_gemm`: how products are cut into ranges, and
//! their launch.

use fathom_reference::ops::gemm::{Gemm, GemmShape, Layout};
use fathom_trace::{DType, TensorMeta};

use super::{Kernel, mandatory, roles};
use crate::compile::{Source, source};
use crate::device::{Gpu, GpuError};
use crate::launch::{Arg, LaunchConfig, Swizzle};
use crate::tensor::DeviceTensor;

/// Entry `fp32_gemm`, constants `LAYOUT` and `GROUPING`.
const FP32: Source<'static> = source!("gemm/fp32_gemm.cu");
/// Entry `bf16_gemm`, constants `LAYOUT`, `GROUPING`, `OUT_BF16` and `STAGES`.
const BF16: Source<'static> = source!("gemm/sm90_bf16_gemm.cu");

/// Extent of a CTA's tile of an F32 product.
const FP32_TILE: usize = 64;
/// Extent of a CTA's tile of a tensor core's product.
pub(super) const TILE: usize = 128;
/// Stages of the BF16 pipeline, of two operands of 128 x 64 and two barriers each.
const STAGES: u32 = 4;
const STAGE_BYTES: u32 = 2 * 128 * 128 + 16;

/// What the ranges of a product bound, by the numbers of `gemm/work.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Grouping {
    /// Ranges of k, chained into one result.
    Depth = 0,
    /// Rows of a and of the result by expert; behind them, rows of no expert.
    Rows = 1,
    /// A range of k by expert, with a result of its own.
    GroupDepth = 2,
}

/// A product, or one product an expert: sizes, and lengths of its ranges.
#[derive(Clone, Debug)]
pub(super) struct Ranges {
    pub grouping: Grouping,
    pub lengths: Vec<usize>,
    /// Of one result.
    pub shape: GemmShape,
}

impl Ranges {
    /// Ascending bounds of the ranges, from 0; behind the experts' rows those of no expert.
    pub fn bounds(&self) -> Vec<i32> {
        let mut bounds = vec![0i32];
        bounds.extend(self.lengths.iter().scan(0, |end, &length| {
            *end += length as i32;
            Some(*end)
        }));
        if self.grouping == Grouping::Rows {
            bounds.push(self.shape.m as i32);
        }
        bounds
    }

    /// Lengths of the ranges of k.
    pub fn depths(&self) -> Vec<usize> {
        match self.grouping {
            Grouping::Rows => vec![self.shape.k],
            Grouping::Depth | Grouping::GroupDepth => self.lengths.clone(),
        }
    }

    /// Number of ranges, as kernels count them.
    pub fn count(&self) -> usize {
        self.lengths.len() + usize::from(self.grouping == Grouping::Rows)
    }

    /// Tiles of `extent` squared of all results.
    pub fn tiles(&self, extent: usize) -> usize {
        let GemmShape { m, n, .. } = self.shape;
        let down = match self.grouping {
            Grouping::Depth => m.div_ceil(extent),
            Grouping::Rows => {
                let rest = m - self.lengths.iter().sum::<usize>();
                self.lengths.iter().chain([&rest]).map(|rows| rows.div_ceil(extent)).sum()
            }
            Grouping::GroupDepth => self.lengths.len() * m.div_ceil(extent),
        };
        down * n.div_ceil(extent)
    }
}

/// `a b (+ c)` in `out`, of this shape; enqueued. Where `out` is F32 and nobody else holds c, the
/// result takes its place.
pub(super) fn launch(
    gpu: &Gpu,
    layout: Layout,
    ranges: &Ranges,
    [a, b]: [&DeviceTensor; 2],
    c: Option<DeviceTensor>,
    (out, shape): (DType, &[usize]),
) -> Result<DeviceTensor, GpuError> {
    let (c, d) = match c {
        Some(c) if out == DType::F32 => {
            let d = gpu.writable(c)?;
            (Some(d.clone()), d)
        }
        c => (c, gpu.tensor(out, shape)?),
    };
    let GemmShape { m, n, k } = ranges.shape;
    let bounds = gpu.constants(&ranges.bounds())?;
    let shared = [
        Arg::OptionalTensor(c.as_ref()),
        Arg::Tensor(&d),
        Arg::Tensor(&bounds),
        Arg::U32(ranges.count() as u32),
        Arg::U32(m as u32),
        Arg::U32(n as u32),
        Arg::U32(k as u32),
    ];
    let [layout_is, grouping] = [("LAYOUT", layout as u64), ("GROUPING", ranges.grouping as u64)];
    if a.dtype() == DType::F32 {
        let kernel = gpu.kernel(FP32, "fp32_gemm", &[layout_is, grouping], 0)?;
        let config = LaunchConfig::new(ranges.tiles(FP32_TILE), 256);
        let args: Vec<_> = [Arg::Tensor(a), Arg::Tensor(b)].into_iter().chain(shared).collect();
        gpu.launch(&kernel, &config, &args)?;
        return Ok(d);
    }
    let defines = [
        layout_is,
        grouping,
        ("OUT_BF16", u64::from(out == DType::BF16)),
        ("STAGES", u64::from(STAGES)),
    ];
    let shared_bytes = STAGES * STAGE_BYTES;
    let config = LaunchConfig { shared_bytes, ..LaunchConfig::new(ranges.tiles(TILE), 384) };
    if config.grid == 0 {
        return Ok(d);
    }
    let kernel = gpu.kernel(BF16, "bf16_gemm", &defines, shared_bytes)?;
    // There is no map of an empty tensor; nobody reads what is in its place.
    let matrix = |x: &DeviceTensor| {
        if x.is_empty() { gpu.matrix(&gpu.zeros(DType::BF16, &[1, 64])?) } else { gpu.matrix(x) }
    };
    let (a, b) = (matrix(a)?, matrix(b)?);
    // Rows along k: 128 of M or N by 64 of k a box; else two boxes of 64 by 64.
    let boxed = |along_k| if along_k { (128, 64) } else { (64, 64) };
    let map_a = gpu.tensor_map(&a, boxed(layout != Layout::Tn), Swizzle::Bytes128)?;
    let map_b = gpu.tensor_map(&b, boxed(layout == Layout::Nt), Swizzle::Bytes128)?;
    let args: Vec<_> = [Arg::Map(&map_a), Arg::Map(&map_b)].into_iter().chain(shared).collect();
    gpu.launch(&kernel, &config, &args)?;
    Ok(d)
}

/// `a b (+ c)` of matrices, F32 or BF16, in `out`; enqueued.
///
/// # Errors
/// [`GpuError`].
///
/// # Panics
/// Where the shapes do not fit each other.
pub fn product(
    gpu: &Gpu,
    layout: Layout,
    [a, b]: [&DeviceTensor; 2],
    c: Option<DeviceTensor>,
    out: DType,
) -> Result<DeviceTensor, GpuError> {
    let shape = layout.shape(a.shape(), b.shape());
    let shape = shape.unwrap_or_else(|| panic!("{layout:?} of {a:?} and {b:?}"));
    let ranges = Ranges { grouping: Grouping::Depth, lengths: vec![shape.k], shape };
    launch(gpu, layout, &ranges, [a, b], c, (out, &[shape.m, shape.n]))
}

impl Kernel for Gemm {
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
        let shape = self.layout.shape(a.shape(), b.shape()).expect("inferred");
        // In F32 every element is one chain over all of k.
        let one_range = self.segments.is_empty() || a.dtype() == DType::F32;
        let lengths = if one_range { vec![shape.k] } else { self.segments.clone() };
        let ranges = Ranges { grouping: Grouping::Depth, lengths, shape };
        let out = (self.out, &[shape.m, shape.n][..]);
        Ok(vec![launch(gpu, self.layout, &ranges, [&a, &b], c, out)?])
    }
}
