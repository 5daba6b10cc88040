//! Comparing tensors bit by bit.

use fathom_reference::{Outputs, Tensor};
use fathom_trace::DType;
use half::{bf16, f16};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::case_file::OUT;

/// What counts as agreement; bits unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Tolerance {
    /// Every bit agrees.
    #[default]
    Bits,
    /// At most this many units in the last place, element by element.
    Ulp(u64),
    /// At most this 2-norm of the difference over the 2-norm of the expected, tensor by tensor.
    Relative(f64),
}

impl std::str::FromStr for Tolerance {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("expected ulp=N or rel=X, found '{text}'");
        match text.split_once('=') {
            Some(("ulp", n)) => n.parse().map(Tolerance::Ulp).map_err(|_| wrong()),
            Some(("rel", x)) => match x.parse::<f64>() {
                Ok(x) if x >= 0.0 && x.is_finite() => Ok(Tolerance::Relative(x)),
                _ => Err(wrong()),
            },
            _ => Err(wrong()),
        }
    }
}

/// Compares an engine's outputs with what is expected of it, each side under its name: whether all
/// agree within `tolerance`, and every expected output's difference, in order of the roles.
///
/// # Panics
/// Where the second side lacks an output that the first has.
pub fn judge(
    [(whose, expected), (other, found)]: [(&'static str, &Outputs); 2],
    tolerance: Tolerance,
) -> (bool, Vec<Difference>) {
    let mut all_agree = true;
    let differences = expected.iter().map(|(role, expected)| {
        let found = &found[role];
        let sides = [(whose, expected), (other, found)];
        let difference = compare(&format!("{OUT}{role}"), sides);
        all_agree &= match tolerance {
            Tolerance::Bits => difference.mismatches == 0,
            Tolerance::Ulp(n) => difference.max_ulp <= n && difference.nan_mismatches == 0,
            Tolerance::Relative(x) => relative(expected, found) <= x,
        };
        difference
    });
    let differences = differences.collect();
    (all_agree, differences)
}

/// How two tensors of one dtype and shape differ, bit by bit.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The tensor's name in the file, `out.d` for instance.
    pub name: String,
    /// Elements of each of the tensors.
    pub elements: usize,
    /// Elements whose bits differ.
    pub mismatches: usize,
    /// The largest [`ulp_distance`] between two elements.
    pub max_ulp: u64,
    /// Elements that are NaN in one of the tensors and a number in the other.
    pub nan_mismatches: usize,
    /// The first element, row-major, whose bits differ.
    pub first: Option<First>,
}

impl Difference {
    /// `out.d: 3 of 64 elements differ, at most 2 ulp, the first at [0, 1]: file 0x3f80, ..`.
    pub fn words(&self) -> String {
        let Difference { name, elements, mismatches, .. } = self;
        let Some(first) = &self.first else {
            return format!("{name}: all {elements} elements agree");
        };
        let distance = match self.nan_mismatches {
            0 => format!("at most {} ulp", self.max_ulp),
            n => format!("{n} of them a NaN on one side only"),
        };
        format!(
            "{name}: {mismatches} of {elements} elements differ, {distance}, the first at {first}"
        )
    }
}

/// The first element that differs, and what both sides have there.
#[derive(Clone, Debug, PartialEq)]
pub struct First {
    /// Its coordinates, outermost dimension first.
    pub index: Vec<usize>,
    /// Whose bits, and the bits: `0x` and as many digits as the dtype has.
    pub sides: [(&'static str, String); 2],
}

impl std::fmt::Display for First {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [(a, a_bits), (b, b_bits)] = &self.sides;
        write!(f, "{:?}: {a} {a_bits}, {b} {b_bits}", self.index)
    }
}

/// `{"index": .., "file": .., "contract": ..}`, each side under its own name. The keys `expected`
/// and `got` of version 0.1 stand beside them for one version.
impl Serialize for First {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("index", &self.index)?;
        for (name, bits) in &self.sides {
            map.serialize_entry(name, bits)?;
        }
        for (name, (_, bits)) in ["expected", "got"].iter().zip(&self.sides) {
            map.serialize_entry(name, bits)?;
        }
        map.end()
    }
}

/// Compares two tensors, each with a word for whose it is: `file`, `contract`, `kernel`.
///
/// # Panics
/// Where dtype or shape differ: case files are checked when they are read.
pub fn compare(name: &str, sides: [(&'static str, &Tensor); 2]) -> Difference {
    let [(a_name, a), (b_name, b)] = sides;
    assert_eq!((a.dtype(), a.shape()), (b.dtype(), b.shape()), "{name}");
    let mut difference = Difference {
        name: name.to_owned(),
        elements: a.len(),
        mismatches: 0,
        max_ulp: 0,
        nan_mismatches: 0,
        first: None,
    };
    if a.bytes() == b.bytes() {
        return difference;
    }
    let dtype = a.dtype();
    for i in 0..a.len() {
        let (x, y) = (a.bits(i), b.bits(i));
        if x == y {
            continue;
        }
        difference.mismatches += 1;
        difference.nan_mismatches += usize::from(is_nan(dtype, x) != is_nan(dtype, y));
        difference.max_ulp = difference.max_ulp.max(ulp_distance(dtype, x, y));
        difference.first.get_or_insert_with(|| First {
            index: coordinates(a.shape(), i),
            sides: [(a_name, hex(dtype, x)), (b_name, hex(dtype, y))],
        });
    }
    difference
}

fn is_nan(dtype: DType, bits: u64) -> bool {
    value(dtype, bits).is_some_and(f64::is_nan)
}

/// An element's bits in hexadecimal, as many digits as the dtype has.
pub fn hex(dtype: DType, bits: u64) -> String {
    format!("{bits:#0width$x}", width = 2 + 2 * dtype.size())
}

/// The coordinates of element `index` of a row-major tensor.
pub fn coordinates(shape: &[usize], mut index: usize) -> Vec<usize> {
    let mut coordinates = vec![0; shape.len()];
    for (c, &size) in coordinates.iter_mut().zip(shape).rev() {
        *c = index % size;
        index /= size;
    }
    coordinates
}

/// Steps along the number line between two codes of a dtype, -0 and +0 one apart.
///
/// `u64::MAX` where one of them is a NaN and the other is not; two NaNs are as far apart as their
/// codes.
pub fn ulp_distance(dtype: DType, a: u64, b: u64) -> u64 {
    if is_nan(dtype, a) != is_nan(dtype, b) {
        return u64::MAX;
    }
    let position = |bits: u64| -> i128 {
        let width = 8 * dtype.size() as u32;
        match dtype {
            // Sign and magnitude: negative codes run the other way, -0 one below +0.
            DType::F64 | DType::F32 | DType::BF16 | DType::F16 | DType::F8E4M3 | DType::F8E5M2 => {
                let magnitude = i128::from(bits & ((1 << (width - 1)) - 1));
                if bits >> (width - 1) == 1 { -1 - magnitude } else { magnitude }
            }
            DType::I64 | DType::I32 | DType::I8 => {
                i128::from(((bits << (64 - width)) as i64) >> (64 - width))
            }
            DType::U64 | DType::U32 | DType::U8 | DType::F8E8M0 | DType::Bool => i128::from(bits),
        }
    };
    u64::try_from((position(a) - position(b)).unsigned_abs()).unwrap_or(u64::MAX)
}

/// The number that an element's bits stand for; `None` for dtypes that are containers of packed
/// codes.
pub fn value(dtype: DType, bits: u64) -> Option<f64> {
    use fathom_numerics::formats::{E4M3, E5M2, UE8M0};
    Some(match dtype {
        DType::F64 => f64::from_bits(bits),
        DType::F32 => f32::from_bits(bits as u32).into(),
        DType::BF16 => bf16::from_bits(bits as u16).into(),
        DType::F16 => f16::from_bits(bits as u16).into(),
        DType::F8E4M3 => E4M3::from_bits(bits as u8).to_f64(),
        DType::F8E5M2 => E5M2::from_bits(bits as u8).to_f64(),
        DType::F8E8M0 => UE8M0::from_bits(bits as u8).to_f64(),
        DType::I64 => bits as i64 as f64,
        DType::I32 => f64::from(bits as i32),
        DType::I8 => f64::from(bits as i8),
        DType::U64 | DType::U32 | DType::U8 | DType::Bool => return None,
    })
}

/// The 2-norm of the difference over the 2-norm of the expected, over the whole tensor.
///
/// Infinite where an element is NaN or infinite in one tensor and another value in the other; a
/// zero expectation that is met gives 0. Packed codes count as 0 where equal, else as infinite.
pub fn relative(expected: &Tensor, got: &Tensor) -> f64 {
    // Over the largest magnitude where squares of it would leave the range of binary64.
    let finite = |t: &Tensor, i| value(t.dtype(), t.bits(i)).map_or(0.0, f64::abs);
    let both = (0..got.len()).flat_map(|i| [finite(expected, i), finite(got, i)]);
    let top = both.filter(|x| x.is_finite()).fold(0.0, f64::max);
    let unit = if (1e-140..1e140).contains(&top) { 1.0 } else { top };
    let (mut error, mut norm) = (0.0f64, 0.0f64);
    for i in 0..got.len() {
        let (e, g) = (expected.bits(i), got.bits(i));
        let Some((ev, gv)) = value(expected.dtype(), e).zip(value(got.dtype(), g)) else {
            if e == g {
                continue;
            }
            return f64::INFINITY;
        };
        if !ev.is_finite() || !gv.is_finite() {
            if ev == gv || (ev.is_nan() && gv.is_nan()) {
                continue;
            }
            return f64::INFINITY;
        }
        if gv != ev {
            error += (gv / unit - ev / unit).powi(2).max(f64::MIN_POSITIVE);
        }
        norm += if ev == 0.0 { 0.0 } else { (ev / unit).powi(2) };
    }
    if error == 0.0 { 0.0 } else { (error / norm).sqrt() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_counts_codes_along_the_number_line() {
        let bits = |x: f32| u64::from(x.to_bits());
        assert_eq!(ulp_distance(DType::F32, bits(1.0), bits(1.0 + f32::EPSILON)), 1);
        assert_eq!(ulp_distance(DType::F32, bits(-0.0), bits(0.0)), 1);
        assert_eq!(ulp_distance(DType::F32, bits(f32::from_bits(1)), bits(-f32::from_bits(1))), 3);
        assert_eq!(ulp_distance(DType::I32, bits_i32(-1), bits_i32(1)), 2);
        assert_eq!(ulp_distance(DType::U8, 3, 255), 252);
        // 448 and NaN are neighbouring codes of E4M3, and as far apart as can be.
        assert_eq!(ulp_distance(DType::F8E4M3, 0x7E, 0x7F), u64::MAX);
        assert_eq!(ulp_distance(DType::F32, 0x7FC0_0000, 0x7FFF_FFFF), 0x3F_FFFF);
    }

    fn bits_i32(x: i32) -> u64 {
        u64::from(x as u32)
    }

    #[test]
    fn the_first_mismatch_has_coordinates_and_both_patterns() {
        let a = Tensor::from_vec(&[2, 3], vec![0.0f32; 6]);
        let mut b = a.clone();
        b.as_mut_slice::<f32>()[4] = -0.0;
        let d = compare("out.d", [("file", &a), ("contract", &b)]);
        assert_eq!((d.mismatches, d.max_ulp), (1, 1));
        let first = d.first.unwrap();
        assert_eq!(first.index, [1, 1]);
        assert_eq!(first.to_string(), "[1, 1]: file 0x00000000, contract 0x80000000");
        let json = serde_json::to_value(&first).unwrap();
        let expected = serde_json::json!({
            "index": [1, 1],
            "file": "0x00000000",
            "contract": "0x80000000",
            "expected": "0x00000000",
            "got": "0x80000000",
        });
        assert_eq!(json, expected);
    }

    /// The squares of such differences are zero in binary64: they passed any tolerance.
    #[test]
    fn tiny_and_huge_numbers_differ_too() {
        for (e, g) in [(1e-170f64, 2e-170), (5e-324, 1e-323), (1e300, 2e300), (-1e308, 1e308)] {
            let [e, g] = [e, g].map(|x| Tensor::from_vec(&[1], vec![x]));
            assert!(relative(&e, &g) >= 1.0, "{}", relative(&e, &g));
            assert_eq!(relative(&e, &e), 0.0);
        }
        let [e, g] = [1e-200, 2e-200].map(|x| Tensor::from_vec(&[2], vec![1.0f64, x]));
        assert!((0.0..1e-100).contains(&relative(&e, &g)) && relative(&e, &g) > 0.0);
    }

    #[test]
    fn relative_is_of_the_whole_tensor_and_refuses_lost_nans() {
        let e = Tensor::from_vec(&[2], vec![3.0f32, 4.0]);
        let g = Tensor::from_vec(&[2], vec![3.0f32, 4.5]);
        assert_eq!(relative(&e, &g), 0.1);
        let n = Tensor::from_vec(&[2], vec![3.0f32, f32::NAN]);
        assert_eq!(relative(&e, &n), f64::INFINITY);
        assert_eq!(relative(&n, &n), 0.0);
    }
}
