//! Hopper's FP8 tensor core on AVX-512: the exact chain at more than half the speed of plain f32
//! FMAs.
//!
//! One step adds 32 products and the accumulator C, each truncated toward zero to the grid
//! `2^(e - 13)`, `e` being the largest exponent among them. Three observations make that cheap:
//!
//! 1. `e` is a max-plus product of the operands' exponents, which fit a byte: 64 products an
//!    instruction, twice.
//! 2. An f32 accumulator that starts at `M = 1.5 * 2^(e + 10)` has the grid as its unit in the last
//!    place, so an FMA **rounded toward zero** adds `floor(product / grid)` and nothing else: the
//!    accumulator is positive and stays in its binade (the sum is below 2^7 grid units times 2^13).
//!    That is one f32 FMA a product.
//! 3. The floor is the truncation but for negative products that lose bits, where it is one unit
//!    less. A product's lowest set bit has as exponent the sum of its factors' lowest bits'
//!    exponents, so those products are counted in bytes again, 64 at a time: an addition (whose top
//!    bit also multiplies the signs), a comparison with the grid's exponent, a masked increment.
//!
//! NaN and infinity ride along in the f32 values. Operands are packed with all three faces: 6 bytes
//! an element. The unit is a tile of 4 rows by 32 columns.

use super::scratch::Scratch;
use super::tile::{self, Codes, PACK, TILE_ROWS, TileKernels, TileOutput};
use crate::formats::Format;
use std::arch::x86_64::*;

/// Products a step.
const GROUP: usize = 32;
/// Columns of a tile: two vectors of f32.
const TILE_COLS: usize = 32;
/// Bytes of a packed group of 32 along K: [`TILE_ROWS`] rows of A.
const A_GROUP: usize = TILE_ROWS * GROUP * 6;
/// Bytes of a packed group of 32 along K: [`TILE_COLS`] columns of B.
const B_GROUP: usize = TILE_COLS * GROUP * 6;

const A_EXPONENTS: usize = TILE_ROWS * GROUP * 4;
const A_LOWEST: usize = TILE_ROWS * GROUP * 5;
const B_EXPONENTS: usize = TILE_COLS * GROUP * 4;
const B_LOWEST: usize = TILE_COLS * GROUP * 5;

/// Exponent bytes of A and B add up to `e + EXPONENT_BIAS`, the biased exponent of M.
const EXPONENT_BIAS: i32 = 127 + 10;
/// The exponent byte of zero, in A and B: two of them, or one and any other, stay below the sum of
/// any two nonzero ones, and high enough for the grid to be a normal f32.
const ZERO_EXPONENT: u8 = 24;
/// The smallest sum of two exponent bytes of nonzero operands: E5M2's smallest product.
const LEAST_SUM: u8 = (EXPONENT_BIAS - 28) as u8;
/// Exponents of lowest set bits are stored with this bias; products then with twice of it.
const LOWEST_BIAS: i32 = 16;
/// The lowest-bit byte of zero: no product with it ever loses a bit.
const ZERO_LOWEST: u8 = 63;

/// Rounding of an FMA toward zero.
const RZ: i32 = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
/// Rounding of an addition upward.
const RU: i32 = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;

/// For the 128 magnitudes of a format: exponent byte, lowest-bit byte, and the two upper bytes of
/// the value as f32 (its lower ones are zero).
struct Tables {
    exponent: [u8; 128],
    lowest: [u8; 128],
    value_low: [u8; 128],
    value_high: [u8; 128],
    /// 0x80 for A: the top bit of the sum of two lowest-bit bytes then says that signs agree.
    sign_flip: u8,
}

impl Tables {
    /// The tables of E4M3 or E5M2, for A or for B.
    fn new(format: Format, is_a: bool) -> Tables {
        let mut tables = Tables {
            exponent: [ZERO_EXPONENT; 128],
            lowest: [ZERO_LOWEST; 128],
            value_low: [0; 128],
            value_high: [0; 128],
            sign_flip: if is_a { 0x80 } else { 0 },
        };
        let bias = if is_a { EXPONENT_BIAS / 2 } else { EXPONENT_BIAS - EXPONENT_BIAS / 2 };
        let layout = format.layout();
        let smallest = layout.min_exponent();
        for code in 1..128 {
            let value = layout.to_f32(code as u32);
            let bits = if value.is_nan() { 0x7FC0_0000 } else { value.to_bits() };
            debug_assert_eq!(bits & 0xFFFF, 0);
            tables.value_low[code] = (bits >> 16) as u8;
            tables.value_high[code] = (bits >> 24) as u8;
            let finite = if value.is_finite() { value } else { 1.0 };
            let exponent = (finite.to_bits() >> 23) as i32 - 127;
            let lowest = exponent - 23 + (finite.to_bits() | 1 << 23).trailing_zeros() as i32;
            tables.exponent[code] = (exponent.max(smallest) + bias) as u8;
            tables.lowest[code] = (lowest + LOWEST_BIAS) as u8;
        }
        tables
    }
}

