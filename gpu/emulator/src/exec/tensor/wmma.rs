//! wmma: matrix products of a warp whose fragments have no published layout (PTX ISA, "Warp Level
//! Matrix Instructions: wmma"); `nvcuda::wmma` of CUDA C++ emits them.
//!
//! A program may only load, store, multiply, and treat all elements of a fragment alike, so the
//! layout is ours: lane l holds the elements l n .. l n + n of the row-major matrix, n a lane; the
//! f16 operands that have more room than elements hold them more than once. The arithmetic is that
//! of the mma instructions to which ptxas lowers them: the same depth, the same types.

use fathom_numerics::mma::{Instr, MmaShape};
use fathom_ptx::ast::{Instruction, Operand};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Flag, Layout, Rounding, Type};

use super::mma::fragment;
use crate::exec::memory::load_store::space_of;
use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::access::{Where, Words};
use crate::machine::cx::Cx;
use crate::machine::lane::{self, Lane};
use crate::machine::op::{Class, Step};
use crate::machine::product::Product;
use crate::machine::registers::{LANES, Reg};

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    match ins.op {
        Opcode::WmmaLoad => load(l, ins),
        Opcode::WmmaStore => store(l, ins),
        _ => multiply(l, ins),
    }
}

/// How the registers of a fragment hold a matrix.
#[derive(Clone, Debug)]
struct Fragment {
    rows: usize,
    columns: usize,
    bits: u32,
    regs: Vec<Reg>,
}

impl Fragment {
    fn register_bits(&self) -> u32 {
        if self.bits == 64 { 64 } else { 32 }
    }

    /// Elements of a lane.
    fn count(&self) -> usize {
        self.regs.len() * (self.register_bits() / self.bits) as usize
    }

    /// Row-major number of element `i` of a lane.
    fn element(&self, lane: usize, i: usize) -> usize {
        (lane * self.count() + i) % (self.rows * self.columns)
    }

    /// Register, and shift in it, of element `i` of a lane.
    fn place(&self, i: usize) -> (usize, u32) {
        let per = (self.register_bits() / self.bits) as usize;
        (i / per, (i % per) as u32 * self.bits)
    }

    fn mask(&self) -> u64 {
        if self.bits == 64 { u64::MAX } else { (1 << self.bits) - 1 }
    }

    /// The codes of the matrix, row-major, gathered from the registers of all lanes.
    fn read(&self, cx: &Cx<'_>) -> Vec<u64> {
        let mut out = vec![0; self.rows * self.columns];
        let wide = self.bits == 64;
        let words: Vec<[u64; LANES]> = self.regs.iter().map(|&r| lane::read(cx, r, wide)).collect();
        for lane in 0..LANES {
            for i in 0..self.count() {
                let (reg, shift) = self.place(i);
                out[self.element(lane, i)] = words[reg][lane] >> shift & self.mask();
            }
        }
        out
    }

    /// Writes the matrix to the registers.
    fn write(&self, cx: &mut Cx<'_>, matrix: &[u64]) {
        let mut words = vec![[0u64; LANES]; self.regs.len()];
        for lane in 0..LANES {
            for i in 0..self.count() {
                let (reg, shift) = self.place(i);
                words[reg][lane] |= (matrix[self.element(lane, i)] & self.mask()) << shift;
            }
        }
        for (&reg, value) in self.regs.iter().zip(words) {
            lane::write(cx, reg, self.bits == 64, value);
        }
    }
}

/// Rows and columns of a matrix of the instruction: `a` is m x k, `b` k x n, `c` and `d` m x n.
fn shape(ins: &Instruction, which: Flag) -> Option<(usize, usize)> {
    let s = ins.mods.shape()?;
    let (m, n, k) = (usize::from(s.m), usize::from(s.n), usize::from(s.k));
    Some(match which {
        Flag::MatrixA => (m, k),
        Flag::MatrixB => (k, n),
        _ => (m, n),
    })
}

/// Where a matrix lies in memory.
#[derive(Clone, Copy)]
struct Memory {
    space: Where,
    addr: crate::machine::access::Addr,
    /// Elements from one row (or column) to the next.
    stride: Option<Reg>,
    columns_first: bool,
}

impl Memory {
    /// Bit offsets of all elements, row-major, and the address they count from.
    fn places(self, cx: &Cx<'_>, f: &Fragment) -> (u64, Vec<u64>) {
        let dense = if self.columns_first { f.rows } else { f.columns } as u64;
        let leader = cx.leader();
        let stride = self.stride.map_or(dense, |r| u64::from(u32::read(cx, r)[leader]));
        let mut out = Vec::with_capacity(f.rows * f.columns);
        for row in 0..f.rows as u64 {
            for column in 0..f.columns as u64 {
                let (major, minor) = if self.columns_first { (column, row) } else { (row, column) };
                out.push((major * stride + minor) * u64::from(f.bits));
            }
        }
        (cx.address(self.addr), out)
    }
}

fn memory(l: &mut Lower<'_>, ins: &Instruction, at: usize) -> Lowered<Memory> {
    let space = space_of(l, ins.mods.space(), &ins.operands[at]);
    let addr = l.addr(&ins.operands[at])?;
    let stride = match ins.operands.get(2) {
        Some(Operand::None) | None => None,
        Some(o) => Some(l.src(o, Type::U32)?),
    };
    let columns_first = ins.mods.layouts().next() == Some(Layout::Col);
    Ok(Memory { space, addr, stride, columns_first })
}

