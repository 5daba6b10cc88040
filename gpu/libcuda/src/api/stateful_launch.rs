//! Launches as they were before CUDA 4, which PyCUDA still makes: block, shared memory and
//! parameters are set one after the other and belong to the function; a launch names only the grid.
//!
//! Source: the CUDA driver API's section "Execution Control", deprecated.

use super::entry_points;
use super::launch::{PLAIN, launchable, shape, submit};
use crate::abi::*;
use crate::driver::initialised;
use crate::objects::program::Stateful;

/// Changes what a function's launches are to be.
fn set(function: Handle, change: impl FnOnce(&mut Stateful) -> R) -> R {
    let callable = initialised()?.callable(function)?;
    let mut stateful = callable.stateful.lock().expect("no panic holds this lock");
    // The whole block is there from the first call on; what is not set is 0.
    stateful.params.resize(callable.function.param_bytes(), 0);
    change(&mut stateful)
}

/// Writes into the block of parameters; what goes beyond the function's own is refused.
fn set_param(function: Handle, offset: i32, bytes: &[u8]) -> R {
    set(function, |stateful| {
        let at = usize::try_from(offset).map_err(|_| ERROR_INVALID_VALUE)?;
        let to = stateful.params.get_mut(at..).and_then(|rest| rest.get_mut(..bytes.len()));
        to.ok_or(ERROR_INVALID_VALUE)?.copy_from_slice(bytes);
        Ok(())
    })
}

/// Sizes along an axis, which cuda.h has as `int`.
fn sizes<const N: usize>(from: [i32; N]) -> R<[u32; N]> {
    if from.iter().all(|n| *n > 0) { Ok(from.map(|n| n as u32)) } else { Err(ERROR_INVALID_VALUE) }
}

/// Launches a function as it was set up.
fn launch(function: Handle, grid: [i32; 2], stream: Handle) -> R {
    let [x, y] = sizes(grid)?;
    let callable = launchable(function)?;
    let stateful = callable.stateful.lock().expect("no panic holds this lock").clone();
    let mut params = stateful.params;
    params.resize(callable.function.param_bytes(), 0);
    let block = stateful.block.ok_or(ERROR_INVALID_VALUE)?;
    let shape = shape([x, y, 1], block, stateful.shared_bytes, stream);
    submit(function, callable, &shape, &PLAIN, params)
}

entry_points! {
    fn cuFuncSetBlockShape(function: Handle, x: i32, y: i32, z: i32) {
        let block = sizes([x, y, z])?;
        set(function, |stateful| {
            stateful.block = Some(block);
            Ok(())
        })
    }

    fn cuFuncSetSharedSize(function: Handle, bytes: u32) {
        set(function, |stateful| {
            stateful.shared_bytes = bytes;
            Ok(())
        })
    }

    // How long the block is follows from the function.
    fn cuParamSetSize(function: Handle, bytes: u32) {
        set(function, |stateful| {
            if bytes as usize > stateful.params.len() { Err(ERROR_INVALID_VALUE) } else { Ok(()) }
        })
    }

    fn cuParamSeti(function: Handle, offset: i32, value: u32) {
        set_param(function, offset, &value.to_ne_bytes())
    }

    fn cuParamSetf(function: Handle, offset: i32, value: f32) {
        set_param(function, offset, &value.to_ne_bytes())
    }

    fn cuParamSetv(function: Handle, offset: i32, from: *const u8, bytes: u32) {
        if from.is_null() {
            return Err(ERROR_INVALID_VALUE);
        }
        set_param(function, offset, std::slice::from_raw_parts(from, bytes as usize))
    }

    fn cuLaunch(function: Handle) { launch(function, [1, 1], 0) }

    fn cuLaunchGrid(function: Handle, width: i32, height: i32) {
        launch(function, [width, height], 0)
    }

    fn cuLaunchGridAsync(function: Handle, width: i32, height: i32, stream: Handle) {
        launch(function, [width, height], stream)
    }
}
