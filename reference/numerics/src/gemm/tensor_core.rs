//! Matrix instructions on whole tiles, with incoming accumulators: what executes a `wgmma`.
//!
//! A [`TensorCore`] packs operands once and multiplies them as often as wanted; an operand is
//! packed in about the time that 10 to 20 products an element take. The accumulator chains over all
//! of the operands' K, so one call may stand for a single instruction (K = 32 for FP8, 16 for BF16)
//! or for a row of them.
//!
//! ```
//! use fathom_numerics::formats::Format;
//! use fathom_numerics::gemm::tensor_core::TensorCore;
//! use fathom_numerics::mma::Accumulator;
//! use ndarray::Array2;
//! let core = TensorCore::new(Accumulator::HOPPER_FP8, Format::E4M3, Format::E4M3);
//! let core = core.expect("FP32 output");
//! let a = core.pack_a(Array2::from_elem((64, 32), 0x38u8).view()); // 1.0
//! let b = core.pack_b(Array2::from_elem((8, 32), 0x40u8).view()); // 2.0, [n, k]
//! let mut d = Array2::from_elem((64, 8), 3.0f32);
//! core.multiply_add(&a, &b, d.view_mut(), true);
//! assert_eq!(d, Array2::from_elem((64, 8), 67.0));
//! ```

use super::isa::Isa;
use super::scratch::Scratch;
use super::tile::{self, Codes, MAX_COLS, PACK, TILE_ROWS, TileKernels, TileOutput};
use crate::formats::Format;
use crate::mma::{Accumulator, Operand, Output, Terms};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, CowArray, Ix2};

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
    codes: StoredCodes,
    bytes: Scratch,
    len: usize,
    is_a: bool,
}

impl Packed {
    /// Whether it was packed from these codes, which lie row after row.
    pub fn is_of<T: Code>(&self, codes: ArrayView2<'_, T>) -> bool {
        codes.dim() == self.codes.0.codes().dim()
            && codes.as_slice().is_some_and(|codes| T::are(codes, &self.codes))
    }

    /// Bytes of the packed form.
    pub fn bytes(&self) -> usize {
        self.len
    }
}

/// Operand codes as they come: bytes for 8-bit formats, words for the others.
pub trait Code: Copy + 'static {
    /// In the form that is packed, copied unless they are owned.
    #[doc(hidden)]
    fn store(codes: CowArray<'_, Self, Ix2>) -> StoredCodes;

    /// Whether these are what was stored, row after row.
    #[doc(hidden)]
    fn are(codes: &[Self], stored: &StoredCodes) -> bool;
}

/// An operand's codes, copied.
#[doc(hidden)]
pub struct StoredCodes(Stored);

fn row_after_row<T: Code>(codes: CowArray<'_, T, Ix2>) -> Array2<T> {
    if codes.is_standard_layout() {
        codes.into_owned()
    } else {
        codes.as_standard_layout().into_owned()
    }
}

impl Code for u8 {
    fn store(codes: CowArray<'_, u8, Ix2>) -> StoredCodes {
        StoredCodes(Stored::U8(row_after_row(codes)))
    }

    fn are(codes: &[u8], StoredCodes(stored): &StoredCodes) -> bool {
        matches!(stored, Stored::U8(stored) if stored.as_slice() == Some(codes))
    }
}

impl Code for u16 {
    fn store(codes: CowArray<'_, u16, Ix2>) -> StoredCodes {
        StoredCodes(Stored::U32(codes.map(|&code| code.into())))
    }

    fn are(codes: &[u16], StoredCodes(stored): &StoredCodes) -> bool {
        matches!(stored, Stored::U32(s) if s.iter().copied().eq(codes.iter().map(|&c| u32::from(c))))
    }
}

impl Code for u32 {
    fn store(codes: CowArray<'_, u32, Ix2>) -> StoredCodes {
        StoredCodes(Stored::U32(row_after_row(codes)))
    }

    fn are(codes: &[u32], StoredCodes(stored): &StoredCodes) -> bool {
        matches!(stored, Stored::U32(stored) if stored.as_slice() == Some(codes))
    }
}

impl TensorCore {
    /// The arithmetic on operands A and B of these formats, on the fastest instruction set; `None`
    /// where the accumulator is held in FP16.
    pub fn new(accumulator: Accumulator, a: Format, b: Format) -> Option<TensorCore> {
        TensorCore::on(Isa::best(), accumulator, a, b)
    }

    /// [`TensorCore::new`] on a chosen instruction set: for tests and benches.
    pub fn on(isa: Isa, accumulator: Accumulator, a: Format, b: Format) -> Option<TensorCore> {
        let Output::F32 { .. } = accumulator.output else { return None };
        let kernels = tile::kernels(isa, (a, b), &accumulator);
        Some(TensorCore { accumulator, formats: (a, b), kernels })
    }

