//! Global memory: bounds, lifetime, initialisation, and races between CTAs.

use fathom_emulator::{Finding, LaunchConfig, Module, Params, Ub, launch_together};

use crate::{BED, Bed, check_places, module_text, tensor_map};

const TWO: Bed = Bed { grid: 2, block: 32, ..BED };
/// `%rd1` is the address of thread `%r0`'s word of the buffer.
const WORD: &str = "mad.wide.u32 %rd1, %r0, 4, %rd0;\n";

#[test]
fn before_the_start_of_an_allocation() {
    let f = BED.finds("ld.global.u32 %r1, [%rd0+-4];", Ub::OutOfBounds, "ld.global.u32");
    assert!(f.allocation.unwrap().contains("4 bytes before"));
    BED.clean("ld.global.u32 %r1, [%rd0+252];");
}

#[test]
fn off_by_one_in_a_guard() {
    // 40 elements, and a guard that lets 65 threads through.
    let body = |compare: &str| {
        format!("setp.{compare}.u32 %p1, %r0, 40;\n@%p1 ret;\n{WORD}st.global.u32 [%rd1], %r0;")
    };
    let bed = Bed { bytes: 160, ..BED };
    bed.clean(&body("ge"));
    let f = bed.finds(&body("gt"), Ub::OutOfBounds, "st.global.u32");
    assert_eq!((f.warp, f.lane), (1, Some(8)));
}

#[test]
fn wide_loads_are_aligned() {
    let f = BED.finds("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd0+8];", Ub::Misaligned, "v4");
    assert_eq!(f.lane, Some(0));
    BED.clean("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd0+16];");
    BED.finds("atom.global.add.u64 %rd1, [%rd0+4], 1;", Ub::Misaligned, "atom");
}

#[test]
fn freed_memory() {
    let device = BED.device();
    let text = module_text("", "", "ld.global.u32 %r1, [%rd0];");
    let module = Module::load(&device, &text).unwrap();
    let buffer = device.upload(&[7u8; 256]).unwrap();
    let config = BED.config(&device, buffer);
    let kernel = module.function("k").unwrap();
    assert_eq!(device.launch(&kernel, &config).unwrap().findings, []);
    device.free(buffer).unwrap();
    let found = device.launch(&kernel, &config).unwrap().findings;
    check_places(&found);
    assert_eq!((found[0].kind, found[0].address), (Ub::UseAfterFree, Some(buffer)));
    assert!(found[0].allocation.as_ref().unwrap().contains("freed"));
}

#[test]
fn freed_twice_in_a_kernel() {
    let module = ".extern .func (.param .b64 r) malloc(.param .b64 n);\n\
                  .extern .func free(.param .b64 p);\n";
    let free = "st.param.b64 [q], %rd1;\ncall.uni free, (q);\n";
    let body = |more: &str| {
        format!(
            ".param .b64 q;\n.param .b64 s;\nst.param.b64 [q], 32;\n\
             call.uni (s), malloc, (q);\nld.param.b64 %rd1, [s];\nst.u32 [%rd1+28], %r0;\n\
             {free}{more}"
        )
    };
    let bed = Bed { module, ..BED };
    bed.clean(&body(""));
    bed.finds(&body(free), Ub::UseAfterFree, "call.uni free");
}

/// What is found in a buffer of 256 bytes of which the host wrote the first.
fn partly_written(body: &str, written: usize) -> Vec<Finding> {
    let device = BED.device();
    let module = Module::load(&device, &module_text("", "", body)).unwrap();
    let buffer = device.alloc(256).unwrap();
    device.write(buffer, &vec![1; written]).unwrap();
    let config = BED.config(&device, buffer);
    device.launch(&module.function("k").unwrap(), &config).unwrap().findings
}

#[test]
fn memory_that_nobody_wrote() {
    let body = format!("{WORD}ld.global.u32 %r1, [%rd1];");
    assert_eq!(partly_written(&body, 256), []);
    let found = partly_written(&body, 200);
    assert_eq!((found[0].kind, found[0].warp, found[0].lane), (Ub::Uninitialized, 1, Some(18)));
    assert!(found[0].allocation.as_ref().unwrap().contains("200 bytes into"));
}

