//! Device memory: stream-ordered allocation, who holds how much of it, and the copies.
//!
//! A `Buffer` is memory that is given back when its last handle goes. Everything happens on one
//! stream, so memory that is given back may be handed out again at once: what was enqueued before
//! runs before. Each allocation is booked under a category (the op whose output it holds, or
//! `upload`), which is what an error of missing memory lists.
//!
//! Source: NVIDIA, "CUDA Driver API", sections Memory Management and Stream Ordered Memory
//! Allocator.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaStream, result, sys};

use crate::device::GpuError;

/// The smallest allocation, so that none is empty: the driver refuses to allocate nothing.
const LEAST_BYTES: usize = 16;

/// Where a block without memory says that it lies: aligned as memory is.
const PRETENDED_ADDRESS: sys::CUdeviceptr = 256;

/// Categories that an error of missing memory lists.
const LISTED: usize = 6;

/// The memory of one device, as far as this process holds it.
pub(crate) struct Memory {
    stream: Arc<CudaStream>,
    /// Whether the driver has stream-ordered allocation.
    ordered: bool,
    /// Whether blocks have no memory: in a rehearsal.
    pretended: bool,
    books: Mutex<Books>,
    /// How often the host has waited for the device.
    waits: AtomicU64,
}

/// What is held, and what is being done.
#[derive(Default)]
struct Books {
    /// Most bytes that may be held at once.
    limit: usize,
    /// Bytes by category.
    held: BTreeMap<&'static str, usize>,
    total: usize,
    /// Category of the allocations to come, and the tensor that they are for.
    category: &'static str,
    tensor: String,
}

/// Memory on the device; given back when dropped.
pub(crate) struct Block {
    memory: Arc<Memory>,
    address: sys::CUdeviceptr,
    bytes: usize,
    category: &'static str,
}

impl Memory {
    /// The memory behind `stream`, of which at most `limit` bytes are taken.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    pub(crate) fn new(stream: Arc<CudaStream>, limit: usize) -> Result<Arc<Memory>, GpuError> {
        let context = stream.context();
        let pools = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED;
        let ordered = context.attribute(pools).map_err(GpuError::of("cuDeviceGetAttribute"))? > 0;
        let books = Mutex::new(Books { limit, category: "other", ..Books::default() });
        let waits = AtomicU64::new(0);
        Ok(Arc::new(Memory { stream, ordered, pretended: false, books, waits }))
    }

    /// Memory of which blocks have none: nothing is allocated, written or read.
    pub(crate) fn pretended(stream: Arc<CudaStream>) -> Arc<Memory> {
        let books = Mutex::new(Books { limit: usize::MAX, category: "other", ..Books::default() });
        let waits = AtomicU64::new(0);
        Arc::new(Memory { stream, ordered: false, pretended: true, books, waits })
    }

    /// Lowers the number of bytes that may be held at once.
    pub(crate) fn cap(&self, bytes: usize) {
        let mut books = self.books.lock().expect("no panic while it is held");
        books.limit = books.limit.min(bytes);
    }

    /// How often the host has waited for the device.
    pub(crate) fn waits(&self) -> u64 {
        self.waits.load(Relaxed)
    }

    /// Books what is allocated from now on under `category`, for the tensor of this name.
    pub(crate) fn purpose(&self, category: &'static str, tensor: &str) {
        let mut books = self.books.lock().expect("no panic while it is held");
        books.category = category;
        books.tensor.clear();
        books.tensor.push_str(tensor);
    }

    /// `bytes` of memory that nobody has written.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`] with what holds the memory, [`GpuError::Driver`].
    pub(crate) fn allocate(self: &Arc<Memory>, bytes: usize) -> Result<Block, GpuError> {
        let bytes = bytes.max(LEAST_BYTES);
        if self.pretended {
            let (memory, category) = (self.clone(), "rehearsal");
            return Ok(Block { memory, address: PRETENDED_ADDRESS, bytes, category });
        }
        let mut books = self.books.lock().expect("no panic while it is held");
        if books.total + bytes > books.limit {
            return Err(books.out_of_memory(bytes));
        }
        self.bind()?;
        // SAFETY: the stream is live and its context current.
        let address = unsafe {
            if self.ordered {
                result::malloc_async(self.stream.cu_stream(), bytes)
            } else {
                result::malloc_sync(bytes)
            }
        };
        let address = address.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => books.out_of_memory(bytes),
            _ => GpuError::of("cuMemAllocAsync")(error),
        })?;
        let category = books.category;
        *books.held.entry(category).or_default() += bytes;
        books.total += bytes;
        Ok(Block { memory: self.clone(), address, bytes, category })
    }

    /// Waits until all that was enqueued is done.
    ///
    /// # Errors
    /// [`GpuError::Driver`], also for what went wrong in a kernel before.
    pub(crate) fn wait(&self) -> Result<(), GpuError> {
        self.waits.fetch_add(1, Relaxed);
        self.stream.synchronize().map_err(GpuError::of("cuStreamSynchronize"))
    }

    /// Makes the stream's context the thread's.
    fn bind(&self) -> Result<(), GpuError> {
        self.stream.context().bind_to_thread().map_err(GpuError::of("cuCtxSetCurrent"))
    }
}

