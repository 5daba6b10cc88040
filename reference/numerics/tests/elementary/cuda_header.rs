//! The CUDA header, compiled for the host by the C compiler, gives the bits of the Rust functions.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fathom_numerics::elementary::{Function, Isa};

/// Builds `host_shim.c` around the header in `folder`.
fn build(folder: &Path) -> PathBuf {
    let crate_root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = folder.join("host_shim");
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let status = Command::new(&compiler)
        .args(["-std=gnu11", "-O2", "-ffp-contract=off", "-Wall", "-Werror", "-I"])
        .arg(crate_root.join("../../gpu/kernels/common"))
        .arg(crate_root.join("tests/elementary/host_shim.c"))
        .arg("-o")
        .arg(&program)
        .arg("-lm")
        .status()
        .unwrap_or_else(|e| panic!("cannot run the C compiler '{compiler}' (set CC): {e}"));
    assert!(status.success(), "'{compiler}' does not compile the header for the host");
    program
}

#[test]
fn header_has_the_bits_of_rust() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = build(folder.path());
    let inputs = super::sample();
    let source = folder.path().join("inputs");
    let bytes: Vec<u8> = inputs.iter().flat_map(|bits| bits.to_le_bytes()).collect();
    fs::write(&source, bytes).expect("inputs written");
    for &f in Function::ALL {
        let output = Command::new(&program)
            .arg(f.name())
            .stdin(fs::File::open(&source).expect("inputs readable"))
            .stderr(Stdio::inherit())
            .output()
            .expect("the program runs");
        assert!(output.status.success(), "host_shim {} failed", f.name());
        assert_eq!(output.stdout.len(), inputs.len() * 4, "results of {}", f.name());
        let mut want: Vec<f32> = inputs.iter().map(|&bits| f32::from_bits(bits)).collect();
        f.apply(Isa::best(), &mut want);
        for ((x, got), want) in inputs.iter().zip(output.stdout.chunks_exact(4)).zip(&want) {
            let got = u32::from_le_bytes(got.try_into().expect("four bytes"));
            let want = want.to_bits();
            assert_eq!(got, want, "{}(0x{x:08X}): C 0x{got:08X}, Rust 0x{want:08X}", f.name());
        }
    }
}
