//! Generation: the cache against the training form in every precision, drafts against plain
//! decoding, distributions against exact ones.

use std::cell::RefCell;
use std::path::Path;

use fathom_config::{AttentionConfig, ModelConfig};
use fathom_reference::Tensor;
use fathom_reference::backend::{Backend, Call, Recorder, Reference};
use fathom_reference::eval::Evaluator;
use fathom_reference::generate::{Generation, Sampling, Settings, generate};
use fathom_reference::layers::Weights;
use fathom_reference::model::{Batch, Model, StepSettings};
use fathom_reference::precision::{Mode, Recipe};
use fathom_trace::{DType, Parallel};

const MODES: [Mode; 3] = [Mode::Fp32, Mode::Bf16, Mode::Fp8];

/// The small preset, shallower, with `mtp_depth` modules; `kv_heads` for grouped-query attention.
fn config(kv_heads: Option<usize>, mtp_depth: usize) -> ModelConfig {
    let mut config = ModelConfig::preset("small").unwrap();
    (config.layers, config.vocab_size, config.mtp_depth) = (2, 160, mtp_depth);
    // Larger weights than at the start of a training, so that attention and routing matter.
    config.initializer_range = 0.08;
    if let Some(kv_heads) = kv_heads {
        config.attention = AttentionConfig::Gqa { kv_heads, head_dim: 32 };
    }
    config
}

fn build<B: Backend>(backend: &B, config: &ModelConfig, mode: Mode) -> (Model, Weights<B>) {
    let model = Model::new(config, Recipe::new(mode), Parallel::default(), 0).unwrap();
    let params = model.init(backend, 3).unwrap();
    let weights = model.weights(backend, &params).unwrap();
    (model, weights)
}

fn tokens(n: u32, vocab: u32) -> Vec<u32> {
    (0..n).map(|i| (i * i * 7 + 3 * i + 1) % vocab).collect()
}

fn floats(t: &Tensor) -> Vec<f64> {
    match t.dtype() {
        DType::F64 => t.as_slice::<f64>().to_vec(),
        DType::F32 => t.as_slice::<f32>().iter().map(|&x| x.into()).collect(),
        _ => (0..t.len()).map(|i| f64::from(f32::from_bits((t.bits(i) as u32) << 16))).collect(),
    }
}

fn relative(got: &[f64], want: &[f64]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut got.iter().zip(want).map(|(a, b)| a - b)) / norm(&mut want.iter().copied())
}

/// The hidden states of training form and decoding form (in calls of 1 to 9 tokens, with drafts
/// taken back), and the experts that each chose.
struct Forms {
    training: Vec<f64>,
    decoding: Vec<f64>,
    choices: [Vec<Vec<i32>>; 2],
    bytes_per_token: usize,
}

fn forms(config: &ModelConfig, mode: Mode, ids: &[u32]) -> Forms {
    let routed = RefCell::new(Vec::<Vec<i32>>::new());
    let backend = Recorder::new(Reference, |call: &Call<'_, Reference>| {
        if call.op.name() == "router" {
            let choices = call.outputs[1].as_slice::<i32>();
            let top_k = call.outputs[1].shape()[1];
            let layer = call.place.layer.unwrap();
            let mut routed = routed.borrow_mut();
            let layers = routed.len().max(layer + 1);
            routed.resize(layers, Vec::new());
            for row in choices.chunks(top_k) {
                let mut row = row.to_vec();
                row.sort();
                routed[layer].extend(row);
            }
        }
        Ok(())
    });
    let (model, weights) = build(&backend, config, mode);
    let batch = Batch::from_sequences(&[ids.to_vec()]);
    let batch = model.batch(&backend, &batch).unwrap();
    let settings = StepSettings::default();
    let forward = model.forward(&backend, &weights, &batch, &settings, false).unwrap();
    let training = floats(&forward.hidden);
    let training_choices = routed.take();
    let mut cache = model.cache();
    let mut decoding = Vec::new();
    let mut next = 0;
    for calls in [1, 9, 2, 5, 3, 1].into_iter().cycle() {
        let end = (next + calls).min(ids.len());
        let kept = routed.borrow().clone();
        model.decode(&backend, &weights, &mut cache, &[1, 2, 3]).unwrap();
        cache.truncate(&backend, next).unwrap();
        routed.replace(kept);
        let rows = model.decode(&backend, &weights, &mut cache, &ids[next..end]).unwrap();
        decoding.extend(floats(&rows));
        next = end;
        if next == ids.len() {
            break;
        }
    }
    let bytes_per_token = cache.bytes(&backend) / cache.len();
    Forms { training, decoding, choices: [training_choices, routed.take()], bytes_per_token }
}

