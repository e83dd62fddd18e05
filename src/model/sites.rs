//! The sites of a block, its distinct linear inputs, and the linears that each feeds.

use super::spec::{BlockSpec, FusedLayout, LayerSpec, MixtureSpec};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// A distinct input of a block, named by the linears that it feeds. In the order in which a block reaches them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SiteKind {
    /// Input of q, k and v: the normed residual. With latent attention, of `q_a_proj` (or `q_proj`) and `kv_a_proj_with_mqa`.
    Qkv,
    /// Input of `q_b_proj`: the queries' normed latent.
    QB,
    /// Input of `kv_b_proj`: the normed latent of keys and values.
    KvB,
    /// Input of the attention's output projection.
    O,
    /// Input of gate and up: the normed residual. In a mixture, of the gates and ups of all experts, shared and routed.
    GateUp,
    /// Input of the MLP's down projection; in a mixture, of the shared expert's.
    Down,
    /// Input of a routed expert's down projection: only the tokens that were sent to it.
    ExpertDown(u32),
}

/// A linear of a block, by the name it has below `layers.{i}.`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearSpec {
    /// `self_attn.q_proj`, `mlp.experts.3.up_proj`, …
    pub name: Cow<'static, str>,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
    /// For a routed expert: where its weight lies in checkpoints without a tensor of that name.
    pub fused: Option<FusedSlice>,
}

/// A linear's share of a tensor that holds it for all experts. A bias lies alike in `{tensor}_bias`, `[experts, rows * parts]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FusedSlice {
    /// `mlp.experts.gate_up_proj`, below `layers.{i}.`
    pub tensor: String,
    /// The expert, of so many.
    pub expert: usize,
    /// Experts in the tensor.
    pub experts: usize,
    /// Which of the linears that the tensor joins, of so many: gate is 0 of 2, up 1 of 2, down 0 of 1.
    pub part: usize,
    /// Linears that the tensor joins.
    pub parts: usize,
    /// How they are joined.
    pub layout: FusedLayout,
}

impl LinearSpec {
    fn plain(name: &'static str, rows: usize, columns: usize) -> Self {
        Self {
            name: name.into(),
            rows,
            columns,
            fused: None,
        }
    }
}

impl MixtureSpec {
    /// Gate, up and down of a routed expert, for a residual of `hidden` channels.
    pub fn expert_linears(&self, hidden: usize, expert: usize) -> [LinearSpec; 3] {
        let names = &self.names[0];
        let linear = |which: usize| {
            let down = which == 2;
            let (rows, columns) = match down {
                true => (hidden, self.intermediate_size),
                false => (self.intermediate_size, hidden),
            };
            let tensor = if down { "down_proj" } else { "gate_up_proj" };
            LinearSpec {
                name: format!("{}.{expert}.{}", names.experts, names.projections[which]).into(),
                rows,
                columns,
                fused: Some(FusedSlice {
                    tensor: format!("{}.{tensor}", names.experts),
                    expert,
                    experts: self.routing.experts,
                    part: which % 2,
                    parts: if down { 1 } else { 2 },
                    layout: names.fused,
                }),
            }
        };
        [linear(0), linear(1), linear(2)]
    }

    /// Gate, up and down of the shared expert, if there is one.
    pub fn shared_linears(&self, hidden: usize) -> Option<[LinearSpec; 3]> {
        let inner = self.shared?.intermediate_size;
        let linear = |projection: &str, rows, columns| LinearSpec {
            name: format!("{}.{projection}", self.names[0].shared).into(),
            rows,
            columns,
            fused: None,
        };
        Some([
            linear("gate_proj", inner, hidden),
            linear("up_proj", inner, hidden),
            linear("down_proj", hidden, inner),
        ])
    }
}

impl BlockSpec {
    /// The mixture of a layer, if its MLP is one.
    pub fn mixture_of(&self, layer: &LayerSpec) -> Option<&MixtureSpec> {
        self.mixture.as_ref().filter(|_| layer.mixture)
    }

    /// The sites of a layer, in the order in which it reaches them.
    pub fn sites(&self, layer: &LayerSpec) -> Vec<SiteKind> {
        let mut sites = vec![SiteKind::Qkv];
        if let Some(mla) = &self.mla {
            sites.extend(mla.q_lora_rank.map(|_| SiteKind::QB));
            sites.push(SiteKind::KvB);
        }
        sites.extend([SiteKind::O, SiteKind::GateUp]);
        match self.mixture_of(layer) {
            None => sites.push(SiteKind::Down),
            Some(mixture) => {
                sites.extend(mixture.shared.map(|_| SiteKind::Down));
                sites.extend((0..mixture.routing.experts as u32).map(SiteKind::ExpertDown));
            }
        }
        sites
    }

