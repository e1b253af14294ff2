//! Properties of the [`Tree`], each shown over many random decisions.

use super::{
    fair::Units,
    tree::{NewCall, Started, Tree},
};
use crate::{clock::LazyNow, rate::Cost};
use fastrand::Rng;
use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    num::NonZeroU32,
};
use tokio::time::{Duration, Instant};

const SEEDS: u64 = 60;
const STEPS: u64 = 3_000;

fn at(start: Instant, nanos: u64) -> LazyNow {
    LazyNow::at(start + Duration::from_nanos(nanos))
}

fn call(cost: u64, due: u64) -> NewCall {
    NewCall {
        class: 0,
        due,
        cost: Cost::tokens(cost),
        units: Units::from(cost) << 20,
        seq: None,
    }
}

fn weight(weight: u32) -> NonZeroU32 {
    NonZeroU32::new(weight).unwrap()
}

/// How much two flows that are ready all the time may be apart, and how much they are.
#[derive(Debug, Default)]
struct Apart {
    pairs: u64,
    over: u64,
    worst: f64,
}

/// Runs flows with random weights, costs, and errors of their estimates, through a tree, or (`is_fifo`) through a queue.
/// Compares what each pair of flows has used in every interval in which both had calls that waited.
fn pairs_apart(error: f64, settles: bool, is_fifo: bool) -> Apart {
    let mut apart = Apart::default();
    for seed in 0..SEEDS {
        let mut rng = Rng::with_seed(seed);
        let start = Instant::now();
        let mut tree = Tree::new([false; 3]);
        let mut fifo = VecDeque::new();
        let flows = rng.usize(2..=6);
        let weights: Vec<u32> = (0..flows).map(|_| rng.u32(1..=8)).collect();
        let largest: Vec<u64> = (0..flows).map(|_| rng.u64(1..=1_000)).collect();
        let bias: Vec<f64> = (0..flows).map(|_| error.powf(rng.f64().mul_add(2.0, -1.0))).collect();
        let permits = rng.usize(1..=16);
        let mut waiting = vec![0_u64; flows];
        let mut costs: HashMap<usize, (usize, u64, u64)> = HashMap::new();
        let mut out: Vec<(Option<Started>, usize, u64, u64)> = Vec::new();
        // For each pair of flows what each has used since the interval began, and the extremes of the difference.
        let mut used = vec![0_f64; flows];
        let mut open_error = vec![0_f64; flows];
        let mut worst_error = vec![0_f64; flows];
        let mut low = BTreeMap::new();
        for step in 0..STEPS {
            let mut now = at(start, step);
            let push = |flow: usize,
                        tree: &mut Tree<u64, ()>,
                        fifo: &mut VecDeque<usize>,
                        rng: &mut Rng,
                        now: &mut LazyNow| {
                let cost = rng.u64(1..=largest[flow]);
                let spread = error.powf(rng.f64().mul_add(0.2, -0.1));
                let estimate = ((cost as f64 * bias[flow] * spread) as u64).max(1);
                let id = tree.push(
                    &[flow as u64],
                    call(estimate, step),
                    (),
                    |_| (weight(weights[flow]), None),
                    now,
                );
                fifo.push_back(id);
                (id, (flow, cost, estimate))
            };
            for flow in 0..flows {
                // Mostly all flows have calls that wait; now and then one has none for a while.
                let wanted = if (step / 500 + flow as u64) % 7 == 6 { 0 } else { 4 };
                while waiting[flow] < wanted {
                    let (id, what) = push(flow, &mut tree, &mut fifo, &mut rng, &mut now);
                    costs.insert(id, what);
                    waiting[flow] += 1;
                }
            }
            while out.len() < permits {
                let (id, started) = if is_fifo {
                    let Some(id) = fifo.pop_front() else { break };
                    tree.cancel(id, &mut now);
                    (id, None)
                } else {
                    let Some((started, ())) = tree.start(&mut now) else {
                        break;
                    };
                    (started.id, Some(started))
                };
                let (flow, cost, estimate) = costs.remove(&id).unwrap();
                waiting[flow] -= 1;
                used[flow] += cost as f64;
                open_error[flow] += estimate as f64 - cost as f64;
                worst_error[flow] = worst_error[flow].max(open_error[flow].abs());
                out.push((started, flow, cost, estimate));
                for i in 0..flows {
                    for j in 0..i {
                        let difference = used[i] / f64::from(weights[i]) - used[j] / f64::from(weights[j]);
                        let (served, range) = low.entry((i, j)).or_insert(([false; 2], (difference, difference)));
                        served[0] |= i == flow;
                        served[1] |= j == flow;
                        // An interval begins when both have had a turn since they were ready: until then, the one that
                        // has woken may be behind the other.
                        if waiting[i] == 0 || waiting[j] == 0 {
                            *served = [false; 2];
                        }
                        if *served == [true; 2] {
                            *range = (difference.min(range.0), difference.max(range.1));
                        } else {
                            *range = (difference, difference);
                        }
                    }
                }
                for ((i, j), (_, (least, most))) in &low {
                    let bound = |flow: usize| {
                        (largest[flow] as f64 * (error * error).max(1.0) + worst_error[flow]) / f64::from(weights[flow])
                    };
                    let ratio = (most - least) / (bound(*i) + bound(*j));
                    if ratio > 1.0 && apart.worst <= 1.0 {
                        println!(
                            "seed {seed} step {step} flow {flow} cost {cost} pair {i} {j} {least} {most} waiting {waiting:?} weights {weights:?} largest {largest:?} permits {permits} used {used:?}"
                        );
                    }
                    apart.worst = apart.worst.max(ratio);
                }
            }
            while out.len() > permits / 2 || (!out.is_empty() && rng.bool()) {
                let (started, flow, cost, estimate) = out.swap_remove(rng.usize(..out.len()));
                open_error[flow] -= estimate as f64 - cost as f64;
                if let Some(started) = started {
                    let cost = if settles { cost } else { estimate };
                    tree.settle(started, Cost::tokens(cost), Units::from(cost) << 20, &mut now);
                }
            }
        }
        apart.pairs += low.len() as u64;
        apart.over += u64::from(apart.worst > 1.0);
    }
    apart
}

