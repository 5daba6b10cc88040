//! The ops as documentation shows them: roles with dtypes and shapes, parameters with types and
//! defaults, an example case. All of it is asked of the table of ops; nothing is written here.

use std::collections::BTreeMap;

use fathom_reference::op::{DynOp, Example, OPS, OpEntry, Param, ReferenceEngine};
use fathom_reference::{Engine, EngineError, OpError};
use fathom_trace::{DType, TensorMeta};
use serde::Serialize;
use serde_json::{Value, json};

use crate::case_file::CaseFile;

/// An input or output of an op.
#[derive(Clone, Debug, Serialize)]
pub struct TensorEntry {
    /// Its name in a case file, without `out.`.
    pub role: &'static str,
    /// Whether the op may run without it.
    pub optional: bool,
    /// The dtypes that the op takes there; of an output, that of the example.
    pub dtype: String,
    /// Its shape in words: `[m, k]`.
    pub shape: &'static str,
    /// Its shape in the example.
    pub example: Vec<usize>,
}

/// An op as documentation shows it.
#[derive(Debug)]
pub struct Entry {
    /// Its name in the table.
    pub op: &'static str,
    /// What the op is, in the words of its definition.
    pub words: String,
    /// Its inputs in order.
    pub inputs: Vec<TensorEntry>,
    /// Its outputs in order.
    pub outputs: Vec<TensorEntry>,
    /// Its parameters, parts of a nested one behind it.
    pub params: Vec<Param>,
    /// The parameters of the example.
    pub example: Value,
}

/// Every op, in alphabetical order.
pub fn entries() -> Vec<Entry> {
    OPS.iter().map(entry).collect()
}

/// The op of a row of the table.
///
/// # Panics
/// Where an op refuses its own example.
pub fn entry(of: &OpEntry) -> Entry {
    let example = (of.example)();
    let metas = example_metas(&example);
    let outputs = example.op.infer(&metas).expect("an op accepts its example");
    let inputs = example.inputs.iter().zip(of.inputs).enumerate().map(|(i, (input, role))| {
        let dtype = dtypes(&*example.op, &metas, i).unwrap_or_else(|| input.dtype.to_string());
        let (shape, sizes) = (input.shape.words, input.shape.sizes.clone());
        TensorEntry { role: role.name, optional: role.optional, dtype, shape, example: sizes }
    });
    let inputs = inputs.collect();
    let outputs = outputs.iter().zip(&example.outputs).map(|(meta, (role, shape))| TensorEntry {
        role,
        optional: false,
        dtype: meta.dtype.to_string(),
        shape: shape.words,
        example: meta.shape.clone(),
    });
    let (outputs, params) = (outputs.collect(), of.params());
    let example = example.op.params();
    Entry { op: of.name, words: of.words(), inputs, outputs, params, example }
}

/// The op's example as a case file, with the contract's outputs.
///
/// # Errors
/// [`EngineError`] where the reference refuses the example: a defect of the op.
pub fn example(of: &OpEntry) -> Result<CaseFile, EngineError> {
    let case = (of.example)().case();
    let expected = ReferenceEngine.run(&case)?;
    let source = format!("example of {}, outputs of the reference", of.name);
    Ok(CaseFile { case, expected, metadata: BTreeMap::from([("source".to_owned(), source)]) })
}

fn example_metas(example: &Example) -> Vec<Option<TensorMeta>> {
    let meta = |input: &fathom_reference::op::example::Described| TensorMeta {
        role: input.role.to_owned(),
        dtype: input.dtype,
        shape: input.shape.sizes.clone(),
    };
    example.inputs.iter().map(|input| input.is_given().then(|| meta(input))).collect()
}

