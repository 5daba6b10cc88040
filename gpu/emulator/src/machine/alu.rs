//! Drivers of lane-wise operations: read whole registers, compute 32 lanes, write under the mask.
//!
//! Each driver exists three times, compiled for AVX-512, for AVX2 and for any CPU; the machine
//! picks once. The macros [`un`], [`bin`], [`tri`] and [`cmp`] turn an expression on scalars into
//! a micro-operation, so that a table of instructions reads as a table of expressions.
//!
//! `unsafe` here is the call of functions compiled for CPU features that were detected.

use super::registers::LANES;
use crate::machine::cx::{Cx, PRED_TRUE};
use crate::machine::lane::Lane;
use crate::machine::op::{MicroOp, Step};

/// The vector instructions that the host's CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vectors {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Plain,
}

impl Vectors {
    /// What this CPU has: every feature that [`for_vectors`] names.
    pub fn detect() -> Vectors {
        #[cfg(target_arch = "x86_64")]
        {
            let scalar = is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("bmi1")
                && is_x86_feature_detected!("bmi2")
                && is_x86_feature_detected!("lzcnt")
                && is_x86_feature_detected!("popcnt");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512cd");
            if scalar && avx512 {
                return Vectors::Avx512;
            }
            if scalar && is_x86_feature_detected!("avx2") {
                return Vectors::Avx2;
            }
        }
        Vectors::Plain
    }
}

/// `for_vectors!(vectors, [generics](name: type, ...) -> type { body })` compiles the body for each
/// of [`Vectors`] and calls the version for `vectors` with the variables of these names. What the
/// body calls must be `inline(always)`, else it is compiled once.
macro_rules! for_vectors {
    ($vectors:expr, [$($generics:tt)*]($($arg:ident: $type:ty),*) -> $out:ty $body:block) => {{
        #[inline(always)]
        fn plain<$($generics)*>($($arg: $type),*) -> $out $body

        #[cfg(target_arch = "x86_64")]
        #[target_feature(
            enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512cd,fma,bmi1,bmi2,lzcnt,popcnt"
        )]
        fn avx512<$($generics)*>($($arg: $type),*) -> $out {
            plain($($arg),*)
        }

        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
        fn avx2<$($generics)*>($($arg: $type),*) -> $out {
            plain($($arg),*)
        }

        match $vectors {
            // SAFETY: `Vectors::detect` found every feature.
            #[cfg(target_arch = "x86_64")]
            $crate::machine::alu::Vectors::Avx512 => unsafe { avx512($($arg),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            $crate::machine::alu::Vectors::Avx2 => unsafe { avx2($($arg),*) },
            $crate::machine::alu::Vectors::Plain => plain($($arg),*),
        }
    }};
}

macro_rules! drivers {
    ($($name:ident $body:ident [$($generics:tt)*][$($f:tt)*];)*) => { $(
        /// Runs the operation on the executing lanes.
        pub fn $name<$($generics)*, F: $($f)*>(cx: &mut Cx<'_>, op: &MicroOp, f: F) -> Step {
            for_vectors!(
                cx.grid.vectors,
                [$($generics)*, F: $($f)*](cx: &mut Cx<'_>, op: &MicroOp, f: F) -> () {
                    $body(cx, op, f)
                }
            );
            Step::Next
        }
    )* };
}

drivers! {
    unary unary_body [A: Lane, D: Lane][Fn(A) -> D];
    binary binary_body [A: Lane, B: Lane, D: Lane][Fn(A, B) -> D];
    ternary ternary_body [A: Lane, B: Lane, C: Lane, D: Lane][Fn(A, B, C) -> D];
    compare compare_body [A: Lane][Fn(A, A) -> bool];
    select select_body [A: Lane][Fn(bool, A, A) -> A];
}

/// `a b + c`, rounded once; NaNs become the one NaN of the hardware.
#[inline(always)]
pub fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
    let sum = a.mul_add(b, c);
    if sum.is_nan() { f32::from_bits(0x7fff_ffff) } else { sum }
}

/// Executes multiply-adds ([`super::plain::FMA`]) one after the other.
pub fn multiply_adds(cx: &mut Cx<'_>, ops: &[MicroOp]) {
    for_vectors!(cx.grid.vectors, [](cx: &mut Cx<'_>, ops: &[MicroOp]) -> () {
        for op in ops {
            ternary_body::<f32, f32, f32, f32, _>(cx, op, multiply_add);
        }
    });
}

/// Runs `work`, which is inlined here, compiled for the machine's vectors.
pub fn wide<R>(vectors: Vectors, work: impl FnOnce() -> R) -> R {
    for_vectors!(vectors, [R](work: impl FnOnce() -> R) -> R { work() })
}

#[inline(always)]
fn unary_body<A: Lane, D: Lane, F: Fn(A) -> D>(cx: &mut Cx<'_>, op: &MicroOp, f: F) {
    let a = A::read(cx, op.a);
    let mut d = [D::default(); LANES];
    for i in 0..LANES {
        d[i] = f(a[i]);
    }
    D::write(cx, op.d, d);
}

#[inline(always)]
fn binary_body<A: Lane, B: Lane, D: Lane, F: Fn(A, B) -> D>(cx: &mut Cx<'_>, op: &MicroOp, f: F) {
    let a = A::read(cx, op.a);
    let b = B::read(cx, op.b);
    let mut d = [D::default(); LANES];
    for i in 0..LANES {
        d[i] = f(a[i], b[i]);
    }
    D::write(cx, op.d, d);
}

