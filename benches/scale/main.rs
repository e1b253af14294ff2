//! Measures the costs of a queue with up to a million calls: memory and time per call to queue, make and cancel the
//! calls. Also measures the costs of waiting for a rate limit and of an idle executor.
//!
//! `cargo bench -p tower-outbound-benches --bench scale` takes about three minutes. `-- --quick` runs a tenth of the
//! calls, and `-- TEXT` runs only the sections whose names contain the text. The last lines of the output are for
//! programs: `scale <section>-<column> <n> = <figure>`.
//!
//! In each round, every size of the queue (`n`) is measured once. Each figure is the median of all rounds except the
//! first, which is a warm-up. Figures are per call. Times are processor time of the thread, and include the time to
//! count its allocations.
//!
//! | section | what is measured |
//! |---|---|
//! | `executor-kept`, `executor-dropped` | calls queued in an executor, whose handles are kept, or dropped at once |
//! | `queue-kept`, `queue-dropped` | calls queued by only a `QueueLayer`, with handles kept, or dropped at once |
//! | `answered-at-once` | calls in flight that are all answered at the same time, and plain tasks that do the same |
//! | `cancel` | cancelling queued calls: by their handles, by dropping their futures, by stopping the executor |
//! | `wait-queue` | waiters of a rate limiter, which begin to wait and stop waiting |
//! | `idle` | an idle executor, and one with 1,000 callers that wait for an empty bucket |
//! | `memory` | an executor, a rate limiter of two budgets and a semaphore that are not used |
//!
//! | column | meaning |
//! |---|---|
//! | `bytes`, `allocations` | in use while the calls are queued, including handles that are kept, without requests |
//! | `submit-ns` | to make a request and submit its call |
//! | `drain-ns` | from letting the first call end to the outcome of the last call |
//! | `total-ns` | `submit-ns` and `drain-ns` together |
//! | `faults` | page faults |
//! | `first-ns`, `first-faults` | `total-ns` and `faults` of the warm-up, in which memory may be new to the process |
//! | `…-ratio` | the time at the largest size, divided by the time at the smallest size |
//! | `executor-ns`, `tasks-ns`, `ratio` | from the first answer to the last outcome, and the ratio of both |
//! | `handles-ns`, `futures-ns`, `stop-ns` | to cancel a call by its handle, by dropping its future, by a stop |
//! | `join-ns`, `leave-ns` | for a waiter to begin to wait, and to stop waiting |
//! | `…-bytes` | on the heap, for each |
//! | `wake-ups/s`, `parks/s`, `cpu-us/s` | wake-ups of all threads, parks of Tokio's workers, processor time in µs |

mod at_once;
mod cancel;
#[path = "../common.rs"]
mod common;
mod idle;
mod measure;
mod queued;
mod subject;
mod table;
mod waiting;

use at_once::at_once;
use cancel::cancel;
use clap::Parser;
use http::{Request, Response};
use idle::{idle, memory};
use queued::queued;
use table::Table;
use tower_outbound::{Executor, Queue};
use waiting::wait_queue;

/// The number of rounds of the sections without ratios.
const FEW_ROUNDS: usize = 3;

type Section = fn(&Scale, &mut Table);

const SECTIONS: [(&str, Section); 9] = [
    ("executor-kept", queued::<Executor<(), ()>, true>),
    ("executor-dropped", queued::<Executor<(), ()>, false>),
    ("queue-kept", queued::<Queue<Request<()>, Response<()>>, true>),
    ("queue-dropped", queued::<Queue<Request<()>, Response<()>>, false>),
    ("answered-at-once", at_once),
    ("cancel", cancel),
    ("wait-queue", wait_queue),
    ("idle", idle),
    ("memory", memory),
];

#[derive(Parser)]
struct Options {
    /// Run only the sections whose name contains this text
    filter: Option<String>,
    /// Run with a tenth of the calls, and fewer rounds
    #[arg(long)]
    quick: bool,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// The sizes of the queue that are measured, and the number of rounds.
struct Scale {
    sizes: [usize; 3],
    /// The numbers of calls that are answered at once.
    answered: [usize; 3],
    rounds: usize,
}

fn main() {
    let options = Options::parse();
    let scale = if options.quick {
        Scale {
            sizes: [1_000, 10_000, 100_000],
            answered: [400, 1_600, 6_400],
            rounds: 3,
        }
    } else {
        Scale {
            sizes: [1_000, 100_000, 1_000_000],
            answered: [4_000, 16_000, 64_000],
            rounds: 9,
        }
    };
    let mut tables = Vec::new();
    for (section, measure) in SECTIONS {
        if options.filter.as_ref().is_none_or(|filter| section.contains(filter)) {
            let mut table = Table::new(section);
            measure(&scale, &mut table);
            table.print();
            tables.push(table);
        }
    }
    println!("{:<32}{:>9} {:>9} {:>6} {:>6}", "", "n", "figure", "bar", "aim");
    tables.iter().for_each(Table::print_verdicts);
    println!();
    tables.iter().for_each(Table::print_for_programs);
}
