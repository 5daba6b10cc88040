//! Max-min fair sharing of links by flows, and the time until all flows are through.
//!
//! Progressive filling: all rates rise together until a link is full; its flows keep their rate,
//! the rest goes on rising.

/// A stream of bytes over a list of links.
#[derive(Debug, Clone, PartialEq)]
pub struct Flow {
    /// Links that it crosses, by index; a link may not repeat.
    pub links: Vec<u32>,
    /// Bytes to move.
    pub bytes: f64,
}

/// Rates (bytes/s) of `flows` over links of `capacity` (bytes/s), max-min fair. A flow without
/// links is unbounded.
///
/// # Panics
/// Where a flow names a link that does not exist.
pub fn max_min(capacity: &[f64], flows: &[Flow]) -> Vec<f64> {
    let mut rate = vec![f64::INFINITY; flows.len()];
    let mut left = capacity.to_vec();
    let mut users = vec![0u32; capacity.len()];
    for flow in flows {
        for &l in &flow.links {
            users[l as usize] += 1;
        }
    }
    let mut open: Vec<usize> = (0..flows.len()).filter(|&f| !flows[f].links.is_empty()).collect();
    while !open.is_empty() {
        let share = |l: usize, left: &[f64], users: &[u32]| left[l].max(0.0) / f64::from(users[l]);
        let fill = (0..capacity.len())
            .filter(|&l| users[l] > 0)
            .map(|l| share(l, &left, &users))
            .fold(f64::INFINITY, f64::min);
        // Links that are full at this rate, with room for rounding.
        let full: Vec<bool> = (0..capacity.len())
            .map(|l| users[l] > 0 && share(l, &left, &users) <= fill * (1.0 + 1e-12))
            .collect();
        let (done, rest): (Vec<usize>, Vec<usize>) =
            open.iter().partition(|&&f| flows[f].links.iter().any(|&l| full[l as usize]));
        for &f in &done {
            rate[f] = fill;
            for &l in &flows[f].links {
                left[l as usize] -= fill;
                users[l as usize] -= 1;
            }
        }
        open = rest;
    }
    rate
}

/// Seconds until the last of `flows`, which start together, is through; rates are shared anew
/// whenever one ends.
pub fn drain(capacity: &[f64], flows: &[Flow]) -> f64 {
    let mut open: Vec<Flow> = flows.iter().filter(|f| f.bytes > 0.0).cloned().collect();
    let mut time = 0.0;
    while !open.is_empty() {
        let rates = max_min(capacity, &open);
        let step = open.iter().zip(&rates).map(|(f, r)| f.bytes / r).fold(f64::INFINITY, f64::min);
        time += step;
        for (f, r) in open.iter_mut().zip(&rates) {
            // A flow that ends within rounding of the first is through with it.
            f.bytes = if f.bytes <= r * step * (1.0 + 1e-9) { 0.0 } else { f.bytes - r * step };
        }
        open.retain(|f| f.bytes > 0.0);
    }
    time
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn flow(links: &[u32], bytes: f64) -> Flow {
        Flow { links: links.to_vec(), bytes }
    }

    /// The textbook case: a long flow over two links, one short flow on each.
    #[test]
    fn long_and_short_flows_share_fairly() {
        let flows = [flow(&[0, 1], 1.0), flow(&[0], 1.0), flow(&[1], 1.0)];
        assert_eq!(max_min(&[10.0, 4.0], &flows), [2.0, 8.0, 2.0]);
    }

    #[test]
    fn a_freed_link_speeds_the_rest_up() {
        // Both at 5 for 1 s, then the second alone at 10 for its last 10 bytes.
        assert_eq!(drain(&[10.0], &[flow(&[0], 5.0), flow(&[0], 15.0)]), 2.0);
    }

    proptest! {
        /// No link is overfull, every flow crosses a full link, and more bandwidth is never slower.
        #[test]
        fn sharing_is_feasible_and_tight(
            capacity in prop::collection::vec(1.0f64..100.0, 4),
            paths in prop::collection::vec((1u32..15, 1.0f64..50.0), 1..8),
        ) {
            let flows: Vec<Flow> = paths
                .iter()
                .map(|&(mask, bytes)| Flow { links: (0..4).filter(|l| mask >> l & 1 == 1).collect(), bytes })
                .collect();
            let rates = max_min(&capacity, &flows);
            let load = |l: u32| -> f64 {
                flows.iter().zip(&rates).filter(|(f, _)| f.links.contains(&l)).map(|(_, r)| r).sum()
            };
            for l in 0..4u32 {
                prop_assert!(load(l) <= capacity[l as usize] * (1.0 + 1e-9));
            }
            for f in &flows {
                prop_assert!(f.links.iter().any(|&l| load(l) >= capacity[l as usize] * (1.0 - 1e-9)));
            }
            // No flow can be through before its bytes have crossed its tightest link, nor later
            // than one by one.
            let time = drain(&capacity, &flows);
            let alone = |f: &Flow| f.bytes / f.links.iter().map(|&l| capacity[l as usize]).fold(f64::INFINITY, f64::min);
            let longest = flows.iter().map(alone).fold(0.0, f64::max);
            let serial: f64 = flows.iter().map(alone).sum();
            prop_assert!(time >= longest * (1.0 - 1e-9) && time <= serial * (1.0 + 1e-9));
            let doubled: Vec<f64> = capacity.iter().map(|c| 2.0 * c).collect();
            prop_assert!((drain(&doubled, &flows) - time / 2.0).abs() <= 1e-9 * time);
        }
    }
}
