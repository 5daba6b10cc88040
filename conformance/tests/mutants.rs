//! Kernel mutation: defects that a tired engineer would make are planted in the CUDA kernels one at
//! a time, and the suite of the kernel's op, on the emulated driver, has to find each of them.
//!
//! The defects are the tables in `tests/mutants/`. Every eighth is planted by default, all by
//!
//! ```text
//! FATHOM_MUTANTS=all cargo test -p fathom-conformance --test mutants -- --nocapture
//! FATHOM_MUTANTS=norm/ cargo test ..      those whose file begins with this
//! ```
//!
//! Each mutant runs in a process of its own, since a driver answers no call after a failed launch.
//! A defect counts as found where a case has other bits than the reference's, a sanitizer reports a
//! finding or the launch fails; the kernels as they are must pass the same cases with the same
//! checks. Skipped, aloud, where NVRTC is not to be had.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use fathom_conformance::conform::{self, Options};
use fathom_gpu::compile::Source;
use fathom_gpu::{CudaEngine, DeviceKind, Gpu};
use fathom_libcuda::{Choices, prepare};
use fathom_reference::op::ReferenceEngine;
use fathom_reference::{Case, Engine, EngineError, Outputs};
use serde::Deserialize;

/// The cases that `fathom conform` draws by default but the tall one, of its default seed.
const CASES: usize = 24;
const SEED: u64 = 0;

/// By default one of so many mutants is planted.
const SAMPLE: usize = 8;

/// Whose suite runs, and on what: the number of a mutant, an op, checks and cases.
const JOB: &str = "FATHOM_MUTANT_JOB";

/// A line of a child's output begins so where the suite disagrees, and with the number of the case.
const FOUND: &str = "found by case ";

/// The tables, one a folder of kernels.
const TABLES: [(&str, &str); 8] = [
    ("attention", include_str!("mutants/attention.toml")),
    ("common", include_str!("mutants/common.toml")),
    ("data", include_str!("mutants/data.toml")),
    ("gemm", include_str!("mutants/gemm.toml")),
    ("moe", include_str!("mutants/moe.toml")),
    ("norm", include_str!("mutants/norm.toml")),
    ("optim", include_str!("mutants/optim.toml")),
    ("quant", include_str!("mutants/quant.toml")),
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    mutant: Vec<Mutant>,
}

/// One planted defect.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutant {
    /// What is wrong, in a sentence.
    defect: String,
    /// Path below `gpu/kernels`.
    file: String,
    /// Text that stands in the file exactly once.
    from: String,
    /// What stands there instead.
    to: String,
    /// The ops whose suites must each find it.
    ops: Vec<String>,
    /// Sanitizers without which nobody sees it: races, fences.
    #[serde(default)]
    check: String,
}

fn mutants() -> Vec<Mutant> {
    let read = |(name, text): (&str, &str)| {
        let table: Table = toml::from_str(text).unwrap_or_else(|e| panic!("{name}.toml: {e}"));
        table.mutant
    };
    TABLES.into_iter().flat_map(read).collect()
}

impl Mutant {
    /// The file's text with the defect.
    fn text(&self) -> String {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../gpu/kernels").join(&self.file);
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", self.file));
        let count = text.matches(&self.from).count();
        assert_eq!(
            count, 1,
            "{}: expected once, found {count} times: {:?}; the mutant '{}' needs another text",
            self.file, self.from, self.defect
        );
        assert_ne!(self.from, self.to, "{}", self.defect);
        text.replace(&self.from, &self.to)
    }
}

#[test]
fn every_text_is_in_its_source_once() {
    let mutants = mutants();
    assert!(mutants.len() >= 80, "{}", mutants.len());
    for mutant in &mutants {
        mutant.text();
        conform::suites(&mutant.ops).unwrap_or_else(|e| panic!("{}: {e}", mutant.defect));
        assert!(!mutant.ops.is_empty() && mutant.defect.ends_with('.'), "{}", mutant.defect);
    }
}

