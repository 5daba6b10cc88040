//! Perplexity and bits a byte: windows against whole evaluations of their sequences.

use std::path::Path;

use fathom_config::ModelConfig;
use fathom_reference::backend::Reference;
use fathom_reference::data::{Tokenizer, read_text};
use fathom_reference::eval::{Evaluator, Wanted, Windows};
use fathom_reference::model::Model;
use fathom_reference::precision::{Mode, Recipe};
use fathom_trace::Parallel;

fn evaluator(vocab_size: usize, mode: Mode) -> Evaluator<Reference> {
    let mut config = ModelConfig::preset("small").unwrap();
    (config.layers, config.vocab_size, config.initializer_range) = (2, vocab_size, 0.08);
    let model = Model::new(&config, Recipe::new(mode), Parallel::default(), 0).unwrap();
    let params = model.init(&Reference, 3).unwrap();
    Evaluator { backend: Reference, model, params }
}

fn tokens(n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * i * 7 + 3 * i + 1) % 300).collect()
}

fn windows(context: usize, stride: usize) -> Windows {
    Windows { context, stride }
}

#[test]
fn one_window_is_the_evaluation_of_the_sequence() {
    for mode in [Mode::Fp32, Mode::Bf16, Mode::Fp8] {
        let evaluator = evaluator(300, mode);
        let tokens = tokens(40);
        let whole = evaluator.run(std::slice::from_ref(&tokens), Wanted::default()).unwrap();
        for (context, stride) in [(39, 39), (39, 1), (64, 20)] {
            let (sum, n) = evaluator.score(&tokens, windows(context, stride)).unwrap();
            assert_eq!((n, sum / 39.0), (39, whole.loss), "{mode:?}, context {context}");
        }
    }
}

/// Every token is predicted once, with the context that the windows promise.
#[test]
fn windows_predict_every_token_once() {
    let evaluator = evaluator(300, Mode::Fp32);
    let tokens = tokens(30);
    let logits = |input: &[u32]| {
        let out = evaluator.run(&[input.to_vec()], Wanted::default()).unwrap();
        let (_, logits) = out.tensors.into_iter().find(|(name, _)| name == "logits").unwrap();
        let all = logits.as_slice::<f32>();
        all[all.len() - 300..].iter().map(|&x| f64::from(x)).collect::<Vec<_>>()
    };
    for (context, stride) in [(8, 8), (8, 3), (8, 1), (5, 4), (1, 1)] {
        let mut want = 0.0;
        let (mut done, mut end) = (0usize, 0usize);
        for i in 1..30 {
            if i > end {
                (done, end) = (end, if end == 0 { context } else { end + stride });
            }
            let end = end.min(29);
            assert!(i > done);
            let logits = logits(&tokens[end.saturating_sub(context)..i]);
            let total: f64 = logits.iter().map(|x| x.exp()).sum();
            want += total.ln() - logits[tokens[i] as usize];
        }
        let (sum, n) = evaluator.score(&tokens, windows(context, stride)).unwrap();
        assert_eq!(n, 29);
        // The loss rounds each row to F32: 29 roundings of some 2^-24 of 6.
        assert!(
            (sum - want).abs() < 29.0 * 6.0 * 2f64.powi(-22),
            "{context}, {stride}: {sum}, {want}"
        );
    }
}

#[test]
fn a_texts_figures_follow_from_its_loss() {
    let evaluator = evaluator(300, Mode::Fp32);
    let text = "The cat sat.\nThe cat s\u{e4}t on the mat.\nThe end\u{2026}\n";
    let tokenizer = Tokenizer::train([text.repeat(3)].into_iter(), 300).unwrap();
    let path = Path::new("cat.txt");
    let score = evaluator.text(path, text, &tokenizer, windows(16, 16)).unwrap();
    let tokens = tokenizer.encode(text).unwrap();
    let (sum, n) = evaluator.score(&tokens, windows(16, 16)).unwrap();
    assert_eq!((score.tokens, score.predicted), (n + 1, n));
    assert_eq!(score.bytes, text.len() - tokenizer.token(tokens[0]).len());
    assert_eq!((score.loss, score.perplexity), (sum / n as f64, (sum / n as f64).exp()));
    let bits = sum / 2f64.ln() / score.bytes as f64;
    assert_eq!(score.bits_per_byte, bits);
    let refused = |evaluator: &Evaluator<_>, text: &str, want: &str| {
        let error =
            evaluator.text(path, text, &tokenizer, windows(16, 16)).unwrap_err().to_string();
        assert!(error.contains(want) && error.contains("cat.txt"), "{error}");
    };
    refused(&evaluator, "", "expected at least two tokens of text, found 0");
    refused(&evaluator, "T", "expected at least two tokens of text, found 1");
    refused(&self::evaluator(100, Mode::Fp32), text, "expected a tokenizer with ids below 100");
    let windows = |context, stride| Windows::new(context, stride, 64).map_err(|e| e.to_string());
    assert_eq!(windows(64, None).unwrap(), Windows { context: 64, stride: 64 });
    assert!(windows(65, None).unwrap_err().contains("--context of 1 to 64 tokens, found 65"));
    assert!(windows(8, Some(0)).unwrap_err().contains("--stride of 1 to 8 tokens, found 0"));
    assert!(windows(8, Some(9)).unwrap_err().contains("found 9"));
}

#[test]
fn text_that_is_no_utf8_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.txt");
    std::fs::write(&path, b"a\nb\nc\xff\n").unwrap();
    let error = read_text(&path).unwrap_err().to_string();
    assert!(error.contains("x.txt, line 3: expected UTF-8 text, found byte 0xff"), "{error}");
}
