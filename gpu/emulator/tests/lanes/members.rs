//! Instructions with a member mask meet wherever they stand: the PTX ISA lets a lane wait until
//! all lanes of its mask that have not exited execute the same instruction with the same
//! qualifiers and the same mask. Expected values come from that sentence.

use std::fmt::Write;

use fathom_emulator::Ub;
use proptest::prelude::*;

use crate::{HEAD, all_turns, check, launch, run};

/// A kernel whose `body` leaves each lane's result in `%d`; `%l` is the lane, `%n` the parameter.
fn kernel(body: &str) -> String {
    format!(
        "{HEAD}
        .func (.param .b32 q) neighbour(.param .b32 a)
        {{
            .reg .b32 %v, %w<9>;
            .reg .b64 %wide;
            ld.param.b32 %v, [a];
            mul.wide.u32 %wide, %v, 3;
            cvt.u32.u64 %v, %wide;
            shfl.sync.bfly.b32 %w8, %v, 1, 31, -1;
            st.param.b32 [q], %w8;
            ret;
        }}
        .visible .entry k(.param .u64 out, .param .u32 n)
        {{
            .shared .align 4 .b8 s[128];
            .reg .b32 %l, %n, %d, %m, %x, %y, %place, %own, %other;
            .reg .b64 %out, %at, %long;
            .reg .pred %p, %q, %z;
            ld.param.u64 %out, [out];
            ld.param.u32 %n, [n];
            mov.u32 %l, %laneid;
            mov.u32 %d, 0;
            mov.u32 %m, 0xffffffff;
            mul.wide.u32 %at, %l, 8;
            add.u64 %out, %out, %at;
            mov.u32 %own, s;
            mad.lo.u32 %own, %l, 4, %own;
            {body}
            cvt.u64.u32 %long, %d;
            st.global.u64 [%out], %long;
            ret;
        }}"
    )
}

/// Lanes below 16 execute `low`, the others `high`.
fn sides(low: &str, high: &str) -> String {
    kernel(&format!("setp.lt.u32 %p, %l, 16;\n@%p bra LOW;\n{high}\nbra END;\nLOW:\n{low}\nEND:"))
}

fn each(f: impl Fn(u64) -> u64) -> Vec<u64> {
    (0..32).map(f).collect()
}

#[test]
fn shuffles_on_two_sides_exchange() {
    let text = sides(
        "add.u32 %x, %l, 5;\nshfl.sync.bfly.b32 %d, %x, 16, 31, -1;\nadd.u32 %d, %d, 2;",
        "mul.lo.u32 %y, %l, 3;\nshfl.sync.bfly.b32 %d, %y, 16, 31, -1;\nadd.u32 %d, %d, 1;",
    );
    check(&text, 0, &each(|l| if l < 16 { 3 * (l + 16) + 2 } else { l - 16 + 5 + 1 }));
    // Which lane is read, and whether it is in range, each lane says by itself.
    let text = sides(
        "shfl.sync.idx.b32 %d|%q, %l, 20, 31, %m;\n@%q add.u32 %d, %d, 100;",
        "add.u32 %x, %l, 200;\nshfl.sync.idx.b32 %d|%q, %x, 3, 7, %m;\n@%q add.u32 %d, %d, 1000;",
    );
    check(&text, 0, &each(|l| if l < 16 { 220 + 100 } else { 3 + 1000 }));
}

#[test]
fn votes_matches_and_sums_on_two_sides_are_of_all_members() {
    let text = sides(
        "setp.lt.u32 %q, %l, 9;\nvote.sync.ballot.b32 %d, %q, -1;",
        "setp.gt.u32 %q, %l, 20;\nvote.sync.ballot.b32 %d, %q, -1;\nxor.b32 %d, %d, 1;",
    );
    let ballot = 0xffe0_01ff;
    check(&text, 0, &each(|l| if l < 16 { ballot } else { ballot ^ 1 }));
    let text = sides(
        "setp.eq.u32 %q, %l, 3;\nvote.sync.any.pred %z, %q, -1;\nselp.u32 %d, 7, 8, %z;",
        "setp.eq.u32 %q, %l, 3;\nvote.sync.any.pred %z, %q, -1;\nselp.u32 %d, 5, 6, %z;",
    );
    check(&text, 0, &each(|l| if l < 16 { 7 } else { 5 }));
    let text = sides(
        "and.b32 %x, %l, 3;\nmatch.any.sync.b32 %d, %x, -1;",
        "and.b32 %y, %l, 7;\nmatch.any.sync.b32 %d, %y, -1;",
    );
    let value = |l: u64| if l < 16 { l & 3 } else { l & 7 };
    let same = |l: u64| (0..32).filter(|&i| value(i) == value(l)).map(|i| 1u64 << i).sum();
    check(&text, 0, &each(same));
    let text = sides(
        "mov.u64 %long, 0x500000001;\nmatch.all.sync.b64 %d|%q, %long, -1;\n@%q add.u32 %d, %d, 1;",
        "mov.u64 %long, 0x600000001;\nmatch.all.sync.b64 %d|%q, %long, -1;\n@%q add.u32 %d, %d, 1;",
    );
    check(&text, 0, &[0; 32]);
    let text = sides(
        "redux.sync.add.u32 %d, %l, -1;",
        "mul.lo.u32 %x, %l, 100;\nredux.sync.add.u32 %d, %x, -1;",
    );
    check(&text, 0, &[120 + 100 * (496 - 120); 32]);
    let text = sides(
        "elect.sync %d|%q, -1;\nselp.u32 %d, %d, 77, %q;",
        "elect.sync %d|%q, -1;\nselp.u32 %d, 55, 88, %q;",
    );
    check(&text, 0, &each(|l| [0, 77, 88][(l > 0) as usize + (l > 15) as usize]));
}

