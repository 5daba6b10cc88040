//! The fused dot-product-add in floating-point lanes: any width up to 40 bits, any group, any
//! operand format, on any instruction set.
//!
//! A product of two operands is exact in f64 (and of two FP8 operands in f32). Scaled by
//! `2^(F - e)`, `e` the step's largest exponent, its truncation to an integer is the aligned term;
//! the sum of the integers is exact. Four instructions a product: two multiplications, a
//! truncation, an addition. Exponents are 16-bit integers and follow the specification to the
//! letter (zero: -126), so that every accumulator C is covered in f64; in f32 those that
//! `tile::in_f32_range` admits.

use super::tile::{Codes, TILE_ROWS, TileKernels, TileOutput};
use super::{Isa, tile};
use crate::formats::{Format, Rounding};
use crate::mma::{Accumulator, Fraction, Output};
use std::sync::LazyLock;

/// A step's arithmetic, as the kernels need it.
#[derive(Clone, Copy)]
pub(super) struct Step {
    group: usize,
    fraction_bits: i32,
    /// Fraction bits of the result, truncated; none: FP32 to nearest even.
    truncate_to: Option<u32>,
}

impl Step {
    /// The arithmetic of `accumulator`, if these kernels can do it.
    pub(super) fn of(accumulator: &Accumulator) -> Option<Step> {
        let Fraction::Bits(fraction_bits @ 0..=40) = accumulator.fraction else { return None };
        let truncate_to = match (accumulator.output, accumulator.round) {
            (Output::F32 { fraction_bits }, Rounding::TowardZero) => Some(fraction_bits),
            (Output::F32 { fraction_bits: 23 }, Rounding::NearestEven) => None,
            _ => return None,
        };
        let fits = accumulator.group <= 256 && accumulator.align == Rounding::TowardZero;
        fits.then_some(Step {
            group: accumulator.group,
            fraction_bits: fraction_bits as i32,
            truncate_to,
        })
    }

    /// Whether FP8 products fit f32 lanes: the sum of a step stays below 2^24 units.
    pub(super) fn fits_f32(&self) -> bool {
        self.fraction_bits <= 15 && self.group <= 32
    }
}

/// `(step, depth, a, b, c, carry)`: `depth` products into a tile of C.
type LanesTile = unsafe fn(&Step, usize, *const u8, *const u8, TileOutput, bool);

/// The kernels of one instruction set for one accumulator and pair of formats.
pub(super) struct Lanes {
    step: Step,
    formats: (Format, Format),
    /// The lanes are f32, not f64.
    narrow: bool,
    cols: usize,
    tile: LanesTile,
    isa: Isa,
}

impl Lanes {
    /// Kernels for `isa`, which the machine has; `narrow` asks for f32 lanes.
    pub(super) fn new(isa: Isa, step: Step, formats: (Format, Format), narrow: bool) -> Lanes {
        let (cols, run): (usize, LanesTile) = match (isa, narrow) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, true) => (32, x86::f32_avx512),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, false) => (16, x86::f64_avx512),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, true) => (16, x86::f32_avx2),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, false) => (8, x86::f64_avx2),
            #[cfg(target_arch = "aarch64")]
            (Isa::Neon, true) => (8, neon::f32_neon),
            #[cfg(target_arch = "aarch64")]
            (Isa::Neon, false) => (4, neon::f64_neon),
            (_, true) => (2, portable::f32_portable),
            (_, false) => (2, portable::f64_portable),
        };
        Lanes { step, formats, narrow, cols, tile: run, isa }
    }

    fn element_bytes(&self) -> usize {
        if self.narrow { 4 } else { 8 }
    }

    /// Packs `width` rows from `row` as one panel: values `[k][width]`, then exponents alike.
    fn pack(&self, format: Format, codes: &Codes<'_>, rows: Rows, panel: &mut [u8]) {
        let (depth, size) = (rows.to - rows.from, self.element_bytes());
        let (values, exponents) = panel.split_at_mut(depth * rows.width * size);
        let table = bytes_table(format);
        for i in 0..rows.width {
            for k in 0..depth {
                let code = codes.get(rows.row + i, rows.from + k);
                let (value, exponent) = match &table {
                    Some(table) => table[code as usize],
                    None => decode(format, code),
                };
                let place = k * rows.width + i;
                let value_bytes = &mut values[place * size..][..size];
                if self.narrow {
                    value_bytes.copy_from_slice(&(value as f32).to_ne_bytes());
                } else {
                    value_bytes.copy_from_slice(&value.to_ne_bytes());
                }
                exponents[2 * place..][..2].copy_from_slice(&exponent.to_ne_bytes());
            }
        }
    }
}

