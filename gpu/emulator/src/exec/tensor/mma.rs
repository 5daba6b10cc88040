//! mma.sync: matrix products of a warp, fragments in registers (PTX ISA, "mma").
//!
//! With g = lane / 4 and t = lane % 4, register r of A holds row g + 8 (r % 2) and elements t e ..
//! t e + e of the K range that starts at 4 e (r / 2), e elements a register; B likewise with column
//! g and range 4 e r; C and D hold columns 2 t, 2 t + 1 of rows g and g + 8. A sparse A holds its
//! stored elements as an A of half the K ([`super::sparse`]).

use fathom_numerics::mma::{Instr, MmaShape};
use fathom_ptx::ast::{Instruction, Operand};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Flag, Shape, Type};

use super::block_scale;
use super::sparse::Metadata;
use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::cx::Cx;
use crate::machine::lane::{self, Lane};
use crate::machine::op::{Class, Step};
use crate::machine::product::Product;
use crate::machine::registers::{LANES, Reg};

/// Registers of an operand.
pub fn fragment(l: &mut Lower<'_>, operand: &Operand, ty: Type, source: bool) -> Lowered<Vec<Reg>> {
    let list = match operand {
        Operand::Vector(list) => &list[..],
        one => std::slice::from_ref(one),
    };
    let mut out = Vec::with_capacity(list.len());
    for o in list {
        let bits = l.dst_bits(o, ty.bits());
        if !source && (bits > 32) != (ty.bits() > 32) {
            return unsupported(format!("{} bits of a matrix in a register of {bits}", ty.bits()));
        }
        out.push(if source { l.src(o, ty)? } else { l.dst(o)? });
    }
    Ok(out)
}

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let types: Vec<Type> = ins.mods.types().collect();
    if let (true, Some(shape)) = (ins.mods.has(Flag::BlockScale), ins.mods.shape()) {
        return block_scale::lower(l, ins, shape);
    }
    let (Opcode::Mma, [d, a, b, c], Some(shape)) = (ins.op, &types[..], ins.mods.shape()) else {
        return unsupported(mnemonic(ins));
    };
    let types = [*d, *a, *b, *c];
    let Shape { m, n, k } = shape;
    if ins.mods.has(Flag::Sp) || ins.mods.has(Flag::SpOrderedMetadata) {
        return sparse(l, ins, shape, types);
    }
    if ins.operands.len() != 4 || (m == 8 && k == 4 && *a == Type::F16) {
        return unsupported(mnemonic(ins));
    }
    let size = MmaShape { m: m.into(), n: n.into(), k: k.into() };
    let Some(product) = Product::new(ins, Instr::MmaSync, size, types) else {
        return unsupported(mnemonic(ins));
    };
    // Elements of kind::f8f6f4 lie in bytes, those of 4 bits in bits 2 to 5.
    let bytes = ins.mods.has(Flag::KindF8f6f4);
    let bits = if bytes { 8 } else { product.bits };
    let padded = [*a, *b].map(|ty| bytes && ty == Type::E2m1);
    let wide = *a == Type::F64;
    let register = if wide { Type::B64 } else { Type::B32 };
    let fa = fragment(l, &ins.operands[1], register, true)?;
    let fb = fragment(l, &ins.operands[2], register, true)?;
    let fc = fragment(l, &ins.operands[3], register, true)?;
    let fd = fragment(l, &ins.operands[0], register, false)?;
    let name = format!("mma.m{m}n{n}k{k}.{}.{}.{}", d.text(), a.text(), b.text());
    l.tensor_core(name, 2 * u64::from(m) * u64::from(n) * u64::from(k));
    l.emit_action(Class::Mma, move |cx| {
        if let Some(step) = cx.converge(!0) {
            return step;
        }
        let (m, n, k) = (size.m, size.n, size.k);
        let mut a = vec![0; m * k];
        let mut b = vec![0; n * k];
        let mut d = vec![0; m * n];
        spread(cx, &fa, bits, m == 16, k, &mut a);
        spread(cx, &fb, bits, false, k, &mut b);
        for (elements, padded) in [&mut a, &mut b].into_iter().zip(padded) {
            if padded {
                elements.iter_mut().for_each(|x| *x = *x >> 2 & 0xf);
            }
        }
        let halves = product.accumulator == Type::F16;
        accumulators(&fc, halves, m, |reg, high, lane, at| {
            let word = lane::read(cx, reg, wide)[lane];
            d[at] = if halves { word >> (16 * u32::from(high)) & 0xffff } else { word };
        });
        product.run(&cx.grid.preset, [m, n, k], &a, &b, &mut d);
        let mut out = vec![[0u64; LANES]; fd.len()];
        let mut index = 0;
        let mut last = None;
        accumulators(&fd, halves, m, |reg, high, lane, at| {
            if last.is_some_and(|r| r != reg) {
                index += 1;
            }
            last = Some(reg);
            out[index][lane] |= d[at] << if halves { 16 * u32::from(high) } else { 0 };
        });
        for (&reg, value) in fd.iter().zip(out) {
            lane::write(cx, reg, wide, value);
        }
        Step::Next
    });
    Ok(())
}

