//! Inside one instruction: the parts of its layers on the compute and the communication stream of a
//! GPU.
//!
//! Both streams run their parts in a fixed order; a part starts when its stream is free and its
//! input is there. An overlapped pair interleaves a forward layer with a backward layer so that
//! every all-to-all has computation beside it (DeepSeek-V3 report, figure 4; the order is that of
//! the published profile):
//!
//! ```text
//! compute        attention(F)  mlp(B)       mlp(W)       mlp(F)  attention(B) attention(W)
//! communication  combine(B)    dispatch(F)  dispatch(B)          combine(F)
//! ```

use fathom_trace::{Component, Phase};

use crate::times::{LayerTimes, PhaseTimes};

/// One part of a layer on its stream. Times count from the start of the instruction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PartSpan {
    /// Layer among the stage's, from 0, shallow to deep.
    pub layer: u16,
    /// Attention, dispatch, mlp or combine.
    pub component: Component,
    /// F, B (input gradient) or W.
    pub phase: Phase,
    /// When it starts, in seconds from the step's begin.
    pub start_s: f64,
    /// When it ends, in seconds from the step's begin.
    pub end_s: f64,
}

impl PartSpan {
    /// Whether the part runs on the communication stream.
    pub fn is_comm(&self) -> bool {
        matches!(self.component, Component::Dispatch | Component::Combine)
    }
}

/// What an instruction took, in seconds of its rank.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ChunkTime {
    /// From its start to the end of both streams, seconds.
    pub span_s: f64,
    /// Compute stream busy, seconds.
    pub compute_s: f64,
    /// Communication stream busy, seconds.
    pub comm_s: f64,
    /// Communication running while the compute stream waits, seconds.
    pub exposed_s: f64,
}

/// Load of the busiest expert rank relative to the mean, by layer of the stage; empty where
/// balanced.
pub type Load<'a> = &'a [f32];

/// The two streams of a GPU during one instruction.
#[derive(Debug)]
struct Streams<'a> {
    overhead_s: f64,
    compute_free: f64,
    comm_free: f64,
    time: ChunkTime,
    spans: Option<&'a mut Vec<PartSpan>>,
    /// How many parts were played.
    events: u64,
}

/// Outcome of one chunk: its time, and how many parts were played.
pub type Played = (ChunkTime, u64);

impl<'a> Streams<'a> {
    fn new(overhead_s: f64, spans: Option<&'a mut Vec<PartSpan>>) -> Self {
        Streams {
            overhead_s,
            compute_free: overhead_s,
            comm_free: overhead_s,
            time: ChunkTime::default(),
            spans,
            events: 0,
        }
    }

    /// Runs a part that is ready at `ready`; its end. A part that takes no time is no event.
    #[inline]
    fn run(
        &mut self,
        component: Component,
        phase: Phase,
        layer: usize,
        seconds: f64,
        ready: f64,
    ) -> f64 {
        debug_assert!(seconds >= 0.0 && seconds.is_finite(), "{component:?} takes {seconds} s");
        if seconds == 0.0 {
            return ready;
        }
        let comm = matches!(component, Component::Dispatch | Component::Combine);
        let free = if comm { &mut self.comm_free } else { &mut self.compute_free };
        let start_s = free.max(ready);
        let end_s = start_s + seconds;
        *free = end_s;
        *(if comm { &mut self.time.comm_s } else { &mut self.time.compute_s }) += seconds;
        self.events += 1;
        if let Some(spans) = &mut self.spans {
            spans.push(PartSpan { layer: layer as u16, component, phase, start_s, end_s });
        }
        end_s
    }

    fn finish(mut self) -> Played {
        self.time.span_s = self.compute_free.max(self.comm_free);
        // A part waits only for other parts of the instruction, so one of the streams is always
        // busy.
        self.time.exposed_s = (self.time.span_s - self.overhead_s - self.time.compute_s).max(0.0);
        (self.time, self.events)
    }
}

