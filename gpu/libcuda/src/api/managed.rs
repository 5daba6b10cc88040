//! Managed memory: what clients advise, prefetch and discard, and what they are told of it.
//!
//! It is memory of the host, which kernels reach where it lies: advice moves nothing and is kept to
//! be told again; what is discarded keeps its values, which it may.

use std::ffi::c_void;

use super::{entry_points, put};
use crate::abi::*;
use crate::driver::{Driver, initialised};
use crate::machine::{Advice, HostKind, Location};

/// `CUmemLocationType`.
const DEVICE: i32 = 1;
const HOST: i32 = 2;

/// `CU_DEVICE_CPU` and `CU_DEVICE_INVALID`.
const CPU: i32 = -1;
const NOWHERE: i32 = -2;

/// A location as older calls name it: a device, or the host.
fn located(device: i32) -> Location {
    if device == CPU { [HOST, 0] } else { [DEVICE, device] }
}

/// The other way round.
fn device_of(location: Option<Location>) -> i32 {
    match location {
        None => NOWHERE,
        Some([DEVICE, device]) => device,
        Some(_) => CPU,
    }
}

/// A location that a call takes by value.
fn unpacked(location: u64) -> Location {
    [location as i32, (location >> 32) as i32]
}

fn check(driver: &Driver, [on, device]: Location) -> R {
    match on {
        DEVICE => driver.device(device).map(|_| ()),
        2..=4 => Ok(()),
        _ => Err(ERROR_INVALID_VALUE),
    }
}

/// Changes what is known of the managed memory that a range lies in.
fn change(at: DevicePtr, bytes: usize, change: impl FnOnce(&mut Advice) -> R) -> R {
    let driver = initialised()?;
    let base = {
        let view = driver.devices[0].memory().view();
        view.locate(at, bytes as u64).ok_or(ERROR_INVALID_VALUE)?.base()
    };
    let kind = driver.host.lock().expect("no panic holds this lock").get(&(base as usize)).copied();
    match kind {
        Some((_, HostKind::Managed)) => {
            let mut advice = driver.advice.lock().expect("no panic holds this lock");
            change(advice.entry(base).or_default())
        }
        _ => Err(ERROR_INVALID_VALUE),
    }
}

fn advise(at: DevicePtr, bytes: usize, advice: u32, location: Location) -> R {
    let driver = initialised()?;
    if matches!(advice, 3 | 5 | 6) {
        check(driver, location)?;
    }
    change(at, bytes, |known| {
        let device = device_of(Some(location));
        match advice {
            1 | 2 => known.read_mostly = advice == 1,
            3 => known.preferred = Some(location),
            4 => known.preferred = None,
            5 => drop(known.accessed_by.insert(device)),
            6 => drop(known.accessed_by.remove(&device)),
            _ => return Err(ERROR_INVALID_VALUE),
        }
        Ok(())
    })
}

fn prefetch(at: DevicePtr, bytes: usize, location: Location, stream: Handle) -> R {
    let driver = initialised()?;
    driver.stream(stream)?;
    check(driver, location)?;
    change(at, bytes, |known| {
        known.prefetched = Some(location);
        Ok(())
    })
}

/// Ranges of a call, with the location of each where it gives some: the i-th from the range
/// `first[i]` on.
struct Batch {
    at: *const DevicePtr,
    bytes: *const usize,
    count: usize,
    locations: *const Location,
    first: *const usize,
    location_count: usize,
}

impl Batch {
    /// # Safety
    /// The lists have as many entries as their counts say.
    unsafe fn apply(&self, flags: u64, stream: Handle, moves: bool) -> R {
        initialised()?.stream(stream)?;
        if flags != 0 || self.count == 0 || self.at.is_null() || self.bytes.is_null() {
            return Err(ERROR_INVALID_VALUE);
        }
        if moves && (self.location_count == 0 || self.locations.is_null() || self.first.is_null()) {
            return Err(ERROR_INVALID_VALUE);
        }
        for i in 0..self.count {
            // SAFETY: within the counts.
            let (at, bytes, location) = unsafe {
                let begun = |l: &usize| *self.first.add(*l) <= i;
                let which = (0..self.location_count).rev().find(begun);
                let location = which.map(|l| *self.locations.add(l));
                (*self.at.add(i), *self.bytes.add(i), location)
            };
            match location {
                Some(location) => prefetch(at, bytes, location, stream)?,
                None if moves => return Err(ERROR_INVALID_VALUE),
                None => change(at, bytes, |_| Ok(()))?,
            }
        }
        Ok(())
    }
}

