//! The event engine: hand-worked chunks, agreement with the chunk-level player, conservation,
//! causality, monotony.

use fathom_schedule::timeline::{self, ChunkDurations};
use fathom_schedule::{Op, Schedule, ScheduleKind, ScheduleShape, Shape};
use fathom_simulator::events::chunk::Weights;
use fathom_simulator::events::{Detail, StepOutcome, chunk, play};
use fathom_simulator::times::{
    LayerKind, LayerTimes, PhaseTimes, StageTimes, StepTimes, TailTimes,
};
use proptest::prelude::*;

fn phase(attention_s: f64, dispatch_s: f64, mlp_s: f64, combine_s: f64) -> PhaseTimes {
    PhaseTimes { attention_s, dispatch_s, mlp_s, combine_s }
}

fn layer(f: PhaseTimes, b: PhaseTimes, w: PhaseTimes) -> LayerTimes {
    LayerTimes { kind: LayerKind::Moe, forward: f, backward: b, weight: w, routed_share: 0.5 }
}

fn uniform(layers: Vec<LayerTimes>, schedule: &Schedule) -> StepTimes {
    StepTimes {
        stages: vec![
            StageTimes { alone: layers.clone(), overlapped: layers };
            schedule.geometry.stages
        ],
        tail: vec![TailTimes::default(); schedule.ranks.len()],
        p2p_s: vec![0.0; schedule.geometry.stages - 1],
        wgrad_under_exchanges: true,
        instruction_overhead_s: 0.0,
        expert_load: Vec::new(),
    }
}

#[test]
fn a_pair_of_single_layers_by_hand() {
    // compute        attn(F) 0-2  mlp(B) 2-5  mlp(W) 5-7  mlp(F) 7-10  attn(B) 10-14  attn(W) 14-15
    // communication  comb(B) 0-1  disp(F) 2-4  disp(B) 5-8  comb(F) 10-12
    let l = layer(phase(2.0, 2.0, 3.0, 2.0), phase(4.0, 3.0, 3.0, 1.0), phase(1.0, 0.0, 2.0, 0.0));
    let layers = [l];
    let side = chunk::Side { overlapped: &layers, alone: &layers, load: &[] };
    let mut spans = Vec::new();
    let (time, events) = chunk::pair(side, side, 0.0, Some(&mut spans));
    assert_eq!(events, 10);
    let times: Vec<(f64, f64)> = spans.iter().map(|s| (s.start_s, s.end_s)).collect();
    let expected = [
        (0.0, 1.0),
        (0.0, 2.0),
        (2.0, 5.0),
        (2.0, 4.0),
        (5.0, 8.0),
        (5.0, 7.0),
        (7.0, 10.0),
        (10.0, 14.0),
        (14.0, 15.0),
        (10.0, 12.0),
    ];
    assert_eq!(times, expected);
    assert_eq!((time.span_s, time.compute_s, time.comm_s, time.exposed_s), (15.0, 15.0, 8.0, 0.0));
}

#[test]
fn chunks_alone_by_hand() {
    let l = layer(phase(2.0, 2.0, 3.0, 2.0), phase(4.0, 3.0, 3.0, 1.0), phase(1.0, 0.0, 2.0, 0.0));
    // Forward: everything in a row, all communication exposed.
    let (f, _) = chunk::forward(&[l, l], &[], 0.5, None);
    assert_eq!((f.span_s, f.exposed_s), (18.5, 8.0));
    // Backward of a layer: combine 0-1, mlp 1-4, dispatch 4-7 with mlp(W) 4-6 under it, attention
    // 7-11; then the next
    // layer's combine 11-12 under attention(W) 11-12; again 3 + 3 + 4, and attention(W).
    let (b, _) = chunk::backward(&[l, l], Weights::Beside, &[], 0.0, None);
    assert_eq!(b.span_s, 11.0 + 11.0 + 1.0);
    assert_eq!(b.compute_s, 20.0);
    assert_eq!(b.exposed_s, 3.0);
    let (bi, _) = chunk::backward(&[l, l], Weights::Later, &[], 0.0, None);
    assert_eq!((bi.span_s, bi.exposed_s), (22.0, 8.0));
    let (w, _) = chunk::weight(&[l, l], &[], 0.0, None);
    assert_eq!(w.span_s, 6.0);
    // A load of 2 doubles the all-to-all and the routed half of the mlp.
    let (loaded, _) = chunk::forward(&[l], &[2.0], 0.0, None);
    assert_eq!(loaded.span_s, 2.0 + 4.0 + 4.5 + 4.0);
}

