//! Bounds, barriers, copies and masks: one bug each in a few instructions.

use fathom_emulator::{Checks, Finding, Ub};

use crate::{BED, Bed};

fn run_block(body: &str, block: u32, checks: Checks) -> Vec<Finding> {
    Bed { block, checks, ..BED }.run(body)
}

fn kinds(body: &str) -> Vec<Ub> {
    run_block(body, 64, Checks::ALL).into_iter().map(|f| f.kind).collect()
}

/// The bug is found, whatever else it brings about.
fn finds(body: &str, kind: Ub) {
    let found = kinds(body);
    assert!(found.contains(&kind), "expected {kind}, found {found:?}");
}

const ADDRESS: &str = "mad.lo.u32 %r1, %r0, 4, %r15;\n";

#[test]
fn global_access_beyond_its_allocation() {
    let body = "mad.wide.u32 %rd1, %r0, 4, %rd0;\nst.global.u32 [%rd1+4], %r0;";
    let findings = run_block(body, 64, Checks::default());
    assert_eq!(findings[0].kind, Ub::OutOfBounds);
    assert_eq!((findings[0].warp, findings[0].lane), (1, Some(31)));
    assert!(findings[0].fatal && findings[0].allocation.as_ref().unwrap().contains("256 bytes"));
    assert_eq!(kinds("mad.wide.u32 %rd1, %r0, 4, %rd0;\nst.global.u32 [%rd1], %r0;"), []);
}

#[test]
fn misaligned_and_shared_accesses() {
    finds("ld.global.u32 %r1, [%rd0+2];", Ub::Misaligned);
    finds("st.shared.u32 [%r15+200000], %r0;", Ub::OutOfBounds);
    finds("mov.u32 %r2, 0;\nld.shared.u32 %r1, [%r2];", Ub::OutOfBounds);
}

#[test]
fn shared_memory_needs_its_barrier() {
    let exchange = |sync: &str| {
        format!(
            "{ADDRESS}st.shared.u32 [%r1], %r0;\n{sync}\nxor.b32 %r2, %r0, 32;\n\
             mad.lo.u32 %r3, %r2, 4, %r15;\nld.shared.u32 %r4, [%r3];"
        )
    };
    finds(&exchange(""), Ub::SharedRace);
    assert_eq!(kinds(&exchange("bar.sync 0;")), []);
    // Two buffers in turn, without the second barrier: the write overtakes the read.
    let again = format!("{}\nst.shared.u32 [%r1], %r4;", exchange("bar.sync 0;"));
    finds(&again, Ub::SharedRace);
}

#[test]
fn uninitialised_shared_memory() {
    finds("ld.shared.u32 %r4, [%r15+64];", Ub::Uninitialized);
}

#[test]
fn cp_async_needs_its_wait() {
    let copy = |wait: &str| {
        format!(
            "and.b32 %r5, %r0, 31;\nmad.lo.u32 %r1, %r0, 4, %r15;\n\
             mad.wide.u32 %rd1, %r0, 4, %rd0;\ncp.async.ca.shared.global [%r1], [%rd1], 4;\n\
             cp.async.commit_group;\n{wait}\nld.shared.u32 %r4, [%r1];"
        )
    };
    finds(&copy(""), Ub::AsyncNotWaited);
    finds(&copy("cp.async.wait_group 1;"), Ub::AsyncNotWaited);
    assert_eq!(kinds(&copy("cp.async.wait_group 0;")), []);
}

#[test]
fn bulk_stores_need_the_proxy_fence() {
    let store = |fence: &str| {
        format!(
            "{ADDRESS}st.shared.u32 [%r1], %r0;\n{fence}\nbar.sync 0;\n\
             setp.ne.u32 %p1, %r0, 0;\n@%p1 ret;\n\
             cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r15], 256;\n\
             cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;"
        )
    };
    finds(&store(""), Ub::MissingProxyFence);
    assert_eq!(kinds(&store("fence.proxy.async.shared::cta;")), []);
}

const BULK_LOAD: &str = "mov.u32 %r6, bar;\nsetp.ne.u32 %p1, %r0, 0;\n\
    @!%p1 mbarrier.init.shared.b64 [%r6], 1;\nbar.sync 0;\n@%p1 bra WAIT;\n\
    mbarrier.arrive.expect_tx.shared.b64 %rd5, [%r6], BYTES;\n\
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r15], [%rd0], 256, [%r6];\n\
    WAIT:\n";
