//! A step's data on the ranks that need it. The sequences have one global order; the first rank of
//! each replica (a pipeline with its tensor parallel ranks) reads those of its shards, once, and
//! hands on the place in the data to whoever reads the next shard. The other ranks of the replica
//! are given what it read.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::world::World;
use crate::Tensor;
use crate::data::{Loader, LoaderState};
use crate::exchange::{Communicator, ExchangeError, one};
use crate::model::Batch;
use crate::train::trainer::{Counts, read_shard};
use crate::train::{TrainConfig, TrainError};

/// What a rank has of a step's data.
pub(super) struct StepData {
    /// The micro-batches of its replica's shards.
    pub shards: BTreeMap<usize, Vec<Batch>>,
    /// Of the whole step.
    pub counts: Counts,
    /// The place behind the step.
    pub place: LoaderState,
}

/// Reads a step of `batch` sequences from `place` on; every rank calls it.
pub(super) fn read(
    world: &World,
    config: &TrainConfig,
    loader: Option<&Arc<Mutex<Loader>>>,
    place: &LoaderState,
    (step, batch): (u64, usize),
) -> Result<StepData, TrainError> {
    let what = format!("sequences of step {step}");
    let mut tensors = Vec::new();
    if let (Some(readers), Some(relay), Some(loader)) = (&world.readers, &world.relay, loader) {
        let reader = Reader { world, config, loader, what: &what };
        let (shards, place) = reader.shards(relay, place, batch / config.grad_shards)?;
        let mut counts = Counts::default();
        counts.predicted_mtp.resize(config.model.mtp_depth, 0);
        shards.values().flatten().for_each(|b| counts.add(b, config.model.mtp_depth));
        let all = readers.all_gather(&what, vec![count_tensor(&counts)])?;
        tensors = vec![state_tensor(&place), count_tensor(&sum(all))];
        shards.values().flatten().for_each(|batch| tensors.extend(batch_tensors(batch)));
    }
    let mut tensors = world.replica.broadcast(&what, 0, tensors)?.into_iter();
    let mut next = || tensors.next().expect("the reader sends them all");
    let place = serde_json::from_slice(next().bytes()).expect("the reader's own JSON");
    let counts = counts_of(&next());
    let per_shard = (batch / config.grad_shards).div_ceil(config.micro_batch);
    let own = own_shards(world).into_iter();
    let read =
        |shard| (shard, (0..per_shard).map(|_| batch_of([next(), next(), next()])).collect());
    Ok(StepData { shards: own.map(read).collect(), counts, place })
}

/// The shards of this rank's replica, in order.
fn own_shards(world: &World) -> Vec<usize> {
    let owners = world.shares.owners();
    (0..owners.len()).filter(|&shard| owners[shard] == world.at.dp).collect()
}

struct Reader<'a> {
    world: &'a World,
    config: &'a TrainConfig,
    loader: &'a Arc<Mutex<Loader>>,
    what: &'a str,
}

impl Reader<'_> {
    /// Reads this rank's shards, of `sequences` each, and gives the place behind the last shard.
    fn shards(
        &self,
        relay: &Communicator,
        place: &LoaderState,
        sequences: usize,
    ) -> Result<(BTreeMap<usize, Vec<Batch>>, LoaderState), TrainError> {
        let (owners, me) = (self.world.shares.owners(), self.world.at.dp);
        let mut place = place.clone();
        let mut shards = BTreeMap::new();
        for (shard, _) in owners.iter().enumerate().filter(|(_, owner)| **owner == me) {
            if shard > 0 && owners[shard - 1] != me {
                place = self.receive(relay, owners[shard - 1])?;
            }
            // The loader of a rank that failed is whole: `restore` sets it anew.
            let mut loader = self.loader.lock().unwrap_or_else(PoisonError::into_inner);
            if loader.state() != place {
                loader.restore(&place)?;
            }
            shards.insert(shard, read_shard(&mut loader, self.config, sequences)?);
            place = loader.state();
            drop(loader);
            if owners.get(shard + 1).is_some_and(|next| *next != me) {
                relay.send(self.what, owners[shard + 1], vec![state_tensor(&place)])?;
            }
        }
        // The place behind the last shard is told to all.
        let last = *owners.last().expect("at least one shard");
        if last != me {
            return Ok((shards, self.receive(relay, last)?));
        }
        for to in (0..relay.size()).filter(|&to| to != me) {
            relay.send(self.what, to, vec![state_tensor(&place)])?;
        }
        Ok((shards, place))
    }

    fn receive(&self, relay: &Communicator, from: usize) -> Result<LoaderState, ExchangeError> {
        let state = one(relay.receive(self.what, from)?);
        Ok(serde_json::from_slice(state.bytes()).expect("the other rank's own JSON"))
    }
}

fn state_tensor(state: &LoaderState) -> Tensor {
    let json = serde_json::to_vec(state).expect("plain data");
    Tensor::from_vec(&[json.len()], json)
}

fn count_tensor(counts: &Counts) -> Tensor {
    let Counts { predicted, predicted_mtp, segments, micro_batches, tokens } = counts;
    let mut numbers =
        vec![*predicted as i64, *segments as i64, *micro_batches as i64, *tokens as i64];
    numbers.extend(predicted_mtp.iter().map(|&n| n as i64));
    Tensor::from_vec(&[numbers.len()], numbers)
}

fn counts_of(tensor: &Tensor) -> Counts {
    let numbers: Vec<usize> = tensor.as_slice::<i64>().iter().map(|&n| n as usize).collect();
    Counts {
        predicted: numbers[0],
        segments: numbers[1],
        micro_batches: numbers[2],
        tokens: numbers[3] as u64,
        predicted_mtp: numbers[4..].to_vec(),
    }
}

fn sum(all: Vec<Vec<Tensor>>) -> Counts {
    let mut numbers: Vec<i64> = Vec::new();
    for tensor in all.into_iter().map(one) {
        let of = tensor.as_slice::<i64>();
        numbers.resize(of.len(), 0);
        numbers.iter_mut().zip(of).for_each(|(sum, n)| *sum += n);
    }
    counts_of(&Tensor::from_vec(&[numbers.len()], numbers))
}

fn batch_tensors(batch: &Batch) -> [Tensor; 3] {
    let segments: Vec<i64> = batch.segments.iter().map(|&n| n as i64).collect();
    [
        Tensor::from_vec(&[batch.tokens.len()], batch.tokens.clone()),
        Tensor::from_vec(&[batch.targets.len()], batch.targets.clone()),
        Tensor::from_vec(&[segments.len()], segments),
    ]
}

fn batch_of([tokens, targets, segments]: [Tensor; 3]) -> Batch {
    Batch {
        tokens: tokens.into_vec(),
        targets: targets.into_vec(),
        segments: segments.as_slice::<i64>().iter().map(|&n| n as usize).collect(),
    }
}
