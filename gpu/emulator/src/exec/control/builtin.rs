//! The device functions that the driver provides: printf, assertions, the heap, graphs' conditions.

use fathom_ptx::ast::Operand;

use super::argument::Argument;
use super::printf::{print, string};
use crate::error::Ub;
use crate::lower::builder::{Lower, Lowered, unsupported};
use crate::machine::cx::Cx;
use crate::machine::op::{Class, Step};
use crate::machine::registers::LANES;

/// Bytes of each parameter and of the result of the functions that the driver provides, as CUDA's
/// headers declare them.
const SIGNATURES: [(&str, &[u32], u32); 5] = [
    ("vprintf", &[8, 8], 4),
    ("__assertfail", &[8, 8, 4, 8, 8], 0),
    ("malloc", &[8], 8),
    ("free", &[8], 0),
    ("cudaGraphSetConditional", &[8, 4], 0),
];

/// Lowers the call of a function that is declared and defined nowhere.
pub fn builtin(l: &mut Lower<'_>, name: &str, returns: &[Operand], args: &[Operand]) -> Lowered {
    let Some(&(_, bytes, of_result)) = SIGNATURES.iter().find(|s| s.0 == name) else {
        return unsupported(format!("the external function {name}"));
    };
    if args.len() != bytes.len() {
        let (found, expected) = (args.len(), bytes.len());
        return unsupported(format!("{name} with {found} arguments, where it has {expected}"));
    }
    let mut values = Vec::new();
    for (operand, &bytes) in args.iter().zip(bytes) {
        values.push((Argument::passed(l, operand, bytes)?, bytes));
    }
    let result = match returns.first() {
        Some(operand) => Some(Argument::received(l, operand, of_result)?),
        None => None,
    };
    let value = move |cx: &Cx<'_>, i: usize| {
        let (argument, bytes): (Argument, u32) = values[i];
        argument.read(cx, bytes)
    };
    match name {
        "vprintf" => {
            l.emit_action(Class::Misc, move |cx| {
                let format = value(cx, 0);
                let list = value(cx, 1);
                for lane in cx.lanes() {
                    match print(cx, lane, format[lane], list[lane]) {
                        Ok(text) => {
                            let at = cx.cluster.ctas[cx.cta].linear;
                            cx.stats.printed.push((at, text));
                        }
                        Err(step) => return step,
                    }
                }
                if let Some(to) = result {
                    to.write(cx, of_result, [0; LANES]);
                }
                Step::Next
            });
            Ok(())
        }
        "__assertfail" => {
            l.emit_action(Class::Misc, move |cx| {
                let lane = cx.leader();
                let [message, file, line, function] = std::array::from_fn(|i| value(cx, i)[lane]);
                let mut text = |address| string(cx, lane, address).unwrap_or_default();
                let message = format!(
                    "assertion `{}` failed in {} ({}:{})",
                    text(message),
                    text(function),
                    text(file),
                    line
                );
                cx.fail(Ub::Trap, Some(lane), None, message)
            });
            Ok(())
        }
        "malloc" => {
            // Which addresses come back depends on the order of CTAs: it has to be fixed.
            l.communicates = true;
            l.uses_heap = true;
            let Some(to) = result else { return Ok(()) };
            l.emit_action(Class::Misc, move |cx| {
                let bytes = value(cx, 0);
                let reuse = !cx.grid.settings.checks.races;
                let mut made = [0; LANES];
                let mut heap = cx.grid.heap.as_ref().expect("its code calls malloc").lock();
                let heap = heap.as_mut().expect("no panic holds this lock");
                for lane in cx.lanes() {
                    made[lane] = heap.malloc(bytes[lane], reuse);
                }
                to.write(cx, of_result, made);
                Step::Next
            });
            Ok(())
        }
        "free" => {
            l.communicates = true;
            l.uses_heap = true;
            l.emit_action(Class::Misc, move |cx| {
                let address = value(cx, 0);
                for lane in cx.lanes() {
                    let heap = cx.grid.heap.as_ref().expect("its code calls free");
                    if !heap.lock().expect("no panic holds this lock").free(address[lane]) {
                        let message = "free of what malloc did not return, or that is freed";
                        return cx.fail(Ub::UseAfterFree, Some(lane), Some(address[lane]), message);
                    }
                }
                Step::Next
            });
            Ok(())
        }
        // A graph's condition is a word of device memory, and its handle the word's address.
        "cudaGraphSetConditional" => {
            l.communicates = true;
            l.emit_action(Class::Misc, move |cx| {
                let handle = value(cx, 0);
                let values = value(cx, 1);
                for lane in cx.lanes() {
                    let word = (values[lane] as u32).to_le_bytes();
                    if let Err(step) = cx.write_global(lane, handle[lane], &word) {
                        return step;
                    }
                }
                Step::Next
            });
            Ok(())
        }
        _ => unreachable!("it has a signature"),
    }
}
