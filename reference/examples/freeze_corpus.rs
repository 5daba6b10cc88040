//! Makes the built-in corpus from a working tree: `git ls-files | cargo run -p fathom-reference
//! --example freeze_corpus -- OUT` writes the snapshot of the sources and pages that the list
//! names (tests, benchmarks and presets are left out) and prints its hash.

use std::io::{BufRead, stdin};

use fathom_reference::data::builtin::freeze;

const KINDS: [&str; 4] = [".rs", ".md", ".cu", ".cuh"];
const LEFT_OUT: [&str; 7] =
    ["tests/", "fuzz/", "benches/", "examples/", "gpu/libcuda/", "gpu/ptx/", "docs/ptx.md"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = std::env::args().nth(1).ok_or("expected the file to write")?;
    let mut files = Vec::new();
    for path in stdin().lock().lines() {
        let path = path?;
        let wanted = KINDS.iter().any(|k| path.ends_with(k));
        if wanted && !LEFT_OUT.iter().any(|folder| path.contains(folder)) {
            let text = std::fs::read_to_string(&path)?;
            files.push((path, text));
        }
    }
    let bytes: usize = files.iter().map(|(_, text)| text.len()).sum();
    let blob = freeze(&mut files);
    std::fs::write(&out, &blob)?;
    println!("{} files, {bytes} bytes, {} compressed", files.len(), blob.len());
    println!("{}", blake3::hash(&blob).to_hex());
    Ok(())
}