const WAIT: &str = "LOOP:\nmbarrier.try_wait.parity.shared.b64 %p2, [%r6], PARITY;\n\
    @!%p2 bra LOOP;\n";
const USE: &str = "mad.lo.u32 %r1, %r0, 4, %r15;\nld.shared.u32 %r4, [%r1];";

#[test]
fn bulk_loads_need_their_mbarrier() {
    let load = BULK_LOAD.replace("BYTES", "256");
    let clean = format!("{load}{}{USE}", WAIT.replace("PARITY", "0"));
    assert_eq!(kinds(&clean), []);
    finds(&format!("{load}{USE}"), Ub::AsyncNotWaited);
    // The wrong parity lets some threads through at once; the others then wait for ever.
    let wrong = format!("{load}{}{USE}", WAIT.replace("PARITY", "1"));
    finds(&wrong, Ub::SharedRace);
    finds(&wrong, Ub::Deadlock);
    // Bytes that never come.
    let short = BULK_LOAD.replace("BYTES", "512");
    let stuck = run_block(&format!("{short}{}", WAIT.replace("PARITY", "0")), 64, Checks::ALL);
    assert_eq!(stuck.last().unwrap().kind, Ub::Deadlock);
    assert!(stuck.last().unwrap().message.contains("mbarrier.try_wait"));
}

#[test]
fn barriers_that_never_complete() {
    let body = "setp.lt.u32 %p1, %r0, 32;\n@%p1 bra A;\nbar.sync 1, 64;\nbra END;\nA:\n\
                bar.sync 2, 64;\nEND:";
    let findings = run_block(body, 64, Checks::default());
    assert_eq!(findings[0].kind, Ub::Deadlock);
    assert!(findings[0].message.contains("barrier 1") && findings[0].message.contains("barrier 2"));
}

#[test]
fn mbarriers_are_initialised_and_not_overfilled() {
    let arrive = "mov.u32 %r6, bar;\nmbarrier.arrive.shared.b64 %rd5, [%r6];";
    finds(arrive, Ub::MbarrierMisuse);
    let over = "mov.u32 %r6, bar;\nsetp.ne.u32 %p1, %r0, 0;\n@%p1 ret;\n\
                mbarrier.init.shared.b64 [%r6], 2;\nmbarrier.arrive.shared.b64 %rd5, [%r6], 3;";
    finds(over, Ub::MbarrierMisuse);
}

#[test]
fn full_masks_need_full_warps() {
    let body = "setp.lt.u32 %p1, %r0, 16;\n@%p1 shfl.sync.idx.b32 %r4, %r0, 0, 31, -1;\n\
                bar.sync 0;";
    finds(body, Ub::Divergence);
}

#[test]
fn traps_stop_the_launch() {
    let findings = run_block("setp.eq.u32 %p1, %r0, 5;\n@%p1 trap;", 64, Checks::default());
    assert_eq!((findings[0].kind, findings[0].lane), (Ub::Trap, Some(5)));
}

#[test]
fn lanes_that_spin_on_one_another_finish() {
    // A lock taken lane by lane: the holder must get on while the others spin.
    let body = "mov.u32 %r6, bar;\nsetp.ne.u32 %p1, %r0, 0;\nmov.b32 %r7, 0;\n\
                @!%p1 st.shared.u32 [%r6], %r7;\n@!%p1 st.shared.u32 [%r6+4], %r7;\nbar.sync 0;\n\
                SPIN:\natom.shared.cas.b32 %r2, [%r6], 0, 1;\nsetp.ne.u32 %p2, %r2, 0;\n\
                @%p2 bra SPIN;\nld.volatile.shared.u32 %r3, [%r6+4];\nadd.u32 %r3, %r3, 1;\n\
                st.volatile.shared.u32 [%r6+4], %r3;\natom.shared.exch.b32 %r2, [%r6], 0;\n\
                bar.sync 0;\nld.shared.u32 %r3, [%r6+4];\nsetp.ne.u32 %p3, %r3, 64;\n@%p3 trap;";
    assert_eq!(run_block(body, 64, Checks::default()), []);
}
