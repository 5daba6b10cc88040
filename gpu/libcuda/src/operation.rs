//! What a stream or a graph is given to do, as data that clients can read back and change.

use std::ffi::c_void;
use std::sync::Arc;

use fathom_emulator::LaunchConfig;
use fathom_emulator::memory::{DEVICE_BASE, DEVICE_STRIDE, Kind};

use crate::abi::*;
use crate::graph::Exec;
use crate::program::Callable;
use crate::queue::Work;
use crate::state::{Event, R, driver};

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

impl Conditional {
    /// The condition's value.
    pub(crate) fn value(&self) -> R<u32> {
        let mut word = [0; 4];
        let memory = driver().devices[0].memory();
        memory.read(self.condition, &mut word).map_err(|_| ERROR_ILLEGAL_ADDRESS)?;
        Ok(u32::from_le_bytes(word))
    }
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

/// One end of a copy.
#[derive(Clone, Copy)]
enum Place {
    /// An address of this process.
    Host(usize),
    /// An address of emulated memory.
    Device(DevicePtr),
}

use Place::{Device, Host};

impl Place {
    fn add(self, bytes: usize) -> Place {
        match self {
            Host(at) => Host(at + bytes),
            Device(at) => Device(at + bytes as u64),
        }
    }

    /// Which of both a unified address is: of emulated memory where the emulator knows it, or gives
    /// such addresses.
    fn of(address: u64) -> Place {
        let end = DEVICE_BASE + driver().devices.len() as u64 * DEVICE_STRIDE;
        let memory = driver().devices[0].memory();
        match memory.view().find(address) {
            Some(allocation) if *allocation.kind() != Kind::Host => Device(address),
            None if (DEVICE_BASE..end).contains(&address) => Device(address),
            _ => Host(address as usize),
        }
    }

    /// A device address, which is an error where the emulator does not know it.
    fn of_device(address: u64) -> Place {
        match driver().devices[0].memory().view().find(address) {
            None => Device(address),
            Some(_) => Self::of(address),
        }
    }

    /// Whether `bytes` from here on are memory that the driver knows nothing of: the client's own,
    /// neither pinned nor registered.
    fn is_pageable(self, bytes: usize) -> bool {
        let memory = driver().devices[0].memory();
        matches!(self, Host(at) if memory.view().locate(at as u64, bytes as u64).is_none())
    }
}

/// Copies bytes between any two places.
fn copy(to: Place, from: Place, bytes: usize) -> R {
    if bytes == 0 {
        return Ok(());
    }
    let memory = driver().devices[0].memory();
    let bad = |_| ERROR_INVALID_VALUE;
    match (to, from) {
        (Host(to), Host(from)) => {
            // SAFETY: both ranges are the client's.
            unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
            Ok(())
        }
        (Host(to), Device(from)) => {
            // SAFETY: the range is the client's; it may be uninitialised, and is only written.
            let out = unsafe { std::slice::from_raw_parts_mut(to as *mut u8, bytes) };
            memory.read(from, out).map_err(bad)
        }
        (Device(to), Host(from)) => {
            // SAFETY: the range is the client's.
            let data = unsafe { std::slice::from_raw_parts(from as *const u8, bytes) };
            memory.write(to, data).map_err(bad)
        }
        (Device(to), Device(from)) => memory.copy(to, from, bytes as u64).map_err(bad),
    }
}

/// Nanoseconds a copy takes on the emulated clock: PCIe towards the host, else device memory.
fn copy_ns(to: Place, from: Place, bytes: usize) -> u64 {
    let bytes_per_ns = match (to, from) {
        (Device(_), Device(_)) => 2000,
        _ => 50,
    };
    bytes as u64 / bytes_per_ns + 1000
}

/// An end of a copy: its first byte, and bytes from a row and from a slice to the next.
struct End {
    place: Place,
    row: usize,
    slice: usize,
}

impl End {
    /// Whether `rows` of `width` bytes lie without gaps.
    fn is_flat(&self, width: usize, rows: usize, slices: usize) -> bool {
        (rows == 1 || self.row == width) && (slices == 1 || self.slice == width * rows)
    }
}

impl Memcpy3d {
    /// A copy of one row.
    pub(crate) fn row(to: DevicePtr, from: DevicePtr, bytes: usize) -> Memcpy3d {
        Memcpy3d {
            src_type: MEMORY_UNIFIED,
            src_device: from,
            dst_type: MEMORY_UNIFIED,
            dst_device: to,
            width: bytes,
            height: 1,
            depth: 1,
            ..Memcpy3d::default()
        }
    }

