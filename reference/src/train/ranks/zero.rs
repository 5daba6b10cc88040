//! The exchanges of ZeRO-1: gradients to the owners of the pieces, which add them by the contract's
//! tree, and updated weights back to the ranks that hold them.

use std::collections::BTreeMap;
use std::ops::Range;

use fathom_numerics::reduce::tree_sum;
use fathom_trace::DType;

use super::pieces::{Contribution, Held, Overlap, Piece, Pieces};
use super::pipeline::Executed;
use super::world::World;
use crate::backend::direct::{Received, Sent, Transfer};
use crate::backend::{Backend, Place};
use crate::exchange::backend::Travelling;
use crate::exchange::one;
use crate::layers::Gradients;
use crate::model::{Model, ParamSpec, Params};
use crate::ops::add::Add;
use crate::ops::clip_factor::ClipFactor;
use crate::ops::sum_of_squares::SumOfSquares;
use crate::optim::Clip;
use crate::train::TrainError;
use crate::train::shards::{Slot, tree};
use crate::{EngineError, Tensor};

/// Which rank sends what to which, the same at every step.
pub(super) struct Routes {
    /// The accumulators that this rank adds up over its shards, by `dir`.
    pub slots: Vec<Vec<Slot>>,
    /// What this rank contributes to the gradient.
    contributions: Vec<Contribution>,
    /// By contribution: which pieces it overlaps.
    gradients_out: Vec<Vec<Overlap<()>>>,
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
            slots: pieces.slots(world, world.rank),
            contributions: pieces.contributions(world, world.rank),
            gradients_out: Vec::new(),
            gradients_in: vec![Vec::new(); ranks],
            weights_out: vec![Vec::new(); ranks],
            weights_in: vec![Vec::new(); ranks],
            own,
        };
        let overlaps = |c: &Contribution| pieces.sent(world, world.rank, &c.held, ());
        routes.gradients_out = routes.contributions.iter().map(overlaps).collect();
        for rank in 0..ranks {
            for c in pieces.contributions(world, rank) {
                let mut found = pieces.sent(world, rank, &c.held, (c.leaf, c.part));
                found.retain(|overlap| pieces.all[overlap.piece].owner == world.rank);
                routes.gradients_in[rank].extend(found);
            }
            for (dir, stage) in pieces.held(world, rank).iter().enumerate() {
                for (id, held) in stage.iter().enumerate() {
                    for overlap in pieces.overlaps(held, (dir, id)) {
                        let owner = pieces.all[overlap.piece].owner;
                        if owner == world.rank {
                            routes.weights_out[rank].push(overlap.clone().of(()));
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

/// Elements `range` of a tensor; shared where they are all.
fn slice(tensor: &Tensor, range: &Range<usize>) -> Tensor {
    if tensor.shape() == [range.len()] {
        return tensor.clone();
    }
    let size = tensor.dtype().size();
    let bytes = &tensor.bytes()[range.start * size..range.end * size];
    Tensor::from_bytes(tensor.dtype(), &[range.len()], bytes)
}

/// What an overlap has of a piece's values, in the order of the rank that holds it.
fn taken<T>(values: &Tensor, piece: &Piece, overlap: &Overlap<T>) -> Tensor {
    if overlap.range.len() == piece.range.len() {
        return values.clone();
    }
    let size = values.dtype().size();
    let mut bytes = Vec::with_capacity(overlap.range.len() * size);
    for run in overlap.runs() {
        let [start, end] = [run.start, run.end].map(|i| (i - piece.range.start) * size);
        bytes.extend_from_slice(&values.bytes()[start..end]);
    }
    Tensor::from_bytes(values.dtype(), &[overlap.range.len()], &bytes)
}

/// What ranks have of a piece.
type Parts<'a, T> = Vec<(&'a Overlap<T>, Tensor)>;

/// A piece of its parts, which have each element once.
fn assembled<T>(piece: &Piece, parts: &mut Parts<'_, T>, dtype: DType) -> Tensor {
    if parts.len() == 1 {
        return parts.remove(0).1;
    }
    let size = dtype.size();
    Tensor::filled(dtype, &[piece.range.len()], |all| {
        for (overlap, tensor) in parts.drain(..) {
            let mut rest = tensor.bytes();
            for run in overlap.runs() {
                let (own, after) = rest.split_at(run.len() * size);
                all[(run.start - piece.range.start) * size..][..own.len()].copy_from_slice(own);
                rest = after;
            }
        }
    })
}

/// The gradient of this rank's pieces: uses of a parameter added in order, shards by the tree.
pub(super) fn reduce<B: Travelling>(
    (world, pieces, routes): (&World, &Pieces, &Routes),
    whole: &Model,
    backend: &B,
    executed: &mut Executed<B>,
    step: u64,
) -> Result<Gradients<B>, TrainError> {
    if backend.connects(&world.between) {
        return reduce_by_devices((world, pieces, routes), whole, backend, executed, step);
    }
    let mut out: Vec<Vec<Tensor>> = vec![Vec::new(); world.all.size()];
    // One after the other, so that no more than one is there whole and in pieces.
    for (c, overlaps) in routes.contributions.iter().zip(&routes.gradients_out) {
        let gradient = backend.download(&computed(c, executed))?;
        for overlap in overlaps {
            let to = pieces.all[overlap.piece].owner;
            out[to].push(slice(&gradient, &overlap.range));
        }
    }
    let what = format!("gradients of step {step}");
    let received = exchange(world, &what, out, |rank| !routes.gradients_in[rank].is_empty())?;
    // By piece, leaf and part: what came.
    let mut parts: BTreeMap<Use, Parts<'_, _>> = BTreeMap::new();
    for (overlaps, tensors) in routes.gradients_in.iter().zip(received) {
        for (overlap, tensor) in overlaps.iter().zip(tensors) {
            parts.entry(use_of(overlap)).or_default().push((overlap, tensor));
        }
    }
    backend.at(Place { step, ..Place::default() });
    let op = whole.gradient_sum();
    let mut buffers = Vec::with_capacity(routes.own.len());
    for &piece in &routes.own {
        let uses = parts.range_mut((piece, 0, 0)..(piece + 1, 0, 0));
        let upload = |(&(_, leaf, _), parts): (&Use, &mut Parts<'_, _>)| {
            let whole = assembled(&pieces.all[piece], parts, op.out);
            Ok::<_, EngineError>((leaf, backend.upload(whole)?))
        };
        buffers.push(sum((world, backend, &op), &mut uses.map(upload))?);
    }
    Ok(Gradients { buffers })
}

/// What is added up for a piece: the piece, the leaf of the tree and the use of the parameter.
type Use = (usize, usize, usize);

fn use_of(overlap: &Overlap<(usize, usize)>) -> Use {
    let (leaf, part) = overlap.of;
    (overlap.piece, leaf, part)
}

/// Takes a contribution out of what was executed.
fn computed<B: Backend>(c: &Contribution, executed: &mut Executed<B>) -> B::Buffer {
    let gradients = &mut executed.gradients.sets;
    let buffers = gradients.get_mut(&(c.source.dir, c.source.leaf)).expect("it was computed");
    buffers.buffers[c.source.slot].take().expect("a trained parameter")
}

/// The gradient of a piece: the uses of each leaf in their order, then the tree.
fn sum<B: Backend>(
    (world, backend, op): (&World, &B, &Add),
    uses: &mut dyn Iterator<Item = Result<(usize, B::Buffer), EngineError>>,
) -> Result<Option<B::Buffer>, EngineError> {
    let mut add = |a: B::Buffer, b: B::Buffer| backend.add(op, &a, &b, None);
    let mut leaves: Vec<Option<B::Buffer>> = vec![None; world.shares.leaves()];
    for used in uses {
        let (leaf, used) = used?;
        leaves[leaf] = Some(match leaves[leaf].take() {
            Some(sum) => add(sum, used)?,
            None => used,
        });
    }
    tree(leaves, &mut add)
}

/// Those of the overlaps, which stand in order of the parameters, that are of one.
fn of_param<'a, T>(pieces: &Pieces, overlaps: &'a [Overlap<T>], param: usize) -> &'a [Overlap<T>] {
    let before = |p: usize| overlaps.partition_point(|o| pieces.all[o.piece].param < p);
    &overlaps[before(param)..before(param + 1)]
}

/// [`reduce`] where devices are connected, parameter by parameter: what has come for one is added
/// up before the next one's is there.
fn reduce_by_devices<B: Travelling>(
    (world, pieces, routes): (&World, &Pieces, &Routes),
    whole: &Model,
    backend: &B,
    executed: &mut Executed<B>,
    step: u64,
) -> Result<Gradients<B>, TrainError> {
    backend.at(Place { step, ..Place::default() });
    let op = whole.gradient_sum();
    let mut buffers = Vec::with_capacity(routes.own.len());
    let mut contributions = routes.contributions.iter().zip(&routes.gradients_out).peekable();
    let mut own = routes.own.iter().peekable();
    for (param, spec) in whole.specs.iter().enumerate() {
        let mut sent = Vec::new();
        while let Some((c, overlaps)) = contributions.next_if(|(c, _)| c.held.param == param) {
            let gradient = computed(c, executed);
            for overlap in overlaps {
                let to = pieces.all[overlap.piece].owner;
                sent.extend(overlap.both().map(|(elements, _)| Sent {
                    to,
                    buffer: gradient.clone(),
                    elements,
                }));
            }
        }
        let (mut room, mut received) = (Vec::new(), Vec::new());
        let mut uses: BTreeMap<Use, usize> = BTreeMap::new();
        for (from, overlaps) in routes.gradients_in.iter().enumerate() {
            for overlap in of_param(pieces, overlaps, param) {
                let whole = &pieces.all[overlap.piece].range;
                let buffer = *uses.entry(use_of(overlap)).or_insert_with(|| {
                    room.push((op.out, vec![whole.len()]));
                    room.len() - 1
                });
                received.extend(overlap.runs().map(|run| {
                    let elements = run.start - whole.start..run.end - whole.start;
                    Received { from, buffer, elements }
                }));
            }
        }
        let mut made: Vec<Option<B::Buffer>> = Vec::new();
        if !sent.is_empty() || !received.is_empty() {
            let what = format!("gradients of {}, step {step}", spec.name);
            let transfer = Transfer { sent, room, received };
            let moved = backend.move_ranges(&world.between, &what, transfer)?;
            made.extend(moved.into_iter().map(Some));
        }
        while let Some(&piece) = own.next_if(|&&piece| pieces.all[piece].param == param) {
            let uses = uses.range((piece, 0, 0)..(piece + 1, 0, 0));
            let mut uses = uses.map(|(&(_, leaf, _), &buffer)| {
                Ok((leaf, made[buffer].take().expect("a buffer a use")))
            });
            buffers.push(sum((world, backend, &op), &mut uses)?);
        }
    }
    Ok(Gradients { buffers })
}

/// Intervals that follow each other, as one.
fn joined(mut intervals: Vec<(usize, Tensor)>, dtype: DType) -> Tensor {
    if intervals.len() == 1 {
        return intervals.remove(0).1;
    }
    intervals.sort_by_key(|(start, _)| *start);
    let length = intervals.iter().map(|(_, tensor)| tensor.len()).sum();
    Tensor::filled(dtype, &[length], |mut all| {
        for (_, tensor) in &intervals {
            let (part, rest) = std::mem::take(&mut all).split_at_mut(tensor.bytes().len());
            part.copy_from_slice(tensor.bytes());
            all = rest;
        }
    })
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
        taken(&own[place[&overlap.piece]], &pieces.all[overlap.piece], overlap)
    };
    let out = routes.weights_out.iter().map(|to| to.iter().map(of).collect()).collect();
    let received = exchange(world, what, out, |rank| !routes.weights_in[rank].is_empty())?;
    let held = pieces.held(world, world.rank);
    let models = pieces.models(world, world.rank);
    let dtype = models[0].recipe.master();
    // By stage and parameter: the intervals that came.
    let mut parts: Vec<Vec<Vec<(usize, Tensor)>>> =
        held.iter().map(|stage: &Vec<Held>| vec![Vec::new(); stage.len()]).collect();
    for (overlaps, tensors) in routes.weights_in.iter().zip(received) {
        for (overlap, tensor) in overlaps.iter().zip(tensors) {
            let (dir, id) = overlap.of;
            parts[dir][id].push((overlap.range.start, tensor));
        }
    }
    let stage = |(model, parts): (&Model, Vec<Vec<(usize, Tensor)>>)| {
        let upload = |(spec, parts): (&ParamSpec, Vec<(usize, Tensor)>)| {
            backend.upload(joined(parts, dtype).reshape(&spec.shape))
        };
        let buffers = model.specs.iter().zip(parts).map(upload).collect::<Result<_, _>>()?;
        Ok(Params { buffers })
    };
    models.iter().zip(parts).map(stage).collect()
}

/// [`gather`] where devices are connected. `own` are the values of this rank's pieces.
pub(super) fn gather_by_devices<B: Travelling>(
    (world, pieces, routes): (&World, &Pieces, &Routes),
    backend: &B,
    own: &[B::Buffer],
    what: &str,
) -> Result<Vec<Params<B>>, TrainError> {
    let place: BTreeMap<usize, usize> =
        routes.own.iter().enumerate().map(|(i, &piece)| (piece, i)).collect();
    let mut sent = Vec::new();
    for (to, overlaps) in routes.weights_out.iter().enumerate() {
        for overlap in overlaps {
            let first = pieces.all[overlap.piece].range.start;
            let buffer = &own[place[&overlap.piece]];
            sent.extend(overlap.runs().map(|run| Sent {
                to,
                buffer: buffer.clone(),
                elements: run.start - first..run.end - first,
            }));
        }
    }
    let models = pieces.models(world, world.rank);
    let dtype = models[0].recipe.master();
    // The parameters of all stages, one after the other.
    let mut firsts = Vec::with_capacity(models.len());
    let mut room = Vec::new();
    for model in models {
        firsts.push(room.len());
        room.extend(model.specs.iter().map(|spec| (dtype, spec.shape.clone())));
    }
    let mut received = Vec::new();
    for (from, overlaps) in routes.weights_in.iter().enumerate() {
        for overlap in overlaps {
            let (dir, id) = overlap.of;
            let buffer = firsts[dir] + id;
            let runs = overlap.both();
            received.extend(runs.map(|(elements, _)| Received { from, buffer, elements }));
        }
    }
    let moved = backend.move_ranges(&world.between, what, Transfer { sent, room, received })?;
    let mut moved = moved.into_iter();
    let stage =
        |model: &Model| Params { buffers: moved.by_ref().take(model.specs.len()).collect() };
    Ok(models.iter().map(stage).collect())
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
