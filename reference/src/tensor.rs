//! Host tensors: an element type, a row-major shape and the elements' bits.
//!
//! A tensor stores words of its element's width, so that any bits survive (NaN payloads, packed
//! codes) and a typed view costs nothing. Clones share their elements until one is written to.

use std::sync::Arc;

use bytemuck::Pod;
use fathom_trace::{DType, TensorMeta};
use half::{bf16, f16};
use ndarray::{ArrayD, ArrayViewD, ArrayViewMutD, IxDyn};

/// A Rust type whose bits are those of an element type.
pub trait Element: Pod + Send + Sync {
    /// The element type that the Rust type holds.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($rust:ty => $dtype:ident),* $(,)?) => {
        $(impl Element for $rust { const DTYPE: DType = DType::$dtype; })*
    };
}

elements! {
    f64 => F64, f32 => F32, bf16 => BF16, f16 => F16,
    i64 => I64, i32 => I32, u64 => U64, u32 => U32, i8 => I8, u8 => U8,
}

#[derive(Clone, Debug)]
enum Words {
    W8(Vec<u8>),
    W16(Vec<u16>),
    W32(Vec<u32>),
    W64(Vec<u64>),
}

impl Words {
    fn zeros(size: usize, len: usize) -> Words {
        match size {
            1 => Words::W8(vec![0; len]),
            2 => Words::W16(vec![0; len]),
            4 => Words::W32(vec![0; len]),
            _ => Words::W64(vec![0; len]),
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Words::W8(v) => v,
            Words::W16(v) => bytemuck::cast_slice(v),
            Words::W32(v) => bytemuck::cast_slice(v),
            Words::W64(v) => bytemuck::cast_slice(v),
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Words::W8(v) => v,
            Words::W16(v) => bytemuck::cast_slice_mut(v),
            Words::W32(v) => bytemuck::cast_slice_mut(v),
            Words::W64(v) => bytemuck::cast_slice_mut(v),
        }
    }
}

/// Words of whatever bytes; without clearing memory first where the bytes are aligned.
fn copied<T: Pod>(bytes: &[u8]) -> Vec<T> {
    match bytemuck::try_cast_slice::<u8, T>(bytes) {
        Ok(words) => words.to_vec(),
        Err(_) => bytemuck::pod_collect_to_vec(bytes),
    }
}

/// A dense row-major tensor on the host. It compares equal to another by element type, shape and
/// bits, so that NaN equals itself and -0 is not 0.
#[derive(Clone, Debug)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    words: Arc<Words>,
}

impl Tensor {
    /// A tensor whose elements are all zero bits.
    pub fn zeros(dtype: DType, shape: &[usize]) -> Tensor {
        let len = shape.iter().product();
        Tensor { dtype, shape: shape.to_vec(), words: Arc::new(Words::zeros(dtype.size(), len)) }
    }

    /// Takes over `elements` (row-major) without copying them.
    ///
    /// # Panics
    /// Where the number of elements is not the shape's.
    pub fn from_vec<T: Element>(shape: &[usize], elements: Vec<T>) -> Tensor {
        let len: usize = shape.iter().product();
        assert_eq!(elements.len(), len, "{} elements for shape {shape:?}", elements.len());
        let words = match size_of::<T>() {
            1 => Words::W8(bytemuck::cast_vec(elements)),
            2 => Words::W16(bytemuck::cast_vec(elements)),
            4 => Words::W32(bytemuck::cast_vec(elements)),
            _ => Words::W64(bytemuck::cast_vec(elements)),
        };
        Tensor { dtype: T::DTYPE, shape: shape.to_vec(), words: Arc::new(words) }
    }

    /// Takes over an ndarray; copies only where it is not in standard layout.
    pub fn from_array<T: Element, D: ndarray::Dimension>(array: ndarray::Array<T, D>) -> Tensor {
        let shape = array.shape().to_vec();
        if array.is_standard_layout() {
            let (elements, offset) = array.into_raw_vec_and_offset();
            let len = shape.iter().product::<usize>();
            if offset.unwrap_or(0) == 0 && elements.len() == len {
                return Tensor::from_vec(&shape, elements);
            }
            let start = offset.unwrap_or(0);
            return Tensor::from_vec(&shape, elements[start..start + len].to_vec());
        }
        Tensor::from_vec(&shape, array.iter().copied().collect())
    }

