//! sm_120: `mma.sync` with `kind::f8f6f4`, whose elements lie in bytes, and with block scales. Sums
//! of these few small numbers are exact, so that products in whole quarters say what is right.

use fathom_emulator::{Checks, Device, Error, LaunchConfig, Module, Params, Preset, Settings};

const KERNEL: &str = "\
.version 8.7
.target sm_120a
.address_size 64
.visible .entry k(.param .u64 a, .param .u64 b, .param .u64 d)
{
.reg .b32 %t, %a<4>, %b<2>;
.reg .b64 %p<3>, %o;
.reg .f32 %f<4>;
mov.u32 %t, %tid.x;
ld.param.u64 %p0, [a];
ld.param.u64 %p1, [b];
ld.param.u64 %p2, [d];
mul.wide.u32 %o, %t, 16;
add.u64 %p0, %p0, %o;
add.u64 %p2, %p2, %o;
mul.wide.u32 %o, %t, 8;
add.u64 %p1, %p1, %o;
ld.global.v4.b32 {%a0, %a1, %a2, %a3}, [%p0];
ld.global.v2.b32 {%b0, %b1}, [%p1];
mov.f32 %f0, 0f3F800000;
mov.f32 %f1, %f0;
mov.f32 %f2, %f0;
mov.f32 %f3, %f0;
mma.sync.aligned.m16n8k32.row.col.kind::f8f6f4.f32.TYPES.f32 {%f0, %f1, %f2, %f3},
    {%a0, %a1, %a2, %a3}, {%b0, %b1}, {%f0, %f1, %f2, %f3};
st.global.v4.f32 [%p2], {%f0, %f1, %f2, %f3};
ret;
}
";

/// Quarters, so that 2 is 8, and the codes of them in E4M3 and in E2M1 (which has no quarter).
const E4M3: [(i32, u8); 6] = [(0, 0), (4, 0x38), (6, 0x3c), (-8, 0xc0), (2, 0x30), (-4, 0xb8)];
const E2M1: [(i32, u8); 6] = [(0, 0), (4, 2), (6, 3), (-8, 0xc), (2, 1), (-24, 0xf)];

fn pick(codes: &[(i32, u8)], i: usize, factor: usize) -> (i32, u8) {
    codes[(i * factor + i / 32) % codes.len()]
}

/// A code as the byte that an operand has of it: those of 4 bits lie in bits 2 to 5.
fn byte((_, code): (i32, u8), narrow: bool) -> u8 {
    if narrow { code << 2 } else { code }
}

fn products_are_right(types: &str, [narrow_a, narrow_b]: [bool; 2]) {
    let codes = |narrow| if narrow { &E2M1 } else { &E4M3 };
    let a = |row: usize, k: usize| pick(codes(narrow_a), 32 * row + k, 7);
    let b = |column: usize, k: usize| pick(codes(narrow_b), 32 * column + k, 5);
    let (mut fa, mut fb) = (Vec::new(), Vec::new());
    for lane in 0..32 {
        let (group, thread) = (lane / 4, lane % 4);
        for (r, i) in (0..4).flat_map(|r| (0..4).map(move |i| (r, i))) {
            fa.push(byte(a(group + 8 * (r % 2), 16 * (r / 2) + 4 * thread + i), narrow_a));
        }
        for (r, i) in (0..2).flat_map(|r| (0..4).map(move |i| (r, i))) {
            fb.push(byte(b(group, 16 * r + 4 * thread + i), narrow_b));
        }
    }
    let device = Device::new(Preset::named("rtx-pro-6000").unwrap());
    device.configure(Settings { checks: Checks::ALL, ..Settings::default() });
    let module = Module::load(&device, &KERNEL.replace("TYPES", types)).unwrap();
    let (pa, pb) = (device.upload(&fa).unwrap(), device.upload(&fb).unwrap());
    let out = device.upload(&[0f32; 128]).unwrap();
    let params = Params::new().with(pa).with(pb).with(out).into_bytes();
    let config = LaunchConfig::new([1, 1, 1], [32, 1, 1], params);
    let report = device.launch(&module.function("k").unwrap(), &config).unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
    let found: Vec<f32> = device.download(out, 128).unwrap();
    for (at, &found) in found.iter().enumerate() {
        let (lane, r) = (at / 4, at % 4);
        let (row, column) = (lane / 4 + 8 * (r / 2), lane % 4 * 2 + r % 2);
        let sum: i32 = (0..32).map(|k| a(row, k).0 * b(column, k).0).sum();
        assert_eq!(found, 1.0 + sum as f32 / 16.0, "{types}: row {row}, column {column}");
    }
}

