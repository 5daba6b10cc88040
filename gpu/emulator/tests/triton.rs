//! Triton-compiled kernels of the shared test data: each runs, with every sanitizer and without,
//! gives the same bits both ways, the right ones, and deserves no report.

use std::path::PathBuf;

use fathom_emulator::{
    Checks, Device, LaunchConfig, LaunchReport, Module, Params, Preset, Settings,
};
use fathom_numerics::formats::Format;
use fathom_numerics::mma::{Arch, Instr, Mma};
use half::{bf16, f16};

struct Kernel {
    device: Device,
    module: Module,
    entry: String,
    threads: u32,
    shared: u32,
}

fn folder() -> Option<PathBuf> {
    fathom_trace::shared::need("ptx")
}

impl Kernel {
    /// `None` where the shared test data is absent.
    fn load(tag: &str) -> Option<Kernel> {
        let folder = folder()?;
        let text = std::fs::read_to_string(folder.join(format!("{tag}.ptx"))).unwrap();
        let json = std::fs::read_to_string(folder.join(format!("{tag}.json"))).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        let device = Device::new(Preset::named("h800").unwrap());
        // What is allocated from here on knows whether it was written.
        device.configure(Settings { checks: Checks::ALL, ..device.settings() });
        let module = Module::load(&device, &text).unwrap();
        Some(Kernel {
            device,
            module,
            entry: json["entry"].as_str().unwrap().to_owned(),
            threads: json["threads"].as_u64().unwrap() as u32,
            shared: json["shared_bytes"].as_u64().unwrap() as u32,
        })
    }

    /// Launches with these parameters and Triton's two scratch pointers, with checks and without;
    /// `outputs` are addresses and sizes in bytes of what the kernel writes.
    fn run(&self, grid: [u32; 3], params: Params, outputs: &[(u64, usize)]) -> LaunchReport {
        let params = params.with(0u64).with(0u64).into_bytes();
        let mut config = LaunchConfig::new(grid, [self.threads, 1, 1], params);
        config.dynamic_shared_bytes = self.shared;
        let function = self.module.function(&self.entry).unwrap();
        let run = |checks| {
            self.device.configure(Settings { checks, ..self.device.settings() });
            let report = self.device.launch(&function, &config).unwrap();
            assert_eq!(report.findings, []);
            let read = |&(at, bytes)| self.device.download::<u8>(at, bytes).unwrap();
            let written: Vec<Vec<u8>> = outputs.iter().map(read).collect();
            // What is not written again would be seen.
            for &(at, bytes) in outputs {
                self.device.memset(at, &[0x5a], bytes as u64).unwrap();
            }
            (report, written)
        };
        let (_, checked) = run(Checks::ALL);
        let (report, plain) = run(Checks::default());
        assert_eq!(checked.len(), plain.len());
        for ((checked, plain), &(at, _)) in checked.iter().zip(&plain).zip(outputs) {
            let differs = checked.iter().zip(plain).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{}: a byte that checks change", self.entry);
            self.device.write(at, plain).unwrap();
        }
        self.device.configure(Settings { checks: Checks::ALL, ..self.device.settings() });
        report
    }
}

/// Numbers in (-1, 1) from a counter (a linear congruential generator's high bits).
fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

#[test]
fn vector_add_is_exact() {
    let Some(kernel) = Kernel::load("vector_add_f32_sm90") else { return };
    let n = 10_000;
    let (x, y) = (noise(1, n), noise(2, n));
    let d = &kernel.device;
    let (px, py) = (d.upload(&x).unwrap(), d.upload(&y).unwrap());
    let out = d.alloc(4 * n as u64).unwrap();
    let params = Params::new().with(px).with(py).with(out).with(n as u32);
    kernel.run([10, 1, 1], params, &[(out, 4 * n)]);
    let got: Vec<f32> = d.download(out, n).unwrap();
    for i in 0..n {
        assert_eq!(got[i].to_bits(), (x[i] + y[i]).to_bits(), "element {i}");
    }
}

#[test]
fn layer_norm_is_right() {
    let Some(kernel) = Kernel::load("layer_norm_fwd_bf16_sm90") else { return };
    let (rows, n) = (5, 1536 + 3 * 8);
    let x: Vec<bf16> = noise(3, rows * n).into_iter().map(bf16::from_f32).collect();
    let w = noise(4, n);
    let b = noise(5, n);
    let d = &kernel.device;
    let (px, pw, pb) = (d.upload(&x).unwrap(), d.upload(&w).unwrap(), d.upload(&b).unwrap());
    let y = d.alloc(2 * x.len() as u64).unwrap();
    let (mean, rstd) = (d.alloc(4 * rows as u64).unwrap(), d.alloc(4 * rows as u64).unwrap());
    let params = Params::new().with(px).with(y).with(pw).with(pb).with(mean).with(rstd);
    let params = params.with(n as u32).with(n as u32).with(1e-5f32);
    let outputs = [(y, 2 * x.len()), (mean, 4 * rows), (rstd, 4 * rows)];
    kernel.run([rows as u32, 1, 1], params, &outputs);
    let got: Vec<bf16> = d.download(y, rows * n).unwrap();
    let means: Vec<f32> = d.download(mean, rows).unwrap();
    for row in 0..rows {
        let v: Vec<f64> = x[row * n..(row + 1) * n].iter().map(|v| v.to_f64()).collect();
        let m = v.iter().sum::<f64>() / n as f64;
        let var = v.iter().map(|x| (x - m) * (x - m)).sum::<f64>() / n as f64;
        let r = 1.0 / (var + 1e-5).sqrt();
        // The mean of 1560 singles, each sum rounded: well within 2^-20 of their size.
        assert!((f64::from(means[row]) - m).abs() < 1e-6, "{} {m}", means[row]);
        for i in 0..n {
            let expected = (v[i] - m) * r * f64::from(w[i]) + f64::from(b[i]);
            let got = got[row * n + i].to_f64();
            // One rounding to bf16 (2^-9 relative) and little before it.
            assert!((got - expected).abs() <= expected.abs() / 256.0 + 1e-5, "{got} {expected}");
        }
    }
}

