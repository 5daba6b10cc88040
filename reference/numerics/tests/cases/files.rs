//! Case files as this crate's tests read them: raw codes under tensor names.

use ndarray::{Array3, ArrayD, IxDyn};
use safetensors::{Dtype, SafeTensors};
use std::path::{Path, PathBuf};

/// A case file, opened.
pub struct CaseFile {
    bytes: Vec<u8>,
    /// `params` of the metadata.
    pub params: serde_json::Value,
}

impl CaseFile {
    /// Reads a whole file.
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

/// The case files of a folder, sorted: the project's own small ones, cut out of the shared ones
/// (two scenarios, two rows, one block a file), and how many they are; then the shared ones where
/// they are at hand.
pub fn cases(folder: &str) -> (Vec<PathBuf>, usize) {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(folder);
    let mut files = listed(&own);
    let count = files.len();
    files.extend(
        fathom_trace::shared::dir().iter().flat_map(|d| listed(&d.join("cases").join(folder))),
    );
    (files, count)
}

fn listed(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder of cases");
    let mut files: Vec<PathBuf> = entries.map(|e| e.expect("an entry").path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    files
}