fn parts(l: &mut Lower<'_>, ins: &Instruction, at: usize, load: bool) -> Lowered<Fragment> {
    let which = ins
        .mods
        .flags()
        .find(|f| matches!(f, Flag::MatrixA | Flag::MatrixB | Flag::MatrixC | Flag::MatrixD))
        .unwrap_or(Flag::MatrixC);
    let (Some(ty), Some((rows, columns))) = (ins.mods.types().last(), shape(ins, which)) else {
        return unsupported(mnemonic(ins));
    };
    let register = if ty.bits() == 64 { Type::B64 } else { Type::B32 };
    let regs = fragment(l, &ins.operands[at], register, !load)?;
    let f = Fragment { rows, columns, bits: ty.bits(), regs };
    let (room, elements) = (f.count() * LANES, rows * columns);
    if room < elements || room % elements != 0 {
        return unsupported(format!("{} with {} registers", mnemonic(ins), f.regs.len()));
    }
    Ok(f)
}

fn load(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let fragment = parts(l, ins, 0, true)?;
    let memory = memory(l, ins, 1)?;
    l.emit_action(Class::Ldmatrix, move |cx| {
        if let Some(step) = cx.converge(!0) {
            return step;
        }
        let (base, places) = memory.places(cx, &fragment);
        let unit = fragment.bits.max(8) / 8;
        let mut matrix = vec![0; places.len()];
        // As many elements at a time as there are lanes.
        for (part, out) in places.chunks(LANES).zip(matrix.chunks_mut(LANES)) {
            let addresses = std::array::from_fn(|i| base + part[i.min(part.len() - 1)] / 8);
            cx.within(memory.addr, &addresses, u64::from(unit));
            let mut words: Words = [[0; LANES]; 4];
            if let Err(step) = cx.load(memory.space, &addresses, unit, &mut words) {
                return step;
            }
            for (i, value) in out.iter_mut().enumerate() {
                let word = u64::from(words[1][i]) << 32 | u64::from(words[0][i]);
                *value = word >> (part[i] % 8) & fragment.mask();
            }
        }
        fragment.write(cx, &matrix);
        Step::Next
    });
    Ok(())
}

fn store(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let fragment = parts(l, ins, 1, false)?;
    if fragment.bits < 16 {
        return unsupported(mnemonic(ins));
    }
    let memory = memory(l, ins, 0)?;
    l.emit_action(Class::Ldmatrix, move |cx| {
        if let Some(step) = cx.converge(!0) {
            return step;
        }
        let (base, places) = memory.places(cx, &fragment);
        let matrix = fragment.read(cx);
        let unit = fragment.bits / 8;
        for (part, values) in places.chunks(LANES).zip(matrix.chunks(LANES)) {
            let addresses = std::array::from_fn(|i| base + part[i.min(part.len() - 1)] / 8);
            cx.within(memory.addr, &addresses, u64::from(unit));
            let mut words: Words = [[0; LANES]; 4];
            for (i, &value) in values.iter().enumerate() {
                words[0][i] = value as u32;
                words[1][i] = (value >> 32) as u32;
            }
            if let Err(step) = cx.store(memory.space, &addresses, unit, &words) {
                return step;
            }
        }
        Step::Next
    });
    Ok(())
}

/// Types of A and B, and of D and C; the f16 form names only the latter.
fn types(ins: &Instruction) -> Option<[Type; 4]> {
    let list: Vec<Type> = ins.mods.types().collect();
    match list[..] {
        [d, c] => Some([d, Type::F16, Type::F16, c]),
        [d, a, b, c] => Some([d, a, b, c]),
        _ => None,
    }
}

fn multiply(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let (Some([d, a, b, c]), Some(s)) = (types(ins), ins.mods.shape()) else {
        return unsupported(mnemonic(ins));
    };
    let float = d.is_float();
    if float && ins.mods.has(Flag::Satfinite)
        || ins.mods.rounding().is_some_and(|r| r != Rounding::Rn)
    {
        return unsupported(mnemonic(ins));
    }
    // C narrower or wider than D is taken through the type of D's accumulator.
    let size = MmaShape { m: 16, n: 8, k: s.k.into() };
    let Some(product) = Product::new(ins, Instr::MmaSync, size, [d, a, b, c]) else {
        return unsupported(mnemonic(ins));
    };
    let side = |l: &mut Lower<'_>, at: usize, which: Flag, ty: Type, source: bool| {
        let (rows, columns) = shape(ins, which).expect("it has a shape");
        let register = if ty.bits() == 64 { Type::B64 } else { Type::B32 };
        let regs = fragment(l, &ins.operands[at], register, source)?;
        Ok(Fragment { rows, columns, bits: ty.bits(), regs })
    };
    let fa = side(l, 1, Flag::MatrixA, a, true)?;
    let fb = side(l, 2, Flag::MatrixB, b, true)?;
    let fc = side(l, 3, Flag::MatrixC, c, true)?;
    let fd = side(l, 0, Flag::MatrixD, d, false)?;
    let (m, n, k) = (usize::from(s.m), usize::from(s.n), usize::from(s.k));
    let name = format!("wmma.m{m}n{n}k{k}.{}.{}.{}", d.text(), a.text(), b.text());
    l.tensor_core(name, 2 * (m * n * k) as u64);
    l.emit_action(Class::Mma, move |cx| {
        if let Some(step) = cx.converge(!0) {
            return step;
        }
        let (a, b, mut c) = (fa.read(cx), fb.read(cx), fc.read(cx));
        // The products want B by columns.
        let by_column: Vec<u64> =
            (0..n).flat_map(|j| (0..k).map(move |p| (j, p))).map(|(j, p)| b[p * n + j]).collect();
        product.run(&cx.grid.preset, [m, n, k], &a, &by_column, &mut c);
        fd.write(cx, &c);
        Step::Next
    });
    Ok(())
}
