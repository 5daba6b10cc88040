//! The formats as types: plain codes (`#[repr(transparent)]`, bytemuck `Pod`) with a name.

use super::{Layout, Overflow, Rounding};
use bytemuck::{Pod, Zeroable};

macro_rules! code_type {
    ($(#[$doc:meta])* $name:ident, $raw:ty, $layout:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Pod, Zeroable)]
        #[repr(transparent)]
        pub struct $name(pub $raw);

        impl $name {
            /// The format as data.
            pub const LAYOUT: Layout = $layout;
            /// The largest finite value.
            pub const MAX: $name = $name(Self::LAYOUT.max_code() as $raw);
            /// The canonical NaN (E2M1, which has none: its largest value).
            pub const NAN: $name = $name(Self::LAYOUT.nan() as $raw);

            /// Wraps a code.
            pub const fn from_bits(bits: $raw) -> Self {
                $name(bits)
            }

            /// The code that stands for the value.
            pub const fn to_bits(self) -> $raw {
                self.0
            }

            /// Encodes an FP32 value, rounded once.
            pub fn from_f32(x: f32, rounding: Rounding, overflow: Overflow) -> Self {
                $name(Self::LAYOUT.from_f32(x, rounding, overflow) as $raw)
            }

            /// Encodes an FP64 value, rounded once.
            pub fn from_f64(x: f64, rounding: Rounding, overflow: Overflow) -> Self {
                $name(Self::LAYOUT.from_f64(x, rounding, overflow) as $raw)
            }

            /// The value, exact; NaN is the canonical one.
            pub fn to_f32(self) -> f32 {
                Self::LAYOUT.to_f32(u32::from(self.0))
            }

            /// The value, exact.
            pub fn to_f64(self) -> f64 {
                Self::LAYOUT.to_f64(u32::from(self.0))
            }

            /// Whether the code is a NaN.
            pub fn is_nan(self) -> bool {
                Self::LAYOUT.unpack(u32::from(self.0)).class == super::Class::Nan
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                let digits = (Self::LAYOUT.bits() as usize).div_ceil(4);
                write!(f, "{}({:#0w$x} = {})", stringify!($name), self.0, self.to_f64(), w = digits + 2)
            }
        }
    };
}

code_type!(
    /// FP8 E4M3 (OCP 'fn'), largest value 448. See [`Layout::E4M3`].
    E4M3,
    u8,
    Layout::E4M3
);
code_type!(
    /// FP8 E5M2, largest value 57344. See [`Layout::E5M2`].
    E5M2,
    u8,
    Layout::E5M2
);
code_type!(
    /// The 12-bit E5M6, largest value 65024, one code in the low bits of a `u16`; see
    /// [`super::packed`] for storage.
    E5M6,
    u16,
    Layout::E5M6
);
code_type!(
    /// Power-of-two scale of MX formats. See [`Layout::UE8M0`].
    UE8M0,
    u8,
    Layout::UE8M0
);
code_type!(
    /// Scale of NVFP4. See [`Layout::UE4M3`].
    UE4M3,
    u8,
    Layout::UE4M3
);
code_type!(
    /// FP4, one code in the low nibble; see [`super::packed`] for storage.
    E2M1,
    u8,
    Layout::E2M1
);

impl E4M3 {
    /// Saturating round-to-nearest-even, the cast of every quantisation; NaN gives 0x7F.
    ///
    /// The same codes as `from_f32(x, NearestEven, Saturate)`, without branches, so that loops over
    /// it vectorise.
    #[inline(always)]
    pub fn saturating(x: f32) -> E4M3 {
        let magnitude = x.to_bits() & 0x7FFF_FFFF;
        let sign = (x.to_bits() >> 24) & 0x80;
        // Normal results: round at bit 20 by adding just under half, then move the bias 127 -> 7.
        let normal = (magnitude + 0x7_FFFF + ((magnitude >> 20) & 1)) >> 20;
        let normal = normal.wrapping_sub(120 << 3);
        // Subnormal results: 2^14 has an ulp of 2^-9, E4M3's quantum, so the adder rounds.
        let subnormal = (f32::from_bits(magnitude) + 16384.0).to_bits().wrapping_sub(0x4680_0000);
        let code = if magnitude < 0x3C80_0000 { subnormal } else { normal };
        let code = if magnitude > 0x43E0_0000 { 0x7E } else { code };
        E4M3(if magnitude > 0x7F80_0000 { 0x7F } else { (sign | code) as u8 })
    }
}

impl E5M2 {
    /// Saturating round-to-nearest-even; NaN gives 0x7F. See [`E4M3::saturating`].
    #[inline(always)]
    pub fn saturating(x: f32) -> E5M2 {
        let magnitude = x.to_bits() & 0x7FFF_FFFF;
        let sign = (x.to_bits() >> 24) & 0x80;
        let normal = (magnitude + 0xF_FFFF + ((magnitude >> 21) & 1)) >> 21;
        let normal = normal.wrapping_sub(112 << 2);
        // 2^7 has an ulp of 2^-16, E5M2's quantum.
        let subnormal = (f32::from_bits(magnitude) + 128.0).to_bits().wrapping_sub(0x4300_0000);
        let code = if magnitude < 0x3880_0000 { subnormal } else { normal };
        let code = if magnitude > 0x4760_0000 { 0x7B } else { code };
        E5M2(if magnitude > 0x7F80_0000 { 0x7F } else { (sign | code) as u8 })
    }
}

impl E5M6 {
    /// Saturating round-to-nearest-even; NaN gives 0x7FF. See [`E4M3::saturating`].
    #[inline(always)]
    pub fn saturating(x: f32) -> E5M6 {
        let magnitude = x.to_bits() & 0x7FFF_FFFF;
        let sign = (x.to_bits() >> 20) & 0x800;
        let normal = (magnitude + 0xFFFF + ((magnitude >> 17) & 1)) >> 17;
        let normal = normal.wrapping_sub(112 << 6);
        // 2^3 has an ulp of 2^-20, E5M6's quantum.
        let subnormal = (f32::from_bits(magnitude) + 8.0).to_bits().wrapping_sub(0x4100_0000);
        let code = if magnitude < 0x3880_0000 { subnormal } else { normal };
        let code = if magnitude > 0x477E_0000 { 0x7BF } else { code };
        E5M6(if magnitude > 0x7F80_0000 { 0x7FF } else { (sign | code) as u16 })
    }
}

impl E2M1 {
    /// Saturating round-to-nearest-even; NaN gives +6, as E2M1 has none. See [`E4M3::saturating`].
    #[inline(always)]
    pub fn saturating(x: f32) -> E2M1 {
        let magnitude = x.to_bits() & 0x7FFF_FFFF;
        let sign = (x.to_bits() >> 28) & 0x8;
        let normal = (magnitude + 0x1F_FFFF + ((magnitude >> 22) & 1)) >> 22;
        let normal = normal.wrapping_sub(126 << 1);
        // 2^22 has an ulp of 2^-1, E2M1's quantum.
        let subnormal =
            (f32::from_bits(magnitude) + 4_194_304.0).to_bits().wrapping_sub(0x4A80_0000);
        let code = if magnitude < 0x3F80_0000 { subnormal } else { normal };
        let code = if magnitude > 0x40C0_0000 { 7 } else { code };
        E2M1(if magnitude > 0x7F80_0000 { 7 } else { (sign | code) as u8 })
    }
}

/// TF32 in its 32-bit container: an FP32 whose low 13 bits are zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Pod, Zeroable)]
#[repr(transparent)]
pub struct Tf32(u32);

impl Tf32 {
    /// What the tensor core makes of an FP32 operand: the low 13 bits dropped. A NaN whose payload
    /// lies in them becomes an infinity, as it does there.
    pub const fn truncate(x: f32) -> Tf32 {
        Tf32(x.to_bits() & !0x1FFF)
    }

    /// FP32 to TF32 as `cvt` does, rounded once; NaN canonical.
    pub fn from_f32(x: f32, rounding: Rounding, overflow: Overflow) -> Tf32 {
        Tf32(Layout::TF32.from_f32(x, rounding, overflow) << 13)
    }

    /// The container's bits.
    pub const fn to_bits(self) -> u32 {
        self.0
    }

    /// The value, exact.
    pub const fn to_f32(self) -> f32 {
        f32::from_bits(self.0)
    }
}

impl std::fmt::Debug for Tf32 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tf32({:#010x} = {})", self.0, self.to_f32())
    }
}
