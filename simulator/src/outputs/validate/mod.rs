//! Validation: every published figure that the simulator can predict, beside its prediction and the
//! error.
//!
//! The figures are facts with their public source, kept as data in the files of this folder. What
//! was used for fitting is marked; nothing else was.

mod figures;
mod kernels;
mod others;
mod public;
mod runs;
mod serving;
mod training;

pub use public::SOURCES;
pub use runs::{B200_GEMMS, b200_gemms};
pub use serving::serving;
pub use training::{PROFILE_LOADS, pretraining_gpu_hours, profiled_chunk};

use serde::Serialize;

use crate::config::Scenario;
use crate::error::SimError;
use crate::first_principles::FirstPrinciples;
use crate::interval::{self, Likeness, ValidatedRun};
use crate::kernel_time::Constants;

/// What a figure is to the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Constants were fitted on it.
    Fitted,
    /// Not used for fitting; a goal is set.
    Tested,
    /// Printed beside ours without a goal.
    Shown,
}

/// One published figure beside its prediction.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Group of figures that are printed in one table.
    pub section: &'static str,
    /// Name of the figure.
    pub figure: String,
    /// Unit of both values.
    pub unit: &'static str,
    /// Value as published.
    pub published: f64,
    /// Value as predicted.
    pub predicted: f64,
    /// Predicted over published less 1; the difference where `goal_points` is set.
    pub error: f64,
    /// Whether constants were fitted on it, and whether it has a goal.
    pub role: Role,
    /// Largest error allowed, as `error` is counted.
    pub goal: Option<f64>,
    /// Whether the error is a difference in the figure's unit instead of a ratio.
    pub goal_points: bool,
    /// Whether the error is within the goal; true without one.
    pub met: bool,
    /// Why it differs, or an assumption that the prediction makes.
    pub note: String,
    /// A whole run's likeness with measured over predicted time, of which intervals are made.
    #[serde(skip)]
    pub run: Option<ValidatedRun>,
}

impl Row {
    fn new(
        section: &'static str,
        figure: impl Into<String>,
        unit: &'static str,
        published: f64,
        predicted: f64,
    ) -> Row {
        Row {
            section,
            figure: figure.into(),
            unit,
            published,
            predicted,
            error: predicted / published - 1.0,
            role: Role::Shown,
            goal: None,
            goal_points: false,
            met: true,
            note: String::new(),
            run: None,
        }
    }

    /// With a goal for the relative error.
    fn goal(mut self, role: Role, goal: f64) -> Row {
        self.role = role;
        self.goal = Some(goal);
        // Differences below a millionth are rounding of the published digits.
        self.met = self.error.abs() <= goal + 1e-6;
        self
    }

    /// With a goal for the difference in the figure's unit.
    fn points(mut self, role: Role, goal: f64) -> Row {
        self.error = self.predicted - self.published;
        self.goal_points = true;
        self.goal(role, goal)
    }

    /// Equal to the printed digits, `decimals` behind the point.
    fn digits(mut self, decimals: usize) -> Row {
        let same =
            format!("{:.decimals$}", self.predicted) == format!("{:.decimals$}", self.published);
        self.role = Role::Tested;
        self.goal = Some(0.0);
        self.met = same;
        if same {
            self.error = 0.0;
        }
        self
    }

    fn fitted(mut self) -> Row {
        self.role = Role::Fitted;
        self
    }

    /// A run of `s`, of whose step the figure is the time, or the rate where `rate`.
    fn of_run(mut self, s: &Scenario, rate: bool) -> Row {
        let ratio = self.published / self.predicted;
        let ratio = if rate { 1.0 / ratio } else { ratio };
        self.run = Some(ValidatedRun { like: Likeness::of(s), ratio });
        self
    }

    fn note(mut self, note: impl Into<String>) -> Row {
        self.note = note.into();
        self
    }

    /// The error for people: a percentage, or points.
    pub fn error_text(&self) -> String {
        if self.goal_points {
            format!("{:+.1} points", self.error)
        } else {
            format!("{:+.1} %", self.error * 100.0)
        }
    }

    /// The goal for people: a percentage, points, or `printed digits`; empty without one.
    pub fn goal_text(&self) -> String {
        match (self.goal, self.goal_points) {
            (None, _) => String::new(),
            (Some(0.0), _) => "printed digits".to_string(),
            (Some(g), true) => format!("{g} points"),
            (Some(g), false) => format!("{} %", (g * 1000.0).round() / 10.0),
        }
    }
}

