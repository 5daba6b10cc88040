//! Giving streams something to do, and waiting for them.

use super::{Driver, driver};
use crate::abi::*;
use crate::objects::graph::EdgeData;
use crate::objects::operation::Operation;
use crate::objects::stream::{Captured, Stream};
use crate::queue::Mark;

impl Driver {
    /// What a stream must wait for beside itself: a blocking stream for the legacy default stream,
    /// and that one for all blocking streams of its device.
    fn before(&self, stream: &Stream) -> Vec<Mark> {
        if stream.flags & STREAM_NON_BLOCKING != 0 {
            return Vec::new();
        }
        if stream.handle != 0 {
            return vec![self.queue.mark((stream.device, 0))];
        }
        let nonblocking = self.streams.which(|s| s.flags & STREAM_NON_BLOCKING != 0);
        self.queue.marks(|(device, handle)| {
            device == stream.device && handle != 0 && !nonblocking.contains(&handle)
        })
    }

    /// Gives a stream something to do, or its graph a node where it captures. `after` is what the
    /// work waits for beside the stream's order.
    pub(crate) fn submit(&self, stream: Handle, operation: Operation) -> R {
        self.submit_after(stream, operation, Vec::new())
    }

    /// As [`Driver::submit`], after further places in the streams' order.
    pub(crate) fn submit_after(
        &self,
        stream: Handle,
        operation: Operation,
        mut after: Vec<Mark>,
    ) -> R {
        self.error()?;
        let at_once = operation.check()?;
        let stream = self.stream(stream)?;
        if let Some(captured) = stream.capturing() {
            let edges = captured.after.iter().map(|node| (*node, EdgeData::default())).collect();
            let node = self.add_node(captured.capture.graph, edges, operation)?;
            stream.set_captured(Captured { after: vec![node], ..captured });
            return Ok(());
        }
        after.extend(self.before(&stream));
        let key = (stream.device, stream.handle);
        if at_once {
            after.push(self.queue.mark(key));
            driver().queue.wait(&after);
            self.error()?;
        }
        let (mut recorded, mut awaited) = (Vec::new(), Vec::new());
        operation.events(&mut recorded, &mut awaited);
        for event in awaited {
            after.extend(*self.events.get(event)?.recorded.lock().expect("no panic holds it"));
        }
        let recorded: Vec<_> =
            recorded.into_iter().map(|e| self.events.get(e)).collect::<R<_>>()?;
        recorded.iter().for_each(|event| event.count_record());
        let (mark, result) = driver().queue.give(key, after, operation.work(stream.device));
        for event in recorded {
            *event.captured.lock().expect("no panic holds this lock") = None;
            *event.recorded.lock().expect("no panic holds this lock") = Some(mark);
        }
        if at_once {
            // Another thread may have given the stream something in between.
            driver().queue.wait(&[mark]);
            self.error()?;
        }
        result
    }

    /// Waits for a stream; the error that a kernel left, if any.
    pub(crate) fn wait_for(&self, stream: Handle) -> R {
        driver().queue.wait(&self.marks_of(stream)?);
        self.error()
    }

    /// What a stream has been given, and what that waits for.
    pub(crate) fn marks_of(&self, stream: Handle) -> R<Vec<Mark>> {
        let stream = self.stream(stream)?;
        if stream.capturing().is_some() {
            return Err(ERROR_STREAM_CAPTURE_UNSUPPORTED);
        }
        let mut marks = self.before(&stream);
        marks.push(self.queue.mark((stream.device, stream.handle)));
        Ok(marks)
    }

    /// Waits for all streams of all devices; the error that a kernel left, if any.
    pub(crate) fn wait_for_all(&self) -> R {
        driver().queue.wait(&self.queue.marks(|_| true));
        self.error()
    }
}