/// The kernels with the tables of their two formats.
pub(super) struct Fp8 {
    a: Tables,
    b: Tables,
}

impl Fp8 {
    /// For A and B of E4M3 or E5M2, on a machine that has [`super::Isa::Avx512`].
    pub(super) fn new((a, b): (Format, Format)) -> Fp8 {
        assert!(super::Isa::Avx512.is_available(), "these kernels are for AVX-512");
        Fp8 { a: Tables::new(a, true), b: Tables::new(b, false) }
    }
}

impl TileKernels for Fp8 {
    fn cols(&self) -> usize {
        TILE_COLS
    }

    fn depth_unit(&self) -> usize {
        GROUP
    }

    fn padded(&self) -> bool {
        true
    }

    fn a_bytes(&self) -> usize {
        A_GROUP / GROUP
    }

    fn b_bytes(&self) -> usize {
        B_GROUP / GROUP
    }

    fn pack_a(&self, codes: &Codes<'_>, row: usize, k: (usize, usize), tiles: &mut [u8]) {
        let groups = (k.1 - k.0).div_ceil(GROUP);
        assert!(tiles.len() >= PACK / TILE_ROWS * groups * A_GROUP, "room for 16 rows");
        with_rows(codes, row, k, |rows, stride| {
            // SAFETY: 16 rows of whole groups of codes; room for 16 rows; AVX-512 as `new` found.
            unsafe { pack_a(&self.a, rows.as_ptr(), stride, groups, tiles.as_mut_ptr()) };
        });
    }

    fn pack_b(&self, codes: &Codes<'_>, row: usize, k: (usize, usize), panel: &mut [u8]) {
        let groups = (k.1 - k.0).div_ceil(GROUP);
        assert!(panel.len() >= groups * B_GROUP, "room for a panel");
        for part in 0..TILE_COLS / PACK {
            with_rows(codes, row + part * PACK, k, |rows, stride| {
                let panel = panel.as_mut_ptr();
                // SAFETY: 16 rows of whole groups of codes; a whole panel; AVX-512 as above.
                unsafe { pack_b(&self.b, rows.as_ptr(), stride, groups, panel, part) };
            });
        }
    }

    fn passes(&self) -> tile::Passes {
        tile::passes_on(super::Isa::Avx512)
    }

    unsafe fn tile(&self, depth: usize, a: *const u8, b: *const u8, c: TileOutput, carry: bool) {
        // SAFETY: the caller's operands and tile; AVX-512 as above.
        unsafe { tile(depth / GROUP, a, b, c, carry) }
    }

    fn promote(&self) -> tile::PromoteRow {
        tile::promote_on(super::Isa::Avx512)
    }

    fn any_c(&self) -> bool {
        false
    }
}

/// Calls `work` with [`PACK`] rows of whole groups of codes and their stride: in place where they
/// are there and contiguous, else by way of a copy filled up with zeros.
fn with_rows(
    codes: &Codes<'_>,
    row: usize,
    (from, to): (usize, usize),
    work: impl FnOnce(&[u8], usize),
) {
    let Codes::U8(codes) = codes else { panic!("FP8 codes are bytes") };
    let (rows, stride) = codes.dim();
    let width = (to - from).next_multiple_of(GROUP);
    if let (Some(all), true) = (codes.to_slice(), width == to - from && row + PACK <= rows) {
        return work(&all[row * stride + from..][..(PACK - 1) * stride + width], stride);
    }
    let mut buffer = Scratch::bytes(PACK * width);
    let copy = buffer.slice::<u8>(PACK * width);
    copy.fill(0);
    for i in 0..PACK.min(rows.saturating_sub(row)) {
        let source = codes.row(row + i);
        let line = copy[i * width..].iter_mut();
        for (to, &code) in line.zip(source.iter().skip(from).take(to - from)) {
            *to = code;
        }
    }
    work(copy, width);
}

