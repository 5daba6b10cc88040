//! The FP8 GEMM in the two layouts of MoE: experts share one tensor, each has its own weights or
//! its own gradient. Every group's bits are those of [`super::gemm_fp8`] on the group alone.

use super::config::{Accumulate, Fp8Operand, GemmConfig, GemmError};
use super::gemm_fp8_into;
use ndarray::{ArrayViewMut2, ArrayViewMut3, Axis, s};

/// Grouped M (fprop and dgrad of experts): group g owns `m_sizes[g]` consecutive rows of A, and
/// those rows of D are `A[M_g] B[g]^T`; rows behind the last group's are +0.
///
/// A needs one scale row for each of its rows, or one for all of them.
///
/// # Errors
/// [`GemmError`] where shapes, scales or sizes do not fit each other.
pub fn gemm_fp8_grouped_m(
    a: &Fp8Operand<'_>,
    b: &[Fp8Operand<'_>],
    m_sizes: &[usize],
    mut d: ArrayViewMut2<'_, f32>,
    config: &GemmConfig,
) -> Result<(), GemmError> {
    let (m, n) = (a.rows(), b.first().map_or(d.ncols(), |b| b.rows()));
    if m_sizes.len() != b.len() {
        let (expected, found) = (vec![b.len()], vec![m_sizes.len()]);
        return Err(GemmError::Shape { what: "m_sizes", expected, found });
    }
    if m_sizes.iter().sum::<usize>() > m {
        return Err(GemmError::GroupSizes {
            what: "m_sizes",
            expected: format!("a sum of at most M = {m}"),
            found: format!("{m_sizes:?}"),
        });
    }
    check_equal_rows(b, n)?;
    if d.dim() != (m, n) {
        return Err(GemmError::Shape { what: "d", expected: vec![m, n], found: d.shape().into() });
    }
    check_row_scales(a)?;
    let mut begin = 0;
    for (&size, b) in m_sizes.iter().zip(b) {
        let rows = d.slice_mut(s![begin..begin + size, ..]);
        gemm_fp8_into(&a.row_range(begin, size), b, rows, Accumulate::Overwrite, config)?;
        begin += size;
    }
    d.slice_mut(s![begin.., ..]).fill(0.0);
    Ok(())
}

/// Grouped K (wgrad of experts): group g owns `k_sizes[g]` consecutive elements of K, and
/// `D[g] = A[:, K_g] B[:, K_g]^T`, overwriting or accumulating. K's scale blocks start anew at
/// every group, so that group g owns `ceil(k_sizes[g] / block)` columns of each operand's scales.
/// An empty group adds nothing.
///
/// # Errors
/// [`GemmError`] where shapes, scales or sizes do not fit each other.
pub fn gemm_fp8_grouped_k(
    a: &Fp8Operand<'_>,
    b: &Fp8Operand<'_>,
    k_sizes: &[usize],
    mut d: ArrayViewMut3<'_, f32>,
    accumulate: Accumulate,
    config: &GemmConfig,
) -> Result<(), GemmError> {
    check_groups(a, b, k_sizes)?;
    let expected = vec![k_sizes.len(), a.rows(), b.rows()];
    if d.shape() != expected {
        return Err(GemmError::Shape { what: "d", expected, found: d.shape().to_vec() });
    }
    let (mut begin, mut column_a, mut column_b) = (0, 0, 0);
    for (&size, d) in k_sizes.iter().zip(d.axis_iter_mut(Axis(0))) {
        let a = a.k_range(begin, size, &mut column_a);
        let b = b.k_range(begin, size, &mut column_b);
        gemm_fp8_into(&a, &b, d, accumulate, config)?;
        begin += size;
    }
    Ok(())
}

/// Segmented K (wgrad of rows that are several sequences): the segments of [`gemm_fp8_grouped_k`]
/// enter one `d`, the first as `accumulate` says, each further one chained onto it.
///
/// # Errors
/// As [`gemm_fp8_grouped_k`].
pub fn gemm_fp8_segmented_k(
    a: &Fp8Operand<'_>,
    b: &Fp8Operand<'_>,
    k_sizes: &[usize],
    mut d: ArrayViewMut2<'_, f32>,
    mut accumulate: Accumulate,
    config: &GemmConfig,
) -> Result<(), GemmError> {
    check_groups(a, b, k_sizes)?;
    let (mut begin, mut column_a, mut column_b) = (0, 0, 0);
    for &size in k_sizes {
        let a = a.k_range(begin, size, &mut column_a);
        let b = b.k_range(begin, size, &mut column_b);
        gemm_fp8_into(&a, &b, d.view_mut(), accumulate, config)?;
        accumulate = Accumulate::Chain;
        begin += size;
    }
    Ok(())
}

impl Fp8Operand<'_> {
    /// `size` rows from `begin`, for operands with a scale row for each row or one for all.
    fn row_range(&self, begin: usize, size: usize) -> Fp8Operand<'_> {
        let own = s![begin..begin + size, ..];
        let scales = if self.block.rows == 1 {
            self.scales.slice(own)
        } else {
            self.scales.slice(s![..size.min(1), ..])
        };
        Fp8Operand { codes: self.codes.slice(own), scales, ..*self }
    }

    /// `size` elements of K from `begin`, whose scales start at `column`, which moves on.
    fn k_range(&self, begin: usize, size: usize, column: &mut usize) -> Fp8Operand<'_> {
        let first = *column;
        *column += size.div_ceil(self.block.k);
        Fp8Operand {
            codes: self.codes.slice(s![.., begin..begin + size]),
            scales: self.scales.slice(s![.., first..*column]),
            ..*self
        }
    }
}

