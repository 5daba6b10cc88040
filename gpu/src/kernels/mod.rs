//! One host file per kernel: what it takes, how it is launched, and the op that it computes.
//!
//! To add a kernel: write its source in `gpu/kernels`, copy the host file of a neighbour, which
//! implements [`Kernel`] for the op, move the op from [`WITHOUT_KERNEL`] to [`KERNELS`] and write
//! the suite of its cases in `conformance/src/conform`.
//!
//! [`execute`] is the one way to a kernel: the backend, `conform`, `check` and `replay` go through
//! it. [`covers`] says the same before there is a device, when a run is planned.

mod attention;
mod attention_cached;
mod attention_latent;
mod copies;
mod cross_entropy;
mod elementwise;
mod fp8;
pub mod gemm;
pub mod gemm_fp8;
mod grouped_gemm;
mod grouped_gemm_fp8;
mod heads;
mod moe;
mod norm;
mod optim;
mod quant;
pub mod quantize_tile;
mod router;
mod rows;
mod swiglu_quantize;
mod transpose;
mod wgrad_fp8;

use std::sync::Arc;

use fathom_reference::ops;
use fathom_reference::{Case, DynOp, Engine, EngineError, Op, Outputs};
use fathom_trace::{DType, TensorMeta};

use crate::device::{Gpu, GpuError};
use crate::launch::LaunchConfig;
use crate::tensor::DeviceTensor;

/// An op that has a kernel.
pub trait Kernel: Op {
    /// Whether the kernel computes this variant of the op on inputs of these element types and
    /// shapes; [`Op::infer`] accepted them.
    ///
    /// # Errors
    /// What the kernel takes, in words that name the parameter or the tensor.
    fn covers(&self, inputs: &[Option<TensorMeta>]) -> Result<(), String>;

    /// Enqueues the op on inputs that [`Op::infer`] and [`Kernel::covers`] accepted: a tensor a
    /// role, by value, so that one that nobody else holds may be written in place. Gives a tensor
    /// an output.
    ///
    /// # Errors
    /// [`GpuError`].
    fn launch(
        &self,
        gpu: &Gpu,
        inputs: Vec<Option<DeviceTensor>>,
    ) -> Result<Vec<DeviceTensor>, GpuError>;
}

/// [`Kernel::covers`] behind a pointer.
type Covers = fn(&dyn DynOp, &[Option<TensorMeta>]) -> Result<(), String>;
/// [`Kernel::launch`] behind a pointer.
type Launch =
    fn(&dyn DynOp, &Gpu, Vec<Option<DeviceTensor>>) -> Result<Vec<DeviceTensor>, GpuError>;

/// A row of [`KERNELS`].
pub struct KernelEntry {
    /// The op's name in the table of ops.
    pub op: &'static str,
    covers: Covers,
    launch: Launch,
}

const fn entry<K: Kernel>() -> KernelEntry {
    KernelEntry {
        op: K::NAME,
        covers: |op, inputs| typed::<K>(op).covers(inputs),
        launch: |op, gpu, inputs| typed::<K>(op).launch(gpu, inputs),
    }
}

fn typed<K: Kernel>(op: &dyn DynOp) -> &K {
    op.as_any().downcast_ref().expect("the entry was found by the op's name")
}