/// Sixteen rows of codes (`rows[i * stride + k]`, `groups * 32` along K, zero-filled) packed as
/// part of a panel of B: `panel` points at the panel, `part` is which sixteen of its columns.
///
/// # Safety
/// AVX-512 BW and VBMI; 16 rows of `groups * 32` codes; a panel of `groups * B_GROUP` bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
unsafe fn pack_b(
    tables: &Tables,
    rows: *const u8,
    stride: usize,
    groups: usize,
    panel: *mut u8,
    part: usize,
) {
    // SAFETY: the offsets stay inside what the caller vouches for.
    unsafe {
        for quad in 0..groups * 8 {
            let (group, q) = (quad / 8, quad % 8);
            let faces = quad_faces(tables, rows.add(4 * quad), stride);
            let to = panel.add(group * B_GROUP);
            _mm512_storeu_si512(to.add(B_EXPONENTS + (q * 2 + part) * 64).cast(), faces.exponent);
            _mm512_storeu_si512(to.add(B_LOWEST + (q * 2 + part) * 64).cast(), faces.lowest);
            for (j, values) in faces.values.into_iter().enumerate() {
                _mm512_storeu_si512(to.add(((4 * q + j) * 2 + part) * 64).cast(), values);
            }
        }
    }
}

/// Sixteen rows of codes packed as four tiles of A, `groups * A_GROUP` bytes each, one after
/// another.
///
/// # Safety
/// As [`pack_b`], with room for four tiles.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
unsafe fn pack_a(tables: &Tables, rows: *const u8, stride: usize, groups: usize, tiles: *mut u8) {
    // SAFETY: the offsets stay inside what the caller vouches for.
    unsafe {
        for quad in 0..groups * 8 {
            let (group, q) = (quad / 8, quad % 8);
            let faces = quad_faces(tables, rows.add(4 * quad), stride);
            let scatter = |vector: __m512i, offset: usize| {
                let mut lanes = [0u8; 64];
                _mm512_storeu_si512(lanes.as_mut_ptr().cast(), vector);
                for (tile, lane) in lanes.as_chunks::<16>().0.iter().enumerate() {
                    let to = tiles.add((tile * groups + group) * A_GROUP + offset);
                    to.cast::<[u8; 16]>().write_unaligned(*lane);
                }
            };
            scatter(faces.exponent, A_EXPONENTS + q * 16);
            scatter(faces.lowest, A_LOWEST + q * 16);
            for (j, values) in faces.values.into_iter().enumerate() {
                scatter(values, (4 * q + j) * 16);
            }
        }
    }
}

/// The faces of 16 rows by 4 along K; bytes lie `[row][k]`, values of each k `[row]`.
struct Faces {
    exponent: __m512i,
    lowest: __m512i,
    values: [__m512i; 4],
}

/// # Safety
/// AVX-512 BW and VBMI; 4 codes are readable at each of the 16 rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
unsafe fn quad_faces(tables: &Tables, rows: *const u8, stride: usize) -> Faces {
    let mut quads = [0u32; 16];
    for (i, quad) in quads.iter_mut().enumerate() {
        // SAFETY: the caller's 16 rows of 4 readable codes.
        *quad = unsafe { rows.add(i * stride).cast::<u32>().read_unaligned() };
    }
    let load = |table: &[u8]| {
        // SAFETY: halves of the tables are 64 bytes.
        unsafe { _mm512_loadu_si512(table.as_ptr().cast()) }
    };
    // SAFETY: 16 words are 64 bytes.
    let codes = unsafe { _mm512_loadu_si512(quads.as_ptr().cast()) };
    let lookup =
        |table: &[u8; 128]| _mm512_permutex2var_epi8(load(&table[..64]), codes, load(&table[64..]));
    let signs = _mm512_and_si512(codes, _mm512_set1_epi8(i8::MIN));
    let (low, high) = (lookup(&tables.value_low), lookup(&tables.value_high));
    let high = _mm512_or_si512(high, signs);
    // Word i of value j: bytes 2 and 3 are byte 4 i + j of low and of high.
    let first = _mm512_set_epi32(60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0);
    let first = _mm512_or_si512(_mm512_slli_epi32::<16>(first), _mm512_slli_epi32::<24>(first));
    let first = _mm512_or_si512(first, _mm512_set1_epi32(0x4000_0000));
    let value = |j: i32| {
        let index = _mm512_add_epi32(first, _mm512_set1_epi32(j * 0x0101_0000));
        _mm512_maskz_permutex2var_epi8(0xCCCC_CCCC_CCCC_CCCC, low, index, high)
    };
    let flags = _mm512_xor_si512(signs, _mm512_set1_epi8(tables.sign_flip as i8));
    Faces {
        exponent: lookup(&tables.exponent),
        lowest: _mm512_or_si512(lookup(&tables.lowest), flags),
        values: [value(0), value(1), value(2), value(3)],
    }
}

