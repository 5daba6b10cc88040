//! Calibration: the constants of the GEMM model, fitted on measured tables.

use fathom_config::Gpu;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::SimError;
use crate::kernel_time::{Constants, GemmKind, GemmShape, KernelModel};

/// A measured GEMM: one line of a table to fit constants to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeasuredGemm {
    /// A name for reports; the fit does not read it.
    pub name: String,
    /// What the operands are and how the result is kept.
    pub kind: GemmKind,
    /// Rows of the output.
    pub m: u64,
    /// Columns of the output.
    pub n: u64,
    /// Inner dimension of the product.
    pub k: u64,
    /// Fastest run, microseconds.
    pub min_us: f64,
    /// Mean of the runs, microseconds.
    pub mean_us: f64,
}

/// Reads measured GEMMs from comma-separated text with the header `name,kind,m,n,k,mean_us,min_us`;
/// kinds are `fp8_one_two`, `fp8_one_one`, `bf16` and `bf16_accumulate`. The error names `file`,
/// line and what was found.
pub fn parse_table(file: &str, text: &str) -> Result<Vec<MeasuredGemm>, SimError> {
    const HEADER: &str = "name,kind,m,n,k,mean_us,min_us";
    let mut lines =
        text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty() && !l.starts_with('#'));
    let first = lines.next().map(|(_, l)| l.replace(' ', ""));
    if first.as_deref() != Some(HEADER) {
        return Err(SimError::input(file, format!("line 1: expected the header {HEADER}")));
    }
    lines
        .map(|(i, line)| {
            let bad = |what: &str| SimError::input(file, format!("line {}: {what}", i + 1));
            let cells: Vec<&str> = line.split(',').map(str::trim).collect();
            let [name, kind, m, n, k, mean, min] = cells[..] else {
                return Err(bad(&format!("expected 7 cells, found {}", cells.len())));
            };
            let kind = serde_json::from_value(Value::String(kind.to_string()))
                .map_err(|_| bad(&format!("unknown kind '{kind}'")))?;
            let size = |cell: &str, what: &str| {
                let ok = cell.parse::<u64>().ok().filter(|v| (1..1 << 32).contains(v));
                ok.ok_or_else(|| {
                    bad(&format!("{what} is '{cell}', expected a positive whole number"))
                })
            };
            let time = |cell: &str, what: &str| {
                let ok = cell.parse::<f64>().ok().filter(|v| v.is_finite() && *v > 0.0);
                ok.ok_or_else(|| {
                    bad(&format!("{what} is '{cell}', expected positive microseconds"))
                })
            };
            Ok(MeasuredGemm {
                name: name.to_string(),
                kind,
                m: size(m, "m")?,
                n: size(n, "n")?,
                k: size(k, "k")?,
                mean_us: time(mean, "mean_us")?,
                min_us: time(min, "min_us")?,
            })
        })
        .collect()
}

/// The fitting half of the GEMMs of the published H800 profile, without the grouped ones, whose
/// rows vary by layer.
pub const PROFILE_FITTING_GEMMS: &str =
    include_str!("../../presets/measured/h800-profile-fitting.csv");

/// Fits `mma_efficiency`, `promotion_cycles` and `tile_cycles` to the fastest runs of `table`,
/// measured on `sms` SMs of `gpu`, and `contention` to mean over fastest; the other constants stay
/// as in `start`.
///
/// For given tile widths the time is linear in the three unknowns (the inverse of the efficiency
/// for the first); relative errors are minimised in the least-squares sense, a few times over:
/// a library's widths depend on the constants. What no GEMM of the table tells (promotion, where
/// there is none) stays. Too few different GEMMs, and times that no such constants give, are a
/// [`SimError::Input`].
pub fn fit_gemms(
    gpu: &Gpu,
    sms: u64,
    table: &[MeasuredGemm],
    start: Constants,
) -> Result<Constants, SimError> {
    let mut fitted = start;
    for _ in 0..ROUNDS {
        let model = model_on(gpu, sms, fitted);
        let width = |g: &MeasuredGemm| {
            model.gemm_of_library(&GemmShape::new(g.m, g.n, g.k), g.kind).block_n
        };
        let widths: Vec<u64> = table.iter().map(width).collect();
        fitted = fit_tiles(gpu, sms, table, &widths, start)?;
    }
    let ratio: f64 = table.iter().map(|g| g.mean_us / g.min_us).sum::<f64>() / table.len() as f64;
    Ok(Constants { contention: ratio, ..fitted })
}