/// A structure is loaded with its padding, which nobody wrote and nothing uses.
#[test]
fn padding_that_is_loaded_with_the_rest() {
    let load = |more: &str| {
        format!("ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd0];\nadd.u32 %r5, %r1, %r3;\n{more}")
    };
    let kinds = |body: &str, written: usize| -> Vec<Ub> {
        partly_written(body, written).iter().map(|f| f.kind).collect()
    };
    let both = load("add.u32 %r5, %r2, 1;");
    assert_eq!(kinds(&both, 12), []);
    assert_eq!(kinds(&both, 8), [Ub::Uninitialized], "%r3 is used");
    assert_eq!(kinds(&load("add.u32 %r5, %r2, %r4;"), 12), [Ub::Uninitialized]);
    let found = partly_written(&load("add.u32 %r5, %r4, 1;"), 4);
    assert_eq!(found.len(), 1);
    assert!(found[0].allocation.as_ref().unwrap().starts_with("8 bytes into"), "{found:?}");
    // Of a load that nothing uses all bytes count.
    assert_eq!(kinds("ld.global.v2.u32 {%r1, %r2}, [%rd0];", 4), [Ub::Uninitialized]);
}

#[test]
fn local_arrays() {
    let body = |index: u32| {
        format!(
            ".local .align 4 .b8 first[64];\n.local .align 4 .b8 second[64];\n\
             mov.u64 %rd1, first;\nmov.u64 %rd2, second;\nst.local.u32 [%rd2], %r0;\n\
             st.local.u32 [%rd1+{index}], %r0;"
        )
    };
    BED.clean(&body(60));
    // The word behind the first array belongs to the second.
    let f = BED.finds(&body(64), Ub::OutOfBounds, "st.local.u32 [%rd1");
    assert!(f.allocation.unwrap().contains("variable first of 64 bytes"));
    assert!(BED.finds(&body(4000), Ub::OutOfBounds, "st.local").count > 0);
}

#[test]
fn ctas_that_write_the_same_word() {
    let own = "mad.lo.u32 %r1, %r14, 32, %r0;\nmad.wide.u32 %rd1, %r1, 4, %rd0;\n\
               st.global.u32 [%rd1], %r0;";
    TWO.clean(own);
    let f = TWO.finds(&format!("{WORD}st.global.u32 [%rd1], %r0;"), Ub::GlobalRace, "st.global");
    assert!(f.message.contains("CTA (0, 0, 0), warp 0"), "{f}");
    assert_eq!(f.cta, [1, 0, 0]);
    assert!(f.allocation.unwrap().contains("of 256 bytes"));
}

#[test]
fn a_histogram_without_atomics() {
    let plain = "ld.global.u32 %r1, [%rd0];\nadd.u32 %r1, %r1, 1;\nst.global.u32 [%rd0], %r1;";
    TWO.finds(plain, Ub::GlobalRace, "st.global.u32");
    TWO.clean("red.global.add.u32 [%rd0], 1;");
    // A plain read beside atomics is a race too.
    let mixed = "red.global.add.u32 [%rd0], 1;\nld.global.u32 %r1, [%rd0];";
    TWO.finds(mixed, Ub::GlobalRace, "red.global.add");
    TWO.clean("red.global.add.u32 [%rd0], 1;\nld.relaxed.gpu.global.u32 %r1, [%rd0];");
}

/// CTA 0 writes data and raises a flag; CTA 1 waits for the flag and reads.
fn message(release: &str, acquire: &str) -> String {
    format!(
        "setp.ne.u32 %p1, %r14, 0;\n@%p1 bra READER;\n{WORD}st.global.u32 [%rd1], %r0;\n\
         bar.warp.sync -1;\nsetp.ne.u32 %p2, %r0, 0;\n@%p2 ret;\n{release}\nret;\n\
         READER:\nLOOP:\n{acquire}\nsetp.ne.u32 %p3, %r2, 1;\n@%p3 bra LOOP;\n\
         {WORD}ld.global.u32 %r3, [%rd1];"
    )
}

