//! Safetensors files: read through a mapping, written beside and renamed.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use fathom_trace::DType;
use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use super::mapped::map;
use crate::{Tensor, files};

/// Why a file of tensors cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TensorsError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The bytes are no safetensors file.
    #[error("{}: expected a safetensors file, found {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A tensor has an element type that nothing here reads.
    #[error("{}, tensor '{name}': element type {found} is not supported", path.display())]
    DType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its element type.
        found: String,
    },
}

/// Where a tensor lies in a file.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Element type.
    pub dtype: DType,
    /// Row-major shape.
    pub shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// A mapped safetensors file.
#[derive(Debug)]
pub struct TensorsFile {
    /// Where it lies.
    pub path: PathBuf,
    /// Its tensors by name.
    pub entries: BTreeMap<String, Entry>,
    map: Mmap,
}

impl TensorsFile {
    /// Maps the file and reads its header.
    ///
    /// # Errors
    /// [`TensorsError`].
    pub fn open(path: &Path) -> Result<TensorsFile, TensorsError> {
        let map = map(path).map_err(|source| TensorsError::Io { path: path.to_owned(), source })?;
        let format = |message: String| TensorsError::Format { path: path.to_owned(), message };
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|e| format(e.to_string()))?;
        let data = header + 8;
        let mut entries = BTreeMap::new();
        for (name, info) in metadata.tensors() {
            let (start, end) = (data + info.data_offsets.0, data + info.data_offsets.1);
            let found = info.dtype.to_string();
            let Some(dtype) = DType::from_name(&found) else {
                return Err(TensorsError::DType { path: path.to_owned(), name, found });
            };
            if end > map.len() {
                let length = map.len();
                return Err(format(format!("{length} bytes where tensor '{name}' ends at {end}")));
            }
            entries.insert(name, Entry { dtype, shape: info.shape.clone(), start, end });
        }
        Ok(TensorsFile { path: path.to_owned(), entries, map })
    }

    /// The bytes of a tensor.
    pub fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.map[entry.start..entry.end]
    }

    /// A copy of a tensor; `None` where there is none of this name.
    pub fn tensor(&self, name: &str) -> Option<Tensor> {
        let entry = self.entries.get(name)?;
        Some(Tensor::from_bytes(entry.dtype, &entry.shape, self.bytes(entry)))
    }
}

/// Writes tensors to a file: first beside it, then renamed, so that a reader never sees half of it.
///
/// # Errors
/// [`TensorsError`].
///
/// # Panics
/// Where a tensor's element type is none of safetensors'.
pub fn write(path: &Path, tensors: &[(String, Tensor)]) -> Result<(), TensorsError> {
    let views = tensors.iter().map(|(name, t)| {
        let dtype = serde_json::from_value(t.dtype().name().into()).expect("one vocabulary");
        let view = TensorView::new(dtype, t.shape().to_vec(), t.bytes()).expect("dense");
        (name.as_str(), view)
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    files::replace(path, |file, beside| {
        let written = safetensors::serialize_to_file(views, Some(metadata), beside);
        written.map_err(std::io::Error::other)?;
        file.sync_all()
    })
    .map_err(|source| TensorsError::Io { path: path.to_owned(), source })
}
