//! Case files: safetensors whose metadata names an op and its parameters.
//!
//! Inputs stand under their role names, expected outputs as `out.<role>`. Files that we write have
//! sorted header keys, so that equal cases give equal bytes.
//!
//! ```
//! use fathom_conformance::case_file;
//! # let path = std::path::Path::new("absent.safetensors");
//! match case_file::read(path) {
//!     Ok(file) => println!("{} with {} inputs", file.case.op.name(), file.case.inputs.len()),
//!     Err(error) => eprintln!("{error}"),
//! }
//! ```

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use fathom_config::nearest;
use fathom_reference::op::op_from;
use fathom_reference::{Case, OpError, Outputs, Tensor};
use fathom_trace::{DType, TensorMeta, input};
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};

/// The prefix of the names of expected outputs in a case file.
pub const OUT: &str = "out.";

/// The largest size of a dimension; only a tensor without elements could have a larger one.
const LARGEST_SIZE: usize = i32::MAX as usize;

/// Most bytes of a case file: it is read whole.
const LARGEST_FILE: u64 = 64 << 30;

/// The largest output that a file may ask for, in bytes: 64 GiB.
const LARGEST_OUTPUT: u128 = 1 << 36;

/// A case with what its file expects of it.
#[derive(Debug)]
pub struct CaseFile {
    /// Op, parameters and inputs.
    pub case: Case,
    /// Expected outputs by role; empty where the file has none, or only some of them.
    pub expected: Outputs,
    /// Further metadata of the file (`source`, for instance).
    pub metadata: BTreeMap<String, String>,
}

/// Why a case file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CaseFileError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file that the error is about.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The bytes are no safetensors file.
    #[error("{}: expected a safetensors file, found {found}", path.display())]
    Format {
        /// The file that the error is about.
        path: PathBuf,
        /// What is wrong with it.
        found: String,
    },
    /// The metadata lacks what makes it a case.
    #[error("{}: metadata '{key}': expected {expected}, found {found}", path.display())]
    Metadata {
        /// The file that the error is about.
        path: PathBuf,
        /// The metadata key.
        key: &'static str,
        /// What should stand there.
        expected: &'static str,
        /// What stands there.
        found: String,
    },
    /// The op refuses the parameters or tensors.
    #[error("{}: {source}", path.display())]
    Op {
        /// The file that the error is about.
        path: PathBuf,
        /// What the op says.
        source: OpError,
    },
}

/// Reads a case file, and checks that the op accepts its inputs and would give outputs like those
/// that the file expects.
///
/// # Errors
/// [`CaseFileError`] naming the file, the tensor or metadata key, what was expected and found.
pub fn read(path: &Path) -> Result<CaseFile, CaseFileError> {
    let bytes = input::read(path, LARGEST_FILE)
        .map_err(|source| CaseFileError::Io { path: path.to_owned(), source })?;
    parse(&bytes, path)
}

/// The name of the op of a case file, from its header alone: an op that is unknown here has one
/// too.
///
/// # Errors
/// [`CaseFileError`] where there is no header or it names none.
pub fn op_name(path: &Path) -> Result<String, CaseFileError> {
    use std::io::Read;
    let io = |source| CaseFileError::Io { path: path.to_owned(), source };
    let format = |found: String| CaseFileError::Format { path: path.to_owned(), found };
    let mut file = io::BufReader::new(input::open_regular(path).map_err(io)?);
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(io)?;
    let mut header = Vec::new();
    file.take(u64::from_le_bytes(length)).read_to_end(&mut header).map_err(io)?;
    let header: Value =
        serde_json::from_slice(&header).map_err(|e| format(format!("a malformed header ({e})")))?;
    let name = &header["__metadata__"]["op"];
    name.as_str().map(str::to_owned).ok_or_else(|| CaseFileError::Metadata {
        path: path.to_owned(),
        key: "op",
        expected: "the name of an op",
        found: name.to_string(),
    })
}

