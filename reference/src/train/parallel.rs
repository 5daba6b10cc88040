//! How a run lies on ranks: TOML section `[parallel]`, what of it is legal, and which rank computes
//! which shards.
//!
//! None of it changes a bit but `tp`, whose sums are part of the contract; `grad_shards`,
//! `context_shards` and `expert_union`, which are part of the result too, are keys of the run.

use fathom_schedule::{Geometry, Schedule, ScheduleKind, ScheduleShape, Shape};
use serde::{Deserialize, Serialize};

use super::TrainConfig;
use crate::parallel::{self, Parallel};
use crate::precision::Mode;
use fathom_config::AttentionConfig;

/// The layout of a run: TOML section `[parallel]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ParallelConfig {
    /// Tensor parallel ranks, which share out heads and the widths of dense feed-forward parts. It
    /// is part of the result: their partial products are added in the order of ranks.
    pub tp: usize,
    /// Ranks of the pipeline.
    pub pp: usize,
    /// Expert parallel ranks, among the data and context parallel ones.
    pub ep: usize,
    /// Data parallel ranks: replicas, each of `cp` ranks.
    pub dp: usize,
    /// Context parallel ranks, which share out the parts of each sequence.
    pub cp: usize,
    /// Order of forwards and backwards in the pipeline.
    pub schedule: ScheduleKind,
    /// Stages of a rank where the schedule is `interleaved`.
    pub interleave: usize,
    /// Layers of each stage; an even share where it is not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage_layers: Option<Vec<usize>>,
    /// SMs of a GPU that exchanges of experts' rows hold: the simulator asks for it, and kernels
    /// over peer memory take at most so many; CPUs have none.
    pub comm_sms: usize,
    /// Longest wait of a rank for another, in seconds.
    pub timeout_seconds: f64,
}

impl Default for ParallelConfig {
    fn default() -> Self {
        ParallelConfig {
            tp: 1,
            pp: 1,
            ep: 1,
            dp: 1,
            cp: 1,
            schedule: ScheduleKind::OneFOneB,
            interleave: 2,
            stage_layers: None,
            comm_sms: 20,
            timeout_seconds: 600.0,
        }
    }
}

impl ParallelConfig {
    /// The sizes of all dimensions.
    pub fn sizes(&self) -> Parallel {
        Parallel { tp: self.tp, pp: self.pp, ep: self.ep, dp: self.dp, cp: self.cp }
    }

    /// How many ranks there are.
    pub fn world(&self) -> usize {
        parallel::world(self.sizes())
    }

    /// Where the pipeline's stages lie.
    pub fn geometry(&self) -> Geometry {
        Geometry::of_ranks(self.schedule.shape(), self.pp, self.interleave)
    }

    /// Directions in which micro-batches pass the pipeline, each of whole shards.
    pub fn directions(&self) -> usize {
        if self.schedule.shape() == Shape::TwoWay { 2 } else { 1 }
    }
}

/// What a rank computes of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// Logical shards of the step.
    pub grad_shards: usize,
    /// Parts of each sequence.
    pub context_shards: usize,
    /// Neighbouring shards that share the experts' calls.
    pub expert_union: usize,
    /// Replicas that an expert parallel group spans.
    replicas: usize,
    dp: usize,
    cp: usize,
    directions: usize,
}

impl Shares {
    /// The shares of a run's ranks.
    pub fn of(config: &TrainConfig) -> Shares {
        let TrainConfig { grad_shards, context_shards, expert_union, parallel, .. } = config;
        Shares {
            grad_shards: *grad_shards,
            context_shards: *context_shards,
            expert_union: *expert_union,
            replicas: (parallel.ep / parallel.cp).max(1),
            dp: parallel.dp,
            cp: parallel.cp,
            directions: parallel.directions(),
        }
    }

    /// Leaves of the tree in which gradients are added: a shard has one for each part of its
    /// sequences.
    pub fn leaves(&self) -> usize {
        self.grad_shards * self.context_shards
    }

    /// From the first leaf of a union to that of the next; at it stands the experts' accumulator.
    pub fn union_leaves(&self) -> usize {
        self.expert_union * self.context_shards
    }

    /// Parts of each sequence that are on one rank.
    pub fn parts(&self) -> usize {
        self.context_shards / self.cp
    }

