//! Modules, libraries, linking, kernels and their attributes.

use std::ffi::{c_char, c_void};
use std::sync::{Arc, Mutex};

use fathom_emulator::{Error, Function, Module, Preset};

use super::{entry_points, put, text};
use crate::abi::*;
use crate::image;
use crate::state::{Driver, R, initialised};

/// `CU_JIT_ERROR_LOG_BUFFER` and the size that goes with it.
const JIT_ERROR_LOG: u32 = 5;
const JIT_ERROR_LOG_BYTES: u32 = 6;

/// Loads PTX on the current device; what is wrong with it goes to stderr and the client's log.
fn load(driver: &Driver, ptx: &str, log: Option<(*mut u8, usize)>) -> R<Module> {
    let device = &driver.devices[driver.current()?];
    Module::load(device, ptx).map_err(|error| {
        let words = error.to_string();
        eprintln!("fathom: {words}");
        if let Some((buffer, room)) = log.filter(|(b, room)| !b.is_null() && *room > 0) {
            let count = words.len().min(room - 1);
            // SAFETY: the client says that its buffer has this room.
            unsafe {
                std::ptr::copy_nonoverlapping(words.as_ptr(), buffer, count);
                *buffer.add(count) = 0;
            }
        }
        match error {
            Error::Memory(_) => ERROR_OUT_OF_MEMORY,
            _ => ERROR_INVALID_PTX,
        }
    })
}

/// The error log among JIT options, if the client gave one.
///
/// # Safety
/// `options` and `values` have `count` entries.
unsafe fn log_of(
    count: u32,
    options: *const u32,
    values: *const usize,
) -> Option<(*mut u8, usize)> {
    let (mut buffer, mut room) = (std::ptr::null_mut(), 0);
    for i in 0..count as usize {
        // SAFETY: within the count.
        let (option, value) = unsafe { (*options.add(i), *values.add(i)) };
        match option {
            JIT_ERROR_LOG => buffer = value as *mut u8,
            JIT_ERROR_LOG_BYTES => room = value,
            _ => {}
        }
    }
    Some((buffer, room))
}

fn insert_function(driver: &Driver, module: &Module, name: &str) -> R<Handle> {
    let function = module.function(name).map_err(|_| ERROR_NOT_FOUND)?;
    Ok(driver.functions.insert(function))
}

/// The function behind a `CUfunction` or a `CUkernel`; a kernel is loaded on the current device.
pub(super) fn function_of(driver: &Driver, handle: Handle) -> R<Function> {
    if let Ok(function) = driver.functions.get(handle) {
        return Ok(function);
    }
    let (ptx, name) = driver.kernels.get(handle)?;
    let module = load(driver, &ptx, None)?;
    let function = module.function(&name).map_err(|_| ERROR_NOT_FOUND)?;
    driver.functions.set(handle, function.clone());
    Ok(function)
}

/// `CUfunction_attribute` of a function.
fn attribute(function: &Function, which: i32) -> R<i32> {
    let a = function.attributes();
    Ok(match which {
        0 => a.max_threads,
        1 => a.static_shared_bytes,
        2 => a.const_bytes,
        3 => a.local_bytes,
        4 => a.registers,
        5 => a.ptx_version,
        6 => a.target,
        7 => 0,
        8 => {
            let p = function.module().device().preset();
            p.shared_bytes_per_block_optin.saturating_sub(a.static_shared_bytes)
        }
        9 => return Ok(-1),
        10 => u32::from(a.required_cluster.is_some()),
        11..=13 => a.required_cluster.map_or(0, |c| c[which as usize - 11]),
        14 | 15 => 0,
        _ => return Err(ERROR_INVALID_VALUE),
    } as i32)
}

