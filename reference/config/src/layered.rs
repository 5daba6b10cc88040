//! TOML in layers: a preset, a file over it, `--set KEY=VALUE` over both; and errors that point at
//! the line of the file, or the flag, that made a value.

use std::path::PathBuf;

use fathom_trace::input;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use crate::{KeyError, ModelConfig, nearest, presets};

/// A value that wins over the file: `--set KEY=VALUE`, or a flag of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// The flag as it was typed: `--steps 5`. Errors name it.
    pub flag: String,
    /// The dotted key and its value as TOML: `steps=5`.
    pub assignment: String,
}

impl Setting {
    /// The setting that `--set KEY=VALUE` makes, given `KEY=VALUE`.
    pub fn set(assignment: &str) -> Setting {
        Setting { flag: format!("--set {assignment}"), assignment: assignment.to_owned() }
    }

    /// A flag of its own, for instance `--steps`, with a number or word for the dotted key.
    pub fn flag(flag: &str, key: &str, value: impl std::fmt::Display) -> Setting {
        Setting { flag: format!("{flag} {value}"), assignment: format!("{key}={value}") }
    }

    /// Whether it made the value of a dotted key, or of what lies around or in it.
    fn made(&self, key: &str) -> bool {
        let Some((own, _)) = self.assignment.split_once('=') else { return false };
        let inside = |outer: &str, inner: &str| {
            let rest = inner.strip_prefix(outer);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        };
        inside(own.trim(), key) || inside(key, own.trim())
    }
}

/// A configuration text, where it is from, and what wins over it.
#[derive(Clone, Debug)]
pub struct Source<'a> {
    /// The file; or what the text was made from, which then has no lines.
    pub name: String,
    /// The text itself, as TOML.
    pub text: &'a str,
    /// Whether errors give lines of the text.
    pub lines: bool,
    /// Folder that relative paths in the text start from; `None` refuses them.
    pub folder: Option<PathBuf>,
    /// Settings that win over the text; of two for one key the later wins.
    pub set: &'a [Setting],
}

