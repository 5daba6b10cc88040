//! The head and its cross-entropy by `gpu/kernels/loss/cross_entropy.cu` and the kernels of
//! [`super::gemm`]: logits exist for 128 rows at a time, as in the reference.

use fathom_reference::ops::cross_entropy::{CrossEntropy, CrossEntropyBackward};
use fathom_reference::ops::gemm::{Gemm, Layout};
use fathom_trace::{DType, TensorMeta};

use super::{Kernel, elementwise, half_warps, is_bf16, mandatory, roles, rows};
use crate::compile::{Source, source};
use crate::device::{Gpu, GpuError};
use crate::launch::{Arg, LaunchConfig};
use crate::memory::copy_rows;
use crate::tensor::DeviceTensor;

/// Entries `row_losses`, `row_slopes`; constant `DZ_BF16`.
const SOURCE: Source<'static> = source!("loss/cross_entropy.cu");

/// Rows whose logits exist together.
const ROWS: usize = 128;

/// A product in F32, chained onto `c`.
fn product(
    gpu: &Gpu,
    layout: Layout,
    [a, b]: [&DeviceTensor; 2],
    c: Option<DeviceTensor>,
) -> Result<DeviceTensor, GpuError> {
    let gemm = Gemm { layout, out: DType::F32, segments: Vec::new() };
    let mut d = gemm.launch(gpu, vec![Some(a.clone()), Some(b.clone()), c])?;
    Ok(d.remove(0))
}

/// Rows `from..to` of a tensor of one number a row.
fn numbers(x: &DeviceTensor, from: usize, to: usize) -> DeviceTensor {
    x.clone().reshape(&[x.len(), 1]).rows(from, to)
}

impl Kernel for CrossEntropy {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [x, weight, targets] = roles(inputs);
        let (x, weight, targets) = (mandatory(x), mandatory(weight), mandatory(targets));
        let (t, vocab) = (x.shape()[0], weight.shape()[0]);
        let loss = gpu.tensor(DType::F32, &[t])?;
        let lse = gpu.tensor(DType::F32, &[t])?;
        let kernel = gpu.kernel(SOURCE, "row_losses", &[("DZ_BF16", 0)], 0)?;
        for from in (0..t).step_by(ROWS) {
            let to = (from + ROWS).min(t);
            let z = product(gpu, Layout::Nt, [&x.rows(from, to), &weight], None)?;
            let of_rows = [&targets, &loss, &lse].map(|x| numbers(x, from, to));
            let args = [
                Arg::Tensor(&z),
                Arg::Tensor(&of_rows[0]),
                Arg::Tensor(&of_rows[1]),
                Arg::Tensor(&of_rows[2]),
                Arg::U32((to - from) as u32),
                Arg::U32(vocab as u32),
            ];
            gpu.launch(&kernel, &half_warps(to - from), &args)?;
        }
        Ok(vec![loss, lse])
    }
}

impl Kernel for CrossEntropyBackward {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [x, weight, targets, lse, acc] = roles(inputs);
        let (x, weight) = (mandatory(x), mandatory(weight));
        let (targets, lse) = (mandatory(targets), mandatory(lse));
        let mut dw = gpu.writable(mandatory(acc))?;
        let vocab = weight.shape()[0];
        let dx = gpu.tensor(DType::F32, x.shape())?;
        let kernel = gpu.kernel(SOURCE, "row_slopes", &[("DZ_BF16", is_bf16(&x))], 0)?;
        let mut start = 0;
        for length in &self.segments {
            let end = start + length;
            for from in (start..end).step_by(ROWS) {
                let to = (from + ROWS).min(end);
                let own = x.rows(from, to);
                let z = product(gpu, Layout::Nt, [&own, &weight], None)?;
                let dz = gpu.tensor(x.dtype(), &[to - from, vocab])?;
                let of_rows = [&targets, &lse].map(|x| numbers(x, from, to));
                let args = [
                    Arg::Tensor(&z),
                    Arg::Tensor(&of_rows[0]),
                    Arg::Tensor(&of_rows[1]),
                    Arg::Tensor(&dz),
                    Arg::U64(dz.len() as u64),
                    Arg::U32(vocab as u32),
                    Arg::F32(self.scale as f32),
                ];
                gpu.launch(&kernel, &LaunchConfig::elements(dz.len()), &args)?;
                let part = product(gpu, Layout::Nn, [&dz, &weight], None)?;
                let (place, bytes) = (dx.rows(from, to), part.bytes());
                copy_rows(part.as_rows(bytes), place.as_rows(bytes), 1, bytes)?;
                dw = product(gpu, Layout::Tn, [&dz, &own], Some(dw))?;
            }
            start = end;
        }
        if start == 0 {
            rows::canonical(gpu, &dw)?;
        }
        Ok(vec![elementwise::cast(gpu, dx, self.out)?, dw])
    }
}