    /// The leaves of the lanes that context parallel rank `cp` of replica `dp` has side by side in
    /// its union number `union` of a direction: by shard, then by part.
    pub fn lanes(&self, (dp, cp): (usize, usize), direction: usize, union: usize) -> Vec<usize> {
        let parts = cp * self.parts()..(cp + 1) * self.parts();
        let of_shard = |shard| parts.clone().map(move |part| shard * self.context_shards + part);
        self.shards(dp, direction, union).flat_map(of_shard).collect()
    }

    /// Shards that a replica computes side by side.
    pub fn side_by_side(&self) -> usize {
        self.expert_union / self.replicas
    }

    /// Unions that a replica takes part in, in each direction.
    pub fn unions(&self) -> usize {
        self.grad_shards / self.expert_union / (self.dp / self.replicas) / self.directions
    }

    /// The shards that replica `dp` computes side by side in its union number `union` of a
    /// direction: neighbours, the replicas of an expert parallel group having neighbouring ones.
    pub fn shards(&self, dp: usize, direction: usize, union: usize) -> std::ops::Range<usize> {
        let (group, member) = (dp / self.replicas, dp % self.replicas);
        let number = (group * self.directions + direction) * self.unions() + union;
        let first = number * self.expert_union + member * self.side_by_side();
        first..first + self.side_by_side()
    }

    /// The replica that computes each shard.
    pub fn owners(&self) -> Vec<usize> {
        let mut owners = vec![0; self.grad_shards];
        for dp in 0..self.dp {
            for direction in 0..self.directions {
                for union in 0..self.unions() {
                    self.shards(dp, direction, union).for_each(|shard| owners[shard] = dp);
                }
            }
        }
        owners
    }
}

impl TrainConfig {
    /// Layers of each pipeline stage, in order.
    pub fn stage_layers(&self) -> Vec<std::ops::Range<usize>> {
        let stages = self.parallel.geometry().stages;
        let layers = self.model.layers;
        let mut begin = 0;
        let mut take = |n: usize| {
            begin += n;
            begin - n..begin
        };
        match &self.parallel.stage_layers {
            Some(given) => given.iter().map(|&n| take(n)).collect(),
            None => {
                (0..stages).map(|s| take(layers * (s + 1) / stages - layers * s / stages)).collect()
            }
        }
    }

    /// The pipeline's instructions for a step of `batch` sequences.
    ///
    /// # Errors
    /// Key and reason where the schedule cannot run that many micro-batches.
    pub fn pipeline(&self, batch: usize) -> Result<Schedule, (String, String)> {
        let shares = Shares::of(self);
        let per_shard = (batch / self.grad_shards).div_ceil(self.micro_batch);
        let micro_batches = per_shard * shares.unions() * self.parallel.directions();
        let stages = self.parallel.geometry().stages;
        let shape = ScheduleShape { stages, micro_batches, interleave: self.parallel.interleave };
        Schedule::new(self.parallel.schedule, shape).map_err(|e| {
            let message = format!(
                "{e}; a step of {batch} sequences in micro-batches of {} over grad_shards = {} and \
                 {} data parallel ranks has {micro_batches}",
                self.micro_batch, self.grad_shards, self.parallel.dp
            );
            ("parallel.schedule".to_owned(), message)
        })
    }

    /// Refuses a layout that the run cannot lie on.
    pub(super) fn check_parallel(&self) -> Result<(), (String, String)> {
        let p = &self.parallel;
        let wrong = |key: &str, message: String| Err((format!("parallel.{key}"), message));
        let longest = 1e9;
        if !(p.timeout_seconds > 0.0 && p.timeout_seconds <= longest) {
            let found = p.timeout_seconds;
            return wrong(
                "timeout_seconds",
                format!("expected above 0, to {longest}, found {found}"),
            );
        }
        parallel::coordinates(p.sizes(), 0).map_err(|e| ("parallel".to_owned(), e.to_string()))?;
        let most = 1024;
        if p.world() > most {
            return wrong("dp", format!("expected at most {most} ranks, found {}", p.world()));
        }
        if p.schedule.shape() == Shape::Loop && !(2..=255).contains(&p.interleave) {
            return wrong("interleave", format!("expected 2 to 255, found {}", p.interleave));
        }
        match &self.model.moe {
            None if p.ep > 1 => {
                return wrong("ep", format!("expected 1 without routed experts, found {}", p.ep));
            }
            Some(moe) if !moe.n_routed_experts.is_multiple_of(p.ep) => {
                let experts = moe.n_routed_experts;
                return wrong("ep", format!("expected a divisor of {experts}, found {}", p.ep));
            }
            _ => {}
        }
        self.check_context_parallel()?;
        if !(p.dp * p.cp).is_multiple_of(p.ep) {
            let by = if p.cp > 1 { " x cp" } else { "" };
            let message = format!(
                "expected a divisor of parallel.dp{by} = {}, found {}: tensor parallel ranks have \
                 the same tokens, and the same experts",
                p.dp * p.cp,
                p.ep
            );
            return wrong("ep", message);
        }
        self.check_tensor_parallel()?;
        self.check_shares()?;
        self.check_stages()?;
        let batches = self.schedule.batch.stated();
        batches.into_iter().try_for_each(|batch| self.pipeline(batch as usize).map(|_| ()))
    }

