//! wgmma: matrix products of a warpgroup, operands in shared memory (PTX ISA, "Asynchronous
//! Warpgroup Level Matrix Multiply-Accumulate Instructions").
//!
//! Each of the four warps computes its 16 rows, when it commits the group that the instruction
//! belongs to or before something that touches the registers; results are there at once then, and
//! what was not waited for only the sanitizer knows. The warps begin a group together, and none
//! leaves `wait_group` before all have committed what it waits for. So a warp may overwrite the
//! operands behind its wait without asking its siblings: the PTX ISA does not promise that, and
//! the pipelines of CUTLASS, FlashAttention-3 and FlashMLA rest on it.

use std::cell::Cell;

use fathom_numerics::gemm::tensor_core::TensorCore;
use fathom_numerics::mma::{Instr, MmaShape};
use fathom_ptx::ast::{Instruction, Operand};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Shape, Type};

use ndarray::{Array2, ArrayViewMut2};

use super::mma::{fragment, spread};
use super::operand::{Descriptor, OperandElement, Part, packed_b, side_by_side};
use super::sparse::Metadata;
use crate::error::Ub;
use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::alu;
use crate::machine::cx::{Cx, Grid};
use crate::machine::lane::Lane;
use crate::machine::op::{Class, Step};
use crate::machine::product::Product;
use crate::machine::registers::{LANES, Reg};
use crate::machine::warp::Wait;
use crate::machine::wgmma::{Issued, OperandA, Operation};

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    match ins.op {
        Opcode::WgmmaMmaAsync | Opcode::WgmmaMmaAsyncSp => mma_async(l, ins),
        Opcode::WgmmaFence | Opcode::WgmmaCommitGroup | Opcode::WgmmaWaitGroup => {
            let left = ins.operands.first().and_then(|o| l.literal(o));
            let op = ins.op;
            l.emit_action(Class::WgmmaSync, move |cx| {
                if let Some(step) = cx.converge(!0) {
                    return step;
                }
                let left = left.unwrap_or(0);
                if op == Opcode::WgmmaWaitGroup
                    && let Some(step) = meet(cx, Meeting::Wait { left })
                {
                    return step;
                }
                cx.wgmma_sync(op, left as usize);
                if op == Opcode::WgmmaCommitGroup {
                    commit(cx);
                }
                if op == Opcode::WgmmaFence || cx.w.issued.is_empty() {
                    return Step::Next;
                }
                // The other warps take their turns while B's packed form is in the cache.
                compute(cx).err().unwrap_or(Step::Yield)
            });
            Ok(())
        }
        _ => unsupported(mnemonic(ins)),
    }
}