/// `groups` steps of a tile of 4 x 32: `c` continues, or starts from zero unless `carry`.
///
/// Exact for C zero, infinite, NaN or of magnitude in [2^-88, 2^44).
///
/// # Safety
/// AVX-512 BW, DQ, VBMI and VNNI; packed operands of `groups` groups; a whole tile.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
#[allow(clippy::needless_range_loop)]
unsafe fn tile(groups: usize, a: *const u8, b: *const u8, c: TileOutput, carry: bool) {
    let zero = _mm512_setzero_si512();
    let bytes = |p: *const u8| {
        // SAFETY: only called below with 64 bytes inside the packed operand.
        unsafe { _mm512_loadu_si512(p.cast()) }
    };
    for g in 0..groups {
        // SAFETY: the caller's operands have `groups` groups.
        let (a, b) = unsafe { (a.add(g * A_GROUP), b.add(g * B_GROUP)) };
        let started = carry || g > 0;
        let mut top = [[zero; 2]; 4];
        for q in 0..8 {
            // SAFETY: quad q of the exponents of both groups.
            unsafe {
                let e = [0, 1].map(|v| bytes(b.add(B_EXPONENTS + (2 * q + v) * 64)));
                for r in 0..4 {
                    let word = a.add(A_EXPONENTS + (4 * q + r) * 4).cast::<i32>();
                    let x = _mm512_set1_epi32(word.read_unaligned());
                    for v in 0..2 {
                        top[r][v] = _mm512_max_epu8(top[r][v], _mm512_add_epi8(x, e[v]));
                    }
                }
            }
        }
        let mut starts = [[Start::default(); 2]; 4];
        for r in 0..4 {
            for v in 0..2 {
                let old = if started {
                    // SAFETY: row r, vector v of the tile.
                    Some(unsafe { _mm512_loadu_ps(c.data.add(r * c.stride + v * 16)) })
                } else {
                    None
                };
                starts[r][v] = start(top[r][v], old);
            }
        }
        let mut acc = starts.map(|row| row.map(|s| s.acc));
        let mut lost = [[zero; 2]; 4];
        let one = _mm512_set1_epi8(1);
        for q in 0..8 {
            // SAFETY: quad q, and its four k, of values and lowest bits of both groups.
            unsafe {
                let low = [0, 1].map(|v| bytes(b.add(B_LOWEST + (2 * q + v) * 64)));
                for j in 0..4 {
                    let k = 4 * q + j;
                    let y = [0, 1].map(|v| _mm512_loadu_ps(b.add((2 * k + v) * 64).cast()));
                    for r in 0..4 {
                        let x = a.add((4 * k + r) * 4).cast::<f32>().read_unaligned();
                        let x = _mm512_set1_ps(x);
                        for v in 0..2 {
                            acc[r][v] = _mm512_fmadd_round_ps::<RZ>(x, y[v], acc[r][v]);
                        }
                    }
                    let word = a.add(A_LOWEST + (4 * q + j) * 4).cast::<i32>();
                    let x = _mm512_set1_epi32(word.read_unaligned());
                    for v in 0..2 {
                        let lowest = _mm512_add_epi8(x, low[v]);
                        count_below(&mut lost[j][v], lowest, starts[j][v].threshold, one);
                    }
                }
            }
        }
        for r in 0..4 {
            for v in 0..2 {
                let sum = finish(acc[r][v], lost[r][v], starts[r][v].exponent);
                // SAFETY: row r, vector v of the tile.
                unsafe { _mm512_storeu_ps(c.data.add(r * c.stride + v * 16), sum) };
            }
        }
    }
}

