//! Everything at once, with what must hold of the tree checked as it goes, and nothing left at the end.

use super::*;
use crate::rate::Rate;
use fastrand::Rng;

/// A call that has begun, with what a retry of it needs.
struct Open {
    started: Started,
    path: Vec<u64>,
    call: NewCall,
}

fn limits(rng: &mut Rng) -> Limits {
    let tokens = Rate::per_second(rng.u64(100..100_000)).burst(rng.u64(500..2_000));
    Limits::new()
        .requests(Rate::per_second(rng.u64(1..2_000)).burst(rng.u64(1..50)))
        .tokens(if rng.u32(..20) == 0 { tokens.refuse() } else { tokens })
}

/// Runs random operations of all kinds on a tree of three levels, and checks it after every `check_each` of them. Returns
/// how many calls went.
fn storm(seed: u64, steps: u64, check_each: u64) -> u64 {
    let mut rng = Rng::with_seed(seed);
    let start = start();
    let mut tree = Tree::new([rng.bool(), false, false], 60);
    let mut waiting: Vec<usize> = Vec::new();
    let mut open: Vec<Open> = Vec::new();
    let (mut time, mut went, mut lost) = (0, 0, 0_u64);
    for step in 0..steps {
        time += [0, rng.u64(..1_000), rng.u64(..3_000_000)][rng.usize(..3)];
        let now = &mut at(start, time);
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
                let used = [0, rng.u64(..500), rng.u64(..10_000), u64::MAX][[0, 1, 1, 1, 2, 3][rng.usize(..6)]];
                settle(&mut tree, started, used, now);
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
                refused(&mut tree, &mut waiting);
                continue;
            }
            _ => {
                if let Some((started, (path, call))) = tree.start(now) {
                    let at = waiting.iter().position(|id| *id == started.id);
                    waiting.swap_remove(at.expect("only calls that wait go"));
                    open.push(Open { started, path, call });
                    went += 1;
                }
                refused(&mut tree, &mut waiting);
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
            refused(&mut tree, &mut waiting);
        }
    }
    assert!(lost < steps / 10, "{lost}");
    let now = &mut at(start, time);
    for Open { started, .. } in open {
        settle(&mut tree, started, 1, now);
    }
    tree.check();
    for id in waiting {
        tree.cancel(id, now).unwrap();
    }
    tree.check();
    for _ in 0..20 {
        tree.head(&mut at(start, time + 30 * 86_400 * SECOND));
    }
    tree.check();
    assert_eq!((tree.waiting(), tree.nodes(), tree.next_at()), (0, 0, None));
    went
}

/// Takes the calls that were refused out of those that wait.
fn refused<T: Clone + Eq + std::hash::Hash, P>(tree: &mut Tree<T, P>, waiting: &mut Vec<usize>) {
    if !tree.take_refused().is_empty() {
        waiting.retain(|id| tree.is_waiting(*id));
    }
}

#[test]
fn in_a_storm_of_everything_all_is_consistent_and_all_is_forgotten_in_the_end() {
    let went: u64 = (0..40).map(|seed| storm(seed, 18_000, 20)).sum();
    println!("{went} calls");
    assert!(went >= 100_000, "{went}");
}

#[test]
#[ignore = "a million decisions: run by hand"]
fn in_a_storm_of_millions_of_decisions_all_is_consistent() {
    let went: u64 = (1_000..1_100).map(|seed| storm(seed, 100_000, 1)).sum();
    println!("{went} calls");
    assert!(went >= 1_000_000, "{went}");
}

#[test]
fn nothing_is_left_of_a_hundred_thousand_calls_that_are_cancelled() {
    let mut rng = Rng::with_seed(1);
    let start = start();
    let mut tree = tree();
    let now = &mut at(start, 0);
    let create = |path: &[u64]| {
        let limits = Limits::new().requests(Rate::per_second(10_u64));
        if path.len() == 2 {
            limited(limits, start)
        } else {
            plain(1)
        }
    };
    let mut ids: Vec<_> = (0..100_000)
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
    assert_eq!((tree.waiting(), tree.nodes(), tree.next_at()), (0, 0, None));
}
