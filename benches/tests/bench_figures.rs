//! Tests of the arithmetic of the pacing bench.

#[path = "../common.rs"]
mod common;
#[path = "../pacing/figures.rs"]
#[allow(dead_code)]
mod figures;

use figures::{Budget, Call, achieved, admissions, empirical_burst, envelope, overtakings, used_rate, waits};
use std::time::Duration;

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn call(arrived: u64, admitted: u64) -> Call {
    Call {
        arrived: ms(arrived),
        waited_until: ms(admitted),
        admitted: true,
        tokens: 1,
        output: 0,
    }
}

fn still_waiting(arrived: u64, end: u64) -> Call {
    Call {
        admitted: false,
        ..call(arrived, end)
    }
}

fn admitted_at(times: &[u64]) -> Vec<Call> {
    times.iter().map(|time| call(0, *time)).collect()
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-6
}

#[test]
fn admissions_are_in_order_and_without_calls_that_still_wait() {
    let calls = [call(0, 30), still_waiting(0, 40), call(5, 10)];
    let times: Vec<_> = admissions(&calls).iter().map(|call| call.waited_until).collect();
    assert_eq!(times, [ms(10), ms(30)]);
}

#[test]
fn the_empirical_burst_is_that_of_the_smallest_sufficient_bucket() {
    let budget = Budget::new(100, 1);
    // Each entry: the times of the admissions in milliseconds, and their empirical burst at a rate of one every 10 ms.
    let table: [(&[u64], f64); 7] = [
        (&[], 0.0),
        (&[5], 1.0),
        (&[0, 10, 20, 30], 1.0),
        (&[0, 0, 0], 3.0),
        // A pause saves nothing up: the window with the largest burst begins after the pause.
        (&[0, 1_000, 1_000, 1_001], 2.9),
        // The window with the largest burst spans several gaps.
        (&[0, 5, 10, 15, 20], 3.0),
        // The window with the largest burst is in the middle of the run.
        (&[0, 100, 101, 102, 200], 2.8),
    ];
    for (times, burst) in table {
        let found = empirical_burst(&admitted_at(times), budget, Call::one);
        assert!(close(found, burst), "{times:?}: {found}");
    }
}

#[test]
fn the_empirical_burst_is_the_largest_excess_of_all_windows() {
    let mut rng = fastrand::Rng::with_seed(1);
    for _ in 0..200 {
        let budget = Budget::new(rng.u64(1..2_000), 1);
        let mut calls: Vec<_> = (0..40).map(|_| call(0, rng.u64(0..100))).collect();
        calls.iter_mut().for_each(|call| call.tokens = rng.u64(1..100));
        let calls = admissions(&calls);
        let windows = (0..calls.len()).flat_map(|first| (first..calls.len()).map(move |last| (first, last)));
        let excess = windows.map(|(first, last)| {
            let sum: u64 = calls[first..=last].iter().map(Call::tokens).sum();
            sum as f64 - budget.inflow(calls[last].waited_until - calls[first].waited_until)
        });
        let largest = excess.fold(0.0, f64::max);
        assert!(close(empirical_burst(&calls, budget, Call::tokens), largest));
    }
}

#[test]
fn achieved_is_the_admissions_beyond_the_burst_as_a_part_of_the_inflow() {
    let calls = admitted_at(&[0, 0, 10, 20, 30]);
    // The burst is two, so three of the five calls are beyond it. In 40 ms, four calls flow in.
    let requests = (Budget::new(100, 2), Call::one as _);
    assert!(close(achieved(&calls, &[requests], ms(40)), 75.0));
    assert!(close(achieved(&calls, &[requests], ms(30)), 100.0));
    assert!(close(achieved(&[], &[requests], ms(30)), 0.0));
}

#[test]
fn with_two_budgets_each_call_waits_for_the_slower_one() {
    let mut calls = admitted_at(&[0, 10, 50, 60]);
    let tokens = [1, 1, 5, 1];
    calls
        .iter_mut()
        .zip(tokens)
        .for_each(|(call, tokens)| call.tokens = tokens);
    let requests = (Budget::new(100, 1), Call::one as _);
    let tokens = (Budget::new(100, 5), Call::tokens as _);
    // The token bucket holds four of five tokens after 10 ms, so the call of five tokens is admitted after 20 ms. The
    // next call waits for a request until 30 ms.
    assert!(close(
        achieved(&calls, &[requests, tokens], ms(60)),
        100.0 * 30.0 / 60.0
    ));
}

