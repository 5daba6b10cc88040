//! `add` and `cast` by `gpu/kernels/data/elementwise.cu`.

use fathom_reference::ops::add::Add;
use fathom_reference::ops::cast::Cast;
use fathom_trace::{DType, TensorMeta};

use super::{Kernel, is_bf16, mandatory, roles};
use crate::compile::{Source, source};
use crate::device::{Gpu, GpuError};
use crate::launch::{Arg, LaunchConfig};
use crate::tensor::DeviceTensor;

/// Entries `add` and `cast`; constants `X_BF16`, `Y_BF16`, for `add` also `B_BF16` and `C_BF16`.
const SOURCE: Source<'static> = source!("data/elementwise.cu");

/// `x` in another element type, F32 or BF16; `x` itself where it has it.
///
/// # Errors
/// [`GpuError`].
pub(super) fn cast(gpu: &Gpu, x: DeviceTensor, out: DType) -> Result<DeviceTensor, GpuError> {
    if x.dtype() == out {
        return Ok(x);
    }
    let y = gpu.tensor(out, x.shape())?;
    let kernel =
        gpu.kernel(SOURCE, "cast", &[("X_BF16", is_bf16(&x)), ("Y_BF16", is_bf16(&y))], 0)?;
    let n = x.len();
    let args = [Arg::Tensor(&x), Arg::Tensor(&y), Arg::U64(n as u64)];
    gpu.launch(&kernel, &LaunchConfig::elements(n), &args)?;
    Ok(y)
}

impl Kernel for Cast {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        super::require(&[(self.out != DType::F64, "out: F32 or BF16")])
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [x] = roles(inputs);
        Ok(vec![cast(gpu, mandatory(x), self.out)?])
    }
}

impl Kernel for Add {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [a, b, c] = roles(inputs);
        let (a, b) = (mandatory(a), mandatory(b));
        let y = gpu.tensor(self.out, a.shape())?;
        let defines = [
            ("X_BF16", is_bf16(&a)),
            ("B_BF16", is_bf16(&b)),
            ("C_BF16", c.as_ref().map_or(0, is_bf16)),
            ("Y_BF16", is_bf16(&y)),
        ];
        let kernel = gpu.kernel(SOURCE, "add", &defines, 0)?;
        let n = a.len();
        let args = [
            Arg::Tensor(&a),
            Arg::Tensor(&b),
            Arg::OptionalTensor(c.as_ref()),
            Arg::Tensor(&y),
            Arg::U64(n as u64),
        ];
        gpu.launch(&kernel, &LaunchConfig::elements(n), &args)?;
        Ok(vec![y])
    }
}
