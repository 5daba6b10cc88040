//! Races between CTAs on global memory, and what a programmatic launch reads too early.
//!
//! Each word of global memory remembers its last write and two reads. Two accesses of different
//! CTAs, or of lanes of one warp, race if one is a write, one is plain, and nothing orders them:
//! a release that the other acquires (PTX ISA, "Memory Consistency Model"), with `fence` and
//! relaxed accesses as its pattern form, all at the place in memory where they meet. Launches after
//! one another are ordered, also where one joins others that run; with programmatic stream
//! serialisation only by `griddepcontrol.wait`.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::machine::checks::lanes::mask_of;
use crate::machine::checks::sanitizer::{
    Far, PREVIOUS_LAUNCH, Sanitizer, join_far, unordered_lanes,
};
use crate::machine::cluster::cta_id;

/// How strong an access is (PTX ISA, "Operation types").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strength {
    /// Plain, or `.weak`: it orders nothing, and races with what is not ordered.
    #[default]
    Weak,
    /// Relaxed, volatile, or an atomic without semantics.
    Relaxed,
    Acquire,
    Release,
    AcquireRelease,
}

impl Strength {
    fn acquires(self) -> bool {
        matches!(self, Strength::Acquire | Strength::AcquireRelease)
    }

    fn releases(self) -> bool {
        matches!(self, Strength::Release | Strength::AcquireRelease)
    }
}

const WORDS: usize = 1024;
const PAGE: u64 = 4 * WORDS as u64;

/// One access; clock 0 stands for none.
#[derive(Clone, Copy, Debug, Default)]
struct Mark {
    warp: u32,
    clock: u32,
    /// Line, whether it was strong, the bytes of the word.
    tag: u32,
    /// As a mask.
    lanes: u32,
}

impl Mark {
    fn bytes(self) -> u32 {
        self.tag & 0xf
    }

    fn strong(self) -> bool {
        self.tag >> 4 & 1 != 0
    }

    fn line(self) -> u32 {
        self.tag >> 5
    }

    /// Takes the place of an earlier access, whose bytes it keeps if it is of the same warp;
    /// `together`: of the same instruction too. No lane stands for bytes of several accesses.
    fn replace(&mut self, mut new: Mark, together: bool) {
        if self.warp == new.warp && self.clock != 0 {
            let again = self.clock == new.clock && self.bytes() == new.bytes();
            if together || again {
                new.lanes |= self.lanes;
            } else if self.bytes() & !new.bytes() != 0 {
                new.lanes = 0;
            }
            new.tag |= self.bytes();
        }
        *self = new;
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    write: Mark,
    reads: [Mark; 2],
}

type Pages = FxHashMap<u64, Box<[Cell]>>;

/// Who and where the warps of one launch are.
#[derive(Clone, Debug)]
struct Numbering {
    kernel: String,
    /// Number of its first warp.
    base: u32,
    warps: u32,
    grid: [u32; 3],
    cluster: [u32; 3],
    /// How many launches had ended when it began.
    began_after: u32,
    /// Once it has ended: how many had by then, itself among them.
    ended: Option<u32>,
}

impl Numbering {
    fn ctas(&self) -> u32 {
        self.cluster.iter().product()
    }

    /// Number behind that of its last warp.
    fn end(&self) -> u32 {
        let ctas: u64 = self.grid.iter().map(|&n| u64::from(n)).product();
        self.base + (ctas * u64::from(self.warps)) as u32
    }

    /// CTA and warp of a number.
    fn place(&self, number: u32) -> ([u32; 3], u32) {
        let (index, warp) = ((number - self.base) / self.warps, (number - self.base) % self.warps);
        let (cluster, rank) = (index / self.ctas(), index % self.ctas());
        (cta_id(self.grid, self.cluster, u64::from(cluster), rank), warp)
    }
}

/// What a launch touched, for the next one.
#[derive(Debug)]
pub struct Touched {
    pages: Pages,
    numbering: Numbering,
}

/// An access of a range.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// [`WARP`](super::lanes::WARP): the warp as a whole.
    pub lane: usize,
    pub address: u64,
    pub bytes: u64,
    pub write: bool,
    pub strong: bool,
    pub line: u32,
}

