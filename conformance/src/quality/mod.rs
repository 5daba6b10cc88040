//! What can be known of the kernels' quality without a GPU, at the report's shapes: what NVIDIA's
//! assembler makes of them, and what the emulated device counts of a launch.
//!
//! [`run`] runs the cases of `cases.toml`, [`look`] assembles every kernel that was loaded for
//! them; [`Quality::page`] is the section of docs/kernels.md. Time is no part of it.

pub mod cases;
mod page;
pub mod sass;

use std::collections::BTreeMap;
use std::path::Path;

use fathom_gpu::assembly::Resources;
use fathom_gpu::compile::{CompileError, Compiler, source_named};
use fathom_gpu::device::Loaded;
use fathom_gpu::{CudaEngine, GpuError, nvdisasm};
use fathom_reference::{Engine, EngineError};
use fathom_trace::{KernelTotals, OpClass, TensorMeta};
use serde::{Deserialize, Serialize};

use sass::Loop;

/// A kernel in machine code.
#[derive(Clone, Debug, Serialize)]
pub struct Code {
    /// Name of the entry.
    pub entry: String,
    /// The constants that it was compiled for, `N=4096`.
    pub constants: Vec<String>,
    /// Registers, local and static shared memory.
    pub resources: Resources,
    /// Dynamic shared memory of a launch, in bytes.
    pub dynamic_shared_bytes: u32,
    /// Stages of its pipeline; 1 where it waits for what it loads.
    pub stages: u64,
    /// What the assembler complains of.
    pub warnings: Vec<String>,
    /// Its hot loop; absent without nvdisasm.
    pub hot_loop: Option<Loop>,
}

/// An op on its case: what its kernels moved beside what it must.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Traffic {
    /// Name of the op.
    pub op: String,
    /// Its largest inputs, in words.
    pub shape: String,
    /// The kernels that were launched, with their counts.
    pub kernels: BTreeMap<String, KernelTotals>,
    /// Bytes of inputs and outputs, each moved once.
    pub minimum_bytes: u64,
    /// Whether moving bytes is all that it should wait for.
    pub memory_bound: bool,
}

impl Traffic {
    fn total(&self) -> KernelTotals {
        let mut total = KernelTotals::default();
        self.kernels.values().for_each(|counts| total.merge(counts));
        total
    }

    /// Bytes of the sectors that launches touched over the fewest, each once a launch: what a cache
    /// that forgets nothing within a launch leaves to be moved.
    pub fn distinct(&self) -> f64 {
        let total = self.total();
        (32 * (total.sectors_read + total.sectors_written)) as f64 / self.minimum_bytes as f64
    }

    /// Bytes moved over the fewest: what reads fetch past the first-level cache, what copies read,
    /// and what is written, each sector once.
    pub fn moved(&self) -> f64 {
        let total = self.total();
        let sectors = total.fetched_sectors + total.sectors_written;
        (32 * sectors + total.copied_bytes) as f64 / self.minimum_bytes as f64
    }
}

/// What running the cases gave.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ran {
    /// Ops on their cases.
    pub traffic: Vec<Traffic>,
    /// The kernels that were loaded for them.
    pub loaded: Vec<Loaded>,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct Quality {
    /// NVRTC's version, 13.0 for instance, of which the assembler is a part.
    pub nvrtc: String,
    /// Kernels by entry and constants.
    pub code: Vec<Code>,
    /// Ops on their cases.
    pub traffic: Vec<Traffic>,
}

/// Why kernels could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum QualityError {
    /// A case did not run.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The device failed.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// A kernel could not be assembled.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// The disassembler failed.
    #[error("nvdisasm: {0}")]
    Disassembler(#[from] std::io::Error),
    /// The emulated device's counts could not be read.
    #[error("{0}")]
    Counts(String),
}

