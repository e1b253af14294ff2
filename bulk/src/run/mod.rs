//! Runs the program from start to end: reads the input, submits its requests, and waits until the last result is
//! written.

use crate::{
    args::{Args, OnMalformed, Target},
    attempts::Attempts,
    client,
    input::{Request, Requests, Tokens},
    limits::Bounds,
    local::Provider,
    output::{Done, Finished, LOCAL, Output},
    price::Price,
    summary::{Summary, Survey},
    view::{Progress, Work},
};
use anyhow::{Context, ensure};
use http::Uri;
use hyper::body::Bytes;
use std::{net::SocketAddr, process::ExitCode, sync::Arc};
use tokio::{
    signal::ctrl_c,
    sync::{mpsc, watch},
    task::spawn_blocking,
    time::Instant,
};
use tower::retry::RetryLayer;
use tower_outbound::{
    Call, CallHandle, Executor, RateLimiter, Shutdown,
    event::Http,
    executor::Monitor,
    rate::ByUsage,
    retry::{RetryPolicy, never_sent},
};

const FAILED: u8 = 3;
const LOST: u8 = 4;
const INTERRUPTED: u8 = 130;

pub(crate) async fn run(args: Args, target: Target) -> anyhow::Result<ExitCode> {
    // The settings, the input and the output are checked before anything is sent.
    let tokens = Tokens::new(args.limits.tokens_field.as_deref(), args.limits.estimate_times);
    if args.serve.is_none() {
        Output::check(&args)?;
    }
    let done = if args.files.resume {
        Some(Done::read(args.files.output())?)
    } else {
        None
    };
    let survey = survey(
        Requests::open(args.files.input(), tokens.clone()).await?,
        done.clone().unwrap_or_default(),
    )
    .await?;
    let bounds = Bounds::new(&args, survey.largest)?;
    if let Some(address) = args.serve {
        return serve(address, &bounds.of_local(&args.local, survey.largest), &args).await;
    }
    ensure!(
        survey.malformed == 0 || args.files.on_malformed == OnMalformed::Skip,
        "{} lines of {} are malformed; nothing was sent (--on-malformed skip sends the others)",
        survey.malformed,
        args.files.input().display()
    );

    let local = target.url.is_none();
    let start = || local_provider(&bounds.of_local(&args.local, survey.largest), &args);
    let url = target.url.map_or_else(start, Ok)?;
    let host = if local { LOCAL } else { url.host().unwrap_or_default() }.to_owned();
    let client = client::reqwest(target.headers, &args.send, &url, local).context("cannot make a client")?;
    let limiter = RateLimiter::new(bounds.limits())?;
    // Every request should succeed, however long that takes, so only the number of retries is limited: there is no
    // retry budget.
    let retries = RetryPolicy::new()
        .provider(args.send.provider)
        .max_retries(args.send.retries)
        .budget(None);
    let attempts = Arc::<Attempts>::default();
    let executor = Executor::builder()
        .queue_capacity(args.limits.queue.get())
        .concurrency_limit(bounds.concurrency)
        .limiter(limiter.clone())
        // The tokens charged are an estimate. When the response reports the tokens used, the difference is settled. For
        // a request that was never sent, the whole estimate is refunded.
        .settle(ByUsage::default().unless_sent(never_sent))
        .layer(RetryLayer::new(retries))
        // A response without a 2xx status counts as FAILED, so that --resume sends the request again.
        .describe(Http::default().fail_on(|status| !status.is_success()))
        .build(client::service(
            client,
            limiter.clone(),
            args.send.provider,
            !args.limits.keep_limits,
            attempts.clone(),
        ))?;
    let output = Output::open(args.files.output(), done.as_ref(), host)?;

    let to_send = survey.requests - survey.skipped;
    let min_time = bounds.min_time(to_send, survey.tokens);
    let work = Work {
        requests: Some(to_send),
        tokens: survey.tokens,
    };
    let progress = Arc::new(Progress::new(work, bounds, attempts.clone(), &args.view));
    if !args.view.quiet {
        let (tokens, min_time) = (survey.tokens, min_time.as_secs_f64());
        progress.note(&format!(
            "{to_send} requests, {tokens} tokens: at least {min_time:.1} s at {bounds}"
        ));
    }
    let stop = watch::Sender::new(Stop::No);
    tokio::spawn(handle_ctrl_c(stop.clone(), progress.clone(), executor.monitor()));
    let (results, received) = mpsc::channel(64);
    let price = args.view.cost.price();
    let has_prices = price.is_some();
    let writer = {
        let (progress, stop) = (progress.clone(), stop.clone());
        spawn_blocking(move || {
            let (counts, written) = output.write_all(received, &progress, has_prices);
            if written.is_err() {
                // Further responses would be paid for and lost, because their results cannot be written.
                stop.send_replace(Stop::Now);
            }
            (counts, written)
        })
    };

    let begun = Instant::now();
    executor.start()?;
    let feeder = Feeder {
        executor: &executor,
        url,
        progress: &progress,
        results,
        price,
    };
    let requests = Requests::open(args.files.input(), tokens).await?;
    let monitor = executor.monitor();
    let (submitted, fed) = tokio::select! {
        fed = async {
            let fed = feeder.feed(requests, done.unwrap_or_default(), stop.subscribe()).await;
            drain(&executor, stop.subscribe()).await;
            fed
        } => fed,
        () = progress.show(&monitor) => unreachable!("it never returns"),
    };
    // The writer ends when the last sender of results is dropped, which is after the last call has ended.
    let (counts, written) = writer.await?;
    progress.end();

    let interrupted = *stop.borrow() > Stop::No;
    let not_sent = if interrupted {
        to_send.saturating_sub(submitted)
    } else {
        0
    };
    let summary = Summary {
        survey,
        counts,
        attempts: attempts.counts(),
        recording: progress.recording(),
        bounds: bounds.with_rates_of(&limiter.limits()),
        elapsed: begun.elapsed(),
        not_sent,
    };
    println!("results in {}\n{summary}", args.files.output().display());
    written.context("cannot write results")?;
    fed?;
    Ok(match () {
        () if summary.lost() > 0 => ExitCode::from(LOST),
        () if interrupted => ExitCode::from(INTERRUPTED),
        () if summary.counts.failed > 0 => ExitCode::from(FAILED),
        () => ExitCode::SUCCESS,
    })
}