/// The race check of a domain.
#[derive(Default)]
pub struct Global {
    pages: Pages,
    launches: Vec<Numbering>,
    previous: Vec<Option<Arc<Touched>>>,
    /// How many launches have ended.
    ends: u32,
    /// What was released at a place.
    places: FxHashMap<u64, Far>,
    /// Tensor maps changed by this launch: how often; and the state that a CTA has fenced.
    maps: FxHashMap<u64, u32>,
    fresh: FxHashMap<(u32, u64), u32>,
}

impl Global {
    /// Adds a launch: the shapes of its grid and its clusters, threads of a CTA, and what the
    /// launch before it touched, where it may start before that one's end.
    pub fn add_launch(
        &mut self,
        kernel: &str,
        (grid, cluster): ([u32; 3], [u32; 3]),
        threads: u32,
        previous: Option<Arc<Touched>>,
    ) {
        let warps = threads.div_ceil(32);
        let base = self.launches.last().map_or(0, Numbering::end);
        let (kernel, began_after) = (kernel.to_owned(), self.ends);
        let numbering = Numbering { kernel, base, warps, grid, cluster, began_after, ended: None };
        self.launches.push(numbering);
        self.previous.push(previous);
    }

    /// A launch has ended: those that are added from now on come after it.
    pub fn end_launch(&mut self, launch: usize) {
        self.ends += 1;
        self.launches[launch].ended = Some(self.ends);
    }

    /// Number of the first warp of a cluster.
    pub fn base_of(&self, launch: usize, cluster: u64) -> u32 {
        let n = &self.launches[launch];
        n.base + cluster as u32 * n.ctas() * n.warps
    }

    /// What the first launch touched.
    pub fn into_touched(mut self) -> Touched {
        Touched { pages: self.pages, numbering: self.launches.swap_remove(0) }
    }

    /// Notes an access and says what is wrong with it: the address and a sentence.
    pub fn access(&mut self, s: &Sanitizer, warp: u32, a: Access) -> Option<(u64, String)> {
        let number = s.number(warp);
        let now = if a.write { "this write" } else { "this read" };
        let mut problem = self.too_early(s, warp, a);
        let launches = &self.launches;
        let cta = cta_of(launches, number);
        let (from, to) = (a.address, a.address + a.bytes);
        let mut at = from & !3;
        let mut page: &mut [Cell] = &mut [];
        while at < to {
            if page.is_empty() || at % PAGE == 0 {
                let of = self.pages.entry(at / PAGE);
                page = of.or_insert_with(|| vec![Cell::default(); WORDS].into());
            }
            let low = from.saturating_sub(at).min(3) as u32;
            let high = (to - at).min(4) as u32;
            let mask = ((1 << high) - 1) & !((1u32 << low) - 1);
            let cell = &mut page[(at % PAGE / 4) as usize];
            let tag = a.line << 5 | u32::from(a.strong) << 4 | mask;
            let mark = Mark { warp: number, clock: s.clock(warp), tag, lanes: mask_of(a.lane) };
            // Lanes that write one place by one instruction: which value stays is anyone's.
            let together =
                |m: &Mark| m.warp == number && m.clock == mark.clock && m.line() == a.line;
            let lane = |m: &Mark, wrote| s.lane_before((warp, a.lane), (m.lanes, m.clock), wrote);
            let races = |m: &Mark, wrote: bool| {
                m.clock != 0
                    && m.bytes() & mask != 0
                    && !(a.strong && m.strong())
                    && match m.warp == number {
                        true => !(wrote && a.write && together(m)) && lane(m, wrote).is_some(),
                        false => {
                            cta_of(launches, m.warp) != cta
                                && !s.knows(warp, m.warp, m.clock)
                                && !ended_before(launches, m.warp, number)
                        }
                    }
            };
            let mut found = None;
            if problem.is_none() {
                if races(&cell.write, true) {
                    found = Some((cell.write, true));
                } else if a.write {
                    found = cell.reads.iter().find(|m| races(m, false)).map(|m| (*m, false));
                }
            }
            if let Some((m, wrote)) = found {
                let what = if wrote { "write" } else { "read" };
                let message = match m.warp == number {
                    true => unordered_lanes(now, what, lane(&m, wrote).unwrap_or(0), m.line()),
                    false => format!(
                        "{now} is not ordered after the {what} by {} at line {}",
                        name(launches, m.warp),
                        m.line()
                    ),
                };
                problem = Some((at, message));
            }
            if a.write {
                let together = together(&cell.write);
                cell.write.replace(mark, together);
                for read in &mut cell.reads {
                    if read.bytes() & !mask == 0 {
                        *read = Mark::default();
                    }
                }
            } else {
                let [first, second] = &mut cell.reads;
                let one = first.clock == 0 || first.warp == number;
                if one { first } else { second }.replace(mark, false);
            }
            at += 4;
        }
        problem
    }