#[test]
fn bytes_of_eight_and_of_four_bits_are_multiplied() {
    products_are_right("e4m3.e4m3", [false, false]);
    products_are_right("e4m3.e2m1", [false, true]);
    products_are_right("e2m1.e4m3", [true, false]);
    products_are_right("e2m1.e2m1", [true, true]);
}

/// An instruction with block scales: its name, K, whether the elements of A and B lie in bytes and
/// have 4 bits, scales a row, whether those are fractions (UE4M3) or powers of two.
struct Scaled {
    name: &'static str,
    k: usize,
    bytes: bool,
    narrow: [bool; 2],
    blocks: usize,
    fractions: bool,
}

const SCALED: [Scaled; 5] = [
    Scaled {
        name: "kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e2m1.f32.ue8m0",
        k: 32,
        bytes: true,
        narrow: [false, true],
        blocks: 1,
        fractions: false,
    },
    Scaled {
        name: "kind::mxf8f6f4.block_scale.f32.e4m3.e4m3.f32.ue8m0",
        k: 32,
        bytes: true,
        narrow: [false, false],
        blocks: 1,
        fractions: false,
    },
    Scaled {
        name: "kind::mxf4.block_scale.f32.e2m1.e2m1.f32.ue8m0",
        k: 64,
        bytes: false,
        narrow: [true, true],
        blocks: 2,
        fractions: false,
    },
    Scaled {
        name: "kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3",
        k: 64,
        bytes: false,
        narrow: [true, true],
        blocks: 4,
        fractions: true,
    },
    Scaled {
        name: "kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0",
        k: 64,
        bytes: false,
        narrow: [true, true],
        blocks: 2,
        fractions: false,
    },
];

/// Scales in quarters with their codes: UE4M3, and UE8M0 (2 to the power of the code less 127).
const FRACTIONS: [(i32, u8); 5] = [(4, 0x38), (6, 0x3c), (8, 0x40), (2, 0x30), (12, 0x44)];
const POWERS: [(i32, u8); 4] = [(4, 127), (8, 128), (2, 126), (16, 129)];