/// Grouped-query, multi-head and multi-query attention decode with the bits of the training form.
#[test]
fn keys_and_values_in_a_cache_give_the_training_forms_bits() {
    let ids = tokens(75, 160);
    for (kv_heads, mode) in
        [(2, Mode::Fp32), (4, Mode::Fp32), (1, Mode::Fp32), (2, Mode::Bf16), (2, Mode::Fp8)]
    {
        let forms = forms(&config(Some(kv_heads), 0), mode, &ids);
        assert_eq!(forms.decoding, forms.training, "{kv_heads} KV heads, {mode:?}");
        assert_eq!(forms.choices[0], forms.choices[1]);
        let element = if mode == Mode::Fp32 { 4 } else { 2 };
        assert_eq!(forms.bytes_per_token, 2 * (2 * kv_heads * 32) * element);
    }
}

/// The absorbed form against the training form. In `fp32` both are chains of the same length in
/// another order, so they agree to some 2^-24 a rounding: 1e-5, and every expert choice is the
/// same. In `bf16` and `fp8` they round different intermediates (the training form up-projected
/// keys and values, in `fp8` with quantised operands; the absorbed form queries and sums of
/// latents), so the yardstick is what the mode itself costs: the training form's distance from
/// `fp32`. The absorbed form may be further from `fp32` than that by a quarter, and agree with its
/// expert choices less often by one in twenty.
#[test]
fn absorbed_decoding_is_as_close_to_exact_as_the_training_form() {
    let ids = tokens(75, 160);
    let mixture = config(None, 0);
    let dense = ModelConfig { moe: None, ..mixture.clone() };
    for config in [mixture, dense] {
        let exact = forms(&config, Mode::Fp32, &ids);
        let error = relative(&exact.decoding, &exact.training);
        println!("fp32: {error:.1e}");
        assert!(error < 1e-5, "fp32: {error:e}");
        assert_eq!(exact.choices[0], exact.choices[1]);
        assert_eq!(exact.bytes_per_token, 2 * (32 + 16) * 4);
        for mode in [Mode::Bf16, Mode::Fp8] {
            let forms = forms(&config, mode, &ids);
            let [training, decoding] =
                [&forms.training, &forms.decoding].map(|x| relative(x, &exact.training));
            let apart = relative(&forms.decoding, &forms.training);
            let agree = |choices: &Vec<Vec<i32>>| {
                let pairs = choices.iter().flatten().zip(exact.choices[0].iter().flatten());
                let same = pairs.filter(|(a, b)| a == b).count();
                same as f64 / choices.iter().map(Vec::len).sum::<usize>().max(1) as f64
            };
            let [same_training, same_decoding] = [0, 1].map(|i| agree(&forms.choices[i]));
            println!(
                "{mode:?}: from fp32 {training:.1e} and {decoding:.1e}, apart {apart:.1e}; \
                 choices of fp32 {same_training:.2} and {same_decoding:.2}"
            );
            assert!(decoding < 1.25 * training, "{mode:?}: {decoding:e}, {training:e}");
            assert!(same_decoding >= same_training - 0.05, "{mode:?}: {same_decoding}");
            assert_eq!(forms.bytes_per_token, 2 * (32 + 16) * 2);
        }
    }
}

