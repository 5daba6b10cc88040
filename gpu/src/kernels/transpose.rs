//! The transpose of a matrix: with its rows set apart as TMA wants them, a step of ops whose
//! kernels read a matrix along its other dimension; dense, `transpose_codes`.

use fathom_reference::ops::gather_rows::GatherRows;
use fathom_reference::ops::transpose_codes::TransposeCodes;
use fathom_trace::{DType, TensorMeta};

use super::{Kernel, mandatory, roles};
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
        let y = self.padded(x.dtype(), columns, rows)?;
        self.transpose_to(x, Arg::Matrix(&y), y.pitch())?;
        Ok(y)
    }

    /// Writes the transpose of `x` to `y`, whose rows begin `pitch` elements after each other.
    fn transpose_to(&self, x: &DeviceTensor, y: Arg<'_>, pitch: usize) -> Result<(), GpuError> {
        let (rows, columns) = x.rows_columns();
        let bytes = x.dtype().size();
        assert!(bytes <= 4, "elements of {bytes} bytes");
        let kernel = self.kernel(SOURCE, "transpose", &[("BYTES", bytes as u64)], 0)?;
        let squares = rows.div_ceil(SIDE) * columns.div_ceil(SIDE);
        let [m, n] = [rows, columns].map(|n| Arg::U32(n as u32));
        let args = [Arg::Tensor(x), y, m, n, Arg::U64(pitch as u64)];
        self.launch(&kernel, &LaunchConfig::new(squares, 256), &args)
    }
}

impl Kernel for TransposeCodes {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [q, scale] = roles(inputs);
        let taken: usize = self.segments.iter().sum();
        let q = mandatory(q).rows(0, taken);
        let q_t = gpu.tensor(q.dtype(), &[q.shape()[1], taken])?;
        gpu.transpose_to(&q, Arg::Tensor(&q_t), taken)?;
        // Row 0 of the one scale, again and again.
        let scales = self.scales();
        let first = gpu.constants(&vec![0; scales])?;
        let op = GatherRows { out: DType::F32 };
        let scale_t = op.launch(gpu, vec![scale, Some(first)])?.remove(0).reshape(&[1, scales]);
        Ok(vec![q_t, scale_t])
    }
}
