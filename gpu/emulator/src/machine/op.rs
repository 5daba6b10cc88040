//! Micro-operations: what PTX instructions are lowered to.

use super::cx::Cx;
use super::layout::{Constant, FunctionInfo, Object, Touch};
use super::registers::Reg;
use super::wgmma;

/// What the machine does after a micro-operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Go on with the next one.
    Next,
    /// The executing lanes branch to the operation's target.
    Branch,
    /// The operation has changed the groups of the warp itself.
    Control,
    /// The operation has changed the groups of the warp, and is to be executed by the new ones.
    Regrouped,
    /// Not now: the same operation again when the group's turn comes.
    Block,
    /// Go on, but let others run first.
    Yield,
    /// The executing lanes exit.
    Exit,
    /// The launch stops; the finding is in [`Cx::fault`].
    Fault,
}

/// Executes a micro-operation for the lanes of [`Cx::mask`], which has at least one.
pub type OpFn = fn(&mut Cx<'_>, &MicroOp) -> Step;

/// An operation with more operands than a [`MicroOp`] has room for.
pub type Action = Box<dyn Fn(&mut Cx<'_>) -> Step + Send + Sync>;

/// In place of a guard's predicate: the operation executes in all lanes.
pub const NO_GUARD: u16 = u16::MAX;

/// One step of a warp: a function, its operands as slots, and which lanes it is for.
#[derive(Clone, Copy)]
pub struct MicroOp {
    pub run: OpFn,
    pub d: Reg,
    pub a: Reg,
    pub b: Reg,
    pub c: Reg,
    /// Predicate that guards it, or [`NO_GUARD`].
    pub guard: u16,
    /// Executes where the guard is false.
    pub negated: bool,
    /// Lanes outside of the guard part from the group first.
    pub control: bool,
    /// How many operations from this one on are plain ([`super::plain`]).
    pub plain: u8,
    /// How many of those, from this one on, are the multiply-add of [`super::plain`].
    pub fmas: u8,
    pub class: Class,
    /// Target of a branch; index into [`Code::actions`].
    pub x: u32,
    /// Where the sides of a branch meet, or `u32::MAX`; else an immediate.
    pub imm: u64,
    /// Line in the PTX text.
    pub line: u32,
}

macro_rules! classes {
    ($($name:ident = $text:literal),* $(,)?) => {
        /// Classes of instructions, as kernel records name them.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Class { $($name),* }
        impl Class {
            /// Name in a kernel record.
            pub const fn name(self) -> &'static str { match self { $(Class::$name => $text),* } }
        }
    };
}

classes! {
    Alu = "alu", Fma = "fma", Fp64 = "fp64", Half = "half", Sfu = "sfu", Convert = "cvt",
    Move = "mov", Control = "control", LdParam = "ld.param",
    LdGlobal = "ld.global", StGlobal = "st.global", LdShared = "ld.shared", StShared = "st.shared",
    Local = "local", Generic = "generic", Atomic = "atomic", Shuffle = "shuffle", Vote = "vote",
    Barrier = "bar", Mbarrier = "mbarrier", CpAsync = "cp.async", Tma = "tma",
    Ldmatrix = "ldmatrix", Mma = "mma", Wgmma = "wgmma", WgmmaSync = "wgmma.sync",
    Tex = "tex", Surface = "surface", Multimem = "multimem", Fence = "fence", Misc = "misc",
}

impl Class {
    /// Computes lane by lane from registers to registers: it always goes on, and no other warp
    /// notices it.
    pub const fn is_lanewise(self) -> bool {
        use Class::*;
        matches!(self, Alu | Fma | Fp64 | Half | Sfu | Convert | Move)
    }
}

/// What an entry and the functions it may call need of an SM.
#[derive(Clone, Copy, Debug)]
pub struct Outline {
    /// Bytes of the shared variables that have a size.
    pub declared_shared_bytes: u32,
    /// Where dynamic shared memory begins: behind them, aligned.
    pub static_shared_bytes: u32,
    /// Bytes of local memory of a thread.
    pub local_bytes: u32,
    /// Most 32-bit registers live at once.
    pub registers: u32,
}

/// An entry and the functions it may call, as micro-operations.
pub struct Code {
    pub ops: Vec<MicroOp>,
    pub actions: Vec<Action>,
    pub wgmmas: Vec<wgmma::Operation>,
    /// Constants, in the order of their slots in [`super::cx::Grid::constants`] and
    /// [`super::cx::Grid::wide_constants`].
    pub constants: Vec<Constant>,
    /// Function 0 is the entry; the map from the module's functions is [`Code::function_of`].
    pub functions: Vec<FunctionInfo>,
    pub function_of: std::collections::BTreeMap<u32, u32>,
    pub outline: Outline,
    /// CTAs may communicate: see DESIGN.md on determinism.
    pub communicates: bool,
    /// It calls `malloc` or `free`.
    pub uses_heap: bool,
    /// What an operation does with registers, for functions with wgmma (which is not among them).
    pub touched: std::collections::BTreeMap<u32, Touch>,
    /// Variables in shared and local memory.
    pub objects: Vec<Object>,
    /// Registers a thread has at its start, where `setmaxnreg` takes effect.
    pub launch_registers: Option<u32>,
    /// Mnemonics of approximate instructions, by operation.
    pub approximate: Vec<(u32, String)>,
    /// Mnemonics and FLOPs of tensor-core instructions, by operation.
    pub tensor_core: Vec<(u32, String, u64)>,
    /// Instruction text by line is in the program; this names the kernel.
    pub name: String,
}

impl std::fmt::Debug for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Code of {}: {} operations", self.name, self.ops.len())
    }
}
