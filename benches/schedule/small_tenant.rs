//! How long a small tenant waits beside the calls of a large one, and how much of the rate is reached.

use crate::common::median;
use http::{Request, Response};
use std::{convert::Infallible, sync::Arc, time::Duration};
use throttle_net::{Queue, Throttle};
use tokio::{runtime::Builder, task::JoinSet, time::Instant};
use tower::service_fn;
use tower_outbound::{Call, Executor, Rate, Schedule, schedule::Level};

/// The number of calls that the small tenant makes.
const SMALL: usize = 10;
const TENANTS: [&str; 2] = ["large", "small"];

/// A rate with its burst, and the number of calls that the large tenant makes.
#[derive(Clone, Copy)]
struct Load {
    per_second: u32,
    burst: u32,
    large: usize,
}

#[derive(Clone, Copy)]
enum Contender {
    Scheduled,
    FirstInFirstOut,
    ThrottleNet,
}

/// What one run has shown.
struct Figures {
    achieved: f64,
    small: Duration,
}

const CONTENDERS: [Contender; 3] = [Contender::Scheduled, Contender::FirstInFirstOut, Contender::ThrottleNet];

/// Measures and prints the table. Returns the lines for programs.
pub(crate) fn print(rounds: usize, quick: bool) -> Vec<String> {
    let per_second = if quick {
        [100, 1_000, 4_000]
    } else {
        [100, 1_000, 20_000]
    };
    let loads = per_second.map(|per_second: u32| Load {
        per_second,
        // What flows in during 10 ms.
        burst: per_second / 100,
        large: if per_second > 1_000 || quick {
            per_second as usize
        } else {
            2 * per_second as usize
        },
    });
    let mut lines = Vec::new();
    println!(
        "{:<20} {:>12} {:<28} {:>9} {:>12}",
        "rate", "before", "", "achieved", "the ten, ms"
    );
    for load in loads {
        let mut runs: [Vec<Figures>; 3] = Default::default();
        for _ in 0..rounds {
            for (contender, runs) in CONTENDERS.iter().zip(&mut runs) {
                runs.push(contender.run(load));
            }
        }
        for (contender, runs) in CONTENDERS.iter().zip(&runs) {
            let achieved = median(runs.iter().map(|run| 100.0 * run.achieved));
            let small = median(runs.iter().map(|run| run.small.as_secs_f64() * 1e3));
            let Load {
                per_second,
                burst,
                large,
            } = load;
            let rate = format!("{per_second}/s burst {burst}");
            println!(
                "{rate:<20} {large:>12} {:<28} {achieved:>8.2} % {small:>11.1}",
                contender.name()
            );
            let name = contender.name().replace(' ', "-");
            lines.push(format!(
                "schedule {name} {rate}: achieved = {achieved:.2}, ten = {small:.1}"
            ));
        }
    }
    lines
}

impl Contender {
    const fn name(self) -> &'static str {
        match self {
            Self::Scheduled => "executor with a schedule",
            Self::FirstInFirstOut => "executor",
            Self::ThrottleNet => "throttle-net",
        }
    }

    fn run(self, load: Load) -> Figures {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build();
        runtime.expect("a runtime can be built").block_on(async move {
            match self {
                Self::Scheduled => executor(load, Some(Schedule::new().level(Level::by("tenant")))).await,
                Self::FirstInFirstOut => executor(load, None).await,
                Self::ThrottleNet => throttle_net(load).await,
            }
        })
    }
}

/// Makes the calls through an executor. All of them are submitted before the first is awaited.
async fn executor(load: Load, schedule: Option<Schedule>) -> Figures {
    let client = service_fn(async |_: Request<()>| Ok::<_, Infallible>(Response::new(Instant::now())));
    let mut executor = Executor::builder()
        .queue_capacity(load.large + SMALL)
        .requests(Rate::per_second(load.per_second).burst(load.burst));
    if let Some(schedule) = schedule {
        executor = executor.schedule(schedule);
    }
    let executor = executor.build(client).expect("the settings are valid");
    executor.start().expect("there is a runtime");
    let start = Instant::now();
    let mut tenants = Vec::new();
    for (tenant, count) in TENANTS.into_iter().zip([load.large, SMALL]) {
        let mut calls = Vec::with_capacity(count);
        for _ in 0..count {
            let call = Call::from(Request::new(())).flow(tenant);
            calls.push(executor.submit(call).await.expect("there is a place"));
        }
        tenants.push(calls);
    }
    let mut last = Vec::new();
    for calls in tenants {
        let mut latest = start;
        for call in calls {
            latest = latest.max(call.await.expect("the call succeeds").into_body());
        }
        last.push(latest);
    }
    load.figures(start, &last)
}

/// Makes the calls as tasks that wait in the fair queue of throttle-net.
async fn throttle_net(load: Load) -> Figures {
    let throttle = Throttle::builder()
        .per_second(load.per_second)
        .burst(load.burst)
        .build();
    let queue: Queue<Throttle, &str> = Queue::builder().capacity(load.large + SMALL).build(throttle);
    let queue = Arc::new(queue);
    let start = Instant::now();
    let mut tenants = Vec::new();
    for (tenant, count) in TENANTS.into_iter().zip([load.large, SMALL]) {
        let mut calls = JoinSet::new();
        for _ in 0..count {
            let queue = queue.clone();
            calls.spawn(async move {
                queue.acquire(tenant, 0, None).await.expect("there is a place");
                Instant::now()
            });
        }
        tenants.push(calls);
    }
    let mut last = Vec::new();
    for calls in tenants {
        last.push(calls.join_all().await.into_iter().fold(start, Instant::max));
    }
    load.figures(start, &last)
}

impl Load {
    /// `last` is the time of the last call of each tenant.
    fn figures(self, start: Instant, last: &[Instant]) -> Figures {
        let end = last.iter().copied().fold(start, Instant::max);
        let calls = (self.large + SMALL) as f64 - f64::from(self.burst);
        Figures {
            achieved: calls / f64::from(self.per_second) / (end - start).as_secs_f64(),
            small: last[1] - start,
        }
    }
}