fn mma_async(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let types: Vec<Type> = ins.mods.types().collect();
    let ([d, a, b], Some(Shape { m, n, k })) = (&types[..], ins.mods.shape()) else {
        return unsupported(mnemonic(ins));
    };
    // Of a sparse A half of the columns are stored; metadata and selector stand behind B.
    let is_sparse = ins.op == Opcode::WgmmaMmaAsyncSp;
    let (stored, after_b) = if is_sparse { (k / 2, 5) } else { (k, 3) };
    let size = MmaShape { m: m.into(), n: n.into(), k: stored.into() };
    let Some(product) = Product::new(ins, Instr::Wgmma, size, [*d, *a, *b, *d]) else {
        return unsupported(mnemonic(ins));
    };
    let from_registers = matches!(ins.operands[1], Operand::Vector(_));
    let source = if from_registers {
        let slots = fragment(l, &ins.operands[1], Type::B32, true)?;
        OperandA::Registers { slots, names: l.names(&ins.operands[1]) }
    } else {
        OperandA::Shared(l.src(&ins.operands[1], Type::B64)?)
    };
    let b_desc = l.src(&ins.operands[2], Type::B64)?;
    let mut sparse = None;
    if is_sparse {
        let selector = l.literal(&ins.operands[4]).unwrap_or(0);
        if !Metadata::selector_fits(product.bits, k.into(), selector) {
            let what = format!("{} with the sparsity selector {selector}", mnemonic(ins));
            return unsupported(what);
        }
        sparse = Some((l.src(&ins.operands[3], Type::B32)?, selector as u32));
    }
    let (scale_d, negated) = match ins.operands.get(after_b) {
        Some(o) => l.pred(o)?,
        None => (crate::machine::cx::PRED_TRUE, false),
    };
    // Immediates: signs of A and B (floats), then transposes of what lies in shared memory.
    let imm = |l: &Lower<'_>, i: usize| {
        ins.operands.get(after_b + 1 + i).and_then(|o| l.literal(o)).map(|v| v as i64)
    };
    let signs = [imm(l, 0) == Some(-1), imm(l, 1) == Some(-1)];
    let integer = *d == Type::S32;
    let (trans_a, trans_b) = if integer {
        (false, false)
    } else if from_registers {
        (false, imm(l, 2) == Some(1))
    } else {
        (imm(l, 2) == Some(1), imm(l, 3) == Some(1))
    };
    let regs = fragment(l, &ins.operands[0], Type::B32, false)?;
    let kind = if is_sparse { "wgmma.sp" } else { "wgmma" };
    let name = format!("{kind}.m{m}n{n}k{k}.{}.{}.{}", d.text(), a.text(), b.text());
    // Counted a warp: a quarter of the warpgroup's work; of a sparse A what is stored.
    l.tensor_core(name, 2 * u64::from(m / 4) * u64::from(n) * u64::from(stored));
    let (n, k) = (usize::from(n), usize::from(stored));
    let number = l.wgmmas.len();
    l.wgmmas.push(Operation {
        product,
        source,
        b_desc,
        scale_d: (scale_d, negated),
        signs: if integer { [false; 2] } else { signs },
        transposed: [trans_a, trans_b],
        regs,
        names: l.names(&ins.operands[0]),
        n,
        k,
        sparse,
    });
    l.emit_action(Class::Wgmma, move |cx| {
        if let Some(step) = cx.converge(!0).or_else(|| meet(cx, Meeting::Product)) {
            return step;
        }
        let issued = Issued::issue(cx, number);
        if cx.cluster.sanitizer.is_some()
            && let Err(step) = issued.note(cx)
        {
            return step;
        }
        cx.w.issued.push(issued);
        Step::Next
    });
    Ok(())
}

/// Computes what is issued and not committed, before an instruction that touches its registers.
pub fn finish(l: &mut Lower<'_>) {
    l.emit_action(Class::WgmmaSync, |cx| compute(cx).err().unwrap_or(Step::Next));
}

/// Where the warps of a warpgroup meet.
#[derive(Clone, Copy)]
enum Meeting {
    Product,
    Wait { left: u64 },
}

/// Waits until the other warps of the warpgroup have come as far. `None`: they have, or never
/// will, which is reported.
fn meet(cx: &mut Cx<'_>, place: Meeting) -> Option<Step> {
    let (group, own) = (cx.w.index as usize / 4, cx.w.index as usize % 4);
    let cta = &mut cx.cluster.ctas[cx.cta];
    let state = &mut cta.warpgroups[group];
    let committed = state.committed[own];
    let (all, needed) = match place {
        Meeting::Product => {
            *cx.changes += u64::from(state.begun[own] <= committed);
            state.begun[own] = committed + 1;
            (state.begun, committed + 1)
        }
        Meeting::Wait { left } => (state.committed, committed.saturating_sub(left)),
    };
    let siblings = cta.warps.iter().skip(4 * group).take(4).enumerate();
    let missing = siblings
        .filter(|(i, warp)| warp.is_some() && all[*i] < needed)
        .fold(0, |mask, (i, _)| mask | 1 << i);
    if missing == 0 {
        cx.w.groups[cx.at].wait = Wait::Ready;
        return None;
    }
    if !cx.stalled {
        return Some(cx.block(Wait::Warpgroup { missing }));
    }
    let message = format!("warps {missing:#06b} of the warpgroup do not take part in this wgmma");
    cx.report(Ub::Divergence, Some(cx.leader()), None, message);
    None
}

