//! A run as one self-contained HTML page: the numbers as JSON inside `page.html`, which draws them.

use serde::Serialize;

use super::config::ServeScenario;
use super::metrics::Sample;
use super::plan::Plan;
use super::run::ServeReport;
use crate::outputs::page::fill;

const TEMPLATE: &str = include_str!("page.html");

/// Points of a curve.
const POINTS: usize = 400;

#[derive(Serialize)]
struct Page<'a> {
    report: &'a ServeReport,
    plan: Option<&'a Plan>,
    subtitle: String,
    /// `(key, value)` of the run.
    facts: Vec<(&'static str, String)>,
    /// By pool: seconds, requests of a rank, requests that wait, share of the pages.
    curves: Vec<Vec<[f64; 4]>>,
    warmup_s: f64,
    duration_s: f64,
}

/// The page of a run, with the plan for a load where one was made.
pub fn page(s: &ServeScenario, report: &ServeReport, plan: Option<&Plan>) -> String {
    let length = |l: &Option<super::config::Length>| {
        l.map_or("of the trace".into(), |l| format!("{} (deviation {} of it)", l.mean, l.cv))
    };
    let w = &s.workload;
    let arrivals = match (w.rate_per_s, w.concurrency) {
        (Some(rate), _) => format!("{rate} a second, at random"),
        (_, Some(n)) => format!("{n} at once"),
        _ => "a trace".into(),
    };
    let page = Page {
        report,
        plan,
        subtitle: format!("{} on {}", s.model.name, s.cluster.gpu.name),
        facts: vec![
            ("requests", arrivals),
            ("prompt", length(&w.prompt)),
            ("answer", length(&w.output)),
            ("drafts a step", s.mtp.drafts.to_string()),
            ("precision", format!("{:?}", s.precision).to_lowercase()),
            ("page", format!("{} tokens", s.memory.page_tokens)),
        ],
        curves: (0..report.pools.len()).map(|p| curve(&report.samples, p, s.duration_s)).collect(),
        warmup_s: s.warmup_s,
        duration_s: s.duration_s,
    };
    fill(TEMPLATE, &page)
}

/// Means of the samples of a pool in slices of the run.
fn curve(samples: &[Sample], pool: usize, duration_s: f64) -> Vec<[f64; 4]> {
    let slice = duration_s / POINTS as f64;
    let mut sums = vec![[0.0; 4]; POINTS];
    for s in samples.iter().filter(|s| s.pool as usize == pool) {
        let at = ((s.at_s / slice) as usize).min(POINTS - 1);
        for (sum, value) in sums[at].iter_mut().zip([1.0, s.batch, s.queue, s.kv]) {
            *sum += value;
        }
    }
    let point = |(i, [n, batch, queue, kv]): (usize, &[f64; 4])| {
        let round = |x: f64| (x / n * 1e4).round() / 1e4;
        let at = ((i as f64 + 0.5) * slice * 1e3).round() / 1e3;
        (*n > 0.0).then(|| [at, round(*batch), round(*queue), round(*kv)])
    };
    sums.iter().enumerate().filter_map(point).collect()
}
