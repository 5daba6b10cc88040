//! Fences.

use fathom_ptx::ast::Instruction;

use crate::lower::{Lower, Lowered};
use crate::machine::cx::Cx;
use crate::machine::lane::LANES;
use crate::machine::op::{Class, Step};

/// Lowers a fence or membar: execution is in order, so only the sanitizer sees it.
pub fn fence(l: &mut Lower<'_>, _ins: &Instruction) -> Lowered {
    l.emit_action(Class::Fence, |_| Step::Next);
    Ok(())
}

/// A warp has arrived at a named barrier.
pub fn barrier_crossed(_cx: &mut Cx<'_>, _id: u32, _waits: bool, _done: bool) {}

impl Cx<'_> {
    /// Shared access of the executing lanes.
    pub fn sanitize_shared(
        &mut self,
        _addresses: &[u64; LANES],
        _bytes: u64,
        _write: bool,
    ) -> Result<(), Step> {
        Ok(())
    }

    /// The executing lanes copy to these shared addresses asynchronously.
    pub fn begin_copy(&mut self, _addresses: &[u64; LANES], _bytes: u64) {}

    /// The copies of the executing lanes so far become a group.
    pub fn commit_copies(&mut self) {}

    /// All but the last `left` groups of the executing lanes have arrived.
    pub fn wait_copies(&mut self, _left: usize, _all: bool) {}

    /// Shared atomic of one lane.
    pub fn sanitize_atomic(&mut self, _lane: usize, _address: u64, _bytes: u64) {}
}
