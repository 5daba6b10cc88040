//! Ranks as threads of one process: messages pass through one table under a lock, elements are
//! shared, not copied.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::mail::Mail;
use super::{Exchange, ExchangeError, Label, Message};
use crate::Tensor;

/// A rank's end.
struct Rank {
    mail: Arc<Mail>,
    rank: usize,
}

impl Exchange for Rank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.mail.world()
    }

    fn post(&self, to: usize, message: Message) -> Result<(), ExchangeError> {
        self.mail.check(self.rank, &message.label)?;
        self.mail.deliver(self.rank, to, message);
        Ok(())
    }

    fn take(&self, from: usize, expected: &Label) -> Result<Vec<Tensor>, ExchangeError> {
        self.mail.take(self.rank, from, expected, &|| ())
    }
}

/// How a rank ended.
#[derive(Debug)]
pub enum End<T, E> {
    /// With what its function gave.
    Returned(Result<T, E>),
    /// With a panic.
    Panicked(String),
    /// Not at all: it still computed when the others had ended and the time of grace was over.
    Hangs,
}

/// How long the ranks that are left have to end once one has failed.
pub(super) const GRACE: Duration = Duration::from_secs(7);

/// As much as a program's main thread has.
const STACK_BYTES: usize = 8 << 20;

/// How often `tick` is called.
pub(super) const TICK: Duration = Duration::from_millis(20);

/// Runs `main` on `world` ranks, each a thread with its share of this pool's threads, and gives how
/// each ended. `tick` is called on this thread every now and then until then. A wait longer than
/// `timeout` is an error.
///
/// A rank that fails or panics ends the others at their next exchange. A thread that then still
/// computes is left to itself, since nothing ends a thread from outside.
pub fn run<T, E>(
    world: usize,
    timeout: Duration,
    main: impl Fn(Arc<dyn Exchange>) -> Result<T, E> + Send + Sync + 'static,
    tick: &mut dyn FnMut(),
) -> Vec<End<T, E>>
where
    T: Send + 'static,
    E: std::fmt::Display + Send + 'static,
{
    run_for(world, (timeout, GRACE), main, tick)
}

