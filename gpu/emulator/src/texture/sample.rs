//! What a fetch gives: coordinates to texels, texels to a value (CUDA C++ Programming Guide,
//! "Texture Fetching").
//!
//! Texel `i` of a row of `n` covers the coordinates from i to i + 1 (divided by n where coordinates
//! are normalized). The nearest texel is that of `floor(x)`. Linear filtering takes `xB = x - 0.5`,
//! `i = floor(xB)` and `a = frac(xB)` in a fixed-point format with 8 bits of fraction, and gives
//! `(1 - a) T[i] + a T[i + 1]`, likewise in two and three dimensions.
//!
//! The guide does not say how `a` is rounded, nor how much of a product of two weights is kept. An
//! image that hardware made says it (`ref_rotated.pgm` of cuda-samples' simpleTexture, all 262,144
//! pixels): `a` and `b` are rounded to nearest, halves up; so is their product, the weight of
//! `T[i + 1, j + 1]`; the other three follow as `a - ab`, `b - ab` and `1 - a - b + ab`; the sum is
//! not rounded to f32 on its way. Here it is computed in f64, x innermost, and rounded to f32. Of
//! three dimensions, of which there is no such image, z weighs two such sums. A texel of weight
//! zero does not count.

use super::{Address, Sampler, Texels, Texture};

/// Coordinates, x first; what the texture has no dimension for is not looked at.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum At {
    /// The numbers of a texel.
    Texel([i32; 3]),
    /// Coordinates between texels, normalized where the sampler says so.
    Point([f32; 3]),
}

/// Which level of a mipmap is meant.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Level {
    /// The largest one.
    Base,
    /// A level of detail, to which the sampler's bias and limits apply.
    Detail(f32),
    /// Derivatives of the coordinates, from which the level of detail is computed.
    Gradients([f32; 3], [f32; 3]),
}

/// One fetch of one thread.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fetch {
    /// Dimensions of the coordinates: 1 to 3, of a cube map 2 once its face is known.
    pub dims: usize,
    /// Number of the layer, or of the cube.
    pub layer: u32,
    /// Where in the texture.
    pub at: At,
    /// The point is a direction from the centre of a cube.
    pub cube: bool,
    /// Texels that are added to the coordinates.
    pub offset: [i32; 3],
    /// Which level of a mipmap.
    pub level: Level,
}

/// A texel's place, or none where it lies beyond the texture.
type Index = Option<u64>;

/// Texel values: integers, or singles as such.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Texel {
    Bits([u32; 4]),
    Numbers([f64; 4]),
}

impl Texel {
    fn words(self) -> [u32; 4] {
        match self {
            Texel::Bits(bits) => bits,
            Texel::Numbers(numbers) => numbers.map(|v| (v as f32).to_bits()),
        }
    }
}

/// Weights of one dimension: a texel and how much it counts, or two.
type Taps = [(Index, f64); 2];

/// How a fetch reads memory: address and length.
pub trait Reader {
    /// Why memory could not be read.
    type Error;

    /// Reads `out.len()` bytes (1 to 16).
    ///
    /// # Errors
    /// Where they are not memory.
    fn read(&mut self, address: u64, out: &mut [u8]) -> Result<(), Self::Error>;

    /// A place beyond plain memory was asked for, which reads as zero.
    fn beyond(&mut self, texel: i64, texels: u32);
}

impl Texture {
    /// What a fetch gives: four words, integers or singles; channels that the texture does not have
    /// are 0.
    ///
    /// # Errors
    /// Those of the reader.
    pub fn fetch<R: Reader>(&self, fetch: &Fetch, reader: &mut R) -> Result<[u32; 4], R::Error> {
        let fetch = self.on_face(fetch);
        let detail = self.detail(&fetch);
        let last = self.levels.len() - 1;
        let nearest = |level: f64| (level.max(0.0) as usize).min(last);
        if self.sampler.linear_levels && self.is_filtered() && last > 0 {
            let low = nearest(detail.floor());
            let part = fraction(detail.max(0.0) - low as f64);
            let first = self.filter(&self.levels[low], &fetch, reader)?;
            if part == 0.0 || low == last {
                return Ok(first.words());
            }
            let second = self.filter(&self.levels[low + 1], &fetch, reader)?;
            if let (Texel::Numbers(a), Texel::Numbers(b)) = (first, second) {
                let mixed = std::array::from_fn(|i| (1.0 - part) * a[i] + part * b[i]);
                return Ok(Texel::Numbers(mixed).words());
            }
            return Ok(first.words());
        }
        let level = &self.levels[nearest((detail + 0.5).floor())];
        Ok(self.filter(level, &fetch, reader)?.words())
    }

