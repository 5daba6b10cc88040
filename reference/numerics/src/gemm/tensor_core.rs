//! Matrix instructions on whole tiles, with incoming accumulators: what executes a `wgmma`.
//!
//! A [`TensorCore`] packs operands once and multiplies them as often as wanted; an operand is packed
//! in about the time that 10 to 20 products an element take. The accumulator chains over all of the
//! operands' K, so one call may stand for a single instruction (K = 32 for FP8, 16 for BF16) or for a
//! row of them.
//!
//! ```
//! use fathom_numerics::formats::Format;
//! use fathom_numerics::gemm::tensor_core::TensorCore;
//! use fathom_numerics::mma::Accumulator;
//! use ndarray::Array2;
//! let core = TensorCore::new(Accumulator::HOPPER_FP8, Format::E4M3, Format::E4M3).expect("FP32 output");
//! let a = core.pack_a(Array2::from_elem((64, 32), 0x38u8).view()); // 1.0
//! let b = core.pack_b(Array2::from_elem((8, 32), 0x40u8).view()); // 2.0, [n, k]
//! let mut d = Array2::from_elem((64, 8), 3.0f32);
//! core.multiply_add(&a, &b, d.view_mut(), true);
//! assert_eq!(d, Array2::from_elem((64, 8), 67.0));
//! ```

use super::isa::Isa;
use super::scratch::Scratch;
use super::tile::{self, Codes, MAX_COLS, PACK, TILE_ROWS, TileKernels, in_f32_range};
use crate::formats::Format;
use crate::mma::{Accumulator, Operand, Output, Terms};
use ndarray::{Array2, ArrayView2, ArrayViewMut2};

/// One tensor-core arithmetic on one pair of formats, with the fastest kernels of the machine.
pub struct TensorCore {
    accumulator: Accumulator,
    formats: (Format, Format),
    kernels: Option<Box<dyn TileKernels>>,
}

/// The codes of an operand, 8-bit ones in bytes.
#[derive(Clone, Debug)]
enum Stored {
    U8(Array2<u8>),
    U32(Array2<u32>),
}

impl Stored {
    fn codes(&self) -> Codes<'_> {
        match self {
            Stored::U8(codes) => Codes::U8(codes.view()),
            Stored::U32(codes) => Codes::U32(codes.view()),
        }
    }
}

/// An operand packed by a [`TensorCore`], for that one.
pub struct Packed {
    codes: Stored,
    bytes: Scratch,
    len: usize,
    is_a: bool,
}

/// Operand codes as they come: bytes for 8-bit formats, words for the others.
pub trait Code: Copy + 'static {
    /// An owned copy in the form that is packed.
    #[doc(hidden)]
    fn store(view: ArrayView2<'_, Self>) -> StoredCodes;
}

/// An operand's codes, copied.
#[doc(hidden)]
pub struct StoredCodes(Stored);

impl Code for u8 {
    fn store(view: ArrayView2<'_, u8>) -> StoredCodes {
        StoredCodes(Stored::U8(view.as_standard_layout().into_owned()))
    }
}

impl Code for u16 {
    fn store(view: ArrayView2<'_, u16>) -> StoredCodes {
        StoredCodes(Stored::U32(view.map(|&code| code.into())))
    }
}

impl Code for u32 {
    fn store(view: ArrayView2<'_, u32>) -> StoredCodes {
        StoredCodes(Stored::U32(view.to_owned()))
    }
}

impl TensorCore {
    /// The arithmetic on the fastest instruction set; none where the accumulator is held in FP16.
    pub fn new(accumulator: Accumulator, a: Format, b: Format) -> Option<TensorCore> {
        TensorCore::on(Isa::best(), accumulator, a, b)
    }

    /// [`TensorCore::new`] on a chosen instruction set: for tests and benches.
    pub fn on(isa: Isa, accumulator: Accumulator, a: Format, b: Format) -> Option<TensorCore> {
        let Output::F32 { .. } = accumulator.output else { return None };
        let kernels = tile::kernels(isa, (a, b), &accumulator);
        Some(TensorCore { accumulator, formats: (a, b), kernels })
    }

    /// Packs A, codes `[m, k]`. FP8 formats take bytes.
    pub fn pack_a<T: Code>(&self, codes: ArrayView2<'_, T>) -> Packed {
        self.pack(codes, true)
    }

    /// Packs B, codes `[n, k]`. FP8 formats take bytes.
    pub fn pack_b<T: Code>(&self, codes: ArrayView2<'_, T>) -> Packed {
        self.pack(codes, false)
    }

