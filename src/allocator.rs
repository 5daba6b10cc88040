//! The program's allocator. Steps allocate and free the same large tensors again and again; the
//! system's allocator gives their pages back each time and takes a page fault for every one of them
//! later.

use std::ffi::c_char;

use libmimalloc_sys::{mi_option_set, mi_option_t};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Options of mimalloc.h by number: whether the room that it reserves at first is committed whole,
/// and after how many milliseconds free pages go back.
const ARENA_EAGER_COMMIT: mi_option_t = 4;
const PURGE_DELAY: mi_option_t = 15;

/// What a step takes is kept for 50 ms: with the default of 10 ms the system cleared a tenth of the
/// step's pages again, and with a second a step's peak was a fifth higher. Room that is not
/// committed at once goes back to the system when it is purged; what is committed only may be
/// taken, and counts until it is: with it the peak of a training step was 1.25 to 1.6 times what it
/// needs, without it is 0.9 to 1.2 times
/// (`cargo run --release -p fathom-benches --example peak_memory`). The environment's
/// `MIMALLOC_ARENA_EAGER_COMMIT` and `MIMALLOC_PURGE_DELAY` still decide.
extern "C" fn keep_pages() {
    for (option, name, value) in [
        (ARENA_EAGER_COMMIT, c"MIMALLOC_ARENA_EAGER_COMMIT", 0),
        (PURGE_DELAY, c"MIMALLOC_PURGE_DELAY", 50),
    ] {
        // SAFETY: a name that ends in NUL; an option's number and value. Nothing is allocated, so
        // that this may come before the allocator's first use.
        unsafe {
            if getenv(name.as_ptr()).is_null() {
                mi_option_set(option, value);
            }
        }
    }
}

unsafe extern "C" {
    fn getenv(name: *const c_char) -> *const c_char;
}

/// Called before `main`, and so before anything is allocated.
#[used]
#[cfg_attr(target_os = "linux", unsafe(link_section = ".init_array"))]
#[cfg_attr(target_os = "macos", unsafe(link_section = "__DATA,__mod_init_func"))]
static BEFORE_MAIN: extern "C" fn() = keep_pages;
