//! Clusters: distributed shared memory, its barriers, and CTAs that leave too early.

use fathom_emulator::Ub;

use crate::{BED, Bed};

const PAIR: Bed = Bed { grid: 2, block: 32, cluster: 2, ..BED };
const SYNC: &str = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;";

/// Each CTA writes its tile, and reads the other's.
fn exchange(first: &str, last: &str) -> String {
    format!(
        "mad.lo.u32 %r1, %r0, 4, %r15;\nst.shared.u32 [%r1], %r0;\n{first}\n\
         mov.u32 %r2, %cluster_ctarank;\nxor.b32 %r3, %r2, 1;\n\
         mapa.shared::cluster.u32 %r4, %r1, %r3;\nld.shared::cluster.u32 %r5, [%r4];\n{last}"
    )
}

#[test]
fn remote_reads_need_the_cluster_barrier() {
    PAIR.clean(&exchange(SYNC, SYNC));
    let f = PAIR.finds(&exchange("bar.sync 0;", SYNC), Ub::SharedRace, "ld.shared::cluster");
    assert!(f.message.contains("CTA rank"), "{f}");
}

#[test]
fn a_cta_exits_while_its_memory_is_read() {
    let f = PAIR.finds(&exchange(SYNC, ""), Ub::UseAfterFree, "ret");
    assert!(f.message.contains("exits while"), "{f}");
    // Rank 1 has exited when rank 0 comes to read.
    let late = |end: &str| {
        format!(
            "mad.lo.u32 %r1, %r0, 4, %r15;\nst.shared.u32 [%r1], %r0;\n\
             mapa.shared::cluster.u32 %r4, %r1, 1;\n{SYNC}\nsetp.ne.u32 %p1, %r14, 0;\n\
             @%p1 bra END;\nmov.u32 %r2, 0;\nL:\nadd.u32 %r2, %r2, 1;\n\
             setp.lt.u32 %p2, %r2, 3000;\n@%p2 bra L;\nld.shared::cluster.u32 %r5, [%r4];\n\
             END:\n{end}"
        )
    };
    PAIR.clean(&late(SYNC));
    let f = PAIR.finds(&late(""), Ub::UseAfterFree, "ld.shared::cluster");
    assert!(f.message.contains("has exited"), "{f}");
    // A relaxed arrival alone says nothing of what came before it; waiting is what counts.
    PAIR.clean(&exchange(SYNC, SYNC));
}

#[test]
fn a_rank_beyond_the_cluster() {
    let body = |rank: u32| {
        format!(
            "mad.lo.u32 %r1, %r0, 4, %r15;\nmapa.shared::cluster.u32 %r4, %r1, {rank};\n\
             st.shared::cluster.u32 [%r4], %r0;\n{SYNC}"
        )
    };
    let one = Bed { grid: 1, cluster: 1, ..PAIR };
    one.clean(&body(0));
    let f = PAIR.finds(&body(2), Ub::OutOfBounds, "st.shared::cluster");
    assert!(f.message.contains("rank 2 in a cluster of 2"), "{f}");
}

#[test]
fn remote_arrivals_after_the_initialisation() {
    // Every CTA arrives at the mbarrier of rank 0.
    let body = |sync: &str| {
        format!(
            "mov.u32 %r6, bar;\nsetp.ne.u32 %p1, %r0, 0;\n\
             @!%p1 mbarrier.init.shared.b64 [%r6], 2;\n\
             @!%p1 fence.mbarrier_init.release.cluster;\n{sync}\n@%p1 bra END;\n\
             mapa.shared::cluster.u32 %r7, %r6, 0;\n\
             mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r7];\nEND:\n{SYNC}"
        )
    };
    PAIR.clean(&body(SYNC));
    let f = PAIR.finds(&body("bar.sync 0;"), Ub::SharedRace, "mbarrier.arrive");
    assert!(f.message.contains("initialisation") && f.cta == [1, 0, 0], "{f}");
}

/// Two CTAs meet at an mbarrier each, twice. The parity that is waited for lies in shared memory,
/// and one thread turns it over when it is through: warps that have still to read it then wait for
/// the next phase, for ever. `docs/found-bugs.md` has where this was found.
#[test]
fn a_meeting_of_ctas_whose_parity_is_turned_before_all_have_read_it() {
    let meet = |i: u32, between: &str, behind: &str| {
        format!(
            "ld.shared.u32 %r4, [%r15];\n{between}\n\
             @!%p1 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r7];\n\
             LOOP{i}:\n\
             mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [%r6], %r4;\n\
             @!%p3 bra LOOP{i};\nxor.b32 %r5, %r4, 1;\n\
             @!%p1 st.shared.u32 [%r15], %r5;\n{behind}\n"
        )
    };
    let body = |between: &str| {
        format!(
            "mov.u32 %r6, bar;\nsetp.ne.u32 %p1, %r0, 0;\n\
             @!%p1 mbarrier.init.shared.b64 [%r6], 1;\n@!%p1 st.shared.u32 [%r15], 0;\n\
             @!%p1 fence.mbarrier_init.release.cluster;\nbar.sync 0;\n{SYNC}\n\
             mov.u32 %r2, %cluster_ctarank;\nxor.b32 %r3, %r2, 1;\n\
             mapa.shared::cluster.u32 %r7, %r6, %r3;\n{}{}{SYNC}",
            meet(1, between, "bar.sync 0;"),
            meet(2, between, "bar.sync 0;")
        )
    };
    let bed = Bed { block: 128, ..PAIR };
    bed.clean(&body("bar.sync 0;"));
    let f = bed.finds(&body(""), Ub::SharedRace, "st.shared.u32 [%r15], %r5");
    assert!(f.message.contains("read by warp"), "{f}");
}

#[test]
fn a_multicast_to_a_cta_that_is_not_there() {
    let body = |mask: u32| {
        format!(
            "mov.u32 %r6, bar;\nsetp.ne.u32 %p1, %r0, 0;\n\
             @!%p1 mbarrier.init.shared.b64 [%r6], 1;\n\
             @!%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r6], 256;\n{SYNC}\n\
             mov.u32 %r2, %cluster_ctarank;\nor.b32 %r3, %r2, %r0;\nsetp.ne.u32 %p2, %r3, 0;\n\
             .reg .b16 %m;\nmov.b16 %m, {mask};\n@!%p2 cp.async.bulk.shared::cluster.global.\
             mbarrier::complete_tx::bytes.multicast::cluster [%r15], [%rd0], 256, [%r6], %m;\n\
             LOOP:\nmbarrier.try_wait.parity.shared.b64 %p3, [%r6], 0;\n@!%p3 bra LOOP;\n{SYNC}"
        )
    };
    PAIR.clean(&body(3));
    PAIR.finds(&body(7), Ub::BadDescriptor, "multicast");
    // One CTA less than the mask should name: the other waits for ever.
    let f = PAIR.finds(&body(1), Ub::Deadlock, "mbarrier.try_wait");
    assert!(f.message.contains("misses 0 of 1 arrivals and 256 bytes"), "{f}");
}

#[test]
fn a_cluster_barrier_that_one_warp_skips() {
    let body = "setp.ge.u32 %p1, %r0, 32;\n@%p1 bra OTHER;\nbarrier.cluster.arrive;\n\
                barrier.cluster.wait;\nret;\nOTHER:\nbar.sync 1, 64;";
    let f = Bed { block: 64, ..PAIR }.finds(body, Ub::Deadlock, "");
    assert!(f.message.contains("waits at the cluster barrier"), "{f}");
    assert!(f.message.contains("waits at barrier 1"), "{f}");
}
