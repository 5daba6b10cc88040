//! The parameters: which there are, their shapes on a rank, and the checkpoint tensors they are
//! made of.
//!
//! A parameter is what ops read: gate beside up, all local experts stacked, the first attention
//! projection in one piece. Row-major it is its checkpoint tensors one after the other
//! ([`ParamSpec::parts`]), so splitting and joining move whole rows.

/// A parameter's place in the model's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParamId(pub usize);

/// What a parameter is: decides initial values, weight decay and quantisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamKind {
    /// Weight of a Linear; in `fp8` mode quantised in blocks.
    Linear,
    /// Stacked weights of the routed experts; as `Linear`.
    Experts,
    /// The embedding of tokens, a row a token.
    Embedding,
    /// The output head, a row a token.
    Head,
    /// Weight of the router's gate, always in master precision.
    Gate,
    /// Weight of a norm; initially one, not decayed.
    Norm,
    /// Selection bias of the router; initially zero, moved by its own rule, without gradient.
    SelectionBias,
}

/// A tensor of a checkpoint that makes up a parameter, or one of several that do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its name in Hugging Face's layout.
    pub name: String,
    /// Its shape on this rank: under tensor parallelism a slice of the checkpoint's.
    pub shape: Vec<usize>,
}

/// A parameter: the unit that has a gradient and moments and that ops read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamSpec {
    /// Its own name: that of its only part, or the parts' common one.
    pub name: String,
    /// What it is, which decides initial values, weight decay and quantisation.
    pub kind: ParamKind,
    /// Its shape on this rank; for routed experts \[local experts, n, k\].
    pub shape: Vec<usize>,
    /// The checkpoint tensors that it consists of, in row-major order.
    pub parts: Vec<Part>,
    /// Decoder layer, for reports; MTP modules follow the last. None for embedding, head and final
    /// norm.
    pub layer: Option<usize>,
}

impl ParamSpec {
    /// Elements on this rank.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has a gradient.
    pub fn trained(&self) -> bool {
        self.kind != ParamKind::SelectionBias
    }
}

/// Collects parameters while the layers are laid out.
#[derive(Debug, Default)]
pub(super) struct Builder {
    pub specs: Vec<ParamSpec>,
}

impl Builder {
    /// Adds a parameter that consists of these tensors; the shape is theirs joined along dimension
    /// 0, or `stacked` over experts.
    pub fn add(
        &mut self,
        name: &str,
        kind: ParamKind,
        layer: Option<usize>,
        parts: Vec<(String, Vec<usize>)>,
        experts: Option<usize>,
    ) -> ParamId {
        let parts: Vec<Part> =
            parts.into_iter().map(|(name, shape)| Part { name, shape }).collect();
        let mut shape = parts[0].shape.clone();
        shape[0] = parts.iter().map(|p| p.shape[0]).sum();
        if let Some(experts) = experts {
            shape[0] /= experts;
            shape.insert(0, experts);
        }
        self.specs.push(ParamSpec { name: name.to_owned(), kind, shape, parts, layer });
        ParamId(self.specs.len() - 1)
    }

    /// Adds a parameter of one tensor.
    pub fn one(
        &mut self,
        name: String,
        kind: ParamKind,
        layer: Option<usize>,
        shape: &[usize],
    ) -> ParamId {
        let part = (name.clone(), shape.to_vec());
        self.add(&name, kind, layer, vec![part], None)
    }
}
