//! Ops that only move bytes, by copies of the driver: slices, concatenations, and the exchanges
//! between ranks, which are the identity where the group has one member.

use fathom_reference::ops::collective::{AllGather, AllReduce, Recv, ReduceScatter, Send};
use fathom_reference::ops::concat_columns::ConcatColumns;
use fathom_reference::ops::concat_rows::ConcatRows;
use fathom_reference::ops::context_exchange::ContextExchange;
use fathom_reference::ops::slice_columns::SliceColumns;
use fathom_reference::ops::slice_rows::SliceRows;
use fathom_trace::{Group, TensorMeta};

use super::{Kernel, mandatory, require, roles};
use crate::device::{Gpu, GpuError};
use crate::memory::{Rows, copy_rows};
use crate::tensor::DeviceTensor;

/// The rows of a matrix from byte `byte` of each.
fn rows_from(x: &DeviceTensor, byte: usize) -> Rows<'_> {
    let rows = x.as_rows(x.rows_columns().1 * x.dtype().size());
    Rows { offset: rows.offset + byte, ..rows }
}

impl Kernel for SliceColumns {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [x] = roles(inputs);
        let x = mandatory(x);
        let size = x.dtype().size();
        let y = gpu.tensor(x.dtype(), &[x.shape()[0], self.width])?;
        let (from, to) = (rows_from(&x, self.offset * size), rows_from(&y, 0));
        copy_rows(from, to, x.shape()[0], self.width * size)?;
        Ok(vec![y])
    }
}

impl Kernel for SliceRows {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [x] = roles(inputs);
        let rows = mandatory(x).rows(self.offset, self.offset + self.rows);
        Ok(vec![gpu.copy(&rows)?])
    }
}

impl Kernel for ConcatColumns {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let parts: Vec<DeviceTensor> = inputs.into_iter().flatten().collect();
        let columns = parts.iter().map(|part| part.shape()[1]).sum();
        let y = gpu.tensor(parts[0].dtype(), &[parts[0].shape()[0], columns])?;
        let mut to = 0;
        for part in &parts {
            let row_bytes = part.shape()[1] * part.dtype().size();
            copy_rows(rows_from(part, 0), rows_from(&y, to), part.shape()[0], row_bytes)?;
            to += row_bytes;
        }
        Ok(vec![y])
    }
}

impl Kernel for ConcatRows {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [a, b] = roles(inputs);
        let (a, b) = (mandatory(a), mandatory(b));
        let y = gpu.tensor(a.dtype(), &[a.shape()[0] + b.shape()[0], a.shape()[1]])?;
        let mut offset = 0;
        for part in [&a, &b] {
            let bytes = part.bytes();
            let to = Rows { offset, ..y.as_rows(bytes) };
            copy_rows(part.as_rows(bytes), to, 1, bytes)?;
            offset += bytes;
        }
        Ok(vec![y])
    }
}

/// Refuses a group of more than this process.
fn alone(group: Group) -> Result<(), String> {
    require(&[(group.size == 1, "a group of one rank")])
}

macro_rules! identities {
    ($($op:ty),*) => {$(
        impl Kernel for $op {
            fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
                alone(self.group)
            }

            fn launch(
                &self,
                _gpu: &Gpu,
                inputs: Vec<Option<DeviceTensor>>,
            ) -> Result<Vec<DeviceTensor>, GpuError> {
                Ok(inputs.into_iter().flatten().collect())
            }
        }
    )*};
}

identities!(AllGather, AllReduce, ContextExchange, Recv, ReduceScatter, Send);
