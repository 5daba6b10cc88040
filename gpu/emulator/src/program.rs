//! A parsed module: what the text says, before anything of it is lowered or placed on a device.

use fathom_ptx::ast;

use crate::error::SourceLine;

/// Address that stands for function 0 of a module; the next ones follow at a distance of 16.
pub const FUNCTION_WINDOW: u64 = 0x0400_0000_0000;

/// A syntax tree, with the text that findings quote.
#[derive(Debug)]
pub struct Program {
    /// Vector registers are split into scalar ones.
    pub ast: ast::Module,
    /// The text by line, trimmed.
    lines: Vec<String>,
}

impl Program {
    /// The tree of a text.
    pub fn new(ast: ast::Module, text: &str) -> Program {
        Program { ast, lines: text.lines().map(|l| l.trim().to_owned()).collect() }
    }

    /// Where the instruction at a line stems from: the `.loc` before it in its function.
    pub fn source_of(&self, line: u32) -> Option<SourceLine> {
        let starts_function = |text: &str| {
            let mut words = text.split_whitespace();
            words.any(|word| matches!(word, ".entry" | ".func"))
        };
        let before = self.lines.get(..line as usize)?.iter().rev();
        let loc = before
            .take_while(|text| !starts_function(text))
            .find_map(|text| text.strip_prefix(".loc"))?;
        let mut numbers = loc.split([' ', '\t', ',']).filter(|word| !word.is_empty());
        let file = numbers.next()?;
        let line = numbers.next()?.parse().ok()?;
        let name = self.lines.iter().find_map(|text| {
            let (number, name) = text.strip_prefix(".file")?.trim_start().split_once('"')?;
            (number.trim() == file).then(|| name.split('"').next())?
        })?;
        Some(SourceLine { file: name.to_owned(), line })
    }

    /// The source line `line` (from 1), trimmed; empty where there is none.
    pub fn line(&self, line: u32) -> &str {
        line.checked_sub(1).and_then(|i| self.lines.get(i as usize)).map_or("", String::as_str)
    }
}
