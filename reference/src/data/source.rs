//! A source: an index of its documents, and reading one of them.
//!
//! The index holds a place per document (16 bytes), never text; documents are read when they are
//! due. Documents lie in blocks (a Parquet row group; everything else is one block): an epoch goes
//! through the blocks in a permuted order, and through each block's documents in another.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::config::{Format, SourceConfig};
use super::duplicates::{Filter, Part};
use super::order::{Purpose, noise, permute};
use super::{DataError, builtin, text};
use fathom_trace::input;

/// A document as a source has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Document {
    /// The text, or the prompt.
    pub text: String,
    /// The response to it.
    pub response: Option<String>,
}

impl Document {
    /// The document of a record, whose fields `field` gives.
    pub fn of<E>(
        config: &SourceConfig,
        field: impl Fn(&str) -> Result<String, E>,
    ) -> Result<Document, E> {
        Ok(match &config.prompt_response {
            None => Document { text: field(&config.text_field)?, response: None },
            Some([prompt, response]) => {
                Document { text: field(prompt)?, response: Some(field(response)?) }
            }
        })
    }

    fn plain(text: impl Into<String>) -> Document {
        Document { text: text.into(), response: None }
    }

    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.response.as_ref().is_none_or(String::is_empty)
    }

    /// blake3 of prompt and response, each with its length.
    pub fn hash(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for part in [Some(&self.text), self.response.as_ref()].into_iter().flatten() {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        hasher.finalize()
    }
}

/// Where a document lies.
#[derive(Clone, Copy, Debug)]
struct DocumentPlace {
    /// Byte in the file; row in the row group.
    offset: u64,
    file: u32,
    length: u32,
}

/// Documents that are read together.
#[derive(Debug, Default)]
struct Block {
    documents: Vec<DocumentPlace>,
}

/// An indexed source.
#[derive(Debug)]
pub(super) struct Source {
    config: SourceConfig,
    files: Vec<PathBuf>,
    blocks: Vec<Block>,
    documents: u64,
    /// Text of the built-in corpus.
    memory: Vec<String>,
    /// The file read last.
    open: Option<(u32, File)>,
    /// Documents of the row group read last: its block, and each row's.
    #[cfg(feature = "parquet")]
    rows: Option<(u32, u64, Vec<Document>)>,
    /// Of the epoch in use: its number, and each block's number and first place in its order.
    epoch: Option<(u64, Vec<(u64, u64)>)>,
}

impl Source {
    /// Indexes a source; every document passes `filter`, which drops duplicates.
    pub fn open(config: &SourceConfig, filter: &mut Filter) -> Result<Source, DataError> {
        let mut source = Source {
            config: config.clone(),
            files: Vec::new(),
            blocks: vec![Block::default()],
            documents: 0,
            memory: Vec::new(),
            open: None,
            #[cfg(feature = "parquet")]
            rows: None,
            epoch: None,
        };
        match (config.format, &config.path) {
            (Format::Builtin, _) => source.index_builtin(filter)?,
            (_, None) => unreachable!("checked with the settings"),
            (format, Some(path)) => {
                source.files = files(path, config)?;
                match format {
                    Format::Text => source.index_text(filter)?,
                    Format::Jsonl => source.index_json(filter)?,
                    #[cfg(feature = "parquet")]
                    Format::Parquet => source.index_parquet(filter)?,
                    _ => {
                        let expected = "a program built with the cargo feature parquet";
                        return Err(DataError::setting("format", expected, "one without"));
                    }
                }
            }
        }
        source.documents = source.blocks.iter().map(|b| b.documents.len() as u64).sum();
        if source.documents == 0 {
            let expected = "at least one document that is not empty";
            let found = match filter.part {
                Part::Training { held_out: 0.0 } => "none (or duplicates of earlier ones only)",
                Part::Training { .. } => "none that is not held out or a duplicate of earlier ones",
                Part::HeldOut { .. } => "none that is held out; raise data.validation.share",
            };
            return Err(DataError::Content {
                path: config.path.clone().unwrap_or_else(|| "(built-in corpus)".into()),
                place: "everywhere".into(),
                expected: expected.into(),
                found: found.into(),
            });
        }
        Ok(source)
    }

    fn index_builtin(&mut self, filter: &mut Filter) -> Result<(), DataError> {
        for (path, text) in builtin::files() {
            let document = Document::plain(text);
            if filter.keep(&document) {
                let place = DocumentPlace { offset: self.memory.len() as u64, file: 0, length: 0 };
                self.blocks[0].documents.push(place);
                self.memory.push(document.text);
                self.files.push(path.into());
            }
        }
        Ok(())
    }

