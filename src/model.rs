//! `fathom model`: what a model is, without its weights.

mod trace;

use std::path::{Path, PathBuf};

use fathom_config::{ModelConfig, presets};
use fathom_reference::checkpoint::HfCheckpoint;
use fathom_reference::checkpoint::hf::{self, SavedType};
use fathom_reference::files;
use fathom_reference::inspect::{self, Inspection, Policy};
use fathom_reference::precision::{Mode, Recipe};
use serde_json::json;

use crate::output::{self, Outcome};

/// What a model is: parameters, memory, work and cache a token
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    Inspect(Inspect),
    Convert(Convert),
    Trace(trace::Args),
}

/// Write a checkpoint again: in another element type, in other shards
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom model convert DIR OUT --weights fp8       E4M3 with weight_scale_inv, as released
  fathom model convert DIR OUT --shard-size 5e9    files of at most 5 GB")]
struct Convert {
    /// Folder in Hugging Face's layout
    #[arg(value_name = "DIR")]
    from: PathBuf,
    /// Folder to write to
    #[arg(value_name = "OUT")]
    to: PathBuf,
    /// Leave MTP modules out, whatever config.json announces
    #[arg(long)]
    without_mtp: bool,
    /// Element type of the weights: f32, bf16 or fp8
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = saved_type)]
    weights: SavedType,
    /// Bytes of a file, at most
    #[arg(long, value_name = "BYTES", default_value = "5e9", value_parser = shard_size)]
    shard_size: usize,
}

fn shard_size(text: &str) -> Result<usize, String> {
    let bytes = text.parse::<f64>().ok().filter(|bytes| (1.0..=1e15).contains(bytes));
    bytes.map(|bytes| bytes as usize).ok_or_else(|| "expected 1 to 1e15 bytes".to_owned())
}

fn saved_type(name: &str) -> Result<SavedType, String> {
    let names = SavedType::ALL.map(SavedType::name).join(", ");
    SavedType::from_name(name).ok_or_else(|| format!("expected one of {names}"))
}

/// Count parameters, memory, FLOPs and cache of presets, config.json files or checkpoints' folders
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom model inspect deepseek-v3
  fathom model inspect deepseek-v3 qwen2.5-72b llama-3.1-405b    side by side
  fathom model inspect DIR/config.json --json
  fathom model inspect DIR --precision fp32 --sequence 2048 --micro-batch 4")]
struct Inspect {
    /// A preset's name, a config.json, or a folder in Hugging Face's layout
    #[arg(required = true, value_name = "MODEL")]
    models: Vec<PathBuf>,
    /// Sequence length that FLOPs and activations are counted at
    #[arg(long, value_name = "N", default_value_t = 4096,
          value_parser = clap::value_parser!(u32).range(1..))]
    sequence: u32,
    /// Sequences of a micro-batch that activations are counted for
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..))]
    micro_batch: u32,
    /// Leave MTP modules out, whatever the configuration announces
    #[arg(long)]
    without_mtp: bool,
    /// Precision mode that memory is counted in
    #[arg(long, value_name = "MODE", default_value = "fp8", value_parser = crate::eval::mode)]
    precision: Mode,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    match &args.command {
        Command::Inspect(args) => inspect(args),
        Command::Trace(args) => trace::run(args),
        Command::Convert(args) => {
            let Convert { from, to, weights, shard_size, without_mtp } = args;
            files::keep_apart([from], [to])?;
            hf::convert_folder(from, to, *weights, *shard_size, *without_mtp)?;
            Ok(Outcome::Holds)
        }
    }
}

