//! [`Spending`]: what a run has spent and may still spend, and the bound of both (`--max-cost`).

use super::{Money, Price};
use crate::{args::CostArgs, input::Request};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Notify;

/// The money of a run: what its finished requests have cost, and what those that are under way will cost at most.
///
/// Before a request is submitted, its estimate is [reserved](Self::reserve), or the mean cost of the finished requests if
/// that is more: a request may set no bound of its output. So the bound is exceeded only where requests cost more.
#[derive(Debug)]
pub(crate) struct Spending {
    price: Price,
    bound: Option<Money>,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    spent: Money,
    expected: Money,
    under_way: u64,
    /// The number of requests that have cost something.
    paid: u64,
}

/// The estimate of a request that is under way. Dropping it takes the estimate back.
#[derive(Debug)]
pub(crate) struct Expected {
    spending: Arc<Spending>,
    estimate: Money,
    cost: Option<Money>,
}

impl Spending {
    /// `None` if the command line gives no prices.
    pub(crate) fn of(args: &CostArgs) -> Option<Arc<Self>> {
        args.price().map(|price| Self::new(price, args.max_cost))
    }

    pub(crate) fn new(price: Price, bound: Option<Money>) -> Arc<Self> {
        Arc::new(Self {
            price,
            bound,
            state: Mutex::default(),
            changed: Notify::new(),
        })
    }

    /// Waits until the estimate of the request fits below the bound, beside what is spent and under way, and reserves
    /// it. `None` if it will not fit, because no other request is under way that could turn out cheaper.
    ///
    /// # Cancel safety
    ///
    /// A future that is dropped has reserved nothing.
    pub(crate) async fn reserve(self: &Arc<Self>, request: &Request) -> Option<Expected> {
        let own_estimate = self.price.estimate(request);
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            // Registered before the check, so that a change between the check and the wait is not missed.
            changed.as_mut().enable();
            {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                let estimate = own_estimate.max(state.mean_cost());
                let sum = state.spent + state.expected + estimate;
                if self.bound.is_none_or(|bound| sum <= bound) {
                    state.expected += estimate;
                    state.under_way += 1;
                    return Some(Expected {
                        spending: self.clone(),
                        estimate,
                        cost: None,
                    });
                }
                if state.under_way == 0 {
                    return None;
                }
            }
            changed.await;
        }
    }

    /// What the finished requests have cost. A request whose answer reports no usage counts with its estimate if it
    /// was sent.
    pub(crate) fn spent(&self) -> Money {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).spent
    }

    /// Returns by how much the finished requests exceed the bound. `None` without a bound, or while they do not.
    pub(crate) fn overshoot(&self) -> Option<Money> {
        let over = self.spent().above(self.bound?);
        (!over.is_zero()).then_some(over)
    }

    /// Why the run stops when [`reserve`](Self::reserve) returns `None`, or when there is an
    /// [`overshoot`](Self::overshoot).
    pub(crate) fn stop_reason(&self) -> String {
        let (spent, bound) = (self.spent(), self.bound.unwrap_or_default());
        match self.overshoot() {
            Some(over) => format!(
                "--max-cost {bound} is reached: {spent} spent, {over} above it, because requests cost more than estimated"
            ),
            None => format!("--max-cost {bound} is reached: {spent} spent, and the next request could exceed it"),
        }
    }
}

// === impl State ===

impl State {
    fn mean_cost(&self) -> Money {
        self.spent.shared_by(self.paid)
    }
}

// === impl Expected ===

impl Expected {
    pub(crate) fn price(&self) -> &Price {
        &self.spending.price
    }

    /// Replaces the estimate by the cost of the finished request: that which its answer reports, or the estimate if the
    /// request was answered without a report. Returns why the run has to stop if the bound is exceeded.
    pub(crate) fn settle(mut self, cost: Option<Money>, was_answered: bool) -> Option<String> {
        self.cost = cost.or_else(|| was_answered.then_some(self.estimate));
        let spending = self.spending.clone();
        drop(self);
        spending.overshoot().map(|_| spending.stop_reason())
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        let mut state = self.spending.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.expected = state.expected.above(self.estimate);
        state.under_way -= 1;
        if let Some(cost) = self.cost {
            state.spent += cost;
            state.paid += 1;
        }
        drop(state);
        self.spending.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderMap, Method};
    use std::time::Duration;
    use tokio::time::timeout;
    use tower_outbound::Cost;

    fn spending(bound: &str) -> Arc<Spending> {
        let price = |text: &str| text.parse().unwrap();
        let price = Price {
            input: price("1"),
            cached_input: price("1"),
            output: price("10"),
        };
        Spending::new(price, Some(bound.parse().unwrap()))
    }

    /// A request that is estimated to cost 6: a million tokens of input, and half a million of output.
    fn request() -> Request {
        Request {
            admitted: None,
            line: 1,
            custom_id: None,
            metadata: None,
            hash: 0,
            tokens: 1_500_000,
            own_cost: Cost::none(),
            method: Method::POST,
            url: None,
            headers: HeaderMap::new(),
            body: r#"{"max_tokens":500000}"#.into(),
        }
    }

    fn money(text: &str) -> Money {
        text.parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_waits_for_those_that_may_turn_out_cheaper() {
        let spending = spending("10");
        let first = spending.reserve(&request()).await.unwrap();
        assert!(
            timeout(Duration::from_secs(1), spending.reserve(&request()))
                .await
                .is_err()
        );
        // The first one has cost 4 and not 6, so there is room for another 6.
        assert_eq!(first.settle(Some(money("4")), true), None);
        let second = timeout(Duration::from_secs(1), spending.reserve(&request()))
            .await
            .unwrap();
        assert!(second.is_some());
        assert_eq!(spending.spent(), money("4"));
    }

    #[tokio::test]
    async fn a_request_that_could_exceed_the_bound_is_not_sent() {
        let spending = spending("10");
        assert_eq!(spending.reserve(&request()).await.unwrap().settle(None, true), None);
        assert!(spending.reserve(&request()).await.is_none());
        assert_eq!(
            spending.stop_reason(),
            "--max-cost 10.00 is reached: 6.00 spent, and the next request could exceed it"
        );
    }

    #[tokio::test]
    async fn a_request_that_costs_more_than_estimated_is_an_overshoot() {
        let spending = spending("10");
        let expected = spending.reserve(&request()).await.unwrap();
        let reason =
            "--max-cost 10.00 is reached: 12.50 spent, 2.50 above it, because requests cost more than estimated";
        assert_eq!(expected.settle(Some(money("12.5")), true).unwrap(), reason);
        assert_eq!(spending.overshoot(), Some(money("2.5")));
        assert!(spending.reserve(&request()).await.is_none());
    }

    #[tokio::test]
    async fn a_request_without_a_bound_of_its_output_counts_as_the_mean_of_those_before() {
        let unbounded = Request {
            tokens: 0,
            body: "{}".into(),
            ..request()
        };
        let spending = spending("10");
        let first = spending.reserve(&unbounded).await.unwrap();
        assert_eq!(first.settle(Some(money("6")), true), None);
        assert!(spending.reserve(&unbounded).await.is_none());
    }

    #[tokio::test]
    async fn a_request_that_was_not_answered_costs_nothing() {
        let spending = spending("10");
        drop(spending.reserve(&request()).await);
        assert_eq!(spending.reserve(&request()).await.unwrap().settle(None, false), None);
        assert!(spending.spent().is_zero());
    }
}
