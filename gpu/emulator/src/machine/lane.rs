//! Registers of a warp, in two files: a [`Slot`] holds a 32-bit register of all 32 lanes, a
//! [`WideSlot`] a 64-bit one; two of those make a 128-bit one.
//!
//! Number L of a slot of either file belongs to lane L, whatever the slot is used for. So lanes
//! that have parted may give the same slots to registers of other functions, or to temporaries,
//! and never see one another's.
//!
//! [`Lane`] reads and writes a slot as any scalar type. Narrow values lie in the low bits of a
//! slot, zero- or sign-extended as their type says.

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};

use super::cx::Cx;

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

/// A scalar type as registers hold it.
pub trait Lane: Copy + Default {
    /// The register in all lanes.
    fn read(cx: &Cx<'_>, reg: Reg) -> [Self; LANES];
    /// Writes the executing lanes of the register.
    fn write(cx: &mut Cx<'_>, reg: Reg, value: [Self; LANES]);
}

#[inline(always)]
fn blend<T: Copy>(to: &mut [T; LANES], value: &[T; LANES], mask: u32) {
    if mask == !0 {
        *to = *value;
    } else {
        for i in 0..LANES {
            to[i] = if mask >> i & 1 != 0 { value[i] } else { to[i] };
        }
    }
}

impl Lane for u32 {
    #[inline(always)]
    fn read(cx: &Cx<'_>, reg: Reg) -> [u32; LANES] {
        *cx.slot(reg)
    }

    #[inline(always)]
    fn write(cx: &mut Cx<'_>, reg: Reg, value: [u32; LANES]) {
        let mask = cx.mask;
        blend(cx.slot_mut(reg), &value, mask);
    }
}

impl Lane for u64 {
    #[inline(always)]
    fn read(cx: &Cx<'_>, reg: Reg) -> [u64; LANES] {
        *cx.slot64(reg)
    }

    #[inline(always)]
    fn write(cx: &mut Cx<'_>, reg: Reg, value: [u64; LANES]) {
        let mask = cx.mask;
        blend(cx.slot64_mut(reg), &value, mask);
    }
}

macro_rules! via {
    ($($t:ty: $word:ty, $from:expr, $to:expr;)*) => { $(
        impl Lane for $t {
            #[inline(always)]
            fn read(cx: &Cx<'_>, reg: Reg) -> [$t; LANES] {
                let words = <$word as Lane>::read(cx, reg);
                let f: fn($word) -> $t = $from;
                std::array::from_fn(|i| f(words[i]))
            }

            #[inline(always)]
            fn write(cx: &mut Cx<'_>, reg: Reg, value: [$t; LANES]) {
                let f: fn($t) -> $word = $to;
                <$word as Lane>::write(cx, reg, std::array::from_fn(|i| f(value[i])));
            }
        }
    )* };
}

via! {
    i32: u32, |w| w as i32, |v| v as u32;
    f32: u32, f32::from_bits, f32::to_bits;
    u16: u32, |w| w as u16, u32::from;
    i16: u32, |w| w as i16, |v| v as i32 as u32;
    u8: u32, |w| w as u8, u32::from;
    i8: u32, |w| w as i8, |v| v as i32 as u32;
    f16: u32, |w| f16::from_bits(w as u16), |v| u32::from(v.to_bits());
    bf16: u32, |w| bf16::from_bits(w as u16), |v| u32::from(v.to_bits());
    i64: u64, |w| w as i64, |v| v as u64;
    f64: u64, f64::from_bits, f64::to_bits;
}
