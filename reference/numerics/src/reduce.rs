//! Reductions in fixed order: the trees that kernels use, their order part of the contract.
//!
//! - [`tree_sum`]: the warp's butterfly, generic in width;
//! - [`RowTree`]: a row over the lanes of a warp or CTA, then trees over lanes and warps;
//! - [`tensor_sum_of_squares`]: a tensor in blocks, each a row, then a tree over blocks;
//! - [`max_num`]: order-free, with NaN and signed zeros stated.
//!
//! Every sum rounds each addition to nearest even and returns the canonical NaN for any NaN. The
//! vectorised forms are bit-identical to [`RowTree::fold`], which states the order.

use rayon::prelude::*;

use crate::formats::canonical_f32;
use crate::isa::{Isa, multiversion};

/// Lanes of a warp.
pub const WARP: usize = 32;
/// The largest number of lanes, that of a CTA.
pub const MAX_LANES: usize = 1024;

/// What the trees add: f32, and f64 for the mode that stands outside the contract.
pub trait Addend: Copy + std::ops::AddAssign {
    /// The number +0, which sums begin with.
    const ZERO: Self;
    /// The value, with any NaN replaced by the canonical one (f64: left as it is).
    fn canonical(self) -> Self;
}

impl Addend for f32 {
    const ZERO: f32 = 0.0;

    #[inline(always)]
    fn canonical(self) -> f32 {
        canonical_f32(self)
    }
}

impl Addend for f64 {
    const ZERO: f64 = 0.0;

    #[inline(always)]
    fn canonical(self) -> f64 {
        self
    }
}

/// The halving tree: with `w` the number of values rounded up to a power of two and missing leaves
/// +0, `v[i] += v[i + o]` for o = w/2, w/4, ..., 1 and all i < o; the sum is `v[0]`.
///
/// It is what every lane of a warp holds after a butterfly, `v += shfl_xor(v, o)` for o = 16, 8, 4,
/// 2, 1, in which lanes that have no value hold +0. `values` is overwritten. The sum of nothing is
/// +0.
pub fn tree_sum<T: Addend>(values: &mut [T]) -> T {
    let mut width = values.len().next_power_of_two();
    while width > 1 {
        width /= 2;
        let (low, high) = values.split_at_mut(width.min(values.len()));
        let (paired, alone) = low.split_at_mut(high.len().min(width));
        for (a, b) in paired.iter_mut().zip(high) {
            *a += *b;
        }
        for a in alone {
            *a += T::ZERO;
        }
    }
    values.first().map_or(T::ZERO, |v| v.canonical())
}

/// How the lanes of a warp or CTA add up a row: each lane walks its elements in ascending order
/// from +0, the lanes of a warp are added by [`tree_sum`], and so are the sums of the warps.
///
/// ```
/// use fathom_numerics::reduce::RowTree;
/// let row: Vec<f32> = (0..100).map(|i| i as f32).collect();
/// assert_eq!(RowTree::WARP.sum(&row), 4950.0);
/// assert_eq!(RowTree::cta(256).with_vector(4).sum(&row), 4950.0);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowTree {
    lanes: usize,
    vector: usize,
    group: usize,
}

impl RowTree {
    /// One warp a row, one element a load.
    pub const WARP: RowTree = RowTree { lanes: WARP, vector: 1, group: WARP };

    /// A CTA of `threads` a row: trees in each warp, then one over the warps.
    ///
    /// # Panics
    /// Unless `threads` is a power of two of at most [`MAX_LANES`].
    pub fn cta(threads: usize) -> RowTree {
        RowTree::new(threads, WARP.min(threads))
    }

