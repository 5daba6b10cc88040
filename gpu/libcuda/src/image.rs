//! What a client may hand over as a module: PTX text, or a fatbinary that carries it.
//!
//! Layout of a fatbinary: a header (magic 0xBA55ED50) and entries, each with a header of its own;
//! the
//! toolkit's programs wrap it in a descriptor (magic 0x466243B1) that points at it.

use std::ffi::CStr;

use crate::abi::{CuResult, ERROR_INVALID_IMAGE, ERROR_INVALID_VALUE, ERROR_NO_BINARY_FOR_GPU};

const FATBIN_MAGIC: u32 = 0xBA55_ED50;
const WRAPPER_MAGIC: u32 = 0x4662_43B1;
const ELF_MAGIC: u32 = 0x464C_457F;
const KIND_PTX: u16 = 1;
const FLAG_LZ4: u64 = 0x2000;

/// The PTX text of a module image.
///
/// # Safety
/// `image` points to a module image as cuda.h describes it: NUL-terminated text, or a binary whose
/// headers tell its length.
pub(crate) unsafe fn ptx_of(image: *const u8) -> Result<String, CuResult> {
    if image.is_null() {
        return Err(ERROR_INVALID_VALUE);
    }
    // SAFETY: every image has at least four bytes (an empty text is refused by its first byte).
    let magic = unsafe {
        if *image == 0 {
            return Err(ERROR_INVALID_IMAGE);
        }
        let first = std::slice::from_raw_parts(image, 2);
        // Text is told by its first characters, so that a short text is not read past its end.
        if first[0] == b'.' || first[0] == b'/' || first[0].is_ascii_whitespace() {
            0
        } else {
            image.cast::<u32>().read_unaligned()
        }
    };
    match magic {
        // SAFETY: the wrapper's third field points at the fatbinary.
        WRAPPER_MAGIC => unsafe { ptx_of(image.add(8).cast::<*const u8>().read_unaligned()) },
        // SAFETY: the header tells the length of what follows.
        FATBIN_MAGIC => unsafe {
            let header = image.add(6).cast::<u16>().read_unaligned() as usize;
            let size = image.add(8).cast::<u64>().read_unaligned() as usize;
            ptx_of_entries(std::slice::from_raw_parts(image.add(header), size))
        },
        ELF_MAGIC => {
            eprintln!(
                "fathom: the module is a cubin (machine code), which is not emulated. Hand over PTX: \
                 compile with -arch=compute_90a or --ptx, or keep the PTX in the fatbinary \
                 (-gencode arch=compute_90a,code=compute_90a)"
            );
            Err(ERROR_NO_BINARY_FOR_GPU)
        }
        // SAFETY: what is no binary is NUL-terminated text.
        _ => unsafe { Ok(CStr::from_ptr(image.cast()).to_string_lossy().into_owned()) },
    }
}

/// The PTX text of data with a known length.
pub(crate) fn ptx_of_bytes(data: &[u8]) -> Result<String, CuResult> {
    let mut owned = data.to_vec();
    owned.extend([0; 4]);
    // SAFETY: the copy ends in zeros; a binary's headers are the client's.
    unsafe { ptx_of(owned.as_ptr()) }
}

fn ptx_of_entries(mut entries: &[u8]) -> Result<String, CuResult> {
    let u16_at = |d: &[u8], at: usize| u16::from_le_bytes([d[at], d[at + 1]]);
    let u32_at =
        |d: &[u8], at: usize| u32::from_le_bytes(d[at..at + 4].try_into().expect("4 bytes"));
    let u64_at =
        |d: &[u8], at: usize| u64::from_le_bytes(d[at..at + 8].try_into().expect("8 bytes"));
    let mut best: Option<(u32, String)> = None;
    while entries.len() >= 64 {
        let header = u32_at(entries, 4) as usize;
        let payload = u64_at(entries, 8) as usize;
        let Some(data) = entries.get(header..header.saturating_add(payload)) else { break };
        if u16_at(entries, 0) == KIND_PTX {
            let compressed = u32_at(entries, 16) as usize;
            let arch = u32_at(entries, 28);
            let flags = u64_at(entries, 40);
            let text = if flags & FLAG_LZ4 != 0 {
                lz4(&data[..compressed.min(data.len())])
            } else if compressed != 0 {
                eprintln!(
                    "fathom: the fatbinary's PTX is compressed in a way that is not known here; \
                           compile with --no-compress"
                );
                None
            } else {
                Some(data.to_vec())
            };
            if let Some(text) = text
                && best.as_ref().is_none_or(|(a, _)| arch > *a)
            {
                let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
                best = Some((arch, String::from_utf8_lossy(&text[..end]).into_owned()));
            }
        }
        entries = &entries[header + payload..];
    }
    best.map(|(_, text)| text).ok_or_else(|| {
        eprintln!("fathom: the fatbinary carries no PTX; compile with code=compute_90a as well");
        ERROR_NO_BINARY_FOR_GPU
    })
}

