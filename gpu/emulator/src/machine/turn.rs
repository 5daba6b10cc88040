//! One turn of one warp: the loop that executes micro-operations.

use super::cluster::Cluster;
use super::cx::{Cx, Grid};
use super::op::{NO_GUARD, Step};
use super::plain;
use super::stats::Stats;
use super::warp::{NO_JOIN, Wait, Warp};
use crate::error::{Finding, Ub};
use crate::machine::checks::global::{Global, Strength};

/// Instructions a group runs before lanes that wait for it at a join are let go.
const RELEASE_AFTER: u64 = 20_000;

/// What a yield (`nanosleep`) counts as, in instructions.
const YIELDED: u64 = 200;

/// What a turn came to.
#[derive(Debug)]
pub enum Turn {
    /// It executed so many operations; 0 where every group was waiting.
    Ran(u64),
    /// The same, and then it gave its turn away (`nanosleep`).
    Yielded(u64),
    /// An operation ended the launch, with this finding.
    Fault(Box<Finding>),
}

/// What the turn of a warp needs beside the warp.
pub struct Around<'a> {
    pub cluster: &'a mut Cluster,
    pub cta: usize,
    pub grid: &'a Grid,
    pub stats: &'a mut Stats,
    pub changes: &'a mut u64,
    pub stalled: bool,
    pub global: Option<&'a mut Global>,
}

/// Runs a warp until it has executed `budget` operations, waits, or is done.
pub fn run(w: &mut Warp, around: Around<'_>, budget: u64) -> Turn {
    let Around { cluster, cta, grid, stats, changes, stalled, global } = around;
    let mut cx = Cx {
        mask: 0,
        active: 0,
        base: 0,
        pred_base: 0,
        local_base: 0,
        pc: 0,
        at: 0,
        w,
        cluster,
        cta,
        grid,
        stats,
        changes,
        stalled,
        fault: None,
        copying: false,
        idle_bytes: 0,
        strength: Strength::Weak,
        global,
    };
    if stalled {
        // Others may wait for what parked lanes do behind their join.
        cx.w.release_parked(!0);
    }
    let mut ran = 0;
    let mut idle = 0;
    let mut yields = false;
    while ran < budget && !cx.w.groups.is_empty() {
        let at = cx.w.turn % cx.w.groups.len();
        let left = (budget - ran).min(RELEASE_AFTER);
        let before = ran;
        match run_group(&mut cx, at, left, &mut ran) {
            GroupEnd::Fault => return Turn::Fault(cx.fault.take().expect("a fault has a finding")),
            GroupEnd::Changed => idle = 0,
            GroupEnd::Waits => {
                cx.w.turn += 1;
                idle = if ran == before { idle + 1 } else { 0 };
                if idle >= cx.w.groups.len() {
                    if !cx.w.release_members() {
                        break;
                    }
                    idle = 0;
                }
            }
            GroupEnd::Yields => {
                cx.w.turn += 1;
                release_after_spinning(cx.w, at);
                yields = true;
                break;
            }
            GroupEnd::Spent => {
                cx.w.turn += 1;
                idle = 0;
                release_after_spinning(cx.w, at);
            }
        }
    }
    cx.w.clock += ran;
    if yields { Turn::Yielded(ran) } else { Turn::Ran(ran) }
}

/// Lets lanes go that wait at a join for a group that has spun for long.
fn release_after_spinning(w: &mut Warp, at: usize) {
    let spun = w.groups.get(at).is_some_and(|g| g.spun >= RELEASE_AFTER);
    if spun && w.release_parked(!0) {
        w.groups.iter_mut().for_each(|g| g.spun = 0);
    }
}

enum GroupEnd {
    /// The groups of the warp are others now.
    Changed,
    Waits,
    Yields,
    Spent,
    Fault,
}

