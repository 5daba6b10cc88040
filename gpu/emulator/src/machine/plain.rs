//! Runs of plain operations: those that compute lane by lane, without a guard, and that nobody
//! else notices. A turn executes a run as one, which saves what it does around each operation; the
//! multiply-adds of a run, of which products consist, are inlined here.

use super::alu;
use super::cx::Cx;
use super::op::{MicroOp, NO_GUARD, OpFn, Step};

/// Single-precision multiply-add, rounded to nearest, without `.ftz` and `.sat`; who emits it sets
/// [`MicroOp::fmas`] to 1.
pub const FMA: OpFn = |cx, op| alu::ternary::<f32, f32, f32, f32, _>(cx, op, alu::multiply_add);

/// Counts the plain operations of a function from each on; none goes on where a basic block begins,
/// which `begins` says in ascending order.
pub fn mark(ops: &mut [MicroOp], first: usize, begins: &[u32]) {
    let mut begins = begins.iter().rev().peekable();
    let (mut plain, mut fmas) = (0u8, 0u8);
    for (i, op) in ops.iter_mut().enumerate().skip(first).rev() {
        if !op.class.is_lanewise() || op.guard != NO_GUARD {
            (plain, fmas) = (0, 0);
        } else {
            plain = plain.saturating_add(1);
            fmas = if op.fmas > 0 { fmas.saturating_add(1) } else { 0 };
        }
        (op.plain, op.fmas) = (plain, fmas);
        while begins.next_if(|&&begin| begin as usize >= i).is_some() {
            (plain, fmas) = (0, 0);
        }
    }
}

/// Executes plain operations one after the other.
pub fn run(cx: &mut Cx<'_>, ops: &[MicroOp]) {
    let mut left = ops;
    while let Some(op) = left.first() {
        let fmas = usize::from(op.fmas).min(left.len());
        if fmas > 1 {
            alu::multiply_adds(cx, &left[..fmas]);
            left = &left[fmas..];
        } else {
            let step = (op.run)(cx, op);
            debug_assert_eq!(step, Step::Next, "a plain operation");
            left = &left[1..];
        }
    }
}
