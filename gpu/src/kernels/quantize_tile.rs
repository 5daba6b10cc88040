//! `quantize_tile` by `gpu/kernels/quant/quantize_tile.cu`: F32 or BF16 to E4M3, a scale for every
//! 1x128.

use fathom_numerics::formats::Format;
use fathom_numerics::quant::ScaleKind;
use fathom_reference::ops::quantize_tile::QuantizeTile;
use fathom_trace::{DType, TensorMeta};

use super::{Kernel, is_bf16, mandatory, require, roles};
use crate::compile::{Source, source};
use crate::device::{Gpu, GpuError};
use crate::launch::{Arg, LaunchConfig};
use crate::tensor::DeviceTensor;

/// Entry `quantize_tile`, constants `INPUT_BF16` and `POW2`.
pub(crate) const SOURCE: Source<'static> = source!("quant/quantize_tile.cu");

/// Elements that share a scale.
const TILE: usize = 128;
/// Threads of a CTA; a warp casts a tile at a time.
const THREADS: u32 = 128;

impl Kernel for QuantizeTile {
    fn covers(&self, inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        let [Some(x)] = inputs else { unreachable!("mandatory") };
        require(&[
            (self.format == Format::E4M3, "format: e4m3"),
            (self.tile == TILE, "tile: 128"),
            (self.scale != ScaleKind::Mx, "scale: f32 or pow2"),
            (matches!(x.dtype, DType::F32 | DType::BF16), "x of F32 or BF16"),
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
        let tiles = k.div_ceil(TILE);
        let q = gpu.tensor(DType::F8E4M3, &[m, k])?;
        let scale = gpu.tensor(DType::F32, &[m, tiles])?;
        let pow2 = u64::from(self.scale == ScaleKind::Pow2);
        let defines = [("INPUT_BF16", is_bf16(&x)), ("POW2", pow2)];
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
