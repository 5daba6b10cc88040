//! Files that are there whole or not at all, inputs that no output replaces, and (in
//! [`fathom_trace::input`]) how they are read.

use std::fs::{self, File, Permissions};
use std::io;
use std::path::{Path, PathBuf};

pub use fathom_trace::input::{
    CONFIG_BYTES, MESSAGE, TEXT_BYTES, VALUE, open, open_regular, read, read_text, shorten,
};
use tempfile::NamedTempFile;

/// How a file is named while it is being written.
const BESIDE: &str = ".writing-";

/// A file that is being written beside its target and takes its name in [`Beside::finish`]; dropped
/// before, it leaves nothing. Other users may read it as the umask says, or as they could its
/// predecessor.
#[derive(Debug)]
pub struct Beside {
    file: NamedTempFile,
    target: PathBuf,
    /// Whether the target is a device or a pipe, into which the bytes are copied.
    stream: bool,
}

impl Beside {
    /// Begins a file that is to stand at `target`; through a link, where it leads to.
    ///
    /// # Errors
    /// Those of the file system; a target that is a folder.
    pub fn begin(target: &Path) -> io::Result<Beside> {
        let (target, there) = match fs::metadata(target) {
            Ok(there) => (fs::canonicalize(target).unwrap_or(target.to_owned()), Some(there)),
            Err(_) => (target.to_owned(), None),
        };
        if there.as_ref().is_some_and(fs::Metadata::is_dir) {
            let message = "expected a file to write, found a folder";
            return Err(io::Error::new(io::ErrorKind::IsADirectory, message));
        }
        let stream = there.as_ref().is_some_and(|there| !there.is_file());
        let mut builder = tempfile::Builder::new();
        builder.prefix(BESIDE);
        // What the umask leaves of it, like a file that the shell creates.
        #[cfg(unix)]
        builder.permissions(<Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o666));
        let file =
            if stream { builder.tempfile()? } else { builder.tempfile_in(folder_of(&target))? };
        if let Some(there) = there.filter(fs::Metadata::is_file) {
            file.as_file().set_permissions(there.permissions())?;
        }
        Ok(Beside { file, target, stream })
    }

    /// Where the file lies until it is finished.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Gives the file the target's name.
    ///
    /// # Errors
    /// Those of the file system; the target is then as it was.
    pub fn finish(self) -> io::Result<()> {
        if self.stream {
            let mut out = fs::OpenOptions::new().write(true).open(&self.target)?;
            io::copy(&mut File::open(self.file.path())?, &mut out)?;
            return Ok(());
        }
        self.file.persist(&self.target)?;
        Ok(())
    }
}

impl io::Write for Beside {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// The folder that a path names a file in.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Writes a file beside its target, then renames it: whoever looks finds the file of before or the
/// new one, whole. `write` gets the new file and its path. A device or a pipe gets the bytes once
/// all are there.
///
/// # Errors
/// Those of `write` and of the file system; the target is then as it was.
pub fn replace(
    path: &Path,
    write: impl FnOnce(&mut File, &Path) -> io::Result<()>,
) -> io::Result<()> {
    let mut beside = Beside::begin(path)?;
    let at = beside.path().to_owned();
    write(beside.file.as_file_mut(), &at)?;
    beside.finish()
}

/// Removes what killed processes left of files that they were writing with [`replace`] into a
/// folder that belongs to the caller alone.
///
/// # Errors
/// Those of the file system.
pub fn sweep(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let left = entry.file_name().to_string_lossy().starts_with(BESIDE);
        if left && entry.file_type()?.is_file() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// An output that would destroy something.
#[derive(Debug, thiserror::Error)]
pub enum Clash {
    /// It would replace an input, or lie among the files of an input folder.
    #[error("{}: expected another place for the output: the input {} is there",
            output.display(), input.display())]
    Input {
        /// Where the output was to go.
        output: PathBuf,
        /// The input that is there.
        input: PathBuf,
    },
    /// It would replace another output of the same command.
    #[error("{} and {}: expected two places for two outputs, found one",
            first.display(), second.display())]
    Output {
        /// The output that is written first.
        first: PathBuf,
        /// The one that would replace it.
        second: PathBuf,
    },
}

/// Refuses outputs that would destroy an input: that are the same file (under any name, through any
/// link), or that lie in an input folder, whose files are read by their names. A command calls this
/// once, with all that it reads and writes, before it does either.
///
/// # Errors
/// [`Clash`].
pub fn keep_apart<'a>(
    inputs: impl IntoIterator<Item = &'a PathBuf>,
    outputs: impl IntoIterator<Item = &'a PathBuf>,
) -> Result<(), Clash> {
    let inputs: Vec<(&PathBuf, Identity)> = inputs.into_iter().map(Identity::named).collect();
    let mut before: Vec<(&PathBuf, Identity)> = Vec::new();
    for (output, place) in outputs.into_iter().map(Identity::named) {
        if place.is_stream {
            continue;
        }
        let meets = |(_, input): &&(_, Identity)| place.is(input) || place.lies_in(input);
        if let Some((input, _)) = inputs.iter().find(meets) {
            return Err(Clash::Input { output: output.clone(), input: (*input).clone() });
        }
        if let Some((first, _)) = before.iter().find(|(_, other)| place.is(other)) {
            return Err(Clash::Output { first: (*first).clone(), second: output.clone() });
        }
        before.push((output, place));
    }
    Ok(())
}

