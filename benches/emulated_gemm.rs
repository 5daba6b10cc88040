//! Our FP8 GEMM kernel on the emulator beside the exact GEMM of the same size, 1024 x 1024 x 1024,
//! on the same threads; the goal is at most 1.5 times its time. Also checks the bits. On one thread
//! the ratio is that of CPU times where the system tells them, so that other work counts less.
//!
//! `cargo bench -p fathom-benches --bench emulated_gemm` (needs NVRTC)

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use fathom_benches::time;
use fathom_conformance::emulated::{self, Fp8Gemm};
use fathom_emulator::{Checks, Settings};
use fathom_gpu::compile::{Compiler, FP8_GEMM_1D2D};
use fathom_numerics::gemm::{Fp8Operand, GemmConfig, cast_bf16, gemm_fp8};
use fathom_numerics::philox::Philox;
use fathom_numerics::quant::{QuantConfig, quantize_block, quantize_tile};
use ndarray::Array2;

const SIZE: usize = 1024;

fn normal(stream: u64) -> Array2<f32> {
    let mut values = vec![0.0; SIZE * SIZE];
    Philox::new(0, stream).normals(0, &mut values);
    Array2::from_shape_vec((SIZE, SIZE), values).unwrap()
}

fn gemms(c: &mut Criterion) {
    let Some(nvrtc) = fathom_gpu::nvrtc::find() else {
        eprintln!("SKIPPED: NVRTC is not here (`fathom kernels fetch-nvrtc`, or set FATHOM_NVRTC)");
        return;
    };
    let cache = fathom_gpu::nvrtc::cache_dir().unwrap().join("kernels");
    let compiler = Compiler::new(&nvrtc, &cache).unwrap();
    let ptx = compiler.compile(FP8_GEMM_1D2D, &emulated::defines(SIZE, SIZE)).unwrap().ptx;
    let a = quantize_tile(normal(0).view(), 128, &QuantConfig::default()).unwrap();
    let b = quantize_block(normal(1).view(), &QuantConfig::default()).unwrap();
    let kernel = Fp8Gemm::new(&ptx, &a, &b).unwrap();
    let run = |threads| {
        let report = kernel.run(Settings { threads, ..Settings::default() }).unwrap();
        assert!(report.findings.is_empty(), "{:?}", report.findings);
    };
    let exact = || {
        let a = Fp8Operand::tile_1x128(a.codes.view(), a.scales.view());
        let b = Fp8Operand::block_128x128(b.codes.view(), b.scales.view());
        gemm_fp8(&a, &b, &GemmConfig::default()).unwrap()
    };
    run(0);
    let found = kernel.output().unwrap();
    let expected = cast_bf16(exact().view());
    assert!(expected.iter().zip(found).all(|(e, f)| e.to_bits() == f), "the kernel's bits");

    let checked = time(true, || {
        let settings = Settings { threads: 1, checks: Checks::ALL, ..Settings::default() };
        assert!(kernel.run(settings).unwrap().findings.is_empty());
    });
    println!("one thread, all checks: {checked:.1?}");

    let mut group = c.benchmark_group("FP8 GEMM 1024^3");
    group.sample_size(10).throughput(Throughput::Elements(2 * (SIZE * SIZE * SIZE) as u64));
    for threads in [1, rayon::current_num_threads()] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        // In turns, so that whatever else the machine does meets both; the best of each counts.
        let pairs: Vec<_> = (0..9)
            .map(|_| {
                let alone = threads == 1;
                pool.install(|| (time(alone, || run(threads)), time(alone, || drop(exact()))))
            })
            .collect();
        let emulated = pairs.iter().map(|p| p.0).min().unwrap();
        let reference = pairs.iter().map(|p| p.1).min().unwrap();
        println!(
            "{threads} threads: emulated kernel {emulated:.1?}, exact GEMM {reference:.1?}, ratio {:.2}",
            emulated.as_secs_f64() / reference.as_secs_f64()
        );
        group.bench_function(format!("exact, {threads} threads"), |b| {
            b.iter(|| pool.install(exact))
        });
        group.bench_function(format!("emulated kernel, {threads} threads"), |b| {
            b.iter(|| pool.install(|| run(threads)));
        });
    }
}

criterion_group!(benches, gemms);
criterion_main!(benches);
