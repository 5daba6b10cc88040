//! Quantises two matrices as DeepSeek-V3 does, multiplies them to the bit as Hopper's tensor cores
//! do, and holds somebody's result against that.
//!
//! `cargo run --release --example gemm_bits`

use fathom_numerics::gemm::{GemmConfig, gemm_fp8};
use fathom_numerics::quant::{QuantConfig, quantize_block, quantize_tile};
use ndarray::Array2;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Activations [m, k] and a Linear's weight [n, k].
    let wave = |scale: f32| move |(i, j): (usize, usize)| (scale * (i * 131 + j * 17) as f32).sin();
    let x = Array2::from_shape_fn((64, 512), wave(0.37));
    let w = Array2::from_shape_fn((96, 512), wave(0.11));

    // E4M3, one scale for 1 x 128 of an activation and for 128 x 128 of a weight.
    let x = quantize_tile(x.view(), 128, &QuantConfig::default())?;
    let w = quantize_block(w.view(), &QuantConfig::default())?;
    println!("x: {:?} codes, {:?} scales", x.codes.dim(), x.scales.dim());

    // 14-bit accumulation on the tensor core, promoted to FP32 every 128 of K.
    let exact = gemm_fp8(&x.operand(), &w.operand(), &GemmConfig::default())?;

    // A kernel's output would be read from a file; here a wider accumulator stands for it.
    let values = |q| fathom_numerics::quant::dequantize(q).mapv(f64::from);
    let theirs = values(&x).dot(&values(&w).t()).mapv(|d| d as f32);
    let differ = exact.iter().zip(&theirs).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    println!("{differ} of {} elements differ from a product in f64", exact.len());
    Ok(())
}
