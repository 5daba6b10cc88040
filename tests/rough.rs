//! Nothing that a user can pass makes the program panic, hang, or pass over it without a word: a
//! sweep of command lines over bad inputs, and what no output may replace.
//!
//! Every run ends within [`PATIENCE`] with exit code 0, 1 or 2; a refusal names the input.
#![cfg(unix)]

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use fathom_config::ModelConfig;
use fathom_reference::Tensor;
use fathom_reference::backend::Reference;
use fathom_reference::checkpoint::{hf, tensors};
use fathom_reference::model::Model;
use fathom_reference::precision::{Mode, Recipe};
use fathom_trace::{DType, Parallel};
use serde_json::{Value, json};

/// A run that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// A step on the published cluster.
const SIMULATE: &str = "simulate --preset deepseek-v3-h800-2048";

/// How a run ended.
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

/// A command, with its output in files so that no pipe fills up.
struct Run<'a> {
    folder: &'a Path,
    args: Vec<OsString>,
    variables: Vec<(&'a str, &'a str)>,
    stdout: Option<File>,
}

impl Run<'_> {
    fn end(self) -> Ran {
        let at = |name: &str| self.folder.join(name);
        let stdout = self.stdout.unwrap_or_else(|| File::create(at(".out")).unwrap());
        let mut child = Command::new(env!("CARGO_BIN_EXE_fathom"))
            .current_dir(self.folder)
            .args(&self.args)
            .env("RUST_BACKTRACE", "0")
            .envs(self.variables)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(File::create(at(".err")).unwrap())
            .spawn()
            .unwrap();
        let begin = Instant::now();
        let status = loop {
            match child.try_wait().unwrap() {
                Some(status) => break status,
                None if begin.elapsed() > PATIENCE => {
                    child.kill().unwrap();
                    child.wait().unwrap();
                    panic!("{:?} hangs", self.args);
                }
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        let text = |name: &str| String::from_utf8_lossy(&fs::read(at(name)).unwrap()).into_owned();
        let out = if at(".out").exists() { text(".out") } else { String::new() };
        let ran = Ran { code: status.code(), out, err: text(".err") };
        assert!(
            matches!(ran.code, Some(0..=2)) && !ran.err.contains("panicked"),
            "{:?}: {status}: {}",
            self.args,
            ran.err
        );
        ran
    }
}

/// A command line of words; `{}` stands for `input`.
fn run(folder: &Path, line: &str, input: &OsStr) -> Ran {
    let word = |word: &str| if word == "{}" { input.to_owned() } else { word.into() };
    let args = line.split(' ').map(word).collect();
    Run { folder, args, variables: Vec::new(), stdout: None }.end()
}

/// A folder with a model, token ids, an op trace and a launch file, all good.
fn world() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut config = ModelConfig::preset("small").unwrap();
    (config.layers, config.vocab_size, config.hidden_size) = (2, 32, 32);
    let model = Model::new(&config, Recipe::new(Mode::Fp32), Parallel::default(), 0).unwrap();
    let params = model.init(&Reference, 1).unwrap();
    hf::save(&at("model"), &model, &Reference, &params, 1 << 30).unwrap();
    fs::write(at("ids.json"), "[[1, 2, 3, 4, 5], [6, 7, 8]]").unwrap();
    let trace = run(folder.path(), &format!("{SIMULATE} --write-op-trace {{}}"), "ops".as_ref());
    assert_eq!(trace.code, Some(0), "{}", trace.err);

    let param = |name: &str, ty: &str| json!({ "name": name, "ptx_type": ty });
    let launch = json!({
        "entry": "axpy", "grid": [1, 1, 1], "threads": 32, "arguments": { "a": 2.5, "n": 4 },
        "params": [param("x", "u64"), param("y", "u64"), param("a", "f32"), param("n", "u32")],
    });
    fs::write(at("axpy.json"), launch.to_string()).unwrap();
    fs::write(at("axpy.ptx"), AXPY).unwrap();
    let tensor = |values: [f32; 4]| Tensor::from_vec(&[4], values.to_vec());
    let [x, y, out] = [[1., 2., 3., 4.], [1.; 4], [3.5, 6.0, 8.5, 11.0]].map(tensor);
    let all = [("x".to_owned(), x), ("y".to_owned(), y), ("out.y".to_owned(), out)];
    tensors::write(&at("axpy.safetensors"), &all).unwrap();
    folder
}

const AXPY: &str = include_str!("../gpu/emulator/tests/data/axpy.ptx");

