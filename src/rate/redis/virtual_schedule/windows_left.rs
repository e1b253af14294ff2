//! [`WindowsLeft`]: what was left of the windows of the calendar when a stored state began.

use crate::rate::{bucket::Bucket, budget::Budget};

/// What was left of the windows of the calendar when a state began: for each bucket, when the window ends that this is true
/// of, and the balance. Of a later window, the whole amount was left.
#[derive(Clone, Debug, Default)]
pub(super) struct WindowsLeft(Vec<(i64, i128)>);

impl WindowsLeft {
    pub(super) fn record(&mut self, buckets: &[(Budget, Bucket)], at: i64) {
        let buckets = buckets.iter();
        self.0 = buckets
            .map(|(_, bucket)| (window_end(bucket, at), bucket.balance()))
            .collect();
    }

    /// Lowers the buckets by as much as less was `left` of them in a lost state than this one began with.
    pub(super) fn lower(&mut self, buckets: &mut [(Budget, Bucket)], left: &[i128], at: i64) {
        let buckets = buckets.iter_mut().map(|(_, bucket)| bucket);
        for ((bucket, (ends, began_with)), left) in buckets.zip(&mut self.0).zip(left) {
            if bucket.until_window_ends().is_none() {
                continue;
            }
            let present = window_end(bucket, at);
            if *ends != present {
                (*ends, *began_with) = (present, bucket.capacity());
            }
            if left < began_with {
                bucket.charge_lost(*began_with - left);
                *began_with = *left;
            }
        }
    }
}

fn window_end(bucket: &Bucket, at: i64) -> i64 {
    bucket.until_window_ends().map_or(0, |ticks| at + ticks as i64)
}
