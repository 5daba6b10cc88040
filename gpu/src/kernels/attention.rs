//! `attention` and `attention_backward` by the kernels of `gpu/kernels/attention`, on CUDA cores
//! for F32 and on the tensor cores for BF16; the decoding forms have their launch from here.

use fathom_reference::ops::attention::{Attention, AttentionBackward, Heads};
use fathom_trace::{DType, TensorMeta};

use super::{Kernel, mandatory, require, roles};
use crate::compile::{Source, source};
use crate::device::{Gpu, GpuError};
use crate::launch::{Arg, LaunchConfig};
use crate::tensor::DeviceTensor;

/// Entry `fp32_attention`, constant `V_TILES`.
const FP32: Source<'static> = source!("attention/fp32_attention.cu");
/// Entry `bf16_attention`, constants `QK`, `V_TILES` and `ALIGNED`.
const BF16: Source<'static> = source!("attention/sm90_bf16_attention.cu");
/// Entries `fp32_attention_delta` and, by the constant `GRADIENT`, `fp32_attention_backward`.
const FP32_BACKWARD: Source<'static> = source!("attention/fp32_attention_backward.cu");
/// Entry `bf16_attention_backward`, by the constant `GRADIENT`.
const BF16_BACKWARD: Source<'static> = source!("attention/sm90_bf16_attention_backward.cu");
/// Entry `attention_delta`, constant `LOW`.
const DELTA: Source<'static> = source!("attention/attention_delta.cu");

/// Rows of queries and of keys that a CTA works on at a time; the reference's blocks of queries.
const BLOCK: usize = 64;
/// Most columns of a value head that a CTA of the forward computes, in 64s.
const MOST_V_TILES: usize = 2;
/// Bytes of 64 rows by 64 columns of BF16 in shared memory.
const BOX_BYTES: usize = 64 * 128;
/// Bytes of shared memory that a CTA can have.
pub(super) const SHARED_LIMIT: usize = 227 * 1024;

/// Whose gradient a launch of the backward computes: the constant `GRADIENT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gradient {
    Queries = 0,
    Keys = 1,
    Values = 2,
}

/// Segments with their lengths in queries and in keys, as the kernels take them.
pub(super) struct Segments {
    queries: Vec<usize>,
    keys: Vec<usize>,
}

impl Segments {
    /// Segments of an op; without `keys` as many as queries.
    pub fn new(queries: &[usize], keys: &[usize]) -> Segments {
        let keys = if keys.is_empty() { queries } else { keys };
        Segments { queries: queries.to_vec(), keys: keys.to_vec() }
    }

    fn bounds(&self) -> Vec<i32> {
        let ends = |lengths: &[usize]| -> Vec<i32> {
            let sums = lengths.iter().scan(0, |end, &length| {
                *end += length as i32;
                Some(*end)
            });
            [0].into_iter().chain(sums).collect()
        };
        [ends(&self.queries), ends(&self.keys)].concat()
    }

    fn blocks(lengths: &[usize]) -> usize {
        lengths.iter().map(|length| length.div_ceil(BLOCK)).sum()
    }
}

/// Queries, keys and values: heads side by side in rows, values from a column on.
pub(super) struct Operands<'a> {
    pub shape: Heads,
    pub q: &'a DeviceTensor,
    pub k: &'a DeviceTensor,
    pub v: &'a DeviceTensor,
    /// Column of `v` at which the first value head begins.
    pub first_v: usize,
}

impl Operands<'_> {
    /// Whether eight columns of any head can be read at once.
    fn aligned(&self) -> bool {
        let rows = [self.q, self.k, self.v].map(|x| x.rows_columns().1);
        let Heads { qk, v, .. } = self.shape;
        rows.into_iter().chain([qk, v, self.first_v]).all(|columns| columns % 8 == 0)
            && [self.q, self.k, self.v].iter().all(|x| x.address() % 16 == 0)
    }

    fn args(&self) -> [Arg<'_>; 8] {
        let Heads { heads, kv_heads, qk, v } = self.shape;
        let [heads, kv_heads, qk, v] = [heads, kv_heads, qk, v].map(|n| Arg::U32(n as u32));
        let row = |x: &DeviceTensor| Arg::U64(x.rows_columns().1 as u64);
        [
            heads,
            kv_heads,
            qk,
            v,
            row(self.q),
            row(self.k),
            row(self.v),
            Arg::U64(self.first_v as u64),
        ]
    }
}

