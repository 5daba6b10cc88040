//! The expert-parallel load balancer: which experts get copies, and where they lie.
//!
//! The algorithm is that of github.com/deepseek-ai/EPLB (March 2025), result for result: copies go
//! one by one to the expert with the largest load a copy; items are packed heaviest first, each to
//! the lightest pack that has room. Hierarchical: groups of experts are packed to nodes, copies are
//! made within a node and packed to its GPUs; it needs that the nodes divide the groups. Else
//! global: the same with one group and one node. Loads are FP32, as there, since ties depend on it.

/// Where the copies of one layer's experts lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// The expert of each slot; GPU `g` has slots `g * slots_per_gpu` and on.
    pub expert_of_slot: Vec<usize>,
    /// Which copy of its expert a slot is, from 0.
    pub copy_of_slot: Vec<usize>,
    /// Copies of each expert.
    pub copies: Vec<usize>,
}

/// What is asked of the balancer. All counts are 1 or more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Balance {
    /// Slots of all GPUs: a multiple of `gpus`, at least the number of experts.
    pub slots: usize,
    /// Groups of experts.
    pub groups: usize,
    /// Nodes, a divisor of `gpus`.
    pub nodes: usize,
    /// GPUs that share out the experts' copies.
    pub gpus: usize,
}

/// Places the experts of a layer by their loads.
///
/// # Panics
/// Where the counts do not divide each other as [`Balance`] says.
pub fn place(loads: &[f32], b: Balance) -> Placement {
    let hierarchical = b.groups.is_multiple_of(b.nodes) && loads.len().is_multiple_of(b.groups);
    let Balance { slots, groups, nodes, gpus } =
        if hierarchical { b } else { Balance { groups: 1, nodes: 1, ..b } };
    assert!(
        slots.is_multiple_of(gpus) && gpus.is_multiple_of(nodes) && slots >= loads.len(),
        "{b:?} of {} experts",
        loads.len()
    );
    let group_size = loads.len() / groups;
    let of_group = |g: usize| loads[g * group_size..(g + 1) * group_size].iter().sum::<f32>();
    let (node_of, place_of) = pack(&(0..groups).map(of_group).collect::<Vec<f32>>(), nodes);
    // Experts in the order of their nodes.
    let mut order = vec![0; loads.len()];
    for (expert, _) in loads.iter().enumerate() {
        let (g, rest) = (expert / group_size, expert % group_size);
        order[(node_of[g] * (groups / nodes) + place_of[g]) * group_size + rest] = expert;
    }
    let (experts_a_node, slots_a_node) = (loads.len() / nodes, slots / nodes);
    let mut placement = Placement {
        expert_of_slot: Vec::with_capacity(slots),
        copy_of_slot: Vec::with_capacity(slots),
        copies: vec![0; loads.len()],
    };
    for node in order.chunks(experts_a_node) {
        let own: Vec<f32> = node.iter().map(|&e| loads[e]).collect();
        let (expert, copy, copies) = replicate(&own, slots_a_node);
        let share: Vec<f32> = expert.iter().map(|&e| own[e] / copies[e] as f32).collect();
        let (gpu, place) = pack(&share, gpus / nodes);
        let mut slot = vec![0; slots_a_node];
        for i in 0..slots_a_node {
            slot[gpu[i] * (slots / gpus) + place[i]] = i;
        }
        placement.expert_of_slot.extend(slot.iter().map(|&i| node[expert[i]]));
        placement.copy_of_slot.extend(slot.iter().map(|&i| copy[i]));
        node.iter().zip(&copies).for_each(|(&e, &n)| placement.copies[e] = n);
    }
    placement
}

/// Packs items into packs of equally many, heaviest first, each to the lightest that has room: the
/// pack of each item, and its place there.
fn pack(weights: &[f32], packs: usize) -> (Vec<usize>, Vec<usize>) {
    let room = weights.len() / packs;
    if room == 1 {
        return ((0..weights.len()).collect(), vec![0; weights.len()]);
    }
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
    let (mut of, mut place) = (vec![0; weights.len()], vec![0; weights.len()]);
    let (mut weight, mut items) = (vec![0f32; packs], vec![0; packs]);
    for item in order {
        let open = (0..packs).filter(|&p| items[p] < room);
        let lightest = open.reduce(|best, p| if weight[p] < weight[best] { p } else { best });
        let p = lightest.expect("as many places as items");
        (of[item], place[item]) = (p, items[p]);
        weight[p] += weights[item];
        items[p] += 1;
    }
    (of, place)
}

/// Gives every slot an expert: each one first, then the one with the largest load a copy. The
/// expert of a slot, which copy it is, and the copies of each expert.
fn replicate(loads: &[f32], slots: usize) -> (Vec<usize>, Vec<usize>, Vec<usize>) {
    let mut expert: Vec<usize> = (0..loads.len()).collect();
    let mut copy = vec![0; loads.len()];
    let mut copies = vec![1; loads.len()];
    for _ in loads.len()..slots {
        let share = |e: usize| loads[e] / copies[e] as f32;
        let first =
            (0..loads.len()).reduce(|best, e| if share(e) > share(best) { e } else { best });
        let e = first.expect("at least one expert");
        expert.push(e);
        copy.push(copies[e]);
        copies[e] += 1;
    }
    (expert, copy, copies)
}

impl Placement {
    /// Load of the busiest GPU relative to the mean, when the copies of an expert share its load.
    pub fn imbalance(&self, loads: &[f32], gpus: usize) -> f64 {
        let slots = self.expert_of_slot.len() / gpus;
        let share = |&e: &usize| f64::from(loads[e]) / self.copies[e] as f64;
        let of_gpu = |s: &[usize]| s.iter().map(share).sum::<f64>();
        let total: f64 = loads.iter().map(|&l| f64::from(l)).sum();
        let busiest = self.expert_of_slot.chunks(slots).map(of_gpu).fold(0.0, f64::max);
        if total > 0.0 { busiest * gpus as f64 / total } else { 1.0 }
    }

    /// Experts in a fixed order, without regard to loads; slots beyond them repeat from the first.
    pub fn in_order(experts: usize, slots: usize) -> Placement {
        let expert_of_slot: Vec<usize> = (0..slots).map(|s| s % experts).collect();
        let copies = (0..experts).map(|e| (slots - e).div_ceil(experts)).collect();
        let copy_of_slot = (0..slots).map(|s| s / experts).collect();
        Placement { expert_of_slot, copy_of_slot, copies }
    }

    /// Slots whose GPU does not hold their expert in `before`: what has to be copied there.
    pub fn moved_from(&self, before: &Placement, gpus: usize) -> usize {
        let slots = self.expert_of_slot.len() / gpus;
        let pairs = self.expert_of_slot.chunks(slots).zip(before.expert_of_slot.chunks(slots));
        let new =
            |(now, then): (&[usize], &[usize])| now.iter().filter(|e| !then.contains(e)).count();
        pairs.map(new).sum()
    }
}
