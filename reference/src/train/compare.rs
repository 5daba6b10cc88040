//! Runs beside each other: the mean loss at their end with its spread over seeds, the difference to
//! a baseline, and their curves as a picture.
//!
//! Runs with one `name` are one group, seeds apart. The difference to the baseline is taken seed by
//! seed, since runs of one seed see the same data in the same order from the same weights.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

/// Why a run cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// The log of a run.
    #[error("{}{}: {message}", path.display(), line.map_or(String::new(), |n| format!(":{n}")))]
    Log {
        /// The file.
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
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// `name` of its configuration.
    pub name: String,
    /// Its seed.
    pub seed: u64,
    /// Main loss of every step, in order.
    pub losses: Vec<f64>,
}

impl Run {
    /// Reads `train.jsonl` of a run's folder.
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
        let text = std::fs::read_to_string(&path).map_err(|e| {
            wrong(None, format!("{e}; expected the log of a run of `fathom train`"))
        })?;
        let mut run = Run { name: String::new(), seed: 0, losses: Vec::new() };
        for (i, line) in text.lines().enumerate() {
            let value: Value = serde_json::from_str(line)
                .map_err(|e| wrong(Some(i + 1), format!("expected a JSON object: {e}")))?;
            match value["kind"].as_str() {
                Some("start") => {
                    let config = &value["config"];
                    run.name = config["name"].as_str().unwrap_or("run").to_owned();
                    run.seed = config["seed"].as_u64().unwrap_or(0);
                }
                Some("step") => {
                    let loss = value["loss"].as_f64().ok_or_else(|| {
                        wrong(
                            Some(i + 1),
                            format!("expected a number 'loss', found {}", value["loss"]),
                        )
                    })?;
                    run.losses.push(loss);
                }
                _ => {}
            }
        }
        if run.losses.is_empty() {
            return Err(wrong(None, "expected lines of kind 'step', found none".into()));
        }
        Ok(run)
    }

    /// Mean loss of the last `last` steps.
    pub fn end(&self, last: usize) -> f64 {
        let tail = &self.losses[self.losses.len().saturating_sub(last)..];
        tail.iter().sum::<f64>() / tail.len() as f64
    }
}

/// A value over the seeds of a group.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// Mean.
    pub mean: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    fn of(values: impl IntoIterator<Item = f64>) -> Option<Spread> {
        let values: Vec<f64> = values.into_iter().collect();
        (!values.is_empty()).then(|| Spread {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            min: values.iter().copied().fold(f64::INFINITY, f64::min),
            max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        })
    }
}

/// One group in the comparison.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The runs' name.
    pub name: String,
    /// Their seeds.
    pub seeds: Vec<u64>,
    /// Steps of the shortest run.
    pub steps: usize,
    /// Mean loss of the last steps.
    pub loss: Spread,
    /// Relative difference of that to the baseline's run of the same seed, in percent; none for
    /// the baseline, or where no seed is shared.
    pub to_baseline_percent: Option<Spread>,
}