/// The warp's group of wgmmas ends.
fn commit(cx: &mut Cx<'_>) {
    let (group, own) = (cx.w.index as usize / 4, cx.w.index as usize % 4);
    let state = &mut cx.cluster.ctas[cx.cta].warpgroups[group];
    state.committed[own] += 1;
    state.begun[own] = state.committed[own];
    *cx.changes += 1;
}

impl Issued {
    fn issue(cx: &Cx<'_>, number: usize) -> Issued {
        let operation = &cx.grid.code.wgmmas[number];
        let leader = cx.leader();
        let (scale, negated) = operation.scale_d;
        let scale = cx.pred(scale) ^ if negated { !0 } else { 0 };
        Issued {
            number,
            pc: cx.pc,
            mask: cx.mask,
            base: cx.base,
            a_desc: match operation.source {
                OperandA::Shared(reg) => u64::read(cx, reg)[leader],
                OperandA::Registers { .. } => 0,
            },
            b_desc: u64::read(cx, operation.b_desc)[leader],
            metadata: operation.sparse.map(|(reg, _)| Box::new(u32::read(cx, reg))),
            keep: scale >> leader & 1 != 0,
        }
    }

    fn operation<'a>(&self, grid: &'a Grid) -> &'a Operation {
        &grid.code.wgmmas[self.number]
    }

    /// Tells the sanitizer what the instruction reads and writes, when it is executed.
    fn note(&self, cx: &mut Cx<'_>) -> Result<(), Step> {
        let grid = cx.grid;
        let o = self.operation(grid);
        cx.wgmma_needs_fence(if self.keep { &o.names } else { &[] });
        match &o.source {
            OperandA::Registers { names, .. } => {
                cx.wgmma_needs_fence(names);
                cx.wgmma_reads(names);
            }
            OperandA::Shared(_) => self.part_a(cx).note_reads(cx)?,
        }
        let b = self.part_b(grid);
        if o.sparse.is_some() {
            b.halves().iter().try_for_each(|half| half.note_reads(cx))?;
        } else {
            b.note_reads(cx)?;
        }
        cx.wgmma_accumulates(&o.names);
        Ok(())
    }

    /// Whether this one does nothing but go on adding to the accumulator of `before`.
    fn continues(&self, before: &Issued, grid: &Grid) -> bool {
        let (x, y) = (self.operation(grid), before.operation(grid));
        let arithmetic = x.product.arithmetic(&grid.preset);
        self.keep
            && x.sparse.is_none()
            && y.sparse.is_none()
            && (self.base, self.mask) == (before.base, before.mask)
            && (x.n, x.k, &x.regs) == (y.n, y.k, &y.regs)
            && arithmetic.is_some()
            && arithmetic == y.product.arithmetic(&grid.preset)
    }

    /// This warp's 16 rows of A in shared memory.
    fn part_a(&self, cx: &Cx<'_>) -> Part {
        let o = self.operation(cx.grid);
        Part {
            descriptor: Descriptor::new(self.a_desc),
            transposed: o.transposed[0],
            negated: o.signs[0],
            bits: o.product.bits,
            first: 16 * u64::from(cx.w.index % 4),
            rows: 16,
            k: o.k,
        }
    }

    fn part_b(&self, grid: &Grid) -> Part {
        let o = self.operation(grid);
        Part {
            descriptor: Descriptor::new(self.b_desc),
            transposed: o.transposed[1],
            negated: o.signs[1],
            bits: o.product.bits,
            first: 0,
            rows: o.n,
            k: if o.sparse.is_some() { 2 * o.k } else { o.k },
        }
    }
}

/// Most wgmmas that are computed as one.
const MOST_CHAINED: usize = 16;

/// Computes what the warp has issued: wgmmas that add to the same accumulator one after another as
/// one product along K, which is what the kernels are fastest at.
fn compute(cx: &mut Cx<'_>) -> Result<(), Step> {
    let mut issued = std::mem::take(&mut cx.w.issued);
    let (pc, mask, base) = (cx.pc, cx.mask, cx.base);
    let grid = cx.grid;
    for chain in issued.chunk_by(|before, next| next.continues(before, grid)) {
        for chain in chain.chunks(MOST_CHAINED) {
            (cx.pc, cx.mask, cx.base) = (chain[0].pc, chain[0].mask, chain[0].base);
            multiply(cx, chain)?;
        }
    }
    (cx.pc, cx.mask, cx.base) = (pc, mask, base);
    issued.clear();
    cx.w.issued = issued;
    Ok(())
}

