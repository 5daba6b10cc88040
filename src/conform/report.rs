//! A run of `fathom conform` as one self-contained HTML page: op by op, with what the kernels of
//! each did, and training runs.

use std::collections::BTreeMap;
use std::fmt::Write;

use fathom_conformance::conform::OpReport;
use fathom_conformance::conform::model::ModelReport;
use fathom_trace::KernelTotals;

use crate::page::{begin, escaped, grouped};

/// An op's verdict, and what its kernels did on the emulated device; nothing is known of that on
/// another.
pub struct OpRow {
    /// The verdict.
    pub report: OpReport,
    /// By kernel.
    pub kernels: BTreeMap<String, KernelTotals>,
}

/// What the page says at its head.
pub struct Head<'a> {
    /// The engine that was held to the reference.
    pub engine: &'a str,
    /// Seed of the cases.
    pub seed: u64,
    /// Whether registers are the emulated driver's estimate.
    pub estimated: bool,
    /// Registers of a thread, by kernel.
    pub registers: &'a BTreeMap<&'static str, u32>,
}

/// The page.
pub fn page(head: &Head<'_>, rows: &[OpRow], models: &[ModelReport]) -> String {
    let mut out = begin("fathom conform", "fathom conform");
    let bad = rows.iter().filter(|row| row.report.failure.is_some()).count()
        + models.iter().filter(|model| model.failure.is_some()).count();
    let (class, verdict) = match bad {
        0 => ("good", "Every bit agrees with the reference.".to_owned()),
        n => ("bad", format!("{n} of {} disagree.", rows.len() + models.len())),
    };
    write!(
        out,
        "<p>{} against the reference, bit by bit; seed {}</p>\n<p class=\"{class}\">{verdict}</p>\n",
        escaped(head.engine),
        head.seed
    )
    .expect("writing to a String");
    if !rows.is_empty() {
        ops(&mut out, head, rows);
    }
    if !models.is_empty() {
        runs(&mut out, models);
    }
    out + "</html>\n"
}

/// A cell with the verdict.
fn verdict(holds: bool) -> &'static str {
    match holds {
        true => "<td class=\"words good\">agrees</td>",
        false => "<td class=\"words bad\">disagrees</td>",
    }
}

fn complaint(out: &mut String, what: Option<&str>, columns: usize) {
    if let Some(what) = what {
        let what = escaped(what);
        writeln!(out, "<tr><td colspan=\"{columns}\" class=\"words\"><pre>{what}</pre></td></tr>")
            .expect("writing to a String");
    }
}

fn ops(out: &mut String, head: &Head<'_>, rows: &[OpRow]) {
    *out += "<h2>Ops</h2>\n<div class=\"scroll\"><table>\n<thead><tr><th>op, its kernels</th>\
             <th>cases</th><th>elements</th><th class=\"words\">bits</th><th>registers</th>\
             <th>launches</th><th>thread instructions</th><th>tensor-core GFLOP</th>\
             <th>bytes read</th><th>bytes written</th><th>bank conflicts</th></tr></thead>\n<tbody>\n";
    for OpRow { report, kernels } in rows {
        let cases = if report.passed == report.cases {
            grouped(report.cases as u64)
        } else {
            format!("{} of {}", report.passed, report.cases)
        };
        writeln!(
            out,
            "<tr class=\"total\"><td>{}</td><td>{cases}</td><td>{}</td>{}<td colspan=\"7\"></td></tr>",
            escaped(report.op),
            grouped(report.elements as u64),
            verdict(report.failure.is_none())
        )
        .expect("writing to a String");
        complaint(out, report.complaint().as_deref(), 11);
        for (name, totals) in kernels {
            let registers = head.registers.get(name.as_str()).map_or(String::new(), u32::to_string);
            writeln!(
                out,
                "<tr><td class=\"part\">{}</td><td colspan=\"3\"></td><td>{registers}</td><td>{}</td>\
                 <td>{}</td><td>{:.3}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
                escaped(name),
                grouped(totals.launches),
                grouped(totals.thread_instructions),
                totals.tensor_core_flops as f64 / 1e9,
                grouped(totals.global_bytes_read),
                grouped(totals.global_bytes_written),
                grouped(totals.bank_conflicts),
            )
            .expect("writing to a String");
        }
    }
    *out += "</tbody></table></div>\n<p>Instructions, bytes and bank conflicts (wavefronts of shared \
             memory beyond the fewest) are the emulated device's counts, summed over all cases; an op \
             without kernels is copies of the driver, or nothing on one rank.";
    if head.estimated {
        *out += " Registers are the emulated driver's estimate, what is live at once: NVIDIA's \
                 assembler may need more or fewer.";
    }
    *out += "</p>\n";
}

fn runs(out: &mut String, models: &[ModelReport]) {
    *out += "<h2>Training runs</h2>\n<div class=\"scroll\"><table>\n<thead><tr><th>run</th>\
             <th>op calls of the first step</th><th>elements</th><th>steps</th>\
             <th>files of the checkpoint</th><th>bytes</th><th class=\"words\">bits</th></tr></thead>\n\
             <tbody>\n";
    for model in models {
        let numbers = [model.calls as u64, model.elements as u64, model.steps];
        let files = [model.files as u64, model.bytes];
        let cells = numbers.into_iter().chain(files).map(|n| format!("<td>{}</td>", grouped(n)));
        writeln!(
            out,
            "<tr><td>{}</td>{}{}</tr>",
            escaped(&model.run),
            cells.collect::<String>(),
            verdict(model.failure.is_none())
        )
        .expect("writing to a String");
        complaint(out, model.failure.as_deref(), 7);
    }
    *out += "</tbody></table></div>\n<p>The first step runs on both op by op; then each side trains by \
             itself, and every step's report and the checkpoint's files (weights, both moments) are \
             compared.</p>\n";
}
