//! Rows from device to device by kernels of ours, over peer memory (NVLink), for ranks that are
//! threads of one process: `gpu/kernels/exchange/peer.cu` says how a transfer goes.
//!
//! Every member of a group has a [`Mailbox`] in its device's memory, and learns where those of the
//! others are. A [`Connection`] then needs no host to begin and end a transfer: the receiver's
//! kernel tells the sender's where its ranges belong, the sender's stores go there, and a flag says
//! that they are through. Memory that ranks allocate in order of a stream is opened to the other
//! devices by its pool, all other memory by the contexts.
//!
//! Source: NVIDIA, "CUDA Driver API", sections Peer Context Memory Access and Stream Ordered Memory
//! Allocator.

use std::cell::{Cell, RefCell};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Arc, OnceLock};

use cudarc::driver::{CudaStream, result, sys};
use fathom_reference::Tensor;
use fathom_reference::backend::Result;
use fathom_reference::backend::direct::{Direct, Landing, Received, Sent, Transfer};
use fathom_trace::DType;
use serde::{Deserialize, Serialize};

use crate::compile::{Source, source};
use crate::device::{Gpu, GpuError};
use crate::lane::{Lane, failed};
use crate::launch::{self, Arg, Kernel, LaunchConfig};
use crate::tensor::DeviceTensor;

/// Entries `peer_ready`, `peer_move` and `peer_done`, with [`CONSTANTS`].
const SOURCE: Source<'static> = source!("exchange/peer.cu");

const CONSTANTS: [(&str, u64); 4] = [
    ("PAIR_WORDS", PAIR as u64),
    ("BOX_WORDS", BOX as u64),
    ("MOVE_THREADS", MOVE_THREADS as u64),
    ("CHUNK_BYTES", CHUNK),
];

/// Words of the kernels' `Pair`, of `Box` before its ranges, of `Range`.
const PAIR: usize = 10;
const BOX: usize = 8;
const RANGE: usize = 2;

/// Place of `left` in a box.
const LEFT: usize = 4;

/// Ranges that a box has room for; a transfer of more goes in several turns.
const MOST_RANGES: usize = 1024;

const BOX_WORDS: usize = BOX + RANGE * MOST_RANGES;
const WORD_BYTES: u64 = 8;

/// Bytes that a CTA of `peer_move` copies at once.
const CHUNK: u64 = 16 * 1024;
const MOVE_THREADS: u32 = 256;
const WARP: u32 = 32;

/// Most members: `peer_ready` has a warp for each in one CTA.
const MOST_MEMBERS: usize = 32;

/// Why devices cannot reach each other.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// Ranks are processes.
    #[error(
        "--transport peer: expected ranks that are threads of one process, found ranks {} and {} of a \
         group in two; start them with --ranks N and without --processes, or use --transport nccl",
        ranks[0], ranks[1]
    )]
    Processes {
        /// Two of the group's ranks.
        ranks: [usize; 2],
    },
    /// Two ranks have one device.
    #[error(
        "--transport peer: expected a GPU for every rank, found ranks {} and {} of a group on device \
         {device}; leave --transport out, or use fewer ranks", ranks[0], ranks[1]
    )]
    Shared {
        /// Two of the group's ranks.
        ranks: [usize; 2],
        /// The device that both have.
        device: i32,
    },
    /// One device cannot reach another.
    #[error(
        "--transport peer: expected devices that reach each other's memory, found that {device} does \
         not reach {other} (nvidia-smi topo -p2p w); use --transport nccl"
    )]
    NoAccess {
        /// This rank's device.
        device: i32,
        /// That of another rank of the group.
        other: i32,
    },
    /// The group is too large.
    #[error("--transport peer: expected at most {MOST_MEMBERS} ranks of a group, found {0}")]
    Members(usize),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] GpuError),
}

/// What a member tells the others of itself.
#[derive(Serialize, Deserialize)]
struct Card {
    process: u64,
    device: sys::CUdevice,
    /// Its context, as a pointer of the process.
    context: u64,
    /// Address of its first box.
    mailbox: u64,
}

