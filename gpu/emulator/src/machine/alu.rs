//! Drivers of lane-wise operations: read whole registers, compute 32 lanes, write under the mask.
//!
//! Each driver exists twice, in plain Rust and compiled for AVX-512; the machine picks once. The
//! macros [`un`], [`bin`], [`tri`] and [`cmp`] turn an expression on scalars into a
//! micro-operation, so that a table of instructions reads as a table of expressions.
//!
//! `unsafe` here is the call of functions compiled for CPU features that were detected.

use super::registers::LANES;
use crate::machine::cx::{Cx, PRED_TRUE};
use crate::machine::lane::Lane;
use crate::machine::op::{MicroOp, Step};

/// Whether this CPU runs the AVX-512 versions.
pub fn available() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512cd")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("lzcnt")
            && is_x86_feature_detected!("popcnt")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

macro_rules! drivers {
    ($($name:ident $simd:ident $body:ident < $($g:ident),* > [$($f:tt)*];)*) => { $(
        #[cfg(target_arch = "x86_64")]
        #[target_feature(
            enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512cd,fma,bmi1,bmi2,lzcnt,popcnt"
        )]
        fn $simd<$($g: Lane,)* F: $($f)*>(cx: &mut Cx<'_>, op: &MicroOp, f: F) {
            $body(cx, op, f);
        }

        /// Runs the operation on the executing lanes.
        pub fn $name<$($g: Lane,)* F: $($f)*>(cx: &mut Cx<'_>, op: &MicroOp, f: F) -> Step {
            #[cfg(target_arch = "x86_64")]
            if cx.grid.simd {
                // SAFETY: `simd` is only set where `available` found every feature.
                unsafe { $simd(cx, op, f) };
                return Step::Next;
            }
            $body(cx, op, f);
            Step::Next
        }
    )* };
}

drivers! {
    unary unary_simd unary_body<A, D>[Fn(A) -> D];
    binary binary_simd binary_body<A, B, D>[Fn(A, B) -> D];
    ternary ternary_simd ternary_body<A, B, C, D>[Fn(A, B, C) -> D];
    compare compare_simd compare_body<A>[Fn(A, A) -> bool];
    select select_simd select_body<A>[Fn(bool, A, A) -> A];
}

/// `a b + c`, rounded once; NaNs become the one NaN of the hardware.
#[inline(always)]
pub fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
    let sum = a.mul_add(b, c);
    if sum.is_nan() { f32::from_bits(0x7fff_ffff) } else { sum }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512cd,fma,bmi1,bmi2,lzcnt,popcnt")]
fn multiply_adds_simd(cx: &mut Cx<'_>, ops: &[MicroOp]) {
    for op in ops {
        ternary_body::<f32, f32, f32, f32, _>(cx, op, multiply_add);
    }
}

/// Executes multiply-adds ([`super::plain::FMA`]) one after the other.
pub fn multiply_adds(cx: &mut Cx<'_>, ops: &[MicroOp]) {
    #[cfg(target_arch = "x86_64")]
    if cx.grid.simd {
        // SAFETY: `simd` is only set where `available` found every feature.
        return unsafe { multiply_adds_simd(cx, ops) };
    }
    for op in ops {
        ternary_body::<f32, f32, f32, f32, _>(cx, op, multiply_add);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512cd,fma,bmi1,bmi2,lzcnt,popcnt")]
fn wide_simd<R>(work: impl FnOnce() -> R) -> R {
    work()
}

/// Runs `work`, which is inlined here, compiled for the machine's vectors; `simd` is
/// [`crate::machine::cx::Grid::simd`].
pub fn wide<R>(simd: bool, work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    if simd {
        // SAFETY: `simd` is only set where `available` found every feature.
        return unsafe { wide_simd(work) };
    }
    work()
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

pub(crate) use {bin, cmp, tri, un};
