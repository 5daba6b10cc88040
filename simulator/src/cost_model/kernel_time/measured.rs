//! Measured kernel times in place of the model's, by op and sizes.
//!
//! A table is comma-separated text with a header that names at least the columns `op`, `shape` and
//! `mean_us`, or a JSON list of objects with these keys. `fathom simulate --write-kernel-times`
//! writes such a table with the model's own times for every kernel of a scenario; a user replaces
//! what he measured. Times hold for the situation in which they were measured; the model's
//! slow-down beside communication is not put on top.
//!
//! Larger things than kernels have times too, as `fathom train --kernel-times` writes them of a
//! run: op `mlp F` of shape `moe` is all that a layer of this kind computes in this component and
//! phase, op `step` what a step has beside its layers (`instruction`, `optimizer`, `gradient
//! reduction`, `parameter gather`).

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{SimError, read_table};
use crate::lowering::Kernel;
use crate::times::LayerKind;
use fathom_trace::{Component, Phase};

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

/// The op under which stand a step's times beside its layers.
const STEP: &str = "step";

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

    /// The measured seconds that a layer of `kind` computes in `components` in a phase, where the
    /// table has any of that kind and phase.
    pub fn of_part(&self, kind: LayerKind, components: &[Component], phase: Phase) -> Option<f64> {
        let kind = format!("{kind:?}").to_lowercase();
        let ending = format!(" {phase:?}");
        let of_phase = |key: &&(String, String)| key.1 == kind && key.0.ends_with(&ending);
        self.seconds.keys().find(of_phase)?;
        let seconds = |component: &Component| {
            let op = format!("{component:?}").to_lowercase() + &ending;
            self.seconds.get(&(op, kind.clone())).copied().unwrap_or_default()
        };
        Some(components.iter().map(seconds).sum())
    }

    /// The measured seconds of what a step has beside its layers.
    pub fn of_step(&self, what: &str) -> Option<f64> {
        self.seconds.get(&(STEP.to_owned(), what.to_owned())).copied()
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
        let is_kernel = |(op, _): &(String, String)| op != STEP && !op.contains(' ');
        left.into_keys().filter(is_kernel).collect()
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
    fn parts_of_layers_and_of_the_step_are_no_kernels() {
        let csv = "op,shape,mean_us\nmlp F,moe,3\ncombine F,moe,1\nstep,optimizer,5\n";
        let times = KernelTimes::from_csv("t.csv", csv).unwrap();
        let of = |kind, phase| {
            times.of_part(kind, &[Component::Mlp, Component::Combine, Component::Head], phase)
        };
        assert_eq!(of(LayerKind::Moe, Phase::F), Some(4e-6));
        assert_eq!((of(LayerKind::Moe, Phase::B), of(LayerKind::Dense, Phase::F)), (None, None));
        assert_eq!((times.of_step("optimizer"), times.of_step("instruction")), (Some(5e-6), None));
        assert!(times.unknown([].into_iter()).is_empty());
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
