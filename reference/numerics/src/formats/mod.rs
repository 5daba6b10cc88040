//! Number formats, exact to the bit.
//!
//! Every format is a row of data, [`Layout`]: exponent bits, fraction bits, bias, which codes are
//! special. One decoder and one encoder serve them all ([`layout`]); the typed wrappers ([`types`]:
//! [`E4M3`], [`E5M2`], [`E5M6`], [`UE8M0`], [`UE4M3`], [`E2M1`], [`Tf32`], and `half`'s [`bf16`]
//! and [`struct@f16`]) put a name and a storage size on a row. Where a format is chosen at run
//! time, it is a [`Format`]. Packed storage of E5M6 and E2M1 is in [`packed`].
//!
//! Canonical NaNs: whatever NaN enters, the NaN that leaves is [`Layout::nan`], positive with all
//! exponent and fraction bits set: 0x7F (E4M3, E5M2, UE4M3), 0xFF (UE8M0), 0x7FF (E5M6), 0x7FFF
//! (F16, BF16), 0x7FFFFFFF (F32).

pub mod layout;
pub mod packed;
pub mod types;

pub use half::{bf16, f16};
pub use layout::{Class, Layout, Overflow, Rounding, Special, Unpacked};
pub use types::{E2M1, E4M3, E5M2, E5M6, Tf32, UE4M3, UE8M0};

/// The canonical NaN of FP32, 0x7FFFFFFF: what the tensor core writes and what every op stores.
pub const F32_NAN: f32 = f32::from_bits(0x7FFF_FFFF);
/// The canonical NaN of BF16, 0x7FFF.
pub const BF16_NAN: bf16 = bf16::from_bits(0x7FFF);
/// The canonical NaN of FP16, 0x7FFF.
pub const F16_NAN: f16 = f16::from_bits(0x7FFF);

/// `x`, with any NaN replaced by the canonical one. Applied where an op stores FP32.
#[inline]
pub fn canonical_f32(x: f32) -> f32 {
    if x.is_nan() { F32_NAN } else { x }
}

/// FP32 to BF16, round to nearest even, NaN canonical. The output cast of GEMMs and of every op
/// that stores BF16.
#[inline]
pub fn to_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
    bf16::from_bits(if x.is_nan() { 0x7FFF } else { rounded as u16 })
}

/// FP32 to FP16, round to nearest even, overflow to infinity, NaN canonical.
#[inline]
pub fn to_f16(x: f32) -> f16 {
    if x.is_nan() { F16_NAN } else { f16::from_f32(x) }
}

/// A format chosen at run time, under the name PTX gives it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[allow(missing_docs)] // the names say it; `layout` documents each
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum Format {
    E4M3,
    E5M2,
    E5M6,
    UE8M0,
    UE4M3,
    E2M1,
    Bf16,
    F16,
    /// Held in 32 bits, of which the tensor core ignores the low 13.
    Tf32,
    F32,
}

impl Format {
    /// Every format, in the order of their declaration.
    pub const ALL: [Format; 10] = [
        Format::E4M3,
        Format::E5M2,
        Format::E5M6,
        Format::UE8M0,
        Format::UE4M3,
        Format::E2M1,
        Format::Bf16,
        Format::F16,
        Format::Tf32,
        Format::F32,
    ];

    /// The name as PTX writes it: `e4m3`, `bf16`, `ue8m0`.
    pub fn name(self) -> &'static str {
        match self {
            Format::E4M3 => "e4m3",
            Format::E5M2 => "e5m2",
            Format::E5M6 => "e5m6",
            Format::UE8M0 => "ue8m0",
            Format::UE4M3 => "ue4m3",
            Format::E2M1 => "e2m1",
            Format::Bf16 => "bf16",
            Format::F16 => "f16",
            Format::Tf32 => "tf32",
            Format::F32 => "f32",
        }
    }

    /// The format of that PTX name.
    pub fn parse(name: &str) -> Option<Format> {
        Format::ALL.into_iter().find(|f| f.name() == name)
    }

    /// The row of data behind the format.
    pub fn layout(self) -> &'static Layout {
        match self {
            Format::E4M3 => &Layout::E4M3,
            Format::E5M2 => &Layout::E5M2,
            Format::E5M6 => &Layout::E5M6,
            Format::UE8M0 => &Layout::UE8M0,
            Format::UE4M3 => &Layout::UE4M3,
            Format::E2M1 => &Layout::E2M1,
            Format::Bf16 => &Layout::BF16,
            Format::F16 => &Layout::F16,
            Format::Tf32 => &Layout::TF32,
            Format::F32 => &Layout::F32,
        }
    }

    /// Decodes a stored code. A TF32 code is the 32-bit container; its low 13 bits are dropped.
    /// UE4M3 is stored as E4M3, whose sign bit is ignored.
    #[inline]
    pub fn unpack(self, code: u32) -> Unpacked {
        match self {
            Format::Tf32 => Layout::TF32.unpack(code >> 13),
            Format::UE4M3 => Layout::UE4M3.unpack(code & 0x7F),
            _ => self.layout().unpack(code),
        }
    }

    /// The largest finite value, exact in FP32.
    pub fn max(self) -> f32 {
        let layout = self.layout();
        layout.to_f64(layout.max_code()) as f32
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
