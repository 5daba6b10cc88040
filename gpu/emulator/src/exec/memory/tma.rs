//! Tensor copies: cp.async.bulk.tensor and its reduction (PTX ISA, "Data Movement and Conversion
//! Instructions: Tensor copy").

use std::sync::atomic::Ordering::Relaxed;

use fathom_ptx::ast::{Instruction, Operand};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Flag, Op, Space, Type};

use super::bulk::{combine, present, shared};
use super::tensormap::map_at;
use crate::error::Ub;
use crate::exec::tensor::operand::swizzle;
use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::access::Addr;
use crate::machine::checks::global::Strength;
use crate::machine::cx::Cx;
use crate::machine::lane::Lane;
use crate::machine::op::{Class, Step};
use crate::machine::registers::Reg;
use crate::memory::Allocation;
use crate::tensormap::{MapElement, Mode, TensorMap};

/// cp.async.bulk.tensor and its reduction.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let store = ins.mods.spaces().next() == Some(Space::Global);
    if ins.mods.flags().any(|f| {
        matches!(
            f,
            Flag::TileGather4
                | Flag::TileScatter4
                | Flag::Im2colW
                | Flag::Im2colW128
                | Flag::CtaGroup1
                | Flag::CtaGroup2
        )
    }) {
        return unsupported(mnemonic(ins));
    }
    let (map_at, memory_at) = if store { (0, 1) } else { (1, 0) };
    let Operand::Tensor(map, coordinates) = &ins.operands[map_at] else {
        return unsupported(mnemonic(ins));
    };
    let map = l.address(map)?;
    let list = match coordinates.last() {
        Some(Operand::Vector(list)) => list,
        _ => coordinates,
    };
    let mut coords = Vec::new();
    for o in list {
        coords.push(l.src(o, Type::S32)?);
    }
    let memory = l.addr(&ins.operands[memory_at])?;
    let barrier = match present(ins, 2) {
        Some(o @ Operand::Address(_)) if !store => Some(l.addr(o)?),
        _ => None,
    };
    let mut offsets = Vec::new();
    if let (false, Some(Operand::Vector(list))) = (store, ins.named("offsets")) {
        for o in list.iter() {
            offsets.push(l.src(o, Type::U16)?);
        }
    }
    let mask = match ins.mods.has(Flag::MulticastCluster) {
        true => match ins.named("mask") {
            Some(o) => Some(l.src(o, Type::U32)?),
            None => return unsupported(mnemonic(ins)),
        },
        false => None,
    };
    let reduce = if ins.op == Opcode::CpReduceAsyncBulkTensor { ins.mods.op() } else { None };
    l.emit_action(Class::Tma, move |cx| {
        let maps = cx.addresses(map);
        let places = cx.addresses(memory);
        let barriers = barrier.map(|b| cx.addresses(b));
        let masks = mask.map(|m| u32::read(cx, m));
        for lane in cx.lanes() {
            let read = |cx: &Cx<'_>, regs: &[Reg]| -> Vec<i64> {
                regs.iter().map(|&r| i64::from(i32::read(cx, r)[lane])).collect()
            };
            let one = Tensor {
                lane,
                map: maps[lane],
                coords: read(cx, &coords),
                offsets: read(cx, &offsets),
                memory: shared(places[lane]),
                variable: memory,
                barrier: barriers.map(|b| shared(b[lane])),
                mask: masks.map(|m| u64::from(m[lane] & 0xffff)),
            };
            let result = if store { one.store(cx, reduce) } else { one.load(cx) };
            if let Err(step) = result {
                return step;
            }
        }
        Step::Next
    });
    Ok(())
}

struct Tensor {
    lane: usize,
    map: u64,
    coords: Vec<i64>,
    offsets: Vec<i64>,
    memory: u64,
    /// The operand that `memory` comes from.
    variable: Addr,
    barrier: Option<u64>,
    mask: Option<u64>,
}

/// One dense run of a box: where it lies in global memory (`None`: outside of the tensor), how many
/// elements at its two ends are outside, and its elements.
struct Run {
    address: Option<u64>,
    before: u64,
    inside: u64,
    after: u64,
}

/// Bytes of a box that are copied together.
const AT_A_TIME: usize = 2048;

/// Where the rows of a box come from.
enum Source<'a> {
    /// All of them from one allocation, and no check wants to see each.
    One(&'a Allocation),
    Any,
}

