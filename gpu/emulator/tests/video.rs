//! Video instructions by the words of the PTX ISA: extract and extend by the source's type,
//! operate, clamp to the result's type where asked. SIMD ones on every pair of bytes keep the low
//! byte or add all four to `c`; scalar ones on words with edges everywhere combine with `c` or
//! merge into it.

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

/// A part of a register by its name: bits and shift.
fn part(name: &str) -> (u32, u32) {
    match name {
        ".h0" => (16, 0),
        ".h1" => (16, 16),
        "" => (32, 0),
        byte => (8, 8 * byte[2..].parse::<u32>().unwrap()),
    }
}

/// A part of a word as a number.
fn number(word: u32, name: &str, signed: bool) -> i128 {
    let (bits, shift) = part(name);
    let value = i128::from(u64::from(word) >> shift & ((1 << bits) - 1));
    if signed && value >> (bits - 1) & 1 == 1 { value - (1 << bits) } else { value }
}

fn saturated(value: i128, bits: u32, signed: bool) -> i128 {
    let low = if signed { -(1i128 << (bits - 1)) } else { 0 };
    let high = low + (1i128 << bits) - 1;
    value.max(low).min(high)
}

/// One scalar instruction: its text, and what it gives for a, b and c.
type Scalar = (String, Box<dyn Fn(u32, u32, u32) -> u32>);

type Primary = fn(i128, i128) -> i128;

const PARTS: [&str; 7] = ["", ".b0", ".b1", ".b2", ".b3", ".h0", ".h1"];

fn scalar_instructions() -> Vec<Scalar> {
    let primaries: [(&str, &str, Primary); 15] = [
        ("vadd", "", |a, b| a + b),
        ("vsub", "", |a, b| a - b),
        ("vabsdiff", "", |a, b| (a - b).abs()),
        ("vmin", "", |a, b| a.min(b)),
        ("vmax", "", |a, b| a.max(b)),
        ("vshl", ".clamp", |a, b| a * (1 << b.min(32))),
        ("vshl", ".wrap", |a, b| a * (1 << (b % 32))),
        ("vshr", ".clamp", |a, b| a.div_euclid(1 << b.min(32))),
        ("vshr", ".wrap", |a, b| a.div_euclid(1 << (b % 32))),
        ("vset", ".eq", |a, b| i128::from(a == b)),
        ("vset", ".ne", |a, b| i128::from(a != b)),
        ("vset", ".lt", |a, b| i128::from(a < b)),
        ("vset", ".le", |a, b| i128::from(a <= b)),
        ("vset", ".gt", |a, b| i128::from(a > b)),
        ("vset", ".ge", |a, b| i128::from(a >= b)),
    ];
    let mut out: Vec<Scalar> = Vec::new();
    let mut turn = 0;
    for (op, suffix, primary) in primaries {
        for types in 0..8u32 {
            let [d, b, a] = [0, 1, 2].map(|i| types >> i & 1 == 1);
            if op == "vset" && d || op.starts_with("vsh") && b {
                continue;
            }
            for sat in [false, true] {
                if sat && op == "vset" {
                    continue;
                }
                // How the result is used: as it is, combined, or merged into a part.
                for last in ["", ".add", ".min", ".max", ".b0", ".b1", ".b2", ".b3", ".h0", ".h1"] {
                    turn += 1;
                    let (pa, pb) = (PARTS[turn % 7], PARTS[turn / 7 % 7]);
                    let [td, ta, tb] = [d, a, b].map(name);
                    let td = if op == "vset" { String::new() } else { format!(".{td}") };
                    let sat_text = if sat { ".sat" } else { "" };
                    let merges = last.starts_with(".b") || last.starts_with(".h");
                    let second = if merges { "" } else { last };
                    let into = if merges { last } else { "" };
                    let c = if last.is_empty() { "" } else { ", %c" };
                    let text = format!(
                        "{op}{td}.{ta}.{tb}{sat_text}{suffix}{second} %d{into}, %a{pa}, %b{pb}{c};"
                    );
                    let f = move |x: u32, y: u32, z: u32| {
                        let tmp = primary(number(x, pa, a), number(y, pb, b));
                        let tmp = if sat { saturated(tmp, part(into).0, d) } else { tmp };
                        let c = number(z, "", d);
                        match second {
                            ".add" => return (tmp + c) as u32,
                            ".min" => return tmp.min(c) as u32,
                            ".max" => return tmp.max(c) as u32,
                            _ => {}
                        }
                        let (bits, shift) = part(into);
                        let mask = ((1u64 << bits) - 1) << shift;
                        let kept = if merges { u64::from(z) & !mask } else { 0 };
                        (kept | ((tmp as u64) << shift) & mask) as u32
                    };
                    out.push((text, Box::new(f)));
                }
            }
        }
    }
    out
}

