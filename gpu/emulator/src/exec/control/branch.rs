//! Branches, exit and trap; calls stand in [`call`].

use fathom_ptx::ast::Instruction;
use fathom_ptx::table::Opcode;
use fathom_ptx::types::Type;

use super::call::call;
use crate::error::Ub;
use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::lower::cfg::targets;
use crate::machine::cx::Cx;
use crate::machine::lane::Lane;
use crate::machine::op::{Class, MicroOp, Step};
use crate::machine::registers::LANES;
use crate::machine::warp::Wait;

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    match ins.op {
        Opcode::Bra => {
            let Some(&target) = targets(l.body, ins).first() else {
                return unsupported(mnemonic(ins));
            };
            l.emit(Class::Control, branch, 0, 0, 0, 0);
            l.branch_to(target);
            Ok(())
        }
        Opcode::BrxIdx => brx(l, ins),
        Opcode::Ret if !l.function.entry => {
            l.emit(Class::Control, branch, 0, 0, 0, 0);
            l.branch_to_end();
            Ok(())
        }
        Opcode::Ret | Opcode::Exit => {
            l.emit(Class::Control, exit, 0, 0, 0, 0);
            Ok(())
        }
        Opcode::Trap | Opcode::Brkpt => {
            let name = ins.op.text();
            l.emit_action(Class::Control, move |cx| {
                let lane = cx.leader();
                cx.fail(Ub::Trap, Some(lane), None, format!("the kernel executed {name}"))
            });
            Ok(())
        }
        Opcode::Call => call(l, ins),
        _ => unsupported(mnemonic(ins)),
    }
}

fn branch(_: &mut Cx<'_>, _: &MicroOp) -> Step {
    Step::Branch
}

fn exit(_: &mut Cx<'_>, _: &MicroOp) -> Step {
    Step::Exit
}

/// One comparison and branch a target; an index beyond the table goes nowhere defined.
fn brx(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let index = l.src(&ins.operands[0], Type::U32)?;
    fn step(cx: &mut Cx<'_>, op: &MicroOp) -> Step {
        let (a, b) = (u32::read(cx, op.a), u32::read(cx, op.b));
        let equal = (0..LANES).fold(0, |m, i| m | u32::from(a[i] == b[i]) << i);
        cx.mask &= equal;
        if cx.mask == 0 { Step::Next } else { Step::Branch }
    }
    for (i, target) in targets(l.body, ins).into_iter().enumerate() {
        let number = l.constant(i as u64, false);
        l.emit(Class::Control, step, 0, index, number, 0);
        l.branch_to(target);
    }
    l.emit_action(Class::Control, |cx| {
        let lane = cx.leader();
        cx.fail(Ub::BadControlFlow, Some(lane), None, "brx.idx with an index beyond its targets")
    });
    Ok(())
}

/// What stands behind a function's last instruction.
pub fn function_end(l: &mut Lower<'_>) {
    if l.function.entry {
        l.emit(Class::Control, exit, 0, 0, 0, 0);
        return;
    }
    l.emit_action(Class::Control, |cx| {
        let group = &mut cx.w.groups[cx.at];
        let Some(frame) = group.frames.pop() else {
            return cx.fail(Ub::BadControlFlow, None, None, "return without a call");
        };
        group.pc = frame.return_pc;
        group.base = frame.base;
        group.pred_base = frame.pred_base;
        group.local_base = frame.local_base;
        group.join = frame.join;
        group.wait = Wait::Ready;
        Step::Control
    });
}
