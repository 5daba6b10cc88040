//! What a tile kernel is: who packs, who multiplies and who promotes, on which instruction set, for
//! which accumulator.

use super::config::Promote;
use super::lanes::{Lanes, Step};
use super::{Isa, promote_row};
use crate::formats::{Format, canonical_f32};
use crate::mma::Accumulator;
use ndarray::ArrayView2;

/// Rows of a tile.
pub(super) const TILE_ROWS: usize = 4;
/// Columns of the widest tile.
pub(super) const MAX_COLS: usize = 32;
/// Rows of A that are packed together.
pub(super) const PACK: usize = 16;

/// An operand's codes, `[rows, k]`.
pub(super) enum Codes<'a> {
    /// Of an 8-bit format.
    U8(ArrayView2<'a, u8>),
    /// Of any other.
    U32(ArrayView2<'a, u32>),
}

impl Codes<'_> {
    /// Rows and K.
    pub(super) fn dim(&self) -> (usize, usize) {
        match self {
            Codes::U8(codes) => codes.dim(),
            Codes::U32(codes) => codes.dim(),
        }
    }

    /// A code; zero outside.
    #[inline]
    pub(super) fn get(&self, row: usize, k: usize) -> u32 {
        match self {
            Codes::U8(codes) => codes.get((row, k)).map_or(0, |&code| code.into()),
            Codes::U32(codes) => codes.get((row, k)).map_or(0, |&code| code),
        }
    }
}

/// A tile of C: a pointer to its first element, its rows `stride` elements apart.
#[derive(Clone, Copy)]
pub(super) struct TileOutput {
    pub(super) data: *mut f32,
    pub(super) stride: usize,
}

impl TileOutput {
    /// Asks for the tile's cache lines, which the kernel will need when it is done.
    #[inline]
    pub(super) fn prefetch(self, rows: usize, cols: usize) {
        for row in 0..rows {
            for col in (0..cols).step_by(16) {
                let line = self.data.wrapping_add(row * self.stride + col);
                #[cfg(target_arch = "x86_64")]
                // SAFETY: a prefetch has no effect but on time, whatever the address.
                unsafe {
                    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
                    _mm_prefetch::<_MM_HINT_T0>(line.cast());
                }
                #[cfg(not(target_arch = "x86_64"))]
                let _ = line;
            }
        }
    }
}

/// Passes over a whole C, compiled for an instruction set.
pub(super) struct Passes {
    /// Whether all elements are [`in_f32_range`].
    pub(super) all_in_range: unsafe fn(&[f32]) -> bool,
    /// Makes every NaN canonical.
    pub(super) canonicalise: unsafe fn(&mut [f32]),
}

/// `(how, scales, partial, acc, end)`: promotes one row of a tile.
pub(super) type PromoteRow = unsafe fn(Promote, (f32, &[f32]), &[f32], &mut [f32], bool);