fn check_row_scales(a: &Fp8Operand<'_>) -> Result<(), GemmError> {
    a.check("a")?;
    if a.block.rows == 1 || a.block.rows >= a.rows() {
        return Ok(());
    }
    let shape = a.codes.dim();
    let block = super::ScaleBlock { rows: 1, ..a.block };
    let expected = block.scales(shape.0, shape.1);
    Err(GemmError::Scales { operand: "a", shape, block, expected, found: a.scales.dim() })
}

/// Both operands' K is cut into `k_sizes`, and their scales begin anew in each.
fn check_groups(
    a: &Fp8Operand<'_>,
    b: &Fp8Operand<'_>,
    k_sizes: &[usize],
) -> Result<(), GemmError> {
    let k = a.codes.ncols();
    if k_sizes.iter().sum::<usize>() != k {
        return Err(GemmError::GroupSizes {
            what: "k_sizes",
            expected: format!("a sum of K = {k}"),
            found: format!("{k_sizes:?}"),
        });
    }
    if b.codes.ncols() != k {
        return Err(GemmError::Depth { a: a.codes.dim(), b: b.codes.dim() });
    }
    check_group_scales("a", a, k_sizes)?;
    check_group_scales("b", b, k_sizes)
}

fn check_group_scales(
    operand: &'static str,
    x: &Fp8Operand<'_>,
    k_sizes: &[usize],
) -> Result<(), GemmError> {
    x.check_block()?;
    let columns = k_sizes.iter().map(|size| size.div_ceil(x.block.k)).sum();
    let expected = (x.rows().div_ceil(x.block.rows), columns);
    if x.scales.dim() == expected {
        return Ok(());
    }
    let (shape, found, block) = (x.codes.dim(), x.scales.dim(), x.block);
    Err(GemmError::Scales { operand, shape, block, expected, found })
}

fn check_equal_rows(groups: &[Fp8Operand<'_>], rows: usize) -> Result<(), GemmError> {
    for x in groups {
        if x.rows() != rows {
            return Err(GemmError::Shape {
                what: "a group's operand",
                expected: vec![rows, x.codes.ncols()],
                found: x.codes.shape().to_vec(),
            });
        }
    }
    Ok(())
}
