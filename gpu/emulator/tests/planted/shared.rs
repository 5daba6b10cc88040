//! Shared memory: its variables' bounds, its barriers, what nobody wrote.

use fathom_emulator::{Checks, LaunchConfig, Module, Params, Ub};

use crate::{BED, Bed};

#[test]
fn past_one_variable_into_the_next() {
    // `tile` has 256 words, and `bar` follows it.
    let body =
        |offset: u32| format!("mad.lo.u32 %r1, %r0, 4, %r15;\nst.shared.u32 [%r1+{offset}], %r0;");
    BED.clean(&body(768));
    let f = BED.finds(&body(772), Ub::OutOfBounds, "st.shared.u32");
    assert_eq!((f.warp, f.lane), (1, Some(31)));
    assert!(f.allocation.unwrap().contains("variable tile of 1024 bytes"));
    // Through a generic address as well.
    let generic = "cvt.u64.u32 %rd1, %r15;\ncvta.shared.u64 %rd2, %rd1;\nst.u32 [%rd2+1024], %r0;";
    BED.finds(generic, Ub::OutOfBounds, "st.u32");
    // A buffer of dynamic size reaches to the end.
    BED.clean("mov.u32 %r1, dyn;\nmad.lo.u32 %r1, %r0, 4, %r1;\nst.shared.u32 [%r1+4096], %r0;");
    BED.finds("mov.u32 %r1, dyn;\nst.shared.u32 [%r1+8192], %r0;", Ub::OutOfBounds, "st.shared");
}

#[test]
fn two_warps_write_one_word() {
    // Which write comes last matters only where the values differ.
    let body = |value: &str| {
        format!(
            "shr.u32 %r2, %r0, 5;\nand.b32 %r3, %r0, 31;\nadd.u32 %r4, %r3, {value};\n\
                 mad.lo.u32 %r1, %r3, 4, %r15;\nst.shared.u32 [%r1], %r4;\n\
                 bar.sync 0;\nld.shared.u32 %r5, [%r1];"
        )
    };
    BED.clean(&body("7"));
    BED.finds(&body("%r2"), Ub::SharedRace, "st.shared.u32");
}

/// Four warps hand their values around through shared memory, four times: whoever comes to the next
/// turn first overwrites what others have not read. `docs/found-bugs.md` has where this was found.
#[test]
fn a_reduction_in_a_loop_that_reuses_its_slots_without_a_barrier() {
    let body = |barrier: &str| {
        format!(
            "shr.u32 %r2, %r0, 5;\nmad.lo.u32 %r1, %r2, 4, %r15;\nmov.u32 %r6, 0;\nAGAIN:\n\
             and.b32 %r3, %r0, 31;\nsetp.eq.u32 %p1, %r3, 0;\nadd.u32 %r4, %r2, %r6;\n\
             @%p1 st.shared.u32 [%r1], %r4;\nbar.sync 0;\nand.b32 %r3, %r3, 3;\n\
             mad.lo.u32 %r5, %r3, 4, %r15;\nld.shared.u32 %r7, [%r5];\n{barrier}\n\
             add.u32 %r6, %r6, 1;\nsetp.lt.u32 %p2, %r6, 4;\n@%p2 bra AGAIN;"
        )
    };
    let bed = Bed { block: 128, ..BED };
    bed.clean(&body("bar.sync 0;"));
    let f = bed.finds(&body("bar.warp.sync -1;"), Ub::SharedRace, "st.shared.u32 [%r1], %r4");
    assert!(f.message.contains("read by warp"), "{f}");
}

/// One warp clears all slots, each warp fills its own: nothing orders the two.
#[test]
fn slots_that_one_warp_clears_and_others_fill() {
    let body = |barrier: &str| {
        format!(
            "shr.u32 %r2, %r0, 5;\nsetp.eq.u32 %p1, %r2, 0;\nmad.lo.u32 %r1, %r0, 4, %r15;\n\
             @%p1 st.shared.u32 [%r1], 0;\n{barrier}\nand.b32 %r3, %r0, 31;\n\
             setp.eq.u32 %p2, %r3, 0;\nmad.lo.u32 %r5, %r2, 4, %r15;\nadd.u32 %r4, %r2, 1;\n\
             @%p2 st.shared.u32 [%r5], %r4;"
        )
    };
    let bed = Bed { block: 128, ..BED };
    bed.clean(&body("bar.sync 0;"));
    bed.finds(&body(""), Ub::SharedRace, "st.shared.u32 [%r5], %r4");
}

#[test]
fn a_tree_reduction_without_its_barrier() {
    let step = |barrier: &str, n: u32| {
        format!(
            "setp.ge.u32 %p1, %r0, {n};\n@%p1 bra SKIP{n};\nld.shared.u32 %r2, [%r1+{}];\n\
             ld.shared.u32 %r3, [%r1];\nadd.u32 %r3, %r3, %r2;\nst.shared.u32 [%r1], %r3;\n\
             SKIP{n}:\n{barrier}\n",
            4 * n
        )
    };
    let body = |barrier: &str| {
        format!(
            "mad.lo.u32 %r1, %r0, 4, %r15;\nst.shared.u32 [%r1], %r0;\nbar.sync 0;\n{}{}",
            step(barrier, 64),
            step("bar.sync 0;", 32)
        )
    };
    let bed = Bed { block: 128, ..BED };
    bed.clean(&body("bar.sync 0;"));
    let f = bed.finds(&body(""), Ub::SharedRace, "st.shared.u32 [%r1], %r3");
    assert!(f.warp == 1 && f.message.contains("read by warp 0"), "{f}");
}