/// Value and nominal exponent of a code; a special value's exponent is without effect.
#[inline]
fn decode(format: Format, code: u32) -> (f64, i16) {
    let value = match format {
        Format::Bf16 => f32::from_bits(code << 16),
        Format::Tf32 => f32::from_bits(code & !0x1FFF),
        _ => format.layout().to_f32(code),
    };
    let value = f64::from(value);
    let exponent = ((value.to_bits() >> 52 & 0x7FF) as i32 - 1023).min(128);
    let nominal = if value == 0.0 { -126 } else { exponent.max(format.layout().min_exponent()) };
    (value, nominal as i16)
}

/// [`decode`] of every code of FP8.
fn bytes_table(format: Format) -> Option<&'static [(f64, i16); 256]> {
    static E4M3: LazyLock<[(f64, i16); 256]> = LazyLock::new(|| table(Format::E4M3));
    static E5M2: LazyLock<[(f64, i16); 256]> = LazyLock::new(|| table(Format::E5M2));
    fn table(format: Format) -> [(f64, i16); 256] {
        std::array::from_fn(|code| decode(format, code as u32))
    }
    match format {
        Format::E4M3 => Some(&E4M3),
        Format::E5M2 => Some(&E5M2),
        _ => None,
    }
}

/// Which rows and columns of an operand go into a panel.
#[derive(Clone, Copy)]
struct Rows {
    row: usize,
    width: usize,
    from: usize,
    to: usize,
}

impl TileKernels for Lanes {
    fn cols(&self) -> usize {
        self.cols
    }

    fn depth_unit(&self) -> usize {
        self.step.group
    }

    fn padded(&self) -> bool {
        false
    }

    fn a_bytes(&self) -> usize {
        TILE_ROWS * (self.element_bytes() + 2)
    }

    fn b_bytes(&self) -> usize {
        self.cols * (self.element_bytes() + 2)
    }

    fn pack_a(&self, codes: &Codes<'_>, row: usize, (from, to): (usize, usize), tiles: &mut [u8]) {
        let size = (to - from) * self.a_bytes();
        for (i, tile) in tiles.chunks_exact_mut(size).enumerate() {
            let rows = Rows { row: row + i * TILE_ROWS, width: TILE_ROWS, from, to };
            self.pack(self.formats.0, codes, rows, tile);
        }
    }

    fn pack_b(&self, codes: &Codes<'_>, row: usize, (from, to): (usize, usize), panel: &mut [u8]) {
        let rows = Rows { row, width: self.cols, from, to };
        self.pack(self.formats.1, codes, rows, panel);
    }

    fn passes(&self) -> tile::Passes {
        tile::passes_on(self.isa)
    }

    unsafe fn tile(&self, depth: usize, a: *const u8, b: *const u8, c: TileOutput, carry: bool) {
        // SAFETY: the caller's panels and tile; the instruction set was there when this was made.
        unsafe { (self.tile)(&self.step, depth, a, b, c, carry) }
    }

    fn promote(&self) -> tile::PromoteRow {
        tile::promote_on(self.isa)
    }

    fn any_c(&self) -> bool {
        !self.narrow
    }
}

