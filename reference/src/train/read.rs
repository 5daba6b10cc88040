//! Reads a run's TOML: presets merged with overrides, and errors that point at the line.
//!
//! TOML has no null. Where a setting's null means 'the whole dimension' (`[recipe.fp8]`), the file
//! says `"all"`; everywhere else a key is left out.

use std::path::{Path, PathBuf};

use fathom_config::layered::{Setting, Source, merge, offence};
use fathom_config::{KeyError, ModelConfig, unknown_name};
use fathom_trace::input;
use serde_json::Value as Json;
use toml::{Table, Value};

use super::config::{TrainConfig, TrainConfigError};
use crate::data::{DataError, Format, SourceConfig};
use crate::precision::{Mode, Recipe};

/// The embedded runs: name and TOML text.
pub const PRESETS: &[(&str, &str)] = &[
    ("tiny", include_str!("../../presets/train/tiny.toml")),
    ("deepseek-v3", include_str!("../../presets/train/deepseek-v3.toml")),
    ("deepseek-v3-32k", include_str!("../../presets/train/deepseek-v3-32k.toml")),
    ("deepseek-v3-128k", include_str!("../../presets/train/deepseek-v3-128k.toml")),
    ("deepseek-v3-sft", include_str!("../../presets/train/deepseek-v3-sft.toml")),
];

impl TrainConfig {
    /// Reads a run's file; each of `set` wins over its key in the file. Paths in the file are
    /// relative to its folder.
    ///
    /// # Errors
    /// [`TrainConfigError`] naming file, line and key.
    pub fn read(path: &Path, set: &[Setting]) -> Result<TrainConfig, TrainConfigError> {
        let io = |source| TrainConfigError::Io { path: path.to_owned(), source };
        let text = input::read_text(path, input::CONFIG_BYTES).map_err(io)?;
        let folder = Some(path.parent().unwrap_or(Path::new("")).to_owned());
        let name = path.display().to_string();
        resolve(&Source { name, text: &text, lines: true, folder, set })
    }

    /// An embedded run, with settings over it.
    ///
    /// # Errors
    /// As [`TrainConfig::read`].
    pub fn preset(name: &str, set: &[Setting]) -> Result<TrainConfig, TrainConfigError> {
        let text = format!("preset = {name:?}\n");
        let (name, folder) = (format!("--preset {name}"), Some(PathBuf::new()));
        resolve(&Source { name, text: &text, lines: false, folder, set })
    }

    /// This configuration with settings over it.
    ///
    /// # Errors
    /// As [`TrainConfig::read`].
    pub fn with(&self, set: &[Setting]) -> Result<TrainConfig, TrainConfigError> {
        let (name, folder) = (format!("run '{}'", self.name), Some(PathBuf::new()));
        resolve(&Source { name, text: &self.to_toml(), lines: false, folder, set })
    }

    /// The dotted keys whose values differ in `other`, each with this and the other value as JSON
    /// (`none` where a key is absent).
    pub fn differences(&self, other: &TrainConfig) -> Vec<(String, String, String)> {
        let [own, other] = [self, other].map(|c| serde_json::to_value(c).expect("plain data"));
        let mut found = Vec::new();
        differences("", Some(&own), Some(&other), &mut found);
        found
    }

    /// This configuration with files (or folders of text) as its data, where any are given.
    ///
    /// # Errors
    /// [`TrainConfigError::Key`] for a path that is no UTF-8.
    pub fn with_files(mut self, files: &[PathBuf]) -> Result<TrainConfig, TrainConfigError> {
        if !files.is_empty() {
            self.data.sources = files.iter().map(|path| file_source(path)).collect();
        }
        utf8_paths(&self)?;
        Ok(self)
    }

