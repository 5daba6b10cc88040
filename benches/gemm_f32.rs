//! The in-order f32 and f64 GEMMs beside the `gemm` crate, on one core and on all: square and
//! small.
//!
//! `cargo bench -p fathom-benches --bench gemm_f32`

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use fathom_numerics::gemm::inorder::gemm_on;
use fathom_numerics::gemm::{InOrder, Isa};
use gemm::{Parallelism, gemm};
use ndarray::Array2;

/// Runs `work` on a pool of `threads` threads.
fn on_threads(threads: usize, work: impl FnOnce() + Send) {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool").install(work);
}

fn operand<T: InOrder + From<f32>>(rows: usize, cols: usize) -> Array2<T> {
    Array2::from_shape_fn((rows, cols), |(i, j)| T::from(((i * 7 + j * 13) % 101) as f32 - 50.0))
}

/// One shape: the crate, and ours on every instruction set, `B` as it lies and transposed.
fn shape<T>(criterion: &mut Criterion, name: &str, (m, n, k): (usize, usize, usize), threads: usize)
where
    T: InOrder + From<f32> + 'static,
{
    let (a, b) = (operand::<T>(m, k), operand::<T>(k, n));
    let transposed = operand::<T>(n, k);
    let mut c = Array2::<T>::from_elem((m, n), T::zeroed());
    let mut group = criterion.benchmark_group(format!("{name}/{m}x{n}x{k}/{threads} threads"));
    group.throughput(Throughput::Elements((2 * m * n * k) as u64)).sample_size(20);
    let parallelism = if threads == 1 { Parallelism::None } else { Parallelism::Rayon(threads) };
    let (zero, one) = (T::from(0.0), T::from(1.0));
    group.bench_function("gemm crate", |bencher| {
        on_threads(threads, || {
            bencher.iter(|| {
                let (n, k) = (n as isize, k as isize);
                // SAFETY: the three arrays are contiguous, of the shapes given.
                unsafe {
                    gemm(
                        m,
                        n as usize,
                        k as usize,
                        c.as_mut_ptr(),
                        1,
                        n,
                        false,
                        a.as_ptr(),
                        1,
                        k,
                        b.as_ptr(),
                        1,
                        n,
                        zero,
                        one,
                        false,
                        false,
                        false,
                        parallelism,
                    );
                }
            });
        });
    });
    for isa in Isa::available().filter(|isa| *isa != Isa::Portable || m * n * k <= 1 << 20) {
        group.bench_function(format!("in order, {}", isa.name()), |bencher| {
            on_threads(threads, || {
                bencher.iter(|| gemm_on(isa, a.view(), b.view(), c.view_mut(), false));
            });
        });
    }
    group.bench_function("in order, B transposed", |bencher| {
        on_threads(threads, || {
            bencher.iter(|| {
                gemm_on(Isa::best(), a.view(), transposed.t(), c.view_mut(), false);
            });
        });
    });
    group.finish();
}

fn all(criterion: &mut Criterion) {
    shape::<f32>(criterion, "f32", (1024, 1024, 1024), 1);
    shape::<f32>(criterion, "f32", (64, 64, 64), 1);
    shape::<f32>(criterion, "f32", (48, 256, 512), 1);
    shape::<f32>(criterion, "f32", (512, 256, 256), 1);
    shape::<f64>(criterion, "f64", (1024, 1024, 1024), 1);
    let threads = rayon::current_num_threads();
    if threads > 1 {
        shape::<f32>(criterion, "f32", (1024, 1024, 1024), threads);
    }
}

criterion_group!(benches, all);
criterion_main!(benches);