    fn index_text(&mut self, filter: &mut Filter) -> Result<(), DataError> {
        let documents = &mut self.blocks[0].documents;
        for (file, path) in self.files.iter().enumerate() {
            text::documents(path, &self.config, &mut |offset, text| {
                if filter.keep(&Document::plain(text)) {
                    documents.push(DocumentPlace {
                        offset,
                        file: file as u32,
                        length: text.len() as u32,
                    });
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    fn index_json(&mut self, filter: &mut Filter) -> Result<(), DataError> {
        let documents = &mut self.blocks[0].documents;
        for (file, path) in self.files.iter().enumerate() {
            text::json_lines(path, &self.config, &mut |offset, length, document| {
                if filter.keep(&document) {
                    documents.push(DocumentPlace {
                        offset,
                        file: file as u32,
                        length: length as u32,
                    });
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// A row group is a block; `DocumentPlace::offset` is its row, `DocumentPlace::length` the
    /// row group.
    #[cfg(feature = "parquet")]
    fn index_parquet(&mut self, filter: &mut Filter) -> Result<(), DataError> {
        self.blocks.clear();
        for (file, path) in self.files.iter().enumerate() {
            for group in 0..super::parquet::row_groups(path)? {
                let mut documents = Vec::new();
                let rows = super::parquet::read_group(path, &self.config, group)?;
                for (row, document) in rows.into_iter().enumerate() {
                    if filter.keep(&document) {
                        let (file, length) = (file as u32, group as u32);
                        documents.push(DocumentPlace { offset: row as u64, file, length });
                    }
                }
                if !documents.is_empty() {
                    self.blocks.push(Block { documents });
                }
            }
        }
        Ok(())
    }

    /// A row of a row group, which is kept until one of another is asked for.
    #[cfg(feature = "parquet")]
    fn parquet_document(&mut self, place: DocumentPlace) -> Result<Document, DataError> {
        let path = &self.files[place.file as usize];
        let group = u64::from(place.length);
        if !matches!(&self.rows, Some((file, of, _)) if (*file, *of) == (place.file, group)) {
            let rows = super::parquet::read_group(path, &self.config, group as usize)?;
            self.rows = Some((place.file, group, rows));
        }
        let (_, _, rows) = self.rows.as_ref().expect("just read");
        rows.get(place.offset as usize).cloned().ok_or_else(|| DataError::Content {
            path: path.clone(),
            place: format!("row group {group}"),
            expected: format!("row {}, as when the file was indexed", place.offset),
            found: format!("{} rows", rows.len()),
        })
    }

    /// Documents of an epoch.
    pub fn len(&self) -> u64 {
        self.documents
    }

    /// The weight of the source.
    pub fn weight(&self) -> f64 {
        self.config.weight
    }

    /// Document `position` of an epoch of source number `index`: its number in the source, and the
    /// document.
    pub fn read(
        &mut self,
        (seed, shuffle): (u64, bool),
        index: usize,
        epoch: u64,
        position: u64,
    ) -> Result<(u64, Document), DataError> {
        let (block, place) = self.locate((seed, shuffle), index, epoch, position);
        let before: usize = self.blocks[..block].iter().map(|b| b.documents.len()).sum();
        let number = (before + place) as u64;
        let place = self.blocks[block].documents[place];
        Ok((number, self.document(place)?))
    }

    /// Block and place in it of a position of an epoch.
    fn locate(
        &mut self,
        (seed, shuffle): (u64, bool),
        index: usize,
        epoch: u64,
        position: u64,
    ) -> (usize, usize) {
        let count = self.blocks.len() as u64;
        if self.epoch.as_ref().is_none_or(|(of, _)| *of != epoch) {
            let noise = noise(seed, Purpose::Blocks, index, epoch, 0);
            let mut first = 0;
            let order = (0..count).map(|i| {
                let block = if shuffle { permute(noise, i, count) } else { i };
                let start = first;
                first += self.blocks[block as usize].documents.len() as u64;
                (block, start)
            });
            self.epoch = Some((epoch, order.collect()));
        }
        let (_, order) = self.epoch.as_ref().expect("just made");
        let at = order.partition_point(|&(_, first)| first <= position) - 1;
        let (block, first) = order[at];
        let length = self.blocks[block as usize].documents.len() as u64;
        let noise = noise(seed, Purpose::Documents, index, epoch, block);
        let place = position - first;
        let place = if shuffle { permute(noise, place, length) } else { place };
        (block as usize, place as usize)
    }

    fn document(&mut self, place: DocumentPlace) -> Result<Document, DataError> {
        if self.config.format == Format::Builtin {
            return Ok(Document::plain(&*self.memory[place.offset as usize]));
        }
        #[cfg(feature = "parquet")]
        if self.config.format == Format::Parquet {
            return self.parquet_document(place);
        }
        let path = &self.files[place.file as usize];
        if self.open.as_ref().is_none_or(|(file, _)| *file != place.file) {
            let file = input::open_regular(path).map_err(DataError::io(path))?;
            self.open = Some((place.file, file));
        }
        let (_, file) = self.open.as_ref().expect("just opened");
        let mut bytes = vec![0; place.length as usize];
        file.read_exact_at(&mut bytes, place.offset).map_err(DataError::io(path))?;
        let changed = |expected: &str, found: String| DataError::Content {
            path: path.clone(),
            place: format!("offset {}", place.offset),
            expected: format!("{expected}, as when the file was indexed"),
            found,
        };
        if self.config.format == Format::Jsonl {
            return text::json_document(&bytes, &self.config)
                .map_err(|(expected, found)| changed(&expected, found));
        }
        let text = String::from_utf8(bytes).map_err(|e| changed("UTF-8 text", e.to_string()))?;
        Ok(Document::plain(text))
    }
}

/// The files of a source, ordered by path; hidden ones are passed over.
fn files(path: &Path, config: &SourceConfig) -> Result<Vec<PathBuf>, DataError> {
    let metadata = std::fs::metadata(path).map_err(DataError::io(path))?;
    if !metadata.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let own = match config.format {
        Format::Jsonl => vec!["jsonl".to_owned()],
        Format::Parquet => vec!["parquet".to_owned()],
        Format::Builtin | Format::Text => Vec::new(),
    };
    let extensions = if config.extensions.is_empty() { &own } else { &config.extensions };
    let wanted = |path: &Path| {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        extensions.is_empty() || extensions.iter().any(|e| e == extension)
    };
    let (mut found, mut folders) = (Vec::new(), vec![path.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).map_err(DataError::io(&folder))? {
            let entry = entry.map_err(DataError::io(&folder))?;
            let path = entry.path();
            if entry.file_name().to_string_lossy().starts_with('.') {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if wanted(&path) {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}
