//! Graphs: nodes with what they do and what they wait for, and what was instantiated of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use crate::abi::*;
use crate::api::user_object::{release_all, retain_all};
use crate::operation::{Choice, Operation};
use crate::state::{Driver, R, driver};

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
pub(crate) type Shared = Arc<Mutex<Graph>>;

/// What streams capture together into a graph, until the one that began ends it.
pub(crate) struct Capture {
    pub graph: Handle,
    pub id: u64,
    pub origin: Handle,
    pub ended: AtomicBool,
}

/// A stream's part in a capture: the nodes that its next one will wait for.
#[derive(Clone)]
pub(crate) struct Captured {
    pub capture: Arc<Capture>,
    pub after: Vec<Handle>,
}

impl Captured {
    pub(crate) fn lasts(&self) -> bool {
        !self.capture.ended.load(Relaxed)
    }
}

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

impl Drop for Exec {
    fn drop(&mut self) {
        if let Ok(held) = self.user_objects.get_mut() {
            release_all(held);
        }
    }
}

impl Graph {
    /// Its nodes, each behind all that it waits for; `None` where they wait in a circle.
    fn order(&self) -> Option<Vec<Handle>> {
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
    fn run(&self, device: usize) -> R {
        if !self.enabled {
            return Ok(());
        }
        let Operation::Conditional(conditional) = &self.operation else {
            self.operation.run(device)?;
            return self.bodies.iter().flatten().try_for_each(|step| step.run(device));
        };
        let run = |body: Option<&Vec<Step>>| -> R {
            body.into_iter().flatten().try_for_each(|step| step.run(device))
        };
        match (conditional.choice, conditional.value()?) {
            (Choice::If, value) => run(self.bodies.get(usize::from(value == 0))),
            (Choice::Switch, value) => run(self.bodies.get(value as usize)),
            (Choice::While, _) => {
                while conditional.value()? != 0 {
                    run(self.bodies.first())?;
                    // A kernel that fails sets no condition.
                    driver().error()?;
                }
                Ok(())
            }
        }
    }

    /// The conditions of its own node and of those in the graphs that it holds.
    fn conditions(&self, found: &mut BTreeSet<DevicePtr>) {
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

    /// Runs it once on a device.
    pub(crate) fn run(&self, device: usize) -> R {
        let steps = self.steps.lock().expect("no panic holds this lock").clone();
        let mut conditions = BTreeSet::new();
        steps.iter().for_each(|step| step.conditions(&mut conditions));
        driver().set_conditions(&conditions)?;
        steps.iter().try_for_each(|step| step.run(device))
    }
}

impl Driver {
    /// Adds a node to a graph.
    ///
    /// # Errors
    /// `CUDA_ERROR_INVALID_VALUE` where it waits for a node of another graph.
    pub(crate) fn add_node(
        &self,
        graph: Handle,
        after: Vec<(Handle, EdgeData)>,
        operation: Operation,
    ) -> R<Handle> {
        let shared = self.graphs.get(graph)?;
        let mut found = shared.lock().expect("no panic holds this lock");
        let distinct: BTreeSet<Handle> = after.iter().map(|(node, _)| *node).collect();
        if distinct.len() < after.len() || !distinct.iter().all(|n| found.nodes.contains_key(n)) {
            return Err(ERROR_INVALID_VALUE);
        }
        let handle = self.nodes.insert(graph);
        found.nodes.insert(handle, Node { operation, after });
        Ok(handle)
    }

    /// Reads a node.
    pub(crate) fn node(&self, node: Handle) -> R<Node> {
        let graph = self.graphs.get(self.nodes.get(node)?)?;
        let graph = graph.lock().expect("no panic holds this lock");
        graph.nodes.get(&node).cloned().ok_or(ERROR_INVALID_VALUE)
    }

    /// Changes a node.
    pub(crate) fn with_node<T>(
        &self,
        node: Handle,
        change: impl FnOnce(&mut Node) -> R<T>,
    ) -> R<T> {
        let graph = self.graphs.get(self.nodes.get(node)?)?;
        let mut graph = graph.lock().expect("no panic holds this lock");
        change(graph.nodes.get_mut(&node).ok_or(ERROR_INVALID_VALUE)?)
    }

    /// A copy of a graph, with nodes and children of its own.
    pub(crate) fn clone_graph(&self, graph: Handle, owned: bool) -> R<Handle> {
        let original = self.graphs.get(graph)?.lock().expect("no panic holds this lock").clone();
        let copy = self.graphs.insert(Arc::default());
        retain_all(&original.user_objects);
        let user_objects = original.user_objects.clone();
        let mut made = Graph { owned, user_objects, ..Graph::default() };
        let mut twins = BTreeMap::new();
        let order = original.order().ok_or(ERROR_INVALID_VALUE)?;
        for handle in order {
            let node = &original.nodes[&handle];
            let operation = node.operation.with_bodies(|body| self.clone_graph(body, true))?;
            let twin = self.nodes.insert(copy);
            twins.insert(handle, twin);
            made.originals.insert(twin, handle);
            let after = node.after.iter().map(|(n, data)| (twins[n], *data)).collect();
            made.nodes.insert(twin, Node { operation, after });
        }
        *self.graphs.get(copy)?.lock().expect("no panic holds this lock") = made;
        Ok(copy)
    }

    /// Gives conditions the values that a launch begins with.
    fn set_conditions(&self, conditions: &BTreeSet<DevicePtr>) -> R {
        let known = self.conditions.lock().expect("no panic holds this lock");
        for at in conditions {
            if let Some(value) = known.get(at).and_then(|condition| condition.default) {
                let word = value.to_le_bytes();
                self.devices[0].memory().write(*at, &word).map_err(|_| ERROR_ILLEGAL_ADDRESS)?;
            }
        }
        Ok(())
    }

    /// Forgets a graph and its nodes.
    pub(crate) fn destroy_graph(&self, graph: Handle) -> R {
        let graph = self.graphs.remove(graph)?;
        let graph = graph.lock().expect("no panic holds this lock");
        release_all(&graph.user_objects);
        for (handle, node) in &graph.nodes {
            self.nodes.remove(*handle)?;
            node.operation.bodies().iter().try_for_each(|body| self.destroy_graph(*body))?;
        }
        Ok(())
    }

    /// The user objects of a graph and its children, retained once more.
    pub(crate) fn hold_user_objects(&self, graph: Handle) -> R<BTreeMap<Handle, u64>> {
        let mut held = BTreeMap::new();
        let mut open = vec![graph];
        while let Some(graph) = open.pop() {
            let graph = self.graphs.get(graph)?;
            let graph = graph.lock().expect("no panic holds this lock");
            retain_all(&graph.user_objects);
            for (object, count) in &graph.user_objects {
                *held.entry(*object).or_default() += count;
            }
            open.extend(graph.nodes.values().flat_map(|node| node.operation.bodies()));
        }
        Ok(held)
    }

    /// The steps of a graph in an order in which they can run.
    pub(crate) fn steps(&self, graph: Handle) -> R<Vec<Step>> {
        let graph = self.graphs.get(graph)?.lock().expect("no panic holds this lock").clone();
        let order = graph.order().ok_or(ERROR_INVALID_VALUE)?;
        order
            .into_iter()
            .map(|handle| {
                let Node { operation, after } = graph.nodes[&handle].clone();
                let bodies = operation.bodies().iter().map(|body| self.steps(*body));
                let bodies = bodies.collect::<R<_>>()?;
                Ok(Step { node: handle, operation, enabled: true, after, bodies })
            })
            .collect()
    }
}
