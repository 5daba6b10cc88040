//! Draws a schedule: as text with a letter a slot of time, and as SVG for light and dark pages.

use std::fmt::Write;

use crate::timeline::Timeline;
use crate::{Chunk, Op, Schedule};

/// Letters of the text drawing, for its legend.
pub const LEGEND: &str = "F f forward (dir 0, others)   B b backward   I i input backward   W w weight   X x \
                          overlapped forward and backward (by the forward's dir)   . idle";

fn letter(op: Op) -> char {
    let (c, dir) = match op {
        Op::F(c) => ('F', c.dir),
        Op::B(c) => ('B', c.dir),
        Op::Bi(c) => ('I', c.dir),
        Op::W(c) => ('W', c.dir),
        Op::FB { f, .. } => ('X', f.dir),
    };
    if dir == 0 { c } else { c.to_ascii_lowercase() }
}

/// A line for each rank: its number, then at most `columns` letters of [`LEGEND`]. A letter stands
/// for a slot of time and shows what runs in the slot's middle.
pub fn text(schedule: &Schedule, timeline: &Timeline, columns: usize) -> String {
    // One column a unit of time where that fits, else the whole width.
    let width = (timeline.makespan.ceil() as usize).clamp(1, columns.max(1));
    let slot = timeline.makespan / width as f64;
    let mut out = String::new();
    for (rank, ops) in schedule.ranks.iter().enumerate() {
        let mut line = vec!['.'; width];
        for (op, &(start, end)) in ops.iter().zip(&timeline.spans[rank]) {
            for (column, cell) in line.iter_mut().enumerate() {
                let middle = (column as f64 + 0.5) * slot;
                if start <= middle && middle < end {
                    *cell = letter(*op);
                }
            }
        }
        let _ = writeln!(out, "rank {rank:>3} {}", line.into_iter().collect::<String>());
    }
    out
}

/// What one rank's op sends to another's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Arrow {
    /// `activation` or `gradient`.
    pub name: &'static str,
    /// The sender, and when its op ends.
    pub from: (usize, f64),
    /// The receiver, and when its op begins.
    pub to: (usize, f64),
}

/// An arrow for every activation and gradient that goes to another rank; `spans[rank][i]` are start
/// and end of the rank's i-th op.
pub fn arrows(schedule: &Schedule, spans: &[Vec<(f64, f64)>]) -> Vec<Arrow> {
    let s = schedule;
    let (dirs, mbs) = (s.geometry.dirs(), s.micro_batches_per_dir());
    let slot = |rank: usize, c: Chunk| (rank * dirs + c.dir as usize) * mbs + c.mb as usize;
    // Where each chunk's forward and backward end.
    let mut sent = [vec![0.0; s.ranks.len() * dirs * mbs], vec![0.0; s.ranks.len() * dirs * mbs]];
    for (rank, ops) in s.ranks.iter().enumerate() {
        for (op, &(_, end)) in ops.iter().zip(&spans[rank]) {
            for (which, chunk) in [op.forward(), op.backward()].into_iter().enumerate() {
                if let Some(c) = chunk {
                    sent[which][slot(rank, c)] = end;
                }
            }
        }
    }
    let mut found = Vec::new();
    for (rank, ops) in s.ranks.iter().enumerate() {
        for (&op, &(start, _)) in ops.iter().zip(&spans[rank]) {
            let before = |c: Chunk| Some((c, s.geometry.shallower(rank, c.dir)?));
            let behind = |c: Chunk| Some((c, s.geometry.deeper(rank, c.dir)?));
            let arrivals = [
                ("activation", op.forward().and_then(before)),
                ("gradient", op.backward().and_then(behind)),
            ];
            for (which, (name, arrival)) in arrivals.into_iter().enumerate() {
                let Some((chunk, (from, dir))) = arrival.filter(|(_, (from, _))| *from != rank)
                else {
                    continue;
                };
                let end = sent[which][slot(from, Chunk { dir, mb: chunk.mb })];
                found.push(Arrow { name, from: (from, end), to: (rank, start) });
            }
        }
    }
    found
}

/// An op as words: `F1.3` is the forward of micro-batch 3 in direction 1.
pub fn op_text(op: Op) -> String {
    match op {
        Op::F(c) | Op::B(c) | Op::Bi(c) | Op::W(c) => format!("{}{}.{}", op.name(), c.dir, c.mb),
        Op::FB { f, b } => format!("F{}.{}&B{}.{}", f.dir, f.mb, b.dir, b.mb),
    }
}

/// A line for each rank with every op, in the words of [`op_text`].
pub fn ops_text(schedule: &Schedule) -> String {
    let mut out = String::new();
    for (rank, ops) in schedule.ranks.iter().enumerate() {
        let words: Vec<String> = ops.iter().map(|&op| op_text(op)).collect();
        let _ = writeln!(out, "rank {rank:>3}: {}", words.join(" "));
    }
    out
}