fn multiply_adds() -> Vec<Scalar> {
    let mut out: Vec<Scalar> = Vec::new();
    let mut turn = 0;
    for types in 0..4u32 {
        let (a, b) = (types & 1 == 1, types & 2 == 2);
        for mode in ["", ".po", "-a", "-b", "-c"] {
            for (scale, by) in [("", 0), (".shr7", 7), (".shr15", 15)] {
                for sat in [false, true] {
                    turn += 3;
                    let (pa, pb) = (PARTS[turn % 7], PARTS[turn / 7 % 7]);
                    let minus = |which: &str| if mode == which { "-" } else { "" };
                    let po = if mode == ".po" { ".po" } else { "" };
                    let text = format!(
                        "vmad.s32.{}.{}{po}{}{scale} %d, {}%a{pa}, {}%b{pb}, {}%c;",
                        name(a),
                        name(b),
                        if sat { ".sat" } else { "" },
                        minus("-a"),
                        minus("-b"),
                        minus("-c"),
                    );
                    let f = move |x: u32, y: u32, z: u32| {
                        let signed = a || b || mode.starts_with('-');
                        let mut tmp = number(x, pa, a) * number(y, pb, b);
                        // In the ISA's words: complement, and one more.
                        let mut c = z;
                        if mode == "-a" || mode == "-b" {
                            tmp = -tmp - 1;
                        }
                        if mode == "-c" {
                            c = !c;
                        }
                        let lsb = i128::from(!mode.is_empty());
                        let sum = tmp + number(c, "", signed) + lsb;
                        let result = sum.div_euclid(1 << by);
                        (if sat { saturated(result, 32, signed) } else { result }) as u32
                    };
                    out.push((text, Box::new(f)));
                }
            }
        }
    }
    out
}

#[test]
fn scalar_ones_give_what_the_isas_pseudo_code_gives() {
    let edges = [
        0u32,
        1,
        2,
        31,
        32,
        33,
        0x7f,
        0x80,
        0xff,
        0x7fff,
        0x8000,
        0xffff,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x80ff_7f01,
        0x1234_5678,
        0xfedc_ba98,
    ];
    let triples: Vec<[u32; 4]> = (0..edges.len() * edges.len())
        .map(|i| {
            let n = edges.len();
            [edges[i % n], edges[i / n], edges[(i * 5 + i / n) % n], 0]
        })
        .collect();
    let device = Device::new(Preset::named("h800").unwrap());
    let all: Vec<Scalar> = scalar_instructions().into_iter().chain(multiply_adds()).collect();
    let mut body = String::new();
    for (i, (text, _)) in all.iter().enumerate() {
        writeln!(body, "{text}\nst.global.u32 [%out+{}], %d;", i * 4 * triples.len()).unwrap();
    }
    let text = format!(
        ".version 8.0\n.target sm_90\n.address_size 64\n\
         .visible .entry k(.param .u64 out, .param .u64 in)\n{{\n\
         .reg .b32 %t, %a, %b, %c, %d, %x;\n.reg .b64 %out, %p, %n;\n\
         mov.u32 %t, %tid.x; ld.param.u64 %p, [in]; ld.param.u64 %out, [out];\n\
         mul.wide.u32 %n, %t, 16; add.u64 %p, %p, %n; mul.wide.u32 %n, %t, 4;\n\
         add.u64 %out, %out, %n; ld.global.v4.u32 {{%a, %b, %c, %x}}, [%p];\n{body}ret;\n}}\n"
    );
    let module = Module::load(&device, &text).unwrap_or_else(|e| panic!("{e}"));
    let out = device.upload(&vec![0u32; all.len() * triples.len()]).unwrap();
    let params = Params::new().with(out).with(device.upload(&triples).unwrap()).into_bytes();
    let config = LaunchConfig::new([1, 1, 1], [triples.len() as u32, 1, 1], params);
    let report = device.launch(&module.function("k").unwrap(), &config).unwrap();
    assert_eq!(report.findings, []);
    let got: Vec<u32> = device.download(out, all.len() * triples.len()).unwrap();
    for ((text, f), got) in all.iter().zip(got.chunks(triples.len())) {
        for ([a, b, c, _], found) in triples.iter().zip(got) {
            assert_eq!(*found, f(*a, *b, *c), "{text} of {a:#x}, {b:#x}, {c:#x}");
        }
    }
}
