//! The device functions of `gpu/kernels/common`, compiled by NVRTC and run by the emulator, give
//! the
//! bits of the Rust functions that they mirror. Skipped where NVRTC is not installed.

use std::path::Path;

use cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use fathom_emulator::{Device, LaunchConfig, Module, Params, Preset};
use fathom_numerics::elementary::Function;
use fathom_numerics::philox::Philox;
use fathom_numerics::reduce::{RowTree, max_num};

/// Compiles `source` against the headers; `None`, said aloud, without NVRTC.
fn compile(device: &Device, source: &str) -> Option<Module> {
    let nvrtc = fathom_gpu::nvrtc::find_or_fetch_for_tests()?;
    for library in [&nvrtc.builtins, &nvrtc.library] {
        // SAFETY: NVIDIA's libraries run no code of consequence when they are loaded. They stay, so
        // that the loader finds them under their names when cudarc asks.
        let loaded = unsafe { libloading::Library::new(library) };
        std::mem::forget(loaded.unwrap_or_else(|e| panic!("{}: {e}", library.display())));
    }
    let headers = Path::new(env!("CARGO_MANIFEST_DIR")).join("../gpu/kernels");
    let options = CompileOptions {
        include_paths: vec![headers.to_str().expect("a path in UTF-8").to_owned()],
        options: vec!["--gpu-architecture=sm_90a".to_owned(), "--fmad=false".to_owned()],
        ..Default::default()
    };
    let ptx = compile_ptx_with_opts(source, options).expect("the headers compile");
    Some(Module::load(device, &ptx.to_src()).expect("the emulator takes the PTX"))
}

fn launch(device: &Device, module: &Module, name: &str, ctas: u32, threads: u32, params: Params) {
    let config = LaunchConfig::new([ctas, 1, 1], [threads, 1, 1], params.into_bytes());
    let kernel = module.function(name).expect("the kernel is there");
    let report = device.launch(&kernel, &config).expect("the kernel runs");
    assert!(report.findings.is_empty(), "{name}: {:?}", report.findings);
    assert!(report.record.approximate.is_empty(), "{name}: {:?}", report.record.approximate);
}

#[test]
fn elementary_functions() {
    let mut source = String::from("#include \"common/elementary.cuh\"\n");
    for f in Function::ALL {
        let name = f.name();
        source += &format!(
            "extern \"C\" __global__ void {name}_of(float* x) {{\n    \
             unsigned int i = blockIdx.x * blockDim.x + threadIdx.x;\n    \
             x[i] = fathom_{name}(x[i]);\n}}\n"
        );
    }
    let device = Device::new(Preset::named("h800").unwrap());
    let Some(module) = compile(&device, &source) else { return };
    // Random bits, every exponent with fractions around its ends, RoPE's positions.
    let mut inputs = vec![0u32; 1 << 16];
    Philox::new(0x0FA7_0E1E, 1).words(0, &mut inputs);
    let fractions = [0, 1, 0x35_04F2, 0x35_04F3, 0x40_0000, 0x7F_FFFE, 0x7F_FFFF];
    inputs.extend((0..512).flat_map(|e| fractions.map(|m| (e << 23) | m)));
    inputs.extend((0..=131_072u32).step_by(8).map(|position| (position as f32).to_bits()));
    inputs.resize(inputs.len().next_multiple_of(256), 0);
    for &f in Function::ALL {
        let x = device.upload(&inputs).unwrap();
        let name = format!("{}_of", f.name());
        launch(&device, &module, &name, inputs.len() as u32 / 256, 256, Params::new().with(x));
        let got: Vec<u32> = device.download(x, inputs.len()).unwrap();
        for (&x, got) in inputs.iter().zip(got) {
            let want = f.eval(f32::from_bits(x)).to_bits();
            assert_eq!(got, want, "{}(0x{x:08X}): 0x{got:08X}, Rust 0x{want:08X}", f.name());
        }
    }
}

#[test]
fn reduction_trees() {
    let source = r#"
#include "common/reduce.cuh"
template <int THREADS, int VECTOR>
static __device__ void sum(const float* rows, int length, float* out) {
    __shared__ float scratch[32];
    float v = fathom_lane_sum<THREADS, VECTOR>(rows + blockIdx.x * length, length, threadIdx.x);
    v = fathom_cta_sum<THREADS>(v, scratch);
    out[blockIdx.x * THREADS + threadIdx.x] = v;
}
extern "C" __global__ void cta_256(const float* x, int n, float* y) { sum<256, 1>(x, n, y); }
extern "C" __global__ void cta_128_vector_4(const float* x, int n, float* y) { sum<128, 4>(x, n, y); }
extern "C" __global__ void cta_1024(const float* x, int n, float* y) { sum<1024, 1>(x, n, y); }
extern "C" __global__ void warp(const float* x, int n, float* y) {
    float v = fathom_lane_sum<32, 1>(x + blockIdx.x * n, n, threadIdx.x);
    y[blockIdx.x * 32 + threadIdx.x] = fathom_warp_sum(v);
}
extern "C" __global__ void warp_max(const float* x, int n, float* y) {
    float v = -1.0f / 0.0f;
    for (int i = threadIdx.x; i < n; i += 32) v = fmaxf(v, x[blockIdx.x * n + i]);
    y[blockIdx.x * 32 + threadIdx.x] = fathom_warp_max(v);
}
"#;
    let device = Device::new(Preset::named("h800").unwrap());
    let Some(module) = compile(&device, source) else { return };
    let (rows, length) = (5, 2999);
    let mut x = vec![0.0; rows * length];
    Philox::new(3, 4).normals(0, &mut x);
    // A row that is NaN, one that overflows, one of negative zeros.
    x[length + 77] = f32::from_bits(0xFFC0_1234);
    (x[2 * length], x[2 * length + 32]) = (f32::MAX, f32::MAX);
    x[3 * length..4 * length].fill(-0.0);
    let row = |i: usize| &x[i * length..(i + 1) * length];
    let source = device.upload(&x).unwrap();
    let run = |name: &str, threads: usize| -> Vec<u32> {
        let out = device.alloc((rows * threads * 4) as u64).unwrap();
        let params = Params::new().with(source).with(length as u32).with(out);
        launch(&device, &module, name, rows as u32, threads as u32, params);
        device.download(out, rows * threads).unwrap()
    };
    for (name, tree) in [
        ("warp", RowTree::WARP),
        ("cta_256", RowTree::cta(256)),
        ("cta_128_vector_4", RowTree::cta(128).with_vector(4)),
        ("cta_1024", RowTree::cta(1024)),
    ] {
        let got = run(name, tree.lanes());
        for (i, lanes) in got.chunks(tree.lanes()).enumerate() {
            let want = tree.sum(row(i)).to_bits();
            assert!(lanes.iter().all(|&v| v == want), "{name}, row {i}: {want:08X} {lanes:08X?}");
        }
    }
    for (i, lanes) in run("warp_max", 32).chunks(32).enumerate() {
        let want = row(i).iter().fold(f32::NEG_INFINITY, |m, &v| max_num(m, v)).to_bits();
        assert!(lanes.iter().all(|&v| v == want), "warp_max, row {i}: {want:08X} {lanes:08X?}");
    }
}