    /// Refuses context parallel ranks that cannot share out parts and heads evenly, or whose tokens
    /// do not meet in the calls of the routed experts.
    fn check_context_parallel(&self) -> Result<(), (String, String)> {
        let (p, shards) = (&self.parallel, self.context_shards);
        if p.cp == 1 {
            return Ok(());
        }
        let wrong = |message: String| Err(("parallel.cp".to_owned(), message));
        if !shards.is_multiple_of(p.cp) {
            return wrong(format!(
                "expected a divisor of context_shards = {shards}, found {}",
                p.cp
            ));
        }
        let mut shared = vec![("model.heads", self.model.heads)];
        if let AttentionConfig::Gqa { kv_heads, .. } = self.model.attention {
            shared.push(("model.attention.kv_heads", kv_heads));
        }
        for (key, value) in shared {
            if !value.is_multiple_of(p.tp * p.cp) {
                return wrong(format!(
                    "expected a number of ranks that shares out {key} = {value}, of which one of \
                     parallel.tp = {} has {}; found {}",
                    p.tp,
                    value / p.tp,
                    p.cp
                ));
            }
        }
        if self.model.moe.is_some() && !p.ep.is_multiple_of(p.cp) {
            let message = format!(
                "expected a multiple of parallel.cp = {}, found {}: the parts of a sequence are \
                 one call of the routed experts",
                p.cp, p.ep
            );
            return Err(("parallel.ep".to_owned(), message));
        }
        Ok(())
    }

    /// Refuses tensor parallel ranks that cannot share out heads and widths evenly, or between
    /// which an FP8 scale would span columns: their sums alone are another result than one rank's.
    fn check_tensor_parallel(&self) -> Result<(), (String, String)> {
        let (tp, recipe) = (self.parallel.tp, &self.recipe);
        if tp == 1 {
            return Ok(());
        }
        let wrong = |message: String| Err(("parallel.tp".to_owned(), message));
        let mut shared = vec![("model.heads", self.model.heads)];
        if let AttentionConfig::Gqa { kv_heads, .. } = self.model.attention {
            shared.push(("model.attention.kv_heads", kv_heads));
        }
        let widths = self.split_widths();
        shared.extend(&widths);
        for (key, value) in shared {
            if !value.is_multiple_of(tp) {
                return wrong(format!("expected a divisor of {key} = {value}, found {tp}"));
            }
        }
        if recipe.mode != Mode::Fp8 {
            return Ok(());
        }
        for (key, block) in [
            ("activation_block", recipe.fp8.activation_block),
            ("weight_block", recipe.fp8.weight_block),
            ("gradient_block", recipe.fp8.gradient_block),
        ] {
            let [Some(rows), Some(columns)] = block else {
                return wrong(format!(
                    "expected 1, found {tp}: with recipe.fp8.{key} over all columns or rows a scale \
                     would span what several ranks hold"
                ));
            };
            let edge = if key == "weight_block" { rows.max(columns) } else { columns };
            for (what, width) in &widths {
                if !(width / tp).is_multiple_of(edge) {
                    return wrong(format!(
                        "expected a number of ranks that leaves each a multiple of {edge} \
                         (recipe.fp8.{key}) of {what} = {width}, found {tp}, which leaves {}",
                        width / tp
                    ));
                }
            }
        }
        Ok(())
    }

