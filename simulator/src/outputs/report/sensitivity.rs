//! Which input matters most: every number of the hardware up and down, every wish of the report
//! granted by itself.

use serde::Serialize;

use crate::config::{Scenario, WhatIf};
use crate::error::SimError;
use crate::events::Detail;
use crate::parallel::CostModel;
use crate::step::simulate;

/// How the step time answers to one number of the hardware.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Input {
    /// The number's dotted key in the scenario file.
    pub key: &'static str,
    /// Step time relative to the base with the number divided by the factor.
    pub less: f64,
    /// Step time relative to the base with the number multiplied by the factor.
    pub more: f64,
}

/// How the step time answers to one wish.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Wish {
    /// Key below `what_if`.
    pub key: &'static str,
    /// Step time relative to the base, with the wish granted.
    pub step: f64,
}

/// How the step answers to everything at once.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sensitivity {
    /// By what every number is divided and multiplied.
    pub factor: f64,
    /// The hardware's numbers, the largest effect first.
    pub inputs: Vec<Input>,
    /// Every wish by itself.
    pub wishes: Vec<Wish>,
}

/// Factor of the report and of `--json`.
pub const FACTOR: f64 = 1.2;

/// Moves every number by [`FACTOR`] and grants every wish, one at a time.
pub fn sensitivity(base: &Scenario, model: &dyn CostModel) -> Result<Sensitivity, SimError> {
    let (inputs, wishes) = (inputs(base, model, FACTOR)?, wishes(base, model)?);
    Ok(Sensitivity { factor: FACTOR, inputs, wishes })
}

/// A number of the scenario as a slider.
type Slider = (&'static str, fn(&mut Scenario) -> &mut f64);

/// The hardware's numbers, by dotted key.
pub const SLIDERS: [Slider; 9] = [
    ("cluster.gpu.fp8_flops", |s| &mut s.cluster.gpu.fp8_flops),
    ("cluster.gpu.bf16_flops", |s| &mut s.cluster.gpu.bf16_flops),
    ("cluster.gpu.fp32_flops", |s| &mut s.cluster.gpu.fp32_flops),
    ("cluster.gpu.memory_bytes_per_s", |s| &mut s.cluster.gpu.memory_bytes_per_s),
    ("cluster.gpu.l2_bytes_per_s", |s| &mut s.cluster.gpu.l2_bytes_per_s),
    ("cluster.gpu.scale_up_bytes_per_s", |s| &mut s.cluster.gpu.scale_up_bytes_per_s),
    ("cluster.network.nic_bytes_per_s", |s| &mut s.cluster.network.nic_bytes_per_s),
    ("cluster.network.cross_leaf_latency_s", |s| &mut s.cluster.network.cross_leaf_latency_s),
    ("cluster.network.scale_up_latency_s", |s| &mut s.cluster.network.scale_up_latency_s),
];

/// A switch of [`WhatIf`].
type Switch = (&'static str, fn(&mut WhatIf) -> &mut bool);

/// Every wish of [`WhatIf`], by its key.
pub const SWITCHES: [Switch; 11] = [
    ("comm_off_sms", |w| &mut w.comm_off_sms),
    ("wide_accumulation", |w| &mut w.wide_accumulation),
    ("scaling_in_tensor_core", |w| &mut w.scaling_in_tensor_core),
    ("fused_cast_tma", |w| &mut w.fused_cast_tma),
    ("warp_level_cast", |w| &mut w.warp_level_cast),
    ("near_memory_cast", |w| &mut w.near_memory_cast),
    ("transposed_reads", |w| &mut w.transposed_reads),
    ("unified_network", |w| &mut w.unified_network),
    ("compressed_combine", |w| &mut w.compressed_combine),
    ("hardware_ordering", |w| &mut w.hardware_ordering),
    ("traffic_priority", |w| &mut w.traffic_priority),
];

/// Moves every slider by `factor` up and down, and gives the largest effect first.
pub fn inputs(base: &Scenario, model: &dyn CostModel, factor: f64) -> Result<Vec<Input>, SimError> {
    let step = |s: &Scenario| simulate(s, model, Detail::Totals).map(|sim| sim.report.step_time_s);
    let base_s = step(base)?;
    let mut inputs = Vec::new();
    for (key, field) in SLIDERS {
        let at = |k: f64| {
            let mut s = base.clone();
            *field(&mut s) *= k;
            step(&s).map(|t| t / base_s)
        };
        inputs.push(Input { key, less: at(1.0 / factor)?, more: at(factor)? });
    }
    let effect = |i: &Input| (i.less - i.more).abs();
    inputs.sort_by(|a, b| effect(b).total_cmp(&effect(a)));
    Ok(inputs)
}

/// Grants every wish by itself, and says what the step then takes.
pub fn wishes(base: &Scenario, model: &dyn CostModel) -> Result<Vec<Wish>, SimError> {
    let step = |s: &Scenario| simulate(s, model, Detail::Totals).map(|sim| sim.report.step_time_s);
    let base_s = step(base)?;
    let mut wishes = Vec::new();
    for (key, field) in SWITCHES {
        let mut s = base.clone();
        *field(&mut s.what_if) = true;
        wishes.push(Wish { key, step: step(&s)? / base_s });
    }
    Ok(wishes)
}
