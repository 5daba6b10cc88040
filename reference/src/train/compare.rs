//! Runs beside each other: the mean loss at their end with its spread over seeds, the difference to
//! a baseline, and their curves as a picture.
//!
//! Runs with one `name` are one group, seeds apart. The difference to the baseline is taken seed by
//! seed, since runs of one seed see the same data in the same order from the same weights.

use std::path::{Path, PathBuf};

use fathom_trace::input;
use serde::Serialize;
use serde_json::Value;

use super::plot::{self, Axis, Line};

/// Why a run cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// The log of a run cannot be read.
    #[error("{}{}: {message}", path.display(), line.map_or(String::new(), |n| format!(":{n}")))]
    Log {
        /// The log: `train.jsonl` of the run.
        path: PathBuf,
        /// Its line, from 1.
        line: Option<usize>,
        /// What was expected, and what was found.
        message: String,
    },
    /// No run has the baseline's name.
    #[error("no run is called '{wanted}'; there are {}", found.join(", "))]
    Baseline {
        /// The name asked for.
        wanted: String,
        /// The names of the runs.
        found: Vec<String>,
    },
}

/// A run as its log tells it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Run {
    /// `name` of its configuration.
    pub name: String,
    /// Seed of its weights and data order.
    pub seed: u64,
    /// Main loss of every step whose update was done, in order, in nats per token.
    pub losses: Vec<f64>,
    /// Loss on what was held out, at its last measurement; none where nothing was.
    pub validation: Option<f64>,
    /// Whether it came to its end; neither stopped nor diverged.
    pub ended: bool,
    /// Why it ended before, where loss or gradient was not finite.
    pub diverged: Option<String>,
}

impl Run {
    /// Reads the log `train.jsonl` of a run's folder.
    ///
    /// # Errors
    /// [`CompareError::Log`].
    pub fn read(folder: &Path) -> Result<Run, CompareError> {
        let path = folder.join("train.jsonl");
        let wrong = |line: Option<usize>, message: String| CompareError::Log {
            path: path.clone(),
            line,
            message,
        };
        let text = input::read_text(&path, input::TEXT_BYTES).map_err(|e| {
            wrong(None, format!("{e}; expected the log of a run of `fathom train`"))
        })?;
        let mut run = Run::default();
        for (i, line) in text.lines().enumerate() {
            let value: Value = serde_json::from_str(line)
                .map_err(|e| wrong(Some(i + 1), format!("expected a JSON object: {e}")))?;
            match value["kind"].as_str() {
                Some("start") => {
                    let config = &value["config"];
                    run.name = config["name"].as_str().unwrap_or("run").to_owned();
                    run.seed = config["seed"].as_u64().unwrap_or(0);
                }
                // A step whose update was left out has no finite loss, and the run went on.
                Some("step") if value["skipped"] == true => run.diverged = None,
                Some("step") => {
                    let loss = value["loss"].as_f64().ok_or_else(|| {
                        wrong(
                            Some(i + 1),
                            format!("expected a number 'loss', found {}", value["loss"]),
                        )
                    })?;
                    run.losses.push(loss);
                }
                Some("validation") => run.validation = value["loss"].as_f64(),
                Some("end") => run.ended = value["summary"]["stopped"] == false,
                Some("diverged") => run.diverged = value["reason"].as_str().map(str::to_owned),
                _ => {}
            }
        }
        if run.losses.is_empty() {
            return Err(wrong(None, "expected lines of kind 'step', found none".into()));
        }
        Ok(run)
    }

    /// Mean main loss of the last `last` steps, or of all where there are fewer.
    pub fn end(&self, last: usize) -> f64 {
        let tail = &self.losses[self.losses.len().saturating_sub(last)..];
        tail.iter().sum::<f64>() / tail.len() as f64
    }
}

/// A value over the seeds of a group: mean, smallest, largest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// Mean over the seeds.
    pub mean: f64,
    /// Smallest of the seeds.
    pub min: f64,
    /// Largest of the seeds.
    pub max: f64,
}

impl Spread {
    /// The spread of some values; `None` where there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Spread> {
        let values: Vec<f64> = values.into_iter().collect();
        (!values.is_empty()).then(|| Spread {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            min: values.iter().copied().fold(f64::INFINITY, f64::min),
            max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        })
    }
}

/// One group of runs, seeds apart, in the comparison.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ComparedRuns {
    /// The runs' name.
    pub name: String,
    /// The seeds of its runs, in the order given.
    pub seeds: Vec<u64>,
    /// Steps of the shortest run.
    pub steps: usize,
    /// Mean loss of the last steps, over the seeds.
    pub loss: Spread,
    /// Relative difference of that to the baseline's run of the same seed, in percent; none for
    /// the baseline, or where no seed is shared.
    pub to_baseline_percent: Option<Spread>,
}

