//! Delayed per-tensor scaling, as Transformer Engine does it: the scale of a step follows from the
//! largest magnitudes of the steps before, so that a cast needs one pass. A baseline.
//!
//! Here, as there, a value is multiplied by `scale` on the way in and by `1 / scale` on the way
//! out.

use super::{QuantError, Quantized, Source, rows};
use crate::formats::{E4M3, E5M2, Format};
use crate::gemm::ScaleBlock;
use crate::isa::Isa;
use ndarray::{Array2, ArrayView2};

/// Which amax of the history the next scale follows from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum AmaxAlgorithm {
    /// The largest of the history.
    Max,
    /// The last step's.
    MostRecent,
}

/// The knobs of a delayed cast.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct DelayedScaling {
    /// E4M3 or E5M2.
    pub format: Format,
    /// Powers of two of headroom below the format's largest value.
    pub margin: i32,
    /// Which amax counts.
    pub algorithm: AmaxAlgorithm,
}

impl DelayedScaling {
    /// Casts with the present scale, saturating; the codes' scale is `1 / scale`. With it x's
    /// largest magnitude, for [`DelayedScaling::next_scale`]; with several ranks that of all of
    /// them counts.
    ///
    /// # Errors
    /// [`QuantError::Format`].
    pub fn quantize<T: Source>(
        &self,
        x: ArrayView2<'_, T>,
        scale: f32,
    ) -> Result<(Quantized, f32), QuantError> {
        let x = x.as_standard_layout();
        let values = x.as_slice().expect("standard layout");
        let isa = Isa::best();
        let codes: Vec<u8> = match self.format {
            Format::E4M3 => {
                let mut codes = vec![E4M3(0); x.len()];
                rows::cast_times(isa, values, scale, &mut codes);
                bytemuck::cast_vec(codes)
            }
            Format::E5M2 => {
                let mut codes = vec![E5M2(0); x.len()];
                rows::cast_times(isa, values, scale, &mut codes);
                bytemuck::cast_vec(codes)
            }
            found => return Err(QuantError::Format { found }),
        };
        let cast = Quantized {
            codes: Array2::from_shape_vec(x.dim(), codes).expect("one code an element"),
            scales: Array2::from_elem((1, 1), 1.0 / scale),
            format: self.format,
            block: ScaleBlock::PER_TENSOR,
        };
        Ok((cast, rows::amax_of(isa, values)))
    }

    /// A step's amax enters the history in front, the oldest leaves, and the scale of the next step
    /// follows: `max_of_format / amax / 2^margin`, or `scale` as it is where amax is zero or not
    /// finite.
    pub fn next_scale(&self, history: &mut [f32], amax: f32, scale: f32) -> f32 {
        history.rotate_right(usize::from(!history.is_empty()));
        if let Some(newest) = history.first_mut() {
            *newest = amax;
        }
        let amax = match self.algorithm {
            AmaxAlgorithm::Max => history.iter().copied().fold(0.0, f32::max),
            AmaxAlgorithm::MostRecent => amax,
        };
        if !(amax > 0.0 && amax.is_finite()) {
            return scale;
        }
        let next = (self.format.max() / amax) / 2.0f32.powi(self.margin);
        if next.is_infinite() { f32::MAX } else { next }
    }
}
