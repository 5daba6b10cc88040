//! What a step does where hardware, software or layout are not those of the published run.

#[path = "../../conformance/src/model_code.rs"]
mod model_code;

use fathom_simulator::config::Scenario;
use fathom_simulator::events::Detail;
use fathom_simulator::first_principles::FirstPrinciples;
use fathom_simulator::kernel_time::AttentionShape;
use fathom_simulator::step::{StepReport, simulate};
use model_code::ModelCode;

fn report(preset: &str, set: &[&str]) -> StepReport {
    let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
    let scenario = Scenario::preset(preset, &set).unwrap();
    simulate(&scenario, &FirstPrinciples::new(ModelCode), Detail::Totals).unwrap().report
}

fn step_s(preset: &str, set: &[&str]) -> f64 {
    report(preset, set).step_time_s
}

/// With every rate at 1e20 what is left is launches and latencies, which are no rates.
#[test]
fn infinite_hardware_leaves_launches_and_latencies() {
    let rates = [
        "cluster.network.nic_bytes_per_s",
        "cluster.gpu.scale_up_bytes_per_s",
        "cluster.gpu.bf16_flops",
        "cluster.gpu.fp8_flops",
        "cluster.gpu.fp32_flops",
        "cluster.gpu.memory_bytes_per_s",
        "cluster.gpu.l2_bytes_per_s",
        "cluster.gpu.clock_hz",
    ];
    let infinite = rates.map(|key| format!("{key}=1e20"));
    let infinite = infinite.each_ref().map(String::as_str);
    for preset in ["deepseek-v3-gb200-nvl72-1152", "deepseek-v3-b200-2048", "deepseek-v3-h800-2048"]
    {
        let (usual, left) = (step_s(preset, &[]), step_s(preset, &infinite));
        assert!(left < 0.06 * usual, "{preset}: {left} of {usual} s");
    }
}

/// Overlapped pairs pay wherever exchanges take time; splitting the backward exposes them, which
/// costs more than its smaller bubble saves until the network is free.
#[test]
fn schedules_rank_as_what_they_hide() {
    for preset in ["deepseek-v3-h800-2048", "deepseek-v3-b200-2048"] {
        let of = |schedule: &str, free: bool| {
            let schedule = format!("schedule=\"{schedule}\"");
            let mut set = vec![schedule.as_str()];
            if free {
                set.extend([
                    "cluster.network.nic_bytes_per_s=1e20",
                    "cluster.gpu.scale_up_bytes_per_s=1e20",
                    "expert_load.deviation=0.0",
                ]);
            }
            step_s(preset, &set)
        };
        assert!(of("dualpipe", false) < of("1f1b", false), "{preset}");
        assert!(of("1f1b", false) < of("zb1p", false), "{preset}");
        assert!(of("zb1p", true) < of("1f1b", true), "{preset}");
    }
}

/// 70B on 512 GPUs in eight micro-batches: ZeRO-3 gathers twice and reduces once in each.
#[test]
fn sharded_parameters_travel_with_every_micro_batch() {
    let layout = [
        "cluster.gpus=512",
        "cluster.gpu.preset=\"h100\"",
        "parallel.tp=2",
        "parallel.pp=1",
        "parallel.dp=256",
        "training.micro_batch=2",
        "training.global_batch=4096",
        "schedule=\"1f1b\"",
        "cluster.network.nic_bytes_per_s=5e9",
    ];
    let of = |more: &[&str]| report("llama-3.1-70b-mi300x-1024", &[&layout, more].concat());
    let once = of(&["parallel.zero=1"]).breakdown_s;
    let all = of(&["parallel.zero=3", "stack.fsdp_prefetch=false"]).breakdown_s;
    // The optimizer itself is booked with the reduction, and is small here.
    let ratio = all.optimizer / once.optimizer;
    assert!((7.0..=8.0).contains(&ratio), "reduced {ratio} times");
    assert!((all.other / once.other / 16.0 - 1.0).abs() < 1e-9, "{all:?} {once:?}");
    let hidden = of(&["parallel.zero=3"]);
    let exposed = hidden.breakdown_s.optimizer + hidden.breakdown_s.other;
    assert!(exposed < all.optimizer + all.other && exposed > 0.5 * (all.optimizer + all.other));
}