    /// Widths that tensor parallel ranks share out, with their words.
    fn split_widths(&self) -> Vec<(&'static str, usize)> {
        let model = &self.model;
        let mut widths = match model.attention {
            AttentionConfig::Mla { qk_nope_head_dim, qk_rope_head_dim, v_head_dim, .. } => vec![
                ("the queries' heads x (nope + rope)", qk_nope_head_dim + qk_rope_head_dim),
                ("the keys' and values' heads x (nope + v)", qk_nope_head_dim + v_head_dim),
                ("the attention's heads x v", v_head_dim),
            ],
            AttentionConfig::Gqa { head_dim, .. } => vec![("heads x head_dim", head_dim)],
        };
        widths.iter_mut().for_each(|(_, width)| *width *= model.heads);
        if let AttentionConfig::Gqa { kv_heads, head_dim } = model.attention {
            widths.push(("kv_heads x head_dim", kv_heads * head_dim));
        }
        if (0..model.layers + model.mtp_depth).any(|layer| !model.is_moe(layer)) {
            widths.push(("model.intermediate_size", model.intermediate_size));
        }
        if let Some(moe) = &model.moe
            && moe.n_shared_experts > 0
        {
            let width = moe.n_shared_experts * moe.intermediate_size;
            widths.push(("model.moe.n_shared_experts x intermediate_size", width));
        }
        widths
    }

    fn check_shares(&self) -> Result<(), (String, String)> {
        let (p, union) = (&self.parallel, self.expert_union);
        let replicas = (p.ep / p.cp).max(1);
        let over = if p.cp > 1 { " / cp" } else { "" };
        if !union.is_multiple_of(replicas) {
            let message =
                format!("expected a multiple of parallel.ep{over} = {replicas}, found {union}");
            return Err(("expert_union".to_owned(), message));
        }
        let (beside, directions) = (union / replicas, p.directions());
        let least = beside * p.dp * directions;
        if self.grad_shards.is_multiple_of(least) {
            return Ok(());
        }
        let by = if p.cp > 1 { " x cp" } else { "" };
        let message = format!(
            "expected a multiple of {least} (parallel.dp = {} x {directions} direction(s) of {} x \
             expert_union{by} / ep = {beside}), found {}",
            p.dp,
            p.schedule.name(),
            self.grad_shards
        );
        Err(("grad_shards".to_owned(), message))
    }

