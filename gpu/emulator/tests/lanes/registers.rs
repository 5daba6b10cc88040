//! Registers are private to a lane: lanes that have parted into functions with other register
//! layouts, or whose temporaries have other widths, never see one another's values.

use std::fmt::Write;

use fathom_emulator::{Checks, Device, LaunchConfig, Module, Params, Preset, Settings};
use proptest::prelude::*;

use crate::{HEAD, NO_CHECKS, ONE_TURN, all_turns, check, run};

/// Lanes in two device functions at once: one's frame holds 64-bit registers where the other's
/// holds 32-bit ones. A lane's halves once lay in the words of two other lanes.
#[test]
fn frames_of_other_layouts_do_not_mix() {
    let text = format!(
        "{HEAD}
        .func (.param .b64 r) squares(.param .b64 a)
        {{
            .reg .b64 %rd<4>;
            .reg .pred %p;
            ld.param.u64 %rd0, [a];
            mov.u64 %rd1, 0;
            mov.u64 %rd2, 0;
        AGAIN:
            mad.lo.u64 %rd1, %rd2, %rd2, %rd1;
            add.u64 %rd2, %rd2, 0x100000001;
            and.b64 %rd3, %rd2, 0xffffffff;
            setp.le.u64 %p, %rd3, %rd0;
            @%p bra AGAIN;
            st.param.b64 [r], %rd1;
            ret;
        }}
        .func (.param .b64 r) sums(.param .b64 a)
        {{
            .reg .b32 %r<6>;
            .reg .b64 %rd;
            .reg .pred %p;
            ld.param.u64 %rd, [a];
            cvt.u32.u64 %r0, %rd;
            mov.u32 %r1, 1;
            mov.u32 %r2, 2;
            mov.u32 %r3, 3;
            mov.u32 %r4, 0;
        AGAIN:
            add.u32 %r1, %r1, %r2;
            add.u32 %r2, %r2, %r3;
            add.u32 %r3, %r3, 5;
            add.u32 %r4, %r4, 1;
            setp.le.u32 %p, %r4, %r0;
            @%p bra AGAIN;
            mov.b64 %rd, {{%r1, %r2}};
            st.param.b64 [r], %rd;
            ret;
        }}
        .visible .entry k(.param .u64 out, .param .u32 n)
        {{
            .reg .b32 %r<3>;
            .reg .b64 %rd<4>;
            .reg .pred %p;
            ld.param.u64 %rd0, [out];
            mov.u32 %r0, %laneid;
            cvt.u64.u32 %rd1, %r0;
            and.b32 %r1, %r0, 1;
            setp.eq.u32 %p, %r1, 1;
            @%p bra ODD;
            {{ .param .b64 a; .param .b64 q; st.param.b64 [a], %rd1;
              call.uni (q), squares, (a); ld.param.b64 %rd2, [q]; }}
            bra END;
        ODD:
            {{ .param .b64 a; .param .b64 q; st.param.b64 [a], %rd1;
              call.uni (q), sums, (a); ld.param.b64 %rd2, [q]; }}
        END:
            shl.b64 %rd1, %rd1, 3;
            add.u64 %rd0, %rd0, %rd1;
            st.global.u64 [%rd0], %rd2;
            ret;
        }}"
    );
    let result = |lane: u64| {
        let squares = (0..=lane).map(|i| i.wrapping_mul(0x1_0000_0001)).map(|v| v.wrapping_mul(v));
        let even = squares.fold(0u64, u64::wrapping_add);
        let (mut a, mut b, mut c) = (1u64, 2u64, 3u64);
        for _ in 0..=lane {
            a += b;
            b += c;
            c += 5;
        }
        if lane.is_multiple_of(2) { even } else { b << 32 | a }
    };
    let want: Vec<u64> = (0..32).map(result).collect();
    check(&text, 0, &want);
}

