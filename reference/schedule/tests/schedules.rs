//! Behaviour of the schedules: hand-worked streams, closed forms of bubbles and memory, verified
//! digests, properties.

use fathom_schedule::check::{Fault, check};
use fathom_schedule::compare::{bubble_formula, table};
use fathom_schedule::draw;
use fathom_schedule::timeline::{ChunkDurations, play};
use fathom_schedule::{Chunk, Op, Schedule, ScheduleKind, ScheduleShape};
use proptest::prelude::*;

fn build(kind: ScheduleKind, stages: usize, micro_batches: usize) -> Schedule {
    Schedule::new(kind, ScheduleShape { stages, micro_batches, interleave: 2 })
        .expect("legal sizes")
}

fn refusal(kind: ScheduleKind, stages: usize, micro_batches: usize) -> String {
    let shape = ScheduleShape { stages, micro_batches, interleave: 2 };
    Schedule::new(kind, shape).expect_err("illegal sizes").to_string()
}

/// All ops of a rank as words, `F0.1 F1.0 F0.1&B1.0`.
fn words(schedule: &Schedule, rank: usize) -> String {
    schedule.ranks[rank].iter().map(|&op| draw::op_text(op)).collect::<Vec<_>>().join(" ")
}

const UNIT: ChunkDurations = ChunkDurations { f: 1.0, b: 2.0, w: 1.0, fb: 3.0 };

#[test]
fn one_f_one_b_of_three_stages_by_hand() {
    let s = build(ScheduleKind::OneFOneB, 3, 4);
    assert_eq!(words(&s, 0), "F0.0 F0.1 F0.2 B0.0 F0.3 B0.1 B0.2 B0.3");
    assert_eq!(words(&s, 1), "F0.0 F0.1 B0.0 F0.2 B0.1 F0.3 B0.2 B0.3");
    assert_eq!(words(&s, 2), "F0.0 B0.0 F0.1 B0.1 F0.2 B0.2 F0.3 B0.3");
}

#[test]
fn gpipe_of_two_stages_by_hand() {
    let s = build(ScheduleKind::GPipe, 2, 3);
    assert_eq!(words(&s, 0), "F0.0 F0.1 F0.2 B0.2 B0.1 B0.0");
    assert_eq!(words(&s, 1), words(&s, 0));
}

#[test]
fn interleaved_of_two_ranks_by_hand() {
    let s = build(ScheduleKind::Interleaved, 4, 4);
    assert_eq!(
        words(&s, 0),
        "F0.0 F0.1 F1.0 F1.1 F0.2 B1.0 F0.3 B1.1 F1.2 B0.0 F1.3 B0.1 B1.2 B1.3 B0.2 B0.3"
    );
    assert_eq!(
        words(&s, 1),
        "F0.0 F0.1 F1.0 B1.0 F1.1 B1.1 F0.2 B0.0 F0.3 B0.1 F1.2 B1.2 F1.3 B1.3 B0.2 B0.3"
    );
}

#[test]
fn zb1p_of_two_stages_by_hand() {
    let s = build(ScheduleKind::Zb1p, 2, 3);
    assert_eq!(words(&s, 0), "F0.0 F0.1 Bi0.0 W0.0 F0.2 Bi0.1 W0.1 Bi0.2 W0.2");
    assert_eq!(words(&s, 1), "F0.0 Bi0.0 F0.1 Bi0.1 W0.0 F0.2 Bi0.2 W0.1 W0.2");
}

#[test]
fn chimera_of_four_stages_by_hand() {
    // Ticks of rank 1: F0.0 1, F1.0 2, F0.1 3, F1.1 4, B1.0 5, B0.0 6, B1.1 7, B0.1 8.
    let s = build(ScheduleKind::Chimera, 4, 4);
    assert_eq!(words(&s, 0), "F0.0 F0.1 F1.0 B1.0 F1.1 B1.1 B0.0 B0.1");
    assert_eq!(words(&s, 1), "F0.0 F1.0 F0.1 F1.1 B1.0 B0.0 B1.1 B0.1");
}

