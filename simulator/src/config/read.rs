//! Reads scenario TOML: presets merged with overrides, and errors that point at the line.

use fathom_config::layered::{Source, merge};
use fathom_config::{KeyError, ModelConfig, unknown_name};
use toml::{Table, Value};

use super::{STACKS, Scenario, limits};
use crate::error::SimError;
use crate::hardware as presets;

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

/// Keys of `[model]`, `[model.moe]` and `[model.attention]` as version 0.1 called them.
const FORMER: &[(&str, &str)] = &[
    ("hidden", "hidden_size"),
    ("intermediate", "intermediate_size"),
    ("moe_intermediate", "intermediate_size"),
    ("n_activated_experts", "top_k"),
    ("n_dense_layers", "first_dense"),
    ("n_expert_groups", "n_group"),
    ("n_heads", "heads"),
    ("n_kv_heads", "kv_heads"),
    ("n_layers", "layers"),
    ("n_limited_groups", "topk_group"),
    ("n_mtp_layers", "mtp_depth"),
    ("tied_embeddings", "tie_word_embeddings"),
];

/// Text of the embedded scenario `name`.
pub(super) fn scenario_text(name: &str) -> Result<&'static str, SimError> {
    let found = SCENARIOS.iter().find(|(n, _)| *n == name).map(|(_, text)| *text);
    found.ok_or_else(|| {
        let names: Vec<&str> = SCENARIOS.iter().map(|(n, _)| *n).collect();
        SimError::input("--preset", unknown_name(name, &names))
    })
}

/// Reads, merges and checks the scenario of `source`.
pub(super) fn scenario(source: &Source<'_>) -> Result<Scenario, SimError> {
    let table = resolve(source, source.table()?)?;
    let missing = missing(&table);
    let read: Result<Scenario, KeyError> = source.deserialize(table);
    let mut scenario = match (read, missing.split_first()) {
        // All at once, not one after every correction.
        (Err(e), Some((first, others))) if e.to_string().contains("missing field") => {
            let field = first.rsplit('.').next().unwrap_or(first);
            let also = match others {
                [] => String::new(),
                _ => format!(", nor are {}", others.join(", ")),
            };
            let message = format!(
                "missing field `{field}`: it is not given{also}, and no preset = \"...\" names what to \
                 start from"
            );
            return Err(source.wrong(first, message).into());
        }
        (read, _) => read?,
    };
    if let Some((key, message)) = limits::first_outside(&scenario) {
        return Err(source.wrong(key, message).into());
    }
    if let Some((key, expected, found)) = scenario.model.refusal() {
        let message = format!("expected {expected}, found {found}");
        return Err(source.wrong(&format!("model.{key}"), message).into());
    }
    if let (Some(trace), Some(folder)) = (&mut scenario.expert_load.trace, &source.folder) {
        // Files that a scenario names lie beside it.
        let path = folder.join(&*trace);
        *trace = path.display().to_string();
        if !path.is_file() {
            let message = format!("no such file: {trace}");
            return Err(source.wrong("expert_load.trace", message).into());
        }
    }
    Ok(scenario)
}

/// Keys without a default.
const REQUIRED: [&str; 11] = [
    "name",
    "schedule",
    "model",
    "cluster",
    "parallel",
    "training",
    "training.seq_len",
    "training.micro_batch",
    "training.global_batch",
    "training.precision",
    "training.recompute",
];

/// The required keys that `table` has not; those of a table that is missing itself not counted.
fn missing(table: &Table) -> Vec<&'static str> {
    let has = |key: &&str| match key.split_once('.') {
        None => table.contains_key(*key),
        Some((outer, inner)) => {
            table.get(outer).and_then(Value::as_table).is_none_or(|t| t.contains_key(inner))
        }
    };
    REQUIRED.into_iter().filter(|key| !has(key)).collect()
}

