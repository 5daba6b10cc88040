//! Barriers, mbarriers, masks and registers used against their rules.

use fathom_emulator::Ub;

use crate::{BED, Bed};

#[test]
fn barriers_with_two_counts() {
    let body = |count: u32| {
        format!(
            "setp.ge.u32 %p1, %r0, 32;\n@%p1 bra B;\nbar.sync 1, 64;\nret;\nB:\nbar.sync 1, {count};"
        )
    };
    BED.clean(&body(64));
    let f = BED.finds(&body(96), Ub::BarrierMisuse, "bar.sync 1");
    assert!(f.message.contains("64 threads") && f.message.contains("96 threads"), "{f}");
    BED.finds("bar.sync 16;", Ub::BarrierMisuse, "bar.sync 16");
    BED.finds("bar.sync 1, 48;", Ub::BarrierMisuse, "48");
}

#[test]
fn a_barrier_inside_of_a_branch() {
    let body = "setp.lt.u32 %p1, %r0, 16;\n@!%p1 bra END;\nbar.sync 0;\nEND:\nbar.sync 0;";
    let bed = Bed { block: 32, ..BED };
    let f = bed.finds(body, Ub::Divergence, "bar.sync 0");
    assert!(f.message.contains("0xffff0000"), "{f}");
    // Whole warps may part ways, and exited lanes do not count.
    BED.clean("setp.lt.u32 %p1, %r0, 32;\n@%p1 bra END;\nbar.sync 1, 32;\nEND:\nbar.sync 0;");
    BED.clean("setp.ge.u32 %p1, %r0, 40;\n@%p1 ret;\nbar.sync 0;");
}

/// Sides meet behind their branch though one of them could trap or leave the kernel on the way: no
/// lane would come back from there.
#[test]
fn a_side_that_may_trap_or_exit_meets_the_other() {
    let bed = Bed { block: 64, ..BED };
    for (stop, who) in [("trap;", 100), ("exit;", 100), ("exit;", 20), ("ret;", 20), ("ret;", 100)]
    {
        let side = |end: &str| {
            format!(
                "and.b32 %r1, %r0, 31;\nsetp.gt.u32 %p1, %r1, 15;\n@!%p1 bra MEET;\n\
                 setp.eq.u32 %p2, %r0, {who};\n@%p2 bra STOP;\nadd.u32 %r2, %r1, 1;\nMEET:\n\
                 bar.sync 0;\nshfl.sync.idx.b32 %r3, %r1, 3, 31, -1;\n{end}\nSTOP:\n{stop}"
            )
        };
        bed.clean(&side("ret;"));
        // The rest has several ends of its own.
        bed.clean(&side("setp.lt.u32 %p3, %r0, 40;\n@%p3 bra OTHER;\nret;\nOTHER:\nexit;"));
    }
    // In a function, whose return is no exit.
    let module = ".func f(.param .b32 a)\n{\n.reg .b32 %a, %b;\n.reg .pred %p<3>;\n\
                  ld.param.u32 %a, [a];\nand.b32 %b, %a, 31;\nsetp.gt.u32 %p0, %b, 15;\n\
                  @!%p0 bra MEET;\nsetp.eq.u32 %p1, %a, 20;\n@%p1 bra STOP;\n\
                  setp.eq.u32 %p2, %a, 21;\n@%p2 ret;\nMEET:\nbar.warp.sync 0x7fdfffff;\nret;\n\
                  STOP:\nexit;\n}\n";
    let call = "{\n.param .b32 a;\nst.param.b32 [a], %r0;\ncall f, (a);\n}\nbar.sync 0;";
    let bed = Bed { block: 31, module, ..BED };
    bed.clean(call);
}

#[test]
fn lanes_that_leave_a_long_loop_early_wait_at_the_barrier() {
    let body = "setp.eq.u32 %p1, %r0, 3;\nselp.u32 %r2, 1, 30000, %p1;\nmov.u32 %r1, 0;\nL:\n\
                add.u32 %r1, %r1, 1;\nsetp.lt.u32 %p2, %r1, %r2;\n@%p2 bra L;\nbar.sync 0;";
    BED.clean(body);
}

