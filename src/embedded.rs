//! The shared library of the emulated driver, as bytes that `build.rs` links into the program.

#[cfg(embedded)]
include!(concat!(env!("OUT_DIR"), "/embedded.rs"));

/// The library's bytes; `None` on systems whose linker does not take them in.
#[cfg(embedded)]
pub fn libcuda() -> Option<&'static [u8]> {
    let (start, end) = (&raw const START, &raw const END);
    // SAFETY: the linker defines both symbols around the bytes of one file, which nothing writes.
    let bytes = unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) };
    Some(bytes)
}

/// The library's bytes; `None` on systems whose linker does not take them in.
#[cfg(not(embedded))]
pub fn libcuda() -> Option<&'static [u8]> {
    None
}
