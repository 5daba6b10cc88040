//! The exchanges of ZeRO-1: gradients to the owners of the pieces, which add them by the contract's
//! tree, and updated weights back to the ranks that hold them.

use std::collections::BTreeMap;

use fathom_numerics::reduce::tree_sum;
use fathom_trace::DType;

use super::pieces::{Contribution, Held, Overlap, Pieces};
use super::pipeline::Executed;
use super::world::World;
use crate::Tensor;
use crate::backend::{Backend, Place};
use crate::exchange::one;
use crate::layers::Gradients;
use crate::model::{Model, Params};
use crate::ops::add::Add;
use crate::ops::clip_factor::ClipFactor;
use crate::ops::sum_of_squares::SumOfSquares;
use crate::optim::Clip;
use crate::train::TrainError;
use crate::train::shards::tree;

/// Which rank sends what to which, the same at every step.
pub(super) struct Routes {
    /// What this rank contributes to the gradient.
    contributions: Vec<Contribution>,
    /// By receiver: which contribution overlaps which of its pieces.
    gradients_out: Vec<Vec<Overlap<usize>>>,
    /// By sender: what comes for this rank's pieces, with leaf and part.
    gradients_in: Vec<Vec<Overlap<(usize, usize)>>>,
    /// By receiver: which of this rank's pieces it holds.
    weights_out: Vec<Vec<Overlap<()>>>,
    /// By sender: where its pieces belong, `dir` and parameter of the stage.
    weights_in: Vec<Vec<Overlap<(usize, usize)>>>,
    /// This rank's pieces, by their place in the list of all.
    pub own: Vec<usize>,
}

impl Routes {
    pub fn new(pieces: &Pieces, world: &World) -> Routes {
        let ranks = world.all.size();
        let own = (0..pieces.all.len()).filter(|&i| pieces.all[i].owner == world.rank).collect();
        let mut routes = Routes {
            contributions: pieces.contributions(world, world.rank),
            gradients_out: vec![Vec::new(); ranks],
            gradients_in: vec![Vec::new(); ranks],
            weights_out: vec![Vec::new(); ranks],
            weights_in: vec![Vec::new(); ranks],
            own,
        };
        for (i, contribution) in routes.contributions.iter().enumerate() {
            for overlap in pieces.overlaps(&contribution.held, i) {
                routes.gradients_out[pieces.all[overlap.piece].owner].push(overlap);
            }
        }
        for rank in 0..ranks {
            for c in pieces.contributions(world, rank) {
                let mut found = pieces.overlaps(&c.held, (c.leaf, c.part));
                found.retain(|overlap| pieces.all[overlap.piece].owner == world.rank);
                routes.gradients_in[rank].extend(found);
            }
            for (dir, stage) in pieces.held(world, rank).iter().enumerate() {
                for (id, held) in stage.iter().enumerate() {
                    for overlap in pieces.overlaps(held, (dir, id)) {
                        let owner = pieces.all[overlap.piece].owner;
                        if owner == world.rank {
                            let Overlap { piece, range, .. } = overlap.clone();
                            routes.weights_out[rank].push(Overlap { piece, range, of: () });
                        }
                        if rank == world.rank {
                            routes.weights_in[owner].push(overlap);
                        }
                    }
                }
            }
        }
        routes
    }
}

/// Sends `out[rank]` to each rank that has something there, and receives from each that `sends`.
fn exchange(
    world: &World,
    what: &str,
    mut out: Vec<Vec<Tensor>>,
    sends: impl Fn(usize) -> bool,
) -> Result<Vec<Vec<Tensor>>, TrainError> {
    let own = std::mem::take(&mut out[world.rank]);
    for (rank, tensors) in out.into_iter().enumerate() {
        if !tensors.is_empty() {
            world.between.send(what, rank, tensors)?;
        }
    }
    let mut received = Vec::with_capacity(world.all.size());
    let mut own = Some(own);
    for rank in 0..world.all.size() {
        received.push(match sends(rank) {
            _ if rank == world.rank => own.take().expect("once"),
            true => world.between.receive(what, rank)?,
            false => Vec::new(),
        });
    }
    Ok(received)
}

/// Elements `range` of a tensor whose first element is number `first`.
fn slice(tensor: &Tensor, first: usize, range: &std::ops::Range<usize>) -> Tensor {
    let size = tensor.dtype().size();
    let bytes = &tensor.bytes()[(range.start - first) * size..(range.end - first) * size];
    Tensor::from_bytes(tensor.dtype(), &[range.len()], bytes)
}

