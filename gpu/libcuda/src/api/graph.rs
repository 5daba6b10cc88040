//! Graphs: by capture of a stream, and replay.

use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use super::{entry_points, put};
use crate::abi::*;
use crate::state::initialised;

entry_points! {
    fn cuStreamBeginCapture_v2(stream: Handle, mode: u32) {
        let _ = mode;
        let stream = initialised()?.stream(stream)?;
        if stream.capturing().is_some() {
            return Err(ERROR_ILLEGAL_STATE);
        }
        let new = Arc::new(Mutex::new(Some(Vec::new())));
        *stream.capture.lock().expect("no panic holds this lock") = Some(new);
        Ok(())
    }

    fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) {
        let driver = initialised()?;
        // Streams that joined the capture leave it with this.
        let capture = driver.stream(stream)?.capturing().ok_or(ERROR_ILLEGAL_STATE)?;
        let works = capture.lock().expect("no panic holds this lock").take();
        put(graph, driver.graphs.insert(Arc::new(works.unwrap_or_default())))
    }

    fn cuStreamIsCapturing(stream: Handle, status: *mut u32) {
        let capturing = initialised()?.stream(stream)?.capturing().is_some();
        put(status, u32::from(capturing))
    }

    fn cuStreamGetCaptureInfo_v2(
        stream: Handle,
        status: *mut u32,
        id: *mut u64,
        graph: *mut Handle,
        dependencies: *mut *const c_void,
        count: *mut usize,
    ) {
        let capturing = initialised()?.stream(stream)?.capturing().is_some();
        put(status, u32::from(capturing))?;
        for optional in [id.cast::<u64>(), graph.cast(), dependencies.cast(), count.cast()] {
            if !optional.is_null() {
                put(optional, 0)?;
            }
        }
        Ok(())
    }

    fn cuThreadExchangeStreamCaptureMode(mode: *mut u32) { put(mode, 0) }

    fn cuGraphCreate(graph: *mut Handle, flags: u32) {
        let _ = flags;
        put(graph, initialised()?.graphs.insert(Arc::new(Vec::new())))
    }

    fn cuGraphGetNodes(graph: Handle, nodes: *mut Handle, count: *mut usize) {
        let graph = initialised()?.graphs.get(graph)?;
        if !nodes.is_null() {
            for i in 0..graph.len() {
                put(nodes.add(i), i + 1)?;
            }
        }
        put(count, graph.len())
    }

    fn cuGraphInstantiateWithFlags(exec: *mut Handle, graph: Handle, flags: u64) {
        let _ = flags;
        let driver = initialised()?;
        put(exec, driver.graphs.insert(driver.graphs.get(graph)?))
    }

    fn cuGraphLaunch(exec: Handle, stream: Handle) {
        let driver = initialised()?;
        let works = driver.graphs.get(exec)?;
        driver.enqueue(stream, move || works.iter().try_for_each(|work| work()))
    }

    fn cuGraphUpload(exec: Handle, stream: Handle) {
        let driver = initialised()?;
        driver.stream(stream)?;
        driver.graphs.get(exec).map(|_| ())
    }

    fn cuGraphDestroy(graph: Handle) { initialised()?.graphs.remove(graph).map(|_| ()) }

    fn cuGraphExecDestroy(exec: Handle) { initialised()?.graphs.remove(exec).map(|_| ()) }
}
