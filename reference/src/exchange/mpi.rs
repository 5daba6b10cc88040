//! Ranks as processes over MPI: `mpirun` has started them, and MPI carries their frames. Feature
//! `mpi`; an MPI with threads (`MPI_THREAD_MULTIPLE`) is needed.
//!
//! Each other rank has a thread that sends, so that nobody waits for a receiver; one thread
//! receives for all. It asks now and then instead of waiting within MPI, which would keep a core
//! busy.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use mpi::Threading;
use mpi::point_to_point::MatchedReceiveVec;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, Destination, Source};

use super::environment::Environment;
use super::links::{Link, Links};
use super::mail::Mail;
use super::processes::{Process, entered};
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
    let links = Links((0..size).map(|peer| (peer != rank).then(|| link(peer))).collect());
    let over = Arc::new(AtomicBool::new(false));
    let answers: Vec<_> = links.0.iter().map(|l| l.as_ref().map(|l| l.frames.clone())).collect();
    let (table, until) = (Arc::clone(&mail), Arc::clone(&over));
    let receiver = thread::spawn(move || receive(&table, rank, &answers, &until));
    let ends = Mutex::new(Some((universe, receiver)));
    // MPI is left by all ranks together. Where one has failed it is not left at all: the process
    // then ends with an error, upon which `mpirun` ends those that are left.
    let leave = move |orderly: bool| {
        let ends = ends.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((universe, receiver)) = ends else { return };
        if !orderly {
            return std::mem::forget(universe);
        }
        over.store(true, Ordering::SeqCst);
        // It has nothing left to receive.
        let _ = receiver.join();
        drop(universe);
    };
    Ok(Process::new(rank, mail, links, Box::new(leave)))
}

/// The way to a rank.
fn link(peer: usize) -> Link {
    let (frames, queue) = mpsc::channel();
    Link::new(frames, thread::spawn(move || send(peer, &queue)))
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
