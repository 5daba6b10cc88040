//! What is on its way to the other ranks of a process: handing a frame over waits for nobody, since
//! a thread of the transport sends it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::wire::Frame;

/// Ranks to which the last frame has not gone yet.
#[derive(Clone)]
pub(super) struct Open(Arc<AtomicUsize>);

impl Open {
    /// The ways to so many ranks.
    pub fn new(ranks: usize) -> Open {
        Open(Arc::new(AtomicUsize::new(ranks)))
    }

    /// One has sent its last, or noted why it could not.
    pub fn close(&self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The ways to all other ranks.
pub(super) struct Links {
    others: Vec<usize>,
    open: Open,
    post: Box<dyn Fn(usize, Frame) + Send + Sync>,
}

impl Links {
    /// The ways from `rank` to the others of `world`; `post` takes what is to go to one of them.
    pub fn new(
        (rank, world): (usize, usize),
        open: Open,
        post: Box<dyn Fn(usize, Frame) + Send + Sync>,
    ) -> Links {
        Links { others: (0..world).filter(|&other| other != rank).collect(), open, post }
    }

    /// Hands a frame over, without waiting until it has arrived.
    pub fn send(&self, to: usize, frame: Frame) {
        (self.post)(to, frame);
    }

    /// Sends `last` to every rank, nothing after it, and waits until all has been handed to the
    /// system, at most `longest`.
    pub fn close(&self, last: &Frame, longest: Duration) {
        let begin = Instant::now();
        self.others.iter().for_each(|&to| self.send(to, last.clone()));
        while self.open.0.load(Ordering::SeqCst) > 0 && begin.elapsed() < longest {
            thread::sleep(Duration::from_millis(1));
        }
    }
}
