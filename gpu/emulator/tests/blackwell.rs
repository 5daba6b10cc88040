//! sm_120: `mma.sync` with `kind::f8f6f4`, whose elements lie in bytes. Sums of these few small
//! numbers are exact, so that products in whole quarters say what is right.

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
