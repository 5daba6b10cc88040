//! Values that kernels get wrong, as bits: each kind a function of (kind, seed, stream).

use fathom_numerics::philox::Philox;

/// Kinds of f32 values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// Bell-shaped, a few decades wide.
    Normal,
    /// Neighbours cancel: x, -x and now and then something small.
    Cancellation,
    /// Subnormals of both signs, and the smallest normal numbers.
    Subnormal,
    /// Zeros of both signs with single numbers among them.
    Zeros,
    /// Numbers with infinities and NaNs of any payload among them.
    NonFinite,
    /// Any bits at all; of every eight one lies midway between two BF16.
    Bits,
}

impl Values {
    /// Every kind, in the order in which suites walk through them.
    pub const ALL: [Values; 6] = [
        Values::Normal,
        Values::NonFinite,
        Values::Cancellation,
        Values::Subnormal,
        Values::Zeros,
        Values::Bits,
    ];

    /// `len` values; with `scale` they are meant as scales: positive where the kind allows, around
    /// 1e-3.
    pub fn floats(self, seed: u64, stream: u64, len: usize, scale: bool) -> Vec<f32> {
        let mut normal = vec![0.0; len];
        Philox::new(seed, 2 * stream).normals(0, &mut normal);
        let mut words = vec![0; len];
        Philox::new(seed, 2 * stream + 1).words(0, &mut words);
        let ordinary = |x: f32| if scale { x.abs() * 2e-3 + 1e-4 } else { x };
        let one = |i: usize| {
            let (x, w) = (ordinary(normal[i]), words[i]);
            match self {
                Values::Normal => x,
                Values::Cancellation if scale => x,
                Values::Cancellation => match w % 16 {
                    0 => x * 1e-3,
                    _ if i % 2 == 1 => -normal[i - 1],
                    _ => x,
                },
                Values::Subnormal => f32::from_bits(w & 0x80FF_FFFF),
                Values::Zeros => match w % 32 {
                    0 => x,
                    w => f32::from_bits(w << 31),
                },
                Values::NonFinite => match w % 61 {
                    0 => f32::INFINITY,
                    1 => f32::NEG_INFINITY,
                    2 => f32::from_bits(0x7F80_0001 | w >> 9),
                    3 => f32::from_bits(0xFF80_0001 | w >> 9),
                    4 => 0.0,
                    5 => -x,
                    6 => x * 1e-36,
                    7 => x * 1e36,
                    _ => x,
                },
                Values::Bits if w % 8 == 0 => f32::from_bits(w & 0xFFFF_0000 | 0x8000),
                Values::Bits => f32::from_bits(w),
            }
        };
        (0..len).map(one).collect()
    }

    /// `len` codes of E4M3, which has no infinity.
    pub fn e4m3(self, seed: u64, stream: u64, len: usize) -> Vec<u8> {
        let mut words = vec![0; len];
        Philox::new(seed, stream).words(0, &mut words);
        // The code of NaN gives way to the largest number.
        let finite = |code: u8| if code & 0x7F == 0x7F { code - 1 } else { code };
        let one = |i: usize| {
            let (w, code) = (words[i], (words[i] >> 24) as u8);
            match self {
                // The exponents around 1, where sums are longest.
                Values::Normal => code & 0x9F | 0x20,
                Values::Cancellation => match w % 16 {
                    0 => code & 0x8F,
                    _ if i % 2 == 1 => finite((words[i - 1] >> 24) as u8) ^ 0x80,
                    _ => finite(code),
                },
                Values::Subnormal => code & 0x87,
                Values::Zeros => {
                    if w % 32 == 0 {
                        finite(code)
                    } else {
                        code & 0x80
                    }
                }
                Values::NonFinite => match w % 997 {
                    0 => code | 0x7F,
                    _ => finite(code),
                },
                Values::Bits => finite(code),
            }
        };
        (0..len).map(one).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_hold_what_they_promise() {
        let f = |v: Values| v.floats(1, 1, 4096, false);
        let any = |v: Values, p: fn(f32) -> bool| f(v).into_iter().any(p);
        assert!(any(Values::NonFinite, f32::is_nan) && any(Values::NonFinite, f32::is_infinite));
        assert!(any(Values::Subnormal, f32::is_subnormal));
        assert!(f(Values::Zeros).iter().filter(|x| **x == 0.0).count() > 3500);
        assert!(f(Values::Normal).iter().all(|x| x.is_finite()));
        let pairs = f(Values::Cancellation);
        assert!(pairs.chunks(2).filter(|p| p[0] == -p[1]).count() > 1000);
        assert!(Values::NonFinite.e4m3(1, 1, 8192).iter().any(|c| c & 0x7F == 0x7F));
        let finite = |v: Values| v.e4m3(1, 1, 8192).iter().all(|c| c & 0x7F != 0x7F);
        assert!(Values::ALL.into_iter().all(|v| v == Values::NonFinite || finite(v)));
        assert!(Values::Subnormal.e4m3(1, 1, 64).iter().all(|c| c & 0x78 == 0));
    }
}
