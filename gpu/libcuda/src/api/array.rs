//! CUDA arrays and mipmaps, and the objects by which textures and surfaces name them.
//!
//! An array is device memory, row by row and slice by slice without gaps. The devices are told what
//! an object stands for, by its handle, which is what a kernel gets.

use std::sync::Arc;

use fathom_emulator::texture::{self, Channel, Surface, Texels, Texture};

use super::memory::{copy_now, copy_on};
use super::{entry_points, put};
use crate::abi::*;
use crate::driver::{Driver, initialised};
use crate::objects::array::{
    Array, CUBEMAP, Flat, LAYERED, Mipmap, Object, Resource, SURFACE, Shape, TextureDesc, ViewDesc,
    sampler, seen_through,
};

/// Bytes of an element of a shape; a format that is not known here is named.
fn element(driver: &Driver, shape: &Shape) -> R<usize> {
    shape.element().inspect_err(|error| {
        if *error == ERROR_NOT_SUPPORTED {
            driver.name_unsupported(&format!("arrays of format {:#x}", shape.format));
        }
    })
}

fn make(shape: Shape, level: bool) -> R<Handle> {
    let driver = initialised()?;
    let device = driver.current()?;
    shape.check()?;
    let row = shape.width * element(driver, &shape)?;
    let (rows, slices) = (shape.height.max(1), shape.depth.max(1));
    let bytes = row.checked_mul(rows).and_then(|n| n.checked_mul(slices));
    let base = driver.alloc(device, bytes.ok_or(ERROR_INVALID_VALUE)?)?;
    Ok(driver.arrays.insert(Arc::new(Array { shape, base, row, rows, slices, level })))
}

fn destroy(driver: &Driver, array: Handle) -> R {
    driver.wait_for_all()?;
    driver.free(driver.arrays.remove(array)?.base)
}

/// `CUresourcetype`.
const ARRAY: u32 = 0;
const MIPMAP: u32 = 1;
const LINEAR: u32 = 2;
const PITCHED: u32 = 3;

/// Refuses what is no resource of this driver.
fn check(resource: &Resource, driver: &Driver) -> R {
    let [value, format, width, height, pitch, ..] = resource.value;
    let memory = |bytes: usize| {
        let (format, channels) = (format as u32, (format >> 32) as u32);
        let row = Shape { width, height: 0, depth: 0, format, channels, flags: 0 };
        element(driver, &row)?;
        let view = driver.devices[0].memory().view();
        let found = view.locate(value as DevicePtr, bytes as u64);
        found.map(|_| ()).ok_or(ERROR_INVALID_VALUE)
    };
    match resource.kind {
        _ if resource.flags != 0 => Err(ERROR_INVALID_VALUE),
        ARRAY => driver.arrays.get(value).map(|_| ()),
        MIPMAP => driver.mipmaps.get(value).map(|_| ()),
        LINEAR => memory(width),
        PITCHED => memory(pitch.checked_mul(height).ok_or(ERROR_INVALID_VALUE)?),
        _ => Err(ERROR_INVALID_VALUE),
    }
}

/// What a kernel finds behind a texture object of a resource that was checked.
fn texture_of(driver: &Driver, resource: &Resource, desc: &TextureDesc) -> R<Texture> {
    let [value, format, width, height, pitch, ..] = resource.value;
    let size = |n: usize| u32::try_from(n).map_err(|_| ERROR_INVALID_VALUE);
    let memory = |bytes: usize, width: usize, height: usize| -> R<(Vec<Texels>, u32)> {
        let channel = Channel::from_cuda(format as u32).ok_or(ERROR_NOT_SUPPORTED)?;
        let texels = Texels {
            base: value as DevicePtr,
            row_bytes: bytes as u64,
            slice_bytes: (bytes * height) as u64,
            size: [size(width)?, size(height)?, 0],
            channel,
            channels: (format >> 32) as u32,
        };
        Ok((vec![texels], 0))
    };
    let (levels, flags) = match resource.kind {
        ARRAY => {
            let array = driver.arrays.get(value)?;
            (vec![array.texels()?], array.shape.flags)
        }
        MIPMAP => {
            let levels = driver.mipmaps.get(value)?.levels.clone();
            let arrays = levels.into_iter().map(|level| driver.arrays.get(level));
            let arrays: Vec<Arc<Array>> = arrays.collect::<R<_>>()?;
            let texels = arrays.iter().map(|array| array.texels()).collect::<R<_>>()?;
            (texels, arrays[0].shape.flags)
        }
        LINEAR => {
            let shape = Shape {
                width: 1,
                height: 0,
                depth: 0,
                format: format as u32,
                channels: (format >> 32) as u32,
                flags: 0,
            };
            memory(width, width / element(driver, &shape)?, 0)?
        }
        _ => memory(pitch, width, height)?,
    };
    Ok(Texture {
        levels,
        layered: flags & LAYERED != 0,
        cube: flags & CUBEMAP != 0,
        buffer: resource.kind == LINEAR,
        sampler: sampler(desc)?,
    })
}

