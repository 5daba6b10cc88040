//! The hot loop of a kernel in machine code, and what its instructions are for.
//!
//! Input is the text of `nvdisasm -c`: a section an entry, labels, an instruction a line. Source of
//! the opcodes: NVIDIA's document "CUDA Binary Utilities", the instruction set of Hopper.

use std::collections::BTreeMap;

use serde::Serialize;

/// Instructions of a loop, or of a whole kernel that has none, by what they are for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Loop {
    /// What its instructions are counted by: `QGMMA`, `FFMA`, `LDG`, or `thread` without a loop.
    pub unit: &'static str,
    /// How many of these it has.
    pub units: u32,
    /// Its instructions, but for those that do nothing (NOP).
    pub instructions: u32,
    /// Products of the tensor core and floating-point arithmetic, conversions among it.
    pub arithmetic: u32,
    /// Loads, stores and exchanges between lanes.
    pub memory: u32,
}

impl Loop {
    /// Addresses, branches, moves, waits: what neither computes nor moves data.
    pub fn rest(&self) -> u32 {
        self.instructions - self.arithmetic - self.memory
    }

    /// A count of instructions a unit.
    pub fn each(&self, count: u32) -> f64 {
        f64::from(count) / f64::from(self.units.max(1))
    }
}

/// Opcodes of products on the tensor core; each begins a unit of its own.
const TENSOR: [&str; 4] = ["QGMMA", "HGMMA", "IGMMA", "HMMA"];
const ARITHMETIC: [&str; 18] = [
    "FFMA", "FMUL", "FADD", "FMNMX", "FSETP", "FSET", "FSEL", "FCHK", "MUFU", "F2F", "F2FP", "F2I",
    "I2F", "I2FP", "DADD", "DMUL", "DFMA", "HADD2",
];
const MEMORY: [&str; 19] = [
    "LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDL", "STL", "LD", "ST", "RED", "ATOM", "ATOMG",
    "ATOMS", "LDGSTS", "UTMALDG", "UTMASTG", "UBLKCP", "SHFL",
];

#[derive(Debug)]
struct Instruction<'a> {
    opcode: &'a str,
    target: Option<&'a str>,
}

/// Instructions and labels of one entry.
#[derive(Default)]
struct Code<'a> {
    instructions: Vec<Instruction<'a>>,
    labels: BTreeMap<&'a str, usize>,
}

/// The instruction of a line: `/*0330*/  @!P0 BRA `(.L_x_3) ;`.
fn instruction(line: &str) -> Option<Instruction<'_>> {
    let rest = line.trim_start().strip_prefix("/*")?;
    let (address, rest) = rest.split_once("*/")?;
    u64::from_str_radix(address, 16).ok()?;
    let text = rest.split(';').next()?.trim_start();
    let text = match text.strip_prefix('@') {
        Some(guarded) => guarded.split_once(' ')?.1.trim_start(),
        None => text,
    };
    let opcode = text.split([' ', '.']).next().filter(|opcode| !opcode.is_empty())?;
    let target = text.split_once("`(").and_then(|(_, t)| t.split_once(')')).map(|(t, _)| t);
    Some(Instruction { opcode, target })
}

/// The code of the section `.text.ENTRY`.
fn code_of<'a>(text: &'a str, entry: &str) -> Code<'a> {
    let mut code = Code::default();
    let mut inside = false;
    for line in text.lines() {
        let trimmed = line.trim();
        if let Some(section) = trimmed.strip_prefix(".section") {
            let name = section.trim().split([',', ' ', '\t']).next().unwrap_or_default();
            inside = name.trim_matches('"').strip_prefix(".text.") == Some(entry);
        } else if inside && let Some(label) = trimmed.strip_suffix(':') {
            code.labels.insert(label, code.instructions.len());
        } else if inside {
            code.instructions.extend(instruction(line));
        }
    }
    code
}