/// Temporaries of lowering without a call: the low half of a wide register beside the address of a
/// variable in local memory.
#[test]
fn temporaries_of_other_widths_do_not_mix() {
    let text = format!(
        "{HEAD}
        .visible .entry k(.param .u64 out, .param .u32 n)
        {{
            .local .align 8 .b8 v[16];
            .reg .b32 %r<8>;
            .reg .b64 %rd<8>;
            .reg .pred %p<3>;
            ld.param.u64 %rd0, [out];
            ld.param.u32 %r0, [n];
            mov.u32 %r1, %laneid;
            mov.u32 %r2, 0;
            mov.u32 %r3, 0;
            mov.u64 %rd1, 0x9abcdef012345678;
            mov.u64 %rd2, v;
            mov.u64 %rd6, %rd2;
            add.u64 %rd2, %rd2, 8;
            and.b32 %r4, %r1, 4;
            setp.eq.u32 %p0, %r4, 0;
            @%p0 bra LOW;
        ADDRESS:
            mov.u64 %rd3, v+8;
            setp.ne.u64 %p1, %rd3, %rd2;
            @%p1 add.u32 %r2, %r2, 1;
            add.u32 %r3, %r3, 1;
            setp.lt.u32 %p2, %r3, %r0;
            @%p2 bra ADDRESS;
            bra END;
        LOW:
            st.local.u32 [%rd6], %rd1;
            ld.local.u32 %r5, [%rd6];
            setp.ne.u32 %p1, %r5, 0x12345678;
            @%p1 add.u32 %r2, %r2, 1;
            add.u32 %r3, %r3, 1;
            setp.lt.u32 %p2, %r3, %r0;
            @%p2 bra LOW;
        END:
            cvt.u64.u32 %rd4, %r1;
            shl.b64 %rd4, %rd4, 3;
            add.u64 %rd0, %rd0, %rd4;
            cvt.u64.u32 %rd5, %r2;
            st.global.u64 [%rd0], %rd5;
            ret;
        }}"
    );
    check(&text, 5000, &[0; 32]);
}