    fn ends(&self) -> R<(End, End)> {
        let place = |kind, host, device| match kind {
            MEMORY_HOST => Ok(Host(host)),
            MEMORY_ARRAY => {
                driver().name_unsupported("CUDA arrays");
                Err(ERROR_NOT_SUPPORTED)
            }
            MEMORY_DEVICE => Ok(Place::of_device(device)),
            _ => Ok(Place::of(device)),
        };
        let end = |place: Place, [x, y, z]: [usize; 3], pitch: usize, height: usize| {
            let row = if pitch == 0 { self.width } else { pitch };
            let slice = row * if height == 0 { self.height } else { height };
            End { place: place.add(z * slice + y * row + x), row, slice }
        };
        let from = place(self.src_type, self.src_host, self.src_device)?;
        let to = place(self.dst_type, self.dst_host, self.dst_device)?;
        let from_at = [self.src_x, self.src_y, self.src_z];
        let to_at = [self.dst_x, self.dst_y, self.dst_z];
        Ok((
            end(to, to_at, self.dst_pitch, self.dst_height),
            end(from, from_at, self.src_pitch, self.src_height),
        ))
    }

    /// Refuses what does not lie within one allocation; true where an end is pageable memory, which
    /// copies do not leave to later.
    fn check(&self) -> R<bool> {
        let (to, from) = self.ends()?;
        if self.width * self.height * self.depth == 0 {
            return Ok(false);
        }
        let memory = driver().devices[0].memory();
        let mut pageable = false;
        for end in [&to, &from] {
            let bytes = (self.depth - 1) * end.slice + (self.height - 1) * end.row + self.width;
            match end.place {
                Host(0) => return Err(ERROR_INVALID_VALUE),
                Device(at) if memory.view().locate(at, bytes as u64).is_none() => {
                    return Err(ERROR_INVALID_VALUE);
                }
                place => pageable |= place.is_pageable(bytes),
            }
        }
        Ok(pageable)
    }

    fn run(&self, device: usize) -> R {
        let (to, from) = self.ends()?;
        let driver = driver();
        driver.devices[device].order_launches();
        let (width, rows, slices) = (self.width, self.height, self.depth);
        let bytes = width * rows * slices;
        driver.advance(device, copy_ns(to.place, from.place, bytes));
        if to.is_flat(width, rows, slices) && from.is_flat(width, rows, slices) {
            return copy(to.place, from.place, bytes);
        }
        for slice in 0..slices {
            for row in 0..rows {
                let at = |end: &End| end.place.add(slice * end.slice + row * end.row);
                copy(at(&to), at(&from), width)?;
            }
        }
        Ok(())
    }
}

impl Fill {
    fn check(&self) -> R {
        if !matches!(self.element, 1 | 2 | 4) || !self.at.is_multiple_of(self.element as u64) {
            return Err(ERROR_INVALID_VALUE);
        }
        if self.width * self.height == 0 {
            return Ok(());
        }
        let bytes = (self.height - 1) * self.pitch + self.width * self.element;
        let memory = driver().devices[0].memory();
        match memory.view().locate(self.at, bytes as u64) {
            Some(_) => Ok(()),
            None => Err(ERROR_INVALID_VALUE),
        }
    }

    fn run(&self, device: usize) -> R {
        driver().devices[device].order_launches();
        let memory = driver().devices[0].memory();
        let pattern = &self.value.to_le_bytes()[..self.element];
        // Rows without gaps are one.
        let flat = self.pitch == self.width * self.element;
        let (rows, width) =
            if flat { (1, self.width * self.height) } else { (self.height, self.width) };
        (0..rows).try_for_each(|row| {
            let at = self.at + (row * self.pitch) as u64;
            memory.fill(at, pattern, width as u64).map_err(|_| ERROR_INVALID_VALUE)
        })
    }
}

impl Value {
    fn check(&self) -> R {
        let view = driver().devices[0].memory().view();
        let aligned = self.at.is_multiple_of(self.bytes as u64);
        match view.locate(self.at, self.bytes as u64) {
            Some(_) if aligned => Ok(()),
            _ => Err(ERROR_INVALID_VALUE),
        }
    }

