//! wgmma: matrix products of a warpgroup, operands in shared memory (PTX ISA, "Asynchronous
//! Warpgroup Level Matrix Multiply-Accumulate Instructions").
//!
//! Each of the four warps computes its 16 rows when it executes the instruction; results are there
//! at once, and what was not waited for only the sanitizer knows.

use std::rc::Rc;

use fathom_numerics::gemm::tensor_core::{Code, Packed, TensorCore};
use fathom_numerics::mma::{Instr, MmaShape};
use fathom_ptx::ast::{Instruction, Operand};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Shape, Type};

use ndarray::{ArrayView2, ArrayViewMut2};

use super::mma::{fragment, spread};
use super::tensor::Product;
use crate::error::Ub;
use crate::lower::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::cluster::CachedTile;
use crate::machine::cx::Cx;
use crate::machine::lane::{LANES, Lane, Reg};
use crate::machine::op::{Class, Step};

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    match ins.op {
        Opcode::WgmmaMmaAsync => mma_async(l, ins),
        Opcode::WgmmaFence | Opcode::WgmmaCommitGroup | Opcode::WgmmaWaitGroup => {
            let left = ins.operands.first().and_then(|o| l.literal(o));
            let op = ins.op;
            l.emit_action(Class::WgmmaSync, move |cx| {
                if let Some(step) = cx.converge(!0) {
                    return step;
                }
                cx.wgmma_sync(op, left.unwrap_or(0) as usize);
                Step::Next
            });
            Ok(())
        }
        _ => unsupported(mnemonic(ins)),
    }
}

/// Where the elements of an operand lie in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    start: u64,
    leading: u64,
    stride: u64,
    base_offset: u64,
    swizzle: u32,
}

impl Descriptor {
    /// Reads the 64-bit matrix descriptor (PTX ISA, "Matrix Descriptor Format").
    pub fn new(bits: u64) -> Descriptor {
        let field = |at: u32| (bits >> at & 0x3fff) << 4;
        Descriptor {
            start: field(0),
            leading: field(16),
            stride: field(32),
            base_offset: bits >> 49 & 7,
            swizzle: (bits >> 62) as u32,
        }
    }

    /// Bytes of a row of the swizzle pattern.
    fn span(self) -> u64 {
        match self.swizzle {
            1 => 128,
            2 => 64,
            3 => 32,
            _ => 16,
        }
    }

    /// The swizzled address: bits 4 to 6 are exchanged with bits 7 to 9 of the absolute address.
    pub fn swizzle(self, address: u64) -> u64 {
        swizzle(address, self.span(), self.base_offset)
    }

    /// Address of the 16 bytes that hold byte `byte` of row `row`, where K is contiguous.
    fn k_major(self, row: u64, byte: u64) -> u64 {
        let span = self.span();
        let linear = if span == 16 {
            self.start + row / 8 * self.stride + row % 8 * 16 + byte / 16 * self.leading
        } else {
            self.start + row / 8 * self.stride + row % 8 * span + byte / 16 * 16
        };
        self.swizzle(linear)
    }

    /// Address of the 16 bytes that hold byte `byte` along M or N of index `k`, where K is strided.
    fn mn_major(self, byte: u64, k: u64) -> u64 {
        let span = self.span();
        let linear = if span == 16 {
            self.start + byte / 16 * self.stride + k % 8 * 16 + k / 8 * self.leading
        } else {
            let along = byte / span * self.leading + byte % span / 16 * 16;
            self.start + along + k % 8 * span + k / 8 * self.stride
        };
        self.swizzle(linear)
    }
}

/// Swizzles an address for a pattern of `span` bytes a row (16: none).
pub fn swizzle(address: u64, span: u64, base_offset: u64) -> u64 {
    let mask = span / 16 - 1;
    address ^ ((address >> 7).wrapping_sub(base_offset) & mask) << 4
}

/// Where A comes from.
enum Source {
    Shared(Reg),
    Registers(Vec<Reg>),
}

