//! nvJitLink: linked PTX in the place of the linked cubin.
//!
//! The real library links everything, as the client wants it, so that its errors, logs and other
//! results are its own. Beside that the inputs are kept; of those with LTO-IR a second link makes
//! PTX (`-lto -ptx`), which the linker of this driver joins to the inputs that were PTX. Machine
//! code among the inputs has no PTX: then the cubin is given out, and the driver refuses it.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int};
use std::sync::Mutex;

use super::{call_real, is_text};
use crate::abi::Handle;
use crate::image;
use crate::say::say;

/// `nvJitLinkInputType`.
const CUBIN: c_int = 1;
const PTX: c_int = 2;
const LTO_IR: c_int = 3;
const LIBRARY: c_int = 6;
const ANY: c_int = 10;

/// First bytes of LTO-IR.
const LTO_MAGIC: [u8; 4] = [0xed, 0x43, 0x4e, 0x7f];
/// Compute capability up to which PTX in a fatbinary is taken: its user is the driver, later.
const NEWEST: image::Capability = [99, 0];

/// A link that a client has begun.
#[derive(Default)]
struct Link {
    options: Vec<CString>,
    /// Each with its type.
    inputs: Vec<(c_int, Vec<u8>)>,
    /// What stands for the cubin, with a NUL.
    ptx: Option<Vec<u8>>,
}

/// By the real library's handle.
static LINKS: Mutex<BTreeMap<Handle, Link>> = Mutex::new(BTreeMap::new());

fn with<T>(handle: Handle, call: impl FnOnce(&mut Link) -> T) -> Option<T> {
    LINKS.lock().ok()?.get_mut(&handle).map(call)
}

fn is_lto(kind: c_int, data: &[u8]) -> bool {
    kind == LTO_IR || kind == ANY && data.starts_with(&LTO_MAGIC)
}

fn create(options: &[CString]) -> Result<Handle, c_int> {
    let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
    let (count, pointers) = (pointers.len() as u32, pointers.as_ptr());
    let mut handle = 0;
    match call_real!(
        c"nvJitLinkCreate",
        (*mut Handle, u32, *const *const c_char),
        (&mut handle, count, pointers)
    ) {
        0 => Ok(handle),
        code => Err(code),
    }
}

fn add(handle: Handle, kind: c_int, data: &[u8], name: *const c_char) -> c_int {
    call_real!(
        c"nvJitLinkAddData",
        (Handle, c_int, *const u8, usize, *const c_char),
        (handle, kind, data.as_ptr(), data.len(), name)
    )
}

/// The PTX of the inputs with LTO-IR.
fn ptx_of_lto(link: &Link) -> Result<String, c_int> {
    let mut options = link.options.clone();
    for wanted in [c"-lto", c"-ptx"] {
        if !options.iter().any(|o| o.as_c_str() == wanted) {
            options.push(wanted.to_owned());
        }
    }
    let handle = create(&options)?;
    let check = |code| if code == 0 { Ok(()) } else { Err(code) };
    let linked = || {
        for (kind, data) in link.inputs.iter().filter(|(kind, data)| is_lto(*kind, data)) {
            check(add(handle, *kind, data, c"lto".as_ptr()))?;
        }
        check(call_real!(c"nvJitLinkComplete", (Handle), (handle)))?;
        let mut bytes = 0;
        let size = (handle, &raw mut bytes);
        check(call_real!(c"nvJitLinkGetLinkedPtxSize", (Handle, *mut usize), (size.0, size.1)))?;
        let mut text = vec![0u8; bytes];
        let to = text.as_mut_ptr();
        check(call_real!(c"nvJitLinkGetLinkedPtx", (Handle, *mut u8), (handle, to)))?;
        Ok(String::from_utf8_lossy(&text).trim_end_matches('\0').to_owned())
    };
    let result = linked();
    let mut handle = handle;
    call_real!(c"nvJitLinkDestroy", (*mut Handle), (&mut handle));
    result
}

/// What the inputs are as one PTX text; a sentence where that cannot be had.
fn ptx_of(link: &Link) -> Result<Vec<u8>, String> {
    let mut texts = Vec::new();
    if link.inputs.iter().any(|(kind, data)| is_lto(*kind, data)) {
        texts.push(ptx_of_lto(link).map_err(|code| format!("LTO-IR to PTX: error {code}"))?);
    }
    for (kind, data) in &link.inputs {
        // Of libraries that are handed over, the device runtime above all, nothing may be needed.
        if !is_lto(*kind, data) && *kind != LIBRARY {
            let text = image::ptx_of_bytes(data, NEWEST);
            texts.push(text.map_err(|_| "an input is machine code without PTX".to_owned())?);
        }
    }
    let mut text = match &texts[..] {
        [] => return Err("no input has PTX".to_owned()),
        [one] => one.clone(),
        several => crate::link::link(several)?,
    };
    if let Some(most) = most_registers(&link.options) {
        text = crate::link::limit_registers(&text, most);
    }
    let mut text = text.into_bytes();
    text.push(0);
    Ok(text)
}

/// `-maxrregcount=N`.
fn most_registers(options: &[CString]) -> Option<u32> {
    let value = |o: &CString| {
        let option = o.to_str().ok()?.trim_start_matches('-');
        option.strip_prefix("maxrregcount=")?.trim().parse().ok()
    };
    options.iter().find_map(value)
}

