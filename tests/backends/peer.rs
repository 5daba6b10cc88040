//! Ranks whose devices reach each other by kernels of ours over peer memory: whole steps, the
//! kernels by themselves under every check, and defects planted in them.

use std::sync::{Arc, Barrier, Mutex};
use std::thread;

use fathom_gpu::compile::Source;
use fathom_gpu::{Cuda, DeviceKind, DeviceTensor, Gpu};
use fathom_libcuda::prepare;
use fathom_reference::Tensor;
use fathom_reference::backend::Backend;
use fathom_reference::backend::direct::{Direct, Received, Sent, Transfer};
use fathom_trace::DType;

use super::ranks::{assert_the_same_run, ran, set};
use super::*;

/// Rows of experts, hidden states, gradients and weights go from device to device: the bits are
/// those of one process on the reference.
#[test]
fn ranks_over_peer_memory_have_the_bits_of_one_process_on_the_reference() {
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let run = ["--precision", "fp8", "--steps", "2"];
    ran(folder, "alone", &[], &run);
    let layout = ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2"];
    let layout = [&layout[..], &["parallel.schedule=\"dualpipe\""]].concat();
    let flags = ["--backend", "emulated", "--transport", "peer", "--ranks", "4"];
    let flags = [&run[..], &set(&layout), &flags].concat();
    ran(folder, "ranks", &[], &flags);
    assert_the_same_run(&folder.join("alone"), &folder.join("ranks"));
}

#[test]
fn what_peer_memory_cannot_do_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |before: &[&str], flags: &[&str], expected: &str| {
        let command =
            command(folder.path(), RUN, "run", &[&["--transport", "peer"], flags].concat());
        let mut all = Command::new(before.first().unwrap_or(&env!("CARGO_BIN_EXE_fathom")));
        if !before.is_empty() {
            all.args(&before[1..]).arg(command.get_program());
        }
        let output = all.args(command.get_args()).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains(expected), "{stderr}");
    };
    refused(&[], &[], "expected --backend cuda or emulated");
    let two = ["--set", "parallel.dp=2", "--backend", "emulated"];
    let processes = [&two[..], &["--processes"]].concat();
    refused(&[], &processes, "expected ranks that are threads of one process");
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_some() {
        let one_device = [env!("CARGO_BIN_EXE_fathom"), "emulate", "--devices", "1", "--"];
        refused(&one_device, &two, "expected a GPU for every rank");
    }
}

const DEVICES: usize = 8;

/// The test of this name in a process of its own, on emulated devices with every check; the output,
/// and whether all was well.
fn on_devices(test: &str, seed: usize, mutant: Option<usize>) -> (String, bool) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fathom"));
    command.args(["emulate", "--devices", &DEVICES.to_string(), "--check", "all"]);
    command.args(["--schedule-seed", &seed.to_string(), "--"]);
    command.arg(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("peer::{test}"), "--nocapture"]);
    if let Some(mutant) = mutant {
        command.env("FATHOM_TEST_MUTANT", mutant.to_string());
    }
    let output = command.output().unwrap();
    let text = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    (text.concat(), output.status.success())
}

/// On 2, 4 and 8 emulated devices under every check, in several orders of turns, the kernels bring
/// every row to its place, and no check finds anything.
#[test]
fn kernels_on_peer_memory_move_rows_under_every_check() {
    let test = "kernels_on_peer_memory_move_rows_under_every_check";
    if prepare::is_prepared() {
        let gpus = gpus(None);
        return [2, 4, DEVICES].into_iter().for_each(|ranks| exchanges(&gpus, ranks));
    }
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    for seed in 0..3 {
        let (text, well) = on_devices(test, seed, None);
        assert!(well && text.contains("1 passed"), "seed {seed}: {text}");
    }
}

