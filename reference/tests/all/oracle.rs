//! The model against the oracles: Hugging Face transformers in F64.

use std::path::Path;

use fathom_reference::Tensor;
use fathom_reference::backend::Reference;
use fathom_reference::checkpoint::hf::{HfCheckpoint, split};
use fathom_reference::checkpoint::tensors::TensorsFile;
use fathom_reference::model::{Batch, Model, StepSettings};
use fathom_reference::precision::{Mode, Recipe};
use fathom_trace::{DType, Parallel};

fn f64s(tensor: &Tensor) -> Vec<f64> {
    match tensor.dtype() {
        DType::F64 => tensor.as_slice::<f64>().to_vec(),
        DType::F32 => tensor.as_slice::<f32>().iter().map(|&x| x.into()).collect(),
        other => panic!("{other} is no float of the oracle"),
    }
}

/// 2-norm of the difference over the 2-norm of the expected.
fn relative(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut found.iter().zip(expected).map(|(f, e)| f - e));
    let scale = norm(&mut expected.iter().copied());
    if scale == 0.0 { difference } else { difference / scale }
}

struct Case {
    model: Model,
    checkpoint: HfCheckpoint,
    oracle: TensorsFile,
    batch: Batch,
}

fn open(folder: &Path, oracle: &str, mode: Mode) -> Case {
    let checkpoint = HfCheckpoint::open(folder).unwrap();
    let model = Model::new(&checkpoint.config, Recipe::new(mode), Parallel::default(), 0).unwrap();
    let oracle = TensorsFile::open(&folder.join(oracle)).unwrap();
    let ids = oracle.tensor("input_ids").unwrap();
    let rows = ids.as_slice::<i64>().chunks(ids.shape()[1]);
    let sequences: Vec<Vec<u32>> =
        rows.map(|row| row.iter().map(|&i| i as u32).collect()).collect();
    Case { model, checkpoint, oracle, batch: Batch::from_sequences(&sequences) }
}

/// Runs forward and backward and compares everything that the oracle holds.
fn check(case: &Case, lambda: f64, grads: &TensorsFile, bounds: [f64; 3]) {
    let Case { model, checkpoint, oracle, batch } = case;
    let [logits_bound, grads_bound, loss_bound] = bounds;
    let (backend, mtp) = (Reference, model.config.mtp_depth);
    let params = checkpoint.load(model, &backend).unwrap();
    let weights = model.weights(&backend, &params).unwrap();
    let device = model.batch(&backend, batch).unwrap();
    let settings = StepSettings::of(batch, mtp, lambda);
    let forward = model.forward(&backend, &weights, &device, &settings, true).unwrap();
    let expect = |name: &str| f64s(&oracle.tensor(name).unwrap());
    let name = if mtp > 0 { "main_logits_f64" } else { "logits_f64" };
    let logits = model.logits(&backend, &weights, &forward.hidden).unwrap();
    let error = relative(&f64s(&logits), &expect(name));
    assert!(error <= logits_bound, "logits: {error:e}");
    let report = model.report(&backend, &forward).unwrap();
    let loss = report.main * settings.main_scale;
    let name = if mtp > 0 { "main_loss_f64" } else { "loss_f64" };
    let error = relative(&[loss], &expect(name));
    assert!(error <= loss_bound, "loss: {error:e}");
    for (layer, output) in forward.outputs.iter().enumerate() {
        if let Some(expected) = oracle.tensor(&format!("layer_out.{layer}")) {
            let error = relative(&f64s(output), &f64s(&expected));
            assert!(error <= logits_bound, "layer {layer}: {error:e}");
        }
        if let Some(expected) = oracle.tensor(&format!("router.{layer}.indices")) {
            let kept = forward.layers[layer].mlp.moe.as_ref().unwrap();
            assert_eq!(sorted(&kept.indices), sorted(&expected), "experts of layer {layer}");
        }
    }
    if let Some((hidden, _, kept)) = forward.mtp.first() {
        let logits = model.logits(&backend, &weights, hidden).unwrap();
        let error = relative(&f64s(&logits), &expect("mtp_logits_f64"));
        assert!(error <= logits_bound, "MTP logits: {error:e}");
        let loss = report.mtp[0] * settings.mtp_scales[0] / lambda;
        let error = relative(&[loss], &expect("mtp_loss_f64"));
        assert!(error <= loss_bound, "MTP loss: {error:e}");
        let expected = oracle.tensor("mtp_router_indices").unwrap();
        let kept = kept.layer.mlp.moe.as_ref().unwrap();
        assert_eq!(sorted(&kept.indices), sorted(&expected), "experts of the MTP module");
    }
    let zeros = model.zero_gradients(&backend).unwrap();
    let found = model.backward(&backend, &weights, &device, &settings, forward, zeros).unwrap();
    let found = model.finish_gradients(&backend, found).unwrap();
    let mut compared = 0;
    for (spec, gradient) in model.specs.iter().zip(&found.buffers) {
        let Some(gradient) = gradient else { continue };
        for (name, tensor) in split(spec, gradient) {
            let expected = grads.tensor(&name).unwrap_or_else(|| panic!("{name} in the oracle"));
            let error = relative(&f64s(&tensor), &f64s(&expected));
            assert!(error <= grads_bound, "gradient of {name}: {error:e}");
            compared += 1;
        }
    }
    let copies = |name: &&String| !name.ends_with("e_score_correction_bias");
    assert_eq!(compared, grads.entries.keys().filter(copies).count());
}

/// Each row's experts, in ascending order.
fn sorted(indices: &Tensor) -> Vec<Vec<i32>> {
    let rows = indices.as_slice::<i32>().chunks(indices.shape()[1]);
    rows.map(|row| {
        let mut row = row.to_vec();
        row.sort_unstable();
        row
    })
    .collect()
}

const FP32: [f64; 3] = [1e-5, 1e-4, 1e-6];
/// The oracle's own RoPE tables are F32 values computed by another library.
const F64: [f64; 3] = [1e-6, 1e-5, 1e-7];

#[test]
fn plain_checkpoint() {
    let Some(folder) = fathom_trace::shared::need("oracle/tiny-v3") else { return };
    let grads = TensorsFile::open(&folder.join("oracle_grads_from_f64.safetensors")).unwrap();
    for (mode, bounds) in [(Mode::Fp32, FP32), (Mode::F64, F64)] {
        check(&open(&folder, "oracle_forward.safetensors", mode), 0.0, &grads, bounds);
    }
}

#[test]
fn mtp_checkpoint() {
    let Some(folder) = fathom_trace::shared::need("oracle/tiny-v3-mtp") else { return };
    let grads = TensorsFile::open(&folder.join("oracle_mtp_grads.safetensors")).unwrap();
    for (mode, bounds) in [(Mode::Fp32, FP32), (Mode::F64, F64)] {
        check(&open(&folder, "oracle_mtp.safetensors", mode), 0.3, &grads, bounds);
    }
}
