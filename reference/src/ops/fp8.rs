//! FP8 around the GEMM: weights in both orientations, transposing casts, dequantisation, and the
//! products of the routed experts and of the weight gradients.
//!
//! - `quantize_weight`: w \[.., n, k\] F32 to codes with a scale for every `block`, and the same
//!   codes transposed with their scales, which dgrad reads. Nothing is rounded twice.
//! - `transpose_quantize`: x \[r, n\] (F32, BF16; or codes with scales, dequantised to F32 first)
//!   to its transpose \[n, r\] with a scale for every `block` of the output. The r rows are cut
//!   into segments (sequences, experts); scales begin anew in each: 128x1 tiles of the report's
//!   wgrad.
//! - `dequantize`: `q * scale`, rounded to `out`.
//! - `grouped_gemm_fp8`: rows of a belong to experts in order; each is op `gemm_fp8` of its own.
//! - `wgrad_fp8`: `d += dy^T x` of transposed casts; over k's segments as one chain, or with
//!   `grouped` one result a segment (an expert).
//!
//! The arithmetic is `fathom_numerics::quant` and `::gemm` (DeepSeek-V3 report, section 3.3).

use fathom_numerics::formats::Format;
use fathom_numerics::gemm::{self, Accumulate, Fp8Operand, GemmConfig, ScaleBlock, grouped};
use fathom_numerics::quant::{self, QuantConfig, Quantized, ScaleKind};
use fathom_trace::{DType, OpClass, TensorMeta};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, ArrayViewMut3, s};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::attention::spans;
use super::example::{Example, ceil, shape};
use super::quantize::{BlockFormat, ScaleType};
use super::real::{FLOATS, Real, stored};
use super::{Op, OpError, Role, input, optional, rules};
use crate::Tensor;

/// Elements along two dimensions that share a scale; `null`: the whole dimension.
pub type Block = [Option<usize>; 2];

const CODES: &[DType] = &[DType::F8E4M3, DType::F8E5M2];

fn extent(block: Block) -> ScaleBlock {
    ScaleBlock { rows: block[0].unwrap_or(usize::MAX), k: block[1].unwrap_or(usize::MAX) }
}

fn scales(block: Block, rows: usize, k: usize) -> [usize; 2] {
    let (a, b) = extent(block).scales(rows, k);
    [a, b]
}

/// Refuses blocks without extent.
fn extents(op: &'static str, blocks: &[(&str, Block)]) -> Result<(), OpError> {
    let sizes = blocks.iter().flat_map(|(path, block)| block.iter().map(move |size| (path, size)));
    sizes.into_iter().try_for_each(|(path, size)| rules::at_least_one(op, path, size.unwrap_or(1)))
}

fn format(dtype: DType) -> Format {
    if dtype == DType::F8E5M2 { Format::E5M2 } else { Format::E4M3 }
}

fn config(format: BlockFormat, scale: ScaleType) -> QuantConfig {
    QuantConfig {
        format: match format {
            BlockFormat::E4m3 => Format::E4M3,
            BlockFormat::E5m2 => Format::E5M2,
        },
        scale: match scale {
            ScaleType::F32 => ScaleKind::F32,
            ScaleType::Pow2 => ScaleKind::Pow2,
        },
        ..QuantConfig::default()
    }
}

fn code_dtype(format: BlockFormat) -> DType {
    match format {
        BlockFormat::E4m3 => DType::F8E4M3,
        BlockFormat::E5m2 => DType::F8E5M2,
    }
}

fn undefined(op: &'static str, error: &impl std::fmt::Display) -> OpError {
    OpError::Undefined { op, message: error.to_string() }
}

/// Weights as both GEMMs read them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QuantizeWeight {
    /// Rows and columns that share a scale.
    pub block: Block,
    /// Any FP32, or powers of two.
    pub scale: ScaleType,
}

