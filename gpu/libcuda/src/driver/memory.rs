//! Memory of devices, of the host and of pools: giving it out and taking it back.

use std::alloc::Layout;
use std::sync::atomic::Ordering::Relaxed;

use super::Driver;
use super::contexts::current_context;
use crate::abi::*;
use crate::machine::HostKind;
use crate::objects::operation::Operation;
use crate::objects::pool::PoolMemory;

impl Driver {
    /// Host memory, which kernels reach at its own address.
    pub(crate) fn host_alloc(&self, bytes: usize, kind: HostKind) -> R<usize> {
        let size = bytes.max(1).next_multiple_of(256);
        let layout = Layout::from_size_align(size, 4096).map_err(|_| ERROR_INVALID_VALUE)?;
        // SAFETY: the size is not zero.
        let pointer = unsafe { std::alloc::alloc_zeroed(layout) };
        if pointer.is_null() {
            return Err(ERROR_OUT_OF_MEMORY);
        }
        // SAFETY: fresh memory, which lives until `host_free` frees it here first.
        unsafe { self.devices[0].register_host(pointer, size) };
        let at = pointer as usize;
        self.host.lock().expect("no panic holds this lock").insert(at, (layout, kind));
        Ok(at)
    }

    /// Memory of the current context's device.
    pub(crate) fn alloc_current(&self, bytes: usize) -> R<DevicePtr> {
        self.alloc(self.current()?, bytes)
    }

    /// Memory of a device; it goes with the current context where that is of the device, else with
    /// the primary one.
    pub(crate) fn alloc(&self, device: usize, bytes: usize) -> R<DevicePtr> {
        if bytes == 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        self.error()?;
        let address = self.devices[device].alloc(bytes as u64).map_err(|_| ERROR_OUT_OF_MEMORY)?;
        let owner = match self.current() {
            Ok(own) if own == device => current_context(),
            _ => self.primary_context(device),
        };
        self.owners.lock().expect("no panic holds this lock").insert(address, owner);
        Ok(address)
    }

    /// Frees memory, of a device or of the host.
    pub(crate) fn free(&self, address: DevicePtr) -> R {
        self.synchronous.lock().expect("no panic holds this lock").remove(&address);
        if self.host_free(address as usize)? {
            self.left_pool(address);
            self.advice.lock().expect("no panic holds this lock").remove(&address);
            return Ok(());
        }
        self.shared.lock().expect("no panic holds this lock").remove(&address);
        self.left_pool(address);
        self.owners.lock().expect("no panic holds this lock").remove(&address);
        self.devices[0].free(address).map_err(|_| ERROR_INVALID_VALUE)
    }

    /// Frees host memory of the driver's; false where the address is not of such memory.
    pub(crate) fn host_free(&self, at: usize) -> R<bool> {
        let Some((layout, _)) = self.host.lock().expect("no panic holds this lock").remove(&at)
        else {
            return Ok(false);
        };
        self.devices[0].free(at as u64).map_err(|_| ERROR_INVALID_VALUE)?;
        // SAFETY: allocated with this layout, and now unknown to the emulator.
        unsafe { std::alloc::dealloc(at as *mut u8, layout) };
        Ok(true)
    }

    /// Frees what belongs to a context, which goes or is reset: modules, device memory, and the
    /// error that a kernel left there.
    pub(crate) fn clear(&self, context: Handle) {
        for module in self.modules.which(|module| module.context == context) {
            // Another thread may have been faster.
            let _ = self.unload(module);
        }
        let device = self.contexts.get(context).unwrap_or(0);
        self.owners.lock().expect("no panic holds this lock").retain(|address, owner| {
            let stays = *owner != context;
            if !stays {
                let _ = self.devices[device].free(*address);
            }
            stays
        });
        self.sticky.store(SUCCESS, Relaxed);
    }
}

impl Driver {
    /// Memory of a pool, of its own kind.
    pub(crate) fn alloc_from(&self, pool: Handle, bytes: usize) -> R<DevicePtr> {
        let found = self.pools.get(pool)?;
        if bytes == 0 {
            return Ok(0);
        }
        let at = match found.memory {
            PoolMemory::Device(device) => self.alloc(device, bytes)?,
            PoolMemory::Host(kind, _) => self.host_alloc(bytes, kind)? as DevicePtr,
        };
        found.used(|used| used + bytes as u64);
        self.pooled.lock().expect("no panic holds this lock").insert(at, (pool, bytes as u64));
        Ok(at)
    }

    /// Allocates in a stream's order; where the stream captures, it is a node, and each launch
    /// allocates.
    pub(crate) fn alloc_on(&self, stream: Handle, pool: Handle, bytes: usize) -> R<DevicePtr> {
        if self.stream(stream)?.capturing().is_none() {
            return self.alloc_from(pool, bytes);
        }
        let PoolMemory::Device(device) = self.pools.get(pool)?.memory else {
            self.name_unsupported("host memory as a node of a graph");
            return Err(ERROR_NOT_SUPPORTED);
        };
        if bytes == 0 {
            return Ok(0);
        }
        let at = self.alloc(device, bytes)?;
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
            let pool = self.pools.get(pool)?;
            let again = {
                let mut state = pool.state.lock().expect("no panic holds this lock");
                let again = state.freed.min(bytes as u64);
                state.freed -= again;
                again
            };
            pool.used(|used| used + bytes as u64 - again);
        }
        Ok(())
    }

    /// Tells the pool of an allocation that it goes.
    pub(crate) fn left_pool(&self, at: DevicePtr) {
        let left = self.pooled.lock().expect("no panic holds this lock").remove(&at);
        if let Some((handle, bytes)) = left
            && let Ok(pool) = self.pools.get(handle)
        {
            if self.graph_pools.contains(&handle) {
                pool.state.lock().expect("no panic holds this lock").freed += bytes;
            } else {
                pool.used(|used| used - bytes);
            }
        }
    }

    /// The pool that a device allocates from.
    pub(crate) fn current_pool(&self, device: i32) -> R<Handle> {
        self.device(device)?;
        Ok(self.current_pools.lock().expect("no panic holds this lock")[device as usize])
    }
}
