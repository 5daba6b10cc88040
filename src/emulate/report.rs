//! A run as one self-contained HTML page: launches, time, instructions, tensor-core work and
//! findings by kernel, and which kernels' bits are exact.

use std::fmt::Write;

use fathom_libcuda::{Summary, Totals};

use crate::page::{begin, escaped, grouped};

/// Whether a kernel's bits are exact, in words, and the class of its cell.
fn bits(totals: &Totals) -> (String, &'static str) {
    if totals.approximate.is_empty() {
        return ("exact".to_owned(), "good");
    }
    let list = totals.approximate.iter().map(|(name, n)| format!("{} of {name}", grouped(*n)));
    (format!("approximate: {}", list.collect::<Vec<_>>().join(", ")), "warn")
}

fn row(class: &str, name: &str, t: &Totals, findings: usize, bits: (&str, &str)) -> String {
    format!(
        "<tr class=\"{class}\"><td>{}</td><td>{}</td><td>{:.3}</td><td>{}</td><td>{:.3}</td>\
         <td class=\"{}\">{findings}</td><td class=\"words {}\">{}</td></tr>\n",
        escaped(name),
        grouped(t.launches),
        t.host_seconds,
        grouped(t.thread_instructions),
        t.tensor_core_flops as f64 / 1e9,
        if findings == 0 { "" } else { "bad" },
        bits.1,
        escaped(bits.0),
    )
}

/// The page of a run of `command` on a device.
pub fn page(summary: &Summary, command: &str, gpu: &str, check: &str) -> String {
    let mut out = begin(&format!("fathom emulate: {command}"), "fathom emulate");
    write!(
        out,
        "<p><code>{}</code><br>emulated {}, checks: {}</p>\n",
        escaped(command),
        escaped(gpu),
        if check.is_empty() { "those that are always on".to_owned() } else { escaped(check) },
    )
    .expect("writing to a String");
    let verdict = match (summary.findings.len(), summary.errors.len()) {
        (0, 0) => "<p class=\"good\">No finding; everything ran.</p>\n".to_owned(),
        (found, failed) => format!(
            "<p class=\"bad\">{found} findings; {failed} launches or modules could not run.</p>\n"
        ),
    };
    out += &verdict;
    out += "<h2>Kernels</h2>\n<div class=\"scroll\"><table>\n<thead><tr><th>kernel</th><th>launches</th>\
            <th>host seconds</th><th>thread instructions</th><th>tensor-core GFLOP</th><th>findings</th>\
            <th>bits</th></tr></thead>\n<tbody>\n";
    let mut kernels: Vec<_> = summary.kernels.iter().collect();
    kernels.sort_by(|a, b| b.1.host_seconds.total_cmp(&a.1.host_seconds));
    let mut all = Totals::default();
    for (name, totals) in kernels {
        let findings = summary.findings.iter().filter(|f| f.kernel == *name).count();
        let (words, class) = bits(totals);
        out += &row("", name, totals, findings, (&words, class));
        all.launches += totals.launches;
        all.host_seconds += totals.host_seconds;
        all.thread_instructions += totals.thread_instructions;
        all.tensor_core_flops += totals.tensor_core_flops;
    }
    out += &row("total", "all", &all, summary.findings.len(), ("", ""));
    out += "</tbody></table></div>\n";
    if !summary.findings.is_empty() {
        out += "<h2>Findings</h2>\n";
    }
    for finding in &summary.findings {
        write!(
            out,
            "<pre>{}</pre>\n<p class=\"why\">Why it matters: {}.<br>To silence it: {}.</p>\n",
            escaped(&finding.to_string()),
            escaped(finding.kind.why()),
            escaped(finding.to_silence())
        )
        .expect("writing to a String");
    }
    if !summary.errors.is_empty() {
        out += "<h2>Could not run</h2>\n";
    }
    for error in &summary.errors {
        writeln!(out, "<pre>{}</pre>", escaped(error)).expect("writing to a String");
    }
    out + "</html>\n"
}
