//! Byte-level BPE: trained here or read from a `tokenizer.json`, through the crate `tokenizers`.
//!
//! Pretokenization follows section 4.1 of arXiv 2412.19437: digits in groups of at most three;
//! runs of Chinese characters and kana; words with one character before them; runs of punctuation
//! *joined with the line breaks behind them*; line breaks; other white space. Joined tokens bias a
//! prompt that ends in punctuation without a line break, so a share of them is split in training
//! ([`Tokenizer::split_joined`]).

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use fathom_numerics::philox::Philox;
use fathom_trace::input;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, DecoderWrapper, ModelWrapper, SplitDelimiterBehavior, Tokenizer as Inner,
    TokenizerImpl,
};

use super::DataError;
use crate::files;

/// Special tokens of a trained tokenizer; their ids are their places.
pub const SPECIAL_TOKENS: [&str; 4] = ["<|eos|>", "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"];

/// Names of the end of a document, in the order in which a tokenizer is asked for them.
const EOS_NAMES: [&str; 5] = [
    SPECIAL_TOKENS[0],
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
];

/// Names of the marks of fill-in-the-middle: before the prefix, the suffix and the middle.
const FIM_NAMES: [[&str; 3]; 3] = [
    [SPECIAL_TOKENS[1], SPECIAL_TOKENS[2], SPECIAL_TOKENS[3]],
    [
        "<\u{ff5c}fim\u{2581}begin\u{ff5c}>",
        "<\u{ff5c}fim\u{2581}hole\u{ff5c}>",
        "<\u{ff5c}fim\u{2581}end\u{ff5c}>",
    ],
    ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
];

