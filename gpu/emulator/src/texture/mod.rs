//! Texture and surface objects: what memory they are of, and how a texture is sampled.
//!
//! An object is a number that a kernel gets as an argument; what stands behind it is looked up when
//! an instruction uses it. `sample` has the arithmetic of fetches, `surface` where the bytes of
//! a surface lie. The instructions are in `exec::memory::texture`; nothing here knows of warps.

mod sample;
mod surface;

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};

use half::f16;

pub use sample::{At, Fetch, Level, Reader};
pub use surface::{Outside, Place};

/// What a channel of a texel is: `CUarray_format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// Unsigned, 8 bits.
    U8,
    /// Unsigned, 16 bits.
    U16,
    /// Unsigned, 32 bits.
    U32,
    /// Signed, 8 bits.
    S8,
    /// Signed, 16 bits.
    S16,
    /// Signed, 32 bits.
    S32,
    /// `half`, which a fetch turns into a single.
    F16,
    /// `float`.
    F32,
}

impl Channel {
    /// By cuda.h's number (`CU_AD_FORMAT_*`); none for formats that are not emulated.
    pub fn from_cuda(format: u32) -> Option<Channel> {
        use Channel::*;
        Some(match format {
            1 => U8,
            2 => U16,
            3 => U32,
            8 => S8,
            9 => S16,
            0xa => S32,
            0x10 => F16,
            0x20 => F32,
            _ => return None,
        })
    }

    /// Bytes of one.
    pub const fn bytes(self) -> u32 {
        use Channel::*;
        match self {
            U8 | S8 => 1,
            U16 | S16 | F16 => 2,
            U32 | S32 | F32 => 4,
        }
    }

    /// Whether its integers have a sign.
    pub const fn is_signed(self) -> bool {
        matches!(self, Channel::S8 | Channel::S16 | Channel::S32)
    }

    /// Whether it holds floating-point numbers.
    pub const fn is_float(self) -> bool {
        matches!(self, Channel::F16 | Channel::F32)
    }

    /// The integer, sign- or zero-extended, or the bits of the float as a single.
    fn bits(self, word: u32) -> u32 {
        use Channel::*;
        match self {
            U8 => word & 0xff,
            U16 => word & 0xffff,
            S8 => word as i8 as u32,
            S16 => word as i16 as u32,
            F16 => f16::from_bits(word as u16).to_f32().to_bits(),
            U32 | S32 | F32 => word,
        }
    }
}

/// Texels in memory, row by row and slice by slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Texels {
    /// Address of the first.
    pub base: u64,
    /// Bytes from a row to the next.
    pub row_bytes: u64,
    /// Bytes from a slice (or layer) to the next.
    pub slice_bytes: u64,
    /// Width, height and depth in texels; 0 where there is no such dimension. Where there are
    /// layers, the depth is their number.
    pub size: [u32; 3],
    /// What a channel is.
    pub channel: Channel,
    /// How many a texel has: 1, 2 or 4.
    pub channels: u32,
}

impl Texels {
    /// Bytes of a texel.
    pub fn bytes(&self) -> u32 {
        self.channel.bytes() * self.channels
    }

    /// Address of a texel that is inside.
    fn address(&self, [x, y, z]: [u64; 3]) -> u64 {
        self.base + z * self.slice_bytes + y * self.row_bytes + x * u64::from(self.bytes())
    }
}

/// What coordinates beyond a texture mean: `CUaddress_mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Address {
    /// The texture repeats. Only for normalized coordinates, else as [`Address::Clamp`].
    Wrap,
    /// The texel at the edge.
    #[default]
    Clamp,
    /// The texture repeats, every other time mirrored. Only for normalized coordinates.
    Mirror,
    /// The border's colour.
    Border,
}

/// How a texture is sampled: `CUDA_TEXTURE_DESC`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampler {
    /// What coordinates beyond the texture mean, a dimension each.
    pub address: [Address; 3],
    /// Whether neighbours are interpolated; else the nearest is taken.
    pub linear: bool,
    /// Whether coordinates run from 0 to 1.
    pub normalized: bool,
    /// Whether integers of 8 and 16 bits are read as they are; else as numbers up to 1.
    pub integers: bool,
    /// Whether bytes that are read as numbers up to 1 are sRGB, which a fetch makes linear.
    pub srgb: bool,
    /// Whether neighbouring levels of a mipmap are interpolated.
    pub linear_levels: bool,
    /// What is added to a level of detail.
    pub bias: f32,
    /// The least and the highest level of detail.
    pub levels: [f32; 2],
    /// The colour beyond the texture under [`Address::Border`].
    pub border: [f32; 4],
}

impl Default for Sampler {
    fn default() -> Self {
        Sampler {
            address: [Address::Clamp; 3],
            linear: false,
            normalized: false,
            integers: true,
            srgb: false,
            linear_levels: false,
            bias: 0.0,
            levels: [0.0, f32::MAX],
            border: [0.0; 4],
        }
    }
}

/// A texture object.
#[derive(Clone, Debug, PartialEq)]
pub struct Texture {
    /// Its levels, the largest first; one where it is no mipmap.
    pub levels: Vec<Texels>,
    /// Whether the slices are layers, which are not filtered across.
    pub layered: bool,
    /// Whether six slices each are the faces of a cube.
    pub cube: bool,
    /// Whether it is a row of plain memory, beyond which there are zeros.
    pub buffer: bool,
    /// How it is sampled.
    pub sampler: Sampler,
}

/// A surface object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Surface {
    /// Where its texels lie and what they are.
    pub texels: Texels,
    /// Whether the slices are layers.
    pub layered: bool,
}

/// What a kernel may name by a number.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// For `tex`, `tld4` and `txq`.
    Texture(Texture),
    /// For `suld`, `sust`, `sured` and `suq`.
    Surface(Surface),
}

/// The objects as they are at one time, by number.
pub type Snapshot = Arc<BTreeMap<u64, Arc<Object>>>;

/// The objects of a set of devices.
#[derive(Debug, Default)]
pub struct Objects(RwLock<Snapshot>);

impl Objects {
    /// Lets a number stand for an object.
    pub fn insert(&self, handle: u64, object: Object) {
        let mut map = self.0.write().expect("no panic holds this lock");
        Arc::make_mut(&mut map).insert(handle, Arc::new(object));
    }

    /// Lets a number stand for nothing.
    pub fn remove(&self, handle: u64) {
        let mut map = self.0.write().expect("no panic holds this lock");
        Arc::make_mut(&mut map).remove(&handle);
    }

    /// The objects as they are now.
    pub fn now(&self) -> Snapshot {
        self.0.read().expect("no panic holds this lock").clone()
    }
}
