//! What is on its way to the other ranks of a process: each has a queue and a thread that empties
//! it, so that nobody waits for a receiver.

use std::sync::mpsc::Sender;
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::wire::Frame;

/// The way to a rank.
pub(super) struct Link {
    /// The queue of what it still has to send.
    pub frames: Sender<Frame>,
    sender: Mutex<Option<JoinHandle<()>>>,
}

impl Link {
    /// The queue of `frames`, which `sender` empties until the last one.
    pub fn new(frames: Sender<Frame>, sender: JoinHandle<()>) -> Link {
        Link { frames, sender: Mutex::new(Some(sender)) }
    }
}

/// The ways to all ranks, none to the own one.
pub(super) struct Links(pub Vec<Option<Link>>);

impl Links {
    /// Hands a frame over, without waiting until it has arrived.
    pub fn send(&self, to: usize, frame: Frame) {
        if let Some(link) = &self.0[to] {
            // A sender that has ended has sent its last, or noted why it could not.
            let _ = link.frames.send(frame);
        }
    }

    /// Sends `last` to every rank, nothing after it, and waits until all has been handed to the
    /// system, at most `longest`.
    pub fn close(&self, last: &Frame, longest: Duration) {
        let begin = Instant::now();
        (0..self.0.len()).for_each(|to| self.send(to, last.clone()));
        for link in self.0.iter().flatten() {
            let mut sender = link.sender.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(sender) = sender.take() else { continue };
            while !sender.is_finished() && begin.elapsed() < longest {
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
}