/// Command lines that read a file, with whether an empty one is refused.
const READERS: [&str; 26] = [
    "check {}",
    "diagnose {}",
    "replay {}",
    "simulate {}",
    "search {}",
    "simulate serve {}",
    "simulate serve --preset deepseek-v3-online-h800 --constants {}",
    "simulate chunk --config {}",
    "simulate alltoall --ep 8 --config {}",
    "simulate calibrate {}",
    "simulate calibrate --gemms {} --gpu h800",
    "simulate calibrate --kernels {} --gpu h800",
    "simulate --preset deepseek-v3-h800-2048 --constants {}",
    "simulate --preset deepseek-v3-h800-2048 --gemms {} --gemms-gpu b200",
    "simulate --preset deepseek-v3-h800-2048 --op-trace {}",
    "simulate --preset deepseek-v3-h800-2048 --kernel-times {}",
    "emulate run {}",
    "emulate -- {}",
    "model inspect {}",
    "model trace {}",
    "model convert {} converted",
    "runs {}",
    "eval --model model --tokens {}",
    "eval --model {} --tokens ids.json",
    "generate --model model --prompt-tokens {}",
    "generate --model {} --prompt-tokens ids.json",
];

/// Files with these bytes are no input of anything.
fn garbage() -> Vec<(&'static str, Vec<u8>)> {
    let long = "x".repeat(100_000);
    vec![
        ("empty", Vec::new()),
        ("zeros", vec![0; 4096]),
        ("bytes", (0..=255).cycle().take(4096).collect()),
        ("no-utf8", b"{\"a\": \"\xff\xfe\"}".to_vec()),
        ("deep", b"[".repeat(100_000)),
        ("half", b"{\"model_type\": \"deepseek_v3\", \"hidden_si".to_vec()),
        ("long-string.json", format!("{{\"model_type\": \"{long}\"}}").into_bytes()),
        ("long-key.toml", format!("{long} = 1\n").into_bytes()),
        ("long-value.toml", format!("preset = \"{long}\"\n").into_bytes()),
        ("huge.json", b"[[1e999, 99999999999999999999999999, -1]]".to_vec()),
        ("huge.toml", b"[parallel]\npp = 99999999999999999999\n".to_vec()),
        ("header", [&u64::MAX.to_le_bytes()[..], b"{}"].concat()),
    ]
}

/// Text under a name that is no UTF-8.
fn foreign_data(folder: &Path) -> OsString {
    let name = OsString::from_vec(b"no-\xff-text.txt".to_vec());
    fs::write(folder.join(&name), "text enough\n".repeat(400)).unwrap();
    name
}

#[test]
fn bad_files_are_refused_by_every_reader() {
    let world = world();
    let folder = world.path();
    let mut inputs: Vec<(OsString, bool)> = Vec::new();
    for (name, bytes) in garbage() {
        fs::write(folder.join(name), bytes).unwrap();
        inputs.push((name.into(), true));
    }
    let foreign = OsString::from_vec(b"no-\xff-text.json".to_vec());
    fs::write(folder.join(&foreign), "{]").unwrap();
    fs::create_dir(folder.join("folder")).unwrap();
    let pipe = Command::new("mkfifo").arg(folder.join("pipe")).status();
    inputs.extend(pipe.is_ok_and(|s| s.success()).then(|| ("pipe".into(), true)));
    let others = ["folder", "missing", "/dev/zero", "/dev/null", "ids.json/below"];
    inputs.extend(others.map(|name| (name.into(), true)));
    inputs.push((foreign, false));
    // An empty configuration is `tiny`, and any text is data: what is left is no input of training.
    let training = ["train --config {} --out run", "train --data {} --out run"];
    for (line, input) in
        training.iter().flat_map(|l| ["pipe", "/dev/zero", "missing"].map(|i| (l, i)))
    {
        let ran = run(folder, line, OsStr::new(input));
        assert!(ran.code == Some(2) && ran.err.contains(input), "{line} {input}: {}", ran.err);
    }
    let ran = run(folder, training[0], OsStr::new("zeros"));
    assert!(ran.code == Some(2) && ran.err.contains("zeros:1"), "{}", ran.err);
    let ran = run(folder, training[1], &foreign_data(folder));
    assert!(ran.code == Some(2) && ran.err.contains("expected UTF-8"), "{}", ran.err);
    for line in READERS {
        for (input, spelled) in &inputs {
            let ran = run(folder, line, input);
            assert_ne!(ran.code, Some(0), "{line} {input:?}: {}", ran.out);
            let name = input.to_string_lossy();
            assert!(!spelled || ran.err.contains(&*name), "{line} {name}: {}", ran.err);
            assert!(ran.err.len() < 3000, "{line} {name}: {} bytes of error", ran.err.len());
        }
    }
}

