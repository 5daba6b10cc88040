//! The flags of every subcommand that can record what it computes: `--record`, `--op-trace`.

use std::path::PathBuf;

use fathom_conformance::record::{Options, RecordError, Recording, Written};

/// Flags that record a run; flatten them into a subcommand's arguments, then
/// `files::keep_apart(inputs, args.record.outputs())?`,
/// `let recording = args.record.open()?;`, run on `recording.wrap(backend)`, and
/// `args.record.close(&recording)?` at the end.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Recording")]
pub struct RecordArgs {
    /// Write every op call as a case file into this folder (empty or absent), for `fathom replay`
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,
    /// Record these ops only
    #[arg(long, value_name = "OP,...", value_delimiter = ',', requires = "record")]
    record_op: Vec<String>,
    /// Record these optimizer steps only
    #[arg(long, value_name = "N,...", value_delimiter = ',', requires = "record")]
    record_step: Vec<u64>,
    /// Record these layers only, counted from 0; MTP modules follow the last
    #[arg(long, value_name = "N,...", value_delimiter = ',', requires = "record")]
    record_layer: Vec<usize>,
    /// Write the op trace (JSON Lines: shapes, FLOPs and bytes of every op call) to this file
    #[arg(long, value_name = "FILE")]
    op_trace: Option<PathBuf>,
}

impl RecordArgs {
    /// Begins the recording; without flags it records nothing.
    ///
    /// # Errors
    /// Those of [`Recording::open`].
    pub fn open(&self) -> Result<Recording, RecordError> {
        Recording::open(&Options {
            cases: self.record.clone(),
            ops: self.record_op.clone(),
            steps: self.record_step.clone(),
            layers: self.record_layer.clone(),
            op_trace: self.op_trace.clone(),
        })
    }

    /// What a recording writes: its folder and the op trace's file.
    pub fn outputs(&self) -> impl Iterator<Item = &PathBuf> {
        self.record.iter().chain(&self.op_trace)
    }

    /// Ends the recording and says on stderr what it wrote.
    ///
    /// # Errors
    /// Those of [`Recording::finish`].
    pub fn close(&self, recording: &Recording) -> Result<(), RecordError> {
        let Written { cases, bytes, ops } = recording.finish()?;
        if let Some(folder) = &self.record {
            let megabytes = bytes as f64 / 1e6;
            errln!("recorded {cases} cases ({megabytes:.1} MB) in {}", folder.display());
        }
        if let Some(file) = &self.op_trace {
            errln!("traced {ops} ops in {}", file.display());
        }
        Ok(())
    }
}
