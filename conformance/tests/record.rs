//! Recording a training step and replaying it: every call, chosen calls, and a flipped bit.

use std::path::{Path, PathBuf};

use fathom_config::ModelConfig;
use fathom_conformance::check::Status;
use fathom_conformance::record::{Options, RecordError, Recording, Written};
use fathom_conformance::{case_file, replay};
use fathom_reference::Tensor;
use fathom_reference::backend::{Backend, Reference};
use fathom_reference::model::{Batch, Model, StepSettings};
use fathom_reference::op::ReferenceEngine;
use fathom_reference::precision::{Mode, Recipe};
use fathom_trace::{OpRecord, Parallel};

/// Two micro-batches of step 3 of a small model: the gradients.
fn step<B: Backend>(backend: &B, mode: Mode) -> Vec<Option<Tensor>> {
    let mut config = ModelConfig::preset("small").unwrap();
    (config.layers, config.vocab_size, config.hidden_size) = (2, 32, 32);
    let model = Model::new(&config, Recipe::new(mode), Parallel::default(), 0).unwrap();
    let params = model.init(backend, 5).unwrap();
    let weights = model.weights(backend, &params).unwrap();
    let mut grads = model.zero_gradients(backend).unwrap();
    for micro_batch in 0..2 {
        let sequence: Vec<u32> = (0..9).map(|i| (i * i + 5 * micro_batch) % 32).collect();
        let host = Batch::from_sequences(&[sequence]);
        let batch = model.batch(backend, &host).unwrap();
        let settings = StepSettings {
            step: 3,
            micro_batch: Some(micro_batch as usize),
            ..StepSettings::of(&host, 1, 0.3)
        };
        model.step(backend, &weights, &batch, &settings, &mut grads).unwrap();
    }
    let download = |b: &B::Buffer| backend.download(b).unwrap();
    grads.buffers.iter().map(|b| b.as_ref().map(download)).collect()
}

