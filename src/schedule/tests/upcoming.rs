//! The calls that would go next are those that do.

use super::*;
use crate::rate::Rate;

/// How the calls that were found differ from those that went.
struct Compared {
    decisions: usize,
    differ: usize,
}

/// Fills trees with random calls of nested flows, with weights, a strict level, limits of some keys and calls in flight,
/// and compares the calls found with those that then go one after the other at the same time. As a `control`, a call that is
/// more urgent comes in between.
fn compare(rounds: u64, control: bool) -> Compared {
    let mut compared = Compared {
        decisions: 0,
        differ: 0,
    };
    for seed in 0..rounds {
        let mut random = fastrand::Rng::with_seed(seed);
        let start = start();
        let mut tree = Tree::<u64, u64>::new([random.bool(), false, false], usize::MAX);
        if random.bool() {
            tree.count_running();
        }
        let depth = random.usize(1..=3);
        let limits = Limits::new().tokens(Rate::per_second(100_u64).burst(300_u64));
        let weights: Vec<u32> = (0..64).map(|_| random.u32(1..=4)).collect();
        let limited_at = random.u64(0..8);
        let create = |path: &[u64]| NewNode {
            limits: (path[0] == limited_at).then(|| Box::new(key_limits(limits.clone(), &mut at(start, 0)))),
            max_running: (path.iter().sum::<u64>() % 5 == 0).then(|| 7.try_into().unwrap()),
            ..plain(weights[path.iter().map(|key| *key as usize).sum::<usize>()])
        };
        for number in 0..random.u64(1..150) {
            let now = &mut at(start, number);
            let path: Vec<_> = (0..depth).map(|_| random.u64(0..4)).collect();
            let call = NewCall {
                class: random.u8(0..3),
                ..call(random.u64(1..100), number + random.u64(0..50))
            };
            tree.push(&path, call, number, create, now).unwrap();
            // Some go at once, so that the shares differ.
            if random.u8(0..5) == 0 {
                tree.start(now).into_iter().for_each(|(started, _)| {
                    let cost = started.cost().tokens;
                    settle(&mut tree, started, cost, now);
                });
            }
        }
        let now = &mut at(start, 1_000);
        let found = tree.upcoming(64, now);
        let found: Vec<_> = found.iter().map(|id| tree.call(*id).unwrap().payload).collect();
        assert!(found.len() <= 64 && (found.is_empty() == tree.head(now).is_none()));
        if control {
            let urgent = NewCall { class: 3, ..call(1, 0) };
            tree.push(&vec![3; depth], urgent, 1_000, create, now).unwrap();
        }
        for number in &found {
            compared.decisions += 1;
            let gone = tree.start(now).map(|(_, number)| number);
            compared.differ += usize::from(gone != Some(*number));
        }
        tree.check();
        // All that could go were found. Those of a key with limits may be fewer: what it admits for late timers is not counted.
        assert!(control || limited_at < 4 || found.len() == 64 || tree.head(now).is_none());
    }
    compared
}

#[test]
fn the_calls_that_are_found_to_go_next_are_those_that_go() {
    let Compared { decisions, differ } = compare(4_000, false);
    assert!(decisions > 100_000, "{decisions}");
    assert_eq!(differ, 0, "of {decisions}");
    let control = compare(200, true);
    assert!(control.differ > 1_000, "{} of {}", control.differ, control.decisions);
}
