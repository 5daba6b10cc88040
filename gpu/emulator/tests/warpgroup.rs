//! wgmma is one operation of four warps: what one of them does behind `wait_group` comes after what
//! all of them read, and one arrival a warpgroup hands a stage back to its producer. Shipping
//! pipelines (CUTLASS, FlashAttention-3, FlashMLA) rest on it. All elements of an operand are
//! equal here, so every element of D is 16 times their product.

use fathom_emulator::{
    Checks, Device, Finding, LaunchConfig, Module, Params, Preset, Settings, Ub,
};
use half::bf16;

/// How the warps take turns, and what is looked for.
#[derive(Clone, Copy, Debug)]
struct Turns {
    seed: u64,
    quantum: u32,
    checks: Checks,
}

fn all_turns() -> Vec<Turns> {
    let mut list = Vec::new();
    let races = Checks { races: true, ..Checks::default() };
    for checks in [Checks::default(), races, Checks::ALL] {
        for (seed, quantum) in [(0, 2000), (0, 1), (1, 2), (2, 2000), (7, 3), (11, 40), (99, 2000)]
        {
            list.push(Turns { seed, quantum, checks });
        }
    }
    list
}

/// A kernel of `threads` threads with A (64 x 16) of ones in `a`, B (8 x 16) in `b`, two mbarriers
/// at `%full` and `%empty`, and `%f0` to `%f3` stored at the end by threads below 128. B is of
/// ones at first; the buffer `%in` holds 512 bytes of twos, 512 of threes and so on.
fn kernel(body: &str) -> String {
    format!(
        ".version 8.0\n.target sm_90a\n.address_size 64\n\
         .visible .entry k(.param .u64 out, .param .u64 in)\n{{\n\
         .shared .align 128 .b8 a[2048];\n.shared .align 128 .b8 b[512];\n.shared .b64 bars[2];\n\
         .reg .pred %p<8>;\n.reg .b32 %t, %w, %r<8>, %a, %b, %full, %empty;\n\
         .reg .b64 %rd<8>, %in, %out, %da, %db;\n.reg .f32 %f<8>;\n\
         ld.param.u64 %out, [out];\nld.param.u64 %in, [in];\nmov.u32 %t, %tid.x;\n\
         shr.u32 %w, %t, 5;\nmov.u32 %a, a;\nmov.u32 %b, b;\nmov.u32 %full, bars;\n\
         add.u32 %empty, %full, 8;\n\
         setp.ge.u32 %p0, %t, 128;\nsetp.ne.u32 %p1, %t, 0;\nsetp.ge.u32 %p2, %t, 32;\n\
         mov.b32 %r0, 0x3f803f80;\nmad.lo.u32 %r1, %t, 16, %a;\n\
         @!%p0 st.shared.v4.b32 [%r1], {{%r0, %r0, %r0, %r0}};\n\
         mad.lo.u32 %r1, %t, 16, %b;\n@!%p2 st.shared.v4.b32 [%r1], {{%r0, %r0, %r0, %r0}};\n\
         @!%p1 mbarrier.init.shared.b64 [%full], 1;\n@!%p1 mbarrier.init.shared.b64 [%empty], 1;\n\
         fence.proxy.async.shared::cta;\nbar.sync 0;\n\
         shr.u32 %r1, %a, 4;\ncvt.u64.u32 %da, %r1;\nor.b64 %da, %da, 0x0000001000080000;\n\
         shr.u32 %r1, %b, 4;\ncvt.u64.u32 %db, %r1;\nor.b64 %db, %db, 0x0000001000080000;\n\
         mov.f32 %f0, 0f00000000;\nmov.f32 %f1, %f0;\nmov.f32 %f2, %f0;\nmov.f32 %f3, %f0;\n\
         {body}\n\
         @%p0 bra END;\nmul.wide.u32 %rd0, %t, 16;\nadd.u64 %out, %out, %rd0;\n\
         st.global.v4.f32 [%out], {{%f0, %f1, %f2, %f3}};\nEND:\nret;\n}}\n"
    )
}

