//! PTX text to a checked syntax tree: lexer, parser, the table of instructions, validation.
//!
//! This room knows the language, not the machine: nothing here executes. Read [`ast`] for what
//! comes out, [`table`] for which instructions there are, [`types`] for their suffixes.
#![forbid(unsafe_code)]

pub mod ast;
pub mod docs;
pub mod error;
mod image;
pub mod lexer;
pub mod parser;
mod print;
mod requirements;
pub mod table;
pub mod types;
mod validate;

pub use error::{Error, ErrorKind};
pub use parser::{Options, parse, parse_with};
pub use print::ItemText;
pub use requirements::requirements;
