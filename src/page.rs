//! What the self-contained HTML pages of `emulate` and `conform` have in common.

/// Colours follow the reader's system.
const STYLE: &str = "
:root { color-scheme: light dark; --line: #8884; --bad: #c33; --good: #393; --warn: #a60; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child, .words { text-align: left; }
td { vertical-align: baseline; }
td.part { padding-left: 1.6rem; }
td:first-child { font-family: ui-monospace, monospace; overflow-wrap: anywhere; min-width: 10rem; }
td small { display: block; opacity: .65; }
tr.total { font-weight: 600; }
.bad { color: var(--bad); } .good { color: var(--good); } .warn { color: var(--warn); }
pre { border-left: 3px solid var(--bad); padding: .5rem .8rem; margin: .6rem 0;
      white-space: pre-wrap; overflow-wrap: anywhere; }
p.why { margin: 0 0 1rem .9rem; }
";

/// Text as HTML.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A number with spaces between its thousands.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

/// The beginning of a page, up to its heading.
pub fn begin(title: &str, heading: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>{}</title>\n<style>{STYLE}</style>\n<h1>{}</h1>\n",
        escaped(title),
        escaped(heading),
    )
}
