//! A table of measured GEMMs in place of one rate: what a library reaches differs by shape in ways
//! that tiles and waves do not tell.

use super::{GemmKind, GemmShape, GroupedBy, KernelModel};
use crate::calibrate::MeasuredGemm;

/// Measured over modelled time, by kind and sizes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GemmTable {
    rows: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq)]
struct Entry {
    kind: GemmKind,
    /// Logarithms of m, n, k.
    at: [f64; 3],
    /// Logarithm of measured over modelled time.
    log_ratio: f64,
}

/// Distance in the logarithm of a size over which a measurement tells half of what it says: shapes
/// a third apart run on other tiles.
const REACH: f64 = 0.3;
/// Weight of the model itself beside the measurements, one of which at no distance weighs 1.
const PRIOR: f64 = 0.05;

fn place(m: u64, n: u64, k: u64) -> [f64; 3] {
    [m, n, k].map(|size| (size.max(1) as f64).ln())
}

impl GemmTable {
    /// The table of `measured`, against the times of `model`.
    pub fn new(model: &KernelModel, measured: &[MeasuredGemm]) -> GemmTable {
        let entry = |g: &MeasuredGemm| {
            let own = model.gemm_of_library(&GemmShape::new(g.m, g.n, g.k), g.kind).seconds;
            let log_ratio = (g.mean_us / 1e6 / own).ln();
            Entry { kind: g.kind, at: place(g.m, g.n, g.k), log_ratio }
        };
        GemmTable { rows: measured.iter().map(entry).collect() }
    }

    /// Factor on the modelled time of `shape`: the mean of the measured ones by their distance in
    /// the logarithms of the sizes, 1 far from all of them. A grouped GEMM is placed by its mean
    /// group.
    pub fn ratio(&self, shape: &GemmShape, kind: GemmKind) -> f64 {
        let groups = shape.groups.len().max(1) as u64;
        let mean = shape.groups.iter().sum::<u64>() / groups;
        let at = match (shape.groups.is_empty(), shape.grouped_by) {
            (true, _) => place(shape.m, shape.n, shape.k),
            (false, GroupedBy::M) => place(mean, shape.n, shape.k),
            (false, GroupedBy::K) => place(shape.m, shape.n, mean),
        };
        let (mut weights, mut sum) = (PRIOR, 0.0);
        for row in self.rows.iter().filter(|row| row.kind == kind) {
            let squares = row.at.iter().zip(at).map(|(a, b)| ((a - b) / REACH).powi(2));
            let distance: f64 = squares.sum();
            if distance < 1e-12 {
                return row.log_ratio.exp();
            }
            let weight = (-distance).exp2();
            weights += weight;
            sum += weight * row.log_ratio;
        }
        (sum / weights).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::WhatIf;
    use crate::kernel_time::Constants;
    use fathom_config::Gpu;

    #[test]
    fn a_measured_shape_takes_its_time_and_a_distant_one_the_models() {
        let gpu = Gpu::preset("b200").unwrap();
        let model = KernelModel::alone(&gpu, Constants::FITTED, &WhatIf::default());
        let shape = GemmShape::new(4096, 8192, 8192);
        let own = model.gemm_of_library(&shape, GemmKind::Bf16).seconds;
        let (name, kind) = (String::new(), GemmKind::Bf16);
        let us = 2.0 * own * 1e6;
        let row = MeasuredGemm { name, kind, m: 4096, n: 8192, k: 8192, min_us: us, mean_us: us };
        let table = GemmTable::new(&model, &[row]);
        assert!((table.ratio(&shape, kind) - 2.0).abs() < 1e-9);
        assert_eq!(table.ratio(&shape, GemmKind::Bf16Accumulate), 1.0);
        let near = table.ratio(&GemmShape::new(4096, 8192, 7168), kind);
        let far = table.ratio(&GemmShape::new(128, 128, 128), kind);
        assert!(near > 1.5 && near < 2.0 && (far - 1.0).abs() < 1e-9, "{near} {far}");
    }
}
