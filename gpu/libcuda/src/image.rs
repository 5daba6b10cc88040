//! What a client may hand over as a module: PTX text, or a fatbinary that carries it.
//!
//! Layout of a fatbinary: a header (magic 0xBA55ED50) and entries, each with a header of its own;
//! the toolkit's programs wrap it in a descriptor (magic 0x466243B1) that points at it, and of
//! separately compiled programs at the fatbinaries of the parts. Of several PTX texts the driver
//! takes the one for the newest architecture that the device may run.

use std::ffi::CStr;
use std::io::Read;

use crate::abi::*;
use crate::say::say;

const FATBIN_MAGIC: u32 = 0xBA55_ED50;
const WRAPPER_MAGIC: u32 = 0x4662_43B1;
const ELF_MAGIC: u32 = 0x464C_457F;
/// Bytecode of CUDA Tile, which a driver compiles as it does PTX.
const TILE_MAGIC: u32 = u32::from_le_bytes(*b"\x7fTil");
/// Version of a wrapper whose last field points at the parts of a separately compiled program.
const WRAPPER_OF_PARTS: u32 = 2;

const KIND_PTX: u16 = 1;
const KIND_CUBIN: u16 = 2;
const FLAG_LZ4: u64 = 0x2000;
const FLAG_ZSTD: u64 = 0x8000;

/// Bytes of an entry's header as far as it is read here.
const ENTRY_HEADER: usize = 64;
/// Bytes of a file with a module at most, and of a text after decompression.
const MOST_BYTES: u64 = 1 << 30;

/// Compute capability of a device, major and minor.
pub(crate) type Capability = [u32; 2];

/// A `.target`: architecture times ten, and the suffix of targets that are not forward compatible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Target {
    sm: u32,
    suffix: Option<char>,
}

impl Target {
    /// Of PTX text, by its first `.target`.
    fn of(text: &str) -> Option<Target> {
        let line = text.lines().find_map(|l| l.trim_start().strip_prefix(".target"))?;
        let name = line.trim_start().strip_prefix("sm_")?;
        let digits = name.chars().take_while(char::is_ascii_digit).count();
        let suffix = name[digits..].chars().next().filter(|c| matches!(c, 'a' | 'f'));
        Some(Target { sm: name[..digits].parse().ok()?, suffix })
    }

    /// Whether a device may run it: plain targets run on all later devices, `f` on later ones of
    /// the same major number, `a` on that very one.
    fn runs_on(self, [major, minor]: Capability) -> bool {
        let device = major * 10 + minor;
        match self.suffix {
            None => self.sm <= device,
            Some('f') => self.sm <= device && self.sm / 10 == major,
            Some(_) => self.sm == device,
        }
    }
}

/// The PTX text of a module image for a device.
///
/// # Errors
/// `cuda.h`'s number, after a sentence on stderr with what to do about it.
///
/// # Safety
/// `image` points to a module image as cuda.h describes it: NUL-terminated text, or a binary whose
/// headers tell its length.
pub(crate) unsafe fn ptx_of(image: *const u8, device: Capability) -> Result<String, CuResult> {
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
        // SAFETY: the wrapper's fields are its version, the fatbinary, and its parts.
        WRAPPER_MAGIC => unsafe {
            let parts = image.add(16).cast::<*const *const u8>().read_unaligned();
            if image.add(4).cast::<u32>().read_unaligned() == WRAPPER_OF_PARTS && !parts.is_null() {
                return linked(parts, device);
            }
            ptx_of(image.add(8).cast::<*const u8>().read_unaligned(), device)
        },
        // SAFETY: the header tells the length of what follows.
        FATBIN_MAGIC => unsafe {
            ptx_of_entries(entries(image), device)?
                .ok_or_else(|| without_ptx(entries(image), device))
        },
        TILE_MAGIC => {
            say!("the module is bytecode of CUDA Tile, which is not emulated; hand over PTX");
            Err(ERROR_NO_BINARY_FOR_GPU)
        }
        ELF_MAGIC => {
            say!(
                "the module is a cubin (machine code), which is not emulated. Hand over PTX: \
                 compile with -arch=compute_90a or --ptx, or keep the PTX in the fatbinary \
                 (-gencode arch=compute_90a,code=compute_90a). For a library that carries both, \
                 cuBLAS for instance: --gpu next, for which it has no machine code"
            );
            Err(ERROR_NO_BINARY_FOR_GPU)
        }
        // SAFETY: what is no binary is NUL-terminated text.
        _ => unsafe { Ok(CStr::from_ptr(image.cast()).to_string_lossy().into_owned()) },
    }
}

