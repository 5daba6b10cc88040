//! Special registers (PTX ISA, "Special Registers").

use fathom_ptx::ast::Special;

use super::cx::Cx;
use super::registers::LANES;

/// The value of a special register in each lane; `lane` is the element of those that are vectors.
pub fn read(cx: &mut Cx<'_>, kind: Special, lane: usize, index: u8) -> [u64; LANES] {
    match kind {
        Special::Tid
        | Special::Laneid
        | Special::LanemaskEq
        | Special::LanemaskLe
        | Special::LanemaskLt
        | Special::LanemaskGe
        | Special::LanemaskGt => std::array::from_fn(|i| by_lane(cx, kind, lane, i as u32)),
        _ => [uniform(cx, kind, lane, index); LANES],
    }
}

fn by_lane(cx: &Cx<'_>, kind: Special, dim: usize, i: u32) -> u64 {
    let below = (1u64 << i) - 1;
    u64::from(match kind {
        Special::Tid => {
            let thread = cx.w.index * 32 + i;
            let [x, y, _] = cx.grid.config.block;
            match dim {
                0 => thread % x,
                1 => thread / x % y,
                2 => thread / x / y,
                _ => 0,
            }
        }
        Special::LanemaskEq => 1 << i,
        Special::LanemaskLt => below as u32,
        Special::LanemaskLe => below as u32 | 1 << i,
        Special::LanemaskGe => !(below as u32),
        Special::LanemaskGt => !(below as u32 | 1 << i),
        _ => i,
    })
}

fn uniform(cx: &mut Cx<'_>, kind: Special, dim: usize, index: u8) -> u64 {
    let grid = cx.grid;
    let at = |v: [u32; 3]| u64::from(v.get(dim).copied().unwrap_or(0));
    let cta = &cx.cluster.ctas[cx.cta];
    let per_cluster = |v: [u32; 3]| -> [u32; 3] { std::array::from_fn(|d| v[d] / grid.cluster[d]) };
    match kind {
        Special::Ntid => at(grid.config.block),
        Special::Ctaid => at(cta.id),
        Special::Nctaid => at(grid.config.grid),
        Special::Warpid => u64::from(cx.w.index),
        Special::Nwarpid => u64::from(grid.preset.threads_per_sm / 32),
        Special::Smid => cta.linear % u64::from(grid.preset.sm_count),
        Special::Nsmid => u64::from(grid.preset.sm_count),
        // The high and low half of the address, where `cooperative_groups` looks for it.
        Special::Envreg if index == 1 => grid.workspace >> 32,
        Special::Envreg if index == 2 => grid.workspace & 0xffff_ffff,
        Special::Gridid => grid.seq,
        Special::IsExplicitCluster => u64::from(grid.cluster != [1; 3]),
        Special::Clusterid => at(per_cluster(cta.id)),
        Special::Nclusterid => at(per_cluster(grid.config.grid)),
        Special::ClusterCtaid => at(std::array::from_fn(|d| cta.id[d] % grid.cluster[d])),
        Special::ClusterNctaid => at(grid.cluster),
        Special::ClusterCtarank => u64::from(cta.rank),
        Special::ClusterNctarank => u64::from(grid.cluster.iter().product::<u32>()),
        Special::Clock | Special::Clock64 => tick(cx),
        Special::ClockHi => tick(cx) >> 32,
        Special::Globaltimer => tick(cx),
        Special::GlobaltimerLo => tick(cx) & 0xffff_ffff,
        Special::GlobaltimerHi => tick(cx) >> 32,
        Special::TotalSmemSize | Special::AggrSmemSize => {
            u64::from(grid.shared_end - grid.preset.shared_bytes_reserved)
        }
        Special::DynamicSmemSize => u64::from(grid.config.dynamic_shared_bytes),
        Special::ReservedSmemOffsetBegin => 0,
        Special::ReservedSmemOffsetEnd | Special::ReservedSmemOffsetCap => {
            u64::from(grid.preset.shared_bytes_reserved)
        }
        _ => 0,
    }
}

/// The warp's emulated clock; reading it takes time, so that two reads differ.
fn tick(cx: &mut Cx<'_>) -> u64 {
    cx.w.clock += 16;
    cx.w.clock
}
