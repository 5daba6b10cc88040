//! Removal of duplicates while sources are indexed, and of the part that is held out.
//!
//! Exact: blake3 of the text, of which 16 bytes per document are kept. Near: MinHash signatures of
//! `bands x rows` 32-bit hashes over shingles of `shingle_words` lower-cased words (a shorter
//! document is one shingle), with locality-sensitive hashing: documents that share a band are
//! candidates, and a candidate is a duplicate where the share of equal hashes, an unbiased estimate
//! of the Jaccard similarity, reaches `threshold`. Two documents of similarity s become candidates
//! with probability `1 - (1 - s^rows)^bands`: by default 0.95 at s = 0.8, 0.06 at s = 0.5.
//! Memory per kept document: `bands x rows x 4` bytes of signature and an entry per band.
//! Source: Broder, 'On the resemblance and containment of documents', 1997.

use std::collections::{HashMap, HashSet};

use super::config::Duplicates;
use super::source::Document;

/// Which of the documents a loader is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Part {
    /// Those that are not held out.
    Training {
        /// Share of the documents that is held out.
        held_out: f64,
    },
    /// Those that are.
    HeldOut {
        /// Share of the documents that is held out.
        held_out: f64,
    },
}

impl Part {
    /// Whether a document of this hash belongs to the part: held out are those whose first eight
    /// bytes, as a share of their range, lie below `held_out`.
    fn has(self, hash: &blake3::Hash) -> bool {
        let first = u64::from_le_bytes(*hash.as_bytes().first_chunk().expect("32 bytes"));
        let place = first as f64 / 2f64.powi(64);
        match self {
            Part::Training { held_out } => place >= held_out,
            Part::HeldOut { held_out } => place < held_out,
        }
    }
}

/// Drops duplicates and the other part, and hashes what is kept.
pub(super) struct Filter {
    config: Duplicates,
    /// The part that is kept.
    pub part: Part,
    exact: HashSet<[u8; 16]>,
    near: Near,
    content: blake3::Hasher,
    /// Documents that were exact duplicates, and near ones.
    pub dropped: [u64; 2],
}

impl Filter {
    pub fn new(config: &Duplicates, part: Part) -> Filter {
        Filter {
            config: config.clone(),
            part,
            exact: HashSet::new(),
            near: Near { bands: vec![HashMap::new(); config.bands], signatures: Vec::new() },
            content: blake3::Hasher::new(),
            dropped: [0; 2],
        }
    }

    /// Whether a document is of this part and neither empty nor a duplicate.
    pub fn keep(&mut self, document: &Document) -> bool {
        if document.is_empty() {
            return false;
        }
        let hash = document.hash();
        if self.config.exact {
            let short = *hash.as_bytes().first_chunk().expect("32 bytes");
            if !self.exact.insert(short) {
                self.dropped[0] += 1;
                return false;
            }
        }
        if self.config.near && !self.near.insert(&self.config, document) {
            self.dropped[1] += 1;
            return false;
        }
        if !self.part.has(&hash) {
            return false;
        }
        self.content.update(hash.as_bytes());
        true
    }

    /// Marks the end of a source in the hash.
    pub fn end_source(&mut self, description: &str) {
        self.content.update(blake3::hash(description.as_bytes()).as_bytes());
    }

    /// Hash of every kept document, in order.
    pub fn digest(&self) -> String {
        self.content.finalize().to_hex().to_string()
    }
}

/// Signatures of what was kept.
struct Near {
    bands: Vec<HashMap<u64, Vec<u32>>>,
    signatures: Vec<Box<[u32]>>,
}

impl Near {
    /// Keeps a document unless it is close to a kept one.
    fn insert(&mut self, config: &Duplicates, document: &Document) -> bool {
        let signature = signature(config, document);
        let keys: Vec<u64> = signature.chunks(config.rows).map(fold).collect();
        let needed = config.threshold * signature.len() as f64;
        let close = keys.iter().zip(&self.bands).any(|(key, band)| {
            band.get(key).into_iter().flatten().any(|&other| {
                let other = &self.signatures[other as usize];
                let equal = signature.iter().zip(other).filter(|(a, b)| a == b).count();
                equal as f64 >= needed
            })
        });
        if close {
            return false;
        }
        let number = self.signatures.len() as u32;
        for (key, band) in keys.into_iter().zip(&mut self.bands) {
            band.entry(key).or_default().push(number);
        }
        self.signatures.push(signature.into());
        true
    }
}

