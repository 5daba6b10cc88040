//! A run as a scenario of the simulator, and a scenario as a run: both speak of one layout.

use fathom_reference::parallel::Parallel;
use fathom_reference::precision::{Mode, Recipe};
use fathom_reference::train::TrainConfig;
use fathom_reference::train::parallel::ParallelConfig;
use fathom_reference::train::schedule::Point;
use fathom_simulator::SimError;
use fathom_simulator::config::{ContextForm, Precision, Recompute, Scenario};
use toml::{Table, Value};

/// Cluster of a scenario that is made from a run, unless the overrides name another.
const CLUSTER: &str = "h800-64";

/// The scenario of a run's step, with its last batch, on as many GPUs as it has ranks; `set` are
/// overrides as those of [`Scenario::read`], `name` stands in errors.
///
/// # Errors
/// [`SimError`] where the simulator has no such run: other precisions than FP8 and BF16, or a
/// policy of recomputation of its own.
pub fn scenario(name: &str, config: &TrainConfig, set: &[String]) -> Result<Scenario, SimError> {
    let refuse = |message: String| SimError::input(name, message);
    let precision = match config.recipe.mode {
        Mode::Fp8 => "fp8",
        Mode::Bf16 => "bf16",
        other => {
            let message = format!("recipe.mode: expected fp8 or bf16 to simulate, found {other:?}");
            return Err(refuse(message));
        }
    };
    let schedules = config.schedules().map_err(|(key, e)| refuse(format!("{key}: {e}")))?;
    let end =
        Point { step: config.steps.unwrap_or(1), tokens: config.tokens.unwrap_or(0.0) as u64 };
    let batch = schedules.at(end).batch;
    let p = &config.parallel;
    let Parallel { tp, pp, ep, dp, cp } = p.sizes();
    let world = p.world();
    let mut table = Table::new();
    let mut top = |key: &str, value: Value| table.insert(key.to_owned(), value);
    top("name", config.name.clone().into());
    top("schedule", Value::try_from(p.schedule).expect("a word"));
    top("interleave", whole(p.interleave));
    top("comm_sms", whole(p.comm_sms));
    let layers = config.stage_layers().into_iter().map(|layers| whole(layers.len()));
    top("stage_layers", Value::Array(layers.collect()));
    top("model", Value::try_from(&config.model).expect("a model is a table"));
    let per_node = (1..=world.min(8)).rev().find(|&n| world.is_multiple_of(n)).unwrap_or(1);
    let cluster = [
        ("preset", Value::from(CLUSTER)),
        ("gpus", whole(world)),
        ("gpus_per_node", whole(per_node)),
    ];
    top("cluster", of(cluster));
    let sizes = [("tp", tp), ("cp", cp), ("pp", pp), ("dp", dp), ("ep", ep), ("zero", 1)];
    top("parallel", of(sizes.map(|(key, n)| (key, whole(n)))));
    let tokens = match (config.tokens, config.steps) {
        (Some(tokens), _) => tokens,
        (None, steps) => (steps.unwrap_or(1) * (batch * config.seq_len) as u64) as f64,
    };
    let training = [
        ("seq_len", whole(config.seq_len)),
        ("micro_batch", whole(config.micro_batch)),
        ("global_batch", whole(batch)),
        ("precision", precision.into()),
        ("recompute", recompute(&config.recipe).map_err(refuse)?.into()),
        ("total_tokens", tokens.into()),
    ];
    top("training", of(training));
    if cp > 1 {
        // Parts of the sequence turn into parts of the heads, and back.
        top("stack", of([("context", "all_to_all".into())]));
    }
    Scenario::from_toml(name, &table.to_string(), None, set)
}

fn whole(n: usize) -> Value {
    Value::Integer(n as i64)
}

fn of<const N: usize>(entries: [(&str, Value); N]) -> Value {
    Value::Table(entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
}

/// The simulator's word for what a recipe makes again.
fn recompute(recipe: &Recipe) -> Result<&'static str, String> {
    match [recipe.recompute_norms, recipe.recompute_up_projections, recipe.recompute_swiglu] {
        [true, true, true] => Ok("selective"),
        [false, false, false] => Ok("none"),
        [norms, up, swiglu] => Err(format!(
            "recipe: expected all or none of recompute_norms, recompute_up_projections, \
             recompute_swiglu to simulate, found {norms}, {up}, {swiglu}"
        )),
    }
}

