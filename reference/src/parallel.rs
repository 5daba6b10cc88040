//! Where a rank stands in the layout, and the exchanges that follow.
//!
//! Ranks are numbered tensor parallel first, then context, data and pipeline:
//! `rank = tp + TP * (cp + CP * (dp + DP * pp))`. Expert parallel ranks are consecutive ranks of
//! one pipeline stage: `ep = (rank inside the stage) mod EP`.

pub use fathom_trace::{Group, GroupKind, Parallel};

/// A rank's coordinate along each dimension of the layout, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coordinates {
    /// Place among the tensor-parallel ranks, from 0.
    pub tp: usize,
    /// Context-parallel coordinate: which part of the sequence the rank has.
    pub cp: usize,
    /// Place among the data-parallel ranks, from 0.
    pub dp: usize,
    /// Pipeline-parallel coordinate: the stage.
    pub pp: usize,
    /// Expert-parallel coordinate: which block of routed experts the rank has.
    pub ep: usize,
}

/// The layout has contradicting sizes, or no such rank.
#[derive(Debug, thiserror::Error)]
#[error("layout tp {} pp {} ep {} dp {} cp {}: {message}", .parallel.tp, .parallel.pp,
    .parallel.ep, .parallel.dp, .parallel.cp)]
pub struct LayoutError {
    /// The layout of which it is a rank.
    pub parallel: Parallel,
    /// What is wrong with it.
    pub message: String,
}

/// Most ranks along one kind of parallelism, and in all.
const MOST_RANKS: usize = 1 << 16;
const LARGEST_WORLD: u128 = 1 << 24;

/// The number of ranks of the layout; expert parallel ranks are among them, not beside them.
pub fn world(p: Parallel) -> usize {
    p.tp * p.cp * p.dp * p.pp
}

/// The coordinates of `rank` in layout `p`.
///
/// # Errors
/// [`LayoutError`] where a size is 0 or beyond any cluster, `ep` does not divide a stage's ranks,
/// or the rank is outside.
pub fn coordinates(p: Parallel, rank: usize) -> Result<Coordinates, LayoutError> {
    let wrong = |message: String| Err(LayoutError { parallel: p, message });
    if [p.tp, p.pp, p.ep, p.dp, p.cp].contains(&0) {
        return wrong("every size must be at least 1".into());
    }
    if let Some(size) = [p.tp, p.pp, p.ep, p.dp, p.cp].into_iter().find(|&n| n > MOST_RANKS) {
        return wrong(format!("expected at most {MOST_RANKS} ranks of one kind, found {size}"));
    }
    let ranks: u128 = [p.tp, p.cp, p.dp, p.pp].map(|n| n as u128).iter().product();
    if ranks > LARGEST_WORLD {
        return wrong(format!("expected at most {LARGEST_WORLD} ranks, found {ranks}"));
    }
    let stage = p.tp * p.cp * p.dp;
    if !stage.is_multiple_of(p.ep) {
        return wrong(format!("ep must divide the {stage} ranks of a pipeline stage"));
    }
    if rank >= world(p) {
        return wrong(format!("rank {rank} is outside its {} ranks", world(p)));
    }
    Ok(Coordinates {
        tp: rank % p.tp,
        cp: rank / p.tp % p.cp,
        dp: rank / (p.tp * p.cp) % p.dp,
        pp: rank / stage,
        ep: rank % stage % p.ep,
    })
}

/// The group of the collectives along `kind`.
pub fn group(p: Parallel, kind: GroupKind) -> Group {
    let size = match kind {
        GroupKind::Tp => p.tp,
        GroupKind::Pp => p.pp,
        GroupKind::Ep => p.ep,
        GroupKind::Dp => p.dp,
        GroupKind::Cp => p.cp,
    };
    Group { kind, size }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_has_its_own_coordinates() {
        let p = Parallel { tp: 2, pp: 3, ep: 4, dp: 4, cp: 1 };
        let all: Vec<_> = (0..world(p)).map(|r| coordinates(p, r).unwrap()).collect();
        for (i, a) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|b| a != b));
        }
        assert_eq!(all[5].ep, 1);
        assert!(coordinates(p, 24).is_err());
        assert!(coordinates(Parallel { ep: 3, ..p }, 0).is_err());
        let most = coordinates(Parallel { dp: usize::MAX, ..p }, 0).unwrap_err().to_string();
        assert!(most.contains("expected at most 65536 ranks of one kind"), "{most}");
        let all = Parallel { dp: 1 << 16, tp: 1 << 16, ..p };
        assert!(coordinates(all, 0).unwrap_err().to_string().contains("16777216 ranks"));
    }
}