/// What is replaced in a source or header of the kernels, once, and by what.
type Mutant = (&'static str, &'static str, &'static str);

const MUTANTS: [Mutant; 9] = [
    ("ptx/system.cuh", "st.release.sys.global", "st.relaxed.sys.global"),
    ("ptx/system.cuh", "ld.acquire.sys.global", "ld.relaxed.sys.global"),
    (
        "exchange/peer.cu",
        "store_release_system(&box->done, pair.out_number);",
        "box->done = pair.out_number;",
    ),
    ("exchange/peer.cu", "if (wait_for(&box->done, pair.in_number, box) &&", "if ("),
    (
        "exchange/peer.cu",
        "while (load_acquire_system(flag) < number) {",
        "while (load_acquire_system(flag) < number - 1) {",
    ),
    ("exchange/peer.cu", "i < bytes; i += MOVE_THREADS", "i + 1 < bytes; i += MOVE_THREADS"),
    (
        "exchange/peer.cu",
        "const u64 offset = (chunk - first[low]) * CHUNK_BYTES;",
        "const u64 offset = 0;",
    ),
    (
        "exchange/peer.cu",
        "const u64 alignment = (u64)source | (u64)target;",
        "const u64 alignment = (u64)source;",
    ),
    ("exchange/peer.cu", "if (first[middle] <= chunk) low", "if (first[middle] < chunk) low"),
];

/// Missing fences and flags, and rows that end up elsewhere, are found: by a check, or since what
/// has come is not what was sent.
#[test]
fn defects_of_the_kernels_on_peer_memory_are_found() {
    let test = "defects_of_the_kernels_on_peer_memory_are_found";
    if prepare::is_prepared() {
        let mutant = std::env::var("FATHOM_TEST_MUTANT").unwrap().parse().unwrap();
        return match mutant {
            DISAGREE => disagreement(&gpus(None)),
            mutant => exchanges(&gpus(Some(mutant)), 2),
        };
    }
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    for (mutant, what) in MUTANTS.iter().enumerate() {
        let (text, well) = on_devices(test, 0, Some(mutant));
        assert!(!well, "{what:?} survived: {text}");
    }
    let (text, well) = on_devices(test, 0, Some(DISAGREE));
    assert!(!well && text.contains("trap"), "{text}");
}

/// In the place of a defect: two ranks that do not agree on the size of a range.
const DISAGREE: usize = MUTANTS.len();

fn disagreement(gpus: &[Arc<Gpu>]) {
    let meeting = &Meeting::new(2);
    thread::scope(|scope| {
        for (rank, gpu) in gpus.iter().take(2).enumerate() {
            scope.spawn(move || {
                let cuda = Cuda::new(Arc::clone(gpu)).with_peers(1);
                let meet = |own| Ok(meeting.meet(rank, own));
                let direct = cuda.connect((rank, 2), &meet).unwrap().unwrap();
                let own = cuda.upload(Tensor::from_vec(&[4], vec![1.0f32; 4])).unwrap();
                let sent = Sent { to: 1 - rank, buffer: own, elements: 0..4 };
                let received = Received { from: 1 - rank, buffer: 0, elements: 0..3 + rank };
                let room = vec![(DType::F32, vec![4])];
                let transfer = Transfer { sent: vec![sent], room, received: vec![received] };
                let landed = direct.begin(transfer).unwrap()().unwrap();
                cuda.download(&landed[0]).unwrap();
            });
        }
    });
}

/// The devices, their kernels perhaps with a defect.
fn gpus(mutant: Option<usize>) -> Vec<Arc<Gpu>> {
    let open = |rank| {
        let gpu = Gpu::open_for(DeviceKind::Emulated, rank).unwrap();
        let Some(mutant) = mutant else { return Arc::new(gpu) };
        let (name, from, to) = MUTANTS[mutant];
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("gpu/kernels").join(name);
        let text = fs::read_to_string(path).unwrap();
        assert_eq!(text.matches(from).count(), 1, "{name}: {from}");
        let text = Box::leak(text.replace(from, to).into_boxed_str());
        Arc::new(gpu.with_planted(Source { name, text }))
    };
    (0..DEVICES).map(open).collect()
}

/// One exchange: rows of a rank for an expert of another, bytes of a row, experts of a rank.
struct Rows {
    count: fn(usize, usize, usize, usize) -> usize,
    width: usize,
    experts: usize,
    dtype: DType,
}

/// Rows from, to, of the expert there, and how many ranks there are.
const EXCHANGES: [Rows; 6] = [
    Rows {
        count: |from, to, e, _| (from + 2 * to + e) % 4,
        width: 48,
        experts: 3,
        dtype: DType::F8E4M3,
    },
    // The last rank's first expert gets all; the others get nothing, and rank 0 has nothing.
    Rows {
        count: |from, to, e, ranks| if to == ranks - 1 && e == 0 { 3 * from } else { 0 },
        width: 64,
        experts: 2,
        dtype: DType::BF16,
    },
    Rows {
        count: |from, to, e, _| (2 * from + to + e) % 3,
        width: 7,
        experts: 2,
        dtype: DType::F8E4M3,
    },
    Rows { count: |_, _, _, _| 0, width: 16, experts: 1, dtype: DType::F32 },
    // More than a CTA copies at once, and no multiple of it.
    Rows {
        count: |from, to, _, _| 1 + (from + to) % 2,
        width: 20_020,
        experts: 1,
        dtype: DType::F32,
    },
    // More ranges than a box has room for.
    Rows {
        count: |from, to, _, ranks| usize::from(ranks == 2 && from == 0 && to == 1),
        width: 4,
        experts: 1030,
        dtype: DType::F32,
    },
];

/// What a rank says to all and hears of all.
pub struct Meeting {
    said: Mutex<Vec<Vec<u8>>>,
    all: Barrier,
}

impl Meeting {
    pub fn new(ranks: usize) -> Meeting {
        Meeting { said: Mutex::new(vec![Vec::new(); ranks]), all: Barrier::new(ranks) }
    }

    pub fn meet(&self, rank: usize, own: Vec<u8>) -> Vec<Vec<u8>> {
        self.said.lock().unwrap()[rank] = own;
        self.all.wait();
        let said = self.said.lock().unwrap().clone();
        self.all.wait();
        said
    }
}

/// All exchanges among the first devices, and a rank that leaves in the middle of one.
fn exchanges(gpus: &[Arc<Gpu>], ranks: usize) {
    let meeting = &Meeting::new(ranks);
    thread::scope(|scope| {
        for (rank, gpu) in gpus.iter().take(ranks).enumerate() {
            scope.spawn(move || {
                let cuda = Cuda::new(Arc::clone(gpu)).with_peers(3);
                let meet = |own| Ok(meeting.meet(rank, own));
                let direct = cuda.connect((rank, ranks), &meet).unwrap().unwrap();
                for (number, rows) in EXCHANGES.iter().enumerate() {
                    // Now one and now another is late.
                    thread::sleep(Duration::from_millis(20 * ((rank + number) % 3) as u64));
                    rows.exchange(&cuda, &*direct, (rank, ranks));
                }
                meeting.meet(rank, Vec::new());
                let from_first = Received { from: 0, buffer: 0, elements: 0..4 };
                let (room, received) = (vec![(DType::F32, vec![4])], vec![from_first]);
                if rank == 1 {
                    let transfer = Transfer { sent: Vec::new(), room, received };
                    let landed = direct.begin(transfer).unwrap()().unwrap();
                    // It holds nothing that counts, but the device comes to it.
                    cuda.download(&landed[0]).unwrap();
                }
                direct.give_up();
            });
        }
    });
}

impl Rows {
    /// The bytes of a row.
    fn row(&self, from: usize, to: usize, expert: usize, row: usize) -> Vec<u8> {
        let byte = |i: usize| (101 * from + 53 * to + 29 * expert + 7 * row + i) as u8;
        (0..self.width).map(byte).collect()
    }

    fn tensor(&self, rows: usize, bytes: &[u8]) -> Tensor {
        Tensor::from_bytes(self.dtype, &[rows, self.width / self.dtype.size()], bytes)
    }

    /// Every rank's rows to their experts: by expert there, then by rank; then all of it back.
    fn exchange(
        &self,
        cuda: &Cuda,
        direct: &dyn Direct<DeviceTensor>,
        (rank, ranks): (usize, usize),
    ) {
        let columns = self.width / self.dtype.size();
        let (mut own, mut expected) = (Vec::new(), Vec::new());
        let (mut out, mut into) = (Vec::new(), Vec::new());
        let block = |bytes: &mut Vec<u8>, from, to, expert| {
            let begin = bytes.len() / self.dtype.size();
            let count = (self.count)(from, to, expert, ranks);
            bytes.extend((0..count).flat_map(|row| self.row(from, to, expert, row)));
            begin..begin + count * columns
        };
        for to in 0..ranks {
            for e in 0..self.experts {
                out.push((to, block(&mut own, rank, to, e)));
            }
        }
        for e in 0..self.experts {
            for from in 0..ranks {
                into.push((from, block(&mut expected, from, rank, e)));
            }
        }
        let x = cuda.upload(self.tensor(own.len() / self.width, &own)).unwrap();
        let moved = |x: &DeviceTensor, out: &[Block], into: &[Block], rows: usize| {
            let sent = |(to, elements): &Block| {
                let (to, elements) = (*to, elements.clone());
                Sent { to, buffer: x.clone(), elements }
            };
            let received = |(from, elements): &Block| {
                let (from, elements) = (*from, elements.clone());
                Received { from, buffer: 0, elements }
            };
            let room = vec![(self.dtype, vec![rows, columns])];
            let (sent, received) = (out.iter().map(sent), into.iter().map(received));
            let transfer = Transfer { sent: sent.collect(), room, received: received.collect() };
            direct.begin(transfer).unwrap()().unwrap().remove(0)
        };
        let there = moved(&x, &out, &into, expected.len() / self.width);
        let back = moved(&there, &into, &out, own.len() / self.width);
        for (found, expected) in [(there, &expected), (back, &own)] {
            let found = cuda.download(&found).unwrap();
            assert!(found.bytes() == expected, "rank {rank} of {ranks}, rows of {}", self.width);
        }
    }
}

/// A member, and the elements that go to it or come from it.
type Block = (usize, std::ops::Range<usize>);
