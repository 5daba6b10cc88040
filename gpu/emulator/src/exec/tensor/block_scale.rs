//! mma with block scales (`kind::mxf8f6f4`, `kind::mxf4`, `kind::mxf4nvf4` of sm_120): a scale for
//! each block of K, a row of A and a column of B (PTX ISA, "Block Scaling for mma.sync").
//!
//! Lanes 2 i and 2 i + 1 of a quad hold the scales of rows g and g + 8, i being the thread selector
//! of A; lane i those of column g, i being B's. The byte selector is the first byte that counts,
//! and the following ones belong to the following blocks. CUTLASS's layouts of scale factors say
//! the same.

use fathom_numerics::formats::Format;
use fathom_numerics::mma::{Arch, BlockScale, Instr, Mma, MmaShape, Types};
use fathom_ptx::ast::{Instruction, Operand};
use fathom_ptx::types::{Flag, Shape, Type};
use ndarray::{Array2, ArrayView2};

use super::mma::{accumulators, fragment, spread};
use crate::error::Ub;
use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::cx::Cx;
use crate::machine::lane::Lane;
use crate::machine::op::{Class, Step};
use crate::machine::product::format;
use crate::machine::registers::{LANES, Reg};

/// A register of scales, and the registers of its selectors: byte and thread.
#[derive(Clone, Copy)]
struct Scales {
    data: Reg,
    byte: Reg,
    thread: Reg,
}

fn scales(l: &mut Lower<'_>, ins: &Instruction, data: usize) -> Lowered<Scales> {
    let word = match &ins.operands[data] {
        Operand::Vector(list) if list.len() == 1 => l.src(&list[0], Type::B32)?,
        one => l.src(one, Type::B32)?,
    };
    let Operand::Vector(list) = &ins.operands[data + 1] else {
        return unsupported(mnemonic(ins));
    };
    let [byte, thread] = &list[..] else { return unsupported(mnemonic(ins)) };
    Ok(Scales { data: word, byte: l.src(byte, Type::U16)?, thread: l.src(thread, Type::U16)? })
}

impl Scales {
    /// The selectors, which all lanes share; a fault where they select nothing.
    fn selected(self, cx: &mut Cx<'_>, blocks: usize, threads: u32) -> Result<[u32; 2], Step> {
        let lane = cx.leader();
        let [byte, thread] = [self.byte, self.thread].map(|r| u32::read(cx, r)[lane] & 0xffff);
        let whole = (byte as usize).is_multiple_of(blocks);
        if !whole || byte as usize + blocks > 4 || thread >= threads {
            let message = format!(
                "scale selectors {{{byte}, {thread}}}: expected a multiple of {blocks} below 4 and \
                 a number below {threads}"
            );
            return Err(cx.fail(Ub::BadDescriptor, Some(lane), None, message));
        }
        Ok([byte, thread])
    }
}

/// Lowers an mma with block scales.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction, shape: Shape) -> Lowered {
    let types: Vec<Type> = ins.mods.types().collect();
    let ([d, a, b, c, scale], 8) = (&types[..], ins.operands.len()) else {
        return unsupported(mnemonic(ins));
    };
    let Shape { m, n, k } = shape;
    let (n, k) = (usize::from(n), usize::from(k));
    let bytes = ins.mods.has(Flag::KindMxf8f6f4);
    let blocks = match () {
        () if bytes => 1,
        () if ins.mods.has(Flag::ScaleVec4X) => 4,
        () => 2,
    };
    let model = (|| {
        let of = |ty: &Type| format(*ty);
        let types = Types { a: of(a)?, b: of(b)?, c: of(c)?, d: of(d)? };
        let scale = match scale {
            Type::Ue8m0 => Format::UE8M0,
            Type::Ue4m3 => Format::UE4M3,
            _ => return None,
        };
        let size = MmaShape { m: m.into(), n, k };
        let scale = BlockScale { format: scale, block: k / blocks };
        Mma::with_types(Arch::Sm120, Instr::MmaBlockScale, size, types, Some(scale))
    })();
    let Some(model) = model else { return unsupported(mnemonic(ins)) };
    let bits = if bytes { 8 } else { 4 };
    let padded = [*a, *b].map(|ty| bytes && ty == Type::E2m1);
    let fa = fragment(l, &ins.operands[1], Type::B32, true)?;
    let fb = fragment(l, &ins.operands[2], Type::B32, true)?;
    let fc = fragment(l, &ins.operands[3], Type::B32, true)?;
    let fd = fragment(l, &ins.operands[0], Type::B32, false)?;
    let (of_a, of_b) = (scales(l, ins, 4)?, scales(l, ins, 6)?);
    let name = format!("mma.block_scale.m{m}n{n}k{k}.{}.{}", a.text(), b.text());
    l.tensor_core(name, (2 * usize::from(m) * n * k) as u64);
    l.emit_action(Class::Mma, move |cx| {
        if let Some(step) = cx.converge(!0) {
            return step;
        }
        let selected = (|| Ok((of_a.selected(cx, blocks, 2)?, of_b.selected(cx, blocks, 4)?)))();
        let ([byte_a, thread_a], [byte_b, thread_b]) = match selected {
            Ok(selected) => selected,
            Err(step) => return step,
        };
        let mut a = vec![0; 16 * k];
        let mut b = vec![0; n * k];
        spread(cx, &fa, bits, true, k, &mut a);
        spread(cx, &fb, bits, false, k, &mut b);
        let code = |padded: bool| move |x: u64| if padded { x as u32 >> 2 & 0xf } else { x as u32 };
        let a: Vec<u32> = a.into_iter().map(code(padded[0])).collect();
        let b: Vec<u32> = b.into_iter().map(code(padded[1])).collect();
        let (words_a, words_b) = (u32::read(cx, of_a.data), u32::read(cx, of_b.data));
        let scale_a = Array2::from_shape_fn((16, blocks), |(row, block)| {
            let lane = 4 * (row % 8) + 2 * thread_a as usize + row / 8;
            words_a[lane] >> (8 * (byte_a as usize + block)) & 0xff
        });
        let scale_b = Array2::from_shape_fn((blocks, n), |(block, column)| {
            let lane = 4 * column + thread_b as usize;
            words_b[lane] >> (8 * (byte_b as usize + block)) & 0xff
        });
        let mut c = vec![0; 16 * n];
        accumulators(&fc, false, 16, |reg, _, lane, at| c[at] = u32::read(cx, reg)[lane]);
        let view =
            |data, rows, columns| ArrayView2::from_shape((rows, columns), data).expect("fits");
        let (a, b, c) = (view(&a, 16, k), view(&b, n, k), view(&c, 16, n));
        let d = model.mma_scaled(a, b.t(), scale_a.view(), scale_b.view(), c);
        let mut out = vec![[0u32; LANES]; fd.len()];
        let d = d.as_slice().expect("row-major");
        accumulators(&fd, false, 16, |reg, _, lane, at| {
            let index = fd.iter().position(|r| *r == reg).expect("one of them");
            out[index][lane] = d[at];
        });
        for (&reg, value) in fd.iter().zip(out) {
            u32::write(cx, reg, value);
        }
        Step::Next
    });
    Ok(())
}
