//! Ranks whose devices reach each other through NCCL: whole steps with a stand-in for it, and NCCL
//! itself where it is asked for.

use std::path::PathBuf;
use std::thread;

use fathom_gpu::nccl::{self, Nccl};
use fathom_gpu::{Cuda, DeviceKind, Gpu};
use fathom_libcuda::prepare;
use fathom_reference::Tensor;
use fathom_reference::backend::Backend;
use fathom_reference::backend::direct::{Received, Sent, Transfer};
use fathom_trace::shared;

use super::peer::Meeting;
use super::ranks::{assert_the_same_run, ran, set};
use super::*;

/// The stand-in, compiled into the folder; none where the test says that it is skipped.
fn standin(folder: &Path) -> Option<PathBuf> {
    let source = folder.join("nccl_standin.rs");
    fs::write(&source, include_str!("nccl_standin.rs")).unwrap();
    let library = folder.join("libnccl_standin.so");
    let mut rustc = Command::new("rustc");
    rustc.args(["--edition=2024", "--crate-type=cdylib", "-o"]).args([&library, &source]);
    match rustc.output() {
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Some(library)
        }
        Err(error) => {
            shared::skipped(&format!("NCCL's stand-in is not compiled: rustc: {error}"));
            None
        }
    }
}

/// Rows of experts, hidden states, gradients and weights go from device to device: the bits are
/// those of one process on the reference, and the stand-in has nothing to say against the calls and
/// their order.
#[test]
fn ranks_over_nccl_have_the_bits_of_one_process_on_the_reference() {
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let Some(library) = standin(folder) else { return };
    let report = folder.join("report");
    let library = format!("FATHOM_NCCL={}", library.display());
    let told = format!("NCCL_STANDIN_REPORT={}", report.display());
    let run = ["--precision", "fp8", "--steps", "2"];
    ran(folder, "alone", &[], &run);
    let layout = ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2"];
    let layout = [&layout[..], &["parallel.schedule=\"dualpipe\""]].concat();
    let flags = ["--backend", "emulated", "--transport", "nccl"];
    let flags = [&run[..], &set(&layout), &flags].concat();
    ran(folder, "ranks", &["env", &library, &told], &flags);
    assert_the_same_run(&folder.join("alone"), &folder.join("ranks"));
    // Devices, bytes, and whether all that was begun came to its end.
    let text = fs::read_to_string(report).unwrap();
    let mut groups: Vec<(&str, u64)> = Vec::new();
    for line in text.lines() {
        let (devices, rest) = line.split_once("] ").unwrap();
        let (bytes, ends) = rest.split_once(' ').unwrap();
        assert_eq!(ends, "true", "{text}");
        groups.push((devices, bytes.parse().unwrap()));
    }
    groups.sort_unstable();
    // Experts' groups, what a pipeline's two ranks have between them - each direction's hidden
    // states, and their gradients - and all ranks: gradients and weights.
    let mut expected = vec!["[0, 1", "[2, 3", "[0, 1, 2, 3"];
    expected.extend(["[0, 2", "[1, 3"].iter().flat_map(|pair| [*pair; 4]));
    expected.sort_unstable();
    assert_eq!(groups.iter().map(|(devices, _)| *devices).collect::<Vec<_>>(), expected);
    assert!(groups.iter().all(|(_, bytes)| *bytes > 1000), "{text}");
}

#[test]
fn what_nccl_cannot_do_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let nccl = ["--transport", "nccl"];
    let output = train(folder.path(), RUN, "run", &nccl);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("expected --backend cuda or emulated"), "{stderr}");
    if fathom_gpu::nvrtc::find_or_fetch_for_tests().is_none() {
        return;
    }
    let mut command =
        command(folder.path(), RUN, "run", &[&nccl[..], &["--backend", "emulated"]].concat());
    let output = command.env("FATHOM_NCCL", "/nowhere/libnccl.so.2").output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("/nowhere/libnccl.so.2") && stderr.contains("fetch-nccl"), "{stderr}");
}

const RANKS: usize = 4;

