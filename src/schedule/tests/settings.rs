//! Settings of nodes that live, the cap on nodes, calls that are refused, and what can be seen.

use super::*;
use crate::{
    error::Rejected,
    rate::{Budget, Rate},
};

#[test]
fn a_tree_that_is_full_gives_a_call_of_a_new_flow_back_and_forgets_no_flow_for_it() {
    let start = start();
    let mut tree = Tree::new([false; 3], 3);
    let now = &mut at(start, 0);
    let limits = || Limits::new().requests(Rate::per_second(1_u64));
    let create = |path: &[u64]| {
        if path.len() == 2 {
            limited(limits(), start)
        } else {
            plain(1)
        }
    };
    tree.push(&[1, 1], call(1, 0), "a", create, now).unwrap();
    // A path of two new nodes does not fit, and none of the two is made.
    assert_eq!(tree.push(&[2, 1], call(1, 0), "b", create, now), Err("b"));
    assert_eq!(tree.nodes(), 2);
    tree.push(&[1, 2], call(1, 0), "c", create, now).unwrap();
    for _ in 0..2 {
        let (started, _) = tree.start(now).unwrap();
        settle(&mut tree, started, 1, now);
    }
    // Nothing waits or is open, but the limits of both flows are not full.
    tree.check();
    assert_eq!((tree.nodes(), tree.waiting()), (3, 0));
    assert_eq!(
        tree.push(&[2, 1], call(1, 0), "d", create, &mut at(start, SECOND - 1)),
        Err("d")
    );
    tree.push(&[2, 1], call(1, 0), "e", create, &mut at(start, SECOND))
        .unwrap();
    assert_eq!(tree.nodes(), 2);
}

#[test]
fn a_path_that_is_no_flow_gives_the_call_back() {
    let mut tree = tree();
    let now = &mut at(start(), 0);
    let create = |_: &[u64]| plain(1);
    tree.push(&[1, 2], call(1, 0), (), create, now).unwrap();
    for path in [&[][..], &[1], &[1, 2, 3], &[1, 2, 3, 4]] {
        assert!(tree.push(path, call(1, 0), (), create, now).is_err(), "{path:?}");
    }
    assert_eq!(tree.nodes(), 2);
}

#[test]
fn a_call_that_a_limit_never_admits_is_refused_at_once_and_delays_no_other() {
    let start = start();
    for above in [false, true] {
        let mut tree = tree();
        let now = &mut at(start, 0);
        let create = |path: &[u64]| {
            let is_limited = (path.len() == 1) == above;
            if is_limited {
                limited(Limits::new().tokens(Rate::per_second(10_u64)), start)
            } else {
                plain(1)
            }
        };
        tree.push(&[1, 1], call(4, 0), 1, create, now).unwrap();
        assert_eq!(
            tree.push(&[1, 1], call(11, 0), 2, create, now),
            Ok(super::super::tree::REFUSED)
        );
        tree.push(&[1, 2], call(4, 0), 3, create, now).unwrap();
        let refused = tree.take_refused();
        assert!(
            matches!(refused[..], [(2, Rejected::CostExceedsBurst(_))]),
            "{refused:?}"
        );
        tree.check();
        let (first, one) = tree.start(now).unwrap();
        let (second, three) = tree.start(now).unwrap();
        assert_eq!((one, three), (1, 3));
        settle(&mut tree, first, 4, now);
        settle(&mut tree, second, 4, now);
        tree.head(&mut at(start, SECOND));
        assert_eq!(tree.nodes(), 0);
    }
}

#[test]
fn calls_that_new_limits_never_admit_are_refused_when_they_are_first_and_others_go_on() {
    let start = start();
    let mut tree = tree();
    let now = &mut at(start, 0);
    let limits = |most: u64| Limits::new().tokens(Rate::per_second(most));
    for (flow, cost) in [(1, 40), (1, 5), (2, 50), (2, 60), (3, 6)] {
        tree.push(&[9, flow], call(cost, 0), cost, |_| plain(1), now).unwrap();
    }
    tree.set_limits(&[9], limits(10), now).unwrap();
    tree.check();
    let mut went = Vec::new();
    for second in 0..3 {
        while let Some((started, cost)) = tree.start(&mut at(start, second * SECOND)) {
            went.push(cost);
            settle(&mut tree, started, cost, &mut at(start, second * SECOND));
            tree.check();
        }
    }
    let mut refused: Vec<_> = tree.take_refused().into_iter().map(|(cost, _)| cost).collect();
    refused.sort_unstable();
    assert_eq!((went, refused), (vec![6, 5], vec![40, 50, 60]));
    tree.head(&mut at(start, 9 * SECOND));
    assert_eq!(tree.nodes(), 0);
}

