//! Generation: a prompt, then token by token over the cache; plainly, or speculatively with the
//! MTP modules' drafts.
//!
//! Speculative decoding feeds the newest token and the drafts behind it to the model in one call,
//! and keeps the drafts that hold. The rows' bits do not depend on how many tokens come together
//! ([`Model::decode`]), so with greedy sampling the tokens are exactly those of plain decoding;
//! with a temperature their distribution is (see [`Sampling`]). Sources: arXiv 2211.17192; arXiv
//! 2412.19437, section 5.4.3.

mod draft;
mod sampling;

use std::time::Instant;

use fathom_trace::DType;
use serde::Serialize;

use crate::EngineError;
use crate::backend::Backend;
use crate::layers::Weights;
use crate::model::{LatentCache, Model};
use crate::ops::slice_rows::SliceRows;

use draft::Drafter;
use sampling::Purpose;

pub use sampling::Sampling;

/// Why nothing can be generated.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// An op refused its inputs, or the backend failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The model gives no distribution.
    #[error("expected finite logits, found {found} for token {token}: the model is not usable")]
    NotFinite {
        /// The id of the first token whose logit is not finite.
        token: usize,
        /// The logit that it has.
        found: f32,
    },
    /// A prompt or setting that cannot be followed.
    #[error("{what}: expected {expected}, found {found}")]
    Setting {
        /// The prompt, or the setting's name.
        what: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
}

impl GenerateError {
    fn setting(what: &'static str, expected: impl Into<String>, found: impl ToString) -> Self {
        GenerateError::Setting { what, expected: expected.into(), found: found.to_string() }
    }
}

/// What to generate behind a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// At most this many tokens.
    pub tokens: usize,
    /// How each token is chosen from the model's distribution.
    pub sampling: Sampling,
    /// Whether the MTP modules draft tokens for the model to verify.
    pub speculative: bool,
    /// Tokens after which generation ends; they are given out.
    pub stop: Vec<u32>,
}

/// What was generated, and at what cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Generation {
    /// The tokens behind the prompt.
    pub tokens: Vec<u32>,
    /// Whether the last is one of the stop tokens.
    pub stopped: bool,
    /// Calls of the model after the prompt.
    pub steps: usize,
    /// Drafts of the MTP modules that the model verified.
    pub drafted: usize,
    /// Drafts that held: the model would have drawn them itself.
    pub accepted: usize,
    /// Bytes of cache per token that the model's layers hold.
    pub kv_bytes_per_token: usize,
    /// Bytes of cache per token that the MTP modules which drafted hold.
    pub draft_kv_bytes_per_token: usize,
    /// Seconds for the prompt.
    pub prompt_s: f64,
    /// Seconds for the tokens after the first.
    pub decode_s: f64,
    /// With drafts: seconds per token of plain decoding, measured on the last tokens again.
    pub plain_s_per_token: Option<f64>,
}

impl Generation {
    /// Share of the verified drafts that held; `None` where there were none.
    pub fn acceptance_rate(&self) -> Option<f64> {
        (self.drafted > 0).then(|| self.accepted as f64 / self.drafted as f64)
    }

    /// Tokens per call of the model: the speed-up where a call costs the same whatever its tokens.
    pub fn tokens_per_step(&self) -> Option<f64> {
        let tokens = self.tokens.len().saturating_sub(1);
        (self.steps > 0).then(|| tokens as f64 / self.steps as f64)
    }

    /// Measured time per token of plain decoding over that of this run; `None` without drafts.
    pub fn speedup(&self) -> Option<f64> {
        let tokens = self.tokens.len().saturating_sub(1);
        let own = self.decode_s / tokens as f64;
        self.plain_s_per_token.filter(|_| tokens > 0 && own > 0.0).map(|plain| plain / own)
    }
}

/// Tokens that are decoded again to time plain decoding.
const TIMED: usize = 8;