    fn check_stages(&self) -> Result<(), (String, String)> {
        let wrong = |key: &str, message: String| Err((format!("parallel.{key}"), message));
        let (stages, layers) = (self.parallel.geometry().stages, self.model.layers);
        if stages > layers {
            return wrong(
                "pp",
                format!(
                    "expected a layer a stage, found {stages} stages for the \
                model's {layers} layers"
                ),
            );
        }
        let Some(given) = &self.parallel.stage_layers else { return Ok(()) };
        let sum = given.iter().fold(0usize, |sum, &n| sum.saturating_add(n));
        if given.len() != stages || sum != layers || given.contains(&0) {
            let message = format!(
                "expected {stages} numbers from 1 that add up to the {layers} layers, found {given:?}"
            );
            return wrong("stage_layers", message);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::Setting;

    fn config(set: &[&str]) -> Result<TrainConfig, String> {
        let set: Vec<Setting> = set.iter().map(|s| Setting::set(s)).collect();
        TrainConfig::preset("tiny", &set).map_err(|e| e.to_string())
    }

    #[test]
    fn every_leaf_has_one_rank_and_unions_are_neighbours() {
        for (dp, cp, ep, expert_union, directions, grad_shards) in [
            (1, 1, 1, 1, 1, 3),
            (4, 1, 2, 2, 1, 8),
            (4, 1, 4, 8, 2, 16),
            (2, 1, 1, 4, 1, 8),
            (4, 1, 2, 2, 2, 8),
            (1, 2, 2, 1, 1, 3),
            (2, 2, 4, 4, 2, 8),
            (4, 4, 4, 2, 1, 8),
        ] {
            let (replicas, context_shards) = (ep / cp, 4);
            let shares =
                Shares { grad_shards, context_shards, expert_union, replicas, dp, cp, directions };
            let mut seen = vec![0; shares.leaves()];
            for d in 0..dp {
                for direction in 0..directions {
                    for number in 0..shares.unions() {
                        let shards = shares.shards(d, direction, number);
                        let first = shards.start / expert_union * expert_union;
                        // The ranks of its expert parallel group have the others of the union.
                        let group = d / replicas * replicas;
                        let of_group = (group..group + replicas)
                            .flat_map(|d| shares.shards(d, direction, number));
                        assert!(of_group.eq(first..first + expert_union), "{shares:?}");
                        // The ranks of a replica have the same shards' parts, as many each.
                        for c in 0..cp {
                            let lanes = shares.lanes((d, c), direction, number);
                            assert_eq!(lanes.len(), shards.len() * context_shards / cp);
                            for leaf in lanes {
                                assert!(shards.contains(&(leaf / context_shards)));
                                assert_eq!(leaf % context_shards * cp / context_shards, c);
                                seen[leaf] += 1;
                            }
                        }
                    }
                }
            }
            assert_eq!(seen, vec![1; shares.leaves()], "{shares:?}");
        }
    }

    #[test]
    fn illegal_layouts_are_refused_with_the_numbers() {
        let refused = |set: &[&str], key: &str, words: &str| {
            let e = config(set).unwrap_err();
            assert!(e.contains(key) && e.contains(words), "{set:?}: {e}");
        };
        refused(&["parallel.cp=2"], "parallel.ep", "a multiple of parallel.cp = 2, found 1");
        let three = ["parallel.cp=2", "parallel.ep=2", "context_shards=3", "seq_len=12"];
        refused(&three, "parallel.cp", "divisor of context_shards = 3");
        refused(&["context_shards=3"], "context_shards", "divisor of seq_len");
        let four = ["parallel.cp=4", "parallel.ep=4"];
        refused(
            &four,
            "parallel.cp",
            "shares out model.heads = 2, of which one of parallel.tp = 1",
        );
        let spans = ["context_shards=2", "recipe.fp8.activation_block=[\"all\",\"all\"]"];
        refused(&spans, "context_shards", "recipe.fp8.activation_block over all");
        let room = "schedule.capacity={devices=2,factor=1.0}";
        let room = ["context_shards=2", room];
        refused(&room, "schedule.capacity", "expected none with context_shards = 2");
        let counts = ["context_shards=2", "schedule.balance_kind=\"expert\""];
        refused(&counts, "schedule.balance_kind", "\"sequence\" or \"batch\"");
        refused(&["parallel.tp=4"], "parallel.tp", "divisor of model.heads = 2, found 4");
        let tiles = "multiple of 128 (recipe.fp8.activation_block) of the queries' heads x (nope + \
                     rope) = 128, found 2, which leaves 64";
        refused(&["parallel.tp=2"], "parallel.tp", tiles);
        let tensor = ["parallel.tp=2", "recipe.fp8.activation_block=[\"all\",\"all\"]"];
        refused(&tensor, "parallel.tp", "recipe.fp8.activation_block over all");
        let bf16 = "recipe.mode=\"bf16\"";
        let odd = ["parallel.tp=2", bf16, "model.intermediate_size=129"];
        refused(&odd, "parallel.tp", "divisor of model.intermediate_size = 129");
        let experts = ["parallel.tp=2", "parallel.ep=2", "grad_shards=2", bf16];
        refused(&experts, "parallel.ep", "divisor of parallel.dp = 1, found 2");
        assert!(config(&["parallel.tp=2", bf16]).is_ok());
        refused(&["parallel.dp=2"], "grad_shards", "expected a multiple of 2 (parallel.dp = 2 x 1");
        refused(&["parallel.dp=0"], "parallel", "at least 1");
        refused(&["parallel.pp=3"], "parallel.pp", "3 stages for the model's 2 layers");
        let dual = ["parallel.pp=2", "parallel.schedule=\"dualpipe\"", "grad_shards=2"];
        refused(&dual, "parallel.schedule", "at least 2P = 4");
        let two = ["parallel.dp=2", "grad_shards=2", "parallel.ep=2", "expert_union=1"];
        refused(&two, "expert_union", "a multiple of parallel.ep = 2, found 1");
        refused(&["expert_union=2"], "expert_union", "a divisor of grad_shards = 1");
        let three = ["parallel.ep=3", "parallel.dp=3", "grad_shards=3", "schedule.batch=3"];
        refused(&three, "parallel.ep", "divisor of 4");
        refused(&["parallel.timeout_seconds=0"], "parallel.timeout_seconds", "above 0");
        let stages = ["parallel.pp=2", "parallel.stage_layers=[1,2]"];
        refused(&stages, "parallel.stage_layers", "add up to the 2 layers");
        let blocks =
            ["grad_shards=2", "expert_union=2", "recipe.fp8.gradient_block=[\"all\",\"all\"]"];
        refused(&blocks, "expert_union", "gradient_block");
        // What is not set follows from the layout.
        let set = ["parallel.dp=2", "grad_shards=2", "parallel.ep=2"];
        assert_eq!(config(&set).unwrap().expert_union, 2);
        assert_eq!(config(&[]).unwrap().expert_union, 1);
        let set = ["parallel.dp=2", "grad_shards=2", "parallel.cp=2", "parallel.ep=4"];
        let implied = config(&set).unwrap();
        assert_eq!((implied.expert_union, implied.context_shards), (2, 2));
    }
}
