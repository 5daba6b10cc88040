//! Every op of the model's table is timed, or refused by name; and the names that the simulator
//! knows are the table's.

use fathom_config::ModelConfig;
use fathom_reference::backend::{Load, Place, op_record};
use fathom_reference::model::workload::{Workload, record as record_step};
use fathom_reference::op::{Case, OPS};
use fathom_reference::parallel::Parallel;
use fathom_reference::precision::{Mode, Recipe};
use fathom_simulator::kernel_time::Work;
use fathom_simulator::lowering::{self, Kernel, Lowering};
use fathom_simulator::times::LayerKind;
use fathom_simulator::workload::LayerContext;
use fathom_trace::{OpClass, OpRecord};

fn record(case: &Case) -> OpRecord {
    let inputs = case.ordered_inputs().unwrap().into_iter().zip(case.op.inputs());
    let metas = inputs.map(|(tensor, role)| tensor.map(|t| t.meta(role.name))).collect();
    op_record(&*case.op, metas, 0, 0, Place::default()).unwrap()
}

#[test]
fn every_op_becomes_kernels_that_take_bytes_or_is_refused_by_name() {
    let model = ModelConfig::preset("deepseek-v3").unwrap();
    let ctx = LayerContext::of_tokens(4096, 64);
    let lowering = Lowering { model: &model, ctx: &ctx };
    for op in OPS {
        let record = record(&(op.example)().case());
        let kernels = lowering.kernels(LayerKind::Moe, &[&record]);
        if record.class == OpClass::Decode {
            let message = kernels.unwrap_err().to_string();
            assert!(message.contains(op.name) && message.contains("decoding"), "{message}");
            continue;
        }
        let kernels = kernels.unwrap();
        assert!(kernels.iter().any(|k| k.bytes > 0.0), "{}: {kernels:?}", op.name);
    }
}

#[test]
fn ops_that_are_told_apart_by_name_are_in_the_table() {
    let named = [lowering::RETILING, lowering::CAST];
    for name in named.iter().chain(&lowering::FIRST).chain(&lowering::ALIKE) {
        assert!(
            OPS.iter().any(|op| op.name == *name),
            "simulator/src/workload/lowering.rs: no op {name}"
        );
    }
}

/// A layer of fused ops has the same products, and fewer kernels beside them that move fewer bytes.
#[test]
fn fused_ops_are_fewer_kernels_and_fewer_bytes() {
    let model = ModelConfig::preset("deepseek-v3").unwrap();
    let model = ModelConfig { layers: 4, mtp_depth: 0, ..model };
    let (sequences, sequence_length, micro_batches) = (1, 4096, 1);
    let load = Load::Balanced;
    let workload = Workload { sequences, sequence_length, micro_batches, load };
    let ctx = LayerContext::of_tokens(4096, 1);
    let kernels = |fused: bool| {
        let recipe = Recipe { fused: Some(fused), ..Recipe::new(Mode::Fp8) };
        let records = record_step(&model, &recipe, Parallel::default(), 0, &workload).unwrap();
        let layer: Vec<&OpRecord> = records.iter().filter(|r| r.layer == Some(3)).collect();
        Lowering { model: &model, ctx: &ctx }.kernels(LayerKind::Moe, &layer).unwrap()
    };
    let [apart, fused] = [false, true].map(kernels);
    let products = |kernels: &[Kernel]| {
        let products = kernels.iter().filter(|k| matches!(k.work, Work::Gemm(..)));
        products.map(|k| (k.op.clone(), k.shape.clone())).collect::<Vec<_>>()
    };
    assert_eq!(products(&apart), products(&fused));
    let launches = |kernels: &[Kernel]| {
        let memory = kernels.iter().filter_map(|k| match k.work {
            Work::Memory { launches, .. } => Some(launches),
            _ => None,
        });
        memory.sum::<u64>()
    };
    let bytes = |kernels: &[Kernel]| kernels.iter().map(|k| k.bytes).sum::<f64>();
    println!("{} and {} launches", launches(&apart), launches(&fused));
    println!("{:.3e} and {:.3e} bytes", bytes(&apart), bytes(&fused));
    assert!(launches(&fused) < launches(&apart) && bytes(&fused) < bytes(&apart));
}
