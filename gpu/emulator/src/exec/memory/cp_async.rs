//! cp.async: copies of 4 to 16 bytes a thread from global to shared memory.
//!
//! The bytes move at once; what was not yet waited for only the sanitizer knows.

use fathom_ptx::ast::{Instruction, Operand};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::Type;

use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::access::{Where, Words};
use crate::machine::lane::Lane;
use crate::machine::op::{Class, Step};
use crate::machine::registers::LANES;

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    match ins.op {
        Opcode::CpAsync => copy(l, ins),
        Opcode::CpAsyncCommitGroup => {
            l.emit_action(Class::CpAsync, |cx| {
                cx.commit_copies();
                Step::Next
            });
            Ok(())
        }
        Opcode::CpAsyncWaitGroup | Opcode::CpAsyncWaitAll => {
            let left = match ins.operands.first() {
                Some(o) => l.literal(o),
                None => Some(0),
            };
            let Some(left) = left else { return unsupported(mnemonic(ins)) };
            let all = ins.op == Opcode::CpAsyncWaitAll;
            l.emit_action(Class::CpAsync, move |cx| {
                cx.wait_copies(left as usize, all);
                Step::Next
            });
            Ok(())
        }
        _ => unsupported(mnemonic(ins)),
    }
}

/// `cp.async [d], [a], size{, src-size | ignore-src}{, policy}`.
fn copy(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let to = l.addr(&ins.operands[0])?;
    let from = l.addr(&ins.operands[1])?;
    let Some(size) = l.literal(&ins.operands[2]) else { return unsupported(mnemonic(ins)) };
    if !matches!(size, 4 | 8 | 16) {
        return unsupported(format!("{} of {size} bytes: 4, 8 or 16", mnemonic(ins)));
    }
    let mut source_size = None;
    let mut ignore = None;
    match ins.operands.get(3) {
        None | Some(Operand::None) => {}
        Some(o @ (Operand::Not(_) | Operand::Reg(_)))
            if matches!(o, Operand::Not(_)) || is_pred(l, o) =>
        {
            ignore = Some(l.pred(o)?);
        }
        Some(o) => source_size = Some(l.src(o, Type::U32)?),
    }
    let size = size as u32;
    l.emit_action(Class::CpAsync, move |cx| {
        let (target, source) = (cx.addresses(to), cx.addresses(from));
        let mut wanted = source_size.map_or([size; LANES], |r| u32::read(cx, r));
        if let Some((p, negated)) = ignore {
            let skip = cx.pred(p) ^ if negated { !0 } else { 0 };
            for (lane, n) in wanted.iter_mut().enumerate() {
                *n = if skip >> lane & 1 != 0 { 0 } else { *n };
            }
        }
        let mut words: Words = [[0; LANES]; 4];
        let mask = cx.mask;
        // Whole copies go as one load; those that fill with zeros go byte-exactly.
        let whole = (0..LANES).fold(0, |m, i| m | u32::from(wanted[i] >= size) << i) & mask;
        if whole != 0 {
            cx.mask = whole;
            let result = cx.load(Where::Global, &source, size, &mut words);
            cx.mask = mask;
            if let Err(step) = result {
                return step;
            }
        }
        for lane in cx.lanes() {
            let n = wanted[lane];
            if n < size {
                let mut buffer = [0; 16];
                let part = &mut buffer[..n as usize];
                if n > 0
                    && let Err(step) = cx.read_global(lane, source[lane], part)
                {
                    return step;
                }
                for k in 0..4 {
                    let word = buffer[4 * k..4 * k + 4].try_into().expect("4 bytes");
                    words[k][lane] = u32::from_le_bytes(word);
                }
            }
        }
        cx.within(to, &target, u64::from(size));
        cx.begin_copy(&target, u64::from(size));
        match cx.store(Where::Shared, &target, size, &words) {
            Ok(()) => Step::Next,
            Err(step) => step,
        }
    });
    Ok(())
}

fn is_pred(l: &Lower<'_>, operand: &Operand) -> bool {
    matches!(operand, Operand::Reg(r) if l.type_of(*r) == Type::Pred)
}
