//! Barriers of a CTA and of a cluster, fences, programmatic launch, nanosleep, setmaxnreg.

use fathom_ptx::ast::{Instruction, Operand};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Flag, Op, Type};

use super::fence;
use super::members::exchange;
use crate::error::Ub;
use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::cx::Cx;
use crate::machine::lane::{self, Lane};
use crate::machine::meeting::{Answer, Brought};
use crate::machine::op::{Class, Step};
use crate::machine::registers::Reg;
use crate::machine::warp::Wait;

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    use Opcode::*;
    match ins.op {
        BarSync | BarrierSync | BarArrive | BarrierArrive => {
            let id = l.src(&ins.operands[0], Type::U32)?;
            let count = match ins.operands.get(1) {
                Some(o) => Some(l.src(o, Type::U32)?),
                None => None,
            };
            let waits = matches!(ins.op, BarSync | BarrierSync);
            // bar.* is barrier.*.aligned.
            let aligned = matches!(ins.op, BarSync | BarArrive) || ins.mods.has(Flag::Aligned);
            l.emit_action(Class::Barrier, move |cx| {
                if aligned {
                    whole_warp(cx);
                }
                match cross(cx, id, count, waits, None) {
                    Ok(_) => Step::Next,
                    Err(step) => step,
                }
            });
            Ok(())
        }
        BarRed | BarrierRed => bar_red(l, ins),
        BarWarpSync => {
            let mask = l.src(&ins.operands[0], Type::B32)?;
            let nothing = |_: &Brought, _, _| Answer::default();
            exchange(l, ins, Class::Barrier, Some(mask), |_| Brought::NOTHING, nothing, |_, _| {});
            Ok(())
        }
        BarrierClusterArrive => {
            l.emit_action(Class::Barrier, |cx| {
                *cx.changes += 1;
                cx.w.cluster_generation = cx.cluster.barrier_generation;
                cx.cluster.barrier_arrived += cx.mask.count_ones();
                let done = cx.cluster.settle_barrier();
                cx.with_sanitizer(|s, who| s.cluster_arrive(who.warp, done));
                Step::Next
            });
            Ok(())
        }
        BarrierClusterWait => {
            l.emit_action(Class::Barrier, |cx| {
                if cx.cluster.barrier_generation > cx.w.cluster_generation {
                    cx.w.groups[cx.at].wait = Wait::Ready;
                    cx.with_sanitizer(|s, who| s.cluster_leave(who.warp));
                    return Step::Next;
                }
                cx.block(Wait::Cluster)
            });
            Ok(())
        }
        Membar | Fence | FenceProxy => fence::lower(l, ins),
        Nanosleep => {
            l.emit_action(Class::Misc, |_| Step::Yield);
            Ok(())
        }
        // Launches run one after another; only the race check knows that they might not.
        Griddepcontrol => {
            let waits = ins.mods.has(Flag::Wait);
            l.emit_action(Class::Misc, move |cx| {
                if waits {
                    cx.previous_launch_ended();
                }
                Step::Next
            });
            Ok(())
        }
        Setmaxnreg => setmaxnreg(l, ins),
        Pmevent => {
            l.emit_action(Class::Misc, |_| Step::Next);
            Ok(())
        }
        _ => unsupported(mnemonic(ins)),
    }
}

/// Reports an `.aligned` barrier that a part of the warp executes.
fn whole_warp(cx: &mut Cx<'_>) {
    let first = !matches!(cx.w.groups[cx.at].wait, Wait::Barrier { .. });
    if cx.mask == cx.w.live {
        cx.w.let_go = false;
    }
    if !first || !cx.grid.settings.checks.sync || cx.mask == cx.w.live || cx.w.let_go {
        return;
    }
    // Groups that stand here too are on their way.
    let pc = cx.pc;
    let here = cx.w.groups.iter().filter(|g| g.pc == pc).fold(cx.mask, |m, g| m | g.mask);
    if here != cx.w.live {
        let missing = cx.w.live & !here;
        let message = format!("lanes {missing:#010x} of the warp do not execute this barrier");
        cx.report(Ub::Divergence, Some(cx.leader()), None, message);
    }
}

