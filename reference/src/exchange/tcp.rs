//! Ranks as processes over TCP: every two have a connection, on which each has a thread that reads
//! and one that writes, so that nobody waits for a receiver.

use std::io::{self, BufReader, BufWriter, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::environment::Environment;
use super::links::{Links, Open};
use super::mail::Mail;
use super::processes::{Process, entered, lost};
use super::store::{Client, MeetingError, Server};
use super::wire::{Frame, read_hello, write_hello};

/// A thread that passes frames on needs little.
const STACK_BYTES: usize = 256 << 10;

/// Time for a new connection to say whose it is.
const HELLO: Duration = Duration::from_secs(10);

/// Bytes gathered for a call of the system.
const BUFFER: usize = 256 << 10;

/// Meets the other ranks and connects with each. No wait is longer than `timeout`, here or later.
///
/// # Errors
/// [`MeetingError`] naming the rank that does not come, is lost, or does not fit.
pub fn connect(environment: &Environment, timeout: Duration) -> Result<Process, MeetingError> {
    let server = (environment.rank == 0).then(|| Server::open(environment)).transpose()?;
    let mesh = mesh(environment, timeout);
    if let Some(server) = server {
        server.close();
    }
    let rank = environment.rank;
    let mail = Arc::new(Mail::new(environment.world, timeout));
    let open = Open::new(environment.world - 1);
    let queues = mesh?.into_iter().enumerate().map(|(peer, stream)| {
        let stream = stream?;
        Some(link(stream, (rank, peer), &mail, open.clone()))
    });
    let queues: Vec<Option<Sender<Frame>>> = queues.collect();
    let post = move |to: usize, frame| {
        if let Some(queue) = &queues[to] {
            // A writer that has ended has sent its last, or noted why it could not.
            let _ = queue.send(frame);
        }
    };
    let links = Links::new((rank, environment.world), open, Box::new(post));
    // Connections close when the process ends.
    Ok(Process::new(rank, mail, links, Box::new(|_| ())))
}

/// A connection with every other rank.
fn mesh(
    environment: &Environment,
    timeout: Duration,
) -> Result<Vec<Option<TcpStream>>, MeetingError> {
    let (rank, world) = (environment.rank, environment.world);
    let fail = |e: io::Error| MeetingError::new(environment, format!("no connection: {e}"));
    let mut client = Client::come(environment, timeout)?;
    let (own, meeting) = client.addresses().map_err(fail)?;
    let listener = match own.is_loopback() && rank > 0 {
        true => TcpListener::bind((own, 0)),
        false => TcpListener::bind(("0.0.0.0", 0)),
    };
    let listener = listener.map_err(fail)?;
    let port = listener.local_addr().map_err(fail)?.port();
    if rank == 0 {
        client.set("token", token())?;
    }
    let token = client.get("token", "rank 0")?;
    let accepted = accept(listener, token.clone());
    // The others reach rank 0 where they reach the meeting.
    let address =
        if rank == 0 { format!("{port}") } else { SocketAddr::new(own, port).to_string() };
    client.set(&format!("address {rank}"), address)?;
    let mut streams: Vec<Option<TcpStream>> = (0..world).map(|_| None).collect();
    for (peer, stream) in streams.iter_mut().enumerate().take(rank) {
        let what = format!("rank {peer}");
        let address = client.get(&format!("address {peer}"), &what)?;
        let address = match address.parse::<u16>() {
            Ok(port) => Ok(SocketAddr::new(meeting.ip(), port)),
            Err(_) => address.parse().map_err(io::Error::other),
        };
        let connected = address.and_then(TcpStream::connect).and_then(|mut stream| {
            write_hello(&mut stream, rank, &token)?;
            Ok(stream)
        });
        *stream = Some(connected.map_err(fail)?);
    }
    for (peer, stream) in streams.iter_mut().enumerate().skip(rank + 1) {
        // Asked for its address first, so that a rank that does not come is named.
        let what = format!("rank {peer}");
        client.get(&format!("address {peer}"), &what)?;
        *stream = Some(loop {
            let mut waiting = accepted.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(at) = waiting.iter().position(|(of, _)| *of == peer) {
                break waiting.swap_remove(at).1;
            }
            drop(waiting);
            client.rest(&what)?;
        });
    }
    client.leave()?;
    for stream in streams.iter().flatten() {
        stream.set_nodelay(true).map_err(fail)?;
    }
    Ok(streams)
}

/// Something that no process of another run knows; not a secret from this machine's users.
fn token() -> String {
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let words = format!("{} {:?}", std::process::id(), time);
    blake3::hash(words.as_bytes()).to_hex().to_string()
}

type Accepted = Arc<Mutex<Vec<(usize, TcpStream)>>>;

/// Takes connections that know the token, until the process ends.
fn accept(listener: TcpListener, token: String) -> Accepted {
    let accepted = Accepted::default();
    let into = Arc::clone(&accepted);
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let (token, into) = (token.clone(), Arc::clone(&into));
            thread::spawn(move || {
                let said = stream.set_read_timeout(Some(HELLO)).and_then(|()| {
                    let hello = read_hello(&mut stream)?;
                    stream.set_read_timeout(None)?;
                    Ok(hello)
                });
                if let Ok((rank, said)) = said
                    && said == token
                {
                    let mut into = into.lock().unwrap_or_else(PoisonError::into_inner);
                    into.push((rank, stream));
                }
            });
        }
    });
    accepted
}

