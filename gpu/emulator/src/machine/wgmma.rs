//! wgmmas as the machine holds them: of the code, and those that a warp has issued.

use super::product::Product;
use super::registers::{LANES, Reg};

/// Where A comes from.
pub enum OperandA {
    Shared(Reg),
    Registers { slots: Vec<Reg>, names: Vec<u32> },
}

/// What one `wgmma.mma_async` of the code multiplies: D (16 rows a warp by `n`) += A (`k` wide) B.
pub struct Operation {
    pub product: Product,
    pub source: OperandA,
    pub b_desc: Reg,
    pub scale_d: (Reg, bool),
    pub signs: [bool; 2],
    pub transposed: [bool; 2],
    pub regs: Vec<Reg>,
    /// The accumulator's registers as the program names them.
    pub names: Vec<u32>,
    pub n: usize,
    /// Columns of A as they are stored: of a sparse A half of those that it has.
    pub k: usize,
    /// Where A is sparse: the register of its metadata, and which lanes of a quad count.
    pub sparse: Option<(Reg, u32)>,
}

/// A wgmma that a warp has issued, with what it depends on beside the accumulator's registers.
pub struct Issued {
    /// Which [`Operation`] of the code.
    pub number: usize,
    pub pc: u32,
    /// The lanes that issued it.
    pub mask: u32,
    /// The frame that its registers are in.
    pub base: usize,
    /// Descriptor of A, where that lies in shared memory.
    pub a_desc: u64,
    pub b_desc: u64,
    /// The metadata of a sparse A, as the register was when it was issued.
    pub metadata: Option<Box<[u32; LANES]>>,
    /// Adds to the accumulator.
    pub keep: bool,
}