/// NVIDIA's own NCCL on four emulated devices of an architecture that it has PTX for. Its module
/// takes minutes to be read, so `FATHOM_TEST_NCCL=1` asks for it. The test runs itself anew on the
/// emulated driver.
#[test]
fn nccl_itself_moves_what_ranks_exchange() {
    if prepare::is_prepared() {
        return rows_between_devices();
    }
    if std::env::var_os("FATHOM_TEST_NCCL").is_none() {
        return shared::skipped("NCCL itself, which takes minutes: FATHOM_TEST_NCCL=1 asks for it");
    }
    if let Err(error) = nccl::fetch() {
        return shared::skipped(&format!("NCCL itself: {error}"));
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_fathom"));
    command.args(["emulate", "--gpu", "rtx-pro-6000", "--devices", "4", "--"]);
    command.arg(std::env::current_exe().unwrap());
    command.args(["--exact", "nccl::nccl_itself_moves_what_ranks_exchange", "--nocapture"]);
    let output = command.output().unwrap();
    let [told, errors] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    // The exit code is not asked: NCCL probes for modules without PTX, which the emulator tells.
    assert!(told.contains("1 passed"), "{told}\n{errors}");
}

/// Four ranks, threads, exchange rows.
fn rows_between_devices() {
    let nccl = Nccl::open(&nccl::find()).unwrap();
    let (nccl, meeting) = (&nccl, &Meeting::new(RANKS));
    thread::scope(|scope| {
        for rank in 0..RANKS {
            scope.spawn(move || {
                let gpu = Gpu::open_for_exchanges(DeviceKind::Emulated, rank).unwrap();
                let cuda = Cuda::new(gpu).with_nccl(nccl.clone());
                let meet = |own| Ok(meeting.meet(rank, own));
                let direct = cuda.connect((rank, RANKS), &meet).unwrap().unwrap();
                for round in 0..3 {
                    thread::sleep(Duration::from_millis(100 * ((rank + round) % 3) as u64));
                    all_to_all(&cuda, rank, |transfer| direct.begin(transfer).unwrap()().unwrap());
                }
                // And one way, from each to the next.
                let [next, before] = [rank + 1, rank + RANKS - 1].map(|r| r % RANKS);
                let own = cuda.upload(Tensor::from_vec(&[3], vec![rank as i32; 3])).unwrap();
                let sent = vec![Sent { to: next, buffer: own, elements: 1..3 }];
                let room = vec![(fathom_trace::DType::I32, vec![2])];
                let received = vec![Received { from: before, buffer: 0, elements: 0..2 }];
                let landing = direct.begin(Transfer { sent, room, received }).unwrap();
                let found = cuda.download(&landing().unwrap()[0]).unwrap();
                assert_eq!(found.as_slice::<i32>(), [before as i32; 2]);
            });
        }
    });
}

/// Rank a sends (a + 2 b) % 5 rows of 3 numbers to rank b, itself among them, and receives them in
/// the order of ranks from the last to the first.
fn all_to_all(
    cuda: &Cuda,
    rank: usize,
    exchange: impl Fn(Transfer<fathom_gpu::DeviceTensor>) -> Vec<fathom_gpu::DeviceTensor>,
) {
    let count = |from: usize, to: usize| (from + 2 * to) % 5 * 3;
    let number = |from: usize, to: usize, i: usize| (100 * from + 10 * to + i) as f32;
    let (mut own, mut sent) = (Vec::new(), Vec::new());
    for to in 0..RANKS {
        let begin = own.len();
        own.extend((0..count(rank, to)).map(|i| number(rank, to, i)));
        sent.push((to, begin..own.len()));
    }
    let own = cuda.upload(Tensor::from_vec(&[own.len()], own)).unwrap();
    let sent = sent.into_iter().map(|(to, elements)| Sent { to, buffer: own.clone(), elements });
    let (mut expected, mut received) = (Vec::new(), Vec::new());
    for from in (0..RANKS).rev() {
        let begin = expected.len();
        expected.extend((0..count(from, rank)).map(|i| number(from, rank, i)));
        received.push(Received { from, buffer: 0, elements: begin..expected.len() });
    }
    let room = vec![(fathom_trace::DType::F32, vec![expected.len() / 3, 3])];
    let landed = exchange(Transfer { sent: sent.collect(), room, received });
    assert_eq!(cuda.download(&landed[0]).unwrap().as_slice::<f32>(), expected);
}