/// Registers that are wider than what is loaded to them, stored from them or moved through them.
#[test]
fn registers_of_other_widths_hold_what_they_should() {
    let cases = [
        ("ld.global.u32 %q, [%rd0];", [0x8899_aabb, 0]),
        ("ld.global.s32 %q, [%rd0];", [0xffff_ffff_8899_aabb, !0]),
        ("ld.global.u64 %q, [%rd0];", [0x8011_2233_8899_aabb, 0]),
        ("ld.global.s64 %q, [%rd0];", [0x8011_2233_8899_aabb, !0]),
        ("ld.global.s16 %rd1, [%rd0]; mov.b128 %q, {%rd1, %rd1};", [0xffff_ffff_ffff_aabb; 2]),
        ("st.global.u32 [%rd0+4], %q; ld.global.u64 %q, [%rd0];", [0x0000_0005_8899_aabb, 0]),
        (
            "cvt.u32.s16 %rd1, %h; cvt.s64.s16 %rd2, %h; mov.b128 %q, {%rd1, %rd2};",
            [0xffff_fffe, 0xffff_ffff_ffff_fffe],
        ),
        (
            "mov.b128 %q, {%rd0, %rd1}; mov.b128 {%rd2, %rd3}, %q; sub.u64 %rd2, %rd2, %rd0;
          mov.b128 %q, {%rd2, %rd3};",
            [0, 5],
        ),
    ];
    for (body, want) in cases {
        let text = width_kernel(body);
        let device = Device::new(Preset::named("h800").unwrap());
        let module = Module::load(&device, &text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        let out = device.upload(&[0x8011_2233_8899_aabbu64, 0]).unwrap();
        let config = LaunchConfig::new([1; 3], [1; 3], Params::new().with(out).into_bytes());
        device.launch(&module.function("k").unwrap(), &config).unwrap();
        assert_eq!(device.download::<u64>(out, 2).unwrap(), want, "{body}");
    }
}

/// Ends by storing `%q`; `%q` and `%rd1` start as 5, `%h` as -2.
fn width_kernel(body: &str) -> String {
    let body = body.replace("; ", ";\n");
    format!(
        ".version 8.7\n.target sm_90a\n.address_size 64\n\
         .func (.param .b32 r) single(.param .b32 a) {{ st.param.b32 [r], 1; ret; }}\n\
         .func (.param .b64 r) double(.param .b32 a) {{ st.param.b64 [r], 1; ret; }}\n\
         .visible .entry k(.param .u64 out)\n{{\n.reg .pred %p;\n.reg .b16 %h;\n\
         .reg .b32 %r<2>;\n.reg .b64 %rd<4>;\n.reg .b128 %q;\n.shared .b64 s;\n\
         ld.param.u64 %rd0, [out];\nmov.b64 %rd1, 5;\nmov.b128 %q, {{%rd1, %rd1}};\n\
         mov.b16 %h, -2;\nmov.b32 %r0, 5;\n{body}\nst.global.b128 [%rd0], %q;\nret;\n}}\n"
    )
}

/// What no register of its width can hold is refused by name, never read from another register.
#[test]
fn registers_of_widths_that_do_not_fit_are_refused() {
    for (body, said) in [
        ("call (%rd1), single, (%r0);", "a result of 4 bytes in a register of 64 bits"),
        ("call (%r1), double, (%r0);", "a result of 8 bytes in a register of 32 bits"),
        ("ld.global.u32 %r1, [%q];", "an address in a register of 128 bits"),
        ("ld.shared.u32 %r1, [%h];", "an address in a register of 16 bits"),
        ("ld.shared.u32 %r1, [%p];", "an address in a register of 1 bits"),
        ("mov.b128 %q, 5;", "128 bits from what is no register"),
        ("mov.b128 %q, %clock64;", "128 bits from what is no register"),
        ("st.global.b128 [%rd0], 5;", "128 bits from what is no register"),
        ("cvt.u64.u32 %q, %r0;", "cvt.u64.u32 to a register of 128 bits"),
    ] {
        let device = Device::new(Preset::named("h800").unwrap());
        let module = Module::load(&device, &width_kernel(body)).unwrap_or_else(|e| panic!("{e}"));
        let out = device.upload(&[0u64; 2]).unwrap();
        let config = LaunchConfig::new([1; 3], [1; 3], Params::new().with(out).into_bytes());
        let refused = module.function("k").and_then(|f| device.launch(&f, &config));
        let message = refused.expect_err(body).to_string();
        assert!(message.contains(said), "{body}: {message}");
    }
}

/// The faults as they were found.
#[test]
fn found_programs_give_the_right_values() {
    let Some(folder) = fathom_trace::shared::need("found/emulator") else { return };
    let run = |name: &str, threads: u32, n: u32, checks: Checks| -> Vec<u32> {
        let text = std::fs::read_to_string(folder.join(name)).unwrap();
        let device = Device::new(Preset::named("h800").unwrap());
        device.configure(Settings { checks, ..Settings::default() });
        let module = Module::load(&device, &text).unwrap();
        let function = module.function("k").unwrap();
        let out = device.upload(&[0u32; 32]).unwrap();
        let mut params = Params::new().with(out);
        if name == "temps.ptx" {
            params = params.with(n);
        }
        let config = LaunchConfig::new([1; 3], [threads, 1, 1], params.into_bytes());
        let report = device.launch(&function, &config).unwrap();
        assert_eq!(report.findings, [], "{name}");
        device.download(out, threads as usize).unwrap()
    };
    for checks in [NO_CHECKS, Checks::ALL] {
        for threads in [1, 2, 3, 4, 32] {
            let want: Vec<u32> = (0..threads)
                .map(|t| [7, 101].get(t as usize).copied().unwrap_or(t + 1100))
                .collect();
            assert_eq!(run("calls.ptx", threads, 0, checks), want, "{threads} threads");
        }
        for n in [1000, 100_003] {
            assert_eq!(run("temps.ptx", 32, n, checks), [0; 32], "n = {n}");
        }
    }
}

/// A program written from a tape of choices; where the tape ends, so does every list.
struct Writer<'a> {
    tape: &'a [u8],
    at: usize,
    text: String,
    labels: u32,
    /// Device functions: number i calls those above it only.
    functions: usize,
}

