//! Links the shared library of the emulated driver into the program as bytes, so that `fathom
//! emulate` works wherever the program is copied or installed (`src/embedded.rs` reads them).
//!
//! The library is built as a dependency of the program, in the folder of dependencies, before the
//! program is linked; that is why it comes in as an input of the linker and not as a file that the
//! compiler reads, which `cargo check` would not find.

use std::path::PathBuf;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(embedded)");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        return;
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    // OUT_DIR is build/fathom-HASH/out beside deps/.
    let profile = out.ancestors().nth(3).expect("cargo's layout of the target folder");
    let library = profile.join("deps/libfathom_libcuda.so");
    let library = library.to_str().expect("a target folder whose path is UTF-8");
    // Linkers name what they read as bytes by its path.
    let mangled: String =
        library.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    let text = format!(
        "unsafe extern \"C\" {{\n    #[link_name = \"_binary_{mangled}_start\"]\n    static START: u8;\n    \
         #[link_name = \"_binary_{mangled}_end\"]\n    static END: u8;\n}}\n"
    );
    std::fs::write(out.join("embedded.rs"), text).expect("OUT_DIR can be written");
    println!("cargo::rustc-cfg=embedded");
    for argument in ["-Wl,--format=binary", library, "-Wl,--format=default"] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}
