//! Calls that wait in the queue: memory and time per call.

use crate::{
    Scale,
    common::median,
    measure::{Memory, ThreadTime, current_thread, page_faults},
    subject::{Blocker, Subject, fill, request, submit_first},
    table::{Bar, Table},
};
use allocation_counter::measure;
use std::{hint::black_box, iter, time::Duration};
use tokio::runtime::Runtime;

/// The smallest number of calls in a round: with smaller sizes of the queue, queueing and running the calls is repeated
/// until this number is reached.
const CALLS_PER_ROUND: usize = 100_000;

const BYTES: Bar = Bar { max: 640.0, aim: 512.0 };
const RATIO: Bar = Bar { max: 1.5, aim: 1.2 };

/// The figures of one size of the queue in one round, per call.
struct Queued {
    /// What is in use while all calls are queued.
    memory: Memory,
    submit_ns: f64,
    drain_ns: f64,
    page_faults: f64,
}

impl Queued {
    const fn total_ns(&self) -> f64 {
        self.submit_ns + self.drain_ns
    }
}

/// Measures queued calls whose handles the caller keeps, or drops at once.
pub(crate) fn queued<S: Subject, const KEEP: bool>(scale: &Scale, table: &mut Table) {
    let runtime = current_thread();
    let round = || scale.sizes.map(|n| queue_and_drain::<S>(&runtime, n, KEEP));
    let first = round();
    let rounds: Vec<_> = iter::repeat_with(round).take(scale.rounds).collect();
    let request = bare_requests(scale.sizes[0]);

    for (size, n) in scale.sizes.into_iter().enumerate() {
        let median = |figure: fn(&Queued) -> f64| median(rounds.iter().map(|sizes| figure(&sizes[size])));
        table.add("bytes", n, median(|queued| queued.memory.bytes) - request.bytes);
        table.add(
            "allocations",
            n,
            median(|queued| queued.memory.allocations) - request.allocations,
        );
        table.add("submit-ns", n, median(|queued| queued.submit_ns));
        table.add("drain-ns", n, median(|queued| queued.drain_ns));
        table.add("total-ns", n, median(Queued::total_ns));
        table.add("faults", n, median(|queued| queued.page_faults));
        table.add("first-ns", n, first[size].total_ns());
        table.add("first-faults", n, first[size].page_faults);
    }
    let [_, _, most] = scale.sizes;
    let ratio = |figure: fn(&Queued) -> f64| median(rounds.iter().map(|[few, _, many]| figure(many) / figure(few)));
    table.add("submit-ratio", most, ratio(|queued| queued.submit_ns));
    table.add("drain-ratio", most, ratio(|queued| queued.drain_ns));
    table.add("total-ratio", most, ratio(Queued::total_ns));
    table.bar("bytes", most, BYTES);
    table.bar("total-ratio", most, RATIO);
}

/// Queues `n` calls and lets them run, and repeats this until there were [`CALLS_PER_ROUND`] calls. The memory is that
/// of the first repetition.
fn queue_and_drain<S: Subject>(runtime: &Runtime, n: usize, keep: bool) -> Queued {
    let times = CALLS_PER_ROUND.div_ceil(n);
    let blocker = Blocker::new();
    let mut subject = runtime.block_on(async { S::start(n + 1, &blocker) });
    let (mut submit, mut drain) = (Duration::ZERO, Duration::ZERO);
    let mut memory = None;
    let faults_before = page_faults();
    for time in 1..=times {
        let first = runtime.block_on(submit_first(&mut subject));
        let mut calls = Vec::new();
        let begun = ThreadTime::now();
        let counted = measure(|| calls = runtime.block_on(fill(&mut subject, n, keep)));
        submit += begun.elapsed();
        assert_eq!(subject.depth(), n, "all calls are queued");
        memory.get_or_insert(Memory::per_item(&counted, n));

        let begun = ThreadTime::now();
        runtime.block_on(async {
            blocker.unblock();
            for call in iter::once(first).chain(calls) {
                S::response(call).await;
            }
        });
        drain += begun.elapsed();
        assert_eq!(subject.depth(), 0);
        assert_eq!(blocker.ended(), time * (n + 1), "each call was made once");
        runtime.block_on(blocker.block());
    }
    let calls = (times * n) as f64;
    Queued {
        memory: memory.expect("there is at least one repetition"),
        submit_ns: submit.as_nanos() as f64 / calls,
        drain_ns: drain.as_nanos() as f64 / calls,
        page_faults: page_faults().saturating_sub(faults_before) as f64 / calls,
    }
}

/// The memory of a request that belongs to no call.
fn bare_requests(n: usize) -> Memory {
    let mut requests = Vec::new();
    let counted = measure(|| requests = iter::repeat_with(request).take(n).collect());
    assert_eq!(black_box(requests).capacity(), n);
    Memory::per_item(&counted, n)
}
