//! Green contexts: parts of a device's SMs, which clients split, describe and make contexts of.
//!
//! The SMs of such a context are counted and told again; its kernels run as on the whole device,
//! whose order of CTAs is the emulator's own anyway.

use super::stream::{create_in, record};
use super::{entry_points, put};
use crate::abi::*;
use crate::driver::contexts::{current_context, within};
use crate::driver::{Driver, initialised};
use crate::objects::green::Green;

/// `CUdevResource`: a type, and of SMs how many, in which units they may be parted, and flags.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Resource {
    kind: u32,
    pad: [u32; 23],
    sms: u32,
    least: u32,
    alignment: u32,
    flags: u32,
    rest: [u32; 6],
    next: usize,
}

/// `CUdevResourceType`.
const INVALID: u32 = 0;
const SMS: u32 = 1;

/// `CU_DEV_SM_RESOURCE_GROUP_PARAMS`.
#[repr(C)]
pub(crate) struct Group {
    sms: u32,
    coscheduled: u32,
    preferred: u32,
    flags: u32,
    rest: [u32; 12],
}

/// `CU_DEV_SM_RESOURCE_GROUP_BACKFILL`: SMs of a group need not lie together.
const BACKFILL: u32 = 1;
/// `CU_DEV_SM_RESOURCE_SPLIT_IGNORE_SM_COSCHEDULING`.
const IGNORE_COSCHEDULING: u32 = 1;

/// So many SMs of a device. From sm_90 on they are parted in eights, before in pairs from four on
/// (CUDA Driver API, "Green Contexts").
fn resource(driver: &Driver, sms: u32) -> Resource {
    let (least, alignment) = if driver.capability()[0] >= 9 { (8, 8) } else { (4, 2) };
    let kind = if sms == 0 { INVALID } else { SMS };
    Resource { kind, pad: [0; 23], sms, least, alignment, flags: 0, rest: [0; 6], next: 0 }
}

/// # Safety
/// `to` is null or the client's.
unsafe fn tell(driver: &Driver, to: *mut Resource, kind: u32, sms: u32) -> R {
    match kind {
        // SAFETY: the caller's promise.
        SMS => unsafe { put(to, resource(driver, sms)) },
        // Queues of work are not modelled.
        _ => Err(ERROR_NOT_SUPPORTED),
    }
}

impl Driver {
    /// The green context that a context stands for, 0 where it is none.
    pub(crate) fn green_of(&self, context: Handle) -> Handle {
        self.greens.which(|green| green.context == context).first().copied().unwrap_or(0)
    }

    fn all_sms(&self) -> u32 {
        self.devices[0].preset().sm_count
    }

    /// SMs of a green context; of none those of the device.
    fn sms_of(&self, green: Handle) -> R<u32> {
        if green == 0 { Ok(self.all_sms()) } else { Ok(self.greens.get(green)?.sms) }
    }

    /// The context of a stream: its green one, or the primary one of its device.
    pub(crate) fn context_of(&self, stream: Handle) -> R<(Handle, Handle)> {
        let stream = self.stream(stream)?;
        let green =
            if stream.handle == 0 { self.green_of(current_context()) } else { stream.green };
        match green {
            0 => Ok((self.primary_context(stream.device), 0)),
            _ => Ok((self.greens.get(green)?.context, green)),
        }
    }
}

/// Writes the parts of a split; where `result` is null nobody wants them.
///
/// # Safety
/// `result` has as many entries as `parts`, or is null; `remainder` is null or the client's.
unsafe fn give(
    driver: &Driver,
    (result, remainder): (*mut Resource, *mut Resource),
    parts: &[u32],
    left: u32,
) -> R {
    // SAFETY: the caller's promise.
    unsafe {
        if !result.is_null() {
            for (i, sms) in parts.iter().enumerate() {
                put(result.add(i), resource(driver, *sms))?;
            }
        }
        if remainder.is_null() { Ok(()) } else { put(remainder, resource(driver, left)) }
    }
}

/// # Safety
/// `input` is null or the client's.
unsafe fn to_split(input: *const Resource) -> R<u32> {
    // SAFETY: the caller's promise.
    match unsafe { input.as_ref() } {
        None => Err(ERROR_INVALID_VALUE),
        Some(input) if input.kind == SMS => Ok(input.sms),
        Some(_) => Err(ERROR_INVALID_RESOURCE_TYPE),
    }
}