impl Op for QuantizeWeight {
    const NAME: &'static str = "quantize_weight";
    const INPUTS: &'static [Role] = &[input("w")];
    const OUTPUTS: &'static [&'static str] = &["q", "scale", "q_t", "scale_t"];
    const CLASS: OpClass = OpClass::Convert;

    fn example() -> Example {
        let (n, k, block) = (3, 6, [2, 4]);
        Example::new(QuantizeWeight { block: block.map(Some), scale: ScaleType::Pow2 })
            .input("w", DType::F32, shape![n, k])
            .output("q", shape![n, k])
            .output("scale", shape![ceil(n, block[0]), ceil(k, block[1])])
            .output("q_t", shape![k, n])
            .output("scale_t", shape![ceil(k, block[1]), ceil(n, block[0])])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(w)] = inputs else { unreachable!("mandatory") };
        extents(Self::NAME, &[("block", self.block)])?;
        rules::dtype(w, &[DType::F32])?;
        let [leading @ .., n, k] = &w.shape[..] else {
            return rules::rank(w, 2, "[n, k] or [experts, n, k]").map(|()| Vec::new());
        };
        let shape = |last: [usize; 2]| [leading, &last[..]].concat();
        let [a, b] = scales(self.block, *n, *k);
        Ok(vec![
            rules::meta("q", DType::F8E4M3, &w.shape),
            rules::meta("scale", DType::F32, &shape([a, b])),
            rules::meta("q_t", DType::F8E4M3, &shape([*k, *n])),
            rules::meta("scale_t", DType::F32, &shape([b, a])),
        ])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        2 * inputs[0].as_ref().expect("mandatory").shape.iter().product::<usize>() as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let outputs = Op::infer(self, &[inputs[0].as_ref().map(|w| w.meta("w"))])?;
        let [Some(w)] = &inputs[..] else { unreachable!("mandatory") };
        let [.., n, k] = w.shape()[..] else { unreachable!("checked") };
        let config = config(BlockFormat::E4m3, self.scale);
        let (mut q, mut scale) = (Vec::<u8>::with_capacity(w.len()), Vec::<f32>::new());
        let (mut q_t, mut scale_t) = (Vec::<u8>::with_capacity(w.len()), Vec::<f32>::new());
        for w in w.as_slice::<f32>().chunks((n * k).max(1)) {
            let w = ArrayView2::from_shape((n, k), w).expect("dense");
            let one = quant::quantize(w, extent(self.block), &config)
                .map_err(|e| undefined(Self::NAME, &e))?;
            let other = one.transposed();
            q.extend(one.codes.iter());
            scale.extend(one.scales.iter());
            q_t.extend(other.codes.iter());
            scale_t.extend(other.scales.iter());
        }
        Ok(vec![
            Tensor::from_vec(&outputs[0].shape, q).reinterpret(DType::F8E4M3),
            Tensor::from_vec(&outputs[1].shape, scale),
            Tensor::from_vec(&outputs[2].shape, q_t).reinterpret(DType::F8E4M3),
            Tensor::from_vec(&outputs[3].shape, scale_t),
        ])
    }
}

/// Elements of kept codes: FP8, or packed E5M6, with a scale for every 1 x 128 or as `block` says.
fn values(x: &Tensor, scale: Option<&Tensor>, columns: usize, block: Block) -> Array2<f32> {
    match (x.dtype(), scale) {
        (DType::U32, Some(scale)) => quant::e5m6::QuantizedE5M6 {
            words: x.to_array::<u32>().into_dimensionality().expect("rank 2"),
            scales: scale.to_array::<f32>().into_dimensionality().expect("rank 2"),
            k: columns,
            tile: extent(block).k,
        }
        .dequantize(),
        (dtype, Some(scale)) => quant::dequantize(&Quantized {
            codes: x.codes().to_owned(),
            scales: scale.to_array::<f32>().into_dimensionality().expect("rank 2"),
            format: format(dtype),
            block: extent(block),
        }),
        _ => {
            let values = f32::load(x).into_owned();
            Array2::from_shape_vec((x.shape()[0], columns), values).expect("dense")
        }
    }
}

