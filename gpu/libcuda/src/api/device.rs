//! Initialisation and devices.

use std::ffi::c_char;

use fathom_emulator::Preset;

use super::{entry_points, put, text};
use crate::abi::*;
use crate::driver::{driver, initialise, initialised};
use crate::machine;

pub(super) use crate::machine::CUDA_VERSION as VERSION;

/// UUID of a device.
pub(super) fn uuid(device: i32) -> [u8; 16] {
    machine::uuid(driver().physical(device))
}

/// The PCI bus of a device.
pub(super) fn pci_bus(device: i32) -> i32 {
    machine::pci_bus(driver().physical(device))
}

/// `CUdevice_attribute` values of a device; 0 for what has no meaning here.
fn attribute(p: &Preset, device: i32, which: i32) -> i64 {
    let [bx, by, bz] = Preset::MAX_BLOCK;
    let [gx, gy, gz] = Preset::MAX_GRID;
    let i = i64::from;
    match which {
        1 => i(Preset::MAX_THREADS_PER_BLOCK),
        2 => i(bx),
        3 => i(by),
        4 => i(bz),
        5 => i(gx),
        6 => i(gy),
        7 => i(gz),
        8 => i(p.shared_bytes_per_block),
        9 => i(Preset::CONST_BYTES),
        10 => i(Preset::WARP),
        11 => 0x7fff_ffff,
        12 | 82 => i(Preset::REGISTERS_PER_SM),
        13 => i(p.clock_khz),
        14 => 512,
        16 => i(p.sm_count),
        15 | 19 | 31 | 32 | 40 | 41 | 83 | 90 | 95 => 1,
        33 => pci_bus(device).into(),
        36 => i(p.memory_clock_khz),
        37 => i(p.memory_bus_bits),
        38 => i(p.l2_bytes),
        39 => i(p.threads_per_sm),
        75 => i(p.compute_capability[0]),
        76 => i(p.compute_capability[1]),
        51 => 32,
        78..=80 => 1,
        81 => i(p.shared_bytes_per_sm),
        // FP64 at half the rate of FP32 on the large dies, a 64th on the others.
        87 => {
            if p.compute_capability[1] == 0 && p.compute_capability[0] <= 10 {
                2
            } else {
                64
            }
        }
        // Kernels reach pinned, managed and registered host memory, not what `malloc` gave (88).
        89 | 91 | 99 => 1,
        // Values in memory that streams write and wait for; memory mapped by hand, and shared by
        // file descriptors.
        92..=94 | 122 | 123 | 102 | 103 => 1,
        97 => i(p.shared_bytes_per_block_optin),
        106 => i(p.blocks_per_sm),
        111 => i(p.shared_bytes_reserved),
        115 | 127 => 1,
        120 => i64::from(p.compute_capability[0] >= 9),
        _ => 0,
    }
}

entry_points! {
    fn cuInit(flags: u32) {
        if flags != 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        if driver().visible.is_empty() {
            return Err(ERROR_NO_DEVICE);
        }
        initialise()
    }

    fn cuDriverGetVersion(version: *mut i32) { put(version, VERSION) }

    fn cuDeviceGetCount(count: *mut i32) { put(count, initialised()?.devices.len() as i32) }

    fn cuDeviceGet(device: *mut i32, ordinal: i32) {
        initialised()?.device(ordinal)?;
        put(device, ordinal)
    }

    fn cuDeviceGetName(name: *mut c_char, length: i32, device: i32) {
        let words = &initialised()?.device(device)?.preset().name;
        let room = usize::try_from(length).map_err(|_| ERROR_INVALID_VALUE)?;
        if name.is_null() || room == 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        let count = words.len().min(room - 1);
        std::ptr::copy_nonoverlapping(words.as_ptr(), name.cast(), count);
        put(name.add(count), 0)
    }

    fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: i32) {
        initialised()?.device(device)?;
        put(uuid, self::uuid(device))
    }

    fn cuDeviceGetLuid(luid: *mut c_char, mask: *mut u32, device: i32) {
        initialised()?.device(device)?;
        let _ = luid;
        put(mask, 1)
    }

    fn cuDeviceGetPCIBusId(id: *mut c_char, length: i32, device: i32) {
        initialised()?.device(device)?;
        let words = format!("0000:{:02x}:00.0\0", pci_bus(device));
        if id.is_null() || (length as usize) < words.len() {
            return Err(ERROR_INVALID_VALUE);
        }
        std::ptr::copy_nonoverlapping(words.as_ptr(), id.cast(), words.len());
        Ok(())
    }

    fn cuDeviceGetByPCIBusId(device: *mut i32, id: *const c_char) {
        let id = text(id)?;
        let bus = id.split(':').nth(1).and_then(|b| i32::from_str_radix(b, 16).ok());
        let physical = bus.ok_or(ERROR_INVALID_VALUE)? - 1;
        let found = initialised()?.visible.iter().position(|visible| *visible == physical);
        put(device, found.ok_or(ERROR_INVALID_DEVICE)? as i32)
    }

    fn cuDeviceTotalMem_v2(bytes: *mut usize, device: i32) {
        put(bytes, initialised()?.device(device)?.preset().memory_bytes as usize)
    }

    fn cuDeviceGetAttribute(value: *mut i32, which: i32, device: i32) {
        let preset = initialised()?.device(device)?.preset();
        put(value, attribute(preset, device, which).try_into().unwrap_or(i32::MAX))
    }

    fn cuDeviceComputeCapability(major: *mut i32, minor: *mut i32, device: i32) {
        let [a, b] = initialised()?.device(device)?.preset().compute_capability;
        put(major, a as i32)?;
        put(minor, b as i32)
    }

    fn cuDeviceCanAccessPeer(can: *mut i32, device: i32, peer: i32) {
        let driver = initialised()?;
        let (a, b) = (driver.device(device)?, driver.device(peer)?);
        put(can, i32::from(device != peer && a.is_peer(b)))
    }

    fn cuDeviceGetP2PAttribute(value: *mut i32, which: i32, device: i32, peer: i32) {
        let driver = initialised()?;
        driver.device(device)?;
        driver.device(peer)?;
        // Performance rank 0; access, atomics supported.
        put(value, i32::from(which != 1))
    }

    fn cuDeviceGetProperties(properties: *mut i32, device: i32) {
        let p = initialised()?.device(device)?.preset();
        let order = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14];
        for (i, which) in order.into_iter().enumerate() {
            put(properties.add(i), attribute(p, device, which).try_into().unwrap_or(i32::MAX))?;
        }
        Ok(())
    }
}
