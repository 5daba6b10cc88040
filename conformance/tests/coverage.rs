//! The pages' tables of what kernels compute are those that planning the runs gives.

use std::path::Path;

use fathom_conformance::coverage;

/// Holds a page's block to `table`; `FATHOM_BLESS=1` rewrites it.
fn holds(page: &str, what: &str, table: &str) {
    let begin = format!(
        "<!-- {what}; `fathom kernels coverage`, rewritten with FATHOM_BLESS=1 cargo test \
         -p fathom-conformance --test coverage -->\n"
    );
    let end = format!("<!-- End of: {what} -->\n");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(page);
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(&begin).unwrap_or_else(|| panic!("{page} has no {begin}"));
    let (_, after) = rest.split_once(&end).unwrap_or_else(|| panic!("{page} has no {end}"));
    let expected = format!("{before}{begin}\n{table}\n{end}{after}");
    if std::env::var_os("FATHOM_BLESS").is_some() {
        std::fs::write(&path, &expected).unwrap();
    }
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text == expected, "{page}: '{what}' is not what the runs ask for; expected\n{table}");
}

#[test]
fn the_pages_say_what_kernels_compute() {
    let coverage = coverage::coverage().unwrap();
    let (by_run, by_op) = (coverage.by_run(), coverage.by_op());
    holds("README.md", "Runs that kernels cover", &by_run);
    holds("docs/kernels.md", "Ops that kernels cover", &by_op);
    // The tables say something: every run asks for dozens of ops, every op has its row.
    let ops = fathom_reference::op::op_names();
    assert_eq!(by_op.lines().count(), 2 + ops.len());
    assert!(by_op.contains("| `mma` | none |"), "{by_op}");
    assert!(by_op.contains("| `attention_backward` | yes | all | all | all |"), "{by_op}");
    assert!(by_run.contains("| the report's recipe | 3"), "{by_run}");
}