fn settings(tokens: usize, speculative: bool) -> Settings {
    Settings { tokens, sampling: Sampling::default(), speculative, stop: Vec::new() }
}

fn run<B: Backend>(
    (model, weights): &(Model, Weights<B>),
    backend: &B,
    prompt: &[u32],
    settings: &Settings,
) -> Generation {
    let mut streamed = Vec::new();
    let mut each = |token| streamed.push(token);
    let out = generate(model, backend, weights, prompt, settings, &mut each).unwrap();
    assert_eq!(streamed, out.tokens, "streaming gives what is returned");
    out
}

/// Speculative decoding gives the tokens of plain decoding, with one and with two MTP modules.
#[test]
fn drafts_change_no_token_of_random_models() {
    for mode in MODES {
        for (attention, depth) in [(None, 1), (None, 2), (Some(2), 1)] {
            let model = build(&Reference, &config(attention, depth), mode);
            for length in [1, 2, 33] {
                let prompt = tokens(length, 160);
                let plain = run(&model, &Reference, &prompt, &settings(16, false));
                let drafted = run(&model, &Reference, &prompt, &settings(16, true));
                let case = format!("{mode:?}, {attention:?}, depth {depth}, prompt {length}");
                assert_eq!(drafted.tokens, plain.tokens, "{case}");
                assert_eq!((plain.steps, plain.drafted), (15, 0));
                assert!(drafted.drafted > 0 && drafted.steps <= 15);
                assert_eq!(drafted.steps + drafted.accepted, 15, "{case}");
            }
        }
    }
}

/// A model whose next token follows from the last one, and whose MTP modules know it: every draft
/// is accepted, and the drafts' caches stay right over many steps.
#[test]
fn good_drafts_are_accepted_and_bad_ones_are_not() {
    let backend = Reference;
    // Scale of each module's first half of eh_proj, which passes the next token's embedding on:
    // with the wrong sign it never drafts what follows. Steps for 39 tokens behind the first.
    for (scales, accepted, steps) in [
        (&[50.0f32][..], 19, 20),
        (&[-50.0], 0, 39),
        (&[50.0, 50.0], 26, 13),
        (&[50.0, -50.0], 19, 20),
    ] {
        let mut config = config(None, scales.len());
        config.initializer_range = 0.02;
        let model = Model::new(&config, Recipe::new(Mode::Fp32), Parallel::default(), 0).unwrap();
        let mut params = model.init(&backend, 5).unwrap();
        let hidden = config.hidden_size;
        let mut set = |name: &str, values| {
            let id = model.find(name).unwrap().0;
            let shape = model.specs[id].shape.clone();
            params.buffers[id] = backend.upload(Tensor::from_vec(&shape, values)).unwrap();
        };
        // Embeddings are large in single columns, so that the residual stream is the token.
        let mut embed = vec![0f32; config.vocab_size * hidden];
        let mut head = embed.clone();
        for token in 0..hidden {
            embed[token * hidden + token] = 50.0;
            head[(token + 1) % hidden * hidden + token] = 1.0;
        }
        set("model.embed_tokens.weight", embed);
        set("lm_head.weight", head);
        for (k, scale) in scales.iter().enumerate() {
            let mut join = vec![0f32; hidden * 2 * hidden];
            (0..hidden).for_each(|i| join[i * 2 * hidden + i] = *scale);
            set(&format!("model.layers.{}.eh_proj.weight", 2 + k), join);
        }
        let weights = model.weights(&backend, &params).unwrap();
        let pair = (model, weights);
        let plain = run(&pair, &backend, &[3, 4], &settings(40, false));
        let want: Vec<u32> = (5..45).collect();
        assert_eq!(plain.tokens, want);
        let drafted = run(&pair, &backend, &[3, 4], &settings(40, true));
        assert_eq!(drafted.tokens, want);
        assert_eq!((drafted.accepted, drafted.steps), (accepted, steps), "{scales:?}");
        // A stop token ends both at the same place, also when it is a draft that holds.
        for stop in [5, 9, 10, 20, 21] {
            let until = |speculative| Settings { stop: vec![stop], ..settings(40, speculative) };
            let [plain, drafted] = [false, true].map(|s| run(&pair, &backend, &[3, 4], &until(s)));
            assert_eq!(plain.tokens, (5..=stop).collect::<Vec<_>>());
            assert_eq!((&drafted.tokens, drafted.stopped), (&plain.tokens, true));
        }
    }
}

