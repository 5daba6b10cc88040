//! Gives the shared library the name under which loaders ask for the driver, and writes the code
//! that follows from `src/entry_points.txt`, the version history of every name of cuda.h: a
//! function for each symbol that `src/api` does not define, a jump for each symbol's variant with
//! the per-thread default stream, and the table by which `cuGetProcAddress` finds them.
//!
//! A line of the history is a symbol, the CUDA version (1000 * major + 10 * minor) that brought
//! it, the suffix of its per-thread variant where it has one, behind `=` a later symbol with the
//! same signature that does the same, and behind `+` another name that it has from a version on.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
    // Clients keep pointers into it after they have closed it.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/entry_points.txt");
    println!("cargo:rerun-if-changed=src/api");
    let history = std::fs::read_to_string("src/entry_points.txt").expect("part of the crate");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    let code = generate(&history, &defined(Path::new("src/api")));
    std::fs::write(out.join("entry_points.rs"), code).expect("OUT_DIR can be written");
}

/// The entry points that the files of `src/api` define, each with its path.
fn defined(folder: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for file in std::fs::read_dir(folder).expect("part of the crate").flatten() {
        let path = file.path();
        let module = match path.file_stem().expect("a file").to_string_lossy() {
            name if name == "mod" => "crate::api".to_owned(),
            name => format!("crate::api::{name}"),
        };
        let text = std::fs::read_to_string(&path).expect("part of the crate");
        for line in text.lines() {
            // Every name of cuda.h goes on with a capital.
            let rest = line.strip_prefix("    fn cu");
            if let Some(rest) = rest.filter(|rest| rest.starts_with(char::is_uppercase)) {
                let name = rest.split('(').next().expect("split gives one");
                found.insert(format!("cu{name}"), format!("{module}::cu{name}"));
            }
        }
    }
    found
}

/// Rust's text of what the history asks for.
fn generate(history: &str, defined: &BTreeMap<String, String>) -> String {
    let known = |name: &str| history.lines().any(|l| l.split(' ').next() == Some(name));
    if let Some(name) = defined.keys().find(|name| !known(name)) {
        panic!("src/api defines {name}, which src/entry_points.txt does not have");
    }
    let instruction = match std::env::var("CARGO_CFG_TARGET_ARCH").as_deref() {
        Ok("aarch64") => "b {}",
        _ => "jmp {}",
    };
    let jump = |from: &str, to: &str| {
        format!(
            "#[unsafe(naked)]\n#[unsafe(no_mangle)]\nunsafe extern \"C\" fn {from}() {{\n    \
             core::arch::naked_asm!({instruction:?}, sym {to})\n}}\n"
        )
    };
    let (mut code, mut table) = (String::new(), String::new());
    for line in history.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let (symbol, version) = (words[0], words[1]);
        let same = words.iter().find_map(|w| w.strip_prefix('=')).and_then(|s| defined.get(s));
        let mut place = symbol.to_owned();
        match (defined.get(symbol), same) {
            (Some(defined), _) => place.clone_from(defined),
            (None, Some(same)) => code += &jump(symbol, same),
            (None, None) => {
                code += &format!(
                    "#[unsafe(no_mangle)]\nextern \"C\" fn {symbol}() -> CuResult {{\n    \
                     missing({symbol:?})\n}}\n"
                );
            }
        }
        let mut per_thread = place.clone();
        if let Some(suffix) = words.iter().find(|w| w.starts_with("pt")) {
            per_thread = format!("{symbol}_{suffix}");
            code += &jump(&per_thread, &place);
        }
        let mut row = |name: &str, version: &str| {
            table += &format!(
                "    Symbol({name:?}, {version}, {place} as *const c_void, {per_thread} as *const \
                 c_void),\n"
            );
        };
        row(symbol, version);
        if let Some(other) = words.iter().find_map(|w| w.strip_prefix('+')) {
            let (name, version) = other.split_once(':').expect("a name and a version");
            row(name, version);
        }
    }
    format!("{code}pub(super) static SYMBOLS: &[Symbol] = &[\n{table}];\n")
}