#[test]
fn messages_are_released_and_acquired() {
    let release = "st.release.gpu.global.u32 [%rd0+128], 1;";
    let acquire = "ld.acquire.gpu.global.u32 %r2, [%rd0+128];";
    TWO.clean(&message(release, acquire));
    let relaxed_store = "st.relaxed.gpu.global.u32 [%rd0+128], 1;";
    let relaxed_load = "ld.relaxed.gpu.global.u32 %r2, [%rd0+128];";
    let fenced =
        |fence: &str| (format!("{fence}\n{relaxed_store}"), format!("{relaxed_load}\n{fence}"));
    let (store, load) = fenced("fence.acq_rel.gpu;");
    TWO.clean(&message(&store, &load));
    let (store, load) = fenced("membar.gl;");
    TWO.clean(&message(&store, &load));
    for (store, load) in [
        (relaxed_store, acquire),
        (release, relaxed_load),
        ("membar.cta;\nst.relaxed.gpu.global.u32 [%rd0+128], 1;", acquire),
        ("st.volatile.global.u32 [%rd0+128], 1;", "ld.volatile.global.u32 %r2, [%rd0+128];"),
    ] {
        let f = TWO.finds(&message(store, load), Ub::GlobalRace, "ld.global.u32 %r3");
        assert_eq!(f.cta, [1, 0, 0]);
    }
}

/// Each CTA writes; the one that comes last, by a ticket, reads what all wrote.
fn last_block(barrier: &str, fence: &str) -> String {
    format!(
        "mad.lo.u32 %r1, %r14, 64, %r0;\nmad.wide.u32 %rd1, %r1, 4, %rd0;\n\
         st.global.u32 [%rd1], %r0;\n{fence}\n{barrier}\nsetp.ne.u32 %p1, %r0, 0;\n\
         @%p1 bra WAIT;\natom.global.add.u32 %r2, [%rd0+2048], 1;\nst.shared.u32 [%r15], %r2;\n\
         WAIT:\nbar.sync 0;\nld.shared.u32 %r3, [%r15];\nsetp.ne.u32 %p2, %r3, 117901066;\n\
         @%p2 ret;\n{fence}\nmad.wide.u32 %rd2, %r0, 4, %rd0;\n\
         ld.global.u32 %r4, [%rd2];\nld.global.u32 %r5, [%rd2+256];"
    )
}

#[test]
fn the_last_block_needs_fence_and_barrier() {
    // The ticket counts from 0x07070707, so the fourth CTA draws 0x0707070a.
    let bed = Bed { grid: 4, block: 64, bytes: 4096, ..BED };
    bed.clean(&last_block("bar.sync 0;", "membar.gl;"));
    bed.finds(&last_block("bar.sync 0;", ""), Ub::GlobalRace, "ld.global.u32");
    let f = bed.finds(&last_block("", "membar.gl;"), Ub::GlobalRace, "ld.global.u32");
    assert!(f.message.contains("warp 1"), "the warp that did not take the ticket: {f}");
}

#[test]
fn a_grid_barrier() {
    // Each CTA counts itself in, and waits for all.
    let body = |counts: &str| {
        format!(
            "mad.lo.u32 %r1, %r14, 32, %r0;\nmad.wide.u32 %rd1, %r1, 4, %rd0;\n\
             st.global.u32 [%rd1], %r0;\nbar.sync 0;\nsetp.ne.u32 %p1, %r0, 0;\n@%p1 bra GO;\n\
             {counts}\nLOOP:\nld.acquire.gpu.global.u32 %r2, [%rd0+512];\n\
             setp.ne.u32 %p2, %r2, 117901065;\n@%p2 bra LOOP;\nGO:\nbar.sync 0;\n\
             xor.b32 %r3, %r1, 32;\nmad.wide.u32 %rd2, %r3, 4, %rd0;\nld.global.u32 %r4, [%rd2];"
        )
    };
    let bed = Bed { bytes: 1024, ..TWO };
    bed.clean(&body("red.release.gpu.global.add.u32 [%rd0+512], 1;"));
    bed.finds(&body("red.relaxed.gpu.global.add.u32 [%rd0+512], 1;"), Ub::GlobalRace, "%r4");
}

