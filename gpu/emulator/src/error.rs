//! Errors and findings: 'the program is wrong' ([`Ub`]) and 'this is not supported'
//! ([`Unsupported`]) are different things and never the same type.

use std::fmt;

use serde::Serialize;

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
        /// First byte.
        address: u64,
        /// Length.
        bytes: u64,
        /// What lies there or nearby.
        nearest: String,
    },
    /// Freed address that no allocation starts at.
    #[error("{address:#x} is not the start of a live allocation: {nearest}")]
    NotAStart {
        /// The address.
        address: u64,
        /// What lies there or nearby.
        nearest: String,
    },
}

/// What kind of wrong a program did. The names are those of the reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
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
        })
    }
}

/// One report about a running program: what is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What kind of wrong it is.
    pub kind: Ub,
    /// Name of the entry that ran.
    pub kernel: String,
    /// Line in the PTX text, from 1; 0 where no instruction is to blame.
    pub line: u32,
    /// The instruction as written.
    pub instruction: String,
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

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.kind, self.message)?;
        if self.line > 0 {
            writeln!(f, "  at {}, PTX line {}: {}", self.kernel, self.line, self.instruction)?;
        } else {
            writeln!(f, "  in {}", self.kernel)?;
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
