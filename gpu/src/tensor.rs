//! Tensors in device memory: dense ones, which ops take and give, and matrices as TMA wants them.

use std::ops::Range;
use std::sync::Arc;

use fathom_trace::{DType, TensorMeta};

use crate::memory::{Block, Rows};

/// What TMA asks of addresses and of the distance of two rows.
pub(crate) const TMA_BYTES: usize = 16;

/// A dense row-major tensor in device memory; clones share it.
///
/// It starts at a multiple of 256 bytes, but for a view of some rows of another, which starts where
/// its first row does.
#[derive(Clone)]
pub struct DeviceTensor {
    pub(crate) block: Arc<Block>,
    /// Where it starts in the block.
    pub(crate) offset: usize,
    dtype: DType,
    shape: Vec<usize>,
}

impl DeviceTensor {
    pub(crate) fn new(block: Arc<Block>, offset: usize, dtype: DType, shape: &[usize]) -> Self {
        let tensor = DeviceTensor { block, offset, dtype, shape: shape.to_vec() };
        let end = offset + tensor.bytes();
        assert!(end <= tensor.block.bytes(), "{tensor:?} in {} bytes", tensor.block.bytes());
        tensor
    }

    /// Type of its elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Shape, outermost dimension first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of all elements.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }

    /// The product of all dimensions but the last, and the last; a scalar is one row of one column.
    pub fn rows_columns(&self) -> (usize, usize) {
        match self.shape.split_last() {
            Some((&columns, leading)) => (leading.iter().product(), columns),
            None => (1, 1),
        }
    }

    /// Role, element type and shape, as the rules of ops take them.
    pub fn meta(&self, role: &str) -> TensorMeta {
        TensorMeta { role: role.to_owned(), dtype: self.dtype, shape: self.shape.clone() }
    }

    /// The same elements in another shape.
    ///
    /// # Panics
    /// Where the number of elements differs.
    pub fn reshape(mut self, shape: &[usize]) -> DeviceTensor {
        let len: usize = shape.iter().product();
        assert_eq!(len, self.len(), "{:?} reshaped to {shape:?}", self.shape);
        self.shape = shape.to_vec();
        self
    }

    /// A view of rows `from..to` of a matrix; it shares memory with the whole.
    ///
    /// # Panics
    /// Where it has no such rows.
    pub fn rows(&self, from: usize, to: usize) -> DeviceTensor {
        let (rows, columns) = self.rows_columns();
        assert!(from <= to && to <= rows, "rows {from}..{to} of {:?}", self.shape);
        let offset = self.offset + from * columns * self.dtype.size();
        DeviceTensor::new(self.block.clone(), offset, self.dtype, &[to - from, columns])
    }

    /// Whether it begins at a multiple of so many bytes of its memory, which itself begins at one
    /// of any size that kernels ask for.
    pub(crate) fn is_aligned(&self, bytes: usize) -> bool {
        self.offset.is_multiple_of(bytes)
    }

    /// Whether no other handle shares the memory, so that it may be written in place.
    pub(crate) fn is_sole(&self) -> bool {
        Arc::strong_count(&self.block) == 1
    }

    /// The address on the device.
    pub(crate) fn address(&self) -> u64 {
        self.block.address() + self.offset as u64
    }

    /// The address of a range of its elements, counted in row-major order, and its bytes.
    ///
    /// # Panics
    /// Where it has no such elements.
    pub(crate) fn span(&self, elements: &Range<usize>) -> (u64, usize) {
        assert!(elements.end <= self.len(), "{elements:?} of {self:?}");
        let size = self.dtype.size();
        (self.address() + (elements.start * size) as u64, elements.len() * size)
    }

    /// Its memory as rows of `row_bytes` that follow one another.
    pub(crate) fn as_rows(&self, row_bytes: usize) -> Rows<'_> {
        Rows { block: &self.block, offset: self.offset, pitch_bytes: row_bytes }
    }
}

impl std::fmt::Debug for DeviceTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?} on the device", self.dtype, self.shape)
    }
}

/// A matrix in device memory whose rows start at multiples of 16 bytes, as TMA asks.
#[derive(Clone)]
pub struct Matrix {
    pub(crate) block: Arc<Block>,
    /// Where it starts in the block.
    pub(crate) offset: usize,
    pub(crate) dtype: DType,
    /// Rows of the matrix.
    pub rows: usize,
    /// Columns of the matrix.
    pub columns: usize,
    /// Distance of two rows.
    pub(crate) pitch_bytes: usize,
}

impl Matrix {
    /// Element type of the matrix.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Distance of two rows in elements: the leading dimension.
    pub fn pitch(&self) -> usize {
        self.pitch_bytes / self.dtype.size()
    }

    /// The address on the device.
    pub(crate) fn address(&self) -> u64 {
        self.block.address() + self.offset as u64
    }

    /// Its memory as rows.
    pub(crate) fn as_rows(&self) -> Rows<'_> {
        Rows { block: &self.block, offset: self.offset, pitch_bytes: self.pitch_bytes }
    }
}

/// Heads side by side in the rows of device memory, as TMA copies them: every head of every row
/// starts at a multiple of 16 bytes.
#[derive(Clone)]
pub struct HeadRows {
    pub(crate) block: Arc<Block>,
    /// Where the first head starts in the block.
    pub(crate) offset: usize,
    pub(crate) dtype: DType,
    pub(crate) rows: usize,
    pub(crate) heads: usize,
    /// Columns of a head.
    pub(crate) columns: usize,
    /// Distance of two heads.
    pub(crate) head_bytes: usize,
    /// Distance of two rows.
    pub(crate) row_bytes: usize,
}
