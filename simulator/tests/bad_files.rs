//! Bad scenario files of training: each is refused with the file, the place in it, what was
//! expected and what was found, and where there is one the next step. A table, so that a fault that
//! was met once stays met.

#[path = "../../conformance/src/model_code.rs"]
mod model_code;

use fathom_simulator::config::Scenario;
use fathom_simulator::events::Detail;
use fathom_simulator::first_principles::FirstPrinciples;
use fathom_simulator::step::simulate;
use model_code::ModelCode;

/// What follows `preset = "deepseek-v3-h800-2048"` on line 1; the line to blame; parts of the
/// message.
type Bad = (&'static str, u32, &'static [&'static str]);

const FILES: [Bad; 42] = [
    // Not TOML, keys that are not there, values of other types.
    ("schedule = = 3", 2, &["TOML:"]),
    ("schedule = \"1f1b", 2, &["TOML:"]),
    ("schedule = \"1f1b\"\nschedule = \"zb1p\"", 3, &["TOML:", "duplicate key"]),
    ("scedule = \"1f1b\"", 2, &["unknown field `scedule`", "did you mean `schedule`?"]),
    ("[paralel]\npp = 16", 2, &["unknown field `paralel`", "did you mean `parallel`?"]),
    ("[parallel]\nepp = 64", 3, &["parallel.epp: unknown field", "did you mean `ep`?"]),
    ("[training]\nseqlen = 1", 3, &["training.seqlen: unknown field", "did you mean `seq_len`?"]),
    ("[cluster.gpu]\nmemory = 3", 3, &["unknown field", "did you mean `memory_bytes`?"]),
    ("[cluster.network]\nnic_bytes = 1", 3, &["did you mean `nic_bytes_per_s`?"]),
    ("[stack]\nlaunch = 1.0", 3, &["stack.launch: unknown field", "did you mean `launch_us`?"]),
    ("[what_if]\nfree_lunch = true", 3, &["what_if.free_lunch: unknown field"]),
    ("[pricing]\nbudget = 1", 3, &["pricing.budget: unknown field", "did you mean `budget_"]),
    ("[training]\nseq_len = \"long\"", 3, &["training.seq_len: invalid type: string"]),
    ("[training]\nseq_len = -5", 3, &["expected a whole number, 0 or more"]),
    ("[training]\nmicro_batch = 1.5", 3, &["training.micro_batch: invalid type: floating"]),
    ("[parallel]\ntp = [1, 2]", 3, &["parallel.tp: invalid type"]),
    ("parallel = 3", 2, &["parallel: invalid type: integer"]),
    // Names that nothing has.
    ("schedule = \"dualpip\"", 2, &["unknown variant `dualpip`", "did you mean `dualpipe`?"]),
    ("[training]\nprecision = \"fp16\"", 3, &["training.precision: unknown variant `fp16`"]),
    ("[training]\nrecompute = \"some\"", 3, &["training.recompute: unknown variant `some`"]),
    ("[stack]\npreset = \"megatron\"", 3, &["stack.preset: unknown name", "megatron-core"]),
    ("[stack]\ngraphs = \"all\"", 3, &["stack.graphs: unknown variant `all`", "`full`"]),
    ("[model]\npreset = \"deepseek-v9\"", 3, &["model.preset: unknown name", "deepseek-v3"]),
    ("[cluster]\npreset = \"h900\"", 3, &["cluster.preset: unknown name", "h800-2048"]),
    ("[cluster.gpu]\npreset = \"b100\"", 3, &["cluster.gpu.preset: unknown name", "b200"]),
    ("[cluster]\ngpu = 800", 3, &["cluster.gpu: expected a GPU preset's name", "found integer"]),
    ("[cluster.network]\ntopology = \"mesh\"", 3, &["unknown variant `mesh`"]),
    ("[expert_load]\ntrace = \"no.jsonl\"", 3, &["expert_load.trace: no such file"]),
    // Numbers out of all proportion.
    ("[model]\nheads = 0", 3, &["model.heads: expected at least 1, found 0"]),
    ("[model]\nlayers = 5000", 3, &["model.layers: expected at most 4096, found 5000"]),
    (
        "[model.moe]\ntop_k = 257",
        3,
        &["model.moe.top_k: expected 1 to 128, the experts of 4 groups"],
    ),
    // A key of version 0.1 is read; its present name is told, at its table's line.
    ("[model]\nn_layers = 0", 2, &["model.layers: expected at least 1, found 0"]),
    ("[training]\nseq_len = 0", 3, &["training.seq_len: expected 1 to 16777216, found 0"]),
    ("[training]\nglobal_batch = 0", 3, &["expected 1 to 268435456, found 0"]),
    ("training.total_tokens = -1", 2, &["expected 0.0 to 1e24, found -1.0"]),
    ("training.total_tokens = nan", 2, &["expected a finite number, found NaN"]),
    ("[cluster]\nusd_per_gpu_hour = -1", 3, &["expected 0.0 to 1000000000.0, found -1.0"]),
    ("[cluster.gpu]\n\nscale_up_usable = 1.5", 4, &["expected 1e-6 to 1.0, found 1.5"]),
    ("[cluster.network]\nnic_bytes_per_s = 0", 3, &["expected 1.0 to 1e24, found 0.0"]),
    ("[ramp]\nstart_batch = 3072\ntokens = nan\nfallback_schedule = \"zb1p\"", 4, &["found NaN"]),
    ("[reliability]\ngpu_mtbf_hours = 0", 3, &["expected 0.001 to 1e24, found 0.0"]),
    ("parallel.zero = 4", 2, &["parallel.zero: expected 0 to 3, found 4"]),
];

/// Layouts that no cluster runs: overrides of the same preset, and parts of the message.
const LAYOUTS: [(&[&str], &[&str]); 17] = [
    (&["parallel.pp=8"], &["tp 1 * cp 1 * pp 8 * dp 128 = 1024 ranks", "2048 GPUs"]),
    (&["cluster.gpus_per_node=7"], &["2048 GPUs are not whole nodes of 7"]),
    (&["parallel.tp=3", "parallel.dp=128", "cluster.gpus=6144"], &["tp 3", "128 attention heads"]),
    (&["parallel.tp=16", "parallel.dp=8"], &["tp 16 is wider than the 8 GPUs of a node"]),
    (&["parallel.cp=3", "cluster.gpus=6144"], &["3 does not divide the sequence of 4096"]),
    (&["parallel.ep=48"], &["ep 48 does not divide the 256 routed experts"]),
    (&["parallel.ep=256"], &["ep 256 does not divide the 128 ranks of tp * cp * dp"]),
    (&["parallel.zero=3"], &["zero 3 with pp 16", "use zero 1"]),
    (&["training.global_batch=1000"], &["128 does not divide the global batch of 1000"]),
    (&["comm_sms=132"], &["comm_sms 132 leaves none of the 132 SMs"]),
    (&["stage_layers=[61]"], &["expected 16 entries with 61 layers"]),
    (&["training.precision=\"mxfp8\""], &["H800", "block scales", "\"fp8\""]),
    (&["training.precision=\"nvfp4\""], &["H800", "no FP4 tensor cores", "\"bf16\""]),
    (&["cluster.gpu.preset=\"a100\""], &["A100", "no FP8 tensor cores", "\"bf16\""]),
    (
        &["cluster.gpu.preset=\"a100\"", "training.precision=\"bf16\"", "stack.fp8_attention=true"],
        &["A100", "no FP8 tensor cores", "stack.fp8_attention = false"],
    ),
    (&["lora.rank=8", "lora.targets=[]"], &["lora.targets is empty"]),
    (
        &["lora.rank=8", "lora.targets=[\"down\"]"],
        &["adapters of experts are not modelled", "use qkv and output"],
    ),
];

#[test]
fn every_bad_file_is_refused_with_its_place() {
    let here = Some(std::path::Path::new("."));
    for (toml, line, parts) in FILES {
        let text = format!("preset = \"deepseek-v3-h800-2048\"\n{toml}\n");
        let e = Scenario::from_toml("run.toml", &text, here, &[]).unwrap_err().to_string();
        assert!(e.starts_with(&format!("run.toml:{line}: ")), "{toml}: {e}");
        for part in parts {
            assert!(e.contains(part), "{toml}: {e}");
        }
    }
}

#[test]
fn every_illegal_layout_is_refused_with_its_numbers() {
    for (set, parts) in LAYOUTS {
        let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
        let s = Scenario::preset("deepseek-v3-h800-2048", &set).unwrap();
        let found = simulate(&s, &FirstPrinciples::new(ModelCode), Detail::Totals);
        let e = found.err().unwrap_or_else(|| panic!("{set:?} runs")).to_string();
        assert!(e.starts_with("illegal layout: "), "{set:?}: {e}");
        for part in parts {
            assert!(e.contains(part), "{set:?}: {e}");
        }
    }
}
