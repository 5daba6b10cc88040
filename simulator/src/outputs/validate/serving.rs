//! Serving: DeepSeek's published profiles and its service, SGLang on H100 and H200.
//!
//! Figures and set-ups: github.com/deepseek-ai/profile-data (prefill EP32, 16,384 tokens a GPU in
//! prompts of 4096; decode EP128, 128 requests a GPU over 4096 tokens; experts balanced), whose
//! rates are as the SGLang team read them off the traces; github.com/deepseek-ai/open-infra-index,
//! day 6; lmsys.org of 5 May 2025 (96 H100), 17 July 2025 (MTP on H200), 20 July 2025 (Kimi K2 on
//! H200).

use super::{Role, Row};
use crate::error::SimError;
use crate::kernel_time::Constants;
use crate::serve::config::ServeScenario;
use crate::serve::iteration::Batch;
use crate::serve::ops::InferenceOps;
use crate::serve::run::{Ready, prepare, report};

const PROFILE: &str = "Serving: DeepSeek's profiles on H800 (experts balanced)";
const ONLINE: &str = "Serving: DeepSeek's service on H800, a day's means";
const SGLANG: &str = "Serving: SGLang, DeepSeek-V3 on H100 (5 May 2025)";
const H200: &str = "Serving: SGLang on H200 (July 2025)";

/// GPUs of a node in all these rows.
const NODE: f64 = 8.0;
/// The goal of every row that nothing was fitted on.
const GOAL: f64 = 0.15;

/// Asks for scenarios and times iterations of them.
struct Asked<'a> {
    source: &'a dyn InferenceOps,
    constants: Constants,
}

impl Asked<'_> {
    fn ready(&self, preset: &str, set: &[&str]) -> Result<(ServeScenario, Ready), SimError> {
        let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
        let s = ServeScenario::preset(preset, &set)?;
        let ready = prepare(&s, self.source, self.constants)?;
        Ok((s, ready))
    }

    /// Tokens a second of a node that reads `tokens` a GPU in prompts of `length`; `imbalance` of
    /// the experts' placement, or balanced altogether.
    fn reads(
        &self,
        (preset, set): (&str, &[&str]),
        tokens: f64,
        length: f64,
        imbalance: Option<f64>,
    ) -> Result<f64, SimError> {
        let (_, ready) = self.ready(preset, set)?;
        let model = &ready.pools[0].model;
        let load = imbalance.map_or(1.0, |i| model.load(i, 0.0, tokens));
        Ok(NODE * tokens / model.time(&Batch::reading(tokens, length, load)).seconds)
    }

    /// Steps a second of a node times requests of its GPUs: of `requests` a GPU over caches of
    /// `keys` tokens, `per` tokens each a step.
    fn decodes(
        &self,
        (preset, set): (&str, &[&str]),
        [requests, keys, per]: [f64; 3],
        imbalance: Option<f64>,
    ) -> Result<f64, SimError> {
        let (_, ready) = self.ready(preset, set)?;
        let model = &ready.pools[ready.pools.len() - 1].model;
        let load = imbalance.map_or(1.0, |i| model.load(i, requests * per, 0.0));
        let seconds = model.time(&Batch::decoding(requests, per, keys, load)).seconds;
        Ok(NODE * requests / seconds)
    }

    /// Imbalance of the placement of each pool's experts: with copies, and without.
    fn imbalance(&self, preset: &str, set: &[&str]) -> Result<Vec<[f64; 2]>, SimError> {
        let (_, ready) = self.ready(preset, set)?;
        let experts = ready.reports.iter().filter_map(|r| r.experts.as_ref());
        Ok(experts.map(|e| [e.imbalance, e.unbalanced]).collect())
    }
}

/// All rows of serving; `source` gives the ops.
///
/// # Errors
/// Those of the source of ops.
pub fn serving(source: &dyn InferenceOps, constants: Constants) -> Result<Vec<Row>, SimError> {
    let asked = Asked { source, constants };
    let mut rows = profiles(&asked)?;
    rows.extend(online(&asked)?);
    rows.extend(sglang(&asked)?);
    rows.extend(h200(&asked)?);
    Ok(rows)
}

fn per_node(section: &'static str, figure: &str, published: f64, ours: f64) -> Row {
    Row::new(section, figure, "tokens/s a node", published, ours)
}

