//! Types and numbers of cuda.h (CUDA driver API), as far as they are used here.

use std::ffi::c_void;

pub use crate::results::*;

/// `CUresult`.
pub type CuResult = i32;
/// What a call gives, or the number of its error.
pub(crate) type R<T = ()> = Result<T, CuResult>;
/// An opaque handle: a number of ours, never a pointer that is followed.
pub type Handle = usize;
/// `CUdeviceptr`.
pub type DevicePtr = u64;

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

/// `CU_STREAM_NON_BLOCKING`.
pub const STREAM_NON_BLOCKING: u32 = 1;
/// `CU_EVENT_DISABLE_TIMING`.
pub const EVENT_DISABLE_TIMING: u32 = 2;

/// `CU_EVENT_INTERPROCESS`.
pub const EVENT_INTERPROCESS: u32 = 4;

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
#[derive(Clone, Copy, Default)]
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
/// `CU_MEMORYTYPE_DEVICE`.
pub const MEMORY_DEVICE: u32 = 2;
/// `CU_MEMORYTYPE_ARRAY`.
pub const MEMORY_ARRAY: u32 = 3;
/// `CU_MEMORYTYPE_UNIFIED`.
pub const MEMORY_UNIFIED: u32 = 4;

/// `CUhostFn`.
pub type HostFn = unsafe extern "C" fn(*mut c_void);
