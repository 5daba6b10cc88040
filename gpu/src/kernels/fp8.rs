//! What `gemm_fp8`, `grouped_gemm_fp8` and `wgrad_fp8` share: `gpu/kernels/gemm/sm90_fp8_gemm.cu`,
//! for any scale blocks, formats and ranges of k.

use fathom_numerics::gemm::Accumulate;
use fathom_reference::op::codes::{Block, extent};
use fathom_reference::ops::gemm::GemmShape;
use fathom_trace::DType;

use super::gemm::{Ranges, TILE};
use crate::compile::{Source, source};
use crate::device::{Gpu, GpuError};
use crate::launch::{Arg, LaunchConfig, Swizzle};
use crate::tensor::DeviceTensor;

/// Entry `fp8_gemm`; its constants stand at its head.
const SOURCE: Source<'static> = source!("gemm/sm90_fp8_gemm.cu");
/// Extent of a block of k.
const BLOCK: usize = 128;
/// Stages of the pipeline, of two operands of 128 x 128 and two barriers each.
const STAGES: u32 = 4;
const STAGE_BYTES: u32 = 2 * 128 * 128 + 16;

/// An operand: codes, scales, and which elements share one.
pub(super) struct Operand<'a> {
    pub codes: &'a DeviceTensor,
    pub scales: &'a DeviceTensor,
    pub block: Block,
}

/// A product of codes, or one an expert.
pub(super) struct Product<'a> {
    pub ranges: Ranges,
    pub a: Operand<'a>,
    pub b: Operand<'a>,
    pub promotion_interval: Option<usize>,
    pub accumulate: Accumulate,
    pub out: DType,
}

/// Whether the kernel has this promotion: an interval of whole blocks of k, within a scale's reach.
/// `longest` is the length of the longest range of k.
///
/// # Errors
/// What the kernel takes.
pub(super) fn covers(
    interval: Option<usize>,
    longest: usize,
    blocks: [Block; 2],
) -> Result<(), String> {
    let spans = interval.unwrap_or(usize::MAX).min(longest);
    if spans < longest && !spans.is_multiple_of(BLOCK) {
        return Err("the kernel takes promotion_interval: a multiple of 128, or null".to_owned());
    }
    let reach = blocks.map(|block| extent(block).k);
    if reach.iter().any(|&reach| reach < longest && (reach < spans || reach % spans.max(1) != 0)) {
        return Err(
            "the kernel takes scale blocks that are a multiple of promotion_interval along k"
                .to_owned(),
        );
    }
    Ok(())
}

impl Product<'_> {
    /// The result, of this shape; enqueued. Where it is F32 and nobody else holds c, it takes c's
    /// place.
    pub fn launch(
        &self,
        gpu: &Gpu,
        c: Option<DeviceTensor>,
        shape: &[usize],
    ) -> Result<DeviceTensor, GpuError> {
        let (c, d) = match c {
            Some(c) if self.out == DType::F32 => {
                let d = gpu.writable(c)?;
                (Some(d.clone()), d)
            }
            c => (c, gpu.tensor(self.out, shape)?),
        };
        let shared_bytes = STAGES * STAGE_BYTES;
        let tiles = self.ranges.tiles(TILE);
        let config = LaunchConfig { shared_bytes, ..LaunchConfig::new(tiles, 384) };
        if config.grid == 0 {
            return Ok(d);
        }
        let GemmShape { m, n, k } = self.ranges.shape;
        let kernel = gpu.kernel(SOURCE, "fp8_gemm", &self.defines(), shared_bytes)?;
        let [a, b] = [self.a.codes, self.b.codes].map(|codes| match codes.is_empty() {
            // There is no map of an empty tensor; nobody reads what is in its place.
            true => gpu.matrix(&gpu.zeros(DType::U8, &[1, BLOCK])?),
            false => gpu.matrix(codes),
        });
        let (a, b, whole) = (a?, b?, (BLOCK as u32, BLOCK as u32));
        let map_a = gpu.tensor_map(&a, whole, Swizzle::Bytes128)?;
        let map_b = gpu.tensor_map(&b, whole, Swizzle::Bytes128)?;
        let bounds = gpu.constants(&self.bounds())?;
        let args = [
            Arg::Map(&map_a),
            Arg::Map(&map_b),
            Arg::Tensor(self.a.scales),
            Arg::Tensor(self.b.scales),
            Arg::OptionalTensor(c.as_ref()),
            Arg::Tensor(&d),
            Arg::Tensor(&bounds),
            Arg::U32(self.ranges.count() as u32),
            Arg::U32(m as u32),
            Arg::U32(n as u32),
            Arg::U32(k as u32),
            Arg::U32(self.a.scales.rows_columns().1 as u32),
            Arg::U32(self.b.scales.rows_columns().1 as u32),
        ];
        gpu.launch(&kernel, &config, &args)?;
        Ok(d)
    }

    fn defines(&self) -> Vec<(&'static str, u64)> {
        // 0: the whole dimension.
        let of = |size: Option<usize>| size.unwrap_or(0) as u64;
        let e5m2 = |x: &Operand<'_>| u64::from(x.codes.dtype() == DType::F8E5M2);
        // An interval that spans every range is the whole of each.
        let longest = self.ranges.depths().into_iter().max().unwrap_or(0);
        let interval = self.promotion_interval.filter(|&interval| interval < longest);
        let interval = if self.promotion_interval == Some(BLOCK) { Some(BLOCK) } else { interval };
        vec![
            ("GROUPING", self.ranges.grouping as u64),
            ("A_E5M2", e5m2(&self.a)),
            ("B_E5M2", e5m2(&self.b)),
            ("A_ROWS", of(self.a.block[0])),
            ("B_ROWS", of(self.b.block[0])),
            ("A_DEPTH", of(self.a.block[1])),
            ("B_DEPTH", of(self.b.block[1])),
            ("INTERVAL", of(interval)),
            ("ACCUMULATE", self.accumulate as u64),
            ("OUT_BF16", u64::from(self.out == DType::BF16)),
            ("STAGES", u64::from(STAGES)),
        ]
    }

    /// The ranges' bounds, then the columns of a's and of b's scales at which each begins.
    fn bounds(&self) -> Vec<i32> {
        let mut bounds = self.ranges.bounds();
        for block in [self.a.block, self.b.block] {
            let columns = self.ranges.lengths.iter().scan(0, |next, length| {
                let first = *next;
                *next += length.div_ceil(extent(block).k) as i32;
                Some(first)
            });
            bounds.extend(columns);
        }
        bounds
    }
}
