//! Every exact GEMM of the project.
//!
//! [`gemm_fp8`] multiplies as DeepSeek-V3's kernels do on Hopper: within a promotion interval of
//! 128 along K the tensor core chains four steps of 32 from zero; then the partial sum enters an
//! FP32 accumulator on CUDA cores, `acc = fma(scale_a * scale_b, partial, acc)`, K ascending. The
//! [`grouped`] forms are its two MoE layouts. [`gemm_bf16_into`] and its kin chain the steps of any
//! accumulator over all of K.
//!
//! [`tensor_core`] multiplies tiles with incoming accumulators, as matrix instructions do, and
//! [`inorder`] holds the plain f32 and f64 GEMMs of the `fp32` and `f64` modes.
//!
//! `portable` is the specification; the kernels beside it give the same bits faster and are chosen
//! at run time. B is always `[n, k]`, as a Linear's weight is stored; another layout is a
//! transposed view. M, N and K need not be multiples of anything: tails are as if filled with
//! zeros.
//!
//! ```
//! use fathom_numerics::gemm::{Fp8Operand, GemmConfig, gemm_fp8};
//! use ndarray::Array2;
//! let (x, w) = (Array2::from_elem((3, 200), 0x38u8), Array2::from_elem((5, 200), 0x38u8)); // 1.0
//! let (x_scale, w_scale) = (Array2::from_elem((3, 2), 0.5f32), Array2::from_elem((1, 2), 2.0f32));
//! let a = Fp8Operand::tile_1x128(x.view(), x_scale.view());
//! let b = Fp8Operand::block_128x128(w.view(), w_scale.view());
//! assert_eq!(gemm_fp8(&a, &b, &GemmConfig::default())?, Array2::from_elem((3, 5), 200.0));
//! # Ok::<(), fathom_numerics::gemm::GemmError>(())
//! ```

mod config;
#[cfg(target_arch = "x86_64")]
mod fp8_avx512;
pub mod grouped;
pub mod inorder;
mod inorder_kernels;
mod isa;
mod lanes;
mod plain;
mod portable;
mod scratch;
pub mod tensor_core;
mod tile;
mod tiled;

use crate::formats::{Format, bf16, f16, to_bf16};
use crate::mma::Accumulator;
pub use config::{Accumulate, Fp8Operand, GemmConfig, GemmError, Promote, ScaleBlock};
pub use inorder_kernels::InOrder;
pub use isa::Isa;
use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use tiled::promote_row;

/// `D[m, n] = A[m, k] B[n, k]^T` of FP8 operands with scales, in FP32.
///
/// # Errors
/// [`GemmError`] where shapes, formats, scales or the knobs of `config` do not fit each other.
pub fn gemm_fp8(
    a: &Fp8Operand<'_>,
    b: &Fp8Operand<'_>,
    config: &GemmConfig,
) -> Result<Array2<f32>, GemmError> {
    let mut d = Array2::zeros((a.rows(), b.rows()));
    gemm_fp8_into(a, b, d.view_mut(), Accumulate::Overwrite, config)?;
    Ok(d)
}

/// [`gemm_fp8`] into an existing FP32 matrix \[m, n\], overwriting or accumulating: wgrad adds to a
/// gradient so.
///
/// # Errors
/// As [`gemm_fp8`]; also where `d` has another shape than the product.
pub fn gemm_fp8_into(
    a: &Fp8Operand<'_>,
    b: &Fp8Operand<'_>,
    d: ArrayViewMut2<'_, f32>,
    accumulate: Accumulate,
    config: &GemmConfig,
) -> Result<(), GemmError> {
    gemm_fp8_on(Isa::best(), a, b, d, accumulate, config)
}

/// [`gemm_fp8_into`] on a chosen instruction set, [`Isa::Portable`] being the specification itself:
/// for tests and benches.
///
/// # Errors
/// As [`gemm_fp8_into`].
pub fn gemm_fp8_on(
    isa: Isa,
    a: &Fp8Operand<'_>,
    b: &Fp8Operand<'_>,
    d: ArrayViewMut2<'_, f32>,
    accumulate: Accumulate,
    config: &GemmConfig,
) -> Result<(), GemmError> {
    config::check(a, b, config)?;
    check_output(a.rows(), b.rows(), &d)?;
    let formats = (a.format, b.format);
    let plain = plain::sum_of(a, b, config).filter(|_| isa != Isa::Portable);
    match (plain, tile::kernels(isa, formats, &config.accumulator)) {
        (Some(sum), _) => plain::gemm_fp8(sum, a, b, d, accumulate, config),
        (None, Some(kernels)) => tiled::gemm_fp8(&*kernels, a, b, d, accumulate, config),
        (None, None) => portable::gemm_fp8(a, b, d, accumulate, config),
    }
    Ok(())
}

