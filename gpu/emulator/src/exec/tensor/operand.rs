//! Operands of wgmma in shared memory: where their elements lie (PTX ISA, "Matrix Descriptor
//! Format"), how they are gathered, and the packed copies that the warps of a CTA share.

use std::rc::Rc;

use fathom_numerics::gemm::tensor_core::{Code, Packed, TensorCore};
use ndarray::Array2;

use crate::error::Ub;
use crate::machine::cluster::CachedTile;
use crate::machine::cx::Cx;
use crate::machine::op::Step;

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

/// An operand's element while it is on its way: bytes where the kernels take bytes, else words.
pub trait OperandElement: Code + Default + Copy {
    /// From a code in a word.
    fn of(word: u32) -> Self;
    /// The sign of a code of `bits` bits changed.
    fn negated(self, bits: u32) -> Self;
    /// The elements of 16 bytes of shared memory, `bytes` bytes each.
    fn chunk(data: &[u8; 16], bytes: usize, to: &mut [Self]);
    /// As [`Self::chunk`], of a whole line of the 128-byte pattern.
    fn line(data: &[[u8; 16]; 8], exchange: usize, bytes: usize, to: &mut [Self]);
}

impl OperandElement for u8 {
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

    #[inline(always)]
    fn line(data: &[[u8; 16]; 8], exchange: usize, _bytes: usize, to: &mut [u8]) {
        for (i, to) in to.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            *to = data[(i ^ exchange) & 7];
        }
    }
}

impl OperandElement for u32 {
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

