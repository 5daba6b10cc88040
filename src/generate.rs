//! `fathom generate`: text behind a prompt, plainly or with the MTP module's drafts.

use std::path::PathBuf;

use fathom_reference::backend::Backend;
use fathom_reference::checkpoint::HfCheckpoint;
use fathom_reference::data::{TextStream, Tokenizer};
use fathom_reference::eval::{Evaluator, read_prompt};
use fathom_reference::files;
use fathom_reference::generate::{Generation, Sampling, Settings, generate};
use fathom_reference::precision::Mode;
use serde_json::json;

use crate::backend::{BackendArgs, on_backend};
use crate::output::{self, Outcome};
use crate::record::RecordArgs;

/// Generate text behind a prompt
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom generate --model DIR --prompt 'The cache holds' --tokens 200 --temperature 0.8 --top-p 0.95
  fathom generate --model DIR --prompt-tokens ids.json --speculative --json

The text goes to stdout as it comes, the figures to stderr. ids.json is a list of token ids: [5, 17, 2].
Without a prompt, generation begins as a document does.")]
pub struct Args {
    /// Folder in Hugging Face's layout (config.json, model.safetensors, tokenizer.json, ...)
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Leave MTP modules out, whatever config.json announces
    #[arg(long, conflicts_with = "speculative")]
    without_mtp: bool,
    /// Text to continue; special tokens in it are read as such
    #[arg(long, value_name = "TEXT", conflicts_with = "prompt_tokens")]
    prompt: Option<String>,
    /// Token ids to continue: a JSON list
    #[arg(long, value_name = "FILE")]
    prompt_tokens: Option<PathBuf>,
    /// Tokens to generate at most; the end of the text ends it earlier
    #[arg(long, value_name = "N", default_value_t = 100)]
    tokens: usize,
    /// Go on behind the end of the text
    #[arg(long)]
    ignore_eos: bool,
    /// What logits are divided by; 0: always the most probable token
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f64,
    /// Draw from the most probable tokens that together reach this share
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f64,
    /// Seed of the draws
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Draft with the MTP module and verify: the same tokens (with a temperature: the same
    /// distribution) in fewer steps
    #[arg(long)]
    speculative: bool,
    /// Precision mode
    #[arg(long, value_name = "MODE", default_value = "fp32", value_parser = crate::eval::mode)]
    precision: Mode,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    backend: BackendArgs,
    #[command(flatten)]
    record: RecordArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    let inputs = [&args.model].into_iter().chain(&args.prompt_tokens);
    files::keep_apart(inputs, args.record.outputs())?;
    on_backend!(args.backend, backend => run_on(args, backend))
}

fn run_on<B: Backend>(args: &Args, backend: B) -> output::Result {
    let recording = args.record.open()?;
    let backend = recording.wrap(backend);
    let checkpoint = HfCheckpoint::open_as(&args.model, args.without_mtp)?;
    let evaluator = Evaluator::load(backend, &checkpoint, args.precision)?;
    drop(checkpoint);
    let outcome = continue_prompt(args, &evaluator)?;
    args.record.close(&recording)?;
    Ok(outcome)
}

fn continue_prompt<B: Backend>(args: &Args, evaluator: &Evaluator<B>) -> output::Result {
    let (model, config) = (&evaluator.model, &evaluator.model.config);
    let file = args.model.join("tokenizer.json");
    let tokenizer = match (file.exists(), &args.prompt_tokens) {
        (false, Some(_)) => None,
        _ => Some(Tokenizer::load(&file)?),
    };
    let prompt = match (&args.prompt, &args.prompt_tokens, &tokenizer) {
        (Some(text), _, Some(tokenizer)) => tokenizer.encode_prompt(text)?,
        (_, Some(path), _) => read_prompt(path, config.vocab_size)?,
        (_, _, Some(tokenizer)) => vec![config.bos_token_id.unwrap_or(tokenizer.eos())],
        _ => unreachable!("without token ids there is a tokenizer"),
    };
    let mut stop = config.eos_token_ids.clone();
    stop.extend(tokenizer.as_ref().map(Tokenizer::eos));
    let (temperature, top_p, seed) = (args.temperature, args.top_p, args.seed);
    let settings = Settings {
        tokens: args.tokens,
        sampling: Sampling { temperature, top_p, seed },
        speculative: args.speculative,
        stop: if args.ignore_eos { Vec::new() } else { stop },
    };
    let weights = model.weights(&evaluator.backend, &evaluator.params)?;
    let mut stream = tokenizer.as_ref().map(TextStream::new);
    let mut each = |token: u32| {
        if !args.json {
            match &mut stream {
                Some(stream) => show(&stream.push(token)),
                None => show(&format!("{token} ")),
            };
        }
    };
    let out = generate(model, &evaluator.backend, &weights, &prompt, &settings, &mut each)?;
    if args.json {
        output::print_json(&document(&out, prompt.len(), tokenizer.as_ref(), args.precision))?;
        return Ok(Outcome::Holds);
    }
    show(&stream.map(TextStream::finish).unwrap_or_default());
    outln!();
    figures(&out, prompt.len(), args.precision);
    Ok(Outcome::Holds)
}

/// Text on stdout, at once.
fn show(text: &str) {
    out!("{text}");
    output::flush();
}

fn document(
    out: &Generation,
    prompt_tokens: usize,
    tokenizer: Option<&Tokenizer>,
    precision: Mode,
) -> serde_json::Value {
    let mut json = json!(out);
    json["text"] = json!(tokenizer.map(|t| t.decode(&out.tokens)));
    json["prompt_tokens"] = json!(prompt_tokens);
    json["precision"] = json!(precision.name());
    json["acceptance_rate"] = json!(out.acceptance_rate());
    json["tokens_per_step"] = json!(out.tokens_per_step());
    json["speedup"] = json!(out.speedup());
    json
}

fn figures(out: &Generation, prompt_tokens: usize, precision: Mode) {
    let rate = |tokens: usize, seconds: f64| tokens as f64 / seconds.max(1e-9);
    errln!(
        "prompt {prompt_tokens} tokens, {:.1} tokens/s; generated {} tokens, {:.1} tokens/s ({})",
        rate(prompt_tokens, out.prompt_s),
        out.tokens.len(),
        rate(out.tokens.len().saturating_sub(1), out.decode_s),
        precision.name(),
    );
    errln!("KV cache {} bytes a token", out.kv_bytes_per_token);
    if let (Some(acceptance), Some(tokens)) = (out.acceptance_rate(), out.tokens_per_step()) {
        errln!(
            "acceptance rate {:.1} % ({} of {} drafts), {tokens:.2} tokens a step",
            100.0 * acceptance,
            out.accepted,
            out.drafted,
        );
    }
    if let Some(speedup) = out.speedup() {
        errln!("speed-up {speedup:.2}x over plain decoding, measured on the last tokens");
    }
}
