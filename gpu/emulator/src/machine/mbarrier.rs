//! What an mbarrier's 64 bits in shared memory hold. They are ours (the PTX ISA leaves them open):
//! expected arrivals, pending arrivals, a signed transaction count, a mark that says it was
//! initialised, and the phase.

/// Most arrivals, and most bytes announced or arrived.
pub const COUNT: u64 = (1 << 20) - 1;

/// An mbarrier unpacked: arrivals are counted in threads, transactions in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mbarrier {
    /// Arrivals that complete a phase.
    pub expected: u64,
    /// Arrivals that the present phase still misses.
    pub pending: u64,
    /// Bytes announced minus bytes arrived; below zero where the bytes came first.
    pub transactions: i64,
    /// Completed phases, modulo 2.
    pub phase: u64,
    /// Whether it was initialised.
    pub valid: bool,
}

impl Mbarrier {
    /// From the 64 bits in shared memory.
    pub fn unpack(bits: u64) -> Mbarrier {
        Mbarrier {
            expected: bits & COUNT,
            pending: bits >> 20 & COUNT,
            transactions: (bits >> 40 << 42) as i64 >> 42,
            phase: bits >> 63,
            valid: bits >> 62 & 1 != 0,
        }
    }

    /// To the 64 bits in shared memory.
    pub fn pack(self) -> u64 {
        self.expected
            | self.pending << 20
            | (self.transactions as u64 & 0x3f_ffff) << 40
            | u64::from(self.valid) << 62
            | self.phase << 63
    }

    /// Completes the phase if nothing is missing.
    pub fn settle(&mut self) {
        if self.pending == 0 && self.transactions == 0 {
            self.phase ^= 1;
            self.pending = self.expected;
        }
    }
}
