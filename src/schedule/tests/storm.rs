//! Everything at once, with what must hold of the tree checked as it goes, and nothing left at the end.

use super::*;
use crate::{rate::Rate, schedule::tree::Forgetting};
use fastrand::Rng;

/// A call that has begun, with what a retry of it needs.
struct Open {
    started: Started,
    path: Vec<u64>,
    call: NewCall,
}

fn limits(rng: &mut Rng) -> Limits {
    let tokens = Rate::per_second(rng.u64(10_000..1_000_000)).burst(rng.u64(500..2_000));
    Limits::new()
        .requests(Rate::per_second(rng.u64(100..20_000)).burst(rng.u64(1..50)))
        .tokens(if rng.u32(..20) == 0 { tokens.refuse() } else { tokens })
}

/// What is left of a storm: the calls that wait, the nodes, and when a node is next looked at.
type Left = (usize, usize, Option<Instant>);

const NOTHING: Left = (0, 0, None);

/// Runs random operations of all kinds on a tree of three levels, which has the `fault`, and checks it after every
/// `check_each` of them. Returns how many calls went, and what is left in the end.
fn storm(
    seed: u64,
    steps: u64,
    check_each: u64,
    fault: impl FnOnce(&mut Tree<u64, (Vec<u64>, NewCall)>),
) -> (u64, Left) {
    let mut rng = Rng::with_seed(seed);
    let start = start();
    let mut tree = Tree::new([rng.bool(), false, false], 60);
    fault(&mut tree);
    let mut waiting: Vec<usize> = Vec::new();
    let mut open: Vec<Open> = Vec::new();
    let (mut time, mut went, mut lost) = (0, 0, 0_u64);
    for step in 0..steps {
        time += [0, rng.u64(..1_000), rng.u64(..3_000_000)][rng.usize(..3)];
        if rng.u32(..300) == 0 {
            // The largest debts are repaid.
            time += 1_000 * SECOND;
        }
        let now = &mut at(start, time);
        refused(&mut tree, &mut waiting);
        let path = vec![rng.u64(..3), rng.u64(..4), rng.u64(..4)];
        let some = path[..rng.usize(1..=3)].to_vec();
        let retried = match rng.u32(..100) {
            0..=29 => None,
            30..=34 if !waiting.is_empty() => {
                let id = waiting.swap_remove(rng.usize(..waiting.len()));
                assert!(tree.cancel(id, now).is_some());
                continue;
            }
            35..=54 if !open.is_empty() => {
                let Open { started, path, call } = open.swap_remove(rng.usize(..open.len()));
                let seq = Some(started.seq);
                let used = [rng.u64(..500), 0, rng.u64(..10_000), u64::MAX]
                    [[0, 0, 0, 1, 2, rng.usize(..40) / 13][rng.usize(..6)]];
                settle(&mut tree, started, used, now);
                refused(&mut tree, &mut waiting);
                if rng.u32(..3) > 0 {
                    continue;
                }
                // An attempt that is made again keeps the place that its call had.
                Some((path, NewCall { seq, ..call }))
            }
            55..=58 => {
                tree.set_weight(&some, weight(rng.u32(1..9)), now);
                continue;
            }
            59..=61 => {
                let until = start + Duration::from_nanos(time + rng.u64(..20_000_000));
                tree.pause(&some, rng.bool().then_some(until), now);
                continue;
            }
            62..=63 => {
                tree.set_limits(&some, limits(&mut rng), now).unwrap();
                continue;
            }
            _ => {
                if let Some((started, (path, call))) = tree.start(now) {
                    let at = waiting.iter().position(|id| *id == started.id);
                    waiting.swap_remove(at.expect("only calls that wait go"));
                    open.push(Open { started, path, call });
                    went += 1;
                }
                if step % check_each == 0 {
                    tree.check();
                }
                continue;
            }
        };
        let class = rng.usize(..3);
        let (path, new) = retried.unwrap_or_else(|| {
            let new = NewCall {
                class: class as u8,
                due: time + [0, 1_000, 1_000_000_000][class],
                ..call(rng.u64(..900), 0)
            };
            (path, new)
        });
        if tree.waiting() < 300 {
            let created = now.get();
            let create = |_: &[u64]| {
                let limits = (rng.u32(..3) == 0).then(|| limits(&mut rng));
                NewNode {
                    weight: weight(rng.u32(1..9)),
                    ..limits.map_or_else(|| plain(1), |limits| limited(limits, created))
                }
            };
            match tree.push(&path, new, (path.clone(), new), create, now) {
                Ok(super::super::tree::REFUSED) => {}
                Ok(id) => waiting.push(id),
                Err(_) => lost += 1,
            }
        }
    }
    assert!(lost < steps / 10, "{lost}");
    let now = &mut at(start, time);
    for Open { started, .. } in open {
        settle(&mut tree, started, 1, now);
    }
    tree.check();
    refused(&mut tree, &mut waiting);
    while let Some(id) = waiting.pop() {
        tree.cancel(id, now).unwrap();
        refused(&mut tree, &mut waiting);
    }
    tree.check();
    for _ in 0..20 {
        tree.head(&mut at(start, time + 30 * 86_400 * SECOND));
    }
    tree.check();
    (went, left_of(&tree))
}

