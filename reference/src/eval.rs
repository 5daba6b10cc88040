//! Evaluation: logits, layer outputs, losses and gradients of given token sequences, and the
//! perplexity of text.

use std::path::{Path, PathBuf};

use fathom_trace::{DType, Parallel};

use crate::backend::{Backend, Reference};
use crate::checkpoint::hf::{self, HfCheckpoint, HfError};
use crate::model::{Batch, BuildError, Forward, Model, Params, StepSettings};
use crate::precision::{Mode, Recipe};
use crate::{EngineError, Tensor};

/// Why an evaluation failed.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] HfError),
    /// The model.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// An op.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The token or text file.
    #[error("{}: {message}", path.display())]
    Input {
        /// The file.
        path: PathBuf,
        /// What was expected there and what was found.
        message: String,
    },
}

/// A checkpoint loaded for evaluation on a backend.
pub struct Evaluator<B: Backend> {
    /// Who computes.
    pub backend: B,
    /// The model.
    pub model: Model,
    /// Its parameters.
    pub params: Params<B>,
}

/// What an evaluation is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Wanted {
    /// Gradients of the main loss plus `mtp_lambda` times the MTP loss.
    pub grads: bool,
    /// Weight of the MTP loss.
    pub mtp_lambda: f64,
}

/// What an evaluation gives.
#[derive(Clone, Debug, Default)]
pub struct Evaluation {
    /// Mean cross-entropy over the predicted tokens.
    pub loss: f64,
    /// Predicted tokens.
    pub predicted: usize,
    /// Mean cross-entropy of each MTP module.
    pub mtp_loss: Vec<f64>,
    /// Every tensor asked for, by name.
    pub tensors: Vec<(String, Tensor)>,
}

/// Reads token sequences: a JSON list of lists of ids below `vocab`, each of at most `longest`.
///
/// # Errors
/// [`EvalError::Input`] naming sequence and place.
pub fn read_tokens(path: &Path, vocab: usize, longest: usize) -> Result<Vec<Vec<u32>>, EvalError> {
    let wrong = |message: String| EvalError::Input { path: path.to_owned(), message };
    let text = std::fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
    let sequences: Vec<Vec<u32>> = serde_json::from_str(&text)
        .map_err(|e| wrong(format!("expected a JSON list of lists of token ids: {e}")))?;
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

/// Token ids of a text under a `tokenizer.json`.
///
/// # Errors
/// [`EvalError::Input`] naming the file.
pub fn encode(tokenizer: &Path, text: &str) -> Result<Vec<u32>, EvalError> {
    let wrong = |e: tokenizers::Error| EvalError::Input {
        path: tokenizer.to_owned(),
        message: format!("expected a tokenizer: {e}"),
    };
    let tokenizer = tokenizers::Tokenizer::from_file(tokenizer).map_err(wrong)?;
    Ok(tokenizer.encode(text, false).map_err(wrong)?.get_ids().to_vec())
}

impl Evaluator<Reference> {
    /// Loads a Hugging Face folder onto the CPU.
    ///
    /// # Errors
    /// [`EvalError`].
    pub fn open(folder: &Path, mode: Mode) -> Result<Self, EvalError> {
        Evaluator::open_on(Reference, folder, mode)
    }
}

impl<B: Backend> Evaluator<B> {
    /// Loads a Hugging Face folder onto a backend.
    ///
    /// # Errors
    /// [`EvalError`].
    pub fn open_on(backend: B, folder: &Path, mode: Mode) -> Result<Self, EvalError> {
        let checkpoint = HfCheckpoint::open(folder)?;
        let recipe = Recipe::new(mode);
        let model = Model::new(&checkpoint.config, recipe, Parallel::default(), 0)?;
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

    /// Mean cross-entropy of text, in windows of `context` tokens.
    ///
    /// # Errors
    /// [`EvalError::Input`] where the text gives fewer than two tokens.
    pub fn text(
        &self,
        path: &Path,
        tokens: &[u32],
        bytes: usize,
        context: usize,
    ) -> Result<TextScore, EvalError> {
        let (model, backend) = (&self.model, &self.backend);
        let weights = model.weights(backend, &self.params)?;
        let (mut sum, mut predicted) = (0.0, 0);
        // Windows overlap by one token, so that every token but the first is predicted once.
        let mut start = 0;
        while start + 1 < tokens.len() {
            let end = (start + context + 1).min(tokens.len());
            let window = &tokens[start..end];
            let batch = Batch {
                tokens: window[..window.len() - 1].to_vec(),
                targets: window[1..].iter().map(|&t| t as i32).collect(),
                segments: vec![window.len() - 1],
            };
            let device = model.batch(backend, &batch)?;
            let settings = StepSettings::default();
            let forward = model.forward(backend, &weights, &device, &settings, false)?;
            sum += model.report(backend, &forward)?.main;
            predicted += batch.predicted();
            start = end - 1;
        }
        if predicted == 0 {
            let message = format!("expected at least two tokens of text, found {}", tokens.len());
            return Err(EvalError::Input { path: path.to_owned(), message });
        }
        let loss = sum / predicted as f64;
        let bits_per_byte = sum / std::f64::consts::LN_2 / bytes.max(1) as f64;
        Ok(TextScore { loss, perplexity: loss.exp(), bits_per_byte, predicted, bytes })
    }
}

/// How well a model predicts a text.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct TextScore {
    /// Mean cross-entropy a token.
    pub loss: f64,
    /// Its exponential.
    pub perplexity: f64,
    /// Summed cross-entropy in bits over the text's bytes.
    pub bits_per_byte: f64,
    /// Predicted tokens.
    pub predicted: usize,
    /// Bytes of the text.
    pub bytes: usize,
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
