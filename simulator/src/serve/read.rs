//! Reads a serving scenario's TOML: presets merged with overrides, every number checked against
//! what it may be.

use std::path::Path;

use fathom_config::layered::{Setting, Source, merge};
use fathom_config::{KeyError, ModelConfig};
use toml::{Table, Value};

use super::config::{Length, Pool, ServeScenario};
use crate::config::Precision;
use crate::config::read::{preset_table, resolve_cluster};
use crate::error::{SimError, read_text};

macro_rules! presets {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../presets/serving/", $name, ".toml")))),*]
    };
}

/// The embedded serving scenarios: `(name, TOML)`.
pub const SERVING: &[(&str, &str)] = presets!(
    "deepseek-v3-decode-h800-320",
    "deepseek-v3-prefill-h800-32",
    "deepseek-v3-online-h800",
    "deepseek-v3-sglang-h100-96",
    "llama-3.1-70b-unified-h100-8",
);

/// Whether a file of this text asks for serving: it has a pool, or starts from a preset that does.
pub fn asks_for_serving(text: &str) -> bool {
    let Ok(table) = text.parse::<Table>() else { return false };
    let preset = table.get("preset").and_then(Value::as_str);
    ["prefill", "decode", "unified"].iter().any(|pool| table.contains_key(*pool))
        || preset.is_some_and(|name| SERVING.iter().any(|(known, _)| *known == name))
}

impl ServeScenario {
    /// Reads a scenario file; `set` are overrides `key.path=value` that win over the file.
    ///
    /// # Errors
    /// [`SimError`] naming file, line and key, or the override.
    pub fn read(path: &Path, set: &[String]) -> Result<Self, SimError> {
        let text = read_text(path)?;
        let folder = path.parent().unwrap_or(Path::new("."));
        ServeScenario::from_toml(&path.display().to_string(), &text, Some(folder), set)
    }

    /// The embedded scenario `name` of [`SERVING`].
    ///
    /// # Errors
    /// As [`ServeScenario::read`].
    pub fn preset(name: &str, set: &[String]) -> Result<Self, SimError> {
        let text = crate::hardware::preset_text(SERVING, "serving", name)?;
        ServeScenario::from_toml(&format!("preset {name}"), text, None, set)
    }

    /// A scenario from text, which errors call `name`; files that it names lie in `folder`.
    ///
    /// # Errors
    /// As [`ServeScenario::read`].
    pub fn from_toml(
        name: &str,
        text: &str,
        folder: Option<&Path>,
        set: &[String],
    ) -> Result<Self, SimError> {
        let set: Vec<Setting> = set.iter().map(|assignment| Setting::set(assignment)).collect();
        let (name, folder) = (name.to_owned(), folder.map(Path::to_owned));
        let source = Source { name, text, lines: true, folder, set: &set };
        let table = resolve(&source, source.table()?)?;
        let mut scenario: ServeScenario = source.deserialize(table)?;
        if let Some((key, message)) = wrong(&scenario) {
            return Err(source.wrong(&key, message).into());
        }
        if let Some((key, expected, found)) = scenario.model.refusal() {
            let message = format!("expected {expected}, found {found}");
            return Err(source.wrong(&format!("model.{key}"), message).into());
        }
        if let Some(trace) = &mut scenario.workload.trace {
            let Some(folder) = &source.folder else {
                return Err(source.wrong("workload.trace", "a preset names no files").into());
            };
            *trace = folder.join(&*trace).display().to_string();
            if !Path::new(trace).is_file() {
                return Err(source
                    .wrong("workload.trace", format!("no such file: {trace}"))
                    .into());
            }
        }
        Ok(scenario)
    }
}

/// The keys that say how requests arrive, of which one takes the place of another.
const WAYS: [&str; 3] = ["rate_per_s", "concurrency", "trace"];

