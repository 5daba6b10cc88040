//! The FP8 GEMM in the three layouts of MoE: experts share one tensor, each has its own weights or
//! its own gradient. Every group's bits are those of [`super::gemm_fp8`] on the group alone.

use super::config::{Accumulate, Fp8Operand, GemmConfig, GemmError};
use super::gemm_fp8_into;
use ndarray::{Array2, Array3, ArrayViewMut3, Axis, s};

/// Contiguous M (fprop and dgrad of training, prefill): row i of A belongs to group `m_indices[i]`,
/// and
/// `D[i] = A[i] B[group]^T`. A negative index marks padding; its rows of D are +0.
///
/// A needs one scale row for each of its rows (`a.block.rows` = 1). Equal indices need not be
/// adjacent, as each row's bits depend on that row alone.
pub fn gemm_fp8_grouped_contiguous(
    a: &Fp8Operand<'_>,
    b: &[Fp8Operand<'_>],
    m_indices: &[i32],
    config: &GemmConfig,
) -> Result<Array2<f32>, GemmError> {
    let m = a.rows();
    if m_indices.len() != m {
        return Err(GemmError::Shape {
            what: "m_indices",
            expected: vec![m],
            found: vec![m_indices.len()],
        });
    }
    check_row_scales(a)?;
    let n = b.first().map_or(0, |b| b.rows());
    check_equal_rows(b, n)?;
    let mut d = Array2::zeros((m, n));
    let mut row = 0;
    while row < m {
        let group = m_indices[row];
        let end = row + m_indices[row..].iter().take_while(|&&g| g == group).count();
        if let Ok(index) = usize::try_from(group) {
            let weights = b.get(index).ok_or(GemmError::Group { row, group, groups: b.len() })?;
            let rows = d.slice_mut(s![row..end, ..]);
            gemm_fp8_into(&a.row_range(row, end), weights, rows, Accumulate::Overwrite, config)?;
        }
        row = end;
    }
    Ok(d)
}

/// Masked M (decode under CUDA graphs): `D[g, ..masked_m[g]] = A[g, ..masked_m[g]] B[g]^T`; the
/// rows
/// beyond are +0 and A's rows there are not read.
pub fn gemm_fp8_grouped_masked(
    a: &[Fp8Operand<'_>],
    b: &[Fp8Operand<'_>],
    masked_m: &[usize],
    config: &GemmConfig,
) -> Result<Array3<f32>, GemmError> {
    for (what, found) in [("b", b.len()), ("masked_m", masked_m.len())] {
        if found != a.len() {
            return Err(GemmError::Shape { what, expected: vec![a.len()], found: vec![found] });
        }
    }
    let (m, n) = (a.first().map_or(0, |a| a.rows()), b.first().map_or(0, |b| b.rows()));
    check_equal_rows(a, m)?;
    check_equal_rows(b, n)?;
    let mut d = Array3::zeros((a.len(), m, n));
    for (g, mut d) in d.outer_iter_mut().enumerate() {
        check_row_scales(&a[g])?;
        let valid = masked_m[g];
        if valid > m {
            return Err(GemmError::GroupSizes {
                what: "masked_m",
                expected: format!("at most {m} rows in group {g}"),
                found: valid.to_string(),
            });
        }
        let rows = d.slice_mut(s![..valid, ..]);
        gemm_fp8_into(&a[g].row_range(0, valid), &b[g], rows, Accumulate::Overwrite, config)?;
    }
    Ok(d)
}

/// Grouped K (wgrad of experts): group g owns `k_sizes[g]` consecutive elements of K, and
/// `D[g] = A[:, K_g] B[:, K_g]^T`, overwriting or accumulating. K's scale blocks start anew at
/// every
/// group, so that group g owns `ceil(k_sizes[g] / block)` columns of each operand's scales. An
/// empty group adds nothing.
pub fn gemm_fp8_grouped_k(
    a: &Fp8Operand<'_>,
    b: &Fp8Operand<'_>,
    k_sizes: &[usize],
    mut d: ArrayViewMut3<'_, f32>,
    accumulate: Accumulate,
    config: &GemmConfig,
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
    let expected = vec![k_sizes.len(), a.rows(), b.rows()];
    if d.shape() != expected {
        return Err(GemmError::Shape { what: "d", expected, found: d.shape().to_vec() });
    }
    check_group_scales("a", a, k_sizes)?;
    check_group_scales("b", b, k_sizes)?;
    let (mut begin, mut column_a, mut column_b) = (0, 0, 0);
    for (&size, d) in k_sizes.iter().zip(d.axis_iter_mut(Axis(0))) {
        let a = a.k_range(begin, size, &mut column_a);
        let b = b.k_range(begin, size, &mut column_b);
        gemm_fp8_into(&a, &b, d, accumulate, config)?;
        begin += size;
    }
    Ok(())
}

impl Fp8Operand<'_> {
    /// Rows `begin..end`, for operands with a scale row for each row.
    fn row_range(&self, begin: usize, end: usize) -> Fp8Operand<'_> {
        Fp8Operand {
            codes: self.codes.slice(s![begin..end, ..]),
            scales: self.scales.slice(s![begin..end, ..]),
            ..*self
        }
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
    if a.block.rows == 1 && a.scales.nrows() == a.rows() {
        return Ok(());
    }
    let shape = a.codes.dim();
    let block = super::ScaleBlock { rows: 1, ..a.block };
    let expected = block.scales(shape.0, shape.1);
    Err(GemmError::Scales { operand: "a", shape, block, expected, found: a.scales.dim() })
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
