//! `gemm_fp8` by `gpu/kernels/gemm/sm90_fp8_gemm_1d2d.cu`: E4M3 x E4M3 on Hopper, scales for every
//! 1x128 of A and 128x128 of B, promotion every 128.
//!
//! Any m, n, k: rows are padded to 16 bytes, and the tensor maps' bounds hide the padding.

use fathom_numerics::gemm::{Accumulate, Promote};
use fathom_numerics::mma::Arch;
use fathom_reference::op::codes::stored_as;
use fathom_reference::ops::gemm_fp8::GemmFp8;
use fathom_reference::{DynOp, Tensor};
use fathom_trace::DType;

use super::RunError;
use crate::compile::FP8_GEMM_1D2D;
use crate::device::{Buffer, Gpu, GpuError, Matrix};
use crate::launch::{Arg, LaunchConfig, Swizzle, TensorMap};

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
    match output_f32 {
        true => (6, 6 * stage),
        false => (5, 5 * stage + 2 * (BLOCK * BLOCK) as u32),
    }
}

/// `d[m, n] = a[m, k] b[n, k]^T`, enqueued.
///
/// `a_scale` is transposed, [ceil(k / 128), m]: what [`super::quantize_tile::launch`] writes.
/// `b_scale` is dense, [ceil(n / 128), ceil(k / 128)] F32. `d` is F32 or BF16.
///
/// # Errors
/// [`GpuError`].
///
/// # Panics
/// Where shapes or element types do not fit each other, or a dimension is 0.
pub fn launch(
    gpu: &Gpu,
    a: &Matrix,
    a_scale: &Matrix,
    b: &Matrix,
    b_scale: &Buffer,
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
    let map_d = match output_f32 {
        true => TensorMap::unused(),
        false => gpu.tensor_map(d, box_d, Swizzle::Bytes128)?,
    };
    let args = [
        Arg::Map(&map_a),
        Arg::Map(&map_b),
        Arg::Map(&map_scale),
        Arg::Map(&map_d),
        Arg::Buffer(b_scale),
        Arg::Buffer(d.buffer()),
        Arg::U64(d.pitch() as u64),
        Arg::U32(m as u32),
    ];
    gpu.launch(&kernel, &plan.config, &args)
}

/// The op from host to host.
///
/// # Errors
/// [`RunError`].
pub(super) fn run(
    gpu: &Gpu,
    op: &dyn DynOp,
    inputs: &[Option<Tensor>],
) -> Result<Vec<Tensor>, RunError> {
    let op = op.as_any().downcast_ref::<GemmFp8>().expect("the table names this op");
    let [Some(a), Some(a_scale), Some(b), Some(b_scale), _] = inputs else {
        unreachable!("infer accepted the inputs");
    };
    covers(op, a, b).map_err(RunError::Unsupported)?;
    let dtype = stored_as(op.d);
    if op.m == 0 || op.n == 0 || op.k == 0 {
        return Ok(vec![Tensor::zeros(dtype, &[op.m, op.n])]);
    }
    let a_scale = Tensor::from_array(a_scale.matrix::<f32>().t().to_owned());
    let (a, b) = (gpu.upload_matrix(a)?, gpu.upload_matrix(b)?);
    let (a_scale, b_scale) = (gpu.upload_matrix(&a_scale)?, gpu.upload(b_scale.bytes())?);
    let d = gpu.zeros(dtype, op.m, op.n)?;
    launch(gpu, &a, &a_scale, &b, &b_scale, &d)?;
    Ok(vec![gpu.download(&d)?])
}

/// Whether the kernel computes this variant; else the parameter, and what it takes.
fn covers(op: &GemmFp8, a: &Tensor, b: &Tensor) -> Result<(), String> {
    let rules = [
        (op.arch == Arch::Sm90, "arch: sm_90"),
        (op.promotion_interval == Some(BLOCK), "promotion_interval: 128"),
        (op.a_tile == [Some(1), Some(BLOCK)], "a_tile: [1, 128]"),
        (op.b_block == [Some(BLOCK); 2], "b_block: [128, 128]"),
        (op.accumulate == Accumulate::Overwrite, "accumulate: overwrite"),
        (op.promote == Promote::Fma, "promote: fma"),
        (op.accumulator.is_none(), "no accumulator of its own"),
        (a.dtype() == DType::F8E4M3 && b.dtype() == DType::F8E4M3, "a and b of F8_E4M3"),
    ];
    match rules.iter().find(|(holds, _)| !holds) {
        None => Ok(()),
        Some((_, takes)) => Err(format!("the kernel takes {takes}")),
    }
}
