//! Ranks as processes over MPI: `mpirun` has started them, and MPI carries their frames. Feature
//! `mpi`.
//!
//! One thread, the carrier, starts MPI, makes all calls and ends it, so that an MPI without threads
//! will do. No call of it blocks: it looks after sends and receives in turns, and sleeps where
//! nothing moves. Calls that block keep a core busy each, and ranks that share cores then wait for
//! those that only look busy.
//!
//! It has the one unsafe block of the exchanges: MPI reads and writes buffers after the call that
//! names them.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use mpi::Threading;
use mpi::environment::Universe;
use mpi::request::{Request, StaticScope};
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, Destination, Equivalence, Source};

use super::environment::Environment;
use super::links::{Links, Open};
use super::mail::Mail;
use super::processes::{Process, entered};
use super::store::MeetingError;
use super::wire::Frame;

/// Bytes of one MPI message: its count is a 32-bit number.
const MOST_BYTES: usize = 1 << 30;

/// Rounds in which nothing moves until the carrier begins to sleep.
const ROUNDS: u32 = 64;

/// How long it sleeps at first, and at most: what arrives is seen after that long.
const SLEEP: [Duration; 2] = [Duration::from_micros(20), Duration::from_micros(500)];

/// What the carrier is asked for.
enum Order {
    Send(usize, Frame),
    /// The end; `true` where all ranks have come to it as they should.
    Leave(bool),
}

/// Connects with the other ranks of `MPI_COMM_WORLD`.
///
/// # Errors
/// [`MeetingError`] where MPI does not start, or knows other ranks than the environment.
pub fn connect(environment: &Environment, timeout: Duration) -> Result<Process, MeetingError> {
    let Environment { rank, world, .. } = *environment;
    let mail = Arc::new(Mail::new(world, timeout));
    let open = Open::new(world - 1);
    let (orders, queue) = mpsc::channel();
    let (tell, begun) = mpsc::channel();
    let (environment, table, ways) = (environment.clone(), Arc::clone(&mail), open.clone());
    let answers = orders.clone();
    let carry = move || {
        let (universe, told) = match begin(&environment) {
            Ok(universe) => (Some(universe), Ok(())),
            Err(error) => (None, Err(error)),
        };
        // Whoever connects waits for it.
        let _ = tell.send(told);
        let Some(universe) = universe else { return };
        let world = universe.world();
        let arriving = (0..world.size()).map(|_| Arriving::default()).collect();
        let (leaving, rank) = (Vec::new(), environment.rank);
        let carrier =
            Carrier { world, rank, mail: table, queue, answers, leaving, arriving, open: ways };
        if !carrier.run() {
            // MPI is left by all ranks together. Where one has failed it is not left at all: the
            // process then ends with an error, upon which `mpirun` ends those that are left.
            std::mem::forget(universe);
        }
    };
    let builder = thread::Builder::new().name("MPI".to_owned());
    let carrier = builder.spawn(carry).expect("the system starts a thread");
    begun.recv().expect("the carrier tells how it began")?;
    let post = orders.clone();
    // A carrier that has ended has sent all that it was to send.
    let post = move |to, frame| drop(post.send(Order::Send(to, frame)));
    let links = Links::new((rank, world), open, Box::new(post));
    let carrier = Mutex::new(Some(carrier));
    let leave = move |orderly: bool| {
        let carrier = carrier.lock().unwrap_or_else(PoisonError::into_inner).take();
        let _ = orders.send(Order::Leave(orderly));
        if let (true, Some(carrier)) = (orderly, carrier) {
            // It says itself what went wrong.
            let _ = carrier.join();
        }
    };
    Ok(Process::new(rank, mail, links, Box::new(leave)))
}

/// Starts MPI on this thread.
fn begin(environment: &Environment) -> Result<Universe, MeetingError> {
    let fail = |message: String| MeetingError::new(environment, message);
    let started = mpi::initialize_with_threading(Threading::Funneled);
    let (universe, threading) = started.ok_or_else(|| fail("MPI was started before".into()))?;
    let world = universe.world();
    let found = (world.rank() as usize, world.size() as usize);
    let refusal = if threading < Threading::Funneled {
        Some(format!("expected an MPI that programs with threads may call, found {threading:?}"))
    } else if found != (environment.rank, environment.world) {
        Some(format!(
            "expected rank {} of {}, found rank {} of {} in MPI_COMM_WORLD; was the program built \
             for another MPI than this mpirun's?",
            environment.rank, environment.world, found.0, found.1
        ))
    } else {
        None
    };
    match refusal {
        None => Ok(universe),
        Some(message) => {
            std::mem::forget(universe);
            Err(fail(message))
        }
    }
}

/// A request of MPI, and what it reads or writes until it is done.
struct Flight {
    request: Option<Request<'static, [u8], StaticScope>>,
    bytes: Vec<u8>,
}

impl Flight {
    fn begin(
        mut bytes: Vec<u8>,
        request: impl FnOnce(&'static mut [u8]) -> Request<'static, [u8], StaticScope>,
    ) -> Flight {
        // SAFETY: the elements stay where they are until the request is done: the vector is neither
        // changed nor dropped before (`is_done`, `forget`).
        let all = unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr(), bytes.len()) };
        Flight { request: Some(request(all)), bytes }
    }

    fn is_done(&mut self) -> bool {
        self.request = self.request.take().and_then(|request| request.test().err());
        self.request.is_none()
    }

    /// Leaves it to MPI for ever.
    fn forget(self) {
        std::mem::forget(self);
    }
}