impl Scaled {
    fn codes(&self, operand: usize) -> &'static [(i32, u8)] {
        if self.narrow[operand] { &E2M1 } else { &E4M3 }
    }

    fn element(&self, operand: usize, row: usize, k: usize) -> (i32, u8) {
        pick(self.codes(operand), self.k * row + k, [7, 5][operand])
    }

    fn scale(&self, operand: usize, row: usize, block: usize) -> (i32, u8) {
        let codes: &[(i32, u8)] = if self.fractions { &FRACTIONS } else { &POWERS };
        codes[(3 * row + 5 * block + operand + row / 4) % codes.len()]
    }

    /// The words of a lane's elements: rows `g`, registers as the fragments have them.
    fn word(&self, operand: usize, lane: usize, register: usize) -> u32 {
        let per = if self.bytes { 4 } else { 8 };
        let (half, range) = if operand == 0 { (register % 2, register / 2) } else { (0, register) };
        let row = lane / 4 + 8 * half;
        let first = 4 * per * range + per * (lane % 4);
        (0..per).rev().fold(0, |word, i| {
            let code = self.element(operand, row, first + i);
            let code = if self.bytes { byte(code, self.narrow[operand]) } else { code.1 };
            word << (32 / per) | u32::from(code)
        })
    }

    /// The scales of a lane, at the selected byte and thread; elsewhere a code that would show.
    fn scales(&self, operand: usize, lane: usize, [from, thread]: [usize; 2]) -> u32 {
        let mut bytes = [0x77; 4];
        let row = match operand {
            0 if lane % 4 / 2 == thread => lane / 4 + 8 * (lane % 2),
            1 if lane % 4 == thread => lane / 4,
            _ => return u32::from_le_bytes(bytes),
        };
        for block in 0..self.blocks {
            bytes[from + block] = self.scale(operand, row, block).1;
        }
        u32::from_le_bytes(bytes)
    }

    fn check(&self, [of_a, of_b]: [[usize; 2]; 2]) {
        let text = format!(
            ".version 8.7\n.target sm_120a\n.address_size 64\n\
             .visible .entry k(.param .u64 in, .param .u64 d)\n{{\n\
             .reg .b32 %t, %r<8>; .reg .b64 %p, %q, %o; .reg .f32 %f<4>; .reg .b16 %h;\n\
             mov.u32 %t, %tid.x; ld.param.u64 %p, [in]; ld.param.u64 %q, [d];\n\
             mul.wide.u32 %o, %t, 32; add.u64 %p, %p, %o; mul.wide.u32 %o, %t, 16;\n\
             add.u64 %q, %q, %o; ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%p];\n\
             ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%p+16]; mov.b16 %h, {};\n\
             mov.f32 %f0, 0f3F800000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;\n\
             mma.sync.aligned.m16n8k{}.row.col.{} {{%f0, %f1, %f2, %f3}},\n\
             {{%r0, %r1, %r2, %r3}}, {{%r4, %r5}}, {{%f0, %f1, %f2, %f3}},\n\
             {{%r6}}, {{{}, %h}}, %r7, {{{}, {}}};\n\
             st.global.v4.f32 [%q], {{%f0, %f1, %f2, %f3}};\nret;\n}}\n",
            of_a[1], self.k, self.name, of_a[0], of_b[0], of_b[1],
        );
        let device = Device::new(Preset::named("rtx-pro-6000").unwrap());
        device.configure(Settings { checks: Checks::ALL, ..Settings::default() });
        let module = Module::load(&device, &text).unwrap_or_else(|e| panic!("{e}"));
        let lanes: Vec<[u32; 8]> = (0..32)
            .map(|lane| {
                let a = |r| self.word(0, lane, r);
                let b = |r| self.word(1, lane, r);
                let scales = [self.scales(0, lane, of_a), self.scales(1, lane, of_b)];
                [a(0), a(1), a(2), a(3), b(0), b(1), scales[0], scales[1]]
            })
            .collect();
        let out = device.upload(&[0f32; 128]).unwrap();
        let params = Params::new().with(device.upload(&lanes).unwrap()).with(out).into_bytes();
        let config = LaunchConfig::new([1, 1, 1], [32, 1, 1], params);
        let report = device.launch(&module.function("k").unwrap(), &config);
        let report = report.unwrap_or_else(|e| panic!("{e}"));
        assert!(report.findings.is_empty(), "{:?}", report.findings);
        let found: Vec<f32> = device.download(out, 128).unwrap();
        for (at, &found) in found.iter().enumerate() {
            let (lane, r) = (at / 4, at % 4);
            let (row, column) = (lane / 4 + 8 * (r / 2), lane % 4 * 2 + r % 2);
            let sum: i32 = (0..self.k)
                .map(|k| {
                    let block = k / (self.k / self.blocks);
                    let scales = self.scale(0, row, block).0 * self.scale(1, column, block).0;
                    scales * self.element(0, row, k).0 * self.element(1, column, k).0
                })
                .sum();
            assert_eq!(found, 1.0 + sum as f32 / 256.0, "{}: {row}, {column}", self.name);
        }
    }
}

#[test]
fn blocks_have_scales_of_their_own() {
    for scaled in &SCALED {
        for thread in 0..4 {
            for from in (0..4).step_by(scaled.blocks) {
                scaled.check([[from, thread % 2], [4 - scaled.blocks - from, thread]]);
            }
        }
    }
}

#[test]
fn a_selector_that_selects_nothing_is_found() {
    let text = "\
        .version 8.7\n.target sm_120a\n.address_size 64\n.visible .entry k()\n{\n\
        .reg .b32 %r<8>; .reg .f32 %f<4>;\n\
        mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.f32.e2m1.e2m1.f32.ue8m0 \
        {%f0, %f1, %f2, %f3}, {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%f0, %f1, %f2, %f3}, \
        %r6, {1, 0}, %r7, {0, 0};\nret;\n}\n";
    let device = Device::new(Preset::named("rtx-pro-6000").unwrap());
    let module = Module::load(&device, text).unwrap_or_else(|e| panic!("{e}"));
    let config = LaunchConfig::new([1, 1, 1], [32, 1, 1], Vec::new());
    let report = device.launch(&module.function("k").unwrap(), &config).unwrap();
    let fatal = report.fatal().expect("a finding");
    assert_eq!(fatal.kind, fathom_emulator::Ub::BadDescriptor);
    assert!(fatal.message.contains("selectors {1, 0}: expected a multiple of 2"), "{fatal}");
}

/// Formats of six bits are in no published model of the arithmetic.
#[test]
fn what_nobody_has_measured_is_refused_by_name() {
    let device = Device::new(Preset::named("rtx-pro-6000").unwrap());
    let module = Module::load(&device, &KERNEL.replace("TYPES", "e4m3.e3m2")).unwrap();
    let config = LaunchConfig::new([1, 1, 1], [32, 1, 1], vec![0; 24]);
    let refused = device.launch(&module.function("k").unwrap(), &config);
    assert!(
        matches!(&refused, Err(Error::Unsupported(u)) if u.what.contains("e3m2")),
        "{refused:?}"
    );
}
