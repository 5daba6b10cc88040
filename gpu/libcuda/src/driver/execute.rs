//! Doing what a stream or a graph was given: copies, fills, values, calls of the client.

use std::ffi::c_void;

use fathom_emulator::memory::{AllocationKind, DEVICE_BASE, DEVICE_STRIDE};

use super::driver;
use crate::abi::*;
use crate::objects::operation::{Comparison, Conditional, Fill, Operation, Value};
use crate::queue::Work;

impl Conditional {
    /// The condition's value.
    pub(super) fn value(&self) -> R<u32> {
        let mut word = [0; 4];
        let memory = driver().devices[0].memory();
        memory.read(self.condition, &mut word).map_err(|_| ERROR_ILLEGAL_ADDRESS)?;
        Ok(u32::from_le_bytes(word))
    }
}

/// One end of a copy.
#[derive(Clone, Copy)]
enum Address {
    /// An address of this process.
    Host(usize),
    /// An address of emulated memory.
    Device(DevicePtr),
}

use Address::{Device, Host};

impl Address {
    fn add(self, bytes: usize) -> Address {
        match self {
            Host(at) => Host(at + bytes),
            Device(at) => Device(at + bytes as u64),
        }
    }

    /// Which of both a unified address is: of emulated memory where the emulator knows it, or gives
    /// such addresses.
    fn of(address: u64) -> Address {
        let end = DEVICE_BASE + driver().devices.len() as u64 * DEVICE_STRIDE;
        let memory = driver().devices[0].memory();
        match memory.view().find(address) {
            Some(allocation) if *allocation.kind() != AllocationKind::Host => Device(address),
            None if (DEVICE_BASE..end).contains(&address) => Device(address),
            _ => Host(address as usize),
        }
    }

    /// A device address, which is an error where the emulator does not know it.
    fn of_device(address: u64) -> Address {
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
fn copy(to: Address, from: Address, bytes: usize) -> R {
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
fn copy_ns(to: Address, from: Address, bytes: usize) -> u64 {
    let bytes_per_ns = match (to, from) {
        (Device(_), Device(_)) => 2000,
        _ => 50,
    };
    bytes as u64 / bytes_per_ns + 1000
}

/// An end of a copy: its first byte, and bytes from a row and from a slice to the next.
struct End {
    place: Address,
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
            MEMORY_HOST => Host(host),
            MEMORY_DEVICE => Address::of_device(device),
            _ => Address::of(device),
        };
        let end = |place: Address, [x, y, z]: [usize; 3], row: usize, slice: usize| End {
            place: place.add(z * slice + y * row + x),
            row,
            slice,
        };
        let linear = |place: Address, at, pitch: usize, height: usize| {
            let row = if pitch == 0 { self.width } else { pitch };
            end(place, at, row, row * if height == 0 { self.height } else { height })
        };
        let array = |handle, at: [usize; 3]| {
            let array = driver().arrays.get(handle)?;
            let sizes = [self.width, self.height, self.depth];
            let room = [array.row, array.rows, array.slices];
            let beyond = (0..3).any(|i| at[i].saturating_add(sizes[i]) > room[i]);
            match beyond {
                true => Err(ERROR_INVALID_VALUE),
                false => Ok(end(Device(array.base), at, array.row, array.row * array.rows)),
            }
        };
        let from_at = [self.src_x, self.src_y, self.src_z];
        let from = match self.src_type {
            MEMORY_ARRAY => array(self.src_array, from_at)?,
            kind => {
                let from = place(kind, self.src_host, self.src_device);
                linear(from, from_at, self.src_pitch, self.src_height)
            }
        };
        let to_at = [self.dst_x, self.dst_y, self.dst_z];
        let to = match self.dst_type {
            MEMORY_ARRAY => array(self.dst_array, to_at)?,
            kind => {
                let to = place(kind, self.dst_host, self.dst_device);
                linear(to, to_at, self.dst_pitch, self.dst_height)
            }
        };
        Ok((to, from))
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

    /// Does it on a device, as the next thing in its stream.
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