fn profiles(asked: &Asked<'_>) -> Result<Vec<Row>, SimError> {
    let online = "deepseek-v3-online-h800";
    let read = asked.reads((online, &[]), 16384.0, 4096.0, None)?;
    let ep128 = ["decode.gpus=128", "decode.expert_slots=2"];
    let plain = asked.decodes((online, &ep128), [128.0, 4096.0, 1.0], None)?;
    let drafts = ["decode.gpus=128", "decode.expert_slots=2", "mtp.drafts=1"];
    let drafted = 1.6 * asked.decodes((online, &drafts), [128.0, 4096.0, 2.0], None)?;
    Ok(vec![
        per_node(PROFILE, "prefill EP32, 16384 tokens a GPU, prompts of 4096", 62_713.0, read)
            .goal(Role::Tested, GOAL),
        per_node(PROFILE, "decode EP128, 128 requests a GPU, 4096 tokens each", 18_598.0, plain)
            .goal(Role::Tested, GOAL)
            .note(format!(
                "read plainly; read as one draft a step of which 60 % hold, as SGLang's team compares it, ours is {drafted:.0}"
            )),
    ])
}

/// Requests of a GPU that decode: 14.8 K tokens/s a node at 20 to 22 tokens/s a user, by Little's
/// law.
const IN_FLIGHT: f64 = 14_800.0 / NODE / 21.0;

fn online(asked: &Asked<'_>) -> Result<Vec<Row>, SimError> {
    let preset = "deepseek-v3-online-h800";
    let closed = format!("workload.concurrency={:.0}", IN_FLIGHT * 144.0);
    let (mut s, _) = asked.ready(preset, &[&closed, "duration_s=40", "warmup_s=20"])?;
    s.prefill = None;
    let decode = report(&s, prepare(&s, asked.source, asked.constants)?)?;
    // More than it can read: what it reads then is what it can.
    let flood = ["workload.rate_per_s=120", "prefill.units=1", "duration_s=300", "warmup_s=60"];
    let (mut s, _) = asked.ready(preset, &flood)?;
    s.decode = None;
    let read = report(&s, prepare(&s, asked.source, asked.constants)?)?;
    let spread = format!(
        "{IN_FLIGHT:.0} requests a GPU in flight, by Little's law from the two published figures; the spread of lengths is assumed"
    );
    Ok(vec![
        per_node(ONLINE, "decode EP144", 14_800.0, decode.pools[0].tokens_per_s_per_node)
            .goal(Role::Tested, GOAL)
            .note(spread),
        Row::new(ONLINE, "speed of a user (20 to 22)", "tokens/s", 21.0, decode.tokens_per_s_per_user)
            .goal(Role::Tested, GOAL),
        per_node(
            ONLINE,
            "prefill EP32, cache hits counted",
            73_700.0,
            read.pools[0].tokens_per_s_per_node,
        )
        .note("no goal: ours is what a unit can read when prompts always wait, and rests on the unpublished spread of lengths (deviation 0, 0.5, 1, 2 of the mean: 111, 106, 86, 53 K; 1 is taken); the published mean has idle hours"),
    ])
}

