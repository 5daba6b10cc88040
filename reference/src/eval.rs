//! Evaluation: logits, layer outputs, losses and gradients of given token sequences, and the
//! perplexity of text.

use std::path::{Path, PathBuf};

use fathom_trace::{DType, Parallel};

use crate::backend::{Backend, Reference};
use crate::checkpoint::hf::{self, HfCheckpoint, HfError};
use crate::data::{DataError, Tokenizer};
use crate::files::{self, MESSAGE, shorten};
use crate::memory::room::NoRoom;
use crate::model::{Batch, BuildError, Forward, Model, Params, StepSettings};
use crate::precision::{Mode, Recipe};
use crate::{EngineError, Tensor, memory};

/// Why an evaluation failed.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The checkpoint cannot be opened or loaded.
    #[error(transparent)]
    Checkpoint(#[from] HfError),
    /// The model cannot be laid out.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// An op refused its inputs, or the backend failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The tokenizer, or the text it is to read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The model is larger than the memory.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// Windows that are empty, or longer than the model can read.
    #[error("{message}")]
    Windows {
        /// What was expected and found.
        message: String,
    },
    /// The token or text file cannot be read, or holds ids beyond the vocabulary.
    #[error("{}: {message}", path.display())]
    Input {
        /// The file that the error is about.
        path: PathBuf,
        /// What was expected there and what was found.
        message: String,
    },
}

/// A checkpoint loaded for evaluation on a backend.
pub struct Evaluator<B: Backend> {
    /// The backend that executes the ops.
    pub backend: B,
    /// The model on this rank; it holds no values.
    pub model: Model,
    /// Its parameters, in master precision.
    pub params: Params<B>,
}

/// What an evaluation is asked for beside outputs and losses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Wanted {
    /// Whether gradients are wanted: those of the main loss plus `mtp_lambda` times the MTP loss.
    pub grads: bool,
    /// Weight of the mean of the MTP modules' losses in the gradients.
    pub mtp_lambda: f64,
}

/// What an evaluation gives.
#[derive(Clone, Debug, Default)]
pub struct Evaluation {
    /// Mean cross-entropy of the main model over the predicted tokens, in nats.
    pub loss: f64,
    /// Predicted tokens: all but the first of every sequence.
    pub predicted: usize,
    /// Mean cross-entropy of each MTP module, in nats.
    pub mtp_loss: Vec<f64>,
    /// Every tensor asked for, by name.
    pub tensors: Vec<(String, Tensor)>,
}

impl Evaluation {
    /// The first output that is not finite, in the order of computation: its name, the row-major
    /// index and the number.
    pub fn not_finite(&self) -> Option<String> {
        let layers = self.tensors.iter().filter(|(name, _)| name.starts_with("layer_out."));
        let others = self.tensors.iter().filter(|(name, _)| !name.starts_with("layer_out."));
        layers.chain(others).find_map(|(name, tensor)| {
            let (index, found) = tensor.first_not_finite()?;
            Some(format!("{name} is not finite first: element {index} is {found}"))
        })
    }
}

/// Reads token sequences: a JSON list of lists of ids below `vocab`, each of at most `longest`.
///
/// # Errors
/// [`EvalError::Input`] naming sequence and place.
pub fn read_tokens(path: &Path, vocab: usize, longest: usize) -> Result<Vec<Vec<u32>>, EvalError> {
    let wrong = |message: String| EvalError::Input { path: path.to_owned(), message };
    let text = files::read_text(path, files::TEXT_BYTES).map_err(|e| wrong(e.to_string()))?;
    let sequences: Vec<Vec<u32>> = serde_json::from_str(&text).map_err(|e| {
        let found = shorten(&e.to_string(), MESSAGE);
        wrong(format!("expected a JSON list of lists of token ids: {found}"))
    })?;
    if sequences.iter().all(Vec::is_empty) {
        return Err(wrong("expected at least one token, found none".into()));
    }
    for (i, sequence) in sequences.iter().enumerate() {
        if sequence.is_empty() || sequence.len() > longest {
            let found = sequence.len();
            return Err(wrong(format!(
                "sequence {i}: expected 1 to {longest} tokens, found {found}"
            )));
        }
        if let Some(place) = sequence.iter().position(|&t| t as usize >= vocab) {
            return Err(wrong(format!(
                "sequence {i}, place {place}: expected an id below {vocab}, found {}",
                sequence[place]
            )));
        }
    }
    Ok(sequences)
}