/// Groups runs by name, in order of appearance, and compares the means over the `last` steps.
///
/// # Errors
/// [`CompareError::Baseline`].
pub fn compare(
    runs: &[Run],
    last: usize,
    baseline: Option<&str>,
) -> Result<Vec<Row>, CompareError> {
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
        Row {
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

/// Lines of the picture: readable on white and on dark ground, and apart for colour-blind readers.
const COLOURS: [&str; 7] =
    ["#2a78d6", "#c2571a", "#1a8f6b", "#8a5cc9", "#b98a00", "#c43d7a", "#6b7280"];
/// Steps of the moving mean that a line shows.
const WINDOW: usize = 10;
const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 56.0;
const TOP: f64 = 16.0;
const PLOT_WIDTH: f64 = WIDTH - LEFT - 150.0;
const PLOT_HEIGHT: f64 = HEIGHT - TOP - 44.0;

/// The loss over the steps as SVG: a line a group, the mean of its seeds under a moving mean of
/// 10 steps, in a band from the smallest to the largest seed.
pub fn svg(runs: &[Run]) -> String {
    let curves: Vec<(&str, Vec<Spread>)> =
        groups(runs).into_iter().map(|(name, runs)| (name, curve(&runs))).collect();
    let steps = curves.iter().map(|(_, c)| c.len()).max().unwrap_or(1).max(2);
    let finite = || curves.iter().flat_map(|(_, c)| c).filter(|s| s.mean.is_finite());
    let low = finite().map(|s| s.min).fold(f64::INFINITY, f64::min);
    let high = finite().map(|s| s.max).fold(f64::NEG_INFINITY, f64::max);
    let (low, high) = if low < high { (low, high) } else { (0.0, 1.0) };
    let tick = tick(high - low);
    let (low, high) = ((low / tick).floor() * tick, (high / tick).ceil() * tick);
    let x = |step: f64| LEFT + PLOT_WIDTH * step / steps as f64;
    let y = |loss: f64| TOP + PLOT_HEIGHT * (high - loss) / (high - low);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"12\">\n<style>\
         .ground{{fill:#ffffff}}.ink{{fill:#24292f}}.grid{{stroke:#d0d7de}}\
         @media(prefers-color-scheme:dark){{.ground{{fill:#0d1117}}.ink{{fill:#c9d1d9}}\
         .grid{{stroke:#30363d}}}}</style>\n\
         <rect class=\"ground\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\n"
    );
    axes(&mut out, steps, (low, high, tick), &x, &y);
    for ((name, curve), colour) in curves.iter().zip(COLOURS.iter().cycle()) {
        let place = |(i, loss): (usize, f64)| format!("{:.1},{:.1}", x(i as f64 + 1.0), y(loss));
        let points = |of: fn(&Spread) -> f64| {
            let all = curve.iter().enumerate().filter(|(_, s)| s.mean.is_finite());
            all.map(|(i, s)| place((i, of(s)))).collect::<Vec<_>>()
        };
        let mut band = points(|s| s.max);
        band.extend(points(|s| s.min).into_iter().rev());
        let (band, line) = (band.join(" "), points(|s| s.mean).join(" "));
        let _ = writeln!(
            out,
            "<g><title>{name}</title><polygon points=\"{band}\" fill=\"{colour}\" \
             opacity=\"0.15\"/><polyline points=\"{line}\" fill=\"none\" stroke=\"{colour}\" \
             stroke-width=\"1.6\"/></g>",
            name = escape(name)
        );
    }
    legend(&mut out, &curves);
    out.push_str("</svg>\n");
    out
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

/// Distance of grid lines: 1, 2 or 5 times a power of ten, some six over `range`.
fn tick(range: f64) -> f64 {
    let rough = range / 6.0;
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|t| t * power).find(|&t| t >= rough).unwrap_or(power)
}

fn axes(
    out: &mut String,
    steps: usize,
    (low, high, every): (f64, f64, f64),
    x: &dyn Fn(f64) -> f64,
    y: &dyn Fn(f64) -> f64,
) {
    let lines = ((high - low) / every).round() as usize;
    let digits = if every < 1.0 { (-every.log10().floor()) as usize } else { 0 };
    for i in 0..=lines {
        let loss = low + i as f64 * every;
        let (y, right) = (y(loss), LEFT + PLOT_WIDTH);
        let _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
             <text class=\"ink\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{loss:.digits$}</text>",
            LEFT - 8.0,
            y + 4.0
        );
    }
    let every = tick(steps as f64).max(1.0);
    let mut step = 0.0;
    while step <= steps as f64 {
        let _ = writeln!(
            out,
            "<text class=\"ink\" x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{step}</text>",
            x(step),
            TOP + PLOT_HEIGHT + 18.0
        );
        step += every;
    }
    let (middle, centre) = (LEFT + PLOT_WIDTH / 2.0, TOP + PLOT_HEIGHT / 2.0);
    let _ = writeln!(
        out,
        "<text class=\"ink\" x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">step</text>\
         <text class=\"ink\" x=\"14\" y=\"{centre}\" text-anchor=\"middle\" \
         transform=\"rotate(-90 14 {centre})\">loss</text>",
        HEIGHT - 6.0
    );
}

fn legend(out: &mut String, curves: &[(&str, Vec<Spread>)]) {
    for (i, ((name, _), colour)) in curves.iter().zip(COLOURS.iter().cycle()).enumerate() {
        let (x, y) = (LEFT + PLOT_WIDTH + 16.0, TOP + 12.0 + 20.0 * i as f64);
        let _ = writeln!(
            out,
            "<line x1=\"{x}\" x2=\"{}\" y1=\"{y}\" y2=\"{y}\" stroke=\"{colour}\" \
             stroke-width=\"3\"/><text class=\"ink\" x=\"{}\" y=\"{}\">{}</text>",
            x + 18.0,
            x + 24.0,
            y + 4.0,
            escape(name)
        );
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(name: &str, seed: u64, losses: &[f64]) -> Run {
        Run { name: name.into(), seed, losses: losses.to_vec() }
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
        assert_eq!(Run::read(folder.path()).unwrap(), run("a", 7, &[2.5]));
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
