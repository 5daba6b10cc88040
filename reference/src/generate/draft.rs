//! Drafts by the MTP modules, each with a cache of its own.
//!
//! With tokens 0 to n known and the main model's hidden states of rows 0 to n - 1, module k's row i
//! joins the hidden state of module k - 1 (module 0: the main model) with token i + k and predicts
//! token i + k + 1: row n - 1 of module k drafts token n + k from the drafts before it. Its rows up
//! to n - k rest on known tokens alone; the ones behind are taken back after drafting, and come
//! again with known tokens.

use crate::backend::Backend;
use crate::model::{LatentCache, Model};
use crate::ops::concat_rows::ConcatRows;

use super::sampling::Purpose;
use super::{Decoder, GenerateError};

/// The MTP modules' side of speculative decoding.
pub(super) struct Drafter<B: Backend> {
    caches: Vec<LatentCache<B>>,
    /// Hidden states that each module has not kept, although they rest on known tokens.
    held: Vec<Option<B::Buffer>>,
}

impl<B: Backend> Drafter<B> {
    pub fn new(model: &Model) -> Drafter<B> {
        let modules = model.mtp.len();
        let caches = (0..modules).map(|k| model.draft_cache(k)).collect();
        Drafter { caches, held: vec![None; modules] }
    }

    /// At most `wanted` drafts behind `tokens`, one a module, each with the distribution that it
    /// was drawn from. `hidden`: the main model's hidden states since the call before, up to the
    /// token before the last.
    pub fn draft(
        &mut self,
        decoder: &Decoder<'_, B>,
        tokens: &[u32],
        hidden: &B::Buffer,
        wanted: usize,
    ) -> Result<Vec<(u32, Vec<f64>)>, GenerateError> {
        let Decoder { model, backend, weights, sampling } = decoder;
        let last = tokens.len() - 1;
        let mut known = last;
        let (mut tokens, mut drafts) = (tokens.to_vec(), Vec::new());
        let mut hidden = hidden.clone();
        for k in 1..=self.caches.len().min(wanted) {
            let (cache, held) = (&mut self.caches[k - 1], &mut self.held[k - 1]);
            if let Some(held) = held.take() {
                hidden = backend.concat_rows(&ConcatRows {}, &held, &hidden)?;
            }
            let first = cache.len();
            let input = (&hidden, &tokens[first + k..last + k]);
            let out = model.draft(*backend, weights, k - 1, cache, input)?;
            let q = decoder.distributions(&out, last - 1 - first, 1)?.remove(0);
            let token = sampling.draw(&q, Purpose::Draft, tokens.len());
            tokens.push(token);
            drafts.push((token, q));
            // Rows of this module, and of the one before, that rest on known tokens.
            let (before, own) = (known, (last + 1).saturating_sub(k));
            cache.truncate(*backend, own)?;
            *held = match before.saturating_sub(own) {
                0 => None,
                rows => Some(decoder.rows(hidden, own - first, rows)?),
            };
            (known, hidden) = (own, out);
        }
        Ok(drafts)
    }

    /// Bytes of cache per token, of all modules.
    pub fn bytes_per_token(&self, backend: &B) -> usize {
        self.caches.iter().filter(|c| !c.is_empty()).map(|c| c.bytes(backend) / c.len()).sum()
    }
}
