//! What the parts of the simulator share on the command line: models by preset or file, wishes by
//! name.

use std::path::Path;

use fathom_simulator::SimError;
use fathom_simulator::config::WhatIf;
use fathom_simulator::first_principles::FirstPrinciples;
use fathom_simulator::hardware::{self, model::Model};
use fathom_simulator::kernel_time::Constants;

/// The model of a preset, or of a Hugging Face configuration where `config` is given.
pub fn model(preset: &str, config: Option<&Path>) -> Result<Model, SimError> {
    match config {
        None => hardware::model(preset),
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|e| SimError::io(path, e))?;
            Model::from_hf_config(&path.display().to_string(), &text)
        }
    }
}

/// Wishes granted by name.
pub fn what_if(names: &[String]) -> Result<WhatIf, SimError> {
    let mut table = serde_json::Map::new();
    for name in names {
        table.insert(name.clone(), serde_json::Value::Bool(true));
    }
    serde_json::from_value(serde_json::Value::Object(table))
        .map_err(|e| SimError::input("--what-if", e.to_string()))
}

/// The cost model with the constants in use, or with those of a file.
pub fn cost(constants: Option<&Path>) -> Result<FirstPrinciples, SimError> {
    match constants {
        None => Ok(FirstPrinciples::default()),
        Some(path) => Ok(FirstPrinciples { constants: Constants::read(path)? }),
    }
}
