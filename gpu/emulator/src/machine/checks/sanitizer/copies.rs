//! Asynchronous copies of a warp by groups: cp.async, which writes shared memory until it is waited
//! for, and bulk stores, which read it.

use super::{PENDING, Range, Sanitizer};

impl Sanitizer {
    /// A cp.async of a warp is under way to a range.
    pub fn copy_begins(&mut self, warp: u32, range: Range) {
        self.copies[warp as usize].last_mut().expect("an open group").push(range);
    }

    /// cp.async.commit_group: the copies that a warp has begun become a group to wait for.
    pub fn copy_commit(&mut self, warp: u32) {
        self.copies[warp as usize].push(Vec::new());
    }

    /// All but the last `left` groups have arrived (with `all`, the open one too).
    pub fn copy_wait(&mut self, warp: u32, left: usize, all: bool) {
        let groups = &mut self.copies[warp as usize];
        let committed = groups.len() - 1;
        let count = if all { groups.len() } else { committed.saturating_sub(left) };
        let arrived: Vec<Range> = groups.drain(..count).flatten().collect();
        if groups.is_empty() {
            groups.push(Vec::new());
        }
        let clock = self.now(warp);
        for (cta, first, n) in arrived {
            self.cells[cta].each(first, n, |cell| {
                if cell.write.clock == PENDING && cell.write.thread == warp {
                    cell.write.clock = clock;
                }
            });
        }
    }

    /// A bulk store of a warp reads a range until its group is waited for.
    pub fn bulk_reads(&mut self, warp: u32, range: Range) {
        self.bulk[warp as usize].last_mut().expect("an open group").push(range);
    }

    /// cp.async.bulk.commit_group: the stores that a warp has begun become a group.
    pub fn bulk_commit(&mut self, warp: u32) {
        self.bulk[warp as usize].push(Vec::new());
    }

    /// cp.async.bulk.wait_group: all but the last `left` groups have been read, so that their
    /// source may be written.
    pub fn bulk_wait(&mut self, warp: u32, left: usize) {
        let groups = &mut self.bulk[warp as usize];
        let count = (groups.len() - 1).saturating_sub(left);
        let ended: Vec<Range> = groups.drain(..count).flatten().collect();
        self.reads_end(warp, ended);
    }

    fn reads_end(&mut self, warp: u32, ranges: Vec<Range>) {
        let clock = self.now(warp);
        for (cta, first, n) in ranges {
            self.cells[cta].each(first, n, |cell| {
                for read in &mut cell.reads {
                    if read.clock == PENDING && read.thread == warp {
                        read.clock = clock;
                    }
                }
            });
        }
    }
}