    /// The linears that the input at `site` feeds; none where the layer has no such site. A mixture's `gate_up` feeds the shared expert's
    /// gate and up, then gate and up of each routed expert.
    pub fn linears(&self, layer: &LayerSpec, site: SiteKind) -> Vec<LinearSpec> {
        let linear = LinearSpec::plain;
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let mixture = self.mixture_of(layer);
        match (site, &self.mla, mixture) {
            (SiteKind::Qkv | SiteKind::QB | SiteKind::KvB | SiteKind::O, ..) => self.attention_linears(site),
            (SiteKind::GateUp, _, Some(mixture)) => {
                let pair = |[gate, up, _]: [LinearSpec; 3]| [gate, up];
                let shared = mixture.shared_linears(hidden).map(pair);
                let routed = (0..mixture.routing.experts).map(|e| pair(mixture.expert_linears(hidden, e)));
                shared.into_iter().chain(routed).flatten().collect()
            }
            (SiteKind::Down, _, Some(mixture)) => {
                let shared = mixture.shared_linears(hidden);
                shared.map(|[_, _, down]| down).into_iter().collect()
            }
            (SiteKind::ExpertDown(expert), _, Some(mixture)) => {
                let [_, _, down] = mixture.expert_linears(hidden, expert as usize);
                vec![down]
            }
            (SiteKind::ExpertDown(_), _, None) => Vec::new(),
            (SiteKind::GateUp, _, None) if self.fused_gate_up => {
                vec![linear("mlp.gate_up_proj", 2 * inner, hidden)]
            }
            (SiteKind::GateUp, _, None) => vec![
                linear("mlp.gate_proj", inner, hidden),
                linear("mlp.up_proj", inner, hidden),
            ],
            (SiteKind::Down, _, None) => vec![linear("mlp.down_proj", hidden, inner)],
        }
    }

    fn attention_linears(&self, site: SiteKind) -> Vec<LinearSpec> {
        let linear = LinearSpec::plain;
        let hidden = self.hidden_size;
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match (site, &self.mla) {
            (SiteKind::Qkv, Some(mla)) => vec![
                match mla.q_lora_rank {
                    Some(rank) => linear("self_attn.q_a_proj", rank, hidden),
                    None => linear("self_attn.q_proj", q, hidden),
                },
                linear(
                    "self_attn.kv_a_proj_with_mqa",
                    mla.kv_lora_rank + mla.qk_rope_head_dim,
                    hidden,
                ),
            ],
            (SiteKind::QB, Some(mla)) => {
                let q_b = |rank| linear("self_attn.q_b_proj", q, rank);
                mla.q_lora_rank.map(q_b).into_iter().collect()
            }
            (SiteKind::KvB, Some(mla)) => {
                let rows = self.heads * (mla.qk_nope_head_dim + mla.v_head_dim);
                vec![linear("self_attn.kv_b_proj", rows, mla.kv_lora_rank)]
            }
            (SiteKind::O, _) => vec![linear("self_attn.o_proj", hidden, self.site_width_o())],
            (SiteKind::Qkv, None) if self.fused_qkv => {
                vec![linear("self_attn.qkv_proj", q + 2 * kv, hidden)]
            }
            (SiteKind::Qkv, None) => vec![
                linear("self_attn.q_proj", q, hidden),
                linear("self_attn.k_proj", kv, hidden),
                linear("self_attn.v_proj", kv, hidden),
            ],
            _ => Vec::new(),
        }
    }

    fn site_width_o(&self) -> usize {
        self.heads * self.mla.map_or(self.head_dim, |mla| mla.v_head_dim)
    }

    /// Width of the input at `site`; 0 where the layer has no such site.
    pub fn site_width(&self, layer: &LayerSpec, site: SiteKind) -> usize {
        match site {
            // Not by its linears: a mixture's are many.
            SiteKind::GateUp => self.hidden_size,
            site => self
                .linears(layer, site)
                .first()
                .map_or(0, |linear| linear.columns),
        }
    }
}