#[test]
fn with_three_budgets_each_call_waits_for_the_slowest_one() {
    let mut calls = admitted_at(&[0, 10, 50, 100]);
    for (call, (tokens, output)) in calls.iter_mut().zip([(1, 1), (5, 1), (1, 3), (1, 1)]) {
        (call.tokens, call.output) = (tokens, output);
    }
    let budgets = [
        (Budget::new(100, 1), Call::one as _),
        (Budget::new(200, 5), Call::tokens as _),
        (Budget::new(50, 3), Call::output as _),
    ];
    // The second call waits 10 ms for a request. By then a token of the prompt is back, so it does not wait for them. The
    // third waits for the answer's tokens: 2.5 - 1 are left, and 1.5 more take 30 ms. The fourth waits 20 ms for one.
    assert!(close(
        achieved(&calls, &budgets, ms(100)),
        100.0 * (10.0 + 30.0 + 20.0) / 100.0
    ));
}

#[test]
fn the_used_rate_is_that_of_all_calls_but_the_first_without_the_time_lost() {
    let requests = Budget::new(100, 1);
    // Each entry: the times of the admissions in milliseconds, the milliseconds lost, and the rate at one every 10 ms.
    let table: [(&[u64], u64, f64); 6] = [
        (&[], 0, 0.0),
        (&[5], 0, 0.0),
        (&[5, 15, 25], 0, 100.0),
        (&[0, 5, 10], 0, 200.0),
        (&[0, 10, 120, 130], 100, 100.0),
        // Calls that were admitted at once after the interruption, as if it had not been.
        (&[0, 10, 40, 40, 40], 20, 200.0),
    ];
    for (times, lost, rate) in table {
        let found = used_rate(&admitted_at(times), requests, Call::one, ms(lost));
        assert!(close(found, rate), "{times:?}: {found}");
    }
    // Each call uses two tokens, and the limit is one every 10 ms.
    let mut calls = admitted_at(&[0, 20, 40]);
    calls.iter_mut().for_each(|call| call.tokens = 2);
    assert!(close(used_rate(&calls, requests, Call::tokens, Duration::ZERO), 100.0));
}

#[test]
fn a_call_that_is_admitted_before_an_earlier_arrival_overtakes() {
    // Each entry: the calls, and the number of overtakings.
    let table: [(&[Call], usize); 6] = [
        (&[], 0),
        (&[call(0, 100), call(10, 110), call(20, 120)], 0),
        // The first call waits for long, and two later calls are admitted before it.
        (&[call(0, 100), call(10, 50), call(20, 60), call(30, 130)], 2),
        // A difference of a millisecond does not count, neither between arrivals nor between admissions.
        (&[call(0, 100), call(1, 50)], 0),
        (&[call(0, 100), call(10, 99)], 0),
        // A call that is never admitted is overtaken, too.
        (&[call(5, 50), still_waiting(0, 100)], 1),
    ];
    for (calls, expected) in table {
        assert_eq!(overtakings(calls), expected, "{calls:?}");
    }
}

#[test]
fn waits_are_those_of_a_full_queue_and_of_calls_never_admitted() {
    let full_queue = [call(10, 30), call(20, 40), call(30, 50)];
    let first_and_last = [call(0, 9), still_waiting(95, 100)];
    let never_admitted = [still_waiting(5, 100)];
    let all = [&full_queue[..], &first_and_last, &never_admitted].concat();
    // Each entry: the calls, and the expected p50, p99 and maximum of their waits.
    let table = [
        (&all[..3], 20.0, 20.0, 20.0),
        (&all[..5], 20.0, 20.0, 20.0),
        (&all[..], 20.0, 95.0, 95.0),
        (&first_and_last[..], 0.0, 0.0, 9.0),
    ];
    for (calls, p50, p99, max) in table {
        let waits = waits(calls, ms(10));
        let near = |found: f64, expected: f64| (found - expected).abs() < 0.1;
        assert!(
            near(waits.p50, p50) && near(waits.p99, p99) && near(waits.max, max),
            "{calls:?}: {waits:?}"
        );
    }
}

#[test]
fn the_envelope_rises_at_the_rate_and_stops_a_burst_above_the_count() {
    let corners = envelope(&admitted_at(&[0, 50, 60]), Budget::new(100, 2), ms(100));
    let expected = [
        (ms(0), 2.0),
        (ms(0), 2.0),
        // The bucket is full again after 10 ms.
        (ms(10), 3.0),
        (ms(50), 3.0),
        (ms(60), 4.0),
        (ms(70), 5.0),
        (ms(100), 5.0),
    ];
    assert_eq!(corners.len(), expected.len(), "{corners:?}");
    for (found, expected) in corners.iter().zip(expected) {
        assert!(found.0 == expected.0 && close(found.1, expected.1), "{corners:?}");
    }
}
