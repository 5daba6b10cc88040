//! Whether a module's `.version` and `.target` have the instructions that it uses.

use crate::ast::{Module, Target};
use crate::error::Error;
use crate::table::FormId;

/// Compute capability times ten, and whether only that very architecture (`a`) or its family
/// (`f`) will do.
type Needed = (u32, Option<char>);

/// What a row of the table needs: PTX ISA version and target.
fn needs(form: FormId) -> ((u32, u32), Option<Needed>) {
    let mut words = form.form().row.since.split(' ');
    let version = words.next().and_then(|v| v.split_once('.'));
    let number = |s: &str| s.parse().unwrap_or(0);
    let version = version.map_or((1, 0), |(a, b)| (number(a), number(b)));
    let target = words.next().and_then(|t| t.strip_prefix("sm_")).map(|t| {
        let digits = t.trim_end_matches(['a', 'f']);
        (number(digits), t.chars().last().filter(|c| !c.is_ascii_digit()))
    });
    (version, target)
}

/// An architecture-specific feature is there on the same architecture with `a`; sm_100a's also on
/// its successors' own `a` and `f` targets.
fn has(target: &Target, sm: u32, suffix: Option<char>) -> bool {
    match suffix {
        None => target.sm >= sm,
        Some(_) if sm >= 100 => target.sm >= sm && target.suffix.is_some(),
        Some(_) => target.sm == sm && target.suffix == Some('a'),
    }
}

/// One error for every instruction that needs a later `.version` or another `.target` than the
/// module states, as ptxas would refuse it. `source` is the module's text, for the errors' lines.
pub fn requirements(source: &str, module: &Module) -> Vec<Error> {
    let mut errors = Vec::new();
    let bodies = module.functions.iter().filter_map(|f| f.body.as_ref());
    for (_, instruction) in bodies.flat_map(|b| b.instructions()) {
        let (version, target) = needs(instruction.form);
        let op = instruction.op;
        let mut refuse = |what: String| {
            let width = op.text().len() as u32;
            errors.push(Error::new(source, instruction.pos, width, what));
        };
        if module.version < version {
            let (major, minor) = version;
            refuse(format!("this form of `{op}` needs PTX ISA .version {major}.{minor} or later"));
        }
        if let Some((sm, suffix)) = target
            && !has(&module.target, sm, suffix)
        {
            let suffix = suffix.map(String::from).unwrap_or_default();
            refuse(format!("this form of `{op}` needs .target sm_{sm}{suffix}"));
        }
    }
    errors
}