impl<'a> Source<'a> {
    /// Brings the cache lines of all rows, which lie far apart, into the cache together.
    fn of(cx: &Cx<'a>, runs: &[Run], bytes: u64) -> Source<'a> {
        let mut inside =
            runs.iter().filter_map(|r| Some((r.address?, r.inside * bytes))).peekable();
        let found = inside.peek().and_then(|&(address, n)| cx.grid.view.locate(address, n));
        let (Some(found), false) = (found, cx.grid.settings.checks.any()) else {
            return Source::Any;
        };
        for (address, n) in inside {
            let at = address.wrapping_sub(found.base());
            if at.saturating_add(n) > found.bytes() {
                return Source::Any;
            }
            // A word of every line, and the last one, as rows need not start with a line.
            let words = found.range(at, n);
            let lines = words.iter().step_by(16).chain(words.last());
            std::hint::black_box(lines.fold(0, |all, word| all ^ word.load(Relaxed)));
        }
        Source::One(found)
    }

    fn read(&self, cx: &mut Cx<'_>, lane: usize, address: u64, out: &mut [u8]) -> Result<(), Step> {
        match self {
            Source::One(found) => {
                cx.copied(address, out.len() as u64, false);
                found.load(address - found.base(), out);
                Ok(())
            }
            Source::Any => cx.read_global(lane, address, out),
        }
    }
}

impl Tensor {
    fn map(&self, cx: &mut Cx<'_>) -> Result<TensorMap, Step> {
        let map = map_at(cx, self.lane, self.map)?;
        cx.map_used(self.lane, self.map);
        let lane = Some(self.lane);
        if self.coords.len() != map.rank as usize {
            let message = format!("{} coordinates, rank {}", self.coords.len(), map.rank);
            return Err(cx.fail(Ub::BadDescriptor, lane, Some(self.map), message));
        }
        if map.interleave != 0 {
            let message = "interleaved layouts (NC/8HWC8, NC/16HWC16) are not supported";
            return Err(cx.fail(Ub::BadDescriptor, lane, Some(self.map), message));
        }
        // The pattern of a swizzle repeats every 1024, 512 or 256 bytes; the box starts
        // 128-aligned.
        cx.aligned(self.lane, self.memory, 128, "the shared box of a tensor copy")?;
        Ok(map)
    }

    /// The dense runs of the box, in the order in which they lie in shared memory.
    fn runs(&self, map: &TensorMap) -> Vec<Run> {
        match map.mode {
            Mode::Tiled => self.tiled_runs(map),
            Mode::Im2col { .. } => self.im2col_runs(map),
        }
    }

    /// The coordinates, zero beyond the rank.
    fn index(&self) -> [i64; 5] {
        std::array::from_fn(|d| self.coords.get(d).copied().unwrap_or(0))
    }

    fn run(&self, map: &TensorMap, index: &[i64; 5], count: u64) -> Run {
        let rank = map.rank as usize;
        let outside = (1..rank).any(|d| index[d] < 0 || index[d] as u64 >= map.dims[d]);
        let (start, end) = (index[0], index[0] + count as i64);
        let size = map.dims[0] as i64;
        if outside || end <= 0 || start >= size {
            return Run { address: None, before: count, inside: 0, after: 0 };
        }
        let first = start.max(0);
        let last = end.min(size);
        let bytes = u64::from(map.element.bytes());
        let offset = (1..rank)
            .fold(first as u64 * bytes, |sum, d| sum + index[d] as u64 * map.strides_bytes[d - 1]);
        Run {
            address: Some(map.address + offset),
            before: (first - start) as u64,
            inside: (last - first) as u64,
            after: (end - last) as u64,
        }
    }

    fn tiled_runs(&self, map: &TensorMap) -> Vec<Run> {
        let rank = map.rank as usize;
        let sides: Vec<u64> = (0..rank)
            .map(|d| u64::from(map.box_dims[d].div_ceil(map.element_strides[d])))
            .collect();
        let rows: u64 = sides[1..].iter().product();
        let stride0 = u64::from(map.element_strides[0]);
        let mut out = Vec::with_capacity(rows as usize);
        let mut index = self.index();
        let mut count = [0; 5];
        for _ in 0..rows {
            if stride0 == 1 {
                out.push(self.run(map, &index, sides[0]));
            }
            for i in 0..if stride0 == 1 { 0 } else { sides[0] } {
                let mut at = index;
                at[0] += (i * stride0) as i64;
                out.push(self.run(map, &at, 1));
            }
            for d in 1..rank {
                (count[d], index[d]) = (count[d] + 1, index[d] + i64::from(map.element_strides[d]));
                if count[d] < sides[d] {
                    break;
                }
                (count[d], index[d]) = (0, self.coords[d]);
            }
        }
        out
    }