/// `__syncwarp` on both sides, around an exchange by way of shared memory.
#[test]
fn warp_barriers_on_two_sides_order_shared_memory() {
    let exchange = |factor: u32| {
        format!(
            "xor.b32 %other, %own, 64;\nmov.u32 %d, %l;\nmov.u32 %x, 0;\nAGAIN{factor}:\n\
             st.volatile.shared.u32 [%own], %d;\nbar.warp.sync -1;\n\
             ld.volatile.shared.u32 %y, [%other];\nmad.lo.u32 %d, %d, {factor}, %y;\n\
             bar.warp.sync -1;\nadd.u32 %x, %x, 1;\nsetp.lt.u32 %q, %x, %n;\n\
             @%q bra AGAIN{factor};"
        )
    };
    let text = sides(&exchange(3), &exchange(5));
    for n in [1, 2, 7] {
        let mut want: Vec<u32> = (0..32).collect();
        for _ in 0..n {
            let step = |l: usize| {
                let factor = if l < 16 { 3 } else { 5u32 };
                want[l].wrapping_mul(factor).wrapping_add(want[l ^ 16])
            };
            want = (0..32).map(step).collect();
        }
        check(&text, n, &want.into_iter().map(u64::from).collect::<Vec<_>>());
    }
}

/// One side meets the other in a function of another register layout.
#[test]
fn members_meet_in_other_functions() {
    let text = sides(
        "{ .param .b32 a; .param .b32 q; st.param.b32 [a], %l;\n\
         call.uni (q), neighbour, (a); ld.param.b32 %d, [q]; }",
        "add.u32 %x, %l, 1000;\nshfl.sync.bfly.b32 %d, %x, 1, 31, -1;",
    );
    check(&text, 0, &each(|l| if l < 16 { 3 * (l ^ 1) } else { (l ^ 1) + 1000 }));
    // Every even lane in one, every odd lane in the other: pairs of places.
    let text = kernel(
        "and.b32 %x, %l, 1;\nsetp.eq.u32 %p, %x, 0;\n@%p bra EVEN;\nadd.u32 %x, %l, 1000;\n\
         shfl.sync.bfly.b32 %d, %x, 1, 31, -1;\nbra END;\nEVEN:\n\
         { .param .b32 a; .param .b32 q; st.param.b32 [a], %l;\n\
         call.uni (q), neighbour, (a); ld.param.b32 %d, [q]; }\nEND:",
    );
    check(&text, 0, &each(|l| if l % 2 == 0 { l + 1 + 1000 } else { 3 * (l - 1) }));
}

/// A meeting is of a mask: pairs of lanes meet, each on its own, at four places.
#[test]
fn lanes_of_different_masks_do_not_wait_for_each_other() {
    let mut body = String::from(
        "and.b32 %x, %l, 30;\nmov.u32 %m, 3;\nshl.b32 %m, %m, %x;\n\
         and.b32 %place, %l, 3;\n",
    );
    for place in 1..4 {
        writeln!(body, "setp.eq.u32 %p, %place, {place};\n@%p bra P{place};").unwrap();
    }
    for place in [0, 3, 1, 2] {
        writeln!(
            body,
            "P{place}:\nmad.lo.u32 %x, %l, 10, {place};\nshfl.sync.bfly.b32 %d, %x, 1, 31, %m;\n\
             add.u32 %d, %d, {place}00000;\nbra END;"
        )
        .unwrap();
    }
    body.push_str("END:");
    let want = each(|l| 10 * (l ^ 1) + (l ^ 1) % 4 + 100_000 * (l % 4));
    check(&kernel(&body), 0, &want);
}

