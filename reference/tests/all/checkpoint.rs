//! Hugging Face folders: written and read back in every form that checkpoints in the wild have.

use std::collections::BTreeMap;
use std::path::Path;

use fathom_config::{ModelConfig, MtpKind, Yarn};
use fathom_reference::Tensor;
use fathom_reference::backend::Reference;
use fathom_reference::checkpoint::hf::{self, HfCheckpoint, HfError, SavedType, split};
use fathom_reference::checkpoint::tensors::{self, TensorsFile};
use fathom_reference::data::Tokenizer;
use fathom_reference::model::{Model, ParamKind, Params};
use fathom_reference::precision::{Mode, Recipe};
use fathom_trace::{DType, Parallel};
use half::bf16;
use serde_json::{Value, json};

/// Sizes that leave ragged blocks of 128 on every side.
fn config() -> ModelConfig {
    let mut config = ModelConfig::preset("small").unwrap();
    (config.layers, config.vocab_size, config.hidden_size) = (2, 48, 144);
    config.intermediate_size = 200;
    config.moe.as_mut().unwrap().intermediate_size = 136;
    config
}

fn model(config: &ModelConfig) -> (Model, Params<Reference>) {
    let recipe = Recipe::new(Mode::Fp32);
    let model = Model::new(config, recipe, Parallel::default(), 0).unwrap();
    let mut params = model.init(&Reference, 11).unwrap();
    // Selection biases and norms with values that a forgotten tensor would not have.
    for (spec, buffer) in model.specs.iter().zip(&mut params.buffers) {
        if matches!(spec.kind, ParamKind::SelectionBias | ParamKind::Norm) {
            let values = buffer.as_mut_slice::<f32>().iter_mut().enumerate();
            values.for_each(|(i, x)| *x += 0.015_625 * (i % 7) as f32);
        }
    }
    (model, params)
}

fn save(folder: &Path, saved: SavedType, shard_bytes: usize) -> (Model, Params<Reference>) {
    let (model, params) = model(&config());
    hf::save_as(folder, &model, &Reference, &params, saved, shard_bytes).unwrap();
    (model, params)
}

fn load(folder: &Path) -> (ModelConfig, Params<Reference>) {
    let checkpoint = HfCheckpoint::open(folder).unwrap();
    checkpoint.check_shapes().unwrap();
    let recipe = Recipe::new(Mode::Fp32);
    let model = Model::new(&checkpoint.config, recipe, Parallel::default(), 0).unwrap();
    let params = checkpoint.load(&model, &Reference).unwrap();
    (checkpoint.config, params)
}

/// All tensors of a folder's files.
fn files(folder: &Path) -> BTreeMap<String, Tensor> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            let file = TensorsFile::open(&path).unwrap();
            all.extend(file.entries.keys().map(|n| (n.clone(), file.tensor(n).unwrap())));
        }
    }
    all
}

/// Replaces the folder's weights by one file of these tensors.
fn rewrite(folder: &Path, all: BTreeMap<String, Tensor>) {
    let all: Vec<_> = all.into_iter().collect();
    tensors::write(&folder.join("model.safetensors"), &all).unwrap();
}

fn edit_config(folder: &Path, edit: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut json: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    edit(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

#[test]
fn what_is_saved_in_master_precision_is_loaded_bit_by_bit_whatever_the_shards() {
    for (shard_bytes, several) in [(usize::MAX, false), (300_000, true), (1, true)] {
        let folder = tempfile::tempdir().unwrap();
        let (model, params) = save(folder.path(), SavedType::Master, shard_bytes);
        let index = folder.path().join("model.safetensors.index.json");
        assert_eq!(index.exists(), several);
        let (config, loaded) = load(folder.path());
        assert_eq!(config, model.config);
        assert!(loaded.buffers == params.buffers);
        if several {
            let index: Value =
                serde_json::from_str(&std::fs::read_to_string(index).unwrap()).unwrap();
            let all = files(folder.path());
            assert_eq!(index["weight_map"].as_object().unwrap().len(), all.len());
            let bytes: usize = all.values().map(|t| t.bytes().len()).sum();
            assert_eq!(index["metadata"]["total_size"], bytes);
        }
    }
}

#[test]
fn a_smaller_model_saved_over_a_larger_one_is_what_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), SavedType::Master, 300_000);
    // Experts in the MTP module only, and nowhere.
    let few = ModelConfig { layers: 1, ..config() };
    let none = ModelConfig { moe: None, ..config() };
    for expected in [few, none] {
        let (model, params) = model(&expected);
        hf::save(folder.path(), &model, &Reference, &params, usize::MAX).unwrap();
        let (config, loaded) = load(folder.path());
        assert_eq!(config, expected);
        assert!(loaded.buffers == params.buffers);
    }
}

/// E4M3 by its definition (OCP 8-bit floating point specification, section 5.3.1).
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if code < 128 { magnitude } else { -magnitude }
}

