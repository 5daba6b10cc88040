//! Lanes that meet at an instruction with a member mask, each where it stands.

use std::sync::Arc;

use super::registers::LANES;

/// What the lanes of a warp bring to an exchange; an instruction uses of it what it needs.
#[derive(Clone, Debug)]
pub struct Brought {
    pub words: [[u32; LANES]; 3],
    /// A predicate, as a mask of lanes.
    pub predicate: u32,
}

impl Brought {
    /// For instructions that only wait.
    pub const NOTHING: Brought = Brought { words: [[0; LANES]; 3], predicate: 0 };
}

/// What each lane takes away.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    pub word: [u32; LANES],
    pub predicate: u32,
}

/// Lanes of a warp that wait for the other members of a mask, or have met them.
#[derive(Clone, Debug)]
pub struct Meeting {
    /// The instruction with its qualifiers.
    instruction: Arc<str>,
    pub members: u32,
    pub arrived: u32,
    pub brought: Brought,
    /// Once all have come.
    pub answer: Option<Answer>,
    /// Lanes that have not taken the answer yet.
    pub takers: u32,
}

impl Meeting {
    /// One to which nobody has come.
    pub fn new(instruction: Arc<str>, members: u32, brought: Brought) -> Meeting {
        Meeting { instruction, members, arrived: 0, brought, answer: None, takers: 0 }
    }

    /// Whether lanes that execute `instruction` for `members` belong here: they wait for the
    /// answer, or nobody has it yet.
    pub fn is_of(&self, instruction: &str, members: u32, lanes: u32) -> bool {
        let open = self.answer.is_none() || self.takers & lanes != 0;
        open && self.members == members && *self.instruction == *instruction
    }

    /// Lanes come, with what they bring.
    pub fn arrive(&mut self, lanes: u32, brought: &Brought) {
        for lane in (0..LANES).filter(|lane| lanes >> lane & 1 != 0) {
            for (to, from) in self.brought.words.iter_mut().zip(&brought.words) {
                to[lane] = from[lane];
            }
        }
        let brought = brought.predicate & lanes;
        self.brought.predicate = self.brought.predicate & !lanes | brought;
        self.arrived |= lanes;
    }

    /// Members that others wait for.
    pub fn missing(&self, live: u32) -> u32 {
        if self.answer.is_some() { 0 } else { self.members & live & !self.arrived }
    }
}
