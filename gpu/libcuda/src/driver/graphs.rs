//! What the driver does with graphs: nodes, copies, steps, and running those.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::user_objects::{release_all, retain_all};
use super::{Driver, driver};
use crate::abi::*;
use crate::objects::graph::{EdgeData, Exec, Graph, Node, Step};
use crate::objects::operation::{Choice, Operation};

impl Drop for Exec {
    fn drop(&mut self) {
        if let Ok(held) = self.user_objects.get_mut() {
            release_all(held);
        }
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
}

impl Exec {
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