/// Runs every case on `engine`, whose device is the emulated one and counts. `counts` gives what
/// each kernel did since it was last called; `progress` is called with each op.
///
/// # Errors
/// [`QualityError`].
pub fn run(
    engine: &CudaEngine,
    counts: &dyn Fn() -> Result<BTreeMap<String, KernelTotals>, String>,
    progress: &dyn Fn(&str),
) -> Result<Ran, QualityError> {
    let gpu = engine.gpu();
    let mut traffic = Vec::new();
    for measured in cases::all() {
        let (op, case) = (measured.case.op.as_ref(), &measured.case);
        progress(op.name());
        counts().map_err(QualityError::Counts)?;
        engine.run(case)?;
        gpu.write_records()?;
        let inputs = case.ordered_inputs().map_err(EngineError::from)?;
        let metas: Vec<Option<TensorMeta>> = op
            .inputs()
            .iter()
            .zip(&inputs)
            .map(|(role, input)| input.as_ref().map(|tensor| tensor.meta(role.name)))
            .collect();
        let cost = op.cost(&metas, &case.infer().map_err(EngineError::from)?);
        traffic.push(Traffic {
            op: op.name().to_owned(),
            shape: measured.shape.clone(),
            kernels: counts().map_err(QualityError::Counts)?,
            minimum_bytes: cost.bytes_read + cost.bytes_written,
            memory_bound: memory_bound(op.class()),
        });
    }
    Ok(Ran { traffic, loaded: gpu.loaded() })
}

/// Looks at the machine code of what was loaded. The emulated driver gives PTX in the place of
/// machine code, so this is for a process that is not on it.
///
/// # Errors
/// [`QualityError`].
pub fn look(
    ran: Ran,
    compiler: &Compiler,
    nvdisasm: Option<&Path>,
) -> Result<Quality, QualityError> {
    let (major, minor) = compiler.version();
    let code = ran.loaded.iter().map(|loaded| code(compiler, loaded, nvdisasm));
    Ok(Quality {
        nvrtc: format!("{major}.{minor}"),
        code: code.collect::<Result<_, _>>()?,
        traffic: ran.traffic,
    })
}

/// Whether an op of this class does too little with a byte to wait for anything else.
fn memory_bound(class: OpClass) -> bool {
    match class {
        OpClass::Gemm
        | OpClass::GroupedGemm
        | OpClass::WeightGradient
        | OpClass::Attention
        | OpClass::AttentionBackward
        | OpClass::Decode
        | OpClass::Loss
        | OpClass::LossBackward
        | OpClass::DispatchPlan
        | OpClass::Routing
        | OpClass::RoutingBackward => false,
        OpClass::Dispatch
        | OpClass::Combine
        | OpClass::Gather
        | OpClass::Scatter
        | OpClass::Rotation
        | OpClass::Collective
        | OpClass::Stream
        | OpClass::Convert
        | OpClass::Row => true,
    }
}

fn code(
    compiler: &Compiler,
    loaded: &Loaded,
    nvdisasm: Option<&Path>,
) -> Result<Code, QualityError> {
    let Loaded { source, entry, defines, shared_bytes } = loaded;
    let of_source = source_named(source).unwrap_or_else(|| panic!("no source {source}"));
    let constants: Vec<(&str, u64)> =
        defines.iter().map(|(n, value)| (n.as_str(), *value)).collect();
    let assembly = compiler.assemble(of_source, &constants)?;
    let text = nvdisasm.map(|tool| nvdisasm::disassemble(tool, &assembly.cubin)).transpose()?;
    let resources = assembly.resources(entry).unwrap_or_else(|| {
        panic!("no word of {entry} in the assembler's report:\n{}", assembly.report)
    });
    let stages = constants.iter().find(|(name, _)| *name == "STAGES");
    Ok(Code {
        entry: entry.clone(),
        constants: constants.iter().map(|(name, value)| format!("{name}={value}")).collect(),
        resources,
        dynamic_shared_bytes: *shared_bytes,
        stages: stages.map_or(1, |(_, stages)| *stages),
        warnings: assembly.warnings().into_iter().map(str::to_owned).collect(),
        hot_loop: text.and_then(|text| sass::hot_loop(&text, entry)),
    })
}