    /// `lanes` a row, in groups of `group` whose sums are added by a second tree.
    ///
    /// # Panics
    /// Unless both are powers of two with `group <= lanes <=` [`MAX_LANES`].
    pub fn new(lanes: usize, group: usize) -> RowTree {
        assert!(
            lanes.is_power_of_two() && group.is_power_of_two() && group <= lanes,
            "a row tree has powers of two, got {lanes} lanes in groups of {group}"
        );
        assert!(lanes <= MAX_LANES, "a row tree has at most {MAX_LANES} lanes, got {lanes}");
        RowTree { lanes, vector: 1, group }
    }

    /// With loads of `vector` elements: element `i` belongs to lane `(i / vector) % lanes`.
    ///
    /// # Panics
    /// If `vector` is zero.
    pub fn with_vector(self, vector: usize) -> RowTree {
        assert!(vector > 0, "a load has at least one element");
        RowTree { vector, ..self }
    }

    /// The number of lanes.
    pub fn lanes(self) -> usize {
        self.lanes
    }

    /// The specification: `acc = step(acc, i)` over the elements `i < len` of each lane in
    /// ascending order from +0, then the trees. For sums of anything that is computed on the way.
    #[inline]
    pub fn fold<T: Addend>(self, len: usize, step: impl Fn(T, usize) -> T) -> T {
        if self.lanes <= WARP {
            self.fold_in(&mut [T::ZERO; WARP], len, step)
        } else {
            self.fold_in(&mut [T::ZERO; MAX_LANES], len, step)
        }
    }

    #[inline(always)]
    fn fold_in<T: Addend>(self, lanes: &mut [T], len: usize, step: impl Fn(T, usize) -> T) -> T {
        let lanes = &mut lanes[..self.lanes];
        for block in (0..len).step_by(self.lanes * self.vector) {
            for (lane, acc) in lanes.iter_mut().enumerate() {
                let start = (block + lane * self.vector).min(len);
                for i in start..(start + self.vector).min(len) {
                    *acc = step(*acc, i);
                }
            }
        }
        self.add_lanes(lanes)
    }

    /// The trees over what the lanes hold: [`tree_sum`] of each group, then of the groups' sums.
    ///
    /// # Panics
    /// Unless there is one value a lane.
    pub fn add_lanes<T: Addend>(self, values: &mut [T]) -> T {
        assert_eq!(values.len(), self.lanes, "one value a lane");
        let groups = self.lanes / self.group;
        for g in 0..groups {
            values[g] = tree_sum(&mut values[g * self.group..(g + 1) * self.group]);
        }
        tree_sum(&mut values[..groups])
    }

    /// The sum of a row: each lane chains `acc = acc + x[i]`, then the trees.
    pub fn sum(self, row: &[f32]) -> f32 {
        self.sum_on(Isa::best(), row)
    }

    /// The sum of squares: each lane chains `acc = fma(x[i], x[i], acc)`, then the trees.
    pub fn sum_of_squares(self, row: &[f32]) -> f32 {
        self.dot(row, row)
    }

    /// The dot product: each lane chains `acc = fma(a[i], b[i], acc)`, then the trees.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn dot(self, a: &[f32], b: &[f32]) -> f32 {
        self.dot_on(Isa::best(), a, b)
    }

    /// [`RowTree::sum`] with a chosen instruction set.
    pub fn sum_on(self, isa: Isa, row: &[f32]) -> f32 {
        let mut lanes = [0.0; MAX_LANES];
        let lanes = &mut lanes[..self.lanes];
        accumulate(isa, lanes, self.vector, row, row, |acc, x, _| acc + x);
        self.add_lanes(lanes)
    }

    /// [`RowTree::dot`] with a chosen instruction set.
    pub fn dot_on(self, isa: Isa, a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len(), "dot product of {} and {} elements", a.len(), b.len());
        let mut lanes = [0.0; MAX_LANES];
        let lanes = &mut lanes[..self.lanes];
        accumulate(isa, lanes, self.vector, a, b, |acc, x, y| x.mul_add(y, acc));
        self.add_lanes(lanes)
    }
}