/// The run of a scenario, as run.toml: its model, layout, sizes, precision; the rest is the
/// trainer's own.
///
/// # Errors
/// [`SimError`] where nothing executes it: tensor parallelism, other forms of context parallelism
/// than an all-to-all, other formats, other recomputation.
pub fn run(s: &Scenario) -> Result<String, SimError> {
    let refuse = |message: String| Err(SimError::Layout(format!("{}: {message}", s.name)));
    let (p, t) = (&s.parallel, &s.training);
    if p.tp != 1 {
        return refuse(format!("expected tp 1 to execute, found {}", p.tp));
    }
    if p.cp > 1 && s.stack.context != ContextForm::AllToAll {
        return refuse(format!(
            "expected stack.context = \"all_to_all\" to execute cp {}, found {:?}",
            p.cp, s.stack.context
        ));
    }
    let mode = match t.precision {
        Precision::Fp8 => "fp8",
        Precision::Bf16 => "bf16",
        other => return refuse(format!("expected fp8 or bf16 to execute, found {other:?}")),
    };
    let again = match t.recompute {
        Recompute::None => false,
        Recompute::Selective => true,
        other => return refuse(format!("expected recompute none or selective, found {other:?}")),
    };
    let number = |n: u64| Value::Integer(n as i64);
    // As few shards as the layout allows.
    let layout = ParallelConfig { schedule: s.schedule, ..ParallelConfig::default() };
    let shards = p.dp * layout.directions() as u64;
    let mut table = Table::new();
    let mut top = |key: &str, value: Value| table.insert(key.to_owned(), value);
    top("name", s.name.clone().into());
    top("seed", number(1));
    top("tokens", t.total_tokens.into());
    top("seq_len", number(t.seq_len));
    top("micro_batch", number(t.micro_batch));
    top("grad_shards", number(shards));
    top("context_shards", number(p.cp));
    top("expert_union", number((p.ep / p.cp).max(1)));
    top("model", Value::try_from(&s.model).expect("a model is a table"));
    let recipe = [
        ("mode", mode.into()),
        ("recompute_norms", again.into()),
        ("recompute_up_projections", again.into()),
        ("recompute_swiglu", again.into()),
    ];
    top("recipe", of(recipe));
    let schedule = [("learning_rate", 2.2e-4.into()), ("batch", number(t.global_batch))];
    top("schedule", of(schedule));
    let mut layout = Table::new();
    for (key, n) in
        [("pp", p.pp), ("dp", p.dp), ("cp", p.cp), ("ep", p.ep), ("interleave", s.interleave)]
    {
        layout.insert(key.to_owned(), number(n));
    }
    layout.insert("comm_sms".to_owned(), number(s.comm_sms));
    let word = Value::try_from(s.schedule).expect("a word");
    layout.insert("schedule".to_owned(), word);
    if let Some(layers) = &s.stage_layers {
        let layers = layers.iter().map(|&n| number(n)).collect();
        layout.insert("stage_layers".to_owned(), Value::Array(layers));
    }
    top("parallel", Value::Table(layout));
    Ok(table.to_string())
}

#[cfg(test)]
mod tests {
    use fathom_config::layered::Setting;

    use super::*;

    fn preset(name: &str, set: &[&str]) -> TrainConfig {
        let set: Vec<Setting> = set.iter().map(|s| Setting::set(s)).collect();
        TrainConfig::preset(name, &set).unwrap_or_else(|e| panic!("{set:?}: {e}"))
    }

    /// There and back: the layout, the sizes and the model are those of the run.
    #[test]
    fn a_run_is_a_scenario_is_a_run() {
        for (schedule, mode, cp) in [
            ("1f1b", "bf16", 1),
            ("1f1b", "bf16", 2),
            ("interleaved", "fp8", 1),
            ("dualpipe", "fp8", 2),
            ("dualpipev", "bf16", 1),
        ] {
            let (schedule, mode) =
                (format!("parallel.schedule={schedule:?}"), format!("recipe.mode={mode:?}"));
            let cp_ranks = format!("parallel.cp={cp}");
            let set = [
                "model.layers=5",
                "parallel.pp=2",
                "parallel.dp=2",
                "parallel.ep=2",
                "grad_shards=4",
                "schedule.batch=64",
                &schedule,
                &mode,
                &cp_ranks,
            ];
            let config = preset("tiny", &set);
            let s = scenario("run.toml", &config, &[]).unwrap();
            let p = &s.parallel;
            assert_eq!((p.pp, p.dp, p.cp, p.ep, p.zero), (2, 2, cp, 2, 1));
            assert_eq!(s.cluster.gpus, 4 * cp);
            assert_eq!(s.stack.context == ContextForm::AllToAll, cp > 1);
            assert_eq!((s.training.global_batch, s.micro_batches()), (64, 8));
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("run.toml");
            std::fs::write(&path, run(&s).unwrap()).unwrap();
            let back = TrainConfig::read(&path, &[]).unwrap_or_else(|e| panic!("{set:?}: {e}"));
            assert_eq!((&back.model, back.seq_len), (&config.model, config.seq_len));
            assert_eq!(back.stage_layers(), config.stage_layers());
            assert_eq!(back.parallel.sizes(), config.parallel.sizes());
            assert_eq!(back.parallel.schedule, config.parallel.schedule);
            assert_eq!(scenario("run.toml", &back, &[]).unwrap().training, {
                let total_tokens = back.tokens.unwrap();
                fathom_simulator::config::Training { total_tokens, ..s.training }
            });
        }
    }

    #[test]
    fn overrides_win_and_what_nobody_has_is_refused() {
        let dual = ["parallel.dp=2", "grad_shards=2", "schedule.batch=8"];
        let set = ["cluster.preset=\"h100-16384\"".to_owned(), "comm_sms=8".to_owned()];
        let s = scenario("run.toml", &preset("tiny", &dual), &set).unwrap();
        assert!(s.cluster.gpu.name.contains("H100") && s.cluster.gpus == 2, "{:?}", s.cluster);
        assert_eq!(s.comm_sms, 8);
        let fp32 = preset("tiny", &["recipe.mode=\"fp32\""]);
        let e = scenario("run.toml", &fp32, &[]).unwrap_err().to_string();
        assert!(e.contains("run.toml") && e.contains("expected fp8 or bf16"), "{e}");
        let set = ["parallel.tp=8".to_owned(), "parallel.dp=16".to_owned()];
        let wide = Scenario::preset("deepseek-v3-h800-2048", &set).unwrap();
        let e = run(&wide).unwrap_err().to_string();
        assert!(e.contains("expected tp 1 to execute, found 8"), "{e}");
        let set = ["parallel.cp=2".to_owned(), "parallel.dp=64".to_owned()];
        let ring = Scenario::preset("deepseek-v3-h800-2048", &set).unwrap();
        let e = run(&ring).unwrap_err().to_string();
        assert!(e.contains("expected stack.context = \"all_to_all\" to execute cp 2"), "{e}");
    }
}
