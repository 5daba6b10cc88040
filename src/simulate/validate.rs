//! `fathom simulate validate`: published figures beside predictions.

use fathom_conformance::inference::InferenceCode;
use fathom_simulator::validate::{Role, Validation, number, serving, validate};

use super::parts;
use crate::output::{self, Outcome};

/// Print every published figure that can be predicted, the prediction and the error
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom simulate validate
  fathom simulate validate --markdown
  fathom simulate validate --json
  fathom simulate validate --strict

--json: {rows: [{section, figure, unit, published, predicted, error, role, goal, goal_points, met, note}], goals, met}.
A figure marked 'fitted' was used to fit a constant. --strict exits with 1 where a goal is missed.")]
pub struct Args {
    #[command(flatten)]
    cost: parts::CostArgs,
    /// Print one JSON document
    #[arg(long, conflicts_with = "markdown")]
    json: bool,
    /// Print Markdown tables
    #[arg(long)]
    markdown: bool,
    /// Exit with 1 where a goal is missed
    #[arg(long)]
    strict: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    let cost = args.cost.model()?;
    let mut rows = validate(&cost)?.rows;
    rows.extend(serving(&InferenceCode, cost.constants)?);
    let v = Validation::of(rows);
    if args.json {
        output::print_json(&v)?;
    } else if args.markdown {
        out!("{}", v.markdown());
    } else {
        let mut sections: Vec<&str> = v.rows.iter().map(|r| r.section).collect();
        sections.dedup();
        for section in sections {
            outln!("{section}");
            let rows = v.rows.iter().filter(|r| r.section == section).map(|r| {
                let mark = match (r.goal.is_some(), r.met) {
                    (true, false) => format!("missed {}", r.goal_text()),
                    (true, true) => format!("within {}", r.goal_text()),
                    _ => String::new(),
                };
                let fitted = if r.role == Role::Fitted { "fitted" } else { "" };
                vec![
                    format!("  {}", r.figure),
                    number(r.published),
                    number(r.predicted),
                    r.unit.to_string(),
                    r.error_text(),
                    mark,
                    fitted.to_string(),
                ]
            });
            let header = ["", "published", "ours", "", "error", "goal", ""];
            outln!("{}\n", output::table(&header, &[1, 2, 4], rows.collect()));
        }
        outln!("{} of {} figures with a goal are within it", v.met, v.goals);
        for r in v.rows.iter().filter(|r| !r.met) {
            outln!("  missed: {}: {} ({})", r.section, r.figure, r.error_text());
            if !r.note.is_empty() {
                outln!("    {}", r.note);
            }
        }
    }
    Ok(if args.strict && v.met < v.goals { Outcome::Fails } else { Outcome::Holds })
}
