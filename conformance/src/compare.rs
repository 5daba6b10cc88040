//! Comparing tensors bit by bit.

use fathom_reference::Tensor;
use fathom_trace::DType;
use half::{bf16, f16};
use serde::Serialize;

/// How two tensors of one dtype and shape differ.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The tensor's name in the file, `out.d` for instance.
    pub name: String,
    /// Number of elements.
    pub elements: usize,
    /// Elements whose bits differ.
    pub mismatches: usize,
    /// The largest [`ulp_distance`] between two elements.
    pub max_ulp: u64,
    /// The first element, row-major, whose bits differ.
    pub first: Option<First>,
}

/// The first element that differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct First {
    /// Coordinates, row-major.
    pub index: Vec<usize>,
    /// The bits that the file expects, `0x` and as many digits as the dtype has.
    pub expected: String,
    /// The bits that were computed.
    pub got: String,
}

/// Compares `got` with `expected`.
///
/// # Panics
/// Where dtype or shape differ: case files are checked when they are read.
pub fn compare(name: &str, expected: &Tensor, got: &Tensor) -> Difference {
    assert_eq!((expected.dtype(), expected.shape()), (got.dtype(), got.shape()), "{name}");
    let mut difference = Difference {
        name: name.to_owned(),
        elements: got.len(),
        mismatches: 0,
        max_ulp: 0,
        first: None,
    };
    if expected.bytes() == got.bytes() {
        return difference;
    }
    let dtype = got.dtype();
    for i in 0..got.len() {
        let (e, g) = (expected.bits(i), got.bits(i));
        if e == g {
            continue;
        }
        difference.mismatches += 1;
        difference.max_ulp = difference.max_ulp.max(ulp_distance(dtype, e, g));
        difference.first.get_or_insert_with(|| First {
            index: coordinates(got.shape(), i),
            expected: hex(dtype, e),
            got: hex(dtype, g),
        });
    }
    difference
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
    let is_nan = |bits| value(dtype, bits).is_some_and(f64::is_nan);
    if is_nan(a) != is_nan(b) {
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

/// The value of an element's bits; `None` for dtypes that are containers of packed codes.
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
        error += (gv - ev) * (gv - ev);
        norm += ev * ev;
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
        let d = compare("out.d", &a, &b);
        assert_eq!((d.mismatches, d.max_ulp), (1, 1));
        let first = d.first.unwrap();
        assert_eq!(first.index, [1, 1]);
        assert_eq!((first.expected.as_str(), first.got.as_str()), ("0x00000000", "0x80000000"));
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