/// Splits of the pretokenizer, one after the other.
const PATTERNS: [&str; 3] = [
    r"\p{N}{1,3}",
    "[\u{4e00}-\u{9fff}\u{3040}-\u{30ff}]+",
    concat!(
        r"[^\r\n\p{L}\p{N}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r"| ?[\p{P}\p{S}]+[\r\n]*",
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
];

/// A byte-level BPE tokenizer: any text has a spelling in its tokens, and tokens give back its
/// bytes.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Inner,
    /// The same, reading special tokens in text as what they are.
    prompts: Inner,
    bytes: Vec<Vec<u8>>,
    special: Vec<bool>,
    eos: u32,
    fim: Option<[u32; 3]>,
    joined: HashMap<u32, Vec<u32>>,
    json: String,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({} entries, {})", self.vocab_size(), self.digest())
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json` as Hugging Face's crate `tokenizers` writes it.
    ///
    /// # Errors
    /// [`DataError`] where the file is none, is not byte-level, or knows no end of a document.
    pub fn load(path: &Path) -> Result<Tokenizer, DataError> {
        let bytes = input::read(path, input::TEXT_BYTES).map_err(DataError::io(path))?;
        Tokenizer::from_json(&bytes, path)
    }

    /// Reads the content of a `tokenizer.json`; `path` is only named in errors.
    ///
    /// # Errors
    /// As [`Tokenizer::load`].
    pub fn from_json(json: &[u8], path: &Path) -> Result<Tokenizer, DataError> {
        let wrong = |message: String| DataError::Tokenizer { path: path.to_owned(), message };
        // A model whose merges name unknown tokens and the like is an error or a panic of the
        // crate; both are the file's fault.
        let read = std::panic::catch_unwind(|| Inner::from_bytes(json));
        let inner = match read {
            Ok(Ok(inner)) => inner,
            Ok(Err(e)) => return Err(wrong(format!("expected a tokenizer.json: {e}"))),
            Err(_) => return Err(wrong("expected a consistent tokenizer.json".into())),
        };
        Tokenizer::new(inner, path)
    }

    /// Trains a vocabulary of at most `vocab_size` entries on texts. The same texts give the same
    /// tokenizer, whatever the number of threads.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`].
    pub fn train<S: AsRef<str> + Send>(
        texts: impl Iterator<Item = S> + Send,
        vocab_size: usize,
    ) -> Result<Tokenizer, DataError> {
        let path = PathBuf::from("(trained)");
        let wrong = |e: tokenizers::Error| DataError::Tokenizer {
            path: PathBuf::from("(trained)"),
            message: e.to_string(),
        };
        let byte_level = ByteLevel::new(false, true, false);
        let mut steps = Vec::new();
        for pattern in PATTERNS {
            let pattern = SplitPattern::Regex(pattern.into());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
            steps.push(PreTokenizerWrapper::Split(split.map_err(wrong)?));
        }
        steps.push(PreTokenizerWrapper::ByteLevel(byte_level));
        let mut inner = TokenizerImpl::<
            BPE,
            tokenizers::NormalizerWrapper,
            PreTokenizerWrapper,
            tokenizers::PostProcessorWrapper,
            DecoderWrapper,
        >::new(BPE::default());
        inner.with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(Sequence::new(steps))));
        inner.with_decoder(Some(DecoderWrapper::ByteLevel(byte_level)));
        let special = SPECIAL_TOKENS.map(|name| AddedToken::from(name, true));
        let mut trainer = BpeTrainerBuilder::new()
            .show_progress(false)
            .vocab_size(vocab_size)
            .min_frequency(2)
            .special_tokens(special.to_vec())
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        inner.train(&mut trainer, texts).map_err(wrong)?;
        let json = inner.to_string(false).map_err(wrong)?;
        Tokenizer::from_json(json.as_bytes(), &path)
    }

    fn new(mut inner: Inner, path: &Path) -> Result<Tokenizer, DataError> {
        let wrong = |message: String| DataError::Tokenizer { path: path.to_owned(), message };
        if !matches!(inner.get_model(), ModelWrapper::BPE(_))
            || !matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)))
        {
            let message = "expected a BPE model with a ByteLevel decoder, found another kind";
            return Err(wrong(message.into()));
        }
        let json = inner.to_string(true).map_err(|e| wrong(e.to_string()))?;
        let find = |name: &&str| inner.token_to_id(name);
        let eos = EOS_NAMES.iter().find_map(find).ok_or_else(|| {
            wrong(format!("expected one of the special tokens {EOS_NAMES:?}, found none of them"))
        })?;
        let fim = FIM_NAMES.iter().find_map(|names| {
            let ids: Vec<u32> = names.iter().filter_map(find).collect();
            <[u32; 3]>::try_from(ids).ok()
        });
        let vocab = inner.get_vocab(true);
        let size = vocab.values().max().map_or(0, |&id| id as usize + 1);
        let mut bytes = vec![Vec::new(); size];
        let mut special = vec![false; size];
        let alphabet = alphabet();
        for (token, id) in vocab {
            bytes[id as usize] = token_bytes(&alphabet, &token);
        }
        for (id, token) in inner.get_added_tokens_decoder() {
            special[id as usize] = token.special;
        }
        let prompts = inner.clone();
        // In documents the spelling of a special token is text like any other.
        inner.set_encode_special_tokens(true);
        let joined = HashMap::new();
        let mut tokenizer = Tokenizer { inner, prompts, bytes, special, eos, fim, joined, json };
        tokenizer.joined = tokenizer.find_joined()?;
        Ok(tokenizer)
    }

    /// Token ids of a document's text; nothing is added, and no special token is read out of it.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] where the tokenizer cannot read it (a vocabulary without all
    /// bytes).
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        encode(&self.inner, text, false)
    }

    /// Token ids of a prompt: special tokens are read as such, and what the tokenizer's
    /// post-processor adds (a begin of the sentence, say) is added.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, DataError> {
        encode(&self.prompts, text, true)
    }

    /// The text of ids, without special tokens; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.token(id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes that a token stands for: none for special tokens and for ids beyond the
    /// vocabulary.
    pub fn token(&self, id: u32) -> &[u8] {
        match self.bytes.get(id as usize) {
            Some(bytes) if !self.special[id as usize] => bytes,
            _ => &[],
        }
    }

    /// One more than the largest token id.
    pub fn vocab_size(&self) -> usize {
        self.bytes.len()
    }

    /// The id of the token that ends a document.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// The ids of the marks before prefix, suffix and middle of fill-in-the-middle; `None` where
    /// the vocabulary lacks one.
    pub fn fim(&self) -> Option<[u32; 3]> {
        self.fim
    }

    /// Writes `tokenizer.json` beside its target and renames it.
    ///
    /// # Errors
    /// [`DataError::Io`].
    pub fn save(&self, path: &Path) -> Result<(), DataError> {
        files::replace(path, |file, _| file.write_all(self.json.as_bytes()))
            .map_err(DataError::io(path))
    }

    /// The content of the tokenizer's `tokenizer.json`.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// blake3 of [`Tokenizer::json`], in hexadecimal.
    pub fn digest(&self) -> String {
        blake3::hash(self.json.as_bytes()).to_hex().to_string()
    }

    /// Splits a share `rate` of the joined tokens into punctuation and line breaks; token i of
    /// `ids` asks for number `first + i` of `noise`.
    pub fn split_joined(&self, ids: &[u32], noise: Philox, first: u64, rate: f64) -> Vec<u32> {
        let mut out = Vec::with_capacity(ids.len());
        for (i, id) in ids.iter().enumerate() {
            match self.joined.get(id) {
                Some(parts) if f64::from(noise.uniform(first + i as u64)) < rate => {
                    out.extend(parts);
                }
                _ => out.push(*id),
            }
        }
        out
    }

    /// Every token of punctuation joined with line breaks, and the tokens of its two parts.
    fn find_joined(&self) -> Result<HashMap<u32, Vec<u32>>, DataError> {
        let mut joined = HashMap::new();
        for id in 0..self.bytes.len() as u32 {
            let Ok(text) = std::str::from_utf8(self.token(id)) else { continue };
            let Some(at) = text.find(['\r', '\n']) else { continue };
            let (mark, lines) = text.split_at(at);
            if !mark.trim().is_empty() && lines.trim().is_empty() {
                let parts = [self.encode(mark)?, self.encode(lines)?].concat();
                joined.insert(id, parts);
            }
        }
        Ok(joined)
    }
}

