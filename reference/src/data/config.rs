//! The `[data]` table of a run: sources, tokenizer, packing.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::DataError;

/// What to train on, and how it becomes sequences. The default is the built-in corpus with a
/// tokenizer trained on it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// Where documents come from; none: the built-in corpus.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<SourceConfig>,
    /// How text becomes tokens.
    pub tokenizer: TokenizerConfig,
    /// Which duplicates are removed before anything is trained on.
    pub duplicates: Duplicates,
    /// Whether each epoch goes through the documents in an order of its own.
    pub shuffle: bool,
    /// Whether documents packed into one sequence are masked from each other. Off in pre-training,
    /// on for fine-tuning (arXiv 2412.19437, sections 4.1 and 5.1).
    pub mask_documents: bool,
    /// Share of documents (prompts with responses excepted) rearranged to fill in the middle.
    pub fim_rate: f64,
    /// Share of joined tokens (punctuation with line breaks) that is split.
    pub split_rate: f64,
    /// What is held out to measure the loss on.
    pub validation: ValidationConfig,
}

impl Default for DataConfig {
    fn default() -> Self {
        DataConfig {
            sources: Vec::new(),
            tokenizer: TokenizerConfig::default(),
            duplicates: Duplicates::default(),
            shuffle: true,
            mask_documents: false,
            fim_rate: 0.1,
            split_rate: 0.1,
            validation: ValidationConfig::default(),
        }
    }
}

/// What is held out to measure the loss on: TOML section `[data.validation]`. Without a share and
/// sources there is no validation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ValidationConfig {
    /// Share of the sources' documents that is held out of training, chosen by their hash: the same
    /// documents whatever the seed.
    pub share: f64,
    /// Sources of their own, in place of a share.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<SourceConfig>,
    /// Steps between two measurements; 0: only at the end.
    pub every: u64,
    /// Sequences measured, the same every time; fewer where one pass over the documents gives
    /// fewer.
    pub sequences: usize,
}

impl Default for ValidationConfig {
    fn default() -> Self {
        ValidationConfig { share: 0.0, sources: Vec::new(), every: 50, sequences: 32 }
    }
}

impl ValidationConfig {
    /// Whether anything is measured.
    pub fn is_on(&self) -> bool {
        self.share > 0.0 || !self.sources.is_empty()
    }

    fn check(&self) -> Result<(), DataError> {
        let wrong = |key: &str, expected: &str, found: String| {
            Err(DataError::setting(&format!("validation.{key}"), expected, found))
        };
        if !(0.0..1.0).contains(&self.share) {
            return wrong("share", "0 to below 1", self.share.to_string());
        }
        if self.share > 0.0 && !self.sources.is_empty() {
            let found = format!("share {} and {} sources", self.share, self.sources.len());
            return wrong("share", "a share or sources, not both", found);
        }
        if self.sequences == 0 {
            return wrong("sequences", "at least 1", "0".into());
        }
        check_sources("validation.sources", &self.sources)
    }
}

/// The tokenizer: a `tokenizer.json`, or one trained on the sources.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenizerConfig {
    /// A `tokenizer.json`; none: train one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Entries of a trained vocabulary, special tokens included.
    pub vocab_size: usize,
    /// Bytes of text that a tokenizer is trained on, by the sources' weights.
    pub train_bytes: u64,
}

impl Default for TokenizerConfig {
    fn default() -> Self {
        TokenizerConfig { file: None, vocab_size: 1024, train_bytes: 16 << 20 }
    }
}

/// Which duplicates are removed; of equals the first stays, in the order of sources, files, places.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Duplicates {
    /// Whether documents with equal text are removed.
    pub exact: bool,
    /// Whether documents that are nearly equal to one before are removed.
    pub near: bool,
    /// Estimated Jaccard similarity of shingles from which two documents are nearly equal.
    pub threshold: f64,
    /// Words of a shingle, the run of words that near duplicates are compared by.
    pub shingle_words: usize,
    /// Bands of the MinHash signature; documents that share a band are compared.
    pub bands: usize,
    /// Hashes of a band; more of them make fewer candidates.
    pub rows: usize,
}

impl Default for Duplicates {
    fn default() -> Self {
        Duplicates {
            exact: true,
            near: false,
            threshold: 0.8,
            shingle_words: 5,
            bands: 16,
            rows: 8,
        }
    }
}

