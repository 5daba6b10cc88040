//! Graphs: their nodes and edges, executable graphs, launches.

use std::ffi::c_char;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use super::{entry_points, put, text};
use crate::abi::*;
use crate::driver::user_objects::release_all;
use crate::driver::{Driver, initialised};
use crate::objects::graph::{Condition, EdgeData, Exec, Step};
use crate::objects::handles::HANDLE_STEP;
use crate::objects::operation::Operation;

/// A client's list of nodes, with the edges' data where it gives them.
///
/// # Safety
/// The lists have `count` entries; that of data may be null.
pub(super) unsafe fn edges(
    nodes: *const Handle,
    data: *const EdgeData,
    count: usize,
) -> Vec<(Handle, EdgeData)> {
    // SAFETY: within the count.
    let edge = |i| unsafe {
        let data = if data.is_null() { EdgeData::default() } else { *data.add(i) };
        (*nodes.add(i), data)
    };
    (0..count).map(edge).collect()
}

/// A client's buffer for a list: as cuda.h has it, without a buffer the count alone is wanted, and
/// places beyond the end are filled with null.
struct List {
    nodes: [*mut Handle; 2],
    data: *mut EdgeData,
    count: *mut usize,
}

impl List {
    /// # Safety
    /// The buffers have as much room as the count says.
    unsafe fn fill(&self, found: &[([Handle; 2], EdgeData)]) -> R {
        // SAFETY: the client's pointers.
        unsafe {
            let wanted = self.nodes.iter().any(|list| !list.is_null());
            if wanted && self.count.is_null() {
                return Err(ERROR_INVALID_VALUE);
            }
            let room = if wanted { *self.count } else { 0 };
            // Data of edges that is not empty must be asked for.
            let dropped = |(_, data): &([Handle; 2], EdgeData)| *data != EdgeData::default();
            if wanted && self.data.is_null() && found.iter().any(dropped) {
                return Err(ERROR_LOSSY_QUERY);
            }
            for i in 0..room {
                let (nodes, data) = found.get(i).copied().unwrap_or_default();
                for (list, node) in self.nodes.iter().zip(nodes).filter(|(list, _)| !list.is_null())
                {
                    put(list.add(i), node)?;
                }
                if !self.data.is_null() {
                    put(self.data.add(i), data)?;
                }
            }
            put(self.count, if wanted { room.min(found.len()) } else { found.len() })
        }
    }

    /// # Safety
    /// As [`List::fill`].
    unsafe fn fill_one(&self, found: &[(Handle, EdgeData)]) -> R {
        let pairs: Vec<_> = found.iter().map(|(node, data)| ([*node, 0], *data)).collect();
        // SAFETY: the caller's promise.
        unsafe { self.fill(&pairs) }
    }
}

fn one(nodes: *mut Handle, data: *mut EdgeData, count: *mut usize) -> List {
    List { nodes: [nodes, std::ptr::null_mut()], data, count }
}

/// All edges of a graph.
fn edges_of(graph: Handle) -> R<Vec<([Handle; 2], EdgeData)>> {
    let graph = initialised()?.graphs.get(graph)?;
    let graph = graph.lock().expect("no panic holds this lock");
    let of = |(to, node): (&Handle, &crate::objects::graph::Node)| {
        let to = *to;
        node.after.clone().into_iter().map(move |(from, data)| ([from, to], data))
    };
    Ok(graph.nodes.iter().flat_map(of).collect())
}

fn dependents(node: Handle) -> R<Vec<(Handle, EdgeData)>> {
    let driver = initialised()?;
    let graph = driver.graphs.get(driver.nodes.get(node)?)?;
    Ok(graph.lock().expect("no panic holds this lock").dependents(node))
}