fn mma_async(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let types: Vec<Type> = ins.mods.types().collect();
    let ([d, a, b], Some(Shape { m, n, k })) = (&types[..], ins.mods.shape()) else {
        return unsupported(mnemonic(ins));
    };
    let size = MmaShape { m: m.into(), n: n.into(), k: k.into() };
    let Some(product) = Product::new(ins, Instr::Wgmma, size, [*d, *a, *b, *d]) else {
        return unsupported(mnemonic(ins));
    };
    let from_registers = matches!(ins.operands[1], Operand::Vector(_));
    let source = if from_registers {
        Source::Registers(fragment(l, &ins.operands[1], Type::B32, true)?)
    } else {
        Source::Shared(l.src(&ins.operands[1], Type::B64)?)
    };
    let b_desc = l.src(&ins.operands[2], Type::B64)?;
    let (scale_d, negated) = match ins.operands.get(3) {
        Some(o) => l.pred(o)?,
        None => (crate::machine::cx::PRED_TRUE, false),
    };
    // Immediates: signs of A and B (floats), then transposes of what lies in shared memory.
    let imm =
        |l: &Lower<'_>, i: usize| ins.operands.get(i).and_then(|o| l.literal(o)).map(|v| v as i64);
    let signs = [imm(l, 4) == Some(-1), imm(l, 5) == Some(-1)];
    let integer = *d == Type::S32;
    let (trans_a, trans_b) = if integer {
        (false, false)
    } else if from_registers {
        (false, imm(l, 6) == Some(1))
    } else {
        (imm(l, 6) == Some(1), imm(l, 7) == Some(1))
    };
    let regs = fragment(l, &ins.operands[0], Type::B32, false)?;
    let name = format!("wgmma.m{m}n{n}k{k}.{}.{}.{}", d.text(), a.text(), b.text());
    // Counted a warp: a quarter of the warpgroup's work.
    l.tensor_core(name, 2 * u64::from(m / 4) * u64::from(n) * u64::from(k));
    let (n, k) = (usize::from(n), usize::from(k));
    let operation = Operation {
        id: l.unique(),
        product,
        source,
        b_desc,
        scale_d: (scale_d, negated),
        signs: if integer { [false; 2] } else { signs },
        transposed: [trans_a, trans_b],
        regs,
        n,
        k,
    };
    l.emit_action(Class::Wgmma, move |cx| {
        if let Some(step) = cx.converge(!0) {
            return step;
        }
        operation.run(cx).err().unwrap_or(Step::Next)
    });
    Ok(())
}

/// One wgmma.mma_async.
struct Operation {
    id: u64,
    product: Product,
    source: Source,
    b_desc: Reg,
    scale_d: (Reg, bool),
    signs: [bool; 2],
    transposed: [bool; 2],
    regs: Vec<Reg>,
    n: usize,
    k: usize,
}

impl Operation {
    fn run(&self, cx: &mut Cx<'_>) -> Result<(), Step> {
        let leader = cx.leader();
        let (n, k) = (self.n, self.k);
        let core = self.product.core(&cx.grid.preset);
        let a = match &core {
            Some(core) if self.product.bits == 8 => {
                Factor::Packed(pack(core, &self.tile_a::<u8>(cx)?, (16, k), true))
            }
            Some(core) => Factor::Packed(pack(core, &self.tile_a::<u32>(cx)?, (16, k), true)),
            None => Factor::Codes(self.tile_a::<u32>(cx)?),
        };
        let b_desc = u64::read(cx, self.b_desc)[leader];
        let scale = cx.pred(self.scale_d.0) ^ if self.scale_d.1 { !0 } else { 0 };
        let keep = scale >> leader & 1 != 0;
        let halves = self.product.accumulator == Type::F16;
        let mut d = vec![0u32; 16 * n];
        if keep {
            cx.wgmma_needs_fence(&self.regs);
            accumulators(cx, &self.regs, halves, n, &mut d);
        }
        match (core, a) {
            (Some(core), Factor::Packed(a)) => {
                let b = self.packed_b(cx, &core, b_desc)?;
                let singles: &mut [f32] = bytemuck::cast_slice_mut(&mut d);
                let out = ArrayViewMut2::from_shape((16, n), singles).expect("16 x n");
                core.multiply_add(&a, &b, out, keep);
            }
            (_, Factor::Codes(a)) => {
                let b = self.tile_b::<u32>(cx, b_desc)?;
                self.product.run32(&cx.grid.preset, [16, n, k], &a, &b, &mut d);
            }
            (None, Factor::Packed(_)) => unreachable!("packed by a core"),
        }
        store_accumulators(cx, &self.regs, halves, n, &d);
        cx.wgmma_accumulates(&self.regs);
        Ok(())
    }

