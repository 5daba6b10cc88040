//! The routed experts: the router chooses them, dispatch brings rows to them, mlp computes them,
//! combine brings their outputs back.
//!
//! Micro-batches that run side by side (`expert_union`) meet in mlp only: their rows are one call
//! of the experts, see [`union`](super::union).

use fathom_trace::{Group, GroupKind};

use crate::EngineError;
use crate::backend::{Backend, Result};
use crate::layers::linear::GroupedLinear;
use crate::layers::operand::{Codes, Operand};
use crate::layers::union::{Parts, Union};
use crate::layers::{Balance, BalanceKind, Capacity, Cx, Linear};
use crate::model::params::ParamId;
use crate::ops::add::Add;
use crate::ops::balance::BalanceLoss;
use crate::ops::cast::Cast;
use crate::ops::dispatch::{Combine, Dispatch, DispatchCodes, DispatchPlan};
use crate::ops::drop_tokens::DropTokens;
use crate::ops::gemm::{Gemm, Layout};
use crate::ops::router::{Router, RouterBackward};

/// Router and routed experts.
#[derive(Clone, Debug)]
pub struct MoeLayer {
    /// Affinities of the experts, in master precision.
    pub gate: Linear,
    /// Selection bias \[experts\].
    pub bias: ParamId,
    /// How experts are chosen.
    pub router: Router,
    /// Experts on all ranks.
    pub experts: usize,
    /// Experts of this rank.
    pub local: std::ops::Range<usize>,
    /// How many expert-parallel ranks share out the experts.
    pub ep: usize,
    /// Gate and up projection of every local expert, gate first.
    pub gate_up: GroupedLinear,
    /// Down projection of every local expert.
    pub down: GroupedLinear,
}

/// Which rows the tokens of a micro-batch become: a token has one for each expert that it chose.
#[derive(Clone, Debug)]
pub struct Plan<B: Backend> {
    /// Slot of each row, as op `dispatch_plan` gives it; slot = token * top_k + choice.
    rows: B::Buffer,
    /// Row of each slot.
    inverse: B::Buffer,
    tokens: usize,
    /// Rows that the micro-batch gives to each expert of the layer, on whichever rank it is.
    pub chosen: Vec<usize>,
    /// Rows that each rank of the expert-parallel group gives to each local expert, in order of
    /// ranks.
    pub received: Vec<Vec<usize>>,
    /// Rows that each rank gives to each expert of the layer, for the exchange; empty without one.
    sent: Vec<Vec<usize>>,
}

/// What the backward of router and routed experts needs.
#[derive(Clone, Debug)]
pub struct MoeKept<B: Backend> {
    /// Affinities \[t, experts\].
    pub scores: B::Buffer,
    /// Chosen experts \[t, top_k\].
    pub indices: B::Buffer,
    /// Gate values \[t, top_k\].
    pub weights: B::Buffer,
    /// Where the rows lie.
    pub plan: Plan<B>,
    /// What the experts keep, with the first of the micro-batches whose rows they computed
    /// together; there after mlp.
    experts: Option<ExpertsKept<B>>,
    /// Gradients that the input-backward leaves: of the rows' gate values (until the backward of
    /// dispatch takes it) and of the gate's logits.
    dweights: Option<B::Buffer>,
    dlogits: Option<B::Buffer>,
    /// The balance losses.
    pub balance: BalanceKept<B>,
    /// Slots that each device dropped, where room is limited.
    pub dropped: Option<B::Buffer>,
}

/// What the backward of the routed experts needs.
#[derive(Clone, Debug)]
struct ExpertsKept<B: Backend> {
    /// Where the rows come from, of which micro-batch and rank.
    union: Union,
    /// The experts' rows.
    x: Operand<B>,
    /// The gate value of each of them.
    row_weights: B::Buffer,
    /// Gate beside up of every row, SwiGLU's input.
    hidden: Operand<B>,
    /// SwiGLU's output as the down projection reads it; none where it is recomputed.
    act: Option<Operand<B>>,
    /// Gradients that the input-backward leaves: of the experts' outputs, and of `hidden`.
    dy: Option<Operand<B>>,
    dhidden: Option<Operand<B>>,
}

