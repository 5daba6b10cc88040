//! Writes `docs/ptx.md`: `cargo run -p fathom-ptx --example ptx_docs`.

use std::path::Path;

fn main() -> std::io::Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/ptx.md");
    let beside = path.with_extension("md.new");
    std::fs::write(&beside, fathom_ptx::docs::markdown())?;
    std::fs::rename(&beside, &path)
}