#[test]
fn without_communication_the_engine_equals_the_chunk_player() {
    let l =
        layer(phase(1.0, 0.0, 0.5, 0.0), phase(1.25, 0.0, 0.5, 0.0), phase(0.5, 0.0, 0.75, 0.0));
    let d = ChunkDurations { f: 1.5, b: 3.0, w: 1.25, fb: 4.5 };
    for kind in ScheduleKind::ALL {
        let shape = ScheduleShape { stages: 8, micro_batches: 24, interleave: 2 };
        let schedule = Schedule::new(kind, shape).unwrap();
        let step = play(&schedule, &uniform(vec![l], &schedule), Detail::Parts).unwrap();
        let chunks = timeline::play(&schedule, d).unwrap();
        assert_eq!(step.step_time_s, chunks.makespan, "{}", kind.name());
        assert!((step.breakdown.bubble - chunks.mean_bubble()).abs() < 1e-9);
    }
}

#[test]
fn the_tail_waits_for_the_slowest_rank() {
    let l = layer(phase(1.0, 0.0, 0.0, 0.0), phase(1.0, 0.0, 0.0, 0.0), phase(0.0, 0.0, 0.0, 0.0));
    let shape = ScheduleShape { stages: 2, micro_batches: 1, interleave: 2 };
    let schedule = Schedule::new(ScheduleKind::OneFOneB, shape).unwrap();
    let mut times = uniform(vec![l], &schedule);
    times.p2p_s = vec![0.25];
    times.tail[0] = TailTimes { grad_reduce_s: 1.0, optimizer_s: 0.5, param_gather_s: 0.125 };
    times.tail[1] = TailTimes { grad_reduce_s: 3.0, optimizer_s: 0.5, param_gather_s: 0.0 };
    // Rank 0: F 0-1, B 3.5-4.5, reduced at 5.5. Rank 1: F 1.25-2.25, B 2.25-3.25, reduced at 6.25.
    // Optimizer to 6.75.
    let step = play(&schedule, &times, Detail::Instructions).unwrap();
    assert_eq!(step.ranks[0].instructions, [(0.0, 1.0), (3.5, 4.5)]);
    assert_eq!(step.ranks[1].instructions, [(1.25, 2.25), (2.25, 3.25)]);
    assert_eq!(step.step_time_s, 6.875);
    assert_eq!(step.breakdown.optimizer, 2.5);
    assert_eq!(step.breakdown.bubble, (2.5 + 0.75 + 1.25 + 0.125) / 2.0);
}

fn part() -> impl Strategy<Value = PhaseTimes> {
    (0.1f64..2.0, 0.0f64..2.0, 0.1f64..2.0, 0.0f64..2.0).prop_map(|(a, d, m, c)| phase(a, d, m, c))
}

fn any_layer() -> impl Strategy<Value = LayerTimes> {
    (part(), part(), 0.0f64..1.0, 0.0f64..1.0)
        .prop_map(|(f, b, wa, wm)| layer(f, b, phase(wa, 0.0, wm, 0.0)))
}

fn any_step() -> impl Strategy<Value = (Schedule, StepTimes)> {
    let kind = 0..ScheduleKind::ALL.len();
    let layers = prop::collection::vec(any_layer(), 24);
    (
        kind,
        1usize..=4,
        0usize..=6,
        layers,
        0.0f64..0.5,
        any::<bool>(),
        prop::collection::vec(1.0f32..1.5, 32),
    )
        .prop_map(|(kind, half, extra, layers, p2p, loaded, loads)| {
            let (stages, m) = (2 * half, 4 * half + 2 * extra);
            let kind = ScheduleKind::ALL[kind];
            let m = if kind == ScheduleKind::Interleaved { m.div_ceil(half) * half } else { m };
            let schedule =
                Schedule::new(kind, ScheduleShape { stages, micro_batches: m, interleave: 2 })
                    .unwrap();
            let mut times = uniform(Vec::new(), &schedule);
            let mut total = 0;
            for (s, stage) in times.stages.iter_mut().enumerate() {
                let own: Vec<LayerTimes> =
                    (0..1 + (s + extra) % 3).map(|i| layers[(3 * s + i) % 24]).collect();
                total += own.len();
                let slower = |p: PhaseTimes| {
                    phase(p.attention_s * 1.1, p.dispatch_s * 1.3, p.mlp_s * 1.1, p.combine_s * 1.3)
                };
                let slow = own.iter().map(|l| LayerTimes {
                    forward: slower(l.forward),
                    backward: slower(l.backward),
                    weight: slower(l.weight),
                    ..*l
                });
                *stage = StageTimes { overlapped: slow.collect(), alone: own };
            }
            times.p2p_s = vec![p2p; stages - 1];
            times.instruction_overhead_s = 0.01;
            if loaded {
                times.expert_load =
                    (0..total).map(|l| (0..m).map(|k| loads[(l + k) % 32]).collect()).collect();
            }
            for (i, t) in times.tail.iter_mut().enumerate() {
                *t = TailTimes {
                    grad_reduce_s: 0.1 * i as f64,
                    optimizer_s: 0.2,
                    param_gather_s: 0.05,
                };
            }
            (schedule, times)
        })
}