    fn write(&self) -> R {
        let bytes = &self.value.to_le_bytes()[..self.bytes];
        driver().devices[0].memory().write(self.at, bytes).map_err(|_| ERROR_INVALID_VALUE)
    }

    /// Whether the word in memory satisfies what is waited for; memory that is gone does.
    fn holds(&self, comparison: Comparison) -> bool {
        let mut bytes = [0; 8];
        if driver().devices[0].memory().read(self.at, &mut bytes[..self.bytes]).is_err() {
            return true;
        }
        let found = u64::from_le_bytes(bytes);
        let mask = if self.bytes == 4 { u64::from(u32::MAX) } else { u64::MAX };
        let value = self.value & mask;
        match comparison {
            Comparison::AtLeast if self.bytes == 4 => {
                (found as i32).wrapping_sub(value as i32) >= 0
            }
            Comparison::AtLeast => (found as i64).wrapping_sub(value as i64) >= 0,
            Comparison::Equal => found == value,
            Comparison::And => found & value != 0,
            Comparison::Nor => !(found | value) & mask != 0,
        }
    }
}

impl Operation {
    /// Refuses what cannot work; true where it must be done before the call returns, and not
    /// later.
    pub(crate) fn check(&self) -> R<bool> {
        match self {
            Operation::Copy(copy) => copy.check(),
            Operation::Fill(fill) => fill.check().map(|()| false),
            Operation::Write(value) | Operation::WaitValue(value, _) => {
                value.check().map(|()| false)
            }
            Operation::Launch(launch) => {
                driver().can_launch(&launch.callable.function, &launch.config).map(|()| false)
            }
            _ => Ok(false),
        }
    }

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

    /// Does it.
    pub(crate) fn run(&self, device: usize) -> R {
        let driver = driver();
        match self {
            Operation::Nothing
            | Operation::WaitEvent(_)
            | Operation::WaitShared(..)
            | Operation::Child(_)
            | Operation::Conditional(_)
            | Operation::WaitValue(..) => Ok(()),
            Operation::Launch(launch) => {
                driver.run(&[(launch.callable.function.clone(), launch.config.clone())])
            }
            Operation::Copy(copy) => copy.run(device),
            Operation::Fill(fill) => fill.run(device),
            Operation::Host(function, data) => {
                // SAFETY: the client's function with the client's data.
                unsafe { function(*data as *mut c_void) };
                Ok(())
            }
            Operation::Callback(function, stream, data) => {
                // SAFETY: the client's function with the client's data.
                unsafe { function(*stream, SUCCESS, *data as *mut c_void) };
                Ok(())
            }
            Operation::Record(event) => {
                // It may be destroyed before its time is taken.
                if let Ok(event) = driver.events.get(*event) {
                    event.taken(driver.now_ns(device));
                }
                Ok(())
            }
            Operation::Alloc(address, bytes) => driver.graph_allocates(device, *address, *bytes),
            // A pool gives 0 where no byte was asked for.
            Operation::Free(0) => Ok(()),
            Operation::Free(address) => driver.free(*address),
            Operation::Graph(exec) => exec.run(device),
            Operation::Write(value) => value.write(),
        }
    }

    /// As work of a stream.
    pub(crate) fn work(self, device: usize) -> Work {
        match self {
            Operation::Launch(launch) => {
                Work::Launch(launch.callable.function.clone(), launch.config)
            }
            Operation::WaitValue(value, comparison) => {
                Work::Wait(Box::new(move || value.holds(comparison)))
            }
            Operation::WaitShared(event, wanted) => {
                Work::Wait(Box::new(move || event.shared_reached(wanted)))
            }
            Operation::Host(..) | Operation::Callback(..) | Operation::Graph(_) => {
                Work::Later(Box::new(move || self.run(device)))
            }
            other => Work::Now(Box::new(move || other.run(device))),
        }
    }
}