/// The PTX texts of a separately compiled program's parts, linked into one. Parts without PTX for
/// the device are left out where others have it: CUDA's device runtime is machine code, and what
/// is called of it is the driver's (`children.ptx`). A function that is missing then is refused by
/// name with the kernel that calls it.
///
/// # Safety
/// `parts` is a list of fatbinaries that ends with null.
unsafe fn linked(mut parts: *const *const u8, device: Capability) -> Result<String, CuResult> {
    let (mut texts, mut without) = (Vec::new(), None);
    // SAFETY: the list ends with null; of a fatbinary the header tells the length.
    unsafe {
        while !(*parts).is_null() {
            let is_fatbinary = (*parts).cast::<u32>().read_unaligned() == FATBIN_MAGIC;
            match is_fatbinary.then(|| entries(*parts)) {
                None => texts.push(ptx_of(*parts, device)?),
                Some(entries) => match ptx_of_entries(entries, device)? {
                    Some(text) => texts.push(text),
                    None => without = Some(entries),
                },
            }
            parts = parts.add(1);
        }
    }
    if let (Some(entries), true) = (without, texts.is_empty()) {
        return Err(without_ptx(entries, device));
    }
    crate::link::link(&texts).map_err(|what| {
        say!("parts of a separately compiled program: {what}");
        ERROR_INVALID_PTX
    })
}

/// The entries of a fatbinary.
///
/// # Safety
/// `image` points at a fatbinary's header.
unsafe fn entries<'a>(image: *const u8) -> &'a [u8] {
    // SAFETY: the header tells its own length and that of what follows.
    unsafe {
        let header = image.add(6).cast::<u16>().read_unaligned() as usize;
        let size = image.add(8).cast::<u64>().read_unaligned() as usize;
        std::slice::from_raw_parts(image.add(header), size)
    }
}

/// The PTX text of data with a known length.
pub(crate) fn ptx_of_bytes(data: &[u8], device: Capability) -> Result<String, CuResult> {
    let mut owned = data.to_vec();
    owned.extend([0; 4]);
    // SAFETY: the copy ends in zeros; a binary's headers are the client's.
    unsafe { ptx_of(owned.as_ptr(), device) }
}

/// The PTX text of a file.
pub(crate) fn ptx_of_file(path: &str, device: Capability) -> Result<String, CuResult> {
    let not_there = |error: std::io::Error| {
        say!("{path}: {error}");
        ERROR_FILE_NOT_FOUND
    };
    let file = std::fs::File::open(path).map_err(not_there)?;
    let mut data = Vec::new();
    file.take(MOST_BYTES + 1).read_to_end(&mut data).map_err(not_there)?;
    if data.len() as u64 > MOST_BYTES {
        say!("{path}: expected a module of at most {MOST_BYTES} bytes, found more");
        return Err(ERROR_INVALID_IMAGE);
    }
    ptx_of_bytes(&data, device)
}

/// An entry of a fatbinary.
struct Entry<'a> {
    kind: u16,
    /// Architecture times ten.
    arch: u32,
    flags: u64,
    /// Bytes that are compressed; 0 where they are not.
    compressed: usize,
    uncompressed: u64,
    payload: &'a [u8],
}

/// Cuts a fatbinary into its entries; what is cut off at the end is left out.
fn cut(mut bytes: &[u8]) -> Vec<Entry<'_>> {
    let mut found = Vec::new();
    while let Some(header) = bytes.first_chunk::<ENTRY_HEADER>() {
        let u32_at = |at| u32::from_le_bytes(*header[at..].first_chunk().expect("4 bytes"));
        let u64_at = |at| u64::from_le_bytes(*header[at..].first_chunk().expect("8 bytes"));
        let begin = u32_at(4) as usize;
        let end = begin.saturating_add(u64_at(8) as usize);
        let Some(payload) = bytes.get(begin..end) else { break };
        found.push(Entry {
            kind: u16::from_le_bytes([header[0], header[1]]),
            arch: u32_at(28),
            flags: u64_at(40),
            compressed: u32_at(16) as usize,
            uncompressed: u64_at(56),
            payload,
        });
        if end == 0 {
            break;
        }
        bytes = &bytes[end..];
    }
    found
}

