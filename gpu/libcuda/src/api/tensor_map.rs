//! `cuTensorMapEncode*`: the arguments of cuda.h to the emulator's tensor map.

use std::ffi::c_void;

use fathom_emulator::{MapElement, Mode, TensorMap};

use super::{entry_points, put};
use crate::abi::*;
use crate::say::say;

/// What tiled and im2col maps have in common, as the client passes it.
struct Common {
    data_type: u32,
    rank: u32,
    address: usize,
    dims: *const u64,
    strides: *const u64,
    element_strides: *const u32,
    interleave: u32,
    swizzle: u32,
    l2_promotion: u32,
    fill: u32,
}

/// # Safety
/// The arrays have as many entries as the rank (strides: one less).
unsafe fn encode(to: *mut c_void, c: Common, box_dims: *const u32, mode: Mode) -> R {
    let refuse = |words: &str| {
        say!("cuTensorMapEncode: {words}");
        Err(ERROR_INVALID_VALUE)
    };
    let Some(element) = MapElement::from_cuda(c.data_type) else {
        return refuse(&format!("data type: expected 0 to 12, found {}", c.data_type));
    };
    if !(1..=5).contains(&c.rank) {
        return refuse(&format!("rank: expected 1 to 5, found {}", c.rank));
    }
    let rank = c.rank as usize;
    let mut map = TensorMap {
        element,
        rank: c.rank,
        address: c.address as u64,
        dims: [1; 5],
        strides_bytes: [0; 4],
        box_dims: [1; 5],
        element_strides: [1; 5],
        interleave: c.interleave,
        swizzle: c.swizzle,
        l2_promotion: c.l2_promotion,
        fill_nan: c.fill != 0,
        mode,
    };
    // SAFETY: as many entries as the rank says.
    unsafe {
        for i in 0..rank {
            map.dims[i] = *c.dims.add(i);
            map.element_strides[i] = *c.element_strides.add(i);
            if !box_dims.is_null() {
                map.box_dims[i] = *box_dims.add(i);
            }
        }
        for i in 0..rank - 1 {
            map.strides_bytes[i] = *c.strides.add(i);
        }
        match map.encode() {
            // Clients hand over addresses that are aligned to 32 bytes only; `put` asks for none.
            Ok(bytes) => put(to.cast(), bytes),
            Err(error) => refuse(&error.to_string()),
        }
    }
}

entry_points! {
    fn cuTensorMapEncodeTiled(
        to: *mut c_void,
        data_type: u32,
        rank: u32,
        address: usize,
        dims: *const u64,
        strides: *const u64,
        box_dims: *const u32,
        element_strides: *const u32,
        interleave: u32,
        swizzle: u32,
        l2_promotion: u32,
        fill: u32,
    ) {
        let common = Common {
            data_type, rank, address, dims, strides, element_strides, interleave, swizzle,
            l2_promotion, fill,
        };
        encode(to, common, box_dims, Mode::Tiled)
    }

    fn cuTensorMapEncodeIm2col(
        to: *mut c_void,
        data_type: u32,
        rank: u32,
        address: usize,
        dims: *const u64,
        strides: *const u64,
        lower: *const i32,
        upper: *const i32,
        channels: u32,
        pixels: u32,
        element_strides: *const u32,
        interleave: u32,
        swizzle: u32,
        l2_promotion: u32,
        fill: u32,
    ) {
        let spatial = (rank as usize).clamp(3, 5) - 2;
        let corner = |from: *const i32| -> [i16; 3] {
            let mut corner = [0; 3];
            for (i, c) in corner.iter_mut().enumerate().take(spatial) {
                *c = *from.add(i) as i16;
            }
            corner
        };
        let mode = Mode::Im2col {
            lower: corner(lower),
            upper: corner(upper),
            channels: channels as u16,
            pixels: pixels as u16,
        };
        let common = Common {
            data_type, rank, address, dims, strides, element_strides, interleave, swizzle,
            l2_promotion, fill,
        };
        encode(to, common, std::ptr::null(), mode)
    }

    fn cuTensorMapReplaceAddress(to: *mut [u8; TensorMap::BYTES], address: usize) {
        let mut map = TensorMap::decode(&to.read_unaligned()).map_err(|_| ERROR_INVALID_VALUE)?;
        map.address = address as u64;
        put(to, map.encode().map_err(|_| ERROR_INVALID_VALUE)?)
    }
}
