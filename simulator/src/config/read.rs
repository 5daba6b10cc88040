//! Reads scenario TOML: presets merged with overrides, and errors that point at the line.

use std::path::Path;

use toml::{Table, Value};

use super::{Scenario, limits};
use crate::error::{SimError, read_text};
use crate::hardware as presets;
use crate::hardware::model::Model;

macro_rules! scenarios {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../presets/scenarios/", $name, ".toml")))),*]
    };
}

/// The embedded scenarios: `(name, TOML)`.
pub const SCENARIOS: &[(&str, &str)] = scenarios!(
    "deepseek-v3-h800-2048",
    "deepseek-v3-h100-2048",
    "deepseek-v3-h200-2048",
    "deepseek-v3-b200-2048",
    "deepseek-v3-gb200-nvl72-1152",
    "llama-3.1-405b-h100-16384",
    "qwen2.5-72b-a100-2048",
    "llama-3.1-70b-mi300x-1024",
);

/// Where a scenario's text comes from.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// Name for messages.
    pub file: &'a str,
    /// TOML.
    pub text: &'a str,
    /// Folder that relative paths in the text start from; `None` refuses them.
    pub folder: Option<&'a Path>,
}

/// Text of the embedded scenario `name`.
pub(super) fn scenario_text(name: &str) -> Result<&'static str, SimError> {
    let found = SCENARIOS.iter().find(|(n, _)| *n == name).map(|(_, text)| *text);
    found.ok_or_else(|| {
        let names: Vec<&str> = SCENARIOS.iter().map(|(n, _)| *n).collect();
        SimError::input("--preset", unknown_name(name, &names))
    })
}

/// Reads, merges and checks the scenario of `source`.
pub(super) fn scenario(source: &Source<'_>, set: &[String]) -> Result<Scenario, SimError> {
    let mut table: Table = source.text.parse().map_err(|e: toml::de::Error| {
        let line = e.span().map_or(1, |s| line_of(source.text, s.start));
        config_error(source, line, "TOML", e.message())
    })?;
    for assignment in set {
        apply(&mut table, assignment)?;
    }
    let table = resolve(source, table)?;
    let read = serde_path_to_error::deserialize(Value::Table(table));
    let mut scenario: Scenario = read.map_err(|e| {
        let path = e.path().to_string();
        let message = e.inner().message().trim().to_owned();
        blame(source, set, &offending_key(&path, &message), &explain(&message))
    })?;
    if let Some((key, message)) = limits::first_outside(&scenario) {
        return Err(blame(source, set, key, &message));
    }
    if let (Some(trace), Some(folder)) = (&mut scenario.expert_load.trace, source.folder) {
        // Files that a scenario names lie beside it.
        let path = folder.join(&*trace);
        *trace = path.display().to_string();
        if !path.is_file() {
            let (key, message) = ("expert_load.trace", format!("no such file: {trace}"));
            return Err(config_error(source, line_of_key(source.text, key), key, &message));
        }
    }
    Ok(scenario)
}

/// What is wrong with `key`: at the override that sets it, else at its line of the file.
fn blame(source: &Source<'_>, set: &[String], key: &str, message: &str) -> SimError {
    let sets = |a: &&String| a.split_once('=').is_some_and(|(k, _)| k.trim() == key);
    match set.iter().rev().find(sets) {
        Some(assignment) => {
            SimError::input(format!("--set {assignment}"), format!("{key}: {message}"))
        }
        None => config_error(source, line_of_key(source.text, key), key, message),
    }
}

fn config_error(source: &Source<'_>, line: usize, key: &str, message: &str) -> SimError {
    SimError::Config { file: source.file.into(), line, key: key.into(), message: message.into() }
}

/// Puts presets under the table's own keys.
fn resolve(source: &Source<'_>, mut table: Table) -> Result<Table, SimError> {
    if let Some(name) = take_string(source, &mut table, "preset", "preset")? {
        let known: Vec<&str> = SCENARIOS.iter().map(|(n, _)| *n).collect();
        let Some((_, text)) = SCENARIOS.iter().find(|(n, _)| *n == name) else {
            let line = line_of_key(source.text, "preset");
            return Err(config_error(source, line, "preset", &unknown_name(&name, &known)));
        };
        let base: Table = text.parse().expect("embedded scenarios are TOML");
        table = merge(base, table);
    }
    if let Some(Value::Table(model)) = table.remove("model") {
        table.insert("model".into(), Value::Table(resolve_model(source, model)?));
    }
    if let Some(Value::Table(cluster)) = table.remove("cluster") {
        table.insert("cluster".into(), Value::Table(resolve_cluster(source, cluster)?));
    }
    Ok(table)
}

