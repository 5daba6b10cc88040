//! ldmatrix, stmatrix, movmatrix: 8x8 matrices of 16-bit elements between lanes and memory.
//!
//! Thread i of a matrix's fragment holds the elements (i / 4, 2 (i % 4)) and its right neighbour;
//! with `.trans` those of the transposed matrix.

use fathom_ptx::ast::{Instruction, Operand};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Flag, Type};

use crate::exec::memory::load_store::space_of;
use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::access::{Where, Words};
use crate::machine::lane::Lane;
use crate::machine::op::{Class, Step};
use crate::machine::registers::LANES;

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    if !matches!(ins.mods.types().last(), Some(Type::B16)) {
        return unsupported(mnemonic(ins));
    }
    match ins.op {
        Opcode::Ldmatrix => load(l, ins),
        Opcode::Stmatrix => store(l, ins),
        _ => transpose_registers(l, ins),
    }
}

fn list(operand: &Operand) -> &[Operand] {
    match operand {
        Operand::Vector(list) => list,
        one => std::slice::from_ref(one),
    }
}

/// The space of the row addresses: shared, or generic addresses that lie there.
fn place(l: &Lower<'_>, ins: &Instruction, operand: &Operand) -> Where {
    space_of(l, ins.mods.space(), operand)
}

fn load(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let mut to = Vec::new();
    for operand in list(&ins.operands[0]) {
        to.push(l.dst(operand)?);
    }
    let space = place(l, ins, &ins.operands[1]);
    let addr = l.addr(&ins.operands[1])?;
    let trans = ins.mods.has(Flag::Trans);
    l.emit_action(Class::Ldmatrix, move |cx| {
        if let Some(step) = cx.converge(!0) {
            return step;
        }
        let rows = cx.addresses(addr);
        let mask = cx.mask;
        // Lanes 8j..8j+8 give the rows of matrix j; every lane gets a pair of each.
        cx.mask = if to.len() == 4 { mask } else { mask & ((1 << (8 * to.len())) - 1) };
        cx.within(addr, &rows, 16);
        let mut words: Words = [[0; LANES]; 4];
        let result = cx.load(space, &rows, 16, &mut words);
        cx.mask = mask;
        if let Err(step) = result {
            return step;
        }
        for (j, &d) in to.iter().enumerate() {
            let half = |row: usize, column: usize| {
                words[column / 2][8 * j + row] >> (16 * (column % 2)) & 0xffff
            };
            let value = std::array::from_fn(|lane| {
                let (row, column) = (lane / 4, 2 * (lane % 4));
                if trans {
                    half(column, row) | half(column + 1, row) << 16
                } else {
                    words[column / 2][8 * j + row]
                }
            });
            u32::write(cx, d, value);
        }
        Step::Next
    });
    Ok(())
}

fn store(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let space = place(l, ins, &ins.operands[0]);
    let addr = l.addr(&ins.operands[0])?;
    let mut from = Vec::new();
    for operand in list(&ins.operands[1]) {
        from.push(l.src(operand, Type::B32)?);
    }
    let trans = ins.mods.has(Flag::Trans);
    l.emit_action(Class::Ldmatrix, move |cx| {
        if let Some(step) = cx.converge(!0) {
            return step;
        }
        let rows = cx.addresses(addr);
        let mut words: Words = [[0; LANES]; 4];
        for (j, &a) in from.iter().enumerate() {
            let value = u32::read(cx, a);
            for (lane, v) in value.into_iter().enumerate() {
                let (row, column) = (lane / 4, 2 * (lane % 4));
                for (e, half) in [v & 0xffff, v >> 16].into_iter().enumerate() {
                    let (r, c) = if trans { (column + e, row) } else { (row, column + e) };
                    words[c / 2][8 * j + r] |= half << (16 * (c % 2));
                }
            }
        }
        let mask = cx.mask;
        cx.mask = if from.len() == 4 { mask } else { mask & ((1 << (8 * from.len())) - 1) };
        cx.within(addr, &rows, 16);
        let result = cx.store(space, &rows, 16, &words);
        cx.mask = mask;
        match result {
            Ok(()) => Step::Next,
            Err(step) => step,
        }
    });
    Ok(())
}

fn transpose_registers(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let a = l.src(&ins.operands[1], Type::B32)?;
    let d = l.dst(&ins.operands[0])?;
    l.emit_action(Class::Ldmatrix, move |cx| {
        if let Some(step) = cx.converge(!0) {
            return step;
        }
        let v = u32::read(cx, a);
        let half =
            |row: usize, column: usize| v[row * 4 + column / 2] >> (16 * (column % 2)) & 0xffff;
        let out = std::array::from_fn(|lane| {
            let (row, column) = (lane / 4, 2 * (lane % 4));
            half(column, row) | half(column + 1, row) << 16
        });
        u32::write(cx, d, out);
        Step::Next
    });
    Ok(())
}