/// mma.sp: A sparse, its metadata in the fifth operand, the selector of lanes in the sixth.
fn sparse(l: &mut Lower<'_>, ins: &Instruction, shape: Shape, types: [Type; 4]) -> Lowered {
    let Shape { m, n, k } = shape;
    let [d, a, b, _] = types;
    let (k, n) = (usize::from(k), usize::from(n));
    let dense = MmaShape { m: m.into(), n, k: k / 2 };
    let product = Product::new(ins, Instr::MmaSync, dense, types);
    let (Some(product), 6) = (product, ins.operands.len()) else {
        return unsupported(mnemonic(ins));
    };
    let bits = product.bits.min(32);
    let selector = l.literal(&ins.operands[5]).unwrap_or(0);
    if !Metadata::selector_fits(bits, k, selector) {
        return unsupported(format!("{} with the sparsity selector {selector}", mnemonic(ins)));
    }
    let selector = selector as u32;
    let fa = fragment(l, &ins.operands[1], Type::B32, true)?;
    let fb = fragment(l, &ins.operands[2], Type::B32, true)?;
    let fc = fragment(l, &ins.operands[3], Type::B32, true)?;
    let fd = fragment(l, &ins.operands[0], Type::B32, false)?;
    let meta = l.src(&ins.operands[4], Type::B32)?;
    // So many registers a lane; an element of TF32 takes 32 bits.
    let registers = |elements: usize| elements * bits as usize / (LANES * 32);
    if (fa.len(), fb.len()) != (registers(8 * k), registers(n * k)) {
        return unsupported(format!("{} with so many registers", mnemonic(ins)));
    }
    let name = format!("mma.sp.m{m}n{n}k{k}.{}.{}.{}", d.text(), a.text(), b.text());
    // The products that are made: half of the dense ones.
    l.tensor_core(name, (usize::from(m) * n * k) as u64);
    l.emit_action(Class::Mma, move |cx| {
        if let Some(step) = cx.converge(!0) {
            return step;
        }
        let mut a = vec![0; 16 * k / 2];
        let mut b = vec![0; n * k];
        spread(cx, &fa, bits, true, k / 2, &mut a);
        spread(cx, &fb, bits, false, k, &mut b);
        let narrow = |v: Vec<u64>| -> Vec<u32> { v.into_iter().map(|x| x as u32).collect() };
        let (a, b) = (narrow(a), narrow(b));
        let mut d = vec![0; 16 * n];
        let halves = [types[3], types[0]].map(|ty| ty == Type::F16);
        accumulators(&fc, halves[0], 16, |reg, high, lane, at| {
            let word = lane::read(cx, reg, false)[lane] as u32;
            d[at] = if halves[0] { word >> (16 * u32::from(high)) & 0xffff } else { word };
        });
        let metadata = Metadata { words: u32::read(cx, meta), selector, bits, k };
        metadata.multiply(cx, &product, n, [&a, &b], &mut d);
        let mut out = vec![[0u32; LANES]; fd.len()];
        accumulators(&fd, halves[1], 16, |reg, high, lane, at| {
            let index = fd.iter().position(|r| *r == reg).expect("one of them");
            out[index][lane] |= d[at] << if halves[1] { 16 * u32::from(high) } else { 0 };
        });
        for (&reg, value) in fd.iter().zip(out) {
            u32::write(cx, reg, value);
        }
        Step::Next
    });
    Ok(())
}

/// Fragment registers of A (`two_rows`) or B to a row-major matrix of rows (or columns) by k.
pub fn spread(cx: &Cx<'_>, regs: &[Reg], bits: u32, two_rows: bool, k: usize, out: &mut [u64]) {
    let wide = bits == 64;
    let e = if wide { 1 } else { (32 / bits) as usize };
    let mask = if bits >= 32 { u64::MAX } else { (1 << bits) - 1 };
    for (r, &reg) in regs.iter().enumerate() {
        let value = lane::read(cx, reg, wide);
        let (row8, range) = if two_rows { (r % 2, r / 2) } else { (0, r) };
        for (lane, word) in value.into_iter().enumerate() {
            let row = lane / 4 + 8 * row8;
            let start = range * 4 * e + lane % 4 * e;
            for i in 0..e {
                out[row * k + start + i] = word >> (i as u32 * bits) & mask;
            }
        }
    }
}

/// Calls `f(register, high half, lane, index in m x 8)` for every element of C or D.
pub fn accumulators(
    regs: &[Reg],
    halves: bool,
    m: usize,
    mut f: impl FnMut(Reg, bool, usize, usize),
) {
    for row8 in 0..m / 8 {
        for pair in 0..2 {
            let reg = if halves { regs[row8] } else { regs[2 * row8 + pair] };
            for lane in 0..LANES {
                let at = (lane / 4 + 8 * row8) * 8 + 2 * (lane % 4) + pair;
                f(reg, pair == 1, lane, at);
            }
        }
    }
}
