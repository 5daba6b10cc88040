//! Loads and stores of a warp: addresses of 32 lanes to words, in every state space.
//!
//! Values travel as up to four 32-bit words a lane, low word first; narrower ones lie in the low
//! bits of word 0. Bounds and alignment are checked always: global and shared accesses that fail
//! stop the launch, as on hardware.
//!
//! `unsafe` here is the call of functions compiled for CPU features that were detected.

mod global;
mod local;
mod shared;

use super::alu::for_vectors;
use super::cx::Cx;
use super::lane;
use super::op::Step;
use super::registers::{LANES, Reg};
use crate::error::Ub;
use crate::memory::{LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW_BYTES};

/// An address operand, `[reg + offset]`, as the machine computes it in each lane.
#[derive(Clone, Copy, Debug)]
pub struct Addr {
    pub reg: Reg,
    /// The register has 64 bits.
    pub wide: bool,
    pub offset: i64,
    /// The base is a shared variable: the CTA's rank is added.
    pub own_shared: bool,
    /// The variable that it points into, where that is known: index into [`super::op::Code`]'s.
    pub object: Option<u16>,
}

/// The space of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Where {
    Global,
    Shared,
    Local,
    Param,
    Generic,
}

/// Up to 16 bytes a lane.
pub type Words = [[u32; LANES]; 4];

/// What the executing lanes address as a whole.
struct Span {
    lo: u64,
    /// End of the highest.
    hi: u64,
    /// Bits that are set in any address.
    all: u64,
}

impl Span {
    /// Of accesses of `bytes` bytes in lanes of which the idle ones are settled.
    #[inline(always)]
    fn of(settled: &[u64; LANES], bytes: u64) -> Span {
        let (mut lo, mut hi, mut all) = (u64::MAX, 0, 0);
        for a in settled {
            lo = lo.min(*a);
            hi = hi.max(*a);
            all |= a;
        }
        Span { lo, hi: hi.saturating_add(bytes), all }
    }
}

/// All addresses moved by `bytes`.
#[inline(always)]
pub fn advance(addresses: &mut [u64; LANES], bytes: u32) {
    for address in addresses {
        *address = address.wrapping_add(bytes.into());
    }
}

/// The addresses, with that of an executing lane in place of those of idle ones: all 32 can then be
/// treated alike.
#[inline(always)]
fn settled(addresses: &[u64; LANES], mask: u32) -> [u64; LANES] {
    if mask == !0 {
        return *addresses;
    }
    let some = addresses[(mask.trailing_zeros() as usize).min(LANES - 1)];
    let mut out = [some; LANES];
    for i in 0..LANES {
        out[i] = if mask >> i & 1 != 0 { addresses[i] } else { some };
    }
    out
}

/// How words lie that the lanes address, one each.
enum Layout {
    Same,
    /// One behind the other.
    Run,
    Scattered,
}

#[inline(always)]
fn layout(addresses: &[u64; LANES]) -> Layout {
    let first = addresses[0];
    let (mut same, mut run) = (0, 0);
    for lane in 0..LANES {
        same |= addresses[lane] ^ first;
        run |= addresses[lane] ^ first.wrapping_add(4 * lane as u64);
    }
    match (same, run) {
        (0, _) => Layout::Same,
        (_, 0) => Layout::Run,
        _ => Layout::Scattered,
    }
}

/// `N` words a lane, from words of which the first lies at `origin`.
#[inline(always)]
fn gather<const N: usize>(
    addresses: &[u64; LANES],
    origin: u64,
    out: &mut Words,
    words: impl Fn(usize) -> [u32; N],
) {
    let mut rows = [[0; N]; LANES];
    for lane in 0..LANES {
        rows[lane] = words((addresses[lane].wrapping_sub(origin) / 4) as usize);
    }
    for k in 0..N {
        for lane in 0..LANES {
            out[k][lane] = rows[lane][k];
        }
    }
}

/// 1 to 16 bytes a lane; `$read` reads as many of the words as are asked for.
macro_rules! gather_bytes {
    ($addresses:expr, $origin:expr, $bytes:expr, $out:expr, $read:ident($words:ident)) => {
        match $bytes {
            4 => {
                let first = ($addresses[0].wrapping_sub($origin) / 4) as usize;
                match layout($addresses) {
                    Layout::Same => $out[0] = [$read::<1>($words, first)[0]; LANES],
                    Layout::Run => $out[0] = $read($words, first),
                    Layout::Scattered => {
                        gather::<1>($addresses, $origin, $out, |at| $read($words, at))
                    }
                }
            }
            8 => gather::<2>($addresses, $origin, $out, |at| $read($words, at)),
            16 => gather::<4>($addresses, $origin, $out, |at| $read($words, at)),
            bytes => {
                gather::<1>($addresses, $origin, $out, |at| $read($words, at));
                let low = (1u32 << (8 * bytes)) - 1;
                for lane in 0..LANES {
                    let shift = 8 * ($addresses[lane].wrapping_sub($origin) % 4) as u32;
                    $out[0][lane] = $out[0][lane] >> shift & low;
                }
            }
        }
    };
}

use gather_bytes;