/// Context parallelism deals one head's work out, too: 16 ranks of 8 heads do what one would.
#[test]
fn ranks_of_a_sequence_share_its_attention() {
    let whole = AttentionShape {
        heads: 8,
        queries: 131_072,
        keys: 131_072,
        qk_dim: 128,
        v_dim: 128,
        causal: true,
    };
    let ratio = 16.0 * whole.share_of(16).flops(false) / whole.flops(false);
    assert!((ratio - 1.0).abs() < 2e-3, "{ratio}");
    assert_eq!(whole.share_of(1), whole);
}

#[test]
fn forms_of_context_parallelism_differ_and_are_all_slower_on_a_slow_network() {
    let layout =
        ["training.seq_len=131072", "training.global_batch=128", "parallel.cp=16", "parallel.dp=8"];
    for form in ["ring", "all_to_all", "hybrid", "gather", "gather_compiled"] {
        let form = format!("stack.context=\"{form}\"");
        let of = |nic: &str| {
            step_s("llama-3.1-405b-h100-16384", &[&layout[..], &[form.as_str(), nic]].concat())
        };
        let (fast, slow) =
            (of("cluster.network.nic_bytes_per_s=50e9"), of("cluster.network.nic_bytes_per_s=5e9"));
        assert!(slow > fast, "{form}: {slow} {fast}");
    }
}

/// A GPU waits for its host where kernels are shorter than their launches.
#[test]
fn a_slow_host_sets_the_time_and_graphs_take_it_away() {
    let preset = "deepseek-v3-h800-2048";
    let of = |set: &[&str]| step_s(preset, set);
    let usual = of(&[]);
    let eager = of(&["stack.graphs=\"none\"", "stack.launch_us=2000"]);
    assert!(eager > 2.0 * usual, "{eager} against {usual}");
    let twice = of(&["stack.graphs=\"none\"", "stack.launch_us=4000"]);
    assert!((twice / eager - 2.0).abs() < 0.2, "{twice} against {eager}");
    assert_eq!(of(&["stack.graphs=\"full\"", "stack.launch_us=2000"]), usual);
    let part = of(&["stack.graphs=\"dense\"", "stack.launch_us=2000"]);
    assert!(usual < part && part < eager, "{part}");
}

#[test]
fn a_power_limit_slows_a_step_by_less_than_the_power() {
    let usual = step_s("llama-3.1-405b-h100-16384", &[]);
    let limited = step_s("llama-3.1-405b-h100-16384", &["cluster.gpu.power_limit_w=500"]);
    let share = usual / limited;
    assert!(share > 500.0 / 700.0 && share < 0.95, "{share}");
}

/// Gradients and parameters travel under computation where the stack says so.
#[test]
fn overlap_of_the_stack_never_costs_time() {
    let preset = "llama-3.1-405b-h100-16384";
    let usual = step_s(preset, &[]);
    for key in ["stack.tp_overlap", "stack.dp_overlap"] {
        assert!(step_s(preset, &[&format!("{key}=true")]) < usual, "{key}");
    }
    let moe = "deepseek-v3-b200-2048";
    let by = |overlap: &str| {
        let overlap = format!("stack.ep_overlap=\"{overlap}\"");
        step_s(moe, &["schedule=\"1f1b\"", &overlap])
    };
    let (none, wgrad, batch) = (by("none"), by("wgrad"), by("batch"));
    assert!(batch < wgrad && wgrad < none, "{batch} {wgrad} {none}");
}

/// A blocking network slows what crosses its leaves, on every topology; trees that block nothing
/// differ in latency only, which is why they give steps that are close.
#[test]
fn oversubscribed_uplinks_cost_time() {
    for topology in ["mpft", "fat_tree2", "fat_tree3", "rail"] {
        let topology = format!("cluster.network.topology=\"{topology}\"");
        let of = |by: &str| step_s("deepseek-v3-h800-2048", &[&topology, by]);
        let free = of("cluster.network.oversubscription=1.0");
        let blocked = of("cluster.network.oversubscription=4.0");
        assert!(blocked > 1.005 * free, "{topology}: {blocked} {free}");
    }
}

/// Flows that are hashed onto uplinks meet there, which packets that are spread do not.
#[test]
fn hashed_flows_cost_time() {
    for topology in ["mpft", "fat_tree2", "fat_tree3", "rail"] {
        let topology = format!("cluster.network.topology=\"{topology}\"");
        let of = |by: &str| step_s("deepseek-v3-h800-2048", &[&topology, by]);
        let spread = of("cluster.network.routing=\"adaptive\"");
        let hashed = of("cluster.network.routing=\"ecmp\"");
        assert!(hashed > 1.0005 * spread, "{topology}: {hashed} {spread}");
        assert_eq!(spread, of("cluster.network.oversubscription=1.0"));
    }
}
