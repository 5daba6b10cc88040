//! wgmma: operands and accumulators touched too early, fences, descriptors.

use fathom_emulator::Ub;

use crate::{BED, Bed};

const GROUP: Bed = Bed { block: 128, ..BED };

/// Fills A (64 x 16 of 16 bits, no swizzle) and B (8 x 16) in `dyn`, and makes descriptors: `%rd3`
/// of A, `%rd4` of B.
fn operands(fence: &str) -> String {
    format!(
        "mov.u32 %r1, dyn;\nmad.lo.u32 %r2, %r0, 32, %r1;\n\
         st.shared.v4.u32 [%r2], {{0, 0, 0, 0}};\nst.shared.v4.u32 [%r2+16], {{0, 0, 0, 0}};\n\
         {fence}\nbar.sync 0;\nshr.u32 %r3, %r1, 4;\ncvt.u64.u32 %rd1, %r3;\n\
         mov.b64 %rd2, 0x0000000800400000;\nor.b64 %rd3, %rd1, %rd2;\nadd.u64 %rd1, %rd1, 128;\n\
         mov.b64 %rd2, 0x0000000800080000;\nor.b64 %rd4, %rd1, %rd2;\n\
         mov.f32 %f0, 0f00000000;\nmov.f32 %f1, 0f00000000;\nmov.f32 %f2, 0f00000000;\n\
         mov.f32 %f3, 0f00000000;\nmov.b32 %r4, 0;\nmov.b32 %r5, 0;\nmov.b32 %r6, 0;\n\
         mov.b32 %r7, 0;\n"
    )
}

const PROXY: &str = "fence.proxy.async.shared::cta;";
const FENCE: &str = "wgmma.fence.sync.aligned;\n";
const PRODUCT: &str = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 \
                       {%f0, %f1, %f2, %f3}, %rd3, %rd4, 1, 1, 1, 0, 0;\n";
const FROM_REGISTERS: &str = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 \
    {%f0, %f1, %f2, %f3}, {%r4, %r5, %r6, %r7}, %rd4, 1, 1, 1, 0;\n";
const COMMIT: &str = "wgmma.commit_group.sync.aligned;\n";
const WAIT: &str = "wgmma.wait_group.sync.aligned 0;\n";

fn products(product: &str, between: &str, after: &str) -> String {
    format!("{}{FENCE}{product}{COMMIT}{between}{WAIT}{after}", operands(PROXY))
}

#[test]
fn accumulators_before_the_wait() {
    let read = "add.f32 %f4, %f0, %f1;\n";
    GROUP.clean(&products(PRODUCT, "", read));
    let f = GROUP.finds(&products(PRODUCT, read, ""), Ub::AsyncNotWaited, "add.f32 %f4");
    assert_eq!(f.count, 4, "once a warp");
    // One group of two is waited for.
    let two = format!(
        "{}{FENCE}{PRODUCT}{COMMIT}{FROM_REGISTERS}{COMMIT}wgmma.wait_group.sync.aligned 1;\n{read}",
        operands(PROXY)
    );
    GROUP.finds(&two, Ub::AsyncNotWaited, "add.f32 %f4");
}

#[test]
fn operands_before_the_wait() {
    let overwrite = "st.shared.u32 [%r2], %r0;\n";
    GROUP.clean(&products(PRODUCT, "", &format!("bar.sync 0;\n{overwrite}")));
    GROUP.finds(&products(PRODUCT, overwrite, ""), Ub::AsyncNotWaited, "st.shared.u32 [%r2]");
    let change = "mov.b32 %r5, 1;\n";
    GROUP.clean(&products(FROM_REGISTERS, "", change));
    GROUP.finds(&products(FROM_REGISTERS, change, ""), Ub::AsyncNotWaited, "mov.b32 %r5, 1");
    // Other registers are others, whatever they share with those of a product that is under way.
    let others = "add.u32 %r8, %r0, 1;\nadd.u32 %r9, %r8, 1;\nadd.u32 %r10, %r8, %r9;\n";
    GROUP.clean(&products(FROM_REGISTERS, others, ""));
}