    /// One component of the four texels that a bilinear filter weighs: those at (i, j + 1),
    /// (i + 1, j + 1), (i + 1, j) and (i, j).
    ///
    /// # Errors
    /// Those of the reader.
    pub fn gather<R: Reader>(
        &self,
        fetch: &Fetch,
        component: usize,
        reader: &mut R,
    ) -> Result<[u32; 4], R::Error> {
        let fetch = self.on_face(fetch);
        let texels = &self.levels[0];
        let z = self.slice(texels, fetch.layer);
        let pair = |d: usize| {
            let n = i64::from(texels.size[d].max(1));
            let i = match fetch.at {
                At::Texel(at) => i64::from(at[d]) + i64::from(fetch.offset[d]),
                At::Point(at) => {
                    (self.texel_coordinate(at[d], fetch.offset[d], n, d) - 0.5).floor() as i64
                }
            };
            let place = |i: i64| self.place(i, n, self.address(d));
            [place(i), place(i.saturating_add(1))]
        };
        let ([x0, x1], [y0, y1]) = (pair(0), pair(1));
        let mut out = [0; 4];
        for (to, (x, y)) in out.iter_mut().zip([(x0, y1), (x1, y1), (x1, y0), (x0, y0)]) {
            *to = self.texel(texels, [x, y, Some(z)], reader)?.words()[component];
        }
        Ok(out)
    }

    /// Whether values are computed, not only read.
    pub fn is_filtered(&self) -> bool {
        self.sampler.linear && self.gives_numbers()
    }

    /// Whether a fetch gives floating-point numbers.
    fn gives_numbers(&self) -> bool {
        let channel = self.levels[0].channel;
        channel.is_float() || !self.sampler.integers && channel.bytes() < 4
    }

    /// A direction from the centre of a cube as a face and a point on it (the guide's table of
    /// faces); of several components of the same size x goes before y before z.
    fn on_face(&self, fetch: &Fetch) -> Fetch {
        let (true, At::Point([x, y, z])) = (fetch.cube, fetch.at) else { return *fetch };
        let [ax, ay, az] = [x, y, z].map(f32::abs);
        let (face, m, s, t) = if ax >= ay && ax >= az {
            if x >= 0.0 { (0, ax, -z, -y) } else { (1, ax, z, -y) }
        } else if ay >= az {
            if y >= 0.0 { (2, ay, x, z) } else { (3, ay, x, -z) }
        } else if z >= 0.0 {
            (4, az, x, -y)
        } else {
            (5, az, -x, -y)
        };
        let on = |c: f32| ((f64::from(c) / f64::from(m) + 1.0) / 2.0) as f32;
        let cubes = (self.levels[0].size[2] / 6).max(1);
        Fetch {
            layer: fetch.layer.min(cubes - 1) * 6 + face,
            at: At::Point([on(s), on(t), 0.0]),
            cube: false,
            ..*fetch
        }
    }

    /// The level of detail that a fetch means.
    fn detail(&self, fetch: &Fetch) -> f64 {
        let given = match fetch.level {
            Level::Base => return 0.0,
            Level::Detail(level) => f64::from(level),
            // The longer of both derivatives, in texels of the largest level.
            Level::Gradients(dx, dy) => {
                let scale = |d: usize| match self.sampler.normalized {
                    true => f64::from(self.levels[0].size[d].max(1)),
                    false => 1.0,
                };
                let length = |v: [f32; 3]| {
                    let squares = (0..fetch.dims).map(|d| (f64::from(v[d]) * scale(d)).powi(2));
                    squares.sum::<f64>().sqrt()
                };
                length(dx).max(length(dy)).log2()
            }
        };
        let [low, high] = self.sampler.levels.map(f64::from);
        (given + f64::from(self.sampler.bias)).max(low).min(high)
    }

    fn address(&self, d: usize) -> Address {
        match self.sampler.address[d] {
            Address::Wrap | Address::Mirror if !self.sampler.normalized => Address::Clamp,
            mode => mode,
        }
    }

    /// A coordinate in texels, where the texture repeats brought back into it.
    fn texel_coordinate(&self, at: f32, offset: i32, n: i64, d: usize) -> f64 {
        let size = n as f64;
        let at = f64::from(at) * if self.sampler.normalized { size } else { 1.0 };
        let at = at + f64::from(offset);
        // Exact: a single has 24 bits, a size at most 17.
        let x = at / size;
        let part = x - x.floor();
        match self.address(d) {
            Address::Wrap => part * size,
            Address::Mirror if x.floor() % 2.0 == 0.0 => part * size,
            Address::Mirror => (1.0 - part) * size,
            Address::Clamp | Address::Border => at,
        }
    }

    /// Where texel `i` of `n` is.
    fn place(&self, i: i64, n: i64, address: Address) -> Index {
        let inside = (0..n).contains(&i);
        match address {
            _ if inside => Some(i as u64),
            _ if self.buffer => None,
            Address::Border => None,
            Address::Wrap => Some(i.rem_euclid(n) as u64),
            Address::Clamp | Address::Mirror => Some(i.clamp(0, n - 1) as u64),
        }
    }

    /// The slice of a layer: of the nearest that there is.
    fn slice(&self, texels: &Texels, layer: u32) -> u64 {
        match self.layered || self.cube {
            true => u64::from(layer.min(texels.size[2].max(1) - 1)),
            false => 0,
        }
    }