/// The connection with a rank: its threads, and the queue of what is to be written.
fn link(
    stream: TcpStream,
    (rank, peer): (usize, usize),
    mail: &Arc<Mail>,
    open: Open,
) -> Sender<Frame> {
    let (frames, queue) = mpsc::channel();
    let spawn = |name: String, body: Box<dyn FnOnce() + Send>| {
        let builder = thread::Builder::new().name(name).stack_size(STACK_BYTES);
        builder.spawn(body).expect("the system starts a thread")
    };
    let (answers, table) = (frames.clone(), Arc::clone(mail));
    let from = stream.try_clone();
    let reader = move || match from {
        Ok(from) => read(from, (rank, peer), &table, &answers),
        Err(error) => lost(&table, peer, &error.to_string()),
    };
    spawn(format!("from rank {peer}"), Box::new(reader));
    let table = Arc::clone(mail);
    let writer = move || {
        if let Err(error) = write(stream, &queue) {
            lost(&table, peer, &error.to_string());
        }
        open.close();
    };
    spawn(format!("to rank {peer}"), Box::new(writer));
    frames
}

fn read(stream: TcpStream, of: (usize, usize), mail: &Mail, answers: &Sender<Frame>) {
    let (rank, peer) = of;
    let mut from = BufReader::with_capacity(BUFFER, stream);
    loop {
        match Frame::read(&mut from) {
            Ok(frame) => {
                if let Some(answer) = entered(mail, (peer, rank), frame) {
                    // The writer is gone only where this process ends.
                    let _ = answers.send(answer);
                }
            }
            Err(error) => {
                let how = match error.kind() {
                    io::ErrorKind::UnexpectedEof => "its connection was closed".to_owned(),
                    _ => error.to_string(),
                };
                return lost(mail, peer, &how);
            }
        }
    }
}

