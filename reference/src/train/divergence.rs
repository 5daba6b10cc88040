//! Where a loss or gradient that is not finite comes from: the step once more, every op's outputs
//! looked at.

use std::cell::RefCell;

use fathom_trace::{Component, DType, Group, Phase};
use half::{bf16, f16};

use super::shards::accumulate;
use super::trainer::{StepBatches, StepLog, Trainer};
use crate::backend::direct::Transfer;
use crate::backend::{Backend, Call, Place, Recorder, Result, passes_on};
use crate::exchange::Communicator;
use crate::exchange::backend::Travelling;
use crate::model::Params;
use crate::{DynOp, EngineError, Tensor};

/// The first element of a tensor that is not finite.
#[derive(Clone, Debug, PartialEq)]
pub struct NotFinite {
    /// The tensor: a parameter's name, or the role of an op's output.
    pub tensor: String,
    /// Shape of the tensor.
    pub shape: Vec<usize>,
    /// The element's place in it.
    pub index: Vec<usize>,
    /// The element: NaN or an infinity.
    pub value: f64,
}

/// The op call whose output was the first that is not finite.
#[derive(Clone, Debug, PartialEq)]
pub struct Culprit {
    /// Name of the op.
    pub op: &'static str,
    /// Step, layer, component, phase and micro-batch of the call.
    pub place: Place,
    /// The output's first element that is not finite.
    pub output: NotFinite,
}

/// A step whose loss or gradient is not finite.
#[derive(Clone, Debug, PartialEq)]
pub struct Divergence {
    /// The step, counted from 1.
    pub step: u64,
    /// Its main loss.
    pub loss: f64,
    /// The global norm of its gradient.
    pub gradient_norm: f64,
    /// A parameter that was not finite before the step; the cause then lies in an earlier step.
    pub parameter: Option<NotFinite>,
    /// The first op call that gave such a value from finite ones; none where only the host's sums
    /// overflow.
    pub culprit: Option<Culprit>,
}

impl std::error::Error for Divergence {}

impl std::fmt::Display for Divergence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Divergence { step, loss, gradient_norm, .. } = self;
        write!(f, "step {step} diverged (loss {loss}, gradient norm {gradient_norm}): ")?;
        let tensor = |t: &NotFinite| {
            let NotFinite { tensor, shape, index, value } = t;
            format!("'{tensor}' {shape:?} is {value} at {index:?}")
        };
        match (&self.parameter, &self.culprit) {
            (Some(parameter), _) => {
                write!(f, "before the step parameter {}", tensor(parameter))
            }
            (None, Some(Culprit { op, place, output })) => {
                match place.layer {
                    Some(layer) => write!(f, "layer {layer}, ")?,
                    None => write!(f, "outside the layers, ")?,
                }
                write!(f, "{}, {}", component(place.component), phase(place.phase))?;
                if let Some(micro_batch) = place.micro_batch {
                    write!(f, ", micro-batch {micro_batch}")?;
                }
                write!(f, ": op {op} first gave a value that is not finite: output ")?;
                write!(f, "{}", tensor(output))
            }
            (None, None) => write!(f, "no op gave it again; the sum of the losses overflows"),
        }
    }
}

fn component(component: Component) -> String {
    let value = serde_json::to_value(component).expect("a name");
    value.as_str().unwrap_or_default().to_owned()
}

fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::F => "forward",
        Phase::B => "input-backward",
        Phase::W => "weight-backward",
    }
}

/// The first element of a tensor that is not finite, in row-major order; codes of FP8 count by
/// their value. `name` is what the answer calls the tensor.
pub fn not_finite(name: &str, tensor: &Tensor) -> Option<NotFinite> {
    let e4m3 = |code: u64| if code & 0x7F == 0x7F { f64::NAN } else { 0.0 };
    let e5m2 = |code: u64| f64::from(f16::from_bits((code as u16) << 8));
    let value = |i: usize| -> f64 {
        let bits = tensor.bits(i);
        match tensor.dtype() {
            DType::F64 => f64::from_bits(bits),
            DType::F32 => f32::from_bits(bits as u32).into(),
            DType::BF16 => bf16::from_bits(bits as u16).into(),
            DType::F16 => f16::from_bits(bits as u16).into(),
            DType::F8E4M3 => e4m3(bits),
            DType::F8E5M2 => e5m2(bits),
            _ => 0.0,
        }
    };
    let place = (0..tensor.len()).find(|&i| !value(i).is_finite())?;
    let mut rest = place;
    let mut index: Vec<usize> = Vec::new();
    for &size in tensor.shape().iter().rev() {
        index.insert(0, rest % size);
        rest /= size;
    }
    let (tensor_name, shape) = (name.to_owned(), tensor.shape().to_vec());
    Some(NotFinite { tensor: tensor_name, shape, index, value: value(place) })
}

