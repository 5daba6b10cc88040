//! CUDA arrays and mipmaps, and the objects by which textures and surfaces name them.

use fathom_emulator::texture::{Address, Channel, Sampler, Texels, Texture};

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

/// `CUDA_TEXTURE_DESC`: three address modes, filter, flags, anisotropy, filter of levels, bias,
/// least and highest level, border.
pub(crate) type TextureDesc = [u32; 26];
/// `CUDA_RESOURCE_VIEW_DESC`: format, width, height, depth, then first and last level and layer,
/// 32 bits each.
pub(crate) type ViewDesc = [usize; 14];

/// `CU_TRSF_*`.
const READ_AS_INTEGER: u32 = 1;
const NORMALIZED_COORDINATES: u32 = 2;
const SRGB: u32 = 0x10;

/// `CUresourceViewFormat` from 1 on: channels of 1, 2 and 4 of each.
const VIEW_FORMATS: [Channel; 8] = [
    Channel::U8,
    Channel::S8,
    Channel::U16,
    Channel::S16,
    Channel::U32,
    Channel::S32,
    Channel::F16,
    Channel::F32,
];

impl Array {
    /// Its texels as kernels see them.
    pub fn texels(&self) -> R<Texels> {
        let Shape { width, height, depth, format, channels, .. } = self.shape;
        let size = |n: usize| u32::try_from(n).map_err(|_| ERROR_INVALID_VALUE);
        Ok(Texels {
            base: self.base,
            row_bytes: self.row as u64,
            slice_bytes: (self.row * self.rows) as u64,
            size: [size(width)?, size(height)?, size(depth)?],
            channel: Channel::from_cuda(format).ok_or(ERROR_NOT_SUPPORTED)?,
            channels,
        })
    }
}

/// How a texture is sampled.
pub(crate) fn sampler(desc: &TextureDesc) -> R<Sampler> {
    let address = |mode: u32| {
        let modes = [Address::Wrap, Address::Clamp, Address::Mirror, Address::Border];
        modes.get(mode as usize).copied().ok_or(ERROR_INVALID_VALUE)
    };
    let [x, y, z, filter, flags, _, levels, ..] = *desc;
    if filter > 1 || levels > 1 {
        return Err(ERROR_INVALID_VALUE);
    }
    let float = |i: usize| f32::from_bits(desc[i]);
    Ok(Sampler {
        address: [address(x)?, address(y)?, address(z)?],
        linear: filter == 1,
        normalized: flags & NORMALIZED_COORDINATES != 0,
        integers: flags & READ_AS_INTEGER != 0,
        srgb: flags & SRGB != 0,
        linear_levels: levels == 1,
        bias: float(7),
        levels: [float(8), float(9)],
        border: std::array::from_fn(|i| float(10 + i)),
    })
}

/// Lets a texture be seen through a view: another format of the same size, some levels, some
/// layers.
pub(crate) fn seen_through(texture: &mut Texture, view: &ViewDesc) -> R {
    let format = view[0] as u32;
    let [levels, layers] = [4, 5].map(|i| (view[i] as u32, (view[i] >> 32) as u32));
    if format > 0 {
        let i = format as usize - 1;
        let channel = *VIEW_FORMATS.get(i / 3).ok_or(ERROR_NOT_SUPPORTED)?;
        let channels = [1, 2, 4][i % 3];
        for level in &mut texture.levels {
            if level.bytes() != channel.bytes() * channels {
                return Err(ERROR_INVALID_VALUE);
            }
            (level.channel, level.channels) = (channel, channels);
        }
    }
    let last = texture.levels.len() as u32 - 1;
    if levels.0 > levels.1 || levels.1 > last {
        return Err(ERROR_INVALID_VALUE);
    }
    texture.levels = texture.levels[levels.0 as usize..=levels.1 as usize].to_vec();
    if texture.layered || texture.cube {
        for level in &mut texture.levels {
            if layers.0 > layers.1 || layers.1 >= level.size[2] {
                return Err(ERROR_INVALID_VALUE);
            }
            level.base += u64::from(layers.0) * level.slice_bytes;
            level.size[2] = layers.1 - layers.0 + 1;
        }
    }
    Ok(())
}

/// What a texture or surface object was made of.
#[derive(Clone, Copy)]
pub(crate) struct Object {
    pub resource: Resource,
    pub texture: Option<TextureDesc>,
    pub view: Option<ViewDesc>,
}