/// What `model/config.json` may not say; a value of each kind for each key.
#[test]
fn every_key_of_a_configuration_has_limits() {
    let world = world();
    let folder = world.path();
    let path = folder.join("model/config.json");
    let good: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let values = [
        json!(0),
        json!(1_000_000_000),
        json!(1u64 << 60),
        json!(-1),
        json!(1e300),
        json!(-1e-6),
        json!([[]]),
        json!("1"),
    ];
    for key in good.as_object().unwrap().keys() {
        for value in &values {
            let mut config = good.clone();
            config[key] = value.clone();
            fs::write(&path, config.to_string()).unwrap();
            for line in ["eval --model {} --tokens ids.json", "model inspect {}"] {
                let ran = run(folder, line, "model".as_ref());
                let refused = ran.code == Some(2) && ran.err.contains("model");
                assert!(refused || ran.code == Some(0), "{key} {value}: {}", ran.err);
            }
        }
    }
    let refused = [
        ("num_hidden_layers", json!(1_000_000_000), "at most 4096, found 1000000000"),
        ("hidden_size", json!(1u64 << 60), "'hidden_size': expected at most"),
        ("rms_norm_eps", json!(-1e-6), "'rms_norm_eps': expected 0.0 to 1.0, found -1e-6"),
        ("rope_parameters", json!({ "rope_theta": 0 }), "'rope_theta': expected 1.0"),
        ("eos_token_id", json!([1, "x"]), "'eos_token_id': expected a token id"),
    ];
    for (key, value, said) in refused {
        let mut config = good.clone();
        config[key] = value;
        fs::write(&path, config.to_string()).unwrap();
        let ran = run(folder, "eval --model {} --tokens ids.json", "model".as_ref());
        assert!(ran.code == Some(2) && ran.err.contains(said), "{key}: {}", ran.err);
    }
}

/// Rewrites the tensors of `model/`.
fn rewrite(folder: &Path, change: impl Fn(String, Tensor) -> Vec<(String, Tensor)>) {
    let path = folder.join("model/model.safetensors");
    let file = tensors::TensorsFile::open(&path).unwrap();
    let all = file.entries.keys().map(|name| (name.clone(), file.tensor(name).unwrap()));
    let changed: Vec<_> = all.flat_map(|(name, tensor)| change(name, tensor)).collect();
    tensors::write(&path, &changed).unwrap();
}

#[test]
fn weights_that_are_not_what_config_json_says_are_refused_by_name() {
    const GATE: &str = "model.layers.1.mlp.gate.weight";
    type Change = fn(String, Tensor) -> Vec<(String, Tensor)>;
    let cases: [(&str, i32, Change); 5] = [
        ("gate.weight': expected finite numbers, found NaN at 3", 2, |name, mut tensor| {
            if name == GATE {
                tensor.as_mut_slice::<f32>()[3] = f32::NAN;
            }
            vec![(name, tensor)]
        }),
        ("gate.weight': expected element type F64, F32", 2, |name, tensor| {
            let integers = Tensor::zeros(DType::I32, tensor.shape());
            if name == GATE { vec![(name, integers)] } else { vec![(name, tensor)] }
        }),
        ("extra.weight': expected only what config.json asks for", 2, |name, tensor| {
            let extra = (name == GATE).then(|| ("model.extra.weight".into(), tensor.clone()));
            extra.into_iter().chain([(name, tensor)]).collect()
        }),
        ("--without-mtp goes on without MTP modules", 2, |name, tensor| {
            let module = name.starts_with("model.layers.2.");
            if module { Vec::new() } else { vec![(name, tensor)] }
        }),
        // Finite weights whose products are not.
        ("layer_out.0 is not finite first", 1, |name, mut tensor| {
            if name.contains("layers.0.mlp") {
                tensor.as_mut_slice::<f32>().fill(-1e30);
            }
            vec![(name, tensor)]
        }),
    ];
    for (said, code, change) in cases {
        let world = world();
        let folder = world.path();
        rewrite(folder, change);
        let ran = run(folder, "eval --model {} --tokens ids.json", "model".as_ref());
        let as_said = ran.code == Some(code) && ran.err.contains(said);
        assert!(as_said, "{said}: {:?} {} {}", ran.code, ran.out, ran.err);
        if said.contains("without-mtp") {
            let line = "eval --without-mtp --model {} --tokens ids.json";
            let ran = run(folder, line, "model".as_ref());
            assert!(ran.code == Some(0) && !ran.out.contains("MTP"), "{}{}", ran.out, ran.err);
        }
    }
}