/// The gradient of this rank's pieces: uses of a parameter added in order, shards by the tree.
pub(super) fn reduce<B: Backend>(
    (world, pieces, routes): (&World, &Pieces, &Routes),
    whole: &Model,
    backend: &B,
    executed: &mut Executed<B>,
    step: u64,
) -> Result<Gradients<B>, TrainError> {
    let mut out: Vec<Vec<Tensor>> = vec![Vec::new(); world.all.size()];
    let mut host: BTreeMap<usize, Tensor> = BTreeMap::new();
    for (i, c) in routes.contributions.iter().enumerate() {
        let gradients = &mut executed.gradients;
        let buffers = gradients.get_mut(&(c.source.dir, c.source.shard)).expect("it was computed");
        let buffer = buffers.buffers[c.source.slot].take().expect("a trained parameter");
        host.insert(i, backend.download(&buffer)?);
    }
    for (to, overlaps) in out.iter_mut().zip(&routes.gradients_out) {
        for overlap in overlaps {
            let first = routes.contributions[overlap.of].held.range.start;
            to.push(slice(&host[&overlap.of], first, &overlap.range));
        }
    }
    drop(host);
    let what = format!("gradients of step {step}");
    let received = exchange(world, &what, out, |rank| !routes.gradients_in[rank].is_empty())?;
    // By piece, leaf and part: the intervals that came.
    let mut parts: BTreeMap<(usize, usize, usize), Vec<(usize, Tensor)>> = BTreeMap::new();
    for (overlaps, tensors) in routes.gradients_in.iter().zip(received) {
        for (overlap, tensor) in overlaps.iter().zip(tensors) {
            let (leaf, part) = overlap.of;
            let key = (overlap.piece, leaf, part);
            parts.entry(key).or_default().push((overlap.range.start, tensor));
        }
    }
    backend.at(Place { step, ..Place::default() });
    let op = Add { out: whole.recipe.master() };
    let mut add = |a: B::Buffer, b: B::Buffer| backend.add(&op, &a, &b, None);
    let mut buffers = Vec::with_capacity(routes.own.len());
    for &piece in &routes.own {
        let mut leaves: Vec<Option<B::Buffer>> = vec![None; world.shares.grad_shards];
        let range = (piece, 0, 0)..(piece + 1, 0, 0);
        for (&(_, leaf, _), intervals) in parts.range_mut(range) {
            intervals.sort_by_key(|(start, _)| *start);
            let bytes: Vec<u8> = intervals.iter().flat_map(|(_, t)| t.bytes().to_vec()).collect();
            let length = pieces.all[piece].range.len();
            let use_ = backend.upload(Tensor::from_bytes(op.out, &[length], &bytes))?;
            leaves[leaf] = Some(match leaves[leaf].take() {
                Some(sum) => add(sum, use_)?,
                None => use_,
            });
        }
        buffers.push(tree(leaves, &mut add)?);
    }
    Ok(Gradients { buffers })
}

/// Norm and clipping factor of the whole gradient: every rank's blocks, added by the contract's
/// trees.
pub(super) fn clip<B: Backend>(
    (world, pieces): (&World, &Pieces),
    whole: &Model,
    backend: &B,
    gradients: &Gradients<B>,
    (max_norm, step): (f64, u64),
) -> Result<Clip<B>, TrainError> {
    backend.at(Place { step, ..Place::default() });
    let master = whole.recipe.master();
    let trained: Vec<&B::Buffer> = gradients.buffers.iter().flatten().collect();
    let mut sums = backend.zeros(master, &[trained.len()])?;
    for (slot, gradient) in trained.into_iter().enumerate() {
        sums = backend.sum_of_squares(&SumOfSquares { slot }, gradient, sums)?;
    }
    let own = backend.download(&sums)?;
    let all = world.all.all_gather(&format!("gradient norm of step {step}"), vec![own])?;
    let all: Vec<Tensor> = all.into_iter().map(one).collect();
    let mut next = vec![0; all.len()];
    let mut partials: Vec<f64> = Vec::new();
    for (spec, range) in whole.specs.iter().zip(&pieces.of_param) {
        if !spec.trained() {
            continue;
        }
        let mut blocks = Vec::with_capacity(range.len());
        for piece in &pieces.all[range.clone()] {
            let of = &all[piece.owner];
            let block = next[piece.owner];
            next[piece.owner] += 1;
            blocks.push(match master {
                DType::F64 => of.as_slice::<f64>()[block],
                _ => of.as_slice::<f32>()[block].into(),
            });
        }
        partials.push(match master {
            DType::F64 => tree_sum(&mut blocks),
            _ => {
                let mut blocks: Vec<f32> = blocks.iter().map(|&x| x as f32).collect();
                tree_sum(&mut blocks).into()
            }
        });
    }
    let partials = Tensor::from_vec(&[partials.len()], partials);
    let partials = backend.upload(crate::model::convert(partials, master))?;
    let max_norm = (max_norm > 0.0).then_some(max_norm);
    let [norm, factor] = backend.clip_factor(&ClipFactor { max_norm }, &partials)?;
    Ok(Clip { norm, factor })
}

