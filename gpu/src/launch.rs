//! Launches and tensor maps: the calls of the driver API that cudarc has no safe form of.
//!
//! A launch takes a cluster and the attribute of programmatic dependent launch
//! (`cuLaunchKernelEx`); [`TensorMap`] describes a matrix to TMA (`cuTensorMapEncodeTiled`). A
//! kernel is loaded with the sizes of its parameters, and arguments of other sizes are refused, so
//! that the driver never reads beyond them. What a kernel does to device memory is its own
//! business: no Rust reference ever points there.
//!
//! Source: NVIDIA, "CUDA Driver API", sections Execution Control and Tensor Map Object Management.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::{CudaFunction, CudaModule, CudaStream, sys};
use fathom_trace::DType;

use crate::device::GpuError;
use crate::memory::Block;
use crate::tensor::{DeviceTensor, HeadRows, Matrix};

/// An entry of a loaded module, with the sizes of its parameters.
pub struct Kernel {
    name: &'static str,
    /// None in a rehearsal, where nothing is loaded.
    function: Option<CudaFunction>,
    param_bytes: Vec<usize>,
}

impl Kernel {
    /// Takes `name` out of a module and lets it use `shared_bytes` of dynamic shared memory.
    ///
    /// # Errors
    /// [`GpuError::Driver`] where the entry is not there or the device has less shared memory.
    pub(crate) fn new(
        module: &Arc<CudaModule>,
        name: &'static str,
        shared_bytes: u32,
    ) -> Result<Kernel, GpuError> {
        let function = module.load_function(name).map_err(GpuError::of("cuModuleGetFunction"))?;
        let limit = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function
            .set_attribute(limit, shared_bytes as i32)
            .map_err(GpuError::of("cuFuncSetAttribute"))?;
        let mut param_bytes = Vec::new();
        let (mut offset, mut bytes) = (0, 0);
        // SAFETY: the function is live, the pointers are to live locals; the call answers
        // CUDA_ERROR_INVALID_VALUE for the index after the last parameter.
        while let sys::CUresult::CUDA_SUCCESS = unsafe {
            let index = param_bytes.len();
            sys::cuFuncGetParamInfo(function.cu_function(), index, &mut offset, &mut bytes)
        } {
            param_bytes.push(bytes);
        }
        Ok(Kernel { name, function: Some(function), param_bytes })
    }

    /// An entry of a module that nobody has loaded: for rehearsals, which launch nothing.
    pub(crate) fn unloaded(name: &'static str) -> Kernel {
        Kernel { name, function: None, param_bytes: Vec::new() }
    }

    fn function(&self) -> &CudaFunction {
        self.function.as_ref().expect("a kernel of a rehearsal is not launched")
    }

    /// The entry's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Registers of a thread, as the driver gives them; the emulated one estimates them from what
    /// is live at once.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    pub fn registers(&self) -> Result<u32, GpuError> {
        let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS;
        let registers = self.function().get_attribute(which);
        Ok(registers.map_err(GpuError::of("cuFuncGetAttribute"))? as u32)
    }
}