    /// A tensor of zero bits whose bytes `fill` writes, little-endian and row-major.
    pub fn filled(dtype: DType, shape: &[usize], fill: impl FnOnce(&mut [u8])) -> Tensor {
        let mut tensor = Tensor::zeros(dtype, shape);
        let words = Arc::get_mut(&mut tensor.words).expect("a new tensor is not shared");
        fill(words.bytes_mut());
        tensor
    }

    /// Copies little-endian bytes, as they stand in a safetensors file.
    ///
    /// # Panics
    /// Where the number of bytes is not the shape's times the element's size.
    pub fn from_bytes(dtype: DType, shape: &[usize], bytes: &[u8]) -> Tensor {
        let len = shape.iter().product::<usize>() * dtype.size();
        assert_eq!(bytes.len(), len, "{} bytes for {dtype} {shape:?}", bytes.len());
        let words = match dtype.size() {
            1 => Words::W8(bytes.to_vec()),
            2 => Words::W16(copied(bytes)),
            4 => Words::W32(copied(bytes)),
            _ => Words::W64(copied(bytes)),
        };
        Tensor { dtype, shape: shape.to_vec(), words: Arc::new(words) }
    }

    /// A tensor of one element and no dimensions.
    pub fn scalar<T: Element>(value: T) -> Tensor {
        Tensor::from_vec(&[], vec![value])
    }

    /// Element type of the tensor.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Row-major shape of the tensor.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the tensor has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements' bytes, little-endian and row-major.
    pub fn bytes(&self) -> &[u8] {
        self.words.bytes()
    }

    /// The elements, row-major.
    ///
    /// # Panics
    /// Where `T` is not the tensor's element type: ops check dtypes before they compute.
    pub fn as_slice<T: Element>(&self) -> &[T] {
        assert_eq!(self.dtype, T::DTYPE, "a {} tensor viewed as {}", self.dtype, T::DTYPE);
        bytemuck::cast_slice(self.words.bytes())
    }

