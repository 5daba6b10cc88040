//! Nodes of graphs by their type: making them, and reading and changing what they do.

use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use super::graph::{edges, with_step};
use super::launch::{Attributes, config, pack, shape};
use super::{entry_points, put};
use crate::abi::*;
use crate::graph::{EdgeData, Graph, Step};
use crate::operation::{Choice, Conditional, Fill, Launch, Operation};
use crate::state::{R, initialised};

/// `CUDA_KERNEL_NODE_PARAMS`; the second version has two more fields.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct KernelParams {
    function: Handle,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    params: *const *const u8,
    extra: *const *const c_void,
}

/// The second version of `CUDA_KERNEL_NODE_PARAMS`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct KernelParams2 {
    first: KernelParams,
    kernel: Handle,
    context: Handle,
}

/// `CUDA_MEMSET_NODE_PARAMS`; the second version has the context as one more field.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct FillParams {
    at: DevicePtr,
    pitch: usize,
    value: u32,
    element: u32,
    width: usize,
    height: usize,
}

/// `CUDA_HOST_NODE_PARAMS`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct HostParams {
    function: HostFn,
    data: usize,
}

/// `CUDA_MEMCPY_NODE_PARAMS`.
#[repr(C)]
#[derive(Clone, Copy)]
struct CopyParams {
    flags: i32,
    reserved: i32,
    context: Handle,
    copy: Memcpy3d,
}

/// `CUDA_MEM_ALLOC_NODE_PARAMS`: the pool's properties, who may access it, length, address.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct AllocParams {
    pool: [u64; 11],
    access: usize,
    access_count: usize,
    bytes: usize,
    at: DevicePtr,
}

/// `CUDA_CONDITIONAL_NODE_PARAMS`: the condition, how it chooses, how many graphs; where the
/// driver says which these are.
#[repr(C)]
pub(crate) struct ConditionalParams {
    condition: DevicePtr,
    choice: u32,
    count: u32,
    bodies: *const Handle,
    context: Handle,
}

/// `CUgraphNodeParams`: the type, and a union.
#[repr(C)]
pub(crate) struct NodeParams {
    kind: u32,
    reserved: [u32; 3],
    value: [u64; 29],
}

/// # Safety
/// As cuda.h has them: a pointer a parameter, or a packed buffer.
unsafe fn launch(p: &KernelParams, kernel: Handle) -> R<Operation> {
    let driver = initialised()?;
    let handle = if p.function != 0 { p.function } else { kernel };
    let callable = driver.callable(handle)?;
    // SAFETY: the caller's promise.
    let params = unsafe { pack(&callable.function, p.params, p.extra)? };
    let shape = shape(p.grid, p.block, p.shared_bytes, 0);
    let plain = Attributes { cluster: [1; 3], ..Attributes::default() };
    let config = config(&callable, &shape, &plain, params);
    Ok(Operation::Launch(Launch { handle, callable, config }))
}

fn fill(p: &FillParams) -> Operation {
    Operation::Fill(Fill {
        at: p.at,
        pitch: if p.pitch == 0 { p.width * p.element as usize } else { p.pitch },
        value: p.value,
        element: p.element as usize,
        width: p.width,
        height: p.height,
    })
}

fn child(graph: Handle) -> R<Operation> {
    Ok(Operation::Child(initialised()?.clone_graph(graph, true)?))
}

fn alloc(params: &mut AllocParams) -> R<Operation> {
    let driver = initialised()?;
    params.at = super::memory::alloc(driver.current()?, params.bytes)?;
    Ok(Operation::Alloc(params.at, params.bytes))
}

/// A list of graphs that is the client's for as long as the process lives.
fn list(graphs: &[Handle]) -> *const Handle {
    let told: &'static [Handle] = graphs.to_vec().leak();
    told.as_ptr()
}

/// A conditional node with empty graphs, which the client fills.
fn conditional(params: &mut ConditionalParams, graph: Handle) -> R<Operation> {
    let driver = initialised()?;
    let condition = params.condition;
    let made_for = {
        let known = driver.conditions.lock().expect("no panic holds this lock");
        known.get(&condition).ok_or(ERROR_INVALID_VALUE)?.graph
    };
    let choice = match (params.choice, params.count) {
        (0, 1 | 2) => Choice::If,
        (1, 1) => Choice::While,
        (2, 1..) => Choice::Switch,
        _ => return Err(ERROR_INVALID_VALUE),
    };
    // An inner graph may use what the graph around it was given.
    let inner = driver.graphs.get(graph)?.lock().expect("no panic holds this lock").owned;
    if made_for != graph && !inner {
        return Err(ERROR_INVALID_VALUE);
    }
    let body = |_| {
        let graph = Graph { owned: true, ..Graph::default() };
        driver.graphs.insert(Arc::new(Mutex::new(graph)))
    };
    let bodies: Vec<Handle> = (0..params.count).map(body).collect();
    params.bodies = list(&bodies);
    Ok(Operation::Conditional(Conditional { condition, choice, bodies }))
}

