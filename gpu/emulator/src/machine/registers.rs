//! Registers of a warp, in two files: a [`Slot`] holds a 32-bit register of all 32 lanes, a
//! [`WideSlot`] a 64-bit one; two of those make a 128-bit one.
//!
//! Number L of a slot of either file belongs to lane L, whatever the slot is used for. So lanes
//! that have parted may give the same slots to registers of other functions, or to temporaries,
//! and never see one another's. [`super::lane`] reads and writes them as scalar types.

use bytemuck::{Pod, Zeroable};

/// Lanes of a warp.
pub const LANES: usize = 32;

/// A 32-bit register of a warp.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct Slot(pub [u32; LANES]);

/// A 64-bit register of a warp.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct WideSlot(pub [u64; LANES]);

/// A register number of a micro-operation: a slot of the current frame, or of the constants
/// where [`CONSTANT`] is set; in the file of wide slots where [`WIDE`] is set.
pub type Reg = u16;

/// Set in the number of a constant's slot.
pub const CONSTANT: u16 = 0x8000;

/// Set in the number of a 64-bit register.
pub const WIDE: u16 = 0x4000;

/// What goes to `_` is written to this slot of either file, and its second half to the next.
pub const SINK: Reg = 0;

/// Slots at the start of a frame, in either file, that no register has.
pub const SINK_SLOTS: u32 = 2;
