//! Stand-ins for the functions of other NVIDIA libraries that give out machine code.
//!
//! NVRTC and nvJitLink are real, closed, and make SASS; from both the PTX can be had as well.
//! `fathom emulate` loads this library before all others (LD_PRELOAD), so that a program's `dlsym`
//! is the one below: where a program asks for one of the names of [`TABLE`], it gets a function of
//! `nvrtc` or `nvjitlink`, which asks the real one and answers with PTX where that answers with a
//! cubin; nvFatbin, which packs such cubins, is told what they are. Every other name goes on to the
//! C library, as do all where nothing was loaded before.

mod nvfatbin;
mod nvjitlink;
mod nvrtc;

use std::ffi::{CStr, c_char, c_void};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicPtr, Ordering::Relaxed};

type Address = *mut c_void;

/// A function that is stood in for.
struct Replaced {
    /// Without the version that nvJitLink's header puts around it.
    name: &'static CStr,
    ours: AtomicPtr<c_void>,
    real: AtomicPtr<c_void>,
}

macro_rules! table {
    ($($function:path => $name:literal),* $(,)?) => {
        static TABLE: [Replaced; [$($name),*].len()] = [$(Replaced {
            name: $name,
            ours: AtomicPtr::new($function as *mut c_void),
            real: AtomicPtr::new(null_mut()),
        }),*];
    };
}

table! {
    nvrtc::nvrtcGetCUBINSize => c"nvrtcGetCUBINSize",
    nvrtc::nvrtcGetCUBIN => c"nvrtcGetCUBIN",
    nvfatbin::nvFatbinAddCubin => c"nvFatbinAddCubin",
    nvjitlink::nvJitLinkCreate => c"nvJitLinkCreate",
    nvjitlink::nvJitLinkDestroy => c"nvJitLinkDestroy",
    nvjitlink::nvJitLinkAddData => c"nvJitLinkAddData",
    nvjitlink::nvJitLinkAddFile => c"nvJitLinkAddFile",
    nvjitlink::nvJitLinkComplete => c"nvJitLinkComplete",
    nvjitlink::nvJitLinkGetLinkedCubinSize => c"nvJitLinkGetLinkedCubinSize",
    nvjitlink::nvJitLinkGetLinkedCubin => c"nvJitLinkGetLinkedCubin",
}

/// Names that the stand-ins need beside those that they stand in for.
static NEEDED: [(&CStr, AtomicPtr<c_void>); 5] = [
    (c"nvFatbinAddPTX", AtomicPtr::new(null_mut())),
    (c"nvrtcGetPTXSize", AtomicPtr::new(null_mut())),
    (c"nvrtcGetPTX", AtomicPtr::new(null_mut())),
    (c"nvJitLinkGetLinkedPtxSize", AtomicPtr::new(null_mut())),
    (c"nvJitLinkGetLinkedPtx", AtomicPtr::new(null_mut())),
];

/// Whether data is PTX text: what this driver's NVRTC gave out as a cubin is.
fn is_text(data: &[u8]) -> bool {
    data.first().is_some_and(|c| matches!(c, b'.' | b'/') || c.is_ascii_whitespace())
}

type Dlsym = unsafe extern "C" fn(Address, *const c_char) -> Address;

/// The C library's `dlsym`; set before `dlsym` jumps there.
static REAL: AtomicPtr<c_void> = AtomicPtr::new(null_mut());

/// The libraries behind the calling one in the order of loading.
const RTLD_NEXT: Address = -1isize as Address;

unsafe extern "C" {
    fn dlvsym(handle: Address, name: *const c_char, version: *const c_char) -> Address;
}

/// `dlsym` of the whole process. It jumps to the real one, which looks at who called.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn dlsym(handle: Address, name: *const c_char) -> Address {
    core::arch::naked_asm!(
        "push rdi",
        "push rsi",
        "sub rsp, 8",
        "call {choose}",
        "add rsp, 8",
        "pop rsi",
        "pop rdi",
        "test rax, rax",
        "jnz 2f",
        "mov rax, [rip + {real}]",
        "jmp rax",
        "2:",
        "ret",
        choose = sym choose,
        real = sym REAL,
    )
}

/// The real `dlsym`: in libc since 2.34, in libdl before.
fn real_dlsym() -> Dlsym {
    let mut found = REAL.load(Relaxed);
    if found.is_null() {
        for version in [c"GLIBC_2.34", c"GLIBC_2.2.5"] {
            if found.is_null() {
                // SAFETY: NUL-terminated names.
                found = unsafe { dlvsym(RTLD_NEXT, c"dlsym".as_ptr(), version.as_ptr()) };
            }
        }
        REAL.store(found, Relaxed);
    }
    assert!(!found.is_null(), "the C library has dlsym");
    // SAFETY: the address of a function of this type.
    unsafe { std::mem::transmute::<Address, Dlsym>(found) }
}

