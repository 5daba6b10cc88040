//! A binary floating-point format as data, and the one decoder and encoder over it.
//!
//! The encoder takes an exact value, an integer times a power of two, so that every cast of the
//! project rounds exactly once: FP32 and FP64 inputs and the tensor core's sums all come this way.

/// How a value between two codes is rounded.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema))]
pub enum Rounding {
    /// To nearest, ties to even (RNE).
    #[cfg_attr(feature = "serde", serde(rename = "rn"))]
    NearestEven,
    /// Toward zero: truncation (RZ).
    #[cfg_attr(feature = "serde", serde(rename = "rz"))]
    TowardZero,
    /// Toward minus infinity.
    #[cfg_attr(feature = "serde", serde(rename = "rm"))]
    Down,
    /// Toward plus infinity.
    #[cfg_attr(feature = "serde", serde(rename = "rp"))]
    Up,
}

/// What a finite value becomes whose rounded magnitude exceeds the largest finite code.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Overflow {
    /// The largest finite value; infinities too (`cvt.satfinite`).
    Saturate,
    /// IEEE 754: infinity under round-to-nearest, the largest finite value where the rounding
    /// direction points toward zero. Formats without infinity give NaN for infinity.
    Ieee,
    /// Always infinity (NaN where there is none), as the tensor core does although it truncates.
    Infinity,
}

/// Which codes are not finite numbers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Special {
    /// Top exponent: fraction 0 is infinity, any other a NaN.
    Ieee,
    /// No infinity; only the code with all bits set is a NaN ('fn').
    AllOnesNan,
    /// Every code is a finite number.
    None,
}

/// A floating-point format: sign, exponent and fraction fields from the top bit down.
///
/// ```
/// use fathom_numerics::formats::{Layout, Overflow, Rounding};
/// let code = Layout::E4M3.from_f32(17.0, Rounding::NearestEven, Overflow::Saturate);
/// assert_eq!(Layout::E4M3.to_f64(code), 16.0); // 17 lies between 16 and 18: a tie, to even
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Layout {
    /// Width of the exponent field.
    pub exponent_bits: u32,
    /// Width of the fraction field.
    pub fraction_bits: u32,
    /// Exponent field minus exponent.
    pub bias: i32,
    /// Whether there is a sign bit.
    pub signed: bool,
    /// Whether exponent field 0 holds zero and subnormals (UE8M0: no, it is 2^-127).
    pub subnormals: bool,
    /// The codes that are not finite numbers.
    pub special: Special,
}

/// What a code stands for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Class {
    /// A finite number, zero included.
    Finite,
    /// An infinity of either sign.
    Infinite,
    /// A NaN of any payload.
    Nan,
}

/// A decoded code: `(-1)^negative * significand * 2^(exponent - fraction_bits)`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unpacked {
    /// Finite, infinite or NaN; the fields below describe finite numbers.
    pub class: Class,
    /// The sign bit.
    pub negative: bool,
    /// Fraction with the implicit bit; below `2^fraction_bits` for subnormals, 0 for zero.
    pub significand: u32,
    /// The nominal exponent: that of a subnormal (and of zero) is the smallest normal one.
    pub exponent: i32,
}

const fn ieee(exponent_bits: u32, fraction_bits: u32) -> Layout {
    Layout {
        exponent_bits,
        fraction_bits,
        bias: (1 << (exponent_bits - 1)) - 1,
        signed: true,
        subnormals: true,
        special: Special::Ieee,
    }
}

impl Layout {
    /// FP8 E4M3, OCP 'fn': largest 448, NaN 0x7F and 0xFF, no infinity.
    pub const E4M3: Layout = Layout { special: Special::AllOnesNan, ..ieee(4, 3) };
    /// FP8 E5M2: largest 57344, infinities and NaNs as IEEE 754.
    pub const E5M2: Layout = ieee(5, 2);
    /// 12 bits, FP16 with a fraction of 6 bits: largest 65024.
    pub const E5M6: Layout = ieee(5, 6);
    /// Power-of-two scales of MX formats: 2^-127 (code 0) to 2^127, NaN 0xFF; no sign, no zero.
    pub const UE8M0: Layout =
        Layout { signed: false, subnormals: false, special: Special::AllOnesNan, ..ieee(8, 0) };
    /// Scales of NVFP4: E4M3 without a sign.
    pub const UE4M3: Layout = Layout { signed: false, ..Layout::E4M3 };
    /// FP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; neither infinity nor NaN.
    pub const E2M1: Layout = Layout { special: Special::None, ..ieee(2, 1) };
    /// BF16: FP32's exponent, 7 fraction bits.
    pub const BF16: Layout = ieee(8, 7);
    /// IEEE 754's binary16.
    pub const F16: Layout = ieee(5, 10);
    /// TF32: FP32's exponent, 10 fraction bits; codes of 19 bits, the top bits of an FP32.
    pub const TF32: Layout = ieee(8, 10);
    /// IEEE 754's binary32.
    pub const F32: Layout = ieee(8, 23);