/// Makes an object, and lets the devices know what it stands for.
fn insert(driver: &Driver, object: Object, seen: texture::Object) -> Handle {
    let handle = driver.objects.insert(object);
    driver.devices[0].objects().insert(handle as u64, seen);
    handle
}

/// Forgets an object, once the kernels that may use it are over.
fn remove(object: Handle) -> R {
    let driver = initialised()?;
    driver.objects.get(object)?;
    driver.wait_for_all()?;
    driver.devices[0].objects().remove(object as u64);
    driver.objects.remove(object).map(|_| ())
}

/// Bytes of an array's row as one end of a copy; the other is `other`.
fn part(array: Handle, offset: usize, bytes: usize, to_array: bool, other: Memcpy3d) -> Memcpy3d {
    let part = Memcpy3d { width: bytes, height: 1, depth: 1, ..other };
    match to_array {
        true => Memcpy3d { dst_type: MEMORY_ARRAY, dst_array: array, dst_x: offset, ..part },
        false => Memcpy3d { src_type: MEMORY_ARRAY, src_array: array, src_x: offset, ..part },
    }
}

fn host(at: usize, source: bool) -> Memcpy3d {
    match source {
        true => Memcpy3d { src_type: MEMORY_HOST, src_host: at, ..Memcpy3d::default() },
        false => Memcpy3d { dst_type: MEMORY_HOST, dst_host: at, ..Memcpy3d::default() },
    }
}

fn device(at: DevicePtr, source: bool) -> Memcpy3d {
    match source {
        true => Memcpy3d { src_type: MEMORY_DEVICE, src_device: at, ..Memcpy3d::default() },
        false => Memcpy3d { dst_type: MEMORY_DEVICE, dst_device: at, ..Memcpy3d::default() },
    }
}

