//! Shared case files as this crate's tests read them: raw codes under tensor names.

use ndarray::{Array3, ArrayD, IxDyn};
use safetensors::{Dtype, SafeTensors};
use std::path::PathBuf;

/// A case file, opened.
pub struct CaseFile {
    bytes: Vec<u8>,
    /// `params` of the metadata.
    pub params: serde_json::Value,
}

impl CaseFile {
    /// Reads a file that the shared folder vouches for.
    pub fn open(path: &PathBuf) -> CaseFile {
        let bytes = std::fs::read(path).expect("readable");
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("a safetensors header");
        let metadata = header.metadata().as_ref().expect("metadata");
        let params = serde_json::from_str(&metadata["params"]).expect("params are JSON");
        CaseFile { bytes, params }
    }

    /// A tensor's codes, zero-extended.
    pub fn codes(&self, name: &str) -> ArrayD<u32> {
        let tensors = SafeTensors::deserialize(&self.bytes).expect("a safetensors file");
        let tensor = tensors.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        let size = match tensor.dtype() {
            Dtype::F32 | Dtype::U32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            _ => 1,
        };
        let code = |bytes: &[u8]| bytes.iter().rev().fold(0, |code, b| code << 8 | u32::from(*b));
        let codes = tensor.data().chunks(size).map(code).collect();
        ArrayD::from_shape_vec(IxDyn(tensor.shape()), codes).expect("shape and data agree")
    }

    /// A tensor's codes, three-dimensional.
    pub fn codes3(&self, name: &str) -> Array3<u32> {
        self.codes(name).into_dimensionality().expect("three dimensions")
    }

    /// A string parameter.
    pub fn text(&self, key: &str) -> &str {
        self.params[key].as_str().unwrap_or_else(|| panic!("params.{key} is a string"))
    }
}

/// The case files of a folder of the shared data, sorted; empty, and a line printed, without them.
pub fn shared_cases(folder: &str) -> Vec<PathBuf> {
    let Some(shared) = fathom_trace::shared::dir() else {
        println!("SKIPPED: shared cases/{folder} (set FATHOM_SHARED)");
        return Vec::new();
    };
    let entries = std::fs::read_dir(shared.join("cases").join(folder)).expect("a folder of cases");
    let mut files: Vec<PathBuf> = entries.map(|e| e.expect("an entry").path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    files
}
