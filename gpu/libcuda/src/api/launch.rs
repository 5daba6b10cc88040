//! Kernel launches.

use std::ffi::c_void;
use std::sync::Arc;

use fathom_emulator::{Function, LaunchConfig};

use super::entry_points;
use super::function::most_dynamic_shared;
use crate::abi::*;
use crate::driver::initialised;
use crate::objects::operation::{Launch, Operation};
use crate::objects::program::Callable;

/// What the attributes of a launch say.
pub(super) struct Attributes {
    pub cluster: [u32; 3],
    pub cooperative: bool,
    pub pdl: bool,
}

/// What a launch without attributes is.
pub(super) const PLAIN: Attributes = Attributes { cluster: [1; 3], cooperative: false, pdl: false };

/// Reads a launch's attributes.
///
/// # Safety
/// `config` is the client's, with as many attributes as it says.
pub(super) unsafe fn attributes(config: &LaunchConfigC) -> (&LaunchConfigC, Attributes) {
    let mut found = PLAIN;
    for i in 0..config.count as usize {
        // SAFETY: within the client's count.
        let attribute = unsafe { config.attributes.add(i).read_unaligned() };
        let value = attribute.value;
        match attribute.id {
            ATTRIBUTE_COOPERATIVE => found.cooperative = value[0] != 0,
            ATTRIBUTE_CLUSTER_DIMENSION => found.cluster = [value[0], value[1], value[2]],
            ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION => found.pdl = value[0] != 0,
            // Priorities, memory domains and the like change no result.
            _ => {}
        }
    }
    (config, found)
}

/// The parameters as one block, from the client's array of pointers or its packed buffer.
///
/// # Safety
/// `params` has a pointer a parameter, or `extra` a list as cuda.h describes.
pub(super) unsafe fn pack(
    function: &Function,
    params: *const *const u8,
    extra: *const *const c_void,
) -> R<Vec<u8>> {
    let wanted = function.params();
    let mut block = vec![0; function.param_bytes()];
    if wanted.is_empty() {
        return Ok(block);
    }
    if !params.is_null() {
        for (i, param) in wanted.iter().enumerate() {
            // SAFETY: one pointer a parameter, each to as many bytes as the parameter has.
            unsafe {
                let from = *params.add(i);
                if from.is_null() {
                    return Err(ERROR_INVALID_VALUE);
                }
                let to = block.as_mut_ptr().add(param.offset);
                std::ptr::copy_nonoverlapping(from, to, param.bytes);
            }
        }
        return Ok(block);
    }
    if extra.is_null() {
        return Err(ERROR_INVALID_VALUE);
    }
    // CU_LAUNCH_PARAM_BUFFER_POINTER is 1, _BUFFER_SIZE 2, _END 0.
    let (mut buffer, mut bytes, mut at) = (std::ptr::null::<u8>(), 0usize, 0);
    // SAFETY: the list ends with CU_LAUNCH_PARAM_END.
    unsafe {
        while *extra.add(at) as usize != 0 {
            match *extra.add(at) as usize {
                1 => buffer = (*extra.add(at + 1)).cast(),
                2 => bytes = *(*extra.add(at + 1)).cast::<usize>(),
                _ => return Err(ERROR_INVALID_VALUE),
            }
            at += 2;
        }
        if buffer.is_null() || bytes == 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        // NCCL hands over less than its kernels declare: the rest is not read.
        std::ptr::copy_nonoverlapping(buffer, block.as_mut_ptr(), bytes.min(block.len()));
    }
    Ok(block)
}

/// # Safety
/// As [`pack`].
unsafe fn launch(
    function: Handle,
    shape: &LaunchConfigC,
    attributes: Attributes,
    params: *const *const u8,
    extra: *const *const c_void,
) -> R {
    let callable = launchable(function)?;
    // SAFETY: the client's pointers.
    let params = unsafe { pack(&callable.function, params, extra)? };
    submit(function, callable, shape, &attributes, params)
}

/// A function to launch; refused behind an error that stays.
pub(super) fn launchable(function: Handle) -> R<Arc<Callable>> {
    let driver = initialised()?;
    driver.error()?;
    driver.callable(function)
}

/// Gives a launch to its stream.
pub(super) fn submit(
    handle: Handle,
    callable: Arc<Callable>,
    shape: &LaunchConfigC,
    attributes: &Attributes,
    params: Vec<u8>,
) -> R {
    if i64::from(shape.shared_bytes) > i64::from(most_dynamic_shared(&callable)) {
        return Err(ERROR_INVALID_VALUE);
    }
    let config = config(&callable, shape, attributes, params);
    let launch = Operation::Launch(Launch { handle, callable, config });
    initialised()?.submit(shape.stream, launch)
}

/// A launch's configuration: where it names no cluster, that which was chosen for the function.
pub(super) fn config(
    callable: &Callable,
    shape: &LaunchConfigC,
    attributes: &Attributes,
    params: Vec<u8>,
) -> LaunchConfig {
    let chosen = *callable.chosen.lock().expect("no panic holds this lock");
    let own_cluster = chosen.cluster.map(|n| n.filter(|n| *n > 0).map_or(1, |n| n as u32));
    LaunchConfig {
        grid: shape.grid,
        block: shape.block,
        cluster: if attributes.cluster == [1; 3] { own_cluster } else { attributes.cluster },
        dynamic_shared_bytes: shape.shared_bytes,
        params,
        cooperative: attributes.cooperative,
        pdl: attributes.pdl,
    }
}

/// The shape of a launch without attributes.
pub(super) fn shape(
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    stream: Handle,
) -> LaunchConfigC {
    LaunchConfigC { grid, block, shared_bytes, stream, attributes: std::ptr::null(), count: 0 }
}

entry_points! {
    fn cuLaunchKernel(
        function: Handle,
        grid_x: u32,
        grid_y: u32,
        grid_z: u32,
        block_x: u32,
        block_y: u32,
        block_z: u32,
        shared_bytes: u32,
        stream: Handle,
        params: *const *const u8,
        extra: *const *const c_void,
    ) {
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        launch(function, &shape(grid, block, shared_bytes, stream), PLAIN, params, extra)
    }

    fn cuLaunchCooperativeKernel(
        function: Handle,
        grid_x: u32,
        grid_y: u32,
        grid_z: u32,
        block_x: u32,
        block_y: u32,
        block_z: u32,
        shared_bytes: u32,
        stream: Handle,
        params: *const *const u8,
    ) {
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        let all = Attributes { cluster: [1; 3], cooperative: true, pdl: false };
        let shape = shape(grid, block, shared_bytes, stream);
        launch(function, &shape, all, params, std::ptr::null())
    }

    fn cuLaunchKernelEx(
        config: *const LaunchConfigC,
        function: Handle,
        params: *const *const u8,
        extra: *const *const c_void,
    ) {
        if config.is_null() {
            return Err(ERROR_INVALID_VALUE);
        }
        let (config, attributes) = attributes(&*config);
        launch(function, config, attributes, params, extra)
    }
}