/// Adds `one` to the bytes of `count` where `x < threshold`, unsigned.
///
/// In assembly because the compiler would turn the masked addition into a mask expanded to bytes
/// and a subtraction, one more instruction in the innermost loop.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn count_below(count: &mut __m512i, x: __m512i, threshold: __m512i, one: __m512i) {
    // SAFETY: two register instructions of AVX-512 BW.
    unsafe {
        std::arch::asm!(
            "vpcmpub {k}, {x}, {threshold}, 1",
            "vpaddb {count}{{{k}}}, {count}, {one}",
            k = out(kreg) _,
            x = in(zmm_reg) x,
            threshold = in(zmm_reg) threshold,
            count = inout(zmm_reg) *count,
            one = in(zmm_reg) one,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
}

/// What a step knows of 16 elements before it adds products.
#[derive(Clone, Copy)]
struct Start {
    /// The exponent field of M, in place.
    exponent: __m512i,
    /// M plus the truncated C.
    acc: __m512,
    /// A product whose lowest-bit byte is below this one is negative and loses bits.
    threshold: __m512i,
}

impl Default for Start {
    #[inline]
    fn default() -> Start {
        // SAFETY: plain integers and floats, for which zero bytes are a value.
        unsafe { std::mem::zeroed() }
    }
}

/// From the largest exponent bytes of four interleaved k, and C where there is one.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn start(top: __m512i, old: Option<__m512>) -> Start {
    let top = _mm512_max_epu8(top, _mm512_slli_epi32::<16>(top));
    let mut top = _mm512_max_epu8(top, _mm512_slli_epi32::<8>(top));
    if let Some(c) = old {
        // Without a nonzero product only C counts.
        let least = _mm512_set1_epi32((LEAST_SUM as i32) << 24);
        let none = _mm512_cmplt_epu32_mask(top, least);
        let floor = _mm512_set1_epi32((2 * ZERO_EXPONENT as i32) << 24);
        top = _mm512_mask_mov_epi32(top, none, floor);
        // C's exponent field, its sign shifted out, with M's offset. Infinity and NaN wrap to
        // small.
        let c = _mm512_castps_si512(c);
        let c = _mm512_add_epi32(_mm512_add_epi32(c, c), _mm512_set1_epi32(10 << 24));
        top = _mm512_max_epu32(top, c);
    }
    let field = _mm512_set1_epi32(0x7F80_0000);
    let exponent = _mm512_and_si512(_mm512_srli_epi32::<1>(top), field);
    let m = _mm512_or_si512(exponent, _mm512_set1_epi32(0x0040_0000));
    let m = _mm512_castsi512_ps(m);
    let acc = match old {
        None => m,
        Some(c) => {
            let negative = _mm512_movepi32_mask(_mm512_castps_si512(c));
            let down = _mm512_add_round_ps::<RZ>(m, c);
            _mm512_mask_add_round_ps::<RU>(down, negative, m, c)
        }
    };
    // The grid's exponent in the bias of lowest-bit bytes, in all four bytes. C below 2^44 keeps
    // it at or below the byte of zero.
    let spread = _mm512_set1_epi64(0x0707_0707_0303_0303);
    let spread = _mm512_add_epi8(spread, _mm512_set4_epi32(0x0808_0808, 0x0808_0808, 0, 0));
    let grid = _mm512_shuffle_epi8(top, spread);
    let offset = (EXPONENT_BIAS + 13 - 2 * LOWEST_BIAS) as i8;
    let threshold = _mm512_subs_epu8(grid, _mm512_set1_epi8(offset));
    Start { exponent, acc, threshold }
}

/// The sum without M, one grid unit added for each negative product that lost bits, cut to 13
/// fraction bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vnni")]
fn finish(acc: __m512, lost: __m512i, exponent: __m512i) -> __m512 {
    let m = _mm512_castsi512_ps(_mm512_or_si512(exponent, _mm512_set1_epi32(0x0040_0000)));
    let unit = _mm512_castsi512_ps(_mm512_sub_epi32(exponent, _mm512_set1_epi32(23 << 23)));
    let count = _mm512_dpbusd_epi32(_mm512_setzero_si512(), lost, _mm512_set1_epi8(1));
    let sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(count), unit, _mm512_sub_ps(acc, m));
    _mm512_and_ps(sum, _mm512_castsi512_ps(_mm512_set1_epi32(!0x3FF)))
}
