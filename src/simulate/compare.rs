//! `fathom simulate compare`: scenarios side by side, with what differs between them.

use std::collections::BTreeMap;
use std::path::Path;

use fathom_simulator::config::Scenario;
use fathom_simulator::events::Detail;
use fathom_simulator::step::{StepReport, WholeRun, simulate, whole_run};
use serde::Serialize;
use serde_json::Value;

use super::parts;
use crate::output::{self, Outcome};

/// Time several scenarios and say what differs
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom simulate compare deepseek-v3-h800-2048 deepseek-v3-b200-2048
  fathom simulate compare a.toml b.toml c.toml --json

--json: {differences: {KEY: [a value each]}, scenarios: [as of fathom simulate --json]}. Exits with 1
where one does not fit into memory.")]
pub struct Args {
    /// Scenario files, or names of embedded scenarios
    #[arg(value_name = "SCENARIO", required = true, num_args = 2..)]
    scenarios: Vec<String>,
    /// Override a key in all of them; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    cost: parts::CostArgs,
}

#[derive(Serialize)]
struct One {
    #[serde(flatten)]
    report: StepReport,
    whole_run: WholeRun,
}

#[derive(Serialize)]
struct Document {
    differences: BTreeMap<String, Vec<Value>>,
    scenarios: Vec<One>,
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    let model = args.cost.model()?;
    let (mut keys, mut ran) = (Vec::new(), Vec::new());
    for name in &args.scenarios {
        let path = Path::new(name);
        let is_file = path.extension().is_some_and(|e| e == "toml");
        let (file, preset) = (is_file.then_some(path), (!is_file).then_some(name.as_str()));
        let scenario = super::scenario(file, preset, &args.set)?;
        let named = |e| super::named(file, preset, e);
        let report = simulate(&scenario, &model, Detail::Totals).map_err(named)?.report;
        let whole_run = whole_run(&scenario, &report, &model).map_err(named)?;
        keys.push(flat(&scenario)?);
        ran.push(One { report, whole_run });
    }
    let fits = ran.iter().all(|one| one.report.memory_complaint.is_none());
    let document = Document { differences: differences(&keys), scenarios: ran };
    if args.json {
        output::print_json(&document)?;
    } else {
        print(&document);
    }
    Ok(if fits { Outcome::Holds } else { Outcome::Fails })
}

/// A scenario by keys with dots.
fn flat(scenario: &Scenario) -> Result<BTreeMap<String, Value>, serde_json::Error> {
    let mut flat = BTreeMap::new();
    let mut open = vec![(String::new(), serde_json::to_value(scenario)?)];
    while let Some((path, value)) = open.pop() {
        match value {
            Value::Object(map) => open.extend(map.into_iter().map(|(key, value)| {
                let dot = if path.is_empty() { "" } else { "." };
                (format!("{path}{dot}{key}"), value)
            })),
            other => {
                flat.insert(path, other);
            }
        }
    }
    Ok(flat)
}

/// The keys whose values are not the same everywhere; null where a scenario has none.
fn differences(all: &[BTreeMap<String, Value>]) -> BTreeMap<String, Vec<Value>> {
    let mut found = BTreeMap::new();
    for key in all.iter().flat_map(BTreeMap::keys) {
        let values: Vec<Value> =
            all.iter().map(|one| one.get(key).cloned().unwrap_or_default()).collect();
        if values.iter().any(|v| *v != values[0]) {
            found.insert(key.clone(), values);
        }
    }
    found
}

/// A figure of a scenario: its name, and how it reads.
type Figure = (&'static str, fn(&One) -> String);

const FIGURES: [Figure; 10] = [
    ("step, s", |o| format!("{:.3}", o.report.step_time_s)),
    ("  eight of ten cases", |o| {
        format!("{:.2} to {:.2}", o.report.interval.low_s, o.report.interval.high_s)
    }),
    ("tokens/s a GPU", |o| format!("{:.1}", o.report.tokens_per_s_per_gpu)),
    ("tokens a day, 1e9", |o| format!("{:.2}", o.report.tokens_per_day / 1e9)),
    ("MFU, causal, %", |o| format!("{:.2}", 100.0 * o.report.mfu_causal)),
    ("bubble, %", |o| format!("{:.1}", 100.0 * o.report.breakdown_s.bubble / o.report.step_time_s)),
    ("fullest rank, GB", |o| {
        format!("{:.1}", o.report.memory_peak_gb.iter().copied().fold(0.0, f64::max))
    }),
    ("days with failures", |o| format!("{:.1}", o.whole_run.days_with_failures)),
    ("M$ the run", |o| format!("{:.3}", o.whole_run.usd / 1e6)),
    ("GWh the run", |o| format!("{:.3}", o.whole_run.kwh / 1e6)),
];

fn print(document: &Document) {
    let names = document.scenarios.iter().map(|one| one.report.name.as_str());
    let header: Vec<&str> = std::iter::once("").chain(names).collect();
    let right: Vec<usize> = (1..header.len()).collect();
    let figures = FIGURES.iter().map(|(name, read)| {
        std::iter::once((*name).to_owned()).chain(document.scenarios.iter().map(read)).collect()
    });
    outln!("{}\n", output::table(&header, &right, figures.collect()));
    let differences = document.differences.iter().map(|(key, values)| {
        let shown = values.iter().map(|v| match v {
            Value::Null => "-".to_owned(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        });
        std::iter::once(key.clone()).chain(shown).collect()
    });
    outln!("{}", output::table(&header, &right, differences.collect()));
    for one in &document.scenarios {
        if let Some(complaint) = &one.report.memory_complaint {
            outln!("\n{}: {complaint}", one.report.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_listed() {
        let of = |set: &[&str]| {
            let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
            flat(&Scenario::preset("deepseek-v3-h800-2048", &set).unwrap()).unwrap()
        };
        let found = differences(&[of(&[]), of(&["training.seq_len=8192", "comm_sms=24"])]);
        let keys: Vec<&str> = found.keys().map(String::as_str).collect();
        assert_eq!(keys, ["comm_sms", "training.seq_len"]);
        assert_eq!(found["comm_sms"], [Value::from(20), Value::from(24)]);
    }
}
