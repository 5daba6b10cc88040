//! Measured kernel times in place of the model's, by op and sizes.
//!
//! A table is comma-separated text with a header that names at least the columns `op`, `shape` and
//! `mean_us`, or a JSON list of objects with these keys. `fathom simulate --write-kernel-times`
//! writes such a table with the model's own times for every kernel of a scenario; a user replaces
//! what he measured. Times hold for the situation in which they were measured; the model's
//! slow-down beside communication is not put on top.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{SimError, read_table};
use crate::lowering::Kernel;

/// One line of a table of measured kernels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeasuredKernel {
    /// The op's name, with its part where it has several kernels.
    pub op: String,
    /// Sizes as the simulator writes them; an op with other sizes is another kernel.
    pub shape: String,
    /// Mean duration, microseconds.
    pub mean_us: f64,
}

/// A table of measured kernels, by op and sizes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct KernelTimes {
    seconds: BTreeMap<(String, String), f64>,
}

impl KernelTimes {
    /// Reads a table: JSON where the file's name ends in `.json`, else comma-separated.
    ///
    /// # Errors
    /// [`SimError::Input`] with file and line.
    pub fn read(path: &Path) -> Result<KernelTimes, SimError> {
        let text = read_table(path)?;
        let file = path.display().to_string();
        let json = path.extension().is_some_and(|e| e == "json");
        if json {
            KernelTimes::from_json(&file, &text)
        } else {
            KernelTimes::from_csv(&file, &text)
        }
    }

    /// A table from JSON; `file` names it in errors.
    ///
    /// # Errors
    /// As [`KernelTimes::read`].
    pub fn from_json(file: &str, text: &str) -> Result<KernelTimes, SimError> {
        let rows: Vec<MeasuredKernel> = serde_json::from_str(text).map_err(|e| {
            SimError::input(file, format!("expected a list of {{op, shape, mean_us}}: {e}"))
        })?;
        let mut times = KernelTimes::default();
        for (i, row) in rows.into_iter().enumerate() {
            times.add(file, &format!("entry {}", i + 1), row)?;
        }
        times.not_empty(file)
    }

    /// A table from comma-separated text; `file` names it in errors.
    ///
    /// # Errors
    /// As [`KernelTimes::read`].
    pub fn from_csv(file: &str, text: &str) -> Result<KernelTimes, SimError> {
        let mut lines =
            text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty() && !l.starts_with('#'));
        let (first, header) = lines.next().unwrap_or((0, ""));
        let header: Vec<&str> = header.split(',').map(str::trim).collect();
        let column = |name: &str| {
            header.iter().position(|h| *h == name).ok_or_else(|| {
                let found = header.join(",");
                let place = format!("line {}", first + 1);
                SimError::input(
                    file,
                    format!("{place}: expected a column '{name}', found the header '{found}'"),
                )
            })
        };
        let (op, shape, mean) = (column("op")?, column("shape")?, column("mean_us")?);
        let mut times = KernelTimes::default();
        for (number, line) in lines {
            let place = format!("line {}", number + 1);
            let cells: Vec<&str> = line.split(',').map(str::trim).collect();
            if cells.len() != header.len() {
                let (want, have) = (header.len(), cells.len());
                let message = format!("{place}: expected {want} cells, found {have}");
                return Err(SimError::input(file, message));
            }
            let mean_us = cells[mean].parse().map_err(|_| {
                let found = cells[mean];
                SimError::input(file, format!("{place}: mean_us is '{found}', expected a number"))
            })?;
            let (op, shape) = (cells[op].to_owned(), cells[shape].to_owned());
            times.add(file, &place, MeasuredKernel { op, shape, mean_us })?;
        }
        times.not_empty(file)
    }

    fn add(&mut self, file: &str, place: &str, row: MeasuredKernel) -> Result<(), SimError> {
        let MeasuredKernel { op, shape, mean_us } = row;
        if !(mean_us.is_finite() && (0.0..=1e12).contains(&mean_us)) {
            let message = format!("{place}: mean_us is {mean_us}, expected microseconds");
            return Err(SimError::input(file, message));
        }
        if self.seconds.insert((op.clone(), shape.clone()), mean_us / 1e6).is_some() {
            let message = format!("{place}: '{op}' of '{shape}' has a time already");
            return Err(SimError::input(file, message));
        }
        Ok(())
    }

    fn not_empty(self, file: &str) -> Result<KernelTimes, SimError> {
        if self.seconds.is_empty() {
            return Err(SimError::input(file, "no kernel in it"));
        }
        Ok(self)
    }

    /// The measured seconds of `kernel`, where the table has it.
    pub fn of(&self, kernel: &Kernel) -> Option<f64> {
        if self.seconds.is_empty() {
            return None;
        }
        self.seconds.get(&(kernel.op.clone(), kernel.shape.clone())).copied()
    }

    /// How many kernels have a time.
    pub fn len(&self) -> usize {
        self.seconds.len()
    }

    /// Whether no kernel has a time.
    pub fn is_empty(&self) -> bool {
        self.seconds.is_empty()
    }

    /// The kernels of the table that none of `kernels` is, by op and sizes.
    pub fn unknown<'k>(&self, kernels: impl Iterator<Item = &'k Kernel>) -> Vec<(String, String)> {
        let mut left = self.seconds.clone();
        for kernel in kernels {
            left.remove(&(kernel.op.clone(), kernel.shape.clone()));
        }
        left.into_keys().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_say_the_same() {
        let csv = "# measured\nop,phase,shape,mean_us\ngemm_fp8,F,4096x2112x7168,99.5\n";
        let json = r#"[{"op": "gemm_fp8", "shape": "4096x2112x7168", "mean_us": 99.5}]"#;
        let a = KernelTimes::from_csv("t.csv", csv).unwrap();
        assert_eq!(a, KernelTimes::from_json("t.json", json).unwrap());
        assert_eq!(a.len(), 1);
    }

    #[test]
    fn bad_tables_name_line_and_what_was_expected() {
        for (text, part) in [
            ("", "expected a column 'op'"),
            ("op,shape\n", "expected a column 'mean_us'"),
            ("op,shape,mean_us\na,b\n", "line 2: expected 3 cells, found 2"),
            ("op,shape,mean_us\na,b,c\n", "line 2: mean_us is 'c'"),
            ("op,shape,mean_us\na,b,-1\n", "expected microseconds"),
            ("op,shape,mean_us\na,b,1\na,b,2\n", "has a time already"),
            ("op,shape,mean_us\n", "no kernel"),
        ] {
            let e = KernelTimes::from_csv("t.csv", text).unwrap_err().to_string();
            assert!(e.starts_with("t.csv: ") && e.contains(part), "{e}");
        }
        let e = KernelTimes::from_json("t.json", "[{\"op\": 1}]").unwrap_err().to_string();
        assert!(e.starts_with("t.json: expected a list"), "{e}");
    }
}
