//! Capture of streams into graphs.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use super::{entry_points, put};
use crate::abi::*;
use crate::driver::initialised;
use crate::objects::graph::EdgeData;
use crate::objects::stream::{Capture, Captured};

/// `CUstreamCaptureStatus`.
const NONE: u32 = 0;
const ACTIVE: u32 = 1;

thread_local! {
    /// `CUstreamCaptureMode` of the thread.
    static MODE: Cell<u32> = const { Cell::new(0) };
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// Begins a capture into a given graph, else into a new one.
fn begin(stream: Handle, graph: Option<Handle>, after: Vec<Handle>) -> R {
    let driver = initialised()?;
    let found = driver.stream(stream)?;
    if found.capturing().is_some() {
        return Err(ERROR_ILLEGAL_STATE);
    }
    // The legacy default stream cannot be captured, as all others depend on it.
    if stream <= 1 {
        return Err(ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
    let (id, ended) = (NEXT_ID.fetch_add(1, Relaxed), AtomicBool::new(false));
    let given = graph.is_some();
    let graph = graph.unwrap_or_else(|| driver.graphs.insert(Arc::default()));
    let capture = Arc::new(Capture { graph, given, id, origin: stream, ended });
    found.set_captured(Captured { capture, after });
    Ok(())
}

/// What a client asks about a capture; all but the status may be unwanted.
struct Info {
    status: *mut u32,
    id: *mut u64,
    graph: *mut Handle,
    nodes: *mut *const Handle,
    edges: *mut *const EdgeData,
    count: *mut usize,
}

/// # Safety
/// The pointers are the client's.
unsafe fn info(stream: Handle, to: Info) -> R {
    let captured = initialised()?.stream(stream)?.capturing();
    let (id, graph) = captured.as_ref().map_or((0, 0), |c| (c.capture.id, c.capture.graph));
    // The lists are the client's until its next call; a capture is short, and so are they.
    let nodes: &'static [Handle] = captured.as_ref().map_or(Vec::new(), |c| c.after.clone()).leak();
    let edges: &'static [EdgeData] = vec![EdgeData::default(); nodes.len()].leak();
    // SAFETY: the caller's promise.
    unsafe {
        put(to.status, if captured.is_some() { ACTIVE } else { NONE })?;
        let _ = put(to.id, id);
        let _ = put(to.graph, graph);
        let _ = put(to.nodes, nodes.as_ptr());
        let _ = put(to.edges, edges.as_ptr());
        let _ = put(to.count, nodes.len());
    }
    Ok(())
}

/// # Safety
/// `nodes` has `count` entries.
unsafe fn update(stream: Handle, nodes: *const Handle, count: usize, flags: u32) -> R {
    const ADD: u32 = 0;
    let driver = initialised()?;
    let stream = driver.stream(stream)?;
    let mut captured = stream.capturing().ok_or(ERROR_ILLEGAL_STATE)?;
    if flags != ADD {
        captured.after.clear();
    }
    for i in 0..count {
        // SAFETY: within the count.
        let node = unsafe { *nodes.add(i) };
        driver.nodes.get(node).map_err(|_| ERROR_INVALID_VALUE)?;
        if !captured.after.contains(&node) {
            captured.after.push(node);
        }
    }
    stream.set_captured(captured);
    Ok(())
}

entry_points! {
    fn cuStreamBeginCapture(stream: Handle) {
        begin(stream, None, Vec::new())
    }

    fn cuStreamBeginCapture_v2(stream: Handle, mode: u32) {
        let _ = mode;
        begin(stream, None, Vec::new())
    }

    fn cuStreamBeginCaptureToGraph(
        stream: Handle,
        graph: Handle,
        nodes: *const Handle,
        edges: *const EdgeData,
        count: usize,
        mode: u32,
    ) {
        let _ = (edges, mode);
        initialised()?.graphs.get(graph)?;
        begin(stream, Some(graph), (0..count).map(|i| *nodes.add(i)).collect())
    }

    fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) {
        let driver = initialised()?;
        let captured = driver.stream(stream)?.capturing().ok_or(ERROR_ILLEGAL_STATE)?;
        if captured.capture.origin != stream {
            return Err(ERROR_STREAM_CAPTURE_UNMATCHED);
        }
        // Streams that joined the capture leave it with this.
        captured.capture.ended.store(true, Relaxed);
        match captured.capture.given && graph.is_null() {
            true => Ok(()),
            false => put(graph, captured.capture.graph),
        }
    }

    fn cuStreamIsCapturing(stream: Handle, status: *mut u32) {
        let capturing = initialised()?.stream(stream)?.capturing().is_some();
        put(status, if capturing { ACTIVE } else { NONE })
    }

    fn cuStreamGetCaptureInfo(stream: Handle, status: *mut u32, id: *mut u64) {
        use std::ptr::null_mut;
        let (graph, nodes, edges, count) = (null_mut(), null_mut(), null_mut(), null_mut());
        info(stream, Info { status, id, graph, nodes, edges, count })
    }

    fn cuStreamGetCaptureInfo_v2(
        stream: Handle,
        status: *mut u32,
        id: *mut u64,
        graph: *mut Handle,
        nodes: *mut *const Handle,
        count: *mut usize,
    ) {
        info(stream, Info { status, id, graph, nodes, edges: std::ptr::null_mut(), count })
    }

    fn cuStreamGetCaptureInfo_v3(
        stream: Handle,
        status: *mut u32,
        id: *mut u64,
        graph: *mut Handle,
        nodes: *mut *const Handle,
        edges: *mut *const EdgeData,
        count: *mut usize,
    ) {
        info(stream, Info { status, id, graph, nodes, edges, count })
    }

    fn cuStreamUpdateCaptureDependencies(
        stream: Handle,
        nodes: *const Handle,
        count: usize,
        flags: u32,
    ) {
        update(stream, nodes, count, flags)
    }

    fn cuStreamUpdateCaptureDependencies_v2(
        stream: Handle,
        nodes: *const Handle,
        edges: *const EdgeData,
        count: usize,
        flags: u32,
    ) {
        let _ = edges;
        update(stream, nodes, count, flags)
    }

    // All modes allow the same calls here: the thread's is kept to be told again.
    fn cuThreadExchangeStreamCaptureMode(mode: *mut u32) {
        const RELAXED: u32 = 2;
        let new = *mode.as_ref().ok_or(ERROR_INVALID_VALUE)?;
        if new > RELAXED {
            return Err(ERROR_INVALID_VALUE);
        }
        put(mode, MODE.replace(new))
    }
}