    /// Packs A, codes `[m, k]` of the format named for it: bytes for FP8, words for the others.
    pub fn pack_a<'a, T: Code>(&self, codes: impl Into<CowArray<'a, T, Ix2>>) -> Packed {
        self.pack(codes.into(), true)
    }

    /// Packs B, codes `[n, k]` (the transpose of the factor) of the format named for it, as
    /// [`TensorCore::pack_a`] does A.
    pub fn pack_b<'a, T: Code>(&self, codes: impl Into<CowArray<'a, T, Ix2>>) -> Packed {
        self.pack(codes.into(), false)
    }

    fn pack<T: Code>(&self, codes: CowArray<'_, T, Ix2>, is_a: bool) -> Packed {
        let codes = T::store(codes);
        let (rows, k) = codes.0.codes().dim();
        let Some(kernels) = &self.kernels else {
            return Packed { codes, bytes: Scratch::bytes(0), len: 0, is_a };
        };
        let depth = kernels.packed_depth(k);
        let (pack, size) = if is_a {
            (PACK, depth * kernels.a_bytes() * (PACK / TILE_ROWS))
        } else {
            (kernels.cols(), depth * kernels.b_bytes())
        };
        let len = rows.div_ceil(pack) * size;
        let mut bytes = Scratch::bytes(len);
        if size > 0 {
            let chunks = bytes.slice::<u8>(len).chunks_exact_mut(size);
            for (i, chunk) in chunks.enumerate() {
                if is_a {
                    kernels.pack_a(&codes.0.codes(), i * pack, (0, k), chunk)
                } else {
                    kernels.pack_b(&codes.0.codes(), i * pack, (0, k), chunk)
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
        let ((m, k), (n, k_b)) = (a.codes.0.codes().dim(), b.codes.0.codes().dim());
        assert_eq!(k, k_b, "A is [{m}, {k}], B is [{n}, {k_b}]: expected the same K");
        assert_eq!(d.dim(), (m, n), "A is [{m}, {k}], B is [{n}, {k}], D is {:?}", d.dim());
        assert!(a.is_a && !b.is_a, "A is packed by pack_a, B by pack_b");
        let Some(d) = d.as_slice_mut() else {
            let mut copy = d.to_owned();
            self.multiply_add(a, b, copy.view_mut(), accumulate);
            return d.assign(&copy);
        };
        let fast = self.kernels.as_ref().filter(|kernels| {
            // SAFETY: the kernels exist because the machine has their instruction set.
            !accumulate || kernels.any_c() || unsafe { (kernels.passes().all_in_range)(d) }
        });
        match fast {
            Some(kernels) if k > 0 && !d.is_empty() => {
                self.tiles(&**kernels, a, b, d, accumulate);
            }
            _ => {
                if !accumulate {
                    d.fill(0.0);
                }
                if k > 0 {
                    self.specification(a, b, d);
                }
            }
        }
    }

    /// All tiles on the kernels, whole ones in place.
    fn tiles(&self, kernels: &dyn TileKernels, a: &Packed, b: &Packed, d: &mut [f32], carry: bool) {
        let ((m, k), n) = (a.codes.0.codes().dim(), b.codes.0.codes().dim().0);
        let (width, depth) = (kernels.cols(), kernels.packed_depth(k));
        let (a_size, b_size) = (depth * kernels.a_bytes(), depth * kernels.b_bytes());
        let a_packed = a.bytes.as_slice::<u8>(a.len);
        let b_packed = b.bytes.as_slice::<u8>(b.len);
        for (panel, b_panel) in b_packed.chunks_exact(b_size).enumerate() {
            for (tile, a_tile) in
                a_packed.chunks_exact(a_size).take(m.div_ceil(TILE_ROWS)).enumerate()
            {
                let (row, col) = (tile * TILE_ROWS, panel * width);
                let (rows, cols) = (TILE_ROWS.min(m - row), width.min(n - col));
                if rows == TILE_ROWS && cols == width {
                    let output = TileOutput { data: d[row * n + col..].as_mut_ptr(), stride: n };
                    // SAFETY: panels of `depth` by construction of the chunks; a whole tile of D.
                    unsafe {
                        kernels.tile(depth, a_tile.as_ptr(), b_panel.as_ptr(), output, carry)
                    };
                    continue;
                }
                let mut copy = [0f32; TILE_ROWS * MAX_COLS];
                for i in 0..rows {
                    copy[i * width..][..cols].copy_from_slice(&d[(row + i) * n + col..][..cols]);
                }
                let output = TileOutput { data: copy.as_mut_ptr(), stride: width };
                // SAFETY: as above, the tile in its copy.
                unsafe { kernels.tile(depth, a_tile.as_ptr(), b_panel.as_ptr(), output, carry) };
                for i in 0..rows {
                    d[(row + i) * n + col..][..cols].copy_from_slice(&copy[i * width..][..cols]);
                }
            }
        }
        // SAFETY: the kernels exist because the machine has their instruction set.
        unsafe { (kernels.passes().canonicalise)(d) };
    }

    /// The whole product by the specification.
    fn specification(&self, a: &Packed, b: &Packed, d: &mut [f32]) {
        let decode = |format: Format, codes: &Codes<'_>| -> Vec<Operand> {
            let (rows, k) = codes.dim();
            let places = (0..rows).flat_map(|row| (0..k).map(move |k| (row, k)));
            places.map(|(row, k)| Operand::decode(format, codes.get(row, k))).collect()
        };
        let (a, b) = (a.codes.0.codes(), b.codes.0.codes());
        let (k, n) = (a.dim().1, b.dim().0);
        let (a, b) = (decode(self.formats.0, &a), decode(self.formats.1, &b));
        for (place, d) in d.iter_mut().enumerate() {
            let terms = Terms {
                a: &a[place / n * k..][..k],
                b: &b[place % n * k..][..k],
                scale_a: &[],
                scale_b: &[],
                fraction_a: self.formats.0.layout().fraction_bits,
                fraction_b: self.formats.1.layout().fraction_bits,
            };
            *d = f32::from_bits(self.accumulator.chain(&terms, d.to_bits()));
        }
    }
}
