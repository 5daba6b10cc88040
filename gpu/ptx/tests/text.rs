//! Text in, text out: printing what was parsed and parsing it again gives the same module; text
//! that was damaged gives an error, never a panic, and quickly.

use fathom_ptx::ast::*;
use fathom_ptx::{Options, parse, parse_with};
use proptest::prelude::*;

const DIRECTIVES: &str = include_str!("data/directives.ptx");

/// Our own file, and compiler output where it is at hand.
fn sources() -> Vec<(String, String)> {
    let mut all = vec![("directives.ptx".to_string(), DIRECTIVES.to_string())];
    if let Some(dir) = fathom_trace::shared::dir() {
        let mut files: Vec<_> = std::fs::read_dir(dir.join("ptx"))
            .expect("the folder of PTX files")
            .map(|entry| entry.expect("a folder entry").path())
            .filter(|path| path.extension().is_some_and(|e| e == "ptx"))
            .collect();
        files.sort();
        for path in files {
            let text = std::fs::read_to_string(&path).expect("a PTX file");
            all.push((path.display().to_string(), text));
        }
    }
    all
}

#[test]
fn printing_and_parsing_round_trips() {
    for (name, text) in sources() {
        let first = parse(&text).unwrap_or_else(|e| panic!("{}", e.in_file(&name)));
        let printed = first.to_string();
        let second = parse(&printed).unwrap_or_else(|e| panic!("{}", e.in_file(&name)));
        assert_eq!(printed, second.to_string(), "{name}");
        assert!(first.without_positions() == second.without_positions(), "{name}");
    }
}

#[test]
fn directives_are_kept() {
    let module = parse(DIRECTIVES).unwrap_or_else(|e| panic!("{e}"));
    let (_, entry) = module.function("everything").expect("the entry");
    assert_eq!(entry.tuning.reqntid, Some([128, 1, 1]));
    assert_eq!(entry.tuning.reqnctapercluster, Some([2, 1, 1]));
    assert!(entry.tuning.explicitcluster);
    let ptr = entry.params[0].ptr.expect(".ptr");
    assert_eq!((ptr.space, ptr.align), (Some(fathom_ptx::types::Space::Global), Some(16)));
    let body = entry.body.as_ref().expect("a body");
    let locs: Vec<u32> = body
        .statements
        .iter()
        .filter_map(|s| if let Statement::Loc(l) = s { Some(l.line) } else { None })
        .collect();
    assert_eq!(locs, [10, 12, 20]);
    let (_, call) = body.instructions().find(|(_, i)| i.call().is_some()).expect("a call");
    let call = call.call().expect("a call");
    assert_eq!((call.returns.len(), call.args.len(), call.table), (1, 2, None));
    let unsupported = |s: &&Statement| matches!(s, Statement::Unsupported(_));
    assert_eq!(body.statements.iter().filter(unsupported).count(), 1, "tcgen05");
    assert_eq!(module.aliases.len(), 1);
    let (_, text) = module.variable("text").expect("text");
    assert_eq!(&text.image().expect("an image").bytes[..10], b"hello %d\n\0");
    let (_, expression) = module.variable("expression").expect("expression");
    assert_eq!(expression.init, Some(Init::Imm(Imm::Int(4))));
}

#[test]
fn unknown_instructions_may_be_kept() {
    let text =
        ".version 9.0\n.target sm_100a\n.entry k()\n{\n\tnew.thing.b32 {%a, %b}, [x];\n\tret;\n}\n";
    let error = parse(text).expect_err("unknown").to_string();
    assert!(error.contains("unknown instruction `new.thing.b32`"), "{error}");
    let module = parse_with(text, Options { keep_unknown: true }).unwrap_or_else(|e| panic!("{e}"));
    let body = module.functions[0].body.as_ref().expect("a body");
    let Statement::Unsupported(u) = &body.statements[0] else { panic!("{body:?}") };
    assert_eq!(u.text, "new.thing.b32 {%a, %b}, [x]");
    assert!(u.reason.contains("ptx:5:2"), "{}", u.reason);
    assert_eq!(body.instructions().count(), 1);
}

#[test]
fn deep_nesting_is_refused() {
    let head = ".version 8.0\n.target sm_90\n";
    let scopes = format!("{head}.entry k()\n{}{}\n", "{".repeat(100_000), "}".repeat(100_000));
    let lists =
        format!("{head}.global .b8 x[1] = {}1{};", "{".repeat(100_000), "}".repeat(100_000));
    let parens = format!("{head}.global .b8 x[{}1{}];", "(".repeat(100_000), ")".repeat(100_000));
    let minus = format!("{head}.global .b8 x = {}1;", "-".repeat(100_000));
    let ternary =
        format!("{head}.global .b8 x = {}1{};", "1?".repeat(100_000), ":1".repeat(100_000));
    for text in [scopes, lists, parens, minus, ternary] {
        let error = parse(&text).expect_err("too deep").to_string();
        assert!(error.contains("deep"), "{error}");
    }
}

#[test]
fn large_files_are_parsed() {
    let mut text = String::from(
        ".version 8.0\n.target sm_90\n.entry k()\n{\n.reg .b32 %r<40000>;\n.reg .f32 %f<40000>;\n",
    );
    let mut i = 0;
    while text.len() < 1 << 20 {
        let (a, b) = (i % 40000, (i * 7 + 1) % 40000);
        text.push_str(&format!(
            "fma.rn.f32 %f{a}, %f{b}, %f{a}, 0f3F800000;\nadd.s32 %r{b}, %r{a}, {i};\n"
        ));
        i += 1;
    }
    text.push_str("ret;\n}\n");
    // One long line as well: columns must not be counted from its start each time.
    let list = vec!["17"; 400_000].join(",");
    text.push_str(&format!(".global .b8 table[400000] = {{{list}}};\n"));
    // Whatever is quadratic in either takes minutes.
    let module = parse(&text).unwrap_or_else(|e| panic!("{e}"));
    assert!(module.functions[0].body.as_ref().expect("a body").registers.len() > 40_000);
}

/// Damages a text in ways a broken file, or a broken generator, might.
fn damage(text: &str, cuts: &[(usize, usize, usize)]) -> String {
    let mut chars: Vec<char> = text.chars().collect();
    const PIECES: [&str; 16] = [
        "{",
        "}",
        "[",
        "]",
        "(",
        ";",
        "\"",
        "/*",
        "%r1",
        ".reg",
        "@",
        "é",
        "0x",
        "\0",
        "<9999999999>",
        "-",
    ];
    for &(at, length, with) in cuts {
        let at = at % (chars.len() + 1);
        let end = (at + length).min(chars.len());
        chars.splice(at..end, PIECES[with % PIECES.len()].chars());
    }
    chars.into_iter().collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn damaged_text_never_panics(
        cuts in prop::collection::vec((any::<usize>(), 0usize..12, any::<usize>()), 1..6),
        keep_unknown: bool,
    ) {
        let text = damage(DIRECTIVES, &cuts);
        match parse_with(&text, Options { keep_unknown }) {
            Ok(module) => {
                let printed = module.to_string();
                let again = parse_with(&printed, Options { keep_unknown });
                let again = again.unwrap_or_else(|e| panic!("{e}\n{text}"));
                prop_assert_eq!(printed, again.to_string());
            }
            Err(e) => prop_assert!(e.pos.line >= 1 && !e.to_string().is_empty()),
        }
    }

    #[test]
    fn any_text_never_panics(text in "\\PC{0,200}") {
        let _ = parse(&text);
        let _ = parse(&format!(".version 8.0\n.target sm_90\n.entry k()\n{{\n{text}"));
    }
}