/// Rounds of fitting constants and choosing tile widths by them; the third changes no digit that is
/// printed.
const ROUNDS: usize = 3;

/// `sms` SMs of `gpu` with nothing beside.
fn model_on(gpu: &Gpu, sms: u64, constants: Constants) -> KernelModel {
    let what_if = crate::config::WhatIf::default();
    KernelModel { sms, ..KernelModel::alone(gpu, constants, &what_if) }
}

/// [`fit_gemms`] for GEMMs with tiles of these `widths`.
fn fit_tiles(
    gpu: &Gpu,
    sms: u64,
    table: &[MeasuredGemm],
    widths: &[u64],
    start: Constants,
) -> Result<Constants, SimError> {
    // The time with one unknown at 1 and the others at 0, less the time with all at 0.
    let with = |mma: f64, promotion: f64, tile: f64| {
        let mma_efficiency = if mma == 0.0 { f64::INFINITY } else { 1.0 / mma };
        let constants =
            Constants { mma_efficiency, promotion_cycles: promotion, tile_cycles: tile, ..start };
        model_on(gpu, sms, constants)
    };
    let base = with(0.0, 0.0, 0.0);
    let units = [with(1.0, 0.0, 0.0), with(0.0, 1.0, 0.0), with(0.0, 0.0, 1.0)];
    let (mut a, mut b) = ([[0.0; 3]; 3], [0.0; 3]);
    for (g, &width) in table.iter().zip(widths) {
        let time =
            |k: &KernelModel| k.gemm_unbounded(&GemmShape::new(g.m, g.n, g.k), g.kind, width);
        let measured = g.min_us / 1e6;
        let fixed = time(&base);
        let row = [0, 1, 2].map(|i| (time(&units[i]) - fixed) / measured);
        let target = 1.0 - fixed / measured;
        for i in 0..3 {
            b[i] += row[i] * target;
            for j in 0..3 {
                a[i][j] += row[i] * row[j];
            }
        }
    }
    let known = [1.0 / start.mma_efficiency, start.promotion_cycles, start.tile_cycles];
    let x = solve_told(a, b, known)?;
    if x[0] <= 0.0 || x.iter().any(|v| !v.is_finite()) {
        return Err(SimError::input(
            "measured table",
            format!("the fit gives {x:?}: the times do not follow tiles and waves on {sms} SMs"),
        ));
    }
    Ok(Constants { mma_efficiency: 1.0 / x[0], promotion_cycles: x[1], tile_cycles: x[2], ..start })
}

/// The unknowns that the normal equations tell; one that no row depends on stays as `known`, one
/// that would be negative is 0 and the others are solved for anew.
fn solve_told(
    mut a: [[f64; 3]; 3],
    mut b: [f64; 3],
    known: [f64; 3],
) -> Result<[f64; 3], SimError> {
    let mut fixed: [Option<f64>; 3] = std::array::from_fn(|i| (a[i][i] == 0.0).then_some(known[i]));
    let too_few =
        || SimError::input("measured table", "too few different GEMMs to fit the constants");
    if fixed[0].is_some() {
        return Err(too_few());
    }
    loop {
        for i in 0..3 {
            if fixed[i].is_some() {
                // The equation `x = 0`; a value that no row depends on is put in at the end.
                a[i] = [0.0; 3];
                a.iter_mut().for_each(|row| row[i] = 0.0);
                (a[i][i], b[i]) = (1.0, 0.0);
            }
        }
        let x = solve(a, b).ok_or_else(too_few)?;
        match (1..3).find(|&i| fixed[i].is_none() && x[i] < 0.0) {
            Some(negative) => fixed[negative] = Some(0.0),
            None => return Ok(std::array::from_fn(|i| fixed[i].unwrap_or(x[i]))),
        }
    }
}

/// Gaussian elimination with pivoting; `None` where the matrix is singular.
fn solve(mut a: [[f64; 3]; 3], mut b: [f64; 3]) -> Option<[f64; 3]> {
    for i in 0..3 {
        let pivot = (i..3).max_by(|&p, &q| a[p][i].abs().total_cmp(&a[q][i].abs()))?;
        if a[pivot][i].abs() < 1e-12 {
            return None;
        }
        a.swap(i, pivot);
        b.swap(i, pivot);
        for r in 0..3 {
            if r != i {
                let f = a[r][i] / a[i][i];
                let row = a[i];
                for (cell, value) in a[r].iter_mut().zip(row) {
                    *cell -= f * value;
                }
                b[r] -= f * b[i];
            }
        }
    }
    Some(std::array::from_fn(|i| b[i] / a[i][i]))
}
