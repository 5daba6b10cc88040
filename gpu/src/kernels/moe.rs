//! Tokens to experts and back, by the kernels of `gpu/kernels/moe`: `dispatch_plan`, `dispatch`,
//! `dispatch_codes`, `combine`, `drop_tokens`.

use fathom_reference::ops::dispatch::{Combine, Dispatch, DispatchCodes, DispatchPlan};
use fathom_reference::ops::drop_tokens::DropTokens;
use fathom_trace::{DType, TensorMeta};

use super::{Kernel, is_bf16, mandatory, require, roles};
use crate::compile::{Source, source};
use crate::device::{Gpu, GpuError};
use crate::launch::{Arg, LaunchConfig};
use crate::tensor::DeviceTensor;

/// Entries `plan_counts`, `plan_rows` with the constant `PLAN`; `dispatch_slots`, `link_rows`,
/// `dispatch_rows` with `BYTES`; `combine` with `X_BF16` and `Y_BF16`.
const DISPATCH: Source<'static> = source!("moe/dispatch.cu");
/// Entries `drop`, `dropped`.
const DROP: Source<'static> = source!("moe/drop_tokens.cu");

/// Threads of the kernels that give each warp an owner of slots.
const WARPS_THREADS: u32 = 128;

/// A warp for each of `n`.
fn warps(n: usize) -> LaunchConfig {
    LaunchConfig::new(n.div_ceil(WARPS_THREADS as usize / 32), WARPS_THREADS)
}

impl Kernel for DispatchPlan {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [indices] = roles(inputs);
        let indices = mandatory(indices);
        let (slots, experts) = (indices.len(), self.experts);
        let rows = gpu.tensor(DType::I32, &[slots])?;
        let inverse = gpu.tensor(DType::I32, &[slots])?;
        // The dropped are counted behind the experts.
        let counts = gpu.tensor(DType::I32, &[experts + 1, 1])?;
        let sizes = [slots, experts].map(|n| Arg::U32(n as u32));
        let count = gpu.kernel(DISPATCH, "plan_counts", &[("PLAN", 1)], 0)?;
        let args = [Arg::Tensor(&indices), Arg::Tensor(&counts), sizes[0], sizes[1]];
        gpu.launch(&count, &warps(experts + 1), &args)?;
        let place = gpu.kernel(DISPATCH, "plan_rows", &[("PLAN", 1)], 0)?;
        let args = [
            Arg::Tensor(&indices),
            Arg::Tensor(&counts),
            Arg::Tensor(&rows),
            Arg::Tensor(&inverse),
            sizes[0],
            sizes[1],
        ];
        gpu.launch(&place, &warps(experts + 1), &args)?;
        Ok(vec![rows, inverse, counts.rows(0, experts).reshape(&[experts])])
    }
}

impl Kernel for Dispatch {
    fn covers(&self, inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        let [Some(x), Some(rows)] = inputs else { unreachable!("mandatory") };
        require(&[
            (self.group.size == 1, "a group of one rank"),
            (x.dtype.size() <= 4, "elements of at most 4 bytes"),
            (self.received <= rows.shape[0], "received: at most the slots"),
        ])
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [x, rows] = roles(inputs).map(mandatory);
        if !self.slots {
            let [y, _] = dispatch_rows(gpu, [&x, &rows], None, self.received, self.top_k)?;
            return Ok(vec![y]);
        }
        let y = gpu.tensor(x.dtype(), &[self.received])?;
        let defines = [("BYTES", x.dtype().size() as u64)];
        let kernel = gpu.kernel(DISPATCH, "dispatch_slots", &defines, 0)?;
        let mut args = [&x, &rows, &y].map(Arg::Tensor).to_vec();
        args.extend([self.received, rows.len()].map(|n| Arg::U32(n as u32)));
        gpu.launch(&kernel, &LaunchConfig::elements(self.received), &args)?;
        Ok(vec![y])
    }
}

/// Threads of a CTA that moves a token's row.
const MOVING_THREADS: usize = 256;

/// The largest pieces in which rows of `x` can be moved, in bytes.
fn piece_bytes(x: &DeviceTensor, row_bytes: usize) -> usize {
    let fits = |piece: &usize| row_bytes.is_multiple_of(*piece) && x.is_aligned(*piece);
    [16, 4, 2].into_iter().find(fits).unwrap_or(1)
}