/// Files that were good until someone cut them or changed a byte.
#[test]
fn cut_and_changed_files_are_refused_or_read() {
    let world = world();
    let folder = world.path();
    let victims = [
        ("model/model.safetensors", "eval --model model --tokens ids.json"),
        ("model/config.json", "eval --model model --tokens ids.json"),
        ("ids.json", "eval --model model --tokens ids.json"),
        ("ops", "simulate --preset deepseek-v3-h800-2048 --op-trace ops"),
        ("axpy.json", "emulate run axpy.json"),
        ("axpy.ptx", "emulate run axpy.json"),
        ("axpy.safetensors", "emulate run axpy.json"),
    ];
    // Places in the file's beginning, where its structure is, and new bytes: a fixed sequence.
    let mut state = 1u64;
    let mut next = |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    for (victim, line) in victims {
        let path = folder.join(victim);
        let good = fs::read(&path).unwrap();
        let structure = good.len().min(4096);
        for round in 0..24 {
            let mut bytes = good.clone();
            match round % 3 {
                0 => bytes.truncate(next(good.len())),
                1 => bytes[next(structure)] = next(256) as u8,
                _ => bytes[next(structure)] = b"0\"{}[],:9 "[next(10)],
            }
            fs::write(&path, bytes).unwrap();
            run(folder, line, "".as_ref());
        }
        fs::write(&path, good).unwrap();
        assert_eq!(run(folder, line, "".as_ref()).code, Some(0), "{line}");
    }
}

/// Commands that print, into a full disk: an error, whatever the command did.
#[test]
fn a_full_stdout_is_an_error() {
    let world = world();
    let lines = [
        "--help",
        "check --help",
        "doctor",
        "simulate --preset deepseek-v3-h800-2048",
        "simulate --preset deepseek-v3-h800-2048 --json",
        "simulate gemm --m 64 --n 64 --k 64",
        "simulate chunk",
        "simulate alltoall --ep 8",
        "simulate schedule --kind 1f1b --stages 2 --micro-batches 2",
        "simulate schedule --kind 1f1b --stages 2 --micro-batches 2 --json",
        "simulate validate",
        "simulate serve --preset llama-3.1-70b-unified-h100-8 --set duration_s=15",
        "model inspect small",
        "model trace small --sequence 16",
        "emulate run axpy.json",
        "emulate run axpy.json --json",
        "eval --model model --tokens ids.json",
        "eval --model model --tokens ids.json --json",
    ];
    for line in lines {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let args = line.split(' ').map(OsString::from).collect();
        let folder = world.path();
        let ran = Run { folder, args, variables: Vec::new(), stdout: Some(full) }.end();
        let said = ran.err.contains("error: stdout: No space left on device");
        assert!(ran.code == Some(2) && said, "{line}: {:?} {}", ran.code, ran.err);
    }
}