    /// This warp's 16 rows of A.
    fn tile_a<T: Element>(&self, cx: &mut Cx<'_>) -> Result<Vec<T>, Step> {
        let (k, bits) = (self.k, self.product.bits);
        let mut tile = vec![T::default(); 16 * k];
        match &self.source {
            Source::Registers(regs) => {
                cx.wgmma_needs_fence(regs);
                cx.wgmma_reads(regs);
                let mut wide = vec![0; 16 * k];
                spread(cx, regs, bits, true, k, &mut wide);
                tile.iter_mut().zip(wide).for_each(|(t, w)| *t = T::of(w as u32));
            }
            Source::Shared(reg) => {
                let desc = Descriptor::new(u64::read(cx, *reg)[cx.leader()]);
                let first = 16 * (cx.w.index as u64 % 4);
                gather(cx, desc, self.transposed[0], bits, (first, 16, k), &mut tile)?;
            }
        }
        negate(&mut tile, self.signs[0], bits);
        Ok(tile)
    }

    fn tile_b<T: Element>(&self, cx: &mut Cx<'_>, desc: u64) -> Result<Vec<T>, Step> {
        let mut tile = vec![T::default(); self.n * self.k];
        let (desc, bits) = (Descriptor::new(desc), self.product.bits);
        gather(cx, desc, self.transposed[1], bits, (0, self.n, self.k), &mut tile)?;
        negate(&mut tile, self.signs[1], bits);
        Ok(tile)
    }

    /// B packed for the kernels. The warps of a CTA that multiply with the same B share the packed
    /// form until somebody writes to the shared memory that it came from.
    fn packed_b(&self, cx: &mut Cx<'_>, core: &TensorCore, desc: u64) -> Result<Rc<Packed>, Step> {
        let key = (self.id, desc);
        let cta = &cx.cluster.ctas[cx.cta];
        // The sanitizer wants to see every read.
        let share = !cx.grid.settings.checks.any();
        let known = cta.tiles.iter().find(|t| share && t.key == key);
        if let Some(tile) = known
            && tile.version == cta.version_of(tile.span)
        {
            return Ok(tile.packed.clone());
        }
        let shape = (self.n, self.k);
        let packed = Rc::new(match self.product.bits {
            8 => pack(core, &self.tile_b::<u8>(cx, desc)?, shape, false),
            _ => pack(core, &self.tile_b::<u32>(cx, desc)?, shape, false),
        });
        let span = self.span_b(Descriptor::new(desc));
        let cta = &mut cx.cluster.ctas[cx.cta];
        let version = cta.version_of(span);
        cta.tiles.retain(|t| t.key != key);
        if cta.tiles.len() >= CACHED_TILES {
            cta.tiles.remove(0);
        }
        cta.tiles.push(CachedTile { key, span, version, packed: packed.clone() });
        Ok(packed)
    }

    /// First and last byte that B may come from.
    fn span_b(&self, desc: Descriptor) -> (usize, usize) {
        let bytes = (self.product.bits as usize * self.k).div_ceil(8) as u64;
        let size = u64::from(self.product.bits / 8).max(1);
        let last = if self.transposed[1] {
            let along = self.n as u64 * size;
            desc.start
                + (along / desc.span() + 1) * desc.leading.max(desc.stride)
                + self.k as u64 / 8 * desc.stride.max(desc.leading)
                + 1024
        } else {
            // Eight rows lie together; swizzling moves nothing out of its 128 bytes.
            let groups = (self.n as u64 / 8 - 1) * desc.stride;
            let columns = if desc.span() == 16 { bytes / 16 * desc.leading } else { 0 };
            (desc.start & !(desc.span() - 1)) + groups + 8 * desc.span() + columns - 1
        };
        (desc.start as usize & !1023, last as usize)
    }
}