/// The rows of `x`, and of its scales where it has some, of the tokens of the first `received`
/// slots in `rows`; no row of scales without.
fn dispatch_rows(
    gpu: &Gpu,
    [x, rows]: [&DeviceTensor; 2],
    scale: Option<&DeviceTensor>,
    received: usize,
    per: usize,
) -> Result<[DeviceTensor; 2], GpuError> {
    let (tokens, columns) = x.rows_columns();
    let y = gpu.tensor(x.dtype(), &[received, columns])?;
    let scales = scale.map_or(0, |scale| scale.shape()[1]);
    let to_scale = gpu.tensor(DType::F32, &[received, scales])?;
    let row_bytes = columns * x.dtype().size();
    let piece = piece_bytes(x, row_bytes);
    let defines = [("BYTES", piece as u64)];
    let last = gpu.zeros(DType::U32, &[tokens])?;
    let before = gpu.tensor(DType::U32, &[received])?;
    let link = gpu.kernel(DISPATCH, "link_rows", &defines, 0)?;
    let mut args = [rows, &last, &before].map(Arg::Tensor).to_vec();
    args.extend([received, per, rows.len()].map(|n| Arg::U32(n as u32)));
    gpu.launch(&link, &LaunchConfig::elements(received), &args)?;
    let kernel = gpu.kernel(DISPATCH, "dispatch_rows", &defines, 0)?;
    let pieces = row_bytes / piece;
    let mut args = vec![Arg::Tensor(x), Arg::OptionalTensor(scale)];
    args.extend([&last, &before, &y, &to_scale].map(Arg::Tensor));
    args.extend([pieces, scales].map(|n| Arg::U32(n as u32)));
    let threads = pieces.max(scales).next_multiple_of(32).clamp(32, MOVING_THREADS);
    gpu.launch(&kernel, &LaunchConfig::new(tokens, threads as u32), &args)?;
    Ok([y, to_scale])
}

impl Kernel for DispatchCodes {
    fn covers(&self, inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        let [_, _, Some(rows)] = inputs else { unreachable!("mandatory") };
        require(&[
            (self.group.size == 1, "a group of one rank"),
            (self.received <= rows.shape[0], "received: at most the slots"),
        ])
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [q, scale, rows] = roles(inputs).map(mandatory);
        dispatch_rows(gpu, [&q, &rows], Some(&scale), self.received, self.top_k).map(Vec::from)
    }
}

impl Kernel for Combine {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        require(&[(self.group.size == 1, "a group of one rank")])
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [y, inverse] = roles(inputs);
        let (y, inverse) = (mandatory(y), mandatory(inverse));
        let (columns, per) = if self.slots { (1, 1) } else { (y.shape()[1], self.top_k) };
        let width = if self.slots { self.top_k } else { columns };
        let x = gpu.tensor(self.out, &[self.tokens, width])?;
        let defines = [("X_BF16", is_bf16(&y)), ("Y_BF16", is_bf16(&x))];
        let kernel = gpu.kernel(DISPATCH, "combine", &defines, 0)?;
        let args = [
            Arg::Tensor(&y),
            Arg::Tensor(&inverse),
            Arg::Tensor(&x),
            Arg::U64(x.len() as u64),
            Arg::U32(columns as u32),
            Arg::U32(per as u32),
            Arg::U32(y.shape()[0] as u32),
            Arg::U32(inverse.len() as u32),
        ];
        gpu.launch(&kernel, &LaunchConfig::elements(x.len()), &args)?;
        Ok(vec![x])
    }
}

impl Kernel for DropTokens {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [indices, scores] = roles(inputs);
        let (indices, scores) = (mandatory(indices), mandatory(scores));
        let (slots, experts) = (indices.len(), scores.shape()[1]);
        let share = experts / self.devices;
        let room = (self.factor * slots as f64 / self.devices as f64).floor() as usize;
        let exempt = self.segments.iter().enumerate().flat_map(|(segment, &length)| {
            std::iter::repeat_n(i32::from(self.exempt.contains(&segment)), length)
        });
        let exempt = gpu.constants(&exempt.collect::<Vec<_>>())?;
        let kept = gpu.tensor(DType::I32, indices.shape())?;
        let counts = gpu.tensor(DType::I32, &[self.devices])?;
        let sizes = |numbers: [usize; 3]| numbers.map(|n| Arg::U32(n as u32));
        let drop = gpu.kernel(DROP, "drop", &[], 0)?;
        let mut args = vec![
            Arg::Tensor(&indices),
            Arg::Tensor(&scores),
            Arg::Tensor(&exempt),
            Arg::Tensor(&kept),
        ];
        args.extend(sizes([slots, indices.shape()[1], experts]));
        args.extend([Arg::U32(share as u32), Arg::U32(room.min(u32::MAX as usize) as u32)]);
        gpu.launch(&drop, &LaunchConfig::elements(slots), &args)?;
        let dropped = gpu.kernel(DROP, "dropped", &[], 0)?;
        let mut args = vec![Arg::Tensor(&indices), Arg::Tensor(&kept), Arg::Tensor(&counts)];
        args.extend(sizes([slots, self.devices, share]));
        gpu.launch(&dropped, &warps(self.devices), &args)?;
        Ok(vec![kept, counts])
    }
}