/// A number that no other process has, but by an unlikely chance.
fn process() -> u64 {
    static PROCESS: OnceLock<u64> = OnceLock::new();
    *PROCESS.get_or_init(|| RandomState::new().build_hasher().finish())
}

/// A rank's boxes, one for each member of a group: flags, and where ranges belong.
pub struct Mailbox {
    gpu: Arc<Gpu>,
    boxes: DeviceTensor,
    size: usize,
}

impl Mailbox {
    /// Empty boxes for a group of `size` ranks.
    ///
    /// # Errors
    /// [`PeerError::Members`], [`PeerError::Device`].
    pub fn new(gpu: &Arc<Gpu>, size: usize) -> Result<Mailbox, PeerError> {
        if size > MOST_MEMBERS {
            return Err(PeerError::Members(size));
        }
        gpu.purpose("exchange", "mailbox");
        let boxes = gpu.zeros(DType::I64, &[size, BOX_WORDS])?;
        gpu.wait()?;
        Ok(Mailbox { gpu: Arc::clone(gpu), boxes, size })
    }

    /// What the other members are to know.
    pub fn card(&self) -> Vec<u8> {
        let context = self.gpu.stream().context();
        let card = Card {
            process: process(),
            device: context.cu_device(),
            context: context.cu_ctx() as u64,
            mailbox: self.boxes.address(),
        };
        serde_json::to_vec(&card).expect("plain data")
    }

    /// Opens this rank's memory to the other members, and theirs to it; `cards` are those of all,
    /// this one's at `index`. At most `sms` SMs copy.
    ///
    /// # Errors
    /// [`PeerError`].
    ///
    /// # Panics
    /// Where `cards` are none of [`Mailbox::card`].
    pub fn connect(
        self,
        (index, sms): (usize, usize),
        cards: &[Vec<u8>],
    ) -> Result<Connection, PeerError> {
        let cards: Vec<Card> = cards
            .iter()
            .map(|card| serde_json::from_slice(card).expect("a rank's own JSON"))
            .collect();
        for (rank, card) in cards.iter().enumerate().filter(|(rank, _)| *rank != index) {
            let ranks = [index.min(rank), index.max(rank)];
            if card.process != cards[index].process {
                return Err(PeerError::Processes { ranks });
            }
            if card.device == cards[index].device {
                return Err(PeerError::Shared { ranks, device: card.device });
            }
            self.open(card)?;
        }
        let kernel = |entry| self.gpu.kernel(SOURCE, entry, &CONSTANTS, 0);
        let side = Lane::new(&self.gpu)?.stream;
        Ok(Connection {
            ready: kernel("peer_ready")?,
            moves: kernel("peer_move")?,
            done: kernel("peer_done")?,
            lane: Lane::new(&self.gpu)?,
            side,
            sms: sms.clamp(1, self.gpu.description().sm_count.max(1) as usize),
            index,
            mailboxes: cards.iter().map(|card| card.mailbox).collect(),
            own: self.boxes,
            numbers: RefCell::new(vec![[0; 2]; self.size]),
            given_up: Cell::new(false),
        })
    }

