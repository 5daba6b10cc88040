//! Checkpoints of a run: everything needed to go on to the bit.
//!
//! Ranks write theirs side by side: each the pieces that it owns, as `NAME@OFFSET`; the first then
//! writes the index, with the whole tensors' shapes, and renames. A reader sees whole tensors.
//!
//! A checkpoint is a folder `step-00000100` with files of tensors (safetensors) and
//! `checkpoint.json`, which holds the run's header, and size and blake3 hash of every file, under a
//! hash of its own. It is written into a folder beside it, flushed to the disk, and renamed, so
//! that a process killed at any moment leaves whole checkpoints only. Reading checks everything;
//! [`latest`] goes back to the newest one that is whole.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::tensors::{self, Joined, TensorsError, TensorsFile};
use crate::Tensor;

/// Why a checkpoint cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A file is not what was written.
    #[error("{}: expected {expected}, found {found}", path.display())]
    Corrupt {
        /// The file that the error is about.
        path: PathBuf,
        /// What was written.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A file of tensors cannot be read or written.
    #[error(transparent)]
    Tensors(#[from] TensorsError),
    /// There are checkpoints, and none of them is whole.
    #[error("{}: expected a whole checkpoint, found {} damaged: {}",
            folder.display(), damages.len(), damages.join("; "))]
    NoneWhole {
        /// The folder of checkpoints.
        folder: PathBuf,
        /// What is wrong with each, the newest first.
        damages: Vec<String>,
    },
}

/// What a checkpoint of a run holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Saved {
    /// Optimizer steps done.
    pub step: u64,
    /// What the run keeps beside its tensors: [`Header`](crate::train::state::Header) as JSON.
    pub header: Value,
    /// Weights, moments and averages by name.
    pub tensors: Vec<(String, Tensor)>,
}

/// `checkpoint.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Index {
    format: String,
    /// blake3 of `body` as compact JSON.
    blake3: String,
    body: Body,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    step: u64,
    header: Value,
    files: Vec<Listed>,
}

/// A file of a checkpoint, as its index lists it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listed {
    name: String,
    bytes: u64,
    blake3: String,
    /// Whole shapes of the tensors of which the file has pieces.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    shapes: BTreeMap<String, Vec<usize>>,
}

/// Elements of a tensor that one of several writers has.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// The tensor's name.
    pub name: String,
    /// Its whole shape.
    pub shape: Vec<usize>,
    /// The first of the elements, in row-major order.
    pub offset: usize,
    /// The elements, as lists that follow one another; one at least.
    pub lists: Vec<Tensor>,
}

impl Part {
    /// How many elements it has.
    pub fn elements(&self) -> usize {
        self.lists.iter().map(Tensor::len).sum()
    }

    fn bytes(&self) -> usize {
        self.lists.iter().map(|list| list.bytes().len()).sum()
    }
}

const FORMAT: &str = "fathom-training-1";
/// The same with pieces of tensors in its files.
const IN_PIECES: &str = "fathom-training-2";
const INDEX: &str = "checkpoint.json";

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
    let path = path.to_owned();
    |source| CheckpointError::Io { path, source }
}

fn body_hash(body: &Body) -> String {
    let text = serde_json::to_vec(body).expect("plain data");
    blake3::hash(&text).to_hex().to_string()
}

fn file_hash(path: &Path) -> Result<(u64, String), CheckpointError> {
    let mut hasher = blake3::Hasher::new();
    let mut file = File::open(path).map_err(io_at(path))?;
    let bytes = io::copy(&mut file, &mut hasher).map_err(io_at(path))?;
    Ok((bytes, hasher.finalize().to_hex().to_string()))
}

fn sync(path: &Path) -> Result<(), CheckpointError> {
    File::open(path).and_then(|f| f.sync_all()).map_err(io_at(path))
}