#[test]
fn softmax_is_right() {
    let Some(kernel) = Kernel::load("softmax_f32_sm90") else { return };
    let (rows, n) = (23, 781);
    let x: Vec<f32> = noise(6, rows * n).into_iter().map(|v| v * 8.0).collect();
    let d = &kernel.device;
    let px = d.upload(&x).unwrap();
    let out = d.alloc(4 * x.len() as u64).unwrap();
    let n32 = n as u32;
    let params = Params::new().with(out).with(px).with(n32).with(n32).with(rows as u32).with(n32);
    let report = kernel.run([4, 1, 1], params, &[(out, 4 * x.len())]);
    assert!(report.record.approximate["ex2.approx.f32"] > 0);
    let got: Vec<f32> = d.download(out, rows * n).unwrap();
    for row in 0..rows {
        let v: Vec<f64> = x[row * n..(row + 1) * n].iter().map(|&v| f64::from(v)).collect();
        let most = v.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = v.iter().map(|v| (v - most).exp()).sum();
        for i in 0..n {
            let expected = (v[i] - most).exp() / sum;
            let got = f64::from(got[row * n + i]);
            // x log2(e) is rounded in f32 with |x| up to 16: 2^-20 relative after exp2.
            assert!((got - expected).abs() <= expected * 4e-6, "{got} {expected}");
        }
    }
}

#[test]
fn host_threads_and_schedules_change_no_bit() {
    let Some(kernel) = Kernel::load("softmax_f32_sm90") else { return };
    let (rows, n) = (64, 500u32);
    let x = noise(7, rows * n as usize);
    let d = &kernel.device;
    let px = d.upload(&x).unwrap();
    let mut results = Vec::new();
    for (threads, seed, quantum) in [(0, 0, 2000), (1, 0, 2000), (1, 77, 7), (0, 5, 31)] {
        let mut settings = d.settings();
        (settings.threads, settings.schedule_seed, settings.quantum) = (threads, seed, quantum);
        d.configure(settings);
        let out = d.alloc(4 * x.len() as u64).unwrap();
        let params = Params::new().with(out).with(px).with(n).with(n).with(rows as u32).with(n);
        kernel.run([16, 1, 1], params, &[(out, 4 * x.len())]);
        results.push(d.download::<u32>(out, x.len()).unwrap());
    }
    assert!(results.iter().all(|r| *r == results[0]));
}

/// A matmul kernel against the tensor-core model, K step by K step, to the bit.
fn matmul(tag: &str, preset: &str, instr: Instr, qualifier: &str, size: (usize, usize, usize)) {
    let Some(mut kernel) = Kernel::load(tag) else { return };
    let device = Device::new(Preset::named(preset).unwrap());
    device.configure(Settings { checks: kernel.device.settings().checks, ..device.settings() });
    let text = std::fs::read_to_string(folder().unwrap().join(format!("{tag}.ptx"))).unwrap();
    kernel.module = Module::load(&device, &text).unwrap();
    kernel.device = device;
    let arch = if preset == "a100" { Arch::Sm80 } else { Arch::Sm90 };
    let model = Mma::find(arch, instr, qualifier).unwrap();
    let (m, n, k) = size;
    let code = |v: f32| match model.types.a {
        Format::F16 => u32::from(f16::from_f32(v).to_bits()),
        Format::Bf16 => u32::from(bf16::from_f32(v).to_bits()),
        _ => v.to_bits(),
    };
    let a: Vec<u32> = noise(8, m * k).into_iter().map(code).collect();
    let b: Vec<u32> = noise(9, k * n).into_iter().map(code).collect();
    let upload = |codes: &[u32]| match model.types.a {
        Format::Tf32 => kernel.device.upload(codes).unwrap(),
        _ => kernel.device.upload(&codes.iter().map(|&c| c as u16).collect::<Vec<_>>()).unwrap(),
    };
    let half_out = tag.contains("f16") && !tag.contains("bf16");
    let bytes = if half_out { 2 } else { 4 };
    let (pa, pb) = (upload(&a), upload(&b));
    let pc = kernel.device.alloc((m * n * bytes) as u64).unwrap();
    let params = Params::new().with(pa).with(pb).with(pc);
    let params = params.with(m as u32).with(n as u32).with(k as u32);
    let block = if tag.contains("f16_sm") && half_out { 128 } else { 64 };
    let grid = (m.div_ceil(block) * n.div_ceil(block)) as u32;
    let params = params.with(k as u32).with(n as u32).with(n as u32);
    let report = kernel.run([grid, 1, 1], params, &[(pc, m * n * bytes)]);
    assert!(report.record.tensor_core_flops >= 2 * (m * n * k) as u64);
    let step = model.shape.k;
    for i in 0..m {
        for j in 0..n {
            let mut acc = 0;
            for start in (0..k).step_by(step) {
                let row = &a[i * k + start..][..step];
                let column: Vec<u32> = (start..start + step).map(|p| b[p * n + j]).collect();
                acc = model.dot(row, &column, acc);
            }
            let at = pc + ((i * n + j) * bytes) as u64;
            if half_out {
                let got: u16 = kernel.device.download(at, 1).unwrap()[0];
                let expected = f16::from_f32(f32::from_bits(acc)).to_bits();
                assert_eq!(got, expected, "{tag} ({i}, {j})");
            } else {
                let got: u32 = kernel.device.download(at, 1).unwrap()[0];
                assert_eq!(got, acc, "{tag} ({i}, {j})");
            }
        }
    }
}

