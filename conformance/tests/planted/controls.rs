//! Outputs that no fault of the list made: a confident cause, or a K block, would be a false lead.

use fathom_conformance::case_file::CaseFile;
use fathom_numerics::formats::{Format, to_bf16};
use fathom_reference::Tensor;
use fathom_trace::DType;
use half::bf16;

use super::data::Random;
use super::{attention, casts, elementwise, gemm, grouped};
use Format::{Bf16, F32};

/// An output without a cause to be named.
pub struct Control {
    pub name: &'static str,
    pub plant: fn() -> CaseFile,
    /// Whether it is the contract's own output.
    pub right: bool,
}

pub const CONTROLS: &[Control] = &[
    Control { name: "gemm_fp8 to F32, right", plant: || gemm::without_fault(F32), right: true },
    Control { name: "gemm_fp8 to BF16, right", plant: || gemm::without_fault(Bf16), right: true },
    Control { name: "grouped_gemm_fp8, right", plant: grouped::without_fault, right: true },
    Control { name: "quantize_tile, right", plant: casts::without_fault, right: true },
    Control { name: "rms_norm, right", plant: elementwise::norm_without_fault, right: true },
    Control { name: "swiglu, right", plant: elementwise::swiglu_without_fault, right: true },
    Control { name: "attention, right", plant: attention::without_fault, right: true },
    Control { name: "gemm_fp8, normals of its size", plant: random_output, right: false },
    Control { name: "gemm_fp8, one bit flipped", plant: one_bit, right: false },
    Control { name: "gemm_fp8, 1e-5 noise", plant: noise, right: false },
    Control { name: "gemm_fp8 to BF16, a unit up or down", plant: bf16_noise, right: false },
    Control { name: "quantize_tile, any codes", plant: random_codes, right: false },
    Control { name: "quantize_tile, one code off", plant: one_code, right: false },
];

/// The contract's FP32 output, changed.
fn changed(change: impl Fn(&mut [f32])) -> CaseFile {
    let mut file = gemm::without_fault(F32);
    change(file.expected.get_mut("d").unwrap().as_mut_slice());
    file
}

fn random_output() -> CaseFile {
    changed(|d| {
        let squares: f64 = d.iter().map(|&x| f64::from(x).powi(2)).sum();
        let size = (squares / d.len() as f64).sqrt() as f32;
        let normals = Random::new(951).normals(d.len());
        d.iter_mut().zip(normals).for_each(|(x, n)| *x = n * size);
    })
}

fn one_bit() -> CaseFile {
    changed(|d| d[4321] = f32::from_bits(d[4321].to_bits() ^ 1 << 19))
}

fn noise() -> CaseFile {
    changed(|d| {
        let normals = Random::new(953).normals(d.len());
        d.iter_mut().zip(normals).for_each(|(x, n)| *x *= 1.0 + 1e-5 * n);
    })
}

fn bf16_noise() -> CaseFile {
    let mut file = gemm::without_fault(Bf16);
    let d = file.expected.get_mut("d").unwrap().as_mut_slice::<bf16>();
    let normals = Random::new(954).normals(d.len());
    for (x, n) in d.iter_mut().zip(normals) {
        let step = n.clamp(-1.4, 1.4).round() * x.to_f32() / 128.0;
        *x = to_bf16(x.to_f32() + step);
    }
    file
}

/// The contract's codes, changed.
fn recoded(change: impl Fn(&mut [u8])) -> CaseFile {
    let mut file = casts::without_fault();
    let q: Tensor = file.expected.remove("q").unwrap();
    let mut codes = q.reinterpret(DType::U8);
    change(codes.as_mut_slice());
    file.expected.insert("q".to_owned(), codes.reinterpret(DType::F8E4M3));
    file
}

fn random_codes() -> CaseFile {
    recoded(|codes| {
        let normals = Random::new(957).normals(codes.len());
        for (code, n) in codes.iter_mut().zip(normals) {
            *code = ((n * 1e4) as i64).rem_euclid(0x7F) as u8;
        }
    })
}

fn one_code() -> CaseFile {
    recoded(|codes| codes[777] ^= 1)
}
