//! The diagnosis as a self-contained HTML page: verdict, cause, hypotheses, K blocks, map of
//! mismatches, histogram.

use super::hypothesis::KBlocks;
use super::{Diagnosis, Map, grouped};

const STYLE: &str = "
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--line:#d6dae0;--soft:#5b6470;--bad:#c2361c;--bar:#2f6fb5}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ee;--paper:#15181d;--line:#39404a;--soft:#9aa4b1;--bad:#ff7a5c;--bar:#6aa7e8}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.3rem}h2{font-size:1.05rem;margin-top:2rem}
.verdict{border-left:4px solid var(--bar);padding:.4rem .8rem;font-size:1.05rem}
.verdict.open{border-color:var(--bad)}
table{border-collapse:collapse;width:100%}td,th{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem}dt{color:var(--soft)}dd{margin:0}
svg{max-width:100%;height:auto;display:block}.note{color:var(--soft)}
.frame{fill:none;stroke:var(--line)}.bad{fill:var(--bad)}.bar{fill:var(--bar)}text{fill:var(--ink);font:12px system-ui,sans-serif}
";

/// Cells of the map along its longer side; larger matrices are shown in blocks.
const CELLS: usize = 96;

/// The page; `title` names the case file.
pub fn page(title: &str, d: &Diagnosis) -> String {
    let class = if d.explained { "verdict" } else { "verdict open" };
    let mut html = format!(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport \
         content='width=device-width'><title>{title}: diagnosis</title><style>{STYLE}</style>\
         <h1>{title}</h1><p class='{class}'>{verdict}</p>\
         <p class=note>{op}: {elements} elements, {mismatches} differ from the contract's output; \
         {tried} hypotheses tried on {examined} elements.</p>",
        title = escape(title),
        verdict = escape(&d.verdict),
        op = escape(&d.op),
        elements = grouped(d.elements),
        mismatches = grouped(d.mismatches),
        tried = grouped(d.tried),
        examined = grouped(d.examined),
    );
    html += &cause(d);
    html += &hypotheses(d);
    if let Some(k) = &d.k_blocks {
        html += &format!(
            "<h2>Along K</h2><p class=note>Weight of each block of {} elements of K in the file; 1 is \
             right, 0 missing, 2 twice. The weights account for {:.1} % of the difference.</p>",
            k.block,
            100.0 * k.accounts_for
        );
        html += &bars(k);
    }
    if let Some(region) = &d.region {
        html += &format!(
            "<h2>Where {} differs from the contract</h2><p class=note>The differing elements {}.</p>",
            escape(&region.tensor),
            escape(&region.words())
        );
        html += &heat_map(&d.map);
    }
    if !d.ulp_histogram.is_empty() {
        html += "<h2>How far the differing elements are off</h2>";
        html += &histogram(&d.ulp_histogram);
    }
    html
}

/// Cause, meaning and where it was seen, as a list.
fn cause(d: &Diagnosis) -> String {
    let Some(cause) = &d.cause else { return String::new() };
    let mut html = format!("<h2>Cause</h2><dl><dt>what<dd>{}", escape(&cause.name));
    html += &format!("<dt>meaning<dd>{}", escape(&cause.meaning));
    if !cause.seen.is_empty() {
        html += &format!("<dt>seen in<dd>{}", escape(&cause.seen));
    }
    html + "</dl>"
}

fn hypotheses(d: &Diagnosis) -> String {
    let mut html = "<h2>Hypotheses</h2><table><tr><th>arithmetic<th class=n>agree\
                    <th class=n>of the differing<th class=n>by chance"
        .to_owned();
    for h in &d.hypotheses {
        let chance = if h.deviations.is_empty() {
            String::new()
        } else {
            format!("{:.1} %", 100.0 * h.chance)
        };
        let meanings: Vec<&str> = h.hypotheses.iter().map(|h| h.meaning).collect();
        html += &format!(
            "<tr title='{}'><td>{}<td class=n>{}<td class=n>{}<td class=n>{chance}",
            escape(&meanings.join(" ")),
            escape(&h.words()),
            grouped(h.agree),
            grouped(h.agree_of_mismatched)
        );
    }
    html + "</table>"
}

