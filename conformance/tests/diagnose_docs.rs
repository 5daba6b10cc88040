//! docs/diagnose.md lists the hypotheses of the tables; `FATHOM_BLESS=1` writes them anew.

use std::path::Path;

use fathom_conformance::diagnose::catalogue;

const MARK: &str = "<!-- hypotheses -->\n";

fn tables() -> String {
    let mut text = String::new();
    for (title, rows) in catalogue() {
        text += &format!("\n### {title}\n\n| hypothesis | meaning | seen |\n|---|---|---|\n");
        for [name, meaning, seen] in rows {
            let escaped = |s: &str| s.replace('|', "\\|");
            text +=
                &format!("| {} | {} | {} |\n", escaped(&name), escaped(&meaning), escaped(&seen));
        }
    }
    text
}

#[test]
fn the_page_lists_every_hypothesis() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/diagnose.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let (before, listed) = page.split_once(MARK).expect("the mark before the tables");
    if std::env::var_os("FATHOM_BLESS").is_some_and(|v| v == "1") {
        let page = format!("{before}{MARK}{}", tables());
        fathom_conformance::write_atomically(&path, page.as_bytes()).unwrap();
        return;
    }
    assert!(
        listed == tables(),
        "docs/diagnose.md is not in step with the tables of hypotheses; run \
         FATHOM_BLESS=1 cargo test -p fathom-conformance --test diagnose_docs"
    );
}

#[test]
fn every_hypothesis_says_what_it_means() {
    for (title, rows) in catalogue() {
        assert!(!rows.is_empty(), "{title}");
        for [name, meaning, _] in rows {
            assert!(!name.is_empty() && meaning.ends_with('.'), "{title}: {name}: {meaning}");
        }
    }
}
