//! How unevenly tokens fall on the ranks of an expert group: drawn from a distribution, or read
//! from a routing trace.
//!
//! Every all-to-all waits for the busiest rank, so what a layer sees is the largest load of the
//! group, relative to the mean. One number per layer and micro-batch goes to the event engine
//! ([`crate::times::StepTimes::expert_load`]).

use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::ExpertLoad;
use crate::error::{SimError, read_table};
use crate::parallel::{PlacedLayer, Placement};
use crate::times::LayerKind;

/// Tokens of every expert, from one of three kinds of files:
///
/// - JSON Lines, `{"layer": 3, "micro_batch": 0, "tokens": [a count an expert]}`;
/// - the JSON Lines log of `fathom train`, whose lines of steps hold
///   `"expert_load": [[layer, [a count an expert]], ...]`: a step is taken for a micro-batch;
/// - a JSON list of lists of counts, one for each layer with routed experts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RoutingTrace {
    file: String,
    records: Vec<RoutingRecord>,
    /// Whether layers are counted from the first with routed experts.
    from_first_routed: bool,
}

/// One layer and micro-batch of a routing trace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoutingRecord {
    /// Transformer layer, from 0.
    pub layer: u64,
    /// Micro-batch, from 0.
    #[serde(default)]
    pub micro_batch: u64,
    /// Tokens of every routed expert.
    pub tokens: Vec<u64>,
}

/// A line of the training log, as far as it matters here.
#[derive(Deserialize)]
struct TrainingStep {
    expert_load: Vec<(u64, Vec<u64>)>,
}

impl RoutingTrace {
    /// Reads a routing trace from a file of one of the three kinds.
    ///
    /// # Errors
    /// [`SimError::Input`] with file and line.
    pub fn read(path: &Path) -> Result<RoutingTrace, SimError> {
        let text = read_table(path)?;
        RoutingTrace::parse(&path.display().to_string(), &text)
    }

    /// The trace that `load` names, or none.
    ///
    /// # Errors
    /// As [`RoutingTrace::read`].
    pub fn of(load: &ExpertLoad) -> Result<RoutingTrace, SimError> {
        load.trace
            .as_ref()
            .map_or(Ok(RoutingTrace::default()), |f| RoutingTrace::read(Path::new(f)))
    }

    /// Parses a routing trace; `file` names it in errors.
    ///
    /// # Errors
    /// As [`RoutingTrace::read`].
    pub fn parse(file: &str, text: &str) -> Result<RoutingTrace, SimError> {
        let mut trace = RoutingTrace { file: file.to_owned(), ..RoutingTrace::default() };
        if text.trim_start().starts_with('[') {
            trace.from_first_routed = true;
            let layers: Vec<Vec<u64>> = serde_json::from_str(text).map_err(|e| {
                SimError::input(file, format!("expected a list of lists of token counts: {e}"))
            })?;
            for (layer, tokens) in (0..).zip(layers) {
                let record = RoutingRecord { layer, micro_batch: 0, tokens };
                trace.add(record, &format!("list {}", layer + 1))?;
            }
        } else {
            trace.parse_lines(text)?;
        }
        if trace.records.is_empty() {
            return Err(SimError::input(file, "no records"));
        }
        Ok(trace)
    }

