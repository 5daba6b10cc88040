//! Measures the error of the elementary functions over all 2^32 inputs.
//!
//! `cargo run --release -p fathom-numerics --example sweep_elementary [FUNCTION...]` prints a row a
//! function: the largest error in ulp, the input that has it, the share of correctly rounded
//! results.
//! The figures are kept in docs/elementary.md. Exits with 1 if a bound is passed.

#[path = "../tests/elementary/oracle.rs"]
mod oracle;

use std::process::ExitCode;
use std::time::Instant;

use fathom_numerics::elementary::{Function, Isa};
use oracle::Worst;
use rayon::prelude::*;

const CHUNK: u64 = 1 << 16;

fn sweep_all(f: Function) -> Worst {
    (0..(1u64 << 32) / CHUNK)
        .into_par_iter()
        .map(|chunk| {
            let inputs: Vec<u32> = (chunk * CHUNK..(chunk + 1) * CHUNK).map(|b| b as u32).collect();
            oracle::sweep(f, Isa::best(), &inputs)
        })
        .reduce(|| Worst::NONE, Worst::merge)
}

fn main() -> ExitCode {
    let names: Vec<String> = std::env::args().skip(1).collect();
    let known: Vec<&str> = Function::ALL.iter().map(|f| f.name()).collect();
    if let Some(name) = names.iter().find(|n| !known.contains(&n.as_str())) {
        eprintln!("unknown function '{name}'; known: {}", known.join(", "));
        return ExitCode::from(2);
    }
    println!("| function | bound, ulp | max error, ulp | at input | correctly rounded | seconds |");
    println!("|---|---|---|---|---|---|");
    let mut all_hold = true;
    for &f in
        Function::ALL.iter().filter(|f| names.is_empty() || names.iter().any(|n| n == f.name()))
    {
        let start = Instant::now();
        let worst = sweep_all(f);
        let x = f32::from_bits(worst.at);
        // The figure that is printed is taken from 192-bit arithmetic.
        let finite = worst.max_ulp.is_finite() && x.is_finite();
        let max_ulp =
            if finite { oracle::error_ulp_high_precision(f, x, f.eval(x)) } else { worst.max_ulp };
        all_hold &= max_ulp <= f.bound_ulp();
        println!(
            "| `{}` | {} | {:.4} | 0x{:08X} ({x:e}) | {:.8} % | {:.0} |",
            f.name(),
            f.bound_ulp(),
            max_ulp,
            worst.at,
            100.0 * worst.correctly_rounded as f64 / worst.inputs as f64,
            start.elapsed().as_secs_f64(),
        );
    }
    if all_hold { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
