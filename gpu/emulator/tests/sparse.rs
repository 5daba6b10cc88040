//! Products with a sparse A: `mma.sp` and `wgmma.mma_async.sp` against the dense product of A with
//! its zeros, in integers that every format holds, and against the dense instruction where bits
//! depend on the order of additions.
//!
//! Where elements and metadata lie is written here as the PTX ISA's figures have it: from the place
//! in the matrix to lane, register and bit.

use std::fmt::Write;

use fathom_emulator::{
    Checks, Device, LaunchConfig, LaunchReport, Module, Params, Preset, Settings,
};
use half::{bf16, f16};

/// A small generator: numbers that look unrelated.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % below
    }
}

/// Bits of an element, and the code of a small whole number.
fn code(ty: &str, value: i32) -> u32 {
    let fp8 = |one: u32, two: u32| match value.abs() {
        0 => 0,
        1 => one,
        _ => two,
    } | if value < 0 { 0x80 } else { 0 };
    match ty {
        "f16" => f16::from_f32(value as f32).to_bits().into(),
        "bf16" => bf16::from_f32(value as f32).to_bits().into(),
        "tf32" => (value as f32).to_bits(),
        "e4m3" => fp8(0x38, 0x40),
        "e5m2" => fp8(0x3c, 0x40),
        "s8" | "u8" => value as u32 & 0xff,
        _ => value as u32 & 0xf,
    }
}

fn bits(ty: &str) -> usize {
    match ty {
        "tf32" => 32,
        "f16" | "bf16" => 16,
        "s4" | "u4" => 4,
        _ => 8,
    }
}

/// Columns that four bits of metadata are about, and how many of them are stored.
fn chunk(ty: &str) -> (usize, usize) {
    match bits(ty) {
        32 => (2, 1),
        4 => (8, 4),
        _ => (4, 2),
    }
}

/// Lane and shift of the metadata of a row's chunk.
fn place(ty: &str, k: usize, selector: usize, row: usize, chunk: usize) -> (usize, usize) {
    let (quad, high) = (4 * (row % 8), row / 8);
    match (bits(ty), k) {
        (16, 16) | (32, 8) => (quad + selector, 16 * high + 4 * chunk),
        (16, 32) | (32, 16) => (quad + 2 * selector + chunk / 4, 16 * high + 4 * (chunk % 4)),
        (8, 32) | (4, 64) => (quad + 2 * selector + high, 4 * chunk),
        _ => (quad + high + 2 * (chunk / 8), 4 * (chunk % 8)),
    }
}

/// A sparse A of whole numbers: rows with their zeros, what is stored, the metadata of each warp's
/// lanes.
struct Sparse {
    dense: Vec<Vec<i32>>,
    stored: Vec<Vec<i32>>,
    metadata: Vec<u32>,
}

fn value(ty: &str, numbers: &mut Numbers) -> i32 {
    let unsigned = ty.starts_with('u');
    numbers.next(4) as i32 - if unsigned { 0 } else { 2 }
}

fn sparse(ty: &str, rows: usize, k: usize, selector: usize, numbers: &mut Numbers) -> Sparse {
    let (columns, kept) = chunk(ty);
    let mut out = Sparse {
        dense: vec![vec![0; k]; rows],
        stored: vec![Vec::new(); rows],
        metadata: vec![0; rows * 2],
    };
    for row in 0..rows {
        for c in 0..k / columns {
            // Two places of four; of 32 bits both halves of one of two.
            let first = numbers.next(3) as usize;
            let second = first + 1 + numbers.next(3 - first as u64) as usize;
            let (first, second) = match kept {
                1 => [(0, 1), (2, 3)][numbers.next(2) as usize],
                _ => (first, second),
            };
            let (lane, shift) = place(ty, k, selector, row % 16, c);
            out.metadata[row / 16 * 32 + lane] |= ((first | second << 2) as u32) << shift;
            let places: Vec<usize> = match kept {
                1 => vec![first / 2],
                2 => vec![first, second],
                _ => vec![2 * first, 2 * first + 1, 2 * second, 2 * second + 1],
            };
            for place in places {
                let value = value(ty, numbers);
                out.dense[row][columns * c + place] = value;
                out.stored[row].push(value);
            }
        }
    }
    out
}