impl Books {
    fn out_of_memory(&self, bytes: usize) -> GpuError {
        let mut held: Vec<(&'static str, usize)> =
            self.held.iter().filter(|(_, n)| **n > 0).map(|(c, n)| (*c, *n)).collect();
        held.sort_by_key(|&(category, n)| (std::cmp::Reverse(n), category));
        held.truncate(LISTED);
        let tensor = if self.tensor.is_empty() {
            self.category.to_owned()
        } else {
            format!("{} of {}", self.tensor, self.category)
        };
        GpuError::OutOfMemory { tensor, bytes, limit: self.limit, total: self.total, held }
    }
}

impl Block {
    /// The address on the device.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Whether there is no memory behind it.
    pub(crate) fn is_pretended(&self) -> bool {
        self.memory.pretended
    }

    /// Bytes of the block.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Enqueues the copy of `bytes` from the host to the start of the block.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    ///
    /// # Panics
    /// Where the block is shorter.
    pub(crate) fn upload(&self, bytes: &[u8]) -> Result<(), GpuError> {
        assert!(bytes.len() <= self.bytes, "{} bytes into {}", bytes.len(), self.bytes);
        if bytes.is_empty() || self.is_pretended() {
            return Ok(());
        }
        self.memory.bind()?;
        // SAFETY: the block has room for the bytes; from pageable memory the driver has copied them
        // when the call returns.
        unsafe { result::memcpy_htod_async(self.address, bytes, self.memory.stream.cu_stream()) }
            .map_err(GpuError::of("cuMemcpyHtoDAsync"))
    }

    /// Copies `bytes.len()` bytes from `offset` to the host, after all that was enqueued.
    ///
    /// # Errors
    /// [`GpuError::Driver`], also for what went wrong in a kernel before.
    ///
    /// # Panics
    /// Where the block is shorter.
    pub(crate) fn download(&self, offset: usize, bytes: &mut [u8]) -> Result<(), GpuError> {
        assert!(offset + bytes.len() <= self.bytes, "{offset} + {} bytes", bytes.len());
        if self.is_pretended() {
            bytes.fill(0);
            return Ok(());
        }
        self.memory.bind()?;
        if !bytes.is_empty() {
            let address = self.address + offset as u64;
            // SAFETY: the block holds the bytes; the wait below ends before `bytes` is looked at.
            unsafe { result::memcpy_dtoh_async(bytes, address, self.memory.stream.cu_stream()) }
                .map_err(GpuError::of("cuMemcpyDtoHAsync"))?;
        }
        self.memory.wait()
    }