fn run_for<T, E>(
    world: usize,
    (timeout, grace): (Duration, Duration),
    main: impl Fn(Arc<dyn Exchange>) -> Result<T, E> + Send + Sync + 'static,
    tick: &mut dyn FnMut(),
) -> Vec<End<T, E>>
where
    T: Send + 'static,
    E: std::fmt::Display + Send + 'static,
{
    let mail = Arc::new(Mail::new(world, timeout));
    let main = Arc::new(main);
    let (sender, receiver) = mpsc::channel();
    let cores = (rayon::current_num_threads() / world.max(1)).max(1);
    let mut threads = Vec::with_capacity(world);
    for rank in 0..world {
        let (mail, main, sender) = (Arc::clone(&mail), Arc::clone(&main), sender.clone());
        let body = move || {
            let exchange: Arc<dyn Exchange> = Arc::new(Rank { mail: Arc::clone(&mail), rank });
            let end = on_own_pool(cores, || main(exchange));
            mail.end(rank, error_of(&end));
            // The receiver may have given this rank up.
            let _ = sender.send((rank, end));
        };
        let builder = std::thread::Builder::new().name(format!("rank {rank}"));
        threads.push(builder.spawn(body).expect("the system starts a thread"));
    }
    let mut ends: Vec<Option<End<T, E>>> = (0..world).map(|_| None).collect();
    let mut last: Option<Instant> = None;
    while ends.iter().any(Option::is_none) {
        tick();
        match receiver.recv_timeout(TICK) {
            Ok((rank, end)) => {
                let failed = !matches!(end, End::Returned(Ok(_)));
                ends[rank] = Some(end);
                if failed {
                    last.get_or_insert_with(Instant::now);
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if last.is_some_and(|last| last.elapsed() > grace) {
            break;
        }
    }
    tick();
    // Who has ended gives back what it had, a device for instance, before the process may end.
    for (thread, _) in threads.into_iter().zip(&ends).filter(|(_, end)| end.is_some()) {
        let _ = thread.join();
    }
    ends.into_iter().map(|end| end.unwrap_or(End::Hangs)).collect()
}

/// Runs a rank's `main` on a thread of a pool of its own: its parallel loops then begin at once,
/// and wait for no other rank's.
pub(super) fn on_own_pool<T: Send, E: Send>(
    cores: usize,
    main: impl FnOnce() -> Result<T, E> + Send,
) -> End<T, E> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(cores).stack_size(STACK_BYTES);
    let pool = pool.build().expect("the system starts a thread");
    match catch_unwind(AssertUnwindSafe(|| pool.install(main))) {
        Ok(result) => End::Returned(result),
        Err(panic) => End::Panicked(words(&*panic)),
    }
}

/// The error of a rank that has ended with one.
pub(super) fn error_of<T, E: std::fmt::Display>(end: &End<T, E>) -> Option<String> {
    match end {
        End::Returned(Ok(_)) => None,
        End::Returned(Err(error)) => Some(error.to_string()),
        End::Panicked(message) => Some(format!("panicked: {message}")),
        End::Hangs => Some("it still computes; it is left to itself".to_owned()),
    }
}

fn words(panic: &(dyn Any + Send)) -> String {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_owned(),
        (_, Some(text)) => text.clone(),
        _ => "without a message".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use fathom_trace::DType;

    use std::sync::Mutex;

    use super::super::{Communicator, one};
    use super::*;

    fn ranks<T: Send + 'static>(
        world: usize,
        timeout_ms: u64,
        main: impl Fn(Arc<dyn Exchange>) -> Result<T, ExchangeError> + Send + Sync + 'static,
    ) -> Vec<End<T, ExchangeError>> {
        let times = (Duration::from_millis(timeout_ms), Duration::from_millis(500));
        run_for(world, times, main, &mut || ())
    }

    fn whole(exchange: &Arc<dyn Exchange>) -> Communicator {
        let all: Vec<usize> = (0..exchange.world()).collect();
        Communicator::new(exchange, "all", &all)
    }

    fn number(x: i32) -> Tensor {
        Tensor::from_vec(&[1], vec![x])
    }

    fn values(received: Vec<Vec<Tensor>>) -> Vec<Vec<i32>> {
        let flat = |t: Vec<Tensor>| t.iter().flat_map(|t| t.as_slice::<i32>().to_vec()).collect();
        received.into_iter().map(flat).collect()
    }

    fn returned<T>(end: End<T, ExchangeError>) -> T {
        match end {
            End::Returned(Ok(value)) => value,
            End::Returned(Err(e)) => panic!("{e}"),
            _ => panic!("a rank did not return"),
        }
    }

    fn error<T>(end: &End<T, ExchangeError>) -> String {
        match end {
            End::Returned(Err(e)) => e.to_string(),
            _ => panic!("a rank has no error"),
        }
    }

    #[test]
    fn every_collective_gives_what_its_name_says() {
        let ends = ranks(3, 10_000, |exchange| {
            let (all, me) = (whole(&exchange), exchange.rank() as i32);
            // Rank r sends r numbers to each rank below it, with counts that differ.
            let to = |to: i32| (0..me - to).map(|i| number(100 * me + 10 * to + i)).collect();
            let received = all.all_to_all("numbers", (0..3).map(to).collect())?;
            let gathered = all.all_gather("ranks", vec![number(me)])?;
            let root = all.broadcast("root's", 2, vec![number(7 * me)])?;
            all.barrier("here")?;
            let sum = all.all_reduce("thirds", Tensor::from_vec(&[1], vec![me as f32 / 3.0]))?;
            Ok((values(received), values(gathered), values(vec![root]), sum))
        });
        let sum = (0.0f32 + 1.0 / 3.0) + 2.0 / 3.0;
        for (rank, end) in ends.into_iter().enumerate() {
            let (received, gathered, root, all) = returned(end);
            let rank = rank as i32;
            let from = |from: i32| (0..from - rank).map(|i| 100 * from + 10 * rank + i).collect();
            assert_eq!(received, (0..3).map(from).collect::<Vec<Vec<i32>>>());
            assert_eq!(gathered, [[0], [1], [2]]);
            assert_eq!(root, [[14]]);
            assert_eq!(all.as_slice::<f32>(), [sum]);
        }
    }

    #[test]
    fn groups_do_not_meet_and_sends_keep_their_order() {
        let ends = ranks(4, 10_000, |exchange| {
            let me = exchange.rank();
            let pair = Communicator::new(&exchange, "pair", &[me & 2, me | 1]);
            let cross = Communicator::new(&exchange, "cross", &[me & 1, me | 2]);
            let other = 1 - cross.index();
            for i in 0..3 {
                cross.send("count", other, vec![number((10 * me + i) as i32)])?;
            }
            let pair = values(pair.all_gather("ranks", vec![number(me as i32)])?);
            let mut sent = Vec::new();
            for _ in 0..3 {
                sent.push(one(cross.receive("count", other)?).as_slice::<i32>()[0]);
            }
            Ok((pair, sent))
        });
        for (me, end) in ends.into_iter().enumerate() {
            let (pair, sent) = returned(end);
            let base = 10 * (me ^ 2) as i32;
            assert_eq!(pair, [[(me & 2) as i32], [(me | 1) as i32]]);
            assert_eq!(sent, [base, base + 1, base + 2]);
        }
    }

    #[test]
    fn ranks_out_of_step_are_refused_with_both_sides() {
        let ends = ranks(2, 10_000, |exchange| {
            let all = whole(&exchange);
            let what = if exchange.rank() == 0 { "gradients" } else { "weights" };
            all.all_gather(what, vec![number(0)]).map(|_| ())
        });
        // The first to meet the other's message tells; the other may end by its failure.
        let errors = [error(&ends[0]), error(&ends[1])];
        let first = errors.iter().find(|e| !e.contains("has ended")).expect("one tells");
        assert!(first.contains("(gradients)") && first.contains("(weights)"), "{first}");
        let ends = ranks(2, 10_000, |exchange| {
            let shape = [1 + exchange.rank()];
            whole(&exchange).all_reduce("x", Tensor::zeros(DType::F32, &shape))
        });
        let errors = [error(&ends[0]), error(&ends[1])];
        let first = errors.iter().find(|e| !e.contains("has ended")).expect("one tells");
        assert!(first.contains("[1]") && first.contains("[2]"), "{first}");
    }

    #[test]
    fn a_rank_that_dies_is_named_and_the_others_end() {
        let begin = Instant::now();
        let ends = ranks(3, 60_000, |exchange| {
            let all = whole(&exchange);
            all.barrier("begin")?;
            assert!(exchange.rank() != 1, "out of memory, say");
            all.barrier("end")
        });
        assert!(begin.elapsed() < Duration::from_secs(30));
        assert!(matches!(&ends[1], End::Panicked(m) if m.contains("out of memory")));
        for rank in [0, 2] {
            let e = error(&ends[rank]);
            assert!(e.contains("rank 1 has ended (panicked: out of memory"), "{e}");
            assert!(e.contains("Barrier 1 of all [0, 1, 2] (end)"), "{e}");
        }
    }

    #[test]
    fn a_rank_that_hangs_is_named_by_those_that_wait_for_it() {
        let (release, wait) = mpsc::channel::<()>();
        let wait = Mutex::new(wait);
        // Rank 0 waits for rank 1, which waits for rank 2, which computes for ever.
        let ends = ranks(3, 2000, move |exchange| {
            let all = whole(&exchange);
            match exchange.rank() {
                0 => {
                    all.receive("begin", 1)?;
                    all.receive("sums", 1).map(|_| ())
                }
                1 => {
                    all.send("begin", 0, Vec::new())?;
                    all.receive("rows", 2).map(|_| ())
                }
                _ => {
                    let _ = wait.lock().unwrap().recv_timeout(Duration::from_secs(60));
                    Ok(())
                }
            }
        });
        drop(release);
        assert!(matches!(ends[2], End::Hangs));
        let errors = [error(&ends[0]), error(&ends[1])];
        let first = errors.iter().find(|e| e.contains("waited 2 s")).expect("one tells");
        assert!(first.contains("rank 2 waits for nobody and does not answer"), "{first}");
        assert!(first.contains("rank 0 waits for rank 1, Send 1 of all"), "{first}");
        assert!(first.contains("rank 2 computes"), "{first}");
    }

    #[test]
    fn ranks_that_wait_for_each_other_and_for_one_that_has_ended_are_told() {
        let ends = ranks(3, 100, |exchange| {
            let all = whole(&exchange);
            match exchange.rank() {
                2 => Ok(()),
                rank => all.receive("nothing", 1 - rank).map(|_| ()),
            }
        });
        let errors = [error(&ends[0]), error(&ends[1])];
        assert!(errors.iter().any(|e| e.contains("wait for each other")), "{errors:?}");
        let ends = ranks(2, 60_000, |exchange| match exchange.rank() {
            0 => whole(&exchange).receive("more", 1).map(|_| ()),
            _ => Ok(()),
        });
        assert!(error(&ends[0]).contains("rank 1 has ended (it came to its end)"));
    }
}
