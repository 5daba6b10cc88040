//! The built-in corpus: a frozen snapshot of this project's own source and documentation.
//!
//! `corpus.bin` is a raw deflate stream of files: for each, the path's length (u32, little endian),
//! the path, the text's length (u32), the text; ordered by path. It is data, frozen so that runs
//! of different versions compare; `reference/examples/freeze_corpus.rs` remakes it from a working
//! tree, and says so in `docs/data.md`.

use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;

/// The compressed snapshot.
const CORPUS: &[u8] = include_bytes!("corpus.bin");

/// Files of the snapshot: path and text, ordered by path.
pub fn files() -> Vec<(String, String)> {
    let mut all = Vec::new();
    DeflateDecoder::new(CORPUS).read_to_end(&mut all).expect("the embedded corpus is whole");
    let mut rest = &all[..];
    let mut part = || {
        let (length, after) = rest.split_first_chunk::<4>()?;
        let (text, after) = after.split_at(u32::from_le_bytes(*length) as usize);
        rest = after;
        Some(String::from_utf8(text.to_vec()).expect("the embedded corpus is UTF-8"))
    };
    std::iter::from_fn(|| Some((part()?, part()?))).collect()
}

/// Makes a snapshot of files, in the order of their paths.
///
/// # Panics
/// Where a text has 4 GiB or more.
pub fn freeze(files: &mut [(String, String)]) -> Vec<u8> {
    files.sort();
    let mut out = DeflateEncoder::new(Vec::new(), Compression::best());
    for part in files.iter().flat_map(|(path, text)| [path, text]) {
        let length = u32::try_from(part.len()).expect("below 4 GiB").to_le_bytes();
        out.write_all(&length).and_then(|()| out.write_all(part.as_bytes())).expect("memory");
    }
    out.finish().expect("memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The snapshot is frozen: runs are compared across versions by this hash.
    #[test]
    fn the_snapshot_is_the_documented_one() {
        let files = files();
        let bytes: usize = files.iter().map(|(_, text)| text.len()).sum();
        assert!((1 << 20..3 << 20).contains(&bytes), "{bytes} bytes");
        assert!(CORPUS.len() < 512 * 1024);
        assert!(files.is_sorted());
        let page = include_str!("../../../docs/data.md");
        let hash = blake3::hash(CORPUS).to_hex();
        assert!(page.contains(hash.as_str()), "docs/data.md names the hash {hash}");
    }

    #[test]
    fn freezing_what_was_thawed_gives_the_same_files() {
        let mut some = vec![("b".to_owned(), String::new()), ("a".into(), "x\u{e9}\n".into())];
        let blob = freeze(&mut some);
        let mut all = Vec::new();
        DeflateDecoder::new(&blob[..]).read_to_end(&mut all).unwrap();
        assert_eq!(all, b"\x01\0\0\0a\x04\0\0\0x\xc3\xa9\n\x01\0\0\0b\0\0\0\0");
    }
}
