//! Plain text and JSON lines, read front to back in bounded memory.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use fathom_trace::input;
use serde_json::Value;

use super::DataError;
use super::config::{SourceConfig, Split};
use super::source::Document;

/// Bytes of a JSON line above which it is refused.
const LONGEST_LINE: u64 = 64 << 20;

fn content(path: &Path, line: u64, expected: &str, found: impl ToString) -> DataError {
    DataError::Content {
        path: path.to_owned(),
        place: format!("line {line}"),
        expected: expected.into(),
        found: found.to_string(),
    }
}

/// Reads a whole text file, as UTF-8.
///
/// # Errors
/// [`DataError`] naming the line that is no UTF-8.
pub fn read_text(path: &Path) -> Result<String, DataError> {
    let bytes = input::read(path, input::TEXT_BYTES).map_err(DataError::io(path))?;
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        let bytes = e.as_bytes();
        let line = 1 + bytes[..at].iter().filter(|&&b| b == b'\n').count();
        let found = format!("byte 0x{:02x} at offset {at}", bytes[at]);
        content(path, line as u64, "UTF-8 text", found)
    })
}

/// Calls `visit` with offset and text of every document of a text file.
pub(super) fn documents(
    path: &Path,
    config: &SourceConfig,
    visit: &mut dyn FnMut(u64, &str) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let file = input::open_regular(path).map_err(DataError::io(path))?;
    let mut reader = BufReader::with_capacity(1 << 16, file);
    let max = config.max_document_bytes;
    let (mut document, mut start, mut at) = (String::new(), 0, 0u64);
    let (mut line, mut carried) = (1, Vec::new());
    loop {
        // At most `max` bytes at a time; a character that this cuts is carried over.
        let mut piece = std::mem::take(&mut carried);
        let limit = max.saturating_sub(piece.len()).max(1) as u64;
        let read = reader.by_ref().take(limit).read_until(b'\n', &mut piece);
        let read = read.map_err(DataError::io(path))?;
        if piece.is_empty() {
            break;
        }
        let text = match std::str::from_utf8(&piece) {
            Ok(text) => text,
            Err(e) if e.error_len().is_none() && read > 0 && e.valid_up_to() > 0 => {
                carried = piece.split_off(e.valid_up_to());
                std::str::from_utf8(&piece).expect("just checked")
            }
            Err(e) => {
                let bad = piece[e.valid_up_to()];
                let found = format!("byte 0x{bad:02x} at offset {}", at + e.valid_up_to() as u64);
                return Err(content(path, line, "UTF-8 text", found));
            }
        };
        if document.len() + text.len() > max && !document.is_empty() {
            visit(start, &document)?;
            document.clear();
        }
        let ends = match config.split {
            Split::File => false,
            Split::Paragraph => text.trim().is_empty() && text.ends_with('\n'),
            Split::Line => text.ends_with('\n'),
        };
        if document.is_empty() {
            start = at;
        }
        document.push_str(text);
        at += text.len() as u64;
        line += u64::from(text.ends_with('\n'));
        if ends {
            visit(start, &document)?;
            document.clear();
        }
    }
    if document.is_empty() { Ok(()) } else { visit(start, &document) }
}

/// Calls `visit` with offset, length and document of every line of a JSONL file; blank lines are
/// passed over.
pub(super) fn json_lines(
    path: &Path,
    config: &SourceConfig,
    visit: &mut dyn FnMut(u64, usize, Document) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let file = input::open_regular(path).map_err(DataError::io(path))?;
    let mut reader = BufReader::with_capacity(1 << 16, file);
    let (mut at, mut number, mut line) = (0, 0, Vec::new());
    loop {
        line.clear();
        let read = reader.by_ref().take(LONGEST_LINE + 1).read_until(b'\n', &mut line);
        let read = read.map_err(DataError::io(path))?;
        if read == 0 {
            return Ok(());
        }
        number += 1;
        if read as u64 > LONGEST_LINE {
            let expected = format!("at most {LONGEST_LINE} bytes");
            return Err(content(path, number, &expected, "a longer line"));
        }
        if !line.trim_ascii().is_empty() {
            let document = json_document(&line, config)
                .map_err(|(expected, found)| content(path, number, &expected, found))?;
            visit(at, read, document)?;
        }
        at += read as u64;
    }
}

/// The document of a JSON line; the error is what was expected and found.
pub(super) fn json_document(
    line: &[u8],
    config: &SourceConfig,
) -> Result<Document, (String, String)> {
    let value: Value = serde_json::from_slice(line)
        .map_err(|e| ("a JSON object".to_owned(), format!("broken JSON: {e}")))?;
    let Value::Object(object) = value else {
        return Err(("a JSON object".into(), kind(&value).into()));
    };
    let field = |name: &str| match object.get(name) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err((format!("a string in field '{name}'"), kind(other).into())),
        None => {
            let names: Vec<&str> = object.keys().map(String::as_str).collect();
            let found = if names.is_empty() { "none".into() } else { names.join(", ") };
            Err((format!("a field '{name}'"), format!("fields {found}")))
        }
    };
    Document::of(config, field)
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