/// Reads the whole input before anything is sent, so that malformed lines and the shortest possible time are reported
/// at the start.
async fn survey(mut requests: Requests, mut done: Done) -> anyhow::Result<Survey> {
    let mut survey = Survey::default();
    while let Some(line) = requests.next().await? {
        match line {
            Ok(request) => {
                survey.requests += 1;
                survey.largest = survey.largest.max(request.tokens);
                if done.take(&request) {
                    survey.skipped += 1;
                } else {
                    survey.tokens = survey.tokens.saturating_add(request.tokens);
                }
            }
            Err(malformed) => {
                survey.malformed += 1;
                eprintln!("line {} is malformed: {}", malformed.line, malformed.reason);
            }
        }
    }
    Ok(survey)
}

/// Whether, and how, the run stops before the end of the input.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stop {
    No,
    /// The run submits no more requests, and finishes those that are submitted.
    Soon,
    /// The run cancels the submitted requests.
    Now,
}

/// Submits requests to the executor, as fast as places in its queue become free.
struct Feeder<'a> {
    executor: &'a Executor<Bytes, Bytes>,
    url: Uri,
    progress: &'a Progress,
    results: mpsc::Sender<Finished>,
    price: Option<Price>,
}

impl Feeder<'_> {
    /// Submits all requests that an earlier run has not completed. Returns the number of submitted requests, and an
    /// error if the input could not be read to the end. Drops the sender of results, so that the writer ends after the
    /// last call.
    async fn feed(
        self,
        mut requests: Requests,
        mut done: Done,
        mut stop: watch::Receiver<Stop>,
    ) -> (u64, anyhow::Result<()>) {
        let mut submitted = 0;
        loop {
            let request = match requests.next().await {
                Ok(Some(Ok(request))) if done.take(&request) => continue,
                Ok(Some(Ok(request))) => request,
                // A malformed line was reported by `survey`.
                Ok(Some(Err(_))) => continue,
                Ok(None) => return (submitted, Ok(())),
                Err(error) => return (submitted, Err(error)),
            };
            tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop > Stop::No) => return (submitted, Ok(())),
                // `submit` waits for a place in the queue, so the input is read only as fast as requests are sent, and
                // is never in memory as a whole.
                () = self.submit(request) => submitted += 1,
            }
        }
    }

    async fn submit(&self, request: Request) {
        let mut sent = http::Request::new(request.body.clone());
        *sent.method_mut() = request.method.clone();
        *sent.uri_mut() = request.url.clone().unwrap_or_else(|| self.url.clone());
        *sent.headers_mut() = request.headers.clone();
        let call = Call::from(sent).tokens(request.tokens);
        match self.executor.submit(call).await {
            Ok(call) => {
                tokio::spawn(report(call, request, self.results.clone(), self.price));
            }
            // A request that is too large for the limits does not stop the others.
            Err(error) => {
                self.progress
                    .note(&format!("line {} cannot be sent: {error}", request.line));
                let _ = self.results.send(Finished::refused(request, &error)).await;
            }
        }
    }
}