#[test]
fn the_wrong_barrier() {
    // Producers and consumers at two different named barriers.
    let body = |id: u32| {
        format!(
            "setp.ge.u32 %p1, %r0, 32;\n@%p1 bra CONSUMER;\nmad.lo.u32 %r1, %r0, 4, %r15;\n\
             st.shared.u32 [%r1], %r0;\nbar.arrive 1, 64;\nbar.arrive 2, 64;\nret;\nCONSUMER:\n\
             bar.sync {id}, 64;\nsub.u32 %r2, %r0, 32;\nmad.lo.u32 %r1, %r2, 4, %r15;\n\
             ld.shared.u32 %r3, [%r1];"
        )
    };
    BED.clean(&body(1));
    BED.clean(&body(2));
    // The store after the arrival that is waited for.
    let late = body(1).replace(
        "st.shared.u32 [%r1], %r0;\nbar.arrive 1, 64;",
        "bar.arrive 1, 64;\nst.shared.u32 [%r1], %r0;",
    );
    BED.finds(&late, Ub::SharedRace, "ld.shared.u32");
}

#[test]
fn a_part_that_nobody_wrote() {
    let body = |n: u32| {
        format!(
            "setp.ge.u32 %p1, %r0, {n};\nmad.lo.u32 %r1, %r0, 4, %r15;\n\
             @!%p1 st.shared.u32 [%r1], %r0;\nbar.sync 0;\nld.shared.u32 %r2, [%r1];"
        )
    };
    BED.clean(&body(64));
    let f = BED.finds(&body(63), Ub::Uninitialized, "ld.shared.u32");
    assert_eq!((f.warp, f.lane), (1, Some(31)));
}

#[test]
fn matrices_start_at_multiples_of_16() {
    let body = |offset: u32| {
        format!(
            "mad.lo.u32 %r1, %r0, 16, %r15;\nst.shared.v4.u32 [%r1], {{%r0, %r0, %r0, %r0}};\n\
             bar.sync 0;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r2}}, [%r1+{offset}];"
        )
    };
    let bed = Bed { block: 32, ..BED };
    bed.clean(&body(0));
    bed.finds(&body(8), Ub::Misaligned, "ldmatrix");
}

/// Hardware allocates shared memory in units of 128 bytes: what lies beyond the 28 that a launch
/// asks for and inside of the unit can be read. Compilers rely on it.
#[test]
fn bytes_of_the_last_unit_are_there_and_reported_where_wanted() {
    let body = |at: u32| {
        format!(
            ".visible .entry k(.param .u64 p)\n{{\n.reg .b32 %r<8>;\n.reg .b64 %rd;\n\
             mov.b32 %r0, 7;\nst.shared.u32 [dyn+16], %r0;\nst.shared.u32 [dyn+20], %r0;\n\
             st.shared.u32 [dyn+24], %r0;\n\
             ld.shared.v4.u32 {{%r1, %r2, %r3, %r4}}, [dyn+{at}];\nadd.u32 %r5, %r1, %r2;\n\
             add.u32 %r5, %r5, %r3;\nld.param.u64 %rd, [p];\nst.global.u32 [%rd], %r5;\nret;\n}}\n"
        )
    };
    let run = |at: u32, checks: Checks| {
        let device = Bed { checks, ..BED }.device();
        let text = format!(
            ".version 8.0\n.target sm_90\n.address_size 64\n\
             .extern .shared .align 16 .b8 dyn[];\n{}",
            body(at)
        );
        let module = Module::load(&device, &text).unwrap();
        let out = device.upload(&[0u32]).unwrap();
        let mut config = LaunchConfig::new([1; 3], [1; 3], Params::new().with(out).into_bytes());
        config.dynamic_shared_bytes = 28;
        let report = device.launch(&module.function("k").unwrap(), &config).unwrap();
        (device.download::<u32>(out, 1).unwrap()[0], report.findings)
    };
    let memory = Checks { memory: true, ..Checks::default() };
    assert_eq!(run(16, Checks::default()), (21, Vec::new()));
    let (sum, found) = run(16, memory);
    assert_eq!((sum, found.len()), (21, 1), "{found:?}");
    assert!(found[0].kind == Ub::OutOfBounds && !found[0].fatal, "{}", found[0]);
    assert!(found[0].message.contains("a unit of 128 bytes"), "{}", found[0]);
    for checks in [Checks::default(), memory] {
        let (_, found) = run(128, checks);
        let f = found.last().unwrap();
        assert!(f.kind == Ub::OutOfBounds && f.fatal, "{f}");
    }
}
