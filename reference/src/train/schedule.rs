//! Schedules: a number that changes over the run, in pieces that end at a step or at a token.
//!
//! In TOML a schedule is a number, or a list of pieces:
//!
//! ```toml
//! learning_rate = [
//!     { until_step = 2000, from = 0.0, to = 2.2e-4 },
//!     { until_tokens = 10e12, value = 2.2e-4 },
//!     { until_tokens = 14.3e12, from = 2.2e-4, to = 2.2e-5, shape = "cosine" },
//!     { value = 2.2e-5 },
//! ]
//! ```
//!
//! A schedule is a pure function of [`Point`]: nothing about it needs to be kept in a checkpoint.

use std::fmt;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Where in the run a value is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// The step, counted from 1: pieces in steps contain their last one.
    pub step: u64,
    /// Tokens trained on before this step.
    pub tokens: u64,
}

/// How a piece goes from `from` to `to`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// Along a straight line.
    #[default]
    Linear,
    /// Along half a period of a cosine, flat at both ends.
    Cosine,
}

/// A piece of a schedule: `value`, or a way `from` .. `to`, until its end.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Piece {
    /// Last step of the piece, counted from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_step: Option<u64>,
    /// The piece holds for steps that begin before this many tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_tokens: Option<f64>,
    /// As `until_step`, as a share of the run's steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_fraction: Option<f64>,
    /// The value all along; instead of `from` and `to`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<f64>,
    /// The value at the beginning of a ramp.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<f64>,
    /// The value at the end of a ramp.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<f64>,
    /// How the ramp goes between them.
    #[serde(default)]
    pub shape: Shape,
}

/// A number that changes over the run.
#[derive(Clone, Debug, PartialEq)]
pub enum Schedule {
    /// The same value at every step.
    Constant(f64),
    /// Piece after piece; behind the last one its last value.
    Pieces(Vec<Piece>),
}

impl Serialize for Schedule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Schedule::Constant(value) => serializer.serialize_f64(*value),
            Schedule::Pieces(pieces) => pieces.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Schedule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Schedule, D::Error> {
        deserializer.deserialize_any(ScheduleVisitor)
    }
}

struct ScheduleVisitor;

