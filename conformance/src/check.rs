//! Checking case files: find them, recompute, compare, keep what was computed.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fathom_reference::op::ReferenceEngine;
use fathom_reference::{Engine, EngineError, Outputs};
use serde::Serialize;

use crate::case_file::{self, CaseFile, CaseFileError, OUT};
pub use crate::compare::Tolerance;
use crate::compare::{self, Difference};
use crate::github::Annotation;
use crate::junit::{self, Suite, TestCase};

/// A case file to check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Path of the file as given or found.
    pub path: PathBuf,
    /// Its path relative to the folder it was found in; its name where it was given itself.
    pub relative: PathBuf,
}

/// Why the case files cannot be listed.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A folder holds no case file.
    #[error("{}: expected case files (*.safetensors), found none in this folder", path.display())]
    Empty {
        /// The folder in which no case was found.
        path: PathBuf,
    },
    /// Two files would be saved under one name.
    #[error("{} and {} would both be saved as {}; check them one after the other",
            first.display(), second.display(), relative.display())]
    SameName {
        /// One of the two files.
        first: PathBuf,
        /// The other of the two.
        second: PathBuf,
        /// The common name.
        relative: PathBuf,
    },
}

/// Lists the case files of `paths`: files as they are, folders walked recursively in name order.
///
/// # Errors
/// [`ListError`] where a path is absent or unreadable or a folder holds no `*.safetensors`.
pub fn list(paths: &[PathBuf]) -> Result<Vec<Target>, ListError> {
    let mut targets = Vec::new();
    for path in paths {
        let io = |source| ListError::Io { path: path.clone(), source };
        if std::fs::metadata(path).map_err(io)?.is_dir() {
            let before = targets.len();
            walk(path, Path::new(""), &mut targets)?;
            if targets.len() == before {
                return Err(ListError::Empty { path: path.clone() });
            }
        } else {
            let relative = path.file_name().map(PathBuf::from).unwrap_or_else(|| path.clone());
            targets.push(Target { path: path.clone(), relative });
        }
    }
    Ok(targets)
}

/// Refuses two targets that would be saved under one name.
///
/// # Errors
/// [`ListError::SameName`].
pub fn distinct_names(targets: &[Target]) -> Result<(), ListError> {
    let mut seen = std::collections::BTreeMap::new();
    for target in targets {
        if let Some(first) = seen.insert(&target.relative, &target.path) {
            return Err(ListError::SameName {
                first: first.clone(),
                second: target.path.clone(),
                relative: target.relative.clone(),
            });
        }
    }
    Ok(())
}

fn walk(root: &Path, below: &Path, targets: &mut Vec<Target>) -> Result<(), ListError> {
    let folder = root.join(below);
    let io = |source| ListError::Io { path: folder.clone(), source };
    let mut entries: Vec<_> =
        std::fs::read_dir(&folder).map_err(io)?.collect::<Result<_, _>>().map_err(io)?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let relative = below.join(entry.file_name());
        // A linked folder is not entered: it could lead back to itself.
        if entry.file_type().map_err(io)?.is_dir() {
            walk(root, &relative, targets)?;
        } else if entry.path().extension().is_some_and(|e| e == "safetensors") {
            targets.push(Target { path: entry.path(), relative });
        }
    }
    Ok(())
}

/// What became of a case file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Every expected output agrees.
    Pass,
    /// At least one expected output does not agree.
    Fail,
    /// The file expects nothing; the outputs were computed.
    Computed,
    /// The engine has no implementation of the op with these parameters.
    Unsupported,
    /// The file could not be read, or the engine failed on it.
    Error,
}

/// The verdict on one case file.
#[derive(Debug, Serialize)]
pub struct FileReport {
    /// The path as given or found.
    pub file: String,
    /// Name of the op; `None` where the file could not be read.
    pub op: Option<String>,
    /// What became of it.
    pub status: Status,
    /// How each expected output compares with what was computed.
    pub tensors: Vec<Difference>,
    /// Outputs of the op that the file does not hold while it holds others: not compared.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_compared: Vec<String>,
    /// Why there is no verdict.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// How long it took; no part of the JSON, which is the same for the same files.
    #[serde(skip)]
    pub time: Duration,
}

impl FileReport {
    /// Whether it passes without a single element that was compared.
    pub fn compares_nothing(&self) -> bool {
        self.status == Status::Pass && self.tensors.iter().all(|d| d.elements == 0)
    }

