//! Elementary functions, row sums and Philox: the slice kernels on every instruction set of this
//! machine beside the standard library (libm) on the same inputs.
//!
//! `cargo bench -p fathom-benches --bench elementary`

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fathom_numerics::elementary::{Function, Isa};
use fathom_numerics::philox::Philox;
use fathom_numerics::reduce::RowTree;

/// 64 KiB: the slices stay in the second-level cache.
const LEN: usize = 16384;

/// What the standard library offers in place of `f`.
fn std_of(f: Function, x: f32) -> f32 {
    match f {
        Function::Exp2 => x.exp2(),
        Function::Exp => x.exp(),
        Function::Log2 => x.log2(),
        Function::Log => x.ln(),
        Function::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Function::Silu => x / (1.0 + (-x).exp()),
        Function::Rsqrt => 1.0 / x.sqrt(),
        Function::Tanh => x.tanh(),
        Function::Sin => x.sin(),
        Function::Cos => x.cos(),
    }
}

/// Uniform arguments from the range where `f` has work to do; RoPE's angles for sine and cosine.
fn inputs(f: Function) -> Vec<f32> {
    let (low, high) = match f {
        Function::Log2 | Function::Log | Function::Rsqrt => (0.0, 1000.0),
        Function::Sin | Function::Cos => (0.0, 131_072.0),
        _ => (-20.0, 20.0),
    };
    let mut xs = vec![0.0; LEN];
    Philox::new(1, 1).uniforms(0, &mut xs);
    xs.iter().map(|x| low + x * (high - low)).collect()
}

fn functions(c: &mut Criterion) {
    for &f in Function::ALL {
        let mut group = c.benchmark_group(f.name());
        group.throughput(Throughput::Elements(LEN as u64));
        let xs = inputs(f);
        let mut ys = xs.clone();
        for isa in Isa::available() {
            group.bench_function(BenchmarkId::new("fathom", isa.name()), |b| {
                b.iter(|| {
                    ys.copy_from_slice(&xs);
                    f.apply(isa, black_box(&mut ys));
                })
            });
        }
        group.bench_function("std", |b| {
            b.iter(|| {
                for (y, &x) in ys.iter_mut().zip(black_box(&xs)) {
                    *y = std_of(f, x);
                }
            })
        });
        group.finish();
    }
}

fn sums(c: &mut Criterion) {
    let mut group = c.benchmark_group("row_sum");
    group.throughput(Throughput::Elements(LEN as u64));
    let xs = inputs(Function::Exp);
    let trees = [
        ("warp", RowTree::WARP),
        ("warp_vector_4", RowTree::WARP.with_vector(4)),
        ("cta_256", RowTree::cta(256)),
    ];
    for (name, tree) in trees {
        group.bench_function(name, |b| b.iter(|| tree.sum(black_box(&xs))));
    }
    group.bench_function("std_in_order", |b| b.iter(|| black_box(&xs).iter().sum::<f32>()));
    group.finish();
}

fn random(c: &mut Criterion) {
    let mut group = c.benchmark_group("philox");
    group.throughput(Throughput::Elements(LEN as u64));
    let mut words = vec![0u32; LEN];
    for isa in Isa::available() {
        group.bench_function(BenchmarkId::new("words", isa.name()), |b| {
            b.iter(|| Philox::new(1, 2).words_on(isa, 0, black_box(&mut words)))
        });
    }
    let mut xs = vec![0f32; LEN];
    group.bench_function("uniforms", |b| {
        b.iter(|| Philox::new(1, 2).uniforms(0, black_box(&mut xs)))
    });
    group
        .bench_function("normals", |b| b.iter(|| Philox::new(1, 2).normals(0, black_box(&mut xs))));
    group.finish();
}

criterion_group!(benches, functions, sums, random);
criterion_main!(benches);
