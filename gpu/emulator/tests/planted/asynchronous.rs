//! Asynchronous copies: boxes beyond their buffers, reuse before a copy has read, missing waits.

use fathom_emulator::Ub;

use crate::{BED, Bed};

const WARP: Bed = Bed { block: 32, ..BED };

/// A box of 1024 bytes to `target`, waited for by all.
fn load_box(target: &str) -> String {
    format!(
        "mov.u32 %r6, bar;\nmov.u32 %r7, {target};\nsetp.ne.u32 %p1, %r0, 0;\n\
         @!%p1 mbarrier.init.shared.b64 [%r6], 1;\nbar.sync 0;\n\
         @!%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r6], 1024;\n\
         @!%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes \
         [%r7], [%rd14, {{0, 0}}], [%r6];\nLOOP:\n\
         mbarrier.try_wait.parity.shared.b64 %p2, [%r6], 0;\n@!%p2 bra LOOP;\n"
    )
}

#[test]
fn a_box_that_is_larger_than_its_buffer() {
    WARP.clean(&load_box("tile"));
    WARP.clean(&load_box("dyn"));
    let f = WARP.finds(&load_box("tile+128"), Ub::OutOfBounds, "cp.async.bulk.tensor");
    assert_eq!(f.lane, Some(0));
    assert!(f.allocation.unwrap().contains("variable tile"));
    // The last box of dynamic shared memory, half of it beyond the end.
    WARP.clean(&load_box("dyn+7168"));
    let f = WARP.finds(&load_box("dyn+7680"), Ub::OutOfBounds, "cp.async.bulk.tensor");
    assert!(f.fatal);
    WARP.finds(&load_box("tile+64"), Ub::Misaligned, "cp.async.bulk.tensor");
}

#[test]
fn a_box_that_hits_the_mbarrier() {
    // The buffer is 1024 bytes, its mbarrier lies right behind it, the copy has 2048.
    let body = load_box("tile").replace("[%r15]", "[%r7]").replace(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r7], \
         [%rd14, {0, 0}], [%r6]",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r7+16], [%rd0], \
         1024, [%r6]",
    );
    let bed = Bed { bytes: 1024, ..WARP };
    bed.finds(&body, Ub::MbarrierMisuse, "cp.async.bulk.shared");
    bed.clean(&body.replace("[%r7+16]", "[%r7]"));
}

#[test]
fn a_buffer_that_is_reused_while_a_bulk_store_reads_it() {
    let body = |wait: &str| {
        format!(
            "mad.lo.u32 %r1, %r0, 4, %r15;\nst.shared.u32 [%r1], %r0;\n\
             fence.proxy.async.shared::cta;\nbar.sync 0;\nsetp.ne.u32 %p1, %r0, 0;\n\
             @!%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r15], 128;\n\
             @!%p1 cp.async.bulk.commit_group;\n{wait}\nbar.sync 0;\nst.shared.u32 [%r1], %r0;"
        )
    };
    WARP.clean(&body("@!%p1 cp.async.bulk.wait_group.read 0;"));
    WARP.finds(&body(""), Ub::AsyncNotWaited, "st.shared.u32");
    WARP.finds(&body("@!%p1 cp.async.bulk.wait_group.read 1;"), Ub::AsyncNotWaited, "st.shared");
}

#[test]
fn a_stage_that_is_refilled_while_others_read_it() {
    // One buffer, twice: the producer must hear from the consumers first.
    let body = |empty: &str| {
        format!(
            "{}mad.lo.u32 %r1, %r0, 4, %r15;\nld.shared.u32 %r2, [%r1];\n{empty}\n\
             @!%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r6], 1024;\n\
             @!%p1 cp.async.bulk.tensor.2d.shared::cluster.global.\
             mbarrier::complete_tx::bytes [%r7], [%rd14, {{0, 0}}], [%r6];\nAGAIN:\n\
             mbarrier.try_wait.parity.shared.b64 %p3, [%r6], 1;\n@!%p3 bra AGAIN;\n",
            load_box("tile")
        )
    };
    let bed = Bed { quantum: 1, ..BED };
    bed.clean(&body("bar.sync 0;"));
    let f = bed.finds(&body("bar.warp.sync -1;"), Ub::SharedRace, "cp.async.bulk.tensor");
    assert!(f.message.contains("read by warp 1"), "{f}");
}

#[test]
fn the_wrong_phase_of_a_second_round() {
    // Both rounds wait for parity 0: the second goes through at once.
    let body = |parity: u32| {
        format!(
            "{}mad.lo.u32 %r1, %r0, 4, %r15;\nld.shared.u32 %r2, [%r1];\nbar.sync 0;\n\
             @!%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r6], 1024;\n\
             @!%p1 cp.async.bulk.tensor.2d.shared::cluster.global.\
             mbarrier::complete_tx::bytes [%r7], [%rd14, {{0, 0}}], [%r6];\nAGAIN:\n\
             mbarrier.try_wait.parity.shared.b64 %p3, [%r6], {parity};\n@!%p3 bra AGAIN;\n\
             ld.shared.u32 %r3, [%r1];",
            load_box("tile")
        )
    };
    BED.clean(&body(1));
    let found = BED.run(&body(0));
    assert!(!found.is_empty(), "a wait for the phase before");
    let kinds = [Ub::AsyncNotWaited, Ub::SharedRace, Ub::Deadlock];
    assert!(found.iter().any(|f| kinds.contains(&f.kind)), "{found:?}");
}

#[test]
fn more_bytes_than_were_announced() {
    let short = load_box("tile").replace("[%r6], 1024", "[%r6], 512");
    let f = WARP.finds(&short, Ub::Deadlock, "mbarrier.try_wait");
    assert!(
        f.message.contains("misses 1 of 1 arrivals") || f.message.contains("-512 bytes"),
        "{f}"
    );
}

#[test]
fn what_a_tensor_copy_reads_of_generic_writes() {
    let body = |fence: &str| {
        format!(
            "mad.lo.u32 %r1, %r0, 16, %r15;\nst.shared.v4.u32 [%r1], {{%r0, %r0, %r0, %r0}};\n\
             st.shared.v4.u32 [%r1+512], {{%r0, %r0, %r0, %r0}};\n{fence}\nbar.sync 0;\n\
             setp.ne.u32 %p1, %r0, 0;\n@%p1 ret;\n\
             cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd14, {{0, 0}}], [%r15];\n\
             cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;"
        )
    };
    WARP.clean(&body("fence.proxy.async.shared::cta;"));
    // The thread that copies cannot fence what the others wrote before they said so.
    WARP.finds(&body(""), Ub::MissingProxyFence, "cp.async.bulk.tensor.2d.global");
}
