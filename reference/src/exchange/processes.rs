//! Ranks as processes: what others send is entered into this process's table, what this rank sends
//! goes out by its links, over TCP or MPI.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::environment::Environment;
use super::links::Links;
use super::mail::Mail;
use super::store::MeetingError;
use super::threads::{End, GRACE, TICK, error_of, on_own_pool};
use super::wire::Frame;
use super::{Exchange, ExchangeError, Label, Message};
use crate::Tensor;

/// Lets the others go, once all have ended as they should (`true`) or one has not.
pub(super) type Leave = Box<dyn Fn(bool) + Send + Sync>;

/// What carries the messages of processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Sockets: needs nothing.
    Tcp,
    /// MPI, where the program was built for it (feature `mpi`).
    Mpi,
}

impl Transport {
    /// MPI where the program has it and `mpirun` has started the process, else TCP.
    pub fn of(environment: &Environment) -> Transport {
        match cfg!(feature = "mpi") && environment.by_mpirun {
            true => Transport::Mpi,
            false => Transport::Tcp,
        }
    }
}

/// Connects with the other ranks. No wait is longer than `timeout`, here or later.
///
/// # Errors
/// [`MeetingError`].
pub fn connect(
    environment: &Environment,
    transport: Transport,
    timeout: Duration,
) -> Result<Process, MeetingError> {
    match transport {
        Transport::Tcp => super::tcp::connect(environment, timeout),
        #[cfg(feature = "mpi")]
        Transport::Mpi => super::mpi::connect(environment, timeout),
        #[cfg(not(feature = "mpi"))]
        Transport::Mpi => {
            let message = "expected a program built with --features mpi, found one without";
            Err(MeetingError::new(environment, message.to_owned()))
        }
    }
}

/// How long a rank whose time is over waits for the others to say what they wait for.
const ANSWER: Duration = Duration::from_secs(2);

/// Enters what a rank sent; gives the answer that it is owed.
pub(super) fn entered(mail: &Mail, (from, to): (usize, usize), frame: Frame) -> Option<Frame> {
    match frame {
        Frame::Message(message) => mail.deliver(from, to, message),
        Frame::Ask => return Some(Frame::Waits(mail.wait_of(to))),
        Frame::Waits(wait) => mail.answer(from, wait),
        Frame::Failed(rank, error) => {
            mail.end(rank, Some(error));
            mail.end(from, None);
        }
        Frame::Ended => mail.end(from, None),
    }
    None
}

/// Enters that a rank is not there any more, unless it has said that it ends.
pub(super) fn lost(mail: &Mail, rank: usize, how: &str) {
    if !mail.has_ended(rank) {
        mail.end(rank, Some(format!("its process is gone: {how}")));
    }
}

/// This process's rank.
pub struct Process {
    rank: usize,
    mail: Arc<Mail>,
    links: Links,
    leave: Leave,
}

impl Process {
    pub(super) fn new(rank: usize, mail: Arc<Mail>, links: Links, leave: Leave) -> Process {
        Process { rank, mail, links, leave }
    }

    fn others(&self) -> impl Iterator<Item = usize> {
        let own = self.rank;
        (0..self.mail.world()).filter(move |&rank| rank != own)
    }

    /// Asks every rank what it waits for. One that computes answers too; one that is stopped, or
    /// whose machine is lost, does not.
    fn ask(&self) {
        self.mail.ask(self.others());
        self.others().for_each(|rank| self.links.send(rank, Frame::Ask));
        let begin = Instant::now();
        while !self.mail.all_answered() && begin.elapsed() < ANSWER {
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Tells the others how this rank has ended, and waits for those that are not through yet.
    fn end(&self, error: Option<String>) {
        let failure = self.mail.failure().map(|(rank, error, _)| (rank, error));
        if let Some((rank, error)) = failure.or_else(|| Some((self.rank, error?))) {
            self.links.close(&Frame::Failed(rank, error), ANSWER);
            return (self.leave)(false);
        }
        self.links.close(&Frame::Ended, self.mail.timeout());
        // A process that closes its connections while others still send would take from them what
        // is on its way.
        let begin = Instant::now();
        let all = || self.mail.failure().is_some() || self.others().all(|r| self.mail.has_ended(r));
        while !all() && begin.elapsed() < self.mail.timeout() {
            thread::sleep(Duration::from_millis(1));
        }
        (self.leave)(all() && self.mail.failure().is_none());
    }
}

impl Exchange for Process {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.mail.world()
    }

    fn post(&self, to: usize, message: Message) -> Result<(), ExchangeError> {
        self.mail.check(self.rank, &message.label)?;
        match to == self.rank {
            true => self.mail.deliver(to, to, message),
            false => self.links.send(to, Frame::Message(message)),
        }
        Ok(())
    }

    fn take(&self, from: usize, expected: &Label) -> Result<Vec<Tensor>, ExchangeError> {
        self.mail.take(self.rank, from, expected, &|| self.ask())
    }
}

/// Runs `main` as the rank that this process is, on `cores` threads, and gives how it ended. `tick`
/// is called on this thread every now and then until then.
///
/// Where another rank fails, this one ends at its next exchange. A rank that then still computes is
/// given up: what it does is left behind when the process ends.
pub fn run<T, E>(
    process: Process,
    cores: usize,
    main: impl FnOnce(Arc<dyn Exchange>) -> Result<T, E> + Send + 'static,
    tick: &mut dyn FnMut(),
) -> End<T, E>
where
    T: Send + 'static,
    E: std::fmt::Display + Send + 'static,
{
    let process = Arc::new(process);
    let exchange: Arc<dyn Exchange> = Arc::clone(&process) as _;
    let (sender, receiver) = mpsc::channel();
    let builder = thread::Builder::new().name(format!("rank {}", process.rank));
    let body = move || {
        // The receiver may have given this rank up.
        let _ = sender.send(on_own_pool(cores, || main(exchange)));
    };
    builder.spawn(body).expect("the system starts a thread");
    let end = loop {
        tick();
        match receiver.recv_timeout(TICK) {
            Ok(end) => break end,
            Err(RecvTimeoutError::Disconnected) => break End::Hangs,
            Err(RecvTimeoutError::Timeout) => {}
        }
        if process.mail.failure().is_some_and(|(.., since)| since > GRACE) {
            break End::Hangs;
        }
    };
    tick();
    process.end(error_of(&end));
    end
}