/// Lanes wait where sides meet for others that wait for them: they are let go. The first shuffle
/// of the lower half and the only one of the upper half are of one kind, so they meet; the second
/// one of the lower half finds the upper half gone.
#[test]
fn lanes_that_wait_for_a_side_are_let_go_to_meet_it() {
    let text = kernel(
        "add.u32 %x, %l, 100;\nsetp.ge.u32 %p, %l, 16;\n@%p bra ALL;\n\
         shfl.sync.bfly.b32 %x, %l, 16, 31, -1;\nALL:\n\
         shfl.sync.bfly.b32 %y, %x, 16, 31, -1;\nmov.u32 %d, %y;\n@%p bra UPPER;\n\
         mov.u32 %d, %x;\nUPPER:",
    );
    for turns in all_turns() {
        let (got, findings) = launch(&text, 0, turns);
        assert_eq!(got, each(|l| if l < 16 { l + 116 } else { l - 16 }), "{turns:?}");
        assert_eq!(findings, [], "{turns:?}");
    }
}

/// Lanes that have left the kernel are not waited for, whether they left before or after the
/// others came.
#[test]
fn lanes_that_have_exited_are_not_waited_for() {
    let early = kernel("setp.ge.u32 %p, %l, 5;\n@%p ret;\nbar.warp.sync -1;\nmov.u32 %d, %l;");
    check(&early, 0, &each(|l| if l < 5 { l } else { 0 }));
    // Lane l takes l + 1 steps of a loop and leaves the kernel.
    let steps = kernel(
        "mov.u32 %x, 0;\nAGAIN:\nsetp.gt.u32 %p, %x, %l;\n@%p bra DONE;\n\
         redux.sync.add.u32 %y, %l, -1;\nadd.u32 %d, %d, %y;\nbar.warp.sync -1;\n\
         add.u32 %x, %x, 1;\nbra AGAIN;\nDONE:",
    );
    let sum = |from: u64| (from..32).sum::<u64>();
    for turns in all_turns() {
        // A lane that has left the loop may wait for the others behind it or store and exit: by
        // the PTX ISA only lanes that have exited are no longer members.
        let (got, findings) = launch(&steps, 0, turns);
        assert_eq!(findings, [], "{turns:?}");
        assert_eq!(got, each(|l| (0..=l).map(sum).sum()), "{turns:?}");
    }
    // Predicated: the others go round it, and on to their end.
    let some =
        kernel("setp.lt.u32 %p, %l, 16;\n@%p vote.sync.ballot.b32 %d, %p, -1;\nadd.u32 %d, %d, 1;");
    check(&some, 0, &each(|l| if l < 16 { 0x1_0000 } else { 1 }));
}

/// Members that wait for each other at instructions of different kinds wait for ever, and the
/// report says for whom.
#[test]
fn other_qualifiers_or_masks_do_not_meet() {
    let apart = [
        ("shfl.sync.up.b32 %d, %l, 1, 0, -1;", "shfl.sync.down.b32 %d, %l, 1, 31, -1;"),
        ("shfl.sync.bfly.b32 %d, %l, 1, 31, -1;", "vote.sync.ballot.b32 %d, %p, -1;"),
        ("redux.sync.add.u32 %d, %l, -1;", "redux.sync.add.s32 %d, %l, -1;"),
        ("bar.warp.sync -1;", "bar.warp.sync 0xfffffff1;"),
    ];
    for (low, high) in apart {
        let text = sides(low, high);
        for turns in all_turns() {
            let (_, findings) = launch(&text, 0, turns);
            let f = findings.last().unwrap_or_else(|| panic!("{low} {high}: nothing found"));
            assert_eq!(f.kind, Ub::Deadlock, "{f}");
            let named = f.message.contains("waits for lanes 0xffff0000 of its mask");
            assert!(named && f.message.contains(low), "{f}");
        }
    }
}

/// The rest of the warp waits at a barrier of the CTA, where hardware lets a warp meet as well:
/// reported, with every check and without, and the program goes on.
#[test]
fn a_member_at_a_barrier_of_the_cta_is_reported() {
    let text = kernel(
        "setp.lt.u32 %p, %l, 8;\n@!%p bra END;\nshfl.sync.bfly.b32 %d, %l, 4, 31, -1;\nEND:\n\
         bar.sync 0;",
    );
    for turns in all_turns() {
        let (got, findings) = launch(&text, 0, turns);
        assert_eq!(got, each(|l| if l < 8 { l ^ 4 } else { 0 }), "{turns:?}");
        let [f] = &findings[..] else { panic!("{turns:?}: {findings:?}") };
        assert!(f.kind == Ub::Divergence && f.instruction.contains("shfl.sync"), "{f}");
        assert!(f.message.contains("lanes 0xffffff00 of its mask"), "{f}");
        assert!(!f.fatal);
    }
}

/// What a step of a random program exchanges.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Butterfly(u32),
    Read(u32),
    Sum,
    Ballot,
    Match,
}