impl Source<'_> {
    /// An error about a key: at the flag that made it, or at its line.
    pub fn wrong(&self, key: &str, message: impl Into<String>) -> KeyError {
        let place = match self.set.iter().rfind(|setting| setting.made(key)) {
            Some(setting) => setting.flag.clone(),
            None if self.lines => format!("{}:{}", self.name, line_of_key(self.text, key)),
            None => self.name.clone(),
        };
        let place = input::shorten(&place, input::MESSAGE);
        let key = input::shorten(key, input::VALUE);
        KeyError { place, key, message: message.into() }
    }

    /// The text as a table, with the settings applied.
    ///
    /// # Errors
    /// Text that is no TOML, a setting that cannot be applied, a number that is not finite.
    pub fn table(&self) -> Result<Table, KeyError> {
        let mut table: Table = self.text.parse().map_err(|e: toml::de::Error| {
            let line = e.span().map_or(1, |span| line_of(self.text, span.start));
            let place = format!("{}:{line}", self.name);
            KeyError { place, key: "TOML".into(), message: e.message().to_owned() }
        })?;
        for setting in self.set {
            assign(&mut table, &setting.assignment).map_err(|message| {
                let (place, key) = (setting.flag.clone(), setting.assignment.clone());
                KeyError { place, key, message }
            })?;
        }
        match not_finite("", &Value::Table(table.clone())) {
            None => Ok(table),
            Some((key, value)) => {
                Err(self.wrong(&key, format!("expected a finite number, found {value}")))
            }
        }
    }

    /// Takes a string out of a table; `path` is its dotted key in the whole.
    ///
    /// # Errors
    /// What is there instead of a string.
    pub fn take_string(
        &self,
        table: &mut Table,
        key: &str,
        path: &str,
    ) -> Result<Option<String>, KeyError> {
        match table.remove(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => {
                let message = format!("expected a string, found {}", other.type_str());
                Err(self.wrong(path, message))
            }
        }
    }

    /// The error for a value that serde cannot read, at the key that it is about.
    pub fn refused<E: std::fmt::Display>(&self, e: &serde_path_to_error::Error<E>) -> KeyError {
        let (key, message) = offence(e);
        self.wrong(&key, input::shorten(&explain(&message), input::MESSAGE))
    }

    /// Reads a table as the type that it describes.
    ///
    /// # Errors
    /// The key that is unknown, missing or of another type, with the nearest name.
    pub fn deserialize<T: DeserializeOwned>(&self, table: Table) -> Result<T, KeyError> {
        serde_path_to_error::deserialize(Value::Table(table)).map_err(|e| self.refused(&e))
    }

    /// `[model]` with what it starts from under its own keys: an architecture that comes with the
    /// project (`preset`), or the configuration of a Hugging Face folder or file (`path`, also
    /// `file`), which `read` reads.
    ///
    /// # Errors
    /// At the key that cannot be followed.
    pub fn model(
        &self,
        mut model: Table,
        read: fn(&std::path::Path) -> Result<ModelConfig, crate::ConfigError>,
    ) -> Result<Table, KeyError> {
        let preset = self.take_string(&mut model, "preset", "model.preset")?;
        let path = self.take_string(&mut model, "path", "model.path")?;
        let file = self.take_string(&mut model, "file", "model.file")?;
        let (key, path) = match (path, file) {
            (Some(_), Some(_)) => {
                return Err(self.wrong("model.file", "expected path or file, found both"));
            }
            (None, Some(file)) => ("model.file", Some(file)),
            (path, None) => ("model.path", path),
        };
        let base = match (preset, path) {
            (Some(_), Some(_)) => {
                return Err(self.wrong(key, "expected preset or path, found both"));
            }
            (Some(name), None) => {
                let text = presets::model_text(&name);
                let text = text.map_err(|message| self.wrong("model.preset", message))?;
                text.parse().expect("embedded presets are TOML")
            }
            (None, Some(path)) => {
                let refuse = |message: String| self.wrong(key, message);
                let folder = self.folder.as_ref();
                let folder =
                    folder.ok_or_else(|| refuse("a preset cannot refer to files".into()))?;
                let path = folder.join(path);
                let file = if path.is_dir() { path.join("config.json") } else { path };
                let config = read(&file).map_err(|e| refuse(e.to_string()))?;
                Table::try_from(config).expect("a model is a table")
            }
            (None, None) => return Ok(model),
        };
        Ok(merge(base, model))
    }
}

/// Tables that may say what they start from.
const STARTING: [&str; 3] = ["model", "cluster", "gpu"];

