//! Where nvdisasm is, NVIDIA's disassembler: needed only to count the instructions of kernels'
//! loops.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::wheel::{FetchError, Wheel, cache_dir};

/// The PyPI package that carries it, and the version that is fetched.
pub const PACKAGE: &str = "nvidia-cuda-nvdisasm==13.2.*";

const WHEEL: Wheel<PathBuf> = Wheel {
    package: PACKAGE,
    folder: "nvdisasm",
    expected: "nvidia/cu13/bin/nvdisasm",
    find_below: |folder| {
        let path = folder.join("nvidia/cu13/bin/nvdisasm");
        path.is_file().then_some(path)
    },
};

/// Finds nvdisasm: the file `FATHOM_NVDISASM`, in the cache, in the usual CUDA folder.
pub fn find() -> Option<PathBuf> {
    let named = std::env::var_os("FATHOM_NVDISASM").map(PathBuf::from);
    let cached = cache_dir().and_then(|cache| (WHEEL.find_below)(&cache.join(WHEEL.folder)));
    let system = PathBuf::from("/usr/local/cuda/bin/nvdisasm");
    named.into_iter().chain(cached).chain([system]).find(|path| path.is_file())
}

/// Downloads its wheel with pip into the cache, unless it is there; says where it is.
///
/// # Errors
/// [`FetchError`]; the cache is then as it was before.
pub fn fetch() -> Result<PathBuf, FetchError> {
    WHEEL.fetch()
}

/// The text of a cubin's machine code, with labels where branches go.
///
/// # Errors
/// What the program said, or why it could not be started.
pub fn disassemble(nvdisasm: &Path, cubin: &[u8]) -> std::io::Result<String> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), cubin)?;
    let output = Command::new(nvdisasm).arg("-c").arg(file.path()).output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(std::io::Error::other(format!("{}: {said}", nvdisasm.display())));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
