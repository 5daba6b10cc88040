//! Memory pools: allocation in a stream's order, and what pools say of themselves.
//!
//! A pool holds no memory back here: what is reserved is what is used, in the units in which
//! hardware reserves it. Reuse by a stream's order changes no result.

use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use super::memory::alloc;
use super::{entry_points, put};
use crate::abi::*;
use crate::operation::Operation;
use crate::state::{Driver, R, initialised};

/// A pool of a device.
pub(crate) struct Pool {
    pub device: usize,
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
    pub(crate) fn new(device: usize) -> Pool {
        Pool { device, state: Mutex::default() }
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
        let at = alloc(found.device, bytes)?;
        found.used(|used| used + bytes as u64);
        self.pooled.lock().expect("no panic holds this lock").insert(at, (pool, bytes as u64));
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

/// `CUmemLocation`: a type, 1 for devices, and the device.
type Location = [i32; 2];

entry_points! {
    fn cuMemAllocAsync(at: *mut DevicePtr, bytes: usize, stream: Handle) {
        let driver = initialised()?;
        let pool = driver.current_pool(driver.stream(stream)?.device as i32)?;
        put(at, driver.alloc_from(pool, bytes)?)
    }

    fn cuMemAllocFromPoolAsync(at: *mut DevicePtr, bytes: usize, pool: Handle, stream: Handle) {
        let driver = initialised()?;
        driver.stream(stream)?;
        put(at, driver.alloc_from(pool, bytes)?)
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
        let _ = kind;
        let [_, device] = *location.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        initialised()?.device(device)?;
        put(pool, initialised()?.default_pools[device as usize])
    }

    fn cuDeviceGetMemPool(pool: *mut Handle, device: i32) {
        put(pool, initialised()?.current_pool(device)?)
    }

    fn cuMemGetMemPool(pool: *mut Handle, location: *const Location, kind: u32) {
        let _ = kind;
        let [_, device] = *location.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        put(pool, initialised()?.current_pool(device)?)
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
        let [kind, _, place, device] = *properties.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        const PINNED: i32 = 1;
        const DEVICE: i32 = 1;
        if kind != PINNED {
            return Err(ERROR_INVALID_VALUE);
        }
        if place != DEVICE {
            driver.name_unsupported("memory pools on the host");
            return Err(ERROR_NOT_SUPPORTED);
        }
        driver.device(device)?;
        put(pool, driver.pools.insert(Arc::new(Pool::new(device as usize))))
    }

    fn cuMemPoolDestroy(pool: Handle) {
        let driver = initialised()?;
        if driver.default_pools.contains(&pool) {
            return Err(ERROR_INVALID_VALUE);
        }
        let device = driver.pools.remove(pool)?.device;
        let mut current = driver.current_pools.lock().expect("no panic holds this lock");
        if current[device] == pool {
            current[device] = driver.default_pools[device];
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
            // Type, location's type: pinned, a device; exports: none.
            9 | 12 => return put(value.cast::<i32>(), 1),
            10 => return put(value.cast::<i32>(), 0),
            11 => return put(value.cast::<i32>(), found.device as i32),
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