    /// FP32's exponent with `fraction_bits` bits of fraction (at most 23). `e8(13)` is E8M13, what
    /// Ada and Hopper hold an FP8 accumulator in; its code shifted left by `23 - fraction_bits` is
    /// the FP32 of the same value.
    pub const fn e8(fraction_bits: u32) -> Layout {
        assert!(fraction_bits >= 1 && fraction_bits <= 23);
        ieee(8, fraction_bits)
    }

    /// Bits of a code, sign included.
    pub const fn bits(&self) -> u32 {
        self.signed as u32 + self.exponent_bits + self.fraction_bits
    }

    const fn sign_bit(&self) -> u32 {
        if self.signed { 1 << (self.exponent_bits + self.fraction_bits) } else { 0 }
    }

    const fn magnitude_mask(&self) -> u32 {
        ((1u64 << (self.exponent_bits + self.fraction_bits)) - 1) as u32
    }

    /// The smallest exponent of a normal number.
    pub const fn min_exponent(&self) -> i32 {
        if self.subnormals { 1 - self.bias } else { -self.bias }
    }

    /// The code of the largest finite value.
    pub const fn max_code(&self) -> u32 {
        match self.special {
            Special::Ieee => (((1 << self.exponent_bits) - 1) << self.fraction_bits) - 1,
            Special::AllOnesNan => self.magnitude_mask() - 1,
            Special::None => self.magnitude_mask(),
        }
    }

    /// The canonical NaN: all bits set but the sign. E2M1 has none and gives its largest value, as
    /// `cvt.e2m1x2` does.
    pub const fn nan(&self) -> u32 {
        self.magnitude_mask()
    }

    /// The code of infinity of that sign; NaN (largest value for E2M1) where the format has none.
    pub const fn infinity(&self, negative: bool) -> u32 {
        match self.special {
            Special::Ieee => (self.max_code() + 1) | if negative { self.sign_bit() } else { 0 },
            Special::AllOnesNan => self.nan(),
            Special::None => self.max_code() | if negative { self.sign_bit() } else { 0 },
        }
    }

    /// Decodes a code, exactly. Bits above the format's width must be zero.
    #[inline]
    pub const fn unpack(&self, code: u32) -> Unpacked {
        let magnitude = code & self.magnitude_mask();
        let negative = code & self.sign_bit() != 0;
        let class = if magnitude <= self.max_code() {
            Class::Finite
        } else if matches!(self.special, Special::Ieee) && magnitude == self.max_code() + 1 {
            Class::Infinite
        } else {
            Class::Nan
        };
        let field = magnitude >> self.fraction_bits;
        let fraction = magnitude & ((1 << self.fraction_bits) - 1);
        let (significand, exponent) = if field == 0 && self.subnormals {
            (fraction, 1 - self.bias)
        } else {
            (fraction | 1 << self.fraction_bits, field as i32 - self.bias)
        };
        Unpacked { class, negative, significand, exponent }
    }

    /// Encodes `(-1)^negative * magnitude * 2^lsb_exponent`, rounded once.
    ///
    /// A zero magnitude keeps its sign. A caller whose value has more than 64 bits may fold the
    /// rest into the lowest bit (sticky). A negative value has no code in an unsigned format: NaN.
    #[inline]
    pub fn encode(
        &self,
        negative: bool,
        magnitude: u64,
        lsb_exponent: i32,
        rounding: Rounding,
        overflow: Overflow,
    ) -> u32 {
        let sign = if negative { self.sign_bit() } else { 0 };
        if negative && !self.signed {
            return if magnitude == 0 { 0 } else { self.nan() };
        }
        if magnitude == 0 {
            return sign;
        }
        let top = 63 - magnitude.leading_zeros() as i32;
        let exponent = (lsb_exponent + top).max(self.min_exponent());
        if exponent > self.bias + 1 {
            return self.overflowed(negative, rounding, overflow);
        }
        let drop = exponent - self.fraction_bits as i32 - lsb_exponent;
        let kept = round_shift(magnitude, drop, negative, rounding);
        // Fraction and exponent field are contiguous, so a carry out of the fraction moves on to
        // the next exponent by itself, and codes are ordered as their values are.
        let implicit = 1u64 << self.fraction_bits;
        let code = if kept < implicit {
            if self.subnormals { kept } else { 0 }
        } else {
            let field = (exponent + self.bias) as u64;
            (field << self.fraction_bits) + (kept - implicit)
        };
        if code > self.max_code() as u64 {
            return self.overflowed(negative, rounding, overflow);
        }
        sign | code as u32
    }

