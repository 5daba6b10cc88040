//! Writing a model in Hugging Face's layout, shard after shard.

use std::io::Write;
use std::path::Path;

use fathom_numerics::formats::Format;
use fathom_numerics::quant::ScaleKind;
use fathom_trace::{DType, Parallel};
use serde_json::{Value, json};

use super::hf::{FP8_BLOCK, HfCheckpoint, HfError};
use super::tensors::{self, TensorsError};
use crate::backend::{Backend, Reference};
use crate::data::Tokenizer;
use crate::memory;
use crate::model::{Model, ParamId, ParamKind, ParamSpec, Params, Part, convert};
use crate::op::Op;
use crate::ops::quantize_block::QuantizeBlock;
use crate::precision::{Mode, Recipe};
use crate::{EngineError, OpError, Tensor, files};
use fathom_config::ModelConfig;

/// The element types in which weights can be saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SavedType {
    /// F32, or F64 where the model computes in it.
    #[default]
    Master,
    /// BF16; selection biases stay F32.
    Bf16,
    /// E4M3 with `NAME_scale_inv` for every 128 x 128 block of a Linear's or an expert's weight;
    /// the others BF16: as DeepSeek-V3 was released.
    Fp8,
}

impl SavedType {
    /// Every element type that weights are written in.
    pub const ALL: [SavedType; 3] = [SavedType::Master, SavedType::Bf16, SavedType::Fp8];

    /// The name on the command line: `f32`, `bf16`, `fp8`.
    pub fn name(self) -> &'static str {
        match self {
            SavedType::Master => "f32",
            SavedType::Bf16 => "bf16",
            SavedType::Fp8 => "fp8",
        }
    }

    /// The type of that name, `None` for an unknown one.
    pub fn from_name(name: &str) -> Option<SavedType> {
        SavedType::ALL.into_iter().find(|t| t.name() == name)
    }
}

/// Writes a model in Hugging Face's layout: `config.json` and files of at most `shard_bytes`, in
/// master precision.
///
/// # Errors
/// [`HfError`].
pub fn save<B: Backend>(
    folder: &Path,
    model: &Model,
    backend: &B,
    params: &Params<B>,
    shard_bytes: usize,
) -> Result<(), HfError> {
    save_as(folder, model, backend, params, SavedType::Master, shard_bytes)
}

/// A checkpoint tensor to be written: part `part` of a parameter, under a name of its own.
struct Planned {
    name: String,
    id: ParamId,
    part: usize,
    fp8: bool,
}

/// Writes a model in Hugging Face's layout with weights of a type; no more than one shard is held
/// in memory. A tensor larger than `shard_bytes` has a file of its own.
///
/// # Errors
/// [`HfError`]; files that were there before are as they were until all of the new are written.
pub fn save_as<B: Backend>(
    folder: &Path,
    model: &Model,
    backend: &B,
    params: &Params<B>,
    saved: SavedType,
    shard_bytes: usize,
) -> Result<(), HfError> {
    let config = config(&model.config, saved, model.recipe.master())?;
    std::fs::create_dir_all(folder)
        .map_err(|source| TensorsError::Io { path: folder.to_owned(), source })?;
    let shards = shards(model, saved, shard_bytes);
    let count = shards.len();
    let mut map = serde_json::Map::new();
    let mut total = 0;
    for (i, shard) in shards.iter().enumerate() {
        let name = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        let mut written = Vec::new();
        for planned in shard {
            written.extend(tensor(model, backend, params, saved, planned)?);
        }
        for (tensor, value) in &written {
            total += value.bytes().len();
            map.insert(tensor.clone(), name.clone().into());
        }
        tensors::write(&folder.join(name), &written)?;
    }
    let index = folder.join("model.safetensors.index.json");
    if count > 1 {
        write_json(&index, &json!({ "metadata": { "total_size": total }, "weight_map": map }))?;
    } else if index.exists() {
        // The index of an earlier model would name that model's files.
        std::fs::remove_file(&index)
            .map_err(|source| TensorsError::Io { path: index.clone(), source })?;
    }
    write_json(&folder.join("generation_config.json"), &generation_config(&config))?;
    Ok(write_json(&folder.join("config.json"), &config)?)
}

