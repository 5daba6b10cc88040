//! Ranks as processes over MPI: `mpirun` has started them, and MPI carries their frames. Feature
//! `mpi`; an MPI with threads (`MPI_THREAD_MULTIPLE`) is needed.
//!
//! Each other rank has a thread that sends, so that nobody waits for a receiver; one thread
//! receives for all. It asks now and then instead of waiting within MPI, which would keep a core
//! busy.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mpi::Threading;
use mpi::environment::Universe;
use mpi::point_to_point::MatchedReceiveVec;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, Destination, Source};

use super::environment::Environment;
use super::mail::Mail;
use super::processes::{Process, Wire, entered};
use super::store::MeetingError;
use super::wire::Frame;

/// Bytes of one MPI message: its count is a 32-bit number.
const MOST_BYTES: usize = 1 << 30;

/// How long the receiving thread sleeps where nothing has come.
const IDLE: Duration = Duration::from_micros(50);

/// Connects with the other ranks of `MPI_COMM_WORLD`.
///
/// # Errors
/// [`MeetingError`] where MPI does not start, knows other ranks than the environment, or has no
/// threads.
pub fn connect(environment: &Environment, timeout: Duration) -> Result<Process, MeetingError> {
    let fail = |message: String| MeetingError::new(environment, message);
    let started = mpi::initialize_with_threading(Threading::Multiple);
    let (universe, threading) = started.ok_or_else(|| fail("MPI was started before".into()))?;
    if threading != Threading::Multiple {
        return Err(fail(format!("expected an MPI with all threads, found {threading:?}")));
    }
    let world = universe.world();
    let (rank, size) = (world.rank() as usize, world.size() as usize);
    let Environment { rank: own, world: all, .. } = *environment;
    if (rank, size) != (own, all) {
        return Err(fail(format!(
            "expected rank {own} of {all}, found rank {rank} of {size} in MPI_COMM_WORLD; was the \
             program built for another MPI than this mpirun's?"
        )));
    }
    let mail = Arc::new(Mail::new(size, timeout));
    let links: Vec<_> = (0..size).map(|peer| (peer != rank).then(|| Link::new(peer))).collect();
    let over = Arc::new(AtomicBool::new(false));
    let answers: Vec<_> = links.iter().map(|l| l.as_ref().map(|l| l.frames.clone())).collect();
    let (table, until) = (Arc::clone(&mail), Arc::clone(&over));
    let receiver = thread::spawn(move || receive(&table, rank, &answers, &until));
    let ends = Mutex::new(Some((universe, receiver)));
    Ok(Process::new(rank, mail, Box::new(Mpi { links, over, ends })))
}

/// The thread that sends to a rank.
struct Link {
    frames: Sender<Frame>,
    sender: Mutex<Option<JoinHandle<()>>>,
}

impl Link {
    fn new(peer: usize) -> Link {
        let (frames, queue) = mpsc::channel();
        let sender = thread::spawn(move || send(peer, &queue));
        Link { frames, sender: Mutex::new(Some(sender)) }
    }
}

/// Sends frames until the last, each behind its length.
fn send(peer: usize, queue: &Receiver<Frame>) {
    let world = SimpleCommunicator::world();
    let to = world.process_at_rank(peer as i32);
    while let Ok(frame) = queue.recv() {
        let mut bytes = vec![0; 8];
        frame.write(&mut bytes).expect("memory takes all");
        let length = (bytes.len() as u64).to_le_bytes();
        bytes[..8].copy_from_slice(&length);
        bytes.chunks(MOST_BYTES).for_each(|part| to.send(part));
        if matches!(frame, Frame::Ended | Frame::Failed(..)) {
            return;
        }
    }
}

/// Receives until the end, and enters what comes.
fn receive(mail: &Mail, rank: usize, answers: &[Option<Sender<Frame>>], over: &AtomicBool) {
    let world = SimpleCommunicator::world();
    let mut parts: Vec<Vec<u8>> = vec![Vec::new(); answers.len()];
    while !over.load(Ordering::SeqCst) {
        let Some(found) = world.any_process().immediate_matched_probe() else {
            thread::sleep(IDLE);
            continue;
        };
        let (part, status) = found.matched_receive_vec::<u8>();
        let from = status.source_rank() as usize;
        let bytes = &mut parts[from];
        match bytes.is_empty() {
            true => *bytes = part,
            false => bytes.extend(part),
        }
        let length = bytes.first_chunk().map_or(0, |first| u64::from_le_bytes(*first));
        if length != bytes.len() as u64 {
            continue;
        }
        match Frame::read(&mut &std::mem::take(bytes)[8..]) {
            Ok(frame) => {
                if let (Some(answer), Some(to)) =
                    (entered(mail, (from, rank), frame), &answers[from])
                {
                    // The sender is gone only where this process ends.
                    let _ = to.send(answer);
                }
            }
            Err(error) => mail.end(from, Some(error.to_string())),
        }
    }
}

struct Mpi {
    links: Vec<Option<Link>>,
    over: Arc<AtomicBool>,
    /// MPI, until it is left, and the thread that receives.
    ends: Mutex<Option<(Universe, JoinHandle<()>)>>,
}

impl Wire for Mpi {
    fn send(&self, to: usize, frame: Frame) {
        if let Some(link) = &self.links[to] {
            // A sender that has ended has sent its last.
            let _ = link.frames.send(frame);
        }
    }

    fn close(&self, last: &Frame, longest: Duration) {
        let begin = Instant::now();
        (0..self.links.len()).for_each(|to| self.send(to, last.clone()));
        for link in self.links.iter().flatten() {
            let mut sender = link.sender.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(sender) = sender.take() else { continue };
            while !sender.is_finished() && begin.elapsed() < longest {
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// MPI is left by all ranks together. Where one has failed it is not left at all: the process
    /// then ends with an error, upon which `mpirun` ends those that are left.
    fn leave(&self, orderly: bool) {
        let ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((universe, receiver)) = ends else { return };
        if !orderly {
            return std::mem::forget(universe);
        }
        self.over.store(true, Ordering::SeqCst);
        // It has nothing left to receive.
        let _ = receiver.join();
        drop(universe);
    }
}