fn record(options: &Options, mode: Mode) -> (Written, Vec<Option<Tensor>>) {
    let recording = Recording::open(options).unwrap();
    let grads = step(&recording.wrap(Reference), mode);
    (recording.finish().unwrap(), grads)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_recorded_step_replays_in_every_bit_and_its_trace_says_the_same() {
    for mode in [Mode::Fp32, Mode::Fp8] {
        let folder = tempfile::tempdir().unwrap();
        let (cases, trace) = (folder.path().join("run"), folder.path().join("ops.jsonl"));
        let options = Options {
            cases: Some(cases.clone()),
            op_trace: Some(trace.clone()),
            ..Options::default()
        };
        let (written, recorded) = record(&options, mode);
        assert!(recorded == step(&Reference, mode), "recording changes bits");
        let targets = replay::cases(&cases).unwrap();
        let reports: Vec<_> = targets
            .iter()
            .map(|t| replay::replay(t, &ReferenceEngine, &[]).expect("no op is left out"))
            .collect();
        for report in &reports {
            assert_eq!(report.status, Status::Pass, "{}: {:?}", report.file, report.error);
        }
        let ops = replay::by_op(&reports);
        assert_eq!(ops.iter().map(|op| op.pass as u64).sum::<u64>(), written.cases);
        assert!(ops.iter().any(|op| op.op == "attention_backward" && op.mismatches == 0));
        // Names sort in order of execution, which is the trace's.
        let records: Vec<OpRecord> = fathom_trace::jsonl::read_file(&trace).unwrap();
        assert_eq!(records.len() as u64, written.ops);
        assert_eq!(written.ops, written.cases);
        for (record, target) in records.iter().zip(&targets) {
            let file = case_file::read(&target.path).unwrap();
            assert_eq!(record.op, file.case.op.name());
            assert_eq!(file.metadata["step"], record.step.to_string());
            assert_eq!(
                file.metadata.get("layer").cloned(),
                record.layer.map(|layer| layer.to_string())
            );
            let inputs: Vec<String> = record.inputs.iter().map(|i| i.role.clone()).collect();
            assert_eq!(inputs.len(), file.case.inputs.len());
            assert!(inputs.iter().all(|role| file.case.inputs.contains_key(role)));
        }
        assert!(records.iter().any(|r| r.step == 3 && r.micro_batch == Some(1)));
    }
}

#[test]
fn chosen_calls_have_the_names_that_they_have_among_all() {
    let folder = tempfile::tempdir().unwrap();
    let options =
        |name: &str| Options { cases: Some(folder.path().join(name)), ..Options::default() };
    let path = |name: &str| -> PathBuf { folder.path().join(name) };
    record(&options("all"), Mode::Bf16);
    let chosen = Options {
        ops: vec!["gemm".into(), "rope".into()],
        steps: vec![3],
        layers: vec![1],
        ..options("chosen")
    };
    record(&chosen, Mode::Bf16);
    let all = names(&path("all"));
    let picked = |name: &&String| {
        let op = name.ends_with("-gemm.safetensors") || name.ends_with("-rope.safetensors");
        op && name.starts_with("000003-") && name.contains("-layer01-")
    };
    let expected: Vec<&String> = all.iter().filter(picked).collect();
    let found = names(&path("chosen"));
    assert!(found.len() > 4 && found.len() < all.len() / 4, "{found:?}");
    assert_eq!(found.iter().collect::<Vec<_>>(), expected);
    for name in &found {
        let bytes = |folder: &str| std::fs::read(path(folder).join(name)).unwrap();
        assert!(bytes("all") == bytes("chosen"), "{name}");
    }
    let none = record(&Options { steps: vec![4], ..options("none") }, Mode::Bf16).0;
    assert_eq!(none.cases, 0);
}

#[test]
fn a_flipped_bit_fails_at_its_op() {
    let folder = tempfile::tempdir().unwrap();
    let cases = folder.path().join("run");
    let ops = vec!["rms_norm".into(), "swiglu".into()];
    record(&Options { cases: Some(cases.clone()), ops, ..Options::default() }, Mode::Fp32);
    let targets = replay::cases(&cases).unwrap();
    let target = targets.iter().find(|t| t.path.to_string_lossy().contains("swiglu")).unwrap();
    let mut file = case_file::read(&target.path).unwrap();
    let y = file.expected.get_mut("y").unwrap();
    let bits = y.as_slice::<f32>()[5].to_bits() ^ 1;
    y.as_mut_slice::<f32>()[5] = f32::from_bits(bits);
    case_file::write(&target.path, &file).unwrap();
    let only = ["swiglu".to_owned()];
    let reports: Vec<_> =
        targets.iter().filter_map(|t| replay::replay(t, &ReferenceEngine, &only)).collect();
    assert!(reports.len() < targets.len());
    let ops = replay::by_op(&reports);
    assert_eq!((ops.len(), ops[0].fail, ops[0].mismatches), (1, 1, 1));
    assert_eq!(ops[0].first.as_deref(), target.path.to_str());
}

#[test]
fn wrong_options_are_refused_before_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let open = |options: Options| Recording::open(&options).map(|_| ());
    let cases = Some(folder.path().to_owned());
    std::fs::write(folder.path().join("old"), b"").unwrap();
    let taken = open(Options { cases: cases.clone(), ..Options::default() });
    assert!(matches!(taken, Err(RecordError::NotEmpty { .. })), "{taken:?}");
    let unknown = open(Options { cases, ops: vec!["gem".into()], ..Options::default() });
    assert!(matches!(unknown, Err(RecordError::UnknownOp { .. })), "{unknown:?}");
    let nowhere = open(Options { steps: vec![1], ..Options::default() });
    assert!(matches!(nowhere, Err(RecordError::NoFolder)), "{nowhere:?}");
}