/// One source of documents: TOML entry `[[data.sources]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// Format of its files.
    pub format: Format,
    /// A file, or a folder that is searched in the order of paths; none only for `builtin`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Share of the tokens, in proportion to the other sources' weights.
    #[serde(default = "one")]
    pub weight: f64,
    /// Where a text file is cut into documents.
    #[serde(default)]
    pub split: Split,
    /// Bytes of a text document above which it is cut, at a line break where there is one.
    #[serde(default = "max_document_bytes")]
    pub max_document_bytes: usize,
    /// Extensions of a folder's files; none: every file of a text folder, else the format's name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extensions: Vec<String>,
    /// JSONL and Parquet: the field that holds the text.
    #[serde(default = "text_field")]
    pub text_field: String,
    /// JSONL and Parquet: the fields of prompt and response, in place of the text; only the
    /// response (and the end after it) is predicted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_response: Option<[String; 2]>,
}

impl SourceConfig {
    /// A source of this format and path, everything else by default.
    pub fn new(format: Format, path: Option<PathBuf>) -> SourceConfig {
        SourceConfig {
            format,
            path,
            weight: one(),
            split: Split::default(),
            max_document_bytes: max_document_bytes(),
            extensions: Vec::new(),
            text_field: text_field(),
            prompt_response: None,
        }
    }
}

fn one() -> f64 {
    1.0
}

fn max_document_bytes() -> usize {
    64 << 10
}

fn text_field() -> String {
    "text".into()
}

/// Format of a source's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The corpus embedded in the program.
    Builtin,
    /// Plain UTF-8 text.
    Text,
    /// JSON lines: one object a line.
    Jsonl,
    /// Parquet, its text in one column; needs the cargo feature `parquet`.
    Parquet,
}

/// Where a text file is cut into documents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Nowhere: a file is a document (but see `max_document_bytes`).
    #[default]
    File,
    /// At blank lines.
    Paragraph,
    /// At every line break.
    Line,
}

impl DataConfig {
    /// Refuses values out of range and settings that cannot be followed together.
    ///
    /// # Errors
    /// [`DataError::Setting`] naming the key.
    pub fn check(&self) -> Result<(), DataError> {
        for (key, rate) in [("fim_rate", self.fim_rate), ("split_rate", self.split_rate)] {
            if !(0.0..=1.0).contains(&rate) {
                return Err(DataError::setting(key, "0 to 1", rate));
            }
        }
        let least = 256 + tokenizer_specials();
        if self.tokenizer.file.is_none() && self.tokenizer.vocab_size < least {
            let expected = format!("at least {least}: every byte and the special tokens");
            return Err(DataError::setting(
                "tokenizer.vocab_size",
                expected,
                self.tokenizer.vocab_size,
            ));
        }
        let d = &self.duplicates;
        if !(d.threshold > 0.0 && d.threshold <= 1.0) {
            return Err(DataError::setting("duplicates.threshold", "above 0, to 1", d.threshold));
        }
        let counts = [("shingle_words", d.shingle_words), ("bands", d.bands), ("rows", d.rows)];
        for (key, n) in counts {
            if !(1..=1024).contains(&n) {
                return Err(DataError::setting(&format!("duplicates.{key}"), "1 to 1024", n));
            }
        }
        check_sources("sources", &self.sources)?;
        self.validation.check()
    }
}

fn check_sources(list: &str, sources: &[SourceConfig]) -> Result<(), DataError> {
    if sources.len() > 256 {
        return Err(DataError::setting(list, "at most 256", sources.len()));
    }
    for (i, source) in sources.iter().enumerate() {
        let key = |name: &str| format!("{list}[{i}].{name}");
        if !(source.weight > 0.0 && source.weight.is_finite()) {
            return Err(DataError::setting(&key("weight"), "above 0", source.weight));
        }
        if !(4..=1 << 30).contains(&source.max_document_bytes) {
            let found = source.max_document_bytes;
            return Err(DataError::setting(&key("max_document_bytes"), "4 to 2^30", found));
        }
        match (source.format, &source.path) {
            (Format::Builtin, Some(path)) => {
                let expected = "no path with format = \"builtin\"";
                return Err(DataError::setting(&key("path"), expected, path.display()));
            }
            (Format::Builtin, None) | (_, Some(_)) => {}
            (_, None) => {
                return Err(DataError::setting(&key("path"), "a file or folder", "nothing"));
            }
        }
    }
    Ok(())
}

fn tokenizer_specials() -> usize {
    super::tokenizer::SPECIAL_TOKENS.len()
}