/// What the kernels take of an attention.
///
/// # Errors
/// The parameter and what they take.
pub(super) fn covers(shape: Heads, block_kv: usize, dtype: DType) -> Result<(), String> {
    let v_tiles = shape.v.div_ceil(BLOCK).clamp(1, MOST_V_TILES);
    let fits =
        dtype == DType::F32 || shared_bytes([shape.qk, shape.qk, v_tiles * BLOCK]) <= SHARED_LIMIT;
    require(&[(block_kv == BLOCK, "block_kv: 64"), (fits, "shape.qk of at most 768 or so in BF16")])
}

/// Shared memory of boxes that hold 64 rows of so many columns.
fn shared_bytes(columns: impl IntoIterator<Item = usize>) -> usize {
    columns.into_iter().map(|columns| columns.div_ceil(BLOCK).max(1) * BOX_BYTES).sum()
}

/// The forward: o, and the logarithm of each row's sum where `with_lse`; enqueued.
pub(super) fn forward(
    gpu: &Gpu,
    operands: &Operands<'_>,
    segments: &Segments,
    scale: f64,
    with_lse: bool,
) -> Result<(DeviceTensor, Option<DeviceTensor>), GpuError> {
    let Heads { heads, qk, v, .. } = operands.shape;
    let (t, dtype) = (operands.q.rows_columns().0, operands.q.dtype());
    let o = gpu.tensor(dtype, &[t, heads * v])?;
    let lse = with_lse.then(|| gpu.tensor(DType::F32, &[t, heads])).transpose()?;
    let bounds = gpu.constants(&segments.bounds())?;
    let v_tiles = v.div_ceil(BLOCK).clamp(1, MOST_V_TILES);
    let slices = v.div_ceil(v_tiles * BLOCK).max(1);
    let ctas = Segments::blocks(&segments.queries) * heads * slices;
    let mut args = vec![
        Arg::Tensor(operands.q),
        Arg::Tensor(operands.k),
        Arg::Tensor(operands.v),
        Arg::Tensor(&o),
        Arg::OptionalTensor(lse.as_ref()),
        Arg::Tensor(&bounds),
        Arg::U32(segments.queries.len() as u32),
        Arg::F32(scale as f32),
    ];
    args.extend(operands.args());
    let tiles = ("V_TILES", v_tiles as u64);
    if dtype == DType::F32 {
        let kernel = gpu.kernel(FP32, "fp32_attention", &[tiles], 0)?;
        gpu.launch(&kernel, &LaunchConfig::new(ctas, 256), &args)?;
    } else {
        let shared_bytes = shared_bytes([qk, qk, v_tiles * BLOCK]) as u32;
        let aligned = ("ALIGNED", u64::from(operands.aligned()));
        let defines = [("QK", qk as u64), tiles, aligned];
        let kernel = gpu.kernel(BF16, "bf16_attention", &defines, shared_bytes)?;
        let config = LaunchConfig { shared_bytes, ..LaunchConfig::new(ctas, 128) };
        gpu.launch(&kernel, &config, &args)?;
    }
    Ok((o, lse))
}

impl Kernel for Attention {
    fn covers(&self, inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        covers(self.shape, self.block_kv, inputs[0].as_ref().expect("mandatory").dtype)
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [q, k, v] = roles(inputs).map(mandatory);
        let operands = Operands { shape: self.shape, q: &q, k: &k, v: &v, first_v: 0 };
        let segments = Segments::new(&self.segments, &self.keys);
        let (o, lse) = forward(gpu, &operands, &segments, self.scale, true)?;
        Ok([Some(o), lse].into_iter().flatten().collect())
    }
}

/// Most columns of a gradient's head that a CTA of the backward computes, in 64s.
const MOST_TILES: usize = 3;

/// Shared memory of a CTA of the BF16 backward: queries, keys, values, gradients of the output, and
/// sums that are kept aside.
fn backward_bytes(Heads { qk, v, .. }: Heads, tiles: usize) -> usize {
    shared_bytes([qk, qk, v, v]) + tiles * 2 * BOX_BYTES
}

/// One of the three gradients; enqueued.
struct Backward<'a> {
    operands: Operands<'a>,
    d_o: &'a DeviceTensor,
    lse: &'a DeviceTensor,
    delta: &'a DeviceTensor,
    segments: Segments,
    scale: f64,
}