impl<'de> Visitor<'de> for ScheduleVisitor {
    type Value = Schedule;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number or a list of pieces such as { until_step = 10, value = 1.0 }")
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Schedule, E> {
        Ok(Schedule::Constant(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Schedule, E> {
        Ok(Schedule::Constant(value as f64))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Schedule, E> {
        Ok(Schedule::Constant(value as f64))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Schedule, A::Error> {
        let mut pieces = Vec::new();
        while let Some(piece) = seq.next_element()? {
            pieces.push(piece);
        }
        Ok(Schedule::Pieces(pieces))
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Step(f64),
    Tokens(f64),
    Never,
}

/// A schedule whose pieces have been checked and whose shares of the run are steps.
#[derive(Clone, Debug, PartialEq)]
pub struct Resolved {
    pieces: Vec<(End, f64, f64, f64, Shape)>,
}

impl Schedule {
    /// The numbers that the schedule states: values, and both ends of every ramp.
    pub fn stated(&self) -> Vec<f64> {
        match self {
            Schedule::Constant(value) => vec![*value],
            Schedule::Pieces(pieces) => {
                pieces.iter().flat_map(|p| [p.value, p.from, p.to]).flatten().collect()
            }
        }
    }

    /// Checks the pieces; `steps` is the length of the run, where it is known in steps.
    ///
    /// # Errors
    /// The number of the piece and what is wrong with it.
    pub fn resolve(&self, steps: Option<u64>) -> Result<Resolved, (usize, String)> {
        let pieces = match self {
            Schedule::Constant(value) => {
                vec![Piece { value: Some(*value), ..Piece::default() }]
            }
            Schedule::Pieces(pieces) if pieces.is_empty() => {
                return Err((0, "expected at least one piece, found none".into()));
            }
            Schedule::Pieces(pieces) => pieces.clone(),
        };
        let mut resolved: Vec<(End, f64, f64, f64, Shape)> = Vec::new();
        for (i, piece) in pieces.iter().enumerate() {
            let wrong = |message: &str| Err((i, message.to_owned()));
            let end = match (piece.until_step, piece.until_tokens, piece.until_fraction) {
                (Some(step), None, None) => End::Step(step as f64),
                (None, Some(tokens), None) => End::Tokens(tokens),
                (None, None, Some(fraction)) => match steps {
                    Some(steps) => End::Step((fraction * steps as f64).round()),
                    None => return wrong("until_fraction needs a run with a number of steps"),
                },
                (None, None, None) if i + 1 == pieces.len() => End::Never,
                (None, None, None) => {
                    return wrong(
                        "only the last piece may have no end; expected until_step, \
                        until_tokens or until_fraction",
                    );
                }
                _ => return wrong("expected one of until_step, until_tokens, until_fraction"),
            };
            let (from, to) = match (piece.value, piece.from, piece.to) {
                (Some(value), None, None) => (value, value),
                (None, Some(from), Some(to)) => (from, to),
                _ => return wrong("expected either value, or from and to"),
            };
            if [from, to].iter().any(|x| !x.is_finite()) {
                return wrong("expected finite numbers");
            }
            // A ramp is measured from the end of the piece before, so it needs the same unit.
            let start = match (end, resolved.last().map(|p| p.0)) {
                (End::Step(_), None) | (End::Tokens(_), None) | (End::Never, _) => 0.0,
                (End::Step(_), Some(End::Step(s))) | (End::Tokens(_), Some(End::Tokens(s))) => s,
                _ if from == to => 0.0,
                _ => return wrong("a ramp must end in the unit in which the piece before ends"),
            };
            if end == End::Never && from != to {
                return wrong("a ramp needs an end");
            }
            // In a short run a share may end before the piece before it: it is then never reached.
            let share = piece.until_fraction.is_some();
            if !share && matches!(end, End::Step(e) | End::Tokens(e) if e < start) {
                return wrong("it ends before it begins");
            }
            resolved.push((end, start, from, to, piece.shape));
        }
        Ok(Resolved { pieces: resolved })
    }
}

impl Resolved {
    /// The value at a point. Along a ramp it is `from + (to - from) w` with
    /// `w = (x - start) / (end - start)` (cosine: `(1 - cos(pi w)) / 2`), x the step or the tokens.
    pub fn at(&self, point: Point) -> f64 {
        let (step, tokens) = (point.step as f64, point.tokens as f64);
        for &(end, start, from, to, shape) in &self.pieces {
            let (x, end) = match end {
                End::Step(end) if step <= end => (step, end),
                End::Tokens(end) if tokens < end => (tokens, end),
                End::Never => return to,
                _ => continue,
            };
            if from == to || end == start {
                return to;
            }
            let w = (x - start) / (end - start);
            return match shape {
                Shape::Linear => from + (to - from) * w,
                Shape::Cosine => {
                    from + (to - from) * (0.5 - 0.5 * (std::f64::consts::PI * w).cos())
                }
            };
        }
        self.pieces.last().expect("at least one piece").3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(toml: &str) -> Schedule {
        #[derive(Deserialize)]
        struct Table {
            x: Schedule,
        }
        toml::from_str::<Table>(&format!("x = {toml}")).unwrap().x
    }

    fn at(schedule: &Resolved, step: u64, tokens: f64) -> f64 {
        schedule.at(Point { step, tokens: tokens as u64 })
    }

    #[test]
    fn pieces_follow_each_other_in_steps_and_in_tokens() {
        let s = schedule(
            "[{ until_step = 10, from = 0.0, to = 1.0 }, { until_tokens = 100.0, value = 1.0 },
              { until_tokens = 200.0, from = 1.0, to = 0.0, shape = \"cosine\" }]",
        );
        let s = s.resolve(None).unwrap();
        assert_eq!((at(&s, 1, 0.0), at(&s, 10, 50.0), at(&s, 11, 60.0)), (0.1, 1.0, 1.0));
        assert!((at(&s, 12, 150.0) - 0.5).abs() < 1e-15);
        assert_eq!((at(&s, 13, 100.0), at(&s, 14, 5e9)), (1.0, 0.0));
        assert_eq!(at(&schedule("3").resolve(None).unwrap(), 7, 1.0), 3.0);
    }

    #[test]
    fn shares_are_of_the_runs_steps() {
        let s = schedule("[{ until_fraction = 0.5, value = 2 }, { value = 1 }]");
        let resolved = s.resolve(Some(8)).unwrap();
        assert_eq!((at(&resolved, 4, 0.0), at(&resolved, 5, 0.0)), (2.0, 1.0));
        assert!(s.resolve(None).unwrap_err().1.contains("number of steps"));
        // A warm-up longer than the share behind it.
        let s = schedule(
            "[{ until_step = 6, from = 0, to = 6 }, { until_fraction = 0.5, value = 6 },
              { until_fraction = 1.0, from = 6, to = 0 }]",
        );
        let resolved = s.resolve(Some(8)).unwrap();
        assert_eq!([4, 6, 7, 8].map(|step| at(&resolved, step, 0.0)), [4.0, 6.0, 1.5, 0.0]);
    }

    #[test]
    fn contradictions_name_the_piece() {
        let wrong = |toml: &str| schedule(toml).resolve(Some(10)).unwrap_err();
        assert_eq!(wrong("[]").0, 0);
        assert_eq!(wrong("[{ value = 1 }, { value = 2 }]").0, 0);
        assert_eq!(wrong("[{ until_step = 2, value = 1 }, { from = 1, to = 2 }]").0, 1);
        let mixed = "[{ until_step = 2, value = 1 }, { until_tokens = 9.0, from = 1, to = 2 }]";
        assert!(wrong(mixed).1.contains("unit"));
        assert!(wrong("[{ until_step = 2, until_tokens = 1.0, value = 1 }]").1.contains("one of"));
        let backwards = "[{ until_step = 5, value = 1 }, { until_step = 2, from = 1, to = 2 }]";
        assert!(wrong(backwards).1.contains("before"));
        assert!(wrong("[{ value = 1, from = 2 }]").1.contains("either"));
    }
}