/// The rule for `x` of ops that read kept codes; gives rows and columns.
fn kept(
    x: &TensorMeta,
    scale: Option<&TensorMeta>,
    columns: usize,
    block: Block,
) -> Result<[usize; 2], OpError> {
    rules::rank(x, 2, "[r, columns]")?;
    let rows = x.shape[0];
    let Some(scale) = scale else {
        rules::dtype(x, &[DType::F32, DType::BF16])?;
        rules::shape(x, &[rows, columns])?;
        return Ok([rows, columns]);
    };
    rules::dtype(x, &[DType::F8E4M3, DType::F8E5M2, DType::U32])?;
    let stored = if x.dtype == DType::U32 { columns.div_ceil(8) * 3 } else { columns };
    rules::shape(x, &[rows, stored])?;
    rules::dtype(scale, &[DType::F32])?;
    rules::shape(scale, &scales(block, rows, columns))?;
    Ok([rows, columns])
}

/// Transposes and casts, segment by segment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TransposeQuantize {
    /// Columns of `x`.
    pub columns: usize,
    /// Which elements of `x` share a scale, where it is codes.
    pub from: Block,
    /// Rows and columns of the output that share a scale.
    pub block: Block,
    /// Output format.
    pub format: BlockFormat,
    /// Any FP32, or powers of two.
    pub scale: ScaleType,
    /// Lengths that cut the rows; rows behind them are left out.
    pub segments: Vec<usize>,
}

impl TransposeQuantize {
    fn scale_columns(&self) -> usize {
        self.segments.iter().map(|&rows| scales(self.block, self.columns, rows)[1]).sum()
    }
}

impl Op for TransposeQuantize {
    const NAME: &'static str = "transpose_quantize";
    const INPUTS: &'static [Role] = &[input("x"), optional("x_scale")];
    const OUTPUTS: &'static [&'static str] = &["q", "scale"];
    const CLASS: OpClass = OpClass::Convert;

    fn example() -> Example {
        let (r, columns, from, block) = (6, 4, [1, 2], [1, 2]);
        let (taken, tiles) = (5, 3);
        Example::new(TransposeQuantize {
            columns,
            from: from.map(Some),
            block: block.map(Some),
            format: BlockFormat::E4m3,
            scale: ScaleType::Pow2,
            segments: vec![3, 2],
        })
        .input("x", DType::F8E4M3, shape![r, columns])
        .positive("x_scale", DType::F32, shape![ceil(r, from[0]), ceil(columns, from[1])])
        .output("q", shape![columns, taken])
        .output("scale", shape![ceil(columns, block[0]), tiles])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x), scale] = inputs else { unreachable!("mandatory") };
        extents(Self::NAME, &[("from", self.from), ("block", self.block)])?;
        let [rows, columns] = kept(x, scale.as_ref(), self.columns, self.from)?;
        let taken: usize = self.segments.iter().sum();
        if taken > rows {
            let message = format!("segments {:?} exceed the {rows} rows", self.segments);
            return Err(OpError::Undefined { op: Self::NAME, message });
        }
        let scale_rows = scales(self.block, columns, 1)[0];
        Ok(vec![
            rules::meta("q", code_dtype(self.format), &[columns, taken]),
            rules::meta("scale", DType::F32, &[scale_rows, self.scale_columns()]),
        ])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        2 * (self.columns * self.segments.iter().sum::<usize>()) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(x), scale] = &inputs[..] else { unreachable!("mandatory") };
        let x = values(x, scale.as_ref(), self.columns, self.from);
        let taken: usize = self.segments.iter().sum();
        let mut q = Array2::zeros((self.columns, taken));
        let rows = scales(self.block, self.columns, 1)[0];
        let mut out = Array2::zeros((rows, self.scale_columns()));
        let mut column = 0;
        for (start, length) in spans(&self.segments) {
            let part = x.slice(s![start..start + length, ..]).reversed_axes();
            let part = part.as_standard_layout();
            let config = config(self.format, self.scale);
            let cast = quant::quantize(part.view(), extent(self.block), &config)
                .map_err(|e| undefined(Self::NAME, &e))?;
            q.slice_mut(s![.., start..start + length]).assign(&cast.codes);
            let end = column + cast.scales.ncols();
            out.slice_mut(s![.., column..end]).assign(&cast.scales);
            column = end;
        }
        let q = Tensor::from_array(q).reinterpret(code_dtype(self.format));
        Ok(vec![q, Tensor::from_array(out)])
    }
}

