//! A simulated step for Perfetto: a process per rank, a thread per stream, arrows between stages.
//! The form is that of `fathom_schedule::perfetto`, which executed steps have too.

use std::io::{self, Write};

use fathom_schedule::Op;
use fathom_schedule::draw::{arrows, op_text};
use fathom_schedule::perfetto::{self, COMMUNICATION, COMPUTE, INSTRUCTIONS};

use crate::events::{Event, part_name};
use crate::step::Simulation;

/// Writes the trace of a step that was played with its parts ([`crate::events::Detail::Parts`]).
pub fn write(sim: &Simulation, out: &mut dyn Write) -> io::Result<()> {
    perfetto::begin(out, sim.schedule.ranks.len())?;
    for (rank, ops) in sim.schedule.ranks.iter().enumerate() {
        for (index, &op) in ops.iter().enumerate() {
            instruction(sim, out, rank, index, op)?;
        }
        tail(sim, out, rank)?;
    }
    for event in &sim.outcome.parts {
        part(out, event)?;
    }
    let spans: Vec<_> = sim.outcome.ranks.iter().map(|rank| rank.instructions.clone()).collect();
    for (id, arrow) in arrows(&sim.schedule, &spans).into_iter().enumerate() {
        perfetto::arrow(out, (arrow.name, id as u64), arrow.from, arrow.to)?;
    }
    perfetto::end(out)
}

fn instruction(
    sim: &Simulation,
    out: &mut dyn Write,
    rank: usize,
    index: usize,
    op: Op,
) -> io::Result<()> {
    let span = sim.outcome.ranks[rank].instructions[index];
    perfetto::complete(out, (rank, INSTRUCTIONS), (&op_text(op), op.name()), span, &[])
}

fn tail(sim: &Simulation, out: &mut dyn Write, rank: usize) -> io::Result<()> {
    let [reduce, meet, gather, end] = sim.outcome.ranks[rank].tail;
    let reduced = reduce + sim.times.tail[rank].grad_reduce_s;
    let entries = [
        (COMMUNICATION, "gradient reduction", (reduce, reduced)),
        (COMPUTE, "optimizer", (meet, gather)),
        (COMMUNICATION, "parameter gather", (gather, end)),
    ];
    for (tid, name, span) in entries.into_iter().filter(|(_, _, s)| s.1 > s.0) {
        perfetto::complete(out, (rank, tid), (name, "tail"), span, &[])?;
    }
    Ok(())
}

fn part(out: &mut dyn Write, e: &Event) -> io::Result<()> {
    let tid = if e.part.is_comm() { COMMUNICATION } else { COMPUTE };
    let name = part_name(e.part.component, e.part.phase);
    let args = [
        ("stage", e.stage as usize),
        ("layer", e.part.layer.into()),
        ("micro_batch", e.micro_batch as usize),
    ];
    let span = (e.part.start_s, e.part.end_s);
    perfetto::complete(out, (e.rank as usize, tid), (&name, "part"), span, &args)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::config::Scenario;
    use crate::events::Detail;
    use crate::first_principles::FirstPrinciples;
    use crate::model_code::ModelCode;
    use crate::step::simulate;
    use serde_json::Value;

    #[test]
    fn the_trace_is_json_with_every_part_and_paired_arrows() {
        let set = [
            "parallel.pp=4".to_string(),
            "parallel.dp=512".into(),
            "training.global_batch=4096".into(),
        ];
        let s = Scenario::preset("deepseek-v3-h800-2048", &set).unwrap();
        let sim = simulate(&s, &FirstPrinciples::new(ModelCode), Detail::Parts).unwrap();
        let mut bytes = Vec::new();
        write(&sim, &mut bytes).unwrap();
        let trace: Value = serde_json::from_slice(&bytes).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        let count = |key: &str, value: &str| events.iter().filter(|e| e[key] == value).count();
        assert_eq!(count("cat", "part"), sim.outcome.parts.len());
        assert_eq!(count("ph", "s"), count("ph", "f"));
        // 8 micro-batches, 3 boundaries, forward and backward.
        assert_eq!(count("ph", "s"), 8 * 3 * 2);
        for e in events.iter().filter(|e| e["ph"] == "X") {
            assert!(e["ts"].as_f64().unwrap() >= 0.0 && e["dur"].as_f64().unwrap() >= 0.0);
        }
    }

    /// What a thread shows follows one after the other, to the nanosecond.
    #[test]
    fn no_two_events_of_a_thread_overlap() {
        let s = Scenario::preset("deepseek-v3-h800-2048", &["training.global_batch=4096".into()]);
        let model = FirstPrinciples::new(ModelCode);
        let sim = simulate(&s.unwrap(), &model, Detail::Parts).unwrap();
        let mut text = Vec::new();
        write(&sim, &mut text).unwrap();
        let trace: Value = serde_json::from_slice(&text).unwrap();
        let mut threads: BTreeMap<(u64, u64), Vec<(u64, u64)>> = BTreeMap::new();
        let ns = |v: &Value| (v.as_f64().unwrap() * 1e3).round() as u64;
        for e in trace["traceEvents"].as_array().unwrap().iter().filter(|e| e["ph"] == "X") {
            let thread = (e["pid"].as_u64().unwrap(), e["tid"].as_u64().unwrap());
            let start = ns(&e["ts"]);
            threads.entry(thread).or_default().push((start, start + ns(&e["dur"])));
        }
        assert_eq!(threads.len(), 48);
        for (thread, spans) in &mut threads {
            spans.sort_unstable();
            assert!(spans.windows(2).all(|w| w[0].1 <= w[1].0), "{thread:?}");
        }
        // Every arrow leaves and reaches its thread inside a slice, forward in time; every process
        // and thread has a name.
        let events = trace["traceEvents"].as_array().unwrap();
        let mut arrows: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for e in events.iter().filter(|e| e["ph"] == "s" || e["ph"] == "f") {
            let thread = (e["pid"].as_u64().unwrap(), e["tid"].as_u64().unwrap());
            let at = ns(&e["ts"]);
            assert!(threads[&thread].iter().any(|&(start, end)| start <= at && at <= end), "{e}");
            arrows.entry(e["id"].as_u64().unwrap()).or_default().push(at);
        }
        assert!(arrows.values().all(|ends| ends.len() == 2 && ends[0] <= ends[1]));
        let named = |kind: &str, pid: u64, tid: Option<u64>| {
            let is = |e: &&Value| e["ph"] == "M" && e["name"] == kind && e["pid"] == pid;
            events.iter().filter(is).any(|e| tid.is_none_or(|tid| e["tid"] == tid))
        };
        for &(pid, tid) in threads.keys() {
            assert!(named("process_name", pid, None) && named("thread_name", pid, Some(tid)));
        }
    }
}