/// Puts presets under the table's own keys.
fn resolve(source: &Source<'_>, mut table: Table) -> Result<Table, KeyError> {
    if let Some(Value::Table(model)) = table.get_mut("model") {
        rename(model);
    }
    if let Some(name) = source.take_string(&mut table, "preset", "preset")? {
        table = merge(preset_table(source, SCENARIOS, "preset", &name)?, table);
    }
    if let Some(Value::Table(model)) = table.remove("model") {
        let model = source.model(model, ModelConfig::shape_from_hf_file)?;
        table.insert("model".into(), Value::Table(model));
    }
    if let Some(Value::Table(mut stack)) = table.remove("stack") {
        if let Some(name) = source.take_string(&mut stack, "preset", "stack.preset")? {
            stack = merge(preset_table(source, STACKS, "stack.preset", &name)?, stack);
        }
        table.insert("stack".into(), Value::Table(stack));
    }
    if let Some(Value::Table(cluster)) = table.remove("cluster") {
        table.insert("cluster".into(), Value::Table(resolve_cluster(source, cluster)?));
    }
    Ok(table)
}

/// Gives former keys their present names.
fn rename(table: &mut Table) {
    for (former, now) in FORMER {
        if let Some(value) = table.remove(*former) {
            table.insert((*now).to_owned(), value);
        }
    }
    for part in ["moe", "attention"] {
        if let Some(Value::Table(inner)) = table.get_mut(part) {
            rename(inner);
        }
    }
}

/// Puts presets under the keys of a cluster and its GPU.
pub(crate) fn resolve_cluster(source: &Source<'_>, mut cluster: Table) -> Result<Table, KeyError> {
    if let Some(name) = source.take_string(&mut cluster, "preset", "cluster.preset")? {
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
        Some(Value::String(name)) => {
            preset_table(source, fathom_config::presets::GPUS, "cluster.gpu", &name)?
        }
        Some(Value::Table(mut gpu)) => {
            match source.take_string(&mut gpu, "preset", "cluster.gpu.preset")? {
                Some(name) => merge(
                    preset_table(
                        source,
                        fathom_config::presets::GPUS,
                        "cluster.gpu.preset",
                        &name,
                    )?,
                    gpu,
                ),
                None => gpu,
            }
        }
        Some(other) => {
            let message =
                format!("expected a GPU preset's name or a table, found {}", other.type_str());
            return Err(source.wrong("cluster.gpu", message));
        }
        None => return Ok(cluster),
    };
    cluster.insert("gpu".into(), Value::Table(gpu));
    Ok(cluster)
}

/// The table of preset `name`, or an error at `key` that lists what there is.
pub(crate) fn preset_table(
    source: &Source<'_>,
    all: &[(&str, &'static str)],
    key: &str,
    name: &str,
) -> Result<Table, KeyError> {
    let known: Vec<&str> = all.iter().map(|(n, _)| *n).collect();
    match all.iter().find(|(n, _)| *n == name) {
        Some((_, text)) => Ok(text.parse().expect("embedded presets are TOML")),
        None => Err(source.wrong(key, unknown_name(name, &known))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Scenario, SimError> {
        Scenario::from_toml("run.toml", text, None, &[])
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
    fn missing_keys_are_told_all_at_once_and_some_have_defaults() {
        let e = read("name = \"x\"\n[training]\nseq_len = 1\n").unwrap_err().to_string();
        for key in ["schedule", "model", "cluster", "parallel", "training.global_batch"] {
            assert!(e.contains(key), "{e}");
        }
        assert!(!e.contains("training.seq_len") && !e.contains("total_tokens"), "{e}");
        let text = "name = \"x\"\nschedule = \"1f1b\"\n[model]\npreset = \"llama-3.1-70b\"\n\
                    [cluster]\npreset = \"h100-16384\"\n[parallel]\n[training]\nseq_len = 8\n\
                    micro_batch = 1\nglobal_batch = 1\nprecision = \"bf16\"\nrecompute = \"none\"\n";
        let s = read(text).unwrap();
        assert_eq!((s.comm_sms, s.training.total_tokens), (20, 1e12));
        let e = read(&text.replace("seq_len", "seqlen")).unwrap_err().to_string();
        assert!(e.contains("unknown field `seqlen`"), "{e}");
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
}