/// The values of codes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Dequantize {
    /// Columns of the result.
    pub columns: usize,
    /// Which elements share a scale.
    pub block: Block,
    /// Element type of the result.
    pub out: DType,
}

impl Op for Dequantize {
    const NAME: &'static str = "dequantize";
    const INPUTS: &'static [Role] = &[input("q"), input("scale")];
    const OUTPUTS: &'static [&'static str] = &["x"];
    const CLASS: OpClass = OpClass::Convert;

    fn example() -> Example {
        let (r, columns, block) = (3, 6, [1, 4]);
        Example::new(Dequantize { columns, block: block.map(Some), out: DType::BF16 })
            .input("q", DType::F8E4M3, shape![r, columns])
            .positive("scale", DType::F32, shape![ceil(r, block[0]), ceil(columns, block[1])])
            .output("x", shape![r, columns])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(q), scale] = inputs else { unreachable!("mandatory") };
        extents(Self::NAME, &[("block", self.block)])?;
        let shape = kept(q, scale.as_ref(), self.columns, self.block)?;
        rules::dtype(&rules::meta("out", self.out, &[]), &FLOATS[..2])?;
        Ok(vec![rules::meta("x", self.out, &shape)])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        (inputs[0].as_ref().expect("mandatory").shape[0] * self.columns) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(q), scale] = &inputs[..] else { unreachable!("mandatory") };
        let x = values(q, scale.as_ref(), self.columns, self.block);
        let shape = [x.nrows(), x.ncols()];
        let x = x.as_standard_layout().into_owned().into_raw_vec_and_offset().0;
        Ok(vec![f32::store(x, &shape, self.out)])
    }
}

/// One FP8 product an expert: rows of a in order of expert.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GroupedGemmFp8 {
    /// Rows of each expert; rows behind them give zeros.
    pub counts: Vec<usize>,
    /// Which elements of a share a scale; one row, or all of them.
    pub a_tile: Block,
    /// Which elements of an expert's b share a scale.
    pub b_block: Block,
    /// Elements of k summed on the tensor core before promotion; `null`: all.
    pub promotion_interval: Option<usize>,
    /// Element type of d.
    pub out: DType,
}