    /// Lets this device and another reach each other's memory.
    fn open(&self, card: &Card) -> Result<(), PeerError> {
        let context = self.gpu.stream().context();
        context.bind_to_thread().map_err(GpuError::of("cuCtxSetCurrent"))?;
        let (own, other) = (context.cu_device(), card.device);
        let mut can = 0;
        // SAFETY: the pointer is to a live local.
        unsafe { sys::cuDeviceCanAccessPeer(&mut can, own, other).result() }
            .map_err(GpuError::of("cuDeviceCanAccessPeer"))?;
        if can == 0 {
            return Err(PeerError::NoAccess { device: own, other });
        }
        // SAFETY: the context is that of a rank of this process, which has not ended: it waits for
        // this one.
        match unsafe { sys::cuCtxEnablePeerAccess(card.context as sys::CUcontext, 0) } {
            sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => {}
            code => code.result().map_err(GpuError::of("cuCtxEnablePeerAccess"))?,
        }
        let mut pool = std::ptr::null_mut();
        let access = sys::CUmemAccessDesc {
            location: sys::CUmemLocation {
                type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
                id: other,
            },
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: pointers are to live locals; the pool is the device's own.
        unsafe {
            sys::cuDeviceGetMemPool(&mut pool, own)
                .result()
                .map_err(GpuError::of("cuDeviceGetMemPool"))?;
            sys::cuMemPoolSetAccess(pool, &access, 1).result()
        }
        .map_err(GpuError::of("cuMemPoolSetAccess"))?;
        Ok(())
    }
}

/// One rank's end of a group's connection, which its thread alone uses.
pub struct Connection {
    ready: Arc<Kernel>,
    moves: Arc<Kernel>,
    done: Arc<Kernel>,
    lane: Lane,
    /// For a word beside what the lane waits for.
    side: Arc<CudaStream>,
    sms: usize,
    index: usize,
    /// Where each member's boxes are; [`Connection::own`] are this rank's.
    mailboxes: Vec<u64>,
    own: DeviceTensor,
    /// By member: turns that were sent to it, and received from it.
    numbers: RefCell<Vec<[u64; 2]>>,
    given_up: Cell<bool>,
}

/// Address and bytes of a range.
type Bytes = (u64, u64);

/// By member: the ranges that go to it, and those that come from it.
struct Ranges {
    out: Vec<Vec<Bytes>>,
    into: Vec<Vec<Bytes>>,
}

impl Ranges {
    fn of(
        members: usize,
        sent: &[Sent<DeviceTensor>],
        received: &[Received],
        made: &[DeviceTensor],
    ) -> Ranges {
        let mut ranges = Ranges { out: vec![Vec::new(); members], into: vec![Vec::new(); members] };
        for s in sent.iter().filter(|s| !s.elements.is_empty()) {
            let (address, bytes) = s.buffer.span(&s.elements);
            ranges.out[s.to].push((address, bytes as u64));
        }
        for r in received.iter().filter(|r| !r.elements.is_empty()) {
            let (address, bytes) = made[r.buffer].span(&r.elements);
            ranges.into[r.from].push((address, bytes as u64));
        }
        ranges
    }

    /// How often boxes are filled until all ranges have gone.
    fn turns(&self) -> usize {
        let all = self.out.iter().chain(&self.into);
        all.map(|ranges| ranges.len().div_ceil(MOST_RANGES)).max().unwrap_or(0)
    }
}

/// Those of the ranges that go in a turn.
fn of_turn(ranges: &[Bytes], turn: usize) -> &[Bytes] {
    ranges.chunks(MOST_RANGES).nth(turn).unwrap_or_default()
}

/// What the kernels read of a turn, as words, and where each part begins.
struct Table {
    words: Vec<i64>,
    out: usize,
    into: usize,
    /// Where our ranges belong: `peer_ready` writes it.
    to: usize,
    first_chunks: usize,
    /// How many ranges go out, and in how many chunks.
    ranges: usize,
    chunks: u64,
}

impl Connection {
    /// The box about member `about` in the memory of member `of`.
    fn box_of(&self, of: usize, about: usize) -> u64 {
        self.mailboxes[of] + (about * BOX_WORDS) as u64 * WORD_BYTES
    }

    /// The table of a turn; counts it.
    fn table(&self, ranges: &Ranges, turn: usize) -> Table {
        let (mut words, mut out, mut into) = (Vec::new(), Vec::new(), Vec::new());
        let mut numbers = self.numbers.borrow_mut();
        for (member, numbers) in numbers.iter_mut().enumerate() {
            words.push(self.box_of(member, self.index));
            words.push(self.box_of(self.index, member));
            let sides = [(&ranges.out[member], &mut out), (&ranges.into[member], &mut into)];
            for ((ranges, all), number) in sides.into_iter().zip(numbers) {
                let ranges = of_turn(ranges, turn);
                *number += u64::from(!ranges.is_empty());
                let bytes = ranges.iter().map(|(_, bytes)| bytes).sum();
                words.extend([*number, all.len() as u64, ranges.len() as u64, bytes]);
                all.extend_from_slice(ranges);
            }
        }
        debug_assert_eq!(words.len(), numbers.len() * PAIR);
        let pairs = words.len();
        words.extend(out.iter().chain(&into).flat_map(|(address, bytes)| [*address, *bytes]));
        let to = words.len();
        words.resize(to + out.len(), 0);
        let mut chunks = 0;
        words.push(chunks);
        for (_, bytes) in &out {
            chunks += bytes.div_ceil(CHUNK);
            words.push(chunks);
        }
        Table {
            words: words.into_iter().map(|word| word as i64).collect(),
            out: pairs,
            into: pairs + RANGE * out.len(),
            to,
            first_chunks: to + out.len(),
            ranges: out.len(),
            chunks,
        }
    }