/// The balance losses of a layer.
#[derive(Clone, Debug)]
pub struct BalanceKept<B: Backend> {
    /// A buffer for each loss, with the loss of each segment.
    pub losses: Vec<B::Buffer>,
    /// The sum of their gradients for the affinities, where there is a loss.
    dscores: Option<B::Buffer>,
}

impl MoeLayer {
    fn group(&self) -> Group {
        Group { kind: GroupKind::Ep, size: self.ep }
    }

    /// Copies of tokens that leave this rank: each goes once to every other rank that it needs, of
    /// those that its groups allow; choices are taken as independent and even.
    fn copies_sent(&self, tokens: usize) -> usize {
        let Router { n_group, topk_group, top_k, .. } = self.router;
        let reachable = (self.ep as f64 * topk_group as f64 / n_group as f64).max(1.0);
        let distinct = reachable * (1.0 - (1.0 - 1.0 / reachable).powi(top_k as i32));
        (tokens as f64 * distinct * (1.0 - 1.0 / self.ep as f64)).round() as usize
    }

    fn dispatch_op(&self, plan: &Plan<impl Backend>, slots: bool) -> Dispatch {
        Dispatch {
            top_k: self.router.top_k,
            received: plan.received.iter().flatten().sum(),
            copies_sent: self.copies_sent(plan.tokens),
            slots,
            group: self.group(),
            sent: plan.sent.clone(),
        }
    }

    fn combine_op<B: Backend>(&self, cx: &Cx<'_, B>, plan: &Plan<B>, slots: bool) -> Combine {
        Combine {
            top_k: self.router.top_k,
            tokens: plan.tokens,
            copies_sent: self.copies_sent(plan.tokens),
            slots,
            out: if slots { cx.recipe.master() } else { cx.activation() },
            group: self.group(),
            sent: plan.sent.clone(),
        }
    }