#[test]
fn dualpipe_of_two_stages_by_hand() {
    // P = 2, M = 4: both ranks are middle ranks. Phases 2 (F0F1), 4 (F0 B1, then FB), 6 (B1 Bi0), 8
    // (W).
    let s = build(ScheduleKind::DualPipe, 2, 4);
    assert_eq!(words(&s, 0), "F0.0 F1.0 F0.1 B1.0 F1.1&B0.0 B1.1 Bi0.1 W0.1");
    assert_eq!(words(&s, 1), "F1.0 F0.0 F1.1 B0.0 F0.1&B1.0 B0.1 Bi1.1 W1.1");
    assert_eq!(
        serde_json::to_string(&s.ranks[0][4..6]).unwrap(),
        r#"[{"op":"FB","f_dir":1,"f_mb":1,"b_dir":0,"b_mb":0},{"op":"B","dir":1,"mb":1}]"#
    );
}

#[test]
fn dualpipev_on_one_and_two_ranks_by_hand() {
    let s = build(ScheduleKind::DualPipeV, 2, 3);
    assert_eq!(words(&s, 0), "F0.0 F1.0 F0.1 B1.0 F1.1&B0.0 F0.2&B1.1 F1.2&B0.1 B1.2 Bi0.2 W0.2");
    let s = build(ScheduleKind::DualPipeV, 4, 4);
    assert_eq!(
        words(&s, 0),
        "F0.0 F0.1 F0.2 F1.0 Bi1.0 W1.0 F1.1 F0.3&B1.1 F1.2&B0.0 B1.2 F1.3&B0.1 B1.3 Bi0.2 W0.2 Bi0.3 W0.3"
    );
    assert_eq!(
        words(&s, 1),
        "F0.0 F1.0 F0.1 F1.1 F0.2 B1.0 F1.2&B0.0 F0.3&B1.1 F1.3&B0.1 B1.2 B0.2 Bi1.3 Bi0.3 W1.3 W0.3"
    );
}

/// The digests were taken from the ops that the public implementations executed, rank by rank.
#[test]
fn dualpipe_streams_have_the_verified_digests() {
    let rows = include_str!("data/dualpipe-digests.txt").lines().filter(|l| !l.starts_with('#'));
    let mut checked = 0;
    for row in rows {
        let cells: Vec<&str> = row.split(' ').collect();
        let kind = ScheduleKind::from_name(cells[0]).expect("a schedule's name");
        let n: Vec<usize> = cells[1..5].iter().map(|c| c.parse().expect("a number")).collect();
        let mut digest = blake3::Hasher::new();
        for m in (n[1]..=n[2]).step_by(n[3]) {
            digest.update(&serde_json::to_vec(&build(kind, n[0], m)).unwrap());
            checked += 1;
        }
        assert_eq!(digest.finalize().to_hex().as_str(), cells[5], "{row}");
    }
    assert!(checked > 1000, "only {checked} schedules compared");
}

#[test]
fn bubbles_equal_the_closed_forms_where_these_are_exact() {
    let close = |got: f64, want: f64, what: &str| {
        assert!((got - want).abs() < 1e-9 * want.max(1.0), "{what}: bubble {got}, formula {want}");
    };
    let cases = [
        // Any F and B.
        (ScheduleKind::GPipe, ChunkDurations { f: 1.3, b: 2.9, w: 1.1, fb: 4.2 }),
        (ScheduleKind::OneFOneB, ChunkDurations { f: 1.3, b: 2.9, w: 1.1, fb: 4.2 }),
        (ScheduleKind::Interleaved, ChunkDurations { f: 1.3, b: 2.9, w: 1.1, fb: 4.2 }),
        // F = input backward = W.
        (ScheduleKind::Zb1p, UNIT),
        // F = B.
        (ScheduleKind::Chimera, ChunkDurations { f: 1.0, b: 1.0, w: 0.5, fb: 2.0 }),
        // F = input backward, F&B = F + B, W at most F.
        (ScheduleKind::DualPipe, UNIT),
        (ScheduleKind::DualPipe, ChunkDurations { f: 1.0, b: 1.75, w: 0.75, fb: 2.75 }),
        (ScheduleKind::DualPipeV, UNIT),
        (ScheduleKind::DualPipeV, ChunkDurations { f: 1.0, b: 1.75, w: 0.75, fb: 2.75 }),
    ];
    for (kind, d) in cases {
        for p in [4, 8, 16] {
            for m in [2 * p, 3 * p, 4 * p] {
                let s = build(kind, p, m);
                let t = play(&s, d).unwrap();
                let (text, formula) = bubble_formula(kind, p, s.ranks.len(), d);
                for (rank, &bubble) in t.bubble.iter().enumerate() {
                    close(
                        bubble,
                        formula,
                        &format!("{} {text} P={p} M={m} rank {rank}", kind.name()),
                    );
                }
            }
        }
    }
}

