//! The job from start to end.

use crate::{
    args::{Args, OnMalformed, Target},
    client,
    input::{Request, Requests, Tokens},
    limits::Bounds,
    output::{Done, LOCAL, Output},
    progress::Progress,
    provider::Provider,
    result::Finished,
    summary::{Summary, Survey},
};
use anyhow::{Context, ensure};
use http::{Response, Uri};
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
    // Everything that can be wrong is found before anything is sent.
    let tokens = Tokens::new(args.tokens_field.as_deref(), args.estimate_times);
    if args.serve.is_none() {
        Output::check(&args)?;
    }
    let done = if args.resume {
        Some(Done::read(args.output())?)
    } else {
        None
    };
    let survey = survey(
        Requests::open(args.input(), tokens.clone()).await?,
        done.clone().unwrap_or_default(),
    )
    .await?;
    let bounds = Bounds::new(&args, survey.largest)?;
    if let Some(address) = args.serve {
        return serve(address, &bounds.of_local(&args.local, survey.largest), &args).await;
    }
    ensure!(
        survey.malformed == 0 || args.on_malformed == OnMalformed::Skip,
        "{} lines of {} are malformed; nothing was sent",
        survey.malformed,
        args.input().display()
    );

    let local = target.url.is_none();
    let start = || local_provider(&bounds.of_local(&args.local, survey.largest), &args);
    let url = target.url.map_or_else(start, Ok)?;
    let host = if local { LOCAL } else { url.host().unwrap_or_default() }.to_owned();
    let client = client::reqwest(target.headers, &args, &url, local).context("cannot make a client")?;
    let limiter = RateLimiter::new(bounds.limits())?;
    // Every request is to be answered, however long that takes: nothing but their number limits retries.
    let retries = RetryPolicy::new()
        .provider(args.provider)
        .max_retries(args.retries)
        .budget(None);
    let executor = Executor::builder()
        .queue_capacity(args.queue.get())
        .concurrency_limit(bounds.concurrency)
        .limiter(limiter.clone())
        // What was charged is an estimate. When the answer says what was used, the difference is given back.
        .settle(ByUsage::default().unless_sent(never_sent))
        .layer(RetryLayer::new(retries))
        // Nobody wants a 429 or a 500 for an answer: such a request is to be done again.
        .describe(Http::default().fail_on(|status| !status.is_success()))
        .build(client::service(
            client,
            limiter.clone(),
            args.provider,
            !args.keep_limits,
        ))?;
    let output = Output::open(args.output(), done.as_ref(), host)?;

    let to_send = survey.requests - survey.skipped;
    let least = bounds.least_time(to_send, survey.tokens);
    let progress = Arc::new(Progress::new(to_send, least, args.quiet));
    if !args.quiet {
        let (tokens, least) = (survey.tokens, least.as_secs_f64());
        progress.note(&format!(
            "{to_send} requests, {tokens} tokens: at least {least:.1} s at {bounds}"
        ));
    }
    let stop = watch::Sender::new(Stop::Not);
    tokio::spawn(listen_for_ctrl_c(stop.clone(), progress.clone(), executor.monitor()));
    let (results, received) = mpsc::channel(64);
    let writer = {
        let (progress, stop) = (progress.clone(), stop.clone());
        spawn_blocking(move || {
            let (tally, written) = output.write_all(received, &progress);
            if written.is_err() {
                // What is answered from now on would be paid for and lost.
                stop.send_replace(Stop::Now);
            }
            (tally, written)
        })
    };

    let begun = Instant::now();
    executor.start()?;
    let feeder = Feeder {
        executor: &executor,
        url,
        progress: &progress,
        results,
    };
    let requests = Requests::open(args.input(), tokens).await?;
    let monitor = executor.monitor();
    let (handed, fed) = tokio::select! {
        fed = async {
            let fed = feeder.feed(requests, done.unwrap_or_default(), stop.subscribe()).await;
            drain(&executor, stop.subscribe()).await;
            fed
        } => fed,
        () = progress.show(&monitor) => unreachable!("it never ends"),
    };
    // Ends as soon as the last call has handed in its result.
    let (tally, written) = writer.await?;
    progress.end();

    let interrupted = *stop.borrow() > Stop::Not;
    let not_sent = if interrupted { to_send.saturating_sub(handed) } else { 0 };
    let summary = Summary {
        survey,
        tally,
        bounds: bounds.as_they_are(&limiter.limits()),
        elapsed: begun.elapsed(),
        not_sent,
    };
    println!("results in {}\n{summary}", args.output().display());
    written.context("cannot write results")?;
    fed?;
    Ok(match () {
        () if summary.lost() > 0 => ExitCode::from(LOST),
        () if interrupted => ExitCode::from(INTERRUPTED),
        () if summary.tally.failed > 0 => ExitCode::from(FAILED),
        () => ExitCode::SUCCESS,
    })
}

