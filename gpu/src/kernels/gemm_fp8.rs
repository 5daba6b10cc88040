//! `gemm_fp8` by `gpu/kernels/gemm/sm90_fp8_gemm_1d2d.cu`: E4M3 x E4M3 on Hopper, scales for every
//! 1x128 of A and 128x128 of B, promotion every 128. Other formats, scale blocks and intervals, and
//! products that are added, go to `fp8`.
//!
//! Any m, n, k: rows are padded to 16 bytes, and the tensor maps' bounds hide the padding.

use fathom_numerics::gemm::{Accumulate, Promote};
use fathom_numerics::mma::Arch;
use fathom_reference::op::codes::stored_as;
use fathom_reference::ops::gemm::GemmShape;
use fathom_reference::ops::gemm_fp8::GemmFp8;
use fathom_trace::{DType, TensorMeta};

use super::gemm::{Grouping, Ranges};
use super::{Kernel, fp8, mandatory, require, roles};
use crate::compile::FP8_GEMM_1D2D;
use crate::device::{Gpu, GpuError};
use crate::launch::{Arg, LaunchConfig, Swizzle, TensorMap};
use crate::tensor::{DeviceTensor, Matrix};

/// Extent of a tile of the output, and of a block of K.
const BLOCK: usize = 128;
/// CTAs of a cluster; they share the columns of a tile.
const CLUSTER: usize = 2;
/// Two warpgroups that multiply and one that copies.
const THREADS: u32 = 384;

