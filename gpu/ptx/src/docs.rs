//! The table of instructions as Markdown: `docs/ptx.md` is what [`markdown`] gives.

use std::fmt::Write;

use crate::table::{self, pattern};

const HEAD: &str = "\
# PTX: the language that the emulator reads

`fathom-ptx` parses PTX as NVRTC, nvcc, Triton and Numba emit it, up to PTX ISA 9.x. Every
instruction is a row of one table (`gpu/ptx/src/table/`), from which the parser, the operand
checks and this page are made.

```rust
let module = fathom_ptx::parse(&text)?;             // the first error, with its source line
for function in &module.functions { /* ... */ }
println!(\"{module}\");                               // back to text
```

What is read: all directives, types and declarations, initialisers (also addresses), vectors of any
length, nested scopes, calls through prototypes and target lists, `.branchtargets`, `.alias`,
`.pragma`; `.loc` and `.file` are kept as a line mapping, debug sections are skipped.

What is checked: suffixes and their combinations, number, kind, type and width of operands,
vector lengths, as ptxas checks them. `fathom_ptx::requirements` says which instructions need a
later `.version` or another `.target` than the module states.

What is not executed (recognised, so that a module that holds it loads): comparisons with depth
textures, the fifth-generation tensor cores. A kernel that begins with
one is refused when it is launched, with the line; where one stands behind a branch or in a called
function, it stops who comes to it.

To check a file: `cargo run -p fathom-ptx --example ptx_check -- FILE.ptx`.

## Instructions

In the syntax, `.word` is one of the set of that name listed behind it, or the literal suffix;
`{...}` is optional. As in ptxas, suffixes may stand in any order, except types, state spaces and
layouts among themselves. This page is made by `cargo run -p fathom-ptx --example ptx_docs`, and a
test compares.
";

/// The whole page, as `docs/ptx.md` holds it.
pub fn markdown() -> String {
    let mut out = String::from(HEAD);
    let count = table::forms().len();
    let _ = write!(out, "\n{count} forms of {} mnemonics.\n", table::Opcode::ALL.len());
    out.push_str("\nSets that any row may name:\n\n");
    for (name, words) in pattern::GROUPS {
        let _ = writeln!(out, "- `.{name}`: {}", dotted(words));
    }
    let mut title = "";
    for form in table::forms() {
        if form.title != title {
            title = form.title;
            let _ = write!(out, "\n### {title}\n\n");
        }
        let _ = writeln!(out, "- `{}`: {}", form.syntax(), form.row.semantics);
        let sets = pattern::sets(form.row);
        let listed: Vec<String> =
            sets.iter().map(|(name, words)| format!("`.{name}` = {}", dotted(words))).collect();
        let since = format!("PTX ISA {}", form.row.since.replace(' ', ", "));
        let notes =
            if listed.is_empty() { since } else { format!("{}. {since}", listed.join("; ")) };
        let _ = writeln!(out, "  {notes}");
    }
    out
}

fn dotted(words: &str) -> String {
    let all: Vec<String> = words.split_whitespace().map(|w| format!(".{w}")).collect();
    format!("`{}`", all.join(" "))
}