    fn im2col_runs(&self, map: &TensorMap) -> Vec<Run> {
        let Mode::Im2col { lower, upper, channels, pixels } = map.mode else {
            unreachable!("im2col only")
        };
        let rank = map.rank as usize;
        let spatial = rank - 2;
        let mut at = self.index();
        let mut out = Vec::with_capacity(pixels as usize);
        for _ in 0..pixels {
            let mut index = at;
            for d in 0..spatial {
                index[d + 1] += self.offsets.get(d).copied().unwrap_or(0);
            }
            out.push(self.run(map, &index, u64::from(channels)));
            // The next pixel of the bounding box, W fastest, then H, D, and the next image.
            for d in 0..=spatial {
                if d == spatial {
                    at[rank - 1] += 1;
                    break;
                }
                at[d + 1] += i64::from(map.element_strides[d + 1]);
                let end = map.dims[d + 1] as i64 + i64::from(upper[d]);
                if at[d + 1] < end {
                    break;
                }
                at[d + 1] = i64::from(lower[d]);
            }
        }
        out
    }

    /// Bytes that stand for an element outside of the tensor.
    fn filler(map: &TensorMap) -> [u8; 8] {
        if !map.fill_nan {
            return [0; 8];
        }
        let nan: u64 = match map.element {
            MapElement::F64 => 0x7fff_ffff_ffff_ffff,
            MapElement::F16 | MapElement::Bf16 => 0x7fff,
            _ => 0x7fff_ffff,
        };
        nan.to_le_bytes()
    }

    fn load(&self, cx: &mut Cx<'_>) -> Result<(), Step> {
        let map = self.map(cx)?;
        let bytes = u64::from(map.element.bytes());
        let filler = Self::filler(&map);
        let runs = self.runs(&map);
        let source = Source::of(cx, &runs, bytes);
        let total = runs.iter().map(|r| (r.before + r.inside + r.after) * bytes).sum();
        cx.within_one(self.variable, self.lane, self.memory, total);
        cx.stats.tma_bytes_read += total;
        let mut places = Vec::new();
        for target in cx.copies_of(self.lane, self.memory, self.mask)? {
            places.push((target, cx.shared_place(self.lane, target, total)?));
        }
        // Rows go on some at a time: what was just written is slow to read in other pieces.
        let (mut data, mut done) = (Vec::with_capacity(2 * AT_A_TIME), 0);
        for (i, run) in runs.iter().enumerate() {
            let [before, inside, after] =
                [run.before, run.inside, run.after].map(|n| (n * bytes) as usize);
            let at = data.len();
            data.resize(at + before + inside + after, 0);
            let row = &mut data[at..];
            if before + after > 0 {
                row.chunks_mut(bytes as usize).for_each(|e| e.copy_from_slice(&filler[..e.len()]));
            }
            if let Some(address) = run.address {
                source.read(cx, self.lane, address, &mut row[before..before + inside])?;
            }
            if data.len() >= AT_A_TIME || i + 1 == runs.len() {
                round_tf32(&map, &mut data);
                for &(_, (cta, offset)) in &places {
                    scatter(cx.shared_bytes(cta), offset + done, &data, swizzle_span(&map));
                }
                done += data.len();
                data.clear();
            }
        }
        for (target, (cta, offset)) in places {
            let at = self.barrier.map(|barrier| match self.mask {
                Some(_) => target & !0xff_ffff | barrier & 0xff_ffff,
                None => barrier,
            });
            cx.async_writes_shared(self.lane, target, total, at);
            cx.wrote_swizzled(target, total, map.swizzle);
            cx.cluster.ctas[cta].touch(offset, total as usize);
            *cx.changes += 1;
            if let Some(at) = at {
                cx.complete_tx(self.lane, at, total)?;
            }
        }
        Ok(())
    }

