//! Memory pools: allocation in a stream's order, and what pools say of themselves.
//!
//! A pool holds no memory back here: what is reserved is what is used, in the units in which
//! hardware reserves it. Reuse by a stream's order changes no result.

use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use super::memory::{alloc, host_alloc};
use super::{entry_points, put};
use crate::abi::*;
use crate::machine::{HostKind, Location};
use crate::operation::Operation;
use crate::state::{Driver, R, initialised};

/// What a pool's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Device(usize),
    /// Of the host; managed memory may have a device as its preferred place.
    Host(HostKind, Location),
}

/// A pool.
pub(crate) struct Pool {
    place: Place,
    state: Mutex<State>,
}

/// What a pool's attributes say, in bytes where they are sizes.
#[derive(Clone, Copy, Default)]
struct State {
    /// Three switches for reuse, which are on.
    reuse_off: [bool; 3],
    release_threshold: u64,
    used: u64,
    used_high: u64,
    reserved_high: u64,
    /// Of graphs: what is reserved until it is trimmed.
    reserved_now: u64,
}

/// Bytes in which a pool takes memory from its device.
const UNIT: u64 = 32 << 20;

impl State {
    fn reserved(&self) -> u64 {
        self.used.next_multiple_of(UNIT)
    }
}

impl Pool {
    pub(crate) fn new(place: Place) -> Pool {
        Pool { place, state: Mutex::default() }
    }

    fn used(&self, change: impl FnOnce(u64) -> u64) {
        let mut state = self.state.lock().expect("no panic holds this lock");
        state.used = change(state.used);
        state.used_high = state.used_high.max(state.used);
        state.reserved_now = state.reserved_now.max(state.reserved());
        state.reserved_high = state.reserved_high.max(state.reserved());
    }
}

impl Driver {
    fn alloc_from(&self, pool: Handle, bytes: usize) -> R<DevicePtr> {
        let found = self.pools.get(pool)?;
        if bytes == 0 {
            return Ok(0);
        }
        let at = match found.place {
            Place::Device(device) => alloc(device, bytes)?,
            Place::Host(kind, _) => host_alloc(self, bytes, kind)? as DevicePtr,
        };
        found.used(|used| used + bytes as u64);
        self.pooled.lock().expect("no panic holds this lock").insert(at, (pool, bytes as u64));
        Ok(at)
    }

    /// Allocates in a stream's order; where the stream captures, it is a node, and each launch
    /// allocates.
    fn alloc_on(&self, stream: Handle, pool: Handle, bytes: usize) -> R<DevicePtr> {
        if self.stream(stream)?.capturing().is_none() {
            return self.alloc_from(pool, bytes);
        }
        let Place::Device(device) = self.pools.get(pool)?.place else {
            self.name_unsupported("host memory as a node of a graph");
            return Err(ERROR_NOT_SUPPORTED);
        };
        if bytes == 0 {
            return Ok(0);
        }
        let at = alloc(device, bytes)?;
        self.submit(stream, Operation::Alloc(at, bytes))?;
        Ok(at)
    }

    /// A launch of a graph allocates the memory of one of its nodes, which has its address for
    /// good and its memory from here on.
    pub(crate) fn graph_allocates(&self, device: usize, at: DevicePtr, bytes: usize) -> R {
        let memory = self.devices[device].memory();
        memory.restore(at).map_err(|_| ERROR_OUT_OF_MEMORY)?;
        let pool = self.graph_pools[device];
        let before = (pool, bytes as u64);
        if self.pooled.lock().expect("no panic holds this lock").insert(at, before).is_none() {
            self.pools.get(pool)?.used(|used| used + bytes as u64);
        }
        Ok(())
    }

    /// Tells the pool of an allocation that it goes.
    pub(crate) fn left_pool(&self, at: DevicePtr) {
        let left = self.pooled.lock().expect("no panic holds this lock").remove(&at);
        if let Some((pool, bytes)) = left
            && let Ok(pool) = self.pools.get(pool)
        {
            pool.used(|used| used - bytes);
        }
    }

    /// The pool that a device allocates from.
    fn current_pool(&self, device: i32) -> R<Handle> {
        self.device(device)?;
        Ok(self.current_pools.lock().expect("no panic holds this lock")[device as usize])
    }
}

