//! Where processes meet: a small key-value server that rank 0 runs at `MASTER_ADDR:MASTER_PORT`
//! until all have found each other.
//!
//! A client says who it is, sets keys and asks for them; requests and answers are lines of JSON. A
//! client of another program, of another number of ranks or with a rank that is taken is refused,
//! with both sides. Once a client is lost, every answer says so.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::environment::Environment;

/// Why ranks do not meet.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rank {rank}: meeting {place}: {message}")]
pub struct MeetingError {
    /// The rank that tells.
    pub rank: usize,
    /// Where ranks meet, in words.
    pub place: String,
    /// What is wrong, and what to do.
    pub message: String,
}

impl MeetingError {
    pub(super) fn new(environment: &Environment, message: String) -> MeetingError {
        let place = match &environment.meeting {
            (Some(host), port) => format!("at {host}:{port}"),
            (None, _) => "of all ranks".to_owned(),
        };
        MeetingError { rank: environment.rank, place, message }
    }
}

/// Host and port of the meeting.
fn place(environment: &Environment) -> Result<(&str, u16), MeetingError> {
    let (host, port) = &environment.meeting;
    host.as_deref().map(|host| (host, *port)).ok_or_else(|| {
        let message = "expected in MASTER_ADDR the address of rank 0's machine, where ranks meet, \
                       found nothing (mpirun -x MASTER_ADDR=HOST)";
        MeetingError::new(environment, message.to_owned())
    })
}

/// Who a client is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Guest {
    program: String,
    run: String,
    world: usize,
    rank: usize,
}