fn resolve_model(source: &Source<'_>, mut model: Table) -> Result<Table, SimError> {
    if let Some(name) = take_string(source, &mut model, "preset", "model.preset")? {
        let base = preset_table(source, presets::MODELS, "model.preset", &name)?;
        model = merge(base, model);
    }
    if let Some(file) = take_string(source, &mut model, "file", "model.file")? {
        let refuse = |message: &str| {
            config_error(source, line_of_key(source.text, "model.file"), "model.file", message)
        };
        let folder = source.folder.ok_or_else(|| refuse("a preset cannot refer to files"))?;
        let path = folder.join(&file);
        let text = read_text(&path).map_err(|e| refuse(&format!("cannot read: {e}")))?;
        let read = Model::from_hf_config(&file, &text).map_err(|e| refuse(&e.to_string()))?;
        let base = Table::try_from(read).expect("a model is a table");
        model = merge(base, model);
    }
    Ok(model)
}

fn resolve_cluster(source: &Source<'_>, mut cluster: Table) -> Result<Table, SimError> {
    if let Some(name) = take_string(source, &mut cluster, "preset", "cluster.preset")? {
        let base = preset_table(source, presets::CLUSTERS, "cluster.preset", &name)?;
        // `gpu = "h800"` of the preset gives way to a table's overrides, not the other way round.
        let named = base.get("gpu").and_then(Value::as_str).map(str::to_owned);
        if let (Some(Value::Table(gpu)), Some(named)) = (cluster.get_mut("gpu"), named)
            && !gpu.contains_key("preset")
        {
            gpu.insert("preset".into(), Value::String(named));
        }
        cluster = merge(base, cluster);
    }
    let gpu = match cluster.remove("gpu") {
        Some(Value::String(name)) => preset_table(source, presets::GPUS, "cluster.gpu", &name)?,
        Some(Value::Table(mut gpu)) => {
            match take_string(source, &mut gpu, "preset", "cluster.gpu.preset")? {
                Some(name) => {
                    merge(preset_table(source, presets::GPUS, "cluster.gpu.preset", &name)?, gpu)
                }
                None => gpu,
            }
        }
        Some(other) => {
            let message =
                format!("expected a GPU preset's name or a table, found {}", other.type_str());
            let line = line_of_key(source.text, "cluster.gpu");
            return Err(config_error(source, line, "cluster.gpu", &message));
        }
        None => return Ok(cluster),
    };
    cluster.insert("gpu".into(), Value::Table(gpu));
    Ok(cluster)
}

