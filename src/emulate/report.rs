//! A run as one self-contained HTML page: launches, time, instructions, tensor-core work and
//! findings by kernel, and which kernels' bits are exact.

use std::fmt::Write;

use fathom_libcuda::Summary;
use fathom_trace::KernelTotals;

use crate::page::{begin, escaped, grouped};

/// `1 finding`, `3 findings`, `2 launches or modules`.
fn counted(n: usize, what: &str) -> String {
    match (n, what) {
        (1, _) => format!("1 {what}"),
        (_, "launch or module") => format!("{n} launches or modules"),
        _ => format!("{n} {what}s"),
    }
}

/// Whether a kernel's bits are exact, in words, and the class of its cell.
fn bits(totals: &KernelTotals) -> (String, &'static str) {
    if totals.approximate.is_empty() {
        return ("exact".to_owned(), "good");
    }
    let list = totals.approximate.iter().map(|(name, n)| format!("{} of {name}", grouped(*n)));
    (format!("approximate: {}", list.collect::<Vec<_>>().join(", ")), "warn")
}

/// The names that a mangled one begins with (Itanium C++ ABI, 5.1): `_ZN3abc4kernelIfEEvPT_` is
/// `abc::kernel`. `None` where it is not mangled so.
fn plain_name(mangled: &str) -> Option<String> {
    let rest = mangled.strip_prefix("_Z")?;
    let mut rest = rest.strip_prefix('N').unwrap_or(rest);
    let mut parts = Vec::new();
    while rest.starts_with(|c: char| c.is_ascii_digit()) {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let (length, behind) = rest.split_at(digits);
        let length: usize = length.parse().ok()?;
        parts.push(behind.get(..length)?);
        rest = &behind[length..];
    }
    (!parts.is_empty()).then(|| parts.join("::"))
}

/// A kernel's name as a cell has it: of a mangled one what people call it, and the whole below.
fn name_cell(name: &str) -> String {
    match plain_name(name) {
        None => escaped(name),
        Some(plain) => {
            let length = 60;
            let short: String = name.chars().take(length).collect();
            let more = if name.len() > length { "…" } else { "" };
            let (plain, name) = (escaped(&plain), escaped(name));
            format!("{plain}<small title=\"{name}\">{}{more}</small>", escaped(&short))
        }
    }
}

fn row(class: &str, name: &str, t: &KernelTotals, findings: usize, bits: (&str, &str)) -> String {
    format!(
        "<tr class=\"{class}\"><td>{}</td><td>{}</td><td>{:.3}</td><td>{}</td><td>{:.3}</td>\
         <td class=\"{}\">{findings}</td><td class=\"words {}\">{}</td></tr>\n",
        name_cell(name),
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
    writeln!(
        out,
        "<p><code>{}</code><br>emulated {}, checks: {}</p>",
        escaped(command),
        escaped(gpu),
        if check.is_empty() { "those that are always on".to_owned() } else { escaped(check) },
    )
    .expect("writing to a String");
    let verdict = match (summary.findings.len(), summary.errors.len()) {
        (0, 0) => "<p class=\"good\">No finding; everything ran.</p>\n".to_owned(),
        (found, failed) => {
            let found = (found > 0).then(|| counted(found, "finding"));
            let failed = (failed > 0)
                .then(|| format!("{} could not run", counted(failed, "launch or module")));
            let words: Vec<String> = found.into_iter().chain(failed).collect();
            format!("<p class=\"bad\">{}.</p>\n", words.join("; "))
        }
    };
    out += &verdict;
    out += "<h2>Kernels</h2>\n<div class=\"scroll\"><table>\n<thead><tr><th>kernel</th><th>launches</th>\
            <th>host seconds</th><th>thread instructions</th><th>tensor-core GFLOP</th><th>findings</th>\
            <th class=\"words\">bits</th></tr></thead>\n<tbody>\n";
    let mut kernels: Vec<_> = summary.kernels.iter().collect();
    kernels.sort_by(|a, b| b.1.host_seconds.total_cmp(&a.1.host_seconds));
    let mut all = KernelTotals::default();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_called_as_people_call_them() {
        let plain = |mangled: &str| plain_name(mangled);
        assert_eq!(plain("_Z6kernelPfi").as_deref(), Some("kernel"));
        assert_eq!(plain("_ZN3abc4gemmIfEEvPT_").as_deref(), Some("abc::gemm"));
        // Numba's: a module, a function, and what the ABI does not know behind it.
        assert_eq!(plain("_ZN8__main__3addB2v1B104cw51").as_deref(), Some("__main__::add"));
        for other in ["matmul_kernel", "_Z", "_Z99short", "_ZN", "_Z4äb"] {
            assert_eq!(plain(other), None, "{other}");
        }
    }
}
