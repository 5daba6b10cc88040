//! Registers as scalar types: [`Lane`] reads and writes a slot as any of them, [`read()`] and
//! [`write()`] as numbers.
//!
//! Narrow values lie in the low bits of a slot, zero- or sign-extended as their type says.

use half::{bf16, f16};

use super::cx::Cx;
use super::registers::{LANES, Reg};

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

// Loops, not `map`: what `map` is made of stays calls where the compiler inlines less.
macro_rules! via {
    ($($t:ty: $word:ty, |$w:ident| $from:expr, |$v:ident| $to:expr;)*) => { $(
        impl Lane for $t {
            #[inline(always)]
            fn read(cx: &Cx<'_>, reg: Reg) -> [$t; LANES] {
                let words = <$word as Lane>::read(cx, reg);
                let mut value = [<$t>::default(); LANES];
                for i in 0..LANES {
                    let $w = words[i];
                    value[i] = $from;
                }
                value
            }

            #[inline(always)]
            fn write(cx: &mut Cx<'_>, reg: Reg, value: [$t; LANES]) {
                let mut words = [<$word>::default(); LANES];
                for i in 0..LANES {
                    let $v = value[i];
                    words[i] = $to;
                }
                <$word as Lane>::write(cx, reg, words);
            }
        }
    )* };
}

via! {
    i32: u32, |w| w as i32, |v| v as u32;
    f32: u32, |w| f32::from_bits(w), |v| v.to_bits();
    u16: u32, |w| w as u16, |v| u32::from(v);
    i16: u32, |w| w as i16, |v| v as i32 as u32;
    u8: u32, |w| w as u8, |v| u32::from(v);
    i8: u32, |w| w as i8, |v| v as i32 as u32;
    f16: u32, |w| f16::from_bits(w as u16), |v| u32::from(v.to_bits());
    bf16: u32, |w| bf16::from_bits(w as u16), |v| u32::from(v.to_bits());
    i64: u64, |w| w as i64, |v| v as u64;
    f64: u64, |w| f64::from_bits(w), |v| v.to_bits();
}

/// A register of 8 to 64 bits as numbers.
#[inline(always)]
pub fn read(cx: &Cx<'_>, r: Reg, wide: bool) -> [u64; LANES] {
    if wide {
        return u64::read(cx, r);
    }
    let words = u32::read(cx, r);
    let mut value = [0; LANES];
    for i in 0..LANES {
        value[i] = words[i].into();
    }
    value
}

/// Writes numbers to a register.
pub fn write(cx: &mut Cx<'_>, r: Reg, wide: bool, value: [u64; LANES]) {
    if wide {
        u64::write(cx, r, value);
    } else {
        let mut words = [0; LANES];
        for i in 0..LANES {
            words[i] = value[i] as u32;
        }
        u32::write(cx, r, words);
    }
}

/// Writes one value to all executing lanes.
pub fn broadcast(cx: &mut Cx<'_>, d: Reg, wide: bool, value: u64) {
    if wide {
        u64::write(cx, d, [value; LANES]);
    } else {
        u32::write(cx, d, [value as u32; LANES]);
    }
}