/// Packed operands that a CTA keeps.
const CACHED_TILES: usize = 64;

/// An operand of a product.
enum Factor {
    /// For the fast kernels.
    Packed(Packed),
    /// For everything else.
    Codes(Vec<u32>),
}

/// An operand's element while it is on its way: bytes where the kernels take bytes, else words.
trait Element: Code + Default + Copy {
    /// From a code in a word.
    fn of(word: u32) -> Self;
    /// The sign of a code of `bits` bits changed.
    fn negated(self, bits: u32) -> Self;
    /// The elements of 16 bytes of shared memory, `bytes` bytes each.
    fn chunk(data: &[u8; 16], bytes: usize, to: &mut [Self]);
}

impl Element for u8 {
    fn of(word: u32) -> u8 {
        word as u8
    }

    fn negated(self, _bits: u32) -> u8 {
        self ^ 0x80
    }

    #[inline(always)]
    fn chunk(data: &[u8; 16], _bytes: usize, to: &mut [u8]) {
        to.copy_from_slice(data);
    }
}

impl Element for u32 {
    fn of(word: u32) -> u32 {
        word
    }

    fn negated(self, bits: u32) -> u32 {
        self ^ 1 << (bits - 1)
    }

    #[inline(always)]
    fn chunk(data: &[u8; 16], bytes: usize, to: &mut [u32]) {
        for (i, to) in to.iter_mut().enumerate() {
            *to = element(data, i, bytes);
        }
    }
}

fn negate<T: Element>(tile: &mut [T], yes: bool, bits: u32) {
    if yes {
        tile.iter_mut().for_each(|v| *v = v.negated(bits));
    }
}

fn pack<T: Element>(core: &TensorCore, tile: &[T], shape: (usize, usize), is_a: bool) -> Packed {
    let codes = ArrayView2::from_shape(shape, tile).expect("rows x k");
    if is_a { core.pack_a(codes) } else { core.pack_b(codes) }
}

/// Elements `first..first + rows` of an operand in shared memory, row-major with K inner.
fn gather<T: Element>(
    cx: &mut Cx<'_>,
    desc: Descriptor,
    transposed: bool,
    bits: u32,
    (first, rows, k): (u64, usize, usize),
    out: &mut [T],
) -> Result<(), Step> {
    let bytes = (bits / 8).max(1) as usize;
    let cta = cx.cta;
    let end = u64::from(cx.grid.shared_end);
    let per = 16 / bytes;
    let mut fault = None;
    let mut read = |cx: &mut Cx<'_>, address: u64| -> [u8; 16] {
        if address + 16 > end || address < u64::from(crate::machine::reserved(&cx.grid.preset)) {
            fault.get_or_insert(address);
            return [0; 16];
        }
        cx.wgmma_reads_shared(address, (desc.span() / 16).trailing_zeros());
        let shared = cx.shared_bytes(cta);
        shared[address as usize..address as usize + 16].try_into().expect("16 bytes")
    };
    if bits == 1 {
        for row in 0..rows {
            for chunk in 0..k / 128 {
                let data = read(cx, desc.k_major(first + row as u64, chunk as u64 * 16));
                for i in 0..128 {
                    out[row * k + chunk * 128 + i] = T::of(u32::from(data[i / 8] >> (i % 8) & 1));
                }
            }
        }
    } else if transposed {
        for p in 0..k {
            for chunk in 0..rows / per {
                let byte = first * bytes as u64 + chunk as u64 * 16;
                let data = read(cx, desc.mn_major(byte, p as u64));
                for i in 0..per {
                    out[(chunk * per + i) * k + p] = T::of(element(&data, i, bytes));
                }
            }
        }
    } else {
        for row in 0..rows {
            for chunk in 0..k / per {
                let data = read(cx, desc.k_major(first + row as u64, chunk as u64 * 16));
                T::chunk(&data, bytes, &mut out[row * k + chunk * per..][..per]);
            }
        }
    }
    match fault {
        None => Ok(()),
        Some(address) => {
            let message = "a matrix descriptor reaches beyond shared memory";
            Err(cx.fail(Ub::OutOfBounds, None, Some(address), message))
        }
    }
}