/// Goes through the file once before anything is sent: what is wrong is known at the beginning, and how long it will
/// take.
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

/// Whether to end before the end of the file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stop {
    Not,
    /// Take no more requests; finish those taken.
    Soon,
    /// Cancel them.
    Now,
}

/// Hands requests to the executor, as fast as it takes them.
struct Feeder<'a> {
    executor: &'a Executor<Bytes, Bytes>,
    url: Uri,
    progress: &'a Progress,
    results: mpsc::Sender<Finished>,
}

impl Feeder<'_> {
    /// How many requests it handed over, and whether the input could be read to the end. Consumes the sender: the
    /// writer ends with the last call.
    async fn feed(
        self,
        mut requests: Requests,
        mut done: Done,
        mut stop: watch::Receiver<Stop>,
    ) -> (u64, anyhow::Result<()>) {
        let mut handed = 0;
        loop {
            let request = match requests.next().await {
                Ok(Some(Ok(request))) if done.take(&request) => continue,
                Ok(Some(Ok(request))) => request,
                // Named already.
                Ok(Some(Err(_))) => continue,
                Ok(None) => return (handed, Ok(())),
                Err(error) => return (handed, Err(error)),
            };
            tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop > Stop::Not) => return (handed, Ok(())),
                // Waits for a place in the queue, which is what keeps the file from being read into memory.
                () = self.hand_over(request) => handed += 1,
            }
        }
    }

    async fn hand_over(&self, request: Request) {
        let call = http::Request::post(self.url.clone())
            .body(request.body.clone())
            .map(Call::from);
        let call = call.expect("a URL and a body make a request").tokens(request.tokens);
        match self.executor.submit(call).await {
            Ok(call) => {
                tokio::spawn(hand_in(call, request, self.results.clone()));
            }
            // A request that is too large for the limits is no reason to stop.
            Err(error) => {
                self.progress
                    .note(&format!("line {} cannot be sent: {error}", request.line));
                let _ = self.results.send(Finished::refused(request, &error)).await;
            }
        }
    }
}

/// Waits for the end of a call.
async fn hand_in(call: CallHandle<Bytes, Bytes>, request: Request, results: mpsc::Sender<Finished>) {
    let event = call.event().clone();
    // Its error, if there is one, is in the event.
    let body = call.await.ok().map(Response::into_body);
    // Fails if results cannot be written any more, which the writer reports.
    let _ = results
        .send(Finished::made(request, event.finished().await, body))
        .await;
}

/// Finishes what was submitted, or cancels it if that is asked for.
async fn drain(executor: &Executor<Bytes, Bytes>, mut stop: watch::Receiver<Stop>) {
    tokio::select! {
        _ = executor.stop(Shutdown::Graceful) => {}
        _ = stop.wait_for(|stop| *stop == Stop::Now) => {
            executor.stop(Shutdown::Immediate).await;
        }
    }
}

async fn listen_for_ctrl_c(stop: watch::Sender<Stop>, progress: Arc<Progress>, monitor: Monitor) {
    while ctrl_c().await.is_ok() {
        let open = monitor.totals().open();
        stop.send_modify(|stop| *stop = if *stop == Stop::Not { Stop::Soon } else { Stop::Now });
        progress.note(&if *stop.borrow() == Stop::Soon {
            format!("Ctrl-C: finishing the {open} requests already taken; once more cancels them")
        } else {
            format!("Ctrl-C: cancelling {open} requests")
        });
    }
}

/// Starts the local provider, and returns its URL.
fn local_provider(bounds: &Bounds, args: &Args) -> anyhow::Result<Uri> {
    let provider = Provider::bind(SocketAddr::from(([127, 0, 0, 1], 0)), bounds, args)?;
    let url = provider.url().parse()?;
    provider.serve_apart()?;
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