entry_points! {
    fn cuModuleLoadData(module: *mut Handle, image: *const u8) {
        let driver = initialised()?;
        let loaded = load(driver, &image::ptx_of(image)?, None)?;
        put(module, driver.modules.insert(loaded))
    }

    fn cuModuleLoadDataEx(
        module: *mut Handle,
        image: *const u8,
        count: u32,
        options: *const u32,
        values: *const usize,
    ) {
        let driver = initialised()?;
        let loaded = load(driver, &image::ptx_of(image)?, log_of(count, options, values))?;
        put(module, driver.modules.insert(loaded))
    }

    fn cuModuleLoadFatBinary(module: *mut Handle, image: *const u8) {
        let driver = initialised()?;
        let loaded = load(driver, &image::ptx_of(image)?, None)?;
        put(module, driver.modules.insert(loaded))
    }

    fn cuModuleLoad(module: *mut Handle, path: *const c_char) {
        let driver = initialised()?;
        let data = std::fs::read(text(path)?).map_err(|_| ERROR_FILE_NOT_FOUND)?;
        let loaded = load(driver, &image::ptx_of_bytes(&data)?, None)?;
        put(module, driver.modules.insert(loaded))
    }

    fn cuModuleUnload(module: Handle) { initialised()?.modules.remove(module).map(|_| ()) }

    fn cuModuleGetLoadingMode(mode: *mut u32) { put(mode, 1) }

    fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char) {
        let driver = initialised()?;
        put(function, insert_function(driver, &driver.modules.get(module)?, &text(name)?)?)
    }

    fn cuModuleGetFunctionCount(count: *mut u32, module: Handle) {
        put(count, initialised()?.modules.get(module)?.entries().len() as u32)
    }

    fn cuModuleEnumerateFunctions(functions: *mut Handle, count: u32, module: Handle) {
        let driver = initialised()?;
        let module = driver.modules.get(module)?;
        for (i, name) in module.entries().into_iter().take(count as usize).enumerate() {
            put(functions.add(i), insert_function(driver, &module, name)?)?;
        }
        Ok(())
    }

    fn cuModuleGetGlobal_v2(
        address: *mut DevicePtr,
        bytes: *mut usize,
        module: Handle,
        name: *const c_char,
    ) {
        let module = initialised()?.modules.get(module)?;
        let symbol = module.symbol(&text(name)?).map_err(|_| ERROR_NOT_FOUND)?;
        if !address.is_null() {
            put(address, symbol.address)?;
        }
        if bytes.is_null() { Ok(()) } else { put(bytes, symbol.bytes as usize) }
    }

    fn cuLibraryLoadData(
        library: *mut Handle,
        code: *const u8,
        jit_options: *const u32,
        jit_values: *const usize,
        jit_count: u32,
        options: *const u32,
        values: *const usize,
        count: u32,
    ) {
        let _ = (jit_options, jit_values, jit_count, options, values, count);
        let driver = initialised()?;
        put(library, driver.libraries.insert(image::ptx_of(code)?))
    }

    fn cuLibraryLoadFromFile(
        library: *mut Handle,
        path: *const c_char,
        jit_options: *const u32,
        jit_values: *const usize,
        jit_count: u32,
        options: *const u32,
        values: *const usize,
        count: u32,
    ) {
        let _ = (jit_options, jit_values, jit_count, options, values, count);
        let data = std::fs::read(text(path)?).map_err(|_| ERROR_FILE_NOT_FOUND)?;
        put(library, initialised()?.libraries.insert(image::ptx_of_bytes(&data)?))
    }

    fn cuLibraryUnload(library: Handle) { initialised()?.libraries.remove(library).map(|_| ()) }

    fn cuLibraryGetKernel(kernel: *mut Handle, library: Handle, name: *const c_char) {
        let driver = initialised()?;
        let (ptx, name) = (driver.libraries.get(library)?, text(name)?);
        let module = load(driver, &ptx, None)?;
        module.function(&name).map_err(|_| ERROR_NOT_FOUND)?;
        put(kernel, driver.kernels.insert((ptx, name)))
    }

    fn cuLibraryGetModule(module: *mut Handle, library: Handle) {
        let driver = initialised()?;
        let loaded = load(driver, &driver.libraries.get(library)?, None)?;
        put(module, driver.modules.insert(loaded))
    }

    fn cuLibraryGetKernelCount(count: *mut u32, library: Handle) {
        let driver = initialised()?;
        let module = load(driver, &driver.libraries.get(library)?, None)?;
        put(count, module.entries().len() as u32)
    }

    fn cuLibraryEnumerateKernels(kernels: *mut Handle, count: u32, library: Handle) {
        let driver = initialised()?;
        let ptx = driver.libraries.get(library)?;
        let module = load(driver, &ptx, None)?;
        for (i, name) in module.entries().into_iter().take(count as usize).enumerate() {
            put(kernels.add(i), driver.kernels.insert((ptx.clone(), name.to_owned())))?;
        }
        Ok(())
    }

    fn cuLibraryGetGlobal(
        address: *mut DevicePtr,
        bytes: *mut usize,
        library: Handle,
        name: *const c_char,
    ) {
        let driver = initialised()?;
        let module = load(driver, &driver.libraries.get(library)?, None)?;
        let symbol = module.symbol(&text(name)?).map_err(|_| ERROR_NOT_FOUND)?;
        // The variable lives as long as the process, as its kernels may use it at any time.
        driver.modules.insert(module);
        put(address, symbol.address)?;
        if bytes.is_null() { Ok(()) } else { put(bytes, symbol.bytes as usize) }
    }

    fn cuKernelGetFunction(function: *mut Handle, kernel: Handle) {
        function_of(initialised()?, kernel)?;
        put(function, kernel)
    }

    fn cuKernelGetAttribute(value: *mut i32, which: i32, kernel: Handle, device: i32) {
        let _ = device;
        put(value, attribute(&function_of(initialised()?, kernel)?, which)?)
    }

    fn cuKernelSetAttribute(which: i32, value: i32, kernel: Handle, device: i32) {
        let _ = (which, value, device);
        function_of(initialised()?, kernel).map(|_| ())
    }

    fn cuKernelSetCacheConfig(kernel: Handle, config: u32, device: i32) {
        let _ = (config, device);
        function_of(initialised()?, kernel).map(|_| ())
    }

    fn cuKernelGetName(name: *mut *const c_char, kernel: Handle) {
        name_of(name, kernel)
    }

    fn cuKernelGetParamInfo(kernel: Handle, index: usize, offset: *mut usize, bytes: *mut usize) {
        param_info(kernel, index, offset, bytes)
    }

    fn cuFuncGetParamInfo(function: Handle, index: usize, offset: *mut usize, bytes: *mut usize) {
        param_info(function, index, offset, bytes)
    }

    fn cuFuncGetAttribute(value: *mut i32, which: i32, function: Handle) {
        put(value, attribute(&function_of(initialised()?, function)?, which)?)
    }

    fn cuFuncSetAttribute(function: Handle, which: i32, value: i32) {
        let driver = initialised()?;
        let f = function_of(driver, function)?;
        // Dynamic shared memory beyond what a CTA can opt into is refused here, as on hardware.
        let limit = f.module().device().preset().shared_bytes_per_block_optin as i32;
        if which == 8 && !(0..=limit).contains(&value) { Err(ERROR_INVALID_VALUE) } else { Ok(()) }
    }

    fn cuFuncSetCacheConfig(function: Handle, config: u32) {
        let _ = config;
        function_of(initialised()?, function).map(|_| ())
    }

    fn cuFuncSetSharedMemConfig(function: Handle, config: u32) {
        let _ = config;
        function_of(initialised()?, function).map(|_| ())
    }

    fn cuFuncGetModule(module: *mut Handle, function: Handle) {
        let driver = initialised()?;
        let loaded = function_of(driver, function)?.module().clone();
        put(module, driver.modules.insert(loaded))
    }

    fn cuFuncGetName(name: *mut *const c_char, function: Handle) {
        name_of(name, function)
    }

    fn cuFuncLoad(function: Handle) { function_of(initialised()?, function).map(|_| ()) }

    fn cuFuncIsLoaded(state: *mut u32, function: Handle) {
        function_of(initialised()?, function)?;
        put(state, 1)
    }

    fn cuLinkCreate_v2(count: u32, options: *const u32, values: *const usize, link: *mut Handle) {
        let _ = (count, options, values);
        put(link, initialised()?.links.insert(Arc::new(Mutex::new(Vec::new()))))
    }

    fn cuLinkAddData_v2(
        link: Handle,
        kind: u32,
        data: *const u8,
        bytes: usize,
        name: *const c_char,
        count: u32,
        options: *const u32,
        values: *const usize,
    ) {
        let _ = (kind, name, count, options, values);
        let link = initialised()?.links.get(link)?;
        let ptx = image::ptx_of_bytes(std::slice::from_raw_parts(data, bytes))?;
        link.lock().expect("no panic holds this lock").push(ptx);
        Ok(())
    }

    fn cuLinkAddFile_v2(
        link: Handle,
        kind: u32,
        path: *const c_char,
        count: u32,
        options: *const u32,
        values: *const usize,
    ) {
        let _ = (kind, count, options, values);
        let link = initialised()?.links.get(link)?;
        let data = std::fs::read(text(path)?).map_err(|_| ERROR_FILE_NOT_FOUND)?;
        link.lock().expect("no panic holds this lock").push(image::ptx_of_bytes(&data)?);
        Ok(())
    }

    fn cuLinkComplete(link: Handle, image: *mut *const c_void, bytes: *mut usize) {
        let link = initialised()?.links.get(link)?;
        let parts = link.lock().expect("no panic holds this lock");
        let one = match &parts[..] {
            [] => return Err(ERROR_INVALID_VALUE),
            [one] => one.clone(),
            several => crate::link::link(several).map_err(|what| {
                eprintln!("fathom: cuLinkComplete: {what}");
                ERROR_INVALID_PTX
            })?,
        };
        // The image is the client's for as long as the process lives.
        let image_bytes: &'static [u8] = format!("{one}\0").into_bytes().leak();
        put(image, image_bytes.as_ptr().cast())?;
        if bytes.is_null() { Ok(()) } else { put(bytes, image_bytes.len()) }
    }

    fn cuLinkDestroy(link: Handle) { initialised()?.links.remove(link).map(|_| ()) }

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
        let f = function_of(initialised()?, function)?;
        let most = f.attributes().max_threads as i32;
        let most = if limit > 0 { most.min(limit) } else { most };
        let resident_threads = |threads: i32| {
            let shared = shared_of_block.map_or(shared, |of| of(threads));
            resident(function, threads, shared).map_or(0, |blocks| blocks * threads)
        };
        let best = (1..=most / 32).rev().map(|w| w * 32).max_by_key(|&t| (resident_threads(t), t));
        let threads = best.unwrap_or(most);
        let sms = f.module().device().preset().sm_count as i32;
        put(block, threads)?;
        put(grid, sms * (resident_threads(threads) / threads).max(1))
    }

    fn cuOccupancyMaxPotentialClusterSize(
        size: *mut i32,
        function: Handle,
        config: *const LaunchConfigC,
    ) {
        let _ = config;
        let f = function_of(initialised()?, function)?;
        put(size, f.module().device().preset().max_cluster_ctas as i32)
    }

    fn cuOccupancyMaxActiveClusters(
        clusters: *mut i32,
        function: Handle,
        config: *const LaunchConfigC,
    ) {
        if config.is_null() {
            return Err(ERROR_INVALID_VALUE);
        }
        let (config, attributes) = super::launch::attributes(&*config);
        let f = function_of(initialised()?, function)?;
        let threads = config.block.iter().product::<u32>() as i32;
        let blocks = resident(function, threads, config.shared_bytes as usize)?;
        let cluster = attributes.cluster.iter().product::<u32>().max(1) as i32;
        put(clusters, blocks * f.module().device().preset().sm_count as i32 / cluster)
    }
}

