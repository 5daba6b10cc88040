//! Whole modules: real compiler output where it is at hand, small files of our own, and errors.

use fathom_ptx::ast::*;
use fathom_ptx::parse;
use fathom_ptx::table::Opcode;
use fathom_ptx::types::*;

fn kernel(body: &str) -> String {
    format!(
        ".version 8.4\n.target sm_90a\n.address_size 64\n.visible .entry k(.param .u64 \
        p)\n{{\n{body}\n}}\n"
    )
}

fn body(source: &str) -> Body {
    let module = parse(&kernel(source)).unwrap_or_else(|e| panic!("{e}"));
    module.functions[0].body.clone().expect("a body")
}

fn instruction(source: &str) -> Instruction {
    let body = body(source);
    let (_, last) = body.instructions().last().expect("an instruction");
    last.clone()
}

#[test]
fn suffixes_are_typed() {
    let i = instruction(
        ".reg .b32 %r<4>; .reg .b64 %rd<2>;\nld.relaxed.gpu.global.v2.b32 {%r0, %r1}, [%rd0+-8];",
    );
    assert_eq!(i.op, Opcode::Ld);
    assert_eq!(i.mods.sem(), Some(Sem::Relaxed));
    assert_eq!(i.mods.scope(), Some(Scope::Gpu));
    assert_eq!(i.mods.space(), Some(Space::Global));
    assert_eq!(i.mods.vec(), 2);
    assert_eq!(i.mods.ty(0), Some(Type::B32));
    let Operand::Address(a) = &i.operands[1] else { panic!("{:?}", i.operands) };
    assert_eq!(a.offset, -8);
    assert_eq!(i.operands[2], Operand::None, "no cache policy");
    assert_eq!(i.pos, Pos { line: 7, col: 1 });
}

/// ptxas takes blanks and comments in front of a suffix, not behind its dot.
#[test]
fn suffixes_may_stand_apart() {
    for (apart, together) in [
        ("lop3 .b32 %r0, %r1, 1, 2, 0x6a;", "lop3.b32 %r0, %r1, 1, 2, 0x6a;"),
        ("ld .global\n.v2 .u32 {%r0, %r1}, [%rd0];", "ld.global.v2.u32 {%r0, %r1}, [%rd0];"),
        ("bar /* all */ .cta .sync 0;", "bar.sync 0;"),
        ("@!%p1 setp .lt .u32 %p0, %r0, %r1;", "@!%p1 setp.lt.u32 %p0, %r0, %r1;"),
        ("mov.u32 %r0, %tid .y;", "mov.u32 %r0, %tid.y;"),
        ("mov.f32 %f, v .w;", "mov.f32 %f, v.w;"),
    ] {
        let of = |text: &str| {
            let registers = ".reg .b32 %r<4>; .reg .b64 %rd<2>; .reg .pred %p<2>; .reg .f32 %f;\n\
                             .reg .v4 .f32 v;\n";
            instruction(&format!("{registers}{text}"))
        };
        let (got, want) = (of(apart), of(together));
        assert_eq!((got.op, &got.mods, &got.operands), (want.op, &want.mods, &want.operands));
    }
    for bad in ["lop3. b32 %r0, %r1, 1, 2, 0x6a;", "mov.u32 %r0, %tid. x;", "mov.u32 %r0, %r1 .x;"]
    {
        assert!(parse(&kernel(&format!(".reg .b32 %r<4>;\n{bad}"))).is_err(), "{bad}");
    }
}

#[test]
fn optional_operands_keep_their_place() {
    let with =
        instruction(".reg .b32 %r<4>; .reg .pred %p<2>;\nbar.red.popc.u32 %r0, 1, 64, !%p1;");
    assert_eq!(with.operands[2], Operand::Imm(Imm::Int(64)));
    let without = instruction(".reg .b32 %r<4>; .reg .pred %p<2>;\nbar.red.popc.u32 %r0, 1, !%p1;");
    assert_eq!(without.operands[2], Operand::None);
    assert_eq!(with.operands[3], without.operands[3]);
}

#[test]
fn inner_labels_hide_outer_ones() {
    let body = body(
        ".reg .pred %p<2>;\nL: {\n@%p0 bra L;\nL:\nbra M;\n}\n{\n@%p1 bra L;\n}\nbra L;\nM: ret;",
    );
    let target = |i: usize| {
        let (_, instruction) = body.instructions().nth(i).expect("a branch");
        let Operand::Label(l) = instruction.operands[0] else { panic!("{instruction:?}") };
        (body.labels[l.index()].name.clone(), body.labels[l.index()].statement, l.0)
    };
    let place = |n: u32| {
        let at = |s: &Statement| matches!(s, Statement::Label(l) if l.0 == n);
        body.statements.iter().position(at).expect("a label") as u32
    };
    assert_eq!(target(0), ("L".into(), place(1), 1), "the inner L, although an outer one is there");
    assert_eq!(target(1), ("M".into(), place(2), 2));
    assert_eq!(target(2), ("L".into(), place(0), 0), "that scope has none of its own");
    assert_eq!(target(3), ("L".into(), place(0), 0));
}

