//! Textures and surfaces, against a model of the CUDA C++ Programming Guide's formulas ("Texture
//! Fetching") in exact integers, and what is found where a kernel goes beyond.
//!
//! Coordinates are multiples of 1/1024 and texels whole numbers below 256, so that sums have 24
//! bits at most and the model needs no rounding but that of the weights. How those are rounded an
//! image that hardware made says (docs/emulator.md).

use fathom_emulator::texture::{Address, Channel, Object, Sampler, Surface, Texels, Texture};
use fathom_emulator::{
    Checks, Device, LaunchConfig, LaunchReport, Module, Params, Preset, Settings, Ub,
};

/// Parts of a coordinate's unit.
const PARTS: i64 = 1024;

struct Bench {
    device: Device,
}

impl Bench {
    fn new(checks: Checks) -> Bench {
        let device = Device::new(Preset::named("h800").unwrap());
        device.configure(Settings { checks, ..Settings::default() });
        Bench { device }
    }

    /// Texels in memory, and what they are.
    fn texels<T: bytemuck::NoUninit>(
        &self,
        values: &[T],
        size: [u32; 3],
        channel: Channel,
        channels: u32,
    ) -> Texels {
        let row_bytes = u64::from(size[0] * channels * channel.bytes());
        let slice_bytes = row_bytes * u64::from(size[1].max(1));
        let base = self.device.upload(values).unwrap();
        Texels { base, row_bytes, slice_bytes, size, channel, channels }
    }

    fn texture(&self, levels: Vec<Texels>, sampler: Sampler) -> u64 {
        self.object(Object::Texture(Texture {
            levels,
            layered: false,
            cube: false,
            buffer: false,
            sampler,
        }))
    }

    fn object(&self, object: Object) -> u64 {
        let number = 0x40 * (1 + self.device.objects().now().len() as u64);
        self.device.objects().insert(number, object);
        number
    }