#[test]
fn fp8_weights_have_a_scale_for_every_block_and_ragged_edges_have_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let (model, params) = save(folder.path(), SavedType::Fp8, usize::MAX);
    let all = files(folder.path());
    let (_, loaded) = load(folder.path());
    let mut blocks_of_one = 0;
    for ((spec, original), loaded) in model.specs.iter().zip(&params.buffers).zip(&loaded.buffers) {
        let pairs = split(spec, original).into_iter().zip(split(spec, loaded));
        for ((name, original), (_, loaded)) in pairs {
            let stored = &all[&name];
            let (original, loaded) = (original.as_slice::<f32>(), loaded.as_slice::<f32>());
            let Some(scales) = all.get(&format!("{name}_scale_inv")) else {
                assert_ne!(stored.dtype(), DType::F8E4M3, "{name}");
                let round = |x: f32| match stored.dtype() {
                    DType::BF16 => bf16::from_f32(x).to_f32(),
                    _ => x,
                };
                assert!(original.iter().zip(loaded).all(|(&o, &l)| round(o) == l), "{name}");
                continue;
            };
            let [n, k] = stored.shape() else { panic!("{name} is a matrix") };
            assert_eq!(scales.shape(), [n.div_ceil(128), k.div_ceil(128)], "{name}");
            blocks_of_one += usize::from(n % 128 != 0 && k % 128 != 0);
            let codes = stored.clone().reinterpret(DType::U8);
            let scale = scales.as_slice::<f32>();
            let mut amax = vec![0f32; scale.len()];
            for (i, (&code, &value)) in codes.as_slice::<u8>().iter().zip(loaded).enumerate() {
                let block = i / k / 128 * k.div_ceil(128) + i % k / 128;
                assert_eq!(value.to_bits(), (e4m3(code) * scale[block]).to_bits(), "{name} {i}");
                // Half a unit in the last of three mantissa bits, or of the smallest subnormal.
                let bound = (original[i].abs() / 16.0).max(scale[block] * 2f32.powi(-10));
                assert!((value - original[i]).abs() <= bound * 1.0001, "{name} {i}");
                amax[block] = amax[block].max(original[i].abs());
            }
            // Each block's largest element stands at the end of the format.
            for (amax, scale) in amax.iter().zip(scale) {
                assert_eq!(*scale, amax.max(1e-4) / 448.0, "{name}");
            }
        }
    }
    assert!(blocks_of_one > 0, "no weight is ragged in both directions");
    // Codes and scales are a fixed point: what was loaded is saved as the same file.
    let again = tempfile::tempdir().unwrap();
    let same = Params { buffers: loaded.buffers };
    hf::save_as(again.path(), &model, &Reference, &same, SavedType::Fp8, usize::MAX).unwrap();
    for (name, tensor) in files(again.path()) {
        if !name.ends_with("_scale_inv") {
            assert!(all[&name] == tensor, "{name}");
        }
    }
}

#[test]
fn fp8_without_scales_or_with_scales_of_another_shape_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let (model, _) = save(folder, SavedType::Fp8, usize::MAX);
    let checkpoint = || HfCheckpoint::open(folder).unwrap().load(&model, &Reference);
    let all = files(folder);
    let name = "model.layers.0.self_attn.o_proj.weight_scale_inv";
    let mut without = all.clone();
    without.remove(name);
    rewrite(folder, without);
    let error = checkpoint().unwrap_err();
    assert!(matches!(&error, HfError::Missing { name: n, .. } if n == name), "{error}");
    let mut wrong = all;
    wrong.insert(name.to_owned(), Tensor::zeros(DType::F32, &[1, 1]));
    rewrite(folder, wrong);
    let error = checkpoint().unwrap_err();
    assert!(matches!(&error, HfError::Shape { name: n, .. } if n == name), "{error}");
}

#[test]
fn experts_one_by_one_and_stacked_are_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let (_, params) = save(folder.path(), SavedType::Master, usize::MAX);
    let mut stacked: BTreeMap<String, Tensor> = BTreeMap::new();
    let mut experts: BTreeMap<String, BTreeMap<usize, [Vec<u8>; 2]>> = BTreeMap::new();
    for (name, tensor) in files(folder.path()) {
        let Some((prefix, rest)) = name.split_once(".experts.") else {
            stacked.insert(name, tensor);
            continue;
        };
        let (expert, projection) = rest.split_once('.').unwrap();
        let (joint, half) = match projection {
            "gate_proj.weight" => ("gate_up_proj", 0),
            "up_proj.weight" => ("gate_up_proj", 1),
            _ => ("down_proj", 0),
        };
        let all = experts.entry(format!("{prefix}.experts.{joint}")).or_default();
        let own = all.entry(expert.parse().unwrap()).or_default();
        own[half] = tensor.bytes().to_vec();
    }
    assert!(!experts.is_empty());
    for (name, all) in experts {
        let shape = if name.ends_with("down_proj") { [8, 144, 136] } else { [8, 272, 144] };
        let bytes: Vec<u8> = all.into_values().flatten().flatten().collect();
        stacked.insert(name, Tensor::from_bytes(DType::F32, &shape, &bytes));
    }
    rewrite(folder.path(), stacked);
    assert!(load(folder.path()).1.buffers == params.buffers);
}

