//! Built-in input of the demonstration: one FP8 GEMM with the contract's output, and one whose
//! output comes from another arithmetic.

use std::collections::BTreeMap;

use fathom_emulator::{Checks, Device, Finding, LaunchConfig, Module, Params, Preset, Settings};
use fathom_gpu::compile::{CompileError, Compiler, FP8_GEMM_1D2D, Source};
use fathom_numerics::formats::Format;
use fathom_numerics::gemm::{Fp8Operand, GemmConfig, cast_bf16, gemm_fp8};
use fathom_numerics::philox::Philox;
use fathom_numerics::quant::{QuantConfig, quantize_block, quantize_tile};
use fathom_reference::op::{Case, Engine, EngineError, ReferenceEngine};
use fathom_reference::ops::gemm_fp8::GemmFp8;
use fathom_reference::{DynOp, Tensor};
use fathom_trace::DType;
use half::bf16;
use ndarray::Array2;

use crate::case_file::CaseFile;
use crate::emulated::{self, Fp8Gemm};

/// Sizes of the demonstration's GEMM.
const SHAPE: (usize, usize, usize) = (64, 192, 512);

/// A GEMM of normal numbers, quantised as DeepSeek-V3 does, with the contract's output.
///
/// # Errors
/// Those of the reference.
pub fn gemm() -> Result<CaseFile, EngineError> {
    with_output_of(Some(128))
}

/// The same case with the output of a kernel that promotes every 64 elements of k.
///
/// # Errors
/// Those of the reference.
pub fn planted() -> Result<CaseFile, EngineError> {
    with_output_of(Some(64))
}

/// What became of the demonstration's kernel and of its broken version.
pub struct KernelRun {
    /// Elements of the kernel's output.
    pub elements: usize,
    /// Output elements that differ from the reference.
    pub mismatches: usize,
    /// Thread instructions that the emulator executed.
    pub thread_instructions: u64,
    /// What the sanitizers said of the kernel: nothing, if all is well.
    pub findings: Vec<String>,
    /// What the race check said of the kernel without a barrier.
    pub without_barrier: Vec<String>,
}

/// Why the demonstration's kernel could not run.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// NVRTC cannot be used, or refuses the kernel.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// The emulator refuses the kernel, or a launch of it.
    #[error(transparent)]
    Emulator(#[from] fathom_emulator::Error),
}

/// Sizes of the kernel's GEMM: m, n, k.
pub const KERNEL_SHAPE: (usize, usize, usize) = (256, 384, 512);

/// Our FP8 GEMM on the emulated H800 against the reference, all sanitizers on; then the same kernel
/// without the barrier between its threads' writes of the output tile and the TMA store of it.
///
/// # Errors
/// [`KernelError`].
pub fn kernel(compiler: &Compiler) -> Result<KernelRun, KernelError> {
    let (m, n, k) = KERNEL_SHAPE;
    let config = QuantConfig::default();
    let a = quantize_tile(normal(m, k, 0).view(), 128, &config).expect("the default casts");
    let b = quantize_block(normal(n, k, 1).view(), &config).expect("the default casts");
    let operands = (
        Fp8Operand::tile_1x128(a.codes.view(), a.scales.view()),
        Fp8Operand::block_128x128(b.codes.view(), b.scales.view()),
    );
    let expected = gemm_fp8(&operands.0, &operands.1, &GemmConfig::default());
    let expected = cast_bf16(expected.expect("the default is defined").view());
    let settings = Settings { checks: Checks::ALL, ..Settings::default() };

    let defines = emulated::defines(n, k);
    let gemm = Fp8Gemm::new(&compiler.compile(FP8_GEMM_1D2D, &defines)?.ptx, &a, &b)?;
    let report = gemm.run(settings.clone())?;
    let found = gemm.output()?;
    let differs = |(e, f): &(&bf16, &u16)| e.to_bits() != **f;

    let fence = "fence_async_shared();";
    let barrier = "named_barrier(1 + warpgroup, WARPGROUP);";
    let (before, after) = FP8_GEMM_1D2D.text.split_once(fence).expect("the kernel has the fence");
    let text = format!("{before}{fence}{}", after.replacen(barrier, "", 1));
    let broken = Source { text: &text, ..FP8_GEMM_1D2D };
    let broken = Fp8Gemm::new(&compiler.compile(broken, &defines)?.ptx, &a, &b)?;
    Ok(KernelRun {
        elements: expected.len(),
        mismatches: expected.iter().zip(&found).filter(differs).count(),
        thread_instructions: report.record.thread_instructions,
        findings: strings(&report.findings),
        without_barrier: strings(&broken.run(settings)?.findings),
    })
}