    /// The elements for writing; copies them first where another clone shares them.
    ///
    /// # Panics
    /// As [`Tensor::as_slice`].
    pub fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        assert_eq!(self.dtype, T::DTYPE, "a {} tensor viewed as {}", self.dtype, T::DTYPE);
        bytemuck::cast_slice_mut(Arc::make_mut(&mut self.words).bytes_mut())
    }

    /// The elements by value: without a copy where no other clone shares them.
    ///
    /// # Panics
    /// As [`Tensor::as_slice`].
    pub fn into_vec<T: Element>(self) -> Vec<T> {
        assert_eq!(self.dtype, T::DTYPE, "a {} tensor taken as {}", self.dtype, T::DTYPE);
        match Arc::unwrap_or_clone(self.words) {
            Words::W8(v) => bytemuck::cast_vec(v),
            Words::W16(v) => bytemuck::cast_vec(v),
            Words::W32(v) => bytemuck::cast_vec(v),
            Words::W64(v) => bytemuck::cast_vec(v),
        }
    }

    /// An ndarray view of any rank.
    ///
    /// # Panics
    /// As [`Tensor::as_slice`].
    pub fn view<T: Element>(&self) -> ArrayViewD<'_, T> {
        ArrayViewD::from_shape(IxDyn(&self.shape), self.as_slice()).expect("dense and row-major")
    }

    /// A matrix view; leading dimensions beyond the last are folded into the rows.
    ///
    /// # Panics
    /// As [`Tensor::as_slice`], and where the tensor has no dimension.
    pub fn matrix<T: Element>(&self) -> ndarray::ArrayView2<'_, T> {
        let (rows, columns) = self.rows_columns();
        ndarray::ArrayView2::from_shape((rows, columns), self.as_slice()).expect("row-major")
    }

    /// One-byte codes of whatever dtype as a matrix, rows as in [`Tensor::matrix`].
    ///
    /// # Panics
    /// Where an element is not one byte, and where the tensor has no dimension.
    pub fn codes(&self) -> ndarray::ArrayView2<'_, u8> {
        assert_eq!(self.dtype.size(), 1, "a {} tensor viewed as codes of a byte", self.dtype);
        ndarray::ArrayView2::from_shape(self.rows_columns(), self.bytes()).expect("row-major")
    }

    /// A writable view of any rank; copies as [`Tensor::as_mut_slice`].
    ///
    /// # Panics
    /// As [`Tensor::as_slice`].
    pub fn view_mut<T: Element>(&mut self) -> ArrayViewMutD<'_, T> {
        let shape = IxDyn(&self.shape.clone());
        ArrayViewMutD::from_shape(shape, self.as_mut_slice()).expect("dense and row-major")
    }

    /// A writable matrix view, rows as in [`Tensor::matrix`].
    ///
    /// # Panics
    /// As [`Tensor::matrix`].
    pub fn matrix_mut<T: Element>(&mut self) -> ndarray::ArrayViewMut2<'_, T> {
        let shape = self.rows_columns();
        ndarray::ArrayViewMut2::from_shape(shape, self.as_mut_slice()).expect("row-major")
    }

    /// The product of all dimensions but the last, and the last.
    ///
    /// # Panics
    /// Where the tensor has no dimension.
    pub fn rows_columns(&self) -> (usize, usize) {
        let (&columns, leading) = self.shape.split_last().expect("a matrix has a dimension");
        (leading.iter().product(), columns)
    }

    /// The same elements under another shape.
    ///
    /// # Panics
    /// Where the number of elements differs.
    pub fn reshape(mut self, shape: &[usize]) -> Tensor {
        let len: usize = shape.iter().product();
        assert_eq!(len, self.len(), "{:?} reshaped to {shape:?}", self.shape);
        self.shape = shape.to_vec();
        self
    }

    /// The same bits under another element type of the same size (TF32 is kept as F32, say).
    ///
    /// # Panics
    /// Where the sizes differ.
    pub fn reinterpret(mut self, dtype: DType) -> Tensor {
        assert_eq!(dtype.size(), self.dtype.size(), "{} reinterpreted as {dtype}", self.dtype);
        self.dtype = dtype;
        self
    }

    /// Index (row-major) and value of the first element that is NaN or infinite; none where the
    /// elements are neither F32 nor F64.
    pub fn first_not_finite(&self) -> Option<(usize, f64)> {
        let first = |mut values: &mut dyn Iterator<Item = f64>| {
            let values = &mut values;
            values.enumerate().find(|(_, value)| !value.is_finite())
        };
        match self.dtype {
            DType::F32 => first(&mut self.as_slice::<f32>().iter().map(|&x| f64::from(x))),
            DType::F64 => first(&mut self.as_slice::<f64>().iter().copied()),
            _ => None,
        }
    }

    /// Element `index` (row-major) as its bits, zero-extended.
    pub fn bits(&self, index: usize) -> u64 {
        match &*self.words {
            Words::W8(v) => v[index].into(),
            Words::W16(v) => v[index].into(),
            Words::W32(v) => v[index].into(),
            Words::W64(v) => v[index],
        }
    }

    /// The tensor's element type and shape under a role, without its elements.
    pub fn meta(&self, role: &str) -> TensorMeta {
        TensorMeta { role: role.to_owned(), dtype: self.dtype, shape: self.shape.clone() }
    }

    /// An owned ndarray copy.
    ///
    /// # Panics
    /// As [`Tensor::as_slice`].
    pub fn to_array<T: Element>(&self) -> ArrayD<T> {
        self.view().to_owned()
    }
}

/// Equal element type, shape and bits.
impl PartialEq for Tensor {
    fn eq(&self, other: &Tensor) -> bool {
        self.dtype == other.dtype && self.shape == other.shape && self.bytes() == other.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_share_until_written() {
        let a = Tensor::from_vec(&[2, 2], vec![1.0f32, 2.0, 3.0, 4.0]);
        let mut b = a.clone();
        b.as_mut_slice::<f32>()[3] = 9.0;
        assert_eq!(a.as_slice::<f32>()[3], 4.0);
        assert_eq!(b.matrix::<f32>()[[1, 1]], 9.0);
        assert_ne!(a, b);
    }

    #[test]
    fn bits_survive_bytes() {
        let nan = f32::from_bits(0x7F81_2345);
        let a = Tensor::from_vec(&[3], vec![nan, -0.0, 1.0]);
        let b = Tensor::from_bytes(DType::F32, &[3], a.bytes());
        assert_eq!(a, b);
        assert_eq!(b.bits(0), 0x7F81_2345);
        assert_eq!(b.bits(1), 0x8000_0000);
    }

    #[test]
    fn a_transposed_array_is_laid_out_anew() {
        let t = ndarray::arr2(&[[1i32, 2, 3], [4, 5, 6]]).reversed_axes();
        let tensor = Tensor::from_array(t);
        assert_eq!(tensor.shape(), [3, 2]);
        assert_eq!(tensor.as_slice::<i32>(), [1, 4, 2, 5, 3, 6]);
    }
}
