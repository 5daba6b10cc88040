//! The command-line program: parsing and printing, one file per subcommand, no logic.
#![deny(unsafe_code)]
// `output` prints: these macros panic where stdout or stderr is full.
#![deny(clippy::print_stdout, clippy::print_stderr)]

#[macro_use]
mod output;

#[allow(unsafe_code)]
mod allocator;
mod backend;
mod case;
mod check;
mod completions;
mod conform;
mod demo;
mod diagnose;
mod doctor;
#[allow(unsafe_code)]
mod embedded;
mod emulate;
mod eval;
mod generate;
mod kernels;
mod model;
mod page;
mod record;
mod replay;
mod runs;
mod search;
mod simulate;
mod sweep;
mod train;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use output::Outcome;

/// DeepSeek-V3 as a reference: bit-exact on a CPU, on NVIDIA GPUs, and timed on clusters that do
/// not exist yet.
#[derive(Parser)]
#[command(
    name = "fathom",
    version,
    about,
    after_help = "Exit codes: 0 holds, 1 a check failed, \
2 bad input or usage.\nStart with: fathom demo"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Case(case::Args),
    Check(check::Args),
    Completions(completions::Args),
    Conform(conform::Args),
    Simulate(Box<simulate::Args>),
    Search(search::Args),
    Demo(demo::Args),
    Diagnose(diagnose::Args),
    Doctor(doctor::Args),
    Emulate(emulate::Args),
    Kernels(kernels::Args),
    Eval(eval::Args),
    Generate(generate::Args),
    Man(completions::ManArgs),
    Model(model::Args),
    Replay(replay::Args),
    Runs(runs::Args),
    Sweep(sweep::Args),
    Train(train::Args),
}

fn main() -> ExitCode {
    // A reader that has seen enough (`| head`) ends the program; it is no error.
    sigpipe::reset();
    if let Some(library) = embedded::libcuda() {
        fathom_libcuda::prepare::embed(library);
    }
    if let Some(code) = emulate::as_ptxas() {
        return ended(code, output::finish());
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(usage) => {
            let (text, code) = (usage.to_string(), usage.exit_code() as u8);
            let readable = output::readable(&text);
            if usage.use_stderr() && readable != text {
                output::print_err(format_args!("{readable}"));
                return ExitCode::from(code);
            }
            let printed = usage.print().and_then(|()| io::stdout().flush());
            return ended(code, printed.as_ref().err());
        }
    };
    if let Err(error) = threads() {
        output::error(&error);
        return ExitCode::from(2);
    }
    let outcome = match cli.command {
        Command::Case(args) => case::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Completions(args) => completions::run(&args),
        Command::Conform(args) => conform::run(&args),
        Command::Simulate(args) => simulate::run(&args),
        Command::Search(args) => search::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Diagnose(args) => diagnose::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Emulate(args) => emulate::run(&args),
        Command::Kernels(args) => kernels::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Man(args) => completions::man(&args),
        Command::Model(args) => model::run(&args),
        Command::Replay(args) => replay::run(&args),
        Command::Runs(args) => runs::run(&args),
        Command::Sweep(args) => sweep::run(&args),
        Command::Train(args) => train::run(&args),
    };
    let code = match outcome {
        Ok(Outcome::Holds) => 0,
        Ok(Outcome::Fails) => 1,
        Ok(Outcome::BadInput) => 2,
        Ok(Outcome::Ended(code)) => code,
        Err(error) => {
            output::error(&error);
            2
        }
    };
    ended(code, output::finish())
}

/// Most threads that `RAYON_NUM_THREADS` may ask for.
const MOST_THREADS: usize = 1024;

/// Refuses a number of threads that the pool would hang on or pass over.
fn threads() -> Result<(), String> {
    let Some(asked) = std::env::var_os("RAYON_NUM_THREADS") else { return Ok(()) };
    let number = asked.to_str().and_then(|text| text.trim().parse::<usize>().ok());
    match number {
        Some(0..=MOST_THREADS) => Ok(()),
        _ if asked.is_empty() => Ok(()),
        _ => {
            let found = asked.display();
            Err(format!("RAYON_NUM_THREADS: expected 0 to {MOST_THREADS} threads, found '{found}'"))
        }
    }
}

/// A result that could not be printed is none, whatever it was.
fn ended(code: u8, printing: Option<&io::Error>) -> ExitCode {
    match printing {
        None => ExitCode::from(code),
        Some(error) => {
            output::error(&format_args!("stdout: {error}"));
            ExitCode::from(2)
        }
    }
}
