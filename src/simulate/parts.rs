//! What the parts of the simulator share on the command line: models by preset or file, wishes by
//! name.

use std::path::{Path, PathBuf};

use fathom_config::{Gpu, ModelConfig};
use fathom_conformance::model_code::ModelCode;
use fathom_simulator::SimError;
use fathom_simulator::calibrate::parse_table;
use fathom_simulator::config::{Scenario, WhatIf};
use fathom_simulator::error::read_table;
use fathom_simulator::first_principles::FirstPrinciples;
use fathom_simulator::kernel_time::{Constants, KernelTimes};
use fathom_simulator::workload::OpTrace;

/// The model of a preset, or of a Hugging Face configuration where `config` is given.
pub fn model(preset: &str, config: Option<&Path>) -> Result<ModelConfig, SimError> {
    match config {
        None => Ok(ModelConfig::preset(preset)?),
        Some(path) => Ok(ModelConfig::shape_from_hf_file(path)?),
    }
}

/// The hardware wishes of these names, granted; the error lists the known names.
pub fn what_if(names: &[String]) -> Result<WhatIf, SimError> {
    let mut table = serde_json::Map::new();
    for name in names {
        table.insert(name.clone(), serde_json::Value::Bool(true));
    }
    serde_json::from_value(serde_json::Value::Object(table))
        .map_err(|e| SimError::input("--what-if", e.to_string()))
}

/// What times are made of, instead of what the program holds.
#[derive(clap::Args)]
pub struct CostArgs {
    /// Constants of the kernel times, as `calibrate --gemms --json` prints them
    #[arg(long, value_name = "FILE.json")]
    constants: Option<PathBuf>,
    /// Ops of a step as a backend recorded them (JSON Lines), instead of the model's own code
    #[arg(long, value_name = "FILE.jsonl")]
    op_trace: Option<PathBuf>,
    /// GEMMs measured alone on the GPU --gemms-gpu (CSV: name,kind,m,n,k,mean_us,min_us): constants
    /// are fitted to them, and GEMMs of like sizes take their times
    #[arg(long, value_name = "FILE.csv", requires = "gemms_gpu")]
    gemms: Option<PathBuf>,
    /// GPU preset that --gemms was measured on
    #[arg(long, value_name = "NAME", requires = "gemms")]
    gemms_gpu: Option<String>,
    /// Measured kernels (CSV or JSON: op, shape, mean_us) instead of the model's times
    #[arg(long, value_name = "FILE")]
    kernel_times: Option<PathBuf>,
}

impl CostArgs {
    /// The files that the flags name.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.constants.iter().chain(&self.op_trace).chain(&self.gemms).chain(&self.kernel_times)
    }

    /// The cost model that the flags ask for: the program's own where none is given.
    pub fn model(&self) -> Result<FirstPrinciples, SimError> {
        let model = match &self.op_trace {
            None => FirstPrinciples::new(ModelCode),
            Some(path) => FirstPrinciples::new(OpTrace::read(path)?),
        };
        let model = match &self.constants {
            None => model,
            Some(path) => model.with_constants(Constants::read(path)?),
        };
        let model = match (&self.gemms, &self.gemms_gpu) {
            (Some(path), Some(gpu)) => {
                let table = parse_table(&path.display().to_string(), &read_table(path)?)?;
                model.with_gemms(&Gpu::preset(gpu)?, &table)?
            }
            _ => model,
        };
        Ok(match &self.kernel_times {
            None => model,
            Some(path) => model.with_measured(KernelTimes::read(path)?),
        })
    }

    /// Says on stderr which kernels of a measured table the scenario does not have.
    pub fn warn_of_unused(&self, model: &FirstPrinciples, s: &Scenario) -> Result<(), SimError> {
        let Some(file) = &self.kernel_times else { return Ok(()) };
        let unknown = model.unknown_measured(s)?;
        for (op, shape) in unknown.iter().take(5) {
            errln!("{}: no kernel '{op}' of '{shape}' in this scenario", file.display());
        }
        if unknown.len() > 5 {
            errln!("{}: and {} more", file.display(), unknown.len() - 5);
        }
        Ok(())
    }
}
