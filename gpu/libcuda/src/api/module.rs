//! Modules and linking.

use std::ffi::{c_char, c_void};
use std::sync::Arc;

use fathom_emulator::Symbol;

use super::{entry_points, put, text};
use crate::abi::*;
use crate::driver::programs::parse;
use crate::driver::{Driver, initialised};
use crate::image;
use crate::link::{Link, limit_registers};
use crate::say::say;

/// What a client says about compiling PTX: where it wants to read what went wrong, and how many
/// registers a thread may have.
pub(super) struct JitOptions {
    registers: Option<u32>,
    error_log: *mut u8,
    error_log_bytes: usize,
}

/// `CUjit_option` values that are read here.
const MAX_REGISTERS: u32 = 0;
const ERROR_LOG_BUFFER: u32 = 5;
const ERROR_LOG_BUFFER_SIZE_BYTES: u32 = 6;

impl JitOptions {
    /// The options that matter here.
    ///
    /// # Safety
    /// `options` and `values` have `count` entries.
    pub(super) unsafe fn read(count: u32, options: *const u32, values: *const usize) -> Self {
        let mut found =
            JitOptions { registers: None, error_log: std::ptr::null_mut(), error_log_bytes: 0 };
        for i in 0..count as usize {
            // SAFETY: within the count.
            let (option, value) = unsafe { (*options.add(i), *values.add(i)) };
            match option {
                MAX_REGISTERS => found.registers = Some(value as u32).filter(|most| *most > 0),
                ERROR_LOG_BUFFER => found.error_log = value as *mut u8,
                // An integer in a pointer's place: its upper half is not the client's.
                ERROR_LOG_BUFFER_SIZE_BYTES => found.error_log_bytes = value as u32 as usize,
                _ => {}
            }
        }
        found
    }

    /// Gives the client what went wrong.
    ///
    /// # Safety
    /// The client's buffer has as much room as it says.
    unsafe fn report(&self, words: &str) {
        if self.error_log.is_null() || self.error_log_bytes == 0 {
            return;
        }
        let count = words.len().min(self.error_log_bytes - 1);
        // SAFETY: within the client's room.
        unsafe {
            std::ptr::copy_nonoverlapping(words.as_ptr(), self.error_log, count);
            *self.error_log.add(count) = 0;
        }
    }

    /// Parses PTX and reports what is wrong with it.
    ///
    /// # Safety
    /// As [`JitOptions::report`].
    pub(super) unsafe fn parse(&self, ptx: &str) -> R<fathom_emulator::Image> {
        let mut log = String::new();
        let limited = self.registers.map(|most| limit_registers(ptx, most));
        let ptx = limited.as_deref().unwrap_or(ptx);
        // SAFETY: the caller's promise.
        parse(ptx, &mut log).inspect_err(|_| unsafe { self.report(&log) })
    }
}

/// # Safety
/// `image` is a module image, `module` and the options the client's.
unsafe fn load_image(module: *mut Handle, image: *const u8, options: &JitOptions) -> R {
    let driver = initialised()?;
    // SAFETY: the caller's promise.
    unsafe {
        driver.current()?;
        let image = options.parse(&driver.noted(image::ptx_of(image, driver.capability()))?)?;
        put(module, driver.load(&image)?)
    }
}

/// Writes where a variable lies and its length; either may be unwanted, not both.
///
/// # Safety
/// `address` and `bytes` are the client's.
pub(super) unsafe fn put_symbol(symbol: &Symbol, address: *mut DevicePtr, bytes: *mut usize) -> R {
    if address.is_null() && bytes.is_null() {
        return Err(ERROR_INVALID_VALUE);
    }
    // SAFETY: the client's pointers.
    unsafe {
        if !address.is_null() {
            put(address, symbol.address)?;
        }
        if bytes.is_null() { Ok(()) } else { put(bytes, symbol.bytes as usize) }
    }
}