/// The state of the pool that a device's graphs allocate from.
fn graph_pool(device: i32) -> R<Arc<Pool>> {
    let driver = initialised()?;
    driver.device(device)?;
    driver.pools.get(driver.graph_pools[device as usize])
}

/// `CUmemAllocationType`.
const PINNED: u32 = 1;
const MANAGED: u32 = 2;
const ON_DEVICE: i32 = 1;

/// The place that a kind of memory and a location mean.
fn place(driver: &Driver, kind: u32, location: Location) -> R<Place> {
    let [on, device] = location;
    if on == ON_DEVICE {
        driver.device(device)?;
    }
    match (kind, on) {
        (PINNED, ON_DEVICE) => Ok(Place::Device(device as usize)),
        (PINNED, 2..=4) => Ok(Place::Host(HostKind::Pinned, location)),
        (MANAGED, 0..=4) => Ok(Place::Host(HostKind::Managed, location)),
        _ => Err(ERROR_INVALID_VALUE),
    }
}

/// The default pool of a place on the host.
fn host_pool(driver: &Driver, place: Place) -> Handle {
    let mut pools = driver.host_pools.lock().expect("no panic holds this lock");
    if let Some((_, pool)) = pools.iter().find(|(known, _)| *known == place) {
        return *pool;
    }
    let pool = driver.pools.insert(Arc::new(Pool::new(place)));
    pools.push((place, pool));
    pool
}

