//! Flows that come and go: what is forgotten, and that forgetting it changes nothing.

use super::*;
use crate::{rate::Rate, schedule::tree::Forgetting};
use fastrand::Rng;
use std::collections::HashMap;

/// What came of a run.
#[derive(Debug, Default, PartialEq)]
struct Run {
    /// Which call went when, in nanoseconds.
    went: Vec<(u64, u64)>,
    /// How often a key used more than its limits let it.
    over: u64,
    most_nodes: usize,
    left: usize,
}

/// Runs calls of keys of which a few are used often and most once, in a tree of two levels with limits at both, where a
/// call costs up to twice what it uses. Some keys have odd rates.
fn churn(forgetting: Forgetting, calls: u64, keys: u64, seed: u64) -> Run {
    let mut rng = Rng::with_seed(seed);
    let start = start();
    let mut tree = tree();
    tree.forgetting = forgetting;
    let rate = |path: &[u64]| match path {
        [group] => (400 + 7 * group, 40),
        path => (1 + path[1] % 7, 3 + path[1] % 5),
    };
    let create = |now: Instant, path: &[u64]| {
        let (amount, burst) = rate(path);
        let limits = Limits::new().tokens(Rate::per_second(amount).burst(burst));
        NewNode {
            weight: weight(1 + path[path.len() - 1] as u32 % 3),
            ..limited(limits, now)
        }
    };
    let mut run = Run::default();
    let mut buckets: HashMap<Vec<u64>, TrueBucket> = HashMap::new();
    let mut open: Vec<(u64, Started, u64)> = Vec::new();
    let (mut time, mut arrives, mut name) = (0, 0, 0);
    while name < calls || tree.waiting() > 0 || !open.is_empty() {
        let next = tree.next_at().map(|next| nanos(start, next));
        let ends = open.iter().map(|(ends, ..)| *ends).min();
        let arrival = (name < calls).then_some(arrives);
        time = time.max([next, ends, arrival].into_iter().flatten().min().unwrap_or(time));
        let now = &mut at(start, time);
        while let Some(ended) = open.iter().position(|(ends, ..)| *ends <= time) {
            let (_, started, used) = open.swap_remove(ended);
            settle(&mut tree, started, used, now);
        }
        if name < calls && arrives <= time {
            name += 1;
            // The number of a key is small for half of the calls.
            let most = (keys as f64).powf(rng.f64()) as u64;
            let path = [rng.u64(..3), rng.u64(..=most)];
            let cost = rng.u64(1..=3);
            let created = now.get();
            tree.push(
                &path,
                call(cost, time),
                (name, path, cost),
                |path| create(created, path),
                now,
            )
            .unwrap();
            arrives += rng.u64(..4_000_000);
        }
        while let Some((started, (name, path, cost))) = tree.start(now) {
            run.went.push((name, time));
            let used = rng.u64(cost.div_ceil(2)..=cost);
            for depth in 1..=2 {
                let (amount, burst) = rate(&path[..depth]);
                let bucket = buckets.entry(path[..depth].to_vec());
                let bucket = bucket.or_insert_with(|| TrueBucket::per_second(amount, burst));
                run.over += u64::from(bucket.is_over(used, time));
            }
            open.push((time + rng.u64(..50_000_000), started, used));
        }
        run.most_nodes = run.most_nodes.max(tree.nodes());
    }
    // Debts and limits are repaid and full in the end. Each look forgets a few.
    for _ in 0..=tree.nodes() / 8 {
        tree.head(&mut at(start, time + 3_600 * SECOND));
    }
    run.left = tree.nodes();
    run
}

#[test]
fn no_key_is_ever_over_its_limits_and_forgetting_changes_no_decision() {
    let exact = churn(Forgetting::WhenNothingChanges, 100_000, 30_000, 1);
    let never = churn(Forgetting::Never, 100_000, 30_000, 1);
    println!(
        "{} nodes at most, {} without forgetting",
        exact.most_nodes, never.most_nodes
    );
    let differ = exact
        .went
        .iter()
        .zip(&never.went)
        .filter(|(one, other)| one != other)
        .count();
    assert_eq!((exact.went.len(), exact.over, differ, exact.left), (100_000, 0, 0, 0));
    assert!(exact.most_nodes * 4 < never.most_nodes);
    let too_early = churn(Forgetting::TooEarly, 5_000, 30_000, 1);
    let never = churn(Forgetting::Never, 5_000, 30_000, 1);
    assert!(too_early.over > 0 && too_early.went != never.went);
}

#[test]
#[ignore = "a million decisions: run by hand"]
fn no_key_is_ever_over_its_limits_in_millions_of_decisions() {
    for seed in 2..6 {
        let exact = churn(Forgetting::WhenNothingChanges, 300_000, 160_000, seed);
        let never = churn(Forgetting::Never, 300_000, 160_000, seed);
        println!(
            "{} nodes at most, {} without forgetting",
            exact.most_nodes, never.most_nodes
        );
        assert!(exact.went == never.went && exact.over == 0 && exact.left == 0);
    }
}

/// Runs flows without limits that come and go, one permit, and returns the order of their calls.
fn order_of_flows(forgetting: Forgetting, calls: u64) -> (Vec<u64>, usize) {
    let mut rng = Rng::with_seed(3);
    let start = start();
    let mut tree = tree();
    tree.forgetting = forgetting;
    let mut open = Vec::new();
    let (mut went, mut most) = (Vec::new(), 0);
    for name in 0..calls {
        let now = &mut at(start, name);
        let path = [rng.u64(..20), rng.u64(..30)];
        let cost = rng.u64(1..=100);
        tree.push(
            &path,
            call(cost, 0),
            name,
            |path| plain(1 + path[path.len() - 1] as u32 % 4),
            now,
        )
        .unwrap();
        // What waits grows, and is worked off now and then.
        let is_busy = name / 300 % 2 == 0;
        while open.len() < 3 && (!is_busy || rng.u32(..10) > 0) {
            let Some((started, name)) = tree.start(now) else { break };
            went.push(name);
            open.push(started);
        }
        while !open.is_empty() && rng.u32(..10) > 1 {
            let started = open.swap_remove(rng.usize(..open.len()));
            settle(&mut tree, started, rng.u64(1..=200), now);
        }
        most = most.max(tree.nodes());
    }
    (went, most)
}

#[test]
fn forgetting_flows_changes_nothing() {
    let (exact, nodes) = order_of_flows(Forgetting::WhenNothingChanges, 101_000);
    let (never, all) = order_of_flows(Forgetting::Never, 101_000);
    println!("{nodes} nodes at most, {all} without forgetting");
    assert!(
        exact.len() >= 100_000 && exact == never && nodes < all,
        "{} {nodes} {all}",
        exact.len()
    );
    let (too_early, _) = order_of_flows(Forgetting::TooEarly, 5_000);
    assert!(too_early != never[..too_early.len()]);
}