#[test]
fn launches_that_overlap() {
    // Two launches at a time that write the same buffer.
    let bed = Bed { block: 32, ..BED };
    let device = bed.device();
    let text = module_text("", "", &format!("{WORD}st.global.u32 [%rd1], %r0;"));
    let module = Module::load(&device, &text).unwrap();
    let buffer = device.upload(&[7u8; 256]).unwrap();
    let config = bed.config(&device, buffer);
    let kernel = module.function("k").unwrap();
    let launch = fathom_emulator::Launch { function: &kernel, config: &config };
    let reports = launch_together(&[launch, launch]).unwrap();
    assert_eq!(reports[0].findings, []);
    assert_eq!(reports[1].findings[0].kind, Ub::GlobalRace);
}

/// A programmatic launch of `body` after a launch that writes the buffer.
fn dependent(body: &str) -> Vec<fathom_emulator::Finding> {
    let bed = Bed { block: 64, ..BED };
    let device = bed.device();
    let writer = module_text("", "", &format!("{WORD}st.global.u32 [%rd1], %r0;"));
    let writer = Module::load(&device, &writer).unwrap();
    let reader = Module::load(&device, &module_text("", "", body)).unwrap();
    let buffer = device.upload(&[7u8; 256]).unwrap();
    let mut config: LaunchConfig = bed.config(&device, buffer);
    device.launch(&writer.function("k").unwrap(), &config).unwrap();
    config.pdl = true;
    let found = device.launch(&reader.function("k").unwrap(), &config).unwrap().findings;
    check_places(&found);
    found
}

#[test]
fn programmatic_launches_wait() {
    let read = format!("{WORD}ld.global.u32 %r1, [%rd1];");
    assert_eq!(dependent(&format!("griddepcontrol.wait;\n{read}")), []);
    let found = dependent(&read);
    assert_eq!(found[0].kind, Ub::GlobalRace);
    assert!(found[0].message.contains("griddepcontrol.wait was not executed"));
    // One warp waits, and a barrier tells the other; without it that one is too early.
    let one = |barrier: &str| {
        format!(
            "setp.ge.u32 %p1, %r0, 32;\n@%p1 bra GO;\ngriddepcontrol.wait;\nGO:\n{barrier}\n{read}"
        )
    };
    assert_eq!(dependent(&one("bar.sync 0;")), []);
    assert_eq!(dependent(&one(""))[0].warp, 1);
    // Launching one's own dependents early is no wait.
    assert_eq!(dependent(&format!("griddepcontrol.launch_dependents;\n{read}")).len(), 1);
}

#[test]
fn tensor_maps_that_the_kernel_changes() {
    let bed = Bed { block: 32, ..BED };
    let body = |fence: &str| {
        format!(
            "setp.ne.u32 %p1, %r0, 0;\n@%p1 ret;\n\
             tensormap.replace.tile.global_address.global.b1024.b64 [%rd0], %rd1;\n{fence}\n\
             mov.u32 %r6, bar;\nmbarrier.init.shared.b64 [%r6], 1;\n\
             mbarrier.arrive.expect_tx.shared.b64 _, [%r6], 1024;\n\
             cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes \
             [%r15], [%rd0, {{0, 0}}], [%r6];\nLOOP:\n\
             mbarrier.try_wait.parity.shared.b64 %p2, [%r6], 0;\n@!%p2 bra LOOP;"
        )
    };
    let run = |fence: &str| {
        let device = bed.device();
        let tensor = device.upload(&[3u16; 512]).unwrap();
        let map = device.upload(&tensor_map(tensor, 8, 3)).unwrap();
        let text =
            module_text("", "", &format!("ld.global.u64 %rd1, [%rd0+128];\n{}", body(fence)));
        let module = Module::load(&device, &text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        let both: Vec<u8> = [&tensor_map(tensor, 8, 3)[..], &tensor.to_le_bytes()[..]].concat();
        device.free(map).unwrap();
        let buffer = device.upload(&both).unwrap();
        let params = Params::new().with(buffer).with_bytes(&[0; 128], 64).into_bytes();
        let mut config = LaunchConfig::new([1, 1, 1], [32, 1, 1], params);
        config.dynamic_shared_bytes = 8192;
        let found = device.launch(&module.function("k").unwrap(), &config).unwrap().findings;
        check_places(&found);
        found
    };
    assert_eq!(run("fence.proxy.tensormap::generic.acquire.gpu [%rd0], 128;"), []);
    let found = run("");
    assert_eq!(found[0].kind, Ub::MissingProxyFence);
    assert!(found[0].instruction.starts_with("cp.async.bulk.tensor"));
}
