//! Lanes of one warp, which nothing orders but what the program says: `bar.warp.sync` between a
//! write and what another lane does there, any meeting of the lanes between a read and a write.

use fathom_emulator::Ub;

use crate::{BED, Bed};

const WARP: Bed = Bed { block: 32, ..BED };

/// Lane 0 writes for all lanes, in the kernel's shared memory or in its buffer.
fn hand_over(between: &str, place: &str, space: &str) -> String {
    format!(
        "setp.eq.u32 %p1, %r0, 0;\nmov.u32 %r2, 5;\nmov.u32 %r4, -1;\n\
         @%p1 st.{space}.u32 [{place}], %r2;\n{between}\nld.{space}.u32 %r3, [{place}];"
    )
}

const SYNC: &str = "bar.warp.sync -1;";
const SHUFFLE: &str = "shfl.sync.idx.b32 %r6, %r2, 0, 31, -1;";

#[test]
fn a_write_of_one_lane_that_others_read() {
    for (place, space) in [("%r15", "shared"), ("%rd0", "global")] {
        let kind = if space == "shared" { Ub::SharedRace } else { Ub::GlobalRace };
        let body = |between| hand_over(between, place, space);
        WARP.clean(&body(SYNC));
        WARP.clean(&body("bar.sync 0;"));
        // Whoever has met orders no memory by that.
        for between in ["", SHUFFLE, "vote.sync.any.pred %p2, %p1, -1;"] {
            let f = WARP.finds(&body(between), kind, &format!("ld.{space}"));
            assert!(f.message.contains("write by lane 0 of the same warp"), "{f}");
            assert_eq!(f.lane, Some(1));
        }
        // A barrier of the other lanes is none of lane 0's.
        let half = "@!%p1 bar.warp.sync 0xfffffffe;";
        WARP.finds(&body(half), kind, &format!("ld.{space}"));
    }
}

#[test]
fn a_value_that_others_still_read() {
    // All lanes read what lane 0 overwrites; what they have exchanged since, they had read.
    let body = |between: &str| {
        format!(
            "setp.eq.u32 %p1, %r0, 0;\nmov.u32 %r2, 5;\n@%p1 st.shared.u32 [%r15], %r2;\n{SYNC}\n\
             ld.shared.u32 %r3, [%r15];\n{between}\n@%p1 st.shared.u32 [%r15], %r3;"
        )
    };
    WARP.clean(&body(SYNC));
    WARP.clean(&body("shfl.sync.bfly.b32 %r6, %r3, 16, 31, -1;"));
    let f = WARP.finds(&body(""), Ub::SharedRace, "st.shared.u32 [%r15], %r3");
    assert!(f.message.contains("read by lane 1 of the same warp"), "{f}");
}

#[test]
fn two_sides_of_a_branch() {
    let body = |meet: &str| {
        format!(
            "setp.lt.u32 %p1, %r0, 16;\nmov.u32 %r2, 5;\n@%p1 bra LEFT;\n{meet}\n\
             ld.shared.u32 %r3, [%r15];\nbra END;\nLEFT:\nst.shared.u32 [%r15], %r2;\n{meet}\nEND:"
        )
    };
    WARP.clean(&body(SYNC));
    let bare = WARP.run(&body(""));
    let races = bare.iter().filter(|f| f.kind == Ub::SharedRace).count();
    assert_eq!(races, 1, "{bare:?}");
}

#[test]
fn lanes_that_keep_to_their_own_are_clean() {
    // Each its own word, byte and half word, again and again, in shared and in global memory.
    let own = "shl.b32 %r1, %r0, 2;\nadd.u32 %r1, %r1, %r15;\nst.shared.u32 [%r1], %r0;\n\
               ld.shared.u32 %r3, [%r1];\nst.shared.u32 [%r1], %r3;";
    WARP.clean(own);
    let bytes = "cvt.u64.u32 %rd1, %r0;\nadd.u64 %rd2, %rd0, %rd1;\nst.global.u8 [%rd2], %r0;\n\
                 ld.global.u8 %r3, [%rd2];\nst.global.u8 [%rd2], %r3;\n\
                 setp.lt.u32 %p1, %r0, 16;\n@%p1 st.global.u8 [%rd2+64], %r0;\n\
                 @!%p1 st.global.u8 [%rd2+64], %r0;\nld.global.u8 %r3, [%rd2+64];";
    WARP.clean(bytes);
    // One value by all at once, which each may read back.
    WARP.clean("mov.u32 %r2, 9;\nst.shared.u32 [%r15], %r2;\nld.shared.u32 %r3, [%r15];");
}

#[test]
fn an_mbarrier_orders_the_lanes_that_arrive_and_wait() {
    let body = |wait: &str| {
        format!(
            "setp.eq.u32 %p1, %r0, 0;\nmov.u32 %r2, 32;\n\
             @%p1 mbarrier.init.shared.b64 [bar], 32;\n{SYNC}\n@%p1 st.shared.u32 [%r15], %r2;\n\
             mbarrier.arrive.shared.b64 %rd1, [bar];\n{wait}\nld.shared.u32 %r3, [%r15];"
        )
    };
    let wait = "AGAIN:\nmbarrier.test_wait.shared.b64 %p2, [bar], %rd1;\n@!%p2 bra AGAIN;";
    WARP.clean(&body(wait));
    WARP.finds(&body(""), Ub::SharedRace, "ld.shared");
}

#[test]
fn what_lanes_copied_is_their_own_until_they_meet() {
    // Each lane copies 4 bytes, and reads its neighbour's.
    let body = |between: &str| {
        format!(
            "shl.b32 %r1, %r0, 2;\nadd.u32 %r2, %r1, %r15;\ncvt.u64.u32 %rd1, %r1;\n\
             add.u64 %rd2, %rd0, %rd1;\ncp.async.ca.shared.global [%r2], [%rd2], 4;\n\
             cp.async.wait_all;\n{between}\nxor.b32 %r3, %r1, 4;\nadd.u32 %r3, %r3, %r15;\n\
             ld.shared.u32 %r4, [%r3];"
        )
    };
    WARP.clean(&body(SYNC));
    WARP.finds(&body(""), Ub::SharedRace, "ld.shared");
}
