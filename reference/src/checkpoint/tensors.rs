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
    let whole = |(name, tensor): &'_ (String, Tensor)| (name.clone(), tensor.shape().to_vec());
    let lists = tensors.iter().map(|named| (whole(named), std::slice::from_ref(&named.1)));
    write_lists(path, lists.collect())
}

/// The same for tensors that lie in several, one behind the other: name and shape of each, and what
/// it consists of.
///
/// # Errors
/// [`TensorsError`].
pub(super) fn write_lists(
    path: &Path,
    mut order: Vec<((String, Vec<usize>), &[Tensor])>,
) -> Result<(), TensorsError> {
    let dtype = |list: &[Tensor]| list.first().expect("a tensor has a piece").dtype();
    order.sort_by_cached_key(|((name, _), list)| (Reverse(dtype(list).size()), name.clone()));
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut offset = 0;
    for ((name, shape), list) in &order {
        let end = offset + list.iter().map(|tensor| tensor.bytes().len()).sum::<usize>();
        let (dtype, offsets) = (dtype(list).name(), [offset, end]);
        let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets });
        header.insert(name.clone(), entry);
        offset = end;
    }
    let mut header = serde_json::to_vec(&header).expect("plain data");
    header.resize(header.len().next_multiple_of(8), b' ');
    let write = |file: &mut File| {
        let mut out = BufWriter::new(file);
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        let mut tensors = order.iter().flat_map(|(_, list)| list.iter());
        tensors.try_for_each(|tensor| out.write_all(tensor.bytes()))?;
        out.into_inner().map_err(IntoInnerError::into_error)?.sync_all()
    };
    files::replace(path, |file, _| write(file))
        .map_err(|source| TensorsError::Io { path: path.to_owned(), source })
}