/// As [`put_symbol`], of a module's variable.
///
/// # Safety
/// As [`put_symbol`].
pub(super) unsafe fn global(
    driver: &Driver,
    module: Handle,
    name: &str,
    address: *mut DevicePtr,
    bytes: *mut usize,
) -> R {
    let symbol = driver.modules.get(module)?.module.symbol(name).map_err(|_| ERROR_NOT_FOUND)?;
    // SAFETY: the caller's promise.
    unsafe { put_symbol(&symbol, address, bytes) }
}

entry_points! {
    fn cuModuleLoadData(module: *mut Handle, image: *const u8) {
        load_image(module, image, &JitOptions::read(0, std::ptr::null(), std::ptr::null()))
    }

    fn cuModuleLoadDataEx(
        module: *mut Handle,
        image: *const u8,
        count: u32,
        options: *const u32,
        values: *const usize,
    ) {
        load_image(module, image, &JitOptions::read(count, options, values))
    }

    fn cuModuleLoadFatBinary(module: *mut Handle, image: *const u8) {
        load_image(module, image, &JitOptions::read(0, std::ptr::null(), std::ptr::null()))
    }

    fn cuModuleLoad(module: *mut Handle, path: *const c_char) {
        let driver = initialised()?;
        driver.current()?;
        let ptx = driver.noted(image::ptx_of_file(&text(path)?, driver.capability()))?;
        put(module, driver.load(&parse(&ptx, &mut String::new())?)?)
    }

    fn cuModuleUnload(module: Handle) { initialised()?.unload(module) }

    // Lazy.
    fn cuModuleGetLoadingMode(mode: *mut u32) { put(mode, 2) }

    fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char) {
        put(function, initialised()?.function(module, &text(name)?)?)
    }

    fn cuModuleGetFunctionCount(count: *mut u32, module: Handle) {
        put(count, initialised()?.modules.get(module)?.module.image().entries().len() as u32)
    }

    fn cuModuleEnumerateFunctions(functions: *mut Handle, count: u32, module: Handle) {
        let driver = initialised()?;
        let image = driver.modules.get(module)?.module.image();
        for (i, name) in image.entries().into_iter().take(count as usize).enumerate() {
            put(functions.add(i), driver.function(module, name)?)?;
        }
        Ok(())
    }

    fn cuModuleGetGlobal_v2(
        address: *mut DevicePtr,
        bytes: *mut usize,
        module: Handle,
        name: *const c_char,
    ) {
        global(initialised()?, module, &text(name)?, address, bytes)
    }

    fn cuLinkCreate_v2(count: u32, options: *const u32, values: *const usize, link: *mut Handle) {
        let registers = JitOptions::read(count, options, values).registers;
        put(link, initialised()?.links.insert(Arc::new(Link { registers, ..Link::default() })))
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
        let driver = initialised()?;
        let link = driver.links.get(link)?;
        let data = std::slice::from_raw_parts(data, bytes);
        let ptx = image::ptx_of_bytes(data, driver.capability())?;
        link.parts.lock().expect("no panic holds this lock").push(ptx);
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
        let driver = initialised()?;
        let link = driver.links.get(link)?;
        let ptx = image::ptx_of_file(&text(path)?, driver.capability())?;
        link.parts.lock().expect("no panic holds this lock").push(ptx);
        Ok(())
    }

    fn cuLinkComplete(link: Handle, image: *mut *const c_void, bytes: *mut usize) {
        let link = initialised()?.links.get(link)?;
        let parts = link.parts.lock().expect("no panic holds this lock");
        let mut one = match &parts[..] {
            [] => return Err(ERROR_INVALID_VALUE),
            [one] => one.clone(),
            several => crate::link::link(several).map_err(|what| {
                say!("cuLinkComplete: {what}");
                ERROR_INVALID_PTX
            })?,
        };
        if let Some(most) = link.registers {
            one = limit_registers(&one, most);
        }
        // The image is the client's for as long as the process lives.
        let image_bytes: &'static [u8] = format!("{one}\0").into_bytes().leak();
        put(image, image_bytes.as_ptr().cast())?;
        if bytes.is_null() { Ok(()) } else { put(bytes, image_bytes.len()) }
    }

    fn cuLinkDestroy(link: Handle) { initialised()?.links.remove(link).map(|_| ()) }
}