fn run_group(cx: &mut Cx<'_>, at: usize, budget: u64, ran: &mut u64) -> GroupEnd {
    let code = &*cx.grid.code;
    let ops = &code.ops[..];
    let group = &cx.w.groups[at];
    cx.at = at;
    cx.active = group.mask;
    cx.base = group.base as usize;
    cx.pred_base = group.pred_base as usize;
    cx.local_base = group.local_base;
    let depth = group.frames.len() as u32;
    let meets = match cx.w.joins.get(group.join as usize) {
        Some(j) if group.join != NO_JOIN && j.depth == depth => j.pc,
        _ => u32::MAX,
    };
    let mut pc = group.pc;
    let active = cx.active;
    let threads = u64::from(active.count_ones());
    let checks_registers = cx.grid.settings.checks.races;
    let profiles = cx.grid.settings.profile;
    // The check looks at each operation, and a profile counts each for its warp.
    let one_by_one = profiles || checks_registers && cx.cluster.sanitizer.is_some();
    let mut n = 0;
    let end = loop {
        if pc == meets {
            cx.w.groups[at].pc = pc;
            cx.w.arrive(at);
            break GroupEnd::Changed;
        }
        if n == budget {
            break GroupEnd::Spent;
        }
        let op = &ops[pc as usize];
        if op.plain > 1 && budget - n >= u64::from(op.plain) && !one_by_one {
            let run = pc as usize..pc as usize + usize::from(op.plain);
            cx.stats.warps[run.clone()].iter_mut().for_each(|count| *count += 1);
            cx.stats.threads[run.clone()].iter_mut().for_each(|count| *count += threads);
            cx.mask = active;
            cx.pc = pc;
            plain::run(cx, &ops[run]);
            n += u64::from(op.plain);
            pc += u32::from(op.plain);
            continue;
        }
        n += 1;
        cx.stats.warps[pc as usize] += 1;
        if profiles {
            cx.stats.by_warp[cx.w.index as usize][pc as usize] += 1;
        }
        let mask = if op.guard == NO_GUARD {
            cx.stats.threads[pc as usize] += threads;
            active
        } else {
            let p = cx.w.preds[cx.pred_base + op.guard as usize];
            let mask = active & if op.negated { !p } else { p };
            cx.stats.threads[pc as usize] += u64::from(mask.count_ones());
            if mask == 0 {
                pc += 1;
                continue;
            }
            mask
        };
        cx.mask = mask;
        cx.pc = pc;
        if op.control && mask != active {
            // Lanes for which the guard is false go round the instruction.
            cx.w.groups[at].pc = pc;
            let meet = if op.imm == u64::MAX { None } else { Some(pc + 1) };
            cx.w.split(at, mask, pc, pc + 1, meet);
            *ran += n;
            return GroupEnd::Changed;
        }
        if checks_registers && cx.cluster.sanitizer.is_some() {
            check_registers(cx);
        }
        match (op.run)(cx, op) {
            Step::Next => pc += 1,
            Step::Branch => {
                // An indirect branch has narrowed the mask to the lanes that go there.
                let mask = cx.mask;
                if mask == active {
                    pc = op.x;
                } else {
                    let meet = (op.imm != u64::MAX).then_some(op.imm as u32);
                    cx.w.split(at, mask, op.x, pc + 1, meet);
                    break GroupEnd::Changed;
                }
            }
            Step::Control => {
                *ran += n;
                return GroupEnd::Changed;
            }
            step @ (Step::Block | Step::Regrouped) => {
                // It did not execute after all.
                cx.stats.warps[pc as usize] -= 1;
                if profiles {
                    cx.stats.by_warp[cx.w.index as usize][pc as usize] -= 1;
                }
                cx.stats.threads[pc as usize] -= u64::from(mask.count_ones());
                n -= 1;
                *ran += n;
                if step == Step::Regrouped {
                    return GroupEnd::Changed;
                }
                cx.w.groups[at].pc = pc;
                cx.w.groups[at].spun += n;
                return GroupEnd::Waits;
            }
            Step::Yield => {
                cx.w.groups[at].pc = pc + 1;
                // Who yields in a loop spins, a few instructions at a time.
                cx.w.groups[at].spun += n + YIELDED;
                cx.w.groups[at].wait = Wait::Ready;
                *ran += n;
                return GroupEnd::Yields;
            }
            Step::Exit => {
                cx.w.groups[at].pc = pc + 1;
                exit(cx, at, mask);
                break GroupEnd::Changed;
            }
            Step::Fault => return GroupEnd::Fault,
        }
    };
    *ran += n;
    if let GroupEnd::Spent = end {
        cx.w.groups[at].pc = pc;
        cx.w.groups[at].spun += n;
    }
    end
}

/// Reports a register that a wgmma in flight still uses.
fn check_registers(cx: &mut Cx<'_>) {
    let code = &*cx.grid.code;
    let Some(touch) = code.touched.get(&cx.pc) else { return };
    let mut found = None;
    cx.with_sanitizer(|s, who| {
        found = s.registers_touched(who.warp, touch);
        s.registers_written(who.warp, touch);
    });
    if let Some(message) = found {
        cx.report(Ub::AsyncNotWaited, None, None, message.to_owned());
    }
}

fn exit(cx: &mut Cx<'_>, at: usize, mask: u32) {
    *cx.changes += 1;
    cx.w.exit(at, mask);
    let cta = &mut cx.cluster.ctas[cx.cta];
    cta.live_threads -= mask.count_ones();
    let live = cta.live_threads;
    if live == 0 && cx.cluster.ctas.len() > 1 {
        cx.cta_ended();
    }
    let cta = &mut cx.cluster.ctas[cx.cta];
    for barrier in cta.barriers.values_mut() {
        barrier.settle(live);
    }
    cx.cluster.settle_barrier();
}