const PRODUCT: &str = "wgmma.fence.sync.aligned;\n\
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %da, %db, 1, 1, 1, 0, 0;\n\
    wgmma.commit_group.sync.aligned;\n";
const WAIT: &str = "wgmma.wait_group.sync.aligned 0;\n";

/// The 64 x 8 results, and what was found.
fn run(text: &str, threads: u32, turns: Turns) -> (Vec<f32>, Vec<Finding>) {
    let device = Device::new(Preset::named("h800").unwrap());
    device.configure(Settings {
        checks: turns.checks,
        schedule_seed: turns.seed,
        quantum: turns.quantum,
        ..Settings::default()
    });
    let module = Module::load(&device, text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let out = device.upload(&[0f32; 512]).unwrap();
    let pieces: Vec<bf16> = (0..6 * 256).map(|i| bf16::from_f32((2 + i / 256) as f32)).collect();
    let bits: Vec<u16> = pieces.into_iter().map(bf16::to_bits).collect();
    let params = Params::new().with(out).with(device.upload(&bits).unwrap()).into_bytes();
    let config = LaunchConfig::new([1; 3], [threads, 1, 1], params);
    let report = device.launch(&module.function("k").unwrap(), &config).unwrap();
    (device.download(out, 512).unwrap(), report.findings)
}

fn check(body: &str, threads: u32, want: f32) {
    let text = kernel(body);
    for turns in all_turns() {
        let (got, findings) = run(&text, threads, turns);
        assert_eq!(findings, [], "{turns:?}\n{text}");
        let wrong = got.iter().position(|&v| v != want);
        assert_eq!(wrong, None, "{turns:?}: {:?}, expected {want}\n{text}", &got[..8]);
    }
}

/// One warp overwrites B as soon as it has waited, by stores.
#[test]
fn a_warp_overwrites_an_operand_behind_its_wait() {
    for warp in 0..4 {
        let body = format!(
            "{PRODUCT}{WAIT}setp.ne.u32 %p3, %w, {warp};\n@%p3 bra KEEP;\n\
             and.b32 %r2, %t, 31;\nmad.lo.u32 %r2, %r2, 8, %b;\nmov.b32 %r3, 0;\n\
             st.shared.v2.b32 [%r2], {{%r3, %r3}};\nKEEP:"
        );
        check(&body, 128, 16.0);
    }
}

/// The same by a bulk copy that one thread issues, while a second group is under way.
#[test]
fn a_copy_lands_behind_the_wait_for_its_group() {
    let body = format!(
        "add.u64 %rd1, %db, 16;\n{PRODUCT}{}wgmma.wait_group.sync.aligned 1;\n\
         @%p1 bra KEEP;\nmbarrier.arrive.expect_tx.shared.b64 _, [%full], 256;\n\
         cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%b], [%in], 256, \
         [%full];\nKEEP:\n{WAIT}LAST:\n\
         mbarrier.try_wait.parity.shared.b64 %p3, [%full], 0;\n@!%p3 bra LAST;",
        PRODUCT.replace("%db", "%rd1")
    );
    check(&body, 128, 32.0);
}

/// A producer warp fills one stage again and again; a warpgroup hands it back by one arrival.
fn pipeline(before_wait: &str, after_wait: &str) -> String {
    format!(
        "mov.u32 %r2, 0;\nmov.u32 %r3, 0;\n@%p0 bra PRODUCER;\nCONSUMER:\n\
         mbarrier.try_wait.parity.shared.b64 %p3, [%full], %r3;\n@!%p3 bra CONSUMER;\n\
         {PRODUCT}{before_wait}{WAIT}{after_wait}xor.b32 %r3, %r3, 1;\nadd.u32 %r2, %r2, 1;\n\
         setp.lt.u32 %p4, %r2, 6;\n@%p4 bra CONSUMER;\nbra DONE;\nPRODUCER:\n\
         setp.ne.u32 %p5, %t, 128;\n@%p5 bra DONE;\nmov.u32 %r3, 1;\nFILL:\n\
         mbarrier.try_wait.parity.shared.b64 %p3, [%empty], %r3;\n@!%p3 bra FILL;\n\
         mbarrier.arrive.expect_tx.shared.b64 _, [%full], 256;\n\
         cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%b], [%in], 256, \
         [%full];\nadd.u64 %in, %in, 512;\nxor.b32 %r3, %r3, 1;\nadd.u32 %r2, %r2, 1;\n\
         setp.lt.u32 %p4, %r2, 6;\n@%p4 bra FILL;\nDONE:"
    )
}

const ARRIVE: &str = "@!%p1 mbarrier.arrive.shared.b64 _, [%empty];\n";

#[test]
fn one_arrival_of_a_warpgroup_hands_a_stage_back() {
    check(&pipeline("", ARRIVE), 160, 16.0 * (2 + 3 + 4 + 5 + 6 + 7) as f32);
}

/// An arrival before the wait says nothing of the reads.
#[test]
fn an_arrival_before_the_wait_is_found() {
    let text = kernel(&pipeline(ARRIVE, ""));
    for turns in all_turns().into_iter().filter(|t| t.checks.races) {
        let (_, findings) = run(&text, 160, turns);
        let found = findings.iter().find(|f| f.instruction.contains("cp.async.bulk"));
        let f = found.unwrap_or_else(|| panic!("{turns:?}: {findings:?}"));
        assert_eq!(f.kind, Ub::AsyncNotWaited, "{f}");
        assert!(f.message.contains("the read by a wgmma"), "{f}");
    }
}

/// Warps of a warpgroup that do not all take part: named, with every check and without, and no
/// hang.
#[test]
fn a_warp_that_stays_away_is_named() {
    let body =
        format!("setp.eq.u32 %p3, %w, 2;\n@%p3 bra AWAY;\n{PRODUCT}{WAIT}AWAY:\nbar.sync 0;");
    let text = kernel(&body);
    for turns in all_turns() {
        let (_, findings) = run(&text, 128, turns);
        let f = findings.iter().find(|f| f.kind == Ub::Divergence);
        let f = f.unwrap_or_else(|| panic!("{turns:?}: {findings:?}"));
        assert!(f.message.contains("warps 0b0100 of the warpgroup"), "{f}");
    }
}

const ISSUE: &str = "wgmma.fence.sync.aligned;\n\
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %da, %db, 1, 1, 1, 0, 0;\n";
const ISSUE_FROM_REGISTERS: &str = "mov.b32 %r4, 0x3f803f80;\nmov.b32 %r5, %r4;\n\
    mov.b32 %r6, %r4;\nmov.b32 %r7, %r4;\nwgmma.fence.sync.aligned;\n\
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, \
    {%r4, %r5, %r6, %r7}, %db, 1, 1, 1, 0;\n";
const COMMIT: &str = "wgmma.commit_group.sync.aligned;\n";

/// Registers of a product that was not waited for. ptxas gives every read the finished value and
/// puts every write behind the product. The last column is the number under which ptxas 13.5 says
/// so (where it does not find the access dead, or renames). Plain moves, and reads of A's
/// registers, it takes without a word.
#[test]
fn registers_of_a_product_under_way_have_the_values_that_ptxas_gives() {
    let twice = "add.f32 %f4, %f0, %f0;\n";
    let copied = "mov.f32 %f0, %f4;\n";
    let cases: [(&[&str], f32, &str); 19] = [
        (&[ISSUE, COMMIT, WAIT], 16.0, ""),
        (&[ISSUE, twice, COMMIT, WAIT, copied], 32.0, "C7517"),
        (&[ISSUE, COMMIT, twice, WAIT, copied], 32.0, "C7517"),
        (&[ISSUE, COMMIT, "st.global.f32 [%out], %f0;\n", WAIT], 16.0, "C7517"),
        (&[ISSUE, COMMIT, "selp.f32 %f4, %f0, %f5, %p2;\n", WAIT], 16.0, "C7517"),
        (&[ISSUE, "mov.f32 %f4, %f0;\n", COMMIT, WAIT, copied], 16.0, ""),
        (&[ISSUE, COMMIT, "mov.f32 %f4, %f0;\n", WAIT, copied], 16.0, ""),
        (&[ISSUE, COMMIT, "mov.b32 %r4, %f0;\nmov.b32 %f4, %r4;\n", WAIT, copied], 16.0, ""),
        (
            &[ISSUE, "mov.b64 %rd1, {%f0, %f1};\n", COMMIT, WAIT, "mov.b64 {%f0, %f4}, %rd1;\n"],
            16.0,
            "",
        ),
        (
            &[ISSUE, COMMIT, "mov.f32 %f4, %f0;\nadd.f32 %f4, %f4, %f4;\n", WAIT, copied],
            32.0,
            "C7517",
        ),
        (&[ISSUE, COMMIT, "mov.f32 %f4, %f0;\nmov.f32 %f4, 0f40A00000;\n", WAIT], 16.0, ""),
        (
            &[ISSUE, COMMIT, "setp.lt.u32 %p3, %w, 9;\n@%p3 mov.f32 %f4, %f0;\n", WAIT, copied],
            16.0,
            "C7517",
        ),
        (&[ISSUE, COMMIT, "mov.f32 %f0, 0f40A00000;\n", WAIT], 5.0, "C7515"),
        (&[ISSUE, "mov.f32 %f0, 0f40A00000;\n", COMMIT, WAIT], 5.0, "C7515"),
        (&[ISSUE_FROM_REGISTERS, "mov.b32 %r5, 0;\n", COMMIT, WAIT], 16.0, "C7513"),
        (&[ISSUE_FROM_REGISTERS, COMMIT, "mov.b32 %r5, 0;\n", WAIT], 16.0, "C7513"),
        (&[ISSUE_FROM_REGISTERS, "add.u32 %r3, %r5, 1;\n", COMMIT, WAIT], 16.0, ""),
        // A part of each warp reads early, and the other does not.
        (
            &[
                ISSUE,
                "and.b32 %r2, %t, 8;\nsetp.eq.u32 %p3, %r2, 0;\nmov.f32 %f4, 0f42000000;\n\
              @%p3 bra LATE;\n",
                twice,
                "LATE:\n",
                COMMIT,
                WAIT,
                copied,
            ],
            32.0,
            "C7517",
        ),
        // Two products of one group, each read before the next.
        (
            &[
                "mov.f32 %f4, 0f00000000;\nmov.u32 %r2, 0;\nAGAIN:\n",
                ISSUE,
                "add.f32 %f4, %f4, %f0;\nadd.u32 %r2, %r2, 1;\nsetp.lt.u32 %p3, %r2, 2;\n\
               @%p3 bra AGAIN;\n",
                COMMIT,
                WAIT,
                copied,
            ],
            48.0,
            "C7517",
        ),
    ];
    for (parts, want, said) in cases {
        let text = kernel(&parts.concat());
        for turns in all_turns() {
            let (got, findings) = run(&text, 128, turns);
            let first: Vec<f32> = got.iter().step_by(4).copied().collect();
            assert_eq!(first, [want; 128], "{turns:?}\n{text}");
            let expected = turns.checks.races && !said.is_empty();
            assert_eq!(!findings.is_empty(), expected, "{turns:?}\n{findings:?}\n{text}");
            for f in &findings {
                assert_eq!(f.kind, Ub::AsyncNotWaited, "{f}");
                assert!(f.message.contains(said), "{f}\n{text}");
            }
        }
    }
}