#[test]
fn flows_that_are_ready_get_their_shares_within_the_largest_costs_and_the_errors_of_estimates() {
    for error in [1.0, 2.0, 10.0] {
        let apart = pairs_apart(error, true, false);
        println!("estimates wrong by up to x{error}: {apart:?}");
        assert!(apart.worst <= 1.0, "{apart:?}");
    }
    let without_settlement = pairs_apart(10.0, false, false);
    let fifo = pairs_apart(1.0, true, true);
    println!("controls: {without_settlement:?} {fifo:?}");
    assert!(without_settlement.worst > 1.0 && fifo.worst > 1.0);
}

/// Runs one flow with three classes, or with strict ones, and counts how many calls were overtaken by one that had come
/// too late for that.
fn overtaken_too_late(is_strict: bool) -> (u64, u64) {
    const SLACKS: [u64; 3] = [0, 5_000, 60_000];
    let (mut decisions, mut wrong) = (0, 0);
    for seed in 0..SEEDS {
        let mut rng = Rng::with_seed(seed);
        let start = Instant::now();
        let mut tree = Tree::new([false; 3]);
        let mut arrivals: BTreeMap<usize, (u64, u64)> = BTreeMap::new();
        let mut time = 0;
        for _ in 0..STEPS {
            time += rng.u64(1..=400);
            let mut now = at(start, time);
            while rng.bool() {
                let class = rng.usize(..3);
                let slack = SLACKS[class];
                let due = if is_strict { class as u64 } else { time + slack };
                let new = NewCall {
                    class: class as u8,
                    due,
                    ..call(1, 0)
                };
                arrivals.insert(
                    tree.push(&[0_u64], new, (), |_| (weight(1), None), &mut now),
                    (time, slack),
                );
            }
            let Some((started, ())) = tree.start(&mut now) else {
                continue;
            };
            let (arrived, slack) = arrivals.remove(&started.id).unwrap();
            let others = arrivals.values();
            wrong += others.filter(|(other, its)| other + its < arrived + slack).count() as u64;
            decisions += 1;
            tree.settle(started, Cost::request(), 1, &mut now);
        }
    }
    (decisions, wrong)
}

#[test]
fn a_call_is_overtaken_only_by_those_that_come_less_than_the_difference_of_the_slacks_later() {
    let (decisions, wrong) = overtaken_too_late(false);
    assert!(decisions > 50_000 && wrong == 0, "{wrong} of {decisions}");
    assert!(overtaken_too_late(true).1 > 0);
}

#[test]
fn a_flow_with_large_calls_is_not_starved_by_flows_that_come_and_go() {
    // Ninety flows that are always new, with one call each, and one flow whose calls cost ten times as much.
    const PLACES: u64 = 90;
    let start = Instant::now();
    for error in [1, 10] {
        let mut tree = Tree::new([false; 3]);
        let (mut time, mut fresh, mut heavy, mut gap, mut longest) = (0, 1, 0_u64, 0_u64, 0_u64);
        let mut now = at(start, time);
        for _ in 0..PLACES {
            tree.push(&[fresh], call(error, 0), (), |_| (weight(1), None), &mut now);
            fresh += 1;
        }
        let calls = 60_000;
        for _ in 0..2 {
            tree.push(&[0], call(10 * error, 0), (), |_| (weight(1), None), &mut now);
        }
        let heavy_ids = |tree: &Tree<u64, ()>, id: usize| tree.is_of(id, &[0]);
        for _ in 0..calls {
            time += 1;
            let mut now = at(start, time);
            let (id, _) = tree.head(&mut now).unwrap();
            let is_heavy = heavy_ids(&tree, id);
            let (started, ()) = tree.start(&mut now).unwrap();
            if is_heavy {
                (heavy, longest, gap) = (heavy + 1, longest.max(gap), 0);
                tree.push(&[0], call(10 * error, 0), (), |_| (weight(1), None), &mut now);
                tree.settle(started, Cost::tokens(10), 10 << 20, &mut now);
            } else {
                gap += 1;
                fresh += 1;
                tree.push(&[fresh], call(error, 0), (), |_| (weight(1), None), &mut now);
                tree.settle(started, Cost::tokens(1), 1 << 20, &mut now);
            }
        }
        // An equal part of what is used: 91 flows are there at a time, of which each may use as much.
        println!("estimates wrong by x{error}: {heavy} of {calls} heavy calls, longest gap {longest}");
        // Its first call stands where it would end by its estimate, and so waits for as long as that says.
        let first = (10 * error + 10) * (PLACES + 1);
        assert!(heavy * (PLACES + 1) * 10 >= (calls - first) * 9 / 10, "{heavy}");
        assert!(longest <= first, "{longest}");
        assert!(tree.nodes() < 400, "{}", tree.nodes());
    }
}