/// Every pair of an input and an output of every command, under another name, too.
#[test]
fn no_output_replaces_an_input() {
    let world = world();
    let folder = world.path();
    symlink("model", folder.join("linked")).unwrap();
    fs::hard_link(folder.join("ids.json"), folder.join("hard")).unwrap();
    fs::copy(folder.join("axpy.safetensors"), folder.join("case.safetensors")).unwrap();
    fs::create_dir(folder.join("run")).unwrap();
    fs::write(folder.join("run/train.jsonl"), "{\"kind\":\"step\",\"loss\":1.0}\n").unwrap();
    let eval = "eval --model model --tokens ids.json";
    let simulate = "simulate --preset deepseek-v3-h800-2048 --op-trace ops";
    let lines = [
        "check case.safetensors --save-outputs .".to_owned(),
        "check case.safetensors --save-outputs ../{}".to_owned(),
        "diagnose case.safetensors --html ./case.safetensors".to_owned(),
        format!("{eval} --save ids.json"),
        format!("{eval} --save hard"),
        format!("{eval} --save model/model.safetensors"),
        format!("{eval} --save linked/new.safetensors"),
        format!("{eval} --op-trace model/config.json"),
        format!("{eval} --record linked/record"),
        format!("{eval} --save same --op-trace ./same"),
        "generate --model model --prompt-tokens hard --op-trace ids.json".to_owned(),
        format!("{simulate} --trace ops"),
        format!("{simulate} --report ops"),
        format!("{simulate} --write-op-trace ops"),
        format!("{simulate} --write-kernel-times ops"),
        "simulate --preset deepseek-v3-h800-2048 --trace x --report x".to_owned(),
        "model trace model --op-trace model/config.json".to_owned(),
        "model convert model linked".to_owned(),
        "runs run --svg run/train.jsonl".to_owned(),
        "emulate --summary axpy.ptx -- ./axpy.ptx".to_owned(),
    ];
    let name = folder.file_name().unwrap().to_str().unwrap();
    let before = contents(folder);
    for line in lines {
        let ran = run(folder, &line.replace("{}", name), "".as_ref());
        assert_eq!(ran.code, Some(2), "{line}: {}{}", ran.out, ran.err);
        assert!(ran.err.contains("expected another") || ran.err.contains("two places"), "{line}");
        assert_eq!(contents(folder), before, "{line}");
    }
}

/// Every file below a folder with its bytes, but for those of [`Run`].
fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(contents(&path));
        } else if ![".out", ".err"].contains(&path.file_name().unwrap().to_str().unwrap()) {
            files.push((path.clone(), fs::read(&path).unwrap()));
        }
    }
    files.sort();
    files
}

/// An output under a name that is no UTF-8 is written; new files are as readable as the umask says.
#[test]
fn outputs_have_any_name_and_the_umasks_permissions() {
    let world = world();
    let folder = world.path();
    fs::write(folder.join("plain"), "").unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    let name = OsStr::from_bytes(b"out-\xff");
    for line in [
        "eval --model model --tokens ids.json --save {}",
        "eval --model model --tokens ids.json --op-trace {}",
        "simulate --preset deepseek-v3-h800-2048 --report {}",
        "model trace small --sequence 16 --op-trace {}",
        "emulate --summary {} -- true",
    ] {
        let ran = run(folder, line, name);
        assert_eq!(ran.code, Some(0), "{line}: {}", ran.err);
        assert_eq!(mode(&folder.join(name)), mode(&folder.join("plain")), "{line}");
        fs::remove_file(folder.join(name)).unwrap();
    }
}

/// Numbers on the command line and in the environment that nothing could be made for.
#[test]
fn absurd_numbers_are_refused() {
    let world = world();
    let folder = world.path();
    let most = usize::MAX.to_string();
    for line in [
        "model inspect small --sequence 4294967295 --micro-batch 4294967295",
        "model inspect deepseek-v3 --sequence 16777216",
        "model trace deepseek-v3 --sequence {}",
        "model trace deepseek-v3 --micro-batches {}",
        "model trace deepseek-v3 --micro-batch {}",
        "model trace deepseek-v3 --tp {} --pp {}",
        "model trace deepseek-v3 --dp {}",
        "model trace deepseek-v3 --rank {}",
        "model trace deepseek-v3 --cp {} --sequence {}",
        "model convert model out --shard-size nan",
        "simulate gemm --m {} --n {} --k {}",
        "simulate schedule --kind 1f1b --stages {} --micro-batches {}",
        "eval --model model --tokens ids.json --precision {}",
    ] {
        let ran = run(folder, line, most.as_ref());
        assert_eq!(ran.code, Some(2), "{line}: {}{}", ran.out, ran.err);
    }
    for threads in ["1000000", "-1", "many"] {
        let args = vec!["doctor".into()];
        let variables = vec![("RAYON_NUM_THREADS", threads)];
        let ran = Run { folder, args, variables, stdout: None }.end();
        let said = ran.err.contains("RAYON_NUM_THREADS: expected 0 to 1024 threads, found");
        assert!(ran.code == Some(2) && said, "{threads}: {}", ran.err);
    }
}

/// `emulate` ends as the command that it runs.
#[test]
fn emulate_passes_the_commands_exit_code_on() {
    let world = world();
    for (command, code) in [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -9 $$", 137)] {
        let ended = Command::new(env!("CARGO_BIN_EXE_fathom"))
            .current_dir(world.path())
            .args(["emulate", "--", "sh", "-c", command])
            .output()
            .unwrap();
        assert_eq!(ended.status.code(), Some(code), "{command}: {ended:?}");
    }
}
