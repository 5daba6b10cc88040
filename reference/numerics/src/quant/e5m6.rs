//! E5M6 with tile scales: how DeepSeek-V3 keeps the input of the projection after attention for its
//! backward pass (report, section 3.3.3).
//!
//! Scales are as in [`super::quantize`] with amax / 65024; eight codes lie in three 32-bit words
//! ([`crate::formats::packed`]), so a row of k elements is `ceil(k / 8) * 3` words, a tail filled
//! with zeros.

use super::{QuantConfig, QuantError, Source, rows};
use crate::formats::{E5M6, packed};
use crate::gemm::ScaleBlock;
use ndarray::{Array2, ArrayView2};

/// An E5M6 matrix and its scales.
#[derive(Clone, PartialEq, Debug)]
pub struct QuantizedE5M6 {
    /// `[rows, ceil(k / 8) * 3]` words of packed codes.
    pub words: Array2<u32>,
    /// FP32 scales, one a block.
    pub scales: Array2<f32>,
    /// Elements of a row.
    pub k: usize,
    /// Elements that share a scale; what is cast here has tiles of one row.
    pub block: ScaleBlock,
}

/// Quantises x`[rows, k]` to E5M6 with a scale for every 1 x `tile`. `config.format` is not looked
/// at.
///
/// # Errors
/// [`QuantError`] for a floor that is not a positive finite number, and a tile of 0.
pub fn quantize_tile_e5m6<T: Source>(
    x: ArrayView2<'_, T>,
    tile: usize,
    config: &QuantConfig,
) -> Result<QuantizedE5M6, QuantError> {
    let block = ScaleBlock { rows: 1, k: tile };
    config.check_block(block)?;
    let cast = rows::quantize::<T, E5M6>(x, block, config);
    Ok(QuantizedE5M6 { words: pack(cast.codes.view()), scales: cast.scales, k: x.ncols(), block })
}

/// Packs codes `[rows, k]` row by row into words `[rows, ceil(k / 8) * 3]`.
pub fn pack(codes: ArrayView2<'_, E5M6>) -> Array2<u32> {
    let (rows, k) = codes.dim();
    let mut words = Vec::with_capacity(rows * k.div_ceil(8) * 3);
    for row in codes.outer_iter() {
        for begin in (0..k).step_by(8) {
            let eight = std::array::from_fn(|i| *row.get(begin + i).unwrap_or(&E5M6(0)));
            words.extend(packed::pack_e5m6(eight));
        }
    }
    Array2::from_shape_vec((rows, k.div_ceil(8) * 3), words).expect("three words for eight codes")
}

impl QuantizedE5M6 {
    /// The codes, one an element.
    pub fn codes(&self) -> Array2<E5M6> {
        let mut codes = Array2::from_elem((self.words.nrows(), self.k), E5M6(0));
        for (words, mut row) in self.words.outer_iter().zip(codes.outer_iter_mut()) {
            for (g, mut eight) in row.axis_chunks_iter_mut(ndarray::Axis(0), 8).enumerate() {
                let group = packed::unpack_e5m6(std::array::from_fn(|i| words[3 * g + i]));
                eight.iter_mut().zip(group).for_each(|(code, unpacked)| *code = unpacked);
            }
        }
        codes
    }

    /// The values `q * scale` in FP32, NaN canonical.
    pub fn dequantize(&self) -> Array2<f32> {
        let values: Vec<f32> = (0..4096).map(|code| E5M6(code).to_f32()).collect();
        super::scaled(self.codes().view(), self.scales.view(), self.block, |code| {
            values[usize::from(code.0 & 0xFFF)]
        })
    }
}
