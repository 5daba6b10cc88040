//! CUDA arrays and mipmaps, and the objects by which textures and surfaces name them.

use crate::abi::*;

/// `CUDA_ARRAY_DESCRIPTOR`: sizes in elements, 0 where there is no such dimension.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Flat {
    pub width: usize,
    pub height: usize,
    pub format: u32,
    pub channels: u32,
}

/// `CUDA_ARRAY3D_DESCRIPTOR`; with [`LAYERED`] the depth is a number of layers.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub width: usize,
    pub height: usize,
    pub depth: usize,
    pub format: u32,
    pub channels: u32,
    pub flags: u32,
}

/// `CUDA_ARRAY3D_*`.
pub(crate) const LAYERED: u32 = 1;
pub(crate) const SURFACE: u32 = 2;
pub(crate) const CUBEMAP: u32 = 4;
pub(crate) const GATHER: u32 = 8;

/// `CUarray_format` and the bytes of a channel.
const FORMATS: [(u32, usize); 8] =
    [(1, 1), (2, 2), (3, 4), (8, 1), (9, 2), (0xa, 4), (0x10, 2), (0x20, 4)];

/// An array in device memory, with the room that it takes.
pub(crate) struct Array {
    pub shape: Shape,
    pub base: DevicePtr,
    /// Bytes of a row, rows of a slice, slices.
    pub row: usize,
    pub rows: usize,
    pub slices: usize,
    /// Whether it is a level of a mipmap, which frees it.
    pub level: bool,
}

/// A mipmapped array: its levels, largest first.
pub(crate) struct Mipmap {
    pub levels: Vec<Handle>,
}

impl Shape {
    /// Bytes of an element; an error where its format is none or is not known here.
    pub fn element(&self) -> R<usize> {
        let format = FORMATS.iter().find(|(format, _)| *format == self.format);
        match (format, self.channels) {
            (Some((_, bytes)), 1 | 2 | 4) => Ok(bytes * self.channels as usize),
            (None, 1 | 2 | 4) if self.format != 0 => Err(ERROR_NOT_SUPPORTED),
            _ => Err(ERROR_INVALID_VALUE),
        }
    }

    /// Refuses shapes that no array has.
    pub fn check(&self) -> R {
        let has = |flag: u32| self.flags & flag != 0;
        let cube = self.width == self.height
            && if has(LAYERED) { self.depth.is_multiple_of(6) } else { self.depth == 6 };
        let wrong = self.width == 0
            || self.flags & !(LAYERED | SURFACE | CUBEMAP | GATHER) != 0
            || self.height == 0 && self.depth != 0 && !has(LAYERED)
            || has(LAYERED) && self.depth == 0
            || has(CUBEMAP) && !cube
            || has(GATHER) && (self.height == 0 || self.depth != 0);
        if wrong { Err(ERROR_INVALID_VALUE) } else { Ok(()) }
    }

    /// A level of a mipmap of this shape: each dimension but the layers is halved, down to 1.
    pub fn level(&self, level: u32) -> Shape {
        let half = |n: usize| if n == 0 { 0 } else { (n >> level).max(1) };
        let depth = match self.flags & (LAYERED | CUBEMAP) {
            0 => half(self.depth),
            _ => self.depth,
        };
        Shape { width: half(self.width), height: half(self.height), depth, ..*self }
    }
}

/// `CUDA_RESOURCE_DESC`: type, a union, flags.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Resource {
    pub kind: u32,
    /// What it is, then for memory the format with the channels, and sizes.
    pub value: [usize; 16],
    pub flags: u32,
}

/// `CUDA_TEXTURE_DESC` and `CUDA_RESOURCE_VIEW_DESC`, which nobody here reads.
pub(crate) type TextureDesc = [u32; 26];
pub(crate) type ViewDesc = [usize; 14];

/// What a texture or surface object was made of.
#[derive(Clone, Copy)]
pub(crate) struct Object {
    pub resource: Resource,
    pub texture: Option<TextureDesc>,
    pub view: Option<ViewDesc>,
}