entry_points! {
    fn cuDeviceGetDevResource(device: i32, to: *mut Resource, kind: u32) {
        let driver = initialised()?;
        driver.device(device)?;
        tell(driver, to, kind, driver.all_sms())
    }

    fn cuCtxGetDevResource(context: Handle, to: *mut Resource, kind: u32) {
        let driver = initialised()?;
        driver.contexts.get(context).map_err(|_| ERROR_INVALID_CONTEXT)?;
        tell(driver, to, kind, driver.sms_of(driver.green_of(context))?)
    }

    fn cuGreenCtxGetDevResource(green: Handle, to: *mut Resource, kind: u32) {
        let driver = initialised()?;
        tell(driver, to, kind, driver.greens.get(green)?.sms)
    }

    fn cuStreamGetDevResource(stream: Handle, to: *mut Resource, kind: u32) {
        let driver = initialised()?;
        tell(driver, to, kind, driver.sms_of(driver.context_of(stream)?.1)?)
    }

    fn cuDevSmResourceSplitByCount(
        result: *mut Resource,
        groups: *mut u32,
        input: *const Resource,
        remainder: *mut Resource,
        flags: u32,
        least: u32,
    ) {
        let driver = initialised()?;
        let total = to_split(input)?;
        let units = resource(driver, total);
        let (smallest, alignment) = match flags & IGNORE_COSCHEDULING {
            0 => (units.least, units.alignment),
            _ => (2, 2),
        };
        let each = least.max(smallest).checked_next_multiple_of(alignment);
        let most = total / each.ok_or(ERROR_INVALID_VALUE)?;
        let wanted = *groups.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        let count = if result.is_null() { most } else { wanted.min(most) };
        if count == 0 {
            return Err(ERROR_INVALID_RESOURCE_CONFIGURATION);
        }
        put(groups, count)?;
        let each = each.unwrap_or(0);
        let parts = vec![each; count as usize];
        give(driver, (result, remainder), &parts, total - count * each)
    }

    fn cuDevSmResourceSplit(
        result: *mut Resource,
        groups: u32,
        input: *const Resource,
        remainder: *mut Resource,
        flags: u32,
        asked: *mut Group,
    ) {
        let driver = initialised()?;
        let total = to_split(input)?;
        if flags != 0 || groups == 0 || asked.is_null() {
            return Err(ERROR_INVALID_VALUE);
        }
        let mut left = total;
        let mut parts = Vec::new();
        for group in std::slice::from_raw_parts_mut(asked, groups as usize) {
            let unit = match group.coscheduled {
                0 => resource(driver, total).alignment,
                unit => unit,
            };
            let whole = unit.is_multiple_of(2)
                && (group.flags & BACKFILL != 0 || group.sms.is_multiple_of(unit));
            // Without a number: all that is left.
            let sms = if group.sms == 0 { left / unit * unit } else { group.sms };
            if !whole || sms < 2 || sms % 2 != 0 || sms > left {
                return Err(ERROR_INVALID_RESOURCE_CONFIGURATION);
            }
            group.sms = sms;
            left -= sms;
            parts.push(sms);
        }
        give(driver, (result, remainder), &parts, left)
    }

    fn cuDevResourceGenerateDesc(
        description: *mut Handle,
        resources: *const Resource,
        count: u32,
    ) {
        if resources.is_null() || count == 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        let mut sms = 0;
        for resource in std::slice::from_raw_parts(resources, count as usize) {
            sms += to_split(resource)?;
        }
        put(description, initialised()?.descriptions.insert(sms))
    }

    fn cuGreenCtxCreate(green: *mut Handle, description: Handle, device: i32, flags: u32) {
        const DEFAULT_STREAM: u32 = 1;
        let driver = initialised()?;
        driver.device(device)?;
        let sms = driver.descriptions.get(description)?;
        if flags & !DEFAULT_STREAM != 0 || sms > driver.all_sms() {
            return Err(ERROR_INVALID_VALUE);
        }
        let context = driver.contexts.insert(device as usize);
        put(green, driver.greens.insert(Green { context, sms }))
    }

    fn cuGreenCtxDestroy(green: Handle) {
        let driver = initialised()?;
        let context = driver.greens.remove(green)?.context;
        driver.wait_for_all()?;
        driver.contexts.remove(context).map(|_| ())
    }

    fn cuCtxFromGreenCtx(context: *mut Handle, green: Handle) {
        put(context, initialised()?.greens.get(green)?.context)
    }

    fn cuGreenCtxGetId(green: Handle, id: *mut u64) {
        initialised()?.greens.get(green)?;
        put(id, green as u64)
    }

    fn cuGreenCtxStreamCreate(stream: *mut Handle, green: Handle, flags: u32, priority: i32) {
        let context = initialised()?.greens.get(green)?.context;
        if flags != STREAM_NON_BLOCKING {
            return Err(ERROR_INVALID_VALUE);
        }
        within(context, || create_in(stream, flags, priority))
    }

    fn cuStreamGetGreenCtx(stream: Handle, green: *mut Handle) {
        put(green, initialised()?.context_of(stream)?.1)
    }

    fn cuGreenCtxRecordEvent(green: Handle, event: Handle) {
        let context = initialised()?.greens.get(green)?.context;
        within(context, || record(event, 0))
    }

    fn cuGreenCtxWaitEvent(green: Handle, event: Handle) {
        let driver = initialised()?;
        driver.greens.get(green)?;
        let recorded = *driver.events.get(event)?.recorded.lock().expect("no panic holds it");
        driver.queue.wait(recorded.as_slice());
        driver.error()
    }
}