/// Writes a checkpoint into `folder`, in files of at most `shard_bytes` (one tensor at least), and
/// gives its path.
///
/// # Errors
/// [`CheckpointError`]; no checkpoint is then there that was not before.
pub fn write(folder: &Path, saved: &Saved, shard_bytes: usize) -> Result<PathBuf, CheckpointError> {
    let beside = begin(folder, saved.step)?;
    let shards = shards(&saved.tensors, shard_bytes, |(_, t)| t.bytes().len());
    let mut files = Vec::new();
    for (i, shard) in shards.iter().enumerate() {
        let name = format!("tensors-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        tensors::write(&beside.join(&name), shard)?;
        files.push(listed(&beside, name, BTreeMap::new())?);
    }
    commit(folder, saved.step, saved.header.clone(), files)
}

/// Items in order, cut so that each cut has at most `bytes`, or is one item.
fn shards<T>(items: &[T], bytes: usize, of: impl Fn(&T) -> usize) -> Vec<&[T]> {
    let (mut shards, mut rest) = (Vec::new(), items);
    while !rest.is_empty() {
        let mut filled = 0;
        let fits = |item: &&T| {
            filled += of(item);
            filled <= bytes
        };
        let (shard, after) = rest.split_at(rest.iter().take_while(fits).count().max(1));
        shards.push(shard);
        rest = after;
    }
    shards
}

/// What the index lists of a file.
fn listed(
    beside: &Path,
    name: String,
    shapes: BTreeMap<String, Vec<usize>>,
) -> Result<Listed, CheckpointError> {
    let (bytes, blake3) = file_hash(&beside.join(&name))?;
    Ok(Listed { name, bytes, blake3, shapes })
}

/// Where the checkpoint of a step is once it is whole.
pub fn path(folder: &Path, step: u64) -> PathBuf {
    folder.join(format!("step-{step:08}"))
}

fn beside(folder: &Path, step: u64) -> PathBuf {
    folder.join(format!(".writing-step-{step:08}"))
}

/// Begins a checkpoint, for [`write_parts`] and [`commit`]: an empty folder beside its place.
///
/// # Errors
/// [`CheckpointError::Io`].
pub fn begin(folder: &Path, step: u64) -> Result<PathBuf, CheckpointError> {
    fs::create_dir_all(folder).map_err(io_at(folder))?;
    let beside = beside(folder, step);
    if beside.exists() {
        fs::remove_dir_all(&beside).map_err(io_at(&beside))?;
    }
    fs::create_dir(&beside).map_err(io_at(&beside))?;
    Ok(beside)
}

/// Writes the parts of one of several writers, in files of at most `shard_bytes` (one part at
/// least), and gives what the index lists.
///
/// # Errors
/// [`CheckpointError`].
pub fn write_parts(
    folder: &Path,
    step: u64,
    writer: usize,
    parts: &[Part],
    shard_bytes: usize,
) -> Result<Vec<Listed>, CheckpointError> {
    let beside = beside(folder, step);
    let mut files = Vec::new();
    for (i, shard) in shards(parts, shard_bytes, Part::bytes).iter().enumerate() {
        let name = format!("pieces-{writer:05}-{:05}.safetensors", i + 1);
        let joined = shard.iter().map(|part| Joined {
            name: format!("{}@{}", part.name, part.offset),
            shape: vec![part.elements()],
            lists: &part.lists,
        });
        tensors::write_joined(&beside.join(&name), joined.collect())?;
        let shapes = shard.iter().map(|p| (p.name.clone(), p.shape.clone())).collect();
        files.push(listed(&beside, name, shapes)?);
    }
    Ok(files)
}

/// Writes the index of a checkpoint whose files are there, and renames it to its place.
///
/// # Errors
/// [`CheckpointError`]; no checkpoint is then there that was not before.
pub fn commit(
    folder: &Path,
    step: u64,
    header: Value,
    files: Vec<Listed>,
) -> Result<PathBuf, CheckpointError> {
    let (beside, target) = (beside(folder, step), path(folder, step));
    let pieces = files.iter().any(|file| !file.shapes.is_empty());
    let format = if pieces { IN_PIECES } else { FORMAT };
    let body = Body { step, header, files };
    let index = Index { format: format.into(), blake3: body_hash(&body), body };
    let path = beside.join(INDEX);
    let text = serde_json::to_vec_pretty(&index).expect("plain data");
    fs::write(&path, text).map_err(io_at(&path))?;
    sync(&path)?;
    sync(&beside)?;
    if target.exists() {
        remove(folder, &format!("step-{step:08}"))?;
    }
    fs::rename(&beside, &target).map_err(io_at(&target))?;
    sync(folder)?;
    Ok(target)
}

/// Removes a checkpoint: renamed first, so that no half of it keeps its name.
fn remove(folder: &Path, name: &str) -> Result<(), CheckpointError> {
    let (path, aside) = (folder.join(name), folder.join(format!(".removing-{name}")));
    if aside.exists() {
        fs::remove_dir_all(&aside).map_err(io_at(&aside))?;
    }
    fs::rename(&path, &aside).map_err(io_at(&path))?;
    fs::remove_dir_all(&aside).map_err(io_at(&aside))
}

/// The checkpoints of a folder, each its step and its path, the newest first; none where there is
/// no folder.
///
/// # Errors
/// [`CheckpointError::Io`].
pub fn list(folder: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(io_at(folder))? {
        let path = entry.map_err(io_at(folder))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if let Some(Ok(step)) = name.strip_prefix("step-").map(str::parse) {
            found.push((step, path));
        }
    }
    found.sort_unstable_by(|a, b| b.cmp(a));
    Ok(found)
}

/// Keeps the newest `keep` checkpoints, and removes what interrupted writers left behind.
///
/// # Errors
/// [`CheckpointError::Io`].
pub fn rotate(folder: &Path, keep: usize) -> Result<(), CheckpointError> {
    for (_, path) in list(folder)?.into_iter().skip(keep) {
        let name = path.file_name().and_then(|n| n.to_str()).expect("listed by name");
        remove(folder, name)?;
    }
    for entry in fs::read_dir(folder).map_err(io_at(folder))? {
        let path = entry.map_err(io_at(folder))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if name.starts_with(".writing-") || name.starts_with(".removing-") {
            fs::remove_dir_all(&path).map_err(io_at(&path))?;
        }
    }
    Ok(())
}

/// Reads a checkpoint and checks every hash.
///
/// # Errors
/// [`CheckpointError`] naming the file that is not what was written.
pub fn read(path: &Path) -> Result<Saved, CheckpointError> {
    let index_path = path.join(INDEX);
    let corrupt = |path: &Path, expected: String, found: String| {
        Err(CheckpointError::Corrupt { path: path.to_owned(), expected, found })
    };
    let text = fs::read(&index_path).map_err(io_at(&index_path))?;
    let index: Index = match serde_json::from_slice(&text) {
        Ok(index) => index,
        Err(e) => return corrupt(&index_path, "a checkpoint's index".into(), e.to_string()),
    };
    if ![FORMAT, IN_PIECES].contains(&index.format.as_str()) {
        let expected = format!("format '{FORMAT}' or '{IN_PIECES}'");
        return corrupt(&index_path, expected, format!("'{}'", index.format));
    }
    let found = body_hash(&index.body);
    if found != index.blake3 {
        return corrupt(&index_path, format!("a body of blake3 {}", index.blake3), found);
    }
    let (mut tensors, mut pieces) = (Vec::new(), Pieces::default());
    for listed in &index.body.files {
        let path = path.join(&listed.name);
        let (bytes, blake3) = file_hash(&path)?;
        if bytes != listed.bytes {
            let expected = format!("{} bytes", listed.bytes);
            return corrupt(&path, expected, format!("{bytes} bytes"));
        }
        if blake3 != listed.blake3 {
            return corrupt(&path, format!("blake3 {}", listed.blake3), blake3);
        }
        let file = TensorsFile::open(&path)?;
        for name in file.entries.keys() {
            let tensor = file.tensor(name).expect("listed in the file");
            let piece = name.rsplit_once('@').and_then(|(whole, offset)| {
                Some((listed.shapes.get_key_value(whole)?, offset.parse::<usize>().ok()?))
            });
            match piece {
                Some(((whole, shape), offset)) => {
                    pieces.entry(whole.clone()).or_default().push((offset, shape.clone(), tensor));
                }
                None => tensors.push((name.clone(), tensor)),
            }
        }
    }
    for (name, pieces) in pieces {
        match join(pieces) {
            Ok(tensor) => tensors.push((name, tensor)),
            Err(found) => {
                return corrupt(&index_path, format!("all of tensor '{name}'"), found);
            }
        }
    }
    Ok(Saved { step: index.body.step, header: index.body.header, tensors })
}

/// By tensor: offset, whole shape and elements of each piece.
type Pieces = BTreeMap<String, Vec<(usize, Vec<usize>, Tensor)>>;

/// A tensor of its pieces; what is wrong where they are not all of it, each once.
fn join(mut pieces: Vec<(usize, Vec<usize>, Tensor)>) -> Result<Tensor, String> {
    pieces.sort_by_key(|(offset, ..)| *offset);
    let (_, shape, first) = &pieces[0];
    let (mut bytes, mut end) = (Vec::new(), 0);
    for (offset, of, tensor) in &pieces {
        if (of, tensor.dtype()) != (shape, first.dtype()) {
            return Err(format!(
                "pieces of {} {shape:?} and {} {of:?}",
                first.dtype(),
                tensor.dtype()
            ));
        }
        if *offset != end {
            return Err(format!("a piece at {offset} where {end} follows"));
        }
        bytes.extend_from_slice(tensor.bytes());
        end += tensor.len();
    }
    let elements = shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
    if elements != Some(end) {
        return Err(format!("{end} elements of {shape:?}"));
    }
    Ok(Tensor::from_bytes(first.dtype(), shape, &bytes))
}

/// The newest checkpoint that is whole, `None` where there are none at all; `refused` is told of
/// each one that is damaged and newer.
///
/// # Errors
/// [`CheckpointError::Io`] where the folder cannot be listed, [`CheckpointError::NoneWhole`] where
/// there are checkpoints but none can be used: to begin anew would lose what they hold.
pub fn latest(
    folder: &Path,
    refused: &mut dyn FnMut(&Path, &CheckpointError),
) -> Result<Option<Saved>, CheckpointError> {
    let mut damages = Vec::new();
    let listed = list(folder)?;
    for (_, path) in &listed {
        match read(path) {
            Ok(saved) => return Ok(Some(saved)),
            Err(error) => {
                refused(path, &error);
                damages.push(error.to_string());
            }
        }
    }
    if listed.is_empty() {
        return Ok(None);
    }
    Err(CheckpointError::NoneWhole { folder: folder.to_owned(), damages })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(step: u64) -> Saved {
        let tensor = |x: f32| Tensor::from_vec(&[2, 2], vec![x, -0.0, f32::MIN_POSITIVE, 1.0]);
        let header = serde_json::json!({ "tokens": 12, "rate": 0.1 });
        let names = ["a", "b", "c"];
        let tensors = names.map(|n| (n.to_owned(), tensor(step as f32))).to_vec();
        Saved { step, header, tensors }
    }

    #[test]
    fn what_was_written_is_read_and_old_ones_go() {
        let folder = tempfile::tempdir().unwrap();
        for step in [1, 2, 3] {
            // Two tensors fill a file.
            write(folder.path(), &saved(step), 32).unwrap();
        }
        fs::create_dir(folder.path().join(".writing-step-00000009")).unwrap();
        rotate(folder.path(), 2).unwrap();
        let steps: Vec<u64> = list(folder.path()).unwrap().into_iter().map(|c| c.0).collect();
        assert_eq!(steps, [3, 2]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        let read = latest(folder.path(), &mut |_, e| panic!("{e}")).unwrap().unwrap();
        assert_eq!(read, saved(3));
        let files = fs::read_dir(folder.path().join("step-00000003")).unwrap().count();
        assert_eq!(files, 3, "an index and two files of tensors");
    }

    #[test]
    fn pieces_of_several_writers_are_whole_tensors_to_a_reader() {
        let folder = tempfile::tempdir().unwrap();
        let whole = saved(3);
        begin(folder.path(), 3).unwrap();
        // Writer w has every element whose number is 2w or 2w + 1, so none has a whole tensor.
        let mut files = Vec::new();
        for writer in [1, 0] {
            let part = |(name, tensor): &(String, Tensor)| {
                let own = tensor.bytes()[8 * writer..][..8].chunks(4);
                let lists = own.map(|element| Tensor::from_bytes(tensor.dtype(), &[1], element));
                let (name, shape) = (name.clone(), tensor.shape().to_vec());
                Part { name, shape, offset: 2 * writer, lists: lists.collect() }
            };
            let parts: Vec<Part> = whole.tensors.iter().map(part).collect();
            files.extend(write_parts(folder.path(), 3, writer, &parts, 16).unwrap());
        }
        assert_eq!(files.len(), 4, "two files a writer");
        assert!(list(folder.path()).unwrap().is_empty(), "nothing is there before the commit");
        let missing = files[1..].to_vec();
        let path = commit(folder.path(), 3, whole.header.clone(), files).unwrap();
        assert_eq!(read(&path).unwrap(), whole);
        // An index that lists not all of them.
        let index = Body { step: 3, header: whole.header, files: missing };
        let index = Index { format: IN_PIECES.into(), blake3: body_hash(&index), body: index };
        fs::write(path.join(INDEX), serde_json::to_vec(&index).unwrap()).unwrap();
        let e = read(&path).unwrap_err().to_string();
        assert!(e.contains("all of tensor 'a', found 2 elements of [2, 2]"), "{e}");
    }

    #[test]
    fn a_damaged_one_is_refused_with_its_reason_and_the_one_before_is_used() {
        type Damage = fn(&Path);
        let damage: [(&str, &str, Damage); 5] = [
            ("tensors-00001-of-00002.safetensors", "blake3", |path| {
                let mut bytes = fs::read(path).unwrap();
                *bytes.last_mut().unwrap() ^= 1;
                fs::write(path, bytes).unwrap();
            }),
            ("tensors-00002-of-00002.safetensors", "bytes", |path| {
                let bytes = fs::read(path).unwrap();
                fs::write(path, &bytes[..bytes.len() - 3]).unwrap();
            }),
            ("tensors-00001-of-00002.safetensors", "No such file", |path| {
                fs::remove_file(path).unwrap();
            }),
            (INDEX, "blake3", |path| {
                let text = fs::read_to_string(path).unwrap();
                fs::write(path, text.replace("12", "13")).unwrap();
            }),
            (INDEX, "index", |path| {
                let text = fs::read_to_string(path).unwrap();
                fs::write(path, &text[..text.len() / 2]).unwrap();
            }),
        ];
        for (file, reason, damage) in damage {
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), &saved(1), 32).unwrap();
            let newest = write(folder.path(), &saved(2), 32).unwrap();
            damage(&newest.join(file));
            let mut refused = Vec::new();
            let mut tell = |_: &Path, e: &CheckpointError| refused.push(e.to_string());
            let read = latest(folder.path(), &mut tell).unwrap().unwrap();
            assert_eq!(read, saved(1));
            assert!(refused.len() == 1 && refused[0].contains(reason), "{refused:?}");
            assert!(refused[0].contains(file), "{refused:?}");
            // Without the one before nothing is left to go on from, and both are named.
            damage(&folder.path().join("step-00000001").join(file));
            let error = latest(folder.path(), &mut |_, _| ()).unwrap_err();
            assert!(
                matches!(&error, CheckpointError::NoneWhole { damages, .. }
                if damages.len() == 2 && damages.iter().all(|d| d.contains(reason))),
                "{error}"
            );
        }
    }
}
