//! Safetensors files: read through a mapping, written beside and renamed.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, IntoInnerError, Write};
use std::path::{Path, PathBuf};

use fathom_trace::DType;
use memmap2::Mmap;
use safetensors::SafeTensors;
use serde_json::{Map, json};

use super::mapped::map;
use crate::{Tensor, files};

/// Why a file of tensors cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TensorsError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file that the error is about.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The bytes are no safetensors file.
    #[error("{}: expected a safetensors file, found {message}", path.display())]
    Format {
        /// The file that the error is about.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A tensor has an element type that nothing here reads.
    #[error("{}, tensor '{name}': element type {found} is not supported", path.display())]
    DType {
        /// The file that the error is about.
        path: PathBuf,
        /// The tensor that the error is about.
        name: String,
        /// Its element type.
        found: String,
    },
}

/// Element type, shape and byte range of a tensor in a file.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Element type of the tensor.
    pub dtype: DType,
    /// Row-major shape of the tensor.
    pub shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// A safetensors file, mapped into memory.
#[derive(Debug)]
pub struct TensorsFile {
    /// The file's path.
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

    /// The bytes of a tensor, row-major and little-endian, as they lie in the file.
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
/// Wide elements come first, so that every tensor is aligned to its element.
///
/// # Errors
/// [`TensorsError`].
pub fn write(path: &Path, tensors: &[(String, Tensor)]) -> Result<(), TensorsError> {
    let joined = tensors.iter().map(|(name, tensor)| Joined {
        name: name.clone(),
        shape: tensor.shape().to_vec(),
        lists: std::slice::from_ref(tensor),
    });
    write_joined(path, joined.collect())
}

/// A tensor that lies in several, one behind the other; one at least.
pub(super) struct Joined<'a> {
    pub name: String,
    pub shape: Vec<usize>,
    pub lists: &'a [Tensor],
}

impl Joined<'_> {
    fn dtype(&self) -> DType {
        self.lists.first().expect("one at least").dtype()
    }
}

/// The same for tensors that lie in several.
///
/// # Errors
/// [`TensorsError`].
pub(super) fn write_joined(path: &Path, mut order: Vec<Joined<'_>>) -> Result<(), TensorsError> {
    order.sort_by_cached_key(|joined| (Reverse(joined.dtype().size()), joined.name.clone()));
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut offset = 0;
    for tensor in &order {
        let end = offset + tensor.lists.iter().map(|list| list.bytes().len()).sum::<usize>();
        let (dtype, offsets) = (tensor.dtype().name(), [offset, end]);
        let entry = json!({ "dtype": dtype, "shape": tensor.shape, "data_offsets": offsets });
        header.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut header = serde_json::to_vec(&header).expect("plain data");
    header.resize(header.len().next_multiple_of(8), b' ');
    let write = |file: &mut File| {
        let mut out = BufWriter::new(file);
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        let mut lists = order.iter().flat_map(|tensor| tensor.lists);
        lists.try_for_each(|list| out.write_all(list.bytes()))?;
        out.into_inner().map_err(IntoInnerError::into_error)?.sync_all()
    };
    files::replace(path, |file, _| write(file))
        .map_err(|source| TensorsError::Io { path: path.to_owned(), source })
}