#[inline(always)]
fn ternary_body<A: Lane, B: Lane, C: Lane, D: Lane, F: Fn(A, B, C) -> D>(
    cx: &mut Cx<'_>,
    op: &MicroOp,
    f: F,
) {
    let a = A::read(cx, op.a);
    let b = B::read(cx, op.b);
    let c = C::read(cx, op.c);
    let mut d = [D::default(); LANES];
    for i in 0..LANES {
        d[i] = f(a[i], b[i], c[i]);
    }
    D::write(cx, op.d, d);
}

#[inline(always)]
fn compare_body<A: Lane, F: Fn(A, A) -> bool>(cx: &mut Cx<'_>, op: &MicroOp, f: F) {
    let a = A::read(cx, op.a);
    let b = A::read(cx, op.b);
    let mut mask = 0;
    for i in 0..LANES {
        mask |= u32::from(f(a[i], b[i])) << i;
    }
    set_predicates(cx, op, mask);
}

/// How `setp` combines its comparison with a third predicate; in [`MicroOp::x`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combine {
    And = 0,
    Or = 1,
    Xor = 2,
}

/// Packs the second destination, the third predicate's sign and the operator into `x`.
pub fn pack_setp(q: u16, negated: bool, combine: Combine) -> u32 {
    u32::from(q) | u32::from(negated) << 16 | (combine as u32) << 17
}

#[inline(always)]
fn set_predicates(cx: &mut Cx<'_>, op: &MicroOp, mask: u32) {
    let q = op.x as u16;
    let negated = op.x >> 16 & 1 != 0;
    let (mut p, mut n) = (mask, !mask);
    if op.c != PRED_TRUE || negated || op.x >> 17 != 0 {
        let c = cx.pred(op.c);
        let c = if negated { !c } else { c };
        (p, n) = match op.x >> 17 {
            0 => (mask & c, !mask & c),
            1 => (mask | c, !mask | c),
            _ => (mask ^ c, !mask ^ c),
        };
    }
    cx.set_pred(op.d, p);
    cx.set_pred(q, n);
}

/// `d = f(predicate c, a, b)`.
#[inline(always)]
fn select_body<A: Lane, F: Fn(bool, A, A) -> A>(cx: &mut Cx<'_>, op: &MicroOp, f: F) {
    let a = A::read(cx, op.a);
    let b = A::read(cx, op.b);
    let c = cx.pred(op.c) ^ if op.x != 0 { !0 } else { 0 };
    let mut d = [A::default(); LANES];
    for i in 0..LANES {
        d[i] = f(c >> i & 1 != 0, a[i], b[i]);
    }
    A::write(cx, op.d, d);
}

/// A micro-operation of one operand.
macro_rules! un {
    ($a:ty => $d:ty, $f:expr) => {{
        fn run(cx: &mut Cx<'_>, op: &MicroOp) -> Step {
            alu::unary::<$a, $d, _>(cx, op, $f)
        }
        run as OpFn
    }};
}

/// A micro-operation of two operands.
macro_rules! bin {
    ($a:ty, $b:ty => $d:ty, $f:expr) => {{
        fn run(cx: &mut Cx<'_>, op: &MicroOp) -> Step {
            alu::binary::<$a, $b, $d, _>(cx, op, $f)
        }
        run as OpFn
    }};
}

/// A micro-operation of three operands.
macro_rules! tri {
    ($a:ty, $b:ty, $c:ty => $d:ty, $f:expr) => {{
        fn run(cx: &mut Cx<'_>, op: &MicroOp) -> Step {
            alu::ternary::<$a, $b, $c, $d, _>(cx, op, $f)
        }
        run as OpFn
    }};
}

/// A micro-operation that compares two operands and writes predicates, as `setp` does.
macro_rules! cmp {
    ($a:ty, $f:expr) => {{
        fn run(cx: &mut Cx<'_>, op: &MicroOp) -> Step {
            alu::compare::<$a, _>(cx, op, $f)
        }
        run as OpFn
    }};
}

pub(crate) use {bin, cmp, for_vectors, tri, un};

#[cfg(test)]
mod tests {
    use super::{Vectors, multiply_add};
    use crate::machine::registers::LANES;

    /// Every version that this CPU can run gives the bits of plain Rust.
    #[test]
    fn versions_for_vectors_agree() {
        let mut state = 1u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Every eighth is near an end of the range: zeros, subnormals, infinities, NaNs.
            let end =
                [0, 1 << 31, 1, 0x7f7f_ffff, 0x7f80_0000, 0xff80_0000, 0x7fc0_1234, 0xff80_0001];
            f32::from_bits(if state >> 29 == 0 { end[state as usize >> 26 & 7] } else { state })
        };
        let run = |vectors, x: &[[f32; LANES]; 3]| {
            for_vectors!(vectors, [](x: &[[f32; LANES]; 3]) -> [u32; LANES] {
                std::array::from_fn(|i| multiply_add(x[0][i], x[1][i], x[2][i]).to_bits())
            })
        };
        for _ in 0..1000 {
            let x = [0; 3].map(|_| std::array::from_fn(|_| random()));
            let expected = run(Vectors::Plain, &x);
            #[cfg(target_arch = "x86_64")]
            if Vectors::detect() == Vectors::Avx512 {
                assert_eq!(run(Vectors::Avx512, &x), expected, "{x:?}");
            }
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") && Vectors::detect() != Vectors::Plain {
                assert_eq!(run(Vectors::Avx2, &x), expected, "{x:?}");
            }
        }
    }
}