    /// This configuration with what is held out, where anything is given: one number, a share of
    /// the documents, or files.
    ///
    /// # Errors
    /// As [`TrainConfig::with_files`].
    pub fn with_validation(mut self, given: &[PathBuf]) -> Result<TrainConfig, TrainConfigError> {
        let share = |path: &PathBuf| path.to_str().and_then(|s| s.parse::<f64>().ok());
        let validation = &mut self.data.validation;
        match given {
            [] => {}
            [one] if share(one).is_some() => {
                validation.share = share(one).expect("just seen");
                validation.sources = Vec::new();
            }
            files => {
                validation.share = 0.0;
                validation.sources = files.iter().map(|path| file_source(path)).collect();
            }
        }
        utf8_paths(&self)?;
        Ok(self)
    }

    /// The configuration, complete, as TOML that [`TrainConfig::read`] reads again.
    pub fn to_toml(&self) -> String {
        let json = serde_json::to_value(self).expect("plain data");
        let value = to_toml(&json).expect("a table");
        let text = toml::to_string(&value).expect("a table of tables");
        format!("preset = {COMPLETE:?}\n{text}")
    }
}

/// The preset of a file that says everything itself.
const COMPLETE: &str = "none";

fn differences(
    key: &str,
    own: Option<&Json>,
    other: Option<&Json>,
    found: &mut Vec<(String, String, String)>,
) {
    match (own, other) {
        (own, other) if own == other => {}
        (Some(Json::Object(own)), Some(Json::Object(other))) => {
            let added = other.keys().filter(|k| !own.contains_key(*k));
            for name in own.keys().chain(added) {
                let inner = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                differences(&inner, own.get(name), other.get(name), found);
            }
        }
        (own, other) => {
            let words = |v: Option<&Json>| v.map_or_else(|| "none".into(), Json::to_string);
            found.push((key.to_owned(), words(own), words(other)));
        }
    }
}

fn resolve(source: &Source<'_>) -> Result<TrainConfig, TrainConfigError> {
    let mut table = source.table()?;
    let base = match table.remove("preset") {
        Some(Value::String(name)) if name == COMPLETE => None,
        Some(Value::String(name)) => Some(preset_text(source, &name)?),
        Some(other) => {
            let message = format!("expected a preset's name, found {}", other.type_str());
            return Err(source.wrong("preset", message).into());
        }
        None => Some(preset_text(source, "tiny")?),
    };
    if let Some(base) = base {
        table = merge(base.parse().expect("embedded presets are TOML"), table);
    }
    let model = table.remove("model").unwrap_or(Value::Table(Table::new()));
    table.insert("model".into(), resolve_model(source, model)?);
    let recipe = table.remove("recipe").unwrap_or(Value::Table(Table::new()));
    let recipe = resolve_recipe(source, recipe)?;
    let mut json = to_json(&Value::Table(table));
    json["recipe"] = recipe;
    // What the layout implies, where it is not said.
    let ranks = |key: &str| json.pointer(&format!("/parallel/{key}")).and_then(Json::as_u64);
    let (ep, cp) = (ranks("ep"), ranks("cp"));
    for (key, implied) in
        [("expert_union", ep.map(|ep| ep / cp.unwrap_or(1).max(1))), ("context_shards", cp)]
    {
        if let (None, Some(implied)) = (json.get(key), implied) {
            json[key] = implied.max(1).into();
        }
    }
    let mut config = deserialize(source, json)?;
    config.check().map_err(|(key, message)| source.wrong(&key, message))?;
    if let Some((key, expected, found)) = config.model.refusal() {
        let message = format!("expected {expected}, found {found}");
        return Err(source.wrong(&format!("model.{key}"), message).into());
    }
    config.data.check().map_err(|e| match e {
        DataError::Setting { key, expected, found } => {
            source.wrong(&format!("data.{key}"), format!("expected {expected}, found {found}"))
        }
        other => source.wrong("data", other.to_string()),
    })?;
    let data = &mut config.data;
    let sources = data.sources.iter_mut().chain(&mut data.validation.sources);
    let paths = sources.filter_map(|s| s.path.as_mut());
    let others = [data.tokenizer.file.as_mut(), config.checkpoint.initial.as_mut()];
    let folder = source.folder.as_deref().unwrap_or(Path::new(""));
    paths.chain(others.into_iter().flatten()).for_each(|p| *p = absolute(folder, p));
    utf8_paths(&config)?;
    Ok(config)
}

