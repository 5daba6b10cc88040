//! The 128-byte tensor map (`CUtensorMap`): its encoding is opaque to programs, so this is ours.
//!
//! `cuTensorMapEncodeTiled` and `cuTensorMapEncodeIm2col` build one, TMA instructions read it,
//! `tensormap.replace` (PTX ISA, "tensormap.replace") changes its fields. Sizes are elements
//! unless a name says bytes; dimension 0 is the innermost.

/// Type of the elements that a tensor map moves, numbered as `CUtensorMapDataType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum MapElement {
    U8 = 0,
    U16 = 1,
    U32 = 2,
    S32 = 3,
    U64 = 4,
    S64 = 5,
    F16 = 6,
    F32 = 7,
    F64 = 8,
    Bf16 = 9,
    F32Ftz = 10,
    Tf32 = 11,
    Tf32Ftz = 12,
}

impl MapElement {
    const ALL: [MapElement; 13] = {
        use MapElement::*;
        [U8, U16, U32, S32, U64, S64, F16, F32, F64, Bf16, F32Ftz, Tf32, Tf32Ftz]
    };

    /// The type numbered so in `CUtensorMapDataType`.
    pub fn from_cuda(code: u32) -> Option<MapElement> {
        Self::ALL.get(code as usize).copied()
    }

    /// The type numbered so by `tensormap.replace.elemtype`, which orders them otherwise.
    pub fn from_ptx(code: u32) -> Option<MapElement> {
        use MapElement::*;
        let order = [U8, U16, U32, S32, U64, S64, F16, F32, F32Ftz, F64, Bf16, Tf32, Tf32Ftz];
        order.get(code as usize).copied()
    }

    /// Bytes of an element.
    pub const fn bytes(self) -> u32 {
        use MapElement::*;
        match self {
            U8 => 1,
            U16 | F16 | Bf16 => 2,
            U32 | S32 | F32 | F32Ftz | Tf32 | Tf32Ftz => 4,
            U64 | S64 | F64 => 8,
        }
    }

    /// Whether out-of-bounds elements may be filled with NaN.
    pub const fn is_float(self) -> bool {
        use MapElement::*;
        matches!(self, F16 | F32 | F64 | Bf16 | F32Ftz | Tf32 | Tf32Ftz)
    }
}

/// What a box is cut from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Boxes of the tensor itself.
    Tiled,
    /// Columns of an image: rank 3 to 5, channels innermost, batch outermost.
    Im2col {
        /// Lower corner of the pixel box, a spatial dimension each.
        lower: [i16; 3],
        /// Upper corner of the pixel box.
        upper: [i16; 3],
        /// Channels of a pixel that one copy takes.
        channels: u16,
        /// Pixels that one copy takes.
        pixels: u16,
    },
}

/// A decoded tensor map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// Type of an element in global memory.
    pub element: MapElement,
    /// How many dimensions the tensor has, 1 to 5.
    pub rank: u32,
    /// Address of the tensor, a multiple of 16.
    pub address: u64,
    /// Elements along each dimension, the innermost first; those beyond the rank do not count.
    pub dims: [u64; 5],
    /// Bytes from one index to the next in dimension 1, 2, ...; dimension 0 is dense.
    pub strides_bytes: [u64; 4],
    /// Elements of the box that a tiled copy moves, along each dimension, the innermost first.
    pub box_dims: [u32; 5],
    /// Every how many elements of a dimension one is taken, 1 to 8; 1: all.
    pub element_strides: [u32; 5],
    /// `CUtensorMapInterleave`: 0 none, 1 of 16 bytes, 2 of 32 bytes.
    pub interleave: u32,
    /// `CUtensorMapSwizzle`: 0 none, 1 of 32, 2 of 64, 3 of 128 bytes.
    pub swizzle: u32,
    /// `CUtensorMapL2promotion`; kept, without effect.
    pub l2_promotion: u32,
    /// Out-of-bounds elements are NaN instead of zero.
    pub fill_nan: bool,
    /// How a box of coordinates stands for elements: tiled or im2col.
    pub mode: Mode,
}

/// A field that breaks a rule of the driver API's documentation of `cuTensorMapEncode*`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("tensor map: {field}: expected {expected}, found {found}")]
pub struct TensorMapError {
    /// Which argument breaks a rule.
    pub field: &'static str,
    /// The rule that it breaks.
    pub expected: String,
    /// The argument's value.
    pub found: String,
}

const MAGIC: u32 = u32::from_le_bytes(*b"FTM1");

impl TensorMap {
    /// Bytes of an encoded map.
    pub const BYTES: usize = 128;