/// The parameters of this rank's stages, by `dir`, from the owners of the pieces. `own` are the
/// values of this rank's pieces.
pub(super) fn gather<B: Backend>(
    (world, pieces, routes): (&World, &Pieces, &Routes),
    backend: &B,
    own: &[Tensor],
    what: &str,
) -> Result<Vec<Params<B>>, TrainError> {
    let place: BTreeMap<usize, usize> =
        routes.own.iter().enumerate().map(|(i, &piece)| (piece, i)).collect();
    let of = |overlap: &Overlap<()>| {
        let first = pieces.all[overlap.piece].range.start;
        slice(&own[place[&overlap.piece]], first, &overlap.range)
    };
    let out = routes.weights_out.iter().map(|to| to.iter().map(of).collect()).collect();
    let received = exchange(world, what, out, |rank| !routes.weights_in[rank].is_empty())?;
    let held = pieces.held(world, world.rank);
    let models = pieces.models(world, world.rank);
    let dtype = models[0].recipe.master();
    let mut bytes: Vec<Vec<Vec<u8>>> = held
        .iter()
        .map(|stage| stage.iter().map(|h: &Held| vec![0; h.range.len() * dtype.size()]).collect())
        .collect();
    for (overlaps, tensors) in routes.weights_in.iter().zip(received) {
        for (overlap, tensor) in overlaps.iter().zip(tensors) {
            let (dir, id) = overlap.of;
            let first = (overlap.range.start - held[dir][id].range.start) * dtype.size();
            bytes[dir][id][first..first + tensor.bytes().len()].copy_from_slice(tensor.bytes());
        }
    }
    let stage = |(model, bytes): (&Model, Vec<Vec<u8>>)| {
        let upload = |(spec, bytes): (&crate::model::ParamSpec, Vec<u8>)| {
            backend.upload(Tensor::from_bytes(dtype, &spec.shape, &bytes))
        };
        let buffers = model.specs.iter().zip(bytes).map(upload).collect::<Result<_, _>>()?;
        Ok(Params { buffers })
    };
    models.iter().zip(bytes).map(stage).collect()
}

/// Whole tensors of all pieces, on rank 0, in order of the parameters; `None` on the others.
pub(super) fn gather_whole(
    (world, pieces): (&World, &Pieces),
    whole: &Model,
    own: &[Tensor],
    what: &str,
) -> Result<Option<Vec<Tensor>>, TrainError> {
    let mut out: Vec<Vec<Tensor>> = vec![Vec::new(); world.all.size()];
    out[0] = own.to_vec();
    let owns = |rank| pieces.all.iter().any(|piece| piece.owner == rank);
    let sends = |rank| world.rank == 0 && owns(rank);
    let mut received: Vec<_> =
        exchange(world, what, out, sends)?.into_iter().map(Vec::into_iter).collect();
    if world.rank != 0 {
        return Ok(None);
    }
    let mut tensors = Vec::with_capacity(whole.specs.len());
    for (spec, range) in whole.specs.iter().zip(&pieces.of_param) {
        let mut bytes = Vec::new();
        for piece in &pieces.all[range.clone()] {
            let part = received[piece.owner].next().expect("a tensor a piece");
            bytes.extend_from_slice(part.bytes());
        }
        tensors.push(Tensor::from_bytes(whole.recipe.master(), &spec.shape, &bytes));
    }
    Ok(Some(tensors))
}
