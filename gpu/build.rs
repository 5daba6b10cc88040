//! Lists the CUDA sources and headers of `kernels` for `src/compile.rs`, so that a new one needs no
//! line there.

use std::path::Path;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=kernels");
    let kernels =
        Path::new(&env::var("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("kernels");
    let entries = |folder: &Path| fs::read_dir(folder).expect("a folder").flatten();
    let folders = entries(&kernels).filter(|e| e.path().is_dir());
    let mut files: Vec<_> =
        folders.flat_map(|folder| entries(&folder.path()).map(|e| e.path())).collect();
    files.sort();
    let source = |path: &Path| {
        let name = path.strip_prefix(&kernels).expect("below it").display().to_string();
        let path = path.display().to_string();
        format!("    Source {{ name: {name:?}, text: include_str!({path:?}) }},\n")
    };
    let list = |name: &str, extension: &str| {
        let of = files.iter().filter(|p| p.extension().is_some_and(|e| e == extension));
        let sources: String = of.map(|path| source(path)).collect();
        format!("const {name}: &[Source<'static>] = &[\n{sources}];\n")
    };
    let text = list("HEADERS", "cuh") + &list("SOURCES", "cu");
    let out = Path::new(&env::var("OUT_DIR").expect("cargo sets it")).join("headers.rs");
    fs::write(out, text).expect("the output folder can be written");
}