/// The ops that have a kernel, in alphabetical order.
pub const KERNELS: &[KernelEntry] = &[
    entry::<ops::adamw::AdamW>(),
    entry::<ops::add::Add>(),
    entry::<ops::add_rms_norm::AddRmsNorm>(),
    entry::<ops::add_rms_norm::AddRmsNormQuantize>(),
    entry::<ops::collective::AllGather>(),
    entry::<ops::collective::AllReduce>(),
    entry::<ops::attention::Attention>(),
    entry::<ops::attention::AttentionBackward>(),
    entry::<ops::attention_cached::AttentionCached>(),
    entry::<ops::attention_latent::AttentionLatent>(),
    entry::<ops::balance::BalanceLoss>(),
    entry::<ops::cast::Cast>(),
    entry::<ops::clip_factor::ClipFactor>(),
    entry::<ops::dispatch::Combine>(),
    entry::<ops::concat_columns::ConcatColumns>(),
    entry::<ops::concat_rows::ConcatRows>(),
    entry::<ops::context_exchange::ContextExchange>(),
    entry::<ops::cross_entropy::CrossEntropy>(),
    entry::<ops::cross_entropy::CrossEntropyBackward>(),
    entry::<ops::dequantize::Dequantize>(),
    entry::<ops::dispatch::Dispatch>(),
    entry::<ops::dispatch::DispatchCodes>(),
    entry::<ops::dispatch::DispatchPlan>(),
    entry::<ops::drop_tokens::DropTokens>(),
    entry::<ops::ema::Ema>(),
    entry::<ops::gather_rows::GatherRows>(),
    entry::<ops::gemm::Gemm>(),
    entry::<ops::gemm_fp8::GemmFp8>(),
    entry::<ops::grouped_gemm::GroupedGemm>(),
    entry::<ops::grouped_gemm_fp8::GroupedGemmFp8>(),
    entry::<ops::mla_absorb::MlaAbsorbQuery>(),
    entry::<ops::mla_absorb::MlaAbsorbValue>(),
    entry::<ops::mla_kv::MlaKv>(),
    entry::<ops::mla_kv::MlaKvBackward>(),
    entry::<ops::quantize_block::QuantizeBlock>(),
    entry::<ops::quantize_delayed::QuantizeDelayed>(),
    entry::<ops::quantize_tile::QuantizeTile>(),
    entry::<ops::quantize_weight::QuantizeWeight>(),
    entry::<ops::collective::Recv>(),
    entry::<ops::collective::ReduceScatter>(),
    entry::<ops::rms_norm::RmsNorm>(),
    entry::<ops::rms_norm::RmsNormBackward>(),
    entry::<ops::rms_norm_backward_quantize::RmsNormBackwardQuantize>(),
    entry::<ops::rms_norm_quantize::RmsNormQuantize>(),
    entry::<ops::rms_norm::RmsNormWgrad>(),
    entry::<ops::rope::Rope>(),
    entry::<ops::router::Router>(),
    entry::<ops::router::RouterBackward>(),
    entry::<ops::scatter_add_rows::ScatterAddRows>(),
    entry::<ops::collective::Send>(),
    entry::<ops::slice_columns::SliceColumns>(),
    entry::<ops::slice_rows::SliceRows>(),
    entry::<ops::sum_of_squares::SumOfSquares>(),
    entry::<ops::swiglu::Swiglu>(),
    entry::<ops::swiglu::SwigluBackward>(),
    entry::<ops::swiglu_quantize::SwigluBackwardQuantize>(),
    entry::<ops::swiglu_quantize::SwigluQuantize>(),
    entry::<ops::transpose_codes::TransposeCodes>(),
    entry::<ops::transpose_quantize::TransposeQuantize>(),
    entry::<ops::wgrad_fp8::WgradFp8>(),
];

/// The ops that only the CPU computes so far, in alphabetical order.
pub const WITHOUT_KERNEL: &[&str] = &["mma"];

/// Whether there is a kernel for this op, its variant, and inputs of these types and shapes.
///
/// # Errors
/// What is missing, and what is covered, in words.
pub fn covers(op: &dyn DynOp, inputs: &[Option<TensorMeta>]) -> Result<(), String> {
    let entry = entry_of(op)?;
    if let Some(x) = inputs.iter().flatten().find(|x| x.dtype == DType::F64) {
        return Err(format!("{} is F64, and kernels compute in F32", x.role));
    }
    (entry.covers)(op, inputs)
}

fn entry_of(op: &dyn DynOp) -> Result<&'static KernelEntry, String> {
    let entry = KERNELS.iter().find(|k| k.op == op.name());
    entry.ok_or_else(|| "there is no kernel for it".to_owned())
}

/// Enqueues an op; the device's results are there when a later call waits for them. `engine` is
/// who runs it, for errors.
///
/// # Errors
/// [`EngineError`]: the inputs do not fit the op, there is no kernel for the variant, or the driver
/// failed.
pub fn execute(
    gpu: &Gpu,
    engine: &str,
    op: &dyn DynOp,
    inputs: Vec<Option<DeviceTensor>>,
) -> Result<Vec<DeviceTensor>, EngineError> {
    let metas: Vec<Option<TensorMeta>> = op
        .inputs()
        .iter()
        .zip(&inputs)
        .map(|(role, input)| input.as_ref().map(|tensor| tensor.meta(role.name)))
        .collect();
    let expected = op.infer(&metas)?;
    covers(op, &metas).map_err(|reason| EngineError::Unsupported {
        engine: engine.to_owned(),
        op: op.name().to_owned(),
        reason,
    })?;
    gpu.purpose(op.name(), &op.outputs().join(", "));
    let launch = entry_of(op).expect("it is covered").launch;
    let outputs = launch(op, gpu, inputs).map_err(|e| failed(engine, op.name(), &e))?;
    let found = outputs.iter().zip(&expected).map(|(o, e)| o.meta(&e.role));
    debug_assert!(
        outputs.len() == expected.len() && found.eq(expected.iter().cloned()),
        "{}: the kernel's outputs {outputs:?} are not what infer announced: {expected:?}",
        op.name(),
    );
    Ok(outputs)
}