/// A function that is being written: which one, and how many registers of each width it has.
#[derive(Clone, Copy)]
struct Function {
    number: usize,
    narrow: usize,
    wide: usize,
}

impl Writer<'_> {
    fn pick(&mut self, n: usize) -> usize {
        let byte = self.tape.get(self.at).copied().unwrap_or(0);
        self.at += 1;
        usize::from(byte) % n
    }

    fn line(&mut self, text: impl AsRef<str>) {
        writeln!(self.text, "{}", text.as_ref()).unwrap();
    }

    /// Functions differ in how many registers they have and what they return.
    fn returns(number: usize) -> &'static str {
        if number.is_multiple_of(2) { "b64" } else { "b32" }
    }

    fn program(mut self) -> String {
        self.line(HEAD);
        for number in (1..=self.functions).rev() {
            let ty = Self::returns(number);
            self.line(format!(
                ".func (.param .{ty} q) f{number}(.param .b32 a, .param .b64 b)\n{{"
            ));
            let f = self.declare(number);
            self.line("ld.param.u32 %x, [a];\nld.param.u64 %y, [b];");
            self.body(f);
            let low = if ty == "b32" { "cvt.u32.u64 %x, %y;\nst.param.b32 [q], %x;" } else { "" };
            self.line(if low.is_empty() { "st.param.b64 [q], %y;" } else { low });
            self.line("ret;\n}");
        }
        self.line(".visible .entry k(.param .u64 out, .param .u32 n)\n{");
        let f = self.declare(0);
        // `n` says which lanes run.
        self.line(
            ".reg .b64 %out, %place;\nld.param.u64 %out, [out];\nld.param.u32 %x, [n];\n\
             mov.u32 %t, %laneid;\nmul.wide.u32 %place, %t, 8;\nadd.u64 %out, %out, %place;\n\
             shr.u32 %x, %x, %t;\nand.b32 %x, %x, 1;\nsetp.eq.u32 %p, %x, 0;\n@%p exit;\n\
             mul.lo.u32 %x, %t, 0x9e3779b1;\nmul.wide.u32 %y, %x, 0x85ebca6b;",
        );
        self.body(f);
        self.line("st.global.u64 [%out], %y;\nret;\n}");
        self.text
    }

    fn declare(&mut self, number: usize) -> Function {
        let f = Function { number, narrow: 1 + self.pick(7), wide: 1 + self.pick(5) };
        self.line(format!(
            ".local .align 8 .b8 v[16];\n.reg .b32 %x, %t, %r<{}>;\n.reg .b64 %y, %u, %d<{}>;\n\
             .reg .pred %p;",
            f.narrow, f.wide
        ));
        f
    }

    /// From `%x` and `%y` to `%y`, by all registers.
    fn body(&mut self, f: Function) {
        self.line("st.local.u64 [v], %y;\nst.local.u64 [v+8], %y;");
        for i in 0..f.narrow {
            self.line(format!("mad.lo.u32 %r{i}, %x, {}, {i};", 2 * i + 3));
        }
        for i in 0..f.wide {
            self.line(format!("mad.lo.u64 %d{i}, %y, {}, {i};", 2 * i + 5));
        }
        self.block(f, 0);
        self.line("cvt.u64.u32 %y, %x;");
        for i in 0..f.narrow {
            self.line(format!("mad.wide.u32 %y, %r{i}, {}, %y;", 3 * i + 7));
        }
        for i in 0..f.wide {
            self.line(format!("xor.b64 %y, %y, %d{i};\nmul.lo.u64 %y, %y, 0x9e3779b97f4a7c15;"));
        }
    }

    fn block(&mut self, f: Function, depth: usize) {
        for _ in 0..self.pick(7) {
            self.statement(f, depth);
        }
    }

    fn statement(&mut self, f: Function, depth: usize) {
        let [a, b, c] = [0; 3].map(|_| format!("%r{}", self.pick(f.narrow)));
        let [x, y, z] = [0; 3].map(|_| format!("%d{}", self.pick(f.wide)));
        let nested = depth < 3;
        match self.pick(15) {
            0 => self.line(format!("add.u32 {a}, {b}, {c};")),
            1 => self.line(format!("mad.lo.u32 {a}, {b}, {c}, {a};")),
            2 => self.line(format!("add.u64 {x}, {y}, {z};")),
            3 => self.line(format!("mad.wide.u32 {x}, {a}, {b}, {y};")),
            4 => self.line(format!("mov.b64 {{{a}, %t}}, {x};\nxor.b32 {b}, {b}, %t;")),
            5 => self.line(format!("mov.b64 {x}, {{{a}, {b}}};")),
            // A narrow store of a wide register, and a narrow load to one.
            6 => self.line(format!("st.local.u32 [v], {x};\nld.local.u32 {a}, [v];")),
            7 => self.line(format!("st.local.u64 [v+8], {x};\nld.local.u16 {y}, [v+12];")),
            // Addresses and special registers come by way of temporaries.
            8 => self.line(format!("mov.u64 %u, v+4;\nadd.u64 {x}, {y}, %u;")),
            9 => self.line(format!("cvt.u64.u32 %u, %laneid;\nxor.b64 {x}, {x}, %u;")),
            10 => self.line(format!("setp.lt.u64 %p, {x}, {y};\nselp.b64 {z}, {x}, {y}, %p;")),
            11 | 12 if nested => self.branch(f, depth, &a),
            13 if depth == 0 => self.repeat(f, depth, &a),
            _ => self.call(f, &a, &x),
        }
    }

    fn branch(&mut self, f: Function, depth: usize, by: &str) {
        let label = self.label();
        let (bit, right) = (1 << self.pick(8), self.pick(2) == 1);
        self.line(format!("and.b32 %t, {by}, {bit};\nsetp.eq.u32 %p, %t, 0;"));
        self.line(format!("@%p bra ELSE{label};"));
        self.block(f, depth + 1);
        if right {
            self.line(format!("bra END{label};\nELSE{label}:"));
            self.block(f, depth + 1);
            self.line(format!("END{label}:"));
        } else {
            self.line(format!("ELSE{label}:"));
        }
    }

    /// One to four times, as the lane says.
    fn repeat(&mut self, f: Function, depth: usize, by: &str) {
        let label = self.label();
        self.line(format!(".reg .b32 %n{label};\nand.b32 %n{label}, {by}, 3;\nLOOP{label}:"));
        self.block(f, depth + 1);
        self.line(format!(
            "setp.eq.u32 %p, %n{label}, 0;\nsub.u32 %n{label}, %n{label}, 1;\n@!%p bra LOOP{label};"
        ));
    }

    fn call(&mut self, f: Function, narrow: &str, wide: &str) {
        let left = self.functions - f.number;
        if left == 0 {
            return;
        }
        let callee = f.number + 1 + self.pick(left);
        let ty = Self::returns(callee);
        let to = if ty == "b64" { wide } else { narrow };
        self.line(format!(
            "{{ .param .b32 a; .param .b64 b; .param .{ty} q;\nst.param.b32 [a], {narrow};\n\
             st.param.b64 [b], {wide};\ncall.uni (q), f{callee}, (a, b);\n\
             ld.param.{ty} {to}, [q]; }}"
        ));
    }

    fn label(&mut self) -> u32 {
        self.labels += 1;
        self.labels
    }
}

fn program(tape: &[u8]) -> String {
    Writer { tape, at: 0, text: String::new(), labels: 0, functions: 3 }.program()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    /// A lane of 32 that part and meet computes what it computes alone, in every order of turns.
    #[test]
    fn a_lane_computes_what_it_computes_alone(tape in prop::collection::vec(any::<u8>(), 0..600)) {
        let text = program(&tape);
        let alone: Vec<u64> =
            (0..32).map(|lane| run(&text, 1 << lane, ONE_TURN)[lane]).collect();
        for turns in all_turns() {
            let together = run(&text, !0, turns);
            prop_assert_eq!(&together, &alone, "{:?}\n{}", turns, text);
        }
    }
}
