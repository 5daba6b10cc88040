//! A step as one self-contained HTML page: the numbers as JSON inside `page.html`, which draws
//! them.

use fathom_schedule::Op;
use fathom_schedule::draw::op_text;
use serde::Serialize;

use super::sensitivity::{FACTOR, Input, Wish, inputs, wishes};
use crate::error::SimError;
use crate::hardware::cluster::Cluster;
use crate::memory::Categories;
use crate::network::topology;
use crate::outputs::page::fill;
use crate::parallel::CostModel;
use crate::step::{Simulation, StepReport, WholeRun};

const TEMPLATE: &str = include_str!("page.html");

/// Points of the memory curve.
const CURVE_POINTS: usize = 600;

/// What the page shows.
#[derive(Debug, Serialize)]
struct Page<'a> {
    report: &'a StepReport,
    run: &'a WholeRun,
    subtitle: String,
    /// `(key, value)` of the layout and the run.
    facts: Vec<(&'static str, String)>,
    /// By rank: `[kind, start, end, label]`.
    timeline: Vec<Vec<(u8, f64, f64, String)>>,
    /// By rank: bubble, exposed communication, busy compute, seconds.
    ranks: Vec<(f64, f64, f64)>,
    memory: Vec<Categories>,
    capacity: f64,
    fullest: usize,
    curve: Vec<(f64, f64)>,
    inputs: Vec<Input>,
    wishes: Vec<Wish>,
    topology: Topology,
}

/// The network of a cluster in numbers, as the page draws it and `--json` gives it.
#[derive(Debug, Serialize)]
pub struct Topology {
    /// Its kind, as the code calls it.
    pub kind: String,
    /// Planes that do not meet.
    pub planes: u64,
    /// GPUs of a node.
    pub gpus_per_node: u64,
    /// NICs of a node.
    pub nics_per_node: u64,
    /// Nodes of the cluster.
    pub nodes: u64,
    /// Switches of all layers.
    pub switches: u64,
    /// Links between switches.
    pub links: u64,
    /// Switches and links in dollars, at published prices.
    pub cost_usd: f64,
    /// Scale-up link of a GPU, one direction, GB/s.
    pub scale_up_gb_s: f64,
    /// A NIC, one direction, GB/s.
    pub nic_gb_s: f64,
}

/// The page of a step and the run that it is part of. `model` answers what the step would take with
/// other numbers.
pub fn page(sim: &Simulation, run: &WholeRun, model: &dyn CostModel) -> Result<String, SimError> {
    let s = &sim.scenario;
    let p = &s.parallel;
    let (fullest, _) = sim.memory.fullest();
    let ranks = sim.outcome.ranks.iter();
    let page = Page {
        report: &sim.report,
        run,
        subtitle: format!("{} on {} x {}", s.model.name, s.cluster.gpus, s.cluster.gpu.name),
        facts: vec![
            ("schedule", s.schedule.name().to_string()),
            ("pp", p.pp.to_string()),
            ("tp", p.tp.to_string()),
            ("cp", p.cp.to_string()),
            ("ep", p.ep.to_string()),
            ("dp", p.dp.to_string()),
            ("ZeRO", p.zero.to_string()),
            ("micro-batches", s.micro_batches().to_string()),
            ("sequence", s.training.seq_len.to_string()),
            ("precision", format!("{:?}", s.training.precision).to_lowercase()),
            ("recompute", format!("{:?}", s.training.recompute).to_lowercase()),
            ("software", s.stack.name.clone()),
            ("SMs for communication", s.comm_sms.to_string()),
        ],
        timeline: timeline(sim),
        ranks: ranks.map(|r| (r.breakdown.bubble, r.exposed_s, r.compute_s)).collect(),
        memory: sim.memory.ranks.iter().map(|r| r.peak).collect(),
        capacity: sim.memory.capacity_bytes,
        fullest,
        curve: thinned(&sim.memory.ranks[fullest].over_time),
        inputs: inputs(s, model, FACTOR)?,
        wishes: wishes(s, model)?,
        topology: topology_of(&s.cluster),
    };
    Ok(fill(TEMPLATE, &page))
}

