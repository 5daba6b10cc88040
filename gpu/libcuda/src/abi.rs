//! Types and numbers of cuda.h (CUDA driver API), as far as they are used here.

use std::ffi::c_void;

/// `CUresult`.
pub type CuResult = i32;
/// An opaque handle: a number of ours, never a pointer that is followed.
pub type Handle = usize;
/// `CUdeviceptr`.
pub type DevicePtr = u64;

macro_rules! results {
    ($($name:ident = $code:literal $words:literal),* $(,)?) => {
        $(#[allow(dead_code)] // The table answers for every code, ours or not.
        pub const $name: CuResult = $code;)*
        /// Code, name in cuda.h, description.
        pub const RESULTS: &[(CuResult, &str, &str)] =
            &[$(($code, concat!("CUDA_", stringify!($name), "\0"), concat!($words, "\0"))),*];
    };
}

results! {
    SUCCESS = 0 "no error",
    ERROR_INVALID_VALUE = 1 "invalid argument",
    ERROR_OUT_OF_MEMORY = 2 "out of memory",
    ERROR_NOT_INITIALIZED = 3 "initialization error",
    ERROR_NO_DEVICE = 100 "no CUDA-capable device is detected",
    ERROR_INVALID_DEVICE = 101 "invalid device ordinal",
    ERROR_INVALID_IMAGE = 200 "device kernel image is invalid",
    ERROR_INVALID_CONTEXT = 201 "invalid device context",
    ERROR_NO_BINARY_FOR_GPU = 209 "no kernel image is available for execution on the device",
    ERROR_PEER_ACCESS_UNSUPPORTED = 217 "peer access is not supported between these two devices",
    ERROR_INVALID_PTX = 218 "a PTX JIT compilation failed",
    ERROR_FILE_NOT_FOUND = 301 "file not found",
    ERROR_INVALID_HANDLE = 400 "invalid resource handle",
    ERROR_NOT_FOUND = 500 "named symbol not found",
    ERROR_NOT_READY = 600 "device not ready",
    ERROR_ILLEGAL_ADDRESS = 700 "an illegal memory access was encountered",
    ERROR_LAUNCH_OUT_OF_RESOURCES = 701 "too many resources requested for launch",
    ERROR_LAUNCH_TIMEOUT = 702 "the launch timed out and was terminated",
    ERROR_PEER_ACCESS_ALREADY_ENABLED = 704 "peer access is already enabled",
    ERROR_PEER_ACCESS_NOT_ENABLED = 705 "peer access has not been enabled",
    ERROR_ASSERT = 710 "device-side assert triggered",
    ERROR_ILLEGAL_INSTRUCTION = 715 "an illegal instruction was encountered",
    ERROR_MISALIGNED_ADDRESS = 716 "misaligned address",
    ERROR_LAUNCH_FAILED = 719 "unspecified launch failure",
    ERROR_COOPERATIVE_LAUNCH_TOO_LARGE = 720 "too many blocks in cooperative launch",
    ERROR_NOT_SUPPORTED = 801 "operation not supported",
    ERROR_STREAM_CAPTURE_UNSUPPORTED = 900 "operation not permitted when stream is capturing",
    ERROR_ILLEGAL_STATE = 401 "the operation cannot be performed in the present state",
    ERROR_UNKNOWN = 999 "unknown error",
}

/// `CUlaunchConfig`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LaunchConfigC {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared_bytes: u32,
    pub stream: Handle,
    pub attributes: *const LaunchAttribute,
    pub count: u32,
}

/// `CUlaunchAttribute`: an id and a union of 64 bytes.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct LaunchAttribute {
    pub id: u32,
    pub pad: u32,
    pub value: [u32; 16],
}

/// `CU_EVENT_DISABLE_TIMING`.
pub const EVENT_DISABLE_TIMING: u32 = 2;

/// `CUlimit` values.
pub const LIMIT_STACK: u32 = 0;
pub const LIMIT_PRINTF: u32 = 1;
pub const LIMIT_HEAP: u32 = 2;

/// `CUlaunchAttributeID` values that bear on execution here.
pub const ATTRIBUTE_COOPERATIVE: u32 = 2;
pub const ATTRIBUTE_CLUSTER_DIMENSION: u32 = 4;
pub const ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: u32 = 6;

/// `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Memcpy2d {
    pub src_x: usize,
    pub src_y: usize,
    pub src_type: u32,
    pub src_host: usize,
    pub src_device: DevicePtr,
    pub src_array: usize,
    pub src_pitch: usize,
    pub dst_x: usize,
    pub dst_y: usize,
    pub dst_type: u32,
    pub dst_host: usize,
    pub dst_device: DevicePtr,
    pub dst_array: usize,
    pub dst_pitch: usize,
    pub width: usize,
    pub height: usize,
}

/// `CUDA_MEMCPY3D`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Memcpy3d {
    pub src_x: usize,
    pub src_y: usize,
    pub src_z: usize,
    pub src_lod: usize,
    pub src_type: u32,
    pub src_host: usize,
    pub src_device: DevicePtr,
    pub src_array: usize,
    pub src_reserved: usize,
    pub src_pitch: usize,
    pub src_height: usize,
    pub dst_x: usize,
    pub dst_y: usize,
    pub dst_z: usize,
    pub dst_lod: usize,
    pub dst_type: u32,
    pub dst_host: usize,
    pub dst_device: DevicePtr,
    pub dst_array: usize,
    pub dst_reserved: usize,
    pub dst_pitch: usize,
    pub dst_height: usize,
    pub width: usize,
    pub height: usize,
    pub depth: usize,
}

/// `CU_MEMORYTYPE_HOST`.
pub const MEMORY_HOST: u32 = 1;
/// `CU_MEMORYTYPE_ARRAY`.
pub const MEMORY_ARRAY: u32 = 3;

/// `CUDA_KERNEL_NODE_PARAMS` and others are not read; graphs are made by capture.
pub type HostFn = unsafe extern "C" fn(*mut c_void);