    /// Why the file does not pass, in a line a tensor; `None` where it does, or expects nothing.
    fn complaint(&self) -> Option<String> {
        match self.status {
            Status::Pass | Status::Computed => None,
            Status::Fail => {
                let failing = self.tensors.iter().filter(|d| d.mismatches > 0);
                Some(failing.map(Difference::words).collect::<Vec<_>>().join("\n"))
            }
            Status::Error | Status::Unsupported => self.error.clone(),
        }
    }
}

/// The reports as a suite of JUnit tests, one test per file.
pub fn junit(reports: &[FileReport]) -> Suite {
    let test = |report: &FileReport| TestCase {
        class: report.op.clone().unwrap_or_else(|| "unreadable".to_owned()),
        name: report.file.clone(),
        file: Some(report.file.clone()),
        time: report.time,
        outcome: match (report.status, report.complaint()) {
            (Status::Computed, _) => {
                junit::Outcome::Skipped("the file holds no output to compare".to_owned())
            }
            (Status::Fail, Some(text)) => junit::Outcome::Failure(text),
            (_, Some(text)) => junit::Outcome::Error(text),
            (_, None) => junit::Outcome::Pass,
        },
    };
    Suite { name: "fathom check".to_owned(), tests: reports.iter().map(test).collect() }
}

/// A GitHub annotation for every file that does not pass.
pub fn annotations(reports: &[FileReport]) -> Vec<Annotation> {
    let annotation = |report: &FileReport| {
        let title = match report.status {
            Status::Fail => format!("{} differs", report.op.as_deref().unwrap_or_default()),
            _ => "no verdict".to_owned(),
        };
        Some(Annotation { file: Some(report.file.clone()), title, message: report.complaint()? })
    };
    reports.iter().filter_map(annotation).collect()
}

/// Checks one case file on an engine; saves the computed outputs below the folder `save`, where
/// given.
pub fn check(
    target: &Target,
    engine: &dyn Engine,
    tolerance: Tolerance,
    save: Option<&Path>,
) -> FileReport {
    let begin = Instant::now();
    let mut report = checked(target, engine, tolerance, save);
    report.time = begin.elapsed();
    report
}

fn checked(
    target: &Target,
    engine: &dyn Engine,
    tolerance: Tolerance,
    save: Option<&Path>,
) -> FileReport {
    let mut report = FileReport {
        file: target.path.display().to_string(),
        op: None,
        status: Status::Error,
        tensors: Vec::new(),
        not_compared: Vec::new(),
        error: None,
        time: Duration::ZERO,
    };
    let file = match case_file::read(&target.path) {
        Ok(file) => file,
        Err(error) => {
            report.error = Some(error.to_string());
            return report;
        }
    };
    report.op = Some(file.case.op.name().to_owned());
    let outputs = match engine.run(&file.case) {
        Ok(outputs) => outputs,
        Err(error) => {
            if matches!(error, EngineError::Unsupported { .. }) {
                report.status = Status::Unsupported;
            }
            report.error = Some(format!("{}: {error}", target.path.display()));
            return report;
        }
    };
    if let Some(folder) = save
        && let Err(error) = save_outputs(&folder.join(&target.relative), &file, &outputs)
    {
        report.error = Some(error.to_string());
        return report;
    }
    // What the reference gives is the contract; what a backend gives is only its own.
    let whose = if engine.name() == ReferenceEngine.name() { "contract" } else { "backend" };
    let sides = [("file", &file.expected), (whose, &outputs)];
    let (agree, tensors) = compare::judge(sides, tolerance);
    report.tensors = tensors;
    report.status = match agree {
        _ if file.expected.is_empty() => Status::Computed,
        true => Status::Pass,
        false => Status::Fail,
    };
    if !file.expected.is_empty() {
        let absent = file.case.op.outputs().iter().filter(|r| !file.expected.contains_key(**r));
        report.not_compared = absent.map(|role| format!("{OUT}{role}")).collect();
    }
    report
}

/// Writes `out.<role>` tensors with the op and its parameters.
fn save_outputs(path: &Path, file: &CaseFile, outputs: &Outputs) -> Result<(), CaseFileError> {
    let tensors = outputs.iter().map(|(role, t)| (format!("{OUT}{role}"), t)).collect();
    let metadata = [
        ("op".to_owned(), file.case.op.name().to_owned()),
        ("params".to_owned(), file.case.op.params().to_string()),
    ];
    case_file::write_tensors(path, tensors, &metadata.into())
}
