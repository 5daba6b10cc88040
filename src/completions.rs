//! `fathom completions` and `fathom man`: what a shell and `man` need to know of the commands.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::output::{self, Outcome};

/// Print completions for a shell
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom completions bash > ~/.local/share/bash-completion/completions/fathom
  fathom completions zsh > ~/.zfunc/_fathom
  fathom completions fish > ~/.config/fish/completions/fathom.fish")]
pub struct Args {
    /// The shell
    shell: Shell,
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut crate::Cli::command(), "fathom", &mut text);
    io::stdout().lock().write_all(&text)?;
    Ok(Outcome::Holds)
}

/// Print the manual page, or write the pages of all commands into a folder
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom man | man -l -
  fathom man --dir ~/.local/share/man/man1       fathom.1, fathom-train.1, ...")]
pub struct ManArgs {
    /// Write one page a command into this folder
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Runs the command.
pub fn man(args: &ManArgs) -> output::Result {
    let command = crate::Cli::command();
    match &args.dir {
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command).render(&mut page)?;
            io::stdout().lock().write_all(&page)?;
        }
        Some(dir) => {
            std::fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
            clap_mangen::generate_to(command, dir)
                .map_err(|e| format!("{}: {e}", dir.display()))?;
        }
    }
    Ok(Outcome::Holds)
}
