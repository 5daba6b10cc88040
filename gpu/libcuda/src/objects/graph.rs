//! Graphs: nodes with what they do and what they wait for, and what was instantiated of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use super::operation::Operation;
use crate::abi::*;

/// `CUgraphEdgeData`: ports and type of an edge.
pub(crate) type EdgeData = [u8; 8];

/// A node of a graph.
#[derive(Clone)]
pub(crate) struct Node {
    pub operation: Operation,
    /// The nodes that it waits for.
    pub after: Vec<(Handle, EdgeData)>,
}

/// A graph. Handles of nodes grow, so that the map has them in the order of their making.
#[derive(Clone, Default)]
pub(crate) struct Graph {
    pub nodes: BTreeMap<Handle, Node>,
    /// For a clone, the node of the original that each of its nodes stands for.
    pub originals: BTreeMap<Handle, Handle>,
    /// How often it holds each user object.
    pub user_objects: BTreeMap<Handle, u64>,
    /// Whether it belongs to a node or to an executable graph, which destroy it.
    pub owned: bool,
}

/// A condition of a graph.
#[derive(Clone, Copy)]
pub(crate) struct Condition {
    /// The graph that it was made for, whose nodes and inner graphs may use it.
    pub graph: Handle,
    /// The value that each launch begins with, where it is to have one.
    pub default: Option<u32>,
}

/// A graph behind a handle.
pub(crate) type SharedGraph = Arc<Mutex<Graph>>;

/// A node of an executable graph.
#[derive(Clone)]
pub(crate) struct Step {
    pub node: Handle,
    pub operation: Operation,
    pub enabled: bool,
    pub after: Vec<(Handle, EdgeData)>,
    /// What the graphs that it holds are made of.
    pub bodies: Vec<Vec<Step>>,
}

/// An executable graph.
pub(crate) struct Exec {
    pub id: u64,
    pub flags: u64,
    /// In an order in which all that a step waits for stands before it.
    pub steps: Mutex<Vec<Step>>,
    /// How often it holds each user object: as often as its graph and that one's children did.
    pub user_objects: Mutex<BTreeMap<Handle, u64>>,
}

impl Graph {
    /// Its nodes, each behind all that it waits for; `None` where they wait in a circle.
    pub(crate) fn order(&self) -> Option<Vec<Handle>> {
        let mut done = BTreeSet::new();
        let mut order = Vec::new();
        while order.len() < self.nodes.len() {
            let before = order.len();
            for (handle, node) in &self.nodes {
                let ready = node.after.iter().all(|(n, _)| done.contains(n));
                if ready && done.insert(*handle) {
                    order.push(*handle);
                }
            }
            if order.len() == before {
                return None;
            }
        }
        Some(order)
    }

    /// Whether it allocates or frees: from such a graph neither nodes nor edges can be taken.
    pub(crate) fn has_memory_nodes(&self) -> bool {
        let memory =
            |node: &Node| matches!(node.operation, Operation::Alloc(..) | Operation::Free(_));
        self.nodes.values().any(memory)
    }

    /// Nodes that wait for a node.
    pub(crate) fn dependents(&self, node: Handle) -> Vec<(Handle, EdgeData)> {
        let edges = |(handle, n): (&Handle, &Node)| {
            let edge = n.after.iter().find(|(from, _)| *from == node);
            edge.map(|(_, data)| (*handle, *data))
        };
        self.nodes.iter().filter_map(edges).collect()
    }
}

impl Step {
    /// The conditions of its own node and of those in the graphs that it holds.
    pub(crate) fn conditions(&self, found: &mut BTreeSet<DevicePtr>) {
        if let Operation::Conditional(conditional) = &self.operation {
            found.insert(conditional.condition);
        }
        self.bodies.iter().flatten().for_each(|step| step.conditions(found));
    }
}

impl Exec {
    /// The events that its steps record and those that they wait for.
    pub(crate) fn events(&self, recorded: &mut Vec<Handle>, awaited: &mut Vec<Handle>) {
        let steps = self.steps.lock().expect("no panic holds this lock");
        let mut open: Vec<&Step> = steps.iter().collect();
        while let Some(step) = open.pop() {
            step.operation.events(recorded, awaited);
            open.extend(step.bodies.iter().flatten());
        }
    }
}