/// The whole blocks of a row, with the lanes in registers: what the compiler vectorises.
#[inline(always)]
fn accumulate_blocks<const LANES: usize, const VECTOR: usize>(
    lanes: &mut [f32],
    a: &[f32],
    b: &[f32],
    step: impl Fn(f32, f32, f32) -> f32,
) {
    let mut acc: [f32; LANES] = lanes.try_into().expect("the caller has LANES lanes");
    for (a, b) in a.chunks_exact(LANES * VECTOR).zip(b.chunks_exact(LANES * VECTOR)) {
        for element in 0..VECTOR {
            for l in 0..LANES {
                acc[l] = step(acc[l], a[l * VECTOR + element], b[l * VECTOR + element]);
            }
        }
    }
    lanes.copy_from_slice(&acc);
}

multiversion! {
    /// `acc = step(acc, a[i], b[i])` in the order of [`RowTree::fold`].
    fn accumulate(
        lanes: &mut [f32],
        vector: usize,
        a: &[f32],
        b: &[f32],
        step: impl Fn(f32, f32, f32) -> f32 + Copy,
    ) {
        let block = lanes.len() * vector;
        let whole = a.len() / block * block;
        match (lanes.len(), vector) {
            (32, 1) => accumulate_blocks::<32, 1>(lanes, a, b, step),
            (32, 4) => accumulate_blocks::<32, 4>(lanes, a, b, step),
            (128, 1) => accumulate_blocks::<128, 1>(lanes, a, b, step),
            (128, 4) => accumulate_blocks::<128, 4>(lanes, a, b, step),
            (256, 1) => accumulate_blocks::<256, 1>(lanes, a, b, step),
            (256, 4) => accumulate_blocks::<256, 4>(lanes, a, b, step),
            _ => {
                for (a, b) in a[..whole].chunks_exact(block).zip(b[..whole].chunks_exact(block)) {
                    for element in 0..vector {
                        for (lane, acc) in lanes.iter_mut().enumerate() {
                            let i = lane * vector + element;
                            *acc = step(*acc, a[i], b[i]);
                        }
                    }
                }
            }
        }
        for (i, (a, b)) in a[whole..].iter().zip(&b[whole..]).enumerate() {
            lanes[i / vector] = step(lanes[i / vector], *a, *b);
        }
    }
}

/// The sum of squares of a whole tensor, its squared norm: blocks of `block` elements, each added
/// by `row`, the sums of the blocks by [`tree_sum`]. Blocks run in parallel; the order does not
/// depend on threads.
///
/// # Panics
/// If `block` is zero.
pub fn tensor_sum_of_squares(xs: &[f32], block: usize, row: RowTree) -> f32 {
    let mut sums: Vec<f32> = xs.par_chunks(block).map(|x| row.sum_of_squares(x)).collect();
    tree_sum(&mut sums)
}

