//! Routing of a mixture of experts: which experts a token is sent to, and with which gates. Scores, group limits and gates follow
//! transformers' routers (`MixtralTopKRouter`, `Qwen2MoeTopKRouter`, `DeepseekV2TopkRouter`, `DeepseekV3TopkRouter`, `GptOssTopKRouter`).

use super::elementwise::softmax;
use std::ops::Range;

/// What DeepSeek-V3 adds to the sum that its gates are divided by.
const GATE_SUM_MIN: f32 = 1e-20;

/// How router logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// Over all experts. With normalized gates this is also "the largest logits first, then softmax over them".
    Softmax,
    /// Of each logit by itself.
    Sigmoid,
}

/// Experts stand in groups of equal size, and a token uses only the best groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupLimit {
    /// Groups; divides the experts.
    pub groups: usize,
    /// Groups that a token may use.
    pub used: usize,
    /// A group's score is the sum of this many best scores in it: 1 (DeepSeek-V2) or 2 (DeepSeek-V3).
    pub best: usize,
}

/// How tokens are routed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoutingRule {
    /// Routed experts.
    pub experts: usize,
    /// Experts that a token is sent to.
    pub experts_per_token: usize,
    /// Scores.
    pub scoring: Scoring,
    /// Whether a token's gates are divided by their sum.
    pub normalize: bool,
    /// Factor on the gates.
    pub scale: f32,
    /// Limit to some groups.
    pub groups: Option<GroupLimit>,
}

/// Where each token goes.
#[derive(Clone, Debug, PartialEq)]
pub struct Routing {
    /// `[tokens, experts_per_token]`, best first.
    pub experts: Vec<u32>,
    /// `[tokens, experts_per_token]`
    pub gates: Vec<f32>,
    /// Experts that each token is sent to.
    pub experts_per_token: usize,
}

impl Routing {
    /// The tokens of each of so many experts.
    ///
    /// # Panics
    /// A token is sent to an expert beyond them.
    pub fn dispatch(&self, experts: usize) -> Dispatch {
        let mut begins = vec![0; experts + 1];
        for &expert in &self.experts {
            begins[expert as usize + 1] += 1;
        }
        for expert in 0..experts {
            begins[expert + 1] += begins[expert];
        }
        let mut next = begins.clone();
        let (mut tokens, mut gates) = (vec![0; self.experts.len()], vec![0.0; self.experts.len()]);
        for (place, (&expert, &gate)) in self.experts.iter().zip(&self.gates).enumerate() {
            let at = &mut next[expert as usize];
            tokens[*at] = (place / self.experts_per_token) as u32;
            gates[*at] = gate;
            *at += 1;
        }
        Dispatch {
            tokens,
            gates,
            begins,
        }
    }
}

/// What each expert is sent, one expert after the other.
#[derive(Clone, Debug, PartialEq)]
pub struct Dispatch {
    /// Tokens, rising within an expert.
    pub tokens: Vec<u32>,
    /// The gate of each.
    pub gates: Vec<f32>,
    /// Where each expert's begin, and where the last one's end.
    begins: Vec<usize>,
}

impl Dispatch {
    /// Where those of some experts are.
    pub fn of(&self, experts: &Range<usize>) -> Range<usize> {
        self.begins[experts.start]..self.begins[experts.end]
    }
}

/// Routes each row of `logits`, `[tokens, experts]` row-major. `correction`, one number an expert, is added to the scores for the choice
/// and not for the gates. Among equal scores the lower expert wins.
///
/// # Panics
/// The slices are not of these shapes, or the rule asks for more experts or groups than there are.
pub fn route(logits: &[f32], correction: Option<&[f32]>, rule: RoutingRule) -> Routing {
    let (experts, per_token) = (rule.experts, rule.experts_per_token);
    assert!(logits.len().is_multiple_of(experts) && per_token <= experts);
    assert!(correction.is_none_or(|bias| bias.len() == experts));
    let tokens = logits.len() / experts;
    let mut routing = Routing {
        experts: Vec::with_capacity(tokens * per_token),
        gates: Vec::with_capacity(tokens * per_token),
        experts_per_token: per_token,
    };
    let mut scores = vec![0f32; experts];
    let mut choice = vec![0f32; experts];
    for row in logits.chunks_exact(experts) {
        scores.copy_from_slice(row);
        match rule.scoring {
            Scoring::Softmax => softmax(&mut scores, 1.0, None, None),
            Scoring::Sigmoid => scores.iter_mut().for_each(|s| *s = 1.0 / (1.0 + (-*s).exp())),
        }
        choice.copy_from_slice(&scores);
        if let Some(bias) = correction {
            choice
                .iter_mut()
                .zip(bias)
                .for_each(|(score, bias)| *score += bias);
        }
        if let Some(limit) = rule.groups {
            keep_best_groups(&mut choice, limit);
        }
        let begin = routing.gates.len();
        for expert in largest(&choice, per_token) {
            routing.experts.push(expert as u32);
            routing.gates.push(scores[expert]);
        }
        let gates = &mut routing.gates[begin..];
        if rule.normalize {
            let sum = gates.iter().sum::<f32>() + GATE_SUM_MIN;
            gates.iter_mut().for_each(|gate| *gate /= sum);
        }
        gates.iter_mut().for_each(|gate| *gate *= rule.scale);
    }
    routing
}

