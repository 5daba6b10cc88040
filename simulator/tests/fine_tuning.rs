//! Adapters that are trained instead of weights, and what lies in the hosts' memory.

#[path = "../../conformance/src/model_code.rs"]
mod model_code;

use fathom_simulator::config::{LoraTarget, Scenario};
use fathom_simulator::events::Detail;
use fathom_simulator::first_principles::FirstPrinciples;
use fathom_simulator::kernel_time::Work;
use fathom_simulator::step::{Simulation, simulate};
use fathom_trace::Phase;
use model_code::ModelCode;

const LAYOUT: [&str; 10] = [
    "stack.stages=\"even\"",
    "cluster.preset=\"h100-16384\"",
    "cluster.gpus=32",
    "parallel.tp=4",
    "parallel.pp=4",
    "parallel.dp=2",
    "training.global_batch=32",
    "training.micro_batch=1",
    "training.precision=\"bf16\"",
    "training.recompute=\"none\"",
];
const ADAPTERS: [&str; 2] = ["lora.rank=32", "lora.targets=[\"qkv\"]"];

fn scenario(more: &[&str]) -> Scenario {
    let set = LAYOUT.iter().chain(more).map(|s| (*s).to_owned()).collect::<Vec<_>>();
    Scenario::preset("llama-3.1-70b-mi300x-1024", &set).unwrap()
}

fn run(more: &[&str]) -> Simulation {
    simulate(&scenario(more), &FirstPrinciples::new(ModelCode), Detail::Totals).unwrap()
}

/// FLOPs of the products of all layers of a kind on one micro-batch, by phase.
fn products(more: &[&str], phase: Phase) -> f64 {
    let s = scenario(more);
    let kernels = FirstPrinciples::new(ModelCode).kernel_times(&s).unwrap();
    let flops = |k: &fathom_simulator::lowering::Kernel| match &k.work {
        Work::Gemm(shape, _) => shape.flops(),
        _ => 0.0,
    };
    kernels.iter().filter(|(_, k, _)| k.phase == phase).map(|(_, k, _)| flops(k)).sum()
}

/// Frozen weights: no products for their gradients, the others as ever.
#[test]
fn frozen_weights_leave_forward_and_input_gradients() {
    for phase in [Phase::F, Phase::B] {
        assert_eq!(products(&ADAPTERS, phase), products(&[], phase));
    }
    assert!(products(&[], Phase::W) > 0.0);
    assert_eq!(products(&ADAPTERS, Phase::W), 0.0);
}

/// Qkv of LLaMA-3.1-70B: 8192 to 10,240. A rank holds 20 of 80 layers and a quarter of each; BF16
/// weights, FP32 gradients, masters and moments, these over two ranks (ZeRO-1).
#[test]
fn memory_of_adapters_by_hand() {
    let (all, adapted) = (run(&[]), run(&ADAPTERS));
    let (rank, _) = all.memory.fullest();
    let layers = adapted.report.stage_layers[rank] as f64;
    let parameters = layers * 32.0 * (8192.0 + 10_240.0) / 4.0;
    let (all, peak) = (all.memory.ranks[rank].peak, adapted.memory.ranks[rank].peak);
    assert!((peak.gradients / (4.0 * parameters) - 1.0).abs() < 1e-9, "{peak:?}");
    assert!((peak.optimizer / (12.0 * parameters / 2.0) - 1.0).abs() < 1e-9, "{peak:?}");
    assert!((peak.weights - all.weights - 2.0 * parameters).abs() < 1.0, "{peak:?} {all:?}");
    assert!(peak.activations < all.activations);
}

/// A step with adapters takes between two thirds (no weight gradients, products alone) and all of
/// the time; wider ones take longer.
#[test]
fn a_step_with_adapters_is_shorter_and_grows_with_their_rank() {
    let step = |set: &[&str]| run(set).report.step_time_s;
    let all = step(&[]);
    let narrow = step(&ADAPTERS);
    let wide =
        step(&["lora.rank=1024", "lora.targets=[\"qkv\", \"output\", \"gate_up\", \"down\"]"]);
    assert!(0.6 * all < narrow && narrow < 0.95 * all, "{narrow} of {all} s");
    assert!(wide > narrow, "{wide} {narrow}");
    assert_eq!(scenario(&ADAPTERS).lora.unwrap().targets, [LoraTarget::Qkv]);
}

