//! Limits of nodes: what calls they admit, and that they keep no other calls.

use super::*;
use crate::rate::Rate;
use fastrand::Rng;
use std::collections::{HashMap, VecDeque};

fn per_second(amount: u64, burst: u64) -> Limits {
    Limits::new().requests(Rate::per_second(amount).burst(burst))
}

/// Starts all calls that may go.
fn start_all<T>(tree: &mut Tree<u64, T>, now: &mut LazyNow) -> u64 {
    let mut went = 0;
    while let Some((started, _)) = tree.start(now) {
        went += 1;
        settle(tree, started, 0, now);
    }
    went
}

/// Returns how many calls of a flow that is alone in its level go in `seconds`, and how many its rate lets go.
fn alone(amount: u64, admitted: f64, seconds: u64) -> (u64, u64) {
    let start = start();
    let mut tree = tree();
    let burst = 5;
    let rate = Rate::per_second(amount as f64 * admitted).burst(burst);
    let limits = || Limits::new().requests(rate);
    let create = |path: &[u64]| {
        if path.len() == 1 {
            limited(limits(), start)
        } else {
            plain(3)
        }
    };
    let (mut time, mut went) = (0, 0);
    while time <= seconds * SECOND {
        let now = &mut at(start, time);
        while tree.waiting() < 10 {
            tree.push(&[0, 0], call(0, 0), (), create, now).unwrap();
        }
        went += start_all(&mut tree, now);
        while tree.waiting() < 10 {
            tree.push(&[0, 0], call(0, 0), (), create, now).unwrap();
        }
        tree.head(now);
        time = tree.next_at().map_or(time, |next| nanos(start, next));
    }
    (went, burst + amount * seconds)
}

#[test]
fn a_flow_that_is_alone_gets_all_that_the_limits_admit() {
    for (amount, seconds) in [(10, 600), (7, 600), (999, 50), (20_000, 3)] {
        let (went, admitted) = alone(amount, 1.0, seconds);
        assert_eq!(went, admitted, "{amount} a second");
    }
    // A fixed share that is not lent.
    let (went, admitted) = alone(999, 0.75, 5);
    assert!(went < admitted);
}

/// Runs a limit above three, whose sum is more, with timers that are up to 2 ms late. Returns how many calls went in two
/// seconds, and how often a limit admitted more than it may.
fn with_late_timers(seconds: u64, is_strict: bool) -> (u64, u64) {
    let mut rng = Rng::with_seed(1);
    let start = start();
    let mut tree = tree();
    let rate = |path: &[u64]| if path.len() == 1 { 20_000 } else { 8_000 };
    let create = |path: &[u64]| {
        let rate = Rate::per_second(rate(path)).burst(1_u64);
        limited(
            Limits::new().requests(if is_strict { rate.strict() } else { rate }),
            start,
        )
    };
    let mut buckets: HashMap<Vec<u64>, TrueBucket> = HashMap::new();
    let (mut time, mut went, mut over) = (0, 0, 0);
    while time <= seconds * SECOND {
        let now = &mut at(start, time);
        for flow in 0..3 {
            while tree.waiting_of(&[0, flow]) < 60 {
                tree.push(&[0, flow], call(0, 0), flow, create, now).unwrap();
            }
        }
        while let Some((started, flow)) = tree.start(now) {
            went += 1;
            for path in [&[0][..], &[0, flow]] {
                let bucket = buckets.entry(path.to_vec());
                let bucket = bucket.or_insert_with(|| TrueBucket::per_second(rate(path), 1));
                over += u64::from(bucket.is_over(1, time));
            }
            settle(&mut tree, started, 0, now);
        }
        time = tree.next_at().map_or(time, |next| nanos(start, next)) + rng.u64(..2_000_000);
    }
    (went, over)
}

#[test]
fn late_timers_cost_no_throughput_and_admit_no_more_than_they_were_late_by() {
    let seconds = 6;
    let (went, over) = with_late_timers(seconds, false);
    println!("{went} of {}", seconds * 20_000);
    assert!(went * 1_000 >= seconds * 20_000 * 999 && over == 0, "{went} {over}");
    let (went, _) = with_late_timers(1, true);
    assert!(went < 10_000, "{went}");
}