/// Runs the step again and looks at every output.
pub(super) fn find<B: Backend>(
    trainer: &Trainer<B>,
    batches: &StepBatches,
    log: &StepLog,
) -> Result<Divergence> {
    let mut found = Divergence {
        step: log.step,
        loss: log.loss,
        gradient_norm: log.gradient_norm,
        parameter: None,
        culprit: None,
    };
    for (spec, buffer) in trainer.model.specs.iter().zip(&trainer.params.buffers) {
        found.parameter = not_finite(&spec.name, &trainer.backend.download(buffer)?);
        if found.parameter.is_some() {
            return Ok(found);
        }
    }
    let culprit = RefCell::new(None);
    let outcome = {
        let recorder = Recorder::new(Borrowed(&trainer.backend), |call: &Call<'_, _>| {
            look(call).map_or(Ok(()), |found| {
                let (engine, op) = (call.backend.name(), found.op.to_owned());
                culprit.replace(Some(found));
                Err(EngineError::Failed { engine, op, reason: "not finite".to_owned() })
            })
        });
        again(&recorder, trainer, batches)
    };
    found.culprit = culprit.into_inner();
    if found.culprit.is_none() {
        outcome?;
    }
    Ok(found)
}

/// The first output of an op call that is not finite, among those that come to the host.
pub(super) fn look<B: Backend>(call: &Call<'_, B>) -> Option<Culprit> {
    let (op, place) = (call.op.name(), call.place);
    call.op.outputs().iter().zip(call.outputs).find_map(|(role, output)| {
        let output = not_finite(role, &call.backend.download(output).ok()?)?;
        Some(Culprit { op, place, output })
    })
}

fn again<B: Backend, R: Backend<Buffer = B::Buffer>>(
    recorder: &R,
    trainer: &Trainer<B>,
    batches: &StepBatches,
) -> Result<()> {
    let model = &trainer.model;
    let params = Params::<R> { buffers: trainer.params.buffers.clone() };
    let mut weights = model.weights(recorder, &params)?;
    weights.delayed = trainer.begin_scales(recorder)?;
    let sum = accumulate(recorder, model, &weights, batches, &trainer.config, &|| false)?;
    let Some((gradients, _)) = sum else {
        return Ok(());
    };
    let empty = crate::optim::Optimizer::<R> {
        config: trainer.config.optim.clone(),
        updates: 0,
        first: Vec::new(),
        second: Vec::new(),
    };
    empty.clip(model, recorder, &gradients).map(|_| ())
}

/// A backend by reference.
pub(super) struct Borrowed<'a, B>(pub &'a B);

impl<B: Backend> Backend for Borrowed<'_, B> {
    type Buffer = B::Buffer;

    passes_on!(self => self.0, B);

    fn execute(&self, op: &dyn DynOp, inputs: Vec<Option<B::Buffer>>) -> Result<Vec<B::Buffer>> {
        self.0.execute(op, inputs)
    }

    fn at(&self, place: Place) {
        self.0.at(place);
    }

    fn group_counts(&self, counts: &B::Buffer, group: Group) -> Result<Option<Vec<Vec<usize>>>> {
        self.0.group_counts(counts, group)
    }
}

impl<B: Travelling> Travelling for Borrowed<'_, B> {
    fn send_to(
        &self,
        link: &Communicator,
        what: &str,
        to: usize,
        buffers: Vec<B::Buffer>,
    ) -> Result<()> {
        self.0.send_to(link, what, to, buffers)
    }

    fn receive_from(&self, link: &Communicator, what: &str, from: usize) -> Result<Vec<B::Buffer>> {
        self.0.receive_from(link, what, from)
    }

    fn connects(&self, group: &Communicator) -> bool {
        self.0.connects(group)
    }

    fn move_ranges(
        &self,
        group: &Communicator,
        what: &str,
        transfer: Transfer<B::Buffer>,
    ) -> Result<Vec<B::Buffer>> {
        self.0.move_ranges(group, what, transfer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bad_element_is_found_in_every_type() {
        let x = Tensor::from_vec(&[2, 3], vec![0.0f32, 1.0, 2.0, 3.0, f32::INFINITY, f32::NAN]);
        let found = not_finite("x", &x).unwrap();
        assert_eq!((found.index, found.value), (vec![1, 1], f64::INFINITY));
        let codes = |dtype, codes: &[u8]| Tensor::from_bytes(dtype, &[codes.len()], codes);
        assert!(not_finite("q", &codes(DType::F8E4M3, &[0x7E, 0x80])).is_none());
        assert_eq!(not_finite("q", &codes(DType::F8E4M3, &[0, 0xFF])).unwrap().index, [1]);
        assert!(not_finite("q", &codes(DType::F8E5M2, &[0x7B])).is_none());
        assert!(not_finite("q", &codes(DType::F8E5M2, &[0x7C])).unwrap().value.is_infinite());
        assert!(not_finite("ids", &Tensor::from_vec(&[1], vec![-1i32])).is_none());
    }
}
