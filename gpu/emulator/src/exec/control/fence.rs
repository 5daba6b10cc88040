//! Fences and memory barriers. Memory is in order here, so all they do is tell the sanitizer.

use fathom_ptx::ast::{Instruction, Operand};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Flag, Scope, Sem};

use crate::lower::builder::{Lower, Lowered};
use crate::machine::op::{Class, Step};

/// Lowers a fence or membar.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let asynchronous = matches!(ins.op, Opcode::FenceProxy | Opcode::Membar)
        && (ins.mods.has(Flag::Async) || ins.mods.has(Flag::AsyncGeneric));
    let of_map = ins.mods.has(Flag::TensormapGeneric) && ins.mods.sem() == Some(Sem::Acquire);
    let map = match ins.operands.first() {
        Some(o @ Operand::Address(_)) if of_map => Some(l.addr(o)?),
        _ => None,
    };
    // A fence among the threads of a CTA says nothing to other CTAs.
    let wide = matches!(ins.op, Opcode::Fence | Opcode::Membar)
        && !asynchronous
        && ins.mods.scope() != Some(Scope::Cta);
    l.emit_action(Class::Fence, move |cx| {
        if asynchronous {
            cx.with_sanitizer(|s, who| s.fence(who.warp));
        }
        if wide {
            cx.fence_global();
        }
        if let Some(map) = map {
            let address = cx.address(map);
            cx.map_fenced(address);
        }
        Step::Next
    });
    Ok(())
}