#[test]
fn generic_writes_are_fenced_for_the_product() {
    let body = format!("{}{FENCE}{PRODUCT}{COMMIT}{WAIT}", operands(""));
    let f = GROUP.finds(&body, Ub::MissingProxyFence, "wgmma.mma_async");
    assert!(f.address.is_some());
    // A fence for the wrong things.
    let body = format!("{}{FENCE}{PRODUCT}{COMMIT}{WAIT}", operands("fence.acq_rel.cta;"));
    GROUP.finds(&body, Ub::MissingProxyFence, "wgmma.mma_async");
}

/// Zeros by cp.async want no fence for a product, as stores do; a bulk store's source does.
#[test]
fn copies_are_not_fenced_for_the_product() {
    let copied = |wait: &str| {
        let stores =
            "st.shared.v4.u32 [%r2], {0, 0, 0, 0};\nst.shared.v4.u32 [%r2+16], {0, 0, 0, 0};";
        let copies = format!(
            "mov.b32 %r3, 0;\ncp.async.cg.shared.global [%r2], [%rd0], 16, %r3;\n\
             cp.async.cg.shared.global [%r2+16], [%rd0], 16, %r3;\n{wait}"
        );
        let operands = operands("");
        assert!(operands.contains(stores));
        format!("{}{FENCE}{PRODUCT}{COMMIT}{WAIT}", operands.replace(stores, &copies))
    };
    GROUP.clean(&copied("cp.async.wait_all;"));
    GROUP.finds(&copied(""), Ub::AsyncNotWaited, "wgmma.mma_async");
    let store = "cp.async.ca.shared.global [%r15], [%rd0], 16;\ncp.async.wait_all;\n\
                 setp.ne.u32 %p1, %r0, 0;\n@%p1 ret;\n\
                 cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r15], 16;\n\
                 cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;";
    let one = Bed { block: 1, ..BED };
    one.finds(store, Ub::MissingProxyFence, "cp.async.bulk.global");
}

/// Rows of B that one warp writes, which all four multiply: each fences its own writes, and nothing
/// orders them with the product of the others. `docs/found-bugs.md` has where this was found.
#[test]
fn rows_that_another_warp_of_the_warpgroup_writes() {
    let body = |meet: &str| {
        let zero = "setp.lt.u32 %p1, %r0, 32;\nshl.b32 %r8, %r0, 3;\nadd.u32 %r8, %r8, %r1;\n\
                    @%p1 st.shared.u32 [%r8+128], 0;\n";
        format!("{}{zero}{PROXY}\n{meet}{FENCE}{PRODUCT}{COMMIT}{WAIT}", operands(PROXY))
    };
    GROUP.clean(&body("bar.sync 0;\n"));
    let f = GROUP.finds(&body(""), Ub::SharedRace, "wgmma.mma_async");
    assert!(f.message.contains("write by warp 0"), "{f}");
}

#[test]
fn registers_are_fenced_for_the_product() {
    let body = format!("{}{PRODUCT}{COMMIT}{WAIT}", operands(PROXY));
    let f = GROUP.finds(&body, Ub::AsyncNotWaited, "wgmma.mma_async");
    assert!(f.message.contains("wgmma.fence"), "{f}");
    // The first product wants one, also where it reads no register.
    let from_zero = PRODUCT.replace("%rd4, 1, 1", "%rd4, 0, 1");
    let body = |fence: &str| format!("{}{fence}{from_zero}{COMMIT}{WAIT}", operands(PROXY));
    GROUP.clean(&body(FENCE));
    let f = GROUP.finds(&body(""), Ub::AsyncNotWaited, "wgmma.mma_async");
    assert!(f.message.contains("first wgmma"), "{f}");
    // Moves that a compiler sank below the fence are not the program's fault; what they move is.
    let sunk = |moved: &str| {
        format!("{}add.f32 %f5, %f4, %f4;\n{FENCE}{moved}{PRODUCT}{COMMIT}{WAIT}", operands(PROXY))
    };
    GROUP.clean(&sunk("mov.f32 %f0, 0f00000000;\nmov.f32 %f1, %f0;\nmov.f32 %f2, %f5;\n"));
    let computed = sunk("add.f32 %f5, %f4, %f5;\nmov.f32 %f2, %f5;\n");
    GROUP.finds(&computed, Ub::AsyncNotWaited, "wgmma.mma_async");
    // Accumulators of a product that was waited for need it only if something else wrote them.
    GROUP.clean(&products(PRODUCT, "", &format!("{PRODUCT}{COMMIT}{WAIT}")));
    let rescaled = format!("mul.f32 %f0, %f0, %f4;\n{PRODUCT}{COMMIT}{WAIT}");
    let body = products(PRODUCT, "", &rescaled);
    let found = GROUP.run(&body);
    assert!(found.iter().any(|f| f.kind == Ub::AsyncNotWaited), "{found:?}");
}