impl Op for GroupedGemmFp8 {
    const NAME: &'static str = "grouped_gemm_fp8";
    const INPUTS: &'static [Role] = &[input("a"), input("a_scale"), input("b"), input("b_scale")];
    const OUTPUTS: &'static [&'static str] = &["d"];
    const CLASS: OpClass = OpClass::GroupedGemm;

    fn example() -> Example {
        let (rows, experts, n, k) = (6, 3, 4, 160);
        let (a_tile, b_block) = ([1, 128], [128, 128]);
        Example::new(GroupedGemmFp8 {
            counts: vec![2, 0, 3],
            a_tile: a_tile.map(Some),
            b_block: b_block.map(Some),
            promotion_interval: Some(128),
            out: DType::BF16,
        })
        .input("a", DType::F8E4M3, shape![rows, k])
        .positive("a_scale", DType::F32, shape![ceil(rows, a_tile[0]), ceil(k, a_tile[1])])
        .input("b", DType::F8E4M3, shape![experts, n, k])
        .positive("b_scale", DType::F32, shape![experts, ceil(n, b_block[0]), ceil(k, b_block[1])])
        .output("d", shape![rows, n])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(a), Some(a_scale), Some(b), Some(b_scale)] = inputs else {
            unreachable!("mandatory")
        };
        extents(Self::NAME, &[("a_tile", self.a_tile), ("b_block", self.b_block)])?;
        stored(Self::NAME, self.out, DType::F32)?;
        rules::dtype(a, CODES)?;
        rules::rank(a, 2, "[rows, k]")?;
        rules::dtype(b, CODES)?;
        rules::rank(b, 3, "[experts, n, k]")?;
        let (rows, k, n) = (a.shape[0], a.shape[1], b.shape[1]);
        rules::shape(b, &[self.counts.len(), n, k])?;
        rules::dtype(a_scale, &[DType::F32])?;
        rules::shape(a_scale, &scales(self.a_tile, rows, k))?;
        rules::dtype(b_scale, &[DType::F32])?;
        let [x, y] = scales(self.b_block, n, k);
        rules::shape(b_scale, &[self.counts.len(), x, y])?;
        if self.counts.iter().sum::<usize>() > rows {
            let message = format!("counts add up to more than the {rows} rows of a");
            return Err(OpError::Undefined { op: Self::NAME, message });
        }
        if matches!(self.a_tile[0], Some(2..)) {
            let message =
                "experts share out the rows of a: a_tile must be of 1 row or of all".into();
            return Err(OpError::Undefined { op: Self::NAME, message });
        }
        Ok(vec![rules::meta("d", self.out, &[rows, n])])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let b = inputs[2].as_ref().expect("mandatory");
        2 * self.counts.iter().sum::<usize>() as u64 * (b.shape[1] * b.shape[2]) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(a), Some(a_scale), Some(b), Some(b_scale)] = &inputs[..] else {
            unreachable!("mandatory")
        };
        let (rows, n, k) = (a.shape()[0], b.shape()[1], b.shape()[2]);
        let config =
            GemmConfig { promotion_interval: self.promotion_interval, ..GemmConfig::default() };
        let mut d = vec![0f32; rows * n];
        let mut view = ArrayViewMut2::from_shape((rows, n), &mut d).expect("dense");
        let (a_codes, a_scales) = (a.codes(), a_scale.matrix::<f32>());
        let [x, y] = scales(self.b_block, n, k);
        let codes = b.bytes().chunks((n * k).max(1));
        let experts = codes.zip(b_scale.as_slice::<f32>().chunks((x * y).max(1)));
        for ((start, length), (codes, b_scales)) in spans(&self.counts).into_iter().zip(experts) {
            if length == 0 {
                continue;
            }
            let own = s![start..start + length, ..];
            let a_scales = match self.a_tile[0] {
                Some(1) => a_scales.slice(own),
                _ => a_scales.view(),
            };
            let a = Fp8Operand {
                codes: a_codes.slice(own),
                scales: a_scales,
                format: format(a.dtype()),
                block: extent(self.a_tile),
            };
            let b = Fp8Operand {
                codes: ArrayView2::from_shape((n, k), codes).expect("dense"),
                scales: ArrayView2::from_shape((x, y), b_scales).expect("dense"),
                format: format(b.dtype()),
                block: extent(self.b_block),
            };
            gemm::gemm_fp8_into(&a, &b, view.slice_mut(own), Accumulate::Overwrite, &config)
                .map_err(|e| undefined(Self::NAME, &e))?;
        }
        Ok(vec![f32::store(d, &[rows, n], self.out)])
    }
}

/// `length` elements of k from `start`, whose scales begin at `column`, which moves on.
fn k_part<'a>(
    x: &Fp8Operand<'a>,
    start: usize,
    length: usize,
    column: &mut usize,
) -> Fp8Operand<'a> {
    let first = *column;
    *column += length.div_ceil(x.block.k);
    Fp8Operand {
        codes: x.codes.slice_move(s![.., start..start + length]),
        scales: x.scales.slice_move(s![.., first..*column]),
        ..*x
    }
}

/// Weight gradients from transposed casts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WgradFp8 {
    /// Lengths that cut k; scales begin anew in each.
    pub segments: Vec<usize>,
    /// Whether each segment (expert) has a result of its own.
    pub grouped: bool,
    /// Which elements of `dy` share a scale: rows of it, elements along k.
    pub dy_block: Block,
    /// Which elements of `x` share a scale.
    pub x_block: Block,
    /// Elements of k summed on the tensor core before promotion; `null`: all.
    pub promotion_interval: Option<usize>,
}