#[test]
fn masks_name_the_lanes_that_execute() {
    let bed = Bed { block: 32, ..BED };
    bed.clean("setp.lt.u32 %p1, %r0, 16;\n@%p1 vote.sync.any.pred %p2, %p1, 65535;");
    // Members that have exited are not waited for, others for ever.
    let vote = "setp.lt.u32 %p1, %r0, 16;\n@%p1 vote.sync.any.pred %p2, %p1, -1;\n";
    bed.clean(vote);
    let f = bed.finds(&format!("{vote}bar.warp.sync -1;"), Ub::Deadlock, "vote.sync");
    assert!(f.message.contains("waits for lanes 0xffff0000 of its mask"), "{f}");
    // Lanes that are not in the mask execute it.
    let f = bed.finds("shfl.sync.idx.b32 %r1, %r0, 0, 31, 255;", Ub::Divergence, "shfl.sync");
    assert!(f.message.contains("0xffffff00"), "{f}");
    bed.finds("bar.warp.sync 1;", Ub::Divergence, "bar.warp.sync");
    bed.finds("redux.sync.add.u32 %r1, %r0, 3;", Ub::Divergence, "redux.sync");
    let mma = "setp.lt.u32 %p1, %r0, 16;\n@%p1 mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 \
               {%f0, %f1, %f2, %f3}, {%r1, %r2}, {%r3}, {%f0, %f1, %f2, %f3};";
    bed.finds(mma, Ub::Divergence, "mma.sync");
}

/// A lane waits for an mbarrier at which the others arrive behind the place where they meet.
#[test]
fn lanes_that_wait_to_meet_are_let_go_before_all_is_given_up() {
    let bed = Bed { block: 32, ..BED };
    bed.clean(
        "mov.u32 %r6, bar;\nsetp.ne.u32 %p1, %r0, 0;\n@!%p1 mbarrier.init.shared.b64 [%r6], 31;\n\
         bar.sync 0;\n@%p1 bra MEET;\nWAIT:\n\
         mbarrier.try_wait.parity.shared.b64 %p2, [%r6], 0;\n@!%p2 bra WAIT;\nMEET:\n\
         @!%p1 bra END;\nmbarrier.arrive.shared.b64 _, [%r6];\nEND:",
    );
}

/// The rest of the warp waits at a barrier of the CTA, and another warp spins until this one is
/// through: reported at once, and it goes on.
#[test]
fn a_mask_too_wide_in_front_of_a_barrier_holds_nobody_up() {
    let body = "mov.u32 %r6, bar;\nsetp.eq.u32 %p1, %r0, 0;\nmov.b32 %r7, 0;\n\
                @%p1 st.volatile.shared.u32 [%r6], %r7;\nbar.sync 0;\nsetp.ge.u32 %p1, %r0, 32;\n\
                @%p1 bra SPIN;\nsetp.ge.u32 %p2, %r0, 8;\n@%p2 bra MEET;\n\
                shfl.sync.bfly.b32 %r2, %r0, 4, 31, -1;\nMEET:\nbar.sync 1, 32;\n\
                mov.b32 %r7, 1;\nst.volatile.shared.u32 [%r6], %r7;\nret;\nSPIN:\n\
                ld.volatile.shared.u32 %r3, [%r6];\nsetp.eq.u32 %p2, %r3, 0;\n@%p2 bra SPIN;";
    let found = BED.run(body);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].kind == Ub::Divergence && !found[0].fatal, "{}", found[0]);
}

#[test]
fn mbarriers_have_one_life_at_a_time() {
    let one = Bed { block: 1, ..BED };
    let init = "mov.u32 %r6, bar;\nmbarrier.init.shared.b64 [%r6], 1;\n";
    let twice = |between: &str| format!("{init}{between}\nmbarrier.init.shared.b64 [%r6], 2;");
    one.clean(&twice("mbarrier.inval.shared.b64 [%r6];"));
    one.finds(&twice(""), Ub::MbarrierMisuse, "mbarrier.init.shared.b64 [%r6], 2");
    let used =
        format!("{init}mbarrier.inval.shared.b64 [%r6];\nmbarrier.arrive.shared.b64 _, [%r6];");
    one.finds(&used, Ub::MbarrierMisuse, "mbarrier.arrive");
    let wait = format!(
        "{init}mbarrier.inval.shared.b64 [%r6];\n\
                        mbarrier.test_wait.parity.shared.b64 %p1, [%r6], 0;"
    );
    one.finds(&wait, Ub::MbarrierMisuse, "mbarrier.test_wait");
    let stored = format!("{init}st.shared.u32 [%r6+4], %r0;");
    one.finds(&stored, Ub::MbarrierMisuse, "st.shared.u32");
    one.finds(
        &format!("{init}mbarrier.arrive.noComplete.shared.b64 %rd1, [%r6], 1;"),
        Ub::MbarrierMisuse,
        "noComplete",
    );
    let misplaced = "mov.u32 %r6, bar;\nmbarrier.init.shared.b64 [%r6+4], 1;";
    let found = one.run(misplaced);
    assert!(matches!(found[0].kind, Ub::Misaligned | Ub::MbarrierMisuse), "{found:?}");
}