/// Waits for the end of a call, and sends its result to the writer.
async fn report(
    call: CallHandle<Bytes, Bytes>,
    request: Request,
    results: mpsc::Sender<Finished>,
    price: Option<Price>,
) {
    let event = call.event().clone();
    // The error of a failed call is in its event.
    let response = call.await.ok();
    // Sending fails after the writer has ended with an error, which the writer reports.
    let finished = Finished::with_event(request, event.finished().await, response);
    let _ = results.send(finished.priced(price.as_ref())).await;
}

/// Waits until all submitted requests have ended. Cancels them when [`Stop::Now`] is set.
async fn drain(executor: &Executor<Bytes, Bytes>, mut stop: watch::Receiver<Stop>) {
    tokio::select! {
        _ = executor.stop(Shutdown::Graceful) => {}
        _ = stop.wait_for(|stop| *stop == Stop::Now) => {
            executor.stop(Shutdown::Immediate).await;
        }
    }
}

async fn handle_ctrl_c(stop: watch::Sender<Stop>, progress: Arc<Progress>, monitor: Monitor) {
    while ctrl_c().await.is_ok() {
        let open = monitor.totals().open();
        stop.send_modify(|stop| *stop = if *stop == Stop::No { Stop::Soon } else { Stop::Now });
        progress.note(&if *stop.borrow() == Stop::Soon {
            format!("Ctrl-C: finishing the {open} requests already read; press Ctrl-C again to cancel them")
        } else {
            format!("Ctrl-C: cancelling {open} requests")
        });
    }
}

/// Starts the local provider, and returns its URL.
fn local_provider(bounds: &Bounds, args: &Args) -> anyhow::Result<Uri> {
    let provider = Provider::bind(SocketAddr::from(([127, 0, 0, 1], 0)), bounds, args)?;
    let url = provider.url().parse()?;
    provider.serve_on_own_thread()?;
    Ok(url)
}

async fn serve(address: SocketAddr, bounds: &Bounds, args: &Args) -> anyhow::Result<ExitCode> {
    let provider = Provider::bind(address, bounds, args).with_context(|| format!("cannot listen at {address}"))?;
    println!("{bounds}\ntry: bulk --url {}", provider.url());
    tokio::select! {
        served = provider.serve() => served?,
        stopped = ctrl_c() => stopped?,
    }
    Ok(ExitCode::SUCCESS)
}