/// `times` under the load of its layer in `load`, as they are where that is empty.
fn stretched(times: PhaseTimes, routed_share: f64, load: Load<'_>, layer: usize) -> PhaseTimes {
    load.get(layer).map_or(times, |&load| under_load(times, routed_share, f64::from(load)))
}

/// `times` under `load`: routed experts and all-to-all stretch with the busiest rank.
pub(crate) fn under_load(times: PhaseTimes, routed_share: f64, load: f64) -> PhaseTimes {
    PhaseTimes {
        attention_s: times.attention_s,
        dispatch_s: times.dispatch_s * load,
        mlp_s: times.mlp_s * (1.0 + routed_share * (load - 1.0)),
        combine_s: times.combine_s * load,
    }
}

/// Runs one layer forward from `ready`; the end of its combine.
fn forward_layer(s: &mut Streams<'_>, layer: usize, t: PhaseTimes, ready: f64) -> f64 {
    let ready = s.run(Component::Attention, Phase::F, layer, t.attention_s, ready);
    let ready = s.run(Component::Dispatch, Phase::F, layer, t.dispatch_s, ready);
    let ready = s.run(Component::Mlp, Phase::F, layer, t.mlp_s, ready);
    s.run(Component::Combine, Phase::F, layer, t.combine_s, ready)
}

/// When a backward's weight gradients run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weights {
    /// As soon as they can, while the layer's exchanges are on the way.
    Beside,
    /// Each before the exchange that follows its layer's half.
    Before,
    /// By themselves: the backward is for the inputs only.
    Later,
}

impl Weights {
    /// Of a full backward.
    pub fn of(under_exchanges: bool) -> Weights {
        if under_exchanges { Weights::Beside } else { Weights::Before }
    }
}

/// Runs one layer backward from `ready`; the end of its attention's input gradient.
fn backward_layer(
    s: &mut Streams<'_>,
    layer: usize,
    mut b: PhaseTimes,
    w: PhaseTimes,
    weights: Weights,
    ready: f64,
) -> f64 {
    let w = match weights {
        Weights::Beside => w,
        Weights::Later => PhaseTimes::default(),
        Weights::Before => {
            // One after the other on the compute stream: as one part each.
            b.mlp_s += w.mlp_s;
            b.attention_s += w.attention_s;
            PhaseTimes::default()
        }
    };
    let combine = s.run(Component::Combine, Phase::B, layer, b.combine_s, ready);
    let mlp = s.run(Component::Mlp, Phase::B, layer, b.mlp_s, combine);
    let dispatch = s.run(Component::Dispatch, Phase::B, layer, b.dispatch_s, mlp);
    s.run(Component::Mlp, Phase::W, layer, w.mlp_s, mlp);
    let attention = s.run(Component::Attention, Phase::B, layer, b.attention_s, dispatch);
    s.run(Component::Attention, Phase::W, layer, w.attention_s, attention);
    attention
}

/// Plays a forward chunk by itself: all parts one after the other. `overhead_s` passes before the
/// first; `spans` takes every part, where given.
pub fn forward(
    layers: &[LayerTimes],
    load: Load<'_>,
    overhead_s: f64,
    spans: Option<&mut Vec<PartSpan>>,
) -> Played {
    let mut s = Streams::new(overhead_s, spans);
    let mut ready = overhead_s;
    for (i, layer) in layers.iter().enumerate() {
        ready =
            forward_layer(&mut s, i, stretched(layer.forward, layer.routed_share, load, i), ready);
    }
    s.finish()
}

/// Plays a backward chunk by itself, with its weight gradients where `weights` says.
pub fn backward(
    layers: &[LayerTimes],
    weights: Weights,
    load: Load<'_>,
    overhead_s: f64,
    spans: Option<&mut Vec<PartSpan>>,
) -> Played {
    let mut s = Streams::new(overhead_s, spans);
    let mut ready = overhead_s;
    for (i, layer) in layers.iter().enumerate().rev() {
        let b = stretched(layer.backward, layer.routed_share, load, i);
        let w = stretched(layer.weight, layer.routed_share, load, i);
        ready = backward_layer(&mut s, i, b, w, weights, ready);
    }
    s.finish()
}

