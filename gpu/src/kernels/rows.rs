//! Rows of a table by index, by `gpu/kernels/data/rows.cu`: `gather_rows`, `scatter_add_rows`.

use fathom_reference::ops::gather_rows::GatherRows;
use fathom_reference::ops::scatter_add_rows::ScatterAddRows;
use fathom_trace::{DType, TensorMeta};

use super::{Kernel, elementwise, is_bf16, mandatory, require, roles};
use crate::compile::{Source, source};
use crate::device::{Gpu, GpuError};
use crate::launch::{Arg, LaunchConfig};
use crate::tensor::DeviceTensor;

/// Entries `gather_rows`, `scatter_add_rows` and `canonical`; constants `X_BF16` and `Y_BF16`.
const SOURCE: Source<'static> = source!("data/rows.cu");

/// Gives every NaN of an F32 tensor the bits that the reference stores.
///
/// # Errors
/// [`GpuError`].
pub(super) fn canonical(gpu: &Gpu, x: &DeviceTensor) -> Result<(), GpuError> {
    let kernel = gpu.kernel(SOURCE, "canonical", &[("X_BF16", 0), ("Y_BF16", 0)], 0)?;
    let args = [Arg::Tensor(x), Arg::U64(x.len() as u64)];
    gpu.launch(&kernel, &LaunchConfig::elements(x.len()), &args)
}

impl Kernel for GatherRows {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        require(&[(self.out != DType::F64, "out: F32 or BF16")])
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [table, ids] = roles(inputs);
        let (table, ids) = (mandatory(table), mandatory(ids));
        let (height, columns) = table.rows_columns();
        let y = gpu.tensor(self.out, &[ids.len(), columns])?;
        let defines = [("X_BF16", is_bf16(&table)), ("Y_BF16", is_bf16(&y))];
        let kernel = gpu.kernel(SOURCE, "gather_rows", &defines, 0)?;
        let args = [
            Arg::Tensor(&table),
            Arg::Tensor(&ids),
            Arg::Tensor(&y),
            Arg::U64(y.len() as u64),
            Arg::U32(columns as u32),
            Arg::U32(height as u32),
        ];
        gpu.launch(&kernel, &LaunchConfig::elements(y.len()), &args)?;
        Ok(vec![y])
    }
}

impl Kernel for ScatterAddRows {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [x, ids, acc] = roles(inputs);
        let (x, ids) = (mandatory(x), mandatory(ids));
        let acc = gpu.writable(elementwise::cast(gpu, mandatory(acc), DType::F32)?)?;
        let (height, columns) = acc.rows_columns();
        let defines = [("X_BF16", is_bf16(&x)), ("Y_BF16", 0)];
        let scatter = gpu.kernel(SOURCE, "scatter_add_rows", &defines, 0)?;
        let args = [
            Arg::Tensor(&x),
            Arg::Tensor(&ids),
            Arg::Tensor(&acc),
            Arg::U32(ids.len() as u32),
            Arg::U32(columns as u32),
            Arg::U32(height as u32),
        ];
        gpu.launch(&scatter, &LaunchConfig::elements(columns), &args)?;
        if self.out != DType::F32 {
            return Ok(vec![elementwise::cast(gpu, acc, self.out)?]);
        }
        canonical(gpu, &acc)?;
        Ok(vec![acc])
    }
}