#[test]
fn rope_is_read_in_both_spellings() {
    let folder = tempfile::tempdir().unwrap();
    let mut yarn = config();
    yarn.rope.theta = 5000.0;
    yarn.rope.yarn = Some(Yarn {
        factor: 40.0,
        original_max_position_embeddings: 4096,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: Some(1.0),
        mscale_all_dim: Some(1.0),
        attention_factor: None,
        truncate: true,
    });
    for expected in [config(), yarn] {
        let (model, params) = model(&expected);
        hf::save(folder.path(), &model, &Reference, &params, usize::MAX).unwrap();
        assert_eq!(HfCheckpoint::open(folder.path()).unwrap().config, expected);
        edit_config(folder.path(), |json| {
            let mut rope = json.as_object_mut().unwrap().remove("rope_parameters").unwrap();
            json["rope_theta"] = rope.as_object_mut().unwrap().remove("rope_theta").unwrap();
            let kind = rope.as_object_mut().unwrap().remove("rope_type").unwrap();
            json["rope_scaling"] = Value::Null;
            if kind == "yarn" {
                rope["type"] = kind;
                json["rope_scaling"] = rope;
            }
        });
        assert_eq!(HfCheckpoint::open(folder.path()).unwrap().config, expected);
    }
    edit_config(folder.path(), |json| json["rope_scaling"] = json!({ "type": "linear" }));
    let error = HfCheckpoint::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("rope_scaling.rope_type"), "{error}");
}

#[test]
fn announced_mtp_modules_that_are_absent_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), SavedType::Master, usize::MAX);
    let all = files(folder.path());
    let without = all.into_iter().filter(|(name, _)| !name.starts_with("model.layers.2."));
    rewrite(folder.path(), without.collect());
    let error = HfCheckpoint::open(folder.path()).unwrap_err();
    let HfError::MissingMtp { announced: 1, found: 0, name, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(name, "model.layers.2.eh_proj.weight");
    assert!(error.to_string().contains("set num_nextn_predict_layers to 0"), "{error}");
    edit_config(folder.path(), |json| json["num_nextn_predict_layers"] = 0.into());
    assert_eq!(load(folder.path()).0.mtp_depth, 0);
}

#[test]
fn absent_truncated_and_misshapen_files_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let (model, _) = save(folder, SavedType::Master, 300_000);
    let shard = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| p.to_string_lossy().contains("model-00002-of-"))
        .unwrap();
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() - 4]).unwrap();
    let named = |error: HfError| assert!(error.to_string().contains("model-00002"), "{error}");
    named(HfCheckpoint::open(folder).unwrap_err());
    std::fs::remove_file(&shard).unwrap();
    named(HfCheckpoint::open(folder).unwrap_err());
    std::fs::write(&shard, bytes).unwrap();
    edit_config(folder, |json| json["intermediate_size"] = 201.into());
    let checkpoint = HfCheckpoint::open(folder).unwrap();
    let error = checkpoint.check_shapes().unwrap_err();
    assert!(matches!(&error, HfError::Shape { name, .. } if name.contains("layers.0.mlp")));
    assert!(checkpoint.load(&model, &Reference).is_ok(), "the files are as they were");
    std::fs::remove_file(folder.join("model.safetensors.index.json")).unwrap();
    assert!(matches!(HfCheckpoint::open(folder), Err(HfError::NoWeights { .. })));
}

#[test]
fn what_hugging_face_cannot_say_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let mut parallel = config();
    parallel.mtp_kind = MtpKind::Parallel;
    let mut grouped = config();
    grouped.moe.as_mut().unwrap().group_top = 1;
    for config in [parallel, grouped] {
        let (model, params) = model(&config);
        let error = hf::save(folder.path(), &model, &Reference, &params, 1).unwrap_err();
        assert!(matches!(error, HfError::Unspeakable { .. }), "{error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

/// What transformers reads beside the weights: the end of the text, for the tokenizer and for
/// generation. Both go along when the model is converted.
#[test]
fn tokenizer_and_generation_have_their_settings_for_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    save(&from, SavedType::Master, usize::MAX);
    let tokenizer =
        Tokenizer::train(["a text of some words, words and words"].iter(), 300).unwrap();
    let config = ModelConfig { bos_token_id: None, ..config() };
    hf::save_tokenizer(&from, &tokenizer, &config).unwrap();
    hf::convert_folder(&from, &to, SavedType::Bf16, usize::MAX, true).unwrap();
    for folder in [from, to] {
        let read = |name: &str| -> Value {
            serde_json::from_slice(&std::fs::read(folder.join(name)).unwrap()).unwrap()
        };
        let settings = read("tokenizer_config.json");
        assert_eq!(settings["tokenizer_class"], "PreTrainedTokenizerFast");
        let added = read("tokenizer.json")["added_tokens"].as_array().unwrap().clone();
        let eos = added.iter().find(|t| t["content"] == settings["eos_token"]).unwrap();
        assert_eq!(eos["id"], tokenizer.eos());
        assert_eq!(settings["model_max_length"], config.max_position_embeddings);
        let generation = read("generation_config.json");
        assert_eq!(generation["eos_token_id"], read("config.json")["eos_token_id"]);
    }
}
