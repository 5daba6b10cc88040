//! `fathom model`: what a model is, without its weights.

use std::path::{Path, PathBuf};

use fathom_reference::checkpoint::HfCheckpoint;
use fathom_reference::checkpoint::hf::{self, SavedType};
use fathom_reference::config::{ModelConfig, preset_names};
use fathom_reference::inspect;
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
    /// Element type of the weights: f32, bf16 or fp8
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = saved_type)]
    weights: SavedType,
    /// Bytes of a file, at most
    #[arg(long, value_name = "BYTES", default_value_t = 5e9)]
    shard_size: f64,
}

fn saved_type(name: &str) -> Result<SavedType, String> {
    let names = SavedType::ALL.map(SavedType::name).join(", ");
    SavedType::from_name(name).ok_or_else(|| format!("expected one of {names}"))
}

/// Count parameters, memory, FLOPs and cache of a preset, a config.json or a checkpoint's folder
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom model inspect deepseek-v3
  fathom model inspect DIR/config.json --json
  fathom model inspect DIR --precision fp32 --sequence 2048")]
struct Inspect {
    /// A preset's name, a config.json, or a folder in Hugging Face's layout
    #[arg(value_name = "MODEL")]
    model: String,
    /// Sequence length that FLOPs are counted at
    #[arg(long, value_name = "N", default_value_t = 4096)]
    sequence: usize,
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
        Command::Convert(args) => {
            let Convert { from, to, weights, shard_size } = args;
            hf::convert_folder(from, to, *weights, *shard_size as usize)?;
            Ok(Outcome::Holds)
        }
    }
}

fn inspect(args: &Inspect) -> output::Result {
    let config = read(&args.model)?;
    let found = inspect::inspect(&config, Recipe::new(args.precision), args.sequence)?;
    if args.json {
        let document = json!({
            "model": args.model,
            "precision": args.precision.name(),
            "config": config,
            "figures": found,
        });
        output::print_json(&document)?;
        return Ok(Outcome::Holds);
    }
    let p = &found.parameters;
    let billion = |n: u64| format!("{:.4} B", n as f64 / 1e9);
    let gigabytes = |n: u64| format!("{:.3} GB", n as f64 / 1e9);
    let kilobytes = |n: u64| format!("{:.3} KB", n as f64 / 1e3);
    let memory = &found.memory_bytes;
    let mut rows = vec![
        ("parameters, all", billion(p.total)),
        ("active a token, without embedding", billion(p.active_without_embedding)),
        ("active a token, with embedding", billion(p.active)),
        ("embedding", billion(p.embedding)),
        ("head", billion(p.head)),
        ("routed experts", billion(p.routed_experts)),
        ("MTP modules, without shared tables", billion(p.mtp)),
        ("weights as GEMMs read them", gigabytes(memory.weights)),
        ("master copies", gigabytes(memory.master)),
        ("gradients", gigabytes(memory.gradients)),
        ("moments (BF16)", gigabytes(memory.moments)),
        ("training a token, causal", format!("{:.2} GFLOP", found.training_gflop_per_token)),
        (
            "training a token, non-causal",
            format!("{:.2} GFLOP", found.training_gflop_per_token_non_causal),
        ),
        ("forward a token, causal", format!("{:.2} GFLOP", found.forward_gflop_per_token)),
        ("KV cache a token (BF16)", kilobytes(found.kv_cache_bytes_per_token)),
    ];
    let others: Vec<(String, u64)> = found
        .kv_cache_alternatives
        .iter()
        .map(|(name, bytes)| (format!("KV cache a token as {name}"), *bytes))
        .collect();
    rows.extend(others.iter().map(|(name, bytes)| (name.as_str(), kilobytes(*bytes))));
    let rows = rows.into_iter().map(|(name, value)| vec![name.to_owned(), value]).collect();
    println!("{}", output::table(&[args.model.as_str(), ""], &[1], rows));
    Ok(Outcome::Holds)
}

/// The configuration of a preset, of a file, or of a folder (its tensors' shapes are checked).
fn read(model: &str) -> Result<ModelConfig, Box<dyn std::error::Error>> {
    if preset_names().contains(&model) {
        return Ok(ModelConfig::preset(model)?);
    }
    let path = PathBuf::from(model);
    if !path.is_dir() {
        if !path.exists() {
            let known = preset_names().join(", ");
            return Err(
                format!("'{model}' is no file, folder or preset; presets are {known}").into()
            );
        }
        return Ok(ModelConfig::from_hf_file(&path)?);
    }
    if has_weights(&path) {
        let checkpoint = HfCheckpoint::open(&path)?;
        checkpoint.check_shapes()?;
        return Ok(checkpoint.config);
    }
    Ok(ModelConfig::from_hf_file(&path.join("config.json"))?)
}

fn has_weights(folder: &Path) -> bool {
    ["model.safetensors", "model.safetensors.index.json"].iter().any(|f| folder.join(f).is_file())
}
