//! The tokenizer: training, its pretokenizer, splitting of joined tokens, streaming, files.

use std::path::Path;

use fathom_numerics::philox::Philox;
use fathom_reference::data::{TextStream, Tokenizer};
use proptest::prelude::*;

const TEXT: &str = concat!(
    "fn main() {\n    let x = [1, 2, 34567];\n    println!(\"{x:?}\");\n}\n\n",
    "It is so; it was so.\nfn other() {\n    main();\n}\n\n",
    "\u{4e2d}\u{6587}\u{4e2d}\u{6587}\u{306e}. ",
);

fn trained() -> Tokenizer {
    Tokenizer::train([TEXT.repeat(4)].into_iter(), 400).unwrap()
}

fn pieces(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    let ids = tokenizer.encode(text).unwrap();
    ids.iter().map(|&id| tokenizer.decode(&[id])).collect()
}

#[test]
fn training_is_deterministic_and_survives_a_file() {
    let tokenizer = trained();
    assert_eq!(tokenizer.json(), trained().json());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    tokenizer.save(&path).unwrap();
    let loaded = Tokenizer::load(&path).unwrap();
    assert_eq!(
        (loaded.digest(), loaded.vocab_size()),
        (tokenizer.digest(), tokenizer.vocab_size())
    );
    assert_eq!(loaded.encode(TEXT).unwrap(), tokenizer.encode(TEXT).unwrap());
    assert_eq!((loaded.eos(), loaded.fim()), (0, Some([1, 2, 3])));
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(names.len(), 1, "nothing half-written is left");
}

/// Merges are learned within pretokens, so frequent text becomes exactly its pretokens.
#[test]
fn the_pretokenizer_joins_punctuation_and_line_breaks() {
    let text = "{\n".repeat(30) + &"so;\n\n".repeat(30) + &" a  12345 ".repeat(30);
    let tokenizer = Tokenizer::train([text].into_iter(), 300).unwrap();
    assert_eq!(pieces(&tokenizer, "{\nso;\n\n"), ["{\n", "so", ";\n\n"]);
    assert_eq!(pieces(&tokenizer, " a  12345 "), [" a", "  ", "123", "45", " "]);
    // Without the line break the same marks are other tokens: the boundary bias.
    assert_eq!(pieces(&tokenizer, "{so;"), ["{", "so", ";"]);
}

#[test]
fn a_share_of_the_joined_tokens_is_split_and_the_text_stays() {
    let tokenizer = trained();
    let ids = tokenizer.encode(&TEXT.repeat(200)).unwrap();
    let noise = Philox::new(5, 9);
    let split = |rate| tokenizer.split_joined(&ids, noise, 0, rate);
    assert_eq!(split(0.0), ids);
    let joined = |ids: &[u32]| {
        let text = |id: &u32| tokenizer.decode(&[*id]);
        let of_both = |t: &String| t.contains('\n') && !t.trim().is_empty();
        ids.iter().map(text).filter(of_both).count()
    };
    let all = joined(&ids);
    assert!(all > 1000, "{all} joined tokens");
    for rate in [0.1, 0.5, 1.0] {
        let out = split(rate);
        assert_eq!(tokenizer.decode(&out), TEXT.repeat(200));
        let gone = (all - joined(&out)) as f64 / all as f64;
        let bound = 5.0 * (rate * (1.0 - rate) / all as f64).sqrt();
        assert!((gone - rate).abs() <= bound, "rate {rate}: {gone}");
    }
}

/// A document may spell a special token; a prompt may use one.
#[test]
fn special_tokens_are_read_out_of_prompts_only() {
    let tokenizer = trained();
    let text = "a<|eos|><|fim_hole|>";
    let document = tokenizer.encode(text).unwrap();
    assert!(document.iter().all(|&id| id > 3));
    assert_eq!(tokenizer.decode(&document), text);
    let prompt = tokenizer.encode_prompt(text).unwrap();
    assert_eq!(prompt[1..], [0, 2]);
    assert_eq!(tokenizer.decode(&prompt), "a");
}

/// The marks of the released tokenizer, in its format.
#[test]
fn other_names_of_special_tokens_are_known() {
    let mut json = trained().json().to_owned();
    for (own, released) in [
        ("<|eos|>", "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>"),
        ("<|fim_begin|>", "<\u{ff5c}fim\u{2581}begin\u{ff5c}>"),
        ("<|fim_hole|>", "<\u{ff5c}fim\u{2581}hole\u{ff5c}>"),
        ("<|fim_end|>", "<\u{ff5c}fim\u{2581}end\u{ff5c}>"),
    ] {
        json = json.replace(own, released);
    }
    let tokenizer = Tokenizer::from_json(json.as_bytes(), Path::new("t.json")).unwrap();
    assert_eq!((tokenizer.eos(), tokenizer.fim()), (0, Some([1, 2, 3])));
}

#[test]
fn what_is_no_byte_level_tokenizer_is_refused() {
    let refused = |json: &str, want: &str| {
        let error = Tokenizer::from_json(json.as_bytes(), Path::new("t.json")).unwrap_err();
        let error = error.to_string();
        assert!(error.starts_with("t.json: ") && error.contains(want), "{error}");
    };
    refused("{", "expected a tokenizer.json");
    refused("{}", "expected a tokenizer.json");
    let json = trained().json().to_owned();
    refused(&json[..json.len() / 2], "expected a tokenizer.json");
    let bare = json.replace("<|eos|>", "<stop>");
    refused(&bare, "expected one of the special tokens [\"<|eos|>\"");
    let mut value: serde_json::Value = serde_json::from_str(&json).unwrap();
    value["decoder"] = serde_json::Value::Null;
    refused(&value.to_string(), "expected a BPE model with a ByteLevel decoder");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    /// Any text comes back; any tokens stream as their text, in whole characters.
    #[test]
    fn text_round_trips_and_streams(
        text in "[ -~\n\r\t\u{e9}\u{4e2d}\u{1f600}\u{301}\u{a0}]{0,80}",
        ids in prop::collection::vec(0u32..450, 0..60),
    ) {
        thread_local!(static TOKENIZER: Tokenizer = trained());
        TOKENIZER.with(|tokenizer| {
            prop_assert_eq!(&tokenizer.decode(&tokenizer.encode(&text).unwrap()), &text);
            let mut stream = TextStream::new(tokenizer);
            let mut all: String = ids.iter().map(|&id| stream.push(id)).collect();
            all += &stream.finish();
            prop_assert_eq!(all, tokenizer.decode(&ids));
            // Pieces of valid text never hold a replacement character.
            let mut stream = TextStream::new(tokenizer);
            for id in tokenizer.encode(&text).unwrap() {
                let whole = !stream.push(id).contains(char::REPLACEMENT_CHARACTER);
                prop_assert!(whole);
            }
            Ok(())
        })?;
    }

    /// Damaged tokenizer files are refused or read, never a panic.
    #[test]
    fn damaged_files_never_panic(at in 0usize..6000, byte: u8, cut: bool) {
        thread_local!(static JSON: String = trained().json().to_owned());
        let mut bytes = JSON.with(|json| json.clone().into_bytes());
        let at = at % bytes.len();
        if cut { bytes.truncate(at) } else { bytes[at] = byte }
        if let Ok(tokenizer) = Tokenizer::from_json(&bytes, Path::new("t.json")) {
            let _ = tokenizer.encode(TEXT);
        }
    }
}