/// Plays the weight gradients of a chunk by themselves, deepest layer first.
pub fn weight(
    layers: &[LayerTimes],
    load: Load<'_>,
    overhead_s: f64,
    spans: Option<&mut Vec<PartSpan>>,
) -> Played {
    let mut s = Streams::new(overhead_s, spans);
    for (i, layer) in layers.iter().enumerate().rev() {
        let w = stretched(layer.weight, layer.routed_share, load, i);
        s.run(Component::Mlp, Phase::W, i, w.mlp_s, overhead_s);
        s.run(Component::Attention, Phase::W, i, w.attention_s, overhead_s);
    }
    s.finish()
}

/// One side of an overlapped pair.
#[derive(Debug, Clone, Copy)]
pub struct Side<'a> {
    /// Times of its layers beside the other side.
    pub overlapped: &'a [LayerTimes],
    /// Times of its layers alone, for those that have no partner.
    pub alone: &'a [LayerTimes],
    /// Load of its experts, by layer.
    pub load: Load<'a>,
}

/// Plays a forward and a full backward chunk, overlapped layer by layer; layers without a partner
/// follow by themselves.
pub fn pair(
    f: Side<'_>,
    b: Side<'_>,
    overhead_s: f64,
    spans: Option<&mut Vec<PartSpan>>,
) -> Played {
    let mut s = Streams::new(overhead_s, spans);
    let (nf, nb) = (f.overlapped.len(), b.overlapped.len());
    let paired = nf.min(nb);
    let (mut f_ready, mut b_ready) = (overhead_s, overhead_s);
    // Deepest backward layer first: the k-th layer forward pairs with the k-th from the end. The
    // calls stand in the order of the diagram above, which is the order on each stream.
    for k in 0..paired {
        let (i, j) = (k, nb - 1 - k);
        let (fl, bl) = (&f.overlapped[i], &b.overlapped[j]);
        let tf = stretched(fl.forward, fl.routed_share, f.load, i);
        let tb = stretched(bl.backward, bl.routed_share, b.load, j);
        let tw = stretched(bl.weight, bl.routed_share, b.load, j);

        let combine_b = s.run(Component::Combine, Phase::B, j, tb.combine_s, b_ready);
        let attention_f = s.run(Component::Attention, Phase::F, i, tf.attention_s, f_ready);
        let mlp_b = s.run(Component::Mlp, Phase::B, j, tb.mlp_s, combine_b);
        let dispatch_f = s.run(Component::Dispatch, Phase::F, i, tf.dispatch_s, attention_f);
        let dispatch_b = s.run(Component::Dispatch, Phase::B, j, tb.dispatch_s, mlp_b);
        s.run(Component::Mlp, Phase::W, j, tw.mlp_s, mlp_b);
        let mlp_f = s.run(Component::Mlp, Phase::F, i, tf.mlp_s, dispatch_f);
        b_ready = s.run(Component::Attention, Phase::B, j, tb.attention_s, dispatch_b);
        s.run(Component::Attention, Phase::W, j, tw.attention_s, b_ready);
        f_ready = s.run(Component::Combine, Phase::F, i, tf.combine_s, mlp_f);
    }
    for (i, layer) in f.alone.iter().enumerate().skip(paired) {
        f_ready = forward_layer(
            &mut s,
            i,
            stretched(layer.forward, layer.routed_share, f.load, i),
            f_ready,
        );
    }
    for j in (0..nb - paired).rev() {
        let layer = &b.alone[j];
        let tb = stretched(layer.backward, layer.routed_share, b.load, j);
        let tw = stretched(layer.weight, layer.routed_share, b.load, j);
        b_ready = backward_layer(&mut s, j, tb, tw, Weights::Beside, b_ready);
    }
    s.finish()
}
