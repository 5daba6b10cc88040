//! The check by which NVIDIA's runtime asks whether the driver is NVIDIA's own.
//!
//! `driver_types.h` documents it as `cudaErrorSoftwareValidityNotEstablished`: without the answer
//! every call of the runtime fails with it. The answer is a keyed hash (RFC 2104 over the MD2 of
//! RFC 1319) of what both sides know of the process; key and order of the fields are those that
//! ZLUDA found and published. Nothing else rests on this file: it only lets programs that carry
//! NVIDIA's runtime start on this driver, which otherwise says openly what it is.

/// The permutation of RFC 1319, from the digits of pi.
#[rustfmt::skip]
const S: [u8; 256] = [
    41, 46, 67, 201, 162, 216, 124, 1, 61, 54, 84, 161, 236, 240, 6, 19, 98, 167, 5, 243, 192, 199,
    115, 140, 152, 147, 43, 217, 188, 76, 130, 202, 30, 155, 87, 60, 253, 212, 224, 22, 103, 66,
    111, 24, 138, 23, 229, 18, 190, 78, 196, 214, 218, 158, 222, 73, 160, 251, 245, 142, 187, 47,
    238, 122, 169, 104, 121, 145, 21, 178, 7, 63, 148, 194, 16, 137, 11, 34, 95, 33, 128, 127, 93,
    154, 90, 144, 50, 39, 53, 62, 204, 231, 191, 247, 151, 3, 255, 25, 48, 179, 72, 165, 181, 209,
    215, 94, 146, 42, 172, 86, 170, 198, 79, 184, 56, 210, 150, 164, 125, 182, 118, 252, 107, 226,
    156, 116, 4, 241, 69, 157, 112, 89, 100, 113, 135, 32, 134, 91, 207, 101, 230, 45, 168, 2, 27,
    96, 37, 173, 174, 176, 185, 246, 28, 70, 97, 105, 52, 64, 126, 15, 85, 71, 163, 35, 221, 81,
    175, 58, 195, 92, 249, 206, 186, 197, 234, 38, 44, 83, 13, 110, 133, 40, 132, 9, 211, 223, 205,
    244, 65, 129, 77, 82, 106, 220, 55, 200, 108, 193, 171, 250, 36, 225, 123, 8, 12, 189, 177, 74,
    120, 136, 149, 139, 227, 99, 232, 109, 233, 203, 213, 254, 59, 0, 29, 57, 242, 239, 183, 14,
    102, 88, 208, 228, 166, 119, 114, 248, 235, 117, 75, 10, 49, 68, 80, 180, 143, 237, 31, 26, 219,
    153, 141, 51, 159, 17, 131, 20,
];

/// Bytes of a block and of a digest.
const BLOCK: usize = 16;

/// The message digest of RFC 1319.
fn md2(message: &[u8]) -> [u8; BLOCK] {
    let pad = BLOCK - message.len() % BLOCK;
    let mut padded = message.to_vec();
    padded.extend(std::iter::repeat_n(pad as u8, pad));
    let (mut checksum, mut last) = ([0u8; BLOCK], 0u8);
    for block in padded.as_chunks::<BLOCK>().0 {
        for (c, byte) in checksum.iter_mut().zip(block) {
            *c ^= S[usize::from(byte ^ last)];
            last = *c;
        }
    }
    padded.extend(checksum);
    let mut state = [0u8; 3 * BLOCK];
    for block in padded.as_chunks::<BLOCK>().0 {
        for (i, byte) in block.iter().enumerate() {
            state[BLOCK + i] = *byte;
            state[2 * BLOCK + i] = byte ^ state[i];
        }
        let mut t = 0u8;
        for round in 0..18u8 {
            for word in &mut state {
                *word ^= S[usize::from(t)];
                t = *word;
            }
            t = t.wrapping_add(round);
        }
    }
    *state.first_chunk().expect("longer than a block")
}

/// HMAC (RFC 2104) over [`md2`], with a key of one block.
fn hmac(key: [u8; BLOCK], message: &[u8]) -> [u8; BLOCK] {
    let hashed = |pad: u8, message: &[u8]| md2(&[&key.map(|k| k ^ pad)[..], message].concat());
    hashed(0x5c, &hashed(0x36, message))
}

const KEY: [u8; BLOCK] = [
    0x14, 0x6A, 0xDD, 0xAE, 0x53, 0xA9, 0xA7, 0x52, 0xAA, 0x08, 0x41, 0x36, 0x0B, 0xF5, 0x5A, 0x9F,
];

/// A device as the check sees it: its UUID, and its PCI domain, bus and device.
pub(crate) struct DeviceId {
    pub uuid: [u8; 16],
    pub pci: [i32; 3],
}

/// What the check asks and what both sides know.
pub(crate) struct Question {
    /// The driver's CUDA version.
    pub driver_version: u32,
    /// Ten times something, and in the last digit the number of the question.
    pub version: u32,
    pub process: u32,
    /// Low half of the thread's identifier.
    pub thread: u32,
    /// Addresses: of the runtime's export table, of the check's, and of the check's function.
    pub addresses: [u64; 3],
    pub unix_seconds: u64,
}

/// The answer. The first two questions have the same answer always.
pub(crate) fn answer(question: &Question, devices: &[DeviceId]) -> [u64; 2] {
    match question.version % 10 {
        0 => return [0x3341_181C_03CB_675C, 0x8ED3_83AA_1F4C_D1E8],
        1 => return [0x1841_181C_03CB_675C, 0x8ED3_83AA_1F4C_D1E8],
        _ => {}
    }
    let mut message = Vec::new();
    let q = question;
    for word in [q.driver_version, q.version, q.process, q.thread] {
        message.extend(word.to_le_bytes());
    }
    for word in q.addresses.iter().chain([&q.unix_seconds]) {
        message.extend(word.to_le_bytes());
    }
    for device in devices {
        message.extend(device.uuid);
        device.pci.iter().for_each(|number| message.extend(number.to_le_bytes()));
    }
    let digest = hmac(KEY, &message);
    let half = |at: usize| u64::from_le_bytes(*digest[at..].first_chunk().expect("8 of 16 bytes"));
    [half(0), half(8)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_rfc_1319() {
        let hex = |d: [u8; 16]| d.iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!(hex(md2(b"")), "8350e5a3e24c153df2275c9f80692773");
        assert_eq!(hex(md2(b"abc")), "da853b0d3f88d99b30283a69e6ded6bb");
        let long = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
        assert_eq!(hex(md2(long)), "da33def2a42df13975352846c30338cd");
    }
}
