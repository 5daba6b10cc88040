//! How every room reads its input files: whole, bounded, and only where there is a file.
//!
//! A device or a named pipe has no end, or none that comes by itself: a program that reads one as
//! if it were a file hangs, or fills the memory. What a shell hands over as `/dev/stdin` or
//! `/dev/fd/N` is read, up to the limit that every caller names.

use std::fs::{self, File, FileType};
use std::io::{self, Read};
use std::path::Path;

/// Most bytes of a configuration or a launch file: far above any real one, read in no time.
pub const CONFIG_BYTES: u64 = 16 << 20;

/// Most bytes of data that is held in memory as text: token ids, tables, logs, indices.
pub const TEXT_BYTES: u64 = 1 << 30;

/// What a path that is no regular file leads to, in words.
fn kind(found: FileType) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        match () {
            () if found.is_char_device() => return "a character device",
            () if found.is_block_device() => return "a block device",
            () if found.is_fifo() => return "a named pipe",
            () if found.is_socket() => return "a socket",
            () => {}
        }
    }
    if found.is_dir() { "a folder" } else { "something else" }
}

/// Whether the shell has named a pipe of the program's own: standard input, or `<(command)`.
fn is_piped(path: &Path) -> bool {
    let folder = path.parent().unwrap_or(Path::new(""));
    let folders = ["/dev/fd", "/proc/self/fd"].map(Path::new);
    path == Path::new("/dev/stdin") || folders.contains(&folder)
}

fn refuse(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

/// Opens a regular file, for formats that are mapped or read at places.
///
/// # Errors
/// Those of the file system; what is there instead of a file, in words.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let found = fs::metadata(path)?.file_type();
    if !found.is_file() {
        return Err(refuse(format!("expected a file, found {}", kind(found))));
    }
    File::open(path)
}

/// Opens a regular file or what the shell has piped in, to be read from front to back.
///
/// # Errors
/// As [`open_regular`].
pub fn open(path: &Path) -> io::Result<File> {
    let found = fs::metadata(path)?.file_type();
    let pipe = is_piped(path) && kind(found) == "a named pipe";
    if pipe { File::open(path) } else { open_regular(path) }
}

/// The bytes of a file, at most `limit`.
///
/// # Errors
/// As [`open`]; that there are more bytes than `limit`.
pub fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let file = open(path)?;
    let bytes = file.metadata()?.len();
    let too_large =
        |found: String| refuse(format!("expected at most {limit} bytes, found {found}"));
    if bytes > limit {
        return Err(too_large(bytes.to_string()));
    }
    let mut content = Vec::with_capacity(bytes as usize);
    file.take(limit + 1).read_to_end(&mut content)?;
    if content.len() as u64 > limit {
        return Err(too_large("more".to_owned()));
    }
    Ok(content)
}

/// The text of a file of at most `limit` bytes.
///
/// # Errors
/// As [`read`]; the line and the first byte that is no UTF-8.
pub fn read_text(path: &Path, limit: u64) -> io::Result<String> {
    String::from_utf8(read(path, limit)?).map_err(|e| {
        let (at, bytes) = (e.utf8_error().valid_up_to(), e.as_bytes());
        let line = 1 + bytes[..at].iter().filter(|&&b| b == b'\n').count();
        let byte = bytes[at];
        refuse(format!("line {line}: expected UTF-8 text, found byte 0x{byte:02x} at offset {at}"))
    })
}

/// Characters of a value that a message repeats.
pub const VALUE: usize = 60;

/// Characters of another library's message, which may repeat a value in its middle.
pub const MESSAGE: usize = 240;

/// A text of at most `most` characters for a message: a longer one loses its middle.
pub fn shorten(text: &str, most: usize) -> String {
    let length = text.chars().count();
    if length <= most {
        return text.to_owned();
    }
    let side = most.saturating_sub(3) / 2;
    let head: String = text.chars().take(side).collect();
    let tail: String = text.chars().skip(length - side).collect();
    format!("{head}...{tail}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error<T: std::fmt::Debug>(result: io::Result<T>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_file_is_named_and_not_read() {
        for (path, found) in [("/", "a folder"), ("/dev/zero", "a character device")] {
            let expected = format!("expected a file, found {found}");
            assert_eq!(error(open(Path::new(path))), expected);
            assert_eq!(error(read(Path::new(path), 9)), expected);
            assert_eq!(error(open_regular(Path::new(path))), expected);
        }
    }

    #[test]
    fn a_file_is_read_up_to_the_limit_and_as_text_where_it_is() {
        let path = std::env::temp_dir().join(format!("fathom-input-{}", std::process::id()));
        fs::write(&path, b"one\ntw\xff").unwrap();
        assert_eq!(read(&path, 7).unwrap(), b"one\ntw\xff");
        assert_eq!(error(read(&path, 6)), "expected at most 6 bytes, found 7");
        let expected = "line 2: expected UTF-8 text, found byte 0xff at offset 6";
        assert_eq!(error(read_text(&path, 7)), expected);
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_long_value_loses_its_middle() {
        assert_eq!(shorten("short", VALUE), "short");
        let long = shorten(&"ä".repeat(100_000), VALUE);
        assert_eq!(long, format!("{0}...{0}", "ä".repeat(28)));
    }
}