#[test]
fn an_exhausted_limit_that_refuses_says_so_for_each_call_and_lets_other_flows_go() {
    let start = start();
    let mut tree = tree();
    let now = &mut at(start, 0);
    let create = |path: &[u64]| match path {
        [1] => limited(Limits::new().requests(Rate::per_hour(1_u64).refuse()), start),
        _ => plain(1),
    };
    for name in 0..3 {
        tree.push(&[1], call(1, 0), name, create, now).unwrap();
        tree.push(&[2], call(1, 0), 10 + name, create, now).unwrap();
    }
    let mut went = Vec::new();
    while let Some((started, name)) = tree.start(now) {
        went.push(name);
        settle(&mut tree, started, 1, now);
        tree.check();
    }
    let refused = tree.take_refused();
    assert!(refused.iter().all(|(_, why)| matches!(why, Rejected::Exhausted(_))));
    assert_eq!((went, refused.len()), (vec![0, 10, 11, 12], 2));
}

#[test]
fn limits_that_a_node_gets_later_are_not_credited_what_they_were_not_charged() {
    let start = start();
    let mut tree = tree();
    let now = &mut at(start, 0);
    let create = |_: &[u64]| plain(1);
    for _ in 0..3 {
        tree.push(&[1], call(100, 0), (), create, now).unwrap();
    }
    let (before, ()) = tree.start(now).unwrap();
    tree.set_limits(&[1], Limits::new().tokens(Rate::per_second(100_u64)), now)
        .unwrap();
    let (after, ()) = tree.start(now).unwrap();
    settle(&mut tree, before, 0, now);
    assert!(tree.head(now).is_none(), "the charge of 100 is open");
    settle(&mut tree, after, 0, now);
    assert!(tree.head(now).is_some());
}

#[test]
fn limits_of_a_key_must_begin_full() {
    let start = start();
    let mut tree = tree();
    let now = &mut at(start, 0);
    tree.push(&[1], call(1, 0), (), |_: &[u64]| plain(1), now).unwrap();
    let empty = || Limits::new().requests(Rate::per_second(10_u64).initial(0_u64));
    for path in [[1], [2]] {
        let error = tree.set_limits(&path, empty(), now).unwrap_err();
        assert!(error.to_string().contains("requests.initial"), "{error}");
    }
    assert!(KeyLimits::new(empty(), UNIX_EPOCH, start).is_err());
    assert!(tree.head(now).is_some());
}

#[test]
fn a_paused_node_blocks_what_is_below_it_until_its_pause_ends_and_is_not_forgotten_before() {
    let start = start();
    let mut tree = tree();
    let now = &mut at(start, 0);
    let create = |_: &[u64]| plain(1);
    let first = tree.push(&[1, 1], call(1, 0), 1, create, now).unwrap();
    tree.push(&[2, 1], call(1, 0), 2, create, now).unwrap();
    let until = start + Duration::from_secs(10);
    tree.pause(&[1], Some(until), now);
    tree.check();
    let (second, name) = tree.start(now).unwrap();
    assert_eq!(name, 2);
    assert!(tree.start(now).is_none());
    assert_eq!((tree.next_at(), tree.is_blocked(&[1])), (Some(until), true));
    let view = &tree.view(1, start)[0];
    assert_eq!(
        (&view.path[..], view.blocked_until, view.blocked_at),
        (&[1, 1][..], Some(until), Some(0))
    );
    assert!(view.is_paused);
    settle(&mut tree, second, 1, now);
    tree.cancel(first, now).unwrap();
    tree.head(&mut at(start, 10 * SECOND - 1));
    assert_eq!(tree.nodes(), 1, "the paused one");
    // The pause holds for the calls that come later, until it ends or is ended.
    let again = &mut at(start, 2 * SECOND);
    tree.push(&[1, 3], call(1, 0), 3, create, again).unwrap();
    assert!(tree.head(again).is_none());
    tree.pause(&[1], None, again);
    assert!(tree.head(again).is_some());
    tree.pause(&[1], Some(until), again);
    assert!(tree.head(&mut at(start, 10 * SECOND - 1)).is_none());
    let (last, _) = tree.start(&mut at(start, 10 * SECOND)).unwrap();
    settle(&mut tree, last, 1, &mut at(start, 10 * SECOND));
    assert_eq!(tree.nodes(), 0);
}