/// What the parameters of any type say.
///
/// # Safety
/// The parameters are the client's.
unsafe fn operation(params: &mut NodeParams, graph: Handle) -> R<Operation> {
    let value = params.value.as_mut_ptr();
    // SAFETY: the union's member is the one that the type names.
    unsafe {
        Ok(match params.kind {
            0 => {
                let p = value.cast::<KernelParams2>().read();
                launch(&p.first, p.kernel)?
            }
            1 => Operation::Copy(value.cast::<CopyParams>().read().copy),
            2 => fill(&value.cast::<FillParams>().read()),
            3 => {
                let p = value.cast::<HostParams>().read();
                Operation::Host(p.function, p.data)
            }
            4 => child(value.read() as Handle)?,
            5 => Operation::Nothing,
            6 => Operation::WaitEvent(value.read() as Handle),
            7 => Operation::Record(value.read() as Handle),
            10 => alloc(&mut *value.cast::<AllocParams>())?,
            11 => free(value.read())?,
            13 => conditional(&mut *value.cast::<ConditionalParams>(), graph)?,
            other => {
                initialised()?.name_unsupported(&format!("graph nodes of type {other}"));
                return Err(ERROR_NOT_SUPPORTED);
            }
        })
    }
}

/// The operation that frees memory, which there must be.
fn free(at: DevicePtr) -> R<Operation> {
    if at == 0 { Err(ERROR_INVALID_VALUE) } else { Ok(Operation::Free(at)) }
}

/// What a node does as the parameters by which it could be made.
fn params_of(node: Handle) -> R<NodeParams> {
    let operation = initialised()?.node(node)?.operation;
    let mut params = NodeParams { kind: operation.kind(), reserved: [0; 3], value: [0; 29] };
    let value = params.value.as_mut_ptr();
    // SAFETY: the union has room for each of its members.
    unsafe {
        match &operation {
            Operation::Launch(_) => {
                let first = kernel_params(node)?;
                value.cast::<KernelParams2>().write(KernelParams2 { first, kernel: 0, context: 0 });
            }
            // Flags, the context, the copy.
            Operation::Copy(copy) => value.add(2).cast::<Memcpy3d>().write(*copy),
            Operation::Fill(fill) => value.cast::<FillParams>().write(fill_params(fill)),
            Operation::Host(function, data) => {
                let params = HostParams { function: *function, data: *data };
                value.cast::<HostParams>().write(params);
            }
            Operation::Child(graph) => value.write(*graph as u64),
            Operation::WaitEvent(event) | Operation::Record(event) => value.write(*event as u64),
            Operation::Alloc(at, bytes) => {
                value.cast::<AllocParams>().write(alloc_params(*at, *bytes));
            }
            Operation::Free(at) => value.write(*at),
            Operation::Conditional(c) => {
                value.cast::<ConditionalParams>().write(ConditionalParams {
                    condition: c.condition,
                    choice: c.choice as u32,
                    count: c.bodies.len() as u32,
                    bodies: list(&c.bodies),
                    context: 0,
                });
            }
            _ => {}
        }
    }
    Ok(params)
}

fn fill_params(fill: &Fill) -> FillParams {
    let Fill { at, pitch, value, element, width, height } = *fill;
    FillParams { at, pitch, value, element: element as u32, width, height }
}

fn alloc_params(at: DevicePtr, bytes: usize) -> AllocParams {
    AllocParams { pool: [0; 11], access: 0, access_count: 0, bytes, at }
}

/// Where a new node goes: its graph, what it waits for, and where its handle is wanted.
struct Place {
    node: *mut Handle,
    graph: Handle,
    after: *const Handle,
    data: *const EdgeData,
    count: usize,
}

impl Place {
    fn new(node: *mut Handle, graph: Handle, after: *const Handle, count: usize) -> Place {
        Place { node, graph, after, data: std::ptr::null(), count }
    }

    /// # Safety
    /// The pointers are the client's.
    unsafe fn add(self, operation: Operation) -> R {
        operation.check()?;
        // SAFETY: the caller's promise.
        unsafe {
            let after = edges(self.after, self.data, self.count);
            put(self.node, initialised()?.add_node(self.graph, after, operation)?)
        }
    }
}