/// What comes from a rank.
#[derive(Default)]
struct Arriving {
    /// In the order in which it was sent.
    flights: VecDeque<Flight>,
    /// Beginning of a frame of several MPI messages.
    parts: Vec<u8>,
}

/// The thread that makes the calls.
struct Carrier {
    world: SimpleCommunicator,
    rank: usize,
    mail: Arc<Mail>,
    queue: Receiver<Order>,
    /// The same queue's other end: answers go where all else goes.
    answers: Sender<Order>,
    /// What is on its way; true for the last frame to a rank.
    leaving: Vec<(Flight, bool)>,
    /// What is on its way here, by sender.
    arriving: Vec<Arriving>,
    open: Open,
}

impl Carrier {
    /// Carries frames until the rank leaves; gives whether it does so as it should.
    fn run(mut self) -> bool {
        let mut still = 0;
        loop {
            let mut moved = false;
            loop {
                match self.queue.try_recv() {
                    Ok(Order::Send(to, frame)) => self.send(to, &frame),
                    Ok(Order::Leave(orderly)) => return self.left(orderly),
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
                }
                moved = true;
            }
            moved |= self.sent();
            moved |= self.receive();
            still = if moved { 0 } else { still + 1 };
            match still {
                0 => {}
                1..ROUNDS => thread::yield_now(),
                _ => {
                    let pause = SLEEP[0] * 2u32.saturating_pow((still - ROUNDS) / ROUNDS);
                    match self.queue.recv_timeout(pause.min(SLEEP[1])) {
                        Ok(Order::Send(to, frame)) => {
                            self.send(to, &frame);
                            still = 0;
                        }
                        Ok(Order::Leave(orderly)) => return self.left(orderly),
                        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
                    }
                }
            }
        }
    }

    fn left(mut self, orderly: bool) -> bool {
        let nothing_flies =
            self.leaving.is_empty() && self.arriving.iter().all(|of| of.flights.is_empty());
        self.leaving.drain(..).for_each(|(flight, _)| flight.forget());
        self.arriving.iter_mut().flat_map(|of| of.flights.drain(..)).for_each(Flight::forget);
        orderly && nothing_flies
    }

    /// Begins to send a frame, behind its length.
    fn send(&mut self, to: usize, frame: &Frame) {
        let mut bytes = vec![0; 8];
        frame.write(&mut bytes).expect("memory takes all");
        let length = (bytes.len() as u64).to_le_bytes();
        bytes[..8].copy_from_slice(&length);
        let last = matches!(frame, Frame::Ended | Frame::Failed(..));
        let process = self.world.process_at_rank(to as i32);
        let send = |part: &'static mut [u8]| process.immediate_send(StaticScope, &*part);
        if bytes.len() <= MOST_BYTES {
            return self.leaving.push((Flight::begin(bytes, send), last));
        }
        for part in bytes.chunks(MOST_BYTES) {
            self.leaving.push((Flight::begin(part.to_vec(), send), false));
        }
    }

    /// Whether something has arrived elsewhere.
    fn sent(&mut self) -> bool {
        let before = self.leaving.len();
        let open = &self.open;
        self.leaving.retain_mut(|(flight, last)| {
            let done = flight.is_done();
            if done && *last {
                open.close();
            }
            !done
        });
        self.leaving.len() < before
    }

    /// Begins to receive what comes and enters what has come; whether there was anything.
    fn receive(&mut self) -> bool {
        let mut moved = false;
        while let Some((message, status)) = self.world.any_process().immediate_matched_probe() {
            moved = true;
            let count = status.count(u8::equivalent_datatype()) as usize;
            let into = |part| message.immediate_matched_receive_into(StaticScope, part);
            let flight = Flight::begin(vec![0; count], into);
            self.arriving[status.source_rank() as usize].flights.push_back(flight);
        }
        for from in 0..self.arriving.len() {
            while self.arriving[from].flights.front_mut().is_some_and(Flight::is_done) {
                moved = true;
                let of = &mut self.arriving[from];
                let bytes = of.flights.pop_front().expect("just seen").bytes;
                match of.parts.is_empty() {
                    true => of.parts = bytes,
                    false => of.parts.extend(bytes),
                }
                let length = of.parts.first_chunk().map_or(0, |first| u64::from_le_bytes(*first));
                if length == of.parts.len() as u64 {
                    let frame = std::mem::take(&mut of.parts);
                    self.enter(from, &frame[8..]);
                }
            }
        }
        moved
    }

    fn enter(&self, from: usize, mut frame: &[u8]) {
        match Frame::read(&mut frame) {
            Ok(frame) => {
                if let Some(answer) = entered(&self.mail, (from, self.rank), frame) {
                    // It is this thread that takes it.
                    let _ = self.answers.send(Order::Send(from, answer));
                }
            }
            Err(error) => self.mail.end(from, Some(error.to_string())),
        }
    }
}
