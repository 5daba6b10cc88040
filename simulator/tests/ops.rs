//! Every op of the model's table is timed, or refused by name; and the names that the simulator
//! knows are the table's.

use fathom_config::ModelConfig;
use fathom_reference::backend::{Place, op_record};
use fathom_reference::op::{Case, OPS};
use fathom_simulator::lowering::{self, Lowering};
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
    let named = [lowering::RETILING, lowering::CAST, lowering::FIRST];
    for name in named.iter().chain(&lowering::ALIKE) {
        assert!(
            OPS.iter().any(|op| op.name == *name),
            "simulator/src/workload/lowering.rs: no op {name}"
        );
    }
}
