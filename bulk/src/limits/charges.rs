//! [`Charges`]: what a request is charged before its answer is known, and what settles that.

use crate::{args::LimitArgs, input::Request, price::Price};
use hyper::body::Bytes;
use tower_outbound::{
    Cost, RateLimiter,
    provider::QuantileEstimate,
    rate::{Budget, ByExtension, ByUsage, CallKind, RequestCost, UsedCost},
    retry::never_sent,
};

/// Charges a request what its line declares, and settles what its answer reports.
///
/// With `--estimate-quantile`, an answer is estimated by those before of the same model, in place of the longest one that
/// its request allows.
#[derive(Clone, Debug)]
pub(crate) struct Charges {
    limiter: RateLimiter,
    settlement: ByUsage,
    quantile: Option<QuantileEstimate>,
}

/// Returns what a request takes of each budget, as far as its line tells: its tokens, with the longest answer that it
/// allows, and what it takes of the user's own budgets.
pub(crate) fn cost_of(request: &Request) -> Cost {
    let own = request.own_cost.amounts();
    own.fold(Price::tokens_apart(request), |cost, (budget, amount)| {
        cost.with(budget, amount)
    })
}

// === impl Charges ===

impl Charges {
    pub(crate) fn new(limiter: RateLimiter, args: &LimitArgs) -> anyhow::Result<Self> {
        // A request that was never sent is refunded as a whole.
        let settlement = ByUsage::default().unless_sent(never_sent);
        let quantile = args.estimate_quantile.map(QuantileEstimate::new).transpose()?;
        Ok(Self {
            quantile: quantile.map(|quantile| quantile.settlement(settlement.clone())),
            limiter,
            settlement,
        })
    }
}

impl RequestCost<http::Request<Bytes>> for Charges {
    fn cost(&self, request: &http::Request<Bytes>) -> Cost {
        let declared = ByExtension.cost(request);
        let learned = self.quantile.as_ref().and_then(|quantile| {
            let kind = quantile.kind(request);
            kind.map_or_else(|| quantile.answer(), |model| quantile.answer_of(model))
        });
        let Some(answer) = learned else { return declared };
        // A request that sets no bound of its answer declares nothing for it.
        let output = match declared.output_tokens {
            0 => answer,
            longest => answer.min(longest),
        };
        let prompt = declared.tokens.saturating_sub(declared.output_tokens);
        let estimated = declared
            .with(Budget::Tokens, prompt.saturating_add(output))
            .with(Budget::OutputTokens, output);
        // What is learned fails no request whose line declares less.
        match self.limiter.check(estimated) {
            Ok(()) => estimated,
            Err(_) => declared,
        }
    }

    fn kind(&self, request: &http::Request<Bytes>) -> Option<CallKind> {
        self.quantile.as_ref()?.kind(request)
    }

    fn prepare(&self, request: &mut http::Request<Bytes>) -> bool {
        self.quantile.as_ref().is_some_and(|quantile| quantile.prepare(request))
    }
}

impl<R> UsedCost<http::Response<R>> for Charges {
    fn used(&self, charged: Cost, result: Result<&http::Response<R>, &tower::BoxError>) -> Option<Cost> {
        self.used_by_kind(None, charged, result)
    }

    fn used_by_kind(
        &self,
        kind: Option<CallKind>,
        charged: Cost,
        result: Result<&http::Response<R>, &tower::BoxError>,
    ) -> Option<Cost> {
        match &self.quantile {
            Some(quantile) => quantile.used_by_kind(kind, charged, result),
            None => self.settlement.used(charged, result),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Args;
    use clap::Parser;
    use http::Response;
    use tower_outbound::{ApiTokensUsed, Limits, Rate, TokenUsage};

    fn charges(more: &[&str]) -> Charges {
        let args = Args::parse_from([&["bulk"], more].concat());
        let limits = Limits::new().tokens(Rate::per_minute(1_000));
        Charges::new(RateLimiter::new(limits).unwrap(), &args.limits).unwrap()
    }

    fn request(model: &str, declared: Cost) -> http::Request<Bytes> {
        let mut request = http::Request::new(format!(r#"{{"model":"{model}"}}"#).into());
        request.extensions_mut().insert(declared);
        request
    }

    fn learn(charges: &Charges, model: &str, output: u64) {
        let request = request(model, Cost::input_output_tokens(10, 500));
        let used = ApiTokensUsed::unknown();
        used.set_usage(TokenUsage::input_output(10, output));
        let response = Response::builder().extension(used).body(()).unwrap();
        for _ in 0..20 {
            let settled = charges.used_by_kind(charges.kind(&request), charges.cost(&request), Ok(&response));
            assert_eq!(settled, Some(Cost::input_output_tokens(10, output)));
        }
    }

    #[test]
    fn an_answer_is_charged_by_those_of_its_model_only_if_asked() {
        for (args, expected) in [(&["--estimate-quantile", "0.9"][..], [20, 400]), (&[], [500, 500])] {
            let charges = charges(args);
            learn(&charges, "short", 20);
            learn(&charges, "long", 400);
            let declared = Cost::input_output_tokens(10, 500).with("images", 2);
            for (model, output) in ["short", "long"].into_iter().zip(expected) {
                let cost = Cost::input_output_tokens(10, output).with("images", 2);
                assert_eq!(charges.cost(&request(model, declared)), cost, "{model}");
            }
        }
    }

    #[test]
    fn a_request_without_a_bound_is_charged_what_is_learned_unless_that_could_never_be_sent() {
        let charges = charges(&["--estimate-quantile", "1"]);
        learn(&charges, "m", 800);
        let cost = |input| charges.cost(&request("m", Cost::input_output_tokens(input, 0)));
        assert_eq!(cost(10), Cost::input_output_tokens(10, 800));
        assert_eq!(cost(201), Cost::input_output_tokens(201, 0));
    }
}
