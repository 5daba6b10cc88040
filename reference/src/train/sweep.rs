//! A sweep: a run for every point of a grid over keys of the configuration and every seed, and
//! their losses beside each other.
//!
//! Each run has a folder of its own in the sweep's, named after its point, so that an interrupted
//! sweep goes on where it stopped: runs that came to their end are read, others resumed.

use std::path::{Path, PathBuf};

use fathom_config::layered::Setting;
use serde::Serialize;

use super::compare::{CompareError, Run, Spread};
use super::plot::{self, Line};

/// An axis of a sweep's grid: a key of the configuration and the values that it takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Axis {
    /// The dotted key: `schedule.learning_rate`.
    pub key: String,
    /// Values, as TOML.
    pub values: Vec<String>,
}

impl std::str::FromStr for Axis {
    type Err = String;

    /// `KEY=V1,V2,...`; commas inside brackets, braces and quotes belong to a value.
    fn from_str(text: &str) -> Result<Axis, String> {
        let wrong = || format!("expected KEY=VALUE,VALUE,..., found '{text}'");
        let (key, list) = text.split_once('=').ok_or_else(wrong)?;
        let (mut values, mut depth, mut quoted) = (vec![String::new()], 0, false);
        for c in list.chars() {
            match c {
                '"' => quoted = !quoted,
                '[' | '{' if !quoted => depth += 1,
                ']' | '}' if !quoted => depth -= 1,
                _ => {}
            }
            if c == ',' && depth == 0 && !quoted {
                values.push(String::new());
            } else {
                values.last_mut().expect("never empty").push(c);
            }
        }
        let values: Vec<String> = values.iter().map(|v| v.trim().to_owned()).collect();
        if key.trim().is_empty() || values.iter().any(String::is_empty) {
            return Err(wrong());
        }
        Ok(Axis { key: key.trim().to_owned(), values })
    }
}

/// A run of the sweep, at one point of its grid.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// The values of the axes, as TOML, in the order of the axes.
    pub values: Vec<String>,
    /// Seed of the run.
    pub seed: u64,
    /// The point in words, the `name` of the run: `learning_rate=1e-3 clip=0.5`.
    pub name: String,
    /// The run's folder.
    pub out: PathBuf,
}

impl Planned {
    /// The settings that make this run of the sweep's configuration.
    pub fn settings(&self, axes: &[Axis]) -> Vec<Setting> {
        let axis = |(axis, value): (&Axis, &String)| Setting {
            flag: format!("--grid {}={value}", axis.key),
            assignment: format!("{}={value}", axis.key),
        };
        let name = format!("name={:?}", self.name);
        let mut all: Vec<Setting> = axes.iter().zip(&self.values).map(axis).collect();
        all.push(Setting::flag("--seeds", "seed", self.seed));
        all.push(Setting { flag: "the sweep".into(), assignment: name });
        all
    }
}

/// Every run of a sweep in `folder`, the last axis and then the seeds turning fastest.
pub fn plan(folder: &Path, axes: &[Axis], seeds: &[u64]) -> Vec<Planned> {
    let mut points: Vec<Vec<String>> = vec![Vec::new()];
    for axis in axes {
        let before = std::mem::take(&mut points);
        for point in &before {
            for value in &axis.values {
                points.push([&point[..], std::slice::from_ref(value)].concat());
            }
        }
    }
    let mut planned = Vec::new();
    for values in points {
        let word = |(axis, value): (&Axis, &String)| format!("{}={value}", short(&axis.key, axes));
        let words: Vec<String> = axes.iter().zip(&values).map(word).collect();
        for &seed in seeds {
            let safe =
                |c: char| if c.is_ascii_alphanumeric() || "=.-+".contains(c) { c } else { '_' };
            let folder_name: String = words.join("_").chars().map(safe).collect();
            planned.push(Planned {
                values: values.clone(),
                seed,
                name: words.join(" "),
                out: folder.join(format!("{folder_name}_seed={seed}")),
            });
        }
    }
    planned
}

/// The last part of a key, unless two axes share it.
fn short<'a>(key: &'a str, axes: &[Axis]) -> &'a str {
    let last = |key: &'a str| key.rsplit('.').next().unwrap_or(key);
    let shared = axes.iter().filter(|a| a.key.rsplit('.').next() == Some(last(key))).count() > 1;
    if shared { key } else { last(key) }
}

/// What the runs of one point of the grid gave, over their seeds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SweepPoint {
    /// The values of the axes, as TOML, in the order of the axes.
    pub values: Vec<String>,
    /// Seeds whose runs came to their end.
    pub seeds: Vec<u64>,
    /// Mean loss of their last steps; none where no run came to its end.
    pub loss: Option<Spread>,
    /// Loss on what is held out, at their end; none where nothing is.
    pub validation: Option<Spread>,
    /// Runs whose loss or gradient was not finite.
    pub diverged: usize,
}