impl Op for WgradFp8 {
    const NAME: &'static str = "wgrad_fp8";
    const INPUTS: &'static [Role] =
        &[input("dy"), input("dy_scale"), input("x"), input("x_scale"), input("acc")];
    const OUTPUTS: &'static [&'static str] = &["d"];
    const CLASS: OpClass = OpClass::WeightGradient;

    fn example() -> Example {
        let (m, n, k, tiles) = (3, 4, 170, 3);
        let (dy_block, x_block) = ([1, 128], [1, 128]);
        Example::new(WgradFp8 {
            segments: vec![130, 40],
            grouped: false,
            dy_block: dy_block.map(Some),
            x_block: x_block.map(Some),
            promotion_interval: Some(128),
        })
        .input("dy", DType::F8E4M3, shape![m, k])
        .positive("dy_scale", DType::F32, shape![ceil(m, dy_block[0]), tiles])
        .input("x", DType::F8E4M3, shape![n, k])
        .positive("x_scale", DType::F32, shape![ceil(n, x_block[0]), tiles])
        .input("acc", DType::F32, shape![m, n])
        .output("d", shape![m, n])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(dy), Some(dy_scale), Some(x), Some(x_scale), Some(acc)] = inputs else {
            unreachable!("mandatory")
        };
        extents(Self::NAME, &[("dy_block", self.dy_block), ("x_block", self.x_block)])?;
        let k: usize = self.segments.iter().sum();
        for (codes, scale, block) in [(dy, dy_scale, self.dy_block), (x, x_scale, self.x_block)] {
            rules::dtype(codes, CODES)?;
            rules::rank(codes, 2, "[rows, k]")?;
            rules::shape(codes, &[codes.shape[0], k])?;
            rules::dtype(scale, &[DType::F32])?;
            let rows = codes.shape[0];
            let columns = self.segments.iter().map(|&n| scales(block, rows, n)[1]).sum();
            rules::shape(scale, &[scales(block, rows, 1)[0], columns])?;
        }
        let mut shape = vec![dy.shape[0], x.shape[0]];
        if self.grouped {
            shape.insert(0, self.segments.len());
        }
        rules::dtype(acc, &[DType::F32])?;
        rules::shape(acc, &shape)?;
        Ok(vec![rules::meta("d", DType::F32, &shape)])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let [Some(dy), _, Some(x), ..] = inputs else { unreachable!("mandatory") };
        2 * (dy.shape[0] * dy.shape[1]) as u64 * x.shape[0] as u64
    }

    fn run(&self, mut inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let acc = inputs.pop().flatten().expect("mandatory");
        let [Some(dy), Some(dy_scale), Some(x), Some(x_scale)] = &inputs[..] else {
            unreachable!("mandatory")
        };
        let config =
            GemmConfig { promotion_interval: self.promotion_interval, ..GemmConfig::default() };
        let a = Fp8Operand {
            codes: dy.codes(),
            scales: dy_scale.matrix(),
            format: format(dy.dtype()),
            block: extent(self.dy_block),
        };
        let b = Fp8Operand {
            codes: x.codes(),
            scales: x_scale.matrix(),
            format: format(x.dtype()),
            block: extent(self.x_block),
        };
        let shape = acc.shape().to_vec();
        let (m, n) = (dy.shape()[0], x.shape()[0]);
        let mut d = acc.into_vec::<f32>();
        if self.grouped {
            let out = ArrayViewMut3::from_shape((self.segments.len(), m, n), &mut d);
            let out = out.expect("dense");
            grouped::gemm_fp8_grouped_k(&a, &b, &self.segments, out, Accumulate::Chain, &config)
                .map_err(|e| undefined(Self::NAME, &e))?;
            return Ok(vec![f32::store(d, &shape, DType::F32)]);
        }
        let (mut of_a, mut of_b) = (0, 0);
        for (start, length) in spans(&self.segments) {
            let a = k_part(&a, start, length, &mut of_a);
            let b = k_part(&b, start, length, &mut of_b);
            let out = ArrayViewMut2::from_shape((m, n), &mut d[..]).expect("dense");
            gemm::gemm_fp8_into(&a, &b, out, Accumulate::Chain, &config)
                .map_err(|e| undefined(Self::NAME, &e))?;
        }
        Ok(vec![f32::store(d, &shape, DType::F32)])
    }
}