entry_points! {
    fn cuMemAllocAsync(at: *mut DevicePtr, bytes: usize, stream: Handle) {
        let driver = initialised()?;
        let pool = driver.current_pool(driver.stream(stream)?.device as i32)?;
        put(at, driver.alloc_on(stream, pool, bytes)?)
    }

    fn cuMemAllocFromPoolAsync(at: *mut DevicePtr, bytes: usize, pool: Handle, stream: Handle) {
        put(at, initialised()?.alloc_on(stream, pool, bytes)?)
    }

    fn cuMemFreeAsync(at: DevicePtr, stream: Handle) {
        initialised()?.submit(stream, Operation::Free(at))
    }

    fn cuDeviceGetDefaultMemPool(pool: *mut Handle, device: i32) {
        let driver = initialised()?;
        driver.device(device)?;
        put(pool, driver.default_pools[device as usize])
    }

    fn cuMemGetDefaultMemPool(pool: *mut Handle, location: *const Location, kind: u32) {
        let driver = initialised()?;
        let location = *location.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        put(pool, match place(driver, kind, location)? {
            Place::Device(device) => driver.default_pools[device],
            host => host_pool(driver, host),
        })
    }

    fn cuDeviceGetMemPool(pool: *mut Handle, device: i32) {
        put(pool, initialised()?.current_pool(device)?)
    }

    fn cuMemGetMemPool(pool: *mut Handle, location: *const Location, kind: u32) {
        let driver = initialised()?;
        let location = *location.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        put(pool, match place(driver, kind, location)? {
            Place::Device(device) => driver.current_pool(device as i32)?,
            host => host_pool(driver, host),
        })
    }

    fn cuDeviceSetMemPool(device: i32, pool: Handle) {
        let driver = initialised()?;
        driver.device(device)?;
        driver.pools.get(pool).map_err(|_| ERROR_INVALID_VALUE)?;
        driver.current_pools.lock().expect("no panic holds this lock")[device as usize] = pool;
        Ok(())
    }

    // Properties begin with the type and the handle types, then the location.
    fn cuMemPoolCreate(pool: *mut Handle, properties: *const [i32; 4]) {
        let driver = initialised()?;
        let [kind, _, on, device] = *properties.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        let place = place(driver, kind as u32, [on, device])?;
        put(pool, driver.pools.insert(Arc::new(Pool::new(place))))
    }

    fn cuMemPoolDestroy(pool: Handle) {
        let driver = initialised()?;
        let of_host = driver.host_pools.lock().expect("no panic holds this lock");
        if driver.default_pools.contains(&pool) || of_host.iter().any(|(_, known)| *known == pool) {
            return Err(ERROR_INVALID_VALUE);
        }
        if let Place::Device(device) = driver.pools.remove(pool)?.place {
            let mut current = driver.current_pools.lock().expect("no panic holds this lock");
            if current[device] == pool {
                current[device] = driver.default_pools[device];
            }
        }
        Ok(())
    }

    fn cuMemPoolTrimTo(pool: Handle, bytes: usize) {
        let _ = bytes;
        initialised()?.pools.get(pool).map(|_| ())
    }

    fn cuMemPoolSetAttribute(pool: Handle, attribute: u32, value: *const c_void) {
        let pool = initialised()?.pools.get(pool)?;
        let mut state = pool.state.lock().expect("no panic holds this lock");
        if value.is_null() {
            return Err(ERROR_INVALID_VALUE);
        }
        match attribute {
            1..=3 => state.reuse_off[attribute as usize - 1] = *value.cast::<i32>() == 0,
            4 => state.release_threshold = *value.cast::<u64>(),
            // High-water marks can be set back.
            6 if *value.cast::<u64>() == 0 => state.reserved_high = state.reserved(),
            8 if *value.cast::<u64>() == 0 => state.used_high = state.used,
            _ => return Err(ERROR_INVALID_VALUE),
        }
        Ok(())
    }

    fn cuMemPoolGetAttribute(pool: Handle, attribute: u32, value: *mut c_void) {
        let found = initialised()?.pools.get(pool)?;
        let state = *found.state.lock().expect("no panic holds this lock");
        let bytes = match attribute {
            1..=3 => {
                let on = !state.reuse_off[attribute as usize - 1];
                return put(value.cast::<i32>(), i32::from(on));
            }
            4 => state.release_threshold,
            5 => state.reserved(),
            6 => state.reserved_high,
            7 => state.used,
            8 => state.used_high,
            // Type, exports (none), location and its type.
            9 | 11 | 12 => {
                let (kind, [on, device]) = match found.place {
                    Place::Device(device) => (PINNED, [ON_DEVICE, device as i32]),
                    Place::Host(HostKind::Pinned, location) => (PINNED, location),
                    Place::Host(HostKind::Managed, location) => (MANAGED, location),
                };
                let kind = kind as i32;
                return put(value.cast::<i32>(), [kind, 0, device, on][attribute as usize - 9]);
            }
            10 => return put(value.cast::<i32>(), 0),
            13 => 0,
            _ => return Err(ERROR_INVALID_VALUE),
        };
        put(value.cast::<u64>(), bytes)
    }

    fn cuMemPoolSetAccess(pool: Handle, access: *const c_void, count: usize) {
        let _ = (access, count);
        initialised()?.pools.get(pool).map(|_| ())
    }

    // Devices reach each other's memory.
    fn cuMemPoolGetAccess(flags: *mut u32, pool: Handle, location: *const Location) {
        const READ_WRITE: u32 = 3;
        let _ = location;
        initialised()?.pools.get(pool)?;
        put(flags, READ_WRITE)
    }

    // What graphs have used stays reserved until it is trimmed.
    fn cuDeviceGetGraphMemAttribute(device: i32, attribute: u32, value: *mut u64) {
        let pool = graph_pool(device)?;
        let state = *pool.state.lock().expect("no panic holds this lock");
        put(value, match attribute {
            0 => state.used,
            1 => state.used_high,
            2 => state.reserved_now,
            3 => state.reserved_high,
            _ => return Err(ERROR_INVALID_VALUE),
        })
    }

    fn cuDeviceSetGraphMemAttribute(device: i32, attribute: u32, value: *const u64) {
        let pool = graph_pool(device)?;
        let mut state = pool.state.lock().expect("no panic holds this lock");
        if value.is_null() || *value != 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        match attribute {
            1 => state.used_high = state.used,
            3 => state.reserved_high = state.reserved_now,
            _ => return Err(ERROR_INVALID_VALUE),
        }
        Ok(())
    }

    fn cuDeviceGraphMemTrim(device: i32) {
        let pool = graph_pool(device)?;
        let mut state = pool.state.lock().expect("no panic holds this lock");
        state.reserved_now = state.reserved();
        Ok(())
    }
}