#[test]
fn an_mbarrier_before_its_initialisation_is_known() {
    let body = |barrier: &str| {
        format!(
            "mov.u32 %r6, bar;\nsetp.ne.u32 %p1, %r0, 0;\n\
             @!%p1 mbarrier.init.shared.b64 [%r6], 64;\n{barrier}\n\
             mbarrier.arrive.shared.b64 _, [%r6];\nLOOP:\n\
             mbarrier.try_wait.parity.shared.b64 %p2, [%r6], 0;\n@!%p2 bra LOOP;"
        )
    };
    BED.clean(&body("bar.sync 0;"));
    let f = BED.finds(&body("bar.warp.sync -1;"), Ub::SharedRace, "mbarrier.arrive");
    assert!(f.message.contains("initialisation") && f.warp == 1, "{f}");
    let f = BED.finds(&body(""), Ub::SharedRace, "mbarrier.arrive");
    assert!(f.message.contains("by lane 0 of the same warp") && f.warp == 0, "{f}");
}

#[test]
fn one_arrival_too_few() {
    let body = |count: u32| {
        format!(
            "mov.u32 %r6, bar;\nsetp.ne.u32 %p1, %r0, 0;\n\
             @!%p1 mbarrier.init.shared.b64 [%r6], {count};\nbar.sync 0;\n\
             mbarrier.arrive.shared.b64 _, [%r6];\nLOOP:\n\
             mbarrier.try_wait.parity.shared.b64 %p2, [%r6], 0;\n@!%p2 bra LOOP;"
        )
    };
    BED.clean(&body(64));
    let f = BED.finds(&body(65), Ub::Deadlock, "mbarrier.try_wait");
    assert!(f.message.contains("misses 1 of 65 arrivals"), "{f}");
    assert!(f.address.is_some());
}

#[test]
fn two_locks_in_two_orders() {
    // Warp 0 takes a then b, warp 1 b then a; both hold one before they ask for the other.
    let take = |at: u32, label: &str| {
        format!(
            "{label}:\natom.shared.cas.b32 %r2, [%r15+{at}], 0, 1;\n\
                 setp.ne.u32 %p2, %r2, 0;\n@%p2 bra {label};\n"
        )
    };
    let body = format!(
        "and.b32 %r1, %r0, 31;\nsetp.eq.u32 %p3, %r0, 0;\n@%p3 st.shared.v2.u32 [%r15], {{0, 0}};\n\
         bar.sync 0;\nsetp.ne.u32 %p1, %r1, 0;\n@%p1 ret;\nsetp.ge.u32 %p4, %r0, 32;\n\
         @%p4 bra SECOND;\n{}bar.arrive 1, 64;\nbar.sync 2, 64;\n{}ret;\nSECOND:\n{}\
         bar.sync 1, 64;\nbar.arrive 2, 64;\n{}",
        take(0, "A1"),
        take(4, "B1"),
        take(4, "B2"),
        take(0, "A2")
    );
    let f = BED.finds(&body, Ub::Deadlock, "");
    assert!(f.message.contains("warp 0") && f.message.contains("warp 1"), "{f}");
}

