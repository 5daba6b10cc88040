//! The emulator's speed on Triton's layer norm and softmax (shared test data), in thread
//! instructions a second on one host thread; a goal of 200 M/s is the limit to compare with.

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use fathom_benches::time;
use fathom_emulator::{Device, LaunchConfig, Module, Params, Preset, Settings};

fn shared() -> Option<std::path::PathBuf> {
    let beside = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    let folder = std::env::var_os("FATHOM_SHARED").map_or(beside, std::path::PathBuf::from);
    folder.join("ptx").is_dir().then(|| folder.join("ptx"))
}

fn kernels(c: &mut Criterion) {
    let Some(folder) = shared() else {
        eprintln!("SKIPPED: the shared test data is absent (set FATHOM_SHARED to its folder)");
        return;
    };
    let mut group = c.benchmark_group("emulator, thread instructions");
    group.sample_size(10).measurement_time(Duration::from_secs(3));
    for (tag, rows, n) in
        [("layer_norm_fwd_bf16_sm90", 256u32, 8192u32), ("softmax_f32_sm90", 512, 1024)]
    {
        let device = Device::new(Preset::named("h800").unwrap());
        device.configure(Settings { threads: 1, ..Settings::default() });
        let text = std::fs::read_to_string(folder.join(format!("{tag}.ptx"))).unwrap();
        let module = Module::load(&device, &text).unwrap();
        let function = module.function(module.image().entries()[0]).unwrap();
        let x = device.upload(&vec![0x3f80u16; (2 * rows * n) as usize]).unwrap();
        let y = device.alloc(u64::from(4 * rows * n)).unwrap();
        let w = device.upload(&vec![1f32; n.max(rows) as usize]).unwrap();
        let s = device.alloc(u64::from(4 * rows)).unwrap();
        let layer_norm = tag.starts_with("layer");
        let params = if layer_norm {
            let p = Params::new().with(x).with(y).with(w).with(w).with(s).with(s);
            p.with(n).with(n).with(1e-5f32)
        } else {
            Params::new().with(y).with(x).with(n).with(n).with(rows).with(n)
        };
        let params = params.with(0u64).with(0u64).into_bytes();
        let (grid, threads) = if layer_norm { (rows, 128) } else { (32, 256) };
        let mut config = LaunchConfig::new([grid, 1, 1], [threads, 1, 1], params);
        config.dynamic_shared_bytes = 12320;
        let report = device.launch(&function, &config).unwrap();
        assert!(report.findings.is_empty());
        group.throughput(Throughput::Elements(report.record.thread_instructions));
        group.bench_function(tag, |b| b.iter(|| device.launch(&function, &config).unwrap()));
        let launch = || drop(device.launch(&function, &config).unwrap());
        let best = (0..9).map(|_| time(true, launch)).min().unwrap();
        let rate = report.record.thread_instructions as f64 / best.as_secs_f64() / 1e6;
        println!("{tag}: {rate:.0} M thread instructions a second of CPU time, best of nine");
    }
}

criterion_group!(benches, kernels);
criterion_main!(benches);
