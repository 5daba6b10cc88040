//! Functions: attributes, parameters, occupancy.

use std::ffi::c_char;

use fathom_emulator::Preset;

use super::launch::attributes;
use super::{entry_points, put};
use crate::abi::*;
use crate::driver::initialised;
use crate::objects::program::Callable;

/// Numbers of `CUfunction_attribute` that clients set.
const DYNAMIC_SHARED: i32 = 8;
const CARVEOUT: i32 = 9;
const CLUSTER: [i32; 3] = [11, 12, 13];
const NONPORTABLE_CLUSTER: i32 = 14;
const CLUSTER_SCHEDULING: i32 = 15;

/// `CUfunction_attribute` of a function.
pub(super) fn attribute(callable: &Callable, which: i32) -> R<i32> {
    let a = callable.function.attributes();
    let chosen = *callable.chosen.lock().expect("no panic holds this lock");
    Ok(match which {
        0 => a.max_threads as i32,
        1 => a.declared_shared_bytes as i32,
        2 => a.const_bytes as i32,
        3 => a.local_bytes as i32,
        4 => a.registers as i32,
        // The virtual architecture that it was compiled for.
        5 => a.target as i32,
        // The target of the code that runs, which is compiled for the device.
        6 => {
            let [major, minor] = preset(callable).compute_capability;
            (major * 10 + minor) as i32
        }
        7 => 0,
        DYNAMIC_SHARED => most_dynamic_shared(callable),
        CARVEOUT => chosen.carveout.unwrap_or(-1),
        10 => i32::from(a.required_cluster.is_some()),
        11..=13 => {
            let axis = (which - CLUSTER[0]) as usize;
            let required = a.required_cluster.map_or(0, |c| c[axis] as i32);
            chosen.cluster[axis].unwrap_or(required)
        }
        NONPORTABLE_CLUSTER => chosen.nonportable_cluster.unwrap_or(0),
        CLUSTER_SCHEDULING => chosen.cluster_scheduling.unwrap_or(0),
        // Nodes that devices update, and modes of shared memory, are not there.
        16 | 17 => 0,
        _ => return Err(ERROR_INVALID_VALUE),
    })
}

/// Sets what can be set of a function's attributes.
pub(super) fn set_attribute(callable: &Callable, which: i32, value: i32) -> R {
    let a = callable.function.attributes();
    let mut chosen = callable.chosen.lock().expect("no panic holds this lock");
    match which {
        DYNAMIC_SHARED => {
            let most = preset(callable).shared_bytes_per_block_optin as i32;
            if !(0..=most - a.static_shared_bytes as i32).contains(&value) {
                return Err(ERROR_INVALID_VALUE);
            }
            chosen.dynamic_shared = Some(value);
        }
        CARVEOUT if (-1..=100).contains(&value) => chosen.carveout = Some(value),
        11..=13 if a.required_cluster.is_some() => return Err(ERROR_NOT_PERMITTED),
        11..=13 if value >= 0 => chosen.cluster[(which - CLUSTER[0]) as usize] = Some(value),
        NONPORTABLE_CLUSTER if (0..=1).contains(&value) => chosen.nonportable_cluster = Some(value),
        CLUSTER_SCHEDULING if (0..=2).contains(&value) => chosen.cluster_scheduling = Some(value),
        _ => return Err(ERROR_INVALID_VALUE),
    }
    Ok(())
}

fn preset(callable: &Callable) -> &Preset {
    callable.function.module().device().preset()
}

/// Dynamic shared memory that a launch may ask for: what a CTA has without opting in, less the
/// static part, until the client opts into more.
pub(super) fn most_dynamic_shared(callable: &Callable) -> i32 {
    let chosen = callable.chosen.lock().expect("no panic holds this lock").dynamic_shared;
    let fixed = callable.function.attributes().static_shared_bytes;
    chosen.unwrap_or_else(|| preset(callable).shared_bytes_per_block.saturating_sub(fixed) as i32)
}

/// CTAs of a function that fit on an SM.
fn resident(function: Handle, threads: i32, shared: usize) -> R<i32> {
    let callable = initialised()?.callable(function)?;
    let a = callable.function.attributes();
    let threads = u32::try_from(threads).map_err(|_| ERROR_INVALID_VALUE)?;
    if threads == 0 {
        return Err(ERROR_INVALID_VALUE);
    }
    let shared = u32::try_from(shared).map_err(|_| ERROR_INVALID_VALUE)?;
    if threads > a.max_threads || shared as i32 > most_dynamic_shared(&callable) {
        return Ok(0);
    }
    let shared = a.static_shared_bytes + shared;
    Ok(preset(&callable).blocks_per_sm(threads, a.registers, shared) as i32)
}

/// The shape with the most resident threads an SM: threads of a CTA, and CTAs of the grid that
/// fills the device.
fn best_block(
    function: Handle,
    shared_of_block: Option<unsafe extern "C" fn(i32) -> usize>,
    shared: usize,
    limit: i32,
) -> R<(i32, i32)> {
    let callable = initialised()?.callable(function)?;
    let most = callable.function.attributes().max_threads as i32;
    let most = if limit > 0 { most.min(limit) } else { most };
    let blocks = |threads: i32| {
        // SAFETY: the client's function.
        let shared = shared_of_block.map_or(shared, |of| unsafe { of(threads) });
        resident(function, threads, shared).unwrap_or(0)
    };
    // From the largest down, in whole warps but for the first.
    let sizes = std::iter::once(most).chain((1..=(most - 1) / 32).rev().map(|warps| warps * 32));
    let mut best = (most, 0);
    for threads in sizes {
        let blocks = blocks(threads);
        if threads * blocks > best.0 * best.1 {
            best = (threads, blocks);
        }
    }
    let (threads, blocks) = best;
    Ok((preset(&callable).sm_count as i32 * blocks.max(1), threads))
}