fn sglang(asked: &Asked<'_>) -> Result<Vec<Row>, SimError> {
    let preset = "deepseek-v3-sglang-h100-96";
    let [read, decode] = asked.imbalance(preset, &[])?[..] else {
        unreachable!("both pools spread their experts")
    };
    let reads = |tokens, length, i| asked.reads((preset, &[]), tokens, length, i);
    let plain = |i| asked.decodes((preset, &[]), [256.0, 2050.0, 1.0], i);
    let drafts = ["mtp.drafts=1", "mtp.acceptance=0.6"];
    let single = ["mtp.drafts=1", "mtp.acceptance=0.6", "decode.micro_batches=1"];
    let drafted =
        |set: &[&str]| asked.decodes((preset, set), [128.0, 4000.0, 2.0], Some(decode[0]));
    let gain = |with: f64, without: f64| with / without;
    let random = reads(16384.0, 4096.0, None)?;
    let mut rows = vec![
        per_node(
            SGLANG,
            "prefill EP32, prompts of 4096, experts chosen at random",
            59_337.0,
            random,
        )
        .goal(Role::Tested, GOAL),
    ];
    for (length, published) in [(1024.0, 57_674.0), (2048.0, 54_543.0), (4096.0, 50_302.0)] {
        let figure = format!("prefill EP32, prompts of {length}");
        let row = per_node(SGLANG, &figure, published, reads(16384.0, length, Some(read[0]))?);
        // A constant was fitted on the last one's ratio to the row above.
        let role = if length == 4096.0 { Role::Fitted } else { Role::Tested };
        rows.push(row.goal(role, GOAL));
    }
    rows.extend([
        Row::new(
            SGLANG,
            "prefill, random over real choices of experts, 4096",
            "",
            59_337.0 / 50_302.0,
            gain(random, reads(16384.0, 4096.0, Some(read[0]))?),
        )
        .fitted(),
        Row::new(
            SGLANG,
            "prefill, gain of the experts' balancer, 2048",
            "",
            1.49,
            gain(reads(16384.0, 2048.0, Some(read[0]))?, reads(16384.0, 2048.0, Some(read[1]))?),
        )
        .note("1.50 without the correlated tokens that the row above asks for"),
        Row::new(
            SGLANG,
            "decode, gain of the experts' balancer",
            "",
            2.54,
            gain(plain(Some(decode[0]))?, plain(Some(decode[1]))?),
        )
        .fitted(),
        per_node(
            SGLANG,
            "decode EP72, 256 requests a GPU, 2000 tokens each",
            22_282.0,
            plain(Some(decode[0]))?,
        )
        .goal(Role::Tested, GOAL),
        per_node(
            SGLANG,
            "decode EP72, 128 requests of 4000 tokens, two tokens a step, 60 % hold",
            17_373.0,
            1.6 * drafted(&drafts)?,
        )
        .goal(Role::Tested, GOAL)
        .note(
            "a simulated case, as published: attention slowed down to that of DeepSeek's profile",
        ),
        per_node(
            SGLANG,
            "the same without overlap of two batches",
            12_929.0,
            1.6 * drafted(&single)?,
        )
        .goal(Role::Tested, GOAL),
    ]);
    Ok(rows)
}

/// Kimi K2 by its configuration: DeepSeek-V3 with 384 experts in one group, 64 heads, one dense
/// layer.
const K2: [&str; 13] = [
    "cluster.preset=\"h200-2048\"",
    "model.name=\"Kimi K2\"",
    "model.heads=64",
    "model.vocab_size=163840",
    "model.mtp_depth=0",
    "model.moe.n_routed_experts=384",
    "model.moe.n_group=1",
    "model.moe.topk_group=1",
    "model.moe.first_dense=1",
    "prefill.expert_slots=12",
    "decode.gpus=96",
    "decode.expert_slots=5",
    "decode.max_batch=480",
];

fn h200(asked: &Asked<'_>) -> Result<Vec<Row>, SimError> {
    let preset = "deepseek-v3-sglang-h100-96";
    let [read, decode] = asked.imbalance(preset, &K2)?[..] else {
        unreachable!("both pools spread their experts")
    };
    let k2_reads = asked.reads((preset, &K2), 16384.0, 2000.0, Some(read[0]))?;
    let k2_decodes = asked.decodes((preset, &K2), [480.0, 2050.0, 1.0], Some(decode[0]))?;
    let few = [
        "cluster.preset=\"h200-2048\"",
        "decode.gpus=16",
        "decode.expert_slots=18",
        "decode.micro_batches=1",
    ];
    let [_, small] = asked.imbalance(preset, &few)?[..] else {
        unreachable!("both pools spread their experts")
    };
    let long = asked.decodes((preset, &few), [2.0, 67_584.0, 1.0], Some(small[0]))? / NODE;
    Ok(vec![
        per_node(H200, "Kimi K2, prefill EP32, prompts of 2000", 56_000.0, k2_reads)
            .goal(Role::Tested, GOAL)
            .note("tokens a GPU and slots of experts taken as on H100: unpublished"),
        per_node(H200, "Kimi K2, decode EP96, 480 requests a GPU, 2000 tokens each", 24_000.0, k2_decodes)
            .goal(Role::Tested, GOAL),
        Row::new(H200, "DeepSeek-V3, 16 GPUs, two requests a GPU of 65536 tokens", "tokens/s a GPU", 60.4, long)
            .note("51.0 without overlapped scheduling; redundant experts unpublished, 32 taken; the host and launches of small kernels limit it"),
    ])
}
