//! Lays the model out: which layers and which slices of the parameters a rank has.

use std::ops::Range;

use crate::layers::attention::{AttentionLayer, KeyValue};
use crate::layers::feed_forward::FeedForward;
use crate::layers::linear::GroupedLinear;
use crate::layers::mlp::MlpLayer;
use crate::layers::moe::MoeLayer;
use crate::layers::{Linear, Norm, rope};
use crate::model::layer::Layer;
use crate::model::mtp::{Join, MtpModule};
use crate::model::params::{Builder, ParamId, ParamKind, ParamSpec};
use crate::ops::attention::Heads;
use crate::ops::router::Router;
use crate::parallel::{Coordinates, LayoutError, Parallel, coordinates};
use crate::precision::Recipe;
use fathom_config::{AttentionConfig, ModelConfig, MoeConfig, MtpKind};

/// Why a model cannot be laid out.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The layout itself is wrong.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The layout does not fit the architecture.
    #[error("{what} = {value} cannot be split over {name} = {ranks}")]
    Split {
        /// The setting that is to be split, by its configuration key: `heads`, `n_routed_experts`.
        what: &'static str,
        /// Its value in the configuration.
        value: usize,
        /// The dimension of the layout it is split over: `tp`, `cp` or `ep`.
        name: &'static str,
        /// Ranks along that dimension.
        ranks: usize,
    },
}

/// A model on one rank: sizes, layers and the list of its parameters. It holds no values.
#[derive(Clone, Debug)]
pub struct Model {
    /// The architecture that it was built of.
    pub config: ModelConfig,
    /// Precision mode, formats and scales, and what is kept for backward.
    pub recipe: Recipe,
    /// The sizes of all dimensions: tp, cp, dp, pp, ep.
    pub parallel: Parallel,
    /// This rank's number in the layout, from 0.
    pub rank: usize,
    /// This rank's coordinate along each dimension.
    pub at: Coordinates,
    /// Every parameter of this rank; [`ParamId`] indexes it.
    pub specs: Vec<ParamSpec>,
    /// Token embedding \[vocab, hidden\] on the first stage, and on the last where MTP modules or a
    /// tied head read it.
    pub embedding: Option<ParamId>,
    /// The decoder layers of this stage, in order.
    pub layers: Vec<Layer>,
    /// Final norm before the head, on the last stage.
    pub norm: Option<Norm>,
    /// Output head \[vocab, hidden\] on the last stage; the embedding's id where the two are tied.
    pub head: Option<ParamId>,
    /// MTP modules, on the last stage.
    pub mtp: Vec<MtpModule>,
}

/// The checkpoints' epsilon of the norms on the latents, whatever the configuration says.
const LATENT_EPS: f64 = 1e-6;

/// An even share of `value`.
fn share(
    what: &'static str,
    value: usize,
    name: &'static str,
    ranks: usize,
) -> Result<usize, BuildError> {
    if value.is_multiple_of(ranks) {
        return Ok(value / ranks);
    }
    Err(BuildError::Split { what, value, name, ranks })
}

impl Model {
    /// The model as `rank` of the layout holds it.
    ///
    /// # Errors
    /// [`BuildError`] where the layout does not fit.
    pub fn new(
        config: &ModelConfig,
        recipe: Recipe,
        parallel: Parallel,
        rank: usize,
    ) -> Result<Model, BuildError> {
        let (at, stages) = (coordinates(parallel, rank)?, parallel.pp);
        let layers = config.layers * at.pp / stages..config.layers * (at.pp + 1) / stages;
        Model::stage(config, recipe, parallel, rank, layers)
    }

    /// As [`Model::new`] with the decoder layers that the rank's stage has.
    ///
    /// # Errors
    /// As [`Model::new`].
    pub fn stage(
        config: &ModelConfig,
        recipe: Recipe,
        parallel: Parallel,
        rank: usize,
        stage: Range<usize>,
    ) -> Result<Model, BuildError> {
        let at = coordinates(parallel, rank)?;
        Model::placed(config, recipe, parallel, (rank, at), stage)
    }

    /// As [`Model::stage`] where the rank's coordinates are told: those of a run that is executed,
    /// which counts expert parallel ranks among the data parallel ones.
    ///
    /// # Errors
    /// [`BuildError::Split`] where the layout does not fit.
    pub fn placed(
        config: &ModelConfig,
        recipe: Recipe,
        parallel: Parallel,
        (rank, at): (usize, Coordinates),
        stage: Range<usize>,
    ) -> Result<Model, BuildError> {
        let mut layout = Layout { config, parallel, at, params: Builder::default() };
        let stages = parallel.pp;
        let (first, last) = (at.pp == 0, at.pp + 1 == stages);
        let table = [config.vocab_size, config.hidden_size];
        let looks_up = config.mtp_depth > 0 && config.mtp_kind == MtpKind::Sequential;
        let needs_table = first || (last && (looks_up || config.tie_word_embeddings));
        let name = "model.embed_tokens.weight".to_owned();
        let kind = ParamKind::Embedding;
        let embedding = needs_table.then(|| layout.params.one(name, kind, None, &table));
        let layers = stage.map(|i| layout.layer(i)).collect::<Result<_, _>>()?;
        let norm = last.then(|| layout.norm("model.norm.weight", None, config.hidden_size));
        let head = match (last, config.tie_word_embeddings) {
            (false, _) => None,
            (true, true) => embedding,
            (true, false) => {
                Some(layout.params.one("lm_head.weight".into(), ParamKind::Head, None, &table))
            }
        };
        let depth = if last { config.mtp_depth } else { 0 };
        let mtp = (0..depth).map(|d| layout.mtp(d)).collect::<Result<_, _>>()?;
        Ok(Model {
            config: config.clone(),
            recipe,
            parallel,
            rank,
            at,
            specs: layout.params.specs,
            embedding,
            layers,
            norm,
            head,
            mtp,
        })
    }

