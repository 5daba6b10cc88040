//! Libraries, which belong to no context, and their kernels.

use std::ffi::c_char;

use super::function::{attribute, param_info, set_attribute};
use super::module::{JitOptions, global, put_symbol};
use super::{entry_points, put, text};
use crate::abi::*;
use crate::driver::contexts::within;
use crate::driver::{Driver, initialised};
use crate::image::{self, Capability};

/// Runs a call about a kernel as if the device's primary context were the current one.
fn on_device<T>(driver: &Driver, device: i32, call: impl FnOnce() -> R<T>) -> R<T> {
    driver.device(device)?;
    within(driver.primary_context(device as usize), call)
}

/// A library of the PTX that `ptx` finds for the devices' compute capability.
///
/// # Safety
/// The options are the client's.
unsafe fn load(jit: &JitOptions, ptx: impl FnOnce(Capability) -> R<String>) -> R<Handle> {
    let driver = initialised()?;
    let ptx = driver.noted(ptx(driver.capability()))?;
    // SAFETY: the caller's promise.
    driver.library(unsafe { jit.parse(&ptx) }?)
}

entry_points! {
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
        let _ = (options, values, count);
        let jit = JitOptions::read(jit_count, jit_options, jit_values);
        put(library, load(&jit, |capability| image::ptx_of(code, capability))?)
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
        let _ = (options, values, count);
        let jit = JitOptions::read(jit_count, jit_options, jit_values);
        let path = text(path)?;
        put(library, load(&jit, |capability| image::ptx_of_file(&path, capability))?)
    }

    fn cuLibraryUnload(library: Handle) { initialised()?.unload_library(library) }

    fn cuLibraryGetKernel(kernel: *mut Handle, library: Handle, name: *const c_char) {
        put(kernel, initialised()?.kernel(library, &text(name)?)?)
    }

    fn cuLibraryGetModule(module: *mut Handle, library: Handle) {
        put(module, initialised()?.module_of(library)?)
    }

    fn cuLibraryGetKernelCount(count: *mut u32, library: Handle) {
        put(count, initialised()?.libraries.get(library)?.image.entries().len() as u32)
    }

    fn cuLibraryEnumerateKernels(kernels: *mut Handle, count: u32, library: Handle) {
        let driver = initialised()?;
        let image = driver.libraries.get(library)?.image.clone();
        for (i, name) in image.entries().into_iter().take(count as usize).enumerate() {
            put(kernels.add(i), driver.kernel(library, name)?)?;
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
        global(driver, driver.module_of(library)?, &text(name)?, address, bytes)
    }

    fn cuLibraryGetManaged(
        address: *mut DevicePtr,
        bytes: *mut usize,
        library: Handle,
        name: *const c_char,
    ) {
        let library = initialised()?.libraries.get(library)?;
        let symbol = library.managed.symbol(&library.image, &text(name)?);
        put_symbol(&symbol.ok_or(ERROR_NOT_FOUND)?, address, bytes)
    }

    fn cuKernelGetFunction(function: *mut Handle, kernel: Handle) {
        put(function, initialised()?.function_handle(kernel)?)
    }

    fn cuKernelGetLibrary(library: *mut Handle, kernel: Handle) {
        put(library, initialised()?.kernels.get(kernel)?.library)
    }

    fn cuKernelGetAttribute(value: *mut i32, which: i32, kernel: Handle, device: i32) {
        let driver = initialised()?;
        let function = on_device(driver, device, || driver.callable(kernel))?;
        put(value, attribute(&function, which)?)
    }

    fn cuKernelSetAttribute(which: i32, value: i32, kernel: Handle, device: i32) {
        let driver = initialised()?;
        let function = on_device(driver, device, || driver.callable(kernel))?;
        set_attribute(&function, which, value)
    }

    fn cuKernelSetCacheConfig(kernel: Handle, config: u32, device: i32) {
        let _ = config;
        let driver = initialised()?;
        driver.kernels.get(kernel)?;
        driver.device(device).map(|_| ())
    }

    fn cuKernelGetName(name: *mut *const c_char, kernel: Handle) {
        if kernel == 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        put(name, initialised()?.callable(kernel)?.name.as_ptr())
    }

    fn cuKernelGetParamInfo(kernel: Handle, index: usize, offset: *mut usize, bytes: *mut usize) {
        param_info(kernel, index, offset, bytes)
    }

    fn cuKernelGetParamCount(kernel: Handle, count: *mut usize) {
        put(count, initialised()?.callable(kernel)?.function.params().len())
    }
}
