//! wgmmas of one group that lie side by side along K: computed as one product where they may be,
//! and never where a sign or a transposition differs. With checks each is computed by itself, so
//! both ways give the same bits, and the small integers here make every sum exact.

use std::fmt::Write;

use fathom_emulator::{Checks, Device, LaunchConfig, Module, Params, Preset, Settings};
use half::bf16;

/// One m64n8k16 of a group; the i-th takes columns 16 i to 16 i + 15 of the operands in memory.
#[derive(Clone, Copy, Debug)]
struct Product {
    sign_a: i32,
    sign_b: i32,
    /// B's 16 columns are N, its rows K.
    transposed_b: bool,
}

/// Rows of A and of B in shared memory; a row is 64 BF16 numbers, swizzled by 128 bytes.
const ROWS: [usize; 2] = [64, 16];
const COLUMNS: usize = 64;

/// Small integers, other ones in each place: their products sum exactly in FP32.
fn matrix(rows: usize, factor: i32) -> Vec<i32> {
    (0..(rows * COLUMNS) as i32).map(|i| (i * factor + i / 64) % 13 - 6).collect()
}

fn bits(value: i32) -> u16 {
    bf16::from_f32(value as f32).to_bits()
}

/// As it lies in shared memory: the 16-byte pieces of row r in the order that r mod 8 gives.
fn swizzled(matrix: &[i32]) -> Vec<u16> {
    let mut out = vec![0; matrix.len()];
    for (i, &value) in matrix.iter().enumerate() {
        let (row, column) = (i / COLUMNS, i % COLUMNS);
        out[row * COLUMNS + ((column / 8) ^ (row % 8)) * 8 + column % 8] = bits(value);
    }
    out
}

/// What thread `thread` holds of a fragment, by register pair: its row and first column.
fn place(thread: usize, pair: usize) -> (usize, usize) {
    let (warp, lane) = (thread / 32, thread % 32);
    (16 * warp + lane / 4 + 8 * (pair % 2), lane % 4 * 2 + 8 * (pair / 2))
}

fn source(products: &[Product], a_in_registers: bool) -> String {
    let mut body = String::new();
    for (i, p) in products.iter().enumerate() {
        // Descriptors count 16 bytes.
        let at = 2 * i;
        writeln!(body, "add.u64 %rd8, %rd4, {at};\nadd.u64 %rd9, %rd5, {at};").unwrap();
        let (sa, sb, tb) = (p.sign_a, p.sign_b, i32::from(p.transposed_b));
        let (a, tail) = if a_in_registers {
            let [w, x, y, z] = [0, 1, 2, 3].map(|r| 4 * i + r);
            (format!("{{%a{w}, %a{x}, %a{y}, %a{z}}}"), format!("{tb}"))
        } else {
            ("%rd8".into(), format!("0, {tb}"))
        };
        writeln!(
            body,
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f0, %f1, %f2, %f3}}, {a}, \
             %rd9, 1, {sa}, {sb}, {tail};"
        )
        .unwrap();
    }
    let loads: String = (0..4)
        .map(|i| {
            let [w, x, y, z] = [0, 1, 2, 3].map(|r| 4 * i + r);
            format!("ld.global.v4.b32 {{%a{w}, %a{x}, %a{y}, %a{z}}}, [%rd2+{}];\n", 16 * i)
        })
        .collect();
    format!(
        ".version 8.0\n.target sm_90a\n.address_size 64\n\
         .visible .entry k(.param .u64 tiles, .param .u64 fragments, .param .u64 out)\n{{\n\
         .shared .align 1024 .b8 sm[10240];\n.reg .pred %p;\n.reg .b32 %r<8>, %a<16>;\n\
         .reg .b64 %rd<10>;\n.reg .f32 %f<4>;\n\
         ld.param.u64 %rd0, [tiles];\nld.param.u64 %rd2, [fragments];\nld.param.u64 %rd3, [out];\n\
         mov.u32 %r0, %tid.x;\nmul.wide.u32 %rd1, %r0, 64;\nadd.u64 %rd2, %rd2, %rd1;\n\
         mul.wide.u32 %rd1, %r0, 16;\nadd.u64 %rd3, %rd3, %rd1;\n{loads}\
         mov.u32 %r1, sm;\nshl.b32 %r2, %r0, 2;\n\
         FILL:\ncvt.u64.u32 %rd1, %r2;\nadd.u64 %rd1, %rd0, %rd1;\nld.global.b32 %r3, [%rd1];\n\
         add.u32 %r4, %r1, %r2;\nst.shared.b32 [%r4], %r3;\nadd.u32 %r2, %r2, 512;\n\
         setp.lt.u32 %p, %r2, 10240;\n@%p bra FILL;\n\
         fence.proxy.async.shared::cta;\nbar.sync 0;\n\
         shr.u32 %r5, %r1, 4;\ncvt.u64.u32 %rd4, %r5;\nor.b64 %rd4, %rd4, 0x4000004000010000;\n\
         add.u64 %rd5, %rd4, 512;\n\
         mov.f32 %f0, 0f00000000;\nmov.f32 %f1, %f0;\nmov.f32 %f2, %f0;\nmov.f32 %f3, %f0;\n\
         wgmma.fence.sync.aligned;\n{body}wgmma.commit_group.sync.aligned;\n\
         wgmma.wait_group.sync.aligned 0;\n\
         st.global.v4.f32 [%rd3], {{%f0, %f1, %f2, %f3}};\nret;\n}}\n"
    )
}