/// Generates behind `prompt`; `each` sees every token as soon as it is certain.
///
/// # Errors
/// [`GenerateError`] for an empty or too long prompt, an id outside the vocabulary, a temperature
/// below 0, a top-p outside (0, 1\], drafts without an MTP module; [`EngineError`] of the backend.
pub fn generate<B: Backend>(
    model: &Model,
    backend: &B,
    weights: &Weights<B>,
    prompt: &[u32],
    settings: &Settings,
    each: &mut dyn FnMut(u32),
) -> Result<Generation, GenerateError> {
    check(model, prompt, settings)?;
    let decoder = Decoder { model, backend, weights, sampling: settings.sampling };
    let mut out = Generation::default();
    if settings.tokens == 0 {
        return Ok(out);
    }
    let mut give = |tokens: &mut Vec<u32>, token: u32| {
        tokens.push(token);
        each(token);
        settings.stop.contains(&token)
    };
    let mut drafter = settings.speculative.then(|| Drafter::new(model));
    let mut tokens = prompt.to_vec();
    let mut cache = model.cache();
    let start = Instant::now();
    let mut hidden = model.decode(backend, weights, &mut cache, prompt)?;
    let p = decoder.distributions(&hidden, prompt.len() - 1, 1)?.remove(0);
    let first = settings.sampling.draw(&p, Purpose::Sample, tokens.len());
    out.stopped = give(&mut tokens, first);
    out.prompt_s = start.elapsed().as_secs_f64();
    let (start, end) = (Instant::now(), prompt.len() + settings.tokens);
    while !out.stopped && tokens.len() < end {
        let wanted = end - tokens.len() - 1;
        let drafts = match &mut drafter {
            Some(drafter) => drafter.draft(&decoder, &tokens, &hidden, wanted)?,
            None => Vec::new(),
        };
        let known = tokens.len();
        let mut input = vec![tokens[known - 1]];
        input.extend(drafts.iter().map(|(token, _)| *token));
        let rows = model.decode(backend, weights, &mut cache, &input)?;
        let mut accepted = 0;
        for (p, draft) in decoder
            .distributions(&rows, 0, input.len())?
            .iter()
            .zip(drafts.iter().map(Some).chain([None]))
        {
            let at = tokens.len();
            let (token, holds) = match draft {
                Some((token, q)) => settings.sampling.verify(p, q, *token, at),
                None => (settings.sampling.draw(p, Purpose::Sample, at), false),
            };
            out.drafted += usize::from(draft.is_some());
            accepted += usize::from(holds);
            out.stopped = give(&mut tokens, token);
            if out.stopped || !holds {
                break;
            }
        }
        out.accepted += accepted;
        out.steps += 1;
        cache.truncate(backend, known + accepted)?;
        hidden = decoder.rows(rows, 0, accepted + 1)?;
    }
    out.decode_s = start.elapsed().as_secs_f64();
    out.kv_bytes_per_token = cache.bytes(backend) / cache.len();
    out.draft_kv_bytes_per_token = drafter.map_or(0, |d| d.bytes_per_token(backend));
    if settings.speculative && out.steps > 0 {
        out.plain_s_per_token = Some(decoder.time_plain(&mut cache, &tokens)?);
    }
    out.tokens = tokens.split_off(prompt.len());
    Ok(out)
}

fn check(model: &Model, prompt: &[u32], settings: &Settings) -> Result<(), GenerateError> {
    let (config, sampling) = (&model.config, &settings.sampling);
    if prompt.is_empty() {
        return Err(GenerateError::setting("prompt", "at least one token", "none"));
    }
    if let Some((place, id)) =
        prompt.iter().enumerate().find(|(_, id)| **id as usize >= config.vocab_size)
    {
        let expected = format!("ids below {}", config.vocab_size);
        return Err(GenerateError::setting("prompt", expected, format!("{id} at place {place}")));
    }
    let longest = config.max_position_embeddings;
    if prompt.len() + settings.tokens > longest {
        let expected = format!("at most {longest} with the prompt's {}", prompt.len());
        return Err(GenerateError::setting("tokens", expected, settings.tokens));
    }
    if !(sampling.temperature >= 0.0 && sampling.temperature.is_finite()) {
        return Err(GenerateError::setting("temperature", "0 or more", sampling.temperature));
    }
    if !(sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
        return Err(GenerateError::setting("top_p", "above 0, to 1", sampling.top_p));
    }
    if settings.speculative && model.mtp.is_empty() {
        return Err(GenerateError::setting("speculative", "a model with an MTP module", "none"));
    }
    Ok(())
}

/// A model with its weights on a backend.
struct Decoder<'a, B: Backend> {
    model: &'a Model,
    backend: &'a B,
    weights: &'a Weights<B>,
    sampling: Sampling,
}

impl<B: Backend> Decoder<'_, B> {
    /// Rows of hidden states.
    fn rows(
        &self,
        hidden: B::Buffer,
        offset: usize,
        rows: usize,
    ) -> Result<B::Buffer, EngineError> {
        if offset == 0 && rows == self.backend.shape(&hidden)[0] {
            return Ok(hidden);
        }
        self.backend.slice_rows(&SliceRows { offset, rows }, &hidden)
    }

    /// The distributions of the tokens behind rows of hidden states.
    fn distributions(
        &self,
        hidden: &B::Buffer,
        offset: usize,
        rows: usize,
    ) -> Result<Vec<Vec<f64>>, GenerateError> {
        let hidden = self.rows(hidden.clone(), offset, rows)?;
        let logits = self.model.logits(self.backend, self.weights, &hidden)?;
        let logits = crate::model::convert(self.backend.download(&logits)?, DType::F32);
        let width = logits.shape()[1];
        let row = |row: &[f32]| match row.iter().position(|x| !x.is_finite()) {
            None => Ok(self.sampling.distribution(row)),
            Some(token) => Err(GenerateError::NotFinite { token, found: row[token] }),
        };
        logits.as_slice::<f32>().chunks_exact(width).map(row).collect()
    }

    /// Seconds per token of plain decoding: the last tokens again, one by one.
    fn time_plain(&self, cache: &mut LatentCache<B>, tokens: &[u32]) -> Result<f64, GenerateError> {
        let from = cache.len().saturating_sub(TIMED).max(1);
        let until = cache.len();
        cache.truncate(self.backend, from)?;
        let start = Instant::now();
        for at in from..until {
            let token = &tokens[at..=at];
            let hidden = self.model.decode(self.backend, self.weights, cache, token)?;
            let p = self.distributions(&hidden, 0, 1)?;
            std::hint::black_box(self.sampling.draw(&p[0], Purpose::Sample, at));
        }
        Ok(start.elapsed().as_secs_f64() / (until - from).max(1) as f64)
    }
}