fn count(of: &[Instruction<'_>], opcodes: &[&str]) -> u32 {
    of.iter().filter(|i| opcodes.contains(&i.opcode)).count() as u32
}

/// The loop of an entry that does its work: the innermost one with the most products on the tensor
/// core, else, where a loop is mostly that, with the most FFMA, else with the most global loads, or
/// loads of shared memory; without such a loop all of the entry. Of two that cross each other the
/// earlier counts: a wait that the assembler put behind a loop branches back into it, and from
/// there to the wait looks like a longer one. `None`: the text has no such entry.
pub fn hot_loop(text: &str, entry: &str) -> Option<Loop> {
    let code = code_of(text, entry);
    if code.instructions.is_empty() {
        return None;
    }
    let end = |at: usize, i: &Instruction<'_>| {
        let begin = *code.labels.get(i.target.filter(|_| i.opcode == "BRA")?)?;
        // A branch to itself stops a thread that has ended.
        (begin < at).then_some(begin..at + 1)
    };
    let loops: Vec<_> =
        code.instructions.iter().enumerate().filter_map(|(at, i)| end(at, i)).collect();
    let body = |range: &std::ops::Range<usize>| &code.instructions[range.clone()];
    for (unit, opcodes) in TENSOR.map(|op| (op, vec![op])).into_iter().chain([
        ("FFMA", vec!["FFMA"]),
        ("LDG", vec!["LDG", "LD"]),
        ("LDS", vec!["LDS"]),
    ]) {
        let works = |range: &&std::ops::Range<usize>| {
            let (units, all) = (count(body(range), &opcodes), range.len() as u32);
            // Among other arithmetic FFMA is part of an elementary function.
            if unit == "FFMA" { 2 * units > all } else { units > 0 }
        };
        let candidates: Vec<_> = loops.iter().filter(works).collect();
        let innermost = |range: &&&std::ops::Range<usize>| {
            let inside = |other: &&std::ops::Range<usize>| {
                *other != **range && range.start <= other.start && other.end <= range.end
            };
            !candidates.iter().any(inside)
        };
        let waits = |range: &&&std::ops::Range<usize>| {
            candidates.iter().any(|other| {
                other.start < range.start && range.start < other.end && other.end < range.end
            })
        };
        let loops = candidates.iter().filter(innermost).filter(|range| !waits(range));
        let best = loops.max_by_key(|r| count(body(r), &opcodes));
        if let Some(range) = best {
            return Some(counted(body(range), unit, count(body(range), &opcodes)));
        }
    }
    Some(counted(&code.instructions, "thread", 1))
}

fn counted(body: &[Instruction<'_>], unit: &'static str, units: u32) -> Loop {
    Loop {
        unit,
        units,
        instructions: body.iter().filter(|i| i.opcode != "NOP").count() as u32,
        arithmetic: count(body, &ARITHMETIC) + count(body, &TENSOR),
        memory: count(body, &MEMORY),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
	.section	.text.other,"ax",@progbits
.text.other:
        /*0000*/                   EXIT ;
	.section	.text.gemm,"ax",@progbits
.text.gemm:
.L_x_0:
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;
.L_x_1:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], RZ, !UPT ;
        /*0040*/                   FFMA R1, R2, R3, R1 ;
        /*0050*/                   LDS R9, [R8] ;
        /*0060*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24 ;
        /*0070*/                   IMAD.MOV.U32 R4, RZ, RZ, R5 ;
        /*0080*/               @P0 BRA `(.L_x_2) ;
        /*0090*/               @P1 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
        /*00c0*/                   NOP;
"#;

    #[test]
    fn a_wait_behind_the_loop_does_not_lengthen_it() {
        let text = "
	.section	.text.gemm,\"ax\",@progbits
.L_x_2:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*0040*/              @!P0 BRA `(.L_x_4) ;
.L_x_3:
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
        /*0070*/                   STG.E desc[UR4][R2.64], R24 ;
        /*0080*/                   EXIT ;
.L_x_4:
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*00a0*/               @P0 BRA `(.L_x_3) ;
        /*00b0*/                   BRA `(.L_x_4) ;
";
        let found = hot_loop(text, "gemm").unwrap();
        let expected = Loop { unit: "HGMMA", units: 1, instructions: 4, arithmetic: 1, memory: 0 };
        assert_eq!(found, expected);
    }

    #[test]
    fn the_innermost_loop_with_the_products_is_found_and_sorted() {
        let found = hot_loop(TEXT, "gemm").unwrap();
        let expected = Loop { unit: "QGMMA", units: 2, instructions: 6, arithmetic: 3, memory: 1 };
        assert_eq!(found, expected);
        assert_eq!((found.rest(), found.each(found.instructions)), (2, 3.0));
        // Without products: the innermost loop with loads, not the wait.
        let plain = TEXT.replace("QGMMA", "IADD3").replace("FFMA", "IADD3");
        let found = hot_loop(&plain, "gemm").unwrap();
        assert_eq!((found.unit, found.units), ("LDG", 1));
        let whole = hot_loop(TEXT, "other").unwrap();
        assert_eq!((whole.unit, whole.instructions), ("thread", 1));
        assert_eq!(hot_loop(TEXT, "none"), None);
    }
}