/// `over`'s keys on top of `base`, table by table. A model, cluster or GPU that names what it
/// starts from, and any table of another `kind`, starts anew.
pub fn merge(mut base: Table, over: Table) -> Table {
    for (key, value) in over {
        let anew = |b: &Table, o: &Table| {
            let named = ["preset", "path", "file"].iter().any(|start| o.contains_key(*start));
            (STARTING.contains(&&*key) && named)
                || (o.contains_key("kind") && o.get("kind") != b.get("kind"))
        };
        match (base.remove(&key), value) {
            (Some(Value::Table(b)), Value::Table(o)) if !anew(&b, &o) => {
                base.insert(key, Value::Table(merge(b, o)));
            }
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
    base
}

/// Applies `a.b.c=value`; the value is TOML, or a string where it is not.
///
/// # Errors
/// Why it cannot be applied.
pub fn assign(table: &mut Table, assignment: &str) -> Result<(), String> {
    let (path, text) = assignment.split_once('=').ok_or("expected KEY.PATH=VALUE")?;
    let parsed: Result<Table, _> = format!("v = {text}").parse();
    let value = match parsed {
        Ok(mut t) if t.len() == 1 => t.remove("v").expect("the only key"),
        _ => Value::String(text.trim().to_owned()),
    };
    let keys: Vec<&str> = path.trim().split('.').collect();
    if keys.iter().any(|k| k.is_empty()) {
        return Err("expected KEY.PATH=VALUE".into());
    }
    let (last, parents) = keys.split_last().expect("split gives at least one");
    let mut at = table;
    for key in parents {
        let next = at.entry(*key).or_insert_with(|| Value::Table(Table::new()));
        // A preset's name gives way to a table that starts from it.
        if let Value::String(name) = next
            && STARTING.contains(key)
        {
            let preset = ("preset".to_owned(), Value::String(name.clone()));
            *next = Value::Table(Table::from_iter([preset]));
        }
        at = next.as_table_mut().ok_or_else(|| format!("{key} is not a table"))?;
    }
    at.insert((*last).to_owned(), value);
    Ok(())
}

/// The first number that is infinite or NaN, with its dotted key.
fn not_finite(key: &str, value: &Value) -> Option<(String, f64)> {
    match value {
        Value::Float(x) if !x.is_finite() => Some((key.to_owned(), *x)),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .find_map(|(i, value)| not_finite(&format!("{key}[{i}]"), value)),
        Value::Table(table) => table.iter().find_map(|(name, value)| {
            let dot = if key.is_empty() { "" } else { "." };
            not_finite(&format!("{key}{dot}{name}"), value)
        }),
        _ => None,
    }
}

/// Line, from 1, of a byte offset.
fn line_of(text: &str, offset: usize) -> usize {
    1 + text.as_bytes()[..offset.min(text.len())].iter().filter(|&&b| b == b'\n').count()
}

/// Line on which the dotted key is set, else that of the innermost table around it, else 1.
pub fn line_of_key(text: &str, key: &str) -> usize {
    let Ok(table) = toml::de::DeTable::parse(text) else { return 1 };
    let mut table = Some(table.get_ref());
    let mut line = 1;
    for part in key.split(['.', '[']) {
        let Some(inside) = table else { break };
        let Some((name, value)) = inside.iter().find(|(k, _)| k.get_ref() == part) else { break };
        line = line_of(text, name.span().start);
        table = value.get_ref().as_table();
    }
    line
}

/// The dotted key that a serde error is about (for unknown and missing fields the field itself),
/// and the error's words.
pub fn offence<E: std::fmt::Display>(e: &serde_path_to_error::Error<E>) -> (String, String) {
    let path = e.path().to_string();
    let path = if path == "." { "" } else { &path };
    // The TOML reader's display begins with a place of its own.
    let words = e.inner().to_string();
    let message = words.lines().next().unwrap_or("").trim().to_owned();
    let quoted = |prefix| message.strip_prefix(prefix).and_then(|m| m.split('`').next());
    let key = match quoted("unknown field `").or(quoted("missing field `")) {
        Some(field) if path.is_empty() => field.to_owned(),
        Some(field) if path.rsplit('.').next() != Some(field) => format!("{path}.{field}"),
        _ => path.to_owned(),
    };
    (key, message)
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
            .replace("expected usize", "expected a whole number, 0 or more")
            .replace("expected f64", "expected a number"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_under_its_header_or_dotted() {
        let text = "a = 1\n[x]\nb = 2\n[x.y]\nc = 3\n";
        assert_eq!(line_of_key(text, "x.b"), 3);
        assert_eq!(line_of_key(text, "x.y.c"), 5);
        assert_eq!(line_of_key(text, "x.y.d"), 4);
        assert_eq!(line_of_key("x.y.c = 3\n", "x.y.c"), 1);
    }

    #[test]
    fn a_part_that_names_its_start_begins_anew() {
        let base: Table =
            "[model]\npreset = \"a\"\nheads = 3\n[other]\npath = \"p\"\nx = 1\n".parse().unwrap();
        let over: Table = "[model]\npath = \"b\"\n[other]\npath = \"q\"\n".parse().unwrap();
        let merged = merge(base, over);
        let expected: Table =
            "[model]\npath = \"b\"\n[other]\npath = \"q\"\nx = 1\n".parse().unwrap();
        assert_eq!(merged, expected);
    }

    #[test]
    fn the_flag_that_made_a_value_is_blamed_before_its_line() {
        let set = [Setting::set("optim.beta1=2.0"), Setting::flag("--steps", "steps", 5)];
        let text = "[optim]\nbeta1 = 1.0\nbeta2 = 1.0\n";
        let source = Source { name: "run.toml".into(), text, lines: true, folder: None, set: &set };
        let place = |key: &str| source.wrong(key, "").place;
        assert_eq!(place("optim.beta1"), "--set optim.beta1=2.0");
        assert_eq!(place("optim.beta2"), "run.toml:3");
        assert_eq!(place("steps"), "--steps 5");
    }
}
