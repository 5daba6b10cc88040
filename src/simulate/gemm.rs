//! `fathom simulate gemm`: one matrix multiplication by tiles and waves.

use clap::ValueEnum;
use fathom_config::Gpu;
use fathom_simulator::kernel_time::{Constants, GemmKind, GemmShape, KernelModel};
use serde_json::json;

use super::parts;
use crate::output::{self, Outcome};

/// Time a matrix multiplication on a GPU
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fathom simulate gemm --m 4096 --n 7168 --k 16384
  fathom simulate gemm --library deep-gemm --m 4096 --n 2112 --k 7168
  fathom simulate gemm --groups 8192,8192,8192,8192 --n 4096 --k 7168 --sms 112 --contended
  fathom simulate gemm --gpu a100 --kind bf16 --m 4096 --n 4096 --k 4096 --json

--json: {seconds, tflops, block_n, waves, mma_s, promotion_s, epilogue_s, memory_bound, sms}.")]
pub struct Args {
    /// GPU preset
    #[arg(long, default_value = "h800")]
    gpu: String,
    /// Rows of the output
    #[arg(long, required_unless_present = "groups", value_parser = clap::value_parser!(u64).range(1..=1 << 32))]
    m: Option<u64>,
    /// Columns of the output
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1 << 32))]
    n: u64,
    /// Inner dimension
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1 << 32))]
    k: u64,
    /// Rows of every group of a grouped GEMM, by commas
    #[arg(long, value_name = "ROWS", value_delimiter = ',', conflicts_with = "m")]
    groups: Vec<u64>,
    /// Operands and result
    #[arg(long, value_enum, default_value = "fp8-one-two")]
    kind: Kind,
    /// How tiles are chosen and promoted; DeepGEMM is fp8-one-two only
    #[arg(long, value_enum, default_value = "best", conflicts_with = "block_n")]
    library: Library,
    /// Tile width; the best one where absent
    #[arg(long, value_parser = clap::value_parser!(u64).range(8..=512))]
    block_n: Option<u64>,
    /// SMs to run on; all where absent
    #[arg(long)]
    sms: Option<u64>,
    /// Communication kernels run beside
    #[arg(long)]
    contended: bool,
    /// Hardware wishes to grant, by commas
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    what_if: Vec<String>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    /// FP8 with 1x128 and 128x128 scales, BF16 out
    Fp8OneTwo,
    /// FP8 with 1x128 scales on both operands, accumulated in FP32
    Fp8OneOne,
    /// BF16
    Bf16,
    /// BF16, accumulated in FP32
    Bf16Accumulate,
    /// FP8 with one scale a tensor, BF16 out
    Fp8,
    /// FP8 with one scale a tensor, accumulated in FP32
    Fp8Accumulate,
    /// FP4 with block scales, BF16 out
    Fp4,
    /// FP4 with block scales, accumulated in FP32
    Fp4Accumulate,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Library {
    /// The best tile width for the profiled kernels
    Best,
    /// DeepGEMM, March 2025
    DeepGemm,
}

impl Kind {
    fn gemm_kind(self) -> GemmKind {
        match self {
            Kind::Fp8OneTwo => GemmKind::Fp8OneTwo,
            Kind::Fp8OneOne => GemmKind::Fp8OneOne,
            Kind::Bf16 => GemmKind::Bf16,
            Kind::Bf16Accumulate => GemmKind::Bf16Accumulate,
            Kind::Fp8 => GemmKind::Fp8,
            Kind::Fp8Accumulate => GemmKind::Fp8Accumulate,
            Kind::Fp4 => GemmKind::Fp4,
            Kind::Fp4Accumulate => GemmKind::Fp4Accumulate,
        }
    }
}

/// Runs the command.
pub fn run(args: &Args) -> output::Result {
    let gpu = Gpu::preset(&args.gpu)?;
    let mut model = KernelModel::alone(&gpu, Constants::FITTED, &parts::what_if(&args.what_if)?);
    model.sms = args.sms.unwrap_or(gpu.sms);
    if model.sms == 0 || model.sms > gpu.sms {
        return Err(format!("--sms {}: {} has 1 to {}", model.sms, gpu.name, gpu.sms).into());
    }
    model.contended = args.contended;
    let shape = match args.m {
        Some(m) => GemmShape::new(m, args.n, args.k),
        None => GemmShape::grouped_m(args.groups.clone(), args.n, args.k),
    };
    let kind = args.kind.gemm_kind();
    if kind.operand_bytes() == 1.0 && gpu.fp8_flops == 0.0 {
        return Err(format!("{} has no FP8 tensor cores: use --kind bf16", gpu.name).into());
    }
    if kind.operand_bytes() < 1.0 && gpu.fp4_flops == 0.0 {
        return Err(format!("{} has no FP4 tensor cores: use --kind bf16", gpu.name).into());
    }
    let deep = args.library == Library::DeepGemm;
    if deep && kind != GemmKind::Fp8OneTwo {
        return Err("--library deep-gemm multiplies --kind fp8-one-two only".into());
    }
    let t = match args.block_n {
        _ if deep => model.deep_gemm(&shape),
        Some(block_n) => model.gemm_with_block(&shape, kind, block_n),
        None => model.gemm_best_block(&shape, kind),
    };
    let tflops = shape.flops() / t.seconds / 1e12;
    if args.json {
        output::print_json(&json!({
            "seconds": t.seconds,
            "tflops": tflops,
            "block_n": t.block_n,
            "waves": t.waves,
            "mma_s": t.mma_s,
            "promotion_s": t.promotion_s,
            "epilogue_s": t.epilogue_s,
            "memory_bound": t.memory_bound,
            "sms": model.sms,
        }))?;
        return Ok(Outcome::Holds);
    }
    let us = |s: f64| s * 1e6;
    outln!("time        {:>10.1} us  {tflops:.0} TFLOPS on {} SMs", us(t.seconds), model.sms);
    outln!("MMA         {:>10.1} us", us(t.mma_s));
    outln!("promotion   {:>10.1} us", us(t.promotion_s));
    outln!("epilogue    {:>10.1} us", us(t.epilogue_s));
    outln!("tiles       {:>10} waves of 128 x {}", t.waves, t.block_n);
    if t.memory_bound {
        outln!("bound by memory or L2 bandwidth");
    }
    Ok(Outcome::Holds)
}