impl Cx<'_> {
    /// The addresses of an operand.
    #[inline(always)]
    pub fn addresses(&self, a: Addr) -> [u64; LANES] {
        let mut out = lane::read(self, a.reg, a.wide);
        let rank = if a.own_shared { u64::from(self.rank()) << 24 } else { 0 };
        let offset = (a.offset as u64).wrapping_add(rank);
        if offset != 0 {
            let wrap = if a.wide { u64::MAX } else { u64::from(u32::MAX) };
            for address in &mut out {
                *address = address.wrapping_add(offset) & wrap;
            }
        }
        out
    }

    /// The address of the first executing lane.
    pub fn address(&self, a: Addr) -> u64 {
        self.addresses(a)[self.leader()]
    }

    /// Reads `bytes` (1 to 16, a power of two) a lane; what idle lanes get means nothing.
    pub fn load(
        &mut self,
        space: Where,
        addresses: &[u64; LANES],
        bytes: u32,
        out: &mut Words,
    ) -> Result<(), Step> {
        let cx = self;
        for_vectors!(
            cx.grid.vectors,
            [](
                cx: &mut Cx<'_>,
                space: Where,
                addresses: &[u64; LANES],
                bytes: u32,
                out: &mut Words
            ) -> Result<(), Step> {
                cx.load_body(space, addresses, bytes, out)
            }
        )
    }

    #[inline(always)]
    fn load_body(
        &mut self,
        space: Where,
        addresses: &[u64; LANES],
        bytes: u32,
        out: &mut Words,
    ) -> Result<(), Step> {
        match space {
            Where::Global => self.load_global(addresses, bytes, out),
            Where::Shared => self.load_shared(addresses, bytes, out),
            Where::Local => self.load_local(addresses, bytes, out),
            Where::Param => self.load_param(addresses, bytes, out),
            Where::Generic => self.by_window(addresses, |cx, space, offsets| {
                let mut part: Words = [[0; LANES]; 4];
                cx.load(space, offsets, bytes, &mut part)?;
                for lane in cx.lanes() {
                    for k in 0..4 {
                        out[k][lane] = part[k][lane];
                    }
                }
                Ok(())
            }),
        }
    }

    /// Writes `bytes` (1 to 16, a power of two) a lane.
    pub fn store(
        &mut self,
        space: Where,
        addresses: &[u64; LANES],
        bytes: u32,
        values: &Words,
    ) -> Result<(), Step> {
        let cx = self;
        for_vectors!(
            cx.grid.vectors,
            [](
                cx: &mut Cx<'_>,
                space: Where,
                addresses: &[u64; LANES],
                bytes: u32,
                values: &Words
            ) -> Result<(), Step> {
                cx.store_body(space, addresses, bytes, values)
            }
        )
    }

    #[inline(always)]
    fn store_body(
        &mut self,
        space: Where,
        addresses: &[u64; LANES],
        bytes: u32,
        values: &Words,
    ) -> Result<(), Step> {
        *self.changes += 1;
        match space {
            Where::Global => self.store_global(addresses, bytes, values),
            Where::Shared => self.store_shared(addresses, bytes, values),
            Where::Local => self.store_local(addresses, bytes, values),
            Where::Param => Err(self.fail(
                Ub::OutOfBounds,
                Some(self.leader()),
                Some(addresses[self.leader()]),
                "store to kernel parameters, which are constant",
            )),
            Where::Generic => self
                .by_window(addresses, |cx, space, offsets| cx.store(space, offsets, bytes, values)),
        }
    }

    /// Splits generic addresses by the window they lie in.
    pub fn by_window(
        &mut self,
        addresses: &[u64; LANES],
        mut f: impl FnMut(&mut Self, Where, &[u64; LANES]) -> Result<(), Step>,
    ) -> Result<(), Step> {
        let mask = self.mask;
        let mut left = mask;
        while left != 0 {
            let first = left.trailing_zeros() as usize;
            let (space, base) = window(addresses[first]);
            let mut same = 0;
            let mut offsets = [0; LANES];
            for lane in 0..LANES {
                if left >> lane & 1 != 0 && window(addresses[lane]).0 == space {
                    same |= 1 << lane;
                    offsets[lane] = addresses[lane] - base;
                }
            }
            left &= !same;
            self.mask = same;
            let result = f(self, space, &offsets);
            self.mask = mask;
            result?;
        }
        Ok(())
    }

    fn misaligned(&mut self, addresses: &[u64; LANES], bytes: u64) -> Step {
        let bad = self.lanes().find(|&l| !addresses[l].is_multiple_of(bytes));
        let lane = bad.expect("some lane is misaligned");
        let message =
            format!("an access of {bytes} bytes needs an address that is a multiple of it");
        self.fail(Ub::Misaligned, Some(lane), Some(addresses[lane]), message)
    }
}

/// The space that a generic address lies in, and where its window starts.
pub fn window(address: u64) -> (Where, u64) {
    for (start, space) in
        [(SHARED_WINDOW, Where::Shared), (LOCAL_WINDOW, Where::Local), (PARAM_WINDOW, Where::Param)]
    {
        if address.wrapping_sub(start) < WINDOW_BYTES {
            return (space, start);
        }
    }
    (Where::Global, 0)
}