/// Refuses paths that a run.toml cannot hold.
fn utf8_paths(config: &TrainConfig) -> Result<(), TrainConfigError> {
    let data = &config.data;
    let sources = data.sources.iter().chain(&data.validation.sources);
    let paths = sources.filter_map(|s| s.path.as_ref()).chain(&data.tokenizer.file);
    match paths.chain(&config.checkpoint.initial).find(|path| path.to_str().is_none()) {
        None => Ok(()),
        Some(path) => Err(TrainConfigError::Key(KeyError {
            place: path.display().to_string(),
            key: "path".into(),
            message: "expected UTF-8, which run.toml keeps it in; found other bytes".into(),
        })),
    }
}

/// The resolved values as a configuration. Keys that are missing are told all at once: each is
/// filled with the preset `tiny`'s value to see what else is missing.
fn deserialize(source: &Source<'_>, mut json: Json) -> Result<TrainConfig, KeyError> {
    let mut missing: Vec<String> = Vec::new();
    loop {
        let e = match serde_path_to_error::deserialize::<_, TrainConfig>(json.clone()) {
            Ok(config) if missing.is_empty() => return Ok(config),
            Ok(_) => {
                let message = format!("missing, as are {}", missing[1..].join(", "));
                let alone = missing.len() == 1;
                let message = if alone { "missing".into() } else { message };
                let message =
                    format!("{message} (preset = {COMPLETE:?}: nothing stands in for them)");
                return Err(source.wrong(&missing[0], message));
            }
            Err(e) => e,
        };
        let (key, message) = offence(&e);
        let pointer = format!("/{}", key.replace('.', "/"));
        let is_missing = message.starts_with("missing field");
        let filling = if is_missing { example().pointer(&pointer).cloned() } else { None };
        match filling {
            Some(value) if !missing.contains(&key) => {
                let parent = pointer.rsplit_once('/').map_or("", |(parent, _)| parent);
                let name = key.rsplit('.').next().expect("split gives at least one");
                let at = json.pointer_mut(parent).and_then(Json::as_object_mut);
                at.expect("serde named the parent").insert(name.to_owned(), value);
                missing.push(key);
            }
            _ => return Err(source.refused(&e)),
        }
    }
}

/// A whole configuration to take single values from.
fn example() -> Json {
    let config = TrainConfig::preset("tiny", &[]).expect("embedded presets are read by a test");
    serde_json::to_value(config).expect("plain data")
}

/// A source of a file's extension; anything else is text.
fn file_source(path: &Path) -> SourceConfig {
    let format = match path.extension().and_then(|e| e.to_str()) {
        Some("jsonl" | "ndjson") => Format::Jsonl,
        Some("parquet") => Format::Parquet,
        _ => Format::Text,
    };
    SourceConfig::new(format, Some(absolute(Path::new(""), path)))
}

/// A path as the file means it: from its own folder. Absolute, so that a resumed run finds it.
fn absolute(folder: &Path, path: &Path) -> PathBuf {
    let path = folder.join(path);
    std::path::absolute(&path).unwrap_or(path)
}