/// Kernels for one accumulator and pair of formats on one instruction set, which the machine has.
pub(super) trait TileKernels: Send + Sync {
    /// Columns of a tile.
    fn cols(&self) -> usize;
    /// Products a step: depths are multiples of it but at the end of a chain.
    fn depth_unit(&self) -> usize;
    /// Whether packed depths are filled up to the unit with zeros.
    fn padded(&self) -> bool;
    /// Bytes of one step along K of a packed tile of A.
    fn a_bytes(&self) -> usize;
    /// Bytes of one step along K of a packed panel of B.
    fn b_bytes(&self) -> usize;
    /// Packs [`PACK`] rows as tiles of A, one after another; rows that do not exist are zero.
    fn pack_a(&self, codes: &Codes<'_>, row: usize, k: (usize, usize), tiles: &mut [u8]);
    /// Packs `cols` rows as a panel of B; rows that do not exist are zero.
    fn pack_b(&self, codes: &Codes<'_>, row: usize, k: (usize, usize), panel: &mut [u8]);
    /// Chains `depth` products into the tile `c`, from zero unless `carry`.
    ///
    /// # Safety
    /// A tile and a panel packed for `depth`; `c` has `TILE_ROWS` rows of `cols` elements.
    unsafe fn tile(&self, depth: usize, a: *const u8, b: *const u8, c: TileOutput, carry: bool);
    /// What the incoming and outgoing accumulators of whole matrices need.
    fn passes(&self) -> Passes;
    /// Promotes one row of a tile.
    fn promote(&self) -> PromoteRow;
    /// Whether every C is exact, not only those of [`in_f32_range`].
    fn any_c(&self) -> bool;

    /// Packed length of `depth` along K.
    fn packed_depth(&self, depth: usize) -> usize {
        if self.padded() { depth.next_multiple_of(self.depth_unit()) } else { depth }
    }
}

/// Whether kernels with f32 lanes take `c` as an incoming accumulator: zero, infinity, NaN, or
/// a magnitude in [2^-88, 2^43), from where a chain of 2048 products stays below the 2^44 that they
/// compute with.
#[inline(always)]
pub(super) fn in_f32_range(c: f32) -> bool {
    let field = c.to_bits() >> 23 & 0xFF;
    (c == 0.0) | (field == 0xFF) | (field.wrapping_sub(127 - 88) < 88 + 43)
}

#[inline(always)]
fn all_in_range(c: &[f32]) -> bool {
    c.iter().fold(true, |all, &c| all & in_f32_range(c))
}

#[inline(always)]
fn canonicalise(c: &mut [f32]) {
    c.iter_mut().for_each(|c| *c = canonical_f32(*c));
}

/// The kernels for `accumulator` over operands of these formats on `isa`; none where the machine
/// does not have it, or where only the specification computes that accumulator.
pub(super) fn kernels(
    isa: Isa,
    formats: (Format, Format),
    accumulator: &Accumulator,
) -> Option<Box<dyn TileKernels>> {
    if isa == Isa::Portable || !isa.is_available() {
        return None;
    }
    let fp8 = |format| matches!(format, Format::E4M3 | Format::E5M2);
    let both_fp8 = fp8(formats.0) && fp8(formats.1);
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512 && both_fp8 && *accumulator == Accumulator::HOPPER_FP8 {
        return Some(Box::new(super::fp8_avx512::Fp8::new(formats)));
    }
    let step = Step::of(accumulator)?;
    // The f32 form has no subnormal or overflowing results to round, nor a rounding to nearest.
    let narrow = both_fp8 && step.fits_f32() && *accumulator == Accumulator::HOPPER_FP8;
    Some(Box::new(Lanes::new(isa, step, formats, narrow)))
}

/// The promotion of a row, compiled for `isa`.
pub(super) fn promote_on(isa: Isa) -> PromoteRow {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => x86::promote_512,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => x86::promote_256,
        _ => promote_row,
    }
}

/// The passes, compiled for `isa`.
pub(super) fn passes_on(isa: Isa) -> Passes {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => x86::PASSES_512,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => x86::PASSES_256,
        _ => Passes { all_in_range, canonicalise },
    }
}

/// The plain loops again, with wider instructions.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Passes, Promote, promote_row};

    macro_rules! compiled_for {
        ($features:literal, $promote:ident, $all_in_range:ident, $canonicalise:ident) => {
            #[target_feature(enable = $features)]
            pub(super) fn $promote(
                how: Promote,
                scales: (f32, &[f32]),
                partial: &[f32],
                acc: &mut [f32],
                end: bool,
            ) {
                promote_row(how, scales, partial, acc, end);
            }

            #[target_feature(enable = $features)]
            fn $all_in_range(c: &[f32]) -> bool {
                super::all_in_range(c)
            }

            #[target_feature(enable = $features)]
            fn $canonicalise(c: &mut [f32]) {
                super::canonicalise(c);
            }
        };
    }

    compiled_for!("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma", promote_512, range_512, nan_512);
    compiled_for!("avx2,fma", promote_256, range_256, nan_256);

    pub(super) const PASSES_512: Passes = Passes { all_in_range: range_512, canonicalise: nan_512 };
    pub(super) const PASSES_256: Passes = Passes { all_in_range: range_256, canonicalise: nan_256 };
}