    /// Runs a body for each row of four words in `%c0` to `%c3`, of which it makes `%r0` to `%r3`.
    /// `%o` is the object.
    fn run(&self, body: &str, object: u64, rows: &[[u32; 4]]) -> (Vec<[u32; 4]>, LaunchReport) {
        let text = format!(
            ".version 8.7\n.target sm_90a\n.address_size 64\n\
             .visible .entry k(.param .u64 obj, .param .u64 from, .param .u64 to, .param .u32 n)\n{{\n\
             .reg .b32 %c<4>, %r<4>, %i, %n, %b; .reg .b64 %o, %from, %to, %x<4>; .reg .pred %p, %q;\n\
             .reg .b16 %h<4>;\n\
             ld.param.u64 %o, [obj]; ld.param.u64 %from, [from]; ld.param.u64 %to, [to];\n\
             ld.param.u32 %n, [n];\n\
             mov.u32 %i, %ctaid.x; mov.u32 %b, %ntid.x; mul.lo.u32 %i, %i, %b;\n\
             mov.u32 %b, %tid.x; add.u32 %i, %i, %b;\n\
             setp.ge.u32 %p, %i, %n; @%p bra END;\n\
             mul.wide.u32 %x0, %i, 16; add.u64 %from, %from, %x0; add.u64 %to, %to, %x0;\n\
             ld.global.v4.b32 {{%c0, %c1, %c2, %c3}}, [%from];\n\
             mov.b32 %r0, 0; mov.b32 %r1, 0; mov.b32 %r2, 0; mov.b32 %r3, 0;\n\
             {body}\n\
             st.global.v4.b32 [%to], {{%r0, %r1, %r2, %r3}};\nEND:\nret;\n}}\n"
        );
        let module = Module::load(&self.device, &text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        let function = module.function("k").unwrap();
        let from = self.device.upload(rows).unwrap();
        let to = self.device.upload(&vec![[0u32; 4]; rows.len()]).unwrap();
        let params = Params::new().with(object).with(from).with(to).with(rows.len() as u32);
        let blocks = rows.len().div_ceil(64) as u32;
        let config = LaunchConfig::new([blocks, 1, 1], [64, 1, 1], params.into_bytes());
        let report = self.device.launch(&function, &config).unwrap_or_else(|e| panic!("{e}"));
        (self.device.download(to, rows.len()).unwrap(), report)
    }

    /// As [`Bench::run`], where nothing may be found.
    fn clean(&self, body: &str, object: u64, rows: &[[u32; 4]]) -> Vec<[u32; 4]> {
        let (out, report) = self.run(body, object, rows);
        assert!(report.findings.is_empty(), "{body}: {}", report.findings[0]);
        out
    }
}

fn coordinate(parts: i64) -> u32 {
    (parts as f32 / PARTS as f32).to_bits()
}

/// A dimension of the model: the texels that count at a coordinate of `at` parts, each with its
/// weight in 256ths; none is the border.
fn taps(at: i64, n: i64, mode: Address, normalized: bool, linear: bool) -> Vec<(Option<i64>, i64)> {
    let mode = match mode {
        Address::Wrap | Address::Mirror if !normalized => Address::Clamp,
        mode => mode,
    };
    // In parts of a texel; then what the guide says of coordinates beyond.
    let x = if normalized { at * n } else { at };
    let (turn, rest) = (x.div_euclid(n * PARTS), x.rem_euclid(n * PARTS));
    let x = match mode {
        Address::Wrap => rest,
        Address::Mirror if turn % 2 == 0 => rest,
        Address::Mirror => n * PARTS - rest,
        _ => x,
    };
    let place = |i: i64| match mode {
        Address::Border if !(0..n).contains(&i) => None,
        Address::Wrap => Some(i.rem_euclid(n)),
        _ => Some(i.clamp(0, n - 1)),
    };
    if !linear {
        return vec![(place(x.div_euclid(PARTS)), 256)];
    }
    let shifted = x - PARTS / 2;
    let (i, part) = (shifted.div_euclid(PARTS), shifted.rem_euclid(PARTS));
    let weight = (part * 256 + PARTS / 2).div_euclid(PARTS);
    vec![(place(i), 256 - weight), (place(i + 1), weight)]
}

/// The texels of two dimensions that count, with their weights in 256ths: the product of both
/// second weights is rounded to 8 bits like them, and the others are what is left.
fn plane(
    xs: &[(Option<i64>, i64)],
    ys: &[(Option<i64>, i64)],
) -> Vec<(Option<i64>, Option<i64>, i64)> {
    let [a, b] = [xs, ys].map(|taps| taps.get(1).map_or(0, |tap| tap.1));
    let both = (a * b + 128) / 256;
    let weights = [256 - a - b + both, a - both, b - both, both];
    let mut out = Vec::new();
    for (j, y) in ys.iter().enumerate() {
        for (i, x) in xs.iter().enumerate() {
            out.push((x.0, y.0, weights[2 * j + i]));
        }
    }
    out
}

const MODES: [Address; 4] = [Address::Wrap, Address::Clamp, Address::Mirror, Address::Border];

/// Coordinates all over a texture of `n` texels and beyond, in parts.
fn coordinates(n: i64, normalized: bool) -> Vec<i64> {
    let unit = if normalized { PARTS } else { n * PARTS };
    let step = unit / 37 + 1;
    let even = (-3 * unit..=3 * unit).step_by(step as usize);
    // Edges and centres of texels, and the halves between two weights.
    let exact = (-2 * n..=3 * n).flat_map(|i| {
        let at = i * PARTS / if normalized { n } else { 1 };
        [at, at + PARTS / 2, at + 2, at + 513]
    });
    even.chain(exact).collect()
}

#[test]
fn two_dimensions_follow_the_guide() {
    let bench = Bench::new(Checks::ALL);
    for [w, h] in [[8u32, 4], [5, 3], [1, 2]] {
        let values: Vec<f32> = (0..w * h).map(|i| ((i * 97 + 13) % 256) as f32).collect();
        let texels = bench.texels(&values, [w, h, 0], Channel::F32, 1);
        for (i, mode) in MODES.into_iter().enumerate() {
            for normalized in [false, true] {
                for linear in [false, true] {
                    let other = MODES[(i + 1) % 4];
                    let border = [200.0, 0.0, 0.0, 0.0];
                    let sampler = Sampler {
                        address: [mode, other, Address::Clamp],
                        linear,
                        normalized,
                        border,
                        ..Sampler::default()
                    };
                    let object = bench.texture(vec![texels], sampler);
                    let (xs, ys) = (
                        coordinates(i64::from(w), normalized),
                        coordinates(i64::from(h), normalized),
                    );
                    let points: Vec<[i64; 2]> = (0..xs.len().max(ys.len()) * 2)
                        .map(|k| [xs[k % xs.len()], ys[k * 7 % ys.len()]])
                        .collect();
                    let rows: Vec<[u32; 4]> = points
                        .iter()
                        .map(|[x, y]| [coordinate(*x), coordinate(*y), 0, 0])
                        .collect();
                    let body = "tex.2d.v4.f32.f32 {%r0, %r1, %r2, %r3}, [%o, {%c0, %c1}];";
                    let found = bench.clean(body, object, &rows);
                    for (point, found) in points.iter().zip(found) {
                        let xs = taps(point[0], i64::from(w), mode, normalized, linear);
                        let ys = taps(point[1], i64::from(h), other, normalized, linear);
                        let mut sum = 0;
                        for (x, y, weight) in plane(&xs, &ys) {
                            sum += weight
                                * match (x, y) {
                                    (Some(x), Some(y)) => {
                                        values[(y * i64::from(w) + x) as usize] as i64
                                    }
                                    _ => 200,
                                };
                        }
                        let expected = sum as f32 / 256.0;
                        assert_eq!(
                            f32::from_bits(found[0]),
                            expected,
                            "{w}x{h} {mode:?}/{other:?} normalized {normalized} linear {linear} at {point:?}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn one_and_three_dimensions_and_offsets() {
    let bench = Bench::new(Checks::ALL);
    let (w, h, d) = (4i64, 3i64, 5i64);
    let values: Vec<f32> = (0..w * h * d).map(|i| (i * 31 % 61) as f32).collect();
    let volume = bench.texels(&values, [4, 3, 5], Channel::F32, 1);
    let linear = Sampler { linear: true, ..Sampler::default() };
    let object = bench.texture(vec![volume], linear);
    let points: Vec<[i64; 3]> = (0..200)
        .map(|k| [k * 53 % 4500 - 200, k * 97 % 3600 - 300, k * 131 % 5500 - 200])
        .collect();
    let rows: Vec<[u32; 4]> =
        points.iter().map(|p| [coordinate(p[0]), coordinate(p[1]), coordinate(p[2]), 7]).collect();
    let body = "tex.3d.v4.f32.f32 {%r0, %r1, %r2, %r3}, [%o, {%c0, %c1, %c2, %c3}];";
    for (p, found) in points.iter().zip(bench.clean(body, object, &rows)) {
        let of = |at, n| taps(at, n, Address::Clamp, false, true);
        let mut sum = 0;
        for (z, wz) in of(p[2], d) {
            for (x, y, weight) in plane(&of(p[0], w), &of(p[1], h)) {
                let at = (z.unwrap() * h + y.unwrap()) * w + x.unwrap();
                sum += wz * weight * values[at as usize] as i64;
            }
        }
        let expected = (sum as f64 / 65536.0) as f32;
        assert_eq!(f32::from_bits(found[0]), expected, "at {p:?}");
    }
    // A row, with offsets of texels that come before the addressing.
    let row: Vec<f32> = (0..8).map(|i| (i * 29 % 17) as f32).collect();
    let texels = bench.texels(&row, [8, 0, 0], Channel::F32, 1);
    for mode in [Address::Wrap, Address::Clamp, Address::Mirror] {
        let sampler =
            Sampler { address: [mode; 3], normalized: true, linear: true, ..Sampler::default() };
        let object = bench.texture(vec![texels], sampler);
        let points: Vec<i64> = coordinates(8, true);
        let rows: Vec<[u32; 4]> = points.iter().map(|x| [coordinate(*x), 0, 0, 0]).collect();
        let body = "tex.1d.v4.f32.f32 {%r0, %r1, %r2, %r3}, [%o, {%c0}], {-3};";
        for (x, found) in points.iter().zip(bench.clean(body, object, &rows)) {
            // Three eighths of the texture.
            let sum: i64 = taps(x - 3 * PARTS / 8, 8, mode, true, true)
                .iter()
                .map(|(i, weight)| weight * row[i.unwrap() as usize] as i64)
                .sum();
            assert_eq!(f32::from_bits(found[0]), sum as f32 / 256.0, "{mode:?} at {x}");
        }
    }
}

#[test]
fn formats_are_read_as_they_are_or_up_to_one() {
    let bench = Bench::new(Checks::ALL);
    let columns: Vec<[u32; 4]> = (0..4).map(|x| [coordinate(x * PARTS + 300), 0, 0, 0]).collect();
    let body = "tex.1d.v4.u32.f32 {%r0, %r1, %r2, %r3}, [%o, {%c0}];";
    let plain = |texels, integers| {
        let object =
            bench.texture(vec![texels], Sampler { integers, srgb: false, ..Sampler::default() });
        bench.clean(body, object, &columns)
    };
    let u8s: [u8; 16] = [0, 1, 2, 3, 127, 128, 129, 130, 254, 255, 7, 9, 11, 13, 77, 200];
    let texels = bench.texels(&u8s, [4, 0, 0], Channel::U8, 4);
    for (x, found) in plain(texels, true).into_iter().enumerate() {
        assert_eq!(found, std::array::from_fn(|c| u32::from(u8s[4 * x + c])));
    }
    for (x, found) in plain(texels, false).into_iter().enumerate() {
        let expected = |c: usize| (f32::from(u8s[4 * x + c]) / 255.0).to_bits();
        assert_eq!(found, std::array::from_fn(expected));
    }
    let s8s: [i8; 8] = [-128, -127, -126, -1, 0, 1, 126, 127];
    let texels = bench.texels(&s8s, [4, 0, 0], Channel::S8, 2);
    for (x, found) in plain(texels, true).into_iter().enumerate() {
        assert_eq!(found[..2], [s8s[2 * x] as u32, s8s[2 * x + 1] as u32]);
    }
    for (x, found) in plain(texels, false).into_iter().enumerate() {
        let expected = |c: usize| (f32::from(s8s[2 * x + c]) / 127.0).max(-1.0).to_bits();
        assert_eq!(found[..2], [expected(0), expected(1)]);
    }
    let s16s: [i16; 4] = [-32768, -32767, 12345, 32767];
    let texels = bench.texels(&s16s, [4, 0, 0], Channel::S16, 1);
    for (x, found) in plain(texels, false).into_iter().enumerate() {
        assert_eq!(found[0], (f32::from(s16s[x]) / 32767.0).max(-1.0).to_bits());
    }
    let u16s: [u16; 4] = [0, 1, 40000, 65535];
    let texels = bench.texels(&u16s, [4, 0, 0], Channel::U16, 1);
    for (x, found) in plain(texels, false).into_iter().enumerate() {
        assert_eq!(found[0], (f32::from(u16s[x]) / 65535.0).to_bits());
    }
    // Halves become singles; 32-bit integers are never scaled.
    let halves: [u16; 4] = [0x3c00, 0xc500, 0x0001, 0x7c00];
    let texels = bench.texels(&halves, [4, 0, 0], Channel::F16, 1);
    let singles = [1.0, -5.0, 2f32.powi(-24), f32::INFINITY];
    for (found, single) in plain(texels, false).into_iter().zip(singles) {
        assert_eq!(found[0], single.to_bits());
    }
    let s32s: [i32; 4] = [i32::MIN, -1, 0, i32::MAX];
    let texels = bench.texels(&s32s, [4, 0, 0], Channel::S32, 1);
    for (found, value) in plain(texels, false).into_iter().zip(s32s) {
        assert_eq!(found[0], value as u32);
    }
    // sRGB by the standard's values to 4 digits; alpha stays as it is.
    let srgb: [u8; 16] = [0, 10, 64, 64, 128, 188, 255, 255, 1, 2, 3, 4, 5, 6, 7, 8];
    let texels = bench.texels(&srgb, [4, 0, 0], Channel::U8, 4);
    let sampler = Sampler { integers: false, srgb: true, ..Sampler::default() };
    let found = bench.clean(body, bench.texture(vec![texels], sampler), &columns[..2]);
    let expected = [[0.0, 0.0030, 0.0513, 64.0 / 255.0], [0.2159, 0.5029, 1.0, 1.0]];
    for (found, expected) in found.into_iter().zip(expected) {
        for (found, expected) in found.into_iter().zip(expected) {
            assert!((f32::from_bits(found) - expected).abs() < 0.5e-4, "{found:#x} {expected}");
        }
    }
    // Pairs of halves.
    let object = bench.texture(
        vec![bench.texels(&[1.5f32, -2.0, 0.25, 65504.0], [1, 0, 0], Channel::F32, 4)],
        Sampler::default(),
    );
    let pairs = "tex.1d.v2.f16x2.f32 {%r0, %r1}, [%o, {%c0}];";
    assert_eq!(bench.clean(pairs, object, &[[0; 4]])[0][..2], [0xc000_3e00, 0x7bff_3400]);
}

#[test]
fn linear_filtering_of_numbers_up_to_one_rounds_once() {
    let bench = Bench::new(Checks::default());
    let values: Vec<u8> = (0..16).map(|i| (i * 37 + 11) as u8).collect();
    let texels = bench.texels(&values, [4, 4, 0], Channel::U8, 1);
    let sampler = Sampler { integers: false, linear: true, ..Sampler::default() };
    let object = bench.texture(vec![texels], sampler);
    let points: Vec<[i64; 2]> = (0..300).map(|k| [k * 41 % 4300, k * 59 % 4200]).collect();
    let rows: Vec<[u32; 4]> =
        points.iter().map(|[x, y]| [coordinate(*x), coordinate(*y), 0, 0]).collect();
    let body = "tex.2d.v4.f32.f32 {%r0, %r1, %r2, %r3}, [%o, {%c0, %c1}];";
    let (found, report) = bench.run(body, object, &rows);
    // The report says that these bits are not promised.
    assert_eq!(report.record.approximate["tex with a linear filter"], 10);
    for (point, found) in points.iter().zip(found) {
        // In units of 2^-32, which all of these singles are multiples of.
        let mut sum = 0i128;
        let of = |at| taps(at, 4, Address::Clamp, false, true);
        for (x, y, weight) in plane(&of(point[0]), &of(point[1])) {
            let single = f32::from(values[(y.unwrap() * 4 + x.unwrap()) as usize]) / 255.0;
            let scaled = f64::from(single) * 2f64.powi(32);
            assert_eq!(scaled.fract(), 0.0);
            sum += i128::from(weight) * scaled as i128;
        }
        let expected = (sum as f64 / 2f64.powi(40)) as f32;
        assert_eq!(f32::from_bits(found[0]), expected, "at {point:?}");
    }
}

#[test]
fn layers_faces_and_levels() {
    let bench = Bench::new(Checks::ALL);
    // Layers: the number is held to those that there are, and nothing is filtered across.
    let values: Vec<f32> = (0..4 * 3 * 3).map(|i| i as f32).collect();
    let texels = bench.texels(&values, [4, 3, 3], Channel::F32, 1);
    let layers = |texels, cube, sampler| {
        let texture = Texture { levels: vec![texels], layered: true, cube, buffer: false, sampler };
        bench.object(Object::Texture(texture))
    };
    let linear = Sampler { linear: true, ..Sampler::default() };
    let object = layers(texels, false, linear);
    let at = |layer: u32| [layer, coordinate(2 * PARTS), coordinate(PARTS), 0];
    let body = "tex.a2d.v4.f32.f32 {%r0, %r1, %r2, %r3}, [%o, {%c0, %c1, %c2, %c2}];";
    let found = bench.clean(body, object, &[at(0), at(1), at(2), at(9), at(u32::MAX)]);
    // Between texels 1 and 2 of rows 0 and 1 of each layer.
    let expected = [3.5, 15.5, 27.5, 27.5, 27.5];
    assert_eq!(found.iter().map(|f| f32::from_bits(f[0])).collect::<Vec<_>>(), expected);
    let row = bench.texels(&values, [12, 0, 3], Channel::F32, 1);
    let object = layers(row, false, Sampler::default());
    let body = "tex.a1d.v4.f32.s32 {%r0, %r1, %r2, %r3}, [%o, {%c0, %c1}];";
    let found = bench.clean(body, object, &[[0, 5, 0, 0], [2, 11, 0, 0], [1, 99, 0, 0]]);
    assert_eq!(found.iter().map(|f| f32::from_bits(f[0])).collect::<Vec<_>>(), [5.0, 35.0, 23.0]);

    // Two cubes of faces of 2x2: the guide's table of faces.
    let faces: Vec<f32> = (0..2 * 6 * 4).map(|i| i as f32).collect();
    let cubes = bench.texels(&faces, [2, 2, 12], Channel::F32, 1);
    let sampler = Sampler { normalized: true, ..Sampler::default() };
    let object = layers(cubes, true, sampler);
    let body = "tex.acube.v4.f32.f32 {%r0, %r1, %r2, %r3}, [%o, {%c0, %c1, %c2, %c3}];";
    // A direction, then face, and s and t by the table, all by hand.
    let cases: [([f32; 3], u32, [f32; 2]); 6] = [
        ([2.0, 1.0, -1.0], 0, [1.0, -1.0]),
        ([-2.0, 1.0, -1.0], 1, [-1.0, -1.0]),
        ([1.0, 4.0, -1.0], 2, [1.0, -1.0]),
        ([1.0, -4.0, -1.0], 3, [1.0, 1.0]),
        ([1.0, -1.0, 3.0], 4, [1.0, 1.0]),
        ([1.0, -1.0, -3.0], 5, [-1.0, 1.0]),
    ];
    for (direction, face, [s, t]) in cases {
        for cube in [0, 1, 5] {
            let [x, y, z] = direction.map(f32::to_bits);
            let found = bench.clean(body, object, &[[cube, x, y, z]]);
            // The second texel of a row or column begins at the centre.
            let texel = 2 * u32::from(t >= 0.0) + u32::from(s >= 0.0);
            let expected = (cube.min(1) * 6 + face) * 4 + texel;
            assert_eq!(f32::from_bits(found[0][0]), expected as f32, "{direction:?} of {cube}");
        }
    }
    let one = bench.object(Object::Texture(Texture {
        levels: vec![bench.texels(&faces[..24], [2, 2, 6], Channel::F32, 1)],
        layered: false,
        cube: true,
        buffer: false,
        sampler,
    }));
    let body = "tex.cube.v4.f32.f32 {%r0, %r1, %r2, %r3}, [%o, {%c0, %c1, %c2, %c2}];";
    let [x, y, z] = [0.1f32, -0.2, -0.9].map(f32::to_bits);
    assert_eq!(f32::from_bits(bench.clean(body, one, &[[x, y, z, 0]])[0][0]), 22.0);

    // Levels of 4, 2 and 1 texels: the nearest, or two of them mixed.
    let levels = |values: &[f32], n| bench.texels(values, [n, n, 0], Channel::F32, 1);
    let mipmap = vec![levels(&[16.0; 16], 4), levels(&[32.0; 4], 2), levels(&[64.0], 1)];
    let sampler = Sampler { normalized: true, levels: [0.0, 9.0], ..Sampler::default() };
    let nearest = bench.texture(mipmap.clone(), sampler);
    let body = "tex.level.2d.v4.f32.f32 {%r0, %r1, %r2, %r3}, [%o, {%c0, %c0}], %c1;";
    let rows = |lods: &[f32]| -> Vec<[u32; 4]> {
        lods.iter().map(|lod| [0.5f32.to_bits(), lod.to_bits(), 0, 0]).collect()
    };
    let found = |object, lods: &[f32]| -> Vec<f32> {
        bench.clean(body, object, &rows(lods)).iter().map(|f| f32::from_bits(f[0])).collect()
    };
    let lods = [-2.0, 0.0, 0.49, 0.5, 1.2, 1.75, 7.0];
    assert_eq!(found(nearest, &lods), [16.0, 16.0, 16.0, 32.0, 32.0, 64.0, 64.0]);
    let mixed = Sampler { linear: true, linear_levels: true, ..sampler };
    let object = bench.texture(mipmap.clone(), mixed);
    assert_eq!(found(object, &lods[..4]), [16.0, 16.0, 16.0 + 16.0 * 125.0 / 256.0, 24.0]);
    assert_eq!(found(object, &[1.75, 7.0]), [56.0, 64.0]);
    let biased = Sampler { bias: 1.0, levels: [0.5, 1.5], ..mixed };
    let object = bench.texture(mipmap.clone(), biased);
    assert_eq!(found(object, &[-3.0, 0.25, 4.0]), [24.0, 40.0, 48.0]);
    // Derivatives of half a texture a pixel: two texels of four, a level of detail of 1.
    let body =
        "tex.grad.2d.v4.f32.f32 {%r0, %r1, %r2, %r3}, [%o, {%c0, %c0}], {%c1, %c2}, {%c2, %c3};";
    let rows = [[0.5f32, 0.5, 0.0, 0.125], [0.5, 0.0, 0.0, 1.0], [0.5, 0.25, 0.0, 0.25]];
    let found = bench.clean(body, nearest, &rows.map(|r| r.map(f32::to_bits)));
    assert_eq!(found.iter().map(|f| f32::from_bits(f[0])).collect::<Vec<_>>(), [32.0, 64.0, 16.0]);
    let body = "tex.base.2d.v4.f32.f32 {%r0, %r1, %r2, %r3}|%q, [%o, {%c0, %c0}];\n\
                selp.b32 %r1, 7, 0, %q;";
    let found = bench.clean(body, nearest, &[[0; 4]]);
    assert_eq!(found[0][..2], [16f32.to_bits(), 7]);
}

#[test]
fn four_texels_are_gathered_in_their_order() {
    let bench = Bench::new(Checks::ALL);
    let values: Vec<u8> = (0..4 * 3 * 4).collect();
    let texels = bench.texels(&values, [4, 3, 0], Channel::U8, 4);
    let object = bench.texture(vec![texels], Sampler::default());
    for (component, name) in ["r", "g", "b", "a"].into_iter().enumerate() {
        let body = format!("tld4.{name}.2d.v4.u32.f32 {{%r0, %r1, %r2, %r3}}, [%o, {{%c0, %c1}}];");
        // Between texels (1, 0) and (2, 1); then over the corner, where edges repeat.
        let rows = [[2.0f32, 1.0], [0.2, 2.9]].map(|[x, y]| [x.to_bits(), y.to_bits(), 0, 0]);
        let found = bench.clean(&body, object, &rows);
        let at = |x: u32, y: u32| 4 * (4 * y + x) + component as u32;
        assert_eq!(found[0], [at(1, 1), at(2, 1), at(2, 0), at(1, 0)]);
        assert_eq!(found[1], [at(0, 2), at(0, 2), at(0, 2), at(0, 2)]);
    }
}

#[test]
fn attributes_are_told() {
    let bench = Bench::new(Checks::ALL);
    let texels = bench.texels(&[0u16; 2 * 6 * 5 * 4], [6, 5, 4], Channel::S16, 2);
    let half = bench.texels(&[0u16; 2 * 3 * 2 * 2], [3, 2, 2], Channel::S16, 2);
    let sampler = Sampler {
        address: [Address::Mirror, Address::Border, Address::Wrap],
        normalized: true,
        linear: true,
        ..Sampler::default()
    };
    let object = bench.texture(vec![texels, half], sampler);
    let ask =
        |query: &str| bench.clean(&format!("txq.{query}.b32 %r0, [%o];"), object, &[[0; 4]])[0][0];
    let told = [
        ("width", 6),
        ("height", 5),
        ("depth", 4),
        ("array_size", 0),
        ("num_mipmap_levels", 2),
        ("normalized_coords", 1),
        ("filter_mode", 1),
        ("addr_mode_0", 1),
        ("addr_mode_1", 4),
        ("addr_mode_2", 0),
        ("channel_data_type", 0x10d8),
        ("channel_order", 0x10b2),
    ];
    for (query, expected) in told {
        assert_eq!(ask(query), expected, "{query}");
    }
    let level = bench.clean("txq.level.width.b32 %r0, [%o], 1;", object, &[[0; 4]]);
    assert_eq!(level[0][0], 3);
    let surface = bench.object(Object::Surface(Surface { texels, layered: true }));
    for (query, expected) in [("width", 6), ("height", 5), ("depth", 0), ("array_size", 4)] {
        let found = bench.clean(&format!("suq.{query}.b32 %r0, [%o];"), surface, &[[0; 4]]);
        assert_eq!(found[0][0], expected, "{query}");
    }
    let body = "istypep.texref %p, %o; selp.b32 %r0, 1, 0, %p;\n\
                istypep.surfref %p, %o; selp.b32 %r1, 1, 0, %p;";
    assert_eq!(bench.clean(body, object, &[[0; 4]])[0][..2], [1, 0]);
    assert_eq!(bench.clean(body, surface, &[[0; 4]])[0][..2], [0, 1]);
    assert_eq!(bench.clean(body, 1, &[[0; 4]])[0][..2], [0, 0]);
}

#[test]
fn surfaces_are_read_and_written_by_bytes_and_by_texels() {
    let bench = Bench::new(Checks::ALL);
    let texels = bench.texels(&[[0u8; 4]; 8 * 4], [8, 4, 0], Channel::U8, 4);
    let surface = bench.object(Object::Surface(Surface { texels, layered: false }));
    // Every width, with bytes for x.
    let body = "shl.b32 %c2, %c0, 2;\n\
                sust.b.2d.b32.trap [%o, {%c2, %c1}], {%c3};\n\
                suld.b.2d.b32.trap %r0, [%o, {%c2, %c1}];";
    let rows: Vec<[u32; 4]> = (0..32).map(|i| [i % 8, i / 8, 0, 0x0101_0101 * i + 0xf0]).collect();
    let found = bench.clean(body, surface, &rows);
    assert!(found.iter().zip(&rows).all(|(f, r)| f[0] == r[3]));
    let memory: Vec<u32> = bench.device.download(texels.base, 32).unwrap();
    assert!(memory.iter().zip(&rows).all(|(m, r)| *m == r[3]));
    let wide = "suld.b.2d.v4.b32.trap {%r0, %r1, %r2, %r3}, [%o, {16, %c1}];";
    assert_eq!(bench.clean(wide, surface, &[[0, 2, 0, 0]])[0], memory[20..24]);
    let wide = "suld.b.2d.v2.b64.trap {%x0, %x1}, [%o, {16, %c1}];\n\
                mov.b64 {%r0, %r1}, %x0; mov.b64 {%r2, %r3}, %x1;";
    assert_eq!(bench.clean(wide, surface, &[[0, 2, 0, 0]])[0], memory[20..24]);
    let narrow = "suld.b.2d.v2.b8.trap {%h0, %h1}, [%o, {18, 1}];\n\
                  suld.b.2d.b16.trap %h2, [%o, {18, 1}];\n\
                  cvt.u32.u16 %r0, %h0; cvt.u32.u16 %r1, %h1; cvt.u32.u16 %r2, %h2;";
    let [low, high] = [memory[12] >> 16 & 0xff, memory[12] >> 24];
    assert_eq!(bench.clean(narrow, surface, &[[0; 4]])[0], [low, high, high << 8 | low, 0]);
    // Texels, held to what a channel has.
    let body = "sust.p.2d.v4.b32.trap [%o, {%c0, %c1}], {300, 7, %c2, %c3};";
    bench.clean(body, surface, &[[3, 2, 0xffff_ffff, 1]]);
    let memory: Vec<u32> = bench.device.download(texels.base, 32).unwrap();
    assert_eq!(memory[19], 0x01ff_07ff);
    // Beyond: nothing, zero, or the nearest place.
    let body = "sust.b.2d.b32.zero [%o, {%c0, %c1}], {%c3};\n\
                mov.b32 %r0, 9;\nsuld.b.2d.b32.zero %r0, [%o, {%c0, %c1}];\n\
                suld.b.2d.b32.clamp %r1, [%o, {%c0, %c1}];";
    let minus = -4i32 as u32;
    let rows = [[32, 1, 0, 5], [minus, 0, 0, 5], [0, 4, 0, 5], [64, minus, 0, 5]];
    let found = bench.clean(body, surface, &rows);
    let nearest = [memory[15], memory[0], memory[24], memory[7]];
    for (found, nearest) in found.into_iter().zip(nearest) {
        assert_eq!(found[..2], [0, nearest]);
    }
    assert_eq!(bench.device.download::<u32>(texels.base, 32).unwrap(), memory);

    // Rows, volumes and layers.
    let words = bench.texels(&[0u32; 4 * 3 * 2], [4, 3, 2], Channel::S32, 1);
    let volume = bench.object(Object::Surface(Surface { texels: words, layered: false }));
    bench.clean("sust.b.3d.b32.trap [%o, {8, 1, 1, 0}], {77};", volume, &[[0; 4]]);
    assert_eq!(bench.device.download::<u32>(words.base, 24).unwrap()[12 + 4 + 2], 77);
    let layered = bench.object(Object::Surface(Surface { texels: words, layered: true }));
    let body = "suld.b.a2d.b32.trap %r0, [%o, {1, 8, 1, 0}];";
    assert_eq!(bench.clean(body, layered, &[[0; 4]])[0][0], 77);
    let flat = Texels { size: [12, 0, 2], row_bytes: 48, slice_bytes: 48, ..words };
    let rows = bench.object(Object::Surface(Surface { texels: flat, layered: true }));
    let body = "sust.b.a1d.b32.trap [%o, {0, 4}], {78};\nsuld.b.a1d.b32.trap %r0, [%o, {1, 24}];";
    assert_eq!(bench.clean(body, rows, &[[0; 4]])[0][0], 77);
    assert_eq!(bench.device.download::<u32>(words.base, 2).unwrap()[1], 78);

    // Reductions of 200 threads on one word; signed by the format where texels are counted.
    let one: Vec<[u32; 4]> = (0..200).map(|i| [i, 0, 0, 0]).collect();
    bench.clean("sured.b.add.2d.u32.trap [%o, {12, 2}], %c0;", volume, &one);
    let word = |at: usize| bench.device.download::<u32>(words.base, 24).unwrap()[at];
    assert_eq!(word(11), 199 * 100);
    bench.clean("sub.u32 %c0, 100, %c0; sured.p.min.2d.b32.trap [%o, {0, 2}], %c0;", volume, &one);
    assert_eq!(word(8) as i32, -99);
    bench.clean("sured.b.max.2d.u32.trap [%o, {0, 2}], 5;", volume, &one[..1]);
    assert_eq!(word(8) as i32, -99);
    bench.clean("sured.b.max.2d.s32.trap [%o, {0, 2}], 5;", volume, &one[..1]);
    assert_eq!(word(8), 5);
    bench.clean("sured.b.or.2d.b32.trap [%o, {0, 2}], 10;", volume, &one[..1]);
    assert_eq!(word(8), 15);
    bench.clean("mov.u64 %x0, 3; sured.b.add.2d.u64.trap [%o, {0, 2}], %x0;", volume, &one[..1]);
    assert_eq!(word(8), 18);
    let body = "mov.u64 %x0, -3; sured.b.min.2d.s64.trap [%o, {0, 2}], %x0;\n\
                mov.u64 %x0, 4; sured.p.max.2d.b64.trap [%o, {0, 1}], %x0;";
    bench.clean(body, volume, &one[..1]);
    assert_eq!((word(8), word(9)), (-3i32 as u32, u32::MAX));
    assert_eq!((word(4), word(5)), (4, 0));
}

#[test]
fn rows_of_plain_memory_are_counted_and_end_in_zeros() {
    let bench = Bench::new(Checks::default());
    let values: Vec<f32> = (1..=100).map(|i| i as f32).collect();
    let texels = bench.texels(&values, [100, 0, 0], Channel::F32, 1);
    let texture = |sampler| Texture {
        levels: vec![texels],
        layered: false,
        cube: false,
        buffer: true,
        sampler,
    };
    let sampler = Sampler { linear: true, ..Sampler::default() };
    let object = bench.object(Object::Texture(texture(sampler)));
    let body = "tex.1d.v4.f32.s32 {%r0, %r1, %r2, %r3}, [%o, {%c0}];";
    let rows = [[0, 0, 0, 0], [99, 0, 0, 0], [100, 0, 0, 0], [u32::MAX, 0, 0, 0]];
    let found = bench.clean(body, object, &rows);
    let found: Vec<f32> = found.iter().map(|f| f32::from_bits(f[0])).collect();
    assert_eq!(found, [1.0, 100.0, 0.0, 0.0]);
    // Under the check of memory it is told, once for both.
    let checked = Bench::new(Checks::ALL);
    let texels = checked.texels(&values, [100, 0, 0], Channel::F32, 1);
    let object =
        checked.object(Object::Texture(Texture { levels: vec![texels], ..texture(sampler) }));
    let (again, report) = checked.run(body, object, &rows);
    assert_eq!(f32::from_bits(again[1][0]), 100.0);
    let finding = &report.findings[0];
    assert_eq!((finding.kind, finding.fatal, finding.count), (Ub::OutOfBounds, false, 2));
    assert!(finding.message.contains("texel 100 of a texture of 100"), "{finding}");
}

#[test]
fn what_goes_wrong_is_found() {
    let bench = Bench::new(Checks::default());
    let found = |body: &str, object| {
        let (_, report) = bench.run(body, object, &[[0; 4]]);
        let fatal = report.fatal().unwrap_or_else(|| panic!("{body}: nothing"));
        (fatal.kind, fatal.message.clone())
    };
    let texels = bench.texels(&[0u32; 12], [4, 3, 0], Channel::U32, 1);
    let surface = bench.object(Object::Surface(Surface { texels, layered: false }));
    let texture = bench.texture(vec![texels], Sampler::default());
    let fetch = "tex.2d.v4.u32.f32 {%r0, %r1, %r2, %r3}, [%o, {%c0, %c0}];";
    let cases = [
        (fetch, 12345, Ub::BadDescriptor, "0x3039 is no texture object"),
        (fetch, surface, Ub::BadDescriptor, "a surface object where a texture"),
        ("suld.b.2d.b32.trap %r0, [%o, {0, 0}];", texture, Ub::BadDescriptor, "a texture object"),
        (
            "suld.b.2d.b32.trap %r0, [%o, {16, 0}];",
            surface,
            Ub::OutOfBounds,
            "4 bytes at x = byte 16 of a surface with 16 bytes a row",
        ),
        (
            "sust.b.2d.v2.b32.trap [%o, {12, 0}], {%r0, %r0};",
            surface,
            Ub::OutOfBounds,
            "8 bytes at x = byte 12",
        ),
        (
            "suld.b.2d.b32.trap %r0, [%o, {0, 3}];",
            surface,
            Ub::OutOfBounds,
            "y = 3 of a surface with 3 places",
        ),
        ("suld.b.2d.b32.trap %r0, [%o, {2, 0}];", surface, Ub::Misaligned, "from byte 2 of a row"),
        (
            "tex.cube.v4.u32.f32 {%r0, %r1, %r2, %r3}, [%o, {%c0, %c0, %c0, %c0}];",
            texture,
            Ub::BadDescriptor,
            "no cube map",
        ),
    ];
    for (body, object, kind, part) in cases {
        let (found, message) = found(body, object);
        assert_eq!(found, kind, "{body}: {message}");
        assert!(message.contains(part), "{body}: {message}");
    }
    bench.device.free(texels.base).unwrap();
    assert_eq!(found(fetch, texture).0, Ub::UseAfterFree);
    // Memory that nobody wrote.
    let checked = Bench::new(Checks::ALL);
    let base = checked.device.alloc(48).unwrap();
    let object = checked.texture(vec![Texels { base, ..texels }], Sampler::default());
    let (_, report) = checked.run(fetch, object, &[[0; 4]]);
    assert_eq!(report.findings[0].kind, Ub::Uninitialized);
}

#[test]
fn what_no_texture_does_here_is_refused_by_name() {
    let device = Device::new(Preset::named("h800").unwrap());
    for (body, part) in [
        ("tex.1d.v4.f32.f32 {%f0, %f1, %f2, %f3}, [%o, {%f4}], %f5;", "tex.1d.v4.f32.f32"),
        ("tex.1d.v4.f16.f32 {%h0, %h1, %h2, %h3}, [%o, {%f4}];", "tex.1d.v4.f16.f32"),
        ("tex.2dms.v4.f32.s32 {%f0, %f1, %f2, %f3}, [%o, {%r0, %r0, %r0, %r0}];", "tex.2dms"),
        ("tex.1d.v4.f32.f32 {%f0, %f1, %f2, %f3}, [%o, %o, {%f4}];", "tex.1d.v4.f32.f32"),
    ] {
        let text = format!(
            ".version 8.7\n.target sm_90a\n.address_size 64\n.visible .entry k()\n{{\n\
             .reg .f32 %f<6>; .reg .b16 %h<4>; .reg .b64 %o; .reg .b32 %r0;\n{body}\nret;\n}}\n"
        );
        let module = Module::load(&device, &text).unwrap_or_else(|e| panic!("{body}: {e}"));
        let config = LaunchConfig::new([1, 1, 1], [1, 1, 1], Vec::new());
        let error = device.launch(&module.function("k").unwrap(), &config).unwrap_err();
        assert!(error.to_string().contains(part), "{body}: {error}");
    }
}
