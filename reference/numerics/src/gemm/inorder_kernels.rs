//! Micro-kernels of the in-order GEMM, one a type and instruction set, from one macro: a tile of C
//! stays in registers while K ascends, one fused multiply-add a step and element.
//!
//! The micro-kernels differ in tile shape only; each element's chain is the same, so are its bits.

use super::inorder::{CANONICAL_NAN_F32, CANONICAL_NAN_F64};
use super::isa::Isa;

/// A panel of an operand, packed or in place: element i of step k lies at
/// `data[i * stride + k * step]`. Elements of B are neighbours: its `stride` is 1.
#[derive(Clone, Copy)]
pub struct Panel<T> {
    /// Element 0 of step 0.
    pub data: *const T,
    /// Elements from one row of A to the next.
    pub stride: isize,
    /// Elements from one step of K to the next.
    pub step: isize,
}

/// `run(depth, a, b, c, row_stride, first, last)`: the tile at `c` (rows `row_stride` elements
/// apart) continues, or with `first` starts from +0, the chain over `depth` steps of a panel of A
/// (mr rows) and one of B; with `last` NaNs become canonical.
pub type MicroKernel<T> = unsafe fn(usize, Panel<T>, Panel<T>, *mut T, isize, bool, bool);

/// The micro-kernels of one type on one instruction set.
pub struct Tile<T> {
    /// Rows of a tile.
    pub mr: usize,
    /// Columns of the widest tile: three vectors.
    pub nr: usize,
    /// Elements in a vector; the unit in which tiles are narrower than `nr`.
    pub lanes: usize,
    /// The kernels for tiles of one, two and three vectors.
    pub run: [MicroKernel<T>; 3],
}

/// f32 or f64: the element types of the in-order GEMM.
pub trait InOrder: bytemuck::Pod + Send + Sync {
    /// The micro-kernels for `isa`, which the machine must have.
    fn kernel(isa: Isa) -> Tile<Self>;
    /// `self`, or the canonical NaN in place of any NaN.
    fn canonical(self) -> Self;
}