/// Writes what one attribute of a range is, into `size` bytes.
///
/// # Safety
/// `data` has that size.
unsafe fn tell(data: *mut c_void, size: usize, attribute: u32, at: DevicePtr, bytes: usize) -> R {
    let mut known = Advice::default();
    change(at, bytes, |found| {
        known = found.clone();
        Ok(())
    })?;
    let part = |location: Option<Location>, which: usize, none| location.map_or(none, |l| l[which]);
    let values: Vec<i32> = match attribute {
        1 => vec![i32::from(known.read_mostly)],
        2 => vec![device_of(known.preferred)],
        // Devices, then the host.
        3 => {
            let mut places: Vec<i32> = known.accessed_by.into_iter().collect();
            places.sort_by_key(|place| (*place == CPU, *place));
            places
        }
        4 => vec![device_of(known.prefetched)],
        5 => vec![part(known.preferred, 0, 0)],
        6 => vec![part(known.preferred, 1, NOWHERE)],
        7 => vec![part(known.prefetched, 0, 0)],
        8 => vec![part(known.prefetched, 1, NOWHERE)],
        _ => return Err(ERROR_INVALID_VALUE),
    };
    for i in 0..size / 4 {
        // SAFETY: within the client's size.
        unsafe { put(data.cast::<i32>().add(i), values.get(i).copied().unwrap_or(NOWHERE))? };
    }
    Ok(())
}

entry_points! {
    fn cuMemAdvise_v2(at: DevicePtr, bytes: usize, advice: u32, location: u64) {
        advise(at, bytes, advice, unpacked(location))
    }

    fn cuMemAdvise(at: DevicePtr, bytes: usize, advice: u32, device: i32) {
        advise(at, bytes, advice, located(device))
    }

    fn cuMemPrefetchAsync_v2(
        at: DevicePtr,
        bytes: usize,
        location: u64,
        flags: u32,
        stream: Handle,
    ) {
        if flags != 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        prefetch(at, bytes, unpacked(location), stream)
    }

    fn cuMemPrefetchAsync(at: DevicePtr, bytes: usize, device: i32, stream: Handle) {
        prefetch(at, bytes, located(device), stream)
    }

    fn cuMemPrefetchBatchAsync(
        at: *const DevicePtr,
        bytes: *const usize,
        count: usize,
        locations: *const Location,
        first: *const usize,
        location_count: usize,
        flags: u64,
        stream: Handle,
    ) {
        Batch { at, bytes, count, locations, first, location_count }.apply(flags, stream, true)
    }

    fn cuMemDiscardBatchAsync(
        at: *const DevicePtr,
        bytes: *const usize,
        count: usize,
        flags: u64,
        stream: Handle,
    ) {
        let (locations, first, location_count) = (std::ptr::null(), std::ptr::null(), 0);
        Batch { at, bytes, count, locations, first, location_count }.apply(flags, stream, false)
    }

    fn cuMemDiscardAndPrefetchBatchAsync(
        at: *const DevicePtr,
        bytes: *const usize,
        count: usize,
        locations: *const Location,
        first: *const usize,
        location_count: usize,
        flags: u64,
        stream: Handle,
    ) {
        Batch { at, bytes, count, locations, first, location_count }.apply(flags, stream, true)
    }

    fn cuMemRangeGetAttribute(
        data: *mut c_void,
        size: usize,
        attribute: u32,
        at: DevicePtr,
        bytes: usize,
    ) {
        tell(data, size, attribute, at, bytes)
    }

    fn cuMemRangeGetAttributes(
        data: *const *mut c_void,
        sizes: *const usize,
        attributes: *const u32,
        count: usize,
        at: DevicePtr,
        bytes: usize,
    ) {
        for i in 0..count {
            tell(*data.add(i), *sizes.add(i), *attributes.add(i), at, bytes)?;
        }
        Ok(())
    }
}
