//! An emulated device: a preset, a part of the global address space, and settings of its runs.

use std::sync::{Arc, Mutex, OnceLock};

pub use crate::config::{Checks, Settings};
use crate::error::{Error, MemoryError};
use crate::heap::Heap;
use crate::machine::checks::global::Touched;
use crate::memory::{AllocationKind, Memory};
use crate::preset::Preset;
use crate::texture::Objects;

struct Inner {
    preset: Preset,
    index: u32,
    memory: Arc<Memory>,
    objects: Arc<Objects>,
    settings: Mutex<Settings>,
    previous: Mutex<Option<Arc<Touched>>>,
    /// Bytes of the heap to be made, and the heap once a kernel needed it.
    heap: Mutex<(u64, Option<Arc<Mutex<Heap>>>)>,
    /// Where cooperative launches have their workspaces, once there was one.
    workspaces: OnceLock<u64>,
}

/// Size of the heap of `malloc` unless set.
const HEAP_BYTES: u64 = 8 << 20;

/// Cooperative launches that may run at the same time on a device, and what each gets.
const WORKSPACES: u64 = 64;
const WORKSPACE_BYTES: u64 = 64;

/// A handle to an emulated device; clones are the same device.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

impl Device {
    /// A device on its own.
    pub fn new(preset: Preset) -> Device {
        Self::peers(preset, 1).remove(0)
    }

    /// `count` devices in one address space, each reaching the others' memory.
    pub fn peers(preset: Preset, count: usize) -> Vec<Device> {
        let memory = Arc::new(Memory::new(&vec![preset.memory_bytes; count]));
        let objects = Arc::new(Objects::default());
        (0..count as u32)
            .map(|index| {
                Device(Arc::new(Inner {
                    preset: preset.clone(),
                    index,
                    memory: memory.clone(),
                    objects: objects.clone(),
                    settings: Mutex::new(Settings::default()),
                    previous: Mutex::new(None),
                    heap: Mutex::new((HEAP_BYTES, None)),
                    workspaces: OnceLock::new(),
                }))
            })
            .collect()
    }

    /// Its limits and name.
    pub fn preset(&self) -> &Preset {
        &self.0.preset
    }

    /// Its index among its peers.
    pub fn index(&self) -> u32 {
        self.0.index
    }

