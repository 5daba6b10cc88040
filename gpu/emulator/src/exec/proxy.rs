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

    /// The copies of the executing lanes so far will arrive at an mbarrier.
    pub fn copies_arrive(&mut self) {}

    /// The bulk stores of the executing lanes so far become a group.
    pub fn commit_bulk(&mut self) {}

    /// All but the last `left` bulk groups have been read.
    pub fn wait_bulk(&mut self, _left: usize) {}

    /// TMA writes shared memory.
    pub fn async_writes_shared(&mut self, _lane: usize, _address: u64, _bytes: u64) {}

    /// TMA reads shared memory.
    pub fn async_reads_shared(&mut self, _lane: usize, _address: u64, _bytes: u64) {}

    /// An mbarrier came into being.
    pub fn mbarrier_initialised(&mut self, _lane: usize, _address: u64) {}

    /// A thread arrives at an mbarrier.
    pub fn mbarrier_arrived(&mut self, _lane: usize, _address: u64) {}

    /// A thread has seen a phase of an mbarrier complete.
    pub fn mbarrier_waited(&mut self, _lane: usize, _address: u64) {}

    /// wgmma.fence, commit_group or wait_group.
    pub fn wgmma_sync(&mut self, _op: fathom_ptx::table::Opcode, _left: usize) {}

    /// wgmma reads A from these registers.
    pub fn wgmma_reads(&mut self, _regs: &[u16]) {}

    /// wgmma reads 16 bytes of shared memory.
    pub fn wgmma_reads_shared(&mut self, _address: u64) {}

    /// wgmma accumulates into these registers.
    pub fn wgmma_accumulates(&mut self, _regs: &[u16]) {}

    /// Shared atomic of one lane.
    pub fn sanitize_atomic(&mut self, _lane: usize, _address: u64, _bytes: u64) {}
}