/// One product's sum becomes the next one's A: the registers that it was converted into want a
/// fence, though nothing else does. `docs/found-bugs.md` has where this was found.
#[test]
fn operands_in_registers_are_fenced_for_the_product() {
    let from_zero = FROM_REGISTERS.replace("%rd4, 1, 1", "%rd4, 0, 1");
    let body = |fence: &str| {
        let convert = "cvt.rn.bf16x2.f32 %r4, %f1, %f0;\ncvt.rn.bf16x2.f32 %r5, %f3, %f2;\n";
        products(PRODUCT, "", &format!("{convert}{fence}{from_zero}{COMMIT}{WAIT}"))
    };
    GROUP.clean(&body(FENCE));
    let f = GROUP.finds(&body(""), Ub::AsyncNotWaited, "{%r4, %r5, %r6, %r7}");
    assert!(f.message.contains("wgmma.fence"), "{f}");
}

#[test]
fn a_descriptor_beyond_shared_memory() {
    let far =
        products(PRODUCT, "", "").replace("add.u64 %rd1, %rd1, 128", "add.u64 %rd1, %rd1, 640");
    let f = GROUP.finds(&far, Ub::OutOfBounds, "wgmma.mma_async");
    assert!(f.fatal && f.message.contains("descriptor"), "{f}");
}

#[test]
fn the_descriptor_says_another_swizzle_than_the_copy() {
    // B comes by a tensor copy with a swizzle of 128 bytes, 8 rows of 64 elements.
    let body = |swizzle: &str| {
        format!(
            "{}mov.u32 %r8, bar;\nsetp.ne.u32 %p1, %r0, 0;\n\
             @!%p1 mbarrier.init.shared.b64 [%r8], 1;\nbar.sync 0;\n\
             @!%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r8], 1024;\n\
             @!%p1 cp.async.bulk.tensor.2d.shared::cluster.global.\
             mbarrier::complete_tx::bytes [%r15], [%rd14, {{0, 0}}], [%r8];\nLOOP:\n\
             mbarrier.try_wait.parity.shared.b64 %p2, [%r8], 0;\n@!%p2 bra LOOP;\n\
             shr.u32 %r9, %r15, 4;\ncvt.u64.u32 %rd5, %r9;\nmov.b64 %rd6, {swizzle};\n\
             or.b64 %rd4, %rd5, %rd6;\n{FENCE}{PRODUCT}{COMMIT}{WAIT}",
            operands(PROXY)
        )
    };
    GROUP.clean(&body("0x4000004000010000"));
    let f = GROUP.finds(&body("0x8000004000010000"), Ub::BadDescriptor, "wgmma.mma_async");
    assert!(f.message.contains("a 64-byte swizzle") && f.message.contains("a 128-byte"), "{f}");
}

#[test]
fn a_warpgroup_that_is_not_whole() {
    let half = "setp.ge.u32 %p1, %r0, 112;\n@%p1 bra END;\n";
    let body = format!("{}{half}{FENCE}END:\n", operands(PROXY));
    GROUP.finds(&body, Ub::Divergence, "wgmma.fence");
}
