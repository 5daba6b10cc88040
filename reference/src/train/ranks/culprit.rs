//! Which op on which rank first gave a value that is not finite: the step once more on all ranks,
//! every output looked at. The ranks agree on the first in the order of one process.

use std::cell::RefCell;

use fathom_trace::Phase;
use serde::{Deserialize, Serialize};

use super::RankTrainer;
use super::data::StepData;
use crate::Tensor;
use crate::backend::{Backend, Call, Place, Recorder};
use crate::op::entry_of;
use crate::train::TrainError;
use crate::train::config::Plan;
use crate::train::divergence::{Borrowed, Culprit, Divergence, NotFinite, look, not_finite};
use crate::train::trainer::StepLog;

/// Where a call stands in the order of one process: micro-batch, forward before backward, stage (of
/// a backward the deepest first), and its number on the rank.
type Order = (usize, bool, usize, usize);

/// What a rank found.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Found {
    parameter: Option<(usize, Words)>,
    culprit: Option<(Order, String, At, Words)>,
}

/// [`NotFinite`], its value as bits, since JSON has no NaN.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Words {
    tensor: String,
    shape: Vec<usize>,
    index: Vec<usize>,
    value: u64,
}

/// [`Place`] as plain data.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct At {
    step: u64,
    layer: Option<usize>,
    component: fathom_trace::Component,
    phase: Phase,
    micro_batch: Option<usize>,
}

impl Words {
    fn of(found: NotFinite) -> Words {
        let NotFinite { tensor, shape, index, value } = found;
        Words { tensor, shape, index, value: value.to_bits() }
    }

    fn found(self) -> NotFinite {
        let Words { tensor, shape, index, value } = self;
        NotFinite { tensor, shape, index, value: f64::from_bits(value) }
    }
}

/// Runs the step again on every rank.
pub(super) fn find<B: Backend>(
    trainer: &RankTrainer<B>,
    plan: Plan,
    data: &StepData,
    log: &StepLog,
) -> Result<Divergence, TrainError> {
    let mut own = Found::default();
    for (&i, buffer) in trainer.routes.own.iter().zip(&trainer.params.buffers) {
        let piece = &trainer.pieces.all[i];
        let spec = &trainer.whole.specs[piece.param];
        let found = not_finite(&spec.name, &trainer.backend.download(buffer)?);
        if let Some(found) = found {
            let place = piece.range.start + found.index[0];
            let index = index_of(place, &spec.shape);
            let found = NotFinite { index, shape: spec.shape.clone(), ..found };
            own.parameter = Some((piece.param, Words::of(found)));
            break;
        }
    }
    own.culprit = again(trainer, plan, data)?;
    let json = serde_json::to_vec(&own).expect("plain data");
    let what = format!("what is not finite in step {}", log.step);
    let all = trainer.world.all.all_gather(&what, vec![Tensor::from_vec(&[json.len()], json)])?;
    let all: Vec<Found> = all
        .iter()
        .map(|t| serde_json::from_slice(t[0].bytes()).expect("the rank's own JSON"))
        .collect();
    let parameter = all.iter().filter_map(|f| f.parameter.clone()).min_by_key(|(param, _)| *param);
    let culprit = all.into_iter().filter_map(|f| f.culprit).min_by_key(|(order, ..)| *order);
    let parameter = parameter.map(|(_, words)| words.found());
    Ok(Divergence {
        step: log.step,
        loss: log.loss,
        gradient_norm: log.gradient_norm,
        culprit: culprit.filter(|_| parameter.is_none()).and_then(|(_, op, at, words)| {
            let At { step, layer, component, phase, micro_batch } = at;
            let place = Place { step, layer, component, phase, micro_batch };
            Some(Culprit { op: entry_of(&op).ok()?.name, place, output: words.found() })
        }),
        parameter,
    })
}

fn index_of(mut place: usize, shape: &[usize]) -> Vec<usize> {
    let mut index: Vec<usize> = Vec::new();
    for &size in shape.iter().rev() {
        index.insert(0, place % size);
        place /= size;
    }
    index
}

type FirstCall = (Order, String, At, Words);

/// The first call of this rank that gave such a value. The step goes on behind it, since the other
/// ranks wait for what this one sends.
fn again<B: Backend>(
    trainer: &RankTrainer<B>,
    plan: Plan,
    data: &StepData,
) -> Result<Option<FirstCall>, TrainError> {
    let first: RefCell<Option<FirstCall>> = RefCell::new(None);
    let calls = RefCell::new(0);
    let stages = trainer.config.stage_layers();
    let stage = |place: &Place| {
        let layer = place.layer?;
        Some(stages.iter().position(|s| s.contains(&layer)).unwrap_or(stages.len()))
    };
    let recorder = Recorder::new(Borrowed(&trainer.backend), |call: &Call<'_, _>| {
        let Some(Culprit { op, place, output }) = look(call) else { return Ok(()) };
        *calls.borrow_mut() += 1;
        let backward = place.phase != Phase::F;
        // Embedding and head have no layer: they are before and behind all of them.
        let head = place.component == fathom_trace::Component::Head;
        let depth = match stage(&place) {
            Some(stage) => stage + 1,
            None => {
                if head {
                    stages.len() + 1
                } else {
                    0
                }
            }
        };
        let depth = if backward { stages.len() + 1 - depth } else { depth };
        let micro_batch = place.micro_batch.unwrap_or(usize::MAX);
        let order = (micro_batch, backward, depth, *calls.borrow());
        let earlier = first.borrow().as_ref().is_none_or(|found| order < found.0);
        if earlier {
            let Place { step, layer, component, phase, micro_batch } = place;
            let at = At { step, layer, component, phase, micro_batch };
            first.replace(Some((order, op.to_owned(), at, Words::of(output))));
        }
        Ok(())
    });
    let mut executed = trainer.execute(&recorder, plan, data)?;
    trainer.reduce(&recorder, &mut executed)?;
    drop(executed);
    Ok(first.into_inner())
}