/// Makes the scores outside of the best groups smaller than any other.
fn keep_best_groups(scores: &mut [f32], limit: GroupLimit) {
    assert!(scores.len().is_multiple_of(limit.groups) && limit.used <= limit.groups);
    let size = scores.len() / limit.groups;
    assert!(limit.best <= size);
    let totals: Vec<f32> = scores
        .chunks_exact(size)
        .map(|group| largest(group, limit.best).into_iter().map(|i| group[i]).sum())
        .collect();
    let kept = largest(&totals, limit.used);
    for (group, scores) in scores.chunks_exact_mut(size).enumerate() {
        if !kept.contains(&group) {
            scores.fill(f32::NEG_INFINITY);
        }
    }
}

/// Positions of the `count` largest values, largest first.
fn largest(values: &[f32], count: usize) -> Vec<usize> {
    // One integer to compare: falling values, as `f32::total_cmp` has them, then rising positions, so that the order is total, and an unstable sort
    // has one outcome. A NaN sorts somewhere, too: the logits will show it.
    let key = |(position, value): (usize, &f32)| {
        let bits = value.to_bits() as i32;
        let rising = bits ^ (((bits >> 31) as u32) >> 1) as i32;
        (i64::from(!rising) << 32) | position as i64
    };
    let mut keys: Vec<i64> = values.iter().enumerate().map(key).collect();
    if count < keys.len() {
        keys.select_nth_unstable(count);
        keys.truncate(count);
    }
    keys.sort_unstable();
    keys.into_iter().map(|key| key as u32 as usize).collect()
}