    /// Memory of the launch before, without `griddepcontrol.wait`.
    fn too_early(&self, s: &Sanitizer, warp: u32, a: Access) -> Option<(u64, String)> {
        let number = s.number(warp);
        let index = self.launches.partition_point(|n| n.base <= number) - 1;
        let before = self.previous[index].as_ref()?;
        if s.knows(warp, PREVIOUS_LAUNCH, 1) {
            return None;
        }
        let mut words = (a.address & !3..a.address + a.bytes).step_by(4);
        words.find_map(|at| {
            let cell = before.pages.get(&(at / PAGE))?[(at % PAGE / 4) as usize];
            let (mark, what) = match (cell.write.clock, cell.reads[0].clock, a.write) {
                (0, 0, _) | (0, _, false) => return None,
                (0, _, true) => (cell.reads[0], "reads"),
                _ => (cell.write, "writes"),
            };
            let message = format!(
                "the launch before, of {}, {what} this at its line {}, and griddepcontrol.wait was \
                 not executed",
                before.numbering.kernel,
                mark.line()
            );
            Some((at, message))
        })
    }

    /// A strong read or write takes effect at a place.
    pub fn strong(
        &mut self,
        s: &mut Sanitizer,
        warp: u32,
        address: u64,
        (reads, writes): (bool, bool),
        strength: Strength,
    ) {
        if reads && let Some(released) = self.places.get(&address) {
            if strength.acquires() {
                s.learn(warp, released);
            } else {
                s.observe(warp, released);
            }
        }
        if writes {
            let released = if strength.releases() { s.publish(warp) } else { s.fenced_far(warp) };
            join_far(self.places.entry(address).or_default(), &released);
        }
    }

    /// A tensor map in global memory has changed.
    pub fn map_changed(&mut self, address: u64) {
        *self.maps.entry(address).or_default() += 1;
    }

    /// fence.proxy.tensormap::generic.acquire of a map.
    pub fn map_fenced(&mut self, number: u32, address: u64) {
        if let Some(&version) = self.maps.get(&address) {
            self.fresh.insert((cta_of(&self.launches, number), address), version);
        }
    }

    /// Whether a copy may use the map at an address.
    pub fn map_is_fresh(&self, number: u32, address: u64) -> bool {
        let fenced = self.fresh.get(&(cta_of(&self.launches, number), address));
        self.maps.get(&address).is_none_or(|version| fenced == Some(version))
    }
}

fn name(launches: &[Numbering], number: u32) -> String {
    let n = of_launch(launches, number);
    let ([x, y, z], warp) = n.place(number);
    let kernel = if launches.len() > 1 { format!(" of {}", n.kernel) } else { "".into() };
    format!("CTA ({x}, {y}, {z}), warp {warp}{kernel}")
}

fn of_launch(launches: &[Numbering], number: u32) -> &Numbering {
    let after = launches.partition_point(|n| n.base <= number);
    &launches[after - 1]
}

/// Whether the launch of one warp had ended when that of the other began.
fn ended_before(launches: &[Numbering], before: u32, after: u32) -> bool {
    let began_after = of_launch(launches, after).began_after;
    of_launch(launches, before).ended.is_some_and(|ended| ended <= began_after)
}

/// Number of the first warp of a warp's CTA.
fn cta_of(launches: &[Numbering], number: u32) -> u32 {
    let n = of_launch(launches, number);
    number - (number - n.base) % n.warps
}