/// Removes all ways of arriving but `kept`.
fn forget_ways(table: &mut Table, kept: &[&str]) {
    if let Some(Value::Table(workload)) = table.get_mut("workload") {
        WAYS.iter().filter(|way| !kept.contains(way)).for_each(|way| drop(workload.remove(*way)));
    }
}

/// Puts presets under the table's own keys.
fn resolve(source: &Source<'_>, mut table: Table) -> Result<Table, KeyError> {
    let set = |way: &&str| {
        let key = format!("workload.{way}=");
        source.set.iter().any(|s| s.assignment.replace(' ', "").starts_with(&key))
    };
    let by_flag: Vec<&str> = WAYS.into_iter().filter(set).collect();
    if !by_flag.is_empty() {
        forget_ways(&mut table, &by_flag);
    }
    if let Some(name) = source.take_string(&mut table, "preset", "preset")? {
        let mut base = preset_table(source, SERVING, "preset", &name)?;
        let own = table.get("workload").and_then(Value::as_table);
        if own.is_some_and(|own| WAYS.iter().any(|way| own.contains_key(*way))) {
            forget_ways(&mut base, &[]);
        }
        table = merge(base, table);
    }
    if let Some(Value::Table(model)) = table.remove("model") {
        let model = source.model(model, ModelConfig::shape_from_hf_file)?;
        table.insert("model".into(), Value::Table(model));
    }
    if let Some(Value::Table(cluster)) = table.remove("cluster") {
        table.insert("cluster".into(), Value::Table(resolve_cluster(source, cluster)?));
    }
    Ok(table)
}

/// A number by key: value, least, most.
type Limit = (String, f64, f64, f64);

/// The first key that says something impossible, and what is wrong.
fn wrong(s: &ServeScenario) -> Option<(String, String)> {
    let mut limits = Vec::new();
    let pools = [("prefill", &s.prefill), ("decode", &s.decode), ("unified", &s.unified)];
    for (name, pool) in pools {
        limits.extend(pool.iter().flat_map(|p| of_pool(name, p)));
    }
    limits.extend(of_run(s));
    let outside = |(_, value, least, most): &&Limit| !(*least..=*most).contains(value);
    if let Some((key, value, least, most)) = limits.iter().find(outside) {
        return Some((key.clone(), format!("expected {least} to {most}, found {value}")));
    }
    let cluster = crate::config::limits::machine(&s.cluster);
    if let Some((key, message)) = cluster {
        return Some((key.to_owned(), message));
    }
    let error = |key: &str, message: &str| Some((key.to_owned(), message.to_owned()));
    match (&s.prefill, &s.decode, &s.unified) {
        (None, None, None) => {
            return error("decode", "expected a pool: prefill, decode, or unified");
        }
        (None, None, Some(_)) | (_, _, None) => {}
        _ => return error("unified", "expected this pool alone, or prefill and decode"),
    }
    let gpus: u64 = pools.iter().filter_map(|(_, p)| p.as_ref()).map(|p| p.gpus * p.units).sum();
    if gpus > s.cluster.gpus {
        let message =
            format!("expected at least the {gpus} of the pools, found {}", s.cluster.gpus);
        return Some(("cluster.gpus".into(), message));
    }
    let w = &s.workload;
    let ways = [w.rate_per_s.is_some(), w.concurrency.is_some(), w.trace.is_some()];
    if ways.iter().filter(|way| **way).count() != 1 {
        return error("workload", "expected one of rate_per_s, concurrency and trace");
    }
    if w.trace.is_none() && w.prompt.is_none() {
        return error("workload.prompt", "expected prompt = { mean = TOKENS }");
    }
    if w.trace.is_none() && w.output.is_none() {
        return error("workload.output", "expected output = { mean = TOKENS }");
    }
    if !matches!(s.precision, Precision::Fp8 | Precision::Bf16) {
        return error(
            "precision",
            "expected fp8 or bf16: other formats have no kernels of serving",
        );
    }
    if s.mtp.drafts > 0 && s.model.mtp_depth == 0 {
        return error("mtp.drafts", "the model has no prediction module: expected 0");
    }
    if s.warmup_s >= s.duration_s {
        return error("warmup_s", "expected less than duration_s");
    }
    None
}

