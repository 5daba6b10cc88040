//! `attention` and `attention_backward` by the kernels of `gpu/kernels/attention`, on CUDA cores
//! for F32 and on the tensor cores for BF16; the decoding forms have their launch from here.

use fathom_reference::ops::attention::{Attention, AttentionBackward, Heads};
use fathom_trace::{DType, TensorMeta};

use super::{Kernel, mandatory, require, roles};
use crate::compile::{Source, source};
use crate::device::{Gpu, GpuError};
use crate::launch::{Arg, LaunchConfig, Swizzle};
use crate::tensor::{DeviceTensor, HeadRows};

/// Entry `fp32_attention`, constant `V_TILES`.
const FP32: Source<'static> = source!("attention/fp32_attention.cu");
/// Entry `bf16_attention`, constants `QK_TILES`, `V_TILES`, `PACK`, `CONSUMERS` and `STAGES`.
const BF16: Source<'static> = source!("attention/sm90_bf16_attention.cu");
/// Entry `fp32_attention_backward`, constants `GRADIENT` and `TILES`.
const FP32_BACKWARD: Source<'static> = source!("attention/fp32_attention_backward.cu");
/// Entry `bf16_attention_dq`, constants `QK_TILES`, `V_TILES`, `DQ_TILES`, `CONSUMERS` and
/// `STAGES`.
const BF16_DQ: Source<'static> = source!("attention/sm90_bf16_attention_dq.cu");
/// Entry `bf16_attention_dkv`, constants `QK_TILES`, `V_TILES`, `DK_TILES`, `DV_TILES` and
/// `STAGES`.
const BF16_DKV: Source<'static> = source!("attention/sm90_bf16_attention_dkv.cu");
/// Entry `attention_delta`, constant `LOW`.
const DELTA: Source<'static> = source!("attention/attention_delta.cu");

/// Rows of queries and of keys that a CTA works on at a time; the reference's blocks of queries.
const BLOCK: usize = 64;
/// Most columns of a value head that a CTA of the F32 forward computes, in 64s.
const MOST_FP32_V_TILES: usize = 2;
/// The same in BF16.
const MOST_V_TILES: usize = 4;
/// Most stages of a ring.
const MOST_STAGES: usize = 4;
/// Bytes of 64 rows by 64 columns of BF16 in shared memory.
const BOX_BYTES: usize = 64 * 128;
/// Bytes of shared memory that a CTA can have.
pub(super) const SHARED_LIMIT: usize = 227 * 1024;