fn assert_streams_are_exclusive(step: &StepOutcome) -> Result<(), TestCaseError> {
    let ranks = step.ranks.len();
    let mut free = vec![[0.0f64; 2]; ranks];
    for e in &step.parts {
        let slot = &mut free[e.rank as usize][usize::from(e.part.is_comm())];
        prop_assert!(e.part.start_s >= *slot - 1e-12, "two parts at once on a stream: {e:?}");
        prop_assert!(e.part.end_s >= e.part.start_s);
        *slot = e.part.end_s;
        let (start, end) = step.ranks[e.rank as usize].instructions[e.instruction as usize];
        prop_assert!(e.part.start_s >= start && e.part.end_s <= end + 1e-12);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn time_is_conserved_and_streams_are_exclusive((schedule, times) in any_step()) {
        let step = play(&schedule, &times, Detail::Parts).unwrap();
        prop_assert!((step.breakdown.total() - step.step_time_s).abs() < 1e-9 * step.step_time_s);
        for r in &step.ranks {
            prop_assert!((r.breakdown.total() - step.step_time_s).abs() < 1e-9 * step.step_time_s);
            prop_assert!(r.breakdown.bubble >= -1e-9);
            prop_assert!(r.exposed_s <= r.comm_s + 1e-9);
        }
        assert_streams_are_exclusive(&step)?;
        let played: f64 = step.parts.iter().map(|e| e.part.end_s - e.part.start_s).sum();
        let booked: f64 = step.ranks.iter().map(|r| r.compute_s + r.comm_s).sum();
        prop_assert!((played - booked).abs() < 1e-9 * booked);
    }

    #[test]
    fn instructions_wait_for_their_inputs_and_the_wire((schedule, times) in any_step()) {
        let step = play(&schedule, &times, Detail::Instructions).unwrap();
        let span = |rank: usize, wanted: &dyn Fn(Op) -> bool| {
            let index = schedule.ranks[rank].iter().position(|&op| wanted(op)).unwrap();
            step.ranks[rank].instructions[index]
        };
        for (rank, ops) in schedule.ranks.iter().enumerate() {
            for (i, op) in ops.iter().enumerate() {
                let start = step.ranks[rank].instructions[i].0;
                if let Some(f) = op.forward() && let Some((from, dir)) = schedule.geometry.shallower(rank, f.dir) {
                    let sent = span(from, &|o| o.forward().is_some_and(|c| (c.dir, c.mb) == (dir, f.mb))).1;
                    prop_assert!(start >= sent + times.p2p_s[schedule.geometry.stage(from, dir)]);
                }
                if let Some(b) = op.backward() && let Some((from, dir)) = schedule.geometry.deeper(rank, b.dir) {
                    let sent = span(from, &|o| o.backward().is_some_and(|c| (c.dir, c.mb) == (dir, b.mb))).1;
                    prop_assert!(start >= sent + times.p2p_s[schedule.geometry.stage(rank, b.dir)]);
                }
            }
        }
    }

    /// All details give the same step, to the last bit; the totals' memo changes nothing.
    #[test]
    fn detail_does_not_change_the_step((schedule, times) in any_step()) {
        let parts = play(&schedule, &times, Detail::Parts).unwrap();
        for detail in [Detail::Instructions, Detail::Totals] {
            let other = play(&schedule, &times, detail).unwrap();
            prop_assert_eq!(parts.step_time_s, other.step_time_s);
            prop_assert_eq!(parts.breakdown, other.breakdown);
            prop_assert_eq!(parts.events, other.events);
        }
    }

    /// Shorter communication never makes a step longer.
    #[test]
    fn faster_networks_are_never_slower((schedule, times) in any_step(), k in 0.1f64..1.0) {
        let mut fast = times.clone();
        for stage in &mut fast.stages {
            for l in stage.alone.iter_mut().chain(&mut stage.overlapped) {
                for p in [&mut l.forward, &mut l.backward] {
                    p.dispatch_s *= k;
                    p.combine_s *= k;
                }
            }
        }
        fast.p2p_s.iter_mut().for_each(|p| *p *= k);
        let slow = play(&schedule, &times, Detail::Totals).unwrap().step_time_s;
        let fast = play(&schedule, &fast, Detail::Totals).unwrap().step_time_s;
        prop_assert!(fast <= slow + 1e-9);
    }

    /// Two-way schedules are mirror images: ranks r and P-1-r do the same at the same time.
    #[test]
    fn mirrored_ranks_of_two_way_schedules_take_the_same_time(half in 1usize..=4, extra in 0usize..4, l in any_layer()) {
        for kind in [ScheduleKind::DualPipe, ScheduleKind::Chimera] {
            prop_assert_eq!(kind.shape(), Shape::TwoWay);
            let shape = ScheduleShape { stages: 2 * half, micro_batches: 4 * half + 2 * extra, interleave: 2 };
            let schedule = Schedule::new(kind, shape).unwrap();
            let step = play(&schedule, &uniform(vec![l], &schedule), Detail::Instructions).unwrap();
            for r in 0..half {
                prop_assert_eq!(&step.ranks[r].instructions, &step.ranks[2 * half - 1 - r].instructions);
            }
        }
    }
}