/// An argument of a kernel, as large as the parameter that it is for.
#[derive(Clone, Copy)]
pub enum Arg<'a> {
    /// The address of a tensor's first element.
    Tensor(&'a DeviceTensor),
    /// The same, or a null pointer.
    OptionalTensor(Option<&'a DeviceTensor>),
    /// The address of a matrix's first element.
    Matrix(&'a Matrix),
    /// A tensor map by value (`__grid_constant__`).
    Map(&'a TensorMap<'a>),
    /// A 32-bit unsigned integer.
    U32(u32),
    /// A 64-bit unsigned integer.
    U64(u64),
    /// A 32-bit float.
    F32(f32),
}

/// Threads of a CTA of the kernels that give each thread an element.
const ELEMENT_THREADS: u32 = 256;

impl LaunchConfig {
    /// CTAs of `threads`, no clusters, no dynamic shared memory.
    pub fn new(ctas: usize, threads: u32) -> LaunchConfig {
        let grid = u32::try_from(ctas).expect("a grid has at most 2^31 - 1 CTAs");
        LaunchConfig { grid, block: threads, cluster: 1, shared_bytes: 0, programmatic: false }
    }

    /// A thread an element, 256 a CTA.
    pub fn elements(n: usize) -> LaunchConfig {
        LaunchConfig::new(n.div_ceil(ELEMENT_THREADS as usize), ELEMENT_THREADS)
    }
}

/// The shape of a launch; grid, block and cluster have one dimension each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchConfig {
    /// CTAs of the grid.
    pub grid: u32,
    /// Threads of a CTA.
    pub block: u32,
    /// CTAs of a cluster; 1: no clusters.
    pub cluster: u32,
    /// Dynamic shared memory in bytes.
    pub shared_bytes: u32,
    /// Programmatic dependent launch: the grid may start while the one before it ends; the kernel
    /// waits (`griddepcontrol.wait`) before it reads what that one wrote.
    pub programmatic: bool,
}

/// Storage of one argument: as large and as aligned as a tensor map.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
struct Slot([u64; 16]);

/// Enqueues `kernel` on `stream`.
///
/// A grid of no CTA is no launch.
///
/// # Errors
/// [`GpuError::Arguments`] where number or sizes are not the kernel's, [`GpuError::Driver`]. What
/// goes wrong on the device is reported by the next call that waits for it.
pub(crate) fn launch(
    stream: &CudaStream,
    kernel: &Kernel,
    config: &LaunchConfig,
    args: &[Arg<'_>],
) -> Result<(), GpuError> {
    let found: Vec<usize> = args.iter().map(Arg::bytes).collect();
    if found != kernel.param_bytes {
        let (kernel, expected) = (kernel.name, kernel.param_bytes.clone());
        return Err(GpuError::Arguments { kernel, expected, found });
    }
    if config.grid == 0 {
        return Ok(());
    }
    let mut slots: Vec<Slot> = args.iter().map(Arg::slot).collect();
    let mut pointers: Vec<*mut c_void> = slots.iter_mut().map(|s| (&raw mut *s).cast()).collect();
    let mut attributes = Vec::new();
    let mut attribute = |id, value| {
        attributes.push(sys::CUlaunchAttribute { id, pad: [0; 4], value });
    };
    if config.cluster > 1 {
        let dimension =
            sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: config.cluster, y: 1, z: 1 };
        attribute(
            sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
            sys::CUlaunchAttributeValue { clusterDim: dimension },
        );
    }
    if config.programmatic {
        attribute(
            sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        );
    }
    let shape = sys::CUlaunchConfig {
        gridDimX: config.grid,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: config.block,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: config.shared_bytes,
        hStream: stream.cu_stream(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: attributes.len() as u32,
    };
    stream.context().bind_to_thread().map_err(GpuError::of("cuCtxSetCurrent"))?;
    // SAFETY: function and stream are live and of the context that was made current; there is one
    // pointer a parameter, each to at least as many bytes as the parameter has (compared above);
    // the driver copies arguments and attributes before it returns.
    unsafe {
        let function = kernel.function().cu_function();
        let extra = std::ptr::null_mut();
        sys::cuLaunchKernelEx(&shape, function, pointers.as_mut_ptr(), extra).result()
    }
    .map_err(GpuError::of("cuLaunchKernelEx"))
}

impl Arg<'_> {
    fn bytes(&self) -> usize {
        match self {
            Arg::Map(_) => size_of::<sys::CUtensorMap>(),
            Arg::Tensor(_) | Arg::OptionalTensor(_) | Arg::Matrix(_) | Arg::U64(_) => 8,
            Arg::U32(_) | Arg::F32(_) => 4,
        }
    }

    fn slot(&self) -> Slot {
        let mut words = [0; 16];
        match self {
            Arg::Tensor(tensor) => words[0] = tensor.address(),
            Arg::OptionalTensor(tensor) => words[0] = tensor.map_or(0, DeviceTensor::address),
            Arg::Matrix(matrix) => words[0] = matrix.address(),
            Arg::Map(map) => words = map.raw.opaque,
            Arg::U32(value) => words[0] = u64::from(*value),
            Arg::U64(value) => words[0] = *value,
            Arg::F32(value) => words[0] = u64::from(value.to_bits()),
        }
        Slot(words)
    }
}

/// How TMA permutes 16-byte chunks of a box in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    /// Rows follow one another as they are.
    None,
    /// The pattern of 128 bytes, which `wgmma` reads without bank conflicts.
    Bytes128,
}

