//! SIMD video instructions on every pair of bytes, by the words of the PTX ISA: extract and extend
//! by the source's type, operate, clamp to the result's type where asked, keep the low byte or add
//! all four to `c`.

use std::fmt::Write;

use fathom_emulator::{Device, LaunchConfig, Module, Params, Preset, Settings};

/// Two signed numbers to one.
type Operation = fn(i64, i64) -> i64;

const OPERATIONS: [(&str, Operation); 6] = [
    ("vadd4", |a, b| a + b),
    ("vsub4", |a, b| a - b),
    ("vavrg4", |a, b| if a + b >= 0 { (a + b + 1) >> 1 } else { (a + b) >> 1 }),
    ("vabsdiff4", |a, b| (a - b).abs()),
    ("vmin4", i64::min),
    ("vmax4", i64::max),
];

const MODES: [&str; 3] = ["", ".sat", ".add"];
const C: u32 = 0xfedc_ba98;

fn extended(register: u32, at: u32, signed: bool) -> i64 {
    let byte = (register >> (8 * at)) as u8;
    if signed { i64::from(byte as i8) } else { i64::from(byte) }
}

fn name(signed: bool) -> &'static str {
    if signed { "s32" } else { "u32" }
}

#[test]
fn every_pair_of_bytes_gives_what_the_isa_says() {
    let mut variants = Vec::new();
    for (op, f) in OPERATIONS {
        for types in 0..8 {
            for mode in MODES {
                variants.push((op, f, [types & 1 != 0, types & 2 != 0, types & 4 != 0], mode));
            }
        }
    }
    // Thread x of CTA y: bytes x, ~x, x + 128, x + 1 against y, y, ~y, 2 y.
    let mut body = String::new();
    for (i, (op, _, [d, a, b], mode)) in variants.iter().enumerate() {
        let (d, a, b) = (name(*d), name(*a), name(*b));
        writeln!(body, "{op}.{d}.{a}.{b}{mode} %d, %a, %b, {C};").unwrap();
        writeln!(body, "st.global.u32 [%out+{}], %d;", i * 4 * 65536).unwrap();
    }
    let text = format!(
        ".version 8.0\n.target sm_90\n.address_size 64\n\
         .visible .entry k(.param .u64 out, .param .u64 as, .param .u64 bs)\n{{\n\
         .reg .b32 %t, %y, %a, %b, %d;\n.reg .b64 %out, %p, %n;\n\
         mov.u32 %t, %tid.x;\nmov.u32 %y, %ctaid.x;\n\
         ld.param.u64 %p, [as];\nmul.wide.u32 %n, %t, 4;\nadd.u64 %p, %p, %n;\n\
         ld.global.u32 %a, [%p];\nld.param.u64 %p, [bs];\nmul.wide.u32 %n, %y, 4;\n\
         add.u64 %p, %p, %n;\nld.global.u32 %b, [%p];\nld.param.u64 %out, [out];\n\
         mad.lo.u32 %t, %y, 256, %t;\nmul.wide.u32 %n, %t, 4;\nadd.u64 %out, %out, %n;\n\
         {body}ret;\n}}\n"
    );
    let device = Device::new(Preset::named("h800").unwrap());
    device.configure(Settings::default());
    let module = Module::load(&device, &text).unwrap_or_else(|e| panic!("{e}"));
    let packed = |bytes: [u8; 4]| u32::from_le_bytes(bytes);
    let all = 0..=255u8;
    let a: Vec<u32> =
        all.clone().map(|x| packed([x, !x, x.wrapping_add(128), x.wrapping_add(1)])).collect();
    let b: Vec<u32> = all.map(|y| packed([y, y, !y, y.wrapping_mul(2)])).collect();
    let out = device.upload(&vec![0u32; variants.len() * 65536]).unwrap();
    let params = Params::new().with(out).with(device.upload(&a).unwrap());
    let params = params.with(device.upload(&b).unwrap()).into_bytes();
    let config = LaunchConfig::new([256, 1, 1], [256, 1, 1], params);
    let report = device.launch(&module.function("k").unwrap(), &config).unwrap();
    assert_eq!(report.findings, []);
    let got: Vec<u32> = device.download(out, variants.len() * 65536).unwrap();
    for (i, (op, f, [d, a_signed, b_signed], mode)) in variants.iter().enumerate() {
        let (low, high) = if *d { (-128, 127) } else { (0, 255) };
        for (at, &found) in got[i * 65536..][..65536].iter().enumerate() {
            let (x, y) = (a[at % 256], b[at / 256]);
            let results = [0, 1, 2, 3]
                .map(|byte| f(extended(x, byte, *a_signed), extended(y, byte, *b_signed)));
            let expected = match *mode {
                ".add" => results.iter().fold(C, |c, &t| c.wrapping_add(t as u32)),
                ".sat" => packed(results.map(|t| t.clamp(low, high) as u8)),
                _ => packed(results.map(|t| t as u8)),
            };
            let types = [name(*d), name(*a_signed), name(*b_signed)];
            assert_eq!(found, expected, "{op} {types:?}{mode} of {x:#x} and {y:#x}");
        }
    }
}