const SVG_STYLE: &str = "
  svg { font: 10px system-ui, sans-serif; background: #ffffff; }
  text { fill: #1b1f24; } .axis { stroke: #8a9099; } rect { stroke: #ffffff; stroke-width: 0.6; }
  .F0 { fill: #8fb8ff; } .F1 { fill: #c4b2ff; } .B0 { fill: #8fd6a3; } .B1 { fill: #c7dd86; }
  .I0 { fill: #7fd4cf; } .I1 { fill: #a9dfd0; } .W { fill: #ffc177; } .idle { fill: none; }
  @media (prefers-color-scheme: dark) {
    svg { background: #14171c; } text { fill: #e6e9ee; } rect { stroke: #14171c; }
    .cell { fill: #10131a; }
  }
";

/// The schedule as a stand-alone SVG document: time to the right, a row for each rank, micro-batch
/// numbers in the cells.
pub fn svg(schedule: &Schedule, timeline: &Timeline) -> String {
    let (left, top, row, unit) = (56.0, 34.0, 22.0, unit_width(schedule, timeline));
    let width = left + timeline.makespan * unit + 12.0;
    let height = top + row * schedule.ranks.len() as f64 + 14.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.1} {height:.1}\" width=\"{width:.0}\" \
         height=\"{height:.0}\"><style>{SVG_STYLE}</style>\n"
    );
    let _ = writeln!(
        out,
        "<text x=\"4\" y=\"14\">{}: {} stages, {} micro-batches, makespan {:.6}, mean bubble {:.6}</text>",
        schedule.kind.name(),
        schedule.geometry.stages,
        schedule.micro_batches,
        timeline.makespan,
        timeline.mean_bubble(),
    );
    legend(&mut out, 4.0, 20.0);
    for (rank, ops) in schedule.ranks.iter().enumerate() {
        let y = top + row * rank as f64;
        let _ = writeln!(out, "<text x=\"4\" y=\"{:.1}\">rank {rank}</text>", y + 14.0);
        for (&op, &(start, end)) in ops.iter().zip(&timeline.spans[rank]) {
            let (x, w) = (left + start * unit, (end - start) * unit);
            match op {
                Op::FB { f, b } => {
                    let half = (row - 2.0) / 2.0;
                    cell(&mut out, (x, y, w, half), &format!("F{}", f.dir.min(1)), f.mb);
                    cell(&mut out, (x, y + half, w, half), &format!("B{}", b.dir.min(1)), b.mb);
                }
                Op::F(c) => {
                    cell(&mut out, (x, y, w, row - 2.0), &format!("F{}", c.dir.min(1)), c.mb)
                }
                Op::B(c) => {
                    cell(&mut out, (x, y, w, row - 2.0), &format!("B{}", c.dir.min(1)), c.mb)
                }
                Op::Bi(c) => {
                    cell(&mut out, (x, y, w, row - 2.0), &format!("I{}", c.dir.min(1)), c.mb)
                }
                Op::W(c) => cell(&mut out, (x, y, w, row - 2.0), "W", c.mb),
            }
        }
    }
    out.push_str("</svg>\n");
    out
}

/// Pixels a unit of time: the shortest op gets room for its number, the whole at most 6000 pixels.
fn unit_width(schedule: &Schedule, timeline: &Timeline) -> f64 {
    let spans = timeline.spans.iter().flatten().map(|&(start, end)| end - start);
    let shortest = spans.filter(|&d| d > 0.0).fold(f64::INFINITY, f64::min);
    debug_assert!(shortest.is_finite(), "{} has no op", schedule.kind.name());
    (18.0 / shortest).min(6000.0 / timeline.makespan)
}

fn cell(out: &mut String, (x, y, w, h): (f64, f64, f64, f64), class: &str, mb: u32) {
    let _ = write!(
        out,
        "<rect class=\"{class}\" x=\"{x:.2}\" y=\"{y:.2}\" width=\"{w:.2}\" height=\"{h:.2}\"/>"
    );
    if w >= 10.0 {
        let (tx, ty, size) = (x + w / 2.0, y + h / 2.0 + h.min(10.0) * 0.35, h.min(10.0));
        let _ = write!(
            out,
            "<text class=\"cell\" x=\"{tx:.2}\" y=\"{ty:.2}\" font-size=\"{size:.0}\" \
             text-anchor=\"middle\">{mb}</text>"
        );
    }
    out.push('\n');
}

fn legend(out: &mut String, x: f64, y: f64) {
    let names = [
        ("F0", "forward, dir 0"),
        ("F1", "forward, dir 1"),
        ("B0", "backward, dir 0"),
        ("B1", "backward, dir 1"),
        ("I0", "input backward, dir 0"),
        ("I1", "input backward, dir 1"),
        ("W", "weight"),
    ];
    for (i, (class, name)) in names.into_iter().enumerate() {
        let x = x + 124.0 * i as f64;
        let _ = writeln!(
            out,
            "<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"10\" height=\"10\"/><text x=\"{}\" y=\"{}\">{name}</text>",
            x + 14.0,
            y + 9.0
        );
    }
}
