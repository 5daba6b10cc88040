//! The in-order GEMMs against the chain written out, on every instruction set of this machine.

use fathom_numerics::gemm::inorder::{gemm_f32, gemm_f64, gemm_on};
use fathom_numerics::gemm::{InOrder, Isa};
use ndarray::{Array2, ArrayView2, s};

/// A small generator of its own, so that the tests depend on nothing.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }

    /// A value whose exponent varies, so that the order of additions shows in the bits.
    fn value(&mut self) -> f64 {
        let scale = 2f64.powi((self.next() % 13) as i32 - 6);
        (self.next() as f64 / (1u64 << 30) as f64 - 1.0) * scale
    }
}

fn matrix(rows: usize, cols: usize, seed: u64) -> Array2<f64> {
    let mut random = Random(seed);
    Array2::from_shape_simple_fn((rows, cols), || random.value())
}

fn chain(a: ArrayView2<f32>, b: ArrayView2<f32>, c: &Array2<f32>, accumulate: bool) -> Array2<f32> {
    Array2::from_shape_fn((a.nrows(), b.ncols()), |(i, j)| {
        let start = if accumulate { c[[i, j]] } else { 0.0 };
        let sum = (0..a.ncols()).fold(start, |sum, k| a[[i, k]].mul_add(b[[k, j]], sum));
        if sum.is_nan() { f32::from_bits(0x7FFF_FFFF) } else { sum }
    })
}

fn assert_bits(got: &Array2<f32>, want: &Array2<f32>, what: &str) {
    for ((index, got), want) in got.indexed_iter().zip(want) {
        assert_eq!(got.to_bits(), want.to_bits(), "{what} at {index:?}: {got:e} against {want:e}");
    }
}

const SHAPES: [(usize, usize, usize); 16] = [
    (1, 1, 1),
    (1, 17, 5),
    (3, 48, 2),
    (8, 16, 64),
    (7, 33, 100),
    (9, 49, 3),
    (48, 64, 64),
    (50, 95, 257),
    (13, 97, 300),
    (64, 145, 513),
    (129, 31, 40),
    (24, 200, 256),
    (160, 144, 128),
    (257, 130, 70),
    (20, 576, 30),
    (270, 528, 20),
];

#[test]
fn f32_is_the_chain_on_every_instruction_set() {
    for (seed, (m, n, k)) in SHAPES.into_iter().enumerate() {
        let a = matrix(m, k, seed as u64 + 1).mapv(|x| x as f32);
        let b = matrix(k, n, seed as u64 + 100).mapv(|x| x as f32);
        let c = matrix(m, n, seed as u64 + 200).mapv(|x| x as f32);
        for accumulate in [false, true] {
            let want = chain(a.view(), b.view(), &c, accumulate);
            for isa in Isa::available() {
                let mut got = c.clone();
                gemm_on(isa, a.view(), b.view(), got.view_mut(), accumulate);
                assert_bits(&got, &want, &format!("{isa:?} {m} x {n} x {k}"));
            }
        }
    }
}

#[test]
fn strides_of_every_kind_change_nothing() {
    let (m, n, k) = (37, 70, 90);
    let wide = matrix(2 * m.max(k) + 4, 3 * n.max(k) + 4, 7).mapv(|x| x as f32);
    let a_views = [
        wide.slice(s![..m, ..k]),
        wide.slice(s![..k, ..m]).reversed_axes(),
        wide.slice(s![..2*m;2, ..3*k;3]),
        wide.slice(s![..m;-1, ..k;-1]),
    ];
    for a in a_views {
        for b in
            [wide.slice(s![2..2 + k, 1..1 + n]), wide.slice(s![1..=n, 3..3 + k]).reversed_axes()]
        {
            let c = Array2::<f32>::zeros((m, n));
            let want = chain(a, b, &c, false);
            for isa in Isa::available() {
                let mut got = c.clone();
                gemm_on(isa, a, b, got.view_mut(), false);
                assert_bits(&got, &want, "row-major C");
                let mut got = Array2::<f32>::ones((n, m));
                gemm_on(isa, a, b, got.view_mut().reversed_axes(), false);
                assert_bits(&got.reversed_axes().to_owned(), &want, "column-major C");
            }
        }
    }
}

#[test]
fn nan_infinity_and_zero() {
    let (m, n, k) = (12, 50, 9);
    let mut a = matrix(m, k, 3).mapv(|x| x as f32);
    let mut b = matrix(k, n, 4).mapv(|x| x as f32);
    a[[2, 3]] = f32::NAN;
    a[[5, 0]] = f32::from_bits(0xFFC1_2345);
    b[[4, 7]] = f32::INFINITY;
    b[[4, 8]] = f32::NEG_INFINITY;
    a[[9, 4]] = 0.0;
    a.row_mut(11).fill(-0.0);
    b[[1, 20]] = f32::MIN_POSITIVE / 8.0;
    let c = Array2::<f32>::zeros((m, n));
    let want = chain(a.view(), b.view(), &c, false);
    for isa in Isa::available() {
        let mut got = c.clone();
        gemm_on(isa, a.view(), b.view(), got.view_mut(), false);
        assert_bits(&got, &want, isa.name());
    }
    assert_eq!(want[[2, 0]].to_bits(), 0x7FFF_FFFF);
}

#[test]
fn empty_shapes() {
    let mut c = Array2::<f32>::ones((2, 3));
    gemm_f32(Array2::zeros((2, 0)).view(), Array2::zeros((0, 3)).view(), c.view_mut(), true);
    assert_eq!(c, Array2::<f32>::ones((2, 3)));
    gemm_f32(Array2::zeros((2, 0)).view(), Array2::zeros((0, 3)).view(), c.view_mut(), false);
    assert_eq!(c, Array2::<f32>::zeros((2, 3)));
    let mut none = Array2::<f32>::ones((0, 3));
    gemm_f32(Array2::zeros((0, 4)).view(), Array2::zeros((4, 3)).view(), none.view_mut(), false);
}

#[test]
fn f64_is_the_chain_and_the_large_parallel_case_too() {
    fn check<T: InOrder + PartialEq + std::fmt::Debug>(
        a: &Array2<T>,
        b: &Array2<T>,
        chain: impl Fn(usize, usize) -> T,
    ) {
        for isa in Isa::available() {
            let mut got = Array2::from_elem((a.nrows(), b.ncols()), T::zeroed());
            gemm_on(isa, a.view(), b.view(), got.view_mut(), false);
            for ((i, j), got) in got.indexed_iter() {
                assert_eq!(*got, chain(i, j), "{isa:?} at ({i}, {j})");
            }
        }
    }
    let (a, b) = (matrix(190, 270, 5), matrix(270, 131, 6));
    check(&a, &b, |i, j| (0..270).fold(0.0, |sum, k| a[[i, k]].mul_add(b[[k, j]], sum)));
    let (a, b) = (a.mapv(|x| x as f32), b.mapv(|x| x as f32));
    check(&a, &b, |i, j| (0..270).fold(0.0, |sum, k| a[[i, k]].mul_add(b[[k, j]], sum)));
    let mut c = Array2::<f64>::zeros((1, 1));
    gemm_f64(matrix(1, 3, 1).view(), matrix(3, 1, 2).view(), c.view_mut(), false);
    assert_ne!(c[[0, 0]], 0.0);
}
