//! What ops on codes share: how formats lie in tensors, which elements have a scale in common, and
//! the values of codes.

use fathom_numerics::formats::{Format, bf16, f16};
use fathom_numerics::gemm::{Fp8Operand, ScaleBlock};
use fathom_numerics::quant::{self, QuantConfig, Quantized, Source, e5m6::QuantizedE5M6};
use fathom_trace::{DType, TensorMeta};
use ndarray::{Array2, ArrayView2};

use super::compute_type::Real;
use super::{OpError, rules};
use crate::{Element, Tensor};

/// Rows and columns that share a scale; `null`: the whole dimension.
pub type Block = [Option<usize>; 2];

/// The dtypes of FP8 codes.
pub const FP8: &[DType] = &[DType::F8E4M3, DType::F8E5M2];

/// The dtype of a tensor that holds codes of `format`. E5M6 is packed, eight codes in three words;
/// E2M1 two a byte.
pub fn stored_as(format: Format) -> DType {
    match format {
        Format::E4M3 | Format::UE4M3 => DType::F8E4M3,
        Format::E5M2 => DType::F8E5M2,
        Format::UE8M0 => DType::F8E8M0,
        Format::E2M1 => DType::U8,
        Format::Bf16 => DType::BF16,
        Format::F16 => DType::F16,
        Format::Tf32 | Format::F32 => DType::F32,
        Format::E5M6 => DType::U32,
    }
}

/// Columns of a tensor that holds `columns` codes a row: packed E5M6 (U32) has three words for
/// every eight codes or fewer, the other dtypes have one element a code.
pub fn stored_columns(dtype: DType, columns: usize) -> usize {
    if dtype == DType::U32 { columns.div_ceil(8) * 3 } else { columns }
}

/// The format of codes in a tensor of an [`FP8`] dtype.
pub fn fp8_format(dtype: DType) -> Format {
    if dtype == DType::F8E5M2 { Format::E5M2 } else { Format::E4M3 }
}

/// The rule for a parameter that names a format: it is one of `expected`.
///
/// # Errors
/// [`OpError::Params`].
pub fn one_of(
    op: &'static str,
    path: &str,
    found: Format,
    expected: &[Format],
) -> Result<(), OpError> {
    if expected.contains(&found) {
        return Ok(());
    }
    let expected = expected.iter().map(|f| f.name()).collect::<Vec<_>>().join(" or ");
    let message = format!("expected {expected}, found {found}");
    Err(OpError::Params { op, path: path.to_owned(), message })
}

/// A block as the arithmetic takes it.
pub fn extent(block: Block) -> ScaleBlock {
    ScaleBlock { rows: block[0].unwrap_or(usize::MAX), k: block[1].unwrap_or(usize::MAX) }
}

/// The shape of the scales of a `rows` x `columns` matrix: one a block, those cut short by the edge
/// included.
pub fn scales(block: Block, rows: usize, columns: usize) -> [usize; 2] {
    let (a, b) = extent(block).scales(rows, columns);
    [a, b]
}

/// The rule for parameters that are blocks: no extent is 0.
///
/// # Errors
/// [`OpError::Params`].
pub fn extents(op: &'static str, blocks: &[(&str, Block)]) -> Result<(), OpError> {
    let sizes = blocks.iter().flat_map(|(path, block)| block.iter().map(move |size| (path, size)));
    sizes.into_iter().try_for_each(|(path, size)| rules::at_least_one(op, path, size.unwrap_or(1)))
}

/// What the arithmetic refuses, as the op's error.
pub fn undefined(op: &'static str, error: &impl std::fmt::Display) -> OpError {
    OpError::Undefined { op, message: error.to_string() }
}

/// FP8 codes \[rows, k\] with their F32 scales as the GEMMs of `fathom-numerics` take them.
pub fn operand<'a>(codes: &'a Tensor, scales: &'a Tensor, block: Block) -> Fp8Operand<'a> {
    Fp8Operand {
        codes: codes.codes(),
        scales: scales.matrix(),
        format: fp8_format(codes.dtype()),
        block: extent(block),
    }
}

/// Calls `cast` with the elements of x, F32, BF16 or F16, in their own type.
pub fn cast_any<R>(x: &Tensor, cast: impl Cast<R>) -> R {
    match x.dtype() {
        DType::BF16 => cast.call::<bf16>(x.matrix()),
        DType::F16 => cast.call::<f16>(x.matrix()),
        _ => cast.call::<f32>(x.matrix()),
    }
}

/// A cast that is generic over the source's element type.
pub trait Cast<R> {
    /// The cast of x.
    fn call<T: Element + Source>(self, x: ArrayView2<'_, T>) -> R;
}

/// The rule for x and the parameters of a cast.
///
/// # Errors
/// [`OpError`] naming the tensor or the parameter.
pub fn castable(op: &'static str, x: &TensorMeta, config: &QuantConfig) -> Result<(), OpError> {
    rules::dtype(x, &[DType::F32, DType::BF16, DType::F16])?;
    rules::rank(x, 2, "[m, k]")?;
    let floor = config.amax_floor;
    if !(floor > 0.0 && floor.is_finite()) {
        let message = format!("expected a positive finite number, found {floor:e}");
        return Err(OpError::Params { op, path: "amax_floor".into(), message });
    }
    Ok(())
}

/// Codes and scales of a cast as an op's two outputs, in that order.
pub fn outputs(q: Quantized) -> Vec<Tensor> {
    let dtype = stored_as(q.format);
    vec![Tensor::from_array(q.codes).reinterpret(dtype), Tensor::from_array(q.scales)]
}

/// The rule for `x` of ops that read kept codes, or plain values where there are no scales; gives
/// rows and columns.
///
/// # Errors
/// [`OpError`] naming the tensor.
pub fn kept(
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
    rules::shape(x, &[rows, stored_columns(x.dtype, columns)])?;
    rules::dtype(scale, &[DType::F32])?;
    rules::shape(scale, &scales(block, rows, columns))?;
    Ok([rows, columns])
}

/// The values of what [`kept`] accepted, in F32 \[rows, columns\].
pub fn values(x: &Tensor, scale: Option<&Tensor>, columns: usize, block: Block) -> Array2<f32> {
    let matrix = |scale: &Tensor| {
        scale.to_array::<f32>().into_dimensionality().expect("checked to have rank 2")
    };
    match (x.dtype(), scale) {
        (DType::U32, Some(scale)) => QuantizedE5M6 {
            words: x.to_array::<u32>().into_dimensionality().expect("rank 2"),
            scales: matrix(scale),
            k: columns,
            block: extent(block),
        }
        .dequantize(),
        (dtype, Some(scale)) => quant::dequantize(&Quantized {
            codes: x.codes().to_owned(),
            scales: matrix(scale),
            format: fp8_format(dtype),
            block: extent(block),
        }),
        _ => {
            let values = f32::load(x).into_owned();
            Array2::from_shape_vec((x.shape()[0], columns), values).expect("dense")
        }
    }
}