/// `nvJitLinkCreate`.
#[unsafe(no_mangle)]
#[allow(non_snake_case)]
pub(super) unsafe extern "C" fn nvJitLinkCreate(
    handle: *mut Handle,
    count: u32,
    options: *const *const c_char,
) -> c_int {
    let code = call_real!(
        c"nvJitLinkCreate",
        (*mut Handle, u32, *const *const c_char),
        (handle, count, options)
    );
    if code == 0 {
        // SAFETY: the real library took them as `count` C strings and a place for the handle.
        let (handle, options) = unsafe {
            let option = |i| CStr::from_ptr(*options.add(i)).to_owned();
            (*handle, (0..count as usize).map(option).collect())
        };
        if let Ok(mut links) = LINKS.lock() {
            links.insert(handle, Link { options, ..Link::default() });
        }
    }
    code
}

/// `nvJitLinkDestroy`.
#[unsafe(no_mangle)]
#[allow(non_snake_case)]
pub(super) unsafe extern "C" fn nvJitLinkDestroy(handle: *mut Handle) -> c_int {
    // SAFETY: null, or the client's handle.
    if let (Some(handle), Ok(mut links)) = (unsafe { handle.as_ref() }, LINKS.lock()) {
        links.remove(handle);
    }
    call_real!(c"nvJitLinkDestroy", (*mut Handle), (handle))
}

/// `nvJitLinkAddData`. Text that is said to be a cubin is one that NVRTC's stand-in gave out.
#[unsafe(no_mangle)]
#[allow(non_snake_case)]
pub(super) unsafe extern "C" fn nvJitLinkAddData(
    handle: Handle,
    kind: c_int,
    data: *const u8,
    bytes: usize,
    name: *const c_char,
) -> c_int {
    if data.is_null() {
        let arguments = (handle, kind, data, bytes, name);
        return call_real!(
            c"nvJitLinkAddData",
            (Handle, c_int, *const u8, usize, *const c_char),
            (arguments.0, arguments.1, arguments.2, arguments.3, arguments.4)
        );
    }
    // SAFETY: the client's data of this length.
    let data = unsafe { std::slice::from_raw_parts(data, bytes) };
    let kind = if kind == CUBIN && is_text(data) { PTX } else { kind };
    let code = add(handle, kind, data, name);
    if code == 0 {
        with(handle, |link| link.inputs.push((kind, data.to_owned())));
    }
    code
}

/// `nvJitLinkAddFile`.
#[unsafe(no_mangle)]
#[allow(non_snake_case)]
pub(super) unsafe extern "C" fn nvJitLinkAddFile(
    handle: Handle,
    kind: c_int,
    path: *const c_char,
) -> c_int {
    let read = |path: &CStr| std::fs::read(path.to_string_lossy().as_ref()).ok();
    // SAFETY: null, or a C string of the client's.
    let data = if path.is_null() { None } else { read(unsafe { CStr::from_ptr(path) }) };
    if let Some(data) = data.as_deref().filter(|data| kind == CUBIN && is_text(data)) {
        // SAFETY: it stands for the file.
        return unsafe { nvJitLinkAddData(handle, PTX, data.as_ptr(), data.len(), path) };
    }
    let code =
        call_real!(c"nvJitLinkAddFile", (Handle, c_int, *const c_char), (handle, kind, path));
    if let (0, Some(data)) = (code, data) {
        with(handle, |link| link.inputs.push((kind, data)));
    }
    code
}

/// `nvJitLinkComplete`.
#[unsafe(no_mangle)]
#[allow(non_snake_case)]
pub(super) unsafe extern "C" fn nvJitLinkComplete(handle: Handle) -> c_int {
    let code = call_real!(c"nvJitLinkComplete", (Handle), (handle));
    if code == 0 {
        with(handle, |link| {
            // Who asks for PTX gets it from the real library.
            if !link.options.iter().any(|o| o.as_c_str() == c"-ptx") {
                match ptx_of(link) {
                    Ok(ptx) => link.ptx = Some(ptx),
                    Err(why) => say!("nvJitLink: PTX cannot stand for the cubin: {why}"),
                }
            }
        });
    }
    code
}

/// `nvJitLinkGetLinkedCubinSize`: the size of the PTX.
#[unsafe(no_mangle)]
#[allow(non_snake_case)]
pub(super) unsafe extern "C" fn nvJitLinkGetLinkedCubinSize(
    handle: Handle,
    size: *mut usize,
) -> c_int {
    let bytes = with(handle, |link| link.ptx.as_ref().map(Vec::len)).flatten();
    match bytes {
        Some(bytes) if !size.is_null() => {
            // SAFETY: not null, and the client's.
            unsafe { size.write(bytes) };
            0
        }
        _ => call_real!(c"nvJitLinkGetLinkedCubinSize", (Handle, *mut usize), (handle, size)),
    }
}

/// `nvJitLinkGetLinkedCubin`: the PTX.
#[unsafe(no_mangle)]
#[allow(non_snake_case)]
pub(super) unsafe extern "C" fn nvJitLinkGetLinkedCubin(handle: Handle, cubin: *mut u8) -> c_int {
    match with(handle, |link| link.ptx.clone()).flatten() {
        Some(ptx) if !cubin.is_null() => {
            // SAFETY: the client has asked for the size and made room.
            unsafe { cubin.copy_from_nonoverlapping(ptx.as_ptr(), ptx.len()) };
            0
        }
        _ => call_real!(c"nvJitLinkGetLinkedCubin", (Handle, *mut u8), (handle, cubin)),
    }
}
