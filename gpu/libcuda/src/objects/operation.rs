//! What a stream or a graph is given to do, as data that clients can read back and change.

use std::ffi::c_void;
use std::sync::Arc;

use fathom_emulator::LaunchConfig;

use super::event::Event;
use super::graph::Exec;
use super::program::Callable;
use crate::abi::*;

/// Something to do, in a stream or as a node of a graph.
#[derive(Clone)]
pub(crate) enum Operation {
    Nothing,
    Launch(Launch),
    Copy(Memcpy3d),
    Fill(Fill),
    /// A function of the client and its argument.
    Host(HostFn, usize),
    /// As `Host`, with the stream before it.
    Callback(unsafe extern "C" fn(Handle, CuResult, *mut c_void), Handle, usize),
    Record(Handle),
    WaitEvent(Handle),
    /// Until so many records of an event that processes share are done.
    WaitShared(Arc<Event>, u32),
    /// A graph as a node.
    Child(Handle),
    /// Graphs of which a condition chooses.
    Conditional(Conditional),
    /// Memory that a node allocated: address and length.
    Alloc(DevicePtr, usize),
    Free(DevicePtr),
    /// An executable graph.
    Graph(Arc<Exec>),
    Write(Value),
    WaitValue(Value, Comparison),
}

/// A kernel launch.
#[derive(Clone)]
pub(crate) struct Launch {
    /// The handle that the client gave: a `CUfunction` or a `CUkernel`.
    pub handle: Handle,
    pub callable: Arc<Callable>,
    pub config: LaunchConfig,
}

/// A node that runs one of its graphs, or none, or one again and again.
#[derive(Clone)]
pub(crate) struct Conditional {
    /// The word that kernels set: `CUgraphConditionalHandle`, an address of device memory.
    pub condition: DevicePtr,
    pub choice: Choice,
    pub bodies: Vec<Handle>,
}

/// How a condition's value chooses (`CUgraphConditionalNodeType`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// The first graph unless it is 0, else the second where there is one.
    If,
    /// The graph as long as it is not 0.
    While,
    /// The graph of that number, where there is one.
    Switch,
}

/// A rectangle of memory and what it is filled with (`CUDA_MEMSET_NODE_PARAMS`).
#[derive(Clone, Copy)]
pub(crate) struct Fill {
    pub at: DevicePtr,
    /// Bytes from one row to the next.
    pub pitch: usize,
    pub value: u32,
    /// Bytes of an element: 1, 2 or 4.
    pub element: usize,
    /// Elements of a row.
    pub width: usize,
    pub height: usize,
}

/// A word in memory: `bytes` is 4 or 8.
#[derive(Clone, Copy)]
pub(crate) struct Value {
    pub at: DevicePtr,
    pub value: u64,
    pub bytes: usize,
}

/// What a stream waits for in a word (`CUstreamWaitValue_flags`).
#[derive(Clone, Copy)]
pub(crate) enum Comparison {
    /// That it has reached the value, counting round.
    AtLeast,
    Equal,
    And,
    Nor,
}

impl Operation {
    /// `CUgraphNodeType` of it as a node, and the type's name.
    fn node_type(&self) -> (u32, &'static str) {
        match self {
            Operation::Launch(_) => (0, "kernel"),
            Operation::Copy(_) => (1, "memcpy"),
            Operation::Fill(_) => (2, "memset"),
            Operation::Host(..) | Operation::Callback(..) => (3, "host"),
            Operation::Child(_) | Operation::Graph(_) => (4, "graph"),
            Operation::Nothing => (5, "empty"),
            Operation::Conditional(_) => (13, "conditional"),
            Operation::WaitEvent(_) | Operation::WaitShared(..) => (6, "wait for event"),
            Operation::Record(_) => (7, "record event"),
            Operation::Alloc(..) => (10, "allocation"),
            Operation::Free(_) => (11, "free"),
            Operation::Write(_) | Operation::WaitValue(..) => (12, "memory operation"),
        }
    }

    /// `CUgraphNodeType` of it as a node.
    pub(crate) fn kind(&self) -> u32 {
        self.node_type().0
    }

    /// Its node's name in pictures: what it is, and the kernel.
    pub(crate) fn name(&self) -> &str {
        match self {
            Operation::Launch(launch) => launch.callable.function.name(),
            other => other.node_type().1,
        }
    }

    /// The graphs that it holds.
    pub(crate) fn bodies(&self) -> &[Handle] {
        match self {
            Operation::Child(graph) => std::slice::from_ref(graph),
            Operation::Conditional(conditional) => &conditional.bodies,
            _ => &[],
        }
    }

    /// The same with each graph that it holds made anew.
    pub(crate) fn with_bodies(&self, mut make: impl FnMut(Handle) -> R<Handle>) -> R<Operation> {
        Ok(match self {
            Operation::Child(graph) => Operation::Child(make(*graph)?),
            Operation::Conditional(conditional) => {
                let bodies = conditional.bodies.iter().map(|b| make(*b)).collect::<R<_>>()?;
                Operation::Conditional(Conditional { bodies, ..conditional.clone() })
            }
            other => other.clone(),
        })
    }

    /// The events that it records and those that it waits for.
    pub(crate) fn events(&self, recorded: &mut Vec<Handle>, awaited: &mut Vec<Handle>) {
        match self {
            Operation::Record(event) => recorded.push(*event),
            Operation::WaitEvent(event) => awaited.push(*event),
            Operation::Graph(exec) => exec.events(recorded, awaited),
            _ => {}
        }
    }
}