/// SplitMix64's finaliser: a bijection that mixes all bits.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

fn fold(hashes: &[u32]) -> u64 {
    hashes.iter().fold(hashes.len() as u64, |key, &h| mix(key ^ u64::from(h)))
}

/// The least value of each hash function over the document's shingles.
fn signature(config: &Duplicates, document: &Document) -> Vec<u32> {
    let parts = [Some(&document.text), document.response.as_ref()];
    let words: Vec<u64> = parts
        .into_iter()
        .flatten()
        .flat_map(|text| text.split_whitespace())
        .map(|word| {
            let hash = blake3::hash(word.to_lowercase().as_bytes());
            u64::from_le_bytes(*hash.as_bytes().first_chunk().expect("32 bytes"))
        })
        .collect();
    let width = config.shingle_words.min(words.len()).max(1);
    let mut least = vec![u32::MAX; config.bands * config.rows];
    for shingle in words.windows(width) {
        let hash = shingle.iter().fold(0, |h, &word| mix(h ^ word));
        for (i, least) in least.iter_mut().enumerate() {
            let value = mix(hash ^ mix(i as u64 + 1)) as u32;
            *least = (*least).min(value);
        }
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(text: &str) -> Document {
        Document { text: text.into(), response: None }
    }

    fn words(range: std::ops::Range<usize>) -> String {
        range.map(|i| format!("word{i} ")).collect()
    }

    /// Shingles of two runs of words: the estimate against the exact Jaccard similarity.
    #[test]
    fn signatures_estimate_the_jaccard_similarity() {
        let config = Duplicates { bands: 64, rows: 16, ..Duplicates::default() };
        for shift in [0, 10, 50, 150, 400] {
            let [a, b] = [0, shift].map(|s| document(&words(s..s + 504)));
            let exact = (500.0 - shift as f64).max(0.0) / (500.0 + shift.min(500) as f64);
            let [a, b] = [a, b].map(|d| signature(&config, &d));
            let equal = a.iter().zip(&b).filter(|(a, b)| a == b).count() as f64 / 1024.0;
            // Five standard errors of 1024 draws.
            let bound = 5.0 * (exact * (1.0 - exact) / 1024.0).sqrt();
            assert!((equal - exact).abs() <= bound, "shift {shift}: {equal}, exact {exact}");
        }
    }

    #[test]
    fn exact_and_near_duplicates_go_and_others_stay() {
        let config = Duplicates { near: true, ..Duplicates::default() };
        let mut filter = Filter::new(&config, Part::Training { held_out: 0.0 });
        let long = words(0..400);
        assert!(filter.keep(&document(&long)));
        assert!(!filter.keep(&document(&long)));
        assert!(!filter.keep(&document(&format!("{}\n", long.to_uppercase()))));
        // Five shingles of 396 differ on each side.
        assert!(!filter.keep(&document(&long.replace("word200 ", "other "))));
        assert!(filter.keep(&document(&words(300..700))));
        assert!(filter.keep(&document("two words")));
        assert!(!filter.keep(&document("Two  Words")));
        assert!(!filter.keep(&document("")));
        assert_eq!(filter.dropped, [1, 3]);
        let mut exact = Filter::new(&Duplicates::default(), Part::Training { held_out: 0.0 });
        assert!(exact.keep(&document("Two words")) && exact.keep(&document("Two  Words")));
    }

    /// A prompt with a response is not the text of both in a row.
    #[test]
    fn the_hash_knows_where_a_prompt_ends() {
        let pair = |text: &str, response: &str| Document {
            text: text.into(),
            response: Some(response.into()),
        };
        assert_ne!(pair("ab", "c").hash(), pair("a", "bc").hash());
        assert_ne!(pair("ab", "").hash(), document("ab").hash());
    }
}
