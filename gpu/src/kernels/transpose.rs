//! The transpose of a matrix with its rows set apart as TMA wants them: no op of its own, a step
//! of ops whose kernels read a matrix along its other dimension.

use crate::compile::{Source, source};
use crate::device::{Gpu, GpuError};
use crate::launch::{Arg, LaunchConfig};
use crate::tensor::{DeviceTensor, Matrix};

/// Entry `transpose`, constant `BYTES`.
const SOURCE: Source<'static> = source!("data/transpose.cu");

/// Extent of the square that a CTA turns.
const SIDE: usize = 32;

impl Gpu {
    /// The transpose of a matrix, its rows at multiples of 16 bytes; enqueued.
    ///
    /// # Errors
    /// [`GpuError`].
    ///
    /// # Panics
    /// Where an element has more than four bytes.
    pub fn transposed(&self, x: &DeviceTensor) -> Result<Matrix, GpuError> {
        let (rows, columns) = x.rows_columns();
        let bytes = x.dtype().size();
        assert!(bytes <= 4, "elements of {bytes} bytes");
        let y = self.padded(x.dtype(), columns, rows)?;
        let kernel = self.kernel(SOURCE, "transpose", &[("BYTES", bytes as u64)], 0)?;
        let squares = rows.div_ceil(SIDE) * columns.div_ceil(SIDE);
        let config = LaunchConfig::new(squares, 256);
        let sizes = [rows, columns].map(|n| Arg::U32(n as u32));
        let pitch = Arg::U64(y.pitch() as u64);
        self.launch(
            &kernel,
            &config,
            &[Arg::Tensor(x), Arg::Matrix(&y), sizes[0], sizes[1], pitch],
        )?;
        Ok(y)
    }
}
