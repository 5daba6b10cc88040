//! Replaying a recording: every case of a folder on an engine, bit by bit, summed up by op.

use std::collections::BTreeMap;
use std::path::Path;

use fathom_reference::Engine;
use fathom_reference::ops::ReferenceEngine;
use serde::Serialize;

use crate::case_file;
use crate::check::{self, FileReport, ListError, Status, Target, Tolerance};

/// What became of an op's cases.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct OpSummary {
    /// The op; empty for files that could not be read.
    pub op: String,
    /// Case files.
    pub cases: usize,
    /// Those whose outputs all agree in every bit.
    pub pass: usize,
    /// Those with an output that does not.
    pub fail: usize,
    /// Those that could not be read or run.
    pub error: usize,
    /// Output elements compared.
    pub elements: u64,
    /// Of them, those that differ.
    pub mismatches: u64,
    /// The first file that failed or could not be run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first: Option<String>,
}

/// The names that [`engine`] knows.
pub const ENGINES: &[&str] = &["reference"];

/// The engine of a backend's name.
///
/// # Errors
/// A sentence that lists the known names.
pub fn engine(name: &str) -> Result<Box<dyn Engine>, String> {
    match name {
        "reference" => Ok(Box::new(ReferenceEngine)),
        _ => Err(format!("unknown backend '{name}'; known are {}", ENGINES.join(", "))),
    }
}

/// The case files of a recording, in order of execution.
///
/// # Errors
/// As [`check::list`]; a recording without cases is refused as well.
pub fn cases(folder: &Path) -> Result<Vec<Target>, ListError> {
    check::list(&[folder.to_owned()])
}

/// Runs one case and compares bits; `None` where `ops` is not empty and lacks its op. A case that
/// expects nothing is in error: there is nothing to replay against.
pub fn replay(target: &Target, engine: &dyn Engine, ops: &[String]) -> Option<FileReport> {
    if !ops.is_empty() && case_file::op_name(&target.path).is_ok_and(|name| !ops.contains(&name)) {
        return None;
    }
    let mut report = check::check(target, engine, Tolerance::Bits, None);
    if report.status == Status::Computed {
        report.status = Status::Error;
        let file = target.path.display();
        report.error = Some(format!("{file}: expected recorded outputs (out.*), found none"));
    }
    Some(report)
}

/// Sums reports up, an entry an op in alphabetical order.
pub fn by_op(reports: &[FileReport]) -> Vec<OpSummary> {
    let mut ops: BTreeMap<&str, OpSummary> = BTreeMap::new();
    for report in reports {
        let name = report.op.as_deref().unwrap_or("");
        let op = ops.entry(name).or_default();
        name.clone_into(&mut op.op);
        op.cases += 1;
        match report.status {
            Status::Pass => op.pass += 1,
            Status::Fail => op.fail += 1,
            Status::Computed | Status::Error => op.error += 1,
        }
        if report.status != Status::Pass && op.first.is_none() {
            op.first = Some(report.file.clone());
        }
        for tensor in &report.tensors {
            op.elements += tensor.elements as u64;
            op.mismatches += tensor.mismatches as u64;
        }
    }
    ops.into_values().collect()
}