/// What transformers generates by: without it a model has no end of the text there.
fn generation_config(config: &Value) -> Value {
    json!({
        "_from_model_config": true,
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "use_cache": true,
    })
}

/// Writes a model's tokenizer beside it: `tokenizer.json`, and `tokenizer_config.json`, which tells
/// transformers how the end of the text and the longest input are called.
///
/// # Errors
/// [`HfError`].
pub fn save_tokenizer(
    folder: &Path,
    tokenizer: &Tokenizer,
    config: &ModelConfig,
) -> Result<(), HfError> {
    tokenizer.save(&folder.join("tokenizer.json"))?;
    let json: Value = serde_json::from_str(tokenizer.json()).expect("our own JSON");
    let added = json["added_tokens"].as_array().cloned().unwrap_or_default();
    let spelled = |id: u32| added.iter().find(|token| token["id"] == id).map(|t| &t["content"]);
    let bos = config.bos_token_id.and_then(spelled);
    let settings = json!({
        "add_bos_token": false,
        "add_eos_token": false,
        "bos_token": bos,
        "clean_up_tokenization_spaces": false,
        "eos_token": spelled(tokenizer.eos()),
        "model_max_length": config.max_position_embeddings,
        "tokenizer_class": "PreTrainedTokenizerFast",
    });
    Ok(write_json(&folder.join("tokenizer_config.json"), &settings)?)
}

/// What goes with a model from folder to folder.
const COMPANIONS: [&str; 5] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
];

/// Writes the model of one folder into another, in another type or in other shards, with or without
/// its MTP modules; tokenizer and settings of generation go with it.
///
/// # Errors
/// [`HfError`]; the same folder on both sides is refused.
pub fn convert_folder(
    from: &Path,
    to: &Path,
    saved: SavedType,
    shard_bytes: usize,
    without_mtp: bool,
) -> Result<(), HfError> {
    let io = |path: &Path, source| TensorsError::Io { path: path.to_owned(), source };
    let real = |path: &Path| std::fs::canonicalize(path);
    if real(to).is_ok_and(|to| real(from).is_ok_and(|from| from == to)) {
        return Err(HfError::SameFolder { folder: to.to_owned() });
    }
    let checkpoint = HfCheckpoint::open_as(from, without_mtp)?;
    let recipe = Recipe::new(Mode::Fp32);
    let model = Model::new(&checkpoint.config, recipe, Parallel::default(), 0)?;
    memory::evaluation(&model, false).check()?;
    let params = checkpoint.load(&model, &Reference)?;
    save_as(to, &model, &Reference, &params, saved, shard_bytes)?;
    for name in COMPANIONS {
        let (own, target) = (from.join(name), to.join(name));
        if own.is_file() {
            let bytes = files::read(&own, files::TEXT_BYTES).map_err(|e| io(&own, e))?;
            files::replace(&target, |file, _| file.write_all(&bytes))
                .map_err(|e| io(&target, e))?;
        }
    }
    Ok(())
}

fn config(config: &ModelConfig, saved: SavedType, master: DType) -> Result<Value, HfError> {
    let mut json = config.to_hf().map_err(|reason| HfError::Unspeakable { reason })?;
    json["dtype"] = match (saved, master) {
        (SavedType::Master, DType::F64) => "float64".into(),
        (SavedType::Master, _) => "float32".into(),
        (SavedType::Bf16 | SavedType::Fp8, _) => "bfloat16".into(),
    };
    if saved == SavedType::Fp8 {
        json["quantization_config"] = json!({
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        });
    }
    Ok(json)
}