/// C's own exponents, where the search for the largest begins.
#[inline(always)]
fn exponents_of<const W: usize>(c: &[[f32; W]; TILE_ROWS]) -> [[i16; W]; TILE_ROWS] {
    let mut top = [[0i16; W]; TILE_ROWS];
    for (top, c) in top.as_flattened_mut().iter_mut().zip(c.as_flattened()) {
        *top = ((c.to_bits() >> 23 & 0xFF) as i16).max(1) - 127;
    }
    top
}

/// Writes the tile kernel `$name` with lanes of `$t`: vectors `$v` of `$lanes`, two a row;
/// exponents in vectors of 16-bit integers, one a row.
macro_rules! lanes_tile {
    ($(#[$attr:meta])* $name:ident, $t:ident, $v:ty, $lanes:literal,
     $load:expr, $store:expr, $splat:expr, $mul:expr, $trunc:expr, $add:expr,
     exponents: $load_e:expr, $store_e:expr, $splat_e:expr, $add_e:expr, $max_e:expr) => {
        /// # Safety
        /// Panels of `depth` and a tile of `4 x 2 * lanes` elements; the instruction set present.
        $(#[$attr])*
        #[allow(clippy::needless_range_loop)]
        pub(super) unsafe fn $name(
            step: &Step, depth: usize, a: *const u8, b: *const u8, c: TileOutput, carry: bool,
        ) {
            const W: usize = 2 * $lanes;
            let (a_values, b_values) = (a.cast::<$t>(), b.cast::<$t>());
            // SAFETY: exponents follow the values in both panels.
            let (a_exponents, b_exponents) = unsafe {
                let (a, b) = (a_values.add(depth * TILE_ROWS), b_values.add(depth * W));
                (a.cast::<i16>(), b.cast::<i16>())
            };
            let mut tile = [[0f32; W]; TILE_ROWS];
            if carry {
                for r in 0..TILE_ROWS {
                    // SAFETY: the caller's tile.
                    tile[r] = unsafe { c.data.add(r * c.stride).cast::<[f32; W]>().read_unaligned() };
                }
            }
            let mut scale = [[0 as $t; W]; TILE_ROWS];
            let mut grid = [[0 as $t; W]; TILE_ROWS];
            let mut sum = [[0 as $t; W]; TILE_ROWS];
            for from in (0..depth).step_by(step.group) {
                let count = step.group.min(depth - from);
                let mut top = exponents_of(&tile);
                // SAFETY: `from + count <= depth`, so all reads are inside the panels.
                unsafe {
                    let mut rows = [$load_e(top[0].as_ptr()); TILE_ROWS];
                    for r in 1..TILE_ROWS {
                        rows[r] = $load_e(top[r].as_ptr());
                    }
                    for k in from..from + count {
                        let y = $load_e(b_exponents.add(k * W));
                        for r in 0..TILE_ROWS {
                            let x = $splat_e(a_exponents.add(k * TILE_ROWS + r).read_unaligned());
                            rows[r] = $max_e(rows[r], $add_e(x, y));
                        }
                    }
                    for r in 0..TILE_ROWS {
                        $store_e(top[r].as_mut_ptr(), rows[r]);
                    }
                }
                let tops = top.as_flattened();
                for (i, scale) in scale.as_flattened_mut().iter_mut().enumerate() {
                    *scale = power::$t(step.fraction_bits - i32::from(tops[i]));
                }
                for (i, grid) in grid.as_flattened_mut().iter_mut().enumerate() {
                    *grid = power::$t(i32::from(tops[i]) - step.fraction_bits);
                }
                let (tiles, scales) = (tile.as_flattened(), scale.as_flattened());
                for (i, sum) in sum.as_flattened_mut().iter_mut().enumerate() {
                    *sum = (tiles[i] as $t * scales[i]).trunc() + 0.0;
                }
                // SAFETY: as above.
                unsafe {
                    let mut acc = [[$splat(&0.0); 2]; TILE_ROWS];
                    let mut unit = acc;
                    for r in 0..TILE_ROWS {
                        for v in 0..2 {
                            acc[r][v] = $load(sum[r].as_ptr().add(v * $lanes));
                            unit[r][v] = $load(scale[r].as_ptr().add(v * $lanes));
                        }
                    }
                    for k in from..from + count {
                        let y = b_values.add(k * W);
                        let y = [$load(y), $load(y.add($lanes))];
                        for r in 0..TILE_ROWS {
                            let x = $splat(a_values.add(k * TILE_ROWS + r));
                            for v in 0..2 {
                                let term = $trunc($mul($mul(x, y[v]), unit[r][v]));
                                acc[r][v] = $add(acc[r][v], term);
                            }
                        }
                    }
                    for r in 0..TILE_ROWS {
                        for v in 0..2 {
                            $store(sum[r].as_mut_ptr().add(v * $lanes), acc[r][v]);
                        }
                    }
                }
                let (sums, grids) = (sum.as_flattened(), grid.as_flattened());
                for (i, c) in tile.as_flattened_mut().iter_mut().enumerate() {
                    *c = output::$t(step, sums[i] * grids[i]);
                }
            }
            for r in 0..TILE_ROWS {
                // SAFETY: the caller's tile.
                unsafe { c.data.add(r * c.stride).cast::<[f32; W]>().write_unaligned(tile[r]) };
            }
        }
    };
}

/// Powers of two by their exponent field.
mod power {
    /// `2^e`; `e` is cut to the normal range, which bites only where no product is nonzero.
    #[inline(always)]
    pub(super) fn f32(e: i32) -> f32 {
        f32::from_bits(((e + 127).clamp(1, 254) << 23) as u32)
    }

    /// `2^e`, `e` normal.
    #[inline(always)]
    pub(super) fn f64(e: i32) -> f64 {
        f64::from_bits(((e + 1023) as u64) << 52)
    }
}

/// A step's exact sum in the accumulator's format.
mod output {
    use super::{Step, power};

    /// The f32 form; sums are normal (FP8) and need no rounding to nearest.
    #[inline(always)]
    pub(super) fn f32(step: &Step, sum: f32) -> f32 {
        let keep = step.truncate_to.unwrap_or(23);
        f32::from_bits(sum.to_bits() & (u32::MAX << (23 - keep))) + 0.0
    }

    /// The f64 form: truncated, on an absolute grid below 2^-126, infinite above FP32's range; or
    /// to nearest.
    #[inline(always)]
    pub(super) fn f64(step: &Step, sum: f64) -> f32 {
        let Some(keep) = step.truncate_to else { return sum as f32 + 0.0 };
        let cut = f64::from_bits(sum.to_bits() & (u64::MAX << (52 - keep)));
        let smallest = 126 + keep as i32;
        let small = (sum * power::f64(smallest)).trunc() * power::f64(-smallest);
        (if sum.abs() < power::f64(-126) { small } else { cut }) as f32 + 0.0
    }
}

/// Plain Rust: "vectors" are single numbers, or pairs of exponents.
mod portable {
    use super::{Step, TILE_ROWS, TileOutput, exponents_of, output, power};

    type Pair = [i16; 2];

    unsafe fn load_pair(p: *const i16) -> Pair {
        // SAFETY: the kernels pass two readable exponents.
        unsafe { p.cast::<Pair>().read_unaligned() }
    }

    unsafe fn store_pair(p: *mut i16, pair: Pair) {
        // SAFETY: the kernels pass room for two exponents.
        unsafe { p.cast::<Pair>().write_unaligned(pair) }
    }

    lanes_tile!(f32_portable, f32, f32, 1, |p: *const f32| p.read_unaligned(),
        |p: *mut f32, v| *p = v, |p: *const f32| p.read_unaligned(), |x: f32, y: f32| x * y,
        f32::trunc, |x: f32, y: f32| x + y,
        exponents: load_pair, store_pair, |x: i16| [x; 2],
        |x: Pair, y: Pair| [x[0] + y[0], x[1] + y[1]],
        |x: Pair, y: Pair| [x[0].max(y[0]), x[1].max(y[1])]);
    lanes_tile!(f64_portable, f64, f64, 1, |p: *const f64| p.read_unaligned(),
        |p: *mut f64, v| *p = v, |p: *const f64| p.read_unaligned(), |x: f64, y: f64| x * y,
        f64::trunc, |x: f64, y: f64| x + y,
        exponents: load_pair, store_pair, |x: i16| [x; 2],
        |x: Pair, y: Pair| [x[0] + y[0], x[1] + y[1]],
        |x: Pair, y: Pair| [x[0].max(y[0]), x[1].max(y[1])]);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Step, TILE_ROWS, TileOutput, exponents_of, output, power};
    use std::arch::x86_64::*;

    const TRUNCATE: i32 = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;

    lanes_tile!(#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        f32_avx512, f32, __m512, 16, _mm512_loadu_ps, _mm512_storeu_ps,
        |p: *const f32| _mm512_set1_ps(p.read_unaligned()), _mm512_mul_ps,
        _mm512_roundscale_ps::<TRUNCATE>, _mm512_add_ps,
        exponents: |p: *const i16| _mm512_loadu_si512(p.cast()),
        |p: *mut i16, v| _mm512_storeu_si512(p.cast(), v),
        _mm512_set1_epi16, _mm512_add_epi16, _mm512_max_epi16);
    lanes_tile!(#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        f64_avx512, f64, __m512d, 8, _mm512_loadu_pd, _mm512_storeu_pd,
        |p: *const f64| _mm512_set1_pd(p.read_unaligned()), _mm512_mul_pd,
        _mm512_roundscale_pd::<TRUNCATE>, _mm512_add_pd,
        exponents: |p: *const i16| _mm256_loadu_si256(p.cast()),
        |p: *mut i16, v| _mm256_storeu_si256(p.cast(), v),
        _mm256_set1_epi16, _mm256_add_epi16, _mm256_max_epi16);
    lanes_tile!(#[target_feature(enable = "avx2,fma")]
        f32_avx2, f32, __m256, 8, _mm256_loadu_ps, _mm256_storeu_ps,
        |p: *const f32| _mm256_set1_ps(p.read_unaligned()), _mm256_mul_ps,
        _mm256_round_ps::<TRUNCATE>, _mm256_add_ps,
        exponents: |p: *const i16| _mm256_loadu_si256(p.cast()),
        |p: *mut i16, v| _mm256_storeu_si256(p.cast(), v),
        _mm256_set1_epi16, _mm256_add_epi16, _mm256_max_epi16);
    lanes_tile!(#[target_feature(enable = "avx2,fma")]
        f64_avx2, f64, __m256d, 4, _mm256_loadu_pd, _mm256_storeu_pd,
        |p: *const f64| _mm256_set1_pd(p.read_unaligned()), _mm256_mul_pd,
        _mm256_round_pd::<TRUNCATE>, _mm256_add_pd,
        exponents: |p: *const i16| _mm_loadu_si128(p.cast()),
        |p: *mut i16, v| _mm_storeu_si128(p.cast(), v),
        _mm_set1_epi16, _mm_add_epi16, _mm_max_epi16);
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use super::{Step, TILE_ROWS, TileOutput, exponents_of, output, power};
    use std::arch::aarch64::*;

    lanes_tile!(#[target_feature(enable = "neon")]
        f32_neon, f32, float32x4_t, 4, vld1q_f32, vst1q_f32,
        |p: *const f32| vdupq_n_f32(p.read_unaligned()), vmulq_f32, vrndq_f32, vaddq_f32,
        exponents: vld1q_s16, vst1q_s16, vdupq_n_s16, vaddq_s16, vmaxq_s16);
    lanes_tile!(#[target_feature(enable = "neon")]
        f64_neon, f64, float64x2_t, 2, vld1q_f64, vst1q_f64,
        |p: *const f64| vdupq_n_f64(p.read_unaligned()), vmulq_f64, vrndq_f64, vaddq_f64,
        exponents: vld1_s16, vst1_s16, vdup_n_s16, vadd_s16, vmax_s16);
}