/// `setmaxnreg`: a warpgroup gives registers back to the CTA's pool, or waits until there are as
/// many as it asks for. Without a known number at the start (`.maxnreg`, or a bound of threads)
/// ptxas ignores it, and so does this.
fn setmaxnreg(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let Some(wanted) = l.literal(&ins.operands[0]) else { return unsupported(mnemonic(ins)) };
    if !(24..=256).contains(&wanted) || wanted % 8 != 0 {
        return unsupported(format!("{} {wanted}: 24 to 256, a multiple of 8", mnemonic(ins)));
    }
    let (wanted, grows) = (wanted as u32, ins.mods.has(Flag::Inc));
    l.emit_action(Class::Misc, move |cx| {
        let waiting = matches!(cx.w.groups[cx.at].wait, Wait::Registers { .. });
        if !waiting {
            if let Some(step) = cx.converge(!0) {
                return step;
            }
            same_in_warpgroup(cx, wanted);
        }
        let group = cx.w.index as usize / 4;
        let cta = &mut cx.cluster.ctas[cx.cta];
        let Some(&have) = cta.registers.get(group) else { return Step::Next };
        if have == wanted {
            cx.w.groups[cx.at].wait = Wait::Ready;
            return Step::Next;
        }
        let others: u32 = cta.registers.iter().sum::<u32>() - have;
        if grows && (others + wanted) * 128 > REGISTERS {
            return cx.block(Wait::Registers { wanted });
        }
        cta.registers[group] = wanted;
        let wrong = if grows { wanted < have } else { wanted > have };
        *cx.changes += 1;
        cx.w.groups[cx.at].wait = Wait::Ready;
        if wrong && cx.grid.settings.checks.sync {
            let what = if grows { "more" } else { "fewer" };
            let message = format!("asks for {what} registers than {have}, and names {wanted}");
            cx.report(Ub::BarrierMisuse, Some(cx.leader()), None, message);
        }
        Step::Next
    });
    Ok(())
}

/// Registers of an SM, all of which one CTA may have.
const REGISTERS: u32 = 65_536;

/// All warps of a warpgroup execute the same `setmaxnreg`.
fn same_in_warpgroup(cx: &mut Cx<'_>, wanted: u32) {
    let line = cx.grid.code.ops[cx.pc as usize].line;
    let (group, nth) = (cx.w.index as usize / 4, cx.w.register_changes);
    cx.w.register_changes += 1;
    let log = &mut cx.cluster.ctas[cx.cta].register_log;
    if log.len() <= group {
        log.resize(group + 1, Vec::new());
    }
    match log[group].get(nth) {
        None => log[group].push((wanted, line)),
        Some(&(other, at)) if (other, at) != (wanted, line) && cx.grid.settings.checks.sync => {
            let message = format!(
                "another warp of the warpgroup executed setmaxnreg of {other} at line {at} instead"
            );
            cx.report(Ub::Divergence, Some(cx.leader()), None, message);
        }
        Some(_) => {}
    }
}

/// Barriers of a CTA.
const BARRIERS: u32 = 16;

