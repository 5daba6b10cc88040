//! Stands in for NCCL where ranks' GPUs are emulated as Hopper, for which NCCL has machine code
//! alone. `tests/backends/nccl.rs` compiles it and names it in FATHOM_NCCL.
//!
//! It moves what is sent, and holds the calls to more than NCCL does: sends and receives stand in
//! groups, all of a communicator on one stream, within one allocation of the rank's own device, and
//! their sizes match. What is sent is copied at once; that nothing would wait for ever where each
//! group of a rank waits for all of its partners, as on hardware, is seen at the end.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::ffi::{c_char, c_int, c_void};
use std::io::Write;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

// Of the driver, which is in the process.
unsafe extern "C" {
    fn cuCtxGetDevice(device: *mut c_int) -> c_int;
    fn cuMemAlloc_v2(at: *mut u64, bytes: usize) -> c_int;
    fn cuMemGetAddressRange_v2(base: *mut u64, bytes: *mut usize, at: u64) -> c_int;
    fn cuPointerGetAttribute(value: *mut c_void, which: c_int, at: u64) -> c_int;
    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: usize) -> c_int;
    fn cuEventCreate(event: *mut usize, flags: u32) -> c_int;
    fn cuEventRecord(event: usize, stream: usize) -> c_int;
    fn cuStreamWaitEvent(stream: usize, event: usize, flags: u32) -> c_int;
}

const DEVICE_ORDINAL: c_int = 9;
const OK: c_int = 0;
const INVALID: c_int = 4;
const BYTES: c_int = 1;

/// A send or a receive: the partner, the number between the two, bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Half {
    receives: bool,
    partner: usize,
    number: u64,
    bytes: usize,
}

#[derive(Default)]
struct Rank {
    device: c_int,
    stream: Option<usize>,
    groups: VecDeque<Vec<Half>>,
    numbers: HashMap<(bool, usize), u64>,
    left: bool,
}

/// What was sent: its copy, bytes, and the event behind the copying.
type Sent = (u64, usize, usize);

#[derive(Default)]
struct Group {
    ranks: HashMap<usize, Rank>,
    size: usize,
    mail: HashMap<(usize, usize), VecDeque<Sent>>,
    moved: usize,
}

/// `ncclUniqueId`.
#[repr(C)]
struct UniqueId([u64; 16]);

struct Handle {
    id: u64,
    rank: usize,
}

struct Call {
    receives: bool,
    at: u64,
    bytes: usize,
    partner: usize,
    comm: *const Handle,
    stream: usize,
}

static WORLD: Mutex<Option<HashMap<u64, Group>>> = Mutex::new(None);
static CHANGED: Condvar = Condvar::new();

thread_local! {
    static OPEN: RefCell<Option<Vec<Call>>> = const { RefCell::new(None) };
    static WHY: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

fn world() -> MutexGuard<'static, Option<HashMap<u64, Group>>> {
    WORLD.lock().unwrap()
}

fn refuse(why: String) -> c_int {
    eprintln!("NCCL's stand-in: {why}");
    WHY.with_borrow_mut(|words| *words = [why.as_bytes(), b"\0"].concat());
    INVALID
}