thread_local! {
    /// Where a product is computed, used again and again to stay in the cache.
    static PRODUCT: Cell<Vec<u64>> = const { Cell::new(Vec::new()) };
}

/// One product of a warp: `chain` side by side along K.
fn multiply(cx: &mut Cx<'_>, chain: &[Issued]) -> Result<(), Step> {
    let grid = cx.grid;
    let o = chain[0].operation(grid);
    let (n, k) = (o.n, o.k * chain.len());
    let halves = o.product.accumulator == Type::F16;
    let mut d = PRODUCT.take();
    d.resize(8 * n, 0);
    if chain[0].keep {
        alu::wide(
            grid.vectors,
            #[inline(always)]
            || accumulators(cx, &o.regs, halves, n, &mut d),
        );
    }
    let parts: Vec<Part> = chain.iter().map(|c| c.part_b(grid)).collect();
    match o.product.core(&grid.preset) {
        _ if o.sparse.is_some() => multiply_sparse(cx, &chain[0], &parts[0], &mut d)?,
        Some(core) => {
            let singles: &mut [f32] = bytemuck::cast_slice_mut(&mut d);
            let out = ArrayViewMut2::from_shape((16, n), singles).expect("16 x n");
            match o.product.bits {
                8 => multiply_on::<u8>(cx, &core, chain, &parts, out)?,
                _ => multiply_on::<u32>(cx, &core, chain, &parts, out)?,
            }
        }
        None => {
            if !chain[0].keep {
                d.fill(0);
            }
            let a = tile_a::<u32>(cx, chain)?;
            let b = side_by_side::<u32>(cx, &parts)?;
            let words = bytemuck::cast_slice_mut(&mut d);
            o.product.run32(&grid.preset, [16, n, k], &a, &b, words);
        }
    }
    alu::wide(
        grid.vectors,
        #[inline(always)]
        || store_accumulators(cx, &o.regs, halves, n, &d),
    );
    PRODUCT.set(d);
    Ok(())
}

/// The product of a sparse A.
fn multiply_sparse(cx: &mut Cx<'_>, issued: &Issued, b: &Part, d: &mut [u64]) -> Result<(), Step> {
    let grid = cx.grid;
    let o = issued.operation(grid);
    if !issued.keep {
        d.fill(0);
    }
    let (Some((_, selector)), Some(words)) = (o.sparse, &issued.metadata) else {
        unreachable!("a sparse wgmma has metadata");
    };
    let a = tile_a::<u32>(cx, std::slice::from_ref(issued))?;
    let b = side_by_side::<u32>(cx, &b.halves())?;
    let metadata = Metadata { words: **words, selector, bits: o.product.bits, k: 2 * o.k };
    metadata.multiply(cx, &o.product, o.n, [&a, &b], bytemuck::cast_slice_mut(d));
    Ok(())
}

/// The product on the packing kernels.
fn multiply_on<T: OperandElement>(
    cx: &mut Cx<'_>,
    core: &TensorCore,
    chain: &[Issued],
    parts: &[Part],
    out: ArrayViewMut2<'_, f32>,
) -> Result<(), Step> {
    let a = tile_a::<T>(cx, chain)?;
    let a = core.pack_a(Array2::from_shape_vec((16, a.len() / 16), a).expect("16 x k"));
    let key = chain.iter().map(|c| (c.number, c.b_desc)).collect();
    let b = packed_b::<T>(cx, core, key, parts)?;
    core.multiply_add(&a, &b, out, chain[0].keep);
    Ok(())
}

