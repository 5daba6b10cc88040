//! NCCL, NVIDIA's library that moves data between GPUs: opened at run time, used to move and never
//! to add.
//!
//! A [`Connection`] joins the devices of a group's ranks. All that it asks of NCCL are sends and
//! receives, in groups: every collective is a set of them, sums are the contract's own
//! (docs/numerics.md, section 8), and rows go straight to where they belong. It has a stream of its
//! own, so that what is sent travels beside what the device computes; events order the two.
//!
//! Source: NVIDIA, "NCCL Documentation", sections Creating a Communicator, Group Calls and
//! Point-to-Point Communication Functions; nccl.h of 2.32.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fathom_reference::backend::Result;
use fathom_reference::backend::direct::{Direct, Landing, Transfer};
use libloading::Library;

use crate::device::{Gpu, GpuError};
use crate::lane::{Lane, failed};
use crate::tensor::DeviceTensor;
use crate::wheel::{FetchError, Wheel, cache_dir};

/// The PyPI package that carries it, and the version that is fetched.
pub const PACKAGE: &str = "nvidia-nccl-cu13==2.32.*";

const WHEEL: Wheel<PathBuf> = Wheel {
    package: PACKAGE,
    folder: "nccl",
    expected: "nvidia/nccl/lib/libnccl.so.2",
    find_below: |folder| {
        let path = folder.join("nvidia/nccl/lib/libnccl.so.2");
        path.is_file().then_some(path)
    },
};

/// Finds NCCL: the file `FATHOM_NCCL`, in the cache, else by the name under which the loader may
/// know it.
pub fn find() -> PathBuf {
    let named = std::env::var_os("FATHOM_NCCL").map(PathBuf::from);
    let cached = || cache_dir().and_then(|cache| (WHEEL.find_below)(&cache.join(WHEEL.folder)));
    named.or_else(cached).unwrap_or_else(|| "libnccl.so.2".into())
}

/// Downloads its wheel with pip into the cache, unless it is there; says where it is.
///
/// # Errors
/// [`FetchError`]; the cache is then as it was before.
pub fn fetch() -> Result<PathBuf, FetchError> {
    WHEEL.fetch()
}

/// Why NCCL does not do what is asked.
#[derive(Debug, thiserror::Error)]
pub enum NcclError {
    /// The library cannot be opened, or lacks a function.
    #[error(
        "NCCL: {}: {reason}; `fathom kernels fetch-nccl` downloads it with pip, or set FATHOM_NCCL to \
         the file", path.display()
    )]
    Open {
        /// What was opened.
        path: PathBuf,
        /// The loader's words.
        reason: String,
    },
    /// A call failed.
    #[error("{call}: {message}")]
    Call {
        /// Name of the function.
        call: &'static str,
        /// The library's words.
        message: String,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] GpuError),
}

/// `ncclUniqueId`: by it the ranks of a communicator find each other.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; 128]);

/// `ncclUint8`: elements are moved as bytes.
const BYTES: c_int = 1;

type Comm = *mut c_void;
type Stream = *mut c_void;

/// The library, with the functions that are called.
pub struct Nccl {
    unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    init_rank: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> c_int,
    destroy: unsafe extern "C" fn(Comm) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    send: unsafe extern "C" fn(u64, usize, c_int, c_int, Comm, Stream) -> c_int,
    receive: unsafe extern "C" fn(u64, usize, c_int, c_int, Comm, Stream) -> c_int,
    words: unsafe extern "C" fn(c_int) -> *const c_char,
    last_words: unsafe extern "C" fn(Comm) -> *const c_char,
}