impl Entry<'_> {
    /// Its text, decompressed; a sentence where that fails.
    fn text(&self) -> Result<String, String> {
        let packed = &self.payload[..self.compressed.min(self.payload.len())];
        let room = self.uncompressed.min(MOST_BYTES);
        let bytes = if self.flags & FLAG_LZ4 != 0 {
            lz4(packed, room as usize).map_err(|e| format!("LZ4: {e}"))?
        } else if self.flags & FLAG_ZSTD != 0 {
            zstd(packed, room).map_err(|e| format!("zstd: {e}"))?
        } else if self.compressed != 0 {
            return Err(format!("compression of an unknown kind (flags {:#x})", self.flags));
        } else {
            self.payload.to_vec()
        };
        let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
        Ok(String::from_utf8_lossy(&bytes[..end]).into_owned())
    }

    /// Its text with the target that it names.
    fn target(&self) -> Result<(Target, String), CuResult> {
        let text = self.text().map_err(|what| {
            say!("the fatbinary's PTX for sm_{}: {what}", self.arch);
            ERROR_INVALID_IMAGE
        })?;
        let target = Target::of(&text).unwrap_or(Target { sm: self.arch, suffix: None });
        Ok((target, text))
    }
}

fn lz4(packed: &[u8], room: usize) -> Result<Vec<u8>, lz4_flex::block::DecompressError> {
    let mut bytes = vec![0; room];
    let length = lz4_flex::block::decompress_into(packed, &mut bytes)?;
    bytes.truncate(length);
    Ok(bytes)
}

