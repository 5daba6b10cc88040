//! Calls: arguments and results in local memory or registers, frames, indirect targets.

use fathom_ptx::ast::{Instruction, Operand, Symbol};
use fathom_ptx::types::Type;

use super::argument::Argument;
use super::builtin::builtin;
use crate::error::Ub;
use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::cx::Cx;
use crate::machine::lane::Lane;
use crate::machine::op::{Class, Step};
use crate::machine::registers::Reg;
use crate::machine::warp::Frame;
use crate::program::FUNCTION_WINDOW;

/// Refuses what needs parameters in registers; parameters otherwise arrive in local memory.
pub fn load_register_params(l: &mut Lower<'_>) -> Lowered {
    let f = l.function;
    if f.params.iter().chain(&f.returns).any(|v| v.register.is_some()) {
        return unsupported("device functions with parameters in registers");
    }
    Ok(())
}

/// Lowers `call`: the arguments' way into the callee's frame, the jump, the results' way back.
pub fn call(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let Some(call) = ins.call() else { return unsupported(mnemonic(ins)) };
    let direct = match call.target {
        Operand::Symbol(Symbol::Function(f), _) => {
            let name = &l.program.ast.functions[f.index()].name;
            match l.callee(f.index()) {
                Some(callee) => Some(callee),
                None => return builtin(l, &name.clone(), call.returns, call.args),
            }
        }
        _ => None,
    };
    let own = l.callee_index();
    let (params, returns) = match direct {
        Some(callee) => {
            let info = l.frame_of(callee);
            (info.params.clone(), info.returns.clone())
        }
        // The prototype gives the layout of an indirect callee.
        None => prototype(l, ins)?,
    };
    let mut args = Vec::new();
    for (operand, &(offset, bytes)) in call.args.iter().zip(&params) {
        args.push((Argument::passed(l, operand, bytes)?, offset, bytes));
    }
    let target = match direct {
        Some(_) => 0,
        None => l.src(call.target, Type::U64)?,
    };
    let op = l.emit_action(Class::Control, move |cx| enter(cx, own, direct, target, &args));
    op.control = true;
    if call.returns.is_empty() {
        return Ok(());
    }
    let mut results = Vec::new();
    for (operand, &(offset, bytes)) in call.returns.iter().zip(&returns) {
        results.push((Argument::received(l, operand, bytes)?, offset, bytes));
    }
    l.emit_action(Class::Control, move |cx| {
        let above = cx.local_base + cx.grid.code.functions[own as usize].local_bytes;
        for &(to, offset, bytes) in &results {
            to.take_back(cx, above + offset, bytes);
        }
        Step::Next
    });
    Ok(())
}

/// Offset and size of each parameter or result in the callee's frame, in bytes.
type FrameLayout = Vec<(u32, u32)>;

/// Where an indirect callee expects its parameters and leaves its results.
fn prototype(l: &Lower<'_>, ins: &Instruction) -> Lowered<(FrameLayout, FrameLayout)> {
    use fathom_ptx::ast::TableKind;
    let table = ins.call().and_then(|c| c.table).map(|t| &l.body.tables[t.index()].kind);
    match table {
        Some(TableKind::Prototype { returns, params, .. }) => {
            let mut end = 0u32;
            let mut lay = |v: &fathom_ptx::ast::Variable| {
                let at = end.next_multiple_of(v.alignment().max(4));
                end = at + (v.bytes() as u32).next_multiple_of(4);
                (at, v.bytes() as u32)
            };
            let params = params.iter().map(&mut lay).collect();
            let returns = returns.iter().map(&mut lay).collect();
            Ok((params, returns))
        }
        Some(TableKind::Call(list)) => match list.first().and_then(|f| l.callee(f.index())) {
            Some(callee) => {
                let info = l.frame_of(callee);
                Ok((info.params.clone(), info.returns.clone()))
            }
            None => unsupported("a call table without functions"),
        },
        _ => unsupported("an indirect call without prototype"),
    }
}

/// Frames deeper than this are a runaway recursion.
const MAX_DEPTH: usize = 1024;

/// Enters the callee; lanes that call another function take their turn later.
fn enter(
    cx: &mut Cx<'_>,
    own: u32,
    direct: Option<u32>,
    target: Reg,
    args: &[(Argument, u32, u32)],
) -> Step {
    let code = &*cx.grid.code;
    let callee = match direct {
        Some(callee) => callee,
        None => {
            let addresses = u64::read(cx, target);
            let first = addresses[cx.leader()];
            let same = cx.lanes().fold(0, |m, i| m | u32::from(addresses[i] == first) << i);
            if same != cx.mask {
                // Lanes with another target take their turn after this one.
                cx.w.groups[cx.at].pc = cx.pc;
                cx.w.split(cx.at, same, cx.pc, cx.pc, Some(cx.pc + 1));
                return Step::Regrouped;
            }
            let function = first.wrapping_sub(FUNCTION_WINDOW) / 16;
            let found = u32::try_from(function).ok().and_then(|f| code.function_of.get(&f));
            match found {
                Some(&callee) if first >= FUNCTION_WINDOW => callee,
                _ => {
                    let lane = cx.leader();
                    let message = "indirect call of something that is no function";
                    return cx.fail(Ub::BadControlFlow, Some(lane), Some(first), message);
                }
            }
        }
    };
    if cx.w.groups[cx.at].frames.len() >= MAX_DEPTH {
        let lane = cx.leader();
        return cx.fail(Ub::BadControlFlow, Some(lane), None, "calls nest too deeply");
    }
    let caller = &code.functions[own as usize];
    let info = &code.functions[callee as usize];
    let base = cx.base as u32 + caller.slots.max(caller.wide_slots);
    let pred_base = cx.pred_base as u32 + caller.predicates;
    let local_base = cx.local_base + caller.local_bytes;
    cx.w.grow(base, pred_base, info);
    cx.w.grow_local(local_base + info.local_bytes);
    for &(from, offset, bytes) in args {
        from.hand_over(cx, local_base + offset, bytes);
    }
    let return_pc = cx.pc + 1;
    let group = &mut cx.w.groups[cx.at];
    group.frames.push(Frame {
        return_pc,
        base: group.base,
        pred_base: group.pred_base,
        local_base: group.local_base,
        join: group.join,
    });
    group.pc = info.start;
    group.base = base;
    group.pred_base = pred_base;
    group.local_base = local_base;
    // The caller's join is waited for again after the return; exits still leave it.
    Step::Control
}
