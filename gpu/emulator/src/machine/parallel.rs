//! Clusters of one launch on several host threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use rayon::prelude::*;

use super::cx::Grid;
use super::domain::Domain;
use super::stats::Stats;
use crate::error::Finding;

/// Clusters of one launch, each on its own, on rayon's threads. The fault is that of the first
/// cluster in launch order, whatever thread met one first.
pub fn run(grid: &Arc<Grid>) -> (Stats, Option<Box<Finding>>) {
    let count = grid.clusters();
    let faulted = AtomicU64::new(u64::MAX);
    type Acc = (Stats, Option<(u64, Box<Finding>)>);
    let fold = |mut acc: Acc, index: u64| {
        if index < faulted.load(Relaxed) {
            let mut domain = Domain::of_cluster(grid, index, std::mem::take(&mut acc.0));
            let fault = domain.run();
            acc.0 = domain.stats.remove(0);
            if let Some((_, finding)) = fault {
                faulted.fetch_min(index, Relaxed);
                if acc.1.as_ref().is_none_or(|(known, _)| index < *known) {
                    acc.1 = Some((index, finding));
                }
            }
        }
        acc
    };
    let start = || (grid.stats(), None);
    let merge = |a: Acc, b: Acc| {
        let mut stats = a.0;
        stats.merge(b.0);
        let fault = match (a.1, b.1) {
            (Some(x), Some(y)) => Some(if x.0 <= y.0 { x } else { y }),
            (x, y) => x.or(y),
        };
        (stats, fault)
    };
    let (stats, fault) = if count == 1 || grid.settings.threads == 1 {
        (0..count).fold(start(), fold)
    } else {
        (0..count).into_par_iter().fold(start, fold).reduce(start, merge)
    };
    (stats, fault.map(|(_, f)| f))
}
