//! A step as Chrome trace JSON, which Perfetto opens: a process per rank, a thread per stream,
//! arrows between stages.
//!
//! Format: the 'Trace Event Format' document of the Chromium project; complete events (`X`),
//! metadata (`M`) and flow events (`s`, `f`). Times are microseconds. Written by hand: no value
//! needs escaping, and a trace has 10^5 events.

use fathom_schedule::draw::op_text;
use fathom_schedule::{Chunk, Op};
use std::io::{self, Write};

use crate::events::{Event, part_name};
use crate::step::Simulation;

/// Threads of a rank's process.
const INSTRUCTIONS: u32 = 0;
const COMPUTE: u32 = 1;
const COMMUNICATION: u32 = 2;

/// Writes the trace of a step that was played with its parts ([`crate::events::Detail::Parts`]).
pub fn write(sim: &Simulation, out: &mut dyn Write) -> io::Result<()> {
    out.write_all(b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n")?;
    for rank in 0..sim.schedule.ranks.len() {
        metadata(out, rank)?;
    }
    for (rank, ops) in sim.schedule.ranks.iter().enumerate() {
        for (index, &op) in ops.iter().enumerate() {
            instruction(sim, out, rank, index, op)?;
        }
        tail(sim, out, rank)?;
    }
    for event in &sim.outcome.parts {
        part(out, event)?;
    }
    flows(sim, out)?;
    // A closing event without a comma.
    writeln!(
        out,
        "{{\"ph\":\"M\",\"pid\":0,\"name\":\"process_sort_index\",\"args\":{{\"sort_index\":0}}}}"
    )?;
    out.write_all(b"]}\n")
}

fn metadata(out: &mut dyn Write, rank: usize) -> io::Result<()> {
    writeln!(
        out,
        "{{\"ph\":\"M\",\"pid\":{rank},\"name\":\"process_name\",\"args\":{{\"name\":\"rank {rank}\"}}}},"
    )?;
    let streams =
        [(INSTRUCTIONS, "schedule"), (COMPUTE, "compute"), (COMMUNICATION, "communication")];
    for (tid, name) in streams {
        writeln!(
            out,
            "{{\"ph\":\"M\",\"pid\":{rank},\"tid\":{tid},\"name\":\"thread_name\",\"args\":{{\"name\":\"{name}\"}}}},"
        )?;
    }
    Ok(())
}

fn complete(
    out: &mut dyn Write,
    place: (usize, u32),
    name: &str,
    span: (f64, f64),
) -> io::Result<()> {
    let (pid, tid) = place;
    // Whole nanoseconds: rounded apart, a start and a duration could overlap the next event by one,
    // which viewers drop.
    let [start, end] = [span.0, span.1].map(|s| (s * 1e9).round() as u64);
    let (ts, dur) = (microseconds(start), microseconds(end - start));
    write!(
        out,
        "{{\"ph\":\"X\",\"pid\":{pid},\"tid\":{tid},\"name\":\"{name}\",\"ts\":{ts},\"dur\":{dur}"
    )
}

fn microseconds(ns: u64) -> String {
    format!("{}.{:03}", ns / 1000, ns % 1000)
}

fn instruction(
    sim: &Simulation,
    out: &mut dyn Write,
    rank: usize,
    index: usize,
    op: Op,
) -> io::Result<()> {
    let span = sim.outcome.ranks[rank].instructions[index];
    complete(out, (rank, INSTRUCTIONS), &op_text(op), span)?;
    writeln!(out, ",\"cat\":\"{}\"}},", op.name())
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
        complete(out, (rank, tid), name, span)?;
        writeln!(out, ",\"cat\":\"tail\"}},")?;
    }
    Ok(())
}

fn part(out: &mut dyn Write, e: &Event) -> io::Result<()> {
    let tid = if e.part.is_comm() { COMMUNICATION } else { COMPUTE };
    let name = part_name(e.part.component, e.part.phase);
    complete(out, (e.rank as usize, tid), &name, (e.part.start_s, e.part.end_s))?;
    let (stage, layer, mb) = (e.stage, e.part.layer, e.micro_batch);
    writeln!(
        out,
        ",\"cat\":\"part\",\"args\":{{\"stage\":{stage},\"layer\":{layer},\"micro_batch\":{mb}}}}},"
    )
}

/// An arrow for every activation and gradient that goes to another rank.
fn flows(sim: &Simulation, out: &mut dyn Write) -> io::Result<()> {
    let s = &sim.schedule;
    let (dirs, mbs) = (s.geometry.dirs(), s.micro_batches_per_dir());
    let slot = |rank: usize, c: Chunk| (rank * dirs + c.dir as usize) * mbs + c.mb as usize;
    // Where each chunk's forward and backward end.
    let mut sent = [vec![0.0; s.ranks.len() * dirs * mbs], vec![0.0; s.ranks.len() * dirs * mbs]];
    for (rank, ops) in s.ranks.iter().enumerate() {
        for (op, &(_, end)) in ops.iter().zip(&sim.outcome.ranks[rank].instructions) {
            for (which, chunk) in [op.forward(), op.backward()].into_iter().enumerate() {
                if let Some(c) = chunk {
                    sent[which][slot(rank, c)] = end;
                }
            }
        }
    }
    let mut id = 0u64;
    for (rank, ops) in s.ranks.iter().enumerate() {
        for (&op, &(start, _)) in ops.iter().zip(&sim.outcome.ranks[rank].instructions) {
            let arrivals = [
                (
                    "activation",
                    op.forward().and_then(|c| Some((c, s.geometry.shallower(rank, c.dir)?))),
                ),
                (
                    "gradient",
                    op.backward().and_then(|c| Some((c, s.geometry.deeper(rank, c.dir)?))),
                ),
            ];
            for (which, (name, arrival)) in arrivals.into_iter().enumerate() {
                let Some((chunk, (from, dir))) = arrival.filter(|(_, (from, _))| *from != rank)
                else {
                    continue;
                };
                // Just inside both slices, so that viewers bind the arrow to them.
                let end = sent[which][slot(from, Chunk { dir, mb: chunk.mb })] * 1e6 - 0.5;
                let begin = start * 1e6 + 0.5;
                let common = format!(
                    "\"cat\":\"pp\",\"name\":\"{name}\",\"id\":{id},\"tid\":{INSTRUCTIONS}"
                );
                writeln!(out, "{{\"ph\":\"s\",{common},\"pid\":{from},\"ts\":{end:.3}}},")?;
                writeln!(
                    out,
                    "{{\"ph\":\"f\",\"bp\":\"e\",{common},\"pid\":{rank},\"ts\":{begin:.3}}},"
                )?;
                id += 1;
            }
        }
    }
    Ok(())
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