/// Moments that leave the GPU are on the host; the update waits for link and host memory, by hand.
#[test]
fn moments_on_the_host_by_hand() {
    let usual = run(&[]);
    let away = run(&["offload.optimizer=0.5"]);
    let (rank, _) = usual.memory.fullest();
    let (before, after) = (usual.memory.ranks[rank].peak, away.memory.ranks[rank].peak);
    // 12 bytes a parameter, of which half of 8 leave.
    let parameters = before.optimizer / 12.0;
    assert!((before.optimizer - after.optimizer - 4.0 * parameters).abs() < 1.0);
    assert!((away.memory.ranks[rank].host_bytes - 4.0 * parameters).abs() < 1.0);
    let longest = away.memory.ranks.iter().map(|r| r.host_bytes).fold(0.0, f64::max) / 4.0;
    let host_s = 0.5 * longest * (6.0 / 50e9 + 22.0 / 38e9);
    let added = away.report.step_time_s - usual.report.step_time_s;
    // What the GPU updates itself is less by half, a hundredth of the host's time.
    assert!((added / host_s - 1.0).abs() < 0.05, "{added} against {host_s} s");
}

/// Qwen3-30B on 16 H100, TP2 PP2 EP4: NVIDIA reports 15.3 GB saved where all moments leave
/// (docs/training/cpu-offloading.md in NVIDIA-NeMo/Megatron-Bridge).
#[test]
fn moments_that_leave_save_what_was_measured() {
    let run = |share: &str| {
        let set = [
            "model.preset=\"qwen3-30b-a3b\"",
            "model.mtp_depth=0",
            "cluster.preset=\"h100-16384\"",
            "cluster.gpus=16",
            "parallel.tp=2",
            "parallel.pp=2",
            "parallel.dp=4",
            "parallel.ep=4",
            "parallel.zero=1",
            "schedule=\"1f1b\"",
            "training.precision=\"bf16\"",
            "training.micro_batch=1",
            "training.global_batch=8",
            "stack.preset=\"megatron-core\"",
            share,
        ];
        let set = set.map(str::to_owned);
        let text = "name = \"offload\"\n[training]\nseq_len = 4096\nrecompute = \"none\"\n";
        let s = Scenario::from_toml("offload.toml", text, None, &set).unwrap();
        simulate(&s, &FirstPrinciples::new(ModelCode), Detail::Totals).unwrap()
    };
    let (kept, away) = (run("offload.optimizer=0.0"), run("offload.optimizer=1.0"));
    let saved = kept.memory.fullest().1 - away.memory.fullest().1;
    assert!((saved / 15.3e9 - 1.0).abs() < 0.02, "{saved}");
}

/// Activations on the host cost nothing on a fast link, time on a slow one, and memory nowhere.
#[test]
fn activations_on_the_host_hide_behind_computation() {
    let usual = run(&[]);
    let fast = run(&["offload.activations=1.0", "offload.link_bytes_per_s=1e15"]);
    let slow = run(&["offload.activations=1.0", "offload.link_bytes_per_s=1e9"]);
    assert_eq!(fast.report.step_time_s, usual.report.step_time_s);
    assert!(slow.report.step_time_s > 2.0 * usual.report.step_time_s);
    let (rank, _) = usual.memory.fullest();
    let (before, after) = (usual.memory.ranks[rank].peak, fast.memory.ranks[rank].peak);
    assert_eq!(after.activations, 0.0);
    assert!((fast.memory.ranks[rank].host_bytes / before.activations - 1.0).abs() < 1e-9);
    let small = run(&["offload.activations=1.0", "offload.memory_bytes=1e9"]);
    let complaint = small.report.memory_complaint.unwrap();
    assert!(complaint.contains("of 1 GB of host memory a GPU"), "{complaint}");
}
