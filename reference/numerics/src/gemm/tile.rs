//! The table of FP8 tile kernels: who packs, who multiplies and who promotes on which instruction set.

use super::config::Promote;
#[cfg(target_arch = "x86_64")]
use super::fp8_avx512;
use super::isa::Isa;

#[cfg(target_arch = "x86_64")]
pub(super) use super::fp8_avx512::Tables;

/// `(tables, rows, stride, groups, tiles)`: packs 16 rows of codes as tiles of A.
pub(super) type PackA = unsafe fn(&Tables, *const u8, usize, usize, *mut u8);
/// `(tables, rows, stride, groups, panel, part)`: packs 16 rows of codes as half a panel of B.
pub(super) type PackB = unsafe fn(&Tables, *const u8, usize, usize, *mut u8, usize);
/// `(groups, a, b, c, carry)`: chains the groups of a tile.
pub(super) type TileKernel = unsafe fn(usize, *const u8, *const u8, *mut f32, bool);
/// `(how, scales, partial, acc, end)`: promotes one row of a tile.
pub(super) type PromoteRow = unsafe fn(Promote, (f32, &[f32]), &[f32], &mut [f32], bool);

/// The FP8 kernels of one instruction set.
pub(super) struct Kernels {
    /// Bytes of a packed group of a tile of A.
    pub(super) a_group: usize,
    /// Bytes of a packed group of a panel of B.
    pub(super) b_group: usize,
    pub(super) pack_a: PackA,
    pub(super) pack_b: PackB,
    pub(super) tile: TileKernel,
    pub(super) promote: PromoteRow,
}

impl Kernels {
    /// The kernels for `isa`, where the machine has it.
    pub(super) fn new(isa: Isa) -> Option<Kernels> {
        if !isa.is_available() {
            return None;
        }
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Some(Kernels {
                a_group: fp8_avx512::A_GROUP,
                b_group: fp8_avx512::B_GROUP,
                pack_a: fp8_avx512::pack_a,
                pack_b: fp8_avx512::pack_b,
                tile: fp8_avx512::tile,
                promote: promote_avx512,
            }),
            _ => None,
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn promote_avx512(how: Promote, s: (f32, &[f32]), partial: &[f32], acc: &mut [f32], end: bool) {
    super::fp8::promote_row(how, s, partial, acc, end);
}