/// A matrix, or heads in rows, as TMA copies them; lives no longer than what it maps.
pub struct TensorMap<'a> {
    raw: sys::CUtensorMap,
    mapped: PhantomData<&'a Block>,
}

/// What a tensor map describes, the innermost dimension first.
struct Mapped<'a, const N: usize> {
    block: &'a Block,
    offset: usize,
    dtype: DType,
    sizes: [usize; N],
    /// Bytes from one to the next of each dimension but the innermost.
    strides: &'a [usize],
    /// Elements of a box.
    extents: [u32; N],
}

impl TensorMap<'_> {
    /// A map that is not read: for kernels that take one they do not use.
    pub fn unused() -> TensorMap<'static> {
        TensorMap { raw: sys::CUtensorMap { opaque: [0; 16] }, mapped: PhantomData }
    }

    /// Boxes of `rows` x `columns` elements of `matrix`; what lies outside reads as zero.
    ///
    /// # Errors
    /// [`GpuError::Driver`] where the driver refuses the sizes: a box has at most 256 elements a
    /// dimension, and at most 128 bytes a row under [`Swizzle::Bytes128`].
    pub(crate) fn new<'a>(
        matrix: &'a Matrix,
        (rows, columns): (u32, u32),
        swizzle: Swizzle,
    ) -> Result<TensorMap<'a>, GpuError> {
        let mapped = Mapped {
            block: &matrix.block,
            offset: matrix.offset,
            dtype: matrix.dtype,
            sizes: [matrix.columns, matrix.rows],
            strides: &[matrix.pitch_bytes],
            extents: [columns, rows],
        };
        Ok(TensorMap { raw: mapped.encode(swizzle)?, mapped: PhantomData })
    }

    /// Boxes of `rows` rows, `heads` heads and 64 columns under the 128-byte swizzle; what lies
    /// outside reads as zero, also the columns that a head does not have.
    ///
    /// # Errors
    /// As [`TensorMap::new`].
    pub(crate) fn of_heads<'a>(
        x: &'a HeadRows,
        (rows, heads): (u32, u32),
    ) -> Result<TensorMap<'a>, GpuError> {
        let mapped = Mapped {
            block: &x.block,
            offset: x.offset,
            dtype: x.dtype,
            sizes: [x.columns, x.heads, x.rows],
            strides: &[x.head_bytes, x.row_bytes],
            extents: [64, heads, rows],
        };
        Ok(TensorMap { raw: mapped.encode(Swizzle::Bytes128)?, mapped: PhantomData })
    }
}

impl<const N: usize> Mapped<'_, N> {
    fn encode(&self, swizzle: Swizzle) -> Result<sys::CUtensorMap, GpuError> {
        let mut raw = sys::CUtensorMap { opaque: [0; 16] };
        if self.block.is_pretended() {
            return Ok(raw);
        }
        use sys::{
            CUtensorMapDataType as Type, CUtensorMapFloatOOBfill as Fill,
            CUtensorMapInterleave as Interleave, CUtensorMapL2promotion as Promotion,
            CUtensorMapSwizzle as Pattern,
        };
        let element = match self.dtype.size() {
            1 => Type::CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2 if self.dtype == DType::BF16 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2 => Type::CU_TENSOR_MAP_DATA_TYPE_UINT16,
            4 if self.dtype == DType::F32 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            4 => Type::CU_TENSOR_MAP_DATA_TYPE_UINT32,
            _ => Type::CU_TENSOR_MAP_DATA_TYPE_UINT64,
        };
        let pattern = match swizzle {
            Swizzle::None => Pattern::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::Bytes128 => Pattern::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let sizes = self.sizes.map(|n| n as u64);
        let strides: Vec<u64> = self.strides.iter().map(|&bytes| bytes as u64).collect();
        assert_eq!(strides.len() + 1, N, "a stride for every dimension but the innermost");
        let steps = [1u32; N];
        // SAFETY: the map and the arrays are live, with an entry a dimension (of the strides one
        // less); the address is only stored.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut raw,
                element,
                N as u32,
                (self.block.address() + self.offset as u64) as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                self.extents.as_ptr(),
                steps.as_ptr(),
                Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                pattern,
                Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()
        }
        .map_err(GpuError::of("cuTensorMapEncodeTiled"))?;
        Ok(raw)
    }
}
