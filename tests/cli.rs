//! What holds for every subcommand: help, usage errors, readers that leave early.

use std::process::{Command, Output, Stdio};

fn fathom(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fathom")).args(args).output().unwrap()
}

/// The subcommands that the help lists.
fn subcommands() -> Vec<String> {
    let help = String::from_utf8(fathom(&["--help"]).stdout).unwrap();
    let list = help.split("Commands:").nth(1).unwrap().split("Options:").next().unwrap();
    let names = list.lines().filter(|l| l.starts_with("  ") && !l.starts_with("   "));
    let names: Vec<_> = names
        .map(|l| l.split_whitespace().next().unwrap().to_owned())
        .filter(|n| n != "help")
        .collect();
    assert!(names.len() > 5, "{help}");
    names
}

#[test]
fn every_subcommand_has_help_and_refuses_unknown_flags_with_2() {
    for name in subcommands() {
        let help = fathom(&[&name, "--help"]);
        assert!(help.status.success(), "{name}");
        let text = String::from_utf8(help.stdout).unwrap();
        assert!(text.contains("Usage:"), "{name}: {text}");
        let unknown = fathom(&[&name, "--no-such-flag"]);
        assert_eq!(unknown.status.code(), Some(2), "{name}");
        assert!(unknown.stdout.is_empty(), "{name}");
    }
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    // The stream of a large schedule is far longer than a pipe holds.
    let args = "simulate schedule --kind dualpipe --stages 16 --micro-batches 512 --json";
    let mut child = Command::new(env!("CARGO_BIN_EXE_fathom"))
        .args(args.split(' '))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}