    fn overflowed(&self, negative: bool, rounding: Rounding, overflow: Overflow) -> u32 {
        let toward_zero = match rounding {
            Rounding::NearestEven => false,
            Rounding::TowardZero => true,
            Rounding::Down => !negative,
            Rounding::Up => negative,
        };
        match overflow {
            Overflow::Saturate => self.max_code() | if negative { self.sign_bit() } else { 0 },
            Overflow::Ieee if toward_zero => {
                self.max_code() | if negative { self.sign_bit() } else { 0 }
            }
            Overflow::Ieee | Overflow::Infinity => self.infinity(negative),
        }
    }

    /// Encodes an FP32 value. NaN gives the canonical NaN, infinity the format's (or the largest
    /// finite value where saturating).
    #[inline]
    pub fn from_f32(&self, x: f32, rounding: Rounding, overflow: Overflow) -> u32 {
        self.from_f64(f64::from(x), rounding, overflow)
    }

    /// Encodes an FP64 value, rounded once; NaN and infinity as [`Layout::from_f32`].
    #[inline]
    pub fn from_f64(&self, x: f64, rounding: Rounding, overflow: Overflow) -> u32 {
        let negative = x.is_sign_negative();
        if x.is_nan() || (negative && !self.signed && x != 0.0) {
            return self.nan();
        }
        if x.is_infinite() {
            return match overflow {
                Overflow::Saturate => self.overflowed(negative, rounding, overflow),
                _ => self.infinity(negative),
            };
        }
        let bits = x.to_bits();
        let field = (bits >> 52 & 0x7FF) as i32;
        let fraction = bits & ((1 << 52) - 1);
        let (magnitude, exponent) =
            if field == 0 { (fraction, -1022) } else { (fraction | 1 << 52, field - 1023) };
        self.encode(negative, magnitude, exponent - 52, rounding, overflow)
    }

    /// The value of a code: exact, since FP64 holds every value of every format here.
    pub fn to_f64(&self, code: u32) -> f64 {
        let u = self.unpack(code);
        let magnitude = match u.class {
            Class::Nan => return f64::NAN,
            Class::Infinite => f64::INFINITY,
            Class::Finite => {
                f64::from(u.significand) * exp2i(u.exponent - self.fraction_bits as i32)
            }
        };
        if u.negative { -magnitude } else { magnitude }
    }

    /// The value of a code as FP32, with the canonical NaN. Exact for every format of this crate.
    pub fn to_f32(&self, code: u32) -> f32 {
        match self.unpack(code).class {
            Class::Nan => super::F32_NAN,
            _ => self.to_f64(code) as f32,
        }
    }
}

/// 2^e as FP64, for exponents of FP64 normals.
#[inline]
pub fn exp2i(e: i32) -> f64 {
    assert!((-1022..=1023).contains(&e), "2^{e} is not a normal FP64");
    f64::from_bits(((e + 1023) as u64) << 52)
}

/// `magnitude / 2^drop`, rounded to an integer; a negative `drop` shifts left, which must not lose
/// bits. `negative` is the sign of the value, for the directed roundings.
#[inline]
pub fn round_shift(magnitude: u64, drop: i32, negative: bool, rounding: Rounding) -> u64 {
    if drop <= 0 {
        return magnitude << -drop;
    }
    let (kept, rest, half) = if drop < 64 {
        (magnitude >> drop, magnitude & ((1 << drop) - 1), 1 << (drop - 1))
    } else {
        // From 65 on the value is below a half, whatever it is; a rest of 1 stands for 'some'.
        (0, if drop == 64 { magnitude } else { (magnitude != 0) as u64 }, 1 << 63)
    };
    let up = match rounding {
        Rounding::NearestEven => rest > half || (rest == half && kept & 1 == 1),
        Rounding::TowardZero => false,
        Rounding::Down => negative && rest != 0,
        Rounding::Up => !negative && rest != 0,
    };
    kept + up as u64
}
