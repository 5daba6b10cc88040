//! What every number of a scenario may be. A table, so that a value out of all proportion is
//! refused with its key, before anything is computed from it.

use super::Scenario;
use crate::hardware::cluster::Cluster;

/// A whole number by key: value, least, most.
type Size = (&'static str, u64, u64, u64);
/// Another number by key: value, least, most.
type Number = (&'static str, f64, f64, f64);

/// The first number of a cluster outside its limits.
pub(crate) fn machine(c: &Cluster) -> Option<(&'static str, String)> {
    outside(counts(c), rates(c))
}

/// The first number outside its limits: key, and a message with what is allowed.
pub(crate) fn first_outside(s: &Scenario) -> Option<(&'static str, String)> {
    let numbers = rates(&s.cluster).into_iter().chain(run(s)).collect();
    outside(sizes(s).into_iter().chain(counts(&s.cluster)).collect(), numbers)
}

fn outside(sizes: Vec<Size>, numbers: Vec<Number>) -> Option<(&'static str, String)> {
    let mut sizes =
        sizes.into_iter().filter(|&(_, value, least, most)| !(least..=most).contains(&value));
    if let Some((key, value, least, most)) = sizes.next() {
        return Some((key, format!("expected {least} to {most}, found {value}")));
    }
    let mut numbers =
        numbers.into_iter().filter(|&(_, value, least, most)| !(least..=most).contains(&value));
    let (key, value, least, most) = numbers.next()?;
    Some((key, format!("expected {least:?} to {most:?}, found {value:?}")))
}

fn sizes(s: &Scenario) -> Vec<Size> {
    let (p, t) = (&s.parallel, &s.training);
    vec![
        ("parallel.tp", p.tp, 1, 1 << 24),
        ("parallel.cp", p.cp, 1, 1 << 24),
        ("parallel.pp", p.pp, 1, 1 << 12),
        ("parallel.dp", p.dp, 1, 1 << 24),
        ("parallel.ep", p.ep, 1, 1 << 16),
        ("parallel.zero", u64::from(p.zero), 0, 3),
        ("interleave", s.interleave, 1, 255),
        ("training.seq_len", t.seq_len, 1, 1 << 24),
        ("training.micro_batch", t.micro_batch, 1, 1 << 12),
        ("training.global_batch", t.global_batch, 1, 1 << 28),
        ("lora.rank", s.lora.as_ref().map_or(1, |l| l.rank), 1, 1 << 16),
        ("ramp.start_batch", s.ramp.map_or(1, |r| r.start_batch), 1, 1 << 28),
    ]
}

/// Counts and sizes of the machine.
fn counts(c: &Cluster) -> Vec<Size> {
    let n = &c.network;
    vec![
        ("cluster.gpus", c.gpus, 1, 1 << 24),
        ("cluster.gpus_per_node", c.gpus_per_node, 1, 1 << 12),
        ("cluster.network.nics_per_node", n.nics_per_node, 1, 1 << 12),
        ("cluster.network.planes", n.planes, 1, 1 << 12),
        ("cluster.network.switch_ports", n.switch_ports, 1, 1 << 12),
        ("cluster.gpu.sms", c.gpu.sms, 1, 1 << 16),
        ("cluster.gpu.memory_bytes", c.gpu.memory_bytes, 1, 1 << 50),
        ("cluster.gpu.l2_bytes", c.gpu.l2_bytes, 1, 1 << 50),
    ]
}

/// Rates, shares and times of the machine.
fn rates(c: &Cluster) -> Vec<Number> {
    let (g, n) = (&c.gpu, &c.network);
    // Fast enough that a byte takes a finite time, slow enough for any wish.
    let (slow, fast) = (1.0, 1e24);
    vec![
        ("cluster.usd_per_gpu_hour", c.usd_per_gpu_hour, 0.0, 1e9),
        ("cluster.gpu.clock_hz", g.clock_hz, slow, fast),
        ("cluster.gpu.bf16_flops", g.bf16_flops, slow, fast),
        // 0 has none.
        ("cluster.gpu.fp8_flops", g.fp8_flops, 0.0, fast),
        ("cluster.gpu.fp4_flops", g.fp4_flops, 0.0, fast),
        ("cluster.gpu.fp4_achievable", g.fp4_achievable, 0.0, 1.0),
        ("cluster.gpu.fp32_flops", g.fp32_flops, slow, fast),
        ("cluster.gpu.bf16_achievable", g.bf16_achievable, 1e-6, 1.0),
        ("cluster.gpu.fp8_achievable", g.fp8_achievable, 0.0, 1.0),
        ("cluster.gpu.memory_bytes_per_s", g.memory_bytes_per_s, slow, fast),
        ("cluster.gpu.l2_bytes_per_s", g.l2_bytes_per_s, slow, fast),
        ("cluster.gpu.scale_up_bytes_per_s", g.scale_up_bytes_per_s, slow, fast),
        ("cluster.gpu.scale_up_usable", g.scale_up_usable, 1e-6, 1.0),
        ("cluster.gpu.collective_usable", g.collective_usable.unwrap_or(1.0), 1e-6, 1.0),
        ("cluster.gpu.tdp_w", g.tdp_w, 0.0, 1e9),
        ("cluster.gpu.power_limit_w", g.power_limit_w.unwrap_or(0.0), 0.0, 1e9),
        ("cluster.network.nic_bytes_per_s", n.nic_bytes_per_s, slow, fast),
        ("cluster.network.oversubscription", n.oversubscription, 1.0, 1e3),
        ("cluster.network.scale_up_latency_s", n.scale_up_latency_s, 0.0, 1e3),
        ("cluster.network.same_leaf_latency_s", n.same_leaf_latency_s, 0.0, 1e3),
        ("cluster.network.cross_leaf_latency_s", n.cross_leaf_latency_s, 0.0, 1e3),
    ]
}

/// The run, its failures and its prices.
fn run(s: &Scenario) -> Vec<Number> {
    let (r, p) = (&s.reliability, &s.pricing);
    vec![
        ("training.total_tokens", s.training.total_tokens, 0.0, 1e24),
        ("memory_headroom", s.memory_headroom, 0.0, 0.99),
        ("ramp.tokens", s.ramp.map_or(0.0, |r| r.tokens), 0.0, 1e24),
        ("stack.launch_us", s.stack.launch_us, 0.0, 1e6),
        ("stack.elementwise_passes", s.stack.elementwise_passes, 0.0, 1e3),
        ("stack.attention_time[0]", s.stack.attention_time[0], 1e-3, 1e3),
        ("stack.attention_time[1]", s.stack.attention_time[1], 1e-3, 1e3),
        ("offload.optimizer", s.offload.optimizer, 0.0, 1.0),
        ("offload.activations", s.offload.activations, 0.0, 1.0),
        ("offload.link_bytes_per_s", s.offload.link_bytes_per_s, 1.0, 1e24),
        ("offload.update_bytes_per_s", s.offload.update_bytes_per_s, 1.0, 1e24),
        ("offload.memory_bytes", s.offload.memory_bytes, 0.0, 1e24),
        ("expert_load.deviation", s.expert_load.deviation, 0.0, 10.0),
        ("reliability.gpu_mtbf_hours", r.gpu_mtbf_hours, 1e-3, 1e24),
        ("reliability.node_mtbf_hours", r.node_mtbf_hours, 1e-3, 1e24),
        ("reliability.nic_mtbf_hours", r.nic_mtbf_hours, 1e-3, 1e24),
        ("reliability.checkpoint_s", r.checkpoint_s, 1e-6, 1e7),
        ("reliability.checkpoint_interval_s", r.checkpoint_interval_s, 0.0, 1e9),
        ("reliability.restart_s", r.restart_s, 0.0, 1e7),
        ("pricing.capital_usd_per_gpu", p.capital_usd_per_gpu, 0.0, 1e12),
        ("pricing.lifetime_years", p.lifetime_years, 1e-3, 1e3),
        ("pricing.utilization", p.utilization, 1e-6, 1.0),
        ("pricing.budget_usd", p.budget_usd, 0.0, 1e18),
        ("pricing.budget_mw", p.budget_mw, 0.0, 1e9),
        ("pricing.usd_per_kwh", p.usd_per_kwh, 0.0, 1e6),
        ("pricing.pue", p.pue, 1.0, 1e3),
        ("pricing.host_power_share", p.host_power_share, 0.0, 1e3),
        ("search.memory_limit_gb", s.search.memory_limit_gb, 0.0, 1e9),
    ]
}