/// Registers of 32 lanes that hold rows (or columns) of elements, as fragments do.
fn fragment(ty: &str, rows: &[Vec<i32>]) -> Vec<[u32; 32]> {
    let per = 32 / bits(ty);
    let halves = rows.len() / 8;
    let mut out = vec![[0; 32]; halves * rows[0].len() / (4 * per)];
    for (row, elements) in rows.iter().enumerate() {
        for (p, &value) in elements.iter().enumerate() {
            let lane = 4 * (row % 8) + p / per % 4;
            let register = row / 8 + halves * (p / (4 * per));
            out[register][lane] |= code(ty, value) << (p % per * bits(ty));
        }
    }
    out
}

fn product(a: &[Vec<i32>], b: &[Vec<i32>], row: usize, column: usize) -> i32 {
    a[row].iter().zip(&b[column]).map(|(a, b)| a * b).sum()
}

fn launch(text: &str, threads: u32, checks: Checks, inputs: &[u64]) -> (Device, LaunchReport) {
    let device = Device::new(Preset::named("h800").unwrap());
    run_on(&device, text, threads, checks, inputs)
}

fn run_on(
    device: &Device,
    text: &str,
    threads: u32,
    checks: Checks,
    inputs: &[u64],
) -> (Device, LaunchReport) {
    device.configure(Settings { checks, ..Settings::default() });
    let module = Module::load(device, text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let params = inputs.iter().fold(Params::new(), |params, at| params.with(*at)).into_bytes();
    let config = LaunchConfig::new([1; 3], [threads, 1, 1], params);
    let report = device.launch(&module.function("k").unwrap(), &config);
    let report = report.unwrap_or_else(|e| panic!("{e}\n{text}"));
    (device.clone(), report)
}

/// Runs one instruction of a warp: `registers` go to `%r0` and up, `out` registers are stored.
fn warp(instruction: &str, registers: &[[u32; 32]], out: usize, checks: Checks) -> Vec<[u32; 32]> {
    let device = Device::new(Preset::named("h800").unwrap());
    let from = device.upload(registers).unwrap();
    let to = device.upload(&vec![[0u32; 32]; out]).unwrap();
    let mut text = String::from(
        ".version 8.7\n.target sm_90a\n.address_size 64\n\
         .visible .entry k(.param .u64 from, .param .u64 to)\n{\n\
         .reg .b32 %r<32>, %d<4>, %t; .reg .f32 %f<4>; .reg .b64 %from, %to, %n;\n\
         ld.param.u64 %from, [from]; ld.param.u64 %to, [to];\n\
         mov.u32 %t, %tid.x; mul.wide.u32 %n, %t, 4; add.u64 %from, %from, %n; add.u64 %to, %to, %n;\n",
    );
    for i in 0..registers.len() {
        writeln!(text, "ld.global.b32 %r{i}, [%from+{}];", 128 * i).unwrap();
    }
    writeln!(text, "{instruction}").unwrap();
    for i in 0..out {
        writeln!(text, "st.global.b32 [%to+{}], %d{i};", 128 * i).unwrap();
    }
    text.push_str("ret;\n}\n");
    let (device, report) = run_on(&device, &text, 32, checks, &[from, to]);
    assert_eq!(report.findings, [], "{text}");
    device.download(to, out).unwrap()
}

fn braces(prefix: &str, range: std::ops::Range<usize>) -> String {
    let list: Vec<String> = range.map(|i| format!("%{prefix}{i}")).collect();
    format!("{{{}}}", list.join(", "))
}

/// The instruction on registers A, B, C, metadata, in that order.
fn mma_sp(name: &str, sizes: [usize; 3], selector: usize, results: &str) -> String {
    let [a, b, c] = sizes;
    let (fa, fb) = (braces("r", 0..a), braces("r", a..a + b));
    let fc = braces("r", a + b..a + b + c);
    format!("{name} {results}, {fa}, {fb}, {fc}, %r{}, {selector};", a + b + c)
}

#[test]
fn every_shape_of_a_warp() {
    let mut numbers = Numbers(1);
    for (k, a, b, selectors) in [
        (16, "f16", "f16", 4),
        (32, "f16", "f16", 2),
        (16, "bf16", "bf16", 4),
        (32, "bf16", "bf16", 2),
        (8, "tf32", "tf32", 4),
        (16, "tf32", "tf32", 2),
        (64, "e4m3", "e5m2", 1),
        (64, "e5m2", "e5m2", 1),
        (32, "s8", "s8", 2),
        (64, "u8", "s8", 1),
        (64, "s4", "u4", 2),
        (128, "u4", "u4", 1),
    ] {
        for selector in 0..selectors {
            let of_a = sparse(a, 16, k, selector, &mut numbers);
            let of_b: Vec<Vec<i32>> =
                (0..8).map(|_| (0..k).map(|_| value(b, &mut numbers)).collect()).collect();
            let c: Vec<[i32; 8]> =
                (0..16).map(|_| [(); 8].map(|()| numbers.next(19) as i32 - 9)).collect();
            let integers = bits(a) <= 8 && !a.starts_with('e');
            let (d, store) = if integers { ("s32", "d") } else { ("f32", "f") };
            let encode = |v: i32| if integers { v as u32 } else { (v as f32).to_bits() };
            let at = |lane: usize, i: usize| (lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2);
            let fa = fragment(a, &of_a.stored);
            let fb = fragment(b, &of_b);
            let mut registers = [&fa[..], &fb[..]].concat();
            for i in 0..4 {
                registers.push(std::array::from_fn(|lane| {
                    let (row, column) = at(lane, i);
                    encode(c[row][column])
                }));
            }
            registers.push(std::array::from_fn(|lane| of_a.metadata[lane]));
            let variant = if selector % 2 == 0 { "sp" } else { "sp::ordered_metadata" };
            let name = format!("mma.{variant}.sync.aligned.m16n8k{k}.row.col.{d}.{a}.{b}.{d}");
            let mut instruction =
                mma_sp(&name, [fa.len(), fb.len(), 4], selector, &braces(store, 0..4));
            if !integers {
                (0..4).for_each(|i| write!(instruction, " mov.b32 %d{i}, %f{i};").unwrap());
                // Registers of C are of the type's own.
                let first = fa.len() + fb.len();
                let moves: String =
                    (0..4).map(|i| format!("mov.b32 %f{i}, %r{}; ", first + i)).collect();
                let c = braces("r", first..first + 4);
                instruction = moves + &instruction.replace(&c, &braces("f", 0..4));
            }
            for checks in [Checks::default(), Checks::ALL] {
                let found = warp(&instruction, &registers, 4, checks);
                for (i, register) in found.iter().enumerate() {
                    for (lane, &found) in register.iter().enumerate() {
                        let (row, column) = at(lane, i);
                        let sum = product(&of_a.dense, &of_b, row, column) + c[row][column];
                        assert_eq!(
                            found,
                            encode(sum),
                            "{name} selector {selector}: {row}, {column}"
                        );
                    }
                }
            }
        }
    }
}

/// Where sums round, the bits are the dense instruction's over the stored elements: rows that all
/// keep the same places, so that one choice of B's rows serves them all.
#[test]
fn the_arithmetic_is_the_dense_instructions() {
    let mut numbers = Numbers(7);
    for (ty, k, d) in
        [("f16", 32, "f32"), ("f16", 32, "f16"), ("bf16", 16, "f32"), ("e4m3", 64, "f32")]
    {
        let codes = |numbers: &mut Numbers| match ty {
            "f16" => {
                (numbers.next(0x4000) + 0x2000) as u32 & 0x7bff | (numbers.next(2) as u32) << 15
            }
            "bf16" => (numbers.next(0x800) + 0x3c00) as u32 | (numbers.next(2) as u32) << 15,
            _ => numbers.next(0x7f) as u32 | (numbers.next(2) as u32) << 7,
        };
        let width = bits(ty);
        let per = 32 / width;
        let kept: Vec<[usize; 2]> = (0..k / 4)
            .map(|_| [[0, 1], [0, 3], [1, 2], [2, 3]][numbers.next(4) as usize])
            .collect();
        let a: Vec<Vec<u32>> =
            (0..16).map(|_| (0..k / 2).map(|_| codes(&mut numbers)).collect()).collect();
        let b: Vec<Vec<u32>> =
            (0..8).map(|_| (0..k).map(|_| codes(&mut numbers)).collect()).collect();
        let met: Vec<Vec<u32>> = b
            .iter()
            .map(|b| {
                let columns = kept.iter().enumerate();
                columns.flat_map(|(c, [x, y])| [b[4 * c + x], b[4 * c + y]]).collect()
            })
            .collect();
        let lay = |rows: &[Vec<u32>]| {
            let halves = rows.len() / 8;
            let mut out = vec![[0; 32]; halves * rows[0].len() / (4 * per)];
            for (row, elements) in rows.iter().enumerate() {
                for (p, code) in elements.iter().enumerate() {
                    out[row / 8 + halves * (p / (4 * per))][4 * (row % 8) + p / per % 4] |=
                        code << (p % per * width);
                }
            }
            out
        };
        let mut metadata = [0u32; 32];
        for row in 0..16 {
            for (c, [x, y]) in kept.iter().enumerate() {
                let (lane, shift) = place(ty, k, 0, row, c);
                metadata[lane] |= ((x | y << 2) as u32) << shift;
            }
        }
        let results = if d == "f16" { 2 } else { 4 };
        let c: Vec<[u32; 32]> = (0..results)
            .map(|i| {
                std::array::from_fn(|lane| {
                    if d == "f16" { 0x3c00_4200 } else { (lane + i) as u32 + 0x3f80_0000 }
                })
            })
            .collect();
        let (fa, fb, fmet) = (lay(&a), lay(&b), lay(&met));
        let with = |b: &[[u32; 32]], extra: &[[u32; 32]]| [&fa, b, &c, extra].concat();
        let finish = |first: usize, call: &str| match d {
            "f16" => call.replace("RESULT", &braces("d", 0..2)),
            _ => {
                let moves = |i: usize| format!("mov.b32 %f{i}, %r{}; ", first + i);
                let moves: String = (0..4).map(moves).collect();
                let out: String = (0..4).map(|i| format!(" mov.b32 %d{i}, %f{i};")).collect();
                let call = call.replace("RESULT", &braces("f", 0..4));
                let c = braces("r", first..first + 4);
                moves + &call.replace(&c, &braces("f", 0..4)) + &out
            }
        };
        let name = format!("mma.sp.sync.aligned.m16n8k{k}.row.col.{d}.{ty}.{ty}.{d}");
        let call = mma_sp(&name, [fa.len(), fb.len(), results], 0, "RESULT");
        let call = finish(fa.len() + fb.len(), &call);
        let sparse = warp(&call, &with(&fb, &[metadata]), results, Checks::ALL);
        let (x, y) = (fa.len(), fa.len() + fmet.len());
        let call = format!(
            "mma.sync.aligned.m16n8k{}.row.col.{d}.{ty}.{ty}.{d} RESULT, {}, {}, {};",
            k / 2,
            braces("r", 0..x),
            braces("r", x..y),
            braces("r", y..y + results)
        );
        let dense = warp(&finish(y, &call), &with(&fmet, &[]), results, Checks::ALL);
        assert_eq!(sparse, dense, "{name}");
    }
}

/// How operands lie in shared memory: swizzled by 128 or 64 bytes, or in 8 rows of 16 bytes.
#[derive(Clone, Copy, Debug)]
enum Lay {
    Swizzled128,
    Swizzled32,
    Plain,
}

impl Lay {
    /// Byte of a row's byte.
    fn at(self, row: usize, byte: usize) -> usize {
        match self {
            Lay::Swizzled128 => row * 128 + ((byte / 16) ^ (row % 8)) * 16 + byte % 16,
            // Columns of 32 bytes, 64 rows apart.
            Lay::Swizzled32 => {
                let linear = byte / 32 * 2048 + row * 32 + byte % 32;
                linear ^ (linear >> 7 & 1) << 4
            }
            Lay::Plain => row / 8 * 512 + byte / 16 * 128 + row % 8 * 16 + byte % 16,
        }
    }

    /// The descriptor but for its address.
    fn descriptor(self) -> u64 {
        let field = |leading: u64, stride: u64| (leading >> 4) << 16 | (stride >> 4) << 32;
        match self {
            Lay::Swizzled128 => field(16, 1024) | 1 << 62,
            Lay::Swizzled32 => field(2048, 256) | 3 << 62,
            Lay::Plain => field(128, 512),
        }
    }

    fn tile(self, ty: &str, rows: &[Vec<i32>]) -> Vec<u8> {
        let mut out = vec![0; 8192];
        let width = bits(ty) / 8;
        for (row, elements) in rows.iter().enumerate() {
            for (p, &value) in elements.iter().enumerate() {
                let code = code(ty, value).to_le_bytes();
                for (i, byte) in code[..width].iter().enumerate() {
                    out[self.at(row, p * width + i)] = *byte;
                }
            }
        }
        out
    }
}

#[test]
fn every_shape_of_a_warpgroup() {
    let mut numbers = Numbers(3);
    for (k, a, b, selectors) in [
        (32, "f16", "f16", 2),
        (32, "bf16", "bf16", 2),
        (16, "tf32", "tf32", 2),
        (64, "e4m3", "e5m2", 1),
        (64, "s8", "u8", 1),
    ] {
        for selector in 0..selectors {
            for lay in [Lay::Swizzled128, Lay::Swizzled32, Lay::Plain] {
                for in_registers in [false, true] {
                    warpgroup((k, a, b), selector, lay, in_registers, &mut numbers);
                }
            }
        }
    }
}

fn warpgroup(
    (k, a, b): (usize, &str, &str),
    selector: usize,
    lay: Lay,
    in_registers: bool,
    numbers: &mut Numbers,
) {
    // Two products in a row, the second added to the first.
    let of_a = [(); 2].map(|()| sparse(a, 64, k, selector, numbers));
    let of_b: Vec<Vec<i32>> = (0..8).map(|_| (0..k).map(|_| value(b, numbers)).collect()).collect();
    let device = Device::new(Preset::named("h800").unwrap());
    let tiles: Vec<u8> =
        [lay.tile(a, &of_a[0].stored), lay.tile(a, &of_a[1].stored), lay.tile(b, &of_b)].concat();
    let metadata: Vec<[u32; 2]> =
        (0..128).map(|t| [of_a[0].metadata[t], of_a[1].metadata[t]]).collect();
    let mut fragments = vec![[[0u32; 4]; 2]; 128];
    for (i, of_a) in of_a.iter().enumerate() {
        for warp in 0..4 {
            for (r, lanes) in fragment(a, &of_a.stored[16 * warp..][..16]).iter().enumerate() {
                (0..32).for_each(|lane| fragments[32 * warp + lane][i][r] = lanes[lane]);
            }
        }
    }
    let integers = a == "s8";
    let (d, reg, tail) = match (integers, in_registers, bits(a)) {
        (true, ..) => ("s32", "s", ""),
        (false, _, 8 | 32) => ("f32", "f", ", 1, -1"),
        (false, true, _) => ("f32", "f", ", 1, -1, 0"),
        (false, false, _) => ("f32", "f", ", 1, -1, 0, 0"),
    };
    let name = format!("wgmma.mma_async.sp.sync.aligned.m64n8k{k}.{d}.{a}.{b}");
    let call = |i: usize| {
        let from = match in_registers {
            true => braces("a", 4 * i..4 * i + 4),
            false => format!("%da{i}"),
        };
        let results = braces(reg, 0..4);
        format!("{name} {results}, {from}, %db, %m{i}, {selector}, {i}{tail};\n")
    };
    let descriptor = lay.descriptor();
    let text = format!(
        ".version 8.7\n.target sm_90a\n.address_size 64\n\
         .visible .entry k(.param .u64 tiles, .param .u64 meta, .param .u64 frag, .param .u64 to)\n{{\n\
         .shared .align 1024 .b8 sm[24576];\n.reg .pred %p; .reg .b32 %r<8>, %a<8>, %m<2>, %s<4>;\n\
         .reg .f32 %f<4>; .reg .b64 %x, %tiles, %meta, %frag, %to, %da0, %da1, %db;\n\
         ld.param.u64 %tiles, [tiles]; ld.param.u64 %meta, [meta]; ld.param.u64 %frag, [frag];\n\
         ld.param.u64 %to, [to]; mov.u32 %r0, %tid.x;\n\
         mul.wide.u32 %x, %r0, 8; add.u64 %meta, %meta, %x;\n\
         mul.wide.u32 %x, %r0, 32; add.u64 %frag, %frag, %x;\n\
         mul.wide.u32 %x, %r0, 16; add.u64 %to, %to, %x;\n\
         ld.global.v2.b32 {{%m0, %m1}}, [%meta];\n\
         ld.global.v4.b32 {{%a0, %a1, %a2, %a3}}, [%frag];\n\
         ld.global.v4.b32 {{%a4, %a5, %a6, %a7}}, [%frag+16];\n\
         mov.u32 %r1, sm; shl.b32 %r2, %r0, 2;\n\
         FILL:\ncvt.u64.u32 %x, %r2; add.u64 %x, %tiles, %x; ld.global.b32 %r3, [%x];\n\
         add.u32 %r4, %r1, %r2; st.shared.b32 [%r4], %r3; add.u32 %r2, %r2, 512;\n\
         setp.lt.u32 %p, %r2, 24576; @%p bra FILL;\n\
         fence.proxy.async.shared::cta;\nbar.sync 0;\n\
         shr.u32 %r5, %r1, 4; cvt.u64.u32 %da0, %r5; or.b64 %da0, %da0, {descriptor:#x};\n\
         add.u64 %da1, %da0, 512; add.u64 %db, %da0, 1024;\n\
         mov.b32 %s0, 1; mov.b32 %s1, 1; mov.b32 %s2, 1; mov.b32 %s3, 1;\n\
         mov.f32 %f0, 0f3F800000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;\n\
         wgmma.fence.sync.aligned;\n{}{}wgmma.commit_group.sync.aligned;\n\
         wgmma.wait_group.sync.aligned 0;\n\
         st.global.v4.b32 [%to], {};\nret;\n}}\n",
        call(0),
        call(1),
        braces(reg, 0..4),
    );
    let mut outcomes = Vec::new();
    for checks in [Checks::default(), Checks::ALL] {
        let to = device.upload(&[[9u32; 4]; 128]).unwrap();
        let inputs = [
            device.upload(&tiles).unwrap(),
            device.upload(&metadata).unwrap(),
            device.upload(&fragments).unwrap(),
            to,
        ];
        let (device, report) = run_on(&device, &text, 128, checks, &inputs);
        assert_eq!(report.findings, [], "{text}");
        let found: Vec<[u32; 4]> = device.download(to, 128).unwrap();
        for (thread, registers) in found.iter().enumerate() {
            for (i, &found) in registers.iter().enumerate() {
                let row = 16 * (thread / 32) + thread % 32 / 4 + 8 * (i / 2);
                let column = 2 * (thread % 4) + i % 2;
                let sum: i32 = of_a.iter().map(|a| product(&a.dense, &of_b, row, column)).sum();
                let expected = if integers { sum as u32 } else { (-sum as f32).to_bits() };
                // A sum of zero has a sign that its order decides.
                let same = found == expected || sum == 0 && found << 1 == 0;
                assert!(
                    same,
                    "{name} {lay:?} {in_registers} {selector}: {row}, {column}: {found:#x} {expected:#x}"
                );
            }
        }
        outcomes.push(found);
    }
    assert_eq!(outcomes[0], outcomes[1]);
}

#[test]
fn metadata_that_names_no_two_places_is_found_where_it_matters() {
    let text = |a: u32| {
        format!(
            ".version 8.7\n.target sm_90a\n.address_size 64\n.visible .entry k()\n{{\n\
             .reg .b32 %r<8>, %d<4>, %e; .reg .f32 %f<4>;\n\
             mov.b32 %r0, {a}; mov.b32 %r1, 0; mov.b32 %e, 0x44454444;\n\
             mov.b32 %f0, 0f00000000; mov.b32 %f1, %f0; mov.b32 %f2, %f0; mov.b32 %f3, %f0;\n\
             mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{%f0, %f1, %f2, %f3}}, \
             {{%r0, %r1}}, {{%r0, %r1}}, {{%f0, %f1, %f2, %f3}}, %e, 0;\nret;\n}}\n"
        )
    };
    let (_, report) = launch(&text(0x3c00_3c00), 32, Checks::ALL, &[]);
    // The third chunk of row 8 to 15 has the places 1 and 1; those rows of A are zero.
    assert_eq!(report.findings, []);
    let swapped = text(0x3c00_3c00).replace("0x44454444", "0x44444544");
    let (_, report) = launch(&swapped, 32, Checks::ALL, &[]);
    assert_eq!(report.findings[0].kind, fathom_emulator::Ub::BadDescriptor);
    let message = &report.findings[0].message;
    assert!(message.contains("row 0 names no two places for its stored element 4"), "{message}");
}