    /// The map that 128 zero bytes stand for, before `tensormap.replace` fills its fields.
    pub(crate) fn blank() -> TensorMap {
        TensorMap {
            element: MapElement::U8,
            rank: 1,
            address: 0,
            dims: [1; 5],
            strides_bytes: [0; 4],
            box_dims: [1; 5],
            element_strides: [1; 5],
            interleave: 0,
            swizzle: 0,
            l2_promotion: 0,
            fill_nan: false,
            mode: Mode::Tiled,
        }
    }

    /// Checks the rules and encodes.
    ///
    /// # Errors
    /// The first rule that does not hold (the driver says `CUDA_ERROR_INVALID_VALUE`).
    pub fn encode(&self) -> Result<[u8; Self::BYTES], TensorMapError> {
        self.validate()?;
        Ok(self.encode_unchecked())
    }

    /// Encodes without looking: `tensormap.replace` changes a field at a time.
    pub(crate) fn encode_unchecked(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[..8].copy_from_slice(&self.address.to_le_bytes());
        out[8..12].copy_from_slice(&MAGIC.to_le_bytes());
        let im2col = self.mode != Mode::Tiled;
        let small = [
            self.element as u8,
            self.rank as u8,
            self.interleave as u8,
            self.swizzle as u8,
            self.l2_promotion as u8,
            self.fill_nan as u8,
            im2col as u8,
        ];
        out[12..19].copy_from_slice(&small);
        for d in 0..5 {
            // A dimension may have 2^32 elements, so one less is stored, as in the hardware.
            let dim = (self.dims[d].wrapping_sub(1)) as u32;
            out[20 + 4 * d..24 + 4 * d].copy_from_slice(&dim.to_le_bytes());
            let side = self.box_dims[d] as u16;
            out[72 + 2 * d..74 + 2 * d].copy_from_slice(&side.to_le_bytes());
            out[82 + d] = self.element_strides[d] as u8;
        }
        for d in 0..4 {
            let stride = self.strides_bytes[d].to_le_bytes();
            out[40 + 8 * d..48 + 8 * d].copy_from_slice(&stride);
        }
        if let Mode::Im2col { lower, upper, channels, pixels } = self.mode {
            for d in 0..3 {
                out[88 + 2 * d..90 + 2 * d].copy_from_slice(&lower[d].to_le_bytes());
                out[94 + 2 * d..96 + 2 * d].copy_from_slice(&upper[d].to_le_bytes());
            }
            out[100..102].copy_from_slice(&channels.to_le_bytes());
            out[102..104].copy_from_slice(&pixels.to_le_bytes());
        }
        out
    }

    /// Reads an encoded map back.
    ///
    /// # Errors
    /// Where the bytes are no tensor map (never encoded, or overwritten).
    pub fn decode(b: &[u8; Self::BYTES]) -> Result<TensorMap, TensorMapError> {
        let u16_at = |i: usize| u16::from_le_bytes([b[i], b[i + 1]]);
        let u32_at = |i: usize| u32::from_le_bytes(b[i..i + 4].try_into().expect("4 bytes"));
        let u64_at = |i: usize| u64::from_le_bytes(b[i..i + 8].try_into().expect("8 bytes"));
        let wrong = |expected: &str, found: String| TensorMapError {
            field: "bytes",
            expected: expected.into(),
            found,
        };
        if u32_at(8) != MAGIC {
            let found = format!("{:02x?}", &b[..16]);
            return Err(wrong("a map made by cuTensorMapEncode*", found));
        }
        let element = MapElement::from_cuda(u32::from(b[12]))
            .ok_or_else(|| wrong("an element type", b[12].to_string()))?;
        let mode = match b[18] {
            0 => Mode::Tiled,
            _ => Mode::Im2col {
                lower: std::array::from_fn(|d| u16_at(88 + 2 * d) as i16),
                upper: std::array::from_fn(|d| u16_at(94 + 2 * d) as i16),
                channels: u16_at(100),
                pixels: u16_at(102),
            },
        };
        Ok(TensorMap {
            element,
            rank: u32::from(b[13]),
            address: u64_at(0),
            dims: std::array::from_fn(|d| u64::from(u32_at(20 + 4 * d)) + 1),
            strides_bytes: std::array::from_fn(|d| u64_at(40 + 8 * d)),
            box_dims: std::array::from_fn(|d| u32::from(u16_at(72 + 2 * d))),
            element_strides: std::array::from_fn(|d| u32::from(b[82 + d])),
            interleave: u32::from(b[14]),
            swizzle: u32::from(b[15]),
            l2_promotion: u32::from(b[16]),
            fill_nan: b[17] != 0,
            mode,
        })
    }