impl Backward<'_> {
    fn launch(&self, gpu: &Gpu, gradient: Gradient) -> Result<DeviceTensor, GpuError> {
        let Operands { q, k, v, shape, .. } = self.operands;
        let like = [q, k, v][gradient as usize];
        let columns = if gradient == Gradient::Values { shape.v } else { shape.qk };
        let tiles = columns.div_ceil(BLOCK).clamp(1, MOST_TILES);
        let slices = columns.div_ceil(tiles * BLOCK).max(1);
        let blocks = match gradient {
            Gradient::Queries => Segments::blocks(&self.segments.queries) * shape.heads,
            _ => Segments::blocks(&self.segments.keys) * shape.kv_heads,
        };
        let d = gpu.tensor(like.dtype(), like.shape())?;
        let bounds = gpu.constants(&self.segments.bounds())?;
        let mut args: Vec<_> =
            [q, k, v, self.d_o, self.lse, self.delta, &d, &bounds].map(Arg::Tensor).into();
        let count = Arg::U32(self.segments.queries.len() as u32);
        args.extend([count, Arg::F32(self.scale as f32)]);
        args.extend(self.operands.args());
        let mut defines = vec![("GRADIENT", gradient as u64), ("TILES", tiles as u64)];
        if like.dtype() == DType::F32 {
            let kernel = gpu.kernel(FP32_BACKWARD, "fp32_attention_backward", &defines, 0)?;
            gpu.launch(&kernel, &LaunchConfig::new(blocks * slices, 256), &args)?;
            return Ok(d);
        }
        let aligned = self.operands.aligned() && self.d_o.address().is_multiple_of(16);
        defines.extend([
            ("QK", shape.qk as u64),
            ("V", shape.v as u64),
            ("ALIGNED", u64::from(aligned)),
        ]);
        let shared_bytes = backward_bytes(shape, tiles) as u32;
        let kernel =
            gpu.kernel(BF16_BACKWARD, "bf16_attention_backward", &defines, shared_bytes)?;
        let config = LaunchConfig { shared_bytes, ..LaunchConfig::new(blocks * slices, 128) };
        gpu.launch(&kernel, &config, &args)?;
        Ok(d)
    }
}

/// `sum_c do_ic o_ic` of each query row and head, F32 \[t, heads\]; enqueued.
fn delta(
    gpu: &Gpu,
    heads: usize,
    o: &DeviceTensor,
    d_o: &DeviceTensor,
) -> Result<DeviceTensor, GpuError> {
    let (t, columns) = o.rows_columns();
    let delta = gpu.tensor(DType::F32, &[t, heads])?;
    let low = ("LOW", super::is_bf16(o));
    let kernel = gpu.kernel(DELTA, "attention_delta", &[low], 0)?;
    let args = [
        Arg::Tensor(o),
        Arg::Tensor(d_o),
        Arg::Tensor(&delta),
        Arg::U64(delta.len() as u64),
        Arg::U32(columns.checked_div(heads).unwrap_or(0) as u32),
    ];
    gpu.launch(&kernel, &LaunchConfig::elements(delta.len() * 16), &args)?;
    Ok(delta)
}

impl Kernel for AttentionBackward {
    fn covers(&self, inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        let low = inputs[0].as_ref().expect("mandatory").dtype == DType::BF16;
        let fits = !low || backward_bytes(self.shape, MOST_TILES) <= SHARED_LIMIT;
        let block_kv = self.block_kv == BLOCK;
        require(&[
            (block_kv, "block_kv: 64"),
            (fits, "in BF16 heads of at most 704 columns, qk and v"),
        ])
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [q, k, v, o, lse, d_o] = roles(inputs).map(mandatory);
        let backward = Backward {
            operands: Operands { shape: self.shape, q: &q, k: &k, v: &v, first_v: 0 },
            d_o: &d_o,
            lse: &lse,
            delta: &delta(gpu, self.shape.heads, &o, &d_o)?,
            segments: Segments::new(&self.segments, &self.keys),
            scale: self.scale,
        };
        let gradients = [Gradient::Queries, Gradient::Keys, Gradient::Values];
        gradients.into_iter().map(|gradient| backward.launch(gpu, gradient)).collect()
    }
}