fn preset_table(
    source: &Source<'_>,
    all: &[(&str, &'static str)],
    key: &str,
    name: &str,
) -> Result<Table, SimError> {
    let known: Vec<&str> = all.iter().map(|(n, _)| *n).collect();
    match all.iter().find(|(n, _)| *n == name) {
        Some((_, text)) => Ok(text.parse().expect("embedded presets are TOML")),
        None => {
            let line = line_of_key(source.text, key);
            Err(config_error(source, line, key, &unknown_name(name, &known)))
        }
    }
}

fn take_string(
    source: &Source<'_>,
    table: &mut Table,
    key: &str,
    path: &str,
) -> Result<Option<String>, SimError> {
    match table.remove(key) {
        None => Ok(None),
        Some(Value::String(s)) => Ok(Some(s)),
        Some(other) => {
            let message = format!("expected a string, found {}", other.type_str());
            Err(config_error(source, line_of_key(source.text, path), path, &message))
        }
    }
}

/// `over`'s keys on top of `base`, table by table.
fn merge(mut base: Table, over: Table) -> Table {
    for (key, value) in over {
        match (base.remove(&key), value) {
            (Some(Value::Table(b)), Value::Table(o)) if !replaces(&b, &o) => {
                base.insert(key, Value::Table(merge(b, o)));
            }
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
    base
}

/// A table that names its own kind or preset starts anew instead of inheriting the other kind's
/// keys.
fn replaces(base: &Table, over: &Table) -> bool {
    over.contains_key("preset")
        || over.contains_key("file")
        || (over.contains_key("kind") && over.get("kind") != base.get("kind"))
}

/// Applies `--set a.b.c=value`; the value is TOML, or a string where it is not.
fn apply(table: &mut Table, assignment: &str) -> Result<(), SimError> {
    let refuse = |m: &str| SimError::input(format!("--set {assignment}"), m);
    let (path, text) =
        assignment.split_once('=').ok_or_else(|| refuse("expected KEY.PATH=VALUE"))?;
    let parsed: Result<Table, _> = format!("v = {text}").parse();
    let value = match parsed {
        Ok(mut t) if t.len() == 1 => t.remove("v").expect("the only key"),
        _ => Value::String(text.trim().to_owned()),
    };
    let keys: Vec<&str> = path.trim().split('.').collect();
    if keys.iter().any(|k| k.is_empty()) {
        return Err(refuse("expected KEY.PATH=VALUE"));
    }
    let (last, parents) = keys.split_last().expect("split gives at least one");
    let mut at = table;
    for key in parents {
        let next = at.entry(*key).or_insert_with(|| Value::Table(Table::new()));
        if let Value::String(name) = next {
            *next = Value::Table(Table::from_iter([(
                "preset".to_owned(),
                Value::String(name.clone()),
            )]));
        }
        at = next.as_table_mut().ok_or_else(|| refuse(&format!("{key} is not a table")))?;
    }
    at.insert((*last).to_owned(), value);
    Ok(())
}

/// Line, from 1, of a byte offset.
fn line_of(text: &str, offset: usize) -> usize {
    1 + text.as_bytes()[..offset.min(text.len())].iter().filter(|&&b| b == b'\n').count()
}

/// Line on which the dotted `key` is set, else that of its table's header, else 1.
pub(super) fn line_of_key(text: &str, key: &str) -> usize {
    let parts: Vec<&str> = key.split('.').collect();
    let mut header: Vec<String> = Vec::new();
    let mut best = (0, 1);
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if let Some(inner) = line.strip_prefix('[') {
            let inner = inner.trim_start_matches('[').split(']').next().unwrap_or("");
            header = inner.split('.').map(|k| k.trim().trim_matches('"').to_owned()).collect();
            let depth = common(&header, &parts);
            if depth == header.len() && depth > best.0 {
                best = (depth, number + 1);
            }
        } else if let Some((left, _)) = line.split_once('=')
            && !line.starts_with('#')
        {
            let keys = left.split('.').map(|k| k.trim().trim_matches('"').to_owned());
            let full: Vec<String> = header.iter().cloned().chain(keys).collect();
            let depth = common(&full, &parts);
            if depth == full.len() && depth > best.0 {
                best = (depth, number + 1);
            }
        }
    }
    best.1
}

fn common(a: &[String], b: &[&str]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == *y).count()
}

/// The dotted key that serde's error is about: for unknown fields the field itself.
fn offending_key(path: &str, message: &str) -> String {
    let path = if path == "." { "" } else { path };
    let unknown = message.strip_prefix("unknown field `").and_then(|m| m.split('`').next());
    let missing = message.strip_prefix("missing field `").and_then(|m| m.split('`').next());
    match unknown.or(missing) {
        Some(field) if path.is_empty() => field.to_owned(),
        Some(field) if path.rsplit('.').next() != Some(field) => format!("{path}.{field}"),
        _ => path.to_owned(),
    }
}

/// Serde's message, with the nearest allowed name where it lists names.
fn explain(message: &str) -> String {
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let lists = message.contains("expected one of") || message.contains(", expected `");
    match quoted.split_first() {
        Some((found, allowed)) if lists => match nearest(found, allowed) {
            Some(name) => format!("{message}; did you mean `{name}`?"),
            None => message.to_owned(),
        },
        _ if message.starts_with("missing field") => format!(
            "{message}: it has to be given, unless preset = \"...\" names what to start from"
        ),
        _ => message
            .replace("expected u64", "expected a whole number, 0 or more")
            .replace("expected f64", "expected a number"),
    }
}

/// What there is instead of `name`, and the nearest.
pub(crate) fn unknown_name(name: &str, known: &[&str]) -> String {
    let hint = nearest(name, known).map_or(String::new(), |n| format!("; did you mean '{n}'?"));
    format!("unknown name '{name}', there are {}{hint}", known.join(", "))
}

/// The name with the smallest edit distance, if it is near enough to be meant.
pub(crate) fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    // Of names at the same distance the one that begins alike is meant.
    let alike = |k: &str| name.bytes().zip(k.bytes()).take_while(|(a, b)| a == b).count();
    let distances = known.iter().map(|k| (strsim::levenshtein(name, k), *k));
    let best = distances.min_by_key(|(d, k)| (*d, usize::MAX - alike(k)))?;
    if best.0 <= 1 + name.len() / 3 {
        return Some(best.1);
    }
    // The beginning of a longer name, most often without its unit.
    let longer = known.iter().filter(|k| name.len() >= 3 && k.starts_with(name));
    longer.min_by_key(|k| k.len()).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Scenario, SimError> {
        scenario(&Source { file: "run.toml", text, folder: None }, &[])
    }

    #[test]
    fn every_embedded_scenario_reads() {
        for (name, _) in SCENARIOS {
            let s = Scenario::preset(name, &[]).unwrap_or_else(|e| panic!("{e}"));
            assert!(s.micro_batches() > 0, "{name}");
        }
    }

    #[test]
    fn a_misspelt_key_names_file_line_and_nearest() {
        let text = "preset = \"deepseek-v3-h800-2048\"\n\n[parallel]\npp = 16\nepp = 64\n";
        let e = read(text).unwrap_err().to_string();
        assert!(e.starts_with("run.toml:5: parallel.epp: unknown field `epp`"), "{e}");
        assert!(e.contains("did you mean `ep`?"), "{e}");
    }

    #[test]
    fn a_wrong_type_or_value_names_its_line() {
        let e = read("preset = \"deepseek-v3-h800-2048\"\n[training]\nseq_len = \"long\"\n")
            .unwrap_err();
        assert!(
            e.to_string().starts_with("run.toml:3: training.seq_len: invalid type: string"),
            "{e}"
        );
        let e = read("preset = \"deepseek-v3-h800-2048\"\nschedule = \"dualpip\"\n").unwrap_err();
        assert!(
            e.to_string().starts_with("run.toml:2: schedule: unknown variant `dualpip`"),
            "{e}"
        );
        assert!(e.to_string().contains("did you mean `dualpipe`?"), "{e}");
        let e = read("schedule = = 3\n").unwrap_err().to_string();
        assert!(e.starts_with("run.toml:1: TOML:"), "{e}");
        let e = read("preset = \"deepseek-v3-h80-2048\"\n").unwrap_err().to_string();
        assert!(
            e.starts_with("run.toml:1: preset: unknown name") && e.contains("h800-2048'?"),
            "{e}"
        );
    }

    #[test]
    fn messages_lead_to_the_remedy() {
        let preset = "preset = \"deepseek-v3-h800-2048\"\n";
        for (text, part) in [
            ("[cluster.gpu]\nmemory = 3\n", "did you mean `memory_bytes`?"),
            ("[training]\nseq_len = -5\n", "expected a whole number, 0 or more"),
            ("[cluster.network]\nnic_bytes = 1\n", "did you mean `nic_bytes_per_s`?"),
        ] {
            let e = read(&format!("{preset}{text}")).unwrap_err().to_string();
            assert!(e.starts_with("run.toml:3: ") && e.contains(part), "{e}");
        }
        let e = read("[model]\npreset = \"deepseek-v3\"\n").unwrap_err().to_string();
        assert!(e.contains("missing field") && e.contains("preset = "), "{e}");
        let set = ["parallel.ppp=3".to_owned()];
        let e = Scenario::preset("deepseek-v3-h800-2048", &set).unwrap_err().to_string();
        assert!(e.starts_with("--set parallel.ppp=3: ") && e.contains("did you mean `pp`?"), "{e}");
    }

    #[test]
    fn overrides_reach_every_table() {
        let set = ["parallel.dp=256", "cluster.gpus=4096", "cluster.gpu.memory_bytes=141000000000"];
        let set: Vec<String> = set.map(String::from).to_vec();
        let s = Scenario::preset("deepseek-v3-h800-2048", &set).unwrap();
        assert_eq!(
            (s.parallel.dp, s.cluster.gpus, s.cluster.gpu.memory_bytes),
            (256, 4096, 141_000_000_000)
        );
        assert_eq!(s.cluster.gpu.sms, 132, "the rest of the GPU is the preset's");
        let text = "preset = \"deepseek-v3-h800-2048\"\n[cluster]\npreset = \"h200-2048\"\n";
        assert!(read(text).unwrap().cluster.gpu.name.contains("H200"));
    }

    #[test]
    fn a_key_is_found_under_its_header_or_dotted() {
        let text = "a = 1\n[x]\nb = 2\n[x.y]\nc = 3\n";
        assert_eq!(line_of_key(text, "x.b"), 3);
        assert_eq!(line_of_key(text, "x.y.c"), 5);
        assert_eq!(line_of_key(text, "x.y.d"), 4);
        assert_eq!(line_of_key("x.y.c = 3\n", "x.y.c"), 1);
    }

    #[test]
    fn distances_are_levenshtein() {
        assert_eq!(nearest("dualpip", &["dualpipe", "gpipe"]), Some("dualpipe"));
        assert_eq!(nearest("zzzzzz", &["dualpipe", "gpipe"]), None);
    }
}
