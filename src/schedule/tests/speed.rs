//! What a call takes, to be looked at: times depend on the machine, so none of them is checked.

use super::*;
use std::hint::black_box;

/// Returns how long a call takes in nanoseconds, from its push to its settlement, with so many flows that always wait.
fn nanos_a_call(flows: u64, idle: u64, calls: u64) -> u128 {
    let start = start();
    let mut tree = tree();
    let now = &mut at(start, 0);
    let create = |_: &[u64]| plain(1);
    for flow in 0..idle {
        tree.push(&[u64::MAX - flow], call(1, 0), 0, create, now).unwrap();
        let (started, _) = tree.start(now).unwrap();
        settle(&mut tree, started, 1, now);
    }
    let mut rng = fastrand::Rng::with_seed(1);
    let mut cost = move || rng.u64(1..=1_000);
    for flow in 0..flows {
        tree.push(&[flow], call(cost(), 0), flow, create, now).unwrap();
        tree.push(&[flow], call(cost(), 0), flow, create, now).unwrap();
    }
    let mut run = |calls: u64| {
        for time in 0..calls {
            let now = &mut at(start, time);
            let (started, flow) = tree.start(now).unwrap();
            let cost = cost();
            tree.push(&[flow], call(cost, 0), flow, create, now).unwrap();
            settle(&mut tree, black_box(started), cost, now);
        }
    };
    run(calls / 10);
    let began = std::time::SystemTime::now();
    run(calls);
    began.elapsed().unwrap_or_default().as_nanos() / u128::from(calls)
}

#[test]
#[ignore = "prints times: run by hand, with --release"]
fn the_time_of_a_call_is_printed() {
    for (flows, idle) in [(1, 0), (10, 0), (1_000, 0), (100_000, 0), (10, 1_000_000)] {
        let mut times: Vec<_> = (0..5).map(|_| nanos_a_call(flows, idle, 1_000_000)).collect();
        times.sort_unstable();
        println!(
            "{flows} flows, {idle} idle ones before: {} ns a call (best {})",
            times[2], times[0]
        );
    }
}