#[test]
fn matmul_f16_sm80_is_exact_on_ampere_and_hopper() {
    let q = "m16n8k16.f32.f16.f16.f32";
    matmul("matmul_f16_sm80", "a100", Instr::MmaSync, q, (128, 128, 64));
    matmul("matmul_f16_sm80", "h800", Instr::MmaSync, q, (144, 160, 80));
}

#[test]
fn matmul_f16_sm90_is_exact() {
    let q = "m64n128k16.f32.f16.f16";
    matmul("matmul_f16_sm90", "h800", Instr::Wgmma, q, (144, 160, 192));
}

#[test]
fn matmul_bf16_sm90_is_exact() {
    let q = "m64n64k16.f32.bf16.bf16";
    matmul("matmul_bf16_f32out_sm90", "h800", Instr::Wgmma, q, (64, 80, 336));
}

#[test]
fn matmul_tf32_sm90_is_exact() {
    let q = "m64n64k8.f32.tf32.tf32";
    matmul("matmul_tf32_sm90", "h100", Instr::Wgmma, q, (80, 64, 112));
}

/// Causal attention against f64.
fn flash(tag: &str, d: usize, block: usize) {
    let Some(kernel) = Kernel::load(tag) else { return };
    let (heads, s) = (2, 160);
    let n = heads * s * d;
    let gen_bf16 = |seed| -> Vec<bf16> { noise(seed, n).into_iter().map(bf16::from_f32).collect() };
    let (q, k, v) = (gen_bf16(10), gen_bf16(11), gen_bf16(12));
    let dev = &kernel.device;
    let [pq, pk, pv] = [&q, &k, &v].map(|x| dev.upload(x).unwrap());
    let out = dev.alloc(2 * n as u64).unwrap();
    let lse = dev.alloc(4 * (heads * s) as u64).unwrap();
    let scale = 1.0 / (d as f32).sqrt();
    let params = Params::new().with(pq).with(pk).with(pv).with(out).with(lse).with(scale);
    let params = params.with((s * d) as u32).with(d as u32).with(s as u32);
    let outputs = [(out, 2 * n), (lse, 4 * heads * s)];
    kernel.run([s.div_ceil(block) as u32, heads as u32, 1], params, &outputs);
    let got: Vec<bf16> = dev.download(out, n).unwrap();
    for h in 0..heads {
        for i in 0..s {
            let row = |x: &[bf16], i: usize| -> Vec<f64> {
                x[(h * s + i) * d..][..d].iter().map(|v| v.to_f64()).collect()
            };
            let qi = row(&q, i);
            let scores: Vec<f64> = (0..=i)
                .map(|j| {
                    let kj = row(&k, j);
                    f64::from(scale) * qi.iter().zip(kj).map(|(a, b)| a * b).sum::<f64>()
                })
                .collect();
            let most = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for e in 0..d {
                let expected: f64 = (0..=i).map(|j| weights[j] * row(&v, j)[e]).sum::<f64>() / sum;
                let got = got[(h * s + i) * d + e].to_f64();
                // Probabilities and results are rounded to bf16: 2^-8 of values below 1.
                assert!((got - expected).abs() < 8e-3, "{tag} {h} {i} {e}: {got} {expected}");
            }
        }
    }
}

#[test]
fn flash_attention_sm80_is_right() {
    flash("flash_fwd_bf16_d64_causal_sm80", 64, 64);
}

#[test]
fn flash_attention_sm90_is_right() {
    flash("flash_fwd_bf16_d64_causal_sm90", 64, 64);
    flash("flash_fwd_bf16_d128_causal_sm90", 128, 128);
}