    fn line(data: &[[u8; 16]; 8], exchange: usize, bytes: usize, to: &mut [u32]) {
        for (i, to) in to.chunks_exact_mut(16 / bytes).enumerate() {
            Self::chunk(&data[(i ^ exchange) & 7], bytes, to);
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

/// What part of an operand to take from shared memory, and what its elements are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Part {
    pub descriptor: Descriptor,
    /// K is strided in memory.
    pub transposed: bool,
    pub negated: bool,
    /// Bits of an element.
    pub bits: u32,
    /// First row, and how many.
    pub first: u64,
    pub rows: usize,
    pub k: usize,
}

impl Part {
    /// Calls `f(row, k, chunk)` for all 16-byte pieces: the elements of one row from `k` on, or
    /// (transposed) of the rows from `row` on at one `k`.
    fn chunks(&self, read: impl Fn(u64) -> [u8; 16], mut f: impl FnMut(usize, usize, &[u8; 16])) {
        let (descriptor, first) = (self.descriptor, self.first);
        let per = (128 / self.bits) as usize;
        let pieces = if self.transposed { self.rows } else { self.k } / per;
        if self.transposed {
            let bytes = u64::from(self.bits / 8);
            for p in 0..self.k {
                for chunk in 0..pieces {
                    let byte = first * bytes + chunk as u64 * 16;
                    f(chunk * per, p, &read(descriptor.mn_major(byte, p as u64)));
                }
            }
        } else {
            for row in 0..self.rows {
                for chunk in 0..pieces {
                    let address = descriptor.k_major(first + row as u64, chunk as u64 * 16);
                    f(row, chunk * per, &read(address));
                }
            }
        }
    }

    /// Writes the part row-major with K inner to `out`, whose rows are `stride` elements apart.
    ///
    /// # Errors
    /// A fault where the descriptor reaches beyond shared memory.
    pub fn gather<T: OperandElement>(
        &self,
        cx: &mut Cx<'_>,
        stride: usize,
        out: &mut [T],
    ) -> Result<(), Step> {
        let cta = cx.cta;
        let begin = u64::from(cx.grid.preset.shared_bytes_reserved);
        let end = u64::from(cx.grid.shared_end);
        let shared = &*cx.shared_bytes(cta);
        let fault = std::cell::Cell::new(None);
        let read = |address: u64| -> [u8; 16] {
            if address < begin || address + 16 > end {
                fault.set(fault.get().or(Some(address)));
                return [0; 16];
            }
            shared[address as usize..address as usize + 16].try_into().expect("16 bytes")
        };
        let (bits, bytes) = (self.bits, (self.bits / 8) as usize);
        if bits == 1 {
            self.chunks(read, |row, k, data| {
                for (i, to) in out[row * stride + k..][..128].iter_mut().enumerate() {
                    *to = T::of(u32::from(data[i / 8] >> (i % 8) & 1));
                }
            });
        } else if self.transposed {
            self.chunks(read, |row, k, data| {
                for i in 0..16 / bytes {
                    out[(row + i) * stride + k] = T::of(element(data, i, bytes));
                }
            });
        } else if let Some(first) = self.lines() {
            for row in 0..self.rows {
                let line = first + row as u64 / 8 * self.descriptor.stride + row as u64 % 8 * 128;
                if line < begin || line + 128 > end {
                    fault.set(fault.get().or(Some(line)));
                    continue;
                }
                let data = shared[line as usize..].as_chunks().0;
                let data = data.first_chunk().expect("128 bytes");
                let exchange = (line >> 7).wrapping_sub(self.descriptor.base_offset) as usize;
                T::line(data, exchange, bytes, &mut out[row * stride..][..128 / bytes]);
            }
        } else {
            self.chunks(read, |row, k, data| {
                T::chunk(data, bytes, &mut out[row * stride + k..][..16 / bytes]);
            });
        }
        if let Some(address) = fault.get() {
            return Err(beyond(cx, address));
        }
        if self.negated {
            for row in out.chunks_mut(stride).take(self.rows) {
                row[..self.k].iter_mut().for_each(|v| *v = v.negated(bits));
            }
        }
        Ok(())
    }

    /// Where its first row lies, if rows are whole lines of the 128-byte pattern.
    fn lines(&self) -> Option<u64> {
        let d = self.descriptor;
        let whole = !self.transposed && d.span() == 128 && self.bits as usize * self.k == 1024;
        let first = d.start + self.first / 8 * d.stride;
        (whole && first.is_multiple_of(128) && d.stride.is_multiple_of(128)).then_some(first)
    }

    /// The part that lies behind it along K, where the two can be read as one: equal in all but
    /// its place.
    fn next(&self) -> Option<Part> {
        let bytes = (self.bits as usize * self.k / 8) as u64;
        let d = self.descriptor;
        let simple = !self.transposed && d.span() > 16;
        let descriptor = Descriptor { start: d.start + bytes, ..d };
        simple.then_some(Part { descriptor, ..*self })
    }

    /// In two halves along K: the B of a sparse product, which is twice as deep as a dense one, in
    /// pieces of 32 bytes where K is contiguous.
    pub fn halves(self) -> [Part; 2] {
        let d = self.descriptor;
        let k = self.k / 2;
        let step = match (self.transposed, d.span()) {
            (true, 16) => k as u64 / 8 * d.leading,
            (true, _) => k as u64 / 8 * d.stride,
            (false, 16) => 2 * d.leading,
            (false, 32) => d.leading,
            (false, _) => 32,
        };
        let behind = Descriptor { start: d.start + step, ..d };
        [Part { k, ..self }, Part { k, descriptor: behind, ..self }]
    }

    /// Tells the sanitizer of all reads.
    ///
    /// # Errors
    /// As [`Self::gather`].
    pub fn note_reads(&self, cx: &mut Cx<'_>) -> Result<(), Step> {
        let begin = u64::from(cx.grid.preset.shared_bytes_reserved);
        let end = u64::from(cx.grid.shared_end);
        let mode = (self.descriptor.span() / 16).trailing_zeros();
        let addresses = std::cell::RefCell::new(Vec::new());
        let note = |address| {
            addresses.borrow_mut().push(address);
            [0; 16]
        };
        self.chunks(note, |_, _, _| {});
        for address in addresses.into_inner() {
            if address < begin || address + 16 > end {
                return Err(beyond(cx, address));
            }
            cx.wgmma_reads_shared(address, mode);
        }
        Ok(())
    }

    /// First and last byte that it may come from.
    fn span(&self) -> (usize, usize) {
        let d = self.descriptor;
        let bytes = (self.bits as usize * self.k).div_ceil(8) as u64;
        let size = u64::from(self.bits / 8).max(1);
        let last = if self.transposed {
            let along = self.rows as u64 * size;
            d.start
                + (along / d.span() + 1) * d.leading.max(d.stride)
                + self.k as u64 / 8 * d.stride.max(d.leading)
                + 1024
        } else {
            // Eight rows lie together; swizzling moves nothing out of its 128 bytes.
            let groups = (self.rows as u64 / 8 - 1) * d.stride;
            let columns = if d.span() == 16 { bytes / 16 * d.leading } else { 0 };
            (d.start & !(d.span() - 1)) + groups + 8 * d.span() + columns - 1
        };
        (d.start as usize & !1023, last as usize)
    }
}

fn beyond(cx: &mut Cx<'_>, address: u64) -> Step {
    let message = "a matrix descriptor reaches beyond shared memory";
    cx.fail(Ub::OutOfBounds, None, Some(address), message)
}

/// Parts side by side along K, row-major.
///
/// # Errors
/// As [`Part::gather`].
pub fn side_by_side<T: OperandElement>(cx: &mut Cx<'_>, parts: &[Part]) -> Result<Vec<T>, Step> {
    let stride = parts[0].k * parts.len();
    let mut tile = vec![T::default(); parts[0].rows * stride];
    let mut at = 0;
    for run in parts.chunk_by(|a, b| a.next() == Some(*b)) {
        let k = run[0].k * run.len();
        Part { k, ..run[0] }.gather(cx, stride, &mut tile[at..])?;
        at += k;
    }
    Ok(tile)
}

/// Bytes of packed operands that a CTA keeps, beyond two of whatever size: they shall stay in the
/// cache of the host.
const KEPT_BYTES: usize = 256 << 10;

/// B packed for the kernels, parts side by side along K. The warps of a CTA that multiply with the
/// same B share the packed form until somebody writes to the shared memory that it came from; CTAs
/// of a cluster share it where they have the same codes.
///
/// # Errors
/// As [`Part::gather`].
pub fn packed_b<T: OperandElement>(
    cx: &mut Cx<'_>,
    core: &TensorCore,
    key: Vec<(usize, u64)>,
    parts: &[Part],
) -> Result<Rc<Packed>, Step> {
    let cta = &cx.cluster.ctas[cx.cta];
    if let Some(tile) = cta.tiles.iter().find(|t| t.key == key)
        && tile.version == cta.version_of(tile.span)
    {
        return Ok(tile.packed.clone());
    }
    let codes = side_by_side::<T>(cx, parts)?;
    let codes = Array2::from_shape_vec((parts[0].rows, parts[0].k * parts.len()), codes);
    let codes = codes.expect("rows x k");
    let mut tiles = cx.cluster.ctas.iter().flat_map(|c| &c.tiles);
    let known = tiles.find(|t| t.key == key && t.packed.is_of(codes.view()));
    let packed = known.map_or_else(|| Rc::new(core.pack_b(codes)), |t| t.packed.clone());
    let spans = parts.iter().map(Part::span);
    let span = spans.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1))).expect("one part at least");
    let cta = &mut cx.cluster.ctas[cx.cta];
    let version = cta.version_of(span);
    cta.tiles.retain(|t| t.key != key);
    cta.tiles.push(CachedTile { key, span, version, packed: packed.clone() });
    let bytes = |tiles: &[CachedTile]| tiles.iter().map(|t| t.packed.bytes()).sum::<usize>();
    while cta.tiles.len() > 2 && bytes(&cta.tiles) > KEPT_BYTES {
        cta.tiles.remove(0);
    }
    Ok(packed)
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
