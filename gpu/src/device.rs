//! A GPU as the host files of the kernels see it: memory, matrices, compiled kernels, launches.
//!
//! A [`Gpu`] is one device with one stream, on which everything happens in order. It is opened over
//! whatever `libcuda` the loader finds, NVIDIA's or the emulated one, by the same code.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaContext, CudaStream, DriverError};
use fathom_reference::Tensor;
use fathom_trace::DType;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::compile::{CompileError, Compiler, Source};
use crate::driver::{self, Driver};
use crate::launch::{self, Arg, Kernel, LaunchConfig, Swizzle, TensorMap};
use crate::memory::{self, Memory, Rows};
use crate::nvrtc::{self, Nvrtc};
use crate::tensor::{DeviceTensor, HeadRows, Matrix, TMA_BYTES};

/// Which CUDA driver a run wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// NVIDIA's driver, with a GPU.
    Cuda,
    /// The emulated driver, without one.
    Emulated,
}

impl DeviceKind {
    /// The word on the command line: `cuda` or `emulated`.
    pub fn name(self) -> &'static str {
        match self {
            DeviceKind::Cuda => "cuda",
            DeviceKind::Emulated => "emulated",
        }
    }
}

/// Why a kernel could not run.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// There is no driver library, or no usable device.
    #[error(
        "no CUDA device: {reason}; install NVIDIA's driver, or use `--device emulated`, which needs no GPU"
    )]
    NoDevice {
        /// The loader's or the driver's words.
        reason: String,
    },
    /// The loaded driver is the other one.
    #[error("--device {}: expected {expected}, found {found} in libcuda.so.1", wanted.name())]
    OtherDriver {
        /// The driver that was asked for.
        wanted: DeviceKind,
        /// Its name, as the error calls it.
        expected: &'static str,
        /// The name of the driver that the loader found.
        found: &'static str,
    },
    /// The driver cannot load PTX of CUDA 13.
    #[error("the CUDA driver supports CUDA {}.{}: expected 13.0 or newer, update it", version / 1000, version % 1000 / 10)]
    OldDriver {
        /// CUDA version that the driver supports, as `cuDriverGetVersion` gives it: 13000 for 13.0.
        version: i32,
    },
    /// The device is not Hopper.
    #[error("{name} is sm_{major}{minor}: expected sm_90, for which the kernels are written")]
    Architecture {
        /// The device's name.
        name: String,
        /// Major number of its compute capability.
        major: i32,
        /// Minor number of its compute capability.
        minor: i32,
    },
    /// NVRTC, which compiles the kernels, was not found.
    #[error(
        "NVRTC, which compiles the kernels, was not found: `fathom kernels fetch-nvrtc` downloads it with pip, or set FATHOM_NVRTC to its folder"
    )]
    NoNvrtc,
    /// There is no folder to keep compiled kernels in.
    #[error("no cache folder: expected XDG_CACHE_HOME or HOME to be set, or FATHOM_CACHE")]
    NoCache,
    /// A kernel cannot be compiled.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// A launch's arguments are not the kernel's parameters.
    #[error("{kernel}: expected parameters of {expected:?} bytes, found arguments of {found:?}")]
    Arguments {
        /// Name of the kernel's entry.
        kernel: &'static str,
        /// Bytes of each of its parameters.
        expected: Vec<usize>,
        /// Bytes of each of the arguments.
        found: Vec<usize>,
    },
    /// There is no room for a tensor.
    #[error(
        "no room on the device for {tensor}: it takes {bytes} bytes beside {total} that are held{}, and \
         {limit} are there; make micro-batches smaller or recompute more",
        listed(held)
    )]
    OutOfMemory {
        /// The tensor and the op that it is for.
        tensor: String,
        /// Bytes that it takes.
        bytes: usize,
        /// Bytes that may be held.
        limit: usize,
        /// Bytes that are held.
        total: usize,
        /// What holds most of them: ops whose outputs they are, with bytes.
        held: Vec<(&'static str, usize)>,
    },
    /// A call of the driver failed.
    #[error("{call}: {message}")]
    Driver {
        /// Name of the driver's function that failed.
        call: &'static str,
        /// The driver's name for the error.
        message: String,
    },
}