/// The rows of a sweep, in the order of its points; `last` steps are averaged.
///
/// # Errors
/// [`CompareError::Log`] where the log of a run cannot be read.
pub fn rows(planned: &[Planned], last: usize) -> Result<Vec<SweepPoint>, CompareError> {
    let mut rows: Vec<(SweepPoint, Vec<Run>)> = Vec::new();
    for run in planned {
        if rows.last().is_none_or(|(row, _)| row.values != run.values) {
            let values = run.values.clone();
            let (seeds, diverged) = (Vec::new(), 0);
            let row = SweepPoint { values, seeds, loss: None, validation: None, diverged };
            rows.push((row, Vec::new()));
        }
        let (row, runs) = rows.last_mut().expect("just pushed");
        let log = Run::read(&run.out)?;
        if log.ended {
            row.seeds.push(run.seed);
            runs.push(log);
        } else {
            row.diverged += usize::from(log.diverged.is_some());
        }
    }
    let whole = |(row, runs): (SweepPoint, Vec<Run>)| SweepPoint {
        loss: Spread::of(runs.iter().map(|r| r.end(last))),
        validation: Spread::of(runs.iter().filter_map(|r| r.validation)),
        ..row
    };
    Ok(rows.into_iter().map(whole).collect())
}

impl SweepPoint {
    /// What the sweep looks for the smallest of: the loss on what is held out, else the training
    /// loss at the end.
    pub fn score(&self) -> Option<f64> {
        self.validation.or(self.loss).map(|s| s.mean).filter(|x| x.is_finite())
    }
}

/// The index of the row with the smallest score; `None` where no run came to its end.
pub fn best(rows: &[SweepPoint]) -> Option<usize> {
    let scored = rows.iter().enumerate().filter_map(|(i, row)| Some((i, row.score()?)));
    scored.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(i, _)| i)
}

/// The score over the first axis as SVG, a line for each combination of the others; values stand
/// evenly, in the order given.
pub fn svg(axes: &[Axis], rows: &[SweepPoint]) -> String {
    let first = &axes[0];
    let place = |value: &String| {
        let at = first.values.iter().position(|v| v == value).expect("a value of the axis");
        (at as f64 + 0.5) / first.values.len() as f64
    };
    let mut lines: Vec<Line> = Vec::new();
    for row in rows {
        let rest = axes.iter().zip(&row.values).skip(1);
        let words: Vec<String> =
            rest.map(|(axis, value)| format!("{}={value}", short(&axis.key, axes))).collect();
        let name = if words.is_empty() { "all seeds".to_owned() } else { words.join(" ") };
        let Some(spread) = row.validation.or(row.loss) else { continue };
        let point = (place(&row.values[0]), spread);
        match lines.iter_mut().find(|l| l.name == name) {
            Some(line) => line.points.push(point),
            None => lines.push(Line { name, points: vec![point] }),
        }
    }
    for line in &mut lines {
        line.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    let ticks = first.values.iter().map(|v| (place(v), v.clone())).collect();
    let held_out = rows.iter().any(|r| r.validation.is_some());
    let label = if held_out { "loss on what is held out" } else { "loss at the end" };
    plot::svg(&lines, &plot::Axis { label: first.key.clone(), ticks }, label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_are_lists_of_toml_values() {
        let axis: Axis = "optim.clip = 0.5, 1".parse().unwrap();
        assert_eq!((axis.key.as_str(), axis.values.len()), ("optim.clip", 2));
        let axis: Axis = "recipe.fp8.gradient_block=[1,128],[128,128]".parse().unwrap();
        assert_eq!(axis.values, ["[1,128]", "[128,128]"]);
        for wrong in ["clip", "=1", "clip=", "clip=1,,2"] {
            assert!(wrong.parse::<Axis>().unwrap_err().contains("KEY=VALUE"), "{wrong}");
        }
    }

    #[test]
    fn a_plan_has_every_point_and_seed_once() {
        let axes: [Axis; 2] = ["a.rate=1,2,3".parse().unwrap(), "b.rate=x".parse().unwrap()];
        let planned = plan(Path::new("s"), &axes, &[1, 2]);
        assert_eq!(planned.len(), 6);
        assert_eq!(planned[0].name, "a.rate=1 b.rate=x");
        assert_eq!(planned[3].out, Path::new("s/a.rate=2_b.rate=x_seed=2"));
        let settings = planned[5].settings(&axes);
        assert_eq!((settings[0].assignment.as_str(), settings.len()), ("a.rate=3", 4));
    }
}
