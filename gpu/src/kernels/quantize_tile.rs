//! `quantize_tile` by `gpu/kernels/quant/quantize_tile.cu`: a scale for every 1 x tile.

use fathom_numerics::formats::Format;
use fathom_reference::op::codes::{stored_as, stored_columns};
use fathom_reference::ops::quantize_tile::QuantizeTile;
use fathom_trace::{DType, TensorMeta};

use super::quant::{format_code, scale_code};
use super::{Kernel, is_bf16, mandatory, require, roles};
use crate::compile::{Source, source};
use crate::device::{Gpu, GpuError};
use crate::launch::{Arg, LaunchConfig};
use crate::tensor::DeviceTensor;

/// Entry `quantize_tile`, constants `X_BF16`, `TILE`, `FORMAT` and `SCALE`.
pub(crate) const SOURCE: Source<'static> = source!("quant/quantize_tile.cu");

/// The longest tile that a warp holds in registers.
const LONGEST: usize = 1024;
/// Threads of a CTA; a warp casts a tile at a time.
const THREADS: u32 = 128;

impl Kernel for QuantizeTile {
    fn covers(&self, inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        let [Some(x)] = inputs else { unreachable!("mandatory") };
        let eights = self.format != Format::E5M6 || self.tile.is_multiple_of(8);
        require(&[
            (x.dtype != DType::F16, "x of F32 or BF16"),
            (self.tile <= LONGEST, "tile: at most 1024"),
            (eights, "tile: a multiple of 8 for format e5m6"),
        ])
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [x] = roles(inputs);
        let x = mandatory(x);
        let (m, k) = x.rows_columns();
        let (tiles, dtype) = (k.div_ceil(self.tile), stored_as(self.format));
        let q = gpu.tensor(dtype, &[m, stored_columns(dtype, k)])?;
        let scale = gpu.tensor(DType::F32, &[m, tiles])?;
        let defines = [
            ("X_BF16", is_bf16(&x)),
            ("TILE", self.tile as u64),
            ("FORMAT", format_code(self.format)),
            ("SCALE", scale_code(self.scale)),
        ];
        let kernel = gpu.kernel(SOURCE, "quantize_tile", &defines, 0)?;
        // A warp for every tile, at most 16 CTAs an SM.
        let ctas = (m * tiles).div_ceil(THREADS as usize / 32);
        let most = 16 * gpu.description().sm_count as usize;
        let args = [
            Arg::Tensor(&x),
            Arg::Tensor(&q),
            Arg::Tensor(&scale),
            Arg::U32(m as u32),
            Arg::U32(k as u32),
            Arg::F32(self.amax_floor),
        ];
        gpu.launch(&kernel, &LaunchConfig::new(ctas.min(most), THREADS), &args)?;
        Ok(vec![q, scale])
    }
}
