//! Conformance: an engine against the reference on drawn cases, bit by bit.
//!
//! A [`Suite`] draws cases of one op: shapes at random and at the edges of tiles, values that
//! kernels get wrong. Case `i` of a suite depends on the seed, the op and `i` alone, and walks
//! through the suite's kinds of values in turn. The first case that disagrees is simplified as far
//! as it goes on disagreeing, and written as a case file with what the engine gave, for
//! `fathom diagnose`.
//!
//! [`model`] does the same for whole training runs.
//!
//! To add an op: copy a neighbour's file, or a function of one, and name it in its list of suites.

mod attention;
mod data;
pub(crate) mod draw;
mod fp8;
mod gemm;
mod gemm_fp8;
mod heads;
mod loss;
pub mod model;
mod moe;
mod norm;
mod optim;
mod quant;
pub mod values;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fathom_reference::ops::gemm_fp8::GemmFp8;
use fathom_reference::{Case, Engine, EngineError, Op, Outputs};
use proptest::strategy::{BoxedStrategy, Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde::Serialize;

use crate::case_file::{self, CaseFile, CaseFileError};
use crate::compare::{self, Difference, Tolerance};
use crate::github::Annotation;
use crate::junit::{self, Suite as JunitSuite, TestCase};

/// A drawn case and what was drawn, in words.
#[derive(Debug)]
pub struct Drawn {
    /// Shape, options and kind of values, in words.
    pub what: String,
    /// The case that was drawn.
    pub case: Case,
}

/// How cases of one op are drawn.
pub struct Suite {
    /// The op's name in the table of ops.
    pub op: &'static str,
    /// The strategy of case `index`.
    pub strategy: fn(index: usize) -> BoxedStrategy<Drawn>,
}

/// The suites by file; [`all`] has them in order.
const FILES: &[&[Suite]] = &[
    attention::SUITES,
    data::SUITES,
    heads::SUITES,
    loss::SUITES,
    moe::SUITES,
    norm::SUITES,
    optim::SUITES,
    quant::SUITES,
    &[Suite { op: GemmFp8::NAME, strategy: gemm_fp8::strategy }],
    fp8::SUITES,
    gemm::SUITES,
];

/// The ops with a suite, in alphabetical order.
fn all() -> Vec<&'static Suite> {
    let mut suites: Vec<&Suite> = FILES.iter().copied().flatten().collect();
    suites.sort_by_key(|suite| suite.op);
    suites
}

/// Tries at simplifying a case that disagrees, where somebody is going to look at it.
pub const SIMPLIFICATIONS: usize = 24;

/// How much a run of suites draws, and where disagreements go.
#[derive(Clone, Debug)]
pub struct Options {
    /// Cases that are drawn of each op: their numbers.
    pub cases: Range<usize>,
    /// Seed of all draws; the same seed draws the same cases.
    pub seed: u64,
    /// Tries at simplifying a case that disagrees: [`SIMPLIFICATIONS`], or none.
    pub simplifications: usize,
    /// Folder for the case files of disagreements.
    pub save: PathBuf,
}

/// The verdict on one op.
#[derive(Debug, Serialize)]
pub struct OpReport {
    /// Name of the op.
    pub op: &'static str,
    /// Cases that were run.
    pub cases: usize,
    /// Cases whose outputs have every bit as the reference's.
    pub passed: usize,
    /// Output elements that were compared.
    pub elements: usize,
    /// The first disagreement; the op's further cases are not run after it.
    pub failure: Option<Failure>,
    /// How long its cases took; no part of the JSON.
    #[serde(skip)]
    pub time: Duration,
}

impl OpReport {
    /// What disagrees, in a few lines; `None` where nothing does.
    pub fn complaint(&self) -> Option<String> {
        let failure = self.failure.as_ref()?;
        let mut lines = vec![format!("case {}, {}", failure.case, failure.what)];
        let differing = failure.tensors.iter().filter(|d| d.mismatches > 0);
        lines.extend(differing.map(Difference::words));
        lines.extend(failure.error.clone());
        lines.extend(
            failure.file.as_ref().map(|f| format!("kept: fathom diagnose {}", f.display())),
        );
        Some(lines.join("\n"))
    }
}

/// The reports as a suite of JUnit tests, one test per op.
pub fn junit(reports: &[OpReport]) -> JunitSuite {
    let test = |report: &OpReport| TestCase {
        class: "fathom conform".to_owned(),
        name: report.op.to_owned(),
        file: report.failure.as_ref().and_then(|f| Some(f.file.as_ref()?.display().to_string())),
        time: report.time,
        outcome: report.complaint().map_or(junit::Outcome::Pass, junit::Outcome::Failure),
    };
    JunitSuite { name: "fathom conform".to_owned(), tests: reports.iter().map(test).collect() }
}

/// A GitHub annotation for every op that disagrees.
pub fn annotations(reports: &[OpReport]) -> Vec<Annotation> {
    let annotation = |report: &OpReport| {
        let title = format!("{} disagrees with the reference", report.op);
        Some(Annotation { file: None, title, message: report.complaint()? })
    };
    reports.iter().filter_map(annotation).collect()
}