/// A bar for each K block's weight, around the line of 1.
fn bars(k: &KBlocks) -> String {
    const HEIGHT: f64 = 160.0;
    let weights: Vec<f64> = k.coefficients.iter().map(|c| 1.0 + c).collect();
    let top = weights.iter().fold(2.0f64, |m, w| m.max(*w)).min(8.0);
    let bottom = weights.iter().fold(0.0f64, |m, w| m.min(*w)).max(-8.0);
    let y = |w: f64| HEIGHT * (top - w.clamp(bottom, top)) / (top - bottom);
    let step = (600 / weights.len().max(1)).clamp(2, 40);
    let width = step * weights.len();
    let mut svg = format!(
        "<svg viewBox='-40 -12 {} {}' width={} role=img aria-label='weight of each K block'>",
        width + 60,
        HEIGHT + 36.0,
        width + 60
    );
    for line in [0.0, 1.0, 2.0] {
        svg += &format!(
            "<line class=frame x1=0 x2={width} y1={at:.1} y2={at:.1} /><text x=-6 y={:.1} \
             text-anchor=end>{line}</text>",
            y(line) + 4.0,
            at = y(line),
        );
    }
    for (b, &w) in weights.iter().enumerate() {
        let class = if k.off.contains(&b) { "bad" } else { "bar" };
        let (high, low) = (y(w.max(0.0)), y(w.min(0.0)));
        svg += &format!(
            "<rect class={class} x={} y={high:.1} width={} height={:.1}><title>K block {b}: \
             {w:.4}</title></rect>",
            b * step,
            (step - 1).max(1),
            (low - high).max(1.0)
        );
    }
    let last = weights.len().saturating_sub(1);
    svg + &format!(
        "<text x=0 y={at}>block 0</text><text x={width} y={at} text-anchor=end>{last}</text></svg>",
        at = HEIGHT + 18.0
    )
}

fn heat_map(map: &Map) -> String {
    let block = map.rows.max(map.columns).div_ceil(CELLS).max(1);
    let (rows, columns) = (map.rows.div_ceil(block), map.columns.div_ceil(block));
    let mut counts = vec![0usize; rows * columns];
    for (i, _) in map.differs.iter().enumerate().filter(|(_, d)| **d) {
        counts[i / map.columns / block * columns + i % map.columns / block] += 1;
    }
    let cell = (640 / rows.max(columns)).clamp(2, 12);
    let (width, height) = (columns * cell, rows * cell);
    let mut svg = format!(
        "<svg viewBox='-40 -20 {} {}' width={} role=img aria-label='map of mismatches'>\
         <rect class=frame x=0 y=0 width={width} height={height} />\
         <text x=0 y=-6>column 0</text><text x={width} y=-6 text-anchor=end>{}</text>\
         <text x=-4 y=10 text-anchor=end>row 0</text><text x=-4 y={height} text-anchor=end>{}</text>",
        width + 60,
        height + 30,
        width + 60,
        map.columns - 1,
        map.rows - 1,
    );
    for (i, &count) in counts.iter().enumerate().filter(|(_, c)| **c > 0) {
        let (r, c) = (i / columns, i % columns);
        let inside = (map.rows - r * block).min(block) * (map.columns - c * block).min(block);
        svg += &format!(
            "<rect class=bad x={} y={} width={cell} height={cell} fill-opacity={:.2}><title>rows \
             {}.., columns {}..: {count} of {inside}</title></rect>",
            c * cell,
            r * cell,
            0.25 + 0.75 * count as f64 / inside as f64,
            r * block,
            c * block,
        );
    }
    svg += "</svg>";
    if block > 1 {
        svg += &format!("<p class=note>A cell is {block} x {block} elements.</p>");
    }
    svg
}

fn histogram(buckets: &[(u64, usize)]) -> String {
    let most = buckets.iter().map(|b| b.1).max().unwrap_or(1);
    let mut svg = format!(
        "<svg viewBox='0 0 640 {h}' width=640 role=img aria-label='histogram of distances'>",
        h = 22 * buckets.len() + 4
    );
    for (i, &(ulp, count)) in buckets.iter().enumerate() {
        let y = 22 * i;
        let label = match ulp {
            u64::MAX => "NaN against number".to_owned(),
            1 => "1 ulp".to_owned(),
            _ => format!("up to {} ulp", grouped(ulp as usize)),
        };
        svg += &format!(
            "<text x=170 y={} text-anchor=end>{label}</text><rect class=bar x=180 y={} width={} \
             height=16 /><text x={} y={}>{}</text>",
            y + 14,
            y + 2,
            380 * count / most + 1,
            188 + 380 * count / most,
            y + 14,
            grouped(count)
        );
    }
    svg + "</svg>"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('\'', "&#39;")
}