/// Writes the micro-kernel `$name<NV>` for vectors `$v` of `$lanes` elements `$t`, tiles of `$mr`
/// rows by NV vectors. The macro's last arguments are the instruction set's own operations.
macro_rules! micro_kernel {
    ($(#[$attr:meta])* $name:ident, $t:ty, $v:ty, $lanes:literal, $mr:literal,
     $zero:expr, $load:expr, $store:expr, $splat:expr, $fma:expr, $canonical:expr) => {
        /// # Safety
        /// As the type `MicroKernel` says: panels and tile of the full extent, instruction set
        /// present.
        $(#[$attr])*
        #[allow(clippy::needless_range_loop)]
        unsafe fn $name<const NV: usize>(
            depth: usize, a: super::Panel<$t>, b: super::Panel<$t>, c: *mut $t, stride: isize,
            first: bool, last: bool,
        ) {
            let mut acc: [[$v; NV]; $mr] = [[$zero; NV]; $mr];
            // SAFETY: the caller vouches for the extents of panels and tile.
            unsafe {
                if !first {
                    for i in 0..$mr {
                        for j in 0..NV {
                            acc[i][j] = $load(c.offset(i as isize * stride).add(j * $lanes));
                        }
                    }
                }
                let (mut pa, mut pb) = (a.data, b.data);
                for _ in 0..depth {
                    let mut line: [$v; NV] = [$zero; NV];
                    for j in 0..NV {
                        line[j] = $load(pb.add(j * $lanes));
                    }
                    for i in 0..$mr {
                        let x = $splat(pa.offset(i as isize * a.stride));
                        for j in 0..NV {
                            acc[i][j] = $fma(x, line[j], acc[i][j]);
                        }
                    }
                    pa = pa.wrapping_offset(a.step);
                    pb = pb.wrapping_offset(b.step);
                }
                for i in 0..$mr {
                    for j in 0..NV {
                        let value = if last { $canonical(acc[i][j]) } else { acc[i][j] };
                        $store(c.offset(i as isize * stride).add(j * $lanes), value);
                    }
                }
            }
        }
    };
}

/// Plain Rust: "vectors" are arrays of one element.
mod portable {
    use super::InOrder;

    micro_kernel!(
        f32_tile,
        f32,
        f32,
        1,
        4,
        0.0f32,
        |p: *const f32| *p,
        |p: *mut f32, v| *p = v,
        |p: *const f32| *p,
        f32::mul_add,
        f32::canonical
    );
    micro_kernel!(
        f64_tile,
        f64,
        f64,
        1,
        4,
        0.0f64,
        |p: *const f64| *p,
        |p: *mut f64, v| *p = v,
        |p: *const f64| *p,
        f64::mul_add,
        f64::canonical
    );

    pub(super) const F32: super::Tile<f32> =
        super::Tile { mr: 4, nr: 3, lanes: 1, run: [f32_tile::<1>, f32_tile::<2>, f32_tile::<3>] };
    pub(super) const F64: super::Tile<f64> =
        super::Tile { mr: 4, nr: 3, lanes: 1, run: [f64_tile::<1>, f64_tile::<2>, f64_tile::<3>] };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{CANONICAL_NAN_F32, CANONICAL_NAN_F64};
    use std::arch::x86_64::*;

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn canonical_ps512(v: __m512) -> __m512 {
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
        _mm512_mask_blend_ps(nan, v, _mm512_set1_ps(CANONICAL_NAN_F32))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn canonical_pd512(v: __m512d) -> __m512d {
        let nan = _mm512_cmp_pd_mask::<_CMP_UNORD_Q>(v, v);
        _mm512_mask_blend_pd(nan, v, _mm512_set1_pd(CANONICAL_NAN_F64))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn canonical_ps256(v: __m256) -> __m256 {
        _mm256_blendv_ps(v, _mm256_set1_ps(CANONICAL_NAN_F32), _mm256_cmp_ps::<_CMP_UNORD_Q>(v, v))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn canonical_pd256(v: __m256d) -> __m256d {
        _mm256_blendv_pd(v, _mm256_set1_pd(CANONICAL_NAN_F64), _mm256_cmp_pd::<_CMP_UNORD_Q>(v, v))
    }

    micro_kernel!(
        #[target_feature(enable = "avx512f")]
        f32_tile512,
        f32,
        __m512,
        16,
        8,
        _mm512_setzero_ps(),
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        |p: *const f32| _mm512_set1_ps(*p),
        _mm512_fmadd_ps,
        canonical_ps512
    );
    micro_kernel!(
        #[target_feature(enable = "avx512f")]
        f64_tile512,
        f64,
        __m512d,
        8,
        8,
        _mm512_setzero_pd(),
        _mm512_loadu_pd,
        _mm512_storeu_pd,
        |p: *const f64| _mm512_set1_pd(*p),
        _mm512_fmadd_pd,
        canonical_pd512
    );
    micro_kernel!(
        #[target_feature(enable = "avx2,fma")]
        f32_tile256,
        f32,
        __m256,
        8,
        4,
        _mm256_setzero_ps(),
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        |p: *const f32| _mm256_set1_ps(*p),
        _mm256_fmadd_ps,
        canonical_ps256
    );
    micro_kernel!(
        #[target_feature(enable = "avx2,fma")]
        f64_tile256,
        f64,
        __m256d,
        4,
        4,
        _mm256_setzero_pd(),
        _mm256_loadu_pd,
        _mm256_storeu_pd,
        |p: *const f64| _mm256_set1_pd(*p),
        _mm256_fmadd_pd,
        canonical_pd256
    );

    pub(super) const F32_512: super::Tile<f32> = super::Tile {
        mr: 8,
        nr: 48,
        lanes: 16,
        run: [f32_tile512::<1>, f32_tile512::<2>, f32_tile512::<3>],
    };
    pub(super) const F64_512: super::Tile<f64> = super::Tile {
        mr: 8,
        nr: 24,
        lanes: 8,
        run: [f64_tile512::<1>, f64_tile512::<2>, f64_tile512::<3>],
    };
    pub(super) const F32_256: super::Tile<f32> = super::Tile {
        mr: 4,
        nr: 24,
        lanes: 8,
        run: [f32_tile256::<1>, f32_tile256::<2>, f32_tile256::<3>],
    };
    pub(super) const F64_256: super::Tile<f64> = super::Tile {
        mr: 4,
        nr: 12,
        lanes: 4,
        run: [f64_tile256::<1>, f64_tile256::<2>, f64_tile256::<3>],
    };
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use super::{CANONICAL_NAN_F32, CANONICAL_NAN_F64};
    use std::arch::aarch64::*;

    #[inline]
    #[target_feature(enable = "neon")]
    fn canonical_f32(v: float32x4_t) -> float32x4_t {
        vbslq_f32(vceqq_f32(v, v), v, vdupq_n_f32(CANONICAL_NAN_F32))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn canonical_f64(v: float64x2_t) -> float64x2_t {
        vbslq_f64(vceqq_f64(v, v), v, vdupq_n_f64(CANONICAL_NAN_F64))
    }

    micro_kernel!(
        #[target_feature(enable = "neon")]
        f32_tile,
        f32,
        float32x4_t,
        4,
        8,
        vdupq_n_f32(0.0),
        vld1q_f32,
        vst1q_f32,
        |p: *const f32| vdupq_n_f32(*p),
        |x, y, sum| vfmaq_f32(sum, x, y),
        canonical_f32
    );
    micro_kernel!(
        #[target_feature(enable = "neon")]
        f64_tile,
        f64,
        float64x2_t,
        2,
        8,
        vdupq_n_f64(0.0),
        vld1q_f64,
        vst1q_f64,
        |p: *const f64| vdupq_n_f64(*p),
        |x, y, sum| vfmaq_f64(sum, x, y),
        canonical_f64
    );

    pub(super) const F32: super::Tile<f32> =
        super::Tile { mr: 8, nr: 12, lanes: 4, run: [f32_tile::<1>, f32_tile::<2>, f32_tile::<3>] };
    pub(super) const F64: super::Tile<f64> =
        super::Tile { mr: 8, nr: 6, lanes: 2, run: [f64_tile::<1>, f64_tile::<2>, f64_tile::<3>] };
}

impl InOrder for f32 {
    fn kernel(isa: Isa) -> Tile<f32> {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => x86::F32_512,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::F32_256,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::F32,
            _ => portable::F32,
        }
    }

    #[inline]
    fn canonical(self) -> f32 {
        if self.is_nan() { CANONICAL_NAN_F32 } else { self }
    }
}

impl InOrder for f64 {
    fn kernel(isa: Isa) -> Tile<f64> {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => x86::F64_512,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::F64_256,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::F64,
            _ => portable::F64,
        }
    }

    #[inline]
    fn canonical(self) -> f64 {
        if self.is_nan() { CANONICAL_NAN_F64 } else { self }
    }
}