/// A case on which an engine disagrees with the reference.
#[derive(Debug, Serialize)]
pub struct Failure {
    /// Number of the case as it was drawn, from 0.
    pub case: usize,
    /// What was drawn, after simplification.
    pub what: String,
    /// How its outputs differ from the reference's; empty where the engine gave none.
    pub tensors: Vec<Difference>,
    /// Why the engine gave no outputs, where it did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The case file that was written, whose outputs are the engine's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

/// Why a suite could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ConformError {
    /// No suite of this name.
    #[error("--only {found}: expected {}", all().iter().map(|s| s.op).collect::<Vec<_>>().join(", "))]
    NoSuite {
        /// The name that was asked for.
        found: String,
    },
    /// The reference refuses a drawn case, or the engine has no kernel for it.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The case file of a disagreement could not be written.
    #[error(transparent)]
    File(#[from] CaseFileError),
}

/// The suites of these ops, in the order asked for; all where none is named.
///
/// # Errors
/// [`ConformError::NoSuite`].
pub fn suites(only: &[String]) -> Result<Vec<&'static Suite>, ConformError> {
    if only.is_empty() {
        return Ok(all());
    }
    let find = |name: &String| {
        let suite = all().into_iter().find(|s| s.op == name);
        suite.ok_or_else(|| ConformError::NoSuite { found: name.clone() })
    };
    only.iter().map(find).collect()
}

/// Runs a suite on `engine` against `reference`; `progress` is called after every case.
///
/// # Errors
/// [`ConformError`]; a disagreement is none.
pub fn run(
    suite: &Suite,
    engine: &dyn Engine,
    reference: &dyn Engine,
    options: &Options,
    progress: &dyn Fn(),
) -> Result<OpReport, ConformError> {
    let begin = Instant::now();
    let mut report = OpReport {
        op: suite.op,
        cases: 0,
        passed: 0,
        elements: 0,
        failure: None,
        time: Duration::ZERO,
    };
    for index in options.cases.clone() {
        let mut runner = runner(suite.op, options.seed, index);
        let strategy = (suite.strategy)(index);
        let mut tree = strategy.new_tree(&mut runner).expect("strategies reject nothing");
        let drawn = tree.current();
        let verdict = run_both(&drawn.case, engine, reference)?;
        report.cases += 1;
        report.elements += verdict.elements();
        if verdict.agrees() {
            report.passed += 1;
            progress();
            continue;
        }
        let (drawn, verdict) =
            simplify(tree.as_mut(), (drawn, verdict), engine, reference, options)?;
        report.failure = Some(failure(index, drawn, verdict, options)?);
        progress();
        break;
    }
    report.time = begin.elapsed();
    Ok(report)
}

/// Randomness of one case: the seed, the op's name and the index.
fn runner(op: &str, seed: u64, index: usize) -> TestRunner {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&(index as u64).to_le_bytes());
    for (at, b) in op.bytes().enumerate() {
        bytes[16 + at % 16] ^= b.rotate_left(at as u32 / 16);
    }
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    TestRunner::new_with_rng(Config { failure_persistence: None, ..Config::default() }, rng)
}

/// What came of one case.
enum Verdict {
    /// Whether every bit agrees, the outputs' differences, and what the engine gave.
    Compared { agree: bool, differences: Vec<Difference>, outputs: Outputs },
    /// The engine failed on it.
    Failed(String),
}

impl Verdict {
    fn agrees(&self) -> bool {
        matches!(self, Verdict::Compared { agree: true, .. })
    }

    fn elements(&self) -> usize {
        match self {
            Verdict::Compared { differences, .. } => differences.iter().map(|d| d.elements).sum(),
            Verdict::Failed(_) => 0,
        }
    }
}

/// Runs both on a case.
fn run_both(
    case: &Case,
    engine: &dyn Engine,
    reference: &dyn Engine,
) -> Result<Verdict, ConformError> {
    let expected = reference.run(case)?;
    match engine.run(case) {
        Ok(outputs) => {
            let sides = [("contract", &expected), ("kernel", &outputs)];
            let (agree, differences) = compare::judge(sides, Tolerance::Bits);
            Ok(Verdict::Compared { agree, differences, outputs })
        }
        Err(error @ EngineError::Failed { .. }) => Ok(Verdict::Failed(error.to_string())),
        Err(error) => Err(error.into()),
    }
}

/// The simplest case found that still disagrees.
fn simplify(
    tree: &mut dyn ValueTree<Value = Drawn>,
    (mut drawn, mut verdict): (Drawn, Verdict),
    engine: &dyn Engine,
    reference: &dyn Engine,
    options: &Options,
) -> Result<(Drawn, Verdict), ConformError> {
    // After a failed launch a driver answers no further call.
    if let Verdict::Failed(_) = verdict {
        return Ok((drawn, verdict));
    }
    let mut moved = tree.simplify();
    for _ in 0..options.simplifications {
        if !moved {
            break;
        }
        let candidate = tree.current();
        let found = run_both(&candidate.case, engine, reference)?;
        if found.agrees() {
            moved = tree.complicate();
        } else {
            let failed = matches!(found, Verdict::Failed(_));
            (drawn, verdict) = (candidate, found);
            moved = !failed && tree.simplify();
        }
    }
    Ok((drawn, verdict))
}

fn failure(
    index: usize,
    drawn: Drawn,
    verdict: Verdict,
    options: &Options,
) -> Result<Failure, ConformError> {
    let Drawn { what, case } = drawn;
    let (tensors, outputs) = match verdict {
        Verdict::Compared { differences, outputs, .. } => (differences, outputs),
        Verdict::Failed(error) => {
            let error = Some(error);
            return Ok(Failure { case: index, what, tensors: Vec::new(), error, file: None });
        }
    };
    let name = format!("{}-seed{}-case{index}.safetensors", case.op.name(), options.seed);
    let path = options.save.join(name);
    save(&path, case, outputs, &what)?;
    Ok(Failure { case: index, what, tensors, error: None, file: Some(path) })
}

fn save(path: &Path, case: Case, outputs: Outputs, what: &str) -> Result<(), CaseFileError> {
    let metadata = BTreeMap::from([("source".to_owned(), what.to_owned())]);
    case_file::write(path, &CaseFile { case, expected: outputs, metadata })
}