/// The larger; +0 above -0; of a number and a NaN the number (PTX `max.f32`, CUDA `fmaxf`); the
/// canonical NaN of two. Associative and commutative: the order of a reduction does not matter.
#[inline(always)]
pub fn max_num(a: f32, b: f32) -> f32 {
    if a.is_nan() {
        canonical_f32(b)
    } else if b.is_nan() || a > b {
        a
    } else if a == b {
        f32::from_bits(a.to_bits() & b.to_bits())
    } else {
        b
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values whose sums depend on the order, from a multiplicative generator.
    fn values(count: usize) -> Vec<f32> {
        let mut state = 0x2545_F491u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / 8_388_608.0 - 1.0) * 2f32.powi((state >> 3) as i32 & 15)
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn tree_sum_is_what_every_lane_of_a_butterfly_holds() {
        for count in 0..=64 {
            let leaves = values(count);
            let width = count.next_power_of_two();
            let mut lanes = leaves.clone();
            lanes.resize(width, 0.0);
            let mut offset = width / 2;
            while offset > 0 {
                lanes = (0..width).map(|i| lanes[i] + lanes[i ^ offset]).collect();
                offset /= 2;
            }
            let sum = tree_sum(&mut leaves.clone());
            assert!(lanes.iter().all(|v| v.to_bits() == sum.to_bits()), "{count} values");
        }
        assert_eq!(tree_sum(&mut [-0f32, -0.0, -0.0]).to_bits(), 0, "the missing leaf is +0");
        assert_eq!(tree_sum(&mut [f32::from_bits(0xFFC0_0001), 1.0]).to_bits(), 0x7FFF_FFFF);
    }

    #[test]
    fn wide_row_sums_have_the_bits_of_the_specification() {
        let trees = [
            RowTree::WARP,
            RowTree::WARP.with_vector(4),
            RowTree::cta(128),
            RowTree::cta(128).with_vector(4),
            RowTree::cta(256),
            RowTree::cta(256).with_vector(4),
            RowTree::cta(256).with_vector(8),
            RowTree::cta(1024),
            RowTree::new(16, 4),
            RowTree::new(1, 1),
        ];
        let a = values(5003);
        let b: Vec<f32> = a.iter().rev().copied().collect();
        let mut differ = 0;
        for tree in trees {
            for len in [0, 1, 31, 32, 33, 127, 1024, 4096, 5003] {
                let sum = tree.fold(len, |acc: f32, i| acc + a[i]);
                let dot: f32 = tree.fold(len, |acc, i| a[i].mul_add(b[i], acc));
                for isa in Isa::available() {
                    let got = tree.sum_on(isa, &a[..len]);
                    assert_eq!(got.to_bits(), sum.to_bits(), "{tree:?} {len} {isa:?}");
                    let got = tree.dot_on(isa, &a[..len], &b[..len]);
                    assert_eq!(got.to_bits(), dot.to_bits(), "{tree:?} {len} {isa:?}");
                }
                differ += usize::from(sum != RowTree::WARP.fold(len, |acc: f32, i| acc + a[i]));
            }
        }
        assert!(differ > 20, "the orders have to be tellable apart, {differ} were");
    }

    #[test]
    fn cta_adds_inside_warps_first() {
        let mut lanes = vec![0.0; 64];
        (lanes[0], lanes[1], lanes[32]) = (1.0, 2f32.powi(24), -2f32.powi(24));
        assert_eq!(RowTree::cta(64).add_lanes(&mut lanes.clone()), 0.0, "1 is lost in warp 0");
        assert_eq!(tree_sum(&mut lanes), 1.0, "the flat tree pairs lanes 0 and 32");
    }

    #[test]
    fn f64_takes_the_same_tree() {
        let a: Vec<f64> = values(777).into_iter().map(f64::from).collect();
        let mut lanes = [0.0; WARP];
        for (i, x) in a.iter().enumerate() {
            lanes[i % WARP] += x;
        }
        assert_eq!(RowTree::WARP.fold(a.len(), |acc: f64, i| acc + a[i]), tree_sum(&mut lanes));
    }

    #[test]
    fn a_tensors_squares_are_blocks_then_a_tree() {
        let xs = values(10_000);
        let mut blocks: Vec<f32> = xs.chunks(99).map(|b| RowTree::WARP.dot(b, b)).collect();
        assert_eq!(tensor_sum_of_squares(&xs, 99, RowTree::WARP), tree_sum(&mut blocks));
    }

    #[test]
    fn the_maximum_states_nan_and_zeros() {
        let nan = f32::from_bits(0xFFC0_1234);
        for (a, b) in [(0.0, -0.0), (-0.0, 0.0)] {
            assert_eq!(max_num(a, b).to_bits(), 0);
        }
        assert_eq!((max_num(nan, 1.0), max_num(1.0, nan)), (1.0, 1.0));
        assert_eq!(max_num(nan, nan).to_bits(), 0x7FFF_FFFF);
        assert_eq!((max_num(-1.0, 2.0), max_num(-0.5, f32::NEG_INFINITY)), (2.0, -0.5));
    }
}