#[test]
fn planted_defects_are_found() {
    let Some(nvrtc) = fathom_gpu::nvrtc::find_or_fetch_for_tests() else { return };
    let wanted = std::env::var("FATHOM_MUTANTS").unwrap_or_default();
    let mutants = mutants();
    let chosen = mutants.iter().enumerate().filter(|(index, mutant)| match wanted.as_str() {
        "" => index % SAMPLE == 0,
        "all" => true,
        prefix => mutant.file.starts_with(prefix),
    });
    let (mut jobs, mut survivors) = (0, Vec::new());
    // The cases that the kernels as they are must pass, by op and checks.
    let mut controls: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for (index, mutant) in chosen {
        for op in &mutant.ops {
            let found = child(&nvrtc, Some(index), op, &mutant.check, CASES);
            jobs += 1;
            let what = format!("{}, {op}: {}", mutant.file, mutant.defect);
            match found {
                Err(broken) => survivors.push(format!("{what}\n{broken}")),
                Ok(Some((case, how))) => {
                    println!("{what}\n    {FOUND}{case}: {how}");
                    let cases = controls.entry((op, &mutant.check)).or_default();
                    *cases = (case + 1).max(*cases);
                }
                Ok(None) => {
                    println!("{what}\n    NOT FOUND");
                    survivors.push(what);
                }
            }
        }
    }
    assert!(jobs > 0, "FATHOM_MUTANTS={wanted}: expected all, or how a file's path begins");
    for ((op, check), cases) in controls {
        match child(&nvrtc, None, op, check, cases) {
            Ok(None) => {}
            other => panic!("{op} as it is, checks '{check}', does not pass: {other:?}"),
        }
    }
    println!("{} of {jobs} found", jobs - survivors.len());
    assert!(survivors.is_empty(), "{} not found:\n{}", survivors.len(), survivors.join("\n"));
}

/// Runs the suite of an op in a process on the emulated driver; the first case that fails and how.
/// An error is what the process said where it did not come to that.
fn child(
    nvrtc: &fathom_gpu::nvrtc::Nvrtc,
    mutant: Option<usize>,
    op: &str,
    check: &str,
    cases: usize,
) -> Result<Option<(usize, String)>, String> {
    let choices = Choices { check: check.to_owned(), ..Choices::default() };
    let prepared = prepare::prepare(choices).expect("the emulated driver is built with the test");
    let program = std::env::current_exe().expect("the running program");
    let mutant = mutant.map_or("none".to_owned(), |index| index.to_string());
    let mut command: Command = prepared.command(program.as_os_str());
    let output = command
        .args(["--exact", "one_suite", "--nocapture"])
        .env(JOB, format!("{mutant} {op} {cases}"))
        .env("FATHOM_NVRTC", nvrtc.library.parent().expect("a file in a folder"))
        .env("FATHOM_CACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("mutants"))
        .output()
        .expect("the running program starts again");
    let [stdout, stderr] = [&output.stdout, &output.stderr].map(|b| String::from_utf8_lossy(b));
    if !output.status.success() {
        return Err(format!("{stdout}{stderr}"));
    }
    let Some((_, found)) = stdout.split_once(FOUND) else { return Ok(None) };
    let (case, how) = found.lines().next().and_then(|l| l.split_once(": ")).expect("as written");
    Ok(Some((case.parse().expect("a number"), how.to_owned())))
}

/// The kernels, where a finding of the sanitizers is a failure as well.
struct Watched(CudaEngine);

impl Engine for Watched {
    fn name(&self) -> String {
        self.0.name()
    }

    fn run(&self, case: &Case) -> Result<Outputs, EngineError> {
        let outcome = self.0.run(case);
        let findings = findings();
        if findings.is_empty() {
            return outcome;
        }
        let (engine, op) = (self.name(), case.op.name().to_owned());
        Err(EngineError::Failed { engine, op, reason: findings.join("\n") })
    }
}

/// What the driver in this process has reported so far.
fn findings() -> Vec<String> {
    let summary = prepare::so_far().expect("the driver's summary");
    summary.findings.iter().map(ToString::to_string).collect()
}

/// What [`child`] starts; by itself it has no job.
#[test]
fn one_suite() {
    let Ok(job) = std::env::var(JOB) else { return };
    let [mutant, op, cases] = job.split(' ').collect::<Vec<_>>().try_into().expect("three words");
    let mut gpu = Gpu::open(DeviceKind::Emulated).unwrap();
    if let Ok(index) = mutant.parse::<usize>() {
        let mutant: &Mutant = Box::leak(Box::new(mutants().swap_remove(index)));
        let text = Box::leak(mutant.text().into_boxed_str());
        gpu = gpu.with_planted(Source { name: &mutant.file, text });
    }
    let save = tempfile::tempdir().unwrap();
    let cases = 0..cases.parse().expect("a number");
    let options = Options { cases, seed: SEED, simplifications: 0, save: save.path().to_owned() };
    let suite = conform::suites(&[op.to_owned()]).unwrap()[0];
    let engine = Watched(CudaEngine::new(gpu));
    let report = conform::run(suite, &engine, &ReferenceEngine, &options, &|| ()).unwrap();
    if let Some(how) = report.complaint() {
        assert!(!how.contains("does not compile"), "{how}");
        let how = how.lines().skip(1).collect::<Vec<_>>().join(" ");
        println!("{FOUND}{}: {how}", report.failure.as_ref().expect("it complains").case);
    }
}
