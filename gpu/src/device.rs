//! A GPU as the host files of the kernels see it: memory, matrices, compiled kernels, launches.
//!
//! A [`Gpu`] is one device with one stream, on which everything happens in order. It is opened over
//! whatever `libcuda` the loader finds, NVIDIA's or the emulated one, by the same code.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DriverError};
use fathom_reference::Tensor;
use fathom_trace::DType;

use crate::compile::{CompileError, Compiler, Source};
use crate::driver::{self, Driver};
use crate::launch::{self, Arg, Kernel, LaunchConfig, Swizzle, TensorMap};
use crate::nvrtc;

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

/// Bytes in device memory, given back when dropped.
pub struct Buffer {
    pub(crate) slice: CudaSlice<u8>,
}

/// A matrix in device memory whose rows start at multiples of 16 bytes, as TMA asks.
pub struct Matrix {
    pub(crate) buffer: Buffer,
    pub(crate) dtype: DType,
    /// Rows of the matrix.
    pub rows: usize,
    /// Columns of the matrix.
    pub columns: usize,
    /// Distance of two rows.
    pub(crate) pitch_bytes: usize,
}

impl Matrix {
    /// The device memory in which the matrix lies.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// Element type of the matrix.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Distance of two rows in elements: the leading dimension.
    pub fn pitch(&self) -> usize {
        self.pitch_bytes / self.dtype.size()
    }
}

/// A source with its constants: what a kernel is cached by.
type Key = (&'static str, Vec<(&'static str, u64)>);

/// One device, its stream and the kernels that were compiled for it.
pub struct Gpu {
    stream: Arc<CudaStream>,
    kind: DeviceKind,
    description: driver::Device,
    compiler: Compiler,
    kernels: Mutex<HashMap<Key, Arc<Kernel>>>,
}

impl Gpu {
    /// Opens device 0 of the driver that the loader finds, which must be of the wanted kind.
    ///
    /// # Errors
    /// [`GpuError`]: what is missing, and how to get it.
    pub fn open(wanted: DeviceKind) -> Result<Gpu, GpuError> {
        let (version, devices, emulated) = match driver::probe() {
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
        let Some(description) = devices.into_iter().next() else {
            return Err(GpuError::NoDevice { reason: "the driver has no device".to_owned() });
        };
        if version < 13000 {
            return Err(GpuError::OldDriver { version });
        }
        let (major, minor) = description.compute_capability;
        if major != 9 {
            return Err(GpuError::Architecture { name: description.name, major, minor });
        }
        let cache = nvrtc::cache_dir().ok_or(GpuError::NoCache)?.join("kernels");
        let compiler = Compiler::new(&nvrtc::find().ok_or(GpuError::NoNvrtc)?, &cache)?;
        let context = CudaContext::new(0).map_err(GpuError::of("cuDevicePrimaryCtxRetain"))?;
        Ok(Gpu {
            stream: context.default_stream(),
            kind: wanted,
            description,
            compiler,
            kernels: Mutex::default(),
        })
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
        let key = (name, defines.to_vec());
        let mut kernels = self.kernels.lock().expect("no panic while it is held");
        if let Some(kernel) = kernels.get(&key) {
            return Ok(kernel.clone());
        }
        let ptx = self.compiler.compile(source, defines)?.ptx;
        let module = self
            .stream
            .context()
            .load_module(cudarc::nvrtc::Ptx::from_src(ptx))
            .map_err(GpuError::of("cuModuleLoadData"))?;
        let kernel = Arc::new(Kernel::new(&module, name, shared_bytes)?);
        kernels.insert(key, kernel.clone());
        Ok(kernel)
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
        TensorMap::new(&self.stream, matrix, (rows, columns), swizzle)
    }

    /// Copies bytes to new device memory.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    pub fn upload(&self, bytes: &[u8]) -> Result<Buffer, GpuError> {
        // The driver refuses to allocate nothing.
        let slice = match bytes {
            [] => self.stream.clone_htod(&[0u8; 16]),
            bytes => self.stream.clone_htod(bytes),
        };
        Ok(Buffer { slice: slice.map_err(GpuError::of("cuMemcpyHtoDAsync"))? })
    }

    /// Copies a matrix to the device, each row padded with zeros to 16 bytes.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    ///
    /// # Panics
    /// Where the tensor has no dimension.
    pub fn upload_matrix(&self, tensor: &Tensor) -> Result<Matrix, GpuError> {
        let (rows, columns) = tensor.rows_columns();
        let row_bytes = columns * tensor.dtype().size();
        let pitch_bytes = row_bytes.next_multiple_of(16);
        let buffer = if pitch_bytes == row_bytes {
            self.upload(tensor.bytes())?
        } else {
            let mut padded = vec![0; rows * pitch_bytes];
            let from = tensor.bytes().chunks_exact(row_bytes.max(1));
            for (to, from) in padded.chunks_exact_mut(pitch_bytes).zip(from) {
                to[..row_bytes].copy_from_slice(from);
            }
            self.upload(&padded)?
        };
        Ok(Matrix { buffer, dtype: tensor.dtype(), rows, columns, pitch_bytes })
    }

    /// A matrix of zero bits on the device, rows padded to 16 bytes.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    pub fn zeros(&self, dtype: DType, rows: usize, columns: usize) -> Result<Matrix, GpuError> {
        let pitch_bytes = (columns * dtype.size()).next_multiple_of(16);
        let slice = self.stream.alloc_zeros((rows * pitch_bytes).max(16));
        let buffer = Buffer { slice: slice.map_err(GpuError::of("cuMemAllocAsync"))? };
        Ok(Matrix { buffer, dtype, rows, columns, pitch_bytes })
    }

    /// Copies a matrix to the host, without its padding; waits for all work before it.
    ///
    /// # Errors
    /// [`GpuError::Driver`], also for what went wrong in a kernel before.
    pub fn download(&self, matrix: &Matrix) -> Result<Tensor, GpuError> {
        self.stream.synchronize().map_err(GpuError::of("cuStreamSynchronize"))?;
        let copied = self.stream.clone_dtoh(&matrix.buffer.slice);
        let padded = copied.map_err(GpuError::of("cuMemcpyDtoHAsync"))?;
        self.stream.synchronize().map_err(GpuError::of("cuStreamSynchronize"))?;
        let row_bytes = matrix.columns * matrix.dtype.size();
        let rows = padded.chunks_exact(matrix.pitch_bytes.max(1)).take(matrix.rows);
        let bytes: Vec<u8> = rows.flat_map(|row| &row[..row_bytes]).copied().collect();
        Ok(Tensor::from_bytes(matrix.dtype, &[matrix.rows, matrix.columns], &bytes))
    }
}
