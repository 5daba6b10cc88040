//! From documents to packed sequences: fill-in-the-middle, splitting of joined tokens, packing, and
//! the place in the data.

use fathom_numerics::philox::Philox;
use serde::{Deserialize, Serialize};

use super::config::{DataConfig, Format, SourceConfig};
use super::duplicates::{Filter, Part};
use super::order::{Purpose, noise};
use super::source::{Document, Source};
use super::{DataError, Tokenizer};
use crate::model::Batch;

/// Packed sequences of a data set, one after the other, for ever: behind the last document of a
/// source its next pass begins.
#[derive(Debug)]
pub struct Loader {
    config: DataConfig,
    sources: Vec<Source>,
    tokenizer: Tokenizer,
    fim: Option<[u32; 3]>,
    seq_len: usize,
    seed: u64,
    digest: String,
    dropped: [u64; 2],
    sequences: u64,
    cursors: Vec<SourceState>,
    current: Current,
}

/// Where a loader stands: what [`Loader::restore`] needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoaderState {
    /// Hash of the data ([`Loader::digest`]).
    pub data: String,
    /// Hash of the tokenizer ([`Tokenizer::digest`]).
    pub tokenizer: String,
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// Seed of every random choice.
    pub seed: u64,
    /// Sequences given out.
    pub sequences: u64,
    /// The place in each source, in the order of the configuration.
    pub sources: Vec<SourceState>,
    /// The source, by its index, of the document that is being given out.
    pub source: usize,
    /// Tokens of that document that were given out already.
    pub offset: usize,
}

/// The place in one source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceState {
    /// Passes over the source that are complete.
    pub epoch: u64,
    /// Documents of this pass that are complete.
    pub position: u64,
    /// Tokens of all documents begun so far, over all passes; sources are mixed by it.
    pub tokens: u64,
}

/// A document that is being given out.
#[derive(Debug, Default)]
struct Current {
    source: usize,
    tokens: Vec<u32>,
    /// Tokens at the start that are not predicted.
    prompt: usize,
    offset: usize,
}

impl Loader {
    /// Indexes the sources and makes the tokenizer ready.
    ///
    /// Memory: 16 bytes per document (and 16 for the removal of exact duplicates while indexing),
    /// one document at a time, and while a tokenizer is trained `train_bytes` of text.
    ///
    /// # Errors
    /// [`DataError`] naming setting, or file and line.
    pub fn open(config: &DataConfig, seq_len: usize, seed: u64) -> Result<Loader, DataError> {
        let part = Part::Training { held_out: config.validation.share };
        Loader::open_part(config, seq_len, seed, part, None)
    }

    /// The sequences on which the loss is measured: at most `validation.sequences`, of one pass
    /// over what is held out; none where nothing is. They depend on neither seed nor
    /// rearrangements.
    ///
    /// # Errors
    /// As [`Loader::open`].
    pub fn held_out(&self) -> Result<Vec<Batch>, DataError> {
        let validation = &self.config.validation;
        if !validation.is_on() {
            return Ok(Vec::new());
        }
        let mut config = DataConfig { fim_rate: 0.0, split_rate: 0.0, ..self.config.clone() };
        let part = if validation.sources.is_empty() {
            Part::HeldOut { held_out: validation.share }
        } else {
            config.sources = validation.sources.clone();
            Part::Training { held_out: 0.0 }
        };
        let tokenizer = Some(self.tokenizer.clone());
        let mut loader = Loader::open_part(&config, self.seq_len, 0, part, tokenizer)?;
        let mut sequences = vec![loader.next()?];
        // A sequence that ends in a source's second pass repeats what was measured.
        while sequences.len() < validation.sequences {
            let next = loader.next()?;
            if loader.cursors.iter().any(|c| c.epoch > 0) {
                break;
            }
            sequences.push(next);
        }
        Ok(sequences)
    }