/// Whose gradient a launch of the F32 backward computes: the constant `GRADIENT`.
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

    /// Heads that a tile of 64 rows has of each query, where `group` read one key head: several
    /// only where all queries of a segment then fit in one tile, as in decoding.
    fn pack(&self, group: usize) -> usize {
        let longest = self.queries.iter().copied().max().unwrap_or(0).next_power_of_two();
        (BLOCK / longest.min(BLOCK)).min(group.next_power_of_two())
    }

    /// CTAs of which each takes `consumers` tiles of a segment and key head.
    fn ctas(&self, group: usize, pack: usize, consumers: usize) -> usize {
        let tiles = |queries: &usize| queries.div_ceil(BLOCK / pack) * group.div_ceil(pack);
        self.queries.iter().map(|queries| tiles(queries).div_ceil(consumers)).sum()
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
    /// Queries, keys and values as TMA copies them.
    fn heads(&self, gpu: &Gpu) -> Result<[HeadRows; 3], GpuError> {
        let Heads { heads, kv_heads, qk, v } = self.shape;
        Ok([
            gpu.head_rows(self.q, 0, heads, qk)?,
            gpu.head_rows(self.k, 0, kv_heads, qk)?,
            gpu.head_rows(self.v, self.first_v, kv_heads, v)?,
        ])
    }

    /// Sizes of the F32 kernels.
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

/// Columns of heads in boxes of 64.
fn tiles([qk, v]: [usize; 2]) -> [usize; 2] {
    [qk, v].map(|columns| columns.div_ceil(BLOCK).max(1))
}

/// How the CTAs of the BF16 forward are made: the kernel's constants of these names.
#[derive(Clone, Copy, Debug)]
struct Shape {
    qk_tiles: usize,
    v_tiles: usize,
    consumers: usize,
    stages: usize,
}

impl Shape {
    /// The one that computes most at once in the shared memory that there is.
    fn of(Heads { qk, v, .. }: Heads) -> Option<Shape> {
        let [qk_tiles, needed] = tiles([qk, v]);
        let widths = [MOST_V_TILES, MOST_V_TILES / 2].map(|most| needed.min(most));
        let shapes = widths.into_iter().flat_map(|v_tiles| {
            [2, 1].into_iter().flat_map(move |consumers| {
                let shape = move |stages| Shape { qk_tiles, v_tiles, consumers, stages };
                (1..=MOST_STAGES).rev().map(shape)
            })
        });
        shapes.into_iter().find(|shape| shape.shared_bytes() <= SHARED_LIMIT)
    }

    /// The kernel's `SHARED_BYTES`.
    fn shared_bytes(self) -> usize {
        let Shape { qk_tiles, v_tiles, consumers, stages } = self;
        let boxes = consumers * qk_tiles.max(v_tiles) + stages * (qk_tiles + v_tiles);
        boxes * BOX_BYTES + (4 * stages + consumers) * 8
    }
}

/// What the kernels take of an attention.
///
/// # Errors
/// The parameter and what they take.
pub(super) fn covers(shape: Heads, block_kv: usize, dtype: DType) -> Result<(), String> {
    let fits = dtype == DType::F32 || Shape::of(shape).is_some();
    require(&[(block_kv == BLOCK, "block_kv: 64"), (fits, "shape.qk of at most 768 or so in BF16")])
}

/// The forward: o, and the logarithm of each row's sum where `with_lse`; enqueued.
pub(super) fn forward(
    gpu: &Gpu,
    operands: &Operands<'_>,
    segments: &Segments,
    scale: f64,
    with_lse: bool,
) -> Result<(DeviceTensor, Option<DeviceTensor>), GpuError> {
    let Heads { heads, kv_heads, v, .. } = operands.shape;
    let (t, dtype) = (operands.q.rows_columns().0, operands.q.dtype());
    let o = gpu.tensor(dtype, &[t, heads * v])?;
    let lse = with_lse.then(|| gpu.tensor(DType::F32, &[t, heads])).transpose()?;
    let bounds = gpu.constants(&segments.bounds())?;
    let common = [
        Arg::Tensor(&o),
        Arg::OptionalTensor(lse.as_ref()),
        Arg::Tensor(&bounds),
        Arg::U32(segments.queries.len() as u32),
        Arg::F32(scale as f32),
    ];
    if dtype == DType::F32 {
        let v_tiles = v.div_ceil(BLOCK).clamp(1, MOST_FP32_V_TILES);
        let slices = v.div_ceil(v_tiles * BLOCK).max(1);
        let ctas = Segments::blocks(&segments.queries) * heads * slices;
        let kernel = gpu.kernel(FP32, "fp32_attention", &[("V_TILES", v_tiles as u64)], 0)?;
        let tensors = [operands.q, operands.k, operands.v].map(Arg::Tensor);
        let args: Vec<_> = tensors.into_iter().chain(common).chain(operands.args()).collect();
        gpu.launch(&kernel, &LaunchConfig::new(ctas, 256), &args)?;
        return Ok((o, lse));
    }
    let shape = Shape::of(operands.shape).expect("it is covered");
    let Shape { qk_tiles, v_tiles, consumers, stages } = shape;
    let group = heads / kv_heads;
    let pack = segments.pack(group);
    let slices = v.div_ceil(v_tiles * BLOCK).max(1);
    let ctas = segments.ctas(group, pack, consumers) * kv_heads * slices;
    if ctas == 0 {
        return Ok((o, lse));
    }
    let defines = [
        ("QK_TILES", qk_tiles as u64),
        ("V_TILES", v_tiles as u64),
        ("PACK", pack as u64),
        ("CONSUMERS", consumers as u64),
        ("STAGES", stages as u64),
    ];
    let shared_bytes = shape.shared_bytes() as u32;
    let kernel = gpu.kernel(BF16, "bf16_attention", &defines, shared_bytes)?;
    let [q, k, v] = &operands.heads(gpu)?;
    let map_q = gpu.head_map(q, ((BLOCK / pack) as u32, pack as u32))?;
    let [map_k, map_v] = [gpu.head_map(k, (BLOCK as u32, 1))?, gpu.head_map(v, (BLOCK as u32, 1))?];
    let maps = [&map_q, &map_k, &map_v].map(Arg::Map);
    let sizes = [heads, kv_heads, operands.shape.v].map(|n| Arg::U32(n as u32));
    let args: Vec<_> = maps.into_iter().chain(common).chain(sizes).collect();
    let config = LaunchConfig { shared_bytes, ..LaunchConfig::new(ctas, threads(consumers)) };
    gpu.launch(&kernel, &config, &args)?;
    Ok((o, lse))
}

/// Warpgroups that compute, and one that loads.
fn threads(consumers: usize) -> u32 {
    128 * (consumers as u32 + 1)
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
/// Fewest stages of the rings of the BF16 backward: a block is read while the next one is.
const FEWEST_STAGES: usize = 2;

/// Boxes of a gradient's head that a CTA of the BF16 backward computes, of so many: all slices have
/// as many.
fn slice_of(tiles: usize) -> usize {
    (1..=MOST_TILES).rev().find(|slice| tiles.is_multiple_of(*slice)).expect("one divides all")
}

/// How the CTAs of the BF16 backward are made.
#[derive(Clone, Copy, Debug)]
struct BackwardShape {
    qk_tiles: usize,
    v_tiles: usize,
    /// Warpgroups of a CTA that compute dq of 64 queries each.
    consumers: usize,
    dq_stages: usize,
    dkv_stages: usize,
}

impl BackwardShape {
    /// The one that computes most at once in the shared memory that there is.
    fn of(Heads { qk, v, .. }: Heads) -> Option<BackwardShape> {
        let [qk_tiles, v_tiles] = tiles([qk, v]);
        let most = |bytes: &dyn Fn(usize) -> usize| {
            (FEWEST_STAGES..=MOST_STAGES).rev().find(|&stages| bytes(stages) <= SHARED_LIMIT)
        };
        [2, 1].into_iter().find_map(|consumers| {
            let empty = BackwardShape { qk_tiles, v_tiles, consumers, dq_stages: 0, dkv_stages: 0 };
            let dq_stages = most(&|dq_stages| BackwardShape { dq_stages, ..empty }.dq_bytes())?;
            let dkv_stages = most(&|dkv_stages| BackwardShape { dkv_stages, ..empty }.dkv_bytes())?;
            Some(BackwardShape { dq_stages, dkv_stages, ..empty })
        })
    }

    /// A block of queries with its gradients of the output, or of keys with its values.
    fn block_bytes(self) -> usize {
        (self.qk_tiles + self.v_tiles) * BOX_BYTES
    }

    /// `SHARED_BYTES` of the kernel of dq.
    fn dq_bytes(self) -> usize {
        let BackwardShape { consumers, dq_stages, .. } = self;
        (consumers + dq_stages) * self.block_bytes() + (4 * dq_stages + consumers) * 8
    }

    /// `SHARED_BYTES` of the kernel of dk and dv.
    fn dkv_bytes(self) -> usize {
        let floats = (2 + BLOCK) * BLOCK * size_of::<f32>(); // lse, delta, P
        self.block_bytes() + self.dkv_stages * (self.block_bytes() + floats + 5 * 8) + 8
    }
}

/// What the gradients are computed from.
struct Backward<'a> {
    operands: Operands<'a>,
    d_o: &'a DeviceTensor,
    lse: &'a DeviceTensor,
    delta: &'a DeviceTensor,
    segments: Segments,
    scale: f64,
}

impl Backward<'_> {
    /// One of the three gradients in F32; enqueued.
    fn fp32(&self, gpu: &Gpu, gradient: Gradient) -> Result<DeviceTensor, GpuError> {
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
        let defines = [("GRADIENT", gradient as u64), ("TILES", tiles as u64)];
        let kernel = gpu.kernel(FP32_BACKWARD, "fp32_attention_backward", &defines, 0)?;
        gpu.launch(&kernel, &LaunchConfig::new(blocks * slices, 256), &args)?;
        Ok(d)
    }

    /// dq, dk and dv in BF16, the latter by one launch; enqueued.
    fn bf16(&self, gpu: &Gpu) -> Result<Vec<DeviceTensor>, GpuError> {
        let Heads { heads, kv_heads, qk, v: v_columns } = self.operands.shape;
        let shape = BackwardShape::of(self.operands.shape).expect("it is covered");
        let BackwardShape { qk_tiles, v_tiles, consumers, dq_stages, dkv_stages } = shape;
        let [dk_tiles, dv_tiles] = [qk_tiles, v_tiles].map(slice_of);
        let [dk_slices, dv_slices] = [qk_tiles / dk_tiles, v_tiles / dv_tiles];
        let dq_ctas = self.segments.ctas(heads / kv_heads, 1, consumers) * kv_heads * dk_slices;
        let slices = dk_slices.max(dv_slices);
        let dkv_ctas = Segments::blocks(&self.segments.keys) * kv_heads * slices;
        let like = |x: &DeviceTensor| gpu.tensor(x.dtype(), x.shape());
        let [dq, dk, dv] = [like(self.operands.q)?, like(self.operands.k)?, like(self.operands.v)?];
        if dq_ctas == 0 {
            // Without a query the gradients of keys and values are empty sums.
            let zeros = |x: &DeviceTensor| gpu.zeros(x.dtype(), x.shape());
            return Ok(vec![dq, zeros(&dk)?, zeros(&dv)?]);
        }

        let bounds = gpu.constants(&self.segments.bounds())?;
        let [q, k, v] = &self.operands.heads(gpu)?;
        let d_o = &gpu.head_rows(self.d_o, 0, heads, v_columns)?;
        let map = |x| gpu.head_map(x, (BLOCK as u32, 1));
        let maps = [map(q)?, map(d_o)?, map(k)?, map(v)?];
        let common = [
            Arg::Tensor(&bounds),
            Arg::U32(self.segments.queries.len() as u32),
            Arg::F32(self.scale as f32),
            Arg::U32(heads as u32),
            Arg::U32(kv_heads as u32),
            Arg::U32(qk as u32),
        ];
        let tiles = [("QK_TILES", qk_tiles as u64), ("V_TILES", v_tiles as u64)];

        let own = [
            ("DQ_TILES", dk_tiles as u64),
            ("CONSUMERS", consumers as u64),
            ("STAGES", dq_stages as u64),
        ];
        let shared_bytes = shape.dq_bytes() as u32;
        let defines = [&tiles[..], &own].concat();
        let kernel = gpu.kernel(BF16_DQ, "bf16_attention_dq", &defines, shared_bytes)?;
        let tensors = [self.lse, self.delta, &dq].map(Arg::Tensor);
        let args: Vec<_> = maps.iter().map(Arg::Map).chain(tensors).chain(common).collect();
        let config = LaunchConfig::new(dq_ctas, threads(consumers));
        gpu.launch(&kernel, &LaunchConfig { shared_bytes, ..config }, &args)?;

        let own = [
            ("DK_TILES", dk_tiles as u64),
            ("DV_TILES", dv_tiles as u64),
            ("STAGES", dkv_stages as u64),
        ];
        let shared_bytes = shape.dkv_bytes() as u32;
        let defines = [&tiles[..], &own].concat();
        let kernel = gpu.kernel(BF16_DKV, "bf16_attention_dkv", &defines, shared_bytes)?;
        let rows = [gpu.transposed(self.lse)?, gpu.transposed(self.delta)?];
        let map = |x| gpu.tensor_map(x, (1, BLOCK as u32), Swizzle::None);
        let row_maps = [map(&rows[0])?, map(&rows[1])?];
        let maps = maps.iter().chain(&row_maps).map(Arg::Map);
        let gradients = [&dk, &dv].map(Arg::Tensor);
        let columns = Arg::U32(v_columns as u32);
        let args: Vec<_> = maps.chain(gradients).chain(common).chain([columns]).collect();
        let config = LaunchConfig::new(dkv_ctas, threads(2));
        gpu.launch(&kernel, &LaunchConfig { shared_bytes, ..config }, &args)?;
        Ok(vec![dq, dk, dv])
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
        let fits = !low || BackwardShape::of(self.shape).is_some();
        let block_kv = self.block_kv == BLOCK;
        require(&[
            (block_kv, "block_kv: 64"),
            (fits, "in BF16 heads of at most 512 columns, qk and v"),
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
        if q.dtype() == DType::BF16 {
            return backward.bf16(gpu);
        }
        let gradients = [Gradient::Queries, Gradient::Keys, Gradient::Values];
        gradients.into_iter().map(|gradient| backward.fp32(gpu, gradient)).collect()
    }
}
