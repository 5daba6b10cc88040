//! The exact GEMMs at 1024 x 1024 x 1024 beside the `gemm` crate's f32, on one core and on all:
//! Hopper FP8 with promotion on every instruction set, BF16, FP16, TF32, and FP8 as `wgmma`
//! instructions of 64 x 128 x 32, packing included.
//!
//! `cargo bench -p fathom-benches --bench gemm_exact`

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use fathom_numerics::formats::{Format, Overflow, Rounding};
use fathom_numerics::gemm::tensor_core::TensorCore;
use fathom_numerics::gemm::{
    Accumulate, Fp8Operand, GemmConfig, Isa, gemm_fp8_on, gemm_unscaled_on,
};
use fathom_numerics::mma::Accumulator;
use gemm::{Parallelism, gemm};
use ndarray::{Array2, s};
use rayon::ThreadPool;

/// M, N and K of every case.
const SIZE: usize = 1024;

/// Bell-shaped values (the sum of six uniform ones), standard deviation 0.7.
fn bell(rows: usize, k: usize, seed: u64) -> Array2<f32> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as f32 / (1u64 << 31) as f32 - 0.5
    };
    Array2::from_shape_simple_fn((rows, k), || (0..6).map(|_| uniform()).sum())
}

/// The values as codes of `format`, `scale` times.
fn codes(format: Format, values: &Array2<f32>, scale: f32) -> Array2<u32> {
    let (even, saturate) = (Rounding::NearestEven, Overflow::Saturate);
    values.mapv(|x| match format {
        Format::Tf32 => (x * scale).to_bits(),
        _ => format.layout().from_f32(x * scale, even, saturate),
    })
}

/// The yardstick: the `gemm` crate's f32.
fn yardstick(group: &mut BenchmarkGroup<'_, WallTime>, pool: &ThreadPool) {
    let threads = pool.current_num_threads();
    let (a, b) = (bell(SIZE, SIZE, 1), bell(SIZE, SIZE, 2));
    let mut c = Array2::<f32>::zeros((SIZE, SIZE));
    let parallelism = if threads == 1 { Parallelism::None } else { Parallelism::Rayon(threads) };
    group.bench_function("f32, gemm crate", |bencher| {
        let mut run = || {
            let stride = SIZE as isize;
            // SAFETY: three contiguous matrices of SIZE x SIZE; B is used transposed, as below.
            unsafe {
                gemm(
                    SIZE,
                    SIZE,
                    SIZE,
                    c.as_mut_ptr(),
                    1,
                    stride,
                    false,
                    a.as_ptr(),
                    1,
                    stride,
                    b.as_ptr(),
                    stride,
                    1,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    parallelism,
                );
            }
        };
        bencher.iter(|| pool.install(&mut run));
    });
}

/// Hopper FP8 with 1x128 by 128x128 scales, on every instruction set but the specification's.
fn fp8(group: &mut BenchmarkGroup<'_, WallTime>, pool: &ThreadPool) {
    let q = |seed| codes(Format::E4M3, &bell(SIZE, SIZE, seed), 150.0).mapv(|code| code as u8);
    let (a, b) = (q(1), q(2));
    let blocks = SIZE.div_ceil(128);
    let scale_a = Array2::from_elem((SIZE, blocks), 0.01f32);
    let scale_b = Array2::from_elem((blocks, blocks), 0.02f32);
    let a = Fp8Operand::tile_1x128(a.view(), scale_a.view());
    let b = Fp8Operand::block_128x128(b.view(), scale_b.view());
    let (config, overwrite) = (GemmConfig::default(), Accumulate::Overwrite);
    let mut d = Array2::zeros((SIZE, SIZE));
    for isa in Isa::available().filter(|isa| *isa != Isa::Portable) {
        group.bench_function(format!("fp8 hopper, {}", isa.name()), |bencher| {
            let mut run = || gemm_fp8_on(isa, &a, &b, d.view_mut(), overwrite, &config);
            bencher.iter(|| pool.install(&mut run).expect("they fit"));
        });
    }
}

/// The same products as `wgmma.m64n128k32` instructions on one tile after another, operands packed
/// for
/// each instruction.
fn wgmma(group: &mut BenchmarkGroup<'_, WallTime>) {
    let q = |seed| codes(Format::E4M3, &bell(SIZE, SIZE, seed), 150.0).mapv(|code| code as u8);
    let (a, b) = (q(1), q(2));
    let core = TensorCore::new(Accumulator::HOPPER_FP8, Format::E4M3, Format::E4M3);
    let core = core.expect("an FP32 accumulator");
    let mut d = Array2::<f32>::zeros((64, 128));
    group.bench_function("fp8 hopper, as wgmma m64n128k32", |bencher| {
        bencher.iter(|| {
            for row in (0..SIZE).step_by(64) {
                for col in (0..SIZE).step_by(128) {
                    for k in (0..SIZE).step_by(32) {
                        let a = core.pack_a(a.slice(s![row..row + 64, k..k + 32]));
                        let b = core.pack_b(b.slice(s![col..col + 128, k..k + 32]));
                        core.multiply_add(&a, &b, d.view_mut(), k % 128 > 0);
                    }
                }
            }
        });
    });
}

/// BF16, FP16 and TF32 on Hopper's accumulators.
fn wider(group: &mut BenchmarkGroup<'_, WallTime>, pool: &ThreadPool) {
    let cases = [
        ("bf16", Format::Bf16, Accumulator::HOPPER_16BIT),
        ("fp16", Format::F16, Accumulator::HOPPER_16BIT),
        ("tf32", Format::Tf32, Accumulator::HOPPER_TF32),
    ];
    let mut d = Array2::zeros((SIZE, SIZE));
    for (name, format, accumulator) in cases {
        let q = |seed| codes(format, &bell(SIZE, SIZE, seed), 1.0);
        let (a, b) = (q(1), q(2));
        for isa in Isa::available().filter(|isa| *isa != Isa::Portable) {
            group.bench_function(format!("{name} hopper, {}", isa.name()), |bencher| {
                let mut run = || {
                    let (a, b, d) = (a.view(), b.view(), d.view_mut());
                    gemm_unscaled_on(isa, format, a, b, d, Accumulate::Overwrite, &accumulator)
                };
                bencher.iter(|| pool.install(&mut run).expect("they fit"));
            });
        }
    }
}

fn all(criterion: &mut Criterion) {
    let mut counts = vec![1, std::thread::available_parallelism().map_or(1, usize::from)];
    counts.dedup();
    for threads in counts {
        let mut group = criterion.benchmark_group(format!("exact GEMM, {threads} threads"));
        group.throughput(Throughput::Elements(2 * (SIZE as u64).pow(3))).sample_size(10);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        yardstick(&mut group, &pool);
        fp8(&mut group, &pool);
        if threads == 1 {
            wgmma(&mut group);
        }
        wider(&mut group, &pool);
        group.finish();
    }
}

criterion_group!(benches, all);
criterion_main!(benches);