fn of_pool(name: &str, p: &Pool) -> Vec<Limit> {
    let mut sizes = vec![
        ("gpus", p.gpus, 1, 1 << 16),
        ("units", p.units, 1, 1 << 12),
        ("tp", p.tp, 1, 1 << 12),
        ("micro_batches", p.micro_batches, 1, 2),
        ("comm_sms", p.comm_sms, 2, 1 << 10),
        ("max_batch", p.max_batch, 1, 1 << 14),
        ("chunk_tokens", p.chunk_tokens, 1, 1 << 18),
    ];
    sizes.extend(p.ep.map(|ep| ("ep", ep, 1, 1 << 16)));
    sizes.extend(p.expert_slots.map(|slots| ("expert_slots", slots, 1, 1 << 12)));
    let limit = |(key, value, least, most): (&str, u64, u64, u64)| {
        (format!("{name}.{key}"), value as f64, least as f64, most as f64)
    };
    let mut limits: Vec<Limit> = sizes.into_iter().map(limit).collect();
    limits.push((format!("{name}.host_s"), p.host_s, 0.0, 10.0));
    limits
}

fn of_run(s: &ServeScenario) -> Vec<Limit> {
    let (e, c, m, w) = (&s.experts, &s.prefix_cache, &s.memory, &s.workload);
    let mut limits = vec![
        ("duration_s", s.duration_s, 1e-3, 1e6),
        ("warmup_s", s.warmup_s, 0.0, 1e6),
        ("experts.popularity", e.popularity, 0.0, 4.0),
        ("experts.drift", e.drift, 0.0, 1.0),
        ("experts.run_tokens", e.run_tokens, 1.0, 1e6),
        ("experts.interval_s", e.interval_s, 1.0, 1e7),
        ("prefix_cache.hit_rate", c.hit_rate, 0.0, 0.999),
        ("prefix_cache.capacity_tokens", c.capacity_tokens as f64, 0.0, 1e13),
        ("prefix_cache.load_bytes_per_s", c.load_bytes_per_s, 0.0, 1e15),
        ("mtp.drafts", s.mtp.drafts as f64, 0.0, 16.0),
        ("mtp.acceptance", s.mtp.acceptance, 0.0, 1.0),
        ("memory.page_tokens", m.page_tokens as f64, 1.0, 65536.0),
        ("memory.element_bytes", m.element_bytes, 0.25, 8.0),
        ("memory.headroom", m.headroom, 0.0, 0.9),
        ("sla.ttft_s", s.sla.ttft_s, 0.0, 1e6),
        ("sla.tpot_s", s.sla.tpot_s, 0.0, 1e6),
        ("sla.share", s.sla.share, 0.01, 1.0),
        ("workload.rate_per_s", w.rate_per_s.unwrap_or(1.0), 1e-6, 1e6),
        ("workload.concurrency", w.concurrency.unwrap_or(1) as f64, 1.0, 1e7),
        ("workload.trace_speed", w.trace_speed.unwrap_or(1.0), 1e-6, 1e6),
    ];
    let lengths = |name: [&'static str; 3], l: &Option<Length>| {
        let l = l.unwrap_or(Length { mean: 1.0, cv: 0.0, max: 1 });
        [(name[0], l.mean, 1.0, 4e6), (name[1], l.cv, 0.0, 10.0), (name[2], l.max as f64, 1.0, 4e6)]
    };
    let prompt = ["workload.prompt.mean", "workload.prompt.cv", "workload.prompt.max"];
    let output = ["workload.output.mean", "workload.output.cv", "workload.output.max"];
    limits.extend(lengths(prompt, &w.prompt));
    limits.extend(lengths(output, &w.output));
    limits.into_iter().map(|(k, v, a, b)| (k.to_owned(), v, a, b)).collect()
}
