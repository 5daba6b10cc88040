//! Instructions with a member mask: a lane that executes one waits until every lane of its mask
//! that has not exited executes the same instruction with the same mask, wherever in the program
//! that stands (PTX ISA, `shfl.sync` and its kin; since Volta the two sides of a branch may meet).

use std::sync::Arc;

use fathom_ptx::ast::Instruction;
use fathom_ptx::table::Opcode;

use crate::error::Ub;
use crate::lower::builder::{Lower, mnemonic};
use crate::machine::cx::Cx;
use crate::machine::lane::Lane;
use crate::machine::meeting::{Answer, Brought, Meeting};
use crate::machine::op::{Class, Step};
use crate::machine::registers::{LANES, Reg};
use crate::machine::warp::Wait;

/// Emits an exchange between the lanes that name the same mask in `mask` (`None`: those that
/// execute together): each brings something, `answer` is of what the lanes of its second argument
/// brought, members of its third, and each takes its part of the answer. `answer` depends on
/// nothing but the instruction's qualifiers, since any of the places may ask for it.
pub fn exchange(
    l: &mut Lower<'_>,
    ins: &Instruction,
    class: Class,
    mask: Option<Reg>,
    bring: impl Fn(&Cx<'_>) -> Brought + Send + Sync + 'static,
    answer: impl Fn(&Brought, u32, u32) -> Answer + Send + Sync + 'static,
    take: impl Fn(&mut Cx<'_>, &Answer) + Send + Sync + 'static,
) {
    let name: Arc<str> = mnemonic(ins).into();
    let orders_memory = ins.op == Opcode::BarWarpSync;
    l.emit_action(class, move |cx| {
        let all = cx.mask;
        let named = match mask {
            Some(reg) => u32::read(cx, reg),
            None => [all; LANES],
        };
        let needed = cx.lanes().fold(0, |m, lane| m | named[lane]);
        let apart = needed & cx.w.live & !all != 0 || !cx.w.meetings.is_empty();
        if apart && mask.is_some() {
            let answered = match meet(cx, &name, &named, &bring, &answer, orders_memory) {
                Ok(answered) => answered,
                Err(step) => return step,
            };
            take(cx, &answered);
            return Step::Next;
        }
        let brought = bring(cx);
        let mut left = all;
        while left != 0 {
            let members = named[left.trailing_zeros() as usize];
            cx.mask = left;
            cx.mask = naming(cx, &named, members);
            left &= !cx.mask;
            are_members(cx, members);
            cx.lanes_met(cx.mask, orders_memory);
            let answer = answer(&brought, cx.mask, members);
            take(cx, &answer);
        }
        cx.mask = all;
        Step::Next
    });
}

/// The executing lanes that name this mask.
fn naming(cx: &Cx<'_>, named: &[u32; LANES], members: u32) -> u32 {
    cx.lanes().filter(|&lane| named[lane] == members).fold(0, |m, i| m | 1 << i)
}

/// Reports executing lanes that the member mask they name leaves out.
fn are_members(cx: &mut Cx<'_>, members: u32) {
    let others = cx.mask & !members;
    if others != 0 && cx.grid.settings.checks.sync {
        let message = format!("lanes {others:#010x} execute this and are not in its mask");
        cx.report(Ub::Divergence, Some(others.trailing_zeros() as usize), None, message);
    }
}

/// The executing lanes come to the meeting of their mask, and get its answer once all have come.
fn meet(
    cx: &mut Cx<'_>,
    name: &Arc<str>,
    named: &[u32; LANES],
    bring: &dyn Fn(&Cx<'_>) -> Brought,
    answer: &dyn Fn(&Brought, u32, u32) -> Answer,
    orders_memory: bool,
) -> Result<Answer, Step> {
    let (at, pc) = (cx.at, cx.pc);
    let members = named[cx.leader()];
    let lanes = naming(cx, named, members);
    cx.w.groups[at].pc = pc;
    if cx.mask != cx.active {
        // Lanes that the guard excludes go round it: others may wait for them there.
        cx.w.split(at, cx.mask, pc, pc + 1, Some(pc + 1));
        return Err(Step::Regrouped);
    }
    if lanes != cx.mask {
        // Lanes that name another mask wait for others.
        cx.w.split(at, lanes, pc, pc, Some(pc + 1));
        return Err(Step::Regrouped);
    }
    let known = cx.w.meetings.iter().position(|m| m.is_of(name, members, lanes));
    let i = known.unwrap_or(cx.w.meetings.len());
    if known.is_none() {
        let brought = bring(cx);
        cx.w.meetings.push(Meeting::new(name.clone(), members, brought));
    }
    if cx.w.meetings[i].arrived & lanes != lanes {
        are_members(cx, members);
        let brought = bring(cx);
        cx.w.meetings[i].arrive(lanes, &brought);
    }
    if cx.w.meetings[i].answer.is_none() {
        let missing = cx.w.meetings[i].missing(cx.w.live);
        if missing != 0 {
            if !at_a_barrier(cx, missing) {
                return Err(cx.block(Wait::Members { missing }));
            }
            let message = format!(
                "lanes {missing:#010x} of its mask wait at a barrier of the CTA and never come here"
            );
            cx.report(Ub::Divergence, Some(cx.leader()), None, message);
        }
        let meeting = &mut cx.w.meetings[i];
        meeting.answer = Some(answer(&meeting.brought, meeting.arrived, members));
        meeting.takers = meeting.arrived;
        let met = meeting.arrived;
        cx.lanes_met(met, orders_memory);
        // Those that stand here too go on together.
        if cx.w.gather(at, met) != lanes {
            return Err(Step::Regrouped);
        }
    }
    let meeting = &mut cx.w.meetings[i];
    meeting.takers &= !lanes;
    let answer = meeting.answer.clone().expect("just asked for, or before");
    if meeting.takers == 0 {
        cx.w.meetings.swap_remove(i);
    }
    cx.w.groups[at].wait = Wait::Ready;
    Ok(answer)
}

/// Whether these lanes wait at named barriers, which do not complete without the rest of the warp.
/// There hardware lets a warp meet as well, so neither waits for ever.
fn at_a_barrier(cx: &Cx<'_>, lanes: u32) -> bool {
    let barriers = &cx.cluster.ctas[cx.cta].barriers;
    let stuck = |wait| match wait {
        Wait::Barrier { id, generation } => barriers[&id].generation == generation,
        _ => false,
    };
    let there = cx.w.groups.iter().filter(|g| stuck(g.wait)).fold(0, |m, g| m | g.mask);
    lanes & !there == 0
}
