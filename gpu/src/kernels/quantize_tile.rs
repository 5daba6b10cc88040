//! `quantize_tile` by `gpu/kernels/quant/quantize_tile.cu`: F32 or BF16 to E4M3, a scale for every
//! 1x128.

use fathom_numerics::formats::Format;
use fathom_numerics::quant::ScaleKind;
use fathom_reference::ops::quantize_tile::QuantizeTile;
use fathom_reference::{DynOp, Tensor};
use fathom_trace::DType;

use super::RunError;
use crate::compile::QUANTIZE_TILE;
use crate::device::{Gpu, GpuError, Matrix};
use crate::launch::{Arg, LaunchConfig};

/// Elements that share a scale.
const TILE: usize = 128;
/// Threads of a CTA; a warp casts a tile at a time.
const THREADS: u32 = 128;

/// Casts `x` [m, k], enqueued: `q` is E4M3 [m, k], `scale` is transposed, F32 [ceil(k / 128), m],
/// as the GEMM takes it.
///
/// # Errors
/// [`GpuError`].
///
/// # Panics
/// Where shapes or element types do not fit each other, or a dimension is 0.
pub fn launch(
    gpu: &Gpu,
    x: &Matrix,
    q: &Matrix,
    scale: &Matrix,
    kind: ScaleKind,
    amax_floor: f32,
) -> Result<(), GpuError> {
    let (m, k) = (x.rows, x.columns);
    assert!(m > 0 && k > 0, "quantize_tile of {m} x {k}");
    assert_eq!([q.rows, q.columns], [m, k], "q");
    assert_eq!([scale.rows, scale.columns], [k.div_ceil(TILE), m], "scale, transposed");
    assert_eq!([q.dtype(), scale.dtype()], [DType::F8E4M3, DType::F32], "q and scale");
    let input_bf16 = u64::from(x.dtype() == DType::BF16);
    let pow2 = u64::from(kind == ScaleKind::Pow2);
    let defines = [("INPUT_BF16", input_bf16), ("POW2", pow2)];
    let kernel = gpu.kernel(QUANTIZE_TILE, "quantize_tile", &defines, 0)?;
    // A warp for every tile, at most 16 CTAs an SM.
    let ctas = (m * k.div_ceil(TILE)).div_ceil(THREADS as usize / 32);
    let most = 16 * gpu.description().sm_count as usize;
    let config = LaunchConfig {
        grid: ctas.min(most) as u32,
        block: THREADS,
        cluster: 1,
        shared_bytes: 0,
        programmatic: false,
    };
    let args = [
        Arg::Buffer(x.buffer()),
        Arg::Buffer(q.buffer()),
        Arg::Buffer(scale.buffer()),
        Arg::U32(m as u32),
        Arg::U32(k as u32),
        Arg::U64(x.pitch() as u64),
        Arg::U64(q.pitch() as u64),
        Arg::U64(1),
        Arg::U64(scale.pitch() as u64),
        Arg::F32(amax_floor),
    ];
    gpu.launch(&kernel, &config, &args)
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
    let op = op.as_any().downcast_ref::<QuantizeTile>().expect("the table names this op");
    let [Some(x)] = inputs else { unreachable!("infer accepted the inputs") };
    let rules = [
        (op.format == Format::E4M3, "format: e4m3"),
        (op.tile == TILE, "tile: 128"),
        (op.scale != ScaleKind::Mx, "scale: f32 or pow2"),
        (matches!(x.dtype(), DType::F32 | DType::BF16), "x of F32 or BF16"),
    ];
    if let Some((_, takes)) = rules.iter().find(|(holds, _)| !holds) {
        return Err(RunError::Unsupported(format!("the kernel takes {takes}")));
    }
    let (m, k) = x.rows_columns();
    let tiles = k.div_ceil(TILE);
    if m == 0 || k == 0 {
        let scale = Tensor::zeros(DType::F32, &[m, tiles]);
        return Ok(vec![Tensor::zeros(DType::F8E4M3, &[m, k]), scale]);
    }
    let x = gpu.upload_matrix(x)?;
    let (q, scale) = (gpu.zeros(DType::F8E4M3, m, k)?, gpu.zeros(DType::F32, tiles, m)?);
    launch(gpu, &x, &q, &scale, op.scale, op.amax_floor)?;
    let scale = gpu.download(&scale)?;
    let scale = Tensor::from_array(scale.matrix::<f32>().t().to_owned());
    Ok(vec![gpu.download(&q)?, scale])
}