/// Arrives at a named barrier and, with `waits`, stays until it completes; returns the result of
/// its reduction.
fn cross(
    cx: &mut Cx<'_>,
    id: Reg,
    count: Option<Reg>,
    waits: bool,
    vote: Option<u32>,
) -> Result<(u32, bool, bool), Step> {
    let leader = cx.leader();
    let id = u32::read(cx, id)[leader];
    let expected = count.map(|c| u32::read(cx, c)[leader]);
    if let Wait::Barrier { generation, .. } = cx.w.groups[cx.at].wait {
        let barrier = &cx.cluster.ctas[cx.cta].barriers[&id];
        if barrier.generation > generation {
            let result = barrier.result;
            cx.w.groups[cx.at].wait = Wait::Ready;
            cx.barrier_left(id);
            return Ok(result);
        }
        return Err(cx.block(Wait::Barrier { id, generation }));
    }
    if id >= BARRIERS {
        let message = format!("barrier {id}; a CTA has {BARRIERS}");
        return Err(cx.fail(Ub::BarrierMisuse, Some(leader), None, message));
    }
    if let Some(n) = expected
        && (n == 0 || n % 32 != 0)
    {
        let message = format!("{n} threads; a barrier counts in whole warps");
        return Err(cx.fail(Ub::BarrierMisuse, Some(leader), None, message));
    }
    *cx.changes += 1;
    let (mask, live, index) = (cx.mask, cx.w.live, cx.w.index);
    // With a thread count whole warps arrive; a part of a warp is remembered until the rest comes.
    let arriving = match expected {
        None => mask.count_ones(),
        Some(_) => {
            let known = cx.w.partial_arrivals.iter().position(|(b, _)| *b == id);
            let before = known.map_or(0, |i| cx.w.partial_arrivals.swap_remove(i).1);
            let all = before | mask;
            if all & live == live {
                32
            } else {
                cx.w.partial_arrivals.push((id, all));
                0
            }
        }
    };
    let cta = &mut cx.cluster.ctas[cx.cta];
    let threads = cta.live_threads;
    let barrier = cta.barriers.entry(id).or_default();
    let mismatch = match (barrier.arrived > 0, barrier.expected, expected) {
        (true, before, now) if before != now => Some((before, now)),
        _ => None,
    };
    barrier.expected = expected;
    barrier.arrived += arriving;
    if let Some(yes) = vote {
        barrier.popc += yes.count_ones();
        barrier.and &= yes == mask;
        barrier.or |= yes != 0;
    }
    let generation = barrier.generation;
    let over = expected.is_some_and(|n| barrier.arrived > n);
    let arrived = barrier.arrived;
    let done = barrier.settle(threads);
    let result = barrier.result;
    if cx.grid.settings.checks.sync {
        if let Some((before, now)) = mismatch {
            let show = |n: Option<u32>| n.map_or("all threads".into(), |n| format!("{n} threads"));
            let message = format!(
                "barrier {id} is waited for by {} and by {} in one phase (warp {index})",
                show(before),
                show(now)
            );
            cx.report(Ub::BarrierMisuse, Some(leader), None, message);
        }
        if over {
            let message = format!(
                "{arrived} threads arrive at barrier {id}, which expects {}",
                expected.unwrap_or(0)
            );
            cx.report(Ub::BarrierMisuse, Some(leader), None, message);
        }
    }
    cx.barrier_crossed(id, waits, done);
    if done || !waits {
        return Ok(result);
    }
    Err(cx.block(Wait::Barrier { id, generation }))
}

/// bar.red: d = popc of the predicate over the CTA; or p = its and, its or.
fn bar_red(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let n = ins.operands.len();
    let id = l.src(&ins.operands[1], Type::U32)?;
    let count = if n == 4 { Some(l.src(&ins.operands[2], Type::U32)?) } else { None };
    let (p, negated) = l.pred(&ins.operands[n - 1])?;
    let op = ins.mods.op();
    let popc = op == Some(Op::Popc) || ins.mods.has(Flag::Popc);
    let d = match &ins.operands[0] {
        o if popc => l.dst(o)?,
        o @ Operand::Reg(_) => l.dst_pred(o)?,
        _ => return unsupported(mnemonic(ins)),
    };
    l.emit_action(Class::Barrier, move |cx| {
        let yes = (cx.pred(p) ^ if negated { !0 } else { 0 }) & cx.mask;
        let (count, and, or) = match cross(cx, id, count, true, Some(yes)) {
            Ok(result) => result,
            Err(step) => return step,
        };
        match op {
            Some(Op::And) => cx.set_pred(d, if and { !0 } else { 0 }),
            Some(Op::Or) => cx.set_pred(d, if or { !0 } else { 0 }),
            _ => lane::broadcast(cx, d, false, u64::from(count)),
        }
        Step::Next
    });
    Ok(())
}
