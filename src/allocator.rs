//! The program's allocator. Steps allocate and free the same large tensors again and again; the
//! system's allocator gives their pages back each time and takes a page fault for every one of them
//! later.

use libmimalloc_sys::{mi_option_set, mi_option_t};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay` of mimalloc.h: after how many milliseconds free pages go back.
const PURGE_DELAY: mi_option_t = 15;

/// Lets free pages stay for a second, longer than most ops of a step take: the default of 10 ms had
/// the system clear a tenth of the step's pages again. `MIMALLOC_PURGE_DELAY` still decides.
pub fn keep_pages() {
    if std::env::var_os("MIMALLOC_PURGE_DELAY").is_none() {
        // SAFETY: an option's number and value; mimalloc reads it when it next purges.
        unsafe { mi_option_set(PURGE_DELAY, 1000) };
    }
}
