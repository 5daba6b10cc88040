//! An op's parameters as its struct declares them: names, types in words, defaults, and which keys
//! of a JSON object are missing or unknown. All of it is read from the struct's JSON schema.

use fathom_config::nearest;
use serde_json::{Map, Value};

use super::error::OpError;
use super::{DynOp, Op};

/// A parameter as documentation shows it.
#[derive(Clone, Debug, PartialEq)]
pub struct Param {
    /// Its key; a part of a nested parameter has the path, `shape.heads` for instance.
    pub name: String,
    /// Its type in words.
    pub kind: String,
    /// What an absent key stands for; `None` where the key must be there.
    pub default: Option<Value>,
    /// What it is.
    pub words: String,
}

/// The JSON schema of a parameter struct.
pub(super) fn schema<T: Op>() -> Value {
    schemars::schema_for!(T).to_value()
}

/// The parameters in the order of the struct, each followed by its parts.
pub(super) fn describe(
    schema: &Value,
    example: &Value,
    parse: fn(&Value) -> Result<Box<dyn DynOp>, OpError>,
) -> Vec<Param> {
    let mut params = Vec::new();
    for (name, property) in properties(schema, schema) {
        let default = (!is_required(schema, name)).then(|| {
            let candidates = candidates(schema, property);
            default(name, &candidates, example, parse)
        });
        let words = sentence(property);
        params.push(Param { name: name.clone(), kind: kind(schema, property), default, words });
        let object = object(schema, property);
        for (part, property) in properties(schema, object) {
            let default = (!is_required(object, part)).then_some(Value::Null);
            let (kind, words) = (kind(schema, property), sentence(property));
            params.push(Param { name: format!("{name}.{part}"), kind, default, words });
        }
    }
    params
}

/// What an absent key means: the value that is written for it, or the one that is not written.
fn default(
    name: &str,
    candidates: &[Value],
    example: &Value,
    parse: fn(&Value) -> Result<Box<dyn DynOp>, OpError>,
) -> Value {
    let written = |value: Option<&Value>| {
        let mut params = example.clone();
        let object = params.as_object_mut().expect("parameters are an object");
        object.shift_remove(name);
        object.extend(value.map(|value| (name.to_owned(), value.clone())));
        parse(&params).ok().map(|op| op.params().get(name).cloned())
    };
    if let Some(Some(value)) = written(None) {
        return value;
    }
    let default = candidates.iter().find(|value| written(Some(value)) == Some(None));
    default.cloned().unwrap_or_else(|| unreachable!("{name}: the key may be absent"))
}

/// Values that may be defaults: nothing, no, an empty list, each word of a choice.
fn candidates(root: &Value, property: &Value) -> Vec<Value> {
    let property = resolve(root, property);
    let choices = property["oneOf"].as_array().into_iter().flatten();
    let mut all = vec![Value::Null, Value::Bool(false), Value::Array(Vec::new())];
    all.extend(choices.filter_map(|choice| choice.get("const").cloned()));
    all.extend(property["enum"].as_array().into_iter().flatten().cloned());
    all
}

/// Refuses an object that lacks keys or has unknown ones, at any depth, naming all of them.
pub(super) fn check_keys(op: &'static str, schema: &Value, found: &Value) -> Result<(), OpError> {
    let (mut missing, mut unknown) = (Vec::new(), Vec::new());
    compare_keys(schema, schema, found, "", &mut missing, &mut unknown);
    if missing.is_empty() && unknown.is_empty() {
        return Ok(());
    }
    Err(OpError::Keys { op, missing, unknown })
}

fn compare_keys(
    root: &Value,
    schema: &Value,
    found: &Value,
    path: &str,
    missing: &mut Vec<String>,
    unknown: &mut Vec<String>,
) {
    let schema = object(root, schema);
    let Some(found) = found.as_object().filter(|_| schema["type"] == "object") else { return };
    let known: Vec<&str> = properties(root, schema).map(|(name, _)| name.as_str()).collect();
    for (name, property) in properties(root, schema) {
        match found.get(name) {
            Some(value) => {
                let path = format!("{path}{name}.");
                compare_keys(root, property, value, &path, missing, unknown);
            }
            None if is_required(schema, name) => {
                missing.push(format!("'{path}{name}' ({})", kind(root, property)));
            }
            None => {}
        }
    }
    for name in found.keys().filter(|name| !known.contains(&name.as_str())) {
        let meant = nearest(name, &known);
        let meant = meant.map_or(String::new(), |known| format!(" (did you mean '{known}'?)"));
        unknown.push(format!("'{path}{name}'{meant}"));
    }
}

