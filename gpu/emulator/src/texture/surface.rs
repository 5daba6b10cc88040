//! Where the bytes of a surface lie (PTX ISA, "Surface Instructions").

use super::Surface;

/// What coordinates beyond a surface mean: `.trap`, `.clamp`, `.zero`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outside {
    /// The kernel stops.
    Trap,
    /// The nearest place is meant.
    Clamp,
    /// Loads give zero, stores are dropped.
    Zero,
}

/// Where coordinates lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// To an address.
    At(u64),
    /// Nowhere, which is defined.
    Nowhere,
    /// Out of the surface: which coordinate (0 is x, 2 a layer too), how many places there are.
    Beyond(usize, u64),
}

impl Surface {
    /// Where an access of `bytes` bytes goes. The first coordinate counts bytes, or texels where
    /// `formatted`; `dims` are the coordinates that there are, and `layer` the number of a layer.
    pub fn place(
        &self,
        dims: usize,
        layer: Option<u32>,
        at: [i32; 3],
        bytes: u32,
        formatted: bool,
        outside: Outside,
    ) -> Place {
        let texels = &self.texels;
        let unit = if formatted { i64::from(texels.bytes()) } else { 1 };
        let row = i64::from(texels.size[0]) * i64::from(texels.bytes());
        let room = |d: usize| i64::from(texels.size[d].max(1));
        let mut place = [i64::from(at[0]) * unit, 0, 0];
        // The last byte at which an access may begin, by coordinate.
        let mut most = [row - i64::from(bytes), 0, 0];
        for d in 1..dims {
            (place[d], most[d]) = (i64::from(at[d]), room(d) - 1);
        }
        if let Some(layer) = layer {
            (place[2], most[2]) = (i64::from(layer), room(2) - 1);
        }
        for d in 0..3 {
            if (0..=most[d]).contains(&place[d]) {
                continue;
            }
            match outside {
                Outside::Trap => {
                    return Place::Beyond(d, if d == 0 { row as u64 } else { room(d) as u64 });
                }
                Outside::Zero => return Place::Nowhere,
                Outside::Clamp if most[d] < 0 => return Place::Nowhere,
                Outside::Clamp => place[d] = place[d].clamp(0, most[d]),
            }
        }
        let [x, y, z] = place.map(|p| p as u64);
        Place::At(texels.base + z * texels.slice_bytes + y * texels.row_bytes + x)
    }
}
