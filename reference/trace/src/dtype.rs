//! The names and sizes of element types, one vocabulary for all rooms.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// An element type, spelled as in a safetensors header.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
pub enum DType {
    /// IEEE 754's binary64.
    F64,
    /// IEEE 754's binary32.
    F32,
    /// bfloat16: 8 exponent bits, 7 fraction bits.
    BF16,
    /// IEEE 754's binary16.
    F16,
    /// OCP FP8 E4M3 ('fn': no infinities, NaN is 0x7F and 0xFF).
    #[serde(rename = "F8_E4M3")]
    F8E4M3,
    /// OCP FP8 E5M2.
    #[serde(rename = "F8_E5M2")]
    F8E5M2,
    /// OCP MX scale: a power of two, 0xFF is NaN.
    #[serde(rename = "F8_E8M0")]
    F8E8M0,
    /// Signed 64-bit integer.
    I64,
    /// Signed 32-bit integer.
    I32,
    /// Unsigned 64-bit integer.
    U64,
    /// Unsigned 32-bit integer; also a container of packed codes.
    U32,
    /// Signed 8-bit integer.
    I8,
    /// Unsigned byte; also a container of packed codes (E2M1 is two a byte).
    U8,
    /// One byte, 0 or 1.
    #[serde(rename = "BOOL")]
    Bool,
}

impl DType {
    /// Every element type.
    pub const ALL: [DType; 14] = [
        DType::F64,
        DType::F32,
        DType::BF16,
        DType::F16,
        DType::F8E4M3,
        DType::F8E5M2,
        DType::F8E8M0,
        DType::I64,
        DType::I32,
        DType::U64,
        DType::U32,
        DType::I8,
        DType::U8,
        DType::Bool,
    ];

    /// Bytes an element takes.
    pub const fn size(self) -> usize {
        match self {
            DType::F64 | DType::I64 | DType::U64 => 8,
            DType::F32 | DType::I32 | DType::U32 => 4,
            DType::BF16 | DType::F16 => 2,
            DType::F8E4M3 | DType::F8E5M2 | DType::F8E8M0 => 1,
            DType::I8 | DType::U8 | DType::Bool => 1,
        }
    }

    /// The name in a safetensors header, `F8_E4M3` for instance.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F64 => "F64",
            DType::F32 => "F32",
            DType::BF16 => "BF16",
            DType::F16 => "F16",
            DType::F8E4M3 => "F8_E4M3",
            DType::F8E5M2 => "F8_E5M2",
            DType::F8E8M0 => "F8_E8M0",
            DType::I64 => "I64",
            DType::I32 => "I32",
            DType::U64 => "U64",
            DType::U32 => "U32",
            DType::I8 => "I8",
            DType::U8 => "U8",
            DType::Bool => "BOOL",
        }
    }

    /// The element type of a safetensors name; `None` where no op of ours uses it.
    pub fn from_name(name: &str) -> Option<DType> {
        DType::ALL.into_iter().find(|d| d.name() == name)
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_agree_with_serde_and_come_back() {
        for d in DType::ALL {
            assert_eq!(serde_json::to_value(d).unwrap(), d.name());
            assert_eq!(DType::from_name(d.name()), Some(d));
        }
        assert_eq!(DType::from_name("C64"), None);
    }
}