/// The kernel's 64 x 8 results by thread and register.
fn run(products: &[Product], a_in_registers: bool, checks: Checks) -> Vec<f32> {
    let device = Device::new(Preset::named("h800").unwrap());
    device.configure(Settings { checks, ..Settings::default() });
    let text = source(products, a_in_registers);
    let module = Module::load(&device, &text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let (a, b) = (matrix(ROWS[0], 7), matrix(ROWS[1], 5));
    let tiles = [swizzled(&a), swizzled(&b)].concat();
    let mut fragments = Vec::new();
    for (thread, i, pair) in (0..128 * 16).map(|n| (n / 16, n / 4 % 4, n % 4)) {
        let (row, column) = place(thread, pair);
        let at = row * COLUMNS + 16 * i + column;
        fragments.push(u32::from(bits(a[at])) | u32::from(bits(a[at + 1])) << 16);
    }
    let out = device.upload(&[7f32; 512]).unwrap();
    let params = Params::new().with(device.upload(&tiles).unwrap());
    let params = params.with(device.upload(&fragments).unwrap()).with(out).into_bytes();
    let config = LaunchConfig::new([1; 3], [128, 1, 1], params);
    let report = device.launch(&module.function("k").unwrap(), &config).unwrap();
    assert_eq!(report.findings, [], "{text}");
    device.download(out, 512).unwrap()
}

/// The same in integers.
fn expected(products: &[Product]) -> Vec<f32> {
    let (a, b) = (matrix(ROWS[0], 7), matrix(ROWS[1], 5));
    let element = |m: usize, n: usize| -> i32 {
        let of = |(i, p): (usize, &Product)| -> i32 {
            let sum = (0..16).map(|k| {
                let b_at = if p.transposed_b {
                    k * COLUMNS + 16 * i + n
                } else {
                    n * COLUMNS + 16 * i + k
                };
                a[m * COLUMNS + 16 * i + k] * b[b_at]
            });
            p.sign_a * p.sign_b * sum.sum::<i32>()
        };
        products.iter().enumerate().map(of).sum()
    };
    let mut out = Vec::new();
    for (thread, i) in (0..512).map(|n| (n / 4, n % 4)) {
        let (row, column) = place(thread, i / 2);
        out.push(element(row, column + i % 2) as f32);
    }
    out
}

fn check(products: &[Product]) {
    let want = expected(products);
    for a_in_registers in [false, true] {
        for checks in [Checks::default(), Checks::ALL] {
            let got = run(products, a_in_registers, checks);
            let differs = got.iter().zip(&want).position(|(g, w)| g.to_bits() != w.to_bits());
            if let Some(i) = differs {
                panic!(
                    "{products:?}, A in registers: {a_in_registers}, {checks:?}: thread {}, \
                     register {}: expected {}, found {}",
                    i / 4,
                    i % 4,
                    want[i],
                    got[i]
                );
            }
        }
    }
}

/// All kinds of wgmma there are here.
fn kinds() -> Vec<Product> {
    let kind =
        |i: i32| Product { sign_a: 1 - 2 * (i & 1), sign_b: 1 - (i & 2), transposed_b: i & 4 != 0 };
    (0..8).map(kind).collect()
}

#[test]
fn a_pair_is_merged_only_where_signs_and_transposition_are_equal() {
    for first in kinds() {
        for second in kinds() {
            check(&[first, second]);
        }
    }
}

#[test]
fn runs_of_equal_products_end_where_one_differs() {
    for other in kinds() {
        let plain = kinds()[0];
        check(&[plain; 4]);
        check(&[plain, plain, other, plain]);
        check(&[other, other, plain, plain]);
        check(&[plain, other, other, other]);
    }
}

/// The fault as it was found: 16 - 16 in five arrangements of two wgmmas.
#[test]
fn opposite_signs_cancel() {
    let Some(folder) = fathom_trace::shared::need("found/emulator") else { return };
    let text = std::fs::read_to_string(folder.join("sign.ptx")).unwrap();
    for checks in [Checks::default(), Checks::ALL] {
        let device = Device::new(Preset::named("h800").unwrap());
        device.configure(Settings { checks, ..Settings::default() });
        let module = Module::load(&device, &text).unwrap();
        let entries = ["b_second", "b_first", "a_regs_second", "a_shared_second", "b_second_apart"];
        for entry in entries {
            let out = device.upload(&[7f32; 512]).unwrap();
            let params = Params::new().with(out).into_bytes();
            let config = LaunchConfig::new([1; 3], [128, 1, 1], params);
            let report = device.launch(&module.function(entry).unwrap(), &config).unwrap();
            assert_eq!(report.findings, []);
            let got: Vec<f32> = device.download(out, 512).unwrap();
            assert!(got.iter().all(|&v| v == 0.0), "{entry}, {checks:?}: {:?}", got[0]);
        }
    }
}