impl GpuError {
    /// For `map_err`: the driver's error of this call.
    pub(crate) fn of(call: &'static str) -> impl Fn(DriverError) -> GpuError {
        move |error| GpuError::Driver {
            call,
            message: match error.error_name() {
                Ok(name) => name.to_string_lossy().into_owned(),
                Err(_) => format!("error {}", error.0 as u32),
            },
        }
    }
}

/// ` (a by gemm, b by upload)`.
fn listed(held: &[(&'static str, usize)]) -> String {
    if held.is_empty() {
        return String::new();
    }
    let words: Vec<String> = held.iter().map(|(by, bytes)| format!("{bytes} by {by}")).collect();
    format!(" ({})", words.join(", "))
}

/// A source with its constants: what a kernel is cached by.
type Key = (&'static str, &'static str, Vec<(&'static str, u64)>);

/// One device, its stream and the kernels that were compiled for it.
pub struct Gpu {
    stream: Arc<CudaStream>,
    kind: DeviceKind,
    description: driver::Device,
    compiler: Compiler,
    /// With the dynamic shared memory that each may use.
    kernels: Mutex<HashMap<Key, (Arc<Kernel>, u32)>>,
    memory: Arc<Memory>,
    /// In a rehearsal, where nothing is loaded or launched: the kernels that were asked for.
    asked: Option<Mutex<BTreeMap<Constants, Source<'static>>>>,
}

/// A source with constants for which it has not been compiled.
pub type Uncompiled = (Source<'static>, Vec<(&'static str, u64)>);

/// A source's path with its constants: what is compiled once.
type Constants = (&'static str, Vec<(&'static str, u64)>);

/// An entry that was compiled and loaded.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Loaded {
    /// Path of its source below `gpu/kernels`.
    pub source: String,
    /// Name of the entry.
    pub entry: String,
    /// The constants that it was compiled for.
    pub defines: Vec<(String, u64)>,
    /// Dynamic shared memory of a launch, in bytes.
    pub shared_bytes: u32,
}

/// What [`Gpu::open`] needs, all of it there.
pub struct Ready {
    kind: DeviceKind,
    ordinal: usize,
    description: driver::Device,
    nvrtc: Nvrtc,
    cache: PathBuf,
}

/// NVRTC, and the folder in which compiled kernels are kept.
///
/// # Errors
/// [`GpuError::NoCache`], [`GpuError::NoNvrtc`].
pub fn compiler_ready() -> Result<(Nvrtc, PathBuf), GpuError> {
    let cache = nvrtc::cache_dir().ok_or(GpuError::NoCache)?.join("kernels");
    Ok((nvrtc::find().ok_or(GpuError::NoNvrtc)?, cache))
}

/// Whether kernels of a machine's rank `local_rank` could run on this driver, which must be of the
/// wanted kind. Ranks take its devices in turns, and share them where they are fewer.
///
/// # Errors
/// [`GpuError`]: what is missing, and how to get it.
pub fn ready(wanted: DeviceKind, driver: Driver, local_rank: usize) -> Result<Ready, GpuError> {
    let ready = present(wanted, driver, local_rank)?;
    let (major, minor) = ready.description.compute_capability;
    match major {
        9 => Ok(ready),
        _ => Err(GpuError::Architecture { name: ready.description.name, major, minor }),
    }
}

/// As [`ready`], for a device of any architecture.
fn present(wanted: DeviceKind, driver: Driver, local_rank: usize) -> Result<Ready, GpuError> {
    let (version, devices, emulated) = match driver {
        Driver::Absent { reason } | Driver::Unusable { reason, .. } => {
            return Err(GpuError::NoDevice { reason });
        }
        Driver::Present { version, devices, emulated } => (version, devices, emulated),
    };
    let names = ["NVIDIA's driver", "the emulated driver"];
    if emulated != (wanted == DeviceKind::Emulated) {
        let (expected, found) = (names[usize::from(!emulated)], names[usize::from(emulated)]);
        return Err(GpuError::OtherDriver { wanted, expected, found });
    }
    let ordinal = local_rank.checked_rem(devices.len()).unwrap_or(0);
    let Some(description) = devices.into_iter().nth(ordinal) else {
        return Err(GpuError::NoDevice { reason: "the driver has no device".to_owned() });
    };
    if version < 13000 {
        return Err(GpuError::OldDriver { version });
    }
    let (nvrtc, cache) = compiler_ready()?;
    Ok(Ready { kind: wanted, ordinal, description, nvrtc, cache })
}

impl Gpu {
    /// Opens device 0 of the driver that the loader finds, which must be of the wanted kind.
    ///
    /// # Errors
    /// [`GpuError`]: what is missing, and how to get it.
    pub fn open(wanted: DeviceKind) -> Result<Gpu, GpuError> {
        Gpu::open_for(wanted, 0)
    }

    /// Opens the device of a machine's rank `local_rank`, as [`ready`] chooses it.
    ///
    /// # Errors
    /// As [`Gpu::open`].
    pub fn open_for(wanted: DeviceKind, local_rank: usize) -> Result<Gpu, GpuError> {
        Gpu::of(ready(wanted, driver::probe(), local_rank)?)
    }

    /// The same, of any architecture: what is done there without kernels, such as exchanges.
    ///
    /// # Errors
    /// As [`Gpu::open`].
    pub fn open_for_exchanges(wanted: DeviceKind, local_rank: usize) -> Result<Gpu, GpuError> {
        Gpu::of(present(wanted, driver::probe(), local_rank)?)
    }

    fn of(ready: Ready) -> Result<Gpu, GpuError> {
        let Ready { kind, ordinal, description, nvrtc, cache } = ready;
        let compiler = Compiler::new(&nvrtc, &cache)?;
        let context =
            CudaContext::new(ordinal).map_err(GpuError::of("cuDevicePrimaryCtxRetain"))?;
        let stream = context.default_stream();
        let memory = Memory::new(stream.clone(), description.memory_bytes)?;
        let kernels = Mutex::default();
        Ok(Gpu { stream, kind, description, compiler, kernels, memory, asked: None })
    }

    /// The same device for a rehearsal: tensors have no memory, nothing is loaded or launched, and
    /// it is noted which kernels were asked for.
    pub fn rehearsing(&self) -> Gpu {
        Gpu {
            stream: self.stream.clone(),
            kind: self.kind,
            description: self.description.clone(),
            compiler: self.compiler.clone(),
            kernels: Mutex::default(),
            memory: Memory::pretended(self.stream.clone()),
            asked: Some(Mutex::default()),
        }
    }

    /// What was asked for in a rehearsal and is not in the cache, by source and constants.
    pub fn uncompiled(&self) -> Vec<Uncompiled> {
        let Some(asked) = &self.asked else { return Vec::new() };
        let asked = asked.lock().expect("no panic while it is held");
        let all = asked.iter().map(|((_, defines), source)| (*source, defines.clone()));
        all.filter(|(source, defines)| !self.compiler.is_cached(*source, defines)).collect()
    }

    /// Compiles these into the cache, several at a time; `done` is called after each.
    ///
    /// # Errors
    /// [`GpuError::Compile`], of one that fails.
    pub fn compile(&self, all: &[Uncompiled], done: &(dyn Fn() + Sync)) -> Result<(), GpuError> {
        all.par_iter().try_for_each(|(source, defines)| {
            self.compiler.compile(*source, defines)?;
            done();
            Ok(())
        })
    }

    /// Lets tensors take at most `bytes` of device memory; what is held already counts.
    pub fn cap_memory(&self, bytes: usize) {
        self.memory.cap(bytes);
    }

    /// How often the host has waited for the device so far.
    pub fn waits(&self) -> u64 {
        self.memory.waits()
    }

    /// Waits until all that was enqueued is done.
    ///
    /// # Errors
    /// [`GpuError::Driver`], also for what went wrong in a kernel before.
    pub(crate) fn wait(&self) -> Result<(), GpuError> {
        self.memory.wait()
    }

    /// The stream on which everything happens.
    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Lets the driver write out what it has recorded of the work so far.
    ///
    /// # Errors
    /// [`GpuError`].
    pub fn write_records(&self) -> Result<(), GpuError> {
        cudarc::driver::profiler_stop().map_err(GpuError::of("cuProfilerStop"))
    }

    /// The same device, for which one source or header of the kernels has another text: so tests
    /// plant defects in kernels and hold the suites to finding them.
    pub fn with_planted(self, source: Source<'static>) -> Gpu {
        Gpu { compiler: self.compiler.with_planted(source), kernels: Mutex::default(), ..self }
    }

    /// The same device, on which kernels are launched as on one of so many SMs: no result may
    /// depend on their number.
    pub fn with_sm_count(mut self, sms: u32) -> Gpu {
        self.description.sm_count = sms as i32;
        self
    }

    /// Whose driver it is, NVIDIA's or the emulated one.
    pub fn kind(&self) -> DeviceKind {
        self.kind
    }

    /// The device as the driver describes it.
    pub fn description(&self) -> &driver::Device {
        &self.description
    }

    /// The entry `name` of `source` with these constants, compiled and loaded once.
    ///
    /// # Errors
    /// [`GpuError::Compile`], [`GpuError::Driver`].
    pub fn kernel(
        &self,
        source: Source<'static>,
        name: &'static str,
        defines: &[(&'static str, u64)],
        shared_bytes: u32,
    ) -> Result<Arc<Kernel>, GpuError> {
        if let Some(asked) = &self.asked {
            let constants = (source.name, defines.to_vec());
            asked.lock().expect("no panic while it is held").insert(constants, source);
            return Ok(Arc::new(Kernel::unloaded(name)));
        }
        let key = (source.name, name, defines.to_vec());
        let mut kernels = self.kernels.lock().expect("no panic while it is held");
        if let Some((kernel, _)) = kernels.get(&key) {
            return Ok(kernel.clone());
        }
        let ptx = self.compiler.compile(source, defines)?.ptx;
        let module = self
            .stream
            .context()
            .load_module(cudarc::nvrtc::Ptx::from_src(ptx))
            .map_err(GpuError::of("cuModuleLoadData"))?;
        let kernel = Arc::new(Kernel::new(&module, name, shared_bytes)?);
        kernels.insert(key, (kernel.clone(), shared_bytes));
        Ok(kernel)
    }

    /// Of every entry that was loaded so far: the most registers that a variant of it has.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    pub fn registers(&self) -> Result<BTreeMap<&'static str, u32>, GpuError> {
        let mut most = BTreeMap::new();
        for (kernel, _) in self.kernels.lock().expect("no panic while it is held").values() {
            let registers = most.entry(kernel.name()).or_default();
            *registers = kernel.registers()?.max(*registers);
        }
        Ok(most)
    }

    /// What was loaded so far, in order of sources, entries and constants.
    pub fn loaded(&self) -> Vec<Loaded> {
        let kernels = self.kernels.lock().expect("no panic while it is held");
        let one = |((source, entry, defines), (_, shared_bytes)): (&Key, &(_, u32))| Loaded {
            source: (*source).to_owned(),
            entry: (*entry).to_owned(),
            defines: defines.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect(),
            shared_bytes: *shared_bytes,
        };
        let mut all: Vec<Loaded> = kernels.iter().map(one).collect();
        all.sort();
        all
    }

    /// Enqueues a kernel on the device's stream; it does not wait for it.
    ///
    /// # Errors
    /// As [`GpuError::Arguments`] and [`GpuError::Driver`].
    pub fn launch(
        &self,
        kernel: &Kernel,
        config: &LaunchConfig,
        args: &[Arg<'_>],
    ) -> Result<(), GpuError> {
        if self.asked.is_some() {
            return Ok(());
        }
        launch::launch(&self.stream, kernel, config, args)
    }

    /// A tensor map by which TMA copies boxes of `rows` x `columns` elements of `matrix`.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    pub fn tensor_map<'a>(
        &self,
        matrix: &'a Matrix,
        (rows, columns): (u32, u32),
        swizzle: Swizzle,
    ) -> Result<TensorMap<'a>, GpuError> {
        TensorMap::new(matrix, (rows, columns), swizzle)
    }

    /// What tensors are allocated for from now on: an op's output, by the names of both.
    pub(crate) fn purpose(&self, op: &'static str, tensor: &str) {
        self.memory.purpose(op, tensor);
    }

    /// A tensor that nobody has written.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`], [`GpuError::Driver`].
    pub fn tensor(&self, dtype: DType, shape: &[usize]) -> Result<DeviceTensor, GpuError> {
        let bytes = shape.iter().product::<usize>() * dtype.size();
        let block = Arc::new(self.memory.allocate(bytes)?);
        Ok(DeviceTensor::new(block, 0, dtype, shape))
    }

    /// A tensor of zero bits.
    ///
    /// # Errors
    /// As [`Gpu::tensor`].
    pub fn zeros(&self, dtype: DType, shape: &[usize]) -> Result<DeviceTensor, GpuError> {
        let tensor = self.tensor(dtype, shape)?;
        tensor.block.clear(tensor.bytes())?;
        Ok(tensor)
    }

    /// Copies a tensor to the device.
    ///
    /// # Errors
    /// As [`Gpu::tensor`].
    pub fn upload(&self, tensor: &Tensor) -> Result<DeviceTensor, GpuError> {
        let on_device = self.tensor(tensor.dtype(), tensor.shape())?;
        on_device.block.upload(tensor.bytes())?;
        Ok(on_device)
    }

    /// Whole numbers that a kernel reads: lengths of segments, offsets of groups.
    ///
    /// # Errors
    /// As [`Gpu::tensor`].
    pub fn constants(&self, numbers: &[i32]) -> Result<DeviceTensor, GpuError> {
        self.upload(&Tensor::from_vec(&[numbers.len()], numbers.to_vec()))
    }

    /// Copies a tensor to the host; waits for all work before it.
    ///
    /// # Errors
    /// [`GpuError::Driver`], also for what went wrong in a kernel before.
    pub fn download(&self, tensor: &DeviceTensor) -> Result<Tensor, GpuError> {
        let mut bytes = vec![0; tensor.bytes()];
        tensor.block.download(tensor.offset, &mut bytes)?;
        Ok(Tensor::from_bytes(tensor.dtype(), tensor.shape(), &bytes))
    }

    /// A copy on the device.
    ///
    /// # Errors
    /// As [`Gpu::tensor`].
    pub fn copy(&self, tensor: &DeviceTensor) -> Result<DeviceTensor, GpuError> {
        let copy = self.tensor(tensor.dtype(), tensor.shape())?;
        let bytes = tensor.bytes();
        memory::copy_rows(tensor.as_rows(bytes), copy.as_rows(bytes), 1, bytes)?;
        Ok(copy)
    }

    /// The tensor for writing: itself where nobody else holds it, else a copy.
    ///
    /// # Errors
    /// As [`Gpu::tensor`].
    pub fn writable(&self, tensor: DeviceTensor) -> Result<DeviceTensor, GpuError> {
        if tensor.is_sole() { Ok(tensor) } else { self.copy(&tensor) }
    }

    /// A tensor as TMA copies it: itself where its rows start at multiples of 16 bytes, else a copy
    /// with its rows set apart.
    ///
    /// # Errors
    /// As [`Gpu::tensor`].
    pub fn matrix(&self, tensor: &DeviceTensor) -> Result<Matrix, GpuError> {
        let (rows, columns) = tensor.rows_columns();
        let row_bytes = columns * tensor.dtype().size();
        let (block, offset) = (tensor.block.clone(), tensor.offset);
        if row_bytes.is_multiple_of(TMA_BYTES) && offset.is_multiple_of(TMA_BYTES) {
            let dtype = tensor.dtype();
            return Ok(Matrix { block, offset, dtype, rows, columns, pitch_bytes: row_bytes });
        }
        let matrix = self.padded(tensor.dtype(), rows, columns)?;
        memory::copy_rows(tensor.as_rows(row_bytes), matrix.as_rows(), rows, row_bytes)?;
        Ok(matrix)
    }

    /// `heads` heads of `columns` columns that lie side by side in the rows of a tensor, from
    /// column `first` on, as TMA copies them: where they are if each starts at a multiple of 16
    /// bytes, else a copy with the heads set apart. Heads of no column become heads of eight zeros.
    ///
    /// # Errors
    /// As [`Gpu::tensor`].
    ///
    /// # Panics
    /// Where a row has fewer columns.
    pub fn head_rows(
        &self,
        tensor: &DeviceTensor,
        first: usize,
        heads: usize,
        columns: usize,
    ) -> Result<HeadRows, GpuError> {
        let (dtype, (rows, all)) = (tensor.dtype(), tensor.rows_columns());
        assert!(first + heads * columns <= all, "{heads} heads of {columns} from {first} of {all}");
        if columns == 0 {
            return self.head_rows(&self.zeros(dtype, &[rows, heads * 8])?, 0, heads, 8);
        }
        let [start, head_bytes, used, row_bytes] =
            [first, columns, heads * columns, all].map(|columns| columns * dtype.size());
        let offset = tensor.offset + start;
        if [offset, head_bytes, row_bytes].iter().all(|bytes| bytes.is_multiple_of(TMA_BYTES)) {
            let block = tensor.block.clone();
            return Ok(HeadRows {
                block,
                offset,
                dtype,
                rows,
                heads,
                columns,
                head_bytes,
                row_bytes,
            });
        }
        let dense = self.tensor(dtype, &[rows * heads, columns])?;
        let from = Rows { offset, ..tensor.as_rows(row_bytes) };
        memory::copy_rows(from, dense.as_rows(used), rows, used)?;
        let Matrix { block, offset, pitch_bytes: head_bytes, .. } = self.matrix(&dense)?;
        let row_bytes = heads * head_bytes;
        Ok(HeadRows { block, offset, dtype, rows, heads, columns, head_bytes, row_bytes })
    }

    /// A tensor map by which TMA copies boxes of `rows` rows, `heads` heads and 64 columns.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    pub fn head_map<'a>(
        &self,
        x: &'a HeadRows,
        (rows, heads): (u32, u32),
    ) -> Result<TensorMap<'a>, GpuError> {
        TensorMap::of_heads(x, (rows, heads))
    }

    /// A matrix that nobody has written, its rows at multiples of 16 bytes.
    ///
    /// # Errors
    /// As [`Gpu::tensor`].
    pub fn padded(&self, dtype: DType, rows: usize, columns: usize) -> Result<Matrix, GpuError> {
        let pitch_bytes = (columns * dtype.size()).next_multiple_of(TMA_BYTES);
        let block = Arc::new(self.memory.allocate(rows * pitch_bytes)?);
        Ok(Matrix { block, offset: 0, dtype, rows, columns, pitch_bytes })
    }

    /// A matrix as a dense tensor of this shape: itself where its rows follow one another, else a
    /// copy.
    ///
    /// # Errors
    /// As [`Gpu::tensor`].
    ///
    /// # Panics
    /// Where the shape has another number of elements.
    pub fn dense(&self, matrix: Matrix, shape: &[usize]) -> Result<DeviceTensor, GpuError> {
        let row_bytes = matrix.columns * matrix.dtype.size();
        let elements: usize = shape.iter().product();
        assert_eq!(elements, matrix.rows * matrix.columns, "elements of {shape:?}");
        if row_bytes == matrix.pitch_bytes || matrix.rows == 1 {
            return Ok(DeviceTensor::new(matrix.block, matrix.offset, matrix.dtype, shape));
        }
        let tensor = self.tensor(matrix.dtype, shape)?;
        memory::copy_rows(matrix.as_rows(), tensor.as_rows(row_bytes), matrix.rows, row_bytes)?;
        Ok(tensor)
    }
}
