//! Parses PTX files: `cargo run -p fathom-ptx --example ptx_check -- a.ptx b.ptx`.

use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let mut failed = false;
    for file in std::env::args().skip(1) {
        let source = match std::fs::read(&file) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(e) => {
                eprintln!("{file}: {e}");
                failed = true;
                continue;
            }
        };
        let start = Instant::now();
        match fathom_ptx::parse(&source) {
            Ok(module) => {
                let bodies = module.functions.iter().filter_map(|f| f.body.as_ref());
                let (mut instructions, mut registers) = (0, 0);
                for body in bodies {
                    instructions += body.instructions().count();
                    registers += body.registers.len();
                }
                let ms = start.elapsed().as_secs_f64() * 1e3;
                println!("{file}: {instructions} instructions, {registers} registers, {ms:.1} ms");
            }
            Err(e) => {
                failed = true;
                eprintln!("{}", e.in_file(&file));
            }
        }
    }
    if failed { ExitCode::from(2) } else { ExitCode::SUCCESS }
}