fn encode(inner: &Inner, text: &str, add_special: bool) -> Result<Vec<u32>, DataError> {
    let wrong = |e: tokenizers::Error| DataError::Tokenizer {
        path: PathBuf::from("tokenizer"),
        message: format!("expected text that the vocabulary can spell: {e}"),
    };
    Ok(inner.encode_fast(text, add_special).map_err(wrong)?.get_ids().to_vec())
}

/// The character that spells each byte in a byte-level vocabulary: itself where it is printable,
/// else the next free character from U+0100 on (the map of GPT-2).
fn alphabet() -> HashMap<char, u8> {
    let printable = |b: u8| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut free = 0x100..;
    let spell = |b: u8| {
        let code = if printable(b) { u32::from(b) } else { free.next().expect("endless") };
        (char::from_u32(code).expect("below the surrogates"), b)
    };
    (0..=u8::MAX).map(spell).collect()
}

/// The bytes that a vocabulary entry spells; an added token outside the alphabet is itself.
fn token_bytes(alphabet: &HashMap<char, u8>, token: &str) -> Vec<u8> {
    let spelled: Option<Vec<u8>> = token.chars().map(|c| alphabet.get(&c).copied()).collect();
    spelled.unwrap_or_else(|| token.as_bytes().to_vec())
}

/// Tokens to text as they come: gives out whole characters only.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    pending: Vec<u8>,
}

impl<'a> TextStream<'a> {
    /// An empty stream for tokens of `tokenizer`.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        TextStream { tokenizer, pending: Vec::new() }
    }

    /// The text that is certain after one more token: possibly none, while a character is
    /// incomplete. The pieces and [`TextStream::finish`] together are [`Tokenizer::decode`] of all
    /// tokens.
    pub fn push(&mut self, id: u32) -> String {
        self.pending.extend(self.tokenizer.token(id));
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(rest) => {
                    text.push_str(rest);
                    self.pending.clear();
                    return text;
                }
                Err(e) => {
                    let valid = e.valid_up_to();
                    let good = std::str::from_utf8(&self.pending[..valid]).expect("just checked");
                    text.push_str(good);
                    let Some(bad) = e.error_len() else {
                        self.pending.drain(..valid);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.pending.drain(..valid + bad);
                }
            }
        }
    }

    /// What is left at the end: U+FFFD for an incomplete character.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }
}
