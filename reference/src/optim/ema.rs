//! An exponential moving average of the weights, off the critical path.
//!
//! After an update the trainer hands the new weights over and goes on; a thread of its own adds
//! them to the average, in host memory (as the DeepSeek-V3 report keeps it, section 3.2.3). Host
//! tensors share their elements, so handing over copies nothing unless the next update comes before
//! the average is done. The thread takes weights in order, so the average does not depend on when
//! it runs.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use crate::ops::ema;
use crate::{DynOp, Tensor};

enum Message {
    Update(Vec<Tensor>),
    Read(SyncSender<Vec<Tensor>>),
}

/// The exponential moving average of the weights, on a thread of its own.
#[derive(Debug)]
pub struct Ema {
    sender: Option<SyncSender<Message>>,
    thread: Option<JoinHandle<()>>,
}

impl Ema {
    /// Starts from `average`; every update moves it by `1 - decay` of the way.
    pub fn new(average: Vec<Tensor>, decay: f64) -> Ema {
        // One set of weights may wait: a thread that lags behind slows the trainer down instead of
        // filling the memory.
        let (sender, receiver) = sync_channel(1);
        let thread = std::thread::spawn(move || work(average, 1.0 - decay, &receiver));
        Ema { sender: Some(sender), thread: Some(thread) }
    }

    /// Hands over the weights after an update, by parameter; waits only where the thread lags
    /// behind.
    pub fn update(&self, weights: Vec<Tensor>) {
        self.send(Message::Update(weights));
    }

    /// The average over all updates handed over so far, by parameter; waits for them.
    pub fn read(&self) -> Vec<Tensor> {
        let (sender, receiver) = sync_channel(1);
        self.send(Message::Read(sender));
        receiver.recv().expect("the averaging thread answers")
    }

    fn send(&self, message: Message) {
        let sender = self.sender.as_ref().expect("open until dropped");
        sender.send(message).expect("the averaging thread runs");
    }
}

impl Drop for Ema {
    fn drop(&mut self) {
        self.sender.take();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed; a second one here would hide it.
            let _ = thread.join();
        }
    }
}

fn work(mut average: Vec<Tensor>, rate: f64, receiver: &Receiver<Message>) {
    // Ops compute on a pool of this thread alone: on another, whose only thread may be the one that
    // waits for the average, neither would ever come to its end.
    let own = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build();
    let _own = own.expect("a new thread is in no pool");
    let op: &dyn DynOp = &ema::Ema { rate };
    while let Ok(message) = receiver.recv() {
        match message {
            Message::Update(weights) => {
                let pairs = average.into_iter().zip(weights);
                let step = |(e, w)| op.run(vec![Some(e), Some(w)]).expect("same shapes").remove(0);
                average = pairs.map(step).collect();
            }
            // The reader may have gone away.
            Message::Read(reader) => drop(reader.send(average.clone())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where every thread of the pool waits for the average.
    #[test]
    fn a_thread_of_the_pool_may_wait_for_the_average() {
        let many = |x: f32| vec![Tensor::from_vec(&[1 << 20], vec![x; 1 << 20])];
        let ema = Ema::new(many(0.0), 0.5);
        let all = rayon::broadcast(|_| {
            ema.update(many(2.0));
            ema.read()[0].as_slice::<f32>()[7]
        });
        assert!(all.iter().all(|&x| (1.0..2.0).contains(&x)), "{all:?}");
    }

    #[test]
    fn updates_are_taken_in_order() {
        let one = |x: f32| vec![Tensor::from_vec(&[1], vec![x])];
        let ema = Ema::new(one(0.0), 0.5);
        [2.0, 4.0, 8.0].into_iter().for_each(|x| ema.update(one(x)));
        // 0 -> 1 -> 2.5 -> 5.25
        assert_eq!(ema.read()[0].as_slice::<f32>(), [5.25]);
        ema.update(one(5.25));
        assert_eq!(ema.read()[0].as_slice::<f32>(), [5.25]);
    }
}
