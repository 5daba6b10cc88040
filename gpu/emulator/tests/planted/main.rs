//! Small kernels with one planted bug each, beside their clean versions: each bug is found at its
//! place, and nothing is reported of what is right. The anchor is what NVIDIA's compute-sanitizer
//! finds (memcheck, racecheck, initcheck, synccheck), and the asynchronous proxies beyond it.

mod asynchronous;
mod basics;
mod cluster;
mod global;
mod lanes;
mod shared;
mod sync;
mod wgmma;

use fathom_emulator::{
    Checks, Device, Finding, LaunchConfig, MapElement, Mode, Module, Params, Preset, Settings,
    TensorMap, Ub,
};

/// How a kernel is launched. Its body sees `%r0` (thread), `%r14` (CTA), `%r15` (the variable
/// `tile`), `%rd0` (a buffer of `bytes` that holds 7s), `%rd14` (a tensor map of 8 rows of 64
/// 16-bit elements, swizzled by 128 bytes), `bar` (8 bytes), and 8192 bytes of `dyn`.
struct Bed {
    grid: u32,
    block: u32,
    cluster: u32,
    bytes: usize,
    checks: Checks,
    /// Instructions of a warp's turn: few, and the warps go side by side.
    quantum: u32,
    /// What stands before the kernel, and its directives.
    module: &'static str,
    directives: &'static str,
}

const BED: Bed = Bed {
    grid: 1,
    block: 64,
    cluster: 1,
    bytes: 256,
    checks: Checks::ALL,
    quantum: 2000,
    module: "",
    directives: "",
};

/// The module around a body.
fn module_text(module: &str, directives: &str, body: &str) -> String {
    format!(
        ".version 8.5\n.target sm_90a\n.address_size 64\n\
         .extern .shared .align 1024 .b8 dyn[];\n{module}\
         .visible .entry k(.param .u64 p, .param .align 64 .b8 map[128]) {directives}\n{{\n\
         .shared .align 1024 .b8 tile[1024];\n.shared .align 8 .b64 bar;\n\
         .reg .pred %p<8>;\n.reg .b32 %r<16>;\n.reg .b64 %rd<16>;\n.reg .f32 %f<8>;\n\
         ld.param.u64 %rd0, [p];\nmov.u32 %r0, %tid.x;\nmov.u32 %r14, %ctaid.x;\n\
         mov.u32 %r15, tile;\nmov.b64 %rd14, map;\ncvta.param.u64 %rd14, %rd14;\n{body}\nret;\n}}\n"
    )
}

/// Rows of 64 elements of 16 bits at an address.
fn tensor_map(address: u64, rows: u32, swizzle: u32) -> [u8; 128] {
    let map = TensorMap {
        element: MapElement::U16,
        rank: 2,
        address,
        dims: [64, u64::from(rows), 1, 1, 1],
        strides_bytes: [128, 0, 0, 0],
        box_dims: [64, rows, 1, 1, 1],
        element_strides: [1; 5],
        interleave: 0,
        swizzle,
        l2_promotion: 0,
        fill_nan: false,
        mode: Mode::Tiled,
    };
    map.encode().unwrap()
}

impl Bed {
    fn device(&self) -> Device {
        let device = Device::new(Preset::named("h800").unwrap());
        let settings = Settings {
            checks: self.checks,
            quantum: self.quantum,
            patience: 200_000,
            ..Settings::default()
        };
        device.configure(settings);
        device
    }

    fn config(&self, device: &Device, buffer: u64) -> LaunchConfig {
        let tensor = device.upload(&vec![3u16; 64 * 64]).unwrap();
        let params = Params::new().with(buffer).with_bytes(&tensor_map(tensor, 8, 3), 64);
        let mut config =
            LaunchConfig::new([self.grid, 1, 1], [self.block, 1, 1], params.into_bytes());
        config.cluster = [self.cluster, 1, 1];
        config.dynamic_shared_bytes = 8192;
        config
    }

    fn run(&self, body: &str) -> Vec<Finding> {
        let device = self.device();
        let text = module_text(self.module, self.directives, body);
        let module = Module::load(&device, &text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        let buffer = device.upload(&vec![7u8; self.bytes]).unwrap();
        let config = self.config(&device, buffer);
        let report = device.launch(&module.function("k").unwrap(), &config).unwrap();
        check_places(&report.findings);
        report.findings
    }

    /// Nothing is reported.
    fn clean(&self, body: &str) {
        let found = self.run(body);
        assert!(found.is_empty(), "a clean kernel: {found:?}");
    }

    /// The bug is reported at an instruction with this text.
    fn finds(&self, body: &str, kind: Ub, at: &str) -> Finding {
        let found = self.run(body);
        let hit = found.iter().find(|f| f.kind == kind && f.instruction.contains(at));
        hit.cloned().unwrap_or_else(|| panic!("expected {kind} at `{at}`, found {found:?}"))
    }
}

/// The place is always named.
fn check_places(findings: &[Finding]) {
    for finding in findings {
        assert!(finding.line > 0 && !finding.instruction.is_empty(), "{finding}");
        assert_eq!(finding.kernel, "k");
        eprintln!("{finding}");
    }
}
