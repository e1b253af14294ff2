//! [`Answers`]: the lengths of the last answers of each model, and a quantile of them.

use crate::rate::CallKind;
use std::collections::HashMap;

/// The answers of each model, and of all calls whose model is not told or is one too many.
#[derive(Default)]
pub(super) struct Answers {
    models: HashMap<CallKind, Box<LastAnswers>>,
    others: LastAnswers,
}

/// The last answers of one model, in tokens.
struct LastAnswers {
    ring: [u64; RING],
    /// Where the next answer is put.
    next: usize,
    /// How many answers there are in the ring.
    seen: usize,
    /// The quantile of the answers in the ring. `None` until there are enough.
    quantile: Option<u64>,
}

/// The number of models whose answers are kept apart. They are about a kilobyte each, and a program that takes the names
/// of models from its users must not grow with them.
pub(super) const MAX_MODELS: usize = 64;
/// The number of answers that are kept of a model.
const RING: usize = 128;
/// The number of answers from which on the quantile is used.
const ENOUGH: usize = 20;

// === impl Answers ===

impl Answers {
    /// Returns the quantile of the answers of this model, or of those of all other calls if none was kept of it. `None`
    /// until there are enough.
    pub(super) fn quantile(&self, model: Option<CallKind>) -> Option<u64> {
        let own = model.and_then(|model| self.models.get(&model));
        own.map_or(&self.others, |own| own).quantile
    }

    /// Adds an answer of this model, whose `quantile`, above 0 and at most 1, is computed anew.
    pub(super) fn add(&mut self, model: Option<CallKind>, answer: u64, quantile: f64) {
        let has_room = self.models.len() < MAX_MODELS;
        let own = model.filter(|model| has_room || self.models.contains_key(model));
        let answers = match own {
            Some(model) => self.models.entry(model).or_default(),
            None => &mut self.others,
        };
        answers.add(answer, quantile);
    }
}

// === impl LastAnswers ===

impl LastAnswers {
    fn add(&mut self, answer: u64, quantile: f64) {
        self.ring[self.next] = answer;
        self.next = (self.next + 1) % RING;
        self.seen = (self.seen + 1).min(RING);
        let seen = self.seen;
        if seen >= ENOUGH {
            let mut answers = self.ring;
            let answers = &mut answers[..seen];
            let rank = (quantile * seen as f64).ceil() as usize;
            let (_, at_rank, _) = answers.select_nth_unstable(rank.clamp(1, seen) - 1);
            self.quantile = Some(*at_rank);
        }
    }
}

impl Default for LastAnswers {
    fn default() -> Self {
        Self {
            ring: [0; RING],
            next: 0,
            seen: 0,
            quantile: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_beyond_the_bound_share_their_answers_and_take_no_more_memory() {
        let mut answers = Answers::default();
        let model = |number: usize| Some(CallKind::of(&format!("model-{number}")));
        for number in 0..10 * MAX_MODELS {
            for _ in 0..ENOUGH {
                answers.add(model(number), number as u64, 1.0);
            }
        }
        assert_eq!(answers.models.len(), MAX_MODELS);
        assert_eq!(answers.quantile(model(3)), Some(3));
        let last = 10 * MAX_MODELS - 1;
        for shared in [model(MAX_MODELS), model(last), model(10 * last), None] {
            assert_eq!(answers.quantile(shared), Some(last as u64));
        }
    }

    #[test]
    fn a_model_with_few_answers_has_no_quantile_whatever_others_have() {
        let mut answers = Answers::default();
        for _ in 0..ENOUGH {
            answers.add(None, 7, 1.0);
        }
        let model = Some(CallKind::of("new"));
        assert_eq!(answers.quantile(model), Some(7));
        answers.add(model, 900, 1.0);
        assert_eq!(answers.quantile(model), None);
    }
}