/// Reads a prompt: a JSON list of token ids below `vocab`; a list that holds one such list is taken
/// as that one.
///
/// # Errors
/// [`EvalError::Input`] naming the place.
pub fn read_prompt(path: &Path, vocab: usize) -> Result<Vec<u32>, EvalError> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Prompt {
        Ids(Vec<u32>),
        Lists(Vec<Vec<u32>>),
    }
    let wrong = |message: String| EvalError::Input { path: path.to_owned(), message };
    let text = files::read_text(path, files::TEXT_BYTES).map_err(|e| wrong(e.to_string()))?;
    let ids = match serde_json::from_str(&text) {
        Ok(Prompt::Ids(ids)) => ids,
        Ok(Prompt::Lists(mut lists)) if lists.len() == 1 => lists.remove(0),
        Ok(Prompt::Lists(lists)) => {
            let found = lists.len();
            return Err(wrong(format!("expected one list of token ids, found {found}")));
        }
        Err(_) => {
            // Untagged enums do not say where; a plain parse does.
            let found = serde_json::from_str::<Vec<u32>>(&text).expect_err("neither of both");
            let found = shorten(&found.to_string(), MESSAGE);
            return Err(wrong(format!("expected a JSON list of token ids: {found}")));
        }
    };
    if ids.is_empty() {
        return Err(wrong("expected at least one token, found none".into()));
    }
    match ids.iter().position(|&id| id as usize >= vocab) {
        None => Ok(ids),
        Some(place) => {
            let found = ids[place];
            Err(wrong(format!("place {place}: expected an id below {vocab}, found {found}")))
        }
    }
}

impl Evaluator<Reference> {
    /// Loads a Hugging Face folder onto the CPU, to compute in `mode`.
    ///
    /// # Errors
    /// [`EvalError`].
    pub fn open(folder: &Path, mode: Mode) -> Result<Self, EvalError> {
        Evaluator::open_on(Reference, folder, mode)
    }
}

impl<B: Backend> Evaluator<B> {
    /// Loads a Hugging Face folder onto a backend, to compute in `mode`.
    ///
    /// # Errors
    /// [`EvalError`].
    pub fn open_on(backend: B, folder: &Path, mode: Mode) -> Result<Self, EvalError> {
        Evaluator::load(backend, &HfCheckpoint::open(folder)?, mode)
    }

    /// Loads an opened checkpoint onto a backend, to compute in `mode`.
    ///
    /// # Errors
    /// [`EvalError`].
    pub fn load(backend: B, checkpoint: &HfCheckpoint, mode: Mode) -> Result<Self, EvalError> {
        let recipe = Recipe::new(mode);
        let model = Model::new(&checkpoint.config, recipe, Parallel::default(), 0)?;
        memory::evaluation(&model, false).check()?;
        let params = checkpoint.load(&model, &backend)?;
        Ok(Evaluator { backend, model, params })
    }

    /// Evaluates whole sequences. Tensors: `logits` \[sequences, longest, vocab\], `layer_out.N`
    /// \[sequences, longest, hidden\], `loss` \[1\]; of MoE layers `router.N.indices` and
    /// `router.N.weights` \[rows, top_k\]; of MTP module d `mtp_logits` \[sequences, longest - d,
    /// vocab\] (`mtp_logits.d` from the second on) and `mtp_loss` \[modules\]; gradients under
    /// their checkpoint names. Where lengths differ, rows behind a sequence's end are zeros and
    /// `lengths` says how long each is.
    ///
    /// # Errors
    /// [`EvalError`].
    pub fn run(&self, sequences: &[Vec<u32>], wanted: Wanted) -> Result<Evaluation, EvalError> {
        let (model, backend) = (&self.model, &self.backend);
        if wanted.grads {
            memory::evaluation(model, true).check()?;
        }
        let weights = model.weights(backend, &self.params)?;
        let batch = Batch::from_sequences(sequences);
        let device = model.batch(backend, &batch)?;
        let settings = StepSettings::of(&batch, model.config.mtp_depth, wanted.mtp_lambda);
        let forward = model.forward(backend, &weights, &device, &settings, true)?;
        let report = model.report(backend, &forward)?;
        let mean = |sum: f64, n: usize| if n == 0 { 0.0 } else { sum / n as f64 };
        let mut out = Evaluation {
            loss: mean(report.main, batch.predicted()),
            predicted: batch.predicted(),
            ..Evaluation::default()
        };
        let lengths = &batch.segments;
        let pad = |buffer: &B::Buffer, shorter: usize| {
            let tensor = self.float(backend.download(buffer)?);
            Ok::<_, EngineError>(padded(&tensor, lengths, shorter))
        };
        let logits = model.logits(backend, &weights, &forward.hidden)?;
        out.tensors.push(("logits".into(), pad(&logits, 0)?));
        for (layer, output) in model.layers.iter().zip(&forward.outputs) {
            out.tensors.push((format!("layer_out.{}", layer.index), pad(output, 0)?));
        }
        out.tensors.push(("loss".into(), self.scalars(&[out.loss])));
        for (d, (hidden, ..)) in forward.mtp.iter().enumerate() {
            let logits = model.logits(backend, &weights, hidden)?;
            let name = if d == 0 { "mtp_logits".into() } else { format!("mtp_logits.{}", d + 1) };
            out.tensors.push((name, pad(&logits, d + 1)?));
            out.mtp_loss.push(mean(report.mtp[d], batch.predicted_mtp(d + 1)));
        }
        if !out.mtp_loss.is_empty() {
            out.tensors.push(("mtp_loss".into(), self.scalars(&out.mtp_loss)));
        }
        if lengths.iter().any(|n| n != &lengths[0]) {
            let lengths: Vec<i64> = lengths.iter().map(|&n| n as i64).collect();
            out.tensors.push(("lengths".into(), Tensor::from_vec(&[lengths.len()], lengths)));
        }
        self.routing(&forward, &mut out)?;
        if wanted.grads {
            let zeros = model.zero_gradients(backend)?;
            let grads = model.backward(backend, &weights, &device, &settings, forward, zeros)?;
            let grads = model.finish_gradients(backend, grads)?;
            for (spec, gradient) in model.specs.iter().zip(&grads.buffers) {
                if let Some(gradient) = gradient {
                    out.tensors.extend(hf::split(spec, &backend.download(gradient)?));
                }
            }
        }
        Ok(out)
    }

