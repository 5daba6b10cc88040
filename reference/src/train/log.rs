//! The logs of a run: `train.jsonl`, one JSON object a line, and TensorBoard's event files.
//!
//! Lines have a `kind`: `start`, `step`, `validation`, `sample`, `checkpoint`, `diverged`, `end`. A
//! resumed run first drops the lines of steps that come after its checkpoint, so that the file
//! always tells one run without a gap.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::config::LogConfig;
use super::tensorboard::EventWriter;
use super::trainer::{StepLog, ValidationLog};
use crate::files;

/// Writes the logs of a run.
#[derive(Debug)]
pub struct Logs {
    path: PathBuf,
    lines: Option<File>,
    events: Option<EventWriter>,
}

impl Logs {
    /// Opens the logs of the run in `folder`, which goes on after `step`.
    ///
    /// # Errors
    /// The file that cannot be written, and why.
    pub fn open(
        folder: &Path,
        config: &LogConfig,
        step: u64,
    ) -> Result<Logs, (PathBuf, io::Error)> {
        let path = folder.join("train.jsonl");
        let lines = if config.jsonl {
            Some(reopen(&path, step).map_err(|e| (path.clone(), e))?)
        } else {
            None
        };
        let tensorboard = folder.join("tensorboard");
        let events = match config.tensorboard {
            true => Some(
                EventWriter::create(&tensorboard, step).map_err(|e| (tensorboard.clone(), e))?,
            ),
            false => None,
        };
        Ok(Logs { path, lines, events })
    }

    /// Writes a line of `kind` with further `fields` of an object.
    ///
    /// # Errors
    /// As [`Logs::open`].
    pub fn line(&mut self, kind: &str, fields: Value) -> Result<(), (PathBuf, io::Error)> {
        let Some(file) = &mut self.lines else { return Ok(()) };
        let mut line = json!({ "kind": kind });
        if let (Value::Object(line), Value::Object(fields)) = (&mut line, fields) {
            line.extend(fields);
        }
        let text = format!("{line}\n");
        file.write_all(text.as_bytes()).map_err(|e| (self.path.clone(), e))
    }

    /// Writes a step as a line and as scalars: losses, norm, rates, speed, load of every expert.
    ///
    /// # Errors
    /// As [`Logs::open`].
    pub fn step(&mut self, log: &StepLog) -> Result<(), (PathBuf, io::Error)> {
        self.line("step", serde_json::to_value(log).expect("plain data"))?;
        let Some(events) = &mut self.events else { return Ok(()) };
        let mut scalars = vec![
            ("loss/main".to_owned(), log.loss),
            ("loss/balance".to_owned(), log.balance_loss),
            ("optim/gradient_norm".to_owned(), log.gradient_norm),
            ("optim/learning_rate".to_owned(), log.learning_rate),
            ("optim/batch".to_owned(), log.batch as f64),
            ("speed/tokens_per_second".to_owned(), log.tokens_per_second),
        ];
        let mtp = log.mtp_loss.iter().enumerate();
        scalars.extend(mtp.map(|(d, &loss)| (format!("loss/mtp_{}", d + 1), loss)));
        for ((layer, loads), &violation) in log.expert_load.iter().zip(&log.max_violation) {
            scalars.push((format!("max_violation/layer_{layer}"), violation));
            let total = loads.iter().sum::<u64>().max(1) as f64;
            let share = |(e, &n): (usize, &u64)| {
                (format!("expert_load/layer_{layer}/expert_{e}"), n as f64 / total)
            };
            scalars.extend(loads.iter().enumerate().map(share));
        }
        let path = events.path().to_owned();
        events.scalars(log.step, &scalars).map_err(|e| (path, e))
    }

    /// Writes a measurement of the loss on what is held out, as a line and as scalars.
    ///
    /// # Errors
    /// As [`Logs::open`].
    pub fn validation(&mut self, log: &ValidationLog) -> Result<(), (PathBuf, io::Error)> {
        self.line("validation", serde_json::to_value(log).expect("plain data"))?;
        let Some(events) = &mut self.events else { return Ok(()) };
        let mut scalars = vec![("loss/validation".to_owned(), log.loss)];
        let mtp = log.mtp_loss.iter().enumerate();
        scalars.extend(mtp.map(|(d, &loss)| (format!("loss/validation_mtp_{}", d + 1), loss)));
        let path = events.path().to_owned();
        events.scalars(log.step, &scalars).map_err(|e| (path, e))
    }

    /// Writes a sample of the model's text, as a line and for TensorBoard.
    ///
    /// # Errors
    /// As [`Logs::open`].
    pub fn sample(&mut self, step: u64, text: &str) -> Result<(), (PathBuf, io::Error)> {
        self.line("sample", json!({ "step": step, "text": text }))?;
        let Some(events) = &mut self.events else { return Ok(()) };
        let path = events.path().to_owned();
        events.text(step, "sample", text).map_err(|e| (path, e))
    }
}

/// Keeps the lines up to `step` and opens the file for more.
fn reopen(path: &Path, step: u64) -> io::Result<File> {
    let old = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(e),
    };
    let keep = |line: &&str| {
        // A line that was cut off when the process ended is no JSON.
        let value: Option<Value> = serde_json::from_str(line).ok();
        value.is_some_and(|v| v["step"].as_u64().is_none_or(|s| s <= step))
    };
    let mut kept: String = old.lines().filter(keep).collect::<Vec<_>>().join("\n");
    if !kept.is_empty() {
        kept.push('\n');
    }
    if kept != old {
        files::replace(path, |file, _| file.write_all(kept.as_bytes()))?;
    }
    OpenOptions::new().create(true).append(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_log_has_no_step_twice_and_no_half_line() {
        let folder = tempfile::tempdir().unwrap();
        let config = LogConfig { tensorboard: false, ..LogConfig::default() };
        let mut logs = Logs::open(folder.path(), &config, 0).unwrap();
        logs.line("start", json!({ "seed": 1 })).unwrap();
        for step in 1..=3 {
            logs.step(&StepLog { step, ..StepLog::default() }).unwrap();
        }
        let path = folder.path().join("train.jsonl");
        let mut text = fs::read_to_string(&path).unwrap();
        text.push_str("{\"kind\":\"step\",\"step\":2,");
        fs::write(&path, text).unwrap();
        let mut logs = Logs::open(folder.path(), &config, 2).unwrap();
        logs.step(&StepLog { step: 3, ..StepLog::default() }).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let steps = text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap());
        let steps: Vec<Option<u64>> = steps.map(|l| l["step"].as_u64()).collect();
        assert_eq!(steps, [None, Some(1), Some(2), Some(3)]);
    }
}