fn inspect(args: &Inspect) -> output::Result {
    let (sequence, sequences) = (args.sequence as usize, args.micro_batch as usize);
    let mut documents = Vec::new();
    let mut columns = Vec::new();
    for name in &args.models {
        let config = read(name, args.without_mtp)?;
        let figures = inspect::inspect(&config, Recipe::new(args.precision), sequence)?;
        let policies = inspect::by_policy(&config, args.precision, sequences, sequence)?;
        columns.push(column(&figures, &policies));
        documents.push(json!({
            "model": name.display().to_string(),
            "precision": args.precision.name(),
            "config": config,
            "figures": figures,
            "micro_batch": { "sequences": sequences, "tokens": sequences * sequence },
            "policies": policies,
        }));
    }
    if args.json {
        match &documents[..] {
            [one] => output::print_json(one)?,
            several => output::print_json(&json!({ "models": several }))?,
        }
        return Ok(Outcome::Holds);
    }
    let rows = columns[0].iter().enumerate().map(|(i, (name, _))| {
        let values = columns.iter().map(|column| column[i].1.clone());
        std::iter::once(name.clone()).chain(values).collect()
    });
    let names: Vec<String> = args.models.iter().map(|name| name.display().to_string()).collect();
    let header: Vec<&str> = std::iter::once("").chain(names.iter().map(String::as_str)).collect();
    let right: Vec<usize> = (1..header.len()).collect();
    outln!("{}", output::table(&header, &right, rows.collect()));
    outln!(
        "{}; FLOPs at sequence {sequence}, activations of {sequences} x {sequence} tokens",
        args.precision.name()
    );
    Ok(Outcome::Holds)
}

/// A model's figures by name, the same names for every model.
fn column(found: &Inspection, policies: &[Policy]) -> Vec<(String, String)> {
    let p = &found.parameters;
    let billion = |n: u64| format!("{:.4} B", n as f64 / 1e9);
    let gigabytes = |n: u64| format!("{:.3} GB", n as f64 / 1e9);
    let kilobytes = |n: u64| format!("{:.3} KB", n as f64 / 1e3);
    let gflop = |n: f64| format!("{n:.2} GFLOP");
    let memory = &found.memory_bytes;
    let fixed = [
        ("parameters, all", billion(p.total)),
        ("active a token, without embedding", billion(p.active_without_embedding)),
        ("active a token, with embedding", billion(p.active)),
        ("embedding", billion(p.embedding)),
        ("head", billion(p.head)),
        ("routed experts", billion(p.routed_experts)),
        ("MTP modules, without shared tables", billion(p.mtp)),
        ("training a token, causal", gflop(found.training_gflop_per_token)),
        ("training a token, non-causal", gflop(found.training_gflop_per_token_non_causal)),
        ("forward a token, causal", gflop(found.forward_gflop_per_token)),
        ("KV cache a token (BF16)", kilobytes(found.kv_cache_bytes_per_token)),
    ];
    let mut rows: Vec<(String, String)> =
        fixed.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    for (name, bytes) in &found.kv_cache_alternatives {
        rows.push((format!("KV cache a token as {name}"), kilobytes(*bytes)));
    }
    let lasting = [
        ("weights as GEMMs read them", memory.weights),
        ("master copies", memory.master),
        ("gradients", memory.gradients),
        ("moments (BF16)", memory.moments),
    ];
    rows.extend(lasting.map(|(name, bytes)| (name.to_owned(), gigabytes(bytes))));
    for Policy { name, activations_bytes, training_bytes } in policies {
        rows.push((format!("kept activations: {name}"), gigabytes(activations_bytes.kept)));
        if *name == "default" {
            rows.push(("training in all".to_owned(), gigabytes(*training_bytes)));
        }
    }
    rows
}

/// The configuration of a preset, of a file, or of a folder (its tensors' shapes are checked).
fn read(model: &Path, without_mtp: bool) -> Result<ModelConfig, Box<dyn std::error::Error>> {
    let mut config = announced(model, without_mtp)?;
    if without_mtp {
        config.mtp_depth = 0;
    }
    Ok(config)
}

fn announced(model: &Path, without_mtp: bool) -> Result<ModelConfig, Box<dyn std::error::Error>> {
    if let Some(name) = model.to_str().filter(|name| presets::model_text(name).is_ok()) {
        return Ok(ModelConfig::preset(name)?);
    }
    if !model.is_dir() {
        if !model.exists() {
            let (model, known) = (model.display(), presets::model_names().join(", "));
            return Err(
                format!("'{model}' is no file, folder or preset; presets are {known}").into()
            );
        }
        return Ok(ModelConfig::from_hf_file(model)?);
    }
    if has_weights(model) {
        let checkpoint = HfCheckpoint::open_as(model, without_mtp)?;
        checkpoint.check_shapes()?;
        return Ok(checkpoint.config);
    }
    Ok(ModelConfig::from_hf_file(&model.join("config.json"))?)
}

fn has_weights(folder: &Path) -> bool {
    ["model.safetensors", "model.safetensors.index.json"].iter().any(|f| folder.join(f).is_file())
}