/// Replaces what a node does, by something of the same type.
fn set(node: Handle, operation: Operation) -> R {
    operation.check()?;
    initialised()?.with_node(node, |node| {
        if node.operation.kind() != operation.kind() {
            return Err(ERROR_INVALID_VALUE);
        }
        node.operation = operation;
        Ok(())
    })
}

/// As [`set`], in an executable graph.
fn set_step(exec: Handle, node: Handle, operation: Operation) -> R {
    operation.check()?;
    let driver = initialised()?;
    let bodies =
        operation.bodies().iter().map(|body| driver.steps(*body)).collect::<R<Vec<_>>>()?;
    let lengths = |bodies: &[Vec<Step>]| bodies.iter().map(Vec::len).collect::<Vec<_>>();
    with_step(exec, node, |step| {
        let same = lengths(&step.bodies) == lengths(&bodies);
        if step.operation.kind() != operation.kind() || !same {
            return Err(ERROR_INVALID_VALUE);
        }
        step.operation = operation;
        step.bodies = bodies;
        Ok(())
    })
}

/// A launch's parameters as cuda.h has them. The block and its pointers are the client's for as
/// long as the process lives.
fn kernel_params(node: Handle) -> R<KernelParams> {
    let Operation::Launch(launch) = initialised()?.node(node)?.operation else {
        return Err(ERROR_INVALID_VALUE);
    };
    let block: &'static [u8] = launch.config.params.clone().leak();
    let params = launch.callable.function.params();
    let pointers: Vec<*const u8> = params.iter().map(|p| block[p.offset..].as_ptr()).collect();
    let pointers: &'static [*const u8] = pointers.leak();
    Ok(KernelParams {
        function: launch.handle,
        grid: launch.config.grid,
        block: launch.config.block,
        shared_bytes: launch.config.dynamic_shared_bytes,
        params: pointers.as_ptr(),
        extra: std::ptr::null(),
    })
}

fn event_of(node: Handle) -> R<Handle> {
    match initialised()?.node(node)?.operation {
        Operation::Record(event) | Operation::WaitEvent(event) => Ok(event),
        _ => Err(ERROR_INVALID_VALUE),
    }
}