/// The whole validation: every figure, and how many meet their goals.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Validation {
    /// All figures, in the order of their sections.
    pub rows: Vec<Row>,
    /// Figures with a goal.
    pub goals: usize,
    /// How many of these are within their goal.
    pub met: usize,
}

/// Predicts every figure with the times of `cost`.
pub fn validate(cost: &FirstPrinciples) -> Result<Validation, SimError> {
    let mut rows = figures::rows(cost)?;
    rows.extend(kernels::rows(cost)?);
    rows.extend(training::rows(cost)?);
    rows.extend(others::rows(cost)?);
    rows.extend(runs::rows(cost)?);
    rows.extend(public::rows(cost)?);
    rows.extend(public::never_fitted(&rows));
    rows.push(intervals(&rows));
    Ok(Validation::of(rows))
}

/// How many of the runs lie within the interval that all the others give.
fn intervals(rows: &[Row]) -> Row {
    let runs: Vec<ValidatedRun> = rows.iter().filter_map(|r| r.run.clone()).collect();
    let held = 100.0 * interval::coverage(&runs);
    let mut row = Row::new("Intervals", "runs within their 80 % interval", "%", 80.0, held);
    (row.error, row.goal_points) = (held - 80.0, true);
    row.note(format!("each of {} runs against the interval made from the others", runs.len()))
}

impl Validation {
    /// The table of which intervals are made ([`interval::VALIDATED`]).
    pub fn runs_csv(&self) -> String {
        let mut out = "# Measured over predicted time of every public run that was compared; \
                       rewritten by\n# FATHOM_BLESS=1 cargo test -p fathom-simulator --test \
                       validation\ngpu,stack,family,ratio\n"
            .to_owned();
        for run in self.rows.iter().filter_map(|r| r.run.as_ref()) {
            let Likeness { gpu, stack, family } = &run.like;
            out += &format!("{gpu},{stack},{family},{:.3}\n", run.ratio);
        }
        out
    }
}

/// A value with as many digits as help: none above 1000, three below 10.
pub fn number(value: f64) -> String {
    let magnitude = value.abs();
    let decimals = match magnitude {
        m if m >= 1000.0 => 0,
        m if m >= 100.0 => 1,
        m if m >= 10.0 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

impl Validation {
    /// The validation of these figures.
    pub fn of(rows: Vec<Row>) -> Validation {
        let goals = rows.iter().filter(|r| r.goal.is_some()).count();
        let met = rows.iter().filter(|r| r.goal.is_some() && r.met).count();
        Validation { rows, goals, met }
    }

    /// The constants and the validation as Markdown, one table a section.
    pub fn markdown(&self) -> String {
        let mut out = "| constant | value | fitted on |\n|---|---:|---|\n".to_string();
        let values = serde_json::to_value(Constants::FITTED).expect("constants are numbers");
        for (name, source) in Constants::FITTED_ON {
            out += &format!("| `{name}` | {} | {source} |\n", values[name]);
        }
        out + &self.tables()
    }

    /// How many goals are met, and the figures as Markdown, one table a section.
    pub fn tables(&self) -> String {
        let mut out =
            format!("\n{} of {} figures with a goal are within it.\n", self.met, self.goals);
        let mut section = "";
        for row in &self.rows {
            if row.section != section {
                section = row.section;
                let source = public::SOURCES.iter().find(|(name, _)| *name == section);
                let source = source.map_or(String::new(), |(_, text)| format!("{text}.\n\n"));
                out += &format!(
                    "\n### {section}\n\n{source}| figure | unit | published | ours | error | goal | note |\n"
                );
                out += "|---|---|---:|---:|---:|---|---|\n";
            }
            let goal = match (row.goal.is_some(), row.met, row.role) {
                (false, _, Role::Fitted) => "fitted".to_string(),
                (false, _, _) => String::new(),
                (true, true, Role::Fitted) => format!("{}, fitted", row.goal_text()),
                (true, true, _) => row.goal_text(),
                (true, false, _) => format!("{}: **missed**", row.goal_text()),
            };
            let (published, ours) = (number(row.published), number(row.predicted));
            let error = row.error_text();
            out += &format!(
                "| {} | {} | {published} | {ours} | {error} | {goal} | {} |\n",
                row.figure, row.unit, row.note
            );
        }
        out
    }
}
