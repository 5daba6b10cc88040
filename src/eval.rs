//! `fathom eval`: logits, losses and gradients of token sequences; perplexity of text.

use std::path::{Path, PathBuf};

use fathom_reference::backend::Backend;
use fathom_reference::checkpoint::{HfCheckpoint, tensors};
use fathom_reference::data::{Tokenizer, read_text};
use fathom_reference::eval::{Evaluator, Wanted, Windows, read_tokens};
use fathom_reference::files;
use fathom_reference::precision::Mode;
use serde_json::json;

use crate::backend::{BackendArgs, on_backend};
use crate::output::{self, Outcome};
use crate::record::RecordArgs;

/// Evaluate a checkpoint: logits, layer outputs, loss and gradients, or the perplexity of a text
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom eval --model DIR --tokens ids.json --precision fp32 --save out.safetensors --grads
  fathom eval --model DIR --text book.txt
  fathom eval --model DIR --tokens ids.json --record run/ --record-layer 1 --op-trace ops.jsonl

ids.json is a list of lists of token ids, one list a sequence: [[5, 17, 2], [9, 1]].")]
pub struct Args {
    /// Folder in Hugging Face's layout (config.json, model.safetensors, ...)
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Leave MTP modules out, whatever config.json announces
    #[arg(long)]
    without_mtp: bool,
    /// Token sequences: a JSON list of lists of ids
    #[arg(long, value_name = "FILE", required_unless_present = "text", conflicts_with = "text")]
    tokens: Option<PathBuf>,
    /// Text; needs tokenizer.json in the model's folder
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens of a window of text: what a prediction may look back on
    #[arg(long, value_name = "N", default_value_t = 512)]
    context: usize,
    /// Tokens that a window predicts; fewer than the context: windows overlap [default: context]
    #[arg(long, value_name = "N", requires = "text")]
    stride: Option<usize>,
    /// Precision mode
    #[arg(long, value_name = "MODE", default_value = "fp32", value_parser = mode)]
    precision: Mode,
    /// Write the tensors to this safetensors file
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Also compute every parameter's gradient
    #[arg(long, requires = "tokens")]
    grads: bool,
    /// Weight of the MTP loss in the gradients
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    mtp_lambda: f64,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    backend: BackendArgs,
    #[command(flatten)]
    record: RecordArgs,
}

/// The precision mode of that name on the command line; the error lists the names.
pub fn mode(name: &str) -> Result<Mode, String> {
    let names = Mode::ALL.map(Mode::name).join(", ");
    Mode::from_name(name).ok_or_else(|| format!("expected one of {names}"))
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    let inputs = [&args.model].into_iter().chain(&args.tokens).chain(&args.text);
    files::keep_apart(inputs, args.record.outputs().chain(&args.save))?;
    on_backend!(args.backend, backend => evaluate(args, backend))
}

fn evaluate<B: Backend>(args: &Args, backend: B) -> output::Result {
    let recording = args.record.open()?;
    let backend = recording.wrap(backend);
    let checkpoint = HfCheckpoint::open_as(&args.model, args.without_mtp)?;
    let evaluator = Evaluator::load(backend, &checkpoint, args.precision)?;
    drop(checkpoint);
    let outcome = match &args.text {
        Some(path) => text(args, &evaluator, path),
        None => tokens(args, &evaluator),
    }?;
    args.record.close(&recording)?;
    Ok(outcome)
}

fn tokens<B: Backend>(args: &Args, evaluator: &Evaluator<B>) -> output::Result {
    let path = args.tokens.as_ref().expect("clap asks for tokens or text");
    let config = &evaluator.model.config;
    let sequences = read_tokens(path, config.vocab_size, config.max_position_embeddings)?;
    let wanted = Wanted { grads: args.grads, mtp_lambda: args.mtp_lambda };
    let evaluation = evaluator.run(&sequences, wanted)?;
    if let Some(path) = &args.save {
        tensors::write(path, &evaluation.tensors)?;
    }
    let losses = [evaluation.loss].into_iter().chain(evaluation.mtp_loss.iter().copied());
    let finite = losses.sum::<f64>().is_finite();
    let not_finite = if finite { None } else { evaluation.not_finite() };
    if args.json {
        let mut document = json!({
            "loss": evaluation.loss,
            "perplexity": evaluation.loss.exp(),
            "mtp_loss": evaluation.mtp_loss,
            "predicted": evaluation.predicted,
            "precision": args.precision.name(),
        });
        if let Some(found) = &not_finite {
            document["not_finite"] = json!(found);
        }
        output::print_json(&document)?;
    } else {
        outln!("loss {:.6} over {} tokens", evaluation.loss, evaluation.predicted);
        for (d, loss) in evaluation.mtp_loss.iter().enumerate() {
            outln!("MTP {} loss {loss:.6}", d + 1);
        }
    }
    Ok(outcome(&args.model, finite, not_finite))
}

/// A loss that is not finite is no evaluation; says what was not finite first.
fn outcome(model: &Path, finite: bool, not_finite: Option<String>) -> Outcome {
    if finite {
        return Outcome::Holds;
    }
    let found = not_finite.unwrap_or_else(|| "the loss alone is not finite".to_owned());
    output::error(&format_args!("{}: {found}", model.display()));
    Outcome::Fails
}

fn text<B: Backend>(args: &Args, evaluator: &Evaluator<B>, path: &Path) -> output::Result {
    let text = read_text(path)?;
    let tokenizer = Tokenizer::load(&args.model.join("tokenizer.json"))?;
    let longest = evaluator.model.config.max_position_embeddings;
    let windows = Windows::new(args.context, args.stride, longest)?;
    let score = evaluator.text(path, &text, &tokenizer, windows)?;
    if args.json {
        output::print_json(&score)?;
    } else {
        outln!(
            "loss {:.6}, perplexity {:.3}, {:.4} bits a byte ({} tokens, {} bytes predicted; \
             windows of {}, stride {})",
            score.loss,
            score.perplexity,
            score.bits_per_byte,
            score.predicted,
            score.bytes,
            score.context,
            score.stride
        );
    }
    Ok(outcome(&args.model, score.loss.is_finite(), score.not_finite))
}
