//! Basic blocks of a function, and where diverged threads meet again.

use fathom_ptx::ast::{Body, Instruction, Operand, Statement, TableKind};
use fathom_ptx::table::Opcode;

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
    /// Immediate post-dominator of each block; `None` where that is the function's end, or where
    /// the end cannot be reached.
    pub meet: Vec<Option<usize>>,
    /// Whether that `None` is the function's end.
    pub reaches_end: Vec<bool>,
}

fn ends_block(op: Opcode) -> bool {
    matches!(op, Opcode::Bra | Opcode::BrxIdx | Opcode::Ret | Opcode::Exit)
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
    /// Builds the graph and its post-dominators.
    pub fn new(body: &Body) -> Cfg {
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
        cfg.post_dominators();
        cfg
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

    /// Cooper, Harvey and Kennedy's dominator algorithm on the reversed graph, whose root is a
    /// virtual end behind every block without successors.
    fn post_dominators(&mut self) {
        let n = self.blocks.len();
        let end = n;
        let mut predecessors = vec![Vec::new(); n + 1];
        for (b, block) in self.blocks.iter().enumerate() {
            for &s in &block.successors {
                predecessors[s].push(b);
            }
            if block.successors.is_empty() {
                predecessors[end].push(b);
            }
        }
        // Post-order of the reversed graph from the end.
        let mut order = Vec::with_capacity(n + 1);
        let mut number = vec![usize::MAX; n + 1];
        let mut seen = vec![false; n + 1];
        let mut stack = vec![(end, 0)];
        seen[end] = true;
        while let Some((node, i)) = stack.pop() {
            if let Some(&p) = predecessors[node].get(i) {
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
                let mut new = if successors.is_empty() { end } else { usize::MAX };
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
        self.meet = (0..n).map(|b| (dom[b] < n).then_some(dom[b])).collect();
        self.reaches_end = (0..n).map(|b| dom[b] != usize::MAX).collect();
    }
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