    /// The texels along dimension `d` that count.
    fn taps(&self, fetch: &Fetch, n: i64, d: usize) -> Taps {
        let alone = |i: i64, address| [(self.place(i, n, address), 1.0), (None, 0.0)];
        let address = self.address(d);
        match fetch.at {
            // Counted texels do not repeat.
            At::Texel(at) => {
                let address = if address == Address::Border { address } else { Address::Clamp };
                alone(i64::from(at[d]) + i64::from(fetch.offset[d]), address)
            }
            At::Point(at) => {
                let x = self.texel_coordinate(at[d], fetch.offset[d], n, d);
                if !self.is_filtered() {
                    let i = x.floor() as i64;
                    // What rounding carries to the end of a texture that repeats is its last texel.
                    let repeats = matches!(address, Address::Wrap | Address::Mirror);
                    return alone(if repeats { i.clamp(0, n - 1) } else { i }, address);
                }
                let x = x - 0.5;
                let a = fraction(x - x.floor());
                let i = x.floor() as i64;
                let place = |i| self.place(i, n, address);
                [(place(i), 1.0 - a), (place(i.saturating_add(1)), a)]
            }
        }
    }

    /// The value on one level.
    fn filter<R: Reader>(
        &self,
        texels: &Texels,
        fetch: &Fetch,
        reader: &mut R,
    ) -> Result<Texel, R::Error> {
        let only = [(Some(0), 1.0), (None, 0.0)];
        let taps: [Taps; 3] = std::array::from_fn(|d| match d {
            _ if d < fetch.dims => self.taps(fetch, i64::from(texels.size[d].max(1)), d),
            2 => [(Some(self.slice(texels, fetch.layer)), 1.0), (None, 0.0)],
            _ => only,
        });
        if let (true, At::Texel([x, ..]), None) = (self.buffer, fetch.at, taps[0][0].0) {
            reader.beyond(i64::from(x) + i64::from(fetch.offset[0]), texels.size[0]);
        }
        if !self.is_filtered() {
            return self.texel(texels, taps.map(|t| t[0].0), reader);
        }
        // Of the four texels of a slice, x first.
        let (a, b) = (taps[0][1].1, taps[1][1].1);
        let both = fraction(a * b);
        let plane = [1.0 - a - b + both, a - both, b - both, both];
        let mut sum = [0.0; 4];
        for z in taps[2] {
            for (j, y) in taps[1].into_iter().enumerate() {
                for (i, x) in taps[0].into_iter().enumerate() {
                    let weight = plane[2 * j + i] * z.1;
                    if weight == 0.0 {
                        continue;
                    }
                    if let Texel::Numbers(v) = self.texel(texels, [x.0, y.0, z.0], reader)? {
                        sum.iter_mut().zip(v).for_each(|(sum, v)| *sum += weight * v);
                    }
                }
            }
        }
        Ok(Texel::Numbers(sum))
    }

    /// One texel, or the border.
    fn texel<R: Reader>(
        &self,
        texels: &Texels,
        at: [Index; 3],
        reader: &mut R,
    ) -> Result<Texel, R::Error> {
        let numbers = self.gives_numbers();
        let [Some(x), Some(y), Some(z)] = at else {
            let border = if self.buffer { [0.0; 4] } else { self.sampler.border };
            return Ok(match numbers {
                true => Texel::Numbers(border.map(f64::from)),
                false => Texel::Bits(border.map(|v| match texels.channel.is_signed() {
                    true => v as i32 as u32,
                    false => v as u32,
                })),
            });
        };
        let mut bytes = [0; 16];
        reader.read(texels.address([x, y, z]), &mut bytes[..texels.bytes() as usize])?;
        let width = texels.channel.bytes() as usize;
        let mut out = [0; 4];
        for (c, to) in out[..texels.channels as usize].iter_mut().enumerate() {
            let mut word = [0; 4];
            word[..width].copy_from_slice(&bytes[c * width..][..width]);
            *to = texels.channel.bits(u32::from_le_bytes(word));
        }
        if !numbers {
            return Ok(Texel::Bits(out));
        }
        Ok(Texel::Numbers(std::array::from_fn(|c| number(texels, &self.sampler, c, out[c]))))
    }
}

/// A channel as a number: floats as they are, integers of 8 and 16 bits divided by the largest (and
/// at least -1), rounded to f32; sRGB made linear.
fn number(texels: &Texels, sampler: &Sampler, c: usize, bits: u32) -> f64 {
    let channel = texels.channel;
    if channel.is_float() {
        return f64::from(f32::from_bits(bits));
    }
    if channel.is_signed() {
        let most = f64::from((1u32 << (8 * channel.bytes() - 1)) - 1);
        return f64::from((f64::from(bits as i32) / most).max(-1.0) as f32);
    }
    let part = f64::from(bits) / f64::from((1u32 << (8 * channel.bytes())) - 1);
    if sampler.srgb && channel.bytes() == 1 && c < 3 {
        let linear =
            if part <= 0.04045 { part / 12.92 } else { ((part + 0.055) / 1.055).powf(2.4) };
        return f64::from(linear as f32);
    }
    f64::from(part as f32)
}

/// To 8 bits of fraction, to nearest.
fn fraction(a: f64) -> f64 {
    (a * 256.0 + 0.5).floor() / 256.0
}