fn left_of<T>(tree: &Tree<u64, T>) -> Left {
    (tree.waiting(), tree.nodes(), tree.next_at())
}

/// Runs storms over which nothing may be left. Returns how many calls went.
fn storms(seeds: std::ops::Range<u64>, steps: u64, check_each: u64) -> u64 {
    let storms = seeds.map(|seed| {
        let (went, left) = storm(seed, steps, check_each, |_| ());
        assert_eq!(left, NOTHING, "{seed}");
        went
    });
    storms.sum()
}

/// Takes the calls that were refused out of those that wait.
fn refused<T: Clone + Eq + std::hash::Hash, P>(tree: &mut Tree<T, P>, waiting: &mut Vec<usize>) {
    if !tree.take_refused().is_empty() {
        waiting.retain(|id| tree.is_waiting(*id));
    }
}

#[test]
fn in_a_storm_of_everything_all_is_consistent_and_all_is_forgotten_in_the_end() {
    let went = storms(0..40, 12_000, 20);
    println!("{went} calls");
    assert!(went >= 100_000, "{went}");
    // A tree that forgets nothing is consistent, and has all its nodes in the end.
    let (_, (waiting, nodes, _)) = storm(0, 2_000, 20, |tree| tree.forgetting = Forgetting::Never);
    assert!(waiting == 0 && nodes > 40, "{waiting} {nodes}");
}

#[test]
#[should_panic(expected = "timers of blocked nodes, and nodes that fill")]
fn a_tree_that_keeps_the_timer_of_a_node_which_is_not_blocked_any_more_is_found_inconsistent() {
    storm(0, 2_000, 20, |tree| tree.keeps_timers = true);
}

#[test]
#[ignore = "a million decisions: run by hand"]
fn in_a_storm_of_millions_of_decisions_all_is_consistent() {
    let went = storms(1_000..1_100, 100_000, 1);
    println!("{went} calls");
    assert!(went >= 1_000_000, "{went}");
}

/// Cancels `calls` calls of a thousand flows, in any order, in a tree that forgets as `forgetting` says. Returns what is left.
fn cancel_all(calls: u64, forgetting: Forgetting) -> Left {
    let mut rng = Rng::with_seed(1);
    let start = start();
    let mut tree = tree();
    tree.forgetting = forgetting;
    let now = &mut at(start, 0);
    let create = |path: &[u64]| {
        let limits = Limits::new().requests(Rate::per_second(10_u64));
        if path.len() == 2 {
            limited(limits, start)
        } else {
            plain(1)
        }
    };
    let mut ids: Vec<_> = (0..calls)
        .map(|_| {
            tree.push(&[rng.u64(..50), rng.u64(..20)], call(1, 0), (), create, now)
                .unwrap()
        })
        .collect();
    rng.shuffle(&mut ids);
    for (count, id) in ids.into_iter().enumerate() {
        tree.cancel(id, now).unwrap();
        if count % 10_000 == 0 {
            tree.check();
        }
    }
    tree.check();
    left_of(&tree)
}

#[test]
fn nothing_is_left_of_a_hundred_thousand_calls_that_are_cancelled() {
    assert_eq!(cancel_all(100_000, Forgetting::WhenNothingChanges), NOTHING);
    let (_, nodes, _) = cancel_all(2_000, Forgetting::Never);
    assert!(nodes > 50, "{nodes}");
}
