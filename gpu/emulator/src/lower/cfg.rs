//! Basic blocks of a function, and where diverged threads meet again.

use fathom_ptx::ast::{Body, Instruction, Operand, Statement, TableKind};
use fathom_ptx::table::{Effect, Opcode};

/// A basic block: statements `start..end`.
#[derive(Clone, Debug, Default)]
pub struct Block {
    pub start: usize,
    pub end: usize,
    pub successors: Vec<usize>,
}

/// Blocks in source order.
#[derive(Clone, Debug, Default)]
pub struct Cfg {
    pub blocks: Vec<Block>,
    /// Block of each statement.
    pub block_of: Vec<usize>,
    /// Where the lanes that leave a block on several ways meet again; `None` where that is the
    /// function's end, or where the end cannot be reached.
    pub meet: Vec<Option<usize>>,
    /// Whether that `None` is the function's end.
    pub reaches_end: Vec<bool>,
}

fn ends_block(op: Opcode) -> bool {
    op.effect() == Effect::Jump
}

/// Labels that a branch may go to.
pub fn targets(body: &Body, ins: &Instruction) -> Vec<usize> {
    let mut out = Vec::new();
    for operand in &ins.operands {
        match operand {
            Operand::Label(l) => out.push(body.labels[l.index()].statement as usize),
            Operand::Table(t) if ins.op == Opcode::BrxIdx => {
                if let TableKind::Branch(labels) = &body.tables[t.index()].kind {
                    out.extend(labels.iter().map(|l| body.labels[l.index()].statement as usize));
                }
            }
            _ => {}
        }
    }
    out
}

impl Cfg {
    /// Builds the graph of an entry's body, or of a device function's, and where its lanes meet.
    pub fn new(body: &Body, entry: bool) -> Cfg {
        let n = body.statements.len();
        let mut leader = vec![false; n + 1];
        leader[0] = true;
        for (i, statement) in body.statements.iter().enumerate() {
            match statement {
                Statement::Label(_) => leader[i] = true,
                Statement::Instruction(ins) if ends_block(ins.op) => leader[i + 1] = true,
                _ => {}
            }
        }
        let mut cfg = Cfg { block_of: vec![0; n], ..Cfg::default() };
        for i in 0..n {
            if leader[i] {
                cfg.blocks.push(Block { start: i, ..Block::default() });
            }
            let last = cfg.blocks.len() - 1;
            cfg.blocks[last].end = i + 1;
            cfg.block_of[i] = last;
        }
        for b in 0..cfg.blocks.len() {
            cfg.blocks[b].successors = cfg.successors(body, b);
        }
        cfg.find_meetings(body, entry);
        cfg
    }

    /// Lanes meet at the immediate post-dominator of their branch. A trap is no way out, and lanes
    /// that exit are not waited for: where only exits keep sides from meeting before the end,
    /// they meet on the way to where the function returns; in an entry, whose returns are exits,
    /// to the end that most blocks lead to.
    fn find_meetings(&mut self, body: &Body, entry: bool) {
        let blocks = self.blocks.len();
        let ends_with = |b: usize, op: Opcode| match &body.statements[self.blocks[b].end - 1] {
            Statement::Instruction(ins) => ins.op == op,
            _ => false,
        };
        // With a guard, lanes that return part from those that do not.
        let returns = |b: usize| !entry && ends_with(b, Opcode::Ret);
        let stops = |b: usize| self.blocks[b].successors.is_empty() && !ends_with(b, Opcode::Trap);
        let mut ends: Vec<usize> = (0..blocks).filter(|&b| returns(b) || stops(b)).collect();
        let predecessors = self.predecessors();
        let dom = self.post_dominators(&predecessors, &ends);
        self.meet = dom.iter().map(|&d| (d < blocks).then_some(d)).collect();
        self.reaches_end = dom.iter().map(|&d| d != usize::MAX).collect();
        let all = ends.len();
        if entry {
            let count =
                |&end: &usize| leading_to(&predecessors, end).iter().filter(|&&l| l).count();
            ends = ends.iter().copied().max_by_key(count).into_iter().collect();
        } else {
            ends.retain(|&b| !ends_with(b, Opcode::Exit));
        }
        if ends.is_empty() || ends.len() == all {
            return;
        }
        let dom = self.post_dominators(&predecessors, &ends);
        for b in 0..blocks {
            let (meet, successors) = (dom[b], &self.blocks[b].successors);
            if self.meet[b].is_some() || meet >= blocks || successors.len() < 2 {
                continue;
            }
            let leads = leading_to(&predecessors, meet);
            if successors.iter().filter(|&&s| leads[s]).count() > 1 {
                self.meet[b] = Some(meet);
            }
        }
    }