/// The stand-in for a name that a program looks for, null where there is none or nothing to stand
/// in for. It allocates nothing: memory allocators look for names, too.
unsafe extern "C" fn choose(handle: Address, name: *const c_char) -> Address {
    let real = real_dlsym();
    if name.is_null() || in_program() {
        return null_mut();
    }
    // SAFETY: a C string of the caller's.
    let wanted = unsafe { CStr::from_ptr(name) }.to_bytes();
    let Some(row) = TABLE.iter().find(|row| is(wanted, row.name.to_bytes())) else {
        return null_mut();
    };
    let ours = row.ours.load(Relaxed);
    // SAFETY: the caller's handle, or that of the libraries behind this one.
    let found = unsafe {
        match real(handle, name) {
            found if found == ours => real(RTLD_NEXT, name),
            found => found,
        }
    };
    if found.is_null() {
        return null_mut();
    }
    row.real.store(found, Relaxed);
    for (name, place) in &NEEDED {
        // SAFETY: as above.
        let needed = unsafe { real(handle, name.as_ptr()) };
        if !needed.is_null() {
            place.store(needed, Relaxed);
        }
    }
    ours
}

/// What `dladdr` says of an address: the object that it lies in, and the symbol before it.
#[repr(C)]
struct Place {
    path: *const c_char,
    base: Address,
    symbol: *const c_char,
    symbol_at: Address,
}

unsafe extern "C" {
    fn dladdr(address: *const c_void, place: *mut Place) -> std::ffi::c_int;
    fn getauxval(kind: std::ffi::c_ulong) -> std::ffi::c_ulong;
}

/// Of the program's auxiliary vector: where its own headers are in memory.
const AT_PHDR: std::ffi::c_ulong = 3;

/// Whether this code is part of the program itself, as it is of `fathom`, and not of a library that
/// was loaded: such a program asks for machine code because it wants to look at it.
fn in_program() -> bool {
    let base_of = |address: *const c_void| {
        let mut place =
            Place { path: null(), base: null_mut(), symbol: null(), symbol_at: null_mut() };
        // SAFETY: the place is live; any address may be asked for.
        (unsafe { dladdr(address, &mut place) } != 0).then_some(place.base)
    };
    // SAFETY: it takes any number.
    let headers = unsafe { getauxval(AT_PHDR) } as *const c_void;
    base_of(headers).is_some_and(|base| base_of(choose as *const c_void) == Some(base))
}

/// Whether a symbol is a function's, with or without a version: `__nvJitLinkCreate_13_0`.
fn is(symbol: &[u8], name: &[u8]) -> bool {
    let rest = symbol.strip_prefix(b"__").unwrap_or(symbol).strip_prefix(name);
    rest.is_some_and(|rest| rest.iter().all(|c| c.is_ascii_digit() || *c == b'_'))
}

/// The real function of a name; null where no library that is loaded has it.
fn real(name: &CStr) -> Address {
    let places = TABLE.iter().map(|row| (row.name, &row.real));
    let mut places = places.chain(NEEDED.iter().map(|(name, place)| (*name, place)));
    let place = places.find(|(known, _)| *known == name).expect("asked for by names listed").1;
    if place.load(Relaxed).is_null() {
        // SAFETY: a C string. Who calls the stand-in was linked to it in the real one's place.
        place.store(unsafe { real_dlsym()(RTLD_NEXT, name.as_ptr()) }, Relaxed);
    }
    place.load(Relaxed)
}

/// Calls the real function of a name, which has this type.
macro_rules! call_real {
    ($name:literal, ($($type:ty),*), ($($arg:expr),* $(,)?)) => {{
        let function = $crate::standins::real($name);
        assert!(!function.is_null(), "the library that has this name is loaded");
        type Function = unsafe extern "C" fn($($type),*) -> std::ffi::c_int;
        // SAFETY: the type is that of NVIDIA's header.
        let function: Function = unsafe { std::mem::transmute(function) };
        // SAFETY: the client's arguments, or ours.
        unsafe { function($($arg),*) }
    }};
}
use call_real;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_with_and_without_their_version() {
        for name in [&b"nvJitLinkCreate"[..], b"__nvJitLinkCreate_12_0", b"__nvJitLinkCreate_13_5"]
        {
            assert!(is(name, b"nvJitLinkCreate"));
        }
        for name in [&b"nvJitLinkCreateMore"[..], b"nvJitLink", b"cuInit", b""] {
            assert!(!is(name, b"nvJitLinkCreate"));
        }
    }
}
