//! Modules and linking.

use std::ffi::{c_char, c_void};
use std::sync::Arc;

use fathom_emulator::Symbol;

use super::{entry_points, put, text};
use crate::abi::*;
use crate::driver::programs::parse;
use crate::driver::{Driver, initialised};
use crate::image;
use crate::link::{Link, Logs, limit_registers};
use crate::say::say;

/// What a client says about compiling PTX: where it wants to read what went wrong, and how many
/// registers a thread may have.
pub(super) struct JitOptions {
    registers: Option<u32>,
    logs: Logs,
}

/// `CUjit_option` values that are read here.
const MAX_REGISTERS: u32 = 0;
const INFO_LOG_BUFFER: u32 = 3;
const INFO_LOG_BUFFER_SIZE_BYTES: u32 = 4;
const ERROR_LOG_BUFFER: u32 = 5;
const ERROR_LOG_BUFFER_SIZE_BYTES: u32 = 6;
/// `CU_JIT_INPUT_LIBRARY`.
const LIBRARY: u32 = 4;

impl JitOptions {
    /// The options that matter here.
    ///
    /// # Safety
    /// `options` and `values` have `count` entries.
    pub(super) unsafe fn read(count: u32, options: *const u32, values: *const usize) -> Self {
        let mut found = JitOptions { registers: None, logs: Logs::default() };
        for i in 0..count as usize {
            // SAFETY: within the count.
            let (option, at) = unsafe { (*options.add(i), values.add(i)) };
            // SAFETY: as above.
            let value = unsafe { *at };
            match option {
                MAX_REGISTERS => found.registers = Some(value as u32).filter(|most| *most > 0),
                INFO_LOG_BUFFER => found.logs.info.buffer = value,
                INFO_LOG_BUFFER_SIZE_BYTES => found.logs.info.sized(value, at),
                ERROR_LOG_BUFFER => found.logs.error.buffer = value,
                ERROR_LOG_BUFFER_SIZE_BYTES => found.logs.error.sized(value, at),
                _ => {}
            }
        }
        found
    }

    /// Parses PTX and reports what is wrong with it.
    ///
    /// # Safety
    /// As [`write_logs`].
    pub(super) unsafe fn parse(&self, ptx: &str) -> R<fathom_emulator::Image> {
        let mut log = String::new();
        let limited = self.registers.map(|most| limit_registers(ptx, most));
        let parsed = parse(limited.as_deref().unwrap_or(ptx), &mut log);
        // SAFETY: the caller's promise.
        unsafe { write_logs(&self.logs, if parsed.is_err() { &log } else { "" }) };
        parsed
    }
}

/// Tells the client what went wrong, or that nothing did: the text with a NUL, and in the place of
/// the buffer's size how much of it is filled. There is nothing to say for information.
///
/// # Safety
/// The client's buffers have as much room as it said, and are there as cuda.h asks: for as long as
/// a link whose options name them.
unsafe fn write_logs(logs: &Logs, error: &str) {
    for (log, words) in [(&logs.info, ""), (&logs.error, error)] {
        let count = words.len().min(log.room.saturating_sub(1));
        // SAFETY: within the client's room; the place of the size is an option's value.
        unsafe {
            if log.buffer != 0 && log.room > 0 {
                let to = log.buffer as *mut u8;
                to.copy_from_nonoverlapping(words.as_ptr(), count);
                to.add(count).write(0);
            }
            if log.filled != 0 {
                (log.filled as *mut usize).write_unaligned(count);
            }
        }
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
        let JitOptions { registers, logs } = JitOptions::read(count, options, values);
        let begun = Link { registers, logs, ..Link::default() };
        write_logs(&begun.logs, "");
        put(link, initialised()?.links.insert(Arc::new(begun)))
    }

    // Of libraries that are handed over, the device runtime above all, nothing may be needed; what
    // is, a launch names.
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
        let _ = (name, count, options, values);
        let driver = initialised()?;
        let link = driver.links.get(link)?;
        if kind == LIBRARY {
            return Ok(());
        }
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
        let _ = (count, options, values);
        let driver = initialised()?;
        let link = driver.links.get(link)?;
        let path = text(path)?;
        if kind == LIBRARY && std::path::Path::new(&path).is_file() {
            return Ok(());
        }
        let ptx = image::ptx_of_file(&path, driver.capability())?;
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
                write_logs(&link.logs, &what);
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
