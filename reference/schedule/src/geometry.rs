//! Where the stages of a pipeline lie: which of them a rank holds, and where a micro-batch goes
//! next.
//!
//! All of it follows from a [`Shape`] and two numbers; whoever asks (memory, placement of layers,
//! sends, the trainer) asks here, so that a new shape does not compile before it is answered.

/// How pipeline stages lie on ranks, and what `dir` means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Rank `r` holds stage `r`; `dir` is 0.
    Line,
    /// Rank `r` of `n` holds stages `r + n * dir`.
    Loop,
    /// Rank `r` of `P/2` holds stage `r` (`dir` 0, down the V) and stage `P-1-r` (`dir` 1, up); a
    /// micro-batch passes both.
    V,
    /// Rank `r` of `P` holds stage `r` for micro-batches of direction 0 and stage `P-1-r` for those
    /// of direction 1: every stage's weights lie on two ranks.
    TwoWay,
}

impl Shape {
    /// Stages for every rank of the pipeline: `interleave` in a loop.
    fn stages_a_rank(self, interleave: usize) -> usize {
        match self {
            Shape::Line | Shape::TwoWay => 1,
            Shape::Loop => interleave,
            Shape::V => 2,
        }
    }
}

/// The stages of a pipeline on its ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// How stages lie on ranks.
    pub shape: Shape,
    /// Pipeline stages `P`.
    pub stages: usize,
    /// Ranks of the pipeline.
    pub ranks: usize,
}

impl Geometry {
    /// A pipeline of that many ranks; `interleave` stages a rank in a [`Shape::Loop`].
    pub fn of_ranks(shape: Shape, ranks: usize, interleave: usize) -> Geometry {
        Geometry { shape, stages: ranks * shape.stages_a_rank(interleave), ranks }
    }

    /// A pipeline of that many stages, a multiple of what a rank holds.
    pub fn of_stages(shape: Shape, stages: usize, interleave: usize) -> Geometry {
        Geometry { shape, stages, ranks: stages / shape.stages_a_rank(interleave).max(1) }
    }

    /// How many values of `dir` a rank has: they run from 0 to one below.
    pub fn dirs(&self) -> usize {
        match self.shape {
            Shape::Line => 1,
            Shape::Loop => self.stages / self.ranks,
            Shape::V | Shape::TwoWay => 2,
        }
    }

    /// The stage that rank `rank` runs for `dir`.
    pub fn stage(&self, rank: usize, dir: u8) -> usize {
        match self.shape {
            Shape::Line => rank,
            Shape::Loop => rank + self.ranks * dir as usize,
            Shape::V | Shape::TwoWay if dir == 0 => rank,
            Shape::V | Shape::TwoWay => self.stages - 1 - rank,
        }
    }

    /// `(rank, dir)` of a stage, for a micro-batch that moves in `dir` (which only
    /// [`Shape::TwoWay`] asks for).
    pub fn place(&self, stage: usize, dir: u8) -> (usize, u8) {
        match self.shape {
            Shape::Line => (stage, 0),
            Shape::Loop => (stage % self.ranks, (stage / self.ranks) as u8),
            Shape::V if stage < self.ranks => (stage, 0),
            Shape::V => (self.stages - 1 - stage, 1),
            Shape::TwoWay if dir == 0 => (stage, 0),
            Shape::TwoWay => (self.stages - 1 - stage, 1),
        }
    }

    /// Where the same micro-batch runs one stage deeper: `(rank, dir)`, or `None` at the last
    /// stage.
    pub fn deeper(&self, rank: usize, dir: u8) -> Option<(usize, u8)> {
        let stage = self.stage(rank, dir);
        (stage + 1 < self.stages).then(|| self.place(stage + 1, dir))
    }

    /// Where the same micro-batch runs one stage shallower: `(rank, dir)`, or `None` at stage 0.
    pub fn shallower(&self, rank: usize, dir: u8) -> Option<(usize, u8)> {
        let stage = self.stage(rank, dir);
        (stage > 0).then(|| self.place(stage - 1, dir))
    }

    /// The stages whose weights a rank holds, in order of `dir`.
    pub fn held(&self, rank: usize) -> Vec<usize> {
        let mut stages: Vec<usize> =
            (0..self.dirs()).map(|dir| self.stage(rank, dir as u8)).collect();
        stages.dedup();
        stages
    }

    /// A stage and those that share a rank with it: their work is one rank's.
    pub fn partners(&self, stage: usize) -> Vec<usize> {
        self.held(self.place(stage, 0).0)
    }

    /// Ranks that hold the weights of one stage, and so add up its gradient.
    pub fn copies(&self) -> usize {
        match self.shape {
            Shape::TwoWay if self.stages > 1 => 2,
            Shape::Line | Shape::Loop | Shape::V | Shape::TwoWay => 1,
        }
    }

    /// Whether a micro-batch stays on its rank between `stage` (not the last) and the next: at the
    /// turn of a V, and where there is one rank. Nothing is sent there.
    pub fn stays(&self, stage: usize) -> bool {
        self.place(stage, 0).0 == self.place(stage + 1, 0).0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPES: [Shape; 4] = [Shape::Line, Shape::Loop, Shape::V, Shape::TwoWay];

    #[test]
    fn every_stage_is_held_by_as_many_ranks_as_there_are_copies() {
        for shape in SHAPES {
            for ranks in [1, 2, 4, 6] {
                let g = Geometry::of_ranks(shape, ranks, 3);
                assert_eq!(g, Geometry::of_stages(shape, g.stages, 3));
                let mut holders = vec![0; g.stages];
                for rank in 0..ranks {
                    g.held(rank).into_iter().for_each(|stage| holders[stage] += 1);
                }
                assert_eq!(holders, vec![g.copies(); g.stages], "{shape:?} {ranks}");
            }
        }
    }

    #[test]
    fn a_micro_batch_passes_every_stage_once() {
        for shape in SHAPES {
            let g = Geometry::of_ranks(shape, 4, 3);
            let ways: &[u8] = if shape == Shape::TwoWay { &[0, 1] } else { &[0] };
            for &way in ways {
                let (mut at, mut passed) = (g.place(0, way), vec![0]);
                while let Some(next) = g.deeper(at.0, at.1) {
                    assert_eq!(g.shallower(next.0, next.1), Some(at));
                    passed.push(g.stage(next.0, next.1));
                    at = next;
                }
                assert_eq!(passed, (0..g.stages).collect::<Vec<_>>(), "{shape:?}");
            }
        }
    }

    #[test]
    fn only_the_turn_of_a_v_stays_on_its_rank() {
        let stays = |shape, ranks| {
            let g = Geometry::of_ranks(shape, ranks, 2);
            (0..g.stages - 1).filter(|&s| g.stays(s)).collect::<Vec<_>>()
        };
        assert_eq!(stays(Shape::V, 4), [3]);
        assert_eq!(stays(Shape::V, 1), [0]);
        assert_eq!(stays(Shape::Loop, 1), [0]);
        for shape in [Shape::Line, Shape::Loop, Shape::TwoWay] {
            assert!(stays(shape, 4).is_empty(), "{shape:?}");
        }
        let g = Geometry::of_ranks(Shape::V, 4, 2);
        assert_eq!((g.held(1), g.partners(6)), (vec![1, 6], vec![1, 6]));
    }
}
