//! Which ops of which runs our kernels compute: tables for the documentation, from planning the
//! runs. A run that needs what no kernel covers shows it here as `fathom train` would refuse it.

use std::collections::BTreeMap;
use std::fmt::Write;

use fathom_gpu::backend::{Asked, Plan};
use fathom_gpu::kernels::KERNELS;
use fathom_reference::backend::Backend;
use fathom_reference::generate::{Sampling, Settings, generate};
use fathom_reference::model::{Model, Params};
use fathom_reference::op::op_names;
use fathom_reference::precision::{Mode, Recipe};
use fathom_reference::train::{Setting, TrainConfig, TrainError, Trainer};
use fathom_trace::Parallel;

/// What a run is, for the tables.
struct Run {
    name: &'static str,
    /// The column of the table of ops that it is counted in.
    column: &'static str,
    what: What,
}

enum What {
    /// A training step of this preset with these settings over it.
    Step(&'static str, &'static [&'static str]),
    /// Speculative decoding with the preset `tiny`.
    Decoding(Mode),
}

/// One sequence, since a second asks for nothing that the first did not.
const ONE_SEQUENCE: &[&str] =
    &["schedule.batch=1", "grad_shards=1", "micro_batch=1", "expert_union=1"];

/// The smallest tokenizer is made soonest, and no op knows of it.
const SOON: &str = "data.tokenizer={vocab_size=300}";

const RUNS: &[Run] = &[
    Run { name: "the report's recipe", column: "fp8", what: What::Step("tiny", &[]) },
    Run {
        name: "DeepSeek-V3, 671 B, a sequence of 4,096",
        column: "fp8",
        what: What::Step("deepseek-v3", ONE_SEQUENCE),
    },
    Run { name: "bf16", column: "bf16", what: What::Step("tiny", &["recipe.mode=\"bf16\""]) },
    Run { name: "fp32", column: "fp32", what: What::Step("tiny", &["recipe.mode=\"fp32\""]) },
    Run {
        name: "fp8, nothing recomputed, SwiGLU's input and the attention's output kept in BF16",
        column: "baselines",
        what: What::Step(
            "tiny",
            &[
                "recipe.recompute_norms=false",
                "recipe.recompute_up_projections=false",
                "recipe.recompute_swiglu=false",
                "recipe.keep_swiglu_input_fp8=false",
                "recipe.keep_attention_output_e5m6=false",
            ],
        ),
    },
    Run {
        name: "fp8, gradients in E5M2",
        column: "baselines",
        what: What::Step("tiny", &["recipe.fp8.gradient_format=\"e5m2\""]),
    },
    Run {
        name: "fp8, gradients in blocks of 128x128",
        column: "baselines",
        what: What::Step("tiny", &["recipe.fp8.gradient_block=[128,128]"]),
    },
    Run {
        name: "fp8, a scale a tensor, no promotion",
        column: "baselines",
        what: What::Step(
            "tiny",
            &[
                "recipe.fp8.activation_block=[\"all\",\"all\"]",
                "recipe.fp8.weight_block=[\"all\",\"all\"]",
                "recipe.fp8.gradient_block=[\"all\",\"all\"]",
                "recipe.fp8.promotion_interval=\"all\"",
            ],
        ),
    },
    Run {
        name: "fp8, delayed scales",
        column: "baselines",
        what: What::Step(
            "tiny",
            &[
                "recipe.fp8.activation_block=[\"all\",\"all\"]",
                "recipe.fp8.weight_block=[\"all\",\"all\"]",
                "recipe.fp8.gradient_block=[\"all\",\"all\"]",
                "recipe.fp8.delayed={history=16}",
            ],
        ),
    },
    Run {
        name: "MXFP8",
        column: "baselines",
        what: What::Step(
            "tiny",
            &[
                "recipe.fp8.activation_block=[1,32]",
                "recipe.fp8.weight_block=[1,32]",
                "recipe.fp8.gradient_block=[1,32]",
                "recipe.fp8.scale=\"mx\"",
                "recipe.fp8.promotion_interval=32",
                "recipe.dispatch_scale=\"mx\"",
            ],
        ),
    },
    Run {
        name: "V2's router: softmax, losses of devices, dropped tokens",
        column: "architectures",
        what: What::Step(
            "tiny",
            &[
                "model.moe.score=\"softmax\"",
                "schedule.balance_kind={device={devices=2}}",
                "schedule.capacity={devices=2,factor=0.75}",
                "checkpoint.export=false",
            ],
        ),
    },
    Run {
        name: "grouped queries",
        column: "architectures",
        what: What::Step(
            "tiny",
            &[
                "model.attention={kind=\"gqa\",kv_heads=1,head_dim=64}",
                "model.rope={theta=10000.0,interleaved=false}",
                "checkpoint.export=false",
            ],
        ),
    },
    Run { name: "decoding with drafts, fp8", column: "decoding", what: What::Decoding(Mode::Fp8) },
    Run {
        name: "decoding with drafts, bf16",
        column: "decoding",
        what: What::Decoding(Mode::Bf16),
    },
    Run {
        name: "decoding with drafts, fp32",
        column: "decoding",
        what: What::Decoding(Mode::Fp32),
    },
];

/// The columns of the table of ops.
const COLUMNS: [&str; 6] = ["fp8", "bf16", "fp32", "baselines", "architectures", "decoding"];

/// What the runs ask of every op.
pub struct Coverage(Vec<(&'static Run, BTreeMap<&'static str, Asked>)>);

/// Plans every run.
///
/// # Errors
/// [`TrainError`] for a run that cannot be laid out.
pub fn coverage() -> Result<Coverage, TrainError> {
    let plan = |run: &'static Run| {
        let plan = match run.what {
            What::Step(preset, set) => {
                let set: Vec<Setting> =
                    set.iter().chain(&[SOON]).map(|s| Setting::set(s)).collect();
                Trainer::rehearse(TrainConfig::preset(preset, &set)?, Plan::new())?
            }
            What::Decoding(mode) => decode(mode)?,
        };
        Ok((run, plan.asked()))
    };
    RUNS.iter().map(plan).collect::<Result<_, _>>().map(Coverage)
}

/// A prompt and a few tokens with drafts, on nothing but shapes.
fn decode(mode: Mode) -> Result<Plan, TrainError> {
    let plan = Plan::new();
    let config = TrainConfig::preset("tiny", &[])?.model;
    let model = Model::new(&config, Recipe::new(mode), Parallel::default(), 0)?;
    let zeros =
        |spec: &fathom_reference::model::ParamSpec| plan.zeros(model.recipe.master(), &spec.shape);
    let params = Params { buffers: model.specs.iter().map(zeros).collect::<Result<_, _>>()? };
    let weights = model.weights(&plan, &params)?;
    let sampling = Sampling { temperature: 0.0, top_p: 1.0, seed: 0 };
    let settings = Settings { tokens: 4, sampling, speculative: true, stop: Vec::new() };
    generate(&model, &plan, &weights, &[1, 2, 3, 4, 5], &settings, &mut |_| ())?;
    Ok(plan)
}

impl Coverage {
    /// A table of the runs: ops and calls, and how many of the calls kernels compute.
    pub fn by_run(&self) -> String {
        let mut out =
            "| a step of | ops | calls | calls that kernels compute |\n|---|---:|---:|---:|\n"
                .to_owned();
        for (run, asked) in &self.0 {
            let calls: usize = asked.values().map(|a| a.calls).sum();
            let covered = calls - asked.values().map(|a| a.uncovered).sum::<usize>();
            let share = if covered == calls { "all".to_owned() } else { covered.to_string() };
            writeln!(out, "| {} | {} | {calls} | {share} |", run.name, asked.len())
                .expect("writing to a String");
        }
        out
    }

    /// A table of the ops: whether kernels compute all that the runs ask of them.
    pub fn by_op(&self) -> String {
        let mut out = format!("| op | kernel | {} |\n", COLUMNS.join(" | "));
        out += &format!("|---|---{}|\n", "|---".repeat(COLUMNS.len()));
        for op in op_names() {
            let kernel = if KERNELS.iter().any(|k| k.op == op) { "yes" } else { "none" };
            let cells = COLUMNS.map(|column| self.cell(op, column));
            writeln!(out, "| `{op}` | {kernel} | {} |", cells.join(" | "))
                .expect("writing to a String");
        }
        out
    }

    /// `all`, `3 of 4`, or nothing where no run of the column asks for the op.
    fn cell(&self, op: &str, column: &str) -> String {
        let runs = self.0.iter().filter(|(run, _)| run.column == column);
        let mut asked = Asked::default();
        for found in runs.filter_map(|(_, ops)| ops.get(op)) {
            asked.calls += found.calls;
            asked.uncovered += found.uncovered;
        }
        match asked {
            Asked { calls: 0, .. } => String::new(),
            Asked { uncovered: 0, .. } => "all".to_owned(),
            Asked { calls, uncovered } => format!("{} of {calls}", calls - uncovered),
        }
    }
}