    /// The parameter whose name (not that of one of its parts) is `name`.
    pub fn find(&self, name: &str) -> Option<ParamId> {
        self.specs.iter().position(|s| s.name == name).map(ParamId)
    }

    /// Columns of each query and key head that RoPE rotates.
    pub fn rotated(&self) -> usize {
        match self.config.attention {
            AttentionConfig::Mla { qk_rope_head_dim, .. } => qk_rope_head_dim,
            AttentionConfig::Gqa { head_dim, .. } => head_dim,
        }
    }
}

struct Layout<'a> {
    config: &'a ModelConfig,
    parallel: Parallel,
    at: Coordinates,
    params: Builder,
}

impl Layout<'_> {
    fn norm(&mut self, name: &str, layer: Option<usize>, width: usize) -> Norm {
        let weight = self.params.one(name.to_owned(), ParamKind::Norm, layer, &[width]);
        Norm { weight, eps: self.config.rms_norm_eps, offset: 0, width }
    }

    fn linear(&mut self, name: String, layer: usize, shape: [usize; 2]) -> Linear {
        let weight = self.params.one(name, ParamKind::Linear, Some(layer), &shape);
        Linear { weight }
    }

    fn layer(&mut self, index: usize) -> Result<Layer, BuildError> {
        let prefix = format!("model.layers.{index}");
        let attention = self.attention(index, &prefix)?;
        let hidden = self.config.hidden_size;
        let norm = format!("{prefix}.post_attention_layernorm.weight");
        let norm = self.norm(&norm, Some(index), hidden);
        let moe = self.config.moe.filter(|_| self.config.is_moe(index));
        let mlp = match moe {
            None => {
                let width = self.config.intermediate_size;
                let dense = self.feed_forward(index, &format!("{prefix}.mlp"), width)?;
                MlpLayer { norm, dense: Some(dense), moe: None }
            }
            Some(moe) => {
                let routed = self.moe(index, &format!("{prefix}.mlp"), &moe)?;
                let width = moe.n_shared_experts * moe.intermediate_size;
                let name = format!("{prefix}.mlp.shared_experts");
                let shared = (width > 0).then(|| self.feed_forward(index, &name, width));
                MlpLayer { norm, dense: shared.transpose()?, moe: Some(routed) }
            }
        };
        Ok(Layer { index, attention, mlp })
    }

    fn attention(&mut self, index: usize, prefix: &str) -> Result<AttentionLayer, BuildError> {
        let config = self.config;
        let Parallel { tp, cp, .. } = self.parallel;
        let hidden = config.hidden_size;
        let heads = share("heads", config.heads, "tp", tp)?;
        share("heads", heads, "cp", cp)?;
        let norm = self.norm(&format!("{prefix}.input_layernorm.weight"), Some(index), hidden);
        let name = |part: &str| format!("{prefix}.self_attn.{part}.weight");
        let layer = Some(index);
        let (scale, interleaved) = (rope::softmax_scale(config), config.rope.interleaved);
        match config.attention {
            AttentionConfig::Mla {
                q_lora_rank,
                kv_lora_rank,
                qk_nope_head_dim: nope,
                qk_rope_head_dim: rope,
                v_head_dim: v,
            } => {
                let qk = nope + rope;
                let first = match q_lora_rank {
                    Some(rank) => (name("q_a_proj"), vec![rank, hidden]),
                    None => (name("q_proj"), vec![heads * qk, hidden]),
                };
                let offset = first.1[0];
                let second = (name("kv_a_proj_with_mqa"), vec![kv_lora_rank + rope, hidden]);
                let parts = vec![first, second];
                let qkv_a = self.params.add(&name("qkv_a"), ParamKind::Linear, layer, parts, None);
                let q = q_lora_rank.map(|rank| {
                    let norm = self.norm(&name("q_a_layernorm"), layer, rank);
                    let norm = Norm { eps: LATENT_EPS, ..norm };
                    (norm, self.linear(name("q_b_proj"), index, [heads * qk, rank]))
                });
                let kv_norm = self.norm(&name("kv_a_layernorm"), layer, kv_lora_rank);
                let kv_norm = Norm { eps: LATENT_EPS, offset, ..kv_norm };
                let shape = [heads * (nope + v), kv_lora_rank];
                let b = self.linear(name("kv_b_proj"), index, shape);
                let o = self.linear(name("o_proj"), index, [hidden, heads * v]);
                Ok(AttentionLayer {
                    norm,
                    qkv_a: Linear { weight: qkv_a },
                    q,
                    kv: KeyValue::Latent { norm: kv_norm, b },
                    o,
                    heads: Heads { heads, kv_heads: heads, qk, v },
                    nope,
                    interleaved,
                    scale,
                })
            }
            AttentionConfig::Gqa { kv_heads, head_dim } => {
                let kv_heads = share("kv_heads", kv_heads, "tp", tp)?;
                share("kv_heads", kv_heads, "cp", cp)?;
                let parts = vec![
                    (name("q_proj"), vec![heads * head_dim, hidden]),
                    (name("k_proj"), vec![kv_heads * head_dim, hidden]),
                    (name("v_proj"), vec![kv_heads * head_dim, hidden]),
                ];
                let qkv_a = self.params.add(&name("qkv"), ParamKind::Linear, layer, parts, None);
                let o = self.linear(name("o_proj"), index, [hidden, heads * head_dim]);
                Ok(AttentionLayer {
                    norm,
                    qkv_a: Linear { weight: qkv_a },
                    q: None,
                    kv: KeyValue::Direct,
                    o,
                    heads: Heads { heads, kv_heads, qk: head_dim, v: head_dim },
                    nope: 0,
                    interleaved,
                    scale,
                })
            }
        }
    }

    fn feed_forward(
        &mut self,
        index: usize,
        prefix: &str,
        width: usize,
    ) -> Result<FeedForward, BuildError> {
        let width = share("intermediate_size", width, "tp", self.parallel.tp)?;
        let hidden = self.config.hidden_size;
        let parts = ["gate_proj", "up_proj"]
            .map(|part| (format!("{prefix}.{part}.weight"), vec![width, hidden]));
        let name = format!("{prefix}.gate_up_proj.weight");
        let layer = Some(index);
        let gate_up = self.params.add(&name, ParamKind::Linear, layer, parts.to_vec(), None);
        let down = self.linear(format!("{prefix}.down_proj.weight"), index, [hidden, width]);
        Ok(FeedForward { gate_up: Linear { weight: gate_up }, down })
    }

    fn moe(&mut self, index: usize, prefix: &str, moe: &MoeConfig) -> Result<MoeLayer, BuildError> {
        let (hidden, ep, layer) = (self.config.hidden_size, self.parallel.ep, Some(index));
        let experts = moe.n_routed_experts;
        let own = share("n_routed_experts", experts, "ep", ep)?;
        let local = self.at.ep * own..(self.at.ep + 1) * own;
        let gate = format!("{prefix}.gate.weight");
        let gate = self.params.one(gate, ParamKind::Gate, layer, &[experts, hidden]);
        let bias = format!("{prefix}.gate.e_score_correction_bias");
        let bias = self.params.one(bias, ParamKind::SelectionBias, layer, &[experts]);
        let width = moe.intermediate_size;
        let part = |e: usize, part: &str| format!("{prefix}.experts.{e}.{part}.weight");
        let gate_up = local.clone().flat_map(|e| {
            ["gate_proj", "up_proj"].map(|name| (part(e, name), vec![width, hidden]))
        });
        let name = format!("{prefix}.experts.gate_up_proj");
        let kind = ParamKind::Experts;
        let gate_up = self.params.add(&name, kind, layer, gate_up.collect(), Some(own));
        let down = local.clone().map(|e| (part(e, "down_proj"), vec![hidden, width]));
        let name = format!("{prefix}.experts.down_proj");
        let down = self.params.add(&name, kind, layer, down.collect(), Some(own));
        Ok(MoeLayer {
            gate: Linear { weight: gate },
            bias,
            router: Router {
                top_k: moe.top_k,
                n_group: moe.n_group,
                topk_group: moe.topk_group,
                group_top: moe.group_top,
                score: moe.score,
                normalize: moe.normalize,
                scale: moe.routed_scaling_factor,
            },
            experts,
            local,
            ep,
            gate_up: GroupedLinear { weight: gate_up },
            down: GroupedLinear { weight: down },
        })
    }

    fn mtp(&mut self, depth: usize) -> Result<MtpModule, BuildError> {
        let (index, hidden) = (self.config.layers + depth, self.config.hidden_size);
        let prefix = format!("model.layers.{index}");
        let sequential = self.config.mtp_kind == MtpKind::Sequential;
        let mut norm = |name: &str| {
            let name = format!("{prefix}.{name}.weight");
            self.norm(&name, Some(index), hidden)
        };
        let norms = sequential.then(|| [norm("enorm"), norm("hnorm")]);
        let norm = norm("shared_head.norm");
        let join = norms.map(|[enorm, hnorm]| {
            let name = format!("{prefix}.eh_proj.weight");
            Join { enorm, hnorm, eh_proj: self.linear(name, index, [hidden, 2 * hidden]) }
        });
        let layer = self.layer(index)?;
        Ok(MtpModule { depth: depth + 1, join, layer, norm })
    }
}