    /// The rules of `cuTensorMapEncodeTiled` and `cuTensorMapEncodeIm2col`.
    fn validate(&self) -> Result<(), TensorMapError> {
        let fail = |field, expected: &str, found: String| {
            Err(TensorMapError { field, expected: expected.into(), found })
        };
        let im2col = self.mode != Mode::Tiled;
        let rank = self.rank as usize;
        let ranks = if im2col || self.interleave != 0 { 3..=5 } else { 1..=5 };
        if !ranks.contains(&rank) {
            return fail("tensorRank", &format!("{ranks:?}"), rank.to_string());
        }
        let align = if self.interleave == 2 { 32 } else { 16 };
        if !self.address.is_multiple_of(align) {
            let found = format!("{:#x}", self.address);
            return fail("globalAddress", &format!("a multiple of {align}"), found);
        }
        if self.interleave > 2 || self.swizzle > 3 {
            let found = format!("interleave {}, swizzle {}", self.interleave, self.swizzle);
            return fail("interleave, swizzle", "0 to 2, 0 to 3", found);
        }
        for d in 0..rank {
            if self.dims[d] == 0 || self.dims[d] > 1 << 32 {
                return fail("globalDim", "1 to 2^32", self.dims[d].to_string());
            }
            if !(1..=8).contains(&self.element_strides[d]) {
                return fail("elementStrides", "1 to 8", self.element_strides[d].to_string());
            }
            if !im2col && !(1..=256).contains(&self.box_dims[d]) {
                return fail("boxDim", "1 to 256", self.box_dims[d].to_string());
            }
        }
        for &stride in &self.strides_bytes[..rank - 1] {
            if !stride.is_multiple_of(align) || stride >= 1 << 40 {
                let expected = format!("a multiple of {align} below 2^40");
                return fail("globalStrides", &expected, stride.to_string());
            }
        }
        let inner = match self.mode {
            Mode::Tiled => u64::from(self.box_dims[0]),
            Mode::Im2col { channels, pixels, .. } => {
                if !(1..=256).contains(&channels) || !(1..=1024).contains(&pixels) {
                    let found = format!("{channels}, {pixels}");
                    return fail("channelsPerPixel, pixelsPerColumn", "1..256, 1..1024", found);
                }
                u64::from(channels)
            }
        };
        let inner_bytes = inner * u64::from(self.element.bytes());
        if self.interleave == 0 && !inner_bytes.is_multiple_of(16) {
            return fail("boxDim[0]", "a multiple of 16 bytes", format!("{inner_bytes} bytes"));
        }
        let span = 16u64 << self.swizzle;
        if self.interleave == 0 && self.swizzle != 0 && inner_bytes > span {
            let expected = format!("at most the swizzle's {span} bytes");
            return fail("boxDim[0]", &expected, format!("{inner_bytes} bytes"));
        }
        if self.interleave == 2 && self.swizzle != 1 {
            return fail("swizzle", "32 bytes with interleave 32", self.swizzle.to_string());
        }
        if self.fill_nan && !self.element.is_float() {
            return fail("oobFill", "zeros for integers", "NaN".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map() -> TensorMap {
        TensorMap {
            element: MapElement::Bf16,
            rank: 2,
            address: 0x1000_0000_0000,
            dims: [1 << 32, 77, 1, 1, 1],
            strides_bytes: [1 << 34, 0, 0, 0],
            box_dims: [64, 128, 1, 1, 1],
            element_strides: [1; 5],
            interleave: 0,
            swizzle: 3,
            l2_promotion: 2,
            fill_nan: true,
            mode: Mode::Tiled,
        }
    }

    #[test]
    fn decode_inverts_encode() {
        let tiled = map();
        assert_eq!(TensorMap::decode(&tiled.encode().unwrap()).unwrap(), tiled);
        let mode =
            Mode::Im2col { lower: [-1, -2, 0], upper: [3, -4, 0], channels: 64, pixels: 1000 };
        let im2col = TensorMap { rank: 4, mode, ..map() };
        assert_eq!(TensorMap::decode(&im2col.encode().unwrap()).unwrap(), im2col);
    }

    #[test]
    fn rules_name_the_argument() {
        let cases: [(&str, TensorMap); 5] = [
            ("boxDim[0]", TensorMap { box_dims: [65, 1, 1, 1, 1], ..map() }),
            ("boxDim[0]", TensorMap { box_dims: [128, 1, 1, 1, 1], ..map() }),
            ("globalAddress", TensorMap { address: 8, ..map() }),
            ("globalStrides", TensorMap { strides_bytes: [8, 0, 0, 0], ..map() }),
            ("oobFill", TensorMap { element: MapElement::U16, ..map() }),
        ];
        for (field, bad) in cases {
            assert_eq!(bad.encode().unwrap_err().field, field);
        }
        assert!(TensorMap::decode(&[0; 128]).is_err());
    }
}
