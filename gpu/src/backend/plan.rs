//! What a run would ask of the kernels, before it begins: a backend that computes nothing and notes
//! every op that no kernel covers.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;

use fathom_reference::backend::{Backend, Load, Meta, MetaBuffer, Result, input_metas};
use fathom_reference::{DynOp, Tensor};
use fathom_trace::DType;

use crate::kernels;

/// Shapes only, as backend `meta`; what is downloaded is zeros.
#[derive(Default)]
pub struct Plan {
    meta: Meta,
    /// Ops without a kernel, or variants of them: what is missing, and how often.
    uncovered: RefCell<BTreeMap<String, usize>>,
    /// What was asked of every op.
    asked: RefCell<BTreeMap<&'static str, Asked>>,
}

/// How often an op was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// Calls of the op.
    pub calls: usize,
    /// Those of variants that no kernel covers.
    pub uncovered: usize,
}

impl Plan {
    /// Tokens spread evenly over experts.
    pub fn new() -> Plan {
        Plan { meta: Meta::new(0, Load::Balanced), ..Plan::default() }
    }

    /// What was asked of every op so far, by its name.
    pub fn asked(&self) -> BTreeMap<&'static str, Asked> {
        self.asked.borrow().clone()
    }

    /// What no kernel covers, a line an op and reason with the number of calls; none where all is.
    pub fn missing(&self) -> Option<String> {
        let uncovered = self.uncovered.borrow();
        if uncovered.is_empty() {
            return None;
        }
        let lines = uncovered.iter().map(|(what, calls)| format!("{what} ({calls} calls a step)"));
        Some(lines.collect::<Vec<_>>().join("\n"))
    }
}

impl Backend for Plan {
    type Buffer = MetaBuffer;

    fn name(&self) -> String {
        "plan".to_owned()
    }

    fn execute(&self, op: &dyn DynOp, inputs: Vec<Option<MetaBuffer>>) -> Result<Vec<MetaBuffer>> {
        let metas = input_metas(self, op, &inputs);
        let outputs = self.meta.execute(op, inputs)?;
        // The records are not wanted, and a long run's would add up.
        self.meta.take_records();
        let mut all = self.asked.borrow_mut();
        let asked = all.entry(op.name()).or_default();
        asked.calls += 1;
        if let Err(reason) = kernels::covers(op, &metas) {
            asked.uncovered += 1;
            let what = format!("{}: {reason}", op.name());
            *self.uncovered.borrow_mut().entry(what).or_default() += 1;
        }
        Ok(outputs)
    }

    fn upload(&self, tensor: Tensor) -> Result<MetaBuffer> {
        self.meta.upload(tensor)
    }

    fn download(&self, buffer: &MetaBuffer) -> Result<Tensor> {
        Ok(Tensor::zeros(buffer.dtype, &buffer.shape))
    }

    fn zeros(&self, dtype: DType, shape: &[usize]) -> Result<MetaBuffer> {
        self.meta.zeros(dtype, shape)
    }

    fn dtype(&self, buffer: &MetaBuffer) -> DType {
        buffer.dtype
    }

    fn shape(&self, buffer: &MetaBuffer) -> Vec<usize> {
        buffer.shape.clone()
    }

    fn fuses(&self) -> bool {
        true
    }

    fn expert_counts(
        &self,
        counts: &MetaBuffer,
        local: Range<usize>,
        slots: usize,
    ) -> Result<Vec<usize>> {
        self.meta.expert_counts(counts, local, slots)
    }
}

#[cfg(test)]
mod tests {
    use fathom_numerics::formats::Format;
    use fathom_numerics::quant::ScaleKind;
    use fathom_reference::ops::cast::Cast;
    use fathom_reference::ops::quantize_tile::QuantizeTile;

    use super::*;

    #[test]
    fn what_no_kernel_covers_is_named_and_counted() {
        let plan = Plan::new();
        let x = plan.zeros(DType::F32, &[4, 4096]).unwrap();
        plan.cast(&Cast { out: DType::BF16 }, &x).unwrap();
        let (format, scale, amax_floor) = (Format::E4M3, ScaleKind::F32, 1e-4);
        let tile = |tile| QuantizeTile { format, tile, scale, amax_floor };
        plan.quantize_tile(&tile(128), &x).unwrap();
        assert_eq!(plan.missing(), None);
        plan.quantize_tile(&tile(2048), &x).unwrap();
        plan.quantize_tile(&tile(4096), &x).unwrap();
        let wide = plan.zeros(DType::F64, &[2]).unwrap();
        plan.cast(&Cast { out: DType::F64 }, &wide).unwrap();
        let expected = "cast: x is F64, and kernels compute in F32 (1 calls a step)\n\
                        quantize_tile: the kernel takes tile: at most 1024 (2 calls a step)";
        assert_eq!(plan.missing().as_deref(), Some(expected));
        assert_eq!(plan.asked()["cast"], Asked { calls: 2, uncovered: 1 });
        assert_eq!(plan.asked()["quantize_tile"], Asked { calls: 3, uncovered: 2 });
    }
}