/// The device's error as an engine's.
pub(crate) fn failed(engine: &str, op: &str, error: &GpuError) -> EngineError {
    EngineError::Failed { engine: engine.to_owned(), op: op.to_owned(), reason: error.to_string() }
}

/// For [`Kernel::covers`]: each rule with what the kernel takes; the first that does not hold
/// refuses.
fn require(rules: &[(bool, &str)]) -> Result<(), String> {
    match rules.iter().find(|(holds, _)| !holds) {
        None => Ok(()),
        Some((_, takes)) => Err(format!("the kernel takes {takes}")),
    }
}

/// 1 for BF16, 0 for F32: the constant by which sources choose an element type.
fn is_bf16(tensor: &DeviceTensor) -> u64 {
    u64::from(tensor.dtype() == DType::BF16)
}

/// Threads of the kernels that give half a warp a row.
const ROW_THREADS: u32 = 256;

/// Half a warp for each of `n` rows.
fn half_warps(n: usize) -> LaunchConfig {
    LaunchConfig::new(n.div_ceil(ROW_THREADS as usize / 16), ROW_THREADS)
}

/// Takes the inputs apart, one a role.
fn roles<const N: usize>(inputs: Vec<Option<DeviceTensor>>) -> [Option<DeviceTensor>; N] {
    inputs.try_into().expect("one entry a role")
}

/// The input of a mandatory role.
fn mandatory(input: Option<DeviceTensor>) -> DeviceTensor {
    input.expect("infer accepted the inputs")
}

/// The kernels as an engine, from host to host: what `check`, `conform` and `diagnose` stand on.
pub struct CudaEngine {
    gpu: Arc<Gpu>,
}

impl CudaEngine {
    /// The kernels on this device.
    pub fn new(gpu: impl Into<Arc<Gpu>>) -> CudaEngine {
        CudaEngine { gpu: gpu.into() }
    }

    /// The device that it launches on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }
}

impl Engine for CudaEngine {
    fn name(&self) -> String {
        format!("{} ({})", self.gpu.kind().name(), self.gpu.description().name)
    }

    fn run(&self, case: &Case) -> Result<Outputs, EngineError> {
        let (name, op) = (self.name(), case.op.as_ref());
        let failed = |e: GpuError| failed(&name, op.name(), &e);
        case.infer()?;
        self.gpu.purpose("upload", "");
        let upload = |x: &Option<_>| x.as_ref().map(|x| self.gpu.upload(x)).transpose();
        let inputs = case.ordered_inputs()?.iter().map(upload).collect::<Result<_, _>>();
        let outputs = execute(&self.gpu, &name, op, inputs.map_err(failed)?)?;
        let outputs: Result<Vec<_>, _> = outputs.iter().map(|o| self.gpu.download(o)).collect();
        let roles = op.outputs().iter().map(|role| (*role).to_owned());
        Ok(roles.zip(outputs.map_err(failed)?).collect())
    }
}

#[cfg(test)]
mod tests {
    use fathom_reference::op::op_names;

    use super::*;

    #[test]
    fn every_op_has_a_kernel_or_is_said_to_have_none() {
        let have: Vec<&str> = KERNELS.iter().map(|k| k.op).collect();
        assert!(have.is_sorted() && WITHOUT_KERNEL.is_sorted());
        for op in op_names() {
            match (have.contains(&op), WITHOUT_KERNEL.contains(&op)) {
                (false, false) => panic!(
                    "op {op} has no kernel: write gpu/src/kernels/{op}.rs and add it to KERNELS, \
                     or name it in WITHOUT_KERNEL"
                ),
                (true, true) => panic!("op {op} has a kernel: take it out of WITHOUT_KERNEL"),
                _ => {}
            }
        }
        let all = op_names();
        let unknown: Vec<_> = WITHOUT_KERNEL.iter().filter(|op| !all.contains(op)).collect();
        assert!(unknown.is_empty(), "WITHOUT_KERNEL names no op of the table: {unknown:?}");
    }
}