/// Runs flows under a limit of a call each 100 us, with or without 200 calls of a flow that has used up its limit, which
/// stands at the flow or above all flows. Returns when which call of the others went.
fn beside_an_exhausted_flow(calls: u64, is_there: bool, is_above: bool) -> Vec<(u64, u64)> {
    let mut rng = Rng::with_seed(5);
    let start = start();
    let mut tree = tree();
    let exhausted = 9;
    let create = |path: &[u64]| {
        let is_limited = if is_above {
            path.len() == 1
        } else {
            path == [0, exhausted]
        };
        let rate = Rate::per_day(1_u64).burst(1_u64);
        if is_limited {
            limited(Limits::new().budget("quota", rate), start)
        } else {
            plain(1 + path[path.len() - 1] as u32)
        }
    };
    let with_quota = NewCall {
        cost: Cost::request().with("quota", 1),
        ..call(1, 0)
    };
    // The quota is used up in both runs.
    let now = &mut at(start, 0);
    tree.push(&[0, exhausted], with_quota, 0, create, now).unwrap();
    let (first, _) = tree.start(now).unwrap();
    tree.settle(first, with_quota.cost, units(1), now);
    let mut went = Vec::new();
    let mut open: VecDeque<Started> = VecDeque::new();
    for name in 1..=calls {
        let now = &mut at(start, name * 100_000);
        if name <= 200 && is_there {
            tree.push(&[0, exhausted], with_quota, 0, create, now).unwrap();
        }
        // The others have nothing to do now and then.
        if name % 5_000 < 4_900 {
            for _ in 0..rng.u64(..=2) {
                let path = [0, rng.u64(..6)];
                tree.push(&path, call(rng.u64(1..=50), 0), name, create, now).unwrap();
            }
        }
        if let Some((started, other)) = tree.start(now) {
            went.push((other, name));
            open.push_back(started);
        }
        if open.len() > 4 {
            settle(&mut tree, open.pop_front().unwrap(), rng.u64(1..=50), now);
        }
    }
    went
}

#[test]
fn an_exhausted_flow_delays_no_other_by_a_nanosecond() {
    let with = beside_an_exhausted_flow(105_000, true, false);
    assert!(with.len() >= 100_000, "{}", with.len());
    assert_eq!(with, beside_an_exhausted_flow(105_000, false, false));
    let above = |is_there| beside_an_exhausted_flow(1_000, is_there, true);
    assert_ne!(above(true), above(false));
}

/// Runs flows with limits of their own under limits of their groups, and one permit after another. Looks at each flow
/// whenever no call goes. Returns how many calls went, and how often one could have gone that did not.
fn not_conserved(rounds: u64, is_fifo: bool) -> (u64, u64) {
    let mut rng = Rng::with_seed(11);
    let start = start();
    let mut tree = tree();
    let rate = |path: &[u64]| match path {
        [group] => (200 + 100 * group, 6 + group),
        path => (50 + 60 * (path[1] % 3), 2 + path[1]),
    };
    let create = |path: &[u64]| {
        let (amount, burst) = rate(path);
        limited(per_second(amount, burst), start)
    };
    let paths: Vec<[u64; 2]> = (0..3).flat_map(|group| (0..4).map(move |flow| [group, flow])).collect();
    let mut buckets: HashMap<Vec<u64>, TrueBucket> = HashMap::new();
    for path in &paths {
        for path in [&path[..1], path] {
            let (amount, burst) = rate(path);
            buckets.insert(path.to_vec(), TrueBucket::per_second(amount, burst));
        }
    }
    let mut arrived: VecDeque<(usize, [u64; 2])> = VecDeque::new();
    let (mut time, mut went, mut wrong) = (0, 0, 0);
    for _ in 0..rounds {
        let now = &mut at(start, time);
        for _ in 0..rng.u64(..3) {
            let path = paths[rng.usize(..paths.len())];
            if tree.waiting_of(&path) < 10 {
                let id = tree.push(&path, call(0, 0), path, create, now).unwrap();
                arrived.push_back((id, path));
            }
        }
        let head = tree.head(now).map(|(id, _)| id);
        let goes = if is_fifo {
            head.filter(|head| arrived.front().is_some_and(|(id, _)| id == head))
        } else {
            head
        };
        if let Some(id) = goes {
            let (started, path) = tree.start(now).unwrap();
            arrived.retain(|(waiting, _)| *waiting != id);
            for path in [&path[..1], &path] {
                let is_over = buckets.get_mut(path).unwrap().is_over(1, time);
                assert!(!is_over, "{path:?}");
            }
            settle(&mut tree, started, 0, now);
            went += 1;
            continue;
        }
        for path in paths.iter().filter(|path| tree.waiting_of(&path[..]) > 0) {
            let has =
                |path: &[u64], buckets: &mut HashMap<Vec<u64>, TrueBucket>| buckets.get_mut(path).unwrap().has(1, time);
            wrong += u64::from(has(&path[..1], &mut buckets) && has(path, &mut buckets));
        }
        let next = tree.next_at().map_or(u64::MAX, |next| nanos(start, next));
        time = if is_fifo {
            time + 100_000
        } else {
            next.min(time + rng.u64(1..3_000_000)).max(time)
        };
    }
    (went, wrong)
}