/// CTAs of a function that fit on an SM.
fn resident(function: Handle, threads: i32, shared: usize) -> R<i32> {
    let f = function_of(initialised()?, function)?;
    let a = f.attributes();
    let preset: &Preset = f.module().device().preset();
    let threads = u32::try_from(threads).map_err(|_| ERROR_INVALID_VALUE)?;
    let shared = a.static_shared_bytes + shared as u32;
    Ok(preset.blocks_per_sm(threads, a.registers, shared) as i32)
}

/// # Safety
/// `offset` and `bytes` are the client's.
unsafe fn param_info(function: Handle, index: usize, offset: *mut usize, bytes: *mut usize) -> R {
    let params = function_of(initialised()?, function)?.params();
    let param = params.get(index).ok_or(ERROR_INVALID_VALUE)?;
    // SAFETY: the client's pointers.
    unsafe {
        put(offset, param.offset)?;
        if bytes.is_null() { Ok(()) } else { put(bytes, param.bytes) }
    }
}

/// # Safety
/// `name` is the client's.
unsafe fn name_of(name: *mut *const c_char, function: Handle) -> R {
    let f = function_of(initialised()?, function)?;
    // The name is the client's for as long as the process lives.
    let words: &'static [u8] = format!("{}\0", f.name()).into_bytes().leak();
    // SAFETY: the client's pointer.
    unsafe { put(name, words.as_ptr().cast()) }
}