#[test]
fn a_weight_counts_for_what_is_charged_from_when_it_was_set() {
    let mut tree = tree();
    let now = &mut at(start(), 0);
    let create = |_: &[u64]| plain(1);
    let mut went = [0_u64; 2];
    let mut run = |tree: &mut Tree<u64, usize>, now: &mut LazyNow| {
        went = [0; 2];
        for _ in 0..1_000 {
            for flow in 0..2 {
                while tree.waiting_of(&[flow as u64]) < 2 {
                    tree.push(&[flow as u64], call(10, 0), flow, create, now).unwrap();
                }
            }
            let (started, flow) = tree.start(now).unwrap();
            went[flow] += 1;
            settle(tree, started, 10, now);
        }
        tree.check();
        went
    };
    assert_eq!(run(&mut tree, now), [500, 500]);
    tree.set_weight(&[1], weight(4), now);
    tree.check();
    let [light, heavy] = run(&mut tree, now);
    assert!(light.abs_diff(200) <= 2 && heavy.abs_diff(800) <= 2, "{light} {heavy}");
    tree.set_weight(&[7], weight(4), now);
    assert_eq!(tree.nodes(), 2);
}

#[test]
fn what_waits_in_a_flow_before_a_new_call_is_summed() {
    let mut tree = tree();
    let now = &mut at(start(), 0);
    let create = |_: &[u64]| plain(1);
    let of_class = |class, cost, due| NewCall {
        class,
        ..call(cost, due)
    };
    tree.push(&[1, 1], of_class(0, 30, 0), (), create, now).unwrap();
    let id = tree.push(&[1, 1], of_class(0, 12, 5), (), create, now).unwrap();
    tree.push(&[1, 2], of_class(0, 5, 0), (), create, now).unwrap();
    for due in [10, 20, 30] {
        tree.push(&[1, 1], of_class(1, 100, due), (), create, now).unwrap();
    }
    let waiting = [&[1][..], &[1, 1], &[3]].map(|path| tree.waiting_of(path));
    assert_eq!(waiting, [6, 5, 0]);
    let ahead = |tree: &Tree<u64, ()>, class, due| tree.demand_ahead(&[1, 1], class, due).of(Budget::Tokens);
    // A call goes behind all of its class, and behind those of others that are due before it.
    assert_eq!([9, 10, 25, 99].map(|due| ahead(&tree, 0, due)), [42, 142, 242, 342]);
    assert_eq!([4, 5].map(|due| ahead(&tree, 1, due)), [330, 342]);
    assert_eq!([0, 7].map(|due| ahead(&tree, 2, due)), [30, 42]);
    // With a shorter slack, one of its class is due earlier than those before it, and still goes behind them.
    tree.push(&[1, 1], of_class(1, 1_000, 1), (), create, now).unwrap();
    assert_eq!([1, 29].map(|due| ahead(&tree, 0, due)), [42, 242]);
    tree.cancel(id, now).unwrap();
    let demand = tree.demand_ahead(&[1, 1], 0, 0);
    assert_eq!((demand.of(Budget::Requests), demand.of(Budget::Tokens)), (1, 30));
    assert_eq!(tree.demand_ahead(&[3, 1], 0, 0).of(Budget::Tokens), 0);
}

#[test]
fn a_view_has_the_flows_with_the_most_waiting_first_and_no_more_than_asked_for() {
    let start = start();
    let mut tree = tree();
    let now = &mut at(start, 0);
    for flow in 0..100_u64 {
        for _ in 0..=flow % 10 {
            tree.push(&[flow], call(1, 0), (), |_| plain(2), now).unwrap();
        }
    }
    let view = tree.view(15, start);
    let waiting: Vec<_> = view.iter().map(|flow| flow.waiting).collect();
    assert_eq!(waiting, [[10; 10].as_slice(), &[9; 5]].concat());
    assert!(
        view.iter()
            .all(|flow| flow.path[0] % 10 == if flow.waiting == 10 { 9 } else { 8 })
    );
    assert!(tree.view(0, start).is_empty() && tree.view(1_000, start).len() == 100);
    let (_open, ()) = tree.start(now).unwrap();
    let served: Vec<_> = tree
        .view(1_000, start)
        .into_iter()
        .filter(|flow| flow.open == 1)
        .collect();
    assert_eq!(
        (served[0].lag, served[0].weight, served[0].blocked_at),
        (units(1) / 2, 2, None)
    );
}
