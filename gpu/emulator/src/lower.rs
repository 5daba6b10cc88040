//! From syntax tree to micro-operations.
use crate::error::Unsupported;
use crate::module::Program;

/// Micro-operations of an entry.
#[derive(Debug)]
pub(crate) struct Code {
    pub registers: u32,
    pub static_shared_bytes: u32,
    pub local_bytes: u32,
}

/// Lowers an entry.
pub(crate) fn lower(program: &Program, entry: usize) -> Result<Code, Unsupported> {
    let function = &program.ast.functions[entry];
    Err(Unsupported {
        kernel: function.name.clone(),
        line: function.pos.line,
        what: "execution".into(),
        source_line: program.line(function.pos.line).into(),
    })
}
