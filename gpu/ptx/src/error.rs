//! The one error of this crate: a place in the source, what was expected and what was found.

use crate::ast::Pos;

/// Bad PTX. Displays as the message, the place, the source line with a mark under it, and help:
///
/// ```text
/// error: unknown instruction `ad.f32`
///   --> kernel.ptx:12:5
///    |
/// 12 |     ad.f32 %f1, %f2, %f3;
///    |     ^^^^^^
///    = help: nearest is `add`
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.render())]
pub struct Error {
    /// What a caller may want to tell apart.
    pub kind: ErrorKind,
    /// File name, where the caller gave one ([`Error::in_file`]).
    pub file: Option<String>,
    /// Where it is wrong: line and column, from 1.
    pub pos: Pos,
    /// Characters to mark from there on.
    pub width: u32,
    /// What is wrong, and what was expected.
    pub message: String,
    /// What to do about it, where that can be said.
    pub help: Option<String>,
    /// The source line, cut where it is long.
    pub line: String,
}

/// What is wrong, as far as callers go different ways.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ErrorKind {
    /// The text is not PTX, or breaks a rule of the PTX ISA.
    #[default]
    Malformed,
    /// An instruction that the table does not know: of a later PTX ISA, or a slip.
    UnknownInstruction,
}

/// Longest piece of a source line that is shown.
const SHOWN: usize = 120;

impl Error {
    /// An error at a place of `source`, `width` characters wide; its line is looked up there.
    pub fn new(source: &str, pos: Pos, width: u32, message: impl Into<String>) -> Self {
        let line = source.lines().nth(pos.line.saturating_sub(1) as usize).unwrap_or("");
        Error {
            kind: ErrorKind::default(),
            file: None,
            pos,
            width,
            message: message.into(),
            help: None,
            line: line.into(),
        }
    }

    /// Says of which kind it is.
    #[must_use]
    pub(crate) fn of_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// The same error with a line of help.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// The same error with the name of the file.
    #[must_use]
    pub fn in_file(mut self, file: impl Into<String>) -> Self {
        self.file = Some(file.into());
        self
    }

    fn render(&self) -> String {
        let file = self.file.as_deref().unwrap_or("ptx");
        let number = self.pos.line.to_string();
        let pad = " ".repeat(number.len());
        // A long line is cut around the mark.
        let col = self.pos.col.max(1) as usize - 1;
        let skip = if col > SHOWN * 2 / 3 { col - SHOWN / 2 } else { 0 };
        let shown: String = self
            .line
            .chars()
            .skip(skip)
            .take(SHOWN)
            .map(|c| if c == '\t' { ' ' } else { c })
            .collect();
        let mark = (self.width.max(1) as usize).min(SHOWN.saturating_sub(col - skip).max(1));
        let mut out = format!(
            "{}\n {pad}--> {file}:{}\n {pad} |\n {number} | {}\n {pad} | {}{}",
            self.message,
            self.pos,
            shown.trim_end(),
            " ".repeat(col - skip),
            "^".repeat(mark),
        );
        if let Some(help) = &self.help {
            out.push_str(&format!("\n {pad} = help: {help}"));
        }
        out
    }
}

/// What this crate's functions return; the error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