/// `out[tokens[i]] += gates[i] * rows[i]`, where both have rows of `width`.
///
/// # Panics
/// The slices do not have these shapes, or a token is outside of `out`.
pub fn add_gated_rows(out: &mut [f32], rows: &[f32], tokens: &[u32], gates: &[f32], width: usize) {
    assert!(rows.len() == tokens.len() * width && gates.len() == tokens.len());
    for ((row, &token), &gate) in rows.chunks_exact(width).zip(tokens).zip(gates) {
        let begin = token as usize * width;
        for (sum, value) in out[begin..begin + width].iter_mut().zip(row) {
            *sum += gate * value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// f32 against f64: a few roundings of scores that are at most 1.
    const GATE_TOLERANCE: f64 = 1e-5;

    /// The definition in f64: one token, its gate for every expert, 0 where it is not sent.
    fn reference(logits: &[f32], correction: Option<&[f32]>, rule: RoutingRule) -> Vec<f64> {
        let logits: Vec<f64> = logits.iter().map(|&l| f64::from(l)).collect();
        let scores: Vec<f64> = match rule.scoring {
            Scoring::Softmax => {
                let total: f64 = logits.iter().map(|l| l.exp()).sum();
                logits.iter().map(|l| l.exp() / total).collect()
            }
            Scoring::Sigmoid => logits.iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect(),
        };
        let choice: Vec<f64> = (0..rule.experts)
            .map(|e| scores[e] + correction.map_or(0.0, |bias| f64::from(bias[e])))
            .collect();
        // An expert is beaten by those that come before it in the order of falling scores.
        let beaten = |values: &[f64], i: usize| values.iter().filter(|v| **v > values[i]).count();
        let open: Vec<bool> = match rule.groups {
            None => vec![true; rule.experts],
            Some(limit) => {
                let size = rule.experts / limit.groups;
                let totals: Vec<f64> = choice
                    .chunks(size)
                    .map(|group| {
                        let mut sorted = group.to_vec();
                        sorted.sort_by(|a, b| b.total_cmp(a));
                        sorted[..limit.best].iter().sum()
                    })
                    .collect();
                (0..rule.experts)
                    .map(|e| beaten(&totals, e / size) < limit.used)
                    .collect()
            }
        };
        let masked: Vec<f64> = (0..rule.experts)
            .map(|e| if open[e] { choice[e] } else { f64::NEG_INFINITY })
            .collect();
        let chosen: Vec<bool> = (0..rule.experts)
            .map(|e| beaten(&masked, e) < rule.experts_per_token)
            .collect();
        let total: f64 = (0..rule.experts).filter(|&e| chosen[e]).map(|e| scores[e]).sum();
        (0..rule.experts)
            .map(|e| match (chosen[e], rule.normalize) {
                (false, _) => 0.0,
                (true, false) => scores[e] * f64::from(rule.scale),
                (true, true) => scores[e] / total * f64::from(rule.scale),
            })
            .collect()
    }

    proptest! {
        #[test]
        fn matches_the_definition(
            groups in 1usize..5, size in 2usize..5, used in 1usize..5, best in 1usize..3, wanted in 1usize..9,
            limited in any::<bool>(), sigmoid in any::<bool>(), normalize in any::<bool>(), corrected in any::<bool>(),
            scale in 0.5f32..3.0, order in Just((0u32..16).collect::<Vec<_>>()).prop_shuffle(),
            tilt in Just((0u32..16).collect::<Vec<_>>()).prop_shuffle(),
        ) {
            let experts = groups * size;
            let used = used.min(groups);
            let room = if limited { used * size } else { experts };
            let rule = RoutingRule {
                experts, experts_per_token: wanted.min(room),
                scoring: if sigmoid { Scoring::Sigmoid } else { Scoring::Softmax },
                normalize, scale, groups: limited.then_some(GroupLimit { groups, used, best }),
            };
            // A shuffled ladder with uneven steps keeps scores, and their sums by group, apart.
            let step = |i: u32| (i as f32 * 0.37) + (i as f32 * i as f32) * 0.0113 - 3.0;
            let logits: Vec<f32> = order[..experts].iter().map(|&i| step(i)).collect();
            let bias: Vec<f32> = tilt[..experts].iter().map(|&i| step(i) * 0.0517).collect();
            let correction = corrected.then_some(&bias[..]);
            let routing = route(&logits, correction, rule);
            let want = reference(&logits, correction, rule);
            prop_assert_eq!(routing.experts.len(), rule.experts_per_token);
            let dispatch = routing.dispatch(experts);
            for (expert, &want) in want.iter().enumerate() {
                let sent = dispatch.of(&(expert..expert + 1));
                prop_assert!(dispatch.tokens[sent.clone()].iter().all(|&token| token == 0) && sent.len() <= 1);
                let ours = dispatch.gates[sent].first().copied().map_or(0.0, f64::from);
                prop_assert!((ours - want).abs() < GATE_TOLERANCE, "expert {expert}: {ours} != {want}");
            }
        }
    }

    #[test]
    fn ties_go_to_the_lower_expert_and_nan_is_no_panic() {
        let rule = RoutingRule {
            experts: 4,
            experts_per_token: 2,
            scoring: Scoring::Softmax,
            normalize: true,
            scale: 1.0,
            groups: None,
        };
        let routing = route(&[1.0; 8], None, rule);
        assert_eq!(routing.experts, [0, 1, 0, 1]);
        assert_eq!(routing.gates, [0.5; 4]);
        assert_eq!(largest(&[-1.0, 0.0, -0.0, 2.0, -3.0, 2.0], 5), [3, 5, 1, 2, 0]);
        let dispatch = routing.dispatch(4);
        assert_eq!((dispatch.of(&(1..2)), dispatch.of(&(3..4))), (2..4, 4..4));
        assert_eq!(dispatch.of(&(0..4)), 0..4);
        assert_eq!(dispatch.tokens, [0, 1, 0, 1]);
        assert_eq!(route(&[f32::NAN; 4], None, rule).experts.len(), 2);
    }

    #[test]
    fn gated_rows_are_added() {
        let mut out = vec![1.0; 6];
        add_gated_rows(&mut out, &[1.0, 2.0, 3.0, 4.0], &[2, 0], &[10.0, 0.5], 2);
        assert_eq!(out, [2.5, 3.0, 1.0, 1.0, 11.0, 21.0]);
    }
}
