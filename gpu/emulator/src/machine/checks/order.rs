//! What the checks of global memory, of variables' bounds and of ended CTAs want to know.

use crate::error::Ub;
use crate::machine::access::{Addr, window};
use crate::machine::checks::global::{Access, Global, Strength};
use crate::machine::checks::sanitizer::{Sanitizer, Who};
use crate::machine::cx::Cx;
use crate::machine::registers::LANES;
use crate::memory::LOCAL_WINDOW;

impl Cx<'_> {
    /// Calls `f` where races on global memory are checked.
    pub fn with_global(&mut self, f: impl FnOnce(&mut Global, &mut Sanitizer, Who)) {
        let Some(global) = self.global.take() else { return };
        self.with_sanitizer(|s, who| f(global, s, who));
        self.global = Some(global);
    }

    /// Global accesses of the executing lanes, of the present strength.
    pub fn order_global(&mut self, addresses: &[u64; LANES], bytes: u64, write: bool) {
        if self.global.is_none() {
            return;
        }
        let strength = self.strength;
        for lane in self.lanes() {
            self.order_range(lane, addresses[lane], bytes, write);
            if strength != Strength::Weak {
                let sides = (!write, write);
                self.with_global(|g, s, who| {
                    g.strong(s, who.warp, addresses[lane], sides, strength);
                });
            }
        }
    }

    /// A global access of one lane.
    pub fn order_range(&mut self, lane: usize, address: u64, bytes: u64, write: bool) {
        let strong = self.strength != Strength::Weak;
        let mut found = None;
        self.with_global(|g, s, who| {
            let access = Access { lane, address, bytes, write, strong, line: who.line };
            found = g.access(s, who.warp, access);
        });
        if let Some((at, message)) = found {
            let about = self.grid.view.nearest(at);
            self.report_about(Ub::GlobalRace, Some(lane), Some(at), Some(about), message);
        }
    }

    /// An atomic of one lane on global memory.
    pub fn order_atomic(&mut self, lane: usize, address: u64, bytes: u64) {
        if self.global.is_none() {
            return;
        }
        if self.strength == Strength::Weak {
            self.strength = Strength::Relaxed;
        }
        self.order_range(lane, address, bytes, true);
        let strength = self.strength;
        self.with_global(|g, s, who| g.strong(s, who.warp, address, (true, true), strength));
        self.strength = Strength::Weak;
    }

    /// A fence whose scope is wider than the CTA.
    pub fn fence_global(&mut self) {
        self.with_global(|_, s, who| s.fence_far(who.warp));
    }

    /// griddepcontrol.wait: the launches before this one have ended.
    pub fn previous_launch_ended(&mut self) {
        self.with_sanitizer(|s, who| s.previous_ended(who.warp));
    }

    /// A tensor map in global memory has been changed by the kernel itself.
    pub fn map_changed(&mut self, address: u64) {
        self.with_global(|g, _, _| g.map_changed(address));
    }

    /// fence.proxy.tensormap::generic.acquire: this CTA may use the map as it is now.
    pub fn map_fenced(&mut self, address: u64) {
        self.with_global(|g, s, who| g.map_fenced(s.number(who.warp), address));
    }

    /// A tensor copy uses the map at an address.
    pub fn map_used(&mut self, lane: usize, address: u64) {
        let mut fresh = true;
        self.with_global(|g, s, who| fresh = g.map_is_fresh(s.number(who.warp), address));
        if !fresh {
            let message = "the kernel changed this tensor map, and no \
                           fence.proxy.tensormap::generic.acquire came before its use";
            self.report(Ub::MissingProxyFence, Some(lane), Some(address), message.into());
        }
    }

    /// The last thread of a CTA of a cluster has exited.
    pub fn cta_ended(&mut self) {
        if !self.grid.settings.checks.races {
            return;
        }
        let cta = self.cta;
        let mut found = None;
        self.with_sanitizer(|s, _| found = s.cta_ends(cta));
        if let Some((offset, message)) = found {
            let address = (cta as u64) << 24 | offset as u64;
            self.report(Ub::UseAfterFree, None, Some(address), message);
        }
    }

    /// Holds the addresses of an operand to the variable that it points into, if that is known.
    pub fn within(&mut self, operand: Addr, addresses: &[u64; LANES], bytes: u64) {
        let (Some(object), true) = (operand.object, self.grid.settings.checks.memory) else {
            return;
        };
        let grid = self.grid;
        let object = &grid.code.objects[usize::from(object)];
        for lane in self.lanes() {
            let address = addresses[lane] - window(addresses[lane]).1;
            let (space, at) = if object.local {
                ("local", address.wrapping_sub(u64::from(self.local_base)))
            } else {
                ("shared", address & 0xff_ffff)
            };
            let (start, end) = (u64::from(object.start), u64::from(object.start + object.bytes));
            if at >= start && at + bytes <= end {
                continue;
            }
            let beyond = at.wrapping_sub(start) as i64;
            let about = format!(
                "{space} variable {} of {} bytes at {:#x}",
                object.name,
                object.bytes,
                if object.local { LOCAL_WINDOW + start } else { start }
            );
            let message = format!("{bytes} bytes at offset {beyond} of variable {}", object.name);
            let address = Some(addresses[lane]);
            self.report_about(Ub::OutOfBounds, Some(lane), address, Some(about), message);
            return;
        }
    }

    /// As [`Cx::within`], of one lane's range.
    pub fn within_one(&mut self, operand: Addr, lane: usize, address: u64, bytes: u64) {
        let mask = std::mem::replace(&mut self.mask, 1 << lane);
        self.within(operand, &[address; LANES], bytes);
        self.mask = mask;
    }
}
