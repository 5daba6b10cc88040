//! What a rank does when: how long it waits in exchanges, and, where a trace is asked for, the
//! spans of its step.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use fathom_schedule::perfetto::COMPUTE;
use serde::{Deserialize, Serialize};

use super::{Exchange, ExchangeError, Label, Message};
use crate::Tensor;
use crate::backend::Place;

/// How the name of a group begins over which hidden states and gradients come into a stage: a wait
/// for them is the pipeline's bubble.
pub const INTO_STAGE: &str = "into stage";

/// Seconds that a rank waited in a step's exchanges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Waits {
    /// For a neighbouring stage.
    pub stage_s: f64,
    /// For all else: rows of experts, data, gradients, weights, losses.
    pub rest_s: f64,
}

/// A part of a layer that was computed or waited for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// [`COMPUTE`], or [`COMMUNICATION`](fathom_schedule::perfetto::COMMUNICATION) where it was
    /// waited for.
    pub thread: u32,
    /// Component and phase: `attention F`.
    pub name: String,
    /// Layer of the model; none for embedding and head.
    pub layer: Option<usize>,
    /// Micro-batch of the step.
    pub micro_batch: usize,
    /// Begin and end, nanoseconds since 1970.
    pub span: (u64, u64),
}

/// A rank's step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepSpans {
    /// Of each of the rank's instructions.
    pub instructions: Vec<(u64, u64)>,
    /// What was computed and exchanged within the instructions.
    pub parts: Vec<Part>,
    /// Before and behind them: thread, name, span.
    pub tail: Vec<(u32, String, (u64, u64))>,
}

/// A rank's clock.
pub struct Clock {
    begin: Instant,
    begin_ns: u64,
    waits: Mutex<Waits>,
    spans: Option<Mutex<StepSpans>>,
}

impl Clock {
    /// A clock; one that `traces` keeps spans.
    pub fn new(traces: bool) -> Clock {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Clock {
            begin: Instant::now(),
            begin_ns: since.as_nanos() as u64,
            waits: Mutex::default(),
            spans: traces.then(Mutex::default),
        }
    }

    /// Nanoseconds since 1970: the ranks of a machine agree on it.
    pub fn now(&self) -> u64 {
        self.begin_ns + self.begin.elapsed().as_nanos() as u64
    }

    /// Whether it keeps spans.
    pub fn traces(&self) -> bool {
        self.spans.is_some()
    }

    fn note(&self, what: impl FnOnce(&mut StepSpans)) {
        if let Some(spans) = &self.spans {
            what(&mut spans.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// An instruction of the schedule has run from `begin` until now.
    pub fn instruction(&self, begin: u64) {
        self.note(|spans| spans.instructions.push((begin, self.now())));
    }

    /// Something of the whole step has run from `begin` until now.
    pub fn tail(&self, thread: u32, name: &str, begin: u64) {
        self.note(|spans| spans.tail.push((thread, name.to_owned(), (begin, self.now()))));
    }

    /// An op at `place` was computed, or waited for, from `begin` until now; ops that follow each
    /// other at one place are one part.
    pub fn part(&self, thread: u32, place: Place, begin: u64) {
        let Place { layer, component, phase, micro_batch: Some(micro_batch), .. } = place else {
            return;
        };
        self.note(|spans| {
            let component = format!("{component:?}").to_lowercase();
            let name = format!("{component} {phase:?}");
            let span = (begin, self.now());
            let part = Part { thread, name, layer, micro_batch, span };
            let same = |last: &&mut Part| {
                (last.layer, last.micro_batch) == (layer, micro_batch)
                    && (last.thread, &last.name) == (COMPUTE, &part.name)
            };
            match spans.parts.last_mut().filter(same) {
                Some(last) if thread == COMPUTE => last.span.1 = span.1,
                _ => spans.parts.push(part),
            }
        });
    }

    /// The waits since the last call.
    pub fn take_waits(&self) -> Waits {
        std::mem::take(&mut self.waits.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The spans since the last call.
    pub fn take_spans(&self) -> StepSpans {
        let mut taken = StepSpans::default();
        self.note(|spans| taken = std::mem::take(spans));
        taken
    }
}

/// An exchange whose waits a clock sums up.
pub struct Timed {
    /// The exchange whose waits are measured.
    pub inner: Arc<dyn Exchange>,
    /// The clock that sums them up.
    pub clock: Arc<Clock>,
}

impl Exchange for Timed {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world(&self) -> usize {
        self.inner.world()
    }

    fn post(&self, to: usize, message: Message) -> Result<(), ExchangeError> {
        self.inner.post(to, message)
    }

    fn take(&self, from: usize, expected: &Label) -> Result<Vec<Tensor>, ExchangeError> {
        let begin = Instant::now();
        let taken = self.inner.take(from, expected);
        let seconds = begin.elapsed().as_secs_f64();
        let mut waits = self.clock.waits.lock().unwrap_or_else(PoisonError::into_inner);
        match expected.channel.starts_with(INTO_STAGE) {
            true => waits.stage_s += seconds,
            false => waits.rest_s += seconds,
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use fathom_schedule::perfetto::COMMUNICATION;
    use fathom_trace::{Component, Phase};

    use super::*;

    #[test]
    fn ops_at_one_place_are_one_part_and_waits_are_apart() {
        let clock = Clock::new(true);
        let at = |layer, component, phase| {
            let (layer, micro_batch) = (Some(layer), Some(2));
            Place { step: 1, layer, component, phase, micro_batch }
        };
        let attention = at(3, Component::Attention, Phase::F);
        let combine = at(3, Component::Combine, Phase::F);
        for (thread, place) in [
            (COMPUTE, attention),
            (COMPUTE, attention),
            (COMMUNICATION, combine),
            (COMPUTE, combine),
            (COMPUTE, Place::default()),
            (COMPUTE, at(4, Component::Attention, Phase::F)),
        ] {
            let begin = clock.now();
            clock.part(thread, place, begin);
        }
        let spans = clock.take_spans();
        let parts: Vec<_> = spans.parts.iter().map(|p| (p.thread, &*p.name, p.layer)).collect();
        let expected = [
            (COMPUTE, "attention F", Some(3)),
            (COMMUNICATION, "combine F", Some(3)),
            (COMPUTE, "combine F", Some(3)),
            (COMPUTE, "attention F", Some(4)),
        ];
        assert_eq!(parts, expected);
        let ends: Vec<_> = spans.parts.iter().flat_map(|p| [p.span.0, p.span.1]).collect();
        assert!(ends.is_sorted());
        assert_eq!(clock.take_spans(), StepSpans::default());
    }
}
