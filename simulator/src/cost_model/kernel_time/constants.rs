//! The physical constants of the kernel-time model: a handful, each with what it was fitted on.
//!
//! Nothing here belongs to one row of a validation table. GEMM constants come from the fitting half
//! of the GEMMs of one profiled chunk on H800 (their fastest runs), memory classes from the forward
//! phases of the same chunk, all-to-all from EP16 alone. `fathom simulate calibrate TRACE --fit`
//! repeats the GEMM fit on another machine's trace.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{SimError, read_table};

/// The constants of the model, dimensionless or in clock cycles where they carry over to other
/// GPUs, else in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Constants {
    /// Share of the tensor-core peak that the MMAs of a tile's main loop reach.
    pub mma_efficiency: f64,
    /// Cycles of an SM's 128 lanes for one multiply-add each in the promotion of FP8 partial sums,
    /// waits included.
    pub promotion_cycles: f64,
    /// Cycles from the end of a tile's main loop to the start of the next that are not memory time.
    pub tile_cycles: f64,
    /// From launch to the first useful work of a kernel, and from its last to its end, seconds.
    pub ramp_s: f64,
    /// Seconds between two kernels of a stream.
    pub gap_s: f64,
    /// Slow-down of kernels while communication kernels share memory and power.
    pub contention: f64,
    /// Share of memory bandwidth that copies, element-wise kernels, transposes and permutations
    /// reach on all SMs.
    pub stream_efficiency: f64,
    /// Share of memory bandwidth that kernels reach which compute on the way: casts with block
    /// scales, SwiGLU.
    pub convert_efficiency: f64,
    /// Share of memory bandwidth that kernels reach which reduce a row or touch short pieces:
    /// norms, RoPE, odd formats.
    pub row_efficiency: f64,
    /// Cycles of an SM for one attention score in the forward pass beside the MMAs (softmax).
    pub softmax_cycles: f64,
    /// Cycles of an SM for one attention score in the backward pass beside the MMAs.
    pub softmax_backward_cycles: f64,
    /// Share of the usable scale-up bandwidth that the forwarding stage of the all-to-all reaches.
    pub forwarding_efficiency: f64,
    /// Seconds that an all-to-all loses for every second of memory time of the compute kernels
    /// beside it.
    pub comm_contention: f64,
    /// Standard deviation, between ranks and relative to the mean, of the computation that runs
    /// beside communication from one all-to-all to the next; every exchange waits for the slowest.
    pub imbalance: f64,
}

impl Constants {
    /// What every constant was fitted on, in the order of the fields.
    pub const FITTED_ON: [(&str, &str); 14] = [
        (
            "mma_efficiency",
            "least squares on the fastest runs of the 12 plain GEMMs of the fitting half",
        ),
        (
            "promotion_cycles",
            "the same fit; weight gradients take two steps an element, the others one",
        ),
        ("tile_cycles", "the same fit"),
        ("ramp_s", "the profile's kernels of a few bytes: 2 to 4 us"),
        ("gap_s", "the profile's median gap between kernels of a stream: 2 us"),
        ("contention", "mean over fastest run of the same 12 GEMMs"),
        (
            "stream_efficiency",
            "copies, permutations and transposes of the profile's forward phases",
        ),
        ("convert_efficiency", "casts and SwiGLU of the profile's forward phases"),
        ("row_efficiency", "norms and RoPE of the profile's forward phases"),
        ("softmax_cycles", "the profile's attention forward kernel"),
        ("softmax_backward_cycles", "the profile's attention backward kernel"),
        ("forwarding_efficiency", "DeepEP's EP16 dispatch and combine"),
        (
            "comm_contention",
            "the profile's four communication phases, least squares with imbalance",
        ),
        (
            "imbalance",
            "the same fit: 3.1 ms an exchange, of which 2.06 in notify and barrier kernels, after \
             8.04 ms of computation, for the slowest of 64 ranks",
        ),
    ];

    /// The constants of a JSON file: an object of them all, or one that holds it under `constants`
    /// as `fathom simulate calibrate --gemms FILE --json` prints.
    ///
    /// # Errors
    /// [`SimError::Input`] with the file and the name of the constant.
    pub fn read(path: &Path) -> Result<Constants, SimError> {
        let text = read_table(path)?;
        Constants::parse(&path.display().to_string(), &text)
    }

    /// As [`Constants::read`], from text; `file` is only named in errors.
    ///
    /// # Errors
    /// As [`Constants::read`].
    pub fn parse(file: &str, text: &str) -> Result<Constants, SimError> {
        let mut value: serde_json::Value = serde_json::from_str(text)
            .map_err(|e| SimError::input(file, format!("expected constants in JSON: {e}")))?;
        if let Some(inner) = value.get_mut("constants") {
            value = inner.take();
        }
        let read: Constants = serde_path_to_error::deserialize(value)
            .map_err(|e| SimError::input(file, format!("{}: {}", e.path(), e.inner())))?;
        let numbers = serde_json::to_value(read).expect("constants are numbers");
        let bad = |v: &serde_json::Value| !v.as_f64().is_some_and(|x| x.is_finite() && x >= 0.0);
        let object = numbers.as_object().expect("a struct is an object");
        if let Some((name, value)) = object.iter().find(|(_, v)| bad(v)) {
            let message = format!("{name} is {value}, expected a number of at least 0");
            return Err(SimError::input(file, message));
        }
        Ok(read)
    }

    /// The values in use, fitted as [`Constants::FITTED_ON`] says.
    pub const FITTED: Constants = Constants {
        mma_efficiency: 0.927,
        promotion_cycles: 1.539,
        tile_cycles: 586.0,
        ramp_s: 2.0e-6,
        gap_s: 2.0e-6,
        contention: 1.029,
        stream_efficiency: 0.83,
        convert_efficiency: 0.78,
        row_efficiency: 0.41,
        softmax_cycles: 0.0275,
        softmax_backward_cycles: 0.1734,
        forwarding_efficiency: 0.834,
        comm_contention: 0.338,
        imbalance: 0.1746,
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_constant_says_what_it_was_fitted_on() {
        let value = serde_json::to_value(Constants::FITTED).unwrap();
        let names: Vec<&String> = value.as_object().unwrap().keys().collect();
        assert_eq!(names, Constants::FITTED_ON.iter().map(|(n, _)| n).collect::<Vec<_>>());
    }
}