/// The oracle checkpoint with an MTP module: token for token, in every mode.
#[test]
fn drafts_change_no_token_of_the_oracle() {
    let Some(folder) = fathom_trace::shared::need("oracle/tiny-v3-mtp") else { return };
    for mode in MODES {
        let Evaluator { backend, model, params } = Evaluator::open(&folder, mode).unwrap();
        let weights = model.weights(&backend, &params).unwrap();
        let pair = (model, weights);
        for length in [1, 20] {
            let prompt = tokens(length, 512);
            let plain = run(&pair, &backend, &prompt, &settings(40, false));
            let drafted = run(&pair, &backend, &prompt, &settings(40, true));
            assert_eq!(drafted.tokens, plain.tokens, "{mode:?}");
            println!("{mode:?}: accepted {} of {}", drafted.accepted, drafted.drafted);
        }
    }
}

/// Greedy decoding over the cache takes the tokens that whole forwards would.
#[test]
fn greedy_decoding_takes_the_best_token_of_the_training_form() {
    let pair = build(&Reference, &config(None, 0), Mode::Fp32);
    let out = run(&pair, &Reference, &tokens(5, 160), &settings(12, false));
    let (model, weights) = &pair;
    let mut sequence = tokens(5, 160);
    for &token in &out.tokens {
        let batch = Batch::from_sequences(std::slice::from_ref(&sequence));
        let batch = model.batch(&Reference, &batch).unwrap();
        let settings = StepSettings::default();
        let forward = model.forward(&Reference, weights, &batch, &settings, false).unwrap();
        let logits = model.logits(&Reference, weights, &forward.hidden).unwrap();
        let last = &logits.as_slice::<f32>()[(sequence.len() - 1) * 160..];
        let best = (0..160).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
        assert_eq!(token, best as u32);
        sequence.push(token);
    }
}