impl Nccl {
    /// Opens the library.
    ///
    /// # Errors
    /// [`NcclError::Open`].
    pub fn open(path: &Path) -> Result<Arc<Nccl>, NcclError> {
        let failed = |error: libloading::Error| NcclError::Open {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        // SAFETY: NCCL's initialisers prepare its own tables; the types are those of nccl.h; the
        // library stays loaded, as its threads and the handlers of the process's end need.
        unsafe {
            let library = ManuallyDrop::new(Library::new(path).map_err(failed)?);
            Ok(Arc::new(Nccl {
                unique_id: *library.get(b"ncclGetUniqueId\0").map_err(failed)?,
                init_rank: *library.get(b"ncclCommInitRank\0").map_err(failed)?,
                destroy: *library.get(b"ncclCommDestroy\0").map_err(failed)?,
                group_start: *library.get(b"ncclGroupStart\0").map_err(failed)?,
                group_end: *library.get(b"ncclGroupEnd\0").map_err(failed)?,
                send: *library.get(b"ncclSend\0").map_err(failed)?,
                receive: *library.get(b"ncclRecv\0").map_err(failed)?,
                words: *library.get(b"ncclGetErrorString\0").map_err(failed)?,
                last_words: *library.get(b"ncclGetLastError\0").map_err(failed)?,
            }))
        }
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), NcclError> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: both functions give texts of the library's own, or null.
        let text = |words: *const c_char| unsafe {
            let known = !words.is_null();
            known.then(|| CStr::from_ptr(words).to_string_lossy().into_owned())
        };
        // SAFETY: the last error is asked for without a communicator, as nccl.h allows.
        let (what, why) = unsafe { ((self.words)(code), (self.last_words)(std::ptr::null_mut())) };
        let words: Vec<String> =
            [text(what), text(why)].into_iter().flatten().filter(|w| !w.is_empty()).collect();
        Err(NcclError::Call { call, message: words.join(": ") })
    }

    /// What a communicator's first rank gives to all of them.
    ///
    /// # Errors
    /// [`NcclError::Call`].
    pub fn unique_id(&self) -> Result<Vec<u8>, NcclError> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: the pointer is to a live local of the type.
        self.check("ncclGetUniqueId", unsafe { (self.unique_id)(&mut id) })?;
        Ok(id.0.to_vec())
    }
}

/// One rank's end of a communicator, which its thread alone uses.
pub struct Connection {
    nccl: Arc<Nccl>,
    lane: Lane,
    comm: Comm,
}

impl Connection {
    /// Joins the communicator of `id` as rank `index` of `size`, and waits for the others; no two
    /// of them may have the same device.
    ///
    /// # Errors
    /// [`NcclError`].
    ///
    /// # Panics
    /// Where `id` is none of [`Nccl::unique_id`].
    pub fn join(
        nccl: &Arc<Nccl>,
        gpu: &Arc<Gpu>,
        (index, size): (usize, usize),
        id: &[u8],
    ) -> Result<Connection, NcclError> {
        let id = UniqueId(id.try_into().expect("an id of NCCL has 128 bytes"));
        let context = gpu.stream().context();
        context.bind_to_thread().map_err(GpuError::of("cuCtxSetCurrent"))?;
        let mut comm = std::ptr::null_mut();
        // SAFETY: the pointer is to a live local; the thread's context is the device's.
        let joined = unsafe { (nccl.init_rank)(&mut comm, size as c_int, id, index as c_int) };
        nccl.check("ncclCommInitRank", joined)?;
        Ok(Connection { nccl: Arc::clone(nccl), lane: Lane::new(gpu)?, comm })
    }

    fn transfer(
        &self,
        transfer: Transfer<DeviceTensor>,
    ) -> Result<Landing<DeviceTensor>, NcclError> {
        let Transfer { sent, room, received } = transfer;
        let made = self.lane.room(&room)?;
        self.lane.after_computing()?;
        let stream = self.lane.stream.cu_stream().cast();
        // SAFETY: addresses and lengths are those of tensors that live until the stream is through.
        unsafe {
            self.nccl.check("ncclGroupStart", (self.nccl.group_start)())?;
            for s in sent.iter().filter(|s| !s.elements.is_empty()) {
                let (address, bytes) = s.buffer.span(&s.elements);
                let code =
                    (self.nccl.send)(address, bytes, BYTES, s.to as c_int, self.comm, stream);
                self.nccl.check("ncclSend", code)?;
            }
            for r in received.iter().filter(|r| !r.elements.is_empty()) {
                let (address, bytes) = made[r.buffer].span(&r.elements);
                let code =
                    (self.nccl.receive)(address, bytes, BYTES, r.from as c_int, self.comm, stream);
                self.nccl.check("ncclRecv", code)?;
            }
            self.nccl.check("ncclGroupEnd", (self.nccl.group_end)())?;
        }
        Ok(self.lane.landing(sent.into_iter().map(|s| s.buffer).collect(), made)?)
    }
}

impl Direct<DeviceTensor> for Connection {
    fn begin(&self, transfer: Transfer<DeviceTensor>) -> Result<Landing<DeviceTensor>> {
        self.transfer(transfer).map_err(failed(self.lane.gpu.kind().name()))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // A failure means that the context is lost, or that another rank is; nothing is left to do.
        let _ = self.lane.stream.synchronize();
        // SAFETY: the communicator is live, its stream is through, and it is not used again.
        let _ = unsafe { (self.nccl.destroy)(self.comm) };
    }
}