    fn parse_lines(&mut self, text: &str) -> Result<(), SimError> {
        let mut steps = 0;
        for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
            let place = format!("line {}", number + 1);
            let wrong = |e: &dyn std::fmt::Display| {
                let message = format!("{place}: expected {{layer, micro_batch, tokens}}: {e}");
                SimError::input(&self.file, message)
            };
            let value: Value = serde_json::from_str(line).map_err(|e| wrong(&e))?;
            if value.get("expert_load").is_some() {
                let step: TrainingStep = serde_json::from_value(value).map_err(|e| wrong(&e))?;
                for (layer, tokens) in step.expert_load {
                    self.add(RoutingRecord { layer, micro_batch: steps, tokens }, &place)?;
                }
                steps += 1;
            } else if value.get("kind").is_none() {
                let record = serde_json::from_value(value).map_err(|e| wrong(&e))?;
                self.add(record, &place)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, record: RoutingRecord, place: &str) -> Result<(), SimError> {
        let sum = record.tokens.iter().try_fold(0u64, |sum, &t| sum.checked_add(t));
        if !sum.is_some_and(|sum| (1..1 << 53).contains(&sum)) {
            let message = format!("{place}: expected between 1 and 2^53 tokens in all");
            return Err(SimError::input(&self.file, message));
        }
        self.records.push(record);
        Ok(())
    }

    /// Refuses a trace of a model with another number of experts.
    ///
    /// # Errors
    /// [`SimError::Input`] naming the layer.
    pub fn check(&self, experts: u64) -> Result<(), SimError> {
        match self.records.iter().find(|r| r.tokens.len() as u64 != experts) {
            None => Ok(()),
            Some(r) => {
                let (layer, found) = (r.layer, r.tokens.len());
                let message =
                    format!("layer {layer}: {found} experts, the model has {experts} routed ones");
                Err(SimError::input(&self.file, message))
            }
        }
    }

    /// Whether nothing was traced.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// The record of `layer` and `mb`, or the next smaller ones that there are.
    fn nearest(&self, layer: u64, mb: u64) -> Option<&RoutingRecord> {
        let below = |r: &&RoutingRecord| r.layer <= layer && r.micro_batch <= mb;
        let best = self.records.iter().filter(below).max_by_key(|r| (r.layer, r.micro_batch));
        best.or(self.records.first())
    }
}

/// The load of the busiest rank over the mean, for experts laid out in order on `ep` ranks.
pub fn busiest_rank(tokens: &[u64], ep: usize) -> f64 {
    let per_rank = tokens.len().div_ceil(ep.max(1)).max(1);
    let sums = tokens.chunks(per_rank).map(|c| c.iter().sum::<u64>());
    let total: u64 = tokens.iter().sum();
    sums.max().unwrap_or(0) as f64 * ep.max(1) as f64 / total.max(1) as f64
}

/// Loads by `[layer of all stages' lists][micro-batch]`; empty where balanced. Layers without
/// experts have load 1.
pub fn table(
    load: &ExpertLoad,
    trace: &RoutingTrace,
    placement: &Placement,
    ep: usize,
    micro_batches: usize,
) -> Vec<Vec<f32>> {
    if trace.is_empty() && (load.deviation == 0.0 || ep < 2) {
        return Vec::new();
    }
    let routed = |l: &&PlacedLayer| l.kind == LayerKind::Moe;
    let first = placement.stages.iter().flatten().filter(routed).map(|l| l.index).min();
    let skipped = first.filter(|_| trace.from_first_routed).unwrap_or(0);
    let of = |kind: LayerKind, layer: u64, mb: usize| -> f32 {
        if !matches!(kind, LayerKind::Moe | LayerKind::Mtp) {
            return 1.0;
        }
        match trace.nearest(layer.saturating_sub(skipped), mb as u64) {
            Some(record) => busiest_rank(&record.tokens, ep) as f32,
            None => drawn(load, ep, layer, mb as u64) as f32,
        }
    };
    let layers = placement.stages.iter().flatten();
    layers.map(|l| (0..micro_batches).map(|mb| of(l.kind, l.index, mb)).collect()).collect()
}

/// What a [`table`] of loads comes to over the first micro-batches, by layer; 1 a micro-batch where
/// the table is empty.
#[derive(Debug, Clone, Default)]
pub(crate) struct LoadSums {
    /// By layer: sum, least and greatest of none, one, two... micro-batches.
    layers: Vec<Vec<(f64, f32, f32)>>,
}

impl LoadSums {
    /// Of `rows` by `[layer][micro-batch]`.
    pub(crate) fn new(rows: &[Vec<f32>]) -> LoadSums {
        let of_row = |row: &Vec<f32>| {
            let mut now = (0.0, f32::INFINITY, 0.0f32);
            let next = |&load: &f32| {
                now = (now.0 + f64::from(load), now.1.min(load), now.2.max(load));
                now
            };
            std::iter::once((0.0, f32::INFINITY, 0.0)).chain(row.iter().map(next)).collect()
        };
        LoadSums { layers: rows.iter().map(of_row).collect() }
    }

    /// Sum of a layer's loads over `micro_batches`.
    pub(crate) fn sum(&self, layer: usize, micro_batches: Range<usize>) -> f64 {
        match self.layers.get(layer) {
            Some(row) => row[micro_batches.end].0 - row[micro_batches.start].0,
            None => micro_batches.len() as f64,
        }
    }

    /// Least load of every layer in the first `micro_batches`; empty where the table is.
    pub(crate) fn least(&self, micro_batches: usize) -> Vec<f32> {
        self.layers.iter().map(|row| row[micro_batches].1).collect()
    }