/// Which tensor goes into which file.
fn shards(model: &Model, saved: SavedType, shard_bytes: usize) -> Vec<Vec<Planned>> {
    let mut shards: Vec<Vec<Planned>> = vec![Vec::new()];
    let mut filled = 0;
    for planned in plan(model, saved) {
        let spec = &model.specs[planned.id.0];
        let elements: usize = spec.parts[planned.part].shape.iter().product();
        let bytes = elements * dtype(saved, spec, planned.fp8, model).size();
        if filled > 0 && filled + bytes > shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        shards.last_mut().expect("never empty").push(planned);
    }
    shards
}

fn plan(model: &Model, saved: SavedType) -> Vec<Planned> {
    let mut plan = Vec::new();
    for (id, spec) in model.specs.iter().enumerate() {
        for (part, Part { name, .. }) in spec.parts.iter().enumerate() {
            // Released checkpoints leave the modules' joining projection in BF16.
            let product = matches!(spec.kind, ParamKind::Linear | ParamKind::Experts);
            let fp8 = saved == SavedType::Fp8 && product && !name.ends_with("eh_proj.weight");
            plan.push(Planned { name: name.clone(), id: ParamId(id), part, fp8 });
        }
    }
    // Released checkpoints repeat embedding and head in every MTP module.
    for module in &model.mtp {
        let copies = [("embed_tokens", model.embedding), ("shared_head.head", model.head)];
        for (name, id) in copies {
            let id = id.expect("the stage of MTP modules has both");
            let name = format!("model.layers.{}.{name}.weight", module.layer.index);
            plan.push(Planned { name, id, part: 0, fp8: false });
        }
    }
    plan
}

fn dtype(saved: SavedType, spec: &ParamSpec, fp8: bool, model: &Model) -> DType {
    match saved {
        SavedType::Master => model.recipe.master(),
        _ if spec.kind == ParamKind::SelectionBias => DType::F32,
        SavedType::Fp8 if fp8 => DType::F8E4M3,
        SavedType::Bf16 | SavedType::Fp8 => DType::BF16,
    }
}

/// A tensor as it is written, with its scales.
fn tensor<B: Backend>(
    model: &Model,
    backend: &B,
    params: &Params<B>,
    saved: SavedType,
    planned: &Planned,
) -> Result<Vec<(String, Tensor)>, HfError> {
    let spec = &model.specs[planned.id.0];
    let whole = backend.download(&params.buffers[planned.id.0])?;
    let (_, value) = split(spec, &whole).swap_remove(planned.part);
    let dtype = dtype(saved, spec, planned.fp8, model);
    let name = planned.name.clone();
    if dtype != DType::F8E4M3 {
        return Ok(vec![(name, convert(value, dtype))]);
    }
    let block = [Some(FP8_BLOCK), Some(FP8_BLOCK)];
    let format = Format::E4M3;
    let op = QuantizeBlock { format, block, scale: ScaleKind::F32, amax_floor: 1e-4 };
    let out = Op::run(&op, vec![Some(convert(value, DType::F32))]);
    let [q, scale] = <[Tensor; 2]>::try_from(out.map_err(|e: OpError| EngineError::Op(e))?)
        .expect("codes and scales");
    let scale_name = format!("{name}_scale_inv");
    Ok(vec![(name, q), (scale_name, scale)])
}

/// The checkpoint tensors that a parameter consists of, by name; `tensor` has the parameter's
/// shape.
pub fn split(spec: &ParamSpec, tensor: &Tensor) -> Vec<(String, Tensor)> {
    let mut rest = tensor.bytes();
    let mut parts = Vec::with_capacity(spec.parts.len());
    for part in &spec.parts {
        let length = part.shape.iter().product::<usize>() * tensor.dtype().size();
        let (own, after) = rest.split_at(length);
        parts.push((part.name.clone(), Tensor::from_bytes(tensor.dtype(), &part.shape, own)));
        rest = after;
    }
    parts
}

/// Writes JSON beside the file, then renames it.
fn write_json(path: &Path, value: &Value) -> Result<(), TensorsError> {
    let text = format!("{value:#}\n");
    files::replace(path, |file, _| file.write_all(text.as_bytes()))
        .map_err(|source| TensorsError::Io { path: path.to_owned(), source })
}