/// `D[m, n] = A[m, k] B[n, k]^T` of BF16 operands, a chain of `accumulator`'s steps over all of K
/// (Hopper: 16 products, truncated to FP32 between steps).
///
/// # Errors
/// [`GemmError`] where the shapes do not fit each other, or the accumulator's group is 0 or its
/// fraction bits are not 1 to 23.
pub fn gemm_bf16_into(
    a: ArrayView2<'_, bf16>,
    b: ArrayView2<'_, bf16>,
    d: ArrayViewMut2<'_, f32>,
    accumulate: Accumulate,
    accumulator: &Accumulator,
) -> Result<(), GemmError> {
    let code = |x: &bf16| u32::from(x.to_bits());
    gemm_unscaled_on(
        Isa::best(),
        Format::Bf16,
        a.map(code).view(),
        b.map(code).view(),
        d,
        accumulate,
        accumulator,
    )
}

/// [`gemm_bf16_into`] for FP16 operands.
///
/// # Errors
/// As [`gemm_bf16_into`].
pub fn gemm_f16_into(
    a: ArrayView2<'_, f16>,
    b: ArrayView2<'_, f16>,
    d: ArrayViewMut2<'_, f32>,
    accumulate: Accumulate,
    accumulator: &Accumulator,
) -> Result<(), GemmError> {
    let code = |x: &f16| u32::from(x.to_bits());
    gemm_unscaled_on(
        Isa::best(),
        Format::F16,
        a.map(code).view(),
        b.map(code).view(),
        d,
        accumulate,
        accumulator,
    )
}

/// The output cast of a GEMM: FP32 to BF16, nearest even, NaN canonical.
pub fn cast_bf16(d: ArrayView2<'_, f32>) -> Array2<bf16> {
    d.map(|&x| to_bf16(x))
}

/// `D[m, n] = A[m, k] B[n, k]^T` without scales, over codes of `format` (BF16, FP16, TF32 or an
/// 8-bit one) on a chosen instruction set, [`Isa::Portable`] being the specification itself.
///
/// # Errors
/// As [`gemm_bf16_into`].
pub fn gemm_unscaled_on(
    isa: Isa,
    format: Format,
    a: ArrayView2<'_, u32>,
    b: ArrayView2<'_, u32>,
    d: ArrayViewMut2<'_, f32>,
    accumulate: Accumulate,
    accumulator: &Accumulator,
) -> Result<(), GemmError> {
    if a.ncols() != b.ncols() {
        return Err(GemmError::Depth { a: a.dim(), b: b.dim() });
    }
    config::check_accumulator(accumulator)?;
    check_output(a.nrows(), b.nrows(), &d)?;
    let starts = |x: &f32| accumulate != Accumulate::Chain || tile::in_f32_range(*x);
    let kernels = tile::kernels(isa, (format, format), accumulator)
        .filter(|kernels| kernels.any_c() || d.iter().all(starts));
    match kernels {
        Some(kernels) if format.layout().bits() == 8 => {
            let (a, b) = (a.map(|&code| code as u8), b.map(|&code| code as u8));
            let (a, b) = (tile::Codes::U8(a.view()), tile::Codes::U8(b.view()));
            tiled::gemm_unscaled(&*kernels, &a, &b, d, accumulate);
        }
        Some(kernels) => {
            let (a, b) = (tile::Codes::U32(a), tile::Codes::U32(b));
            tiled::gemm_unscaled(&*kernels, &a, &b, d, accumulate);
        }
        None => portable::gemm_unscaled(format, a, b, d, accumulate, accumulator),
    }
    Ok(())
}

fn check_output(m: usize, n: usize, d: &ArrayViewMut2<'_, f32>) -> Result<(), GemmError> {
    if d.dim() == (m, n) {
        return Ok(());
    }
    Err(GemmError::Shape { what: "d", expected: vec![m, n], found: d.shape().to_vec() })
}
