//! CTAs, launches and devices that wait for one another, and what kernels say to the host.

use fathom_emulator::{
    COOPERATIVE_GRID, Checks, Device, Error, Function, Joining, Launch, LaunchConfig, LaunchReport,
    Module, More, Params, Preset, Settings, Ub, launch_joining, launch_together,
};

fn module(device: &Device, before: &str, params: &str, body: &str) -> Module {
    let text = format!(
        ".version 8.5\n.target sm_90\n.address_size 64\n{before}\n.visible .entry k({params})\n{{\n\
         .reg .pred %p<4>;\n.reg .b32 %r<8>;\n.reg .b64 %rd<8>;\n{body}\nret;\n}}\n"
    );
    Module::load(device, &text).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

fn h800s(count: usize) -> Vec<Device> {
    let devices = Device::peers(Preset::named("h800").unwrap(), count);
    for device in &devices {
        device.configure(Settings { checks: Checks::ALL, ..Settings::default() });
    }
    devices
}

/// Adds one to a counter in the first device's memory, waits until all have, and says so in its
/// own.
const RING: &str = "ld.param.u64 %rd0, [counter];\nld.param.u64 %rd1, [own];\n\
    ld.param.u32 %r0, [n];\nred.release.sys.global.add.u32 [%rd0], 1;\nLOOP:\n\
    ld.acquire.sys.global.u32 %r1, [%rd0];\nsetp.lt.u32 %p0, %r1, %r0;\n@%p0 bra LOOP;\n\
    st.global.u32 [%rd1], %r1;";

#[test]
fn devices_that_wait_for_each_other() {
    let devices = h800s(3);
    let counter = devices[0].upload(&[0u32]).unwrap();
    let mut kernels = Vec::new();
    for device in &devices {
        let params = ".param .u64 counter, .param .u64 own, .param .u32 n";
        let kernel = module(device, "", params, RING).function("k").unwrap();
        let own = device.upload(&[0u32]).unwrap();
        let params = Params::new().with(counter).with(own).with(3u32).into_bytes();
        kernels.push((kernel, LaunchConfig::new([1, 1, 1], [1, 1, 1], params), own));
    }
    let launches: Vec<Launch<'_>> =
        kernels.iter().map(|(function, config, _)| Launch { function, config }).collect();
    for report in launch_together(&launches).unwrap() {
        assert_eq!(report.findings, []);
    }
    for (device, (_, _, own)) in devices.iter().zip(&kernels) {
        assert_eq!(device.download::<u32>(*own, 1).unwrap(), [3]);
    }
}

/// Writes a number without more ado, and then sets a flag to it.
const PUT: &str = "ld.param.u64 %rd0, [data];\nld.param.u64 %rd1, [flag];\n\
    ld.param.u32 %r0, [n];\nst.global.u32 [%rd0], %r0;\nst.release.sys.global.u32 [%rd1], %r0;";

/// Waits until the flag is that number, and adds one to what was written.
const TAKE: &str = "ld.param.u64 %rd0, [data];\nld.param.u64 %rd1, [flag];\n\
    ld.param.u32 %r0, [n];\nLOOP:\nld.acquire.sys.global.u32 %r1, [%rd1];\n\
    setp.ne.u32 %p0, %r1, %r0;\n@%p0 bra LOOP;\nld.global.u32 %r2, [%rd0];\n\
    add.u32 %r2, %r2, 1;\nst.global.u32 [%rd0], %r2;";

/// One that waits for the second of two others, which comes once the first has ended.
struct OneByOne {
    kernels: Vec<(Function, LaunchConfig)>,
    ended: Vec<usize>,
}

impl Joining for OneByOne {
    fn more(&mut self, none_left: bool) -> More {
        assert!(!none_left || self.kernels.len() == 3 || self.ended.len() == 3);
        let launches = match (self.kernels.len(), self.ended.len()) {
            (3, 0) => self.kernels.drain(..2).collect(),
            (1, 1) => self.kernels.drain(..).collect(),
            _ => Vec::new(),
        };
        More { launches, progress: false }
    }

    fn ended(&mut self, launch: usize, report: Result<LaunchReport, Error>) {
        assert_eq!(report.unwrap().findings, []);
        self.ended.push(launch);
    }
}

#[test]
fn launches_that_join_others_come_after_what_has_ended() {
    let devices = h800s(2);
    let memory = devices[0].upload(&[0u32; 2]).unwrap();
    let kernel = |device: usize, body, n: u32| {
        let params = ".param .u64 data, .param .u64 flag, .param .u32 n";
        let kernel = module(&devices[device], "", params, body).function("k").unwrap();
        let params = Params::new().with(memory).with(memory + 4).with(n).into_bytes();
        (kernel, LaunchConfig::new([1, 1, 1], [1, 1, 1], params))
    };
    let all = || vec![kernel(0, TAKE, 2), kernel(1, PUT, 1), kernel(1, PUT, 2)];
    let mut source = OneByOne { kernels: all(), ended: Vec::new() };
    launch_joining(&mut source);
    assert_eq!(source.ended, [1, 2, 0]);
    assert_eq!(devices[0].download::<u32>(memory, 2).unwrap(), [3, 2]);
    // Those that run at the same time are not ordered.
    devices[0].write(memory, &[0; 8]).unwrap();
    let all = all();
    let together: Vec<Launch<'_>> =
        all.iter().map(|(function, config)| Launch { function, config }).collect();
    let reports = launch_together(&together).unwrap();
    let races = |report: &LaunchReport| report.findings.iter().any(|f| f.kind == Ub::GlobalRace);
    assert!(reports.iter().any(races), "{reports:?}");
}

#[test]
fn a_cooperative_grid_is_resident_as_a_whole() {
    let device = h800s(1).remove(0);
    let params = ".param .u64 counter, .param .u64 own, .param .u32 n";
    let kernel = module(&device, "", params, RING).function("k").unwrap();
    let buffers = device.upload(&[0u32; 2]).unwrap();
    let run = |ctas: u32| {
        device.write(buffers, &[0; 8]).unwrap();
        let params = Params::new().with(buffers).with(buffers + 4).with(ctas).into_bytes();
        let mut config = LaunchConfig::new([ctas, 1, 1], [1, 1, 1], params);
        config.cooperative = true;
        // Every CTA writes the same word: races are not what this is about.
        device.configure(Settings { quantum: 50, ..Settings::default() });
        device.launch(&kernel, &config)
    };
    assert_eq!(run(132 * 32).unwrap().findings, []);
    assert_eq!(device.download::<u32>(buffers, 2).unwrap(), [132 * 32; 2]);
    let error = run(132 * 32 + 1).unwrap_err();
    assert!(matches!(error, Error::Launch { what: COOPERATIVE_GRID, .. }), "{error}");
}

/// A kernel with 100 values live at once keeps to the registers that its bounds leave it, as ptxas
/// does (by spilling), so that the CTAs they ask for fit. The bounds are those of ptxas 13.5.
#[test]
fn registers_keep_to_the_bounds_of_the_kernel() {
    let device = h800s(1).remove(0);
    let loads: String =
        (0..100).map(|i| format!("ld.global.u32 %v{i}, [%rd+{}];\n", 4 * i)).collect();
    let sums: String = (0..100).map(|i| format!("add.u32 %s, %s, %v{i};\n")).collect();
    let kernel = |directives: &str| {
        let text = format!(
            ".version 8.5\n.target sm_90\n.address_size 64\n\
             .visible .entry k(.param .u64 p)\n{directives}\n{{\n.reg .b32 %v<100>, %s;\n\
             .reg .b64 %rd;\nld.param.u64 %rd, [p];\n{loads}mov.u32 %s, 0;\n{sums}\
             st.global.u32 [%rd], %s;\nret;\n}}\n"
        );
        Module::load(&device, &text).unwrap().function("k").unwrap()
    };
    assert!(kernel("").attributes().registers > 100);
    for (directives, most) in [
        (".maxntid 1024\n.minnctapersm 1", 64),
        (".reqntid 512\n.minnctapersm 2", 64),
        (".maxntid 768", 80),
        (".maxntid 640", 96),
        (".maxntid 96\n.minnctapersm 8", 80),
        (".maxntid 130\n.minnctapersm 4", 96),
        (".maxntid 352\n.minnctapersm 2", 80),
        (".maxntid 1024\n.minnctapersm 2", 32),
        // More CTAs than an SM can hold are ignored.
        (".maxntid 1024\n.minnctapersm 4", 64),
        (".maxntid 256\n.maxnreg 24", 24),
        (".maxnreg 40", 40),
        (".maxntid 1024\n.maxnreg 100", 100),
    ] {
        assert_eq!(kernel(directives).attributes().registers, most, "{directives}");
    }
    // Without a number of threads there is nothing to bound.
    assert!(kernel(".minnctapersm 8").attributes().registers > 100);
    let buffer = device.upload(&[1u32; 100]).unwrap();
    let params = Params::new().with(buffer).into_bytes();
    let mut config = LaunchConfig::new([1; 3], [1024, 1, 1], params);
    config.cooperative = true;
    device.configure(Settings::default());
    let report = device.launch(&kernel(".maxntid 1024\n.minnctapersm 1"), &config);
    assert_eq!(report.unwrap().findings, []);
}

#[test]
fn lanes_that_sleep_while_others_hold_what_they_want() {
    // Two of 32 lanes may enter; who has entered leaves behind the loop, where the warp meets.
    let body = "ld.param.u64 %rd0, [p];\nTRY:\natom.global.add.u32 %r0, [%rd0], -1;\n\
                setp.gt.s32 %p0, %r0, 0;\n@%p0 bra IN;\natom.global.add.u32 %r0, [%rd0], 1;\n\
                nanosleep.u32 100;\nbra TRY;\nIN:\natom.global.add.u32 %r1, [%rd0+4], 1;\n\
                atom.global.add.u32 %r0, [%rd0], 1;";
    let device = h800s(1).remove(0);
    let kernel = module(&device, "", ".param .u64 p", body).function("k").unwrap();
    let p = device.upload(&[2u32, 0]).unwrap();
    let config = LaunchConfig::new([1, 1, 1], [32, 1, 1], Params::new().with(p).into_bytes());
    assert_eq!(device.launch(&kernel, &config).unwrap().findings, []);
    assert_eq!(device.download::<u32>(p, 2).unwrap(), [2, 32]);
}

/// What `cooperative_groups::grid_group::sync` does with the workspace that `%envreg1` and
/// `%envreg2` name, twice: its first word is a size, its second counts.
const GRID_SYNC: &str = "mov.u32 %r0, %envreg1;\nmov.u32 %r1, %envreg2;\n\
    mov.b64 %rd0, {%r1, %r0};\nld.u32 %r5, [%rd0];\nld.param.u64 %rd1, [out];\n\
    mov.u32 %r7, %ctaid.x;\nmov.u32 %r6, 0;\nAGAIN:\nsetp.eq.u32 %p0, %r7, 0;\n\
    mov.u32 %r2, %nctaid.x;\nsub.u32 %r2, 0x80000001, %r2;\nselp.u32 %r2, %r2, 1, %p0;\n\
    atom.add.release.gpu.u32 %r3, [%rd0+4], %r2;\nLOOP:\nld.acquire.gpu.u32 %r4, [%rd0+4];\n\
    xor.b32 %r4, %r4, %r3;\nsetp.ge.s32 %p1, %r4, 0;\n@%p1 bra LOOP;\n\
    add.u32 %r6, %r6, 1;\nsetp.lt.u32 %p2, %r6, 2;\n@%p2 bra AGAIN;\n\
    mad.wide.u32 %rd1, %r7, 4, %rd1;\nst.global.u32 [%rd1], %r5;";

#[test]
fn cooperative_launches_have_a_workspace() {
    let device = h800s(1).remove(0);
    let kernel = module(&device, "", ".param .u64 out", GRID_SYNC).function("k").unwrap();
    for ctas in [1u32, 7] {
        let out = device.upload(&[0u32; 7]).unwrap();
        let mut config =
            LaunchConfig::new([ctas, 1, 1], [1, 1, 1], Params::new().with(out).into_bytes());
        config.cooperative = true;
        assert_eq!(device.launch(&kernel, &config).unwrap().findings, []);
        let sizes = device.download::<u32>(out, ctas as usize).unwrap();
        assert!(sizes.iter().all(|&n| n >= 8), "{sizes:?}");
    }
}

#[test]
fn the_order_of_turns_changes_no_result() {
    // Each CTA adds to a counter with atomics and leaves its ticket: their set is the same.
    let body = "ld.param.u64 %rd0, [p];\nmov.u32 %r0, %tid.x;\nmov.u32 %r1, %ctaid.x;\n\
                atom.global.add.u32 %r2, [%rd0], 1;\nmad.wide.u32 %rd1, %r2, 4, %rd0;\n\
                mad.lo.u32 %r3, %r1, 64, %r0;\nst.global.u32 [%rd1+4], %r3;";
    let mut orders = Vec::new();
    for seed in 0..4 {
        let device = Device::new(Preset::named("h800").unwrap());
        device.configure(Settings { schedule_seed: seed, quantum: 3, ..Settings::default() });
        let kernel = module(&device, "", ".param .u64 p", body).function("k").unwrap();
        let at = device.upload(&[0u32; 257]).unwrap();
        let params = Params::new().with(at).into_bytes();
        let config = LaunchConfig::new([4, 1, 1], [64, 1, 1], params);
        device.launch(&kernel, &config).unwrap();
        let mut tickets: Vec<u32> = device.download(at + 4, 256).unwrap();
        orders.push(tickets.clone());
        tickets.sort_unstable();
        assert_eq!(tickets, (0..256).collect::<Vec<u32>>());
    }
    assert!(orders[1..].iter().any(|o| *o != orders[0]), "seeds permute");
}

#[test]
fn what_kernels_print() {
    let device = h800s(1).remove(0);
    let before = ".extern .func (.param .b32 r) vprintf (.param .b64 f, .param .b64 a);\n\
                  .global .align 1 .b8 text[10] = {37, 100, 32, 105, 115, 32, 37, 117, 10, 0};";
    let body = ".local .align 8 .b8 list[8];\nmov.u64 %rd1, list;\nmov.u32 %r0, %tid.x;\n\
                mul.lo.u32 %r1, %r0, %r0;\nneg.s32 %r2, %r0;\nst.local.u32 [%rd1], %r2;\n\
                st.local.u32 [%rd1+4], %r1;\ncvta.local.u64 %rd2, %rd1;\nmov.u64 %rd3, text;\n\
                cvta.global.u64 %rd4, %rd3;\n{\n.param .b64 f;\n.param .b64 a;\n.param .b32 r;\n\
                st.param.b64 [f], %rd4;\nst.param.b64 [a], %rd2;\ncall (r), vprintf, (f, a);\n}";
    let kernel = module(&device, before, "", body).function("k").unwrap();
    let config = LaunchConfig::new([1, 1, 1], [4, 1, 1], Vec::new());
    let report = device.launch(&kernel, &config).unwrap();
    assert_eq!(report.findings, []);
    assert_eq!(report.printed, "0 is 0\n-1 is 1\n-2 is 4\n-3 is 9\n");
}