/// Sampling, plain and with drafts, against the exact distribution of two tokens behind a prompt:
/// chi-square below its 1 - 1e-6 quantile.
#[test]
fn sampled_pairs_have_the_exact_distribution() {
    const VOCAB: usize = 5;
    let mut config = config(None, 1);
    (config.layers, config.vocab_size, config.hidden_size) = (1, VOCAB, 16);
    (config.intermediate_size, config.heads, config.moe) = (16, 1, None);
    config.attention = AttentionConfig::Mla {
        q_lora_rank: None,
        kv_lora_rank: 8,
        qk_nope_head_dim: 8,
        qk_rope_head_dim: 4,
        v_head_dim: 8,
    };
    config.initializer_range = 0.4;
    let pair = build(&Reference, &config, Mode::Fp32);
    let (model, weights) = &pair;
    let sampling = |seed| Sampling { temperature: 0.7, top_p: 0.9, seed };
    // The exact distribution: every first token, then every second behind it.
    let after = |tokens: &[u32]| {
        let mut cache = model.cache();
        let rows = model.decode(&Reference, weights, &mut cache, tokens).unwrap();
        let logits = model.logits(&Reference, weights, &rows).unwrap();
        let logits = logits.as_slice::<f32>();
        sampling(0).distribution(&logits[logits.len() - VOCAB..])
    };
    let prompt = [1, 4, 2];
    let first = after(&prompt);
    let mut exact = Vec::new();
    for (a, p) in (0u32..).zip(&first) {
        let second = after(&[&prompt[..], &[a]].concat());
        exact.extend(second.iter().map(|b| p * b));
    }
    let n = 1500;
    for speculative in [false, true] {
        let mut counts = vec![0; VOCAB * VOCAB];
        let mut accepted = 0;
        for seed in 0..n {
            // Three tokens, so that the second is a verified draft.
            let settings = Settings { sampling: sampling(seed), ..settings(3, speculative) };
            let out = run(&pair, &Reference, &prompt, &settings);
            counts[out.tokens[0] as usize * VOCAB + out.tokens[1] as usize] += 1;
            accepted += out.accepted;
        }
        // Cells with fewer than eight expected are one.
        let (mut chi, mut cells, mut rest) = (0.0, 0, (0.0, 0.0));
        let mut add = |count: f64, expected: f64| {
            chi += (count - expected).powi(2) / expected;
            cells += 1;
        };
        for (&count, &p) in counts.iter().zip(&exact) {
            let (count, expected) = (f64::from(count), p * n as f64);
            assert!(expected > 0.0 || count == 0.0, "a token outside the nucleus");
            match expected {
                8.0.. => add(count, expected),
                _ => rest = (rest.0 + count, rest.1 + expected),
            }
        }
        if rest.1 > 0.0 {
            add(rest.0, rest.1.max(1.0));
        }
        // Wilson and Hilferty's approximation of the quantile, z = 4.75.
        let k = f64::from(cells - 1);
        let bound = k * (1.0 - 2.0 / (9.0 * k) + 4.75 * (2.0 / (9.0 * k)).sqrt()).powi(3);
        println!("chi-square {chi:.1} of {cells} cells, bound {bound:.1}, accepted {accepted}");
        assert!(chi < bound, "speculative {speculative}: {counts:?}, exact {exact:?}");
        assert_eq!(speculative, accepted > 0);
    }
}

#[test]
fn what_cannot_be_generated_is_named() {
    let pair = build(&Reference, &config(None, 0), Mode::Fp32);
    let refused = |prompt: &[u32], settings: &Settings, want: &str| {
        let (model, weights) = &pair;
        let error = generate(model, &Reference, weights, prompt, settings, &mut |_| {});
        let error = error.unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    };
    refused(&[], &settings(1, false), "prompt: expected at least one token, found none");
    refused(&[3, 160], &settings(1, false), "expected ids below 160, found 160 at place 1");
    refused(&[3], &settings(4096, false), "expected at most 4096 with the prompt's 1, found 4096");
    refused(&[3], &settings(1, true), "expected a model with an MTP module, found none");
    let sampling = |temperature, top_p| {
        let sampling = Sampling { temperature, top_p, seed: 0 };
        Settings { sampling, ..settings(1, false) }
    };
    refused(&[3], &sampling(f64::NAN, 1.0), "temperature: expected 0 or more");
    refused(&[3], &sampling(1.0, 0.0), "top_p: expected above 0, to 1, found 0");
}

#[test]
fn prompts_are_read_or_refused() {
    use fathom_reference::eval::read_prompt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ids.json");
    let read = |text: &str| {
        std::fs::write(&path, text).unwrap();
        read_prompt(Path::new(&path), 10).map_err(|e| e.to_string())
    };
    assert_eq!(read("[1, 2, 9]").unwrap(), [1, 2, 9]);
    assert_eq!(read("[[3]]").unwrap(), [3]);
    for (text, want) in [
        ("", "expected a JSON list of token ids: EOF"),
        ("[1,", "EOF while parsing"),
        ("[1, -2]", "expected u32"),
        ("{\"a\": 1}", "expected a JSON list"),
        ("[]", "expected at least one token, found none"),
        ("[[1], [2]]", "expected one list of token ids, found 2"),
        ("[1, 10]", "place 1: expected an id below 10, found 10"),
    ] {
        let error = read(text).unwrap_err();
        assert!(error.contains(want) && error.contains("ids.json"), "{text}: {error}");
    }
}