/// Zero bubble means that a rank never idles between its first and its last op.
#[test]
fn zb_v_has_no_bubble_where_its_three_parts_are_equal() {
    for p in [4, 8, 16] {
        for m in [2 * p, 3 * p, 4 * p] {
            let t = play(&build(ScheduleKind::ZbV, p, m), UNIT).unwrap();
            for (rank, spans) in t.spans.iter().enumerate() {
                assert_eq!(spans[0].0, rank as f64, "the first input comes down the V");
                let idle: f64 = spans.windows(2).map(|w| w[1].0 - w[0].1).sum();
                assert_eq!(idle, 0.0, "P={p} M={m} rank {rank}");
            }
        }
    }
}

#[test]
fn activations_peak_as_published() {
    let p = 8;
    let peak = |kind| {
        let s = build(kind, p, 24);
        check(&s).unwrap().activations_peak
    };
    assert_eq!(peak(ScheduleKind::GPipe), vec![24; p]);
    assert_eq!(peak(ScheduleKind::OneFOneB), (1..=p).rev().collect::<Vec<_>>());
    assert_eq!(*peak(ScheduleKind::Zb1p).iter().max().unwrap(), p);
    assert_eq!(*peak(ScheduleKind::ZbV).iter().max().unwrap(), p);
    assert_eq!(peak(ScheduleKind::DualPipe), vec![p + 1; p]);
    assert_eq!(peak(ScheduleKind::DualPipeV), vec![p + 1; p / 2]);
}

#[test]
fn illegal_sizes_are_refused_with_the_rule() {
    assert!(refusal(ScheduleKind::DualPipe, 3, 8).contains("stages must be even"));
    assert!(refusal(ScheduleKind::DualPipe, 4, 9).contains("even, half for each direction"));
    assert!(refusal(ScheduleKind::DualPipe, 4, 6).contains("at least 2P = 8"));
    assert!(refusal(ScheduleKind::DualPipeV, 4, 3).contains("at least P = 4"));
    assert!(refusal(ScheduleKind::Interleaved, 8, 6).contains("multiple of the 4 ranks"));
    assert!(refusal(ScheduleKind::OneFOneB, 0, 6).contains("at least 1"));
}

#[test]
fn the_check_finds_broken_streams() {
    let mut s = build(ScheduleKind::OneFOneB, 2, 2);
    s.ranks[1].swap(0, 1);
    assert!(matches!(check(&s), Err(Fault::Deadlock { .. })));

    let mut s = build(ScheduleKind::OneFOneB, 2, 2);
    s.ranks[0][1] = Op::F(Chunk { dir: 0, mb: 0 });
    assert!(matches!(check(&s), Err(Fault::Count { rank: 0, part: "forward", count: 2, .. })));

    let mut s = build(ScheduleKind::Zb1p, 2, 3);
    s.ranks[1].swap(4, 7);
    assert!(matches!(check(&s), Err(Fault::Queue { rank: 1, index: 4, .. })));

    // Two ranks that each want the other's later op first.
    let mut s = build(ScheduleKind::Chimera, 2, 4);
    s.ranks[0].swap(0, 1);
    s.ranks[1].swap(0, 1);
    let Err(Fault::Deadlock { waits }) = check(&s) else { panic!("a deadlock is not found") };
    assert_eq!(waits.len(), 2, "{waits:?}");
}

#[test]
fn the_table_has_every_kind() {
    let rows = table(ScheduleShape { stages: 8, micro_batches: 20, interleave: 2 }, UNIT);
    assert_eq!(rows.len(), ScheduleKind::ALL.len());
    let dualpipe = rows.iter().find(|r| r.kind == "dualpipe").unwrap();
    assert_eq!((dualpipe.bubble, dualpipe.parameters, dualpipe.activations), (6.0, 2, 9));
    let rows = table(ScheduleShape { stages: 8, micro_batches: 10, interleave: 2 }, UNIT);
    assert!(rows.iter().find(|r| r.kind == "dualpipe").unwrap().refused.is_some());
}