/// The LZ4 block format: literals and matches, until the input ends; `None` where it is malformed.
fn lz4(input: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let mut at = 0;
    let long = |at: &mut usize, mut length: usize| -> Option<usize> {
        if length == 15 {
            loop {
                let more = *input.get(*at)?;
                *at += 1;
                length += usize::from(more);
                if more != 255 {
                    break;
                }
            }
        }
        Some(length)
    };
    while at < input.len() {
        let token = input[at];
        at += 1;
        let literals = long(&mut at, usize::from(token >> 4))?;
        out.extend_from_slice(input.get(at..at + literals)?);
        at += literals;
        if at >= input.len() {
            break;
        }
        let offset = usize::from(u16::from_le_bytes([*input.get(at)?, *input.get(at + 1)?]));
        at += 2;
        let length = long(&mut at, usize::from(token & 15))? + 4;
        let start = out.len().checked_sub(offset).filter(|_| offset > 0)?;
        for i in 0..length {
            out.push(out[start + i]);
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: u16, arch: u32, flags: u64, compressed: u32, payload: &[u8]) -> Vec<u8> {
        let mut e = vec![0u8; 64];
        e[0..2].copy_from_slice(&kind.to_le_bytes());
        e[4..8].copy_from_slice(&64u32.to_le_bytes());
        e[8..16].copy_from_slice(&(payload.len() as u64).to_le_bytes());
        e[16..20].copy_from_slice(&compressed.to_le_bytes());
        e[28..32].copy_from_slice(&arch.to_le_bytes());
        e[40..48].copy_from_slice(&flags.to_le_bytes());
        e.extend(payload);
        e
    }

    fn fatbin(entries: &[Vec<u8>]) -> Vec<u8> {
        let body = entries.concat();
        let mut f = FATBIN_MAGIC.to_le_bytes().to_vec();
        f.extend(1u16.to_le_bytes());
        f.extend(16u16.to_le_bytes());
        f.extend((body.len() as u64).to_le_bytes());
        f.extend(body);
        f
    }

    #[test]
    fn the_newest_ptx_of_a_fatbinary_is_taken() {
        let f = fatbin(&[
            entry(2, 90, 0, 0, b"machine code...."),
            entry(KIND_PTX, 80, 0, 0, b".version 8.0 old"),
            entry(KIND_PTX, 90, 0, 0, b".version 8.0 new\0"),
        ]);
        assert_eq!(ptx_of_bytes(&f).unwrap(), ".version 8.0 new");
        assert_eq!(
            ptx_of_bytes(&fatbin(&[entry(2, 90, 0, 0, b"x")])),
            Err(ERROR_NO_BINARY_FOR_GPU)
        );
    }

    #[test]
    fn lz4_blocks_are_unpacked() {
        // "abcabcabcabc": three literals, then a match of 9 at distance 3.
        assert_eq!(lz4(&[0x35, b'a', b'b', b'c', 3, 0]).unwrap(), b"abcabcabcabc");
        assert_eq!(lz4(&[0x35, b'a', b'b', b'c', 9, 0]), None);
        assert_eq!(lz4(&[0xF0]), None);
    }

    #[test]
    fn text_is_taken_as_it_is_and_cubins_are_refused() {
        assert_eq!(ptx_of_bytes(b".version 8.0\n").unwrap(), ".version 8.0\n");
        assert_eq!(ptx_of_bytes(b"\x7fELF\x02\x01"), Err(ERROR_NO_BINARY_FOR_GPU));
        assert_eq!(ptx_of_bytes(b""), Err(ERROR_INVALID_IMAGE));
    }
}
