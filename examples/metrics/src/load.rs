//! An executor with metrics, and the calls that it makes.

use crate::provider;
use anyhow::ensure;
use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use std::{sync::Arc, time::Duration};
use tokio::{task::JoinSet, time::sleep};
use tower::{ServiceBuilder, retry::RetryLayer};
use tower_outbound::{
    Call, Cost, Executor, Limits, Monitor, Rate,
    body::CollectLayer,
    metrics::{INSTRUMENTS, Metrics},
    provider::UsageLayer,
    rate::ByUsage,
    retry::RetryPolicy,
};

type Body = Full<Bytes>;

/// How many calls are made, and what each is charged until its usage is known.
pub(crate) const CALLS: u32 = 300;
const ESTIMATE: u64 = 300;
/// How many calls are submitted at once, and how fast the others are: more slowly than the limits allow.
const BURST: u32 = 100;
const EVERY: Duration = Duration::from_millis(25);

/// An executor with metrics.
pub(crate) struct Load {
    executor: Executor<Body, Bytes>,
    metrics: Arc<Metrics>,
    prometheus: PrometheusHandle,
    url: String,
}

/// What Prometheus scrapes.
#[derive(Clone)]
pub(crate) struct Scrape {
    metrics: Arc<Metrics>,
    monitor: Monitor,
    prometheus: PrometheusHandle,
}

impl Load {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        // The names are those that Prometheus recommends: `_seconds` and `_total` are appended.
        let mut prometheus = PrometheusBuilder::new().with_recommended_naming(true);
        for instrument in INSTRUMENTS.iter().filter(|instrument| !instrument.buckets.is_empty()) {
            let matcher = Matcher::Full(instrument.name.to_owned());
            prometheus = prometheus.set_buckets_for_metric(matcher, instrument.buckets)?;
        }
        let recorder = prometheus.build_recorder();
        let prometheus = recorder.handle();
        // Most programs install the recorder globally, with `install_recorder`, and leave out `recorder` here.
        let metrics = Metrics::new()
            .recorder(recorder)
            .label("executor", "chat")
            .gen_ai("chat", "openai");
        let metrics = Arc::new(metrics);

        let client = ServiceBuilder::new()
            .layer(CollectLayer::new(1 << 20))
            .layer(UsageLayer::new())
            .service(Client::builder(TokioExecutor::new()).build_http::<Body>());
        let limits = Limits::new()
            .requests(Rate::per_second(60).burst(20))
            .tokens(Rate::per_second(20_000))
            .budget("cents", Rate::per_second(100).refuse());
        let executor = Executor::builder()
            .limits(limits)
            .settle(ByUsage::default())
            .concurrency_limit(16)
            .layer(RetryLayer::new(RetryPolicy::new()))
            .observe(metrics.clone())
            .build(client)?;
        executor.start()?;
        let url = provider::start().await?;
        Ok(Self {
            executor,
            metrics,
            prometheus,
            url,
        })
    }

    pub(crate) fn scrape(&self) -> Scrape {
        Scrape {
            metrics: self.metrics.clone(),
            monitor: self.executor.monitor(),
            prometheus: self.prometheus.clone(),
        }
    }

    /// Makes all calls, and three more: one that is paid for, one for which there is no money left, and one
    /// that is cancelled.
    pub(crate) async fn run(&self) -> anyhow::Result<()> {
        let mut calls = JoinSet::new();
        for number in 0..CALLS {
            if number > BURST {
                sleep(EVERY).await;
            }
            calls.spawn(self.executor.submit(self.call()?).await?);
        }
        // Of two calls for 60 cents, the second is refused.
        for is_first in [true, false] {
            let cost = Cost::tokens(ESTIMATE).with("cents", 60);
            let call = self.executor.submit(self.call()?.cost(cost)).await?;
            ensure!(call.await.is_ok() || !is_first, "a call was not answered");
        }
        let cancelled = self.executor.submit(self.call()?).await?;
        cancelled.cancel();
        ensure!(cancelled.await.is_err(), "a call was cancelled");
        while let Some(response) = calls.join_next().await {
            ensure!(response??.status().is_success(), "a call was not answered");
        }
        Ok(())
    }

    fn call(&self) -> anyhow::Result<Call<Body>> {
        let request = Request::post(&self.url).body(Body::from("{}"))?;
        Ok(Call::from(request).tokens(ESTIMATE))
    }
}

impl Scrape {
    /// Returns the text page.
    pub(crate) fn page(&self) -> String {
        self.metrics.record(&self.monitor);
        self.prometheus.render()
    }
}