    fn routing(&self, forward: &Forward<B>, out: &mut Evaluation) -> Result<(), EngineError> {
        let mtp =
            self.model.mtp.iter().map(|m| &m.layer).zip(forward.mtp.iter().map(|m| &m.2.layer));
        for (layer, kept) in self.model.layers.iter().zip(&forward.layers).chain(mtp) {
            if let Some(moe) = &kept.mlp.moe {
                let name = |part: &str| format!("router.{}.{part}", layer.index);
                out.tensors.push((name("indices"), self.backend.download(&moe.indices)?));
                out.tensors.push((name("weights"), self.backend.download(&moe.weights)?));
            }
        }
        Ok(())
    }

    /// F32, or F64 in that mode.
    fn float(&self, tensor: Tensor) -> Tensor {
        crate::model::convert(tensor, self.model.recipe.master())
    }

    fn scalars(&self, values: &[f64]) -> Tensor {
        let tensor = Tensor::from_vec(&[values.len()], values.to_vec());
        self.float(tensor)
    }

    /// Cross-entropy of a token sequence behind its first token, summed over windows, and the
    /// tokens predicted.
    ///
    /// Every token but the first is predicted once. The first window predicts `context` tokens;
    /// each further one at most `stride`, with `context` tokens of input of which those before the
    /// predicted ones are context only. `stride = context` cuts the sequence into windows that know
    /// nothing of each other; `stride = 1` gives every token the longest context.
    ///
    /// # Errors
    /// Those of the backend.
    ///
    /// # Panics
    /// Where context or stride are 0.
    pub fn score(&self, tokens: &[u32], windows: Windows) -> Result<(f64, usize), EngineError> {
        let (model, backend) = (&self.model, &self.backend);
        let Windows { context, stride } = windows;
        assert!(context > 0 && stride > 0, "a window has tokens");
        let weights = model.weights(backend, &self.params)?;
        let (mut sum, mut predicted) = (0.0, 0);
        // The index of the last token that was predicted; the first token counts as known.
        let (mut done, last) = (0, tokens.len().saturating_sub(1));
        while done < last {
            let end = last.min(if done == 0 { context } else { done + stride.min(context) });
            let begin = end.saturating_sub(context);
            let target = |i: usize| if i > done { tokens[i] as i32 } else { -1 };
            let batch = Batch {
                tokens: tokens[begin..end].to_vec(),
                targets: (begin + 1..=end).map(target).collect(),
                segments: vec![end - begin],
            };
            let device = model.batch(backend, &batch)?;
            let settings = StepSettings::default();
            let forward = model.forward(backend, &weights, &device, &settings, false)?;
            sum += model.report(backend, &forward)?.main;
            predicted += batch.predicted();
            done = end;
        }
        Ok((sum, predicted))
    }