    fn predecessors(&self) -> Vec<Vec<usize>> {
        let mut list = vec![Vec::new(); self.blocks.len()];
        for (b, block) in self.blocks.iter().enumerate() {
            block.successors.iter().for_each(|&s| list[s].push(b));
        }
        list
    }

    fn successors(&self, body: &Body, b: usize) -> Vec<usize> {
        let next = (b + 1 < self.blocks.len()).then_some(b + 1);
        let last = &body.statements[self.blocks[b].end - 1];
        let mut out: Vec<usize> = Vec::new();
        match last {
            Statement::Instruction(ins) if ends_block(ins.op) => {
                out.extend(targets(body, ins).into_iter().map(|s| self.block_of[s]));
                if ins.guard.is_some() {
                    out.extend(next);
                }
            }
            _ => out.extend(next),
        }
        out.sort_unstable();
        out.dedup();
        out
    }

    /// Immediate post-dominators, by Cooper, Harvey and Kennedy's algorithm on the reversed graph,
    /// whose root is a virtual end behind the blocks `ends`: its number is that of blocks. What
    /// does not lead there has `usize::MAX`.
    fn post_dominators(&self, predecessors: &[Vec<usize>], ends: &[usize]) -> Vec<usize> {
        let n = self.blocks.len();
        let end = n;
        let before = |node: usize| if node == end { ends } else { &predecessors[node] };
        // Post-order of the reversed graph from the end.
        let mut order = Vec::with_capacity(n + 1);
        let mut number = vec![usize::MAX; n + 1];
        let mut seen = vec![false; n + 1];
        let mut stack = vec![(end, 0)];
        seen[end] = true;
        while let Some((node, i)) = stack.pop() {
            if let Some(&p) = before(node).get(i) {
                stack.push((node, i + 1));
                if !seen[p] {
                    seen[p] = true;
                    stack.push((p, 0));
                }
            } else {
                number[node] = order.len();
                order.push(node);
            }
        }
        let mut dom = vec![usize::MAX; n + 1];
        dom[end] = end;
        let mut changed = true;
        while changed {
            changed = false;
            for &node in order.iter().rev().filter(|&&x| x != end) {
                let successors = &self.blocks[node].successors;
                let mut new = if ends.contains(&node) { end } else { usize::MAX };
                for &s in successors {
                    if dom[s] == usize::MAX {
                        continue;
                    }
                    new = if new == usize::MAX { s } else { intersect(&dom, &number, new, s) };
                }
                if new != usize::MAX && dom[node] != new {
                    dom[node] = new;
                    changed = true;
                }
            }
        }
        dom.truncate(n);
        dom
    }
}

/// Whether each block leads to this one.
fn leading_to(predecessors: &[Vec<usize>], to: usize) -> Vec<bool> {
    let mut leads = vec![false; predecessors.len()];
    let mut stack = vec![to];
    while let Some(b) = stack.pop() {
        if !std::mem::replace(&mut leads[b], true) {
            stack.extend(&predecessors[b]);
        }
    }
    leads
}

fn intersect(dom: &[usize], number: &[usize], mut a: usize, mut b: usize) -> usize {
    while a != b {
        while number[a] < number[b] {
            a = dom[a];
        }
        while number[b] < number[a] {
            b = dom[b];
        }
    }
    a
}
