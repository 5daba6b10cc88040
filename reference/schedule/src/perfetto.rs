//! A timeline of ranks as Chrome trace JSON, which Perfetto opens: a process per rank, a thread per
//! stream, arrows between ranks. Simulated and executed steps are written alike.
//!
//! Format: the 'Trace Event Format' document of the Chromium project; complete events (`X`),
//! metadata (`M`) and flow events (`s`, `f`). Times are microseconds. Written by hand: no value
//! needs escaping, and a trace has 10^5 events.

use std::io::{self, Write};

/// The thread of a rank's instructions.
pub const INSTRUCTIONS: u32 = 0;
/// The thread of what it computes.
pub const COMPUTE: u32 = 1;
/// The thread of what it sends and receives.
pub const COMMUNICATION: u32 = 2;

/// Begins a trace of ranks 0 to `ranks`, and names their threads.
///
/// # Errors
/// Those of the writer, as everywhere here.
pub fn begin(out: &mut dyn Write, ranks: usize) -> io::Result<()> {
    out.write_all(b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n")?;
    (0..ranks).try_for_each(|rank| metadata(out, rank))
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

/// Something that a rank does on a thread (`place`), from and to these seconds; `args` are shown
/// beside it.
///
/// # Errors
/// Those of the writer.
pub fn complete(
    out: &mut dyn Write,
    place: (usize, u32),
    (name, category): (&str, &str),
    span_s: (f64, f64),
    args: &[(&str, usize)],
) -> io::Result<()> {
    let (pid, tid) = place;
    // Whole nanoseconds: rounded apart, a start and a duration could overlap the next event by one,
    // which viewers drop.
    let [start, end] = [span_s.0, span_s.1].map(|s| (s * 1e9).round() as u64);
    let (ts, dur) = (microseconds(start), microseconds(end.saturating_sub(start)));
    write!(
        out,
        "{{\"ph\":\"X\",\"pid\":{pid},\"tid\":{tid},\"name\":\"{name}\",\"ts\":{ts},\"dur\":{dur},\
         \"cat\":\"{category}\""
    )?;
    if !args.is_empty() {
        let args: Vec<String> = args.iter().map(|(key, n)| format!("\"{key}\":{n}")).collect();
        write!(out, ",\"args\":{{{}}}", args.join(","))?;
    }
    out.write_all(b"},\n")
}

fn microseconds(ns: u64) -> String {
    format!("{}.{:03}", ns / 1000, ns % 1000)
}

/// An arrow between the instructions of two ranks: from the end of the one to the start of the
/// other, in seconds. Every arrow has an `id` of its own.
///
/// # Errors
/// Those of the writer.
pub fn arrow(
    out: &mut dyn Write,
    (name, id): (&str, u64),
    (from, end_s): (usize, f64),
    (to, start_s): (usize, f64),
) -> io::Result<()> {
    // Just inside both slices, so that viewers bind the arrow to them.
    let (end, begin) = (end_s * 1e6 - 0.5, start_s * 1e6 + 0.5);
    let common = format!("\"cat\":\"pp\",\"name\":\"{name}\",\"id\":{id},\"tid\":{INSTRUCTIONS}");
    writeln!(out, "{{\"ph\":\"s\",{common},\"pid\":{from},\"ts\":{end:.3}}},")?;
    writeln!(out, "{{\"ph\":\"f\",\"bp\":\"e\",{common},\"pid\":{to},\"ts\":{begin:.3}}},")
}

/// Ends a trace.
///
/// # Errors
/// Those of the writer.
pub fn end(out: &mut dyn Write) -> io::Result<()> {
    // A closing event without a comma.
    writeln!(
        out,
        "{{\"ph\":\"M\",\"pid\":0,\"name\":\"process_sort_index\",\"args\":{{\"sort_index\":0}}}}"
    )?;
    out.write_all(b"]}\n")
}