    fn open_part(
        config: &DataConfig,
        seq_len: usize,
        seed: u64,
        part: Part,
        tokenizer: Option<Tokenizer>,
    ) -> Result<Loader, DataError> {
        config.check()?;
        if seq_len == 0 {
            return Err(DataError::setting("seq_len", "at least 1", seq_len));
        }
        let builtin = [SourceConfig::new(Format::Builtin, None)];
        let configs = if config.sources.is_empty() { &builtin } else { &config.sources[..] };
        let mut filter = Filter::new(&config.duplicates, part);
        let mut sources = Vec::new();
        for source in configs {
            sources.push(Source::open(source, &mut filter)?);
            filter.end_source(&format!("{:?} {}", source.format, source.weight));
        }
        let order = (seed, config.shuffle);
        let tokenizer = match (tokenizer, &config.tokenizer.file) {
            (Some(tokenizer), _) => tokenizer,
            (None, Some(path)) => Tokenizer::load(path)?,
            (None, None) => {
                let texts = sample(&mut sources, order, config.tokenizer.train_bytes)?;
                Tokenizer::train(texts.into_iter(), config.tokenizer.vocab_size)?
            }
        };
        let fim = tokenizer.fim().filter(|_| config.fim_rate > 0.0);
        if fim.is_none() && config.fim_rate > 0.0 {
            let expected = "0 with a tokenizer that has no tokens for fill-in-the-middle";
            return Err(DataError::setting("fim_rate", expected, config.fim_rate));
        }
        let cursors = vec![SourceState::default(); sources.len()];
        let mut loader = Loader {
            config: config.clone(),
            sources,
            tokenizer,
            fim,
            seq_len,
            seed,
            digest: filter.digest(),
            dropped: filter.dropped,
            sequences: 0,
            cursors,
            current: Current::default(),
        };
        loader.begin_next()?;
        Ok(loader)
    }