/// Adds or removes edges.
///
/// # Safety
/// The lists have `count` entries.
unsafe fn change_edges(
    graph: Handle,
    (from, to): (*const Handle, *const Handle),
    data: *const EdgeData,
    count: usize,
    add: bool,
) -> R {
    let driver = initialised()?;
    let memory =
        driver.graphs.get(graph)?.lock().expect("no panic holds this lock").has_memory_nodes();
    if memory && !add {
        return Err(ERROR_NOT_SUPPORTED);
    }
    // SAFETY: the caller's promise.
    for (i, (from, data)) in unsafe { edges(from, data, count) }.into_iter().enumerate() {
        // SAFETY: within the count.
        let to = unsafe { *to.add(i) };
        let same = driver.nodes.get(from)? == graph && driver.nodes.get(to)? == graph;
        if !same || from == to {
            return Err(ERROR_INVALID_VALUE);
        }
        driver.with_node(to, |node| {
            let at = node.after.iter().position(|(other, _)| *other == from);
            match (add, at) {
                (true, None) => node.after.push((from, data)),
                (false, Some(at)) => drop(node.after.remove(at)),
                _ => return Err(ERROR_INVALID_VALUE),
            }
            Ok(())
        })?;
    }
    Ok(())
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

fn instantiate(driver: &Driver, graph: Handle, flags: u64) -> R<Handle> {
    let steps = Mutex::new(driver.steps(graph)?);
    let id = NEXT_ID.fetch_add(1, Relaxed);
    let user_objects = Mutex::new(driver.hold_user_objects(graph)?);
    Ok(driver.execs.insert(Arc::new(Exec { id, flags, steps, user_objects })))
}

/// Changes a step of an executable graph.
pub(super) fn with_step<T>(
    exec: Handle,
    node: Handle,
    change: impl FnOnce(&mut Step) -> R<T>,
) -> R<T> {
    let exec = initialised()?.execs.get(exec)?;
    let mut steps = exec.steps.lock().expect("no panic holds this lock");
    let step = steps.iter_mut().find(|step| step.node == node).ok_or(ERROR_INVALID_VALUE)?;
    change(step)
}

/// `CUgraphExecUpdateResult`.
const UPDATE_TOPOLOGY: u32 = 2;
const UPDATE_TYPE: u32 = 3;

/// Takes over a graph's parameters; where it is another graph, the reason and the node.
fn update(exec: Handle, graph: Handle) -> R<Result<(), (u32, Handle)>> {
    let driver = initialised()?;
    let exec = driver.execs.get(exec)?;
    let new = driver.steps(graph)?;
    let mut old = exec.steps.lock().expect("no panic holds this lock");
    let place = |steps: &[Step], node: Handle| steps.iter().position(|step| step.node == node);
    let shape = |steps: &[Step], step: &Step| -> Vec<Option<usize>> {
        let mut places: Vec<_> = step.after.iter().map(|(n, _)| place(steps, *n)).collect();
        places.sort_unstable();
        places
    };
    let lengths = |step: &Step| step.bodies.iter().map(Vec::len).collect::<Vec<_>>();
    if old.len() != new.len() {
        return Ok(Err((UPDATE_TOPOLOGY, new.last().map_or(0, |step| step.node))));
    }
    for (was, is) in old.iter().zip(&new) {
        if was.operation.kind() != is.operation.kind() {
            return Ok(Err((UPDATE_TYPE, is.node)));
        }
        if shape(&old, was) != shape(&new, is) || lengths(was) != lengths(is) {
            return Ok(Err((UPDATE_TOPOLOGY, is.node)));
        }
    }
    for (was, is) in old.iter_mut().zip(new) {
        was.operation = is.operation;
        was.bodies = is.bodies;
    }
    drop(old);
    let held = driver.hold_user_objects(graph)?;
    let before = {
        let mut objects = exec.user_objects.lock().expect("no panic holds this lock");
        std::mem::replace(&mut *objects, held)
    };
    release_all(&before);
    Ok(Ok(()))
}

/// `CUDA_GRAPH_INSTANTIATE_PARAMS`.
#[repr(C)]
pub(crate) struct InstantiateParams {
    flags: u64,
    stream: Handle,
    error_node: Handle,
    result: u32,
}

/// `CUgraphExecUpdateResultInfo`.
#[repr(C)]
pub(crate) struct UpdateResultInfo {
    result: u32,
    node: Handle,
    from: Handle,
}

entry_points! {
    fn cuGraphCreate(graph: *mut Handle, flags: u32) {
        if flags != 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        put(graph, initialised()?.graphs.insert(Arc::default()))
    }

    fn cuGraphClone(copy: *mut Handle, graph: Handle) {
        put(copy, initialised()?.clone_graph(graph, false)?)
    }

    fn cuGraphNodeFindInClone(twin: *mut Handle, node: Handle, copy: Handle) {
        let copy = initialised()?.graphs.get(copy)?;
        let copy = copy.lock().expect("no panic holds this lock");
        let found = copy.originals.iter().find(|(_, original)| **original == node);
        put(twin, *found.ok_or(ERROR_INVALID_VALUE)?.0)
    }

    fn cuGraphDestroy(graph: Handle) {
        let driver = initialised()?;
        if driver.graphs.get(graph)?.lock().expect("no panic holds this lock").owned {
            return Err(ERROR_INVALID_VALUE);
        }
        driver.destroy_graph(graph)
    }

    fn cuGraphDestroyNode(node: Handle) {
        let driver = initialised()?;
        let graph = driver.graphs.get(driver.nodes.get(node)?)?;
        let mut graph = graph.lock().expect("no panic holds this lock");
        if graph.has_memory_nodes() {
            return Err(ERROR_NOT_SUPPORTED);
        }
        driver.nodes.remove(node)?;
        let removed = graph.nodes.remove(&node);
        graph.nodes.values_mut().for_each(|other| other.after.retain(|(from, _)| *from != node));
        let removed = removed.ok_or(ERROR_INVALID_VALUE)?.operation;
        removed.bodies().iter().try_for_each(|body| driver.destroy_graph(*body))
    }

    fn cuGraphGetNodes(graph: Handle, nodes: *mut Handle, count: *mut usize) {
        let graph = initialised()?.graphs.get(graph)?;
        let graph = graph.lock().expect("no panic holds this lock");
        let found: Vec<_> = graph.nodes.keys().map(|n| (*n, EdgeData::default())).collect();
        one(nodes, std::ptr::null_mut(), count).fill_one(&found)
    }

    fn cuGraphGetRootNodes(graph: Handle, nodes: *mut Handle, count: *mut usize) {
        let graph = initialised()?.graphs.get(graph)?;
        let graph = graph.lock().expect("no panic holds this lock");
        let roots = graph.nodes.iter().filter(|(_, node)| node.after.is_empty());
        let found: Vec<_> = roots.map(|(n, _)| (*n, EdgeData::default())).collect();
        one(nodes, std::ptr::null_mut(), count).fill_one(&found)
    }

    fn cuGraphGetEdges(graph: Handle, from: *mut Handle, to: *mut Handle, count: *mut usize) {
        let data = std::ptr::null_mut();
        List { nodes: [from, to], data, count }.fill(&edges_of(graph)?)
    }

    fn cuGraphGetEdges_v2(
        graph: Handle,
        from: *mut Handle,
        to: *mut Handle,
        data: *mut EdgeData,
        count: *mut usize,
    ) {
        List { nodes: [from, to], data, count }.fill(&edges_of(graph)?)
    }

    fn cuGraphNodeGetDependencies(node: Handle, nodes: *mut Handle, count: *mut usize) {
        one(nodes, std::ptr::null_mut(), count).fill_one(&initialised()?.node(node)?.after)
    }

    fn cuGraphNodeGetDependencies_v2(
        node: Handle,
        nodes: *mut Handle,
        data: *mut EdgeData,
        count: *mut usize,
    ) {
        one(nodes, data, count).fill_one(&initialised()?.node(node)?.after)
    }

    fn cuGraphNodeGetDependentNodes(node: Handle, nodes: *mut Handle, count: *mut usize) {
        one(nodes, std::ptr::null_mut(), count).fill_one(&dependents(node)?)
    }

    fn cuGraphNodeGetDependentNodes_v2(
        node: Handle,
        nodes: *mut Handle,
        data: *mut EdgeData,
        count: *mut usize,
    ) {
        one(nodes, data, count).fill_one(&dependents(node)?)
    }

    fn cuGraphAddDependencies(graph: Handle, from: *const Handle, to: *const Handle, count: usize) {
        change_edges(graph, (from, to), std::ptr::null(), count, true)
    }

    fn cuGraphAddDependencies_v2(
        graph: Handle,
        from: *const Handle,
        to: *const Handle,
        data: *const EdgeData,
        count: usize,
    ) {
        change_edges(graph, (from, to), data, count, true)
    }

    fn cuGraphRemoveDependencies(
        graph: Handle,
        from: *const Handle,
        to: *const Handle,
        count: usize,
    ) {
        change_edges(graph, (from, to), std::ptr::null(), count, false)
    }

    fn cuGraphRemoveDependencies_v2(
        graph: Handle,
        from: *const Handle,
        to: *const Handle,
        data: *const EdgeData,
        count: usize,
    ) {
        change_edges(graph, (from, to), data, count, false)
    }

    fn cuGraphNodeGetType(node: Handle, kind: *mut u32) {
        put(kind, initialised()?.node(node)?.operation.kind())
    }

    fn cuGraphNodeGetContainingGraph(node: Handle, graph: *mut Handle) {
        put(graph, initialised()?.nodes.get(node)?)
    }

    fn cuGraphInstantiateWithFlags(exec: *mut Handle, graph: Handle, flags: u64) {
        put(exec, instantiate(initialised()?, graph, flags)?)
    }

    fn cuGraphInstantiate_v2(
        exec: *mut Handle,
        graph: Handle,
        error_node: *mut Handle,
        log: *mut u8,
        bytes: usize,
    ) {
        if !error_node.is_null() {
            put(error_node, 0)?;
        }
        if !log.is_null() && bytes > 0 {
            put(log, 0)?;
        }
        put(exec, instantiate(initialised()?, graph, 0)?)
    }

    fn cuGraphInstantiateWithParams(
        exec: *mut Handle,
        graph: Handle,
        params: *mut InstantiateParams,
    ) {
        let params = params.as_mut().ok_or(ERROR_INVALID_VALUE)?;
        let made = instantiate(initialised()?, graph, params.flags);
        params.error_node = 0;
        params.result = u32::from(made.is_err());
        put(exec, made?)
    }

    fn cuGraphExecGetFlags(exec: Handle, flags: *mut u64) {
        put(flags, initialised()?.execs.get(exec)?.flags)
    }

    // Numbers that no other graph or node has.
    fn cuGraphGetId(graph: Handle, id: *mut u32) {
        initialised()?.graphs.get(graph)?;
        put(id, (graph / HANDLE_STEP) as u32)
    }

    fn cuGraphNodeGetLocalId(node: Handle, id: *mut u32) {
        initialised()?.nodes.get(node)?;
        put(id, (node / HANDLE_STEP) as u32)
    }

    fn cuGraphNodeGetToolsId(node: Handle, id: *mut u64) {
        initialised()?.nodes.get(node)?;
        put(id, (node / HANDLE_STEP) as u64)
    }

    fn cuGraphExecGetId(exec: Handle, id: *mut u32) {
        put(id, initialised()?.execs.get(exec)?.id as u32)
    }

    fn cuGraphExecUpdate(exec: Handle, graph: Handle, node: *mut Handle, result: *mut u32) {
        let updated = update(exec, graph)?;
        let (reason, at) = updated.err().unwrap_or_default();
        let _ = put(node, at);
        put(result, reason)?;
        updated.map_err(|_| ERROR_GRAPH_EXEC_UPDATE_FAILURE)
    }

    fn cuGraphExecUpdate_v2(exec: Handle, graph: Handle, info: *mut UpdateResultInfo) {
        let updated = update(exec, graph)?;
        let (result, node) = updated.err().unwrap_or_default();
        put(info, UpdateResultInfo { result, node, from: 0 })?;
        updated.map_err(|_| ERROR_GRAPH_EXEC_UPDATE_FAILURE)
    }

    fn cuGraphNodeSetEnabled(exec: Handle, node: Handle, enabled: u32) {
        with_step(exec, node, |step| {
            // Kernels, copies and fills can be switched off.
            if step.operation.kind() > 2 {
                return Err(ERROR_INVALID_VALUE);
            }
            step.enabled = enabled != 0;
            Ok(())
        })
    }

    fn cuGraphNodeGetEnabled(exec: Handle, node: Handle, enabled: *mut u32) {
        put(enabled, with_step(exec, node, |step| Ok(u32::from(step.enabled)))?)
    }

    fn cuGraphConditionalHandleCreate(
        condition: *mut DevicePtr,
        graph: Handle,
        context: Handle,
        default: u32,
        flags: u32,
    ) {
        const ASSIGN_DEFAULT: u32 = 1;
        let _ = context;
        let driver = initialised()?;
        driver.graphs.get(graph)?;
        if flags > ASSIGN_DEFAULT {
            return Err(ERROR_INVALID_VALUE);
        }
        let default = (flags == ASSIGN_DEFAULT).then_some(default);
        let at = driver.alloc_current(4)?;
        driver.devices[0].memory().write(at, &[0; 4]).map_err(|_| ERROR_OUT_OF_MEMORY)?;
        let made = Condition { graph, default };
        driver.conditions.lock().expect("no panic holds this lock").insert(at, made);
        put(condition, at)
    }

    fn cuGraphLaunch(exec: Handle, stream: Handle) {
        let exec = initialised()?.execs.get(exec)?;
        initialised()?.submit(stream, Operation::Graph(exec))
    }

    fn cuGraphUpload(exec: Handle, stream: Handle) {
        let driver = initialised()?;
        driver.stream(stream)?;
        driver.execs.get(exec).map(|_| ())
    }

    fn cuGraphExecDestroy(exec: Handle) { initialised()?.execs.remove(exec).map(|_| ()) }

    fn cuGraphDebugDotPrint(graph: Handle, path: *const c_char, flags: u32) {
        let _ = flags;
        let driver = initialised()?;
        let mut dot = String::from("digraph {\n");
        for node in driver.graphs.get(graph)?.lock().expect("no panic holds this lock").nodes.iter() {
            dot += &format!("  n{:x} [label=\"{}\"];\n", node.0, node.1.operation.name());
        }
        for ([from, to], _) in edges_of(graph)? {
            dot += &format!("  n{from:x} -> n{to:x};\n");
        }
        dot.push_str("}\n");
        std::fs::write(text(path)?, dot).map_err(|_| ERROR_OPERATING_SYSTEM)
    }
}
