//! Errors and findings: 'the program is wrong' ([`Ub`]) and 'this is not supported'
//! ([`Unsupported`]) are different things and never the same type.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Why a call failed before or instead of running anything.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No preset of that name.
    #[error("no device preset '{found}': known are {known}")]
    UnknownPreset {
        /// What was asked for.
        found: String,
        /// The keys of the presets there are, separated by commas.
        known: String,
    },
    /// The PTX text does not parse or validate.
    #[error("{0}")]
    Ptx(String),
    /// The kernel needs something the emulator does not have.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The launch configuration does not fit device or kernel.
    #[error("cannot launch {kernel}: {what}: expected {expected}, found {found}")]
    Launch {
        /// Name of the entry that was to run.
        kernel: String,
        /// Which part of the configuration.
        what: &'static str,
        /// What would be accepted.
        expected: String,
        /// What the configuration says.
        found: String,
    },
    /// A memory call of the host that does not fit an allocation.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A name that the module does not define.
    #[error("module has no {what} '{name}': it has {known}")]
    NotFound {
        /// What was looked for: `entry` or `variable`.
        what: &'static str,
        /// What was asked for.
        name: String,
        /// The names that it defines, separated by commas.
        known: String,
    },
    /// A launch file or its tensors are not as described in docs/emulator.md.
    #[error("{file}: {what}")]
    File {
        /// Path of the file.
        file: String,
        /// Place in it, what was expected, what was found.
        what: String,
    },
}

/// Something valid that the emulator cannot execute. The program may be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kernel}: line {line}: the emulator does not support {what}\n  {source_line}")]
pub struct Unsupported {
    /// Function that holds it.
    pub kernel: String,
    /// Line in the PTX text, from 1.
    pub line: u32,
    /// The instruction or feature.
    pub what: String,
    /// The instruction as written.
    pub source_line: String,
}

/// Host accesses that do not fit device memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// More than the device has left.
    #[error("out of device memory: {requested} bytes asked, {free} free")]
    OutOfMemory {
        /// Bytes asked for.
        requested: u64,
        /// Bytes that the device has left.
        free: u64,
    },
    /// Not inside one live allocation.
    #[error("{bytes} bytes at {address:#x} are not in one live allocation: {nearest}")]
    Unmapped {
        /// Address of the first byte that was asked for.
        address: u64,
        /// How many bytes were asked for.
        bytes: u64,
        /// What lies there or nearby.
        nearest: String,
    },
    /// Freed address that no allocation starts at.
    #[error("{address:#x} is not the start of a live allocation: {nearest}")]
    NotAStart {
        /// The address at which no live allocation begins.
        address: u64,
        /// What lies there or nearby.
        nearest: String,
    },
}

/// What kind of wrong a program did. The names are those of the reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ub {
    /// Access outside of every live allocation, or beyond shared or local memory.
    OutOfBounds,
    /// Access to freed memory.
    UseAfterFree,
    /// Address that is not a multiple of the access size (or of what the instruction asks).
    Misaligned,
    /// Read of memory that nobody wrote.
    Uninitialized,
    /// Two unordered accesses to shared memory, one of them a write.
    SharedRace,
    /// Two unordered plain accesses to global memory from different CTAs, one of them a write.
    GlobalRace,
    /// Generic and asynchronous proxy touch the same bytes without a proxy fence.
    MissingProxyFence,
    /// Destination of an asynchronous copy, or operand of an asynchronous matrix product,
    /// touched before it was waited for.
    AsyncNotWaited,
    /// mbarrier that is not initialised, overflows, or is used against its rules.
    MbarrierMisuse,
    /// Barrier used against its rules.
    BarrierMisuse,
    /// `.aligned` or full-mask instruction executed by a part of its threads.
    Divergence,
    /// Matrix or tensor-map descriptor that breaks its format.
    BadDescriptor,
    /// Every warp waits and none can go on.
    Deadlock,
    /// `trap`, `brkpt` or a failed device assertion.
    Trap,
    /// Indirect call or branch to nowhere, stack overflow, and the like.
    BadControlFlow,
    /// An instruction behind a branch or in a called function that the emulator cannot execute: the
    /// program may be right.
    NotEmulated,
}

impl fmt::Display for Ub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Ub::OutOfBounds => "out-of-bounds access",
            Ub::UseAfterFree => "use after free",
            Ub::Misaligned => "misaligned access",
            Ub::Uninitialized => "uninitialized read",
            Ub::SharedRace => "shared-memory race",
            Ub::GlobalRace => "global-memory race between CTAs",
            Ub::MissingProxyFence => "missing proxy fence",
            Ub::AsyncNotWaited => "asynchronous operation not waited for",
            Ub::MbarrierMisuse => "mbarrier misuse",
            Ub::BarrierMisuse => "barrier misuse",
            Ub::Divergence => "divergent threads at an aligned instruction",
            Ub::BadDescriptor => "bad descriptor",
            Ub::Deadlock => "deadlock",
            Ub::Trap => "trap",
            Ub::BadControlFlow => "bad control flow",
            Ub::NotEmulated => "instruction that is not emulated",
        })
    }
}

