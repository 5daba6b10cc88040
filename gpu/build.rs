//! Lists the CUDA headers of `kernels` for `src/compile.rs`, so that a new one needs no line there.

use std::path::Path;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=kernels");
    let kernels =
        Path::new(&env::var("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("kernels");
    let mut headers = Vec::new();
    let entries = |folder: &Path| fs::read_dir(folder).expect("a folder").flatten();
    for folder in entries(&kernels).filter(|e| e.path().is_dir()) {
        let files = entries(&folder.path()).map(|e| e.path());
        headers.extend(files.filter(|p| p.extension().is_some_and(|e| e == "cuh")));
    }
    headers.sort();
    let source = |path: &Path| {
        let name = path.strip_prefix(&kernels).expect("below it").display().to_string();
        let path = path.display().to_string();
        format!("    Source {{ name: {name:?}, text: include_str!({path:?}) }},\n")
    };
    let sources: String = headers.iter().map(|path| source(path)).collect();
    let text = format!("const HEADERS: &[Source<'static>] = &[\n{sources}];\n");
    let out = Path::new(&env::var("OUT_DIR").expect("cargo sets it")).join("headers.rs");
    fs::write(out, text).expect("the output folder can be written");
}