entry_points! {
    fn cuGraphAddKernelNode(
        node: *mut Handle,
        graph: Handle,
        after: *const Handle,
        count: usize,
        params: *const KernelParams,
    ) {
        let params = params.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        Place::new(node, graph, after, count).add(launch(params, 0)?)
    }

    fn cuGraphAddKernelNode_v2(
        node: *mut Handle,
        graph: Handle,
        after: *const Handle,
        count: usize,
        params: *const KernelParams2,
    ) {
        let params = params.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        Place::new(node, graph, after, count).add(launch(&params.first, params.kernel)?)
    }

    fn cuGraphAddMemcpyNode(
        node: *mut Handle,
        graph: Handle,
        after: *const Handle,
        count: usize,
        copy: *const Memcpy3d,
        context: Handle,
    ) {
        let _ = context;
        let copy = *copy.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        Place::new(node, graph, after, count).add(Operation::Copy(copy))
    }

    fn cuGraphAddMemsetNode(
        node: *mut Handle,
        graph: Handle,
        after: *const Handle,
        count: usize,
        params: *const FillParams,
        context: Handle,
    ) {
        let _ = context;
        let params = params.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        Place::new(node, graph, after, count).add(fill(params))
    }

    fn cuGraphAddHostNode(
        node: *mut Handle,
        graph: Handle,
        after: *const Handle,
        count: usize,
        params: *const HostParams,
    ) {
        let params = params.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        let operation = Operation::Host(params.function, params.data);
        Place::new(node, graph, after, count).add(operation)
    }

    fn cuGraphAddChildGraphNode(
        node: *mut Handle,
        graph: Handle,
        after: *const Handle,
        count: usize,
        inner: Handle,
    ) {
        Place::new(node, graph, after, count).add(child(inner)?)
    }

    fn cuGraphAddEmptyNode(node: *mut Handle, graph: Handle, after: *const Handle, count: usize) {
        Place::new(node, graph, after, count).add(Operation::Nothing)
    }

    fn cuGraphAddEventRecordNode(
        node: *mut Handle,
        graph: Handle,
        after: *const Handle,
        count: usize,
        event: Handle,
    ) {
        initialised()?.events.get(event)?;
        Place::new(node, graph, after, count).add(Operation::Record(event))
    }

    fn cuGraphAddEventWaitNode(
        node: *mut Handle,
        graph: Handle,
        after: *const Handle,
        count: usize,
        event: Handle,
    ) {
        initialised()?.events.get(event)?;
        Place::new(node, graph, after, count).add(Operation::WaitEvent(event))
    }

    fn cuGraphAddMemAllocNode(
        node: *mut Handle,
        graph: Handle,
        after: *const Handle,
        count: usize,
        params: *mut AllocParams,
    ) {
        let operation = alloc(params.as_mut().ok_or(ERROR_INVALID_VALUE)?)?;
        Place::new(node, graph, after, count).add(operation)
    }

    fn cuGraphAddMemFreeNode(
        node: *mut Handle,
        graph: Handle,
        after: *const Handle,
        count: usize,
        at: DevicePtr,
    ) {
        Place::new(node, graph, after, count).add(free(at)?)
    }

    fn cuGraphAddNode(
        node: *mut Handle,
        graph: Handle,
        after: *const Handle,
        count: usize,
        params: *mut NodeParams,
    ) {
        let operation = operation(params.as_mut().ok_or(ERROR_INVALID_VALUE)?, graph)?;
        Place::new(node, graph, after, count).add(operation)
    }

    fn cuGraphAddNode_v3(
        node: *mut Handle,
        graph: Handle,
        after: *const Handle,
        data: *const EdgeData,
        count: usize,
        params: *mut NodeParams,
    ) {
        let operation = operation(params.as_mut().ok_or(ERROR_INVALID_VALUE)?, graph)?;
        Place { data, ..Place::new(node, graph, after, count) }.add(operation)
    }

    fn cuGraphNodeGetParams(node: Handle, params: *mut NodeParams) {
        put(params, params_of(node)?)
    }

    fn cuGraphNodeSetParams_v2(node: Handle, params: *mut NodeParams) {
        set(node, operation(params.as_mut().ok_or(ERROR_INVALID_VALUE)?, initialised()?.nodes.get(node)?)?)
    }

    fn cuGraphExecNodeSetParams(exec: Handle, node: Handle, params: *mut NodeParams) {
        set_step(exec, node, operation(params.as_mut().ok_or(ERROR_INVALID_VALUE)?, initialised()?.nodes.get(node)?)?)
    }

    fn cuGraphKernelNodeGetParams(node: Handle, params: *mut KernelParams) {
        put(params, kernel_params(node)?)
    }

    fn cuGraphKernelNodeGetParams_v2(node: Handle, params: *mut KernelParams2) {
        put(params, KernelParams2 { first: kernel_params(node)?, kernel: 0, context: 0 })
    }

    fn cuGraphKernelNodeSetParams(node: Handle, params: *const KernelParams) {
        set(node, launch(params.as_ref().ok_or(ERROR_INVALID_VALUE)?, 0)?)
    }

    fn cuGraphKernelNodeSetParams_v2(node: Handle, params: *const KernelParams2) {
        let params = params.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        set(node, launch(&params.first, params.kernel)?)
    }

    fn cuGraphExecKernelNodeSetParams(exec: Handle, node: Handle, params: *const KernelParams) {
        set_step(exec, node, launch(params.as_ref().ok_or(ERROR_INVALID_VALUE)?, 0)?)
    }

    fn cuGraphExecKernelNodeSetParams_v2(
        exec: Handle,
        node: Handle,
        params: *const KernelParams2,
    ) {
        let params = params.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        set_step(exec, node, launch(&params.first, params.kernel)?)
    }

    // Attributes of kernel nodes: a cluster or cooperation is part of the launch, others are hints.
    fn cuGraphKernelNodeCopyAttributes(to: Handle, from: Handle) {
        initialised()?.node(to)?;
        initialised()?.node(from).map(|_| ())
    }

    fn cuGraphKernelNodeGetAttribute(node: Handle, attribute: u32, value: *mut [u32; 16]) {
        let Operation::Launch(launch) = initialised()?.node(node)?.operation else {
            return Err(ERROR_INVALID_VALUE);
        };
        let mut found = [0; 16];
        match attribute {
            ATTRIBUTE_COOPERATIVE => found[0] = u32::from(launch.config.cooperative),
            ATTRIBUTE_CLUSTER_DIMENSION => found[..3].copy_from_slice(&launch.config.cluster),
            _ => {}
        }
        put(value, found)
    }

    fn cuGraphKernelNodeSetAttribute(node: Handle, attribute: u32, value: *const [u32; 16]) {
        let value = *value.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        initialised()?.with_node(node, |node| {
            let Operation::Launch(launch) = &mut node.operation else {
                return Err(ERROR_INVALID_VALUE);
            };
            match attribute {
                ATTRIBUTE_COOPERATIVE => launch.config.cooperative = value[0] != 0,
                ATTRIBUTE_CLUSTER_DIMENSION => {
                    launch.config.cluster = [value[0], value[1], value[2]];
                }
                _ => {}
            }
            Ok(())
        })
    }

    fn cuGraphMemcpyNodeGetParams(node: Handle, copy: *mut Memcpy3d) {
        match initialised()?.node(node)?.operation {
            Operation::Copy(found) => put(copy, found),
            _ => Err(ERROR_INVALID_VALUE),
        }
    }

    fn cuGraphMemcpyNodeSetParams(node: Handle, copy: *const Memcpy3d) {
        set(node, Operation::Copy(*copy.as_ref().ok_or(ERROR_INVALID_VALUE)?))
    }

    fn cuGraphExecMemcpyNodeSetParams(
        exec: Handle,
        node: Handle,
        copy: *const Memcpy3d,
        context: Handle,
    ) {
        let _ = context;
        set_step(exec, node, Operation::Copy(*copy.as_ref().ok_or(ERROR_INVALID_VALUE)?))
    }

    fn cuGraphMemsetNodeGetParams(node: Handle, params: *mut FillParams) {
        let Operation::Fill(f) = initialised()?.node(node)?.operation else {
            return Err(ERROR_INVALID_VALUE);
        };
        put(params, fill_params(&f))
    }

    fn cuGraphMemsetNodeSetParams(node: Handle, params: *const FillParams) {
        set(node, fill(params.as_ref().ok_or(ERROR_INVALID_VALUE)?))
    }

    fn cuGraphExecMemsetNodeSetParams(
        exec: Handle,
        node: Handle,
        params: *const FillParams,
        context: Handle,
    ) {
        let _ = context;
        set_step(exec, node, fill(params.as_ref().ok_or(ERROR_INVALID_VALUE)?))
    }

    fn cuGraphHostNodeGetParams(node: Handle, params: *mut HostParams) {
        match initialised()?.node(node)?.operation {
            Operation::Host(function, data) => put(params, HostParams { function, data }),
            _ => Err(ERROR_INVALID_VALUE),
        }
    }

    fn cuGraphHostNodeSetParams(node: Handle, params: *const HostParams) {
        let p = params.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        set(node, Operation::Host(p.function, p.data))
    }

    fn cuGraphExecHostNodeSetParams(exec: Handle, node: Handle, params: *const HostParams) {
        let p = params.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        set_step(exec, node, Operation::Host(p.function, p.data))
    }

    fn cuGraphChildGraphNodeGetGraph(node: Handle, graph: *mut Handle) {
        match initialised()?.node(node)?.operation {
            Operation::Child(found) => put(graph, found),
            _ => Err(ERROR_INVALID_VALUE),
        }
    }

    fn cuGraphExecChildGraphNodeSetParams(exec: Handle, node: Handle, graph: Handle) {
        set_step(exec, node, Operation::Child(graph))
    }

    fn cuGraphEventRecordNodeGetEvent(node: Handle, event: *mut Handle) {
        put(event, event_of(node)?)
    }

    fn cuGraphEventWaitNodeGetEvent(node: Handle, event: *mut Handle) {
        put(event, event_of(node)?)
    }

    fn cuGraphEventRecordNodeSetEvent(node: Handle, event: Handle) {
        initialised()?.events.get(event)?;
        set(node, Operation::Record(event))
    }

    fn cuGraphEventWaitNodeSetEvent(node: Handle, event: Handle) {
        initialised()?.events.get(event)?;
        set(node, Operation::WaitEvent(event))
    }

    fn cuGraphExecEventRecordNodeSetEvent(exec: Handle, node: Handle, event: Handle) {
        initialised()?.events.get(event)?;
        set_step(exec, node, Operation::Record(event))
    }

    fn cuGraphExecEventWaitNodeSetEvent(exec: Handle, node: Handle, event: Handle) {
        initialised()?.events.get(event)?;
        set_step(exec, node, Operation::WaitEvent(event))
    }

    fn cuGraphMemAllocNodeGetParams(node: Handle, params: *mut AllocParams) {
        match initialised()?.node(node)?.operation {
            Operation::Alloc(at, bytes) => put(params, alloc_params(at, bytes)),
            _ => Err(ERROR_INVALID_VALUE),
        }
    }

    fn cuGraphMemFreeNodeGetParams(node: Handle, at: *mut DevicePtr) {
        match initialised()?.node(node)?.operation {
            Operation::Free(found) => put(at, found),
            _ => Err(ERROR_INVALID_VALUE),
        }
    }
}
