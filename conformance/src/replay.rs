//! Replaying a recording: every case of a folder on an engine, bit by bit, summed up by op.

use std::collections::BTreeMap;
use std::path::Path;

use fathom_reference::Engine;
use serde::Serialize;

use crate::case_file;
use crate::check::{self, FileReport, ListError, Status, Target, Tolerance};

/// What became of an op's cases.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct OpSummary {
    /// Name of the op; empty for files that could not be read.
    pub op: String,
    /// Case files of the op.
    pub cases: usize,
    /// Case files whose outputs all agree in every bit.
    pub pass: usize,
    /// Case files with an output that does not agree.
    pub fail: usize,
    /// Case files that the backend has no kernel for.
    pub unsupported: usize,
    /// Case files that could not be read, or failed to run.
    pub error: usize,
    /// Output elements that were compared.
    pub elements: u64,
    /// Compared elements that differ.
    pub mismatches: u64,
    /// The first file that failed or could not be run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first: Option<String>,
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

/// Sums the reports up by op, in alphabetical order.
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
            Status::Unsupported => op.unsupported += 1,
            Status::Computed | Status::Error => op.error += 1,
        }
        let counts = matches!(report.status, Status::Pass | Status::Unsupported);
        if !counts && op.first.is_none() {
            op.first = Some(report.file.clone());
        }
        for tensor in &report.tensors {
            op.elements += tensor.elements as u64;
            op.mismatches += tensor.mismatches as u64;
        }
    }
    ops.into_values().collect()
}
