//! The table of instructions is complete, says what it needs, and is what the docs show.

use std::collections::BTreeSet;

use fathom_ptx::table::{Opcode, forms, forms_of, nearest, split};
use fathom_ptx::types::{Flag, Mod};
use fathom_ptx::{parse, requirements};

#[test]
fn every_opcode_has_a_form_and_every_flag_a_use() {
    for op in Opcode::ALL {
        assert!(!forms_of(*op).is_empty(), "`{op}` has no row");
        assert_eq!(split(op.text()), Some((*op, "")));
    }
    let used: BTreeSet<Flag> = forms()
        .iter()
        .flat_map(|f| f.elements.iter().flat_map(|e| e.choices.iter()))
        .filter_map(|m| if let Mod::Flag(f) = m { Some(*f) } else { None })
        .chain([Flag::Unified])
        .collect();
    let unused: Vec<&Flag> = Flag::ALL.iter().filter(|f| !used.contains(f)).collect();
    assert!(unused.is_empty(), "{unused:?}");
}

#[test]
fn rows_are_complete() {
    for form in forms() {
        let row = form.row;
        assert!(!row.semantics.is_empty() && row.semantics.len() < 240, "{row:?}");
        let version = row.since.split(' ').next().and_then(|v| v.split_once('.'));
        let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
        assert!(version.is_some_and(|(a, b)| digits(a) && digits(b)), "{row:?}");
        // A row's own set that its syntax does not name is a slip.
        for (name, _) in fathom_ptx::table::pattern::sets(row) {
            assert!(row.syntax.contains(&format!(".{name}")), "`{name}` in {row:?}");
        }
    }
}

#[test]
fn the_docs_are_up_to_date() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/ptx.md");
    let page = std::fs::read_to_string(path).expect("docs/ptx.md");
    let same = page == fathom_ptx::docs::markdown();
    assert!(same, "docs/ptx.md is stale: cargo run -p fathom-ptx --example ptx_docs");
}

#[test]
fn nearest_mnemonics() {
    assert_eq!(nearest("ad.f32"), Some(Opcode::Add));
    assert_eq!(nearest("mbarrier.tri_wait.parity.b64"), Some(Opcode::MbarrierTryWait));
    assert_eq!(nearest("wgmma.mma_asink"), Some(Opcode::WgmmaMmaAsync));
    assert_eq!(nearest("zzzzzz"), None);
}

#[test]
fn requirements_name_version_and_target() {
    let text = ".version 7.4\n.target sm_80\n.entry k()\n{\n.reg .b32 \
    %r<4>;\nwgmma.fence.sync.aligned;\nadd.s32 %r0, %r1, %r2;\n}\n";
    let module = parse(text).unwrap_or_else(|e| panic!("{e}"));
    let errors = requirements(text, &module);
    let messages: Vec<&str> = errors.iter().map(|e| e.message.as_str()).collect();
    assert_eq!(
        messages,
        [
            "this form of `wgmma.fence` needs PTX ISA .version 8.0 or later",
            "this form of `wgmma.fence` needs .target sm_90a"
        ]
    );
    assert_eq!(errors[0].pos.line, 6);
}
