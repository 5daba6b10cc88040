//! wgmma in flight: registers that belong to it until it is waited for, and the shared memory that
//! its warpgroup reads.

use super::Sanitizer;
use super::clock::Seen;
use crate::machine::layout::Touch;

/// What a register is to a wgmma in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flight {
    /// Nobody else may read or write it.
    Accumulator,
    /// Nobody may write it.
    Input,
    /// A move of an accumulator: nobody may read it.
    Copy,
}

impl Sanitizer {
    /// The thread that stands for the wgmma reads of a warp's warpgroup. Its clock counts groups.
    pub(super) fn products_of(&mut self, warp: u32) -> u32 {
        let first = warp - warp % self.warps % 4;
        if let Some(thread) = self.products[first as usize] {
            return thread;
        }
        let thread = self.seen.len() as u32;
        self.seen.push(Seen::default());
        self.products[first as usize] = Some(thread);
        thread
    }

    /// wgmma uses these registers until it is waited for.
    pub fn product_registers(&mut self, warp: u32, registers: &[u32], flight: Flight) {
        let group = self.groups[warp as usize];
        self.registers[warp as usize].extend(registers.iter().map(|&r| (group, r, flight)));
    }

    /// What is wrong with an operation on registers while wgmmas are in flight. ptxas renames what
    /// is only moved, and says so where it has to wait or to serialise.
    pub fn registers_touched(&mut self, warp: u32, touch: &Touch) -> Option<&'static str> {
        let flying = &mut self.registers[warp as usize];
        if flying.is_empty() {
            return None;
        }
        let written = |r: u32| touch.written.contains(&r);
        let overwritten = flying.iter().find(|(_, r, how)| *how != Flight::Copy && written(*r));
        let read =
            |(_, r, how): &&(usize, u32, Flight)| *how != Flight::Input && touch.read.contains(r);
        let source = flying.iter().filter(read).map(|(group, ..)| *group).max();
        let problem = match (overwritten, source) {
            (Some((_, _, Flight::Input)), _) => Some(
                "a register that a wgmma still reads is written before it was waited for \
                 (ptxas serialises the wgmmas: C7513)",
            ),
            (Some(_), _) => Some(
                "an accumulator of a wgmma is written before it was waited for (ptxas \
                 serialises the wgmmas: C7515)",
            ),
            (None, Some(_)) if !touch.copies => Some(
                "an accumulator of a wgmma is read before it was waited for (ptxas injects \
                 wgmma.wait_group here: C7517)",
            ),
            _ => None,
        };
        flying.retain(|(_, r, how)| *how != Flight::Copy || !written(*r));
        if let (Some(group), true) = (source, touch.copies) {
            flying.extend(touch.written.iter().map(|&r| (group, r, Flight::Copy)));
        }
        problem
    }

    /// A warp writes registers outside of wgmma. Compilers sink moves, of constants above all,
    /// below the fence, and ptxas puts them back: behind a first fence they only pass on what
    /// their source is.
    pub fn registers_written(&mut self, warp: u32, touch: &Touch) {
        let moved = touch.copies && self.has_fenced[warp as usize];
        let unfenced = &mut self.unfenced[warp as usize];
        if moved && touch.read.iter().all(|r| !unfenced.contains(r)) {
            for register in &touch.written {
                unfenced.remove(register);
            }
        } else {
            unfenced.extend(&touch.written);
        }
    }

    /// wgmma.fence: registers written before it may be used by the products after it.
    pub fn product_fence(&mut self, warp: u32) {
        self.has_fenced[warp as usize] = true;
        self.unfenced[warp as usize].clear();
    }

    /// Why a wgmma of this warp that reads these registers wants a wgmma.fence before it: the first
    /// always does (PTX ISA, "wgmma.fence"), later ones where a register was written since.
    pub fn needs_product_fence(&self, warp: u32, registers: &[u32]) -> Option<&'static str> {
        if !self.has_fenced[warp as usize] {
            return Some("no wgmma.fence stands before the first wgmma");
        }
        let unfenced = &self.unfenced[warp as usize];
        let written = registers.iter().any(|r| unfenced.contains(r));
        written.then_some("a register was written after the last wgmma.fence")
    }

    /// wgmma.commit_group: products that a warp issues from now on are of its next group.
    pub fn product_commit(&mut self, warp: u32) {
        self.groups[warp as usize] += 1;
    }

    /// wgmma.wait_group: all four warps have read the operands of the groups before the last
    /// `left`.
    pub fn product_wait(&mut self, warp: u32, left: usize) {
        let group = self.groups[warp as usize];
        self.registers[warp as usize].retain(|(g, ..)| *g + left >= group);
        let thread = self.products_of(warp) as usize;
        let clock = &mut self.seen[warp as usize].clock;
        clock.resize(clock.len().max(thread + 1), 0);
        clock[thread] = clock[thread].max(group.saturating_sub(left) as u32);
    }
}
