//! `fathom generate` and `fathom eval --text` as a user runs them, on a small model of initial
//! values with a tokenizer of its own.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use fathom_reference::backend::Reference;
use fathom_reference::checkpoint::hf;
use fathom_reference::data::Tokenizer;
use fathom_reference::model::Model;
use fathom_reference::precision::{Mode, Recipe};
use fathom_reference::train::{Setting, TrainConfig};
use fathom_trace::Parallel;
use serde_json::Value;

fn fathom(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fathom")).args(args).output().unwrap()
}

fn json(args: &[&str]) -> Value {
    let output = fathom(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A folder with a small model of initial values, MTP module included, and a tokenizer of 512
/// entries.
fn model(tokenizer: bool) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let set = ["model.vocab_size=512", "model.hidden_size=64"].map(Setting::set);
    let config = TrainConfig::preset("tiny", &set).unwrap().model;
    let recipe = Recipe::new(Mode::Fp32);
    let model = Model::new(&config, recipe, Parallel::default(), 0).unwrap();
    let params = model.init(&Reference, 1).unwrap();
    hf::save(folder.path(), &model, &Reference, &params, 1 << 30).unwrap();
    if tokenizer {
        let text = include_str!("../docs/data.md");
        let tokenizer = Tokenizer::train([text].iter(), 512).unwrap();
        tokenizer.save(&folder.path().join("tokenizer.json")).unwrap();
    }
    let path = folder.path().to_owned();
    (folder, path)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn plain_and_speculative_tokens_are_the_same() {
    let (_folder, model) = model(false);
    let ids = model.join("ids.json");
    std::fs::write(&ids, "[3, 1, 4, 1, 5, 9, 2, 6]").unwrap();
    let prompt = ["generate", "--model", text(&model), "--prompt-tokens", text(&ids), "--json"];
    let with = |more: &[&str]| json(&[&prompt[..], more].concat());
    let plain = with(&["--tokens", "24", "--ignore-eos"]);
    let drafted = with(&["--tokens", "24", "--ignore-eos", "--speculative"]);
    assert_eq!(plain["tokens"].as_array().unwrap().len(), 24);
    assert_eq!(plain["tokens"], drafted["tokens"]);
    assert_eq!(plain["acceptance_rate"], Value::Null);
    assert!(drafted["acceptance_rate"].is_number() && drafted["speedup"].is_number());
    assert_eq!(plain["text"], Value::Null);
    // Latent and shared key of each layer, in F32.
    let config: Value =
        serde_json::from_slice(&std::fs::read(model.join("config.json")).unwrap()).unwrap();
    let number = |key: &str| config[key].as_u64().unwrap();
    let latent = number("kv_lora_rank") + number("qk_rope_head_dim");
    assert_eq!(plain["kv_bytes_per_token"], number("num_hidden_layers") * latent * 4);
    // The same seed gives the same text, another one another.
    let sampled =
        |seed| with(&["--temperature", "1", "--top-p", "0.9", "--seed", seed])["tokens"].clone();
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));
}

#[test]
fn text_streams_to_stdout_and_figures_to_stderr() {
    let (_folder, model) = model(true);
    let args = ["generate", "--model", text(&model), "--prompt", "The cache", "--tokens", "12"];
    let document = json(&[&args[..], &["--json"]].concat());
    let output = fathom(&[&args[..], &["--speculative"]].concat());
    assert!(output.status.success());
    let printed = String::from_utf8(output.stdout).unwrap();
    assert_eq!(printed, format!("{}\n", document["text"].as_str().unwrap()));
    let figures = String::from_utf8(output.stderr).unwrap();
    for part in ["KV cache ", " bytes a token", "acceptance rate ", "speed-up "] {
        assert!(figures.contains(part), "{figures}");
    }
    let bare = fathom(&["generate", "--model", text(&model), "--tokens", "3"]);
    assert!(bare.status.success(), "a document begins without a prompt");
}

#[test]
fn perplexity_of_text() {
    let (_folder, model) = model(true);
    let file = model.join("some.txt");
    std::fs::write(&file, "The cache holds what a token leaves.\nAnd more; much more.\n").unwrap();
    let args = ["eval", "--model", text(&model), "--text", text(&file), "--json"];
    let whole = json(&args);
    let number = |json: &Value, key: &str| json[key].as_f64().unwrap();
    let loss = number(&whole, "loss");
    assert_eq!(number(&whole, "perplexity"), loss.exp());
    let bits = loss * number(&whole, "predicted") / 2f64.ln() / number(&whole, "bytes");
    assert!((number(&whole, "bits_per_byte") - bits).abs() < 1e-12 * bits);
    // The same ids, evaluated as a sequence.
    let tokenizer = Tokenizer::load(&model.join("tokenizer.json")).unwrap();
    let ids = tokenizer.encode(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let tokens = model.join("ids.json");
    std::fs::write(&tokens, serde_json::to_string(&[ids]).unwrap()).unwrap();
    let sequence = json(&["eval", "--model", text(&model), "--tokens", text(&tokens), "--json"]);
    assert_eq!(sequence["loss"], whole["loss"]);
    let short = json(&[&args[..], &["--context", "8", "--stride", "2"]].concat());
    assert_eq!(short["predicted"], whole["predicted"]);
    assert_ne!(short["loss"], whole["loss"]);
}

#[test]
fn bad_input_exits_with_2() {
    let (_folder, model) = model(false);
    let ids = model.join("ids.json");
    std::fs::write(&ids, "[1, 99999]").unwrap();
    let base = ["generate", "--model", text(&model)];
    for (more, want) in [
        (&["--prompt", "x"][..], "tokenizer.json: No such file"),
        (&["--prompt-tokens", text(&ids)], "place 1: expected an id below 512, found 99999"),
        (&["--prompt-tokens", "/nowhere.json"], "/nowhere.json"),
    ] {
        let output = fathom(&[&base[..], more].concat());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(want), "{error}");
    }
}