/// Parses the bytes of a case file; `path` is only named in errors.
///
/// # Errors
/// As [`read`].
pub fn parse(bytes: &[u8], path: &Path) -> Result<CaseFile, CaseFileError> {
    let format = |found: String| CaseFileError::Format { path: path.to_owned(), found };
    let op_error = |source| CaseFileError::Op { path: path.to_owned(), source };
    let (_, header) =
        SafeTensors::read_metadata(bytes).map_err(|e| format(explain(&e, bytes.len())))?;
    let file = SafeTensors::deserialize(bytes).map_err(|e| format(explain(&e, bytes.len())))?;
    let mut metadata: BTreeMap<String, String> =
        header.metadata().clone().unwrap_or_default().into_iter().collect();

    let mut take = |key: &'static str, expected: &'static str| {
        metadata.remove(key).ok_or_else(|| {
            let keys: Vec<&str> = metadata.keys().map(String::as_str).collect();
            let found = match nearest(key, &keys) {
                Some(other) => format!("'{other}'; is that a misspelling?"),
                None => "nothing".to_owned(),
            };
            CaseFileError::Metadata { path: path.to_owned(), key, expected, found }
        })
    };
    let name = take("op", "the name of an op")?;
    let params = take("params", "the op's parameters as a JSON object")?;
    let params: Value = serde_json::from_str(&params).map_err(|e| CaseFileError::Metadata {
        path: path.to_owned(),
        key: "params",
        expected: "the op's parameters as a JSON object",
        found: format!("{params} ({e})"),
    })?;
    let op = op_from(&name, &params).map_err(op_error)?;

    let mut case = Case { op, inputs: BTreeMap::new() };
    let mut expected = Outputs::new();
    let mut unknown = Vec::new();
    for (name, view) in file.tensors() {
        let spelled = view.dtype().to_string();
        let dtype = DType::from_name(&spelled).ok_or_else(|| {
            op_error(OpError::DType {
                role: name.clone(),
                expected: DType::ALL.map(DType::name).join(", "),
                found: spelled,
            })
        })?;
        if view.shape().iter().any(|&size| size > LARGEST_SIZE) {
            let expected = format!("sizes of at most {LARGEST_SIZE}");
            let (role, found) = (name, view.shape().to_vec());
            return Err(op_error(OpError::Shape { role, expected, found }));
        }
        let tensor = Tensor::from_bytes(dtype, view.shape(), view.data());
        match name.strip_prefix(OUT) {
            Some(role) if case.op.outputs().contains(&role) => {
                expected.insert(role.to_owned(), tensor);
            }
            None if case.op.inputs().iter().any(|r| r.name == name) => {
                case.inputs.insert(name, tensor);
            }
            _ => unknown.push(name),
        }
    }
    check_names(&case, unknown).map_err(op_error)?;
    let file = CaseFile { case, expected, metadata };
    check_outputs(&file).map_err(op_error)?;
    Ok(file)
}

/// No tensor is unknown; where one is, says also which inputs are absent: it may be meant for one.
fn check_names(case: &Case, mut unknown: Vec<String>) -> Result<(), OpError> {
    if unknown.is_empty() {
        return Ok(());
    }
    unknown.sort();
    let found: Vec<&str> = unknown.iter().map(String::as_str).collect();
    let inputs = case.op.inputs().iter().map(|r| r.name.to_owned());
    let known: Vec<String> =
        inputs.chain(case.op.outputs().iter().map(|role| format!("{OUT}{role}"))).collect();
    let known: Vec<&str> = known.iter().map(String::as_str).collect();
    let mut error = OpError::unknown_roles(case.op.name(), &found, &known);
    if let OpError::Roles { missing, .. } = &mut error {
        *missing = case.absent_inputs();
    }
    Err(error)
}

