//! Parameters of graphs' nodes as cuda.h has them: what they say, and what a node's are.

use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use super::launch::{PLAIN, config, pack, shape};
use crate::abi::*;
use crate::driver::initialised;
use crate::objects::graph::Graph;
use crate::objects::operation::{Choice, Conditional, Fill, Launch, Operation};

/// `CUDA_KERNEL_NODE_PARAMS`; the second version has two more fields.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct KernelParams {
    pub function: Handle,
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
    pub first: KernelParams,
    pub kernel: Handle,
    pub context: Handle,
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
    pub function: HostFn,
    pub data: usize,
}

/// `CUDA_MEMCPY_NODE_PARAMS`.
#[repr(C)]
#[derive(Clone, Copy)]
struct CopyParams {
    flags: i32,
    reserved: i32,
    pub context: Handle,
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
    pub context: Handle,
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
pub(super) unsafe fn launch(p: &KernelParams, kernel: Handle) -> R<Operation> {
    let driver = initialised()?;
    let handle = if p.function != 0 { p.function } else { kernel };
    let callable = driver.callable(handle)?;
    // SAFETY: the caller's promise.
    let params = unsafe { pack(&callable.function, p.params, p.extra)? };
    let shape = shape(p.grid, p.block, p.shared_bytes, 0);
    let config = config(&callable, &shape, &PLAIN, params);
    Ok(Operation::Launch(Launch { handle, callable, config }))
}

pub(super) fn fill(p: &FillParams) -> Operation {
    Operation::Fill(Fill {
        at: p.at,
        pitch: if p.pitch == 0 { p.width * p.element as usize } else { p.pitch },
        value: p.value,
        element: p.element as usize,
        width: p.width,
        height: p.height,
    })
}

pub(super) fn child(graph: Handle) -> R<Operation> {
    Ok(Operation::Child(initialised()?.clone_graph(graph, true)?))
}

pub(super) fn alloc(params: &mut AllocParams) -> R<Operation> {
    let driver = initialised()?;
    params.at = driver.alloc_current(params.bytes)?;
    Ok(Operation::Alloc(params.at, params.bytes))
}

/// A list of graphs that is the client's for as long as the process lives.
fn list(graphs: &[Handle]) -> *const Handle {
    let told: &'static [Handle] = graphs.to_vec().leak();
    told.as_ptr()
}

/// A conditional node with empty graphs, which the client fills.
pub(super) fn conditional(params: &mut ConditionalParams, graph: Handle) -> R<Operation> {
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
pub(super) unsafe fn operation(params: &mut NodeParams, graph: Handle) -> R<Operation> {
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
pub(super) fn free(at: DevicePtr) -> R<Operation> {
    if at == 0 { Err(ERROR_INVALID_VALUE) } else { Ok(Operation::Free(at)) }
}

/// What a node does as the parameters by which it could be made.
pub(super) fn params_of(node: Handle) -> R<NodeParams> {
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

pub(super) fn fill_params(fill: &Fill) -> FillParams {
    let Fill { at, pitch, value, element, width, height } = *fill;
    FillParams { at, pitch, value, element: element as u32, width, height }
}

pub(super) fn alloc_params(at: DevicePtr, bytes: usize) -> AllocParams {
    AllocParams { pool: [0; 11], access: 0, access_count: 0, bytes, at }
}

/// A launch's parameters as cuda.h has them. The block and its pointers are the client's for as
/// long as the process lives.
pub(super) fn kernel_params(node: Handle) -> R<KernelParams> {
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