/// Groups runs by name, in order of appearance, and compares their mean loss over the last `last`
/// steps with the runs of `baseline`.
///
/// # Errors
/// [`CompareError::Baseline`].
pub fn compare(
    runs: &[Run],
    last: usize,
    baseline: Option<&str>,
) -> Result<Vec<ComparedRuns>, CompareError> {
    let groups = groups(runs);
    if let Some(wanted) = baseline
        && !groups.iter().any(|(name, _)| *name == wanted)
    {
        let found = groups.iter().map(|(name, _)| (*name).to_owned()).collect();
        return Err(CompareError::Baseline { wanted: wanted.to_owned(), found });
    }
    let of_seed =
        |seed: u64| runs.iter().find(|r| Some(r.name.as_str()) == baseline && r.seed == seed);
    let row = |(name, runs): (&str, Vec<&Run>)| {
        let relative = |run: &&Run| {
            of_seed(run.seed).map(|base| 100.0 * (run.end(last) / base.end(last) - 1.0))
        };
        ComparedRuns {
            name: name.to_owned(),
            seeds: runs.iter().map(|r| r.seed).collect(),
            steps: runs.iter().map(|r| r.losses.len()).min().expect("a group has a run"),
            loss: Spread::of(runs.iter().map(|r| r.end(last))).expect("a group has a run"),
            to_baseline_percent: (Some(name) != baseline)
                .then(|| Spread::of(runs.iter().filter_map(relative)))
                .flatten(),
        }
    };
    Ok(groups.into_iter().map(row).collect())
}

fn groups(runs: &[Run]) -> Vec<(&str, Vec<&Run>)> {
    let mut groups: Vec<(&str, Vec<&Run>)> = Vec::new();
    for run in runs {
        match groups.iter_mut().find(|(name, _)| *name == run.name) {
            Some((_, own)) => own.push(run),
            None => groups.push((&run.name, vec![run])),
        }
    }
    groups
}

/// Steps of the moving mean that a line shows.
const WINDOW: usize = 10;

/// The loss over the steps as SVG: a line per group, the mean of its seeds under a moving mean of
/// 10 steps, in a band from the smallest to the largest seed.
pub fn svg(runs: &[Run]) -> String {
    let curves: Vec<(&str, Vec<Spread>)> =
        groups(runs).into_iter().map(|(name, runs)| (name, curve(&runs))).collect();
    let steps = curves.iter().map(|(_, c)| c.len()).max().unwrap_or(1).max(2) as f64;
    let place = |(i, spread): (usize, Spread)| ((i as f64 + 1.0) / steps, spread);
    let line = |(name, curve): (&str, Vec<Spread>)| Line {
        name: name.to_owned(),
        points: curve.into_iter().enumerate().map(place).collect(),
    };
    let every = plot::tick(steps).max(1.0);
    let ticks = (0..).map(|i| f64::from(i) * every).take_while(|step| *step <= steps);
    let axis = Axis {
        label: "step".into(),
        ticks: ticks.map(|step| (step / steps, step.to_string())).collect(),
    };
    plot::svg(&curves.into_iter().map(line).collect::<Vec<_>>(), &axis, "loss")
}

/// The seeds' spread at every step, under the moving mean.
fn curve(runs: &[&Run]) -> Vec<Spread> {
    let steps = runs.iter().map(|r| r.losses.len()).max().unwrap_or(0);
    let at = |run: &Run, step: usize| {
        let window = &run.losses[(step + 1).saturating_sub(WINDOW)..=step];
        window.iter().sum::<f64>() / window.len() as f64
    };
    let spread = |step: usize| {
        Spread::of(runs.iter().filter(|r| step < r.losses.len()).map(|r| at(r, step)))
    };
    (0..steps).filter_map(spread).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(name: &str, seed: u64, losses: &[f64]) -> Run {
        Run { name: name.into(), seed, losses: losses.to_vec(), ..Run::default() }
    }

    #[test]
    fn groups_are_compared_seed_by_seed() {
        let runs = [
            run("bf16", 1, &[9.0, 4.0, 4.0]),
            run("bf16", 2, &[9.0, 8.0, 8.0]),
            run("fp8", 2, &[9.0, 8.0, 8.8]),
            run("fp8", 1, &[9.0, 4.4, 4.0]),
        ];
        let rows = compare(&runs, 2, Some("bf16")).unwrap();
        assert_eq!(rows[0].loss, Spread { mean: 6.0, min: 4.0, max: 8.0 });
        assert_eq!(rows[0].to_baseline_percent, None);
        let relative = rows[1].to_baseline_percent.unwrap();
        assert!((relative.min - 5.0).abs() < 1e-9 && (relative.max - 5.0).abs() < 1e-9);
        let error = compare(&runs, 2, Some("f64")).unwrap_err().to_string();
        assert_eq!(error, "no run is called 'f64'; there are bf16, fp8");
    }

    #[test]
    fn a_log_is_read_and_a_bad_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.jsonl");
        let good = "{\"kind\":\"start\",\"config\":{\"name\":\"a\",\"seed\":7}}\n\
                    {\"kind\":\"step\",\"step\":1,\"loss\":2.5}\n{\"kind\":\"end\"}\n";
        std::fs::write(&path, good).unwrap();
        let read = Run::read(folder.path()).unwrap();
        assert_eq!(read, run("a", 7, &[2.5]));
        std::fs::write(&path, format!("{good}{{\"kind\":\"step\",\"loss\":null}}\n")).unwrap();
        let error = Run::read(folder.path()).unwrap_err().to_string();
        assert!(error.ends_with("train.jsonl:4: expected a number 'loss', found null"), "{error}");
        std::fs::write(&path, "{\"kind\":\"start\"}\n").unwrap();
        assert!(Run::read(folder.path()).is_err());
    }

    #[test]
    fn the_picture_has_a_line_a_group_and_escaped_names() {
        let picture = svg(&[run("a<b", 1, &[3.0, 2.0, 1.0]), run("c", 1, &[3.0, 2.5, 2.0])]);
        assert_eq!(picture.matches("<polyline").count(), 2);
        assert!(picture.contains("a&lt;b") && !picture.contains("NaN"));
    }
}
