//! Files that are there whole or not at all.

use std::fs::{self, File};
use std::io;
use std::path::Path;

/// How a file is named while it is being written.
const BESIDE: &str = ".writing-";

/// Writes a file beside its target, then renames it: whoever looks finds the file of before or the
/// new one, whole. `write` gets the new file and its path.
///
/// # Errors
/// Those of `write` and of the file system; the target is then as it was.
pub fn replace(
    path: &Path,
    write: impl FnOnce(&mut File, &Path) -> io::Result<()>,
) -> io::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(BESIDE);
    // Readable by all, like a file that the shell creates.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644));
    let (mut file, beside) = builder.tempfile_in(folder)?.into_parts();
    write(&mut file, &beside)?;
    beside.persist(path)?;
    Ok(())
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

#[cfg(test)]
mod tests {
    use std::io::Write;

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
}