fn any_schedule() -> impl Strategy<Value = Schedule> {
    (0..ScheduleKind::ALL.len(), 1usize..=12, 0usize..=24, 2usize..=4).prop_map(
        |(kind, n, extra, v)| {
            let kind = ScheduleKind::ALL[kind];
            let (stages, micro_batches) = match kind {
                ScheduleKind::Interleaved => (n * v, n * (1 + extra % 5)),
                ScheduleKind::Chimera => (2 * n, 2 * (1 + extra)),
                ScheduleKind::DualPipe => (2 * n, 4 * n + 2 * extra),
                ScheduleKind::DualPipeV => (2 * n, 2 * n + extra),
                ScheduleKind::ZbV => (2 * n, 1 + extra),
                _ => (n, 1 + extra),
            };
            Schedule::new(kind, ScheduleShape { stages, micro_batches, interleave: v })
                .expect("legal sizes")
        },
    )
}

proptest! {
    /// Every legal schedule is executable, keeps causality, and no rank runs two ops at once.
    #[test]
    fn schedules_are_executable_and_causal(
        s in any_schedule(), f in 0.1f64..3.0, bi in 0.1f64..3.0, w in 0.1f64..3.0, hidden in 0.0f64..1.0,
    ) {
        let b = bi + w;
        let d = ChunkDurations { f, b, w, fb: f.max(b) + (1.0 - hidden) * f.min(b) };
        let t = play(&s, d).unwrap();
        let mut forward = std::collections::BTreeMap::new();
        let mut backward = std::collections::BTreeMap::new();
        for (rank, ops) in s.ranks.iter().enumerate() {
            let mut free = 0.0;
            for (&op, &(start, end)) in ops.iter().zip(&t.spans[rank]) {
                prop_assert!(start >= free && end >= start);
                free = end;
                if let Some(c) = op.forward() { forward.insert((s.geometry.stage(rank, c.dir), rank, c), (start, end)); }
                if let Some(c) = op.backward() { backward.insert((s.geometry.stage(rank, c.dir), rank, c), (start, end)); }
            }
            let busy: f64 = ops.iter().map(|&op| d.of(op)).sum();
            prop_assert!((busy + t.bubble[rank] - t.makespan).abs() < 1e-9 * t.makespan);
        }
        for (&(_, rank, c), &(start, _)) in &forward {
            if let Some((from, dir)) = s.geometry.shallower(rank, c.dir) {
                let key = (s.geometry.stage(from, dir), from, Chunk { dir, mb: c.mb });
                prop_assert!(forward[&key].1 <= start);
            }
        }
        for (key @ &(stage, rank, c), &(start, _)) in &backward {
            prop_assert!(forward[key].1 <= start);
            if stage + 1 < s.geometry.stages {
                let (from, dir) = s.geometry.deeper(rank, c.dir).unwrap();
                let key = (stage + 1, from, Chunk { dir, mb: c.mb });
                prop_assert!(backward[&key].1 <= start);
            }
        }
    }

    /// Shorter ops never make a step longer.
    #[test]
    fn faster_chunks_never_slow_a_schedule(s in any_schedule(), f in 0.5f64..3.0, w in 0.5f64..3.0, k in 0.1f64..1.0) {
        let slow = ChunkDurations { f, b: f + w, w, fb: 2.0 * f + w };
        let fast = ChunkDurations { f: f * k, b: f * k + w, w, fb: f * k + f + w };
        prop_assert!(play(&s, fast).unwrap().makespan <= play(&s, slow).unwrap().makespan + 1e-9);
    }
}

/// A kind that TOML can name and the comparison leaves out would never be tested.
#[test]
fn all_kinds_are_in_the_list_of_all() {
    let refused = serde_json::from_str::<ScheduleKind>("\"none of them\"").unwrap_err().to_string();
    let named: Vec<&str> = refused.split('`').skip(3).step_by(2).collect();
    let listed = ScheduleKind::ALL.map(ScheduleKind::name);
    for name in &named {
        assert!(listed.contains(name), "reference/schedule/src/lib.rs: ALL lacks {name}");
    }
    assert_eq!(named.len(), listed.len());
}