fn timeline(sim: &Simulation) -> Vec<Vec<(u8, f64, f64, String)>> {
    let rank = |(rank, ops): (usize, &Vec<Op>)| {
        let spans = &sim.outcome.ranks[rank].instructions;
        let entry = |(&op, &(start, end)): (&Op, &(f64, f64))| {
            let kind = match op {
                Op::F(_) => 0,
                Op::B(_) => 1,
                Op::Bi(_) => 2,
                Op::W(_) => 3,
                Op::FB { .. } => 4,
            };
            (kind, round(start), round(end), op_text(op))
        };
        let mut entries: Vec<_> = ops.iter().zip(spans).map(entry).collect();
        let [start, meet, _, end] = sim.outcome.ranks[rank].tail;
        let reduced = start + sim.times.tail[rank].grad_reduce_s;
        entries.push((5, round(start), round(reduced), "gradient reduction".into()));
        entries.push((5, round(meet), round(end), "optimizer, parameter gather".into()));
        entries
    };
    sim.schedule.ranks.iter().enumerate().map(rank).collect()
}

/// Microseconds are enough for a picture.
fn round(seconds: f64) -> f64 {
    (seconds * 1e6).round() / 1e6
}

/// At most [`CURVE_POINTS`] points that keep every slice's peak.
fn thinned(curve: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let slice = curve.len().div_ceil(CURVE_POINTS).max(1);
    let peak =
        |points: &[(f64, f64)]| points.iter().copied().reduce(|a, b| if b.1 > a.1 { b } else { a });
    curve.chunks(slice).filter_map(peak).map(|(t, b)| (round(t), b.round())).collect()
}

/// The network of `c`.
pub fn topology_of(c: &Cluster) -> Topology {
    let n = &c.network;
    let nodes = c.gpus / c.gpus_per_node;
    let size = topology::for_nics(n.topology, n.switch_ports, n.planes, nodes * n.nics_per_node);
    Topology {
        kind: format!("{:?}", n.topology),
        planes: n.planes,
        gpus_per_node: c.gpus_per_node,
        nics_per_node: n.nics_per_node,
        nodes,
        switches: size.switches,
        links: size.links,
        cost_usd: topology::NetworkPrices::PUBLISHED.cost_usd(size),
        scale_up_gb_s: c.gpu.scale_up_bytes_per_s / 1e9,
        nic_gb_s: n.nic_bytes_per_s / 1e9,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Scenario;
    use crate::events::Detail;
    use crate::first_principles::FirstPrinciples;
    use crate::model_code::ModelCode;
    use crate::step::{simulate, whole_run};

    #[test]
    fn the_page_holds_its_data_and_refers_to_nothing_outside() {
        let set = ["name=\"</script><b>\"".to_string()];
        let s = Scenario::preset("deepseek-v3-h800-2048", &set).unwrap();
        let model = FirstPrinciples::new(ModelCode);
        let sim = simulate(&s, &model, Detail::Instructions).unwrap();
        let run = whole_run(&s, &sim.report, &model).unwrap();
        let page = page(&sim, &run, &model).unwrap();
        assert!(!page.contains("/*DATA*/") && !page.contains("/*STYLE*/"));
        assert!(page.contains("prefers-color-scheme: dark"));
        for outside in ["http://", "https://", "src=", "@import", "url("] {
            assert!(!page.contains(outside), "the page refers to {outside}");
        }
        let (_, rest) = page.split_once("const D = ").unwrap();
        let (json, _) = rest.split_once(";\nconst $").unwrap();
        let data: serde_json::Value = serde_json::from_str(json).unwrap();
        assert_eq!(data["report"]["name"], "</script><b>");
        assert_eq!(data["timeline"].as_array().unwrap().len(), 16);
        assert_eq!(data["report"]["stage_layers"].as_array().unwrap().len(), 16);
        assert!(data["run"]["days_with_failures"].as_f64().unwrap() > 1.0);
        assert!(!json.contains("</"));
    }

    #[test]
    fn a_thinned_curve_keeps_its_peak() {
        let curve: Vec<(f64, f64)> =
            (0..5000).map(|i| (i as f64, ((i * 37) % 1000) as f64)).collect();
        let thin = thinned(&curve);
        assert!(thin.len() <= CURVE_POINTS);
        assert!(thin.iter().any(|p| p.1 == 999.0));
    }
}
