//! What NVIDIA's assembler makes of a kernel: the registers and memory that a thread takes, what it
//! complains of, and the machine code.
//!
//! Source: NVIDIA's document "CUDA Compiler Driver", the output of `--ptxas-options=-v`.

use serde::Serialize;

/// A source in machine code, with the assembler's report.
#[derive(Clone, Debug)]
pub struct Assembly {
    /// The code, an ELF file.
    pub cubin: Vec<u8>,
    /// The report on every entry, and warnings.
    pub report: String,
}

/// What a thread of an entry, or its CTA, takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Resources {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of local memory of a thread: the stack.
    pub stack_bytes: u32,
    /// Bytes that are stored because registers run out.
    pub spill_store_bytes: u32,
    /// Bytes that are read back.
    pub spill_load_bytes: u32,
    /// Static shared memory of a CTA in bytes.
    pub shared_bytes: u32,
}

impl Assembly {
    /// What the entry of this name takes; `None` where the report does not speak of it.
    pub fn resources(&self, entry: &str) -> Option<Resources> {
        let begin = format!("entry function '{entry}'");
        let (_, rest) = self.report.split_once(&begin)?;
        let own = rest.split("entry function").next()?;
        // The number in front of these words, or 0.
        let of = |words: &str| {
            let before = own.split(words).next().filter(|before| before.len() < own.len());
            before.and_then(|b| b.split_whitespace().last()?.parse().ok()).unwrap_or(0)
        };
        let used = own.split_once("Used ")?.1;
        Some(Resources {
            registers: used.split_whitespace().next()?.parse().ok()?,
            stack_bytes: of(" bytes stack frame"),
            spill_store_bytes: of(" bytes spill stores"),
            spill_load_bytes: of(" bytes spill loads"),
            shared_bytes: of(" bytes smem"),
        })
    }

    /// Lines of the assembler that complain; it says that it serialises `wgmma` where it gives up
    /// on running it beside other instructions. The compiler in front of it speaks of sources.
    pub fn warnings(&self) -> Vec<&str> {
        let complains = |line: &&str| {
            let line = line.to_ascii_lowercase();
            line.contains("warning") || line.contains("serializ") || line.contains("advisory")
        };
        self.report.lines().filter(|line| line.starts_with("ptxas")).filter(complains).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_entry_by_entry() {
        let report = "add.cu(3): warning #177-D: function \"f\" was declared but never referenced
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'add' for 'sm_90a'
ptxas info    : Function properties for add
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 16 registers, used 0 barriers
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Compiling entry function 'turn' for 'sm_90a'
ptxas info    : Function properties for turn
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 4224 bytes smem
";
        let assembly = Assembly { cubin: Vec::new(), report: report.to_owned() };
        let add = assembly.resources("add").unwrap();
        let expected = Resources { registers: 16, stack_bytes: 16, ..Resources::default() };
        assert_eq!(add, Resources { spill_store_bytes: 4, spill_load_bytes: 8, ..expected });
        let turn = assembly.resources("turn").unwrap();
        assert_eq!((turn.registers, turn.shared_bytes, turn.stack_bytes), (32, 4224, 0));
        assert_eq!(assembly.resources("none"), None);
        assert_eq!(assembly.warnings().len(), 1);
    }
}