/// The dtypes that the op takes for input `i`, in the words of its own refusal: for each dtype of
/// the first input, since most ops want the others to go with it. `None` where the example does
/// without the input.
fn dtypes(op: &dyn DynOp, metas: &[Option<TensorMeta>], i: usize) -> Option<String> {
    let own = metas[i].as_ref()?.dtype;
    let first = refusal(op, metas, 0, metas[0].as_ref()?.dtype);
    if i == 0 {
        return Some(first.map_or("any".to_owned(), |dtypes| dtypes.join(", ")));
    }
    let any = || DType::ALL.map(|dtype| dtype.name().to_owned()).to_vec();
    let first = first.unwrap_or_else(any);
    let with =
        |dtype: &String| Some((dtype.clone(), refusal(op, metas, i, DType::from_name(dtype)?)?));
    let each: Vec<(String, Vec<String>)> = first.iter().filter_map(with).collect();
    let Some((_, one)) = each.first() else { return Some(own.to_string()) };
    if each.iter().all(|(_, dtypes)| dtypes == one) {
        return Some(one.join(", "));
    }
    let role = op.inputs()[0].name;
    if each.iter().all(|(dtype, dtypes)| dtypes[..] == [dtype.clone()]) {
        return Some(format!("as {role}"));
    }
    // Those that want the same stand together: `F32 with F32, BF16; F64 with F64`.
    let mut groups: Vec<(Vec<String>, Vec<String>)> = Vec::new();
    for (dtype, dtypes) in each {
        match groups.iter_mut().find(|(same, _)| *same == dtypes) {
            Some((_, with)) => with.push(dtype),
            None => groups.push((dtypes, vec![dtype])),
        }
    }
    let words = groups
        .iter()
        .map(|(dtypes, with)| format!("{} with {role} {}", dtypes.join(", "), with.join(", ")));
    Some(words.collect::<Vec<_>>().join("; "))
}

/// The dtypes that the op says it expects of input `i` where the first input has dtype `first` and
/// the others are changed as the op asks; `None` where it takes any, or refuses for other reasons.
fn refusal(
    op: &dyn DynOp,
    metas: &[Option<TensorMeta>],
    i: usize,
    first: DType,
) -> Option<Vec<String>> {
    let mut metas = metas.to_vec();
    metas[0].as_mut()?.dtype = first;
    metas[i].as_mut()?.dtype = DType::Bool;
    for _ in 0..=metas.len() {
        let Err(OpError::DType { role, expected, .. }) = op.infer(&metas) else { return None };
        let expected: Vec<String> = expected.split(" or ").map(str::to_owned).collect();
        let place = op.inputs().iter().position(|r| r.name == role)?;
        if place == i {
            return Some(expected);
        }
        metas[place].as_mut()?.dtype = DType::from_name(&expected[0])?;
    }
    None
}

impl Serialize for Entry {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let param = |p: &Param| {
            let mut param = json!({ "name": p.name, "type": p.kind, "required": p.default.is_none(),
                "words": p.words });
            if let Some(default) = &p.default {
                param["default"] = default.clone();
            }
            param
        };
        json!({
            "op": self.op,
            "words": self.words,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "params": self.params.iter().map(param).collect::<Vec<_>>(),
            "example": self.example,
        })
        .serialize(serializer)
    }
}

/// The table of ops in Markdown, as `docs/case-files.md` holds it.
pub fn markdown() -> String {
    let tensors = |entries: &[TensorEntry]| {
        let words = |t: &TensorEntry| {
            let optional = if t.optional { " (optional)" } else { "" };
            format!("`{} {}` {}{optional}", t.role, t.shape, t.dtype)
        };
        entries.iter().map(words).collect::<Vec<_>>().join("<br>")
    };
    let mut text = "| op | inputs | outputs | params |\n|---|---|---|---|\n".to_owned();
    for entry in entries() {
        let top = entry.params.iter().filter(|p| !p.name.contains('.'));
        let params = top.map(|p| {
            let default = p.default.as_ref().map(|value| format!(", default {value}"));
            format!("`{}` {}{}", p.name, p.kind, default.unwrap_or_default())
        });
        let params = params.collect::<Vec<_>>().join("<br>");
        let (inputs, outputs) = (tensors(&entry.inputs), tensors(&entry.outputs));
        let (op, words) = (entry.op, entry.words);
        text += &format!("| `{op}`: {words} | {inputs} | {outputs} | {params} |\n");
    }
    text
}