macro_rules! must {
    ($holds:expr, $($why:tt)*) => {
        if !$holds {
            return refuse(format!($($why)*));
        }
    };
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetErrorString(_: c_int) -> *const c_char {
    c"refused".as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetLastError(_: *const Handle) -> *const c_char {
    WHY.with_borrow_mut(|words| {
        words.push(0);
        words.as_ptr().cast()
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> c_int {
    let mut world = world();
    let groups = world.get_or_insert_default();
    let number = groups.len() as u64 + 1;
    groups.insert(number, Group::default());
    unsafe { *id = UniqueId([number; 16]) };
    OK
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommInitRank(
    comm: *mut *const Handle,
    size: c_int,
    id: UniqueId,
    rank: c_int,
) -> c_int {
    let (size, rank, id, mut device) = (size as usize, rank as usize, id.0[0], -1);
    must!(unsafe { cuCtxGetDevice(&mut device) } == 0, "no context is current");
    let mut world = world();
    let Some(group) = world.as_mut().and_then(|w| w.get_mut(&id)) else {
        return refuse("an id that nobody gave".into());
    };
    must!(rank < size && (group.size == 0 || group.size == size), "rank {rank} of {size}");
    must!(!group.ranks.contains_key(&rank), "rank {rank} twice");
    must!(group.ranks.values().all(|r| r.device != device), "two ranks on device {device}");
    group.size = size;
    group.ranks.insert(rank, Rank { device, ..Rank::default() });
    CHANGED.notify_all();
    let all = |w: &mut Option<HashMap<u64, Group>>| w.as_ref().unwrap()[&id].ranks.len() < size;
    let (_world, late) = CHANGED.wait_timeout_while(world, Duration::from_secs(60), all).unwrap();
    must!(!late.timed_out(), "not all of {size} ranks have come");
    unsafe { *comm = Box::leak(Box::new(Handle { id, rank })) };
    OK
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupStart() -> c_int {
    must!(OPEN.with_borrow(Option::is_none), "a group in a group");
    OPEN.set(Some(Vec::new()));
    OK
}

fn call(
    receives: bool,
    at: u64,
    bytes: usize,
    dtype: c_int,
    partner: c_int,
    of: (*const Handle, usize),
) -> c_int {
    let (comm, stream) = of;
    must!(dtype == BYTES && bytes > 0, "{bytes} elements of type {dtype}");
    must!(!comm.is_null() && partner >= 0 && stream != 0, "no communicator, partner or stream");
    let partner = partner as usize;
    let call = Call { receives, at, bytes, partner, comm, stream };
    let taken = OPEN.with_borrow_mut(|open| open.as_mut().map(|calls| calls.push(call)));
    must!(taken.is_some(), "outside of a group");
    OK
}

#[unsafe(no_mangle)]
extern "C" fn ncclSend(
    at: u64,
    n: usize,
    dtype: c_int,
    to: c_int,
    comm: *const Handle,
    s: usize,
) -> c_int {
    call(false, at, n, dtype, to, (comm, s))
}

#[unsafe(no_mangle)]
extern "C" fn ncclRecv(
    at: u64,
    n: usize,
    dtype: c_int,
    from: c_int,
    comm: *const Handle,
    s: usize,
) -> c_int {
    call(true, at, n, dtype, from, (comm, s))
}

/// Enters a call in the books; refuses what does not fit.
fn enter(groups: &mut HashMap<u64, Group>, call: &Call) -> Result<Half, String> {
    let Handle { id, rank } = unsafe { &*call.comm };
    let group = groups.get_mut(id).ok_or("no such communicator")?;
    let (size, own) = (group.size, group.ranks.get_mut(rank).ok_or("it has left")?);
    let (mut base, mut room, mut device) = (0u64, 0usize, -1i32);
    let known = unsafe {
        cuMemGetAddressRange_v2(&mut base, &mut room, call.at)
            + cuPointerGetAttribute((&raw mut device).cast(), DEVICE_ORDINAL, call.at)
    };
    let inside = known == 0 && call.at + call.bytes as u64 <= base + room as u64;
    if !inside || device != own.device {
        return Err(format!("{:#x}, {} bytes: not of device {}", call.at, call.bytes, own.device));
    }
    if call.partner >= size || *own.stream.get_or_insert(call.stream) != call.stream {
        return Err(format!("partner {} of {size}, or another stream", call.partner));
    }
    let number = own.numbers.entry((call.receives, call.partner)).or_default();
    *number += 1;
    let Call { receives, partner, bytes, .. } = *call;
    Ok(Half { receives, partner, number: *number, bytes })
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupEnd() -> c_int {
    let Some(calls) = OPEN.take() else { return refuse("no group is open".into()) };
    let mut world = world();
    let groups = world.as_mut().unwrap();
    let mut halves: HashMap<(u64, usize), Vec<Half>> = HashMap::new();
    for call in &calls {
        let half = match enter(groups, call) {
            Ok(half) => half,
            Err(why) => return refuse(why),
        };
        let Handle { id, rank } = unsafe { &*call.comm };
        halves.entry((*id, *rank)).or_default().push(half);
        if !call.receives {
            let (mut copy, mut event) = (0, 0);
            let failed = unsafe {
                cuMemAlloc_v2(&mut copy, call.bytes)
                    + cuMemcpyDtoDAsync_v2(copy, call.at, call.bytes, call.stream)
                    + cuEventCreate(&mut event, 2)
                    + cuEventRecord(event, call.stream)
            };
            must!(failed == 0, "the driver refused a copy");
            let group = groups.get_mut(id).unwrap();
            group.moved += call.bytes;
            let mail = group.mail.entry((*rank, call.partner)).or_default();
            mail.push_back((copy, call.bytes, event));
        }
    }
    for ((id, rank), halves) in halves {
        groups.get_mut(&id).unwrap().ranks.get_mut(&rank).unwrap().groups.push_back(halves);
    }
    CHANGED.notify_all();
    for call in calls.iter().filter(|call| call.receives) {
        let Handle { id, rank } = unsafe { &*call.comm };
        let between = (call.partner, *rank);
        let none = |w: &mut Option<HashMap<u64, Group>>| {
            w.as_ref().unwrap()[id].mail.get(&between).is_none_or(VecDeque::is_empty)
        };
        let limit = Duration::from_secs(60);
        let (mut guard, late) = CHANGED.wait_timeout_while(world, limit, none).unwrap();
        must!(!late.timed_out(), "nothing comes from {} to {}", between.0, between.1);
        let mail = guard.as_mut().unwrap().get_mut(id).unwrap().mail.get_mut(&between).unwrap();
        let (copy, bytes, event) = mail.pop_front().unwrap();
        must!(bytes == call.bytes, "{bytes} bytes are sent, {} expected", call.bytes);
        let failed = unsafe {
            cuStreamWaitEvent(call.stream, event, 0)
                + cuMemcpyDtoDAsync_v2(call.at, copy, bytes, call.stream)
        };
        must!(failed == 0, "the driver refused a copy");
        world = guard;
    }
    OK
}

/// Whether every group comes to its end where it waits for all of its partners.
fn ends(group: &mut Group) -> bool {
    loop {
        let heads: Vec<(usize, Half)> = (group.ranks.iter())
            .flat_map(|(rank, r)| r.groups.front().into_iter().flatten().map(|half| (*rank, *half)))
            .collect();
        let meets = |(rank, half): &(usize, Half)| {
            let other = Half { receives: !half.receives, partner: *rank, ..*half };
            heads.contains(&(half.partner, other))
        };
        let met: Vec<&(usize, Half)> = heads.iter().filter(|head| meets(head)).collect();
        if met.is_empty() {
            return group.ranks.values().all(|rank| rank.groups.is_empty());
        }
        for (rank, half) in met {
            let groups = &mut group.ranks.get_mut(rank).unwrap().groups;
            let head = groups.front_mut().unwrap();
            head.retain(|other| other != half);
            if head.is_empty() {
                groups.pop_front();
            }
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommDestroy(comm: *const Handle) -> c_int {
    let Handle { id, rank } = unsafe { &*comm };
    let mut world = world();
    let group = world.as_mut().unwrap().get_mut(id).unwrap();
    group.ranks.get_mut(rank).unwrap().left = true;
    if group.ranks.values().all(|rank| rank.left) {
        let mut devices: Vec<c_int> = group.ranks.values().map(|rank| rank.device).collect();
        devices.sort();
        let (ends, mail) = (ends(group), group.mail.values().all(VecDeque::is_empty));
        let line = format!("{devices:?} {} {}\n", group.moved, ends && mail);
        let report = std::env::var_os("NCCL_STANDIN_REPORT").unwrap();
        let mut file = std::fs::File::options().append(true).create(true).open(report).unwrap();
        file.write_all(line.as_bytes()).unwrap();
    }
    OK
}