impl Guest {
    fn of(environment: &Environment) -> Guest {
        let Environment { run, world, rank, .. } = environment;
        let program = format!("fathom {}", env!("CARGO_PKG_VERSION"));
        Guest { program, run: run.clone(), world: *world, rank: *rank }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Request {
    Hello(Guest),
    Set(String, String),
    Get(String),
    Leave,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Value(Option<String>),
    Refused(String),
}

/// No line is longer.
const MOST_LINE: u64 = 1 << 20;

/// How long a client sleeps until it asks again for what is not there yet.
const AGAIN: Duration = Duration::from_millis(10);

fn write_line(stream: &mut impl Write, of: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(of).expect("plain data");
    line.push(b'\n');
    stream.write_all(&line)
}

fn read_line<T: for<'a> Deserialize<'a>>(from: &mut BufReader<TcpStream>) -> io::Result<T> {
    let mut line = Vec::new();
    let read = from.by_ref().take(MOST_LINE).read_until(b'\n', &mut line)?;
    if read == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_slice(&line).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// What the server knows.
struct Register {
    host: Guest,
    values: BTreeMap<String, String>,
    /// Ranks that have come, and of these those that have left as they should.
    come: Vec<bool>,
    left: Vec<bool>,
    failure: Option<String>,
}

impl Register {
    /// Whether a client may come in; with words where not, and whether the meeting fails by it.
    fn admit(&mut self, guest: &Guest) -> Result<(), (String, bool)> {
        let own = &self.host;
        let differs = |what: &str, own: &str, theirs: &str| {
            format!("rank {} has {what} {theirs}, rank 0 has {own}", guest.rank)
        };
        if guest.run != own.run {
            // Of somebody else's run; this one does not mind.
            return Err((differs("the run", &own.run, &guest.run), false));
        }
        if guest.program != own.program {
            return Err((differs("the program", &own.program, &guest.program), true));
        }
        if guest.world != own.world {
            let [own, theirs] = [own.world, guest.world].map(|world| world.to_string());
            return Err((differs("a world of", &own, &theirs), true));
        }
        match self.come.get_mut(guest.rank) {
            Some(come) if !*come => *come = true,
            _ => return Err((format!("rank {} is there twice", guest.rank), true)),
        }
        Ok(())
    }

    fn answer(&mut self, request: Request) -> Answer {
        if let Some(failure) = &self.failure {
            return Answer::Refused(failure.clone());
        }
        match request {
            Request::Get(key) => Answer::Value(self.values.get(&key).cloned()),
            Request::Set(key, value) => {
                self.values.insert(key, value);
                Answer::Value(None)
            }
            Request::Hello(_) | Request::Leave => Answer::Value(None),
        }
    }

    fn over(&self) -> bool {
        self.failure.is_some() || self.left.iter().all(|left| *left)
    }
}

/// The server: it answers until every rank has left.
pub(super) struct Server {
    register: Arc<Mutex<Register>>,
}

impl Server {
    /// Opens the meeting on rank 0.
    ///
    /// # Errors
    /// [`MeetingError`] where the port is taken, or the address is none of this machine.
    pub fn open(environment: &Environment) -> Result<Server, MeetingError> {
        let (host, port) = place(environment)?;
        // A name may stand for another address here than elsewhere, so all are listened at; what
        // says that it is of this machine alone is.
        let local = ["localhost", "127.0.0.1", "::1"].contains(&host);
        let bound = match local {
            true => TcpListener::bind((host, port)),
            false => TcpListener::bind(("0.0.0.0", port)),
        };
        let listener = bound.and_then(|l| l.set_nonblocking(true).map(|()| l));
        let listener = listener.map_err(|e| {
            let message = format!("rank 0 cannot listen there: {e}; name a free MASTER_PORT");
            MeetingError::new(environment, message)
        })?;
        let register = Arc::new(Mutex::new(Register {
            host: Guest::of(environment),
            values: BTreeMap::new(),
            come: vec![false; environment.world],
            left: vec![false; environment.world],
            failure: None,
        }));
        let server = Server { register: Arc::clone(&register) };
        thread::spawn(move || {
            while !lock(&register).over() {
                match listener.accept() {
                    Ok((stream, _)) => {
                        let register = Arc::clone(&register);
                        thread::spawn(move || serve(stream, &register));
                    }
                    Err(_) => thread::sleep(AGAIN / 2),
                }
            }
        });
        Ok(server)
    }

    /// Waits until every rank that has come has left or knows what has failed, but not long.
    pub fn close(self) {
        let begin = Instant::now();
        let over = || {
            let register = lock(&self.register);
            register.come.iter().zip(&register.left).all(|(come, left)| !come || *left)
        };
        while !over() && begin.elapsed() < Duration::from_secs(2) {
            thread::sleep(AGAIN / 2);
        }
    }
}

fn lock(register: &Mutex<Register>) -> MutexGuard<'_, Register> {
    register.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers a client until it leaves. Who says nothing that makes sense is let go.
fn serve(stream: TcpStream, register: &Mutex<Register>) {
    let plain = stream.set_nonblocking(false).and_then(|()| stream.set_nodelay(true));
    let (Ok(()), Ok(mut out)) = (plain, stream.try_clone()) else { return };
    let mut from = BufReader::new(stream);
    let Ok(Request::Hello(guest)) = read_line(&mut from) else { return };
    let admitted = lock(register).admit(&guest);
    if let Err((words, fails)) = admitted {
        let _ = write_line(&mut out, &Answer::Refused(words.clone()));
        if fails {
            lock(register).failure.get_or_insert(words);
        }
        return;
    }
    let _ = write_line(&mut out, &Answer::Value(None));
    loop {
        let request = read_line(&mut from);
        let leaves = matches!(request, Ok(Request::Leave));
        let answer = {
            let mut register = lock(register);
            if leaves || request.is_err() {
                register.left[guest.rank] = true;
            }
            match request {
                Ok(request) => register.answer(request),
                Err(_) => {
                    let words = format!("rank {} is lost before all ranks have met", guest.rank);
                    register.failure.get_or_insert(words);
                    return;
                }
            }
        };
        if matches!(answer, Answer::Refused(_)) {
            lock(register).left[guest.rank] = true;
        }
        let _ = write_line(&mut out, &answer);
        if leaves {
            return;
        }
    }
}

/// A rank's connection to the server.
pub(super) struct Client<'a> {
    environment: &'a Environment,
    from: BufReader<TcpStream>,
    end: Instant,
}

impl<'a> Client<'a> {
    /// Comes to the meeting, and waits until it is open, at most `timeout` in all.
    ///
    /// # Errors
    /// [`MeetingError`].
    pub fn come(environment: &'a Environment, timeout: Duration) -> Result<Self, MeetingError> {
        let end = Instant::now() + timeout;
        let fail = |message: String| MeetingError::new(environment, message);
        let (host, port) = place(environment)?;
        let stream = loop {
            match TcpStream::connect((host, port)) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > end => {
                    let seconds = timeout.as_secs_f64();
                    return Err(fail(format!("nobody there for {seconds} s: {error}")));
                }
                Err(_) => thread::sleep(AGAIN),
            }
        };
        let ready = stream.set_nodelay(true);
        ready.and_then(|()| stream.set_read_timeout(Some(timeout))).map_err(|e| fail(words(&e)))?;
        let mut client = Client { environment, from: BufReader::new(stream), end };
        client.ask(&Request::Hello(Guest::of(environment)))?;
        Ok(client)
    }

    /// This machine's address on the way to the meeting, and the meeting's.
    pub fn addresses(&self) -> io::Result<(IpAddr, SocketAddr)> {
        let stream = self.from.get_ref();
        Ok((stream.local_addr()?.ip(), stream.peer_addr()?))
    }

    fn fail(&self, message: String) -> MeetingError {
        MeetingError::new(self.environment, message)
    }

    fn ask(&mut self, request: &Request) -> Result<Option<String>, MeetingError> {
        let asked = write_line(self.from.get_mut(), request);
        match asked.and_then(|()| read_line(&mut self.from)) {
            Ok(Answer::Value(value)) => Ok(value),
            Ok(Answer::Refused(message)) => Err(self.fail(message)),
            Err(error) => Err(self.fail(format!("rank 0 is lost: {}", words(&error)))),
        }
    }

    /// Sets a key for all.
    ///
    /// # Errors
    /// [`MeetingError`] where a rank is lost.
    pub fn set(&mut self, key: &str, value: String) -> Result<(), MeetingError> {
        self.ask(&Request::Set(key.to_owned(), value)).map(|_| ())
    }

    /// A key's value, waited for; `what` it is, in words.
    ///
    /// # Errors
    /// [`MeetingError`] where a rank is lost or the time is over.
    pub fn get(&mut self, key: &str, what: &str) -> Result<String, MeetingError> {
        loop {
            if let Some(value) = self.ask(&Request::Get(key.to_owned()))? {
                return Ok(value);
            }
            self.rest(what)?;
        }
    }

    /// Sleeps a little; between two calls a rank that is lost is noticed.
    ///
    /// # Errors
    /// [`MeetingError`] where a rank is lost or the time is over.
    pub fn rest(&mut self, what: &str) -> Result<(), MeetingError> {
        self.ask(&Request::Get(String::new()))?;
        if Instant::now() > self.end {
            return Err(self.fail(format!("waited in vain for {what}")));
        }
        thread::sleep(AGAIN);
        Ok(())
    }

    /// Leaves: this rank has all that it came for.
    ///
    /// # Errors
    /// [`MeetingError`] where a rank is lost.
    pub fn leave(mut self) -> Result<(), MeetingError> {
        self.ask(&Request::Leave).map(|_| ())
    }
}

fn words(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "it has closed the connection".to_owned(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "it does not answer".to_owned(),
        _ => error.to_string(),
    }
}