    /// How well the model predicts a text. The tokens are the tokenizer's for a prompt (with a
    /// begin of the sentence where it adds one); the first is given, all others are predicted.
    ///
    /// # Errors
    /// [`EvalError::Input`] where the text gives fewer than two tokens, or ids beyond the model's
    /// vocabulary.
    pub fn text(
        &self,
        path: &Path,
        text: &str,
        tokenizer: &Tokenizer,
        windows: Windows,
    ) -> Result<TextScore, EvalError> {
        let wrong = |message: String| EvalError::Input { path: path.to_owned(), message };
        let tokens = tokenizer.encode_prompt(text)?;
        if tokens.len() < 2 {
            let found = tokens.len();
            return Err(wrong(format!("expected at least two tokens of text, found {found}")));
        }
        let vocab = self.model.config.vocab_size;
        if let Some(id) = tokens.iter().find(|&&id| id as usize >= vocab) {
            let message = format!("expected a tokenizer with ids below {vocab}, found id {id}");
            return Err(wrong(message));
        }
        let (sum, predicted) = self.score(&tokens, windows)?;
        let loss = sum / predicted as f64;
        let not_finite =
            if loss.is_finite() { None } else { self.find_not_finite(&tokens, windows)? };
        let bytes = text.len() - tokenizer.token(tokens[0]).len().min(text.len() - 1);
        Ok(TextScore {
            loss,
            perplexity: loss.exp(),
            bits_per_byte: sum / std::f64::consts::LN_2 / bytes as f64,
            tokens: tokens.len(),
            predicted,
            bytes,
            context: windows.context,
            stride: windows.stride,
            not_finite,
        })
    }

    /// The first output that is not finite, in the first window of the tokens that has one.
    fn find_not_finite(
        &self,
        tokens: &[u32],
        windows: Windows,
    ) -> Result<Option<String>, EvalError> {
        for (i, window) in tokens.chunks(windows.context).enumerate() {
            let evaluation = self.run(&[window.to_vec()], Wanted::default())?;
            if let Some(found) = evaluation.not_finite() {
                return Ok(Some(format!("tokens from {}: {found}", i * windows.context)));
            }
        }
        Ok(None)
    }
}

/// How a long text is cut for evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Tokens that go into the model at once.
    pub context: usize,
    /// New tokens that a window predicts, at most `context`.
    pub stride: usize,
}

impl Windows {
    /// Windows of `context` tokens (at most `longest`, what the model has positions for) that each
    /// predict `stride`, by default as many.
    ///
    /// # Errors
    /// A sentence where a window would be empty, or longer than the model can read.
    pub fn new(
        context: usize,
        stride: Option<usize>,
        longest: usize,
    ) -> Result<Windows, EvalError> {
        let stride = stride.unwrap_or(context);
        if !(1..=longest).contains(&context) {
            let message = format!("expected --context of 1 to {longest} tokens, found {context}");
            return Err(EvalError::Windows { message });
        }
        if !(1..=context).contains(&stride) {
            let message = format!("expected --stride of 1 to {context} tokens, found {stride}");
            return Err(EvalError::Windows { message });
        }
        Ok(Windows { context, stride })
    }
}

/// How well a model predicts a text.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct TextScore {
    /// Mean cross-entropy a predicted token, in nats.
    pub loss: f64,
    /// The exponential of `loss`.
    pub perplexity: f64,
    /// Summed cross-entropy in bits over `bytes`.
    pub bits_per_byte: f64,
    /// Tokens of the text, the first included.
    pub tokens: usize,
    /// Predicted tokens: all but the first.
    pub predicted: usize,
    /// Bytes of the text that the predicted tokens spell.
    pub bytes: usize,
    /// Tokens that go into the model at once, as asked for.
    pub context: usize,
    /// New tokens that a window predicts, as asked for.
    pub stride: usize,
    /// Where the loss is not finite: which output was not, first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_finite: Option<String>,
}

/// Rows of sequences (each `shorter` rows less than its length) as \[sequences, longest, columns\],
/// zeros behind a sequence's end.
fn padded(rows: &Tensor, lengths: &[usize], shorter: usize) -> Tensor {
    let columns = rows.shape()[1];
    let width = columns * rows.dtype().size();
    let of = |n: usize| n.saturating_sub(shorter);
    let longest = of(lengths.iter().copied().max().unwrap_or(0));
    let mut bytes = Vec::with_capacity(lengths.len() * longest * width);
    let mut rest = rows.bytes();
    for &length in lengths {
        let (own, after) = rest.split_at(of(length) * width);
        bytes.extend_from_slice(own);
        bytes.resize(bytes.len() + (longest - of(length)) * width, 0);
        rest = after;
    }
    assert!(rest.is_empty(), "every row belongs to a sequence");
    debug_assert!(matches!(rows.dtype(), DType::F32 | DType::F64));
    Tensor::from_bytes(rows.dtype(), &[lengths.len(), longest, columns], &bytes)
}
