//! One run of the load: through an executor whose schedule knows the tenants, or not.

use crate::{
    load::{ACCOUNT, LARGE, TENANTS, Tenant},
    table::Table,
};
use anyhow::ensure;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use std::time::Duration;
use tokio::{
    task::JoinSet,
    time::{Instant, interval, sleep_until},
};
use tower_outbound::{Call, Executor, Limits, Rate, Schedule, Shutdown, schedule::Level};

/// Who goes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Of each model, the call that came first.
    FirstComeFirstServed,
    /// Of each model, the tenants in turns.
    Fair,
}

/// When the calls of a tenant were answered, after the start of the run, in order.
pub(crate) struct Answered {
    pub(crate) at: Vec<Duration>,
    /// The longest time from a call's submission to its answer.
    pub(crate) longest: Duration,
}

/// The outermost level is the one whose limits are shared by what is below it: all tenants share the limits of a model.
fn schedule(order: Order) -> Schedule {
    let limits = |model: &str| (model == "large").then(|| Limits::new().requests(Rate::per_second(LARGE).burst(1)));
    let schedule = Schedule::new().level(Level::by("model").limits(limits));
    match order {
        // The calls name their tenant here, too. A key without a level is ignored.
        Order::FirstComeFirstServed => schedule,
        Order::Fair => schedule.level(Level::by("tenant")),
    }
}

/// Makes all calls, shows the schedule meanwhile, and returns when the calls of each tenant were answered.
pub(crate) async fn run(order: Order, url: &str) -> anyhow::Result<Vec<Answered>> {
    let schedule = schedule(order);
    let executor = Executor::builder()
        .requests(Rate::per_second(ACCOUNT).burst(1))
        .concurrency_limit(100)
        .schedule(schedule.clone())
        .build(Client::builder(TokioExecutor::new()).build_http::<String>())?;
    executor.start()?;

    let start = Instant::now();
    let mut calls = JoinSet::new();
    for (tenant, index) in TENANTS.iter().zip(0_usize..) {
        for call in 0..tenant.calls {
            let model = Tenant::model(call);
            let request = http::Request::post(format!("{url}/{model}")).body(String::new())?;
            let submitted_at = start + tenant.submitted_at(call);
            let executor = executor.clone();
            calls.spawn(async move {
                sleep_until(submitted_at).await;
                let call = Call::from(request).flow([model, tenant.name]);
                let response = executor.submit(call).await?.await?;
                ensure!(response.status().is_success(), "{} was not answered", tenant.name);
                let now = Instant::now();
                Ok((index, now - start, now - submitted_at))
            });
        }
    }

    let mut table = Table::new(order);
    let mut redraw = interval(Duration::from_millis(100));
    let mut answered: Vec<_> = TENANTS.iter().map(|_| Answered::new()).collect();
    loop {
        tokio::select! {
            call = calls.join_next() => match call {
                Some(call) => {
                    let (tenant, at, took) = call??;
                    answered[tenant].add(at, took);
                }
                None => break,
            },
            _ = redraw.tick() => table.draw(&schedule.flows(16), start.elapsed()),
        }
    }
    table.finish();
    executor.stop(Shutdown::Graceful).await;
    Ok(answered)
}

impl Answered {
    const fn new() -> Self {
        Self {
            at: Vec::new(),
            longest: Duration::ZERO,
        }
    }

    fn add(&mut self, at: Duration, took: Duration) {
        self.at.push(at);
        self.longest = self.longest.max(took);
    }
}