impl Ub {
    /// Why it matters, in a sentence.
    pub fn why(self) -> &'static str {
        match self {
            Ub::OutOfBounds => {
                "no allocation holds that address: hardware faults, or reads or \
                                overwrites what lies there by chance"
            }
            Ub::UseAfterFree => "the memory was given back and may by now hold something else",
            Ub::Misaligned => "an access must start at a multiple of its size, or hardware faults",
            Ub::Uninitialized => {
                "what is read is left over from earlier use and differs from run to \
                                  run"
            }
            Ub::SharedRace => {
                "no barrier orders the two accesses, so that the value depends on which \
                 comes first"
            }
            Ub::GlobalRace => {
                "CTAs, and lanes of a warp, run in any order, and nothing orders the two accesses"
            }
            Ub::MissingProxyFence => {
                "asynchronous copies and tensor cores see generic writes only \
                                      behind fence.proxy.async"
            }
            Ub::AsyncNotWaited => {
                "the operation may still be under way, so that old or half-written \
                                   data is seen"
            }
            Ub::MbarrierMisuse => "the barrier's state is not what its waiters count on",
            Ub::BarrierMisuse => "threads that disagree about a barrier are undefined behaviour",
            Ub::Divergence => "the instruction is defined only if all threads it names take part",
            Ub::BadDescriptor => "hardware reads the bits as another layout, or faults",
            Ub::Deadlock => "hardware would hang until it is reset",
            Ub::Trap => "the program stopped itself",
            Ub::BadControlFlow => "control left the program",
            Ub::NotEmulated => "the emulator, and not the program, is what falls short",
        }
    }
}

/// A line of the source that PTX was compiled from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceLine {
    /// File, as the compiler wrote it.
    pub file: String,
    /// Line in it, from 1.
    pub line: u32,
}

/// One report about a running program: what is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What kind of wrong it is.
    pub kind: Ub,
    /// Name of the entry that ran.
    pub kernel: String,
    /// Line in the PTX text, from 1; 0 where no instruction is to blame.
    pub line: u32,
    /// The instruction as written.
    pub instruction: String,
    /// Where it stems from, if the PTX says so (`.loc`).
    pub source: Option<SourceLine>,
    /// CTA in the grid.
    pub cta: [u32; 3],
    /// Number of the warp in its CTA.
    pub warp: u32,
    /// Lane of the warp, 0 to 31, where one is to blame.
    pub lane: Option<u32>,
    /// Guest address, where there is one.
    pub address: Option<u64>,
    /// What is known of the memory at that address.
    pub allocation: Option<String>,
    /// The rest, in a sentence.
    pub message: String,
    /// Whether the launch was stopped by it.
    pub fatal: bool,
    /// How often the same finding came up (same kind, line and first other place).
    pub count: u64,
}

impl Finding {
    /// Whether both are one defect: the same kind at the same instruction.
    pub fn is_same(&self, other: &Finding) -> bool {
        (self.kind, self.line, &self.kernel) == (other.kind, other.line, &other.kernel)
    }

    /// What a user can do who does not want to be told.
    pub fn to_silence(&self) -> &'static str {
        match self.kind {
            _ if self.fatal => {
                "always on, since the kernel ends there; with --on-finding report the program goes on"
            }
            Ub::SharedRace | Ub::GlobalRace | Ub::MissingProxyFence | Ub::AsyncNotWaited => {
                "leave races out of --check"
            }
            Ub::UseAfterFree => "leave races out of --check",
            Ub::Uninitialized => "leave uninit out of --check",
            Ub::OutOfBounds => "leave memory out of --check",
            // Members of a mask or a warpgroup that stay away are reported in any case.
            Ub::Divergence => {
                "leave sync out of --check (absent members of a mask are always told)"
            }
            _ => "leave sync out of --check",
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.kind, self.message)?;
        if self.line > 0 {
            writeln!(f, "  at {}, PTX line {}: {}", self.kernel, self.line, self.instruction)?;
        } else {
            writeln!(f, "  in {}", self.kernel)?;
        }
        if let Some(SourceLine { file, line }) = &self.source {
            writeln!(f, "  from {file}:{line}")?;
        }
        let [x, y, z] = self.cta;
        write!(f, "  by CTA ({x}, {y}, {z}), warp {}", self.warp)?;
        if let Some(lane) = self.lane {
            write!(f, ", lane {lane}")?;
        }
        if let Some(address) = self.address {
            write!(f, ", address {address:#x}")?;
        }
        if let Some(allocation) = &self.allocation {
            write!(f, "\n  {allocation}")?;
        }
        if self.count > 1 {
            write!(f, "\n  ({} times)", self.count)?;
        }
        Ok(())
    }
}
