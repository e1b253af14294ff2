//! [`OwnBudgets`]: budgets with a name of the user's own, such as images, and what a request takes of them.

use crate::{args::LimitArgs, input::Fields};
use anyhow::ensure;
use serde_json::value::RawValue;
use std::{fmt, str::FromStr};
use tower_outbound::{Cost, rate::Budget};

/// The field of a line that holds what its request takes of the budgets of the user's own.
pub(crate) const COST_FIELD: &str = "cost";

/// The header in which the local provider is told what a request takes of these budgets. Real providers find it in the
/// request itself, and are not sent this header.
pub(crate) const LOCAL_COST: &str = "x-local-cost";

/// The largest number of budgets of the user's own: a cost has room for no more.
const MAX_OWN: usize = 4;

/// The budgets of `--budget` that are not built in, and what a request takes of each whose line does not tell.
#[derive(Clone, Debug, Default)]
pub(crate) struct OwnBudgets(Vec<(Budget, u64)>);

/// What a request takes of a budget if its line does not tell (`--budget-default`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct DefaultAmount {
    budget: Budget,
    amount: u64,
}

// === impl OwnBudgets ===

impl OwnBudgets {
    pub(crate) fn of(args: &LimitArgs) -> Self {
        let mut own = Self::default();
        for budget in args.budget.iter().map(|rate| rate.budget) {
            if matches!(budget, Budget::Named(_)) && !own.has(budget) && own.0.len() < MAX_OWN {
                let given = args.budget_default.iter().find(|default| default.budget == budget);
                own.0.push((budget, given.map_or(1, |default| default.amount)));
            }
        }
        own
    }

    /// Checks that there are not too many, and that each default amount is one of them.
    pub(super) fn check(args: &LimitArgs) -> anyhow::Result<()> {
        let own = Self::of(args);
        for rate in &args.budget {
            let is_own = matches!(rate.budget, Budget::Named(_));
            ensure!(
                !is_own || own.has(rate.budget),
                "--budget: at most {MAX_OWN} budgets with names of your own"
            );
        }
        for DefaultAmount { budget, .. } in &args.budget_default {
            ensure!(
                own.has(*budget),
                "--budget-default: `{budget}` is no budget with a name of your own that --budget limits"
            );
        }
        Ok(())
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn budgets(&self) -> impl Iterator<Item = Budget> + '_ {
        self.0.iter().map(|(budget, _)| *budget)
    }

    /// Returns what a request takes of these budgets, by the field [`COST_FIELD`] of its line, and nothing of any other.
    ///
    /// # Errors
    ///
    /// What is wrong with the field, by its name, and that of the budget.
    pub(crate) fn cost(&self, field: Option<&RawValue>) -> Result<Cost, String> {
        let mut cost = self
            .0
            .iter()
            .fold(Cost::none(), |cost, (budget, amount)| cost.with(*budget, *amount));
        // Tools that write tables as JSON write `null` for what a row does not have.
        let Some(field) = field.filter(|field| field.get() != "null") else {
            return Ok(cost);
        };
        let amounts = Fields::parse(field.get()).map_err(|_| format!("`{COST_FIELD}` is not an object"))?;
        for name in amounts.names() {
            let own = self.budgets().find(|budget| budget.name() == name);
            let budget = own.ok_or_else(|| {
                let names: Vec<_> = self.budgets().map(Budget::name).collect();
                let name: String = name.chars().take(64).collect();
                format!(
                    "`{COST_FIELD}.{name}` is no budget of --budget, which are: {}",
                    names.join(", ")
                )
            })?;
            let amount = amounts.get(name).and_then(|amount| amount.get().parse().ok());
            let amount = amount.ok_or_else(|| format!("`{COST_FIELD}.{name}` is not a whole number"))?;
            cost = cost.with(budget, amount);
        }
        Ok(cost)
    }

    /// Returns the value of [`LOCAL_COST`] for a request of this cost: `images=2, seconds=0`.
    pub(crate) fn local_cost(&self, cost: &Cost) -> String {
        let amounts = self.budgets().map(|budget| format!("{budget}={}", cost.of(budget)));
        amounts.collect::<Vec<_>>().join(", ")
    }

    fn has(&self, budget: Budget) -> bool {
        self.budgets().any(|own| own == budget)
    }
}

// === impl DefaultAmount ===

impl FromStr for DefaultAmount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, amount) = text.split_once('=').ok_or("must be NAME=N, such as images=2")?;
        Ok(Self {
            budget: budget(name)?,
            amount: amount
                .parse()
                .map_err(|_| "must have a whole number, such as images=2")?,
        })
    }
}