#[test]
fn registers_that_nobody_gives_back() {
    // 384 threads have 168 registers each; two warpgroups of 240 and one of 24 fit, of 40 not.
    let body = |low: u32| {
        format!(
            "setp.ge.u32 %p1, %r0, 128;\n@%p1 bra MATH;\n\
             setmaxnreg.dec.sync.aligned.u32 {low};\nret;\nMATH:\n\
             setmaxnreg.inc.sync.aligned.u32 240;"
        )
    };
    let bed = Bed { block: 384, directives: ".maxntid 384", ..BED };
    bed.clean(&body(24));
    let f = bed.finds(&body(40), Ub::Deadlock, "setmaxnreg");
    assert!(f.message.contains("waits for registers, to have 240 a thread"), "{f}");
    // Where two CTAs are to fit, 256 threads start with 128 registers each.
    let two = Bed { block: 256, directives: ".maxntid 256\n.minnctapersm 2", ..BED };
    two.clean(&body(40).replace("240", "160"));
    // More from a dec, and warps of one warpgroup that do not agree.
    bed.finds("setmaxnreg.dec.sync.aligned.u32 200;", Ub::BarrierMisuse, "setmaxnreg");
    let split = "setp.ge.u32 %p1, %r0, 32;\n@%p1 bra B;\nsetmaxnreg.dec.sync.aligned.u32 160;\n\
                 ret;\nB:\nsetmaxnreg.dec.sync.aligned.u32 152;";
    bed.finds(split, Ub::Divergence, "setmaxnreg");
}

#[test]
fn a_failed_assertion_and_runaway_recursion() {
    let module = ".extern .func __assertfail (.param .b64 a, .param .b64 b, .param .b32 c, \
                  .param .b64 d, .param .b64 e);\n\
                  .global .align 1 .b8 text[6] = {105, 32, 60, 32, 110, 0};\n\
                  .func deep (.param .b32 n);\n\
                  .func deep (.param .b32 n)\n{\n.param .b32 m;\ncall deep, (m);\nret;\n}\n";
    let bed = Bed { module, ..BED };
    let body = "setp.ne.u32 %p1, %r0, 37;\n@%p1 ret;\n{\n.param .b64 a;\n.param .b64 b;\n\
                .param .b32 c;\n.param .b64 d;\n.param .b64 e;\nmov.u64 %rd1, text;\n\
                cvta.global.u64 %rd1, %rd1;\nst.param.b64 [a], %rd1;\nst.param.b64 [b], %rd1;\n\
                st.param.b32 [c], 12;\nst.param.b64 [d], %rd1;\nst.param.b64 [e], 1;\n\
                call __assertfail, (a, b, c, d, e);\n}";
    let f = bed.finds(body, Ub::Trap, "call __assertfail");
    assert!(f.message.contains("`i < n`"), "{f}");
    assert_eq!((f.warp, f.lane), (1, Some(5)));
    let endless = "{\n.param .b32 n;\nst.param.b32 [n], 1;\ncall deep, (n);\n}";
    bed.finds(endless, Ub::BadControlFlow, "call deep");
}

/// Libraries keep functions in tables, of which a launch calls one: an instruction that is not
/// emulated stops who comes to it.
#[test]
fn what_is_not_emulated_stops_who_calls_it() {
    let module = ".func far(.param .u32 p)\n{\n.reg .b64 %m; .reg .b32 %v;\nmov.u64 %m, 0;\n\
                  multimem.cp.async.bulk.global.shared::cta.bulk_group [%m], [%v], 16;\nret;\n}\n";
    let call = |who: u32| {
        format!("setp.eq.u32 %p0, %r0, {who};\n@%p0 call far, (0);\nadd.u32 %r1, %r0, 1;")
    };
    let bed = Bed { module, ..BED };
    bed.clean(&call(4096));
    let found = &bed.run(&call(3))[0];
    assert_eq!((found.kind, found.kernel.as_str(), found.lane), (Ub::NotEmulated, "k", Some(3)));
    assert!(found.message.contains("multimem.cp.async.bulk"), "{found}");
}

/// Where its guard is false, nobody comes to it; known by name alone, unknown, and in the table.
#[test]
fn what_is_not_emulated_stops_only_whom_its_guard_lets() {
    for instruction in [
        "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned",
        "later.instruction.b32 %r1, [%rd1], unheard",
        "multimem.cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], 16",
    ] {
        let body = |who: u32| {
            format!("setp.ne.u32 %p0, %r0, {who};\n@!%p0 {instruction};\nadd.u32 %r1, %r0, 1;")
        };
        BED.clean(&body(4096));
        let found = &BED.run(&body(3))[0];
        assert_eq!((found.kind, found.lane), (Ub::NotEmulated, Some(3)), "{found}");
        let name = instruction.split(' ').next().unwrap();
        assert!(found.message.contains(name), "{found}");
    }
}