    /// One more than the tokenizer's largest id: what the model's vocabulary must reach.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.vocab_size()
    }

    /// The tokenizer that the sequences are made with.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// blake3 over every kept document of every source, in order, in hexadecimal.
    pub fn digest(&self) -> String {
        self.digest.clone()
    }

    /// Documents of an epoch of each source, after the removal of duplicates and of what is held
    /// out.
    pub fn documents(&self) -> Vec<u64> {
        self.sources.iter().map(Source::len).collect()
    }

    /// Documents that were dropped: exact duplicates, and near duplicates.
    pub fn dropped(&self) -> [u64; 2] {
        self.dropped
    }

    /// The next packed sequence: `seq_len` tokens.
    ///
    /// Without `mask_documents`, documents follow each other, each ended by the end-of-document
    /// token, cut every `seq_len` tokens; the sequence is one segment and every row has a target
    /// (that of the last row is the first token of the sequence after), except those inside
    /// prompts.
    ///
    /// With it, each document is a segment. One that no longer fits begins the next sequence, and
    /// the rest is padded (a segment of end-of-document tokens without targets); one longer than a
    /// sequence is cut, its pieces being segments.
    ///
    /// # Errors
    /// [`DataError`] where a file changed since it was indexed; the tokens of the sequence that was
    /// being packed are lost.
    #[allow(clippy::should_implement_trait)] // an iterator's `next` cannot fail
    pub fn next(&mut self) -> Result<Batch, DataError> {
        if self.current.tokens.is_empty() {
            self.begin_next()?;
        }
        let batch = if self.config.mask_documents { self.masked()? } else { self.joined()? };
        self.sequences += 1;
        Ok(batch)
    }

    /// Where the loader stands: [`Loader::restore`] continues there.
    pub fn state(&self) -> LoaderState {
        LoaderState {
            data: self.digest.clone(),
            tokenizer: self.tokenizer.digest(),
            seq_len: self.seq_len,
            seed: self.seed,
            sequences: self.sequences,
            sources: self.cursors.clone(),
            source: self.current.source,
            offset: self.current.offset,
        }
    }

    /// Goes to a place of a loader of the same data, tokenizer, seed and sequence length: what
    /// follows is what followed there, to the bit.
    ///
    /// # Errors
    /// [`DataError::State`] where the state belongs to something else.
    pub fn restore(&mut self, state: &LoaderState) -> Result<(), DataError> {
        let differs = |what, expected: String, found: String| {
            let error = DataError::State { what, expected: expected.clone(), found: found.clone() };
            if expected == found { Ok(()) } else { Err(error) }
        };
        differs("data", self.digest.clone(), state.data.clone())?;
        differs("tokenizer", self.tokenizer.digest(), state.tokenizer.clone())?;
        differs("sequence length", self.seq_len.to_string(), state.seq_len.to_string())?;
        differs("seed", self.seed.to_string(), state.seed.to_string())?;
        let [own, found] = [self.sources.len(), state.sources.len()].map(|n| n.to_string());
        differs("sources", own, found)?;
        let inside = self.sources.iter().zip(&state.sources).all(|(s, c)| c.position < s.len());
        if !inside || state.source >= self.sources.len() {
            let (expected, found) = ("a place inside the data", "one outside");
            differs("place", expected.into(), found.into())?;
        }
        let current = self.load(state.source, state.sources[state.source])?;
        if state.offset >= current.tokens.len() {
            let expected = format!("below {}", current.tokens.len());
            differs("offset", expected, state.offset.to_string())?;
        }
        self.sequences = state.sequences;
        self.cursors = state.sources.clone();
        self.current = Current { offset: state.offset, ..current };
        Ok(())
    }

    fn joined(&mut self) -> Result<Batch, DataError> {
        let mut tokens = Vec::with_capacity(self.seq_len);
        let mut targets = Vec::with_capacity(self.seq_len);
        while tokens.len() < self.seq_len {
            // The document never is at its end here: whose next token is the target is known.
            let current = &mut self.current;
            tokens.push(current.tokens[current.offset]);
            current.offset += 1;
            if current.offset == current.tokens.len() {
                self.end_document()?;
            }
            targets.push(self.current.target(self.current.offset));
        }
        Ok(Batch { tokens, targets, segments: vec![self.seq_len] })
    }

    fn masked(&mut self) -> Result<Batch, DataError> {
        let mut batch = Batch::default();
        while batch.tokens.len() < self.seq_len {
            let room = self.seq_len - batch.tokens.len();
            let current = &mut self.current;
            let rest = current.tokens.len() - current.offset;
            if current.offset == 0 && rest > room && rest <= self.seq_len {
                let padding = std::iter::repeat_n(self.tokenizer.eos(), room);
                batch.tokens.extend(padding);
                batch.targets.resize(self.seq_len, -1);
                batch.segments.push(room);
                break;
            }
            let piece = current.offset..current.offset + rest.min(room);
            batch.tokens.extend(&current.tokens[piece.clone()]);
            batch.targets.extend(piece.clone().map(|i| current.target(i + 1)));
            batch.segments.push(piece.len());
            current.offset = piece.end;
            if piece.end == current.tokens.len() {
                self.end_document()?;
            }
        }
        Ok(batch)
    }

    /// Leaves a document that was given out, and begins the next.
    fn end_document(&mut self) -> Result<(), DataError> {
        let source = self.current.source;
        let cursor = &mut self.cursors[source];
        cursor.position += 1;
        if cursor.position == self.sources[source].len() {
            cursor.position = 0;
            cursor.epoch += 1;
        }
        self.begin_next()
    }

    /// Begins a document of the source that is furthest behind its share of the tokens.
    fn begin_next(&mut self) -> Result<(), DataError> {
        let behind = |i: usize| self.cursors[i].tokens as f64 / self.sources[i].weight();
        let order = |a: &usize, b: &usize| behind(*a).total_cmp(&behind(*b));
        let source = (0..self.sources.len()).min_by(order).expect("at least one source");
        self.current = Current::default();
        self.current = self.load(source, self.cursors[source])?;
        self.cursors[source].tokens += self.current.tokens.len() as u64;
        Ok(())
    }

    /// Reads a document and makes its tokens.
    fn load(&mut self, source: usize, at: SourceState) -> Result<Current, DataError> {
        let order = (self.seed, self.config.shuffle);
        let (number, document) = self.sources[source].read(order, source, at.epoch, at.position)?;
        let noise = |purpose| noise(self.seed, purpose, source, at.epoch, number);
        let mut encoder = Encoder {
            tokenizer: &self.tokenizer,
            noise: noise(Purpose::Split),
            rate: self.config.split_rate,
            tokens: Vec::new(),
            encoded: 0,
        };
        let Document { text, response } = document;
        let mut prompt = 0;
        match (response, self.fim) {
            (Some(response), _) => {
                encoder.push(&text)?;
                prompt = encoder.tokens.len();
                encoder.push(&response)?;
            }
            (None, Some(marks)) => {
                let noise = noise(Purpose::Fim);
                if f64::from(noise.uniform(0)) < self.config.fim_rate {
                    encoder.fill_in_the_middle(&text, marks, noise)?;
                } else {
                    encoder.push(&text)?;
                }
            }
            (None, None) => encoder.push(&text)?,
        }
        let mut tokens = encoder.tokens;
        tokens.push(self.tokenizer.eos());
        Ok(Current { source, tokens, prompt, offset: 0 })
    }
}

