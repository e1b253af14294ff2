//! Results in the order of the input, for `--ordered`.

use super::Finished;
use crate::input::Admission;
use std::collections::BTreeMap;

/// Holds back results until those of all earlier lines are written.
pub(super) struct Order {
    admission: Admission,
    /// By their line. What they hold of the memory for requests keeps the input from being read further meanwhile.
    held: BTreeMap<u64, Finished>,
}

impl Order {
    pub(super) const fn new(admission: Admission) -> Self {
        Self {
            admission,
            held: BTreeMap::new(),
        }
    }

    pub(super) fn hold(&mut self, finished: Finished) {
        self.held.insert(finished.line(), finished);
    }

    /// Returns the next result, if no earlier line is open. Its place is free from now on, so that the line after it is
    /// the next.
    pub(super) fn next(&mut self) -> Option<Finished> {
        let line = *self.held.first_key_value()?.0;
        if self.admission.is_open_before(line) {
            return None;
        }
        self.rest()
    }

    /// Returns the next result, whatever is open: at the end, when nothing can come any more.
    pub(super) fn rest(&mut self) -> Option<Finished> {
        let (_, mut finished) = self.held.pop_first()?;
        finished.release();
        Some(finished)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::{Malformed, Request};

    async fn finished(admission: &Admission, line: u64) -> Finished {
        let mut request = Request::example(line);
        admission.admit(&mut request).await;
        Finished::unsent(request)
    }

    #[tokio::test]
    async fn a_result_waits_for_those_of_earlier_lines() {
        let admission = Admission::new(1 << 20, true);
        let mut order = Order::new(admission.clone());
        let one = finished(&admission, 1).await;
        let two = finished(&admission, 2).await;
        // Line 3 is malformed. Line 4 was completed by an earlier run.
        let five = finished(&admission, 5).await;
        let lines =
            |order: &mut Order| -> Vec<u64> { std::iter::from_fn(|| order.next()).map(|one| one.line()).collect() };
        order.hold(five);
        order.hold(Finished::malformed(Malformed::example(3)));
        assert!(lines(&mut order).is_empty());
        order.hold(one);
        assert_eq!(lines(&mut order), [1]);
        order.hold(two);
        assert_eq!(lines(&mut order), [2, 3, 5]);
    }

    #[tokio::test]
    async fn a_request_that_is_dropped_without_a_result_holds_nothing_back() {
        let admission = Admission::new(1 << 20, true);
        let mut order = Order::new(admission.clone());
        let one = finished(&admission, 1).await;
        order.hold(finished(&admission, 2).await);
        assert!(order.next().is_none());
        drop(one);
        assert_eq!(order.next().map(|finished| finished.line()), Some(2));
    }
}
