//! The order within a flow, and of strict bands.

use super::*;
use crate::{rate::Rate, wait_queue::Availability};
use fastrand::Rng;
use std::collections::{BTreeMap, VecDeque};

/// Runs one flow with three classes, or with strict ones, and counts how many calls were overtaken by one that had come
/// too late for that.
fn overtaken_too_late(seeds: u64, is_strict: bool) -> (u64, u64) {
    const SLACKS: [u64; 3] = [0, 5_000, 60_000];
    let (mut decisions, mut wrong) = (0, 0);
    for seed in 0..seeds {
        let mut rng = Rng::with_seed(seed);
        let start = start();
        let mut tree = tree();
        let mut arrivals: BTreeMap<usize, (u64, u64)> = BTreeMap::new();
        let mut time = 0;
        for _ in 0..3_000 {
            time += rng.u64(1..=400);
            let now = &mut at(start, time);
            while rng.bool() {
                let class = rng.usize(..3);
                let slack = SLACKS[class];
                let due = if is_strict { class as u64 } else { time + slack };
                let new = NewCall {
                    class: class as u8,
                    due,
                    ..call(1, 0)
                };
                let id = tree.push(&[0_u64], new, (), |_| plain(1), now).unwrap();
                arrivals.insert(id, (time, slack));
            }
            let Some((started, ())) = tree.start(now) else { continue };
            let (arrived, slack) = arrivals.remove(&started.id).unwrap();
            let others = arrivals.values();
            wrong += others.filter(|(other, its)| other + its < arrived + slack).count() as u64;
            decisions += 1;
            settle(&mut tree, started, 1, now);
        }
    }
    (decisions, wrong)
}

#[test]
fn a_call_is_overtaken_only_by_those_that_come_less_than_the_difference_of_the_slacks_later() {
    let (decisions, wrong) = overtaken_too_late(60, false);
    assert!(decisions >= 100_000 && wrong == 0, "{wrong} of {decisions}");
    assert!(overtaken_too_late(3, true).1 > 0);
}

/// Runs one flow with two budgets beside a plain queue in front of the same buckets, step by step. Returns how many
/// steps there were, and in how many another call went, or at another time.
fn steps_unlike_a_queue(flows: u64, seeds: u64) -> (u64, u64) {
    let (mut steps, mut unlike) = (0, 0);
    for seed in 0..seeds {
        let mut rng = Rng::with_seed(seed);
        let start = start();
        let now = &mut at(start, 0);
        let limits = Limits::new()
            .requests(Rate::per_second(1_000_u64).burst(rng.u64(1..=20)))
            .tokens(Rate::per_second(rng.u64(20_000..=90_000)).burst(1_000_u64));
        let mut tree = tree();
        let mut queue: VecDeque<(usize, Cost)> = VecDeque::new();
        let mut buckets = key_limits(limits.clone(), now);
        let mut open = Vec::new();
        let (mut time, mut has_waited) = (0, false);
        // A call that stays open keeps the limits of the tree.
        for flow in 0..flows {
            tree.push(
                &[0, flow],
                call(0, 0),
                (),
                |path: &[u64]| {
                    if path.len() == 1 {
                        limited(limits.clone(), start)
                    } else {
                        plain(1)
                    }
                },
                now,
            )
            .unwrap();
            buckets.set_waited_for(true, now);
            open.push((tree.start(now).unwrap().0, buckets.charge(&Cost::tokens(0), false, now)));
            buckets.set_waited_for(false, now);
        }
        for _ in 0..4_000 {
            steps += 1;
            // Between some steps the timer is on time, between others late, or something else happens first.
            time = match tree.next_at() {
                Some(next) if rng.bool() => nanos(start, next).max(time) + [0, 0, rng.u64(..7_000_000)][rng.usize(..3)],
                _ => time + rng.u64(..400_000),
            };
            let now = &mut at(start, time);
            match rng.u32(..10) {
                0..=4 if queue.len() < 40 => {
                    let cost = rng.u64(1..=200);
                    let path = [0, rng.u64(..flows)];
                    let id = tree.push(&path, call(cost, 0), (), |_| plain(1), now).unwrap();
                    buckets.set_waited_for(true, now);
                    queue.push_back((id, Cost::tokens(cost)));
                }
                5 if !queue.is_empty() => {
                    let (id, _) = queue.remove(rng.usize(..queue.len())).unwrap();
                    if queue.is_empty() {
                        buckets.set_waited_for(false, now);
                    }
                    tree.cancel(id, now).unwrap();
                }
                6 | 7 if open.len() > flows as usize => {
                    let (started, number) = open.swap_remove(rng.usize(flows as usize..open.len()));
                    let used = Cost::tokens(rng.u64(..400));
                    buckets.settle(&started.cost(), number, &used, now);
                    tree.settle(started, used, units(used.tokens), now);
                }
                _ => {}
            }
            loop {
                let first = queue.front().copied();
                let goes = first.filter(|(_, cost)| match buckets.availability(cost, now) {
                    Ok(Availability::Now) => true,
                    _ => {
                        has_waited = true;
                        false
                    }
                });
                let of_tree = tree.head(now).map(|(id, _)| id);
                if of_tree != goes.map(|(id, _)| id) {
                    unlike += 1;
                }
                let Some((_, cost)) = goes.filter(|(id, _)| of_tree == Some(*id)) else {
                    break;
                };
                queue.pop_front();
                if queue.is_empty() {
                    buckets.set_waited_for(false, now);
                }
                let number = buckets.charge(&cost, std::mem::take(&mut has_waited), now);
                open.push((tree.start(now).unwrap().0, number));
            }
            if unlike > 0 {
                break;
            }
        }
    }
    (steps, unlike)
}

#[test]
fn one_flow_is_a_queue_in_front_of_its_buckets_step_by_step() {
    let (steps, unlike) = steps_unlike_a_queue(1, 30);
    assert!(steps >= 100_000 && unlike == 0, "{unlike} of {steps}");
    assert!(steps_unlike_a_queue(2, 3).1 > 0);
}

/// Runs three bands with flows of their own. Returns how many calls went, and how many before one of a lower band.
fn before_a_lower_band(is_strict: bool, rounds: u64) -> (u64, u64) {
    let mut rng = Rng::with_seed(7);
    let start = start();
    let mut tree = Tree::new([is_strict, false, false], usize::MAX);
    let (mut waiting, mut went, mut wrong) = ([0_u64; 3], 0, 0);
    for time in 0..rounds {
        let now = &mut at(start, time);
        while rng.u32(..3) > 0 {
            let band = rng.usize(..3);
            let path = [band as u64, rng.u64(..4)];
            let create = |path: &[u64]| plain(if path.len() == 1 { 1 + path[0] as u32 } else { 1 });
            tree.push(&path, call(rng.u64(1..=9), time), band, create, now).unwrap();
            waiting[band] += 1;
        }
        let Some((started, band)) = tree.start(now) else {
            continue;
        };
        waiting[band] -= 1;
        went += 1;
        wrong += u64::from(waiting[..band].iter().any(|waiting| *waiting > 0));
        settle(&mut tree, started, 5, now);
    }
    (went, wrong)
}

#[test]
fn a_strict_band_goes_before_all_bands_with_higher_numbers() {
    let (went, wrong) = before_a_lower_band(true, 120_000);
    assert!(went >= 100_000 && wrong == 0, "{wrong} of {went}");
    assert!(before_a_lower_band(false, 3_000).1 > 0);
}