impl Current {
    /// Token `i` as a target: -1 inside a prompt and behind the end.
    fn target(&self, i: usize) -> i32 {
        match self.tokens.get(i) {
            Some(&token) if i >= self.prompt => token as i32,
            _ => -1,
        }
    }
}

/// Makes a document's tokens.
struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    noise: Philox,
    rate: f64,
    tokens: Vec<u32>,
    /// Tokens that were encoded, before splitting: the counter of `noise`.
    encoded: u64,
}

impl Encoder<'_> {
    fn push(&mut self, text: &str) -> Result<(), DataError> {
        let ids = self.tokenizer.encode(text)?;
        self.tokens.extend(self.tokenizer.split_joined(&ids, self.noise, self.encoded, self.rate));
        self.encoded += ids.len() as u64;
        Ok(())
    }

    /// Prefix, suffix, middle: `begin prefix hole suffix end middle`, cut at two uniform places.
    /// Source: arXiv 2412.19437, section 4.1.
    fn fill_in_the_middle(
        &mut self,
        text: &str,
        [begin, hole, end]: [u32; 3],
        noise: Philox,
    ) -> Result<(), DataError> {
        let cut = |index| {
            let places = text.len() as u64 + 1;
            let place = ((u64::from(noise.word(index)) * places) >> 32) as usize;
            (0..=place).rev().find(|&i| text.is_char_boundary(i)).expect("0 is one")
        };
        let (a, b) = (cut(1), cut(2));
        let (a, b) = (a.min(b), a.max(b));
        self.tokens.push(begin);
        self.push(&text[..a])?;
        self.tokens.push(hole);
        self.push(&text[b..])?;
        self.tokens.push(end);
        self.push(&text[a..b])
    }
}

/// Text to train a tokenizer on: each source's first documents of epoch 0, by weight.
fn sample(
    sources: &mut [Source],
    order: (u64, bool),
    bytes: u64,
) -> Result<Vec<String>, DataError> {
    let total: f64 = sources.iter().map(Source::weight).sum();
    let mut texts = Vec::new();
    for (index, source) in sources.iter_mut().enumerate() {
        let mut quota = (bytes as f64 * source.weight() / total) as i64;
        let mut position = 0;
        while quota > 0 && position < source.len() {
            let (_, document) = source.read(order, index, 0, position)?;
            for text in [Some(document.text), document.response].into_iter().flatten() {
                quota -= text.len() as i64;
                texts.push(text);
            }
            position += 1;
        }
    }
    Ok(texts)
}