/// One exchange of all lanes, among the whole warp or in each half, at up to four places.
#[derive(Clone, Debug)]
struct Exchange {
    kind: Kind,
    halves: bool,
    /// Two bits a lane: where it stands.
    places: u64,
}

fn exchanges() -> impl Strategy<Value = Vec<Exchange>> {
    let kind = prop_oneof![
        (1..16u32).prop_map(Kind::Butterfly),
        (0..16u32).prop_map(Kind::Read),
        Just(Kind::Sum),
        Just(Kind::Ballot),
        Just(Kind::Match),
    ];
    let one = (kind, any::<bool>(), any::<u64>()).prop_map(|(kind, halves, places)| Exchange {
        kind,
        halves,
        places,
    });
    prop::collection::vec(one, 1..8)
}

impl Exchange {
    /// `%d` becomes what is exchanged of `%d * (2 place + 3) + step`.
    fn write(&self, step: usize, body: &mut String) {
        writeln!(
            body,
            "mov.u64 %long, {:#x};\nshl.b32 %x, %l, 1;\nshr.u64 %long, %long, %x;\n\
             cvt.u32.u64 %place, %long;\nand.b32 %place, %place, 3;\nmov.u32 %m, {};",
            self.places,
            if self.halves { "0xffff" } else { "-1" }
        )
        .unwrap();
        if self.halves {
            body.push_str("and.b32 %x, %l, 16;\nshl.b32 %m, %m, %x;\n");
        }
        for place in 1..4 {
            writeln!(body, "setp.eq.u32 %p, %place, {place};\n@%p bra P{step}_{place};").unwrap();
        }
        for place in 0..4 {
            writeln!(
                body,
                "P{step}_{place}:\nmad.lo.u32 %y, %d, {}, {step};\n{}\nbra END{step};",
                2 * place + 3,
                match self.kind {
                    Kind::Butterfly(by) => format!("shfl.sync.bfly.b32 %d, %y, {by}, 31, %m;"),
                    Kind::Read(lane) => format!(
                        "and.b32 %x, %l, 16;\nor.b32 %x, %x, {lane};\n\
                         shfl.sync.idx.b32 %d, %y, %x, 31, %m;"
                    ),
                    Kind::Sum => "redux.sync.add.u32 %d, %y, %m;".into(),
                    Kind::Ballot => "and.b32 %y, %y, 4;\nsetp.ne.u32 %q, %y, 0;\n\
                                     vote.sync.ballot.b32 %d, %q, %m;"
                        .into(),
                    Kind::Match => "and.b32 %y, %y, 3;\nmatch.any.sync.b32 %d, %y, %m;".into(),
                }
            )
            .unwrap();
        }
        writeln!(body, "END{step}:\nmad.lo.u32 %d, %l, 7, %d;").unwrap();
    }

    /// The same on 32 numbers.
    fn apply(&self, step: usize, d: &[u32; 32]) -> [u32; 32] {
        let place = |l: usize| (self.places >> (2 * l) & 3) as u32;
        let y: [u32; 32] =
            std::array::from_fn(|l| d[l].wrapping_mul(2 * place(l) + 3).wrapping_add(step as u32));
        let members = |l: usize| {
            let half = if self.halves { l / 16 * 16..l / 16 * 16 + 16 } else { 0..32 };
            half.collect::<Vec<usize>>()
        };
        let mask = |l: usize, holds: &dyn Fn(usize) -> bool| {
            members(l).into_iter().filter(|&i| holds(i)).fold(0, |m, i| m | 1 << i)
        };
        std::array::from_fn(|l| {
            let got = match self.kind {
                Kind::Butterfly(by) => y[l ^ by as usize],
                Kind::Read(lane) => y[l / 16 * 16 + lane as usize],
                Kind::Sum => members(l).into_iter().fold(0, |s: u32, i| s.wrapping_add(y[i])),
                Kind::Ballot => mask(l, &|i| y[i] & 4 != 0),
                Kind::Match => mask(l, &|i| y[i] & 3 == y[l] & 3),
            };
            got.wrapping_add(7 * l as u32)
        })
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// The steps are the same for every lane, the places at which it takes them are its own.
    #[test]
    fn exchanges_do_not_depend_on_where_lanes_stand(steps in exchanges()) {
        let mut body = String::from("mov.u32 %d, %l;\n");
        let mut want: [u32; 32] = std::array::from_fn(|l| l as u32);
        for (i, step) in steps.iter().enumerate() {
            step.write(i, &mut body);
            want = step.apply(i, &want);
        }
        let text = kernel(&body);
        for turns in all_turns() {
            prop_assert_eq!(run(&text, 0, turns), want.map(u64::from), "{:?}\n{}", turns, text);
        }
    }
}