#[test]
fn registers_are_numbered_by_use() {
    let body = body(
        ".reg .b32 %r<40000>; .reg .b32 %r1x;\nmov.b32 %r39999, %r7;\n{ .reg .b32 %r7; mov.b32 \
        %r7, %r1x; }",
    );
    let names: Vec<&str> = body.registers.iter().map(|r| r.name.as_str()).collect();
    assert_eq!(names, ["%r39999", "%r7", "%r7", "%r1x"]);
}

#[test]
fn errors_show_the_line() {
    let cases = [
        (".reg .f32 %f<4>;\n  ad.f32 %f0, %f1, %f2;", "7:3", "unknown instruction `ad.f32`"),
        (".reg .f32 %f<4>;\nadd.rx.f32 %f0, %f1, %f2;", "7:1", "`.rx` does not belong"),
        (".reg .f32 %f<4>;\nfma.f32 %f0, %f1, %f2, %f3;", "7:1", "lacks one of .rn .rz .rm .rp"),
        (".reg .f32 %f<4>;\nadd.s32 %f0, 1, 2;", "7:9", "expected a register of type .s32"),
        (".reg .f32 %f<4>;\nadd.f32 %f0, %f1;", "7:9", "takes 3 operands, found 2"),
        (".reg .f32 %f<4>;\nadd.f32 %f0, %f1, %f4;", "7:19", "register `%f4` is not declared"),
        ("bra L;", "6:5", "label `L` is not defined"),
        ("L: L: ret;", "6:4", "`L` is defined twice"),
        ("ret", "7:1", "expected an operand or `;`, found `}`"),
    ];
    for (source, place, message) in cases {
        let error = parse(&kernel(source)).expect_err(source).to_string();
        assert!(error.contains(&format!("ptx:{place}\n")), "{error}");
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn initialisers_become_bytes_and_relocations() {
    let source = ".version 8.0\n.target sm_90\n.address_size 64\n\
        .global .align 4 .b8 a[8] = {1, 0xFF, -1};\n\
        .global .f32 f[2][2] = {{0f3F800000, 2.0}, {1.5}};\n\
        .const .u64 p[2] = {a+4, generic(a)};\n\
        .global .u8 m[2] = {0xFF(a), 0xFF00(a)};\n";
    let module = parse(source).unwrap_or_else(|e| panic!("{e}"));
    let image = |name: &str| module.variable(name).expect(name).1.image().expect("an image");
    assert_eq!(image("a").bytes, [1, 255, 255, 0, 0, 0, 0, 0]);
    let f: Vec<u8> = [1f32, 2.0, 1.5, 0.0].into_iter().flat_map(f32::to_le_bytes).collect();
    assert_eq!(image("f").bytes, f);
    let p = image("p");
    assert_eq!(p.relocations.len(), 2);
    assert_eq!((p.relocations[0].addend, p.relocations[0].generic), (4, false));
    assert_eq!((p.relocations[1].offset, p.relocations[1].generic), (8, true));
    let m = image("m");
    assert_eq!((m.relocations[1].shift, m.relocations[1].size), (8, 1));
}

/// `a<2>` declares `a0` and `a1`: Triton's conversions from E4M3 have an `a` of another width
/// beside.
#[test]
fn a_family_and_a_register_may_share_a_name() {
    let body =
        ".reg .b32 a; .reg .b16 a<2>; mov.b32 a, 7; mov.b32 {a0, a1}, a; mov.b32 a, {a1, a0};";
    parse(&kernel(body)).unwrap_or_else(|e| panic!("{e}"));
    for twice in [".reg .b16 a<2>; .reg .b16 a<3>;", ".reg .b32 a; .reg .b16 a;"] {
        let error = parse(&kernel(twice)).expect_err(twice).to_string();
        assert!(error.contains('a') && error.contains("twice"), "{error}");
    }
}

/// What ptxas 13.5 takes, and what it refuses.
#[test]
fn textures_surfaces_and_scalar_video_are_what_ptxas_takes() {
    let parses = |instruction: &str| {
        let text = format!(
            ".version 8.7\n.target sm_90a\n.address_size 64\n.entry k()\n{{\n.reg .b32 %r<8>; \
             .reg .f32 %f<8>; .reg .b64 %q; .reg .pred %p; .reg .b16 %h<4>;\n{instruction}\n}}\n"
        );
        let printed = parse(&text).map(|module| module.to_string());
        if let Ok(printed) = &printed {
            let again = parse(printed).unwrap_or_else(|e| panic!("{printed}: {e}"));
            assert_eq!(&again.to_string(), printed);
        }
        printed.is_ok()
    };
    let d = "{%r4, %r5, %r6, %r7}";
    for taken in [
        format!("tex.2d.v4.u32.f32 {d}, [%q, {{%f0, %f1}}];"),
        format!("tex.2d.v4.u32.f32 {d}, [%q, {{%r0, %r1}}];"),
        format!("tex.1d.v4.u32.f32 {d}, [%q, %f0];"),
        format!("tex.1d.v4.u32.f32 {d}|%p, [%q, {{%f0}}];"),
        "tex.1d.v4.f16.f32 {%h0, %h1, %h2, %h3}, [%q, {%f0}];".into(),
        "tex.1d.v2.f16x2.f32 {%r4, %r5}, [%q, {%f0}];".into(),
        format!("tex.1d.v4.u32.f32 {d}, [%q, {{%f0}}], {{3}};"),
        format!("tex.1d.v4.u32.f32 {d}, [%q, {{%f0}}], 3;"),
        format!("tex.2d.v4.u32.f32 {d}, [%q, {{%f0, %f1}}], {{3, 4}};"),
        format!("tex.level.2d.v4.u32.s32 {d}, [%q, {{%r0, %r1}}], %r2;"),
        format!(
            "tex.grad.cube.v4.u32.f32 {d}, [%q, {{%f0, %f1, %f2, %f3}}], \
             {{%f0, %f1, %f2, %f3}}, {{%f0, %f1, %f2, %f3}};"
        ),
        format!("tld4.r.2d.v4.u32.f32 {d}, [%q, {{%f0, %f1}}];"),
        "suld.b.2d.b32.trap %r4, [%q, {%r0, %r1}];".into(),
        "suld.b.2d.v2.b8.trap {%h0, %h1}, [%q, {%r0, %r1}];".into(),
        "sust.p.2d.b32.trap [%q, {%r0, %r1}], %r2;".into(),
        format!("sust.p.a2d.v4.b32.clamp [%q, {{%r0, %r1, %r1, %r1}}], {d};"),
        "sured.b.add.2d.u32.trap [%q, {%r0, %r1}], %r2;".into(),
        "sured.p.min.2d.b64.trap [%q, {%r0, %r1}], %q;".into(),
        "txq.level.width.b32 %r4, [%q], %r1;".into(),
        "suq.array_size.b32 %r4, [%q];".into(),
        "istypep.texref %p, %q;".into(),
        "vmad.s32.s32.s32.shr7 %r4, %r0.h0, %r1.b3, %r2;".into(),
        "vmad.s32.s32.s32 %r4, -%r0.h1, %r1, %r2;".into(),
        "vadd.u32.u32.u32.sat.add %r4, %r0, %r1, %r2;".into(),
        "vadd.u32.u32.u32 %r4, %r0, %r1, %r2;".into(),
    ] {
        assert!(parses(&taken), "{taken}");
    }
    for refused in [
        format!("tex.2d.v4.u32.s32 {d}, [%q, {{%f0, %f1}}];"),
        format!("tex.3d.v4.u32.f32 {d}, [%q, {{%f0, %f1, %f2}}];"),
        format!("tex.cube.v4.u32.f32 {d}, [%q, {{%f0, %f1, %f2}}];"),
        format!("tex.a2d.v4.u32.f32 {d}, [%q, {{%r0, %f1, %f2}}];"),
        format!("tex.a2d.v4.u32.f32 {d}, [%q, {{%f0, %f1, %f2, %f2}}];"),
        format!("tex.level.2d.v4.u32.s32 {d}, [%q, {{%r0, %r1}}], %f2;"),
        "suld.b.2d.b32 %r4, [%q, {%r0, %r1}];".into(),
        "sured.p.add.2d.u32.trap [%q, {%r0, %r1}], %r2;".into(),
        "sured.b.and.2d.b64.trap [%q, {%r0, %r1}], %q;".into(),
        "sured.b.add.2d.s64.trap [%q, {%r0, %r1}], %q;".into(),
        "vmad.s32.s32.s32.po %r4, -%r0, %r1, %r2;".into(),
        "vshl.u32.u32.u32 %r4, %r0, %r1;".into(),
        "vset.u32.u32.lt.sat %r4, %r0, %r1;".into(),
        "vadd.u32.u32.u32 %r4, %r0.h2, %r1;".into(),
        "vadd.u32.u32.u32 %r4, -%r0, %r1;".into(),
    ] {
        assert!(!parses(&refused), "{refused}");
    }
}
