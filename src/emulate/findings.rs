//! Findings as a file for other programs: JSON, SARIF 2.1.0 (code scanning) or JUnit XML.

use std::path::Path;
use std::time::Duration;

use fathom_conformance::junit::{self, Outcome, Suite, TestCase};
use fathom_emulator::Finding;
use fathom_libcuda::Summary;
use serde_json::{Value, json};

/// What a file is written as; its name's ending says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    Sarif,
    Junit,
}

impl Format {
    /// The format of a file's name.
    ///
    /// # Errors
    /// A name that ends in none of the three.
    pub fn of(path: &Path) -> Result<Format, String> {
        match path.extension().and_then(|e| e.to_str()) {
            Some("json") => Ok(Format::Json),
            Some("sarif") => Ok(Format::Sarif),
            Some("xml" | "junit") => Ok(Format::Junit),
            _ => Err(format!(
                "--findings {}: expected a name that ends in .json, .sarif, or .xml (JUnit)",
                path.display()
            )),
        }
    }

    /// The document of a run's findings.
    pub fn document(self, summary: &Summary) -> String {
        let value = match self {
            Format::Json => json!({ "findings": summary.findings, "errors": summary.errors }),
            Format::Sarif => sarif(&summary.findings),
            Format::Junit => return junit::document(&[suite(summary)]),
        };
        serde_json::to_string_pretty(&value).expect("values are JSON") + "\n"
    }
}

/// The name of a finding's kind in files: `shared_race`.
pub fn kind(finding: &Finding) -> String {
    match serde_json::to_value(finding.kind) {
        Ok(Value::String(name)) => name,
        _ => finding.kind.to_string(),
    }
}

fn sarif(findings: &[Finding]) -> Value {
    let mut rules: Vec<Value> = Vec::new();
    for finding in findings {
        let rule = json!({
            "id": kind(finding),
            "shortDescription": { "text": finding.kind.to_string() },
            "fullDescription": { "text": finding.kind.why() },
        });
        if !rules.contains(&rule) {
            rules.push(rule);
        }
    }
    let results: Vec<Value> = findings.iter().map(sarif_result).collect();
    json!({
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{
            "tool": { "driver": {
                "name": "fathom emulate",
                "version": env!("CARGO_PKG_VERSION"),
                "rules": rules,
            } },
            "results": results,
        }],
    })
}

fn sarif_result(finding: &Finding) -> Value {
    let mut location = json!({
        "logicalLocations": [{ "name": finding.kernel, "kind": "function" }],
    });
    if let Some(source) = &finding.source {
        location["physicalLocation"] = json!({
            "artifactLocation": { "uri": source.file },
            "region": { "startLine": source.line.max(1) },
        });
    }
    json!({
        "ruleId": kind(finding),
        "level": if finding.fatal { "error" } else { "warning" },
        "message": { "text": finding.to_string() },
        "locations": [location],
        "occurrenceCount": finding.count,
    })
}

/// A test a kernel, which fails by its findings, and one a launch or module that could not run.
fn suite(summary: &Summary) -> Suite {
    let test = |name: &str, outcome| TestCase {
        class: "emulated device".to_owned(),
        name: name.to_owned(),
        file: None,
        time: Duration::ZERO,
        outcome,
    };
    let kernels = summary.kernels.iter().map(|(name, totals)| {
        let own = summary.findings.iter().filter(|f| f.kernel == *name);
        let words: Vec<String> = own.map(ToString::to_string).collect();
        let outcome =
            if words.is_empty() { Outcome::Pass } else { Outcome::Failure(words.join("\n")) };
        TestCase { time: Duration::from_secs_f64(totals.host_seconds), ..test(name, outcome) }
    });
    let errors = summary.errors.iter().enumerate().map(|(i, error)| {
        test(&format!("could not run: {}", i + 1), Outcome::Error(error.clone()))
    });
    Suite { name: "fathom emulate".to_owned(), tests: kernels.chain(errors).collect() }
}