    /// Rows back to their tokens, summed.
    pub(super) fn combine<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        plan: &Plan<B>,
        rows: &B::Buffer,
    ) -> Result<B::Buffer> {
        cx.backend.combine(&self.combine_op(cx, plan, false), rows, &plan.inverse)
    }

    /// Chooses experts for the normalised rows, given as they are and as products read them, of
    /// each of the rank's parts of a micro-batch, and brings the rows to them, with the gate value
    /// of each.
    #[allow(clippy::type_complexity)]
    pub(super) fn dispatch<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        inputs: Vec<(B::Buffer, Operand<B>)>,
    ) -> Result<Vec<(MoeKept<B>, (Operand<B>, B::Buffer))>> {
        let mut routed = Vec::with_capacity(cxs.len());
        for (cx, (n, _)) in cxs.iter().zip(&inputs) {
            let (backend, master) = (cx.backend, cx.recipe.master());
            let gate_input = backend.cast(&Cast { out: master }, n)?;
            let logits = Gemm { layout: Layout::Nt, out: master, segments: Vec::new() };
            let logits = backend.gemm(&logits, &gate_input, cx.master(self.gate.weight), None)?;
            let bias = Some(cx.master(self.bias));
            routed.push(backend.router(&self.router, &logits, bias)?);
        }
        let balance = self.balances(cxs, &routed)?;
        let parts = cxs.iter().zip(inputs).zip(routed).zip(balance);
        let part = |(((cx, (_, operand)), routed), balance): (((&Cx<'_, B>, (_, _)), _), _)| {
            self.dispatch_routed(cx, &operand, routed, balance)
        };
        parts.map(part).collect()
    }

    /// Brings a part's rows to their experts.
    #[allow(clippy::type_complexity)]
    fn dispatch_routed<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        operand: &Operand<B>,
        [scores, indices, weights]: [B::Buffer; 3],
        balance: BalanceKept<B>,
    ) -> Result<(MoeKept<B>, (Operand<B>, B::Buffer))> {
        let backend = cx.backend;
        let (placed, dropped) = match cx.capacity.clone() {
            Some(Capacity { devices, factor, exempt }) => {
                self.whole_only(cx, "drop_tokens")?;
                let segments = cx.rows.segments.clone();
                let op = DropTokens { devices, factor, segments, exempt };
                let [placed, dropped] = backend.drop_tokens(&op, &indices, &scores)?;
                (placed, Some(dropped))
            }
            None => (indices.clone(), None),
        };
        let plan = self.plan(cx, &placed)?;
        let x = self.to_rows(cx, operand, &plan)?;
        let row_weights = backend.dispatch(&self.dispatch_op(&plan, true), &weights, &plan.rows)?;
        let kept = MoeKept {
            scores,
            indices,
            weights,
            plan,
            experts: None,
            dweights: None,
            dlogits: None,
            balance,
            dropped,
        };
        Ok((kept, (x, row_weights)))
    }

    /// Refuses what is over the choices of whole sequences, where the rows are parts of them.
    fn whole_only<B: Backend>(&self, cx: &Cx<'_, B>, op: &str) -> Result<()> {
        if cx.rows.context.is_none() {
            return Ok(());
        }
        let (engine, op) = (cx.backend.name(), op.to_owned());
        let reason = "it reads the choices of whole sequences, whose parts lie apart".into();
        Err(EngineError::Unsupported { engine, op, reason })
    }

    /// Where the rows of the chosen experts \[t, top_k\] lie, here and in the group.
    fn plan<B: Backend>(&self, cx: &Cx<'_, B>, placed: &B::Buffer) -> Result<Plan<B>> {
        let (backend, tokens) = (cx.backend, cx.rows.len());
        let op = DispatchPlan { experts: self.experts };
        let [rows, inverse, counts] = backend.dispatch_plan(&op, placed)?;
        let local = self.local.clone();
        if let Some(sent) = backend.group_counts(&counts, self.group())? {
            let received = sent.iter().map(|of_rank| of_rank[local.clone()].to_vec()).collect();
            let chosen = sent[local.start / local.len()].clone();
            return Ok(Plan { rows, inverse, tokens, chosen, received, sent });
        }
        let slots = tokens * self.router.top_k * self.ep;
        let received = backend.expert_counts(&counts, local, slots)?;
        let (chosen, received) = (received.clone(), vec![received]);
        Ok(Plan { rows, inverse, tokens, chosen, received, sent: Vec::new() })
    }

    /// A token-wise operand as the experts' rows: codes and scales travel, not values.
    pub(super) fn to_rows<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        operand: &Operand<B>,
        plan: &Plan<B>,
    ) -> Result<Operand<B>> {
        let op = self.dispatch_op(plan, false);
        let rows = |x| cx.backend.dispatch(&op, x, &plan.rows);
        match operand {
            Operand::Plain(x) => rows(x).map(Operand::Plain),
            Operand::Codes(codes @ Codes { block: [Some(1), _], .. }) if cx.fuses() => {
                let Dispatch { top_k, received, copies_sent, group, sent, .. } = op;
                let op = DispatchCodes { top_k, received, copies_sent, group, sent };
                let [q, scale] =
                    cx.backend.dispatch_codes(&op, &codes.q, &codes.scale, &plan.rows)?;
                Ok(Operand::Codes(Codes { q, scale, ..*codes }))
            }
            Operand::Codes(codes) => {
                let scale = match codes.block[0] {
                    Some(1) => rows(&codes.scale)?,
                    _ => codes.scale.clone(),
                };
                Ok(Operand::Codes(Codes { q: rows(&codes.q)?, scale, ..*codes }))
            }
        }
    }

    /// The step's balance losses over whole sequences, and each part's rows of their gradients for
    /// the affinities; the losses stand with the first part.
    fn balances<B: Backend>(
        &self,
        cxs: &[Cx<'_, B>],
        routed: &[[B::Buffer; 3]],
    ) -> Result<Vec<BalanceKept<B>>> {
        let cx = &cxs[0];
        let context = match &cx.rows.context {
            Some(context) if !cx.balance.is_empty() => context,
            _ => {
                let each = cxs.iter().zip(routed);
                return each
                    .map(|(cx, [scores, indices, _])| self.balance(cx, scores, indices))
                    .collect();
            }
        };
        let scores = routed.iter().map(|[scores, ..]| scores.clone()).collect();
        let scores = context.gather(cx.backend, scores)?;
        let BalanceKept { losses, dscores } = self.balance(cx, &scores, &routed[0][1])?;
        let dscores = context.own(cx.backend, dscores.expect("there is a loss"))?;
        let mut losses = Some(losses).filter(|_| context.member == 0);
        let part = |dscores| {
            let losses = losses.take().unwrap_or_default();
            BalanceKept { losses, dscores: Some(dscores) }
        };
        Ok(dscores.into_iter().map(part).collect())
    }

    /// The balance losses of `scores`, those of whole sequences, and the sum of their gradients.
    fn balance<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        scores: &B::Buffer,
        indices: &B::Buffer,
    ) -> Result<BalanceKept<B>> {
        let (mut losses, mut sum) = (Vec::new(), None);
        for &Balance { kind, weight } in cx.balance {
            let sequences = || cx.rows.whole_segments().to_vec();
            let (segments, devices, chosen) = match kind {
                BalanceKind::Sequence => (sequences(), self.experts, None),
                BalanceKind::Batch => (vec![sequences().iter().sum()], self.experts, None),
                BalanceKind::Expert => (sequences(), self.experts, Some(indices)),
                BalanceKind::Device { devices } => (sequences(), devices, Some(indices)),
            };
            if chosen.is_some() {
                self.whole_only(cx, "balance_loss")?;
            }
            let op = BalanceLoss { top_k: self.router.top_k, weight, segments, devices };
            let [loss, dscores] = cx.backend.balance_loss(&op, scores, chosen)?;
            losses.push(loss);
            sum = Some(match sum {
                Some(sum) => {
                    cx.backend.add(&Add { out: cx.recipe.master() }, &sum, &dscores, None)?
                }
                None => dscores,
            });
        }
        Ok(BalanceKept { losses, dscores: sum })
    }

    /// The experts on the rows of all micro-batches: each one's part of the outputs.
    pub(super) fn mlp<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        routed: &[&(Operand<B>, B::Buffer)],
        kept: &mut [&mut MoeKept<B>],
    ) -> Result<Vec<B::Buffer>> {
        let received = kept.iter().map(|kept| &kept.plan.received);
        let ranks = cx.rows.context.as_ref().map_or(1, |context| context.group.size);
        let union = Union::new(received, Parts { ranks, each: cx.parts() });
        let counts = union.counts();
        let x = union.join_operands(cx, routed.iter().map(|(x, _)| x))?;
        let row_weights = union.join(cx.backend, routed.iter().map(|(_, weights)| weights))?;
        let hidden = self.gate_up.fprop(cx, &x, counts)?;
        let act =
            cx.swiglu(&Operand::Plain(hidden.clone()), Some(&row_weights), self.down.weight)?;
        let act = cx.by_row(act)?;
        let y = self.down.fprop(cx, &act, counts)?;
        let parts = union.split(cx.backend, y)?;
        let hidden = cx.keep_swiglu_input(&hidden)?;
        let act = (!cx.recipe.recompute_swiglu).then_some(act);
        let (dy, dhidden) = (None, None);
        kept[0].experts = Some(ExpertsKept { union, x, row_weights, hidden, act, dy, dhidden });
        Ok(parts)
    }

    /// Gradient of the experts' rows, given that of the combined output: each micro-batch's part.
    pub(super) fn mlp_backward<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        kept: &mut [&mut MoeKept<B>],
        dy: &[Operand<B>],
    ) -> Result<Vec<B::Buffer>> {
        let mut experts = kept[0].experts.take().expect("forward comes first");
        let union = &experts.union;
        let dy = union.join_operands(cx, dy.iter())?;
        let counts = union.counts();
        let dact = self.down.dgrad(cx, &dy, counts)?;
        let (hidden, weights) = (&experts.hidden, Some(&experts.row_weights));
        let gradient = cx.swiglu_backward(&dact, hidden, weights, self.gate_up.weight)?;
        let (dhidden, dweights) = (gradient.dx, gradient.dweight);
        let dx = self.gate_up.dgrad(cx, &cx.by_row(gradient.operand)?, counts)?;
        let parts = union.split(cx.backend, dx)?;
        for (kept, dweights) in kept.iter_mut().zip(union.split(cx.backend, dweights)?) {
            kept.dweights = Some(dweights);
        }
        (experts.dy, experts.dhidden) = (Some(dy), Some(Operand::Plain(dhidden)));
        kept[0].experts = Some(experts);
        Ok(parts)
    }

    /// Gradient of the normalised rows: through the experts and through the gate.
    pub(super) fn dispatch_backward<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        kept: &mut MoeKept<B>,
        dx: &B::Buffer,
    ) -> Result<[B::Buffer; 2]> {
        let (backend, plan) = (cx.backend, &kept.plan);
        let routed = self.combine(cx, plan, dx)?;
        let dweights = kept.dweights.take().expect("backward of mlp comes first");
        let dweights =
            backend.combine(&self.combine_op(cx, plan, true), &dweights, &plan.inverse)?;
        let Router { score, normalize, scale, .. } = self.router;
        let op = RouterBackward { score, normalize, scale };
        let dscores = kept.balance.dscores.as_ref();
        let dlogits =
            backend.router_backward(&op, &dweights, &kept.scores, &kept.indices, dscores)?;
        let op = Gemm { layout: Layout::Nn, out: cx.recipe.master(), segments: Vec::new() };
        let gate = backend.gemm(&op, &dlogits, cx.master(self.gate.weight), None)?;
        kept.dlogits = Some(dlogits);
        Ok([routed, gate])
    }

    pub(super) fn backward_weight<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        kept: MoeKept<B>,
        n: &B::Buffer,
    ) -> Result<()> {
        if let Some(experts) = kept.experts {
            self.experts_backward_weight(cx, experts)?;
        }
        let dlogits = kept.dlogits.expect("input-backward comes first");
        let out = cx.recipe.master();
        let gate_input = cx.backend.cast(&Cast { out }, n)?;
        let op = Gemm { layout: Layout::Tn, out, segments: Vec::new() };
        cx.accumulate(self.gate.weight, |acc| {
            cx.backend.gemm(&op, &dlogits, &gate_input, Some(acc))
        })
    }

    fn experts_backward_weight<B: Backend>(
        &self,
        cx: &Cx<'_, B>,
        kept: ExpertsKept<B>,
    ) -> Result<()> {
        let ready = "input-backward comes first";
        let (dy, dhidden) = (kept.dy.expect(ready), kept.dhidden.expect(ready));
        let counts = kept.union.counts();
        let act = match kept.act {
            Some(act) => act,
            None => cx.swiglu(&kept.hidden, Some(&kept.row_weights), self.down.weight)?,
        };
        self.down.wgrad(cx, &act, &dy, counts)?;
        self.gate_up.wgrad(cx, &kept.x, &dhidden, counts)
    }
}