/// # Safety
/// `offset` and `bytes` are the client's.
pub(super) unsafe fn param_info(
    function: Handle,
    index: usize,
    offset: *mut usize,
    bytes: *mut usize,
) -> R {
    let params = initialised()?.callable(function)?.function.params();
    let param = params.get(index).ok_or(ERROR_INVALID_VALUE)?;
    // SAFETY: the client's pointers.
    unsafe {
        put(offset, param.offset)?;
        if bytes.is_null() { Ok(()) } else { put(bytes, param.bytes) }
    }
}

entry_points! {
    fn cuFuncGetParamInfo(function: Handle, index: usize, offset: *mut usize, bytes: *mut usize) {
        param_info(function, index, offset, bytes)
    }

    fn cuFuncGetParamCount(function: Handle, count: *mut usize) {
        put(count, initialised()?.callable(function)?.function.params().len())
    }

    fn cuFuncGetAttribute(value: *mut i32, which: i32, function: Handle) {
        put(value, attribute(&*initialised()?.callable(function)?, which)?)
    }

    fn cuFuncSetAttribute(function: Handle, which: i32, value: i32) {
        set_attribute(&*initialised()?.callable(function)?, which, value)
    }

    fn cuFuncSetCacheConfig(function: Handle, config: u32) {
        let _ = config;
        initialised()?.callable(function).map(|_| ())
    }

    fn cuFuncSetSharedMemConfig(function: Handle, config: u32) {
        let _ = config;
        initialised()?.callable(function).map(|_| ())
    }

    fn cuFuncGetModule(module: *mut Handle, function: Handle) {
        put(module, initialised()?.callable(function)?.module)
    }

    fn cuFuncGetName(name: *mut *const c_char, function: Handle) {
        if function == 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        put(name, initialised()?.callable(function)?.name.as_ptr())
    }

    fn cuFuncLoad(function: Handle) { initialised()?.callable(function).map(|_| ()) }

    fn cuFuncIsLoaded(state: *mut u32, function: Handle) {
        initialised()?.callable(function)?;
        put(state, 1)
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: *mut i32,
        function: Handle,
        threads: i32,
        shared: usize,
    ) {
        put(blocks, resident(function, threads, shared)?)
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        blocks: *mut i32,
        function: Handle,
        threads: i32,
        shared: usize,
        flags: u32,
    ) {
        let _ = flags;
        put(blocks, resident(function, threads, shared)?)
    }

    fn cuOccupancyMaxPotentialBlockSize(
        grid: *mut i32,
        block: *mut i32,
        function: Handle,
        shared_of_block: Option<unsafe extern "C" fn(i32) -> usize>,
        shared: usize,
        limit: i32,
    ) {
        let (ctas, threads) = best_block(function, shared_of_block, shared, limit)?;
        put(block, threads)?;
        put(grid, ctas)
    }

    fn cuOccupancyMaxPotentialBlockSizeWithFlags(
        grid: *mut i32,
        block: *mut i32,
        function: Handle,
        shared_of_block: Option<unsafe extern "C" fn(i32) -> usize>,
        shared: usize,
        limit: i32,
        flags: u32,
    ) {
        let _ = flags;
        let (ctas, threads) = best_block(function, shared_of_block, shared, limit)?;
        put(block, threads)?;
        put(grid, ctas)
    }

    fn cuOccupancyAvailableDynamicSMemPerBlock(
        bytes: *mut usize,
        function: Handle,
        blocks: i32,
        threads: i32,
    ) {
        let callable = initialised()?.callable(function)?;
        if blocks <= 0 || threads <= 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        let p = preset(&callable);
        // Each CTA has its static part and the system's, in units of 128 bytes.
        let each = p.shared_bytes_per_sm / blocks as u32 / 128 * 128;
        let fixed = callable.function.attributes().static_shared_bytes + p.shared_bytes_reserved;
        // No more than a launch of the function may ask for.
        let most = most_dynamic_shared(&callable) as u32;
        put(bytes, each.saturating_sub(fixed).min(most) as usize)
    }

    fn cuOccupancyMaxPotentialClusterSize(
        size: *mut i32,
        function: Handle,
        config: *const LaunchConfigC,
    ) {
        let _ = config;
        let callable = initialised()?.callable(function)?;
        let larger = callable.chosen.lock().expect("no panic holds this lock").nonportable_cluster;
        let p = preset(&callable);
        let most = match larger {
            Some(1) => p.max_cluster_ctas_nonportable,
            _ => p.max_cluster_ctas,
        };
        put(size, most as i32)
    }

    fn cuOccupancyMaxActiveClusters(
        clusters: *mut i32,
        function: Handle,
        config: *const LaunchConfigC,
    ) {
        if config.is_null() {
            return Err(ERROR_INVALID_VALUE);
        }
        let (config, attributes) = attributes(&*config);
        let callable = initialised()?.callable(function)?;
        let threads = config.block.iter().product::<u32>() as i32;
        let blocks = resident(function, threads, config.shared_bytes as usize)?;
        let cluster = attributes.cluster.iter().product::<u32>().max(1) as i32;
        put(clusters, blocks * preset(&callable).sm_count as i32 / cluster)
    }
}
