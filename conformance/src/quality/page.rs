//! The tables of docs/kernels.md.

use std::fmt::Write;

use super::{Code, Quality, Traffic};

/// Bytes over the fewest that a memory-bound kernel may move.
const MOST: f64 = 1.05;

impl Quality {
    /// Two tables in Markdown: kernels in machine code, and the bytes that ops move.
    pub fn page(&self) -> String {
        let mut out = format!("NVRTC {}, sm_90a.\n\n", self.nvrtc);
        out += "| kernel | constants | registers | local, spilled | shared: static, dynamic | stages | \
                hot loop, by | instructions | arithmetic | memory | rest |\n\
                |---|---|---:|---:|---:|---:|---|---:|---:|---:|---:|\n";
        self.code.iter().for_each(|code| row_of_code(&mut out, code));
        let complaints: Vec<&String> = self.code.iter().flat_map(|code| &code.warnings).collect();
        let words = match complaints.len() {
            0 => "The assembler warns of nothing.".to_owned(),
            n => format!("The assembler warns {n} times: {complaints:?}."),
        };
        write!(
            out,
            "\n{words}\n\n| op | largest inputs | fewest bytes | distinct | moved | requests to shared memory | \
             bank conflicts |\n|---|---|---:|---:|---:|---:|---:|\n"
        )
        .expect("writing to a String");
        self.traffic.iter().for_each(|traffic| row_of_traffic(&mut out, traffic));
        let over = |t: &&Traffic| t.memory_bound && t.moved() > MOST;
        let (bound, over) = (
            self.traffic.iter().filter(|t| t.memory_bound).count(),
            self.traffic.iter().filter(over).count(),
        );
        writeln!(
            out,
            "\nOf {bound} memory-bound cases {} move at most {MOST} times the fewest bytes.",
            bound - over
        )
        .expect("writing to a String");
        out
    }
}

fn row_of_code(out: &mut String, code: &Code) {
    let r = &code.resources;
    let spilled = r.spill_store_bytes + r.spill_load_bytes;
    let local = match (r.stack_bytes, spilled) {
        (0, 0) => "none".to_owned(),
        (stack, spilled) => format!("{stack}, {spilled}"),
    };
    let loops = match &code.hot_loop {
        None => " | | | |".to_owned(),
        Some(found) => {
            let each = |count| format!("{:.1}", found.each(count));
            format!(
                "{} {} | {} | {} | {} | {}",
                found.units,
                found.unit,
                each(found.instructions),
                each(found.arithmetic),
                each(found.memory),
                each(found.rest())
            )
        }
    };
    writeln!(
        out,
        "| `{}` | {} | {} | {local} | {}, {} | {} | {loops} |",
        code.entry,
        code.constants.join(" "),
        r.registers,
        r.shared_bytes,
        code.dynamic_shared_bytes,
        code.stages,
    )
    .expect("writing to a String");
}

fn row_of_traffic(out: &mut String, traffic: &Traffic) {
    let total = traffic.total();
    let bold = traffic.memory_bound && traffic.moved() > MOST;
    let moved = format!("{:.2}", traffic.moved());
    let moved = if bold { format!("**{moved}**") } else { moved };
    writeln!(
        out,
        "| `{}` | {} | {} | {:.2} | {moved} | {} | {} |",
        traffic.op,
        traffic.shape,
        traffic.minimum_bytes,
        traffic.distinct(),
        total.shared_requests,
        total.bank_conflicts,
    )
    .expect("writing to a String");
}