/// The expected outputs have the roles, dtypes and shapes that the op announces.
fn check_outputs(file: &CaseFile) -> Result<(), OpError> {
    let announced = file.case.infer()?;
    for TensorMeta { role, dtype, shape } in &announced {
        let elements =
            shape.iter().try_fold(1u128, |product, &size| product.checked_mul(size as _));
        if elements.is_none_or(|n| n.saturating_mul(dtype.size() as u128) > LARGEST_OUTPUT) {
            let op = file.case.op.name();
            let limit = LARGEST_OUTPUT >> 30;
            let message = format!("output '{role}' {shape:?} of {dtype} exceeds {limit} GiB");
            return Err(OpError::Undefined { op, message });
        }
    }
    for (role, tensor) in &file.expected {
        let meta = announced.iter().find(|m| m.role == *role).expect("names are checked");
        let role = format!("{OUT}{role}");
        if tensor.dtype() != meta.dtype {
            let (expected, found) = (meta.dtype.to_string(), tensor.dtype().to_string());
            return Err(OpError::DType { role, expected, found });
        }
        if tensor.shape() != meta.shape {
            let (expected, found) = (format!("{:?}", meta.shape), tensor.shape().to_vec());
            return Err(OpError::Shape { role, expected, found });
        }
    }
    Ok(())
}

/// What is wrong with the bytes, in words that say what to do.
fn explain(error: &safetensors::SafeTensorError, len: usize) -> String {
    use safetensors::SafeTensorError as E;
    match error {
        E::HeaderTooSmall => format!("{len} bytes, too few for a header; is the file truncated?"),
        E::InvalidHeaderLength | E::MetadataIncompleteBuffer => format!(
            "a header that announces more or other data than the file's {len} bytes; is it truncated?"
        ),
        other => format!("a malformed header ({other})"),
    }
}

/// Writes a case file: inputs under their roles, expected outputs under `out.` and their roles,
/// metadata.
///
/// # Errors
/// [`CaseFileError::Io`]; the file is then as it was before.
pub fn write(path: &Path, file: &CaseFile) -> Result<(), CaseFileError> {
    let outputs = file.expected.iter().map(|(role, t)| (format!("{OUT}{role}"), t));
    let inputs = file.case.inputs.iter().map(|(role, t)| (role.clone(), t));
    let mut metadata = file.metadata.clone();
    metadata.insert("op".to_owned(), file.case.op.name().to_owned());
    metadata.insert("params".to_owned(), file.case.op.params().to_string());
    write_tensors(path, inputs.chain(outputs).collect(), &metadata)
}

/// Writes tensors and metadata as safetensors, header keys sorted, beside `path` and renamed.
///
/// # Errors
/// [`CaseFileError::Io`]; the file is then as it was before.
pub fn write_tensors(
    path: &Path,
    tensors: BTreeMap<String, &Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<(), CaseFileError> {
    // Wide elements first, so that every tensor is aligned to its element.
    let mut order: Vec<_> = tensors.iter().collect();
    order.sort_by_key(|(name, t)| (std::cmp::Reverse(t.dtype().size()), name.as_str()));
    let mut header = BTreeMap::from([("__metadata__".to_owned(), json!(metadata))]);
    let mut offset = 0;
    for (name, tensor) in &order {
        let end = offset + tensor.bytes().len();
        let mut entry = Map::new();
        entry.insert("data_offsets".to_owned(), json!([offset, end]));
        entry.insert("dtype".to_owned(), json!(tensor.dtype().name()));
        entry.insert("shape".to_owned(), json!(tensor.shape()));
        header.insert((*name).clone(), Value::Object(entry));
        offset = end;
    }
    let mut header = serde_json::to_vec(&header).expect("a header is plain data");
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    for (_, tensor) in &order {
        bytes.extend(tensor.bytes());
    }
    crate::write_atomically(path, &bytes)
        .map_err(|source| CaseFileError::Io { path: path.to_owned(), source })
}