/// What a path leads to, now or once it is written.
#[derive(Debug)]
struct Identity {
    /// Without links, as far as there is something.
    real: PathBuf,
    /// Device and inode of what is there.
    inode: Option<(u64, u64)>,
    is_folder: bool,
    /// A device or a pipe: nothing in it is replaced.
    is_stream: bool,
}

impl Identity {
    fn named(path: &PathBuf) -> (&PathBuf, Identity) {
        let there = fs::metadata(path).ok();
        #[cfg(unix)]
        let inode = there.as_ref().map(|m| {
            use std::os::unix::fs::MetadataExt;
            (m.dev(), m.ino())
        });
        #[cfg(not(unix))]
        let inode = None;
        let is_folder = there.as_ref().is_some_and(fs::Metadata::is_dir);
        let is_stream = there.is_some_and(|m| !m.is_dir() && !m.is_file());
        (path, Identity { real: real(path), inode, is_folder, is_stream })
    }

    fn is(&self, other: &Identity) -> bool {
        self.real == other.real || self.inode.is_some() && self.inode == other.inode
    }

    fn lies_in(&self, folder: &Identity) -> bool {
        folder.is_folder && self.real.starts_with(&folder.real)
    }
}

/// A path without links in what of it exists.
fn real(path: &Path) -> PathBuf {
    if let Ok(real) = fs::canonicalize(path) {
        return real;
    }
    match (path.file_name(), folder_of(path)) {
        (Some(name), folder) if folder != path => real(folder).join(name),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_file_is_replaced_or_left_and_leftovers_are_swept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        replace(&path, |file, _| file.write_all(b"one")).unwrap();
        let fails = |file: &mut File, _: &Path| {
            file.write_all(b"tw")?;
            Err(io::Error::other("no more space"))
        };
        assert!(replace(&path, fails).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"one");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);

        fs::write(folder.path().join(".writing-x1"), "tw").unwrap();
        fs::create_dir(folder.path().join(".writing-step-1")).unwrap();
        sweep(folder.path()).unwrap();
        assert!(!folder.path().join(".writing-x1").exists() && path.exists());
        assert!(folder.path().join(".writing-step-1").exists());
    }

    /// A new file is as readable as one of `std` (which the umask decides), a replaced one as it
    /// was; a link stays and what it leads to is replaced; a device stays a device.
    #[test]
    fn permissions_links_and_devices_stay_what_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        fs::write(at("plain"), "").unwrap();
        replace(&at("new"), |file, _| file.write_all(b"new")).unwrap();
        assert_eq!(mode(&at("new")), mode(&at("plain")));

        fs::set_permissions(at("new"), Permissions::from_mode(0o640)).unwrap();
        symlink("new", at("link")).unwrap();
        replace(&at("link"), |file, _| file.write_all(b"newer")).unwrap();
        assert!(at("link").is_symlink());
        assert_eq!((fs::read(at("new")).unwrap(), mode(&at("new"))), (b"newer".to_vec(), 0o640));

        replace(Path::new("/dev/null"), |file, _| file.write_all(b"gone")).unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
        let error = replace(folder.path(), |_, _| Ok(())).unwrap_err();
        assert_eq!(error.to_string(), "expected a file to write, found a folder");
    }

    #[test]
    fn outputs_keep_apart_from_inputs_and_from_each_other() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("model")).unwrap();
        symlink("model", at("linked")).unwrap();
        for name in ["in", "model/config.json"] {
            fs::write(at(name), "").unwrap();
        }
        symlink("in", at("soft")).unwrap();
        fs::hard_link(at("in"), at("hard")).unwrap();
        let inputs = [at("in"), at("model")];
        let clash = |outputs: &[&str]| {
            let outputs: Vec<PathBuf> = outputs.iter().map(|name| at(name)).collect();
            keep_apart(&inputs, &outputs).err().map(|clash| clash.to_string())
        };
        for output in ["in", "model/../in", "soft", "hard", "model/config.json", "model/new/a"] {
            let said = clash(&[output]).unwrap_or_else(|| panic!("{output}"));
            assert!(said.contains(output) && said.contains("the input"), "{said}");
        }
        assert!(clash(&["linked/tokenizer.json"]).is_some());
        assert!(clash(&["a", "./a"]).unwrap().contains("two places for two outputs"));
        assert_eq!(clash(&["a", "b", "model-new/a"]), None);
        let null = PathBuf::from("/dev/null");
        assert!(keep_apart([&null], [&null, &null]).is_ok());
    }
}