/// The launch of one shape: all of it but addresses.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Name of the entry in [`FP8_GEMM_1D2D`].
    pub entry: &'static str,
    /// The constants that it is compiled for.
    pub defines: [(&'static str, u64); 4],
    /// Grid, cluster, shared memory.
    pub config: LaunchConfig,
    /// Rows and columns of the boxes in which TMA copies a, b, a_scale and a BF16 d.
    pub boxes: [(u32, u32); 4],
}

/// How `d[m, n] = a[m, k] b[n, k]^T` is launched on a device of `sm_count` SMs.
pub fn plan([m, n, k]: [usize; 3], output_f32: bool, sm_count: usize) -> Plan {
    let (stages, shared_bytes) = pipeline(output_f32);
    let block = BLOCK as u32;
    // Persistent: a cluster for every pair of tiles, at most one CTA an SM.
    let tiles = CLUSTER * m.div_ceil(CLUSTER * BLOCK) * n.div_ceil(BLOCK);
    let sms = sm_count / CLUSTER * CLUSTER;
    Plan {
        entry: "fp8_gemm_1d2d",
        defines: [
            ("N", n as u64),
            ("K", k as u64),
            ("OUTPUT_F32", u64::from(output_f32)),
            ("STAGES", stages),
        ],
        config: LaunchConfig {
            grid: tiles.min(sms) as u32,
            block: THREADS,
            cluster: CLUSTER as u32,
            shared_bytes,
            programmatic: true,
        },
        boxes: [(block, block), (block / CLUSTER as u32, block), (1, block), (64, 64)],
    }
}

/// Pipeline stages, and the bytes of shared memory that they take (the kernel's `SHARED_BYTES`).
fn pipeline(output_f32: bool) -> (u64, u32) {
    let stage = 2 * (BLOCK * BLOCK) as u32 + 4 * BLOCK as u32 + 16;
    if output_f32 { (6, 6 * stage) } else { (5, 5 * stage + 2 * (BLOCK * BLOCK) as u32) }
}

/// `d[m, n] = a[m, k] b[n, k]^T`, enqueued.
///
/// `a_scale` is transposed, [ceil(k / 128), m] (see [`Gpu::transposed`]); `b_scale` is
/// [ceil(n / 128), ceil(k / 128)] F32. `d` is F32 or BF16.
///
/// # Errors
/// [`GpuError`].
///
/// # Panics
/// Where shapes or element types do not fit each other, or a dimension is 0.
pub fn product(
    gpu: &Gpu,
    (a, a_scale): (&Matrix, &Matrix),
    (b, b_scale): (&Matrix, &DeviceTensor),
    d: &Matrix,
) -> Result<(), GpuError> {
    let (m, n, k) = (d.rows, d.columns, a.columns);
    assert!(m > 0 && n > 0 && k > 0, "gemm_fp8 of {m} x {n} x {k}");
    assert_eq!([a.rows, b.rows, b.columns], [m, n, k], "rows of a and b, columns of b");
    assert_eq!([a_scale.rows, a_scale.columns], [k.div_ceil(BLOCK), m], "a_scale, transposed");
    assert_eq!([a.dtype(), b.dtype()], [DType::F8E4M3; 2], "a and b");
    let output_f32 = d.dtype() == DType::F32;
    let plan = plan([m, n, k], output_f32, gpu.description().sm_count as usize);
    let kernel = gpu.kernel(FP8_GEMM_1D2D, plan.entry, &plan.defines, plan.config.shared_bytes)?;
    let [box_a, box_b, box_scale, box_d] = plan.boxes;
    let map_a = gpu.tensor_map(a, box_a, Swizzle::Bytes128)?;
    let map_b = gpu.tensor_map(b, box_b, Swizzle::Bytes128)?;
    let map_scale = gpu.tensor_map(a_scale, box_scale, Swizzle::None)?;
    let map_d =
        if output_f32 { TensorMap::unused() } else { gpu.tensor_map(d, box_d, Swizzle::Bytes128)? };
    let args = [
        Arg::Map(&map_a),
        Arg::Map(&map_b),
        Arg::Map(&map_scale),
        Arg::Map(&map_d),
        Arg::Tensor(b_scale),
        Arg::Matrix(d),
        Arg::U64(d.pitch() as u64),
        Arg::U32(m as u32),
    ];
    gpu.launch(&kernel, &plan.config, &args)
}

/// Whether the variant is the one of the report, for which there is a kernel of its own.
fn is_1d2d(op: &GemmFp8, a: DType, b: DType) -> bool {
    op.promotion_interval == Some(BLOCK)
        && op.a_tile == [Some(1), Some(BLOCK)]
        && op.b_block == [Some(BLOCK); 2]
        && op.accumulate == Accumulate::Overwrite
        && [a, b] == [DType::F8E4M3; 2]
}

impl Kernel for GemmFp8 {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        require(&[
            (self.arch == Arch::Sm90, "arch: sm_90"),
            (self.promote == Promote::Fma, "promote: fma"),
            (self.accumulator.is_none(), "no accumulator of its own"),
        ])?;
        fp8::covers(self.promotion_interval, self.k, [self.a_tile, self.b_block])
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [a, a_scale, b, b_scale, c] = roles(inputs);
        let (a, b) = (mandatory(a), mandatory(b));
        let (a_scale, b_scale) = (mandatory(a_scale), mandatory(b_scale));
        let GemmFp8 { m, n, k, .. } = *self;
        let (out, shape) = (stored_as(self.d), [m, n]);
        if is_1d2d(self, a.dtype(), b.dtype()) && m > 0 && n > 0 && k > 0 {
            let a_scale = gpu.transposed(&a_scale)?;
            let d = gpu.padded(out, m, n)?;
            product(gpu, (&gpu.matrix(&a)?, &a_scale), (&gpu.matrix(&b)?, &b_scale), &d)?;
            return Ok(vec![gpu.dense(d, &shape)?]);
        }
        let shape_mnk = GemmShape { m, n, k };
        let product = fp8::Product {
            ranges: Ranges { grouping: Grouping::Depth, lengths: vec![k], shape: shape_mnk },
            a: fp8::Operand { codes: &a, scales: &a_scale, block: self.a_tile },
            b: fp8::Operand { codes: &b, scales: &b_scale, block: self.b_block },
            promotion_interval: self.promotion_interval,
            accumulate: self.accumulate,
            out,
        };
        Ok(vec![product.launch(gpu, c, &shape)?])
    }
}