#[inline(always)]
fn element(data: &[u8; 16], i: usize, bytes: usize) -> u32 {
    match bytes {
        1 => u32::from(data[i]),
        2 => u32::from(u16::from_le_bytes([data[2 * i], data[2 * i + 1]])),
        _ => u32::from_le_bytes(data[4 * i..4 * i + 4].try_into().expect("4 bytes")),
    }
}

/// Register of column block `block`, row half `row8`, pair element `pair`.
fn accumulator_register(regs: &[Reg], halves: bool, block: usize, row8: usize, pair: usize) -> Reg {
    if halves { regs[2 * block + row8] } else { regs[4 * block + 2 * row8 + pair] }
}

/// The accumulator registers as a row-major 16 x n.
fn accumulators(cx: &Cx<'_>, regs: &[Reg], halves: bool, n: usize, d: &mut [u32]) {
    for block in 0..n / 8 {
        for row8 in 0..2 {
            let pair = [0, 1].map(|pair| {
                let value = cx.slot(accumulator_register(regs, halves, block, row8, pair));
                if halves { value.map(|word| word >> (16 * pair) & 0xffff) } else { *value }
            });
            let rows = d[8 * row8 * n..][..8 * n].chunks_exact_mut(n);
            for (row, to) in rows.enumerate() {
                let to: &mut [u32; 8] =
                    (&mut to[8 * block..][..8]).try_into().expect("eight columns");
                *to = std::array::from_fn(|i| pair[i % 2][4 * row + i / 2]);
            }
        }
    }
}

fn store_accumulators(cx: &mut Cx<'_>, regs: &[Reg], halves: bool, n: usize, d: &[u32]) {
    for block in 0..n / 8 {
        for row8 in 0..2 {
            let mut pair = [[0u32; LANES]; 2];
            for (row, from) in d[8 * row8 * n..][..8 * n].chunks_exact(n).enumerate() {
                let from: &[u32; 8] = from[8 * block..][..8].try_into().expect("eight columns");
                for i in 0..8 {
                    pair[i % 2][4 * row + i / 2] = from[i];
                }
            }
            if halves {
                let packed = std::array::from_fn(|lane| pair[0][lane] | pair[1][lane] << 16);
                u32::write(cx, regs[2 * block + row8], packed);
            } else {
                for (i, value) in pair.into_iter().enumerate() {
                    u32::write(cx, accumulator_register(regs, false, block, row8, i), value);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swizzles_exchange_the_bits_of_the_address() {
        // Row 1 of a 128-byte pattern starts at its second 16 bytes.
        assert_eq!(swizzle(128, 128, 0), 128 + 16);
        assert_eq!(swizzle(128 * 7 + 16, 128, 0), 128 * 7 + 96);
        assert_eq!(swizzle(128 * 3, 64, 0), 128 * 3 + 48);
        assert_eq!(swizzle(128 * 3, 32, 0), 128 * 3 + 16);
        assert_eq!(swizzle(128 * 3, 16, 0), 128 * 3);
    }

    #[test]
    fn descriptor_fields() {
        let bits = 0x400 >> 4 | (16u64 >> 4) << 16 | (1024u64 >> 4) << 32 | 1 << 62;
        let d = Descriptor::new(bits);
        assert_eq!((d.start, d.leading, d.stride, d.span()), (0x400, 16, 1024, 128));
        assert_eq!(d.k_major(9, 16), 0x400 + 1024 + 128);
    }
}