    fn pack<T: Code>(&self, codes: ArrayView2<'_, T>, is_a: bool) -> Packed {
        let StoredCodes(codes) = T::store(codes);
        let (rows, k) = codes.codes().dim();
        let Some(kernels) = &self.kernels else {
            return Packed { codes, bytes: Scratch::bytes(0), len: 0, is_a };
        };
        let depth = kernels.packed_depth(k);
        let (pack, size) = match is_a {
            true => (PACK, depth * kernels.a_bytes() * (PACK / TILE_ROWS)),
            false => (kernels.cols(), depth * kernels.b_bytes()),
        };
        let len = rows.div_ceil(pack) * size;
        let mut bytes = Scratch::bytes(len);
        if size > 0 {
            let chunks = bytes.slice::<u8>(len).chunks_exact_mut(size);
            for (i, chunk) in chunks.enumerate() {
                match is_a {
                    true => kernels.pack_a(&codes.codes(), i * pack, (0, k), chunk),
                    false => kernels.pack_b(&codes.codes(), i * pack, (0, k), chunk),
                }
            }
        }
        Packed { codes, bytes, len, is_a }
    }

    /// `D = A B^T + D`, or `A B^T` alone without `accumulate`: each element one chain over K in the
    /// accumulator's steps.
    ///
    /// # Panics
    /// Where the shapes do not fit or an operand was packed for the other side.
    pub fn multiply_add(
        &self,
        a: &Packed,
        b: &Packed,
        mut d: ArrayViewMut2<'_, f32>,
        accumulate: bool,
    ) {
        let ((m, k), (n, k_b)) = (a.codes.codes().dim(), b.codes.codes().dim());
        assert_eq!(k, k_b, "A is [{m}, {k}], B is [{n}, {k_b}]: expected the same K");
        assert_eq!(d.dim(), (m, n), "A is [{m}, {k}], B is [{n}, {k}], D is {:?}", d.dim());
        assert!(a.is_a && !b.is_a, "A is packed by pack_a, B by pack_b");
        if !accumulate {
            d.fill(0.0);
        }
        if k == 0 {
            return;
        }
        let cols = self.kernels.as_ref().map_or(MAX_COLS, |kernels| kernels.cols());
        for col in (0..n).step_by(cols) {
            for row in (0..m).step_by(TILE_ROWS) {
                let (rows, cols) = (TILE_ROWS.min(m - row), cols.min(n - col));
                let to = ndarray::s![row..row + rows, col..col + cols];
                self.tile(a, b, (row, col), d.slice_mut(to), accumulate);
            }
        }
    }

    /// One tile: on the kernels where they cover its accumulators, else by the specification.
    fn tile(
        &self,
        a: &Packed,
        b: &Packed,
        (row, col): (usize, usize),
        mut d: ArrayViewMut2<'_, f32>,
        accumulate: bool,
    ) {
        let fast = self
            .kernels
            .as_ref()
            .filter(|kernels| !accumulate || kernels.any_c() || d.iter().all(|&c| in_f32_range(c)));
        let Some(kernels) = fast else {
            return self.specification(a, b, (row, col), d);
        };
        let cols = kernels.cols();
        let depth = kernels.packed_depth(a.codes.codes().dim().1);
        let mut tile = [0f32; TILE_ROWS * MAX_COLS];
        if accumulate {
            for (line, d) in tile.chunks_mut(cols).zip(d.outer_iter()) {
                line.iter_mut().zip(d).for_each(|(to, &c)| *to = c);
            }
        }
        let a_tile = &a.bytes.as_slice::<u8>(a.len)[row / TILE_ROWS * depth * kernels.a_bytes()..];
        let b_panel = &b.bytes.as_slice::<u8>(b.len)[col / cols * depth * kernels.b_bytes()..];
        assert!(a_tile.len() >= depth * kernels.a_bytes(), "A is packed by this tensor core");
        assert!(b_panel.len() >= depth * kernels.b_bytes(), "B is packed by this tensor core");
        // SAFETY: both are packed for `depth` (asserted), the tile has room for the widest.
        unsafe {
            kernels.tile(depth, a_tile.as_ptr(), b_panel.as_ptr(), tile.as_mut_ptr(), accumulate);
        }
        for (line, mut d) in tile.chunks(cols).zip(d.outer_iter_mut()) {
            d.iter_mut().zip(line).for_each(|(d, &x)| *d = crate::formats::canonical_f32(x));
        }
    }

    fn specification(
        &self,
        a: &Packed,
        b: &Packed,
        (row, col): (usize, usize),
        mut d: ArrayViewMut2<'_, f32>,
    ) {
        let decode = |format: Format, codes: &Codes<'_>, row: usize| -> Vec<Operand> {
            (0..codes.dim().1).map(|k| Operand::decode(format, codes.get(row, k))).collect()
        };
        let (a, b) = (a.codes.codes(), b.codes.codes());
        for ((i, j), d) in d.indexed_iter_mut() {
            let terms = Terms {
                a: &decode(self.formats.0, &a, row + i),
                b: &decode(self.formats.1, &b, col + j),
                scale_a: &[],
                scale_b: &[],
                fraction_a: self.formats.0.layout().fraction_bits,
                fraction_b: self.formats.1.layout().fraction_bits,
            };
            *d = f32::from_bits(self.accumulator.chain(&terms, d.to_bits()));
        }
    }
}
