//! PTX text to a checked syntax tree: lexer, parser, the table of instructions, validation.
//!
//! This room knows the language, not the machine: nothing here executes.
#![forbid(unsafe_code)]