fn preset_text(source: &Source<'_>, name: &str) -> Result<&'static str, KeyError> {
    let found = PRESETS.iter().find(|(n, _)| *n == name).map(|(_, text)| *text);
    let names: Vec<&str> = PRESETS.iter().map(|(n, _)| *n).chain([COMPLETE]).collect();
    found.ok_or_else(|| source.wrong("preset", unknown_name(name, &names)))
}

/// `[model]`: a preset or a `config.json`, with single keys over it, or everything inline.
fn resolve_model(source: &Source<'_>, model: Value) -> Result<Value, KeyError> {
    match model {
        Value::Table(model) => source.model(model, ModelConfig::from_hf_file).map(Value::Table),
        other => {
            Err(source.wrong("model", format!("expected a table, found {}", other.type_str())))
        }
    }
}

/// `[recipe]`: what its mode says, with single keys over it.
fn resolve_recipe(source: &Source<'_>, recipe: Value) -> Result<Json, KeyError> {
    let Value::Table(recipe) = recipe else {
        let message = format!("expected a table, found {}", recipe.type_str());
        return Err(source.wrong("recipe", message));
    };
    let names = Mode::ALL.map(Mode::name);
    let mode = match recipe.get("mode") {
        None => Mode::Fp8,
        Some(Value::String(name)) => Mode::from_name(name)
            .ok_or_else(|| source.wrong("recipe.mode", unknown_name(name, &names)))?,
        Some(other) => {
            let message =
                format!("expected one of {}, found {}", names.join(", "), other.type_str());
            return Err(source.wrong("recipe.mode", message));
        }
    };
    let mut json = serde_json::to_value(Recipe::new(mode)).expect("plain data");
    overlay(&mut json, to_json(&Value::Table(recipe)));
    if let Some(fp8) = json.get_mut("fp8") {
        nulls(fp8);
    }
    Ok(json)
}

/// `"all"` becomes null.
fn nulls(json: &mut Json) {
    match json {
        Json::String(s) if s == "all" => *json = Json::Null,
        Json::Array(items) => items.iter_mut().for_each(nulls),
        Json::Object(items) => items.values_mut().for_each(nulls),
        _ => {}
    }
}

/// `over`'s keys on top of `base`, object by object.
fn overlay(base: &mut Json, over: Json) {
    match (base, over) {
        (Json::Object(base), Json::Object(over)) => {
            for (key, value) in over {
                overlay(base.entry(key).or_insert(Json::Null), value);
            }
        }
        (base, over) => *base = over,
    }
}

fn to_json(value: &Value) -> Json {
    serde_json::to_value(value).expect("TOML has no value that JSON lacks")
}

/// JSON as TOML; nulls in arrays and of the promotion interval become `"all"`, others go.
fn to_toml(json: &Json) -> Option<Value> {
    Some(match json {
        Json::Null => return None,
        Json::Bool(b) => Value::Boolean(*b),
        Json::Number(n) => match n.as_i64() {
            Some(n) => Value::Integer(n),
            None => Value::Float(n.as_f64().expect("a number")),
        },
        Json::String(s) => Value::String(s.clone()),
        Json::Array(items) => {
            let all = || Value::String("all".into());
            Value::Array(items.iter().map(|v| to_toml(v).unwrap_or_else(all)).collect())
        }
        Json::Object(items) => {
            let one = |(key, value): (&String, &Json)| match value {
                Json::Null if key == "promotion_interval" => {
                    Some((key.clone(), Value::String("all".into())))
                }
                value => to_toml(value).map(|value| (key.clone(), value)),
            };
            Value::Table(items.iter().filter_map(one).collect())
        }
    })
}

#[cfg(test)]
mod tests {
    use fathom_numerics::quant::delayed::AmaxAlgorithm;

    use super::*;
    use crate::precision::Delayed;

    fn read(text: &str, set: &[&str]) -> Result<TrainConfig, TrainConfigError> {
        let set: Vec<Setting> = set.iter().map(|s| Setting::set(s)).collect();
        let (name, folder) = ("run.toml".into(), Some(PathBuf::new()));
        resolve(&Source { name, text, lines: true, folder, set: &set })
    }

    fn error(text: &str, set: &[&str]) -> String {
        read(text, set).unwrap_err().to_string()
    }

    #[test]
    fn every_embedded_run_reads_and_survives_its_own_toml() {
        for (name, _) in PRESETS {
            let config = TrainConfig::preset(name, &[]).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(config.with(&[]).unwrap(), config, "{name}");
        }
        let baseline = "[recipe.fp8]\nactivation_block = [\"all\", \"all\"]\n\
            weight_block = [\"all\", \"all\"]\ngradient_block = [\"all\", \"all\"]\n\
            gradient_format = \"e5m2\"\npromotion_interval = \"all\"\n\
            [recipe.fp8.delayed]\nhistory = 8\namax = \"most_recent\"\n";
        let config = read(baseline, &[]).unwrap();
        let fp8 = &config.recipe.fp8;
        assert_eq!((fp8.weight_block, fp8.promotion_interval), ([None, None], None));
        let amax = AmaxAlgorithm::MostRecent;
        assert_eq!(fp8.delayed, Some(Delayed { history: 8, margin: 0, amax }));
        assert_eq!(config.with(&[]).unwrap(), config);
    }

    #[test]
    fn what_a_mode_says_gives_way_to_single_keys() {
        let config = read("[recipe]\nmode = \"fp32\"\nrecompute_norms = true\n", &[]).unwrap();
        assert_eq!(config.recipe, Recipe { recompute_norms: true, ..Recipe::new(Mode::Fp32) });
        let bf16 = config.with(&[Setting::set("recipe.mode=\"bf16\"")]).unwrap();
        assert_eq!(bf16.recipe.mode, Mode::Bf16);
        let config =
            read("[model]\npreset = \"small\"\nlayers = 3\n", &["optim.clip=0.5"]).unwrap();
        assert_eq!((config.model.layers, config.model.heads, config.optim.clip), (3, 4, 0.5));
        let block = ["recipe.fp8.gradient_block=[128,128]"];
        assert_eq!(read("", &block).unwrap().recipe.fp8.gradient_block, [Some(128), Some(128)]);
    }

    #[test]
    fn errors_name_file_line_key_and_the_nearest_name() {
        let e = error("steps = 5\n\n[optim]\nweight_decya = 0.1\n", &[]);
        assert!(e.starts_with("run.toml:4: optim.weight_decya: unknown field"), "{e}");
        assert!(e.contains("did you mean `weight_decay`?"), "{e}");
        let e = error("[recipe]\nmode = \"fp9\"\n", &[]);
        assert!(e.starts_with("run.toml:2: recipe.mode: unknown name 'fp9'"), "{e}");
        assert!(e.contains("fp8, bf16, fp32, f64") && e.contains("did you mean 'fp8'?"), "{e}");
        let e = error("steps = \"many\"\n", &[]);
        assert!(e.starts_with("run.toml:1: steps: invalid type: string"), "{e}");
        let e = error("[schedule]\nbatch = [{ value = 8, until = 3 }]\n", &[]);
        assert!(e.starts_with("run.toml:2: schedule.batch[0].until: unknown field"), "{e}");
        let e = error("[schedule]\nbatch = [{ value = 8 }, { value = 9 }]\n", &[]);
        assert!(e.starts_with("run.toml:2: schedule.batch: piece 1: only the last"), "{e}");
        let e = error("\npreset = \"tiyn\"\n", &[]);
        assert!(e.starts_with("run.toml:2: preset: unknown name 'tiyn'; expected one of"), "{e}");
        let e = error("seq_len = = 3\n", &[]);
        assert!(e.starts_with("run.toml:1: TOML:"), "{e}");
        let e = error("", &["optim.beta1=2.0"]);
        assert!(e.starts_with("--set optim.beta1=2.0: optim.beta1: expected 0 to 1"), "{e}");
        let e = error("", &["recipe.mode=\"fp9\""]);
        assert!(e.starts_with("--set recipe.mode=\"fp9\": recipe.mode: unknown name"), "{e}");
        let e = error("", &["schedule.batch=[{ value = 8, until = 3 }]"]);
        assert!(e.contains("]: schedule.batch[0].until: unknown field"), "{e}");
        let e = error("", &["data.fim_rate=2"]);
        assert!(e.starts_with("--set data.fim_rate=2: data.fim_rate: expected 0 to 1"), "{e}");
        let e = error("[optim]\nclip = nan\n", &[]);
        assert!(
            e.starts_with("run.toml:2: optim.clip: expected a finite number, found NaN"),
            "{e}"
        );
        let e = error("[model]\nheads = 0\n", &[]);
        assert!(e.starts_with("run.toml:2: model.heads: expected at least 1"), "{e}");
    }

    /// Figures of the DeepSeek-V3 report, sections 4.2, 4.3 and 5.1.
    #[test]
    fn the_reports_schedules_are_reproduced() {
        let config = TrainConfig::preset("deepseek-v3", &[]).unwrap();
        let schedules = config.schedules().unwrap();
        let at = |step, tokens: f64| {
            schedules.at(super::super::schedule::Point { step, tokens: tokens as u64 })
        };
        let near = |a: f64, b: f64| assert!((a - b).abs() <= 1e-12 * b.abs(), "{a} against {b}");
        near(at(1, 0.0).learning_rate, 2.2e-4 / 2000.0);
        near(at(1000, 12.6e9).learning_rate, 1.1e-4);
        near(at(2000, 25e9).learning_rate, 2.2e-4);
        near(at(100_000, 9.99e12).learning_rate, 2.2e-4);
        near(at(200_000, 12.15e12).learning_rate, (2.2e-4 + 2.2e-5) / 2.0);
        near(at(230_000, 14.3e12).learning_rate, 2.2e-5);
        near(at(230_000, 14.6e12).learning_rate, 2.2e-5);
        near(at(234_000, 14.633e12).learning_rate, 7.3e-6);
        assert_eq!((at(1, 0.0).batch, at(9000, 469e9).batch), (3072, 15360));
        assert_eq!(at(5000, 234.5e9).batch, 9216);
        let gamma = |tokens| at(9000, tokens).bias_update_speed;
        assert_eq!((gamma(14.299e12), gamma(14.3e12)), (1e-3, 0.0));
        let lambda = |tokens| at(9000, tokens).mtp_lambda;
        assert_eq!((lambda(9.99e12), lambda(10e12)), (0.3, 0.1));
        assert_eq!(at(9, 0.0).balance_loss, 1e-4);
        let optim = &config.optim;
        assert_eq!((optim.beta1, optim.beta2, optim.weight_decay), (0.9, 0.95, 0.1));
        assert_eq!((optim.clip, config.model.initializer_range), (1.0, 0.006));
        assert_eq!((config.tokens, config.seq_len), (Some(14.8e12), 4096));
        for (name, seq_len, batch) in [("32k", 32 << 10, 1920), ("128k", 128 << 10, 480)] {
            let config = TrainConfig::preset(&format!("deepseek-v3-{name}"), &[]).unwrap();
            let plan = config
                .schedules()
                .unwrap()
                .at(super::super::schedule::Point { step: 1, tokens: 0 });
            assert_eq!((config.steps, config.seq_len), (Some(1000), seq_len));
            assert_eq!((plan.batch, plan.learning_rate), (batch, 7.3e-6));
            let yarn = config.model.rope.yarn.unwrap();
            assert_eq!((yarn.factor, yarn.beta_slow, yarn.beta_fast), (40.0, 1.0, 32.0));
        }
        let sft = TrainConfig::preset("deepseek-v3-sft", &[Setting::set("steps=201")]).unwrap();
        let rate = |step| {
            let point = super::super::schedule::Point { step, tokens: 0 };
            sft.schedules().unwrap().at(point).learning_rate
        };
        assert!(rate(1) <= 5e-6 && rate(1) > 4.99e-6 && sft.data.mask_documents);
        near(rate(201), 1e-6);
    }
}