    fn transfer(
        &self,
        transfer: Transfer<DeviceTensor>,
    ) -> Result<Landing<DeviceTensor>, GpuError> {
        let Transfer { sent, room, received } = transfer;
        let made = self.lane.room(&room)?;
        let ranges = Ranges::of(self.mailboxes.len(), &sent, &received, &made);
        let mut held: Vec<DeviceTensor> = sent.into_iter().map(|s| s.buffer).collect();
        let mut tables = Vec::new();
        for turn in 0..ranges.turns() {
            let Table { words, out, into, to, first_chunks, ranges, chunks } =
                self.table(&ranges, turn);
            let words = self.lane.gpu.upload(&Tensor::from_vec(&[words.len()], words))?;
            let at = |word: usize| Arg::U64(words.address() + word as u64 * WORD_BYTES);
            let of_ready = [at(0), at(out), at(into), at(to)];
            let of_moves = [at(out), at(to), at(first_chunks), Arg::U32(ranges as u32)];
            tables.push((of_ready, of_moves, chunks));
            held.push(words);
        }
        self.lane.after_computing()?;
        let threads = WARP * self.mailboxes.len() as u32;
        let one = LaunchConfig::new(1, threads);
        let stream = &self.lane.stream;
        for (of_ready, of_moves, chunks) in tables {
            let moves = LaunchConfig::new(self.sms.min(chunks as usize), MOVE_THREADS);
            launch::launch(stream, &self.ready, &one, &of_ready)?;
            launch::launch(stream, &self.moves, &moves, &of_moves)?;
            launch::launch(stream, &self.done, &one, &[of_ready[0], of_ready[3]])?;
        }
        self.lane.landing(held, made)
    }

    /// Tells every member's kernels, and this rank's own, that nothing more is to be waited for.
    fn leave(&self) -> Result<(), GpuError> {
        let context = self.side.context();
        context.bind_to_thread().map_err(GpuError::of("cuCtxSetCurrent"))?;
        let word = 1u64.to_ne_bytes();
        for member in 0..self.mailboxes.len() {
            for about in [self.box_of(self.index, member), self.box_of(member, self.index)] {
                let at = about + LEFT as u64 * WORD_BYTES;
                // SAFETY: a word of a mailbox, none of which is given back once a member has
                // failed; from pageable memory the driver has copied it when the call returns.
                unsafe { result::memcpy_htod_async(at, &word, self.side.cu_stream()) }
                    .map_err(GpuError::of("cuMemcpyHtoDAsync"))?;
            }
        }
        self.side.synchronize().map_err(GpuError::of("cuStreamSynchronize"))
    }
}

impl Direct<DeviceTensor> for Connection {
    fn begin(&self, transfer: Transfer<DeviceTensor>) -> Result<Landing<DeviceTensor>> {
        self.transfer(transfer).map_err(failed(self.lane.gpu.kind().name()))
    }

    fn give_up(&self) {
        if !self.given_up.replace(true) {
            // Others may still write here, and say that they have left.
            std::mem::forget(self.own.clone());
            // A failure means that the context is lost, and with it every kernel that waits.
            let _ = self.leave();
        }
    }
}

impl Drop for Connection {
    /// What was begun comes to its end first: the others have begun it too, or give up.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.give_up();
        }
        // A failure means that the context is lost; nothing is left to do.
        let _ = self.lane.stream.synchronize();
    }
}
