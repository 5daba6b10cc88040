//! Memory pools: allocation in a stream's order, and what pools say of themselves.
//!
//! A pool holds no memory back here: what is reserved is what is used, in the units in which
//! hardware reserves it. Reuse by a stream's order changes no result.

use std::ffi::c_void;
use std::sync::Arc;

use super::{entry_points, put};
use crate::abi::*;
use crate::driver::{Driver, initialised};
use crate::machine::{HostKind, Location};
use crate::objects::operation::Operation;
use crate::objects::pool::{Pool, PoolMemory};

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
fn place(driver: &Driver, kind: u32, location: Location) -> R<PoolMemory> {
    let [on, device] = location;
    if on == ON_DEVICE {
        driver.device(device)?;
    }
    match (kind, on) {
        (PINNED, ON_DEVICE) => Ok(PoolMemory::Device(device as usize)),
        (PINNED, 2..=4) => Ok(PoolMemory::Host(HostKind::Pinned, location)),
        (MANAGED, 0..=4) => Ok(PoolMemory::Host(HostKind::Managed, location)),
        _ => Err(ERROR_INVALID_VALUE),
    }
}

/// The default pool of a place on the host.
fn host_pool(driver: &Driver, place: PoolMemory) -> Handle {
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
            PoolMemory::Device(device) => driver.default_pools[device],
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
            PoolMemory::Device(device) => driver.current_pool(device as i32)?,
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
        if let PoolMemory::Device(device) = driver.pools.remove(pool)?.memory {
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
                let (kind, [on, device]) = match found.memory {
                    PoolMemory::Device(device) => (PINNED, [ON_DEVICE, device as i32]),
                    PoolMemory::Host(HostKind::Pinned, location) => (PINNED, location),
                    PoolMemory::Host(HostKind::Managed, location) => (MANAGED, location),
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
        // Graphs that were launched have their memory.
        initialised()?.wait_for_all()?;
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
        state.used -= std::mem::take(&mut state.freed);
        state.reserved_now = state.reserved();
        Ok(())
    }
}
