//! Nodes of graphs by their type: making them, and reading and changing what they do.

use super::graph::{edges, with_step};
use super::node_params::{
    AllocParams, FillParams, HostParams, KernelParams, KernelParams2, NodeParams, alloc,
    alloc_params, child, fill, fill_params, free, kernel_params, launch, operation, params_of,
};
use super::{entry_points, put};
use crate::abi::*;
use crate::driver::initialised;
use crate::objects::graph::{EdgeData, Step};
use crate::objects::operation::Operation;

/// Where a new node goes: its graph, what it waits for, and where its handle is wanted.
struct NewNode {
    node: *mut Handle,
    graph: Handle,
    after: *const Handle,
    data: *const EdgeData,
    count: usize,
}

impl NewNode {
    fn new(node: *mut Handle, graph: Handle, after: *const Handle, count: usize) -> NewNode {
        NewNode { node, graph, after, data: std::ptr::null(), count }
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
        NewNode::new(node, graph, after, count).add(launch(params, 0)?)
    }

    fn cuGraphAddKernelNode_v2(
        node: *mut Handle,
        graph: Handle,
        after: *const Handle,
        count: usize,
        params: *const KernelParams2,
    ) {
        let params = params.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        NewNode::new(node, graph, after, count).add(launch(&params.first, params.kernel)?)
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
        NewNode::new(node, graph, after, count).add(Operation::Copy(copy))
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
        NewNode::new(node, graph, after, count).add(fill(params))
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
        NewNode::new(node, graph, after, count).add(operation)
    }

    fn cuGraphAddChildGraphNode(
        node: *mut Handle,
        graph: Handle,
        after: *const Handle,
        count: usize,
        inner: Handle,
    ) {
        NewNode::new(node, graph, after, count).add(child(inner)?)
    }

    fn cuGraphAddEmptyNode(node: *mut Handle, graph: Handle, after: *const Handle, count: usize) {
        NewNode::new(node, graph, after, count).add(Operation::Nothing)
    }

    fn cuGraphAddEventRecordNode(
        node: *mut Handle,
        graph: Handle,
        after: *const Handle,
        count: usize,
        event: Handle,
    ) {
        initialised()?.events.get(event)?;
        NewNode::new(node, graph, after, count).add(Operation::Record(event))
    }

    fn cuGraphAddEventWaitNode(
        node: *mut Handle,
        graph: Handle,
        after: *const Handle,
        count: usize,
        event: Handle,
    ) {
        initialised()?.events.get(event)?;
        NewNode::new(node, graph, after, count).add(Operation::WaitEvent(event))
    }

    fn cuGraphAddMemAllocNode(
        node: *mut Handle,
        graph: Handle,
        after: *const Handle,
        count: usize,
        params: *mut AllocParams,
    ) {
        let operation = alloc(params.as_mut().ok_or(ERROR_INVALID_VALUE)?)?;
        NewNode::new(node, graph, after, count).add(operation)
    }

    fn cuGraphAddMemFreeNode(
        node: *mut Handle,
        graph: Handle,
        after: *const Handle,
        count: usize,
        at: DevicePtr,
    ) {
        NewNode::new(node, graph, after, count).add(free(at)?)
    }

    fn cuGraphAddNode(
        node: *mut Handle,
        graph: Handle,
        after: *const Handle,
        count: usize,
        params: *mut NodeParams,
    ) {
        let operation = operation(params.as_mut().ok_or(ERROR_INVALID_VALUE)?, graph)?;
        NewNode::new(node, graph, after, count).add(operation)
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
        NewNode { data, ..NewNode::new(node, graph, after, count) }.add(operation)
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
