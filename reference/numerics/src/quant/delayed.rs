//! Delayed per-tensor scaling, as Transformer Engine does it: the scale of a step follows from the
//! largest magnitudes of the steps before, so that a cast needs one pass. A baseline.
//!
//! Here, as there, a value is multiplied by `scale` on the way in and by `scale_inv` on the way
//! out.

use super::{QuantError, Quantized, Source, rows};
use crate::formats::{E4M3, E5M2, Format};
use crate::gemm::ScaleBlock;
use crate::isa::Isa;
use ndarray::{Array2, ArrayView2};
use std::collections::VecDeque;

/// Which amax of the history the next scale follows from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum AmaxAlgorithm {
    /// The largest.
    Max,
    /// The last step's.
    MostRecent,
}

/// The scaling state of one tensor.
#[derive(Clone, PartialEq, Debug)]
pub struct DelayedScaling {
    /// Largest magnitudes of the last steps, the newest in front; its length is fixed.
    history: VecDeque<f32>,
    scale: f32,
    /// E4M3 or E5M2.
    pub format: Format,
    /// Powers of two of headroom below the format's largest value.
    pub margin: i32,
    /// Which amax counts.
    pub algorithm: AmaxAlgorithm,
}

impl DelayedScaling {
    /// A history of `length` steps (Transformer Engine: 1024), all zero, and scale 1.
    pub fn new(format: Format, length: usize) -> Result<DelayedScaling, QuantError> {
        if !matches!(format, Format::E4M3 | Format::E5M2) {
            return Err(QuantError::Format { found: format });
        }
        let history = VecDeque::from(vec![0.0; length.max(1)]);
        Ok(DelayedScaling { history, scale: 1.0, format, margin: 0, algorithm: AmaxAlgorithm::Max })
    }

    /// The factor that the next cast multiplies by.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Largest magnitudes of the last steps, the newest first.
    pub fn history(&self) -> impl Iterator<Item = f32> + '_ {
        self.history.iter().copied()
    }

    /// Casts with the present scale, saturating; the codes' scale is `1 / scale`. Then x's amax
    /// enters the history and the scale for the next step follows: `max_of_format / amax /
    /// 2^margin`,
    /// or unchanged where amax is zero or not finite.
    pub fn quantize<T: Source>(&mut self, x: ArrayView2<'_, T>) -> Quantized {
        let x = x.as_standard_layout();
        let x_slice = x.as_slice().expect("standard layout");
        let (isa, scale) = (Isa::best(), self.scale);
        let codes: Vec<u8> = match self.format {
            Format::E5M2 => {
                let mut codes = vec![E5M2(0); x.len()];
                rows::cast_times(isa, x_slice, scale, &mut codes);
                bytemuck::cast_vec(codes)
            }
            _ => {
                let mut codes = vec![E4M3(0); x.len()];
                rows::cast_times(isa, x_slice, scale, &mut codes);
                bytemuck::cast_vec(codes)
            }
        };
        self.update(rows::amax_of(isa, x_slice));
        Quantized {
            codes: Array2::from_shape_vec(x.dim(), codes).expect("one code an element"),
            scales: Array2::from_elem((1, 1), 1.0 / scale),
            format: self.format,
            block: ScaleBlock::PER_TENSOR,
        }
    }

    /// A step's amax enters the history, the oldest leaves, and the scale follows. With several
    /// ranks
    /// the amax is the largest of theirs.
    pub fn update(&mut self, amax: f32) {
        self.history.pop_back();
        self.history.push_front(amax);
        let amax = match self.algorithm {
            AmaxAlgorithm::Max => self.history.iter().copied().fold(0.0, f32::max),
            AmaxAlgorithm::MostRecent => self.history[0],
        };
        if amax > 0.0 && amax.is_finite() {
            let scale = (self.format.max() / amax) / 2.0f32.powi(self.margin);
            self.scale = if scale.is_infinite() { f32::MAX } else { scale };
        }
    }
}
