//! What is known of lowered code beside its operations: frames, variables, the registers that an
//! operation touches, constants.

/// A function inside [`super::op::Code`].
#[derive(Clone, Debug, Default)]
pub struct FunctionInfo {
    /// Index of its first operation.
    pub start: u32,
    /// Slots of either file, and predicates, of a frame.
    pub slots: u32,
    pub wide_slots: u32,
    pub predicates: u32,
    /// Local memory of a frame in bytes: variables, parameters, results.
    pub local_bytes: u32,
    /// Where formal parameters and results lie in the frame's local memory: (offset, bytes).
    pub params: Vec<(u32, u32)>,
    pub returns: Vec<(u32, u32)>,
}

/// A variable in shared or local memory, to whose bytes an address may be held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    pub name: String,
    /// First byte: in the CTA's shared memory, or in the frame's local memory.
    pub start: u32,
    pub bytes: u32,
    /// Whether it lies in local memory, else in shared.
    pub local: bool,
}

/// Registers, as the program names them, that an operation reads and writes.
#[derive(Clone, Debug, Default)]
pub struct Touch {
    pub read: Vec<u32>,
    pub written: Vec<u32>,
    /// It does nothing but copy what it reads to what it writes.
    pub copies: bool,
}

/// A literal or an address in the code, which a launch turns into a slot of 32 equal lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Constant {
    /// The same in every launch.
    Bits { bits: u64, wide: bool },
    /// Address of a module-scope variable or function, plus a number.
    Symbol { symbol: fathom_ptx::ast::Symbol, addend: i64, wide: bool },
}