    /// Greatest load of every layer in the first `micro_batches`; empty where the table is.
    pub(crate) fn most(&self, micro_batches: usize) -> Vec<f32> {
        self.layers.iter().map(|row| row[micro_batches].2).collect()
    }
}

/// The largest of `ep` independent draws from a normal distribution around 1, at least 1. One
/// uniform number gives it: the largest of n has the distribution function of one to the n-th
/// power.
fn drawn(load: &ExpertLoad, ep: usize, layer: u64, mb: u64) -> f64 {
    let u = uniform(load.seed, [layer, mb]).powf(1.0 / ep as f64);
    (1.0 + load.deviation * normal_quantile(u)).max(1.0)
}

/// A number inside (0, 1) that depends on seed and counter only.
fn uniform(seed: u64, counter: [u64; 2]) -> f64 {
    let mut state = seed;
    for c in counter {
        state = mix(state ^ mix(c.wrapping_add(0x9e37_79b9_7f4a_7c15)));
    }
    ((mix(state) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

/// The inverse of the normal distribution function (Acklam 2003): rational approximations with a
/// relative error below 1.15e-9.
fn normal_quantile(p: f64) -> f64 {
    const A: [f64; 6] = [
        -39.696_830_286_653_76,
        220.946_098_424_520_5,
        -275.928_510_446_968_7,
        138.357_751_867_269,
        -30.664_798_066_147_16,
        2.506_628_277_459_239,
    ];
    const B: [f64; 5] = [
        -54.476_098_798_224_06,
        161.585_836_858_040_9,
        -155.698_979_859_886_6,
        66.801_311_887_719_72,
        -13.280_681_552_885_72,
    ];
    const C: [f64; 6] = [
        -0.007_784_894_002_430_293,
        -0.322_396_458_041_136_5,
        -2.400_758_277_161_838,
        -2.549_732_539_343_734,
        4.374_664_141_464_968,
        2.938_163_982_698_783,
    ];
    const D: [f64; 4] = [
        0.007_784_695_709_041_462,
        0.322_467_129_070_039_8,
        2.445_134_137_142_996,
        3.754_408_661_907_416,
    ];
    let horner = |c: &[f64], x: f64| c.iter().fold(0.0, |sum, k| sum * x + k);
    let tail = |p: f64| {
        let q = (-2.0 * p.ln()).sqrt();
        horner(&C, q) / (horner(&D, q) * q + 1.0)
    };
    if p < 0.02425 {
        tail(p)
    } else if p > 1.0 - 0.02425 {
        -tail(1.0 - p)
    } else {
        let q = p - 0.5;
        let r = q * q;
        horner(&A, r) * q / (horner(&B, r) * r + 1.0)
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_busiest_rank_is_counted_over_its_experts() {
        assert_eq!(busiest_rank(&[1, 1, 1, 1], 2), 1.0);
        assert_eq!(busiest_rank(&[3, 1, 0, 0], 2), 2.0);
        assert_eq!(busiest_rank(&[6, 2, 1, 3], 4), 2.0);
    }

    #[test]
    fn quantiles_of_the_normal_distribution() {
        // Tables: 50 %, 97.5 %, 99.9 %, 84.1345 % (one deviation), and the far tail.
        let known =
            [(0.5, 0.0), (0.975, 1.959_963_985), (0.999, 3.090_232_306), (1e-6, -4.753_424_309)];
        for (p, z) in known {
            assert!((normal_quantile(p) - z).abs() < 1e-8, "{p}: {}", normal_quantile(p));
        }
        assert!((normal_quantile(0.841_344_746_068_543) - 1.0).abs() < 1e-8);
    }

    #[test]
    fn the_busiest_of_many_is_as_busy_as_order_statistics_say() {
        // The mean of the largest of 64 standard normal draws is 2.3437 (tables of order
        // statistics).
        let load = ExpertLoad { deviation: 0.01, ..ExpertLoad::default() };
        let n = 20_000;
        let mean = (0..n).map(|i| drawn(&load, 64, i, 0)).sum::<f64>() / n as f64;
        // Four standard errors; the largest has a deviation of 0.43.
        assert!(((mean - 1.0) / 0.01 - 2.3437).abs() < 0.013, "{mean}");
    }

    #[test]
    fn a_bad_trace_names_its_line() {
        let text = "{\"layer\":0,\"micro_batch\":0,\"tokens\":[1]}\n{\"layer\":0}\n";
        let e = RoutingTrace::parse("t.jsonl", text).unwrap_err().to_string();
        assert!(e.starts_with("t.jsonl: line 2:") && e.contains("tokens"), "{e}");
        assert!(RoutingTrace::parse("t.jsonl", "").is_err());
        let few = RoutingTrace::parse("t.json", "[[1, 2], [3, 4]]").unwrap();
        let e = few.check(4).unwrap_err().to_string();
        assert_eq!(e, "t.json: layer 0: 2 experts, the model has 4 routed ones");
    }

    /// The three kinds of files say the same of a model whose first layer is dense.
    #[test]
    fn three_formats_one_load() {
        let lines = "{\"layer\":1,\"tokens\":[3,1]}\n{\"layer\":2,\"tokens\":[1,1]}\n";
        let log = "{\"kind\":\"run\"}\n{\"kind\":\"step\",\"step\":1,\"expert_load\":[[1,[3,1]],[2,[1,1]]]}\n";
        let layer = |kind, index| PlacedLayer { kind, index };
        let stage =
            vec![layer(LayerKind::Dense, 0), layer(LayerKind::Moe, 1), layer(LayerKind::Moe, 2)];
        let placement = Placement { stages: vec![stage], ranks: 1 };
        for text in [lines, log, "[[3, 1], [1, 1]]"] {
            let trace = RoutingTrace::parse("t", text).unwrap();
            trace.check(2).unwrap();
            let table = table(&ExpertLoad::default(), &trace, &placement, 2, 1);
            assert_eq!(table, [[1.0], [1.5], [1.0]], "{text}");
        }
    }
}