/// This warp's 16 rows of A, `chain` side by side along K.
fn tile_a<T: OperandElement>(cx: &mut Cx<'_>, chain: &[Issued]) -> Result<Vec<T>, Step> {
    let grid = cx.grid;
    let shared = |c: &Issued| matches!(c.operation(grid).source, OperandA::Shared(_));
    if chain.iter().all(shared) {
        let parts: Vec<Part> = chain.iter().map(|c| c.part_a(cx)).collect();
        return side_by_side(cx, &parts);
    }
    let k = chain[0].operation(grid).k;
    let stride = k * chain.len();
    let mut tile = vec![T::default(); 16 * stride];
    for (i, issued) in chain.iter().enumerate() {
        let out = &mut tile[i * k..];
        let operation = issued.operation(grid);
        let OperandA::Registers { slots: regs, .. } = &operation.source else {
            issued.part_a(cx).gather(cx, stride, out)?;
            continue;
        };
        let (bits, negated) = (operation.product.bits, operation.signs[0]);
        let mut wide = vec![0; 16 * k];
        spread(cx, regs, bits, true, k, &mut wide);
        for (row, from) in wide.chunks_exact(k).enumerate() {
            for (to, &code) in out[row * stride..].iter_mut().zip(from) {
                let code = T::of(code as u32);
                *to = if negated { code.negated(bits) } else { code };
            }
        }
    }
    Ok(tile)
}

/// Register of column block `block`, row half `row8`, pair element `pair`.
fn accumulator_register(regs: &[Reg], halves: bool, block: usize, row8: usize, pair: usize) -> Reg {
    if halves { regs[2 * block + row8] } else { regs[4 * block + 2 * row8 + pair] }
}

/// The accumulator registers as a row-major 16 x n, two elements in 64 bits: a lane holds such
/// pairs, in two registers or (halves) in one.
#[inline(always)]
fn accumulators(cx: &Cx<'_>, regs: &[Reg], halves: bool, n: usize, d: &mut [u64]) {
    for block in 0..n / 8 {
        for row8 in 0..2 {
            let at = |pair| cx.slot(accumulator_register(regs, halves, block, row8, pair));
            let (even, odd) = (at(0), at(1));
            let rows = d[4 * row8 * n..][..4 * n].chunks_exact_mut(n / 2);
            for (row, to) in rows.enumerate() {
                for (i, to) in to[4 * block..][..4].iter_mut().enumerate() {
                    let (even, odd) = (u64::from(even[4 * row + i]), u64::from(odd[4 * row + i]));
                    *to = if halves { even & 0xffff | odd >> 16 << 32 } else { even | odd << 32 };
                }
            }
        }
    }
}

/// The opposite of [`accumulators`].
#[inline(always)]
fn store_accumulators(cx: &mut Cx<'_>, regs: &[Reg], halves: bool, n: usize, d: &[u64]) {
    for block in 0..n / 8 {
        for row8 in 0..2 {
            let rows = d[4 * row8 * n..][..4 * n].chunks_exact(n / 2);
            let rows = rows.map(|row| row[4 * block..].first_chunk().expect("four pairs"));
            let [first, second] =
                [0, 1].map(|pair| accumulator_register(regs, halves, block, row8, pair));
            let places = [first, second].map(|reg| cx.base + usize::from(reg));
            if cx.mask == !0
                && let Ok([even, odd]) = cx.w.regs.get_disjoint_mut(places)
            {
                part_pairs(rows, &mut even.0, &mut odd.0);
                continue;
            }
            let (mut even, mut odd) = ([0; LANES], [0; LANES]);
            part_pairs(rows, &mut even, &mut odd);
            if halves {
                u32::write(cx, first, std::array::from_fn(|i| even[i] | odd[i] << 16));
            } else {
                u32::write(cx, first, even);
                u32::write(cx, second, odd);
            }
        }
    }
}

/// Eight rows of four pairs to the lanes of two registers.
#[inline(always)]
fn part_pairs<'a>(
    rows: impl Iterator<Item = &'a [u64; 4]>,
    even: &mut [u32; LANES],
    odd: &mut [u32; LANES],
) {
    let lanes = even.as_chunks_mut::<4>().0.iter_mut().zip(odd.as_chunks_mut::<4>().0);
    for ((even, odd), row) in lanes.zip(rows) {
        // By value, so that the compiler sees vectors.
        let [a, b, c, d] = *row;
        *even = [a as u32, b as u32, c as u32, d as u32];
        *odd = [(a >> 32) as u32, (b >> 32) as u32, (c >> 32) as u32, (d >> 32) as u32];
    }
}