/// Where there is no compiler: what the race check says of a kernel of a few lines whose threads
/// read what their neighbours wrote to shared memory, without a barrier between.
///
/// # Errors
/// None: the kernel is built in.
pub fn without_barrier() -> Result<Vec<String>, fathom_emulator::Error> {
    let device = Device::new(Preset::named("h800")?);
    device.configure(Settings { checks: Checks::ALL, ..Settings::default() });
    let module = Module::load(&device, NEIGHBOURS)?;
    let out = device.alloc(4 * 128)?;
    let params = Params::new().with(out).into_bytes();
    let config = LaunchConfig::new([1, 1, 1], [128, 1, 1], params);
    let report = device.launch(&module.function("neighbours")?, &config)?;
    Ok(strings(&report.findings))
}

const NEIGHBOURS: &str = "
.version 8.0
.target sm_90
.address_size 64
.visible .entry neighbours(.param .u64 out)
{
    .reg .b32 %r<8>;
    .reg .b64 %rd<4>;
    .shared .align 4 .b8 tile[512];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, tile;
    shl.b32 %r2, %r0, 2;
    add.u32 %r3, %r1, %r2;
    st.shared.u32 [%r3], %r0;
    // bar.sync 0; is missing here
    xor.b32 %r4, %r2, 256;
    add.u32 %r4, %r1, %r4;
    ld.shared.u32 %r5, [%r4];
    ld.param.u64 %rd0, [out];
    cvt.u64.u32 %rd1, %r2;
    add.u64 %rd2, %rd0, %rd1;
    st.global.u32 [%rd2], %r5;
    ret;
}
";

fn strings(findings: &[Finding]) -> Vec<String> {
    findings.iter().map(ToString::to_string).collect()
}

fn with_output_of(promotion_interval: Option<usize>) -> Result<CaseFile, EngineError> {
    let (m, n, k) = SHAPE;
    let config = QuantConfig::default();
    let a = quantize_tile(normal(m, k, 0).view(), 128, &config).expect("the default casts");
    let b = quantize_block(normal(n, k, 1).view(), &config).expect("the default casts");
    let fp8 = |codes: Array2<u8>| Tensor::from_array(codes).reinterpret(DType::F8E4M3);
    let inputs = BTreeMap::from([
        ("a".to_owned(), fp8(a.codes)),
        ("a_scale".to_owned(), Tensor::from_array(a.scales)),
        ("b".to_owned(), fp8(b.codes)),
        ("b_scale".to_owned(), Tensor::from_array(b.scales)),
    ]);
    let stated = GemmFp8::hopper(m, n, k, Format::Bf16);
    let computed = GemmFp8 { promotion_interval, ..stated.clone() };
    let case = Case { op: computed.boxed(), inputs };
    let expected = ReferenceEngine.run(&case)?;
    let case = Case { op: stated.boxed(), ..case };
    Ok(CaseFile { case, expected, metadata: BTreeMap::new() })
}

fn normal(rows: usize, columns: usize, stream: u64) -> Array2<f32> {
    let mut values = vec![0.0; rows * columns];
    Philox::new(0, stream).normals(0, &mut values);
    Array2::from_shape_vec((rows, columns), values).expect("as many as the shape has")
}
