//! No text makes the emulator panic: the instruction cases, changed at random, are parsed, lowered
//! and run for a bounded number of instructions. `FATHOM_ROUNDS=N` makes it go on for longer.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use fathom_emulator::{Checks, Device, LaunchConfig, Module, Params, Preset, Settings};

/// SplitMix64: a stream of numbers from a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

/// Head, lines and tail of the module of a case.
fn wrap(text: &str) -> (String, Vec<String>, &'static str) {
    let mut module = String::new();
    let mut registers = String::new();
    let mut lines = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["//>", "in" | "out", name, ty, ..] => {
                registers.push_str(&format!(".reg .{ty} %{name};\n"));
            }
            ["//>", "body"] => {
                module = std::mem::take(&mut lines).join("\n") + "\n";
            }
            [first, ..] if !first.starts_with("//") => lines.push(line.to_owned()),
            _ => {}
        }
    }
    let head = format!(
        ".version 8.7\n.target sm_90a\n.address_size 64\n{module}\
         .visible .entry k(.param .u64 p, .param .align 64 .b8 map[128])\n{{\n\
         .reg .b32 %t, %_x; .reg .b64 %g, %m, %tensor; .reg .pred %_p;\n\
         .shared .align 1024 .b8 smem[16384];\n{registers}\
         ld.param.u64 %g, [p]; mov.u32 %t, %tid.x; mov.u64 %m, map;\n\
         cvta.param.u64 %m, %m; mov.u64 %tensor, %g;\n"
    );
    (head, lines, "ret;\n}\n")
}

/// The pieces of a line: words, numbers, and what stands between them.
fn pieces(line: &str) -> Vec<String> {
    let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '%' | '$' | '.' | ':');
    let mut out: Vec<String> = Vec::new();
    let mut last = None;
    for c in line.chars() {
        match out.last_mut() {
            Some(piece) if last == Some(word(c)) => piece.push(c),
            _ => out.push(c.into()),
        }
        last = Some(word(c));
    }
    out
}

const NUMBERS: [&str; 14] = [
    "0",
    "1",
    "-1",
    "2",
    "3",
    "7",
    "16",
    "31",
    "32",
    "33",
    "255",
    "65536",
    "4294967295",
    "0x7fffffffffffffff",
];

fn mutate(lines: &mut Vec<String>, random: &mut Random, other: &[String]) {
    let at = random.below(lines.len());
    match random.below(8) {
        0 => drop(lines.remove(at)),
        1 => lines.insert(at, lines[random.below(lines.len())].clone()),
        2 => {
            let to = random.below(lines.len());
            lines.swap(at, to);
        }
        3 if !other.is_empty() => lines.insert(at, random.pick(other).clone()),
        _ => {
            let all: Vec<String> = lines.iter().flat_map(|l| pieces(l)).collect();
            let mut own = pieces(&lines[at]);
            if own.is_empty() {
                return;
            }
            let i = random.below(own.len());
            let kind = |p: &str| p.chars().next().map(|c| (c == '%', c.is_ascii_digit()));
            if kind(&own[i]) == Some((false, true)) {
                own[i] = (*random.pick(&NUMBERS)).into();
            } else {
                let alike: Vec<&String> = all.iter().filter(|p| kind(p) == kind(&own[i])).collect();
                own[i] = (*random.pick(&alike)).clone();
            }
            lines[at] = own.concat();
        }
    }
    if lines.is_empty() {
        lines.push(String::new());
    }
}

/// Whether the text parses; it is lowered and run then.
fn try_one(text: &str, random: &mut Random) -> bool {
    let device = Device::new(Preset::named("h800").unwrap());
    let checks = if random.below(2) == 0 { Checks::ALL } else { Checks::default() };
    let (patience, limit) = (20_000, 40_000);
    let schedule_seed = random.below(3) as u64;
    device.configure(Settings { checks, patience, limit, schedule_seed, ..Settings::default() });
    let Ok(module) = Module::load(&device, text) else { return false };
    let Ok(function) = module.function("k") else { return false };
    let buffer = device.upload(&vec![0u8; 65536]).unwrap();
    let params = Params::new().with(buffer).with_bytes(&[0; 128], 64).into_bytes();
    let cluster = 1 + random.below(2) as u32;
    let block = *random.pick(&[1, 32, 48, 128]);
    let mut config = LaunchConfig::new([cluster, 1, 1], [block, 1, 1], params);
    config.cluster = [cluster, 1, 1];
    // Findings and refusals are answers; only a panic is none.
    let _ = device.launch(&function, &config);
    true
}

#[test]
fn no_text_makes_it_panic() {
    let rounds = std::env::var("FATHOM_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(6u64);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/instructions");
    let mut paths: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "ptx"))
        .collect();
    paths.sort();
    let cases: Vec<_> = paths.iter().map(|p| wrap(&std::fs::read_to_string(p).unwrap())).collect();
    let (mut parsed, mut tried) = (0, 0);
    let mut broken = Vec::new();
    for round in 0..rounds {
        for (i, (head, lines, tail)) in cases.iter().enumerate() {
            let mut random = Random(round << 32 | i as u64);
            let mut lines = lines.clone();
            for _ in 0..1 + random.below(3) {
                let other = &random.pick(&cases).1;
                mutate(&mut lines, &mut random, other);
            }
            let text = format!("{head}{}\n{tail}", lines.join("\n"));
            tried += 1;
            match catch_unwind(AssertUnwindSafe(|| try_one(&text, &mut random))) {
                Ok(ran) => parsed += usize::from(ran),
                Err(_) => broken.push(format!("{}, round {round}:\n{text}", paths[i].display())),
            }
        }
    }
    let first = broken.first().cloned().unwrap_or_default();
    assert!(broken.is_empty(), "{} of {tried} texts make it panic:\n{first}", broken.len());
    // Enough of them get past the parser for the test to mean something.
    assert!(parsed * 5 > tried, "{parsed} of {tried} texts parse");
}

#[test]
fn an_unknown_instruction_is_refused_with_its_kernel_alone() {
    let device = Device::new(Preset::named("h800").unwrap());
    let text = ".version 9.0\n.target sm_90\n.address_size 64\n\
        .visible .entry good(.param .u64 out)\n{\n.reg .b64 %rd<2>;\n.reg .b32 %r<2>;\n\
        ld.param.u64 %rd0, [out];\nmov.u32 %r0, 7;\nst.global.u32 [%rd0], %r0;\nret;\n}\n\
        .visible .entry bad()\n{\n.reg .b32 %r<2>;\naddd.u32 %r0, %r1, 1;\nret;\n}\n";
    let module = Module::load(&device, text).unwrap();
    let out = device.upload(&[0u32]).unwrap();
    let launch = |name: &str, params: Params| {
        let config = LaunchConfig::new([1, 1, 1], [1, 1, 1], params.into_bytes());
        device.launch(&module.function(name).unwrap(), &config)
    };
    assert!(launch("good", Params::new().with(out)).unwrap().findings.is_empty());
    assert_eq!(device.download::<u32>(out, 1).unwrap(), [7]);
    let error = launch("bad", Params::new()).expect_err("unknown").to_string();
    for part in ["bad: line 16", "addd.u32", "nearest is `add"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    // Everything else that is wrong is wrong when the module is loaded.
    let broken = text.replace("addd.u32 %r0, %r1, 1", "add.u32 %r0, %r1");
    assert!(Module::load(&device, &broken).is_err());
}