#[test]
fn a_permit_that_is_free_goes_to_a_call_that_all_limits_admit_if_there_is_one() {
    let (went, wrong) = not_conserved(250_000, false);
    assert!(went >= 100_000 && wrong == 0, "{wrong} of {went}");
    assert!(not_conserved(5_000, true).1 > 0);
}

/// Runs calls under limits of an account, of its tenants and of their models, with estimates that are too large, and
/// counts how often one of them was over. Returns that for each level. `levels` are those that have limits.
fn layers_over(calls: u64, levels: usize) -> [u64; 3] {
    let mut rng = Rng::with_seed(13);
    let start = start();
    let mut tree = tree();
    let rate = |path: &[u64]| match path {
        [_] => (3_000, 300),
        [_, tenant] => (900 + 50 * tenant, 100),
        path => (400 + 30 * path[2], 60),
    };
    let create = |path: &[u64]| {
        let (amount, burst) = rate(path);
        let limits = Limits::new().tokens(Rate::per_second(amount).burst(burst));
        if path.len() > 3 - levels {
            limited(limits, start)
        } else {
            plain(1 + path[path.len() - 1] as u32)
        }
    };
    let mut buckets: HashMap<Vec<u64>, TrueBucket> = HashMap::new();
    let mut over = [0; 3];
    let mut open = VecDeque::new();
    let (mut time, mut went) = (0, 0);
    while went < calls {
        let now = &mut at(start, time);
        for _ in 0..6 {
            let path = [rng.u64(..2), rng.u64(..5), rng.u64(..3)];
            if tree.waiting_of(&path) < 10 {
                let cost = rng.u64(1..=50);
                tree.push(&path, call(cost, time), (path, cost), create, now).unwrap();
            }
        }
        while let Some((started, (path, cost))) = tree.start(now) {
            let used = rng.u64(1..=cost);
            for (depth, over) in (1..).zip(&mut over) {
                let (amount, burst) = rate(&path[..depth]);
                let bucket = buckets.entry(path[..depth].to_vec());
                let bucket = bucket.or_insert_with(|| TrueBucket::per_second(amount, burst));
                *over += u64::from(bucket.is_over(used, time));
            }
            open.push_back((started, used));
            went += 1;
        }
        while open.len() > 10 || (!open.is_empty() && rng.bool()) {
            let (started, used) = open.pop_front().unwrap();
            settle(&mut tree, started, used, now);
        }
        let next = tree.next_at().map_or(u64::MAX, |next| nanos(start, next));
        time = next.min(time + rng.u64(1..4_000_000)).max(time);
    }
    over
}

#[test]
fn a_call_is_charged_to_all_limits_on_its_path_or_to_none() {
    assert_eq!(layers_over(100_000, 3), [0; 3]);
    // Limits that are not looked at are exceeded.
    let [account, tenant, model] = layers_over(3_000, 1);
    assert!(account > 0 && tenant > 0 && model == 0);
}
