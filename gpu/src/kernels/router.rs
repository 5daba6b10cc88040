//! The router with its gradient, and the balance losses, by the kernels of `gpu/kernels/moe`.

use fathom_config::Score;
use fathom_reference::ops::balance::BalanceLoss;
use fathom_reference::ops::router::{Router, RouterBackward};
use fathom_trace::{DType, TensorMeta};

use super::{Kernel, half_warps, mandatory, require, roles};
use crate::compile::{Source, source};
use crate::device::{Gpu, GpuError};
use crate::launch::{Arg, LaunchConfig};
use crate::tensor::DeviceTensor;

/// Entries `router`, `router_backward`; constants `SOFTMAX`, `NORMALIZE`.
const ROUTER: Source<'static> = source!("moe/router.cu");
/// Entries `own_choice`, `token_sums`, `shares`, `fractions`, `losses`, `gradients`.
const BALANCE: Source<'static> = source!("moe/balance_loss.cu");

/// The shared memory that every kernel may have, in bytes.
const SHARED_BYTES: u32 = 48 * 1024;
/// Experts whose orders and biased scores, and those of as many groups, fit into it.
const MOST_EXPERTS: usize = 3072;

fn constants(score: Score, normalize: bool) -> [(&'static str, u64); 2] {
    [("SOFTMAX", u64::from(score == Score::Softmax)), ("NORMALIZE", u64::from(normalize))]
}

/// A warp for each token, with `shared_bytes` of dynamic shared memory.
fn a_warp_each(tokens: usize, shared_bytes: usize) -> LaunchConfig {
    LaunchConfig { shared_bytes: shared_bytes as u32, ..LaunchConfig::new(tokens, 32) }
}

impl Kernel for Router {
    fn covers(&self, inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        let [Some(logits), _] = inputs else { unreachable!("mandatory") };
        require(&[(logits.shape[1] <= MOST_EXPERTS, "at most 3072 experts")])
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [logits, bias] = roles(inputs);
        let logits = mandatory(logits);
        let (t, experts) = logits.rows_columns();
        let scores = gpu.tensor(DType::F32, &[t, experts])?;
        let indices = gpu.tensor(DType::I32, &[t, self.top_k])?;
        let weights = gpu.tensor(DType::F32, &[t, self.top_k])?;
        let config = a_warp_each(t, 8 * (experts + self.n_group));
        let defines = constants(self.score, self.normalize);
        let kernel = gpu.kernel(ROUTER, "router", &defines, SHARED_BYTES)?;
        let mut args = vec![
            Arg::Tensor(&logits),
            Arg::OptionalTensor(bias.as_ref()),
            Arg::Tensor(&scores),
            Arg::Tensor(&indices),
            Arg::Tensor(&weights),
        ];
        let kept_groups = self.topk_group.min(self.n_group);
        let numbers = [experts, self.top_k, self.n_group, kept_groups, self.group_top];
        args.extend(numbers.map(|n| Arg::U32(n as u32)));
        args.push(Arg::F32(self.scale as f32));
        gpu.launch(&kernel, &config, &args)?;
        Ok(vec![scores, indices, weights])
    }
}

impl Kernel for RouterBackward {
    fn covers(&self, _inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        Ok(())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [dweights, scores, indices, dscores] = roles(inputs);
        let (dweights, scores, indices) =
            (mandatory(dweights), mandatory(scores), mandatory(indices));
        let (t, experts) = scores.rows_columns();
        let dlogits = gpu.tensor(DType::F32, scores.shape())?;
        let defines = constants(self.score, self.normalize);
        let kernel = gpu.kernel(ROUTER, "router_backward", &defines, 0)?;
        let args = [
            Arg::Tensor(&dweights),
            Arg::Tensor(&scores),
            Arg::Tensor(&indices),
            Arg::OptionalTensor(dscores.as_ref()),
            Arg::Tensor(&dlogits),
            Arg::U32(experts as u32),
            Arg::U32(indices.shape()[1] as u32),
            Arg::F32(self.scale as f32),
        ];
        gpu.launch(&kernel, &a_warp_each(t, 0), &args)?;
        Ok(vec![dlogits])
    }
}

impl Kernel for BalanceLoss {
    fn covers(&self, inputs: &[Option<TensorMeta>]) -> Result<(), String> {
        let [Some(scores), _] = inputs else { unreachable!("mandatory") };
        require(&[(scores.shape[1] <= MOST_EXPERTS, "at most 3072 experts")])
    }

    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError> {
        let [scores, indices] = roles(inputs);
        let scores = mandatory(scores);
        let (t, experts) = scores.rows_columns();
        let (segments, weight) = (self.segments.len(), Arg::F32(self.weight as f32));
        let [tokens, of_experts, top_k, of_segments] =
            [t, experts, self.top_k, segments].map(|n| Arg::U32(n as u32));
        let (bounds, segment_of) = on_device(gpu, &self.segments)?;
        let per_expert = [segments, experts];
        let own = indices.is_none();
        let indices = match indices {
            Some(indices) => indices,
            None => {
                let chosen = gpu.tensor(DType::I32, &[t, self.top_k])?;
                let kernel = gpu.kernel(BALANCE, "own_choice", &[], SHARED_BYTES)?;
                let args = [Arg::Tensor(&scores), Arg::Tensor(&chosen), of_experts, top_k];
                gpu.launch(&kernel, &a_warp_each(t, 4 * experts), &args)?;
                chosen
            }
        };
        let sums = gpu.tensor(DType::F32, &[t])?;
        let run = |entry, config: &LaunchConfig, args: &[Arg<'_>]| {
            gpu.launch(&*gpu.kernel(BALANCE, entry, &[], 0)?, config, args)
        };
        let args = [Arg::Tensor(&scores), Arg::Tensor(&sums), tokens, of_experts];
        run("token_sums", &half_warps(t), &args)?;
        let counts = gpu.tensor(DType::I32, &per_expert)?;
        let means = gpu.tensor(DType::F32, &per_expert)?;
        let each = LaunchConfig::elements(segments * experts);
        let mut args = vec![Arg::Tensor(&scores), Arg::Tensor(&sums), Arg::Tensor(&indices)];
        args.extend([Arg::Tensor(&bounds), Arg::Tensor(&counts), Arg::Tensor(&means)]);
        args.extend([of_segments, of_experts, top_k, Arg::U32(u32::from(own))]);
        run("shares", &each, &args)?;
        let f = gpu.tensor(DType::F32, &per_expert)?;
        let mut args = vec![Arg::Tensor(&counts), Arg::Tensor(&bounds), Arg::Tensor(&f)];
        let share = Arg::U32((experts / self.devices) as u32);
        args.extend([of_segments, of_experts, top_k, share]);
        run("fractions", &each, &args)?;
        let loss = gpu.tensor(DType::F32, &[segments])?;
        let mut args = vec![Arg::Tensor(&f), Arg::Tensor(&means), Arg::Tensor(&bounds)];
        args.extend([Arg::Tensor(&loss), of_segments, of_experts, weight]);
        run("losses", &half_warps(segments), &args)?;
        let dscores = gpu.tensor(DType::F32, scores.shape())?;
        let mut args = vec![Arg::Tensor(&scores), Arg::Tensor(&sums), Arg::Tensor(&f)];
        args.extend([Arg::Tensor(&bounds), Arg::Tensor(&segment_of), Arg::Tensor(&dscores)]);
        args.extend([tokens, of_experts, weight]);
        run("gradients", &half_warps(t), &args)?;
        Ok(vec![loss, dscores])
    }
}

/// The first token of each segment, and the end of the last; and the segment of each token.
fn on_device(gpu: &Gpu, segments: &[usize]) -> Result<(DeviceTensor, DeviceTensor), GpuError> {
    let mut bounds = vec![0];
    let mut of_token = Vec::new();
    for (segment, &length) in segments.iter().enumerate() {
        bounds.push(bounds[segment] + length as i32);
        of_token.extend(std::iter::repeat_n(segment as i32, length));
    }
    Ok((gpu.constants(&bounds)?, gpu.constants(&of_token)?))
}