    fn store(&self, cx: &mut Cx<'_>, reduce: Option<Op>) -> Result<(), Step> {
        let map = self.map(cx)?;
        let bytes = u64::from(map.element.bytes());
        let runs = self.runs(&map);
        let total: u64 = runs.iter().map(|r| (r.before + r.inside + r.after) * bytes).sum();
        cx.within_one(self.variable, self.lane, self.memory, total);
        let (cta, offset) = cx.shared_place(self.lane, self.memory, total)?;
        cx.async_reads_shared(self.lane, self.memory, total, true);
        let data = collect(cx.shared_bytes(cta), offset, total as usize, &map);
        cx.stats.tma_bytes_written += total;
        Source::of(cx, &runs, bytes);
        let mut at = 0usize;
        for run in runs {
            at += (run.before * bytes) as usize;
            let n = (run.inside * bytes) as usize;
            if let Some(address) = run.address {
                let new = &data[at..at + n];
                if let Some(op) = reduce {
                    cx.strength = Strength::Relaxed;
                    let mut old = vec![0; n];
                    cx.read_global(self.lane, address, &mut old)?;
                    combine(op, element_type(map.element), &mut old, new);
                    cx.write_global(self.lane, address, &old)?;
                } else {
                    cx.write_global(self.lane, address, new)?;
                }
                cx.strength = Strength::Weak;
            }
            at += n + (run.after * bytes) as usize;
        }
        Ok(())
    }
}

fn element_type(element: MapElement) -> Type {
    match element {
        MapElement::U8 => Type::U8,
        MapElement::U16 => Type::U16,
        MapElement::U32 => Type::U32,
        MapElement::S32 => Type::S32,
        MapElement::U64 => Type::U64,
        MapElement::S64 => Type::S64,
        MapElement::F16 => Type::F16,
        MapElement::Bf16 => Type::Bf16,
        MapElement::F64 => Type::F64,
        _ => Type::F32,
    }
}

/// The TFLOAT32 element types round what they load.
fn round_tf32(map: &TensorMap, data: &mut [u8]) {
    if !matches!(map.element, MapElement::Tf32 | MapElement::Tf32Ftz) {
        return;
    }
    use crate::exec::arith::cvt::{Format, round};
    use fathom_ptx::types::Rounding;
    for word in data.chunks_exact_mut(4) {
        let v = f32::from_le_bytes((&*word).try_into().expect("4 bytes"));
        let code = (round(f64::from(v), Format::TF32, Rounding::Rn, false) << 13) as u32;
        word.copy_from_slice(&code.to_le_bytes());
    }
}

fn swizzle_span(map: &TensorMap) -> u64 {
    16 << map.swizzle
}

/// Copies a piece of a box into shared memory, 16 bytes by 16 where it is swizzled.
fn scatter(shared: &mut [u8], offset: usize, data: &[u8], span: u64) {
    if span == 16 {
        shared[offset..offset + data.len()].copy_from_slice(data);
        return;
    }
    let (mut at, mut data) = (offset as u64, data);
    while !data.is_empty() {
        if let (128, 0, Some((from, rest))) = (span, at % 128, data.split_first_chunk::<128>()) {
            // A whole line of the pattern.
            let line = shared[at as usize..at as usize + 128].as_chunks_mut::<16>().0;
            for (i, chunk) in from.as_chunks::<16>().0.iter().enumerate() {
                line[i ^ (at as usize >> 7 & 7)] = *chunk;
            }
            (at, data) = (at + 128, rest);
            continue;
        }
        let to = swizzle(at, span, 0) as usize;
        if let (Some((chunk, rest)), 0) = (data.split_first_chunk::<16>(), at % 16) {
            let to: &mut [u8; 16] = (&mut shared[to..to + 16]).try_into().expect("16 bytes");
            *to = *chunk;
            (at, data) = (at + 16, rest);
        } else {
            let (part, rest) = data.split_at((16 - at as usize % 16).min(data.len()));
            shared[to..to + part.len()].copy_from_slice(part);
            (at, data) = (at + part.len() as u64, rest);
        }
    }
}

fn collect(shared: &[u8], offset: usize, bytes: usize, map: &TensorMap) -> Vec<u8> {
    let span = swizzle_span(map);
    if span == 16 {
        return shared[offset..offset + bytes].to_vec();
    }
    let mut out = Vec::with_capacity(bytes);
    for i in 0..bytes.div_ceil(16) {
        let from = swizzle((offset + 16 * i) as u64, span, 0) as usize;
        out.extend_from_slice(&shared[from..from + 16.min(bytes - 16 * i)]);
    }
    out
}
