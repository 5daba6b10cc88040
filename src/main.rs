//! The command-line program: parsing and printing, one file per subcommand, no logic.
#![forbid(unsafe_code)]

fn main() {}