/// Writes frames until the last, which ends the connection this way.
fn write(stream: TcpStream, queue: &Receiver<Frame>) -> io::Result<()> {
    let mut to = BufWriter::with_capacity(BUFFER, stream);
    loop {
        let frame = match queue.try_recv() {
            Ok(frame) => frame,
            Err(TryRecvError::Disconnected) => return to.flush(),
            Err(TryRecvError::Empty) => {
                to.flush()?;
                let Ok(frame) = queue.recv() else { return Ok(()) };
                frame
            }
        };
        frame.write(&mut to)?;
        if matches!(frame, Frame::Ended | Frame::Failed(..)) {
            to.flush()?;
            return to.get_ref().shutdown(std::net::Shutdown::Write);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::threads::End;
    use super::super::{Communicator, ExchangeError, processes};
    use super::*;
    use crate::Tensor;

    /// A port that nobody listens at.
    fn free_port() -> u16 {
        TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
    }

    fn environments(world: usize) -> Vec<Environment> {
        let port = free_port();
        let of = |rank| Environment {
            starter: "a test".to_owned(),
            rank,
            world,
            local_rank: rank,
            local_world: Some(world),
            meeting: (Some("127.0.0.1".to_owned()), port),
            by_mpirun: false,
            run: "test".to_owned(),
        };
        (0..world).map(of).collect()
    }

    /// Every environment's rank as a thread with connections of its own.
    fn ranks<T: Send + 'static>(
        environments: Vec<Environment>,
        timeout: Duration,
        main: impl Fn(Communicator) -> Result<T, ExchangeError> + Clone + Send + 'static,
    ) -> Vec<Result<End<T, ExchangeError>, MeetingError>> {
        let rank = |environment: Environment| {
            let main = main.clone();
            thread::spawn(move || {
                let process = connect(&environment, timeout)?;
                let all: Vec<usize> = (0..environment.world).collect();
                let main = move |exchange: Arc<dyn super::super::Exchange>| {
                    main(Communicator::new(&exchange, "all", &all))
                };
                Ok(processes::run(process, 1, main, &mut || ()))
            })
        };
        let threads: Vec<_> = environments.into_iter().map(rank).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    }

    const LONG: Duration = Duration::from_secs(60);

    fn error<T>(end: &Result<End<T, ExchangeError>, MeetingError>) -> String {
        match end {
            Ok(End::Returned(Err(error))) => error.to_string(),
            Err(error) => error.to_string(),
            Ok(_) => panic!("it has no error"),
        }
    }

    #[test]
    fn collectives_over_sockets_carry_every_bit() {
        // More than any buffer holds, so that senders that waited for receivers would all wait.
        let long = 1 << 20;
        let main = move |all: Communicator| {
            let me = all.index() as f32;
            let to = |to: usize| {
                let x: Vec<f32> =
                    (0..long).map(|i| me * 10.0 + to as f32 + i as f32 * 1e-6).collect();
                vec![Tensor::from_vec(&[long], x)]
            };
            let received = all.all_to_all("rows", (0..3).map(to).collect())?;
            all.barrier("end")?;
            Ok(received.iter().map(|t| t[0].as_slice::<f32>()[long - 1]).collect::<Vec<f32>>())
        };
        for (rank, end) in ranks(environments(3), LONG, main).into_iter().enumerate() {
            let Ok(End::Returned(Ok(last))) = end else { panic!("rank {rank}") };
            let of = |from: usize| from as f32 * 10.0 + rank as f32 + (long - 1) as f32 * 1e-6;
            assert_eq!(last, (0..3).map(of).collect::<Vec<f32>>());
        }
    }

    #[test]
    fn a_rank_that_fails_ends_the_others_with_its_error() {
        let begin = Instant::now();
        let ends = ranks(environments(3), LONG, |all| {
            all.barrier("begin")?;
            assert!(all.index() != 2, "no room");
            all.barrier("step 7")
        });
        assert!(begin.elapsed() < Duration::from_secs(10));
        assert!(matches!(&ends[2], Ok(End::Panicked(words)) if words.contains("no room")));
        for end in &ends[..2] {
            let error = error(end);
            assert!(error.contains("rank 2 has ended (panicked: no room"), "{error}");
            assert!(error.contains("Barrier 1 of all [0, 1, 2] (step 7)"), "{error}");
        }
    }

    #[test]
    fn a_rank_that_computes_for_ever_is_named() {
        let (release, wait) = mpsc::channel::<()>();
        let wait = Arc::new(Mutex::new(wait));
        let main = move |all: Communicator| match all.index() {
            0 => all.receive("sums", 1).map(|_| ()),
            1 => all.receive("rows", 2).map(|_| ()),
            _ => {
                let _ = wait.lock().unwrap().recv_timeout(Duration::from_secs(3));
                Ok(())
            }
        };
        let ends = ranks(environments(3), Duration::from_secs(1), main);
        drop(release);
        let errors = [error(&ends[0]), error(&ends[1])];
        let first = errors.iter().find(|e| e.contains("waited 1 s")).expect("one tells");
        assert!(first.contains("rank 2 waits for nobody and does not answer"), "{first}");
        assert!(first.contains("rank 2 computes"), "{first}");
    }

    #[test]
    fn ranks_that_do_not_fit_are_refused_where_they_meet() {
        let idle = |_: Communicator| Ok::<_, ExchangeError>(());
        let mut of_three = environments(2);
        of_three[1].world = 3;
        let ends = ranks(of_three, LONG, idle);
        for end in &ends {
            let error = error(end);
            assert!(error.contains("rank 1 has a world of 3, rank 0 has 2"), "{error}");
        }
        let mut twice = environments(3);
        twice[2].rank = 1;
        let ends = ranks(twice, LONG, idle);
        assert!(ends.iter().any(|end| error(end).contains("rank 1 is there twice")));
        // One that does not come is named.
        let mut alone = environments(2);
        alone.truncate(1);
        let error = error(&ranks(alone, Duration::from_millis(300), idle)[0]);
        assert!(error.contains("waited in vain for rank 1"), "{error}");
    }

    #[test]
    fn strangers_do_not_disturb_the_meeting() {
        let environments = environments(2);
        let port = environments[0].meeting.1;
        let stranger = thread::spawn(move || {
            for _ in 0..200 {
                if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) {
                    return stream.write_all(b"GET / HTTP/1.1\r\n\r\n").is_ok();
                }
                thread::sleep(Duration::from_millis(5));
            }
            false
        });
        let mut other = environments[1].clone();
        other.run = "another".to_owned();
        let refused = thread::spawn(move || connect(&other, LONG).map(|_| ()));
        thread::sleep(Duration::from_millis(50));
        let first = environments[0].clone();
        let zero = thread::spawn(move || ranks(vec![first], LONG, |all| all.barrier("end")));
        assert!(stranger.join().unwrap());
        let error = refused.join().unwrap().unwrap_err().to_string();
        assert!(error.contains("the run another, rank 0 has test"), "{error}");
        let one = ranks(vec![environments[1].clone()], LONG, |all| all.barrier("end"));
        for end in zero.join().unwrap().into_iter().chain(one) {
            assert!(matches!(end, Ok(End::Returned(Ok(())))));
        }
    }
}