entry_points! {
    fn cuArrayCreate_v2(array: *mut Handle, flat: *const Flat) {
        initialised()?.current()?;
        let &Flat { width, height, format, channels } = flat.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        put(array, make(Shape { width, height, depth: 0, format, channels, flags: 0 }, false)?)
    }

    fn cuArray3DCreate_v2(array: *mut Handle, shape: *const Shape) {
        put(array, make(*shape.as_ref().ok_or(ERROR_INVALID_VALUE)?, false)?)
    }

    fn cuArrayGetDescriptor_v2(flat: *mut Flat, array: Handle) {
        let Shape { width, height, format, channels, .. } = initialised()?.arrays.get(array)?.shape;
        put(flat, Flat { width, height, format, channels })
    }

    fn cuArray3DGetDescriptor_v2(shape: *mut Shape, array: Handle) {
        put(shape, initialised()?.arrays.get(array)?.shape)
    }

    fn cuArrayDestroy(array: Handle) {
        let driver = initialised()?;
        if driver.arrays.get(array)?.level {
            return Err(ERROR_INVALID_VALUE);
        }
        destroy(driver, array)
    }

    fn cuMipmappedArrayCreate(mipmap: *mut Handle, shape: *const Shape, levels: u32) {
        let shape = shape.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        // More levels than the largest dimension halves are none.
        let depth = if shape.flags & (LAYERED | CUBEMAP) == 0 { shape.depth } else { 0 };
        let most = 1 + shape.width.max(shape.height).max(depth).max(1).ilog2();
        let levels = (0..levels.clamp(1, most)).map(|level| make(shape.level(level), true));
        let levels = levels.collect::<R<_>>()?;
        put(mipmap, initialised()?.mipmaps.insert(Arc::new(Mipmap { levels })))
    }

    fn cuMipmappedArrayGetLevel(array: *mut Handle, mipmap: Handle, level: u32) {
        let mipmap = initialised()?.mipmaps.get(mipmap)?;
        put(array, *mipmap.levels.get(level as usize).ok_or(ERROR_INVALID_VALUE)?)
    }

    fn cuMipmappedArrayDestroy(mipmap: Handle) {
        let driver = initialised()?;
        let levels = &driver.mipmaps.remove(mipmap)?.levels;
        levels.iter().try_for_each(|level| destroy(driver, *level))
    }

    fn cuTexObjectCreate(
        object: *mut Handle,
        resource: *const Resource,
        texture: *const TextureDesc,
        view: *const ViewDesc,
    ) {
        let driver = initialised()?;
        driver.current()?;
        let resource = *resource.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        check(&resource, driver)?;
        let desc = *texture.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        let view = view.as_ref().copied();
        let mut seen = texture_of(driver, &resource, &desc)?;
        if let Some(view) = &view {
            seen_through(&mut seen, view)?;
        }
        let made = Object { resource, texture: Some(desc), view };
        put(object, insert(driver, made, texture::Object::Texture(seen)))
    }

    fn cuTexObjectDestroy(object: Handle) { remove(object) }

    fn cuTexObjectGetResourceDesc(resource: *mut Resource, object: Handle) {
        put(resource, initialised()?.objects.get(object)?.resource)
    }

    fn cuTexObjectGetTextureDesc(texture: *mut TextureDesc, object: Handle) {
        put(texture, initialised()?.objects.get(object)?.texture.ok_or(ERROR_INVALID_VALUE)?)
    }

    fn cuTexObjectGetResourceViewDesc(view: *mut ViewDesc, object: Handle) {
        put(view, initialised()?.objects.get(object)?.view.ok_or(ERROR_INVALID_VALUE)?)
    }

    fn cuSurfObjectCreate(object: *mut Handle, resource: *const Resource) {
        let driver = initialised()?;
        driver.current()?;
        let resource = *resource.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        check(&resource, driver)?;
        let array = if resource.kind == ARRAY { driver.arrays.get(resource.value[0]).ok() } else { None };
        let array = array.filter(|array| array.shape.flags & SURFACE != 0);
        let array = array.ok_or(ERROR_INVALID_VALUE)?;
        let layered = array.shape.flags & (LAYERED | CUBEMAP) != 0;
        let seen = texture::Object::Surface(Surface { texels: array.texels()?, layered });
        put(object, insert(driver, Object { resource, texture: None, view: None }, seen))
    }

    fn cuSurfObjectDestroy(object: Handle) { remove(object) }

    fn cuSurfObjectGetResourceDesc(resource: *mut Resource, object: Handle) {
        put(resource, initialised()?.objects.get(object)?.resource)
    }

    fn cuMemcpyAtoH_v2(to: usize, array: Handle, offset: usize, bytes: usize) {
        copy_now(part(array, offset, bytes, false, host(to, false)))
    }

    fn cuMemcpyAtoHAsync_v2(to: usize, array: Handle, offset: usize, bytes: usize, stream: Handle) {
        copy_on(stream, part(array, offset, bytes, false, host(to, false)))
    }

    fn cuMemcpyHtoA_v2(array: Handle, offset: usize, from: usize, bytes: usize) {
        copy_now(part(array, offset, bytes, true, host(from, true)))
    }

    fn cuMemcpyHtoAAsync_v2(
        array: Handle,
        offset: usize,
        from: usize,
        bytes: usize,
        stream: Handle,
    ) {
        copy_on(stream, part(array, offset, bytes, true, host(from, true)))
    }

    fn cuMemcpyAtoD_v2(to: DevicePtr, array: Handle, offset: usize, bytes: usize) {
        copy_now(part(array, offset, bytes, false, device(to, false)))
    }

    fn cuMemcpyDtoA_v2(array: Handle, offset: usize, from: DevicePtr, bytes: usize) {
        copy_now(part(array, offset, bytes, true, device(from, true)))
    }

    fn cuMemcpyAtoA_v2(to: Handle, to_offset: usize, from: Handle, offset: usize, bytes: usize) {
        let target = part(to, to_offset, bytes, true, Memcpy3d::default());
        copy_now(part(from, offset, bytes, false, target))
    }
}
