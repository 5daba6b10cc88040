//! A parsed module: what the text says, before anything of it is lowered or placed on a device.

use fathom_ptx::ast;

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

    /// The source line `line` (from 1), trimmed; empty where there is none.
    pub fn line(&self, line: u32) -> &str {
        line.checked_sub(1).and_then(|i| self.lines.get(i as usize)).map_or("", String::as_str)
    }
}