impl fmt::Display for DefaultAmount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.budget, self.amount)
    }
}

/// Returns the budget with this name.
///
/// # Errors
///
/// An error for a name that is not valid, and for one that is that of a built-in budget in another spelling: no request
/// would take anything of it as it was meant.
pub(super) fn budget(name: &str) -> Result<Budget, String> {
    let letters = |name: &str| -> String {
        let letters = name.chars().filter(char::is_ascii_alphanumeric);
        let letters: String = letters.map(|letter| letter.to_ascii_lowercase()).collect();
        letters.trim_end_matches('s').to_owned()
    };
    let built_in = [
        Budget::Requests,
        Budget::Tokens,
        Budget::InputTokens,
        Budget::OutputTokens,
    ];
    let similar = built_in.iter().find(|budget| letters(budget.name()) == letters(name));
    match similar {
        Some(budget) if budget.name() == name => Ok(*budget),
        Some(budget) => Err(format!("`{name}` is no budget: write `{budget}`")),
        None => name.parse().map_err(|_| {
            "the name must be requests, tokens, input_tokens, output_tokens, or one of your own of a-z, 0-9, _, - and ."
                .to_owned()
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Args;
    use clap::Parser;

    fn args(more: &[&str]) -> LimitArgs {
        Args::parse_from([&["bulk"], more].concat()).limits
    }

    fn cost(field: &str) -> Result<Cost, String> {
        let args = args(&[
            "--budget",
            "images=5/min",
            "--budget",
            "images=90/day",
            "--budget",
            "seconds=60/min",
            "--budget-default",
            "seconds=10",
        ]);
        let field = RawValue::from_string(field.to_owned()).unwrap();
        OwnBudgets::of(&args).cost(Some(&field))
    }

    #[test]
    fn a_line_tells_what_its_request_takes_and_the_rest_has_its_default() {
        let expected = |images: u64, seconds: u64| Cost::none().with("images", images).with("seconds", seconds);
        assert_eq!(cost("null"), Ok(expected(1, 10)));
        assert_eq!(cost("{}"), Ok(expected(1, 10)));
        assert_eq!(cost(r#"{"images": 3}"#), Ok(expected(3, 10)));
        assert_eq!(cost(r#"{"seconds":0,"images":2,"images":4}"#), Ok(expected(4, 0)));
        let own = OwnBudgets::of(&args(&["--budget", "images=5/min", "--budget", "seconds=60/min"]));
        assert_eq!(own.local_cost(&expected(4, 0)), "images=4, seconds=0");
    }

    #[test]
    fn what_is_wrong_with_a_cost_is_told_with_its_field() {
        for (field, expected) in [
            ("[2]", "`cost` is not an object"),
            ("2", "`cost` is not an object"),
            (r#"{"images":"2"}"#, "`cost.images` is not a whole number"),
            (r#"{"images":2.5}"#, "`cost.images` is not a whole number"),
            (r#"{"images":-1}"#, "`cost.images` is not a whole number"),
            (
                r#"{"imges":2}"#,
                "`cost.imges` is no budget of --budget, which are: images, seconds",
            ),
            (
                r#"{"tokens":2}"#,
                "`cost.tokens` is no budget of --budget, which are: images, seconds",
            ),
        ] {
            assert_eq!(cost(field).unwrap_err(), expected);
        }
    }

    #[test]
    fn a_name_is_built_in_or_valid_and_no_other_spelling_of_one_that_is_built_in() {
        assert_eq!(budget("input_tokens"), Ok(Budget::InputTokens));
        assert_eq!(budget("images"), Ok(Budget::from("images")));
        for (name, named) in [
            ("input-tokens", "`input_tokens`"),
            ("Token", "`tokens`"),
            ("request", "`requests`"),
            ("Bilder", "a-z"),
            ("", "a-z"),
        ] {
            assert!(budget(name).unwrap_err().contains(named), "{name}");
        }
    }

    #[test]
    fn too_many_names_and_defaults_of_other_budgets_are_refused() {
        let names = ["a", "b", "c", "d", "e"].map(|name| format!("--budget={name}=5/min"));
        let names = names.each_ref().map(String::as_str);
        assert!(OwnBudgets::check(&args(&names[..4])).is_ok());
        assert!(
            OwnBudgets::check(&args(&names))
                .unwrap_err()
                .to_string()
                .contains("at most 4")
        );
        let error = OwnBudgets::check(&args(&["--budget-default", "images=2"])).unwrap_err();
        assert!(error.to_string().contains("`images`"), "{error}");
    }
}