/// Follows a reference to where the type is defined.
fn resolve<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(place) => root.pointer(place.trim_start_matches('#')).expect("a reference of ours"),
        None => schema,
    }
}

/// The type itself, where `null` is allowed beside it.
fn object<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    let some = |choice: &&Value| choice["type"] != "null";
    let schema = match schema["anyOf"].as_array() {
        Some(choices) => choices.iter().find(some).expect("not null alone"),
        None => schema,
    };
    resolve(root, schema)
}

fn properties<'a>(
    root: &'a Value,
    schema: &'a Value,
) -> impl Iterator<Item = (&'a String, &'a Value)> + use<'a> {
    let map: Option<&Map<_, _>> = object(root, schema)["properties"].as_object();
    map.into_iter().flatten()
}

fn is_required(schema: &Value, name: &str) -> bool {
    schema["required"].as_array().is_some_and(|names| names.iter().any(|n| n == name))
}

/// The first paragraph of a doc comment on one line, without the brackets of its links.
pub(super) fn sentence(schema: &Value) -> String {
    let text = schema["description"].as_str().unwrap_or_default();
    let first = text.split("\n\n").next().unwrap_or_default();
    let first = first.replace('\n', " ").replace("[`", "`").replace("`]", "`");
    first.strip_suffix(':').map_or(first.clone(), |words| format!("{words}."))
}

/// A type in words: `integer`, `[integer, ..]`, `f32 or bf16`.
fn kind(root: &Value, schema: &Value) -> String {
    let any_of = |choices: &Vec<Value>, word: &dyn Fn(&Value) -> String| {
        choices.iter().map(word).collect::<Vec<_>>().join(" or ")
    };
    let literal = |value: &Value| value.as_str().map_or(value.to_string(), str::to_owned);
    // A parameter may take less than its type.
    if let Some(choices) = schema["enum"].as_array() {
        return any_of(choices, &literal);
    }
    if let Some(place) = schema["$ref"].as_str() {
        // Its fourteen names are those of safetensors.
        let dtype = place.ends_with("/DType");
        return if dtype { "dtype".to_owned() } else { kind(root, resolve(root, schema)) };
    }
    if let Some(value) = schema.get("const") {
        return literal(value);
    }
    if let Some(choices) = schema["oneOf"].as_array().or(schema["anyOf"].as_array()) {
        return any_of(choices, &|choice| kind(root, choice));
    }
    if let Some(types) = schema["type"].as_array() {
        return any_of(types, &literal);
    }
    match schema["type"].as_str() {
        Some("array") => {
            let item = kind(root, &schema["items"]);
            match schema["maxItems"].as_u64() {
                Some(n) => format!("[{}]", vec![item; n as usize].join(", ")),
                None => format!("[{item}, ..]"),
            }
        }
        Some("object") => {
            let parts = properties(root, schema).map(|(n, p)| format!("{n}: {}", kind(root, p)));
            format!("{{{}}}", parts.collect::<Vec<_>>().join(", "))
        }
        other => other.unwrap_or("any").to_owned(),
    }
}

/// The largest number that a size may be: sums and products of two then fit 64 bits.
pub(super) const LARGEST: u64 = i32::MAX as u64;

/// Refuses whole numbers that no size or index can be.
pub(super) fn check_sizes(op: &'static str, params: &Value) -> Result<(), OpError> {
    fn largest(value: &Value, path: &str) -> Option<(String, u64)> {
        let below = |key: String, value| {
            let path = if path.is_empty() { key } else { format!("{path}.{key}") };
            largest(value, &path)
        };
        match value {
            Value::Number(n) => n.as_u64().filter(|&n| n > LARGEST).map(|n| (path.to_owned(), n)),
            Value::Array(a) => a.iter().enumerate().find_map(|(i, v)| below(i.to_string(), v)),
            Value::Object(o) => o.iter().find_map(|(k, v)| below(k.clone(), v)),
            _ => None,
        }
    }
    match largest(params, "") {
        None => Ok(()),
        Some((path, found)) => {
            let message = format!("expected at most {LARGEST}, found {found}");
            Err(OpError::Params { op, path, message })
        }
    }
}
