//! The expert-parallel load balancer against the public one, result for result.

use fathom_simulator::serve::eplb::{Balance, Placement, place};
use proptest::prelude::*;

fn balance([slots, groups, nodes, gpus]: [usize; 4]) -> Balance {
    Balance { slots, groups, nodes, gpus }
}

/// The example of the public repository's README, with its printed output.
#[test]
fn the_published_example_comes_out() {
    let ask = balance([16, 4, 2, 8]);
    for (loads, expected) in [
        (
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        ),
        (
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
            [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
        ),
    ] {
        assert_eq!(place(&loads.map(|l| l as f32), ask).expert_of_slot, expected);
    }
}

/// The last step of SplitMix64, which spreads bits.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Skewed whole loads; seeds with a coarse grain have many equal ones, where order decides.
fn loads(seed: u64, experts: usize) -> Vec<f32> {
    let load = |i: u64| {
        let u = mix(seed * 65536 + i) >> 48;
        (u * u) >> 16 >> (seed % 5 * 3)
    };
    (0..experts as u64).map(|i| load(i) as f32).collect()
}

/// `[experts, slots, groups, nodes, GPUs]` and a digest of what eplb.py of deepseek-ai/EPLB (commit
/// of March 2025) gives for 25 sets of loads: the expert and copy of every slot, the copies of
/// every expert. Both policies, whole groups on a node and not.
#[rustfmt::skip]
const PUBLIC: [([usize; 5], u64); 13] = [
    ([12, 16, 4, 2, 8], 0x103b_5b40_1276_8fc8),
    ([256, 288, 8, 4, 32], 0x7cf0_58f9_5948_c3ff),
    ([257, 320, 1, 40, 320], 0x3c_2dd1_adae_1c5d),
    ([256, 320, 8, 40, 320], 0x1c2_a9f1_d98d_6783),
    ([256, 288, 8, 18, 144], 0x5614_3668_4c6a_fc31),
    ([64, 72, 8, 2, 8], 0x3677_217b_292d_a526),
    ([16, 16, 4, 4, 8], 0xd10f_2063_cd4f_eaef),
    ([64, 80, 1, 1, 16], 0xc7b8_f7fc_41aa_54ba),
    ([256, 288, 8, 16, 96], 0x6849_fe71_3364_860f),
    ([8, 24, 2, 2, 4], 0xa6c9_063a_8abc_9b2d),
    ([32, 48, 8, 8, 16], 0x6171_77c8_ebdb_fd3c),
    ([256, 288, 8, 8, 72], 0xcb99_d694_f915_a593),
    ([160, 176, 8, 2, 16], 0xc865_9366_4ff0_e2e2),
];

#[test]
fn three_hundred_placements_are_the_public_ones() {
    let mut seed = 0;
    for ([experts, slots, groups, nodes, gpus], expected) in PUBLIC {
        let mut digest = 0u64;
        for _ in 0..25 {
            seed += 1;
            let p = place(&loads(seed, experts), balance([slots, groups, nodes, gpus]));
            let all = p.expert_of_slot.iter().chain(&p.copy_of_slot).chain(&p.copies);
            digest = all.fold(digest, |d, &x| mix(d ^ x as u64));
        }
        assert_eq!(digest, expected, "{experts} experts in {slots} slots on {gpus} GPUs");
    }
}

proptest! {
    /// Every expert has a place, copies are counted, GPUs are full, and the busiest is no busier
    /// than the heaviest share forces beside a full GPU.
    #[test]
    fn placements_are_whole(
        seed in 0u64..1000, groups in 1usize..9, size in 1usize..9, gpus in 1usize..9, spare in 0usize..3,
    ) {
        let experts = groups * size;
        let slots = (experts + spare * gpus).next_multiple_of(gpus);
        let loads = loads(seed, experts);
        let p = place(&loads, balance([slots, groups, 1, gpus]));
        prop_assert_eq!(p.expert_of_slot.len(), slots);
        for e in 0..experts {
            let held: Vec<usize> =
                (0..slots).filter(|&s| p.expert_of_slot[s] == e).map(|s| p.copy_of_slot[s]).collect();
            let mut sorted = held.clone();
            sorted.sort_unstable();
            prop_assert_eq!(sorted, (0..p.copies[e]).collect::<Vec<_>>());
            prop_assert!(p.copies[e] >= 1);
        }
        let imbalance = p.imbalance(&loads, gpus);
        prop_assert!(imbalance >= 1.0 - 1e-6 && imbalance <= gpus as f64 + 1e-6);
        prop_assert_eq!(p.moved_from(&p, gpus), 0);
        let order = Placement::in_order(experts, slots);
        prop_assert_eq!(order.copies.iter().sum::<usize>(), slots);
    }
}