fn zstd(packed: &[u8], room: u64) -> std::io::Result<Vec<u8>> {
    let decoder = ruzstd::decoding::StreamingDecoder::new(packed).map_err(std::io::Error::other)?;
    let mut bytes = Vec::new();
    decoder.take(room).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The PTX of a fatbinary for a device, if there is any.
fn ptx_of_entries(bytes: &[u8], device: Capability) -> Result<Option<String>, CuResult> {
    let [major, minor] = device;
    let mut best: Option<(Target, String)> = None;
    for entry in cut(bytes) {
        if entry.kind == KIND_PTX && entry.arch <= major * 10 + minor {
            let (target, text) = entry.target()?;
            if target.runs_on(device) && best.as_ref().is_none_or(|(b, _)| target > *b) {
                best = Some((target, text));
            }
        }
    }
    Ok(best.map(|(_, text)| text))
}

/// Tells what a fatbinary has in the place of PTX for a device.
fn without_ptx(bytes: &[u8], [major, minor]: Capability) -> CuResult {
    let told = |entry: &Entry<'_>| match (entry.kind, entry.arch) {
        (KIND_PTX, arch) => {
            let target = entry.target().ok().map(|(target, _)| target);
            let Target { sm, suffix } = target.unwrap_or(Target { sm: arch, suffix: None });
            format!("PTX for sm_{sm}{}", suffix.map(String::from).unwrap_or_default())
        }
        (KIND_CUBIN, arch) => format!("machine code for sm_{arch}"),
        (other, arch) => format!("an image of kind {other} for sm_{arch}"),
    };
    let found: Vec<String> = cut(bytes).iter().map(told).collect();
    let found = if found.is_empty() { "nothing".to_owned() } else { found.join(", ") };
    say!(
        "expected PTX for sm_{major}{minor} or older in the fatbinary, found {found}; build with \
         -gencode arch=compute_{major}{minor},code=compute_{major}{minor}"
    );
    ERROR_NO_BINARY_FOR_GPU
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOPPER: Capability = [9, 0];

    fn entry(kind: u16, arch: u32, flags: u64, sizes: [usize; 2], payload: &[u8]) -> Vec<u8> {
        let mut e = vec![0u8; ENTRY_HEADER];
        e[0..2].copy_from_slice(&kind.to_le_bytes());
        e[4..8].copy_from_slice(&(ENTRY_HEADER as u32).to_le_bytes());
        e[8..16].copy_from_slice(&(payload.len() as u64).to_le_bytes());
        e[16..20].copy_from_slice(&(sizes[0] as u32).to_le_bytes());
        e[28..32].copy_from_slice(&arch.to_le_bytes());
        e[40..48].copy_from_slice(&flags.to_le_bytes());
        e[56..64].copy_from_slice(&(sizes[1] as u64).to_le_bytes());
        e.extend(payload);
        e
    }

    fn ptx(arch: u32, target: &str) -> Vec<u8> {
        let text = format!(".version 8.0\n.target {target}\n\0");
        entry(KIND_PTX, arch, 0, [0, 0], text.as_bytes())
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

    fn target_of(entries: &[Vec<u8>], device: Capability) -> Result<String, CuResult> {
        let text = ptx_of_bytes(&fatbin(entries), device)?;
        Ok(text.lines().nth(1).unwrap().replace(".target ", ""))
    }

    #[test]
    fn a_device_takes_the_newest_ptx_that_it_may_run() {
        let cubin = entry(KIND_CUBIN, 90, 0, [0, 0], b"machine code....");
        let some = [cubin.clone(), ptx(80, "sm_80"), ptx(90, "sm_90"), ptx(120, "sm_120")];
        assert_eq!(target_of(&some, HOPPER).unwrap(), "sm_90");
        assert_eq!(target_of(&some, [8, 0]).unwrap(), "sm_80");
        assert_eq!(target_of(&some, [12, 0]).unwrap(), "sm_120");
        // One architecture's own features, and those of its family.
        let own = [ptx(90, "sm_90"), ptx(90, "sm_90a"), ptx(100, "sm_100f")];
        assert_eq!(target_of(&own, HOPPER).unwrap(), "sm_90a");
        assert_eq!(target_of(&own, [10, 3]).unwrap(), "sm_100f");
        assert_eq!(target_of(&own, [12, 0]).unwrap(), "sm_90");
        assert_eq!(target_of(&[ptx(90, "sm_90a")], [10, 0]), Err(ERROR_NO_BINARY_FOR_GPU));
        assert_eq!(target_of(&[cubin], HOPPER), Err(ERROR_NO_BINARY_FOR_GPU));
        assert_eq!(target_of(&[], HOPPER), Err(ERROR_NO_BINARY_FOR_GPU));
    }

    #[test]
    fn parts_without_ptx_are_left_out_beside_others() {
        let with = fatbin(&[ptx(90, "sm_90")]);
        let without = fatbin(&[entry(KIND_CUBIN, 90, 0, [0, 0], b"machine code....")]);
        let of = |parts: &[&[u8]]| {
            let mut list: Vec<*const u8> = parts.iter().map(|p| p.as_ptr()).collect();
            list.push(std::ptr::null());
            // SAFETY: whole fatbinaries, and a null at the end.
            unsafe { linked(list.as_ptr(), HOPPER) }
        };
        assert!(of(&[&with, &without]).unwrap().contains(".target sm_90"));
        assert_eq!(of(&[&without]), Err(ERROR_NO_BINARY_FOR_GPU));
    }

    #[test]
    fn compressed_ptx_is_unpacked_and_broken_ptx_refused() {
        use ruzstd::encoding::{CompressionLevel, compress_to_vec};
        let text = format!(".version 8.0\n.target sm_90\n{}", "add.u32 a, b, c;\n".repeat(500));
        let zstd = compress_to_vec(text.as_bytes(), CompressionLevel::Fastest);
        let lz4 = lz4_flex::block::compress(text.as_bytes());
        for (flag, packed) in [(FLAG_ZSTD, zstd), (FLAG_LZ4, lz4)] {
            assert!(packed.len() < text.len());
            let mut padded = packed.clone();
            padded.resize(packed.len().next_multiple_of(8), 0);
            let whole = entry(KIND_PTX, 90, flag, [packed.len(), text.len()], &padded);
            assert_eq!(ptx_of_bytes(&fatbin(&[whole]), HOPPER).unwrap(), text);
            let half = packed.len() / 2;
            let broken = entry(KIND_PTX, 90, flag, [half, text.len()], &padded[..half]);
            assert_eq!(ptx_of_bytes(&fatbin(&[broken]), HOPPER), Err(ERROR_INVALID_IMAGE));
        }
    }

    #[test]
    fn text_is_taken_as_it_is_and_cubins_are_refused() {
        assert_eq!(ptx_of_bytes(b".version 8.0\n", HOPPER).unwrap(), ".version 8.0\n");
        assert_eq!(ptx_of_bytes(b"\x7fELF\x02\x01", HOPPER), Err(ERROR_NO_BINARY_FOR_GPU));
        assert_eq!(ptx_of_bytes(b"", HOPPER), Err(ERROR_INVALID_IMAGE));
    }
}