    /// Global memory, shared with its peers.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.0.memory
    }

    /// The texture and surface objects of coming launches, shared with its peers.
    pub fn objects(&self) -> &Objects {
        &self.0.objects
    }

    /// Whether both reach the same memory.
    pub fn is_peer(&self, other: &Device) -> bool {
        Arc::ptr_eq(&self.0.memory, &other.0.memory)
    }

    /// The settings of coming launches.
    pub fn settings(&self) -> Settings {
        self.0.settings.lock().expect("no panic holds this lock").clone()
    }

    /// Changes the settings of coming launches. With `checks.uninit`, allocations made from now
    /// on record what was written.
    pub fn configure(&self, settings: Settings) {
        self.0.memory.track_written(settings.checks.uninit);
        *self.0.settings.lock().expect("no panic holds this lock") = settings;
    }

    /// What the last launch touched, where races were checked.
    pub(crate) fn previous(&self) -> Option<Arc<Touched>> {
        self.0.previous.lock().expect("no panic holds this lock").clone()
    }

    pub(crate) fn remember(&self, touched: Option<Touched>) {
        *self.0.previous.lock().expect("no panic holds this lock") = touched.map(Arc::new);
    }

    /// Sets the size of the heap that `malloc` in kernels uses (8 MiB unless set). False once a
    /// kernel has used it.
    pub fn set_heap_bytes(&self, bytes: u64) -> bool {
        let mut heap = self.0.heap.lock().expect("no panic holds this lock");
        if heap.1.is_none() {
            heap.0 = bytes;
        }
        heap.1.is_none()
    }

    /// Size of the heap that `malloc` in kernels uses.
    pub fn heap_bytes(&self) -> u64 {
        self.0.heap.lock().expect("no panic holds this lock").0
    }

    /// The heap of `malloc` in kernels, made at its first use.
    pub(crate) fn heap(&self) -> Result<Arc<Mutex<Heap>>, MemoryError> {
        let mut heap = self.0.heap.lock().expect("no panic holds this lock");
        if let Some(heap) = &heap.1 {
            return Ok(heap.clone());
        }
        let kind = AllocationKind::Variable("heap of malloc".into());
        let base = self.0.memory.alloc(self.0.index, heap.0, 256, kind)?;
        let made = Arc::new(Mutex::new(Heap::new(base, heap.0)));
        heap.1 = Some(made.clone());
        Ok(made)
    }

    /// A fresh workspace of a cooperative launch: its size and the word on which
    /// `cooperative_groups::grid_group::sync` counts arrivals.
    pub(crate) fn workspace(&self, launch: u64) -> Result<u64, MemoryError> {
        let memory = &self.0.memory;
        let base = match self.0.workspaces.get() {
            Some(base) => *base,
            None => {
                let kind = AllocationKind::Variable("workspaces of cooperative launches".into());
                let made = memory.alloc(self.0.index, WORKSPACES * WORKSPACE_BYTES, 256, kind)?;
                *self.0.workspaces.get_or_init(|| made)
            }
        };
        let at = base + launch % WORKSPACES * WORKSPACE_BYTES;
        memory.write(at, &WORKSPACE_BYTES.to_le_bytes())?;
        Ok(at)
    }

    /// Coming launches are ordered after all earlier ones, programmatic or not: something else
    /// than a launch stands between them in the stream.
    pub fn order_launches(&self) {
        self.remember(None);
    }

    /// Allocates `bytes` of device memory, aligned to 256.
    ///
    /// # Errors
    /// [`MemoryError::OutOfMemory`].
    pub fn alloc(&self, bytes: u64) -> Result<u64, MemoryError> {
        self.alloc_aligned(bytes, 256)
    }

    /// Allocates `bytes` aligned to `align`, a power of two.
    ///
    /// # Errors
    /// [`MemoryError::OutOfMemory`].
    pub fn alloc_aligned(&self, bytes: u64, align: u64) -> Result<u64, MemoryError> {
        self.0.memory.alloc(self.0.index, bytes, align, AllocationKind::Device)
    }

    /// Frees what [`Self::alloc`] returned.
    ///
    /// # Errors
    /// [`MemoryError::NotAStart`].
    pub fn free(&self, address: u64) -> Result<(), MemoryError> {
        self.0.memory.free(address)
    }

    /// Copies device memory to the host.
    ///
    /// # Errors
    /// [`MemoryError::Unmapped`].
    pub fn read(&self, address: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        self.0.memory.read(address, out)
    }

    /// Copies host memory to the device.
    ///
    /// # Errors
    /// [`MemoryError::Unmapped`].
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.0.memory.write(address, data)
    }

    /// Sets `count` elements to a pattern of 1, 2 or 4 bytes.
    ///
    /// # Errors
    /// [`MemoryError::Unmapped`].
    pub fn memset(&self, address: u64, pattern: &[u8], count: u64) -> Result<(), MemoryError> {
        self.0.memory.fill(address, pattern, count)
    }

    /// Allocates room for `values` and copies them there.
    ///
    /// # Errors
    /// [`MemoryError::OutOfMemory`].
    pub fn upload<T: bytemuck::NoUninit>(&self, values: &[T]) -> Result<u64, Error> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let address = self.alloc(bytes.len() as u64)?;
        self.write(address, bytes)?;
        Ok(address)
    }

    /// Reads `count` values from `address`.
    ///
    /// # Errors
    /// [`MemoryError::Unmapped`].
    pub fn download<T: bytemuck::Pod>(&self, address: u64, count: usize) -> Result<Vec<T>, Error> {
        let mut out = vec![T::zeroed(); count];
        self.read(address, bytemuck::cast_slice_mut(&mut out))?;
        Ok(out)
    }
}