    /// Enqueues the filling of the block's first `bytes` with zero bits.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    pub(crate) fn clear(&self, bytes: usize) -> Result<(), GpuError> {
        if bytes == 0 || self.is_pretended() {
            return Ok(());
        }
        self.memory.bind()?;
        // SAFETY: the block is live and as long.
        unsafe { result::memset_d8_async(self.address, 0, bytes, self.memory.stream.cu_stream()) }
            .map_err(GpuError::of("cuMemsetD8Async"))
    }
}

/// Rows of bytes in two blocks: where each begins, and how far its rows are apart.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) block: &'a Block,
    pub(crate) offset: usize,
    pub(crate) pitch_bytes: usize,
}

/// Enqueues the copy of `rows` rows of `row_bytes` each.
///
/// # Errors
/// [`GpuError::Driver`].
///
/// # Panics
/// Where a block is shorter.
pub(crate) fn copy_rows(
    from: Rows<'_>,
    to: Rows<'_>,
    rows: usize,
    row_bytes: usize,
) -> Result<(), GpuError> {
    if rows == 0 || row_bytes == 0 {
        return Ok(());
    }
    for part in [from, to] {
        let end = part.offset + (rows - 1) * part.pitch_bytes + row_bytes;
        assert!(end <= part.block.bytes, "{end} bytes of {}", part.block.bytes);
        assert!(rows == 1 || row_bytes <= part.pitch_bytes, "rows overlap");
    }
    let memory = &from.block.memory;
    if memory.pretended {
        return Ok(());
    }
    memory.bind()?;
    let (source, target) =
        (from.block.address + from.offset as u64, to.block.address + to.offset as u64);
    let stream = memory.stream.cu_stream();
    if rows == 1 || (from.pitch_bytes == row_bytes && to.pitch_bytes == row_bytes) {
        // SAFETY: both blocks are live and long enough, as asserted.
        return unsafe { result::memcpy_dtod_async(target, source, rows * row_bytes, stream) }
            .map_err(GpuError::of("cuMemcpyDtoDAsync"));
    }
    let device = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
    let copy = sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: device,
        srcHost: std::ptr::null(),
        srcDevice: source,
        srcArray: std::ptr::null_mut(),
        srcPitch: from.pitch_bytes,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: device,
        dstHost: std::ptr::null_mut(),
        dstDevice: target,
        dstArray: std::ptr::null_mut(),
        dstPitch: to.pitch_bytes,
        WidthInBytes: row_bytes,
        Height: rows,
    };
    // SAFETY: the description is live during the call; both blocks are live and long enough, as
    // asserted.
    unsafe { sys::cuMemcpy2DAsync_v2(&copy, stream).result() }
        .map_err(GpuError::of("cuMemcpy2DAsync"))
}

impl Drop for Block {
    fn drop(&mut self) {
        let memory = &self.memory;
        if memory.pretended {
            return;
        }
        // A failure means that the context is lost, which the next call reports.
        let _ = memory.bind();
        // SAFETY: the address came from the allocator of the same kind and is given back once;
        // what uses it was enqueued before on the same stream, or is waited for.
        let _ = unsafe {
            if memory.ordered {
                result::free_async(self.address, memory.stream.cu_stream())
            } else {
                memory.stream.synchronize().and(result::free_sync(self.address))
            }
        };
        if let Ok(mut books) = memory.books.lock() {
            books.total -= self.bytes;
            if let Some(held) = books.held.get_mut(self.category) {
                *held -= self.bytes;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_memory_names_the_tensor_and_what_holds_most() {
        let held = BTreeMap::from([("gemm", 700), ("upload", 200), ("cast", 0)]);
        let (category, tensor) = ("rms_norm", "y, rstd".to_owned());
        let books = Books { limit: 1000, held, total: 900, category, tensor };
        let message = books.out_of_memory(128).to_string();
        let expected = "no room on the device for y, rstd of rms_norm: it takes 128 bytes beside \
                        900 that are held (700 by gemm, 200 by upload), and 1000 are there";
        assert!(message.starts_with(expected), "{message}");
    }
}
