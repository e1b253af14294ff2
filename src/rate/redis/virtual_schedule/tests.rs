//! Tests of the schedule with members that report truthfully what they use.

use super::*;
use crate::rate::{
    cost::Cost,
    limits::{Limits, Rate},
};
use std::time::Duration;

const RATE: i64 = 3;
const BURST: i64 = 40;

/// A member of the quota that reports truthfully what its calls have used, and records when they did.
struct HonestMember {
    request: StoreRequest,
    open: Vec<OpenReservation>,
}

/// A reservation of the simulated member that is not settled yet.
struct OpenReservation {
    admitted_at: i64,
    reserved: u64,
    /// How many tokens the call will turn out to use.
    used: u64,
}

impl HonestMember {
    fn new(number: u8) -> Self {
        // The rate is 3 tokens per 11 microseconds.
        let limits = Limits::new().tokens(Rate::new(RATE, Duration::from_micros(11)).burst(BURST));
        let config = Arc::new(QuotaConfig::new(limits).unwrap());
        let request = StoreRequest {
            max_ahead: 300,
            configured_as: config.text().to_owned(),
            ..StoreRequest::new([number; 16], config)
        };
        Self {
            request,
            open: Vec::new(),
        }
    }

    /// Sends a request when the server's clock shows `now`. Returns what finished calls have used and when, by the
    /// clock `real`, which never jumps.
    fn call(
        &mut self,
        schedule: &mut VirtualSchedule,
        rng: &mut fastrand::Rng,
        now: i64,
        real: i64,
    ) -> Vec<(i64, u64)> {
        let mut used = Vec::new();
        let mut credit = 0;
        self.open.retain(|open| {
            let is_over = open.admitted_at < real && rng.bool();
            if is_over {
                credit += open.reserved - open.used;
                used.push((open.admitted_at, open.used));
            }
            !is_over
        });
        let request = &mut self.request;
        request.batch += 1;
        request.credit.tokens = credit;
        request.estimated.tokens = self.open.iter().map(|open| open.reserved).sum();
        let last = self.open.iter().map(|open| open.admitted_at).max().unwrap_or(real);
        request.last_reservation = (last - real).max(0);
        let costs = (0..rng.usize(0..4)).map(|_| Cost {
            requests: 0,
            ..Cost::tokens(rng.u64(1..=20))
        });
        request.costs = costs.collect();
        let reply = schedule.handle(request, now);
        if request.incarnation != 0 && request.incarnation != reply.incarnation {
            // The store has lost its state and refunds nothing for these estimates, so all of them count as used.
            used.extend(self.open.drain(..).map(|open| (open.admitted_at, open.reserved)));
        }
        request.incarnation = reply.incarnation;
        request.sequence = reply.sequence;
        request.config_version = reply.config_version;
        for (delay, cost) in reply.delays.iter().zip(&request.costs) {
            // A quarter of the calls are cancelled and use nothing.
            let is_cancelled = rng.u8(0..4) == 0;
            self.open.push(OpenReservation {
                admitted_at: real + delay,
                reserved: cost.tokens,
                used: if is_cancelled { 0 } else { rng.u64(0..=cost.tokens) },
            });
        }
        used
    }
}

/// Sends a request for calls of `member` that cost so many cents each, and returns how many are admitted.
fn take(schedule: &mut VirtualSchedule, member: u8, costs: &[u64], now: i64) -> usize {
    let limits = Limits::new().budget("cents", Rate::utc_day(100).refuse());
    let request = StoreRequest {
        costs: costs.iter().map(|cents| Cost::none().with("cents", *cents)).collect(),
        ..StoreRequest::new([member; 16], Arc::new(QuotaConfig::new(limits).unwrap()))
    };
    schedule.handle(&request, now).delays.len()
}

/// In microseconds.
const DAY: i64 = 24 * 60 * 60 * 1_000_000;
const SECOND: i64 = 1_000_000;

#[test]
fn a_clock_that_is_set_back_over_midnight_does_not_begin_the_day_twice() {
    let mut schedule = VirtualSchedule::default();
    let midnight = 20_000 * DAY;
    assert_eq!(take(&mut schedule, 1, &[60, 60], midnight - SECOND), 1);
    assert_eq!(take(&mut schedule, 2, &[60, 60], midnight + SECOND), 1);
    // The clock goes back by two seconds, and passes midnight again.
    assert_eq!(take(&mut schedule, 1, &[60], midnight - SECOND), 0);
    assert_eq!(take(&mut schedule, 2, &[60, 40, 1], midnight + SECOND), 1);
    assert_eq!(take(&mut schedule, 1, &[100], midnight + DAY - 1), 0);
    assert_eq!(take(&mut schedule, 1, &[100], midnight + DAY), 1);
}

#[test]
fn a_clock_that_was_wrong_by_years_costs_no_more_than_one_day() {
    let mut schedule = VirtualSchedule::default();
    let midnight = 20_000 * DAY;
    assert_eq!(take(&mut schedule, 1, &[100], midnight), 1);
    assert_eq!(take(&mut schedule, 1, &[100], midnight + 3_000 * DAY), 1);
    assert_eq!(take(&mut schedule, 1, &[1], midnight + SECOND), 0);
    assert_eq!(take(&mut schedule, 1, &[100], midnight + DAY), 1);
}

#[test]
fn no_window_sees_more_true_usage_than_the_burst_and_what_came_in() {
    let mut rng = fastrand::Rng::with_seed(7);
    let (mut admitted, mut steps_back, mut lost) = (0, 0, 0);
    for _ in 0..if cfg!(miri) { 3 } else { 400 } {
        let mut schedule = VirtualSchedule::default();
        let mut members = [HonestMember::new(1), HonestMember::new(2), HonestMember::new(3)];
        let (mut now, mut real) = (1_000_000_i64, 0_i64);
        let mut used = Vec::new();
        for _ in 0..200 {
            let passed = rng.i64(0..60);
            real += passed;
            now += passed;
            match rng.u32(0..60) {
                0 => {
                    now -= rng.i64(0..100_000);
                    steps_back += 1;
                }
                1 if members.iter().all(|member| member.request.incarnation != 0) => {
                    schedule.lose_state();
                    lost += 1;
                }
                _ => {}
            }
            let member = rng.usize(0..3);
            used.extend(members[member].call(&mut schedule, &mut rng, now, real));
        }
        for member in &mut members {
            used.extend(member.open.drain(..).map(|open| (open.admitted_at, open.used)));
        }
        used.sort_unstable();
        // Replays the usage through an exact bucket. It counts in elevenths of a token, because the rate of 3
        // tokens per 11 microseconds drains 3 elevenths each microsecond.
        let (mut level, mut last) = (0_i64, 0);
        for (at, tokens) in used {
            level = (level - (at - last) * RATE).max(0) + tokens as i64 * 11;
            last = at;
            assert!(level <= BURST * 11, "{} elevenths over at {at}", level - BURST * 11);
            admitted += 1;
        }
    }
    assert!(admitted > 10_000 || cfg!(miri), "{admitted}");
    assert!((steps_back > 100 && lost > 100) || cfg!(miri), "{steps_back} {lost}");
}
