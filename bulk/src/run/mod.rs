//! The run of the program from start to end: reads the input, submits its requests, and waits until the last result is
//! written.

mod failure;
mod feed;
mod health;
mod stop;

use crate::{
    args::{Args, OnMalformed, SendArgs, Target},
    attempts::{Attempts, AttemptsLayer},
    client,
    input::{self, Admission, Form, Requests},
    limits::{Bounds, Charges, FurtherSums, OwnBudgets, TokenBurst, cost_of},
    local::Provider,
    output::{Claim, Done},
    plan::Plan,
    price::Spending,
    report,
    secrets::Secrets,
    summary::{Summary, Survey, counts::Counts},
    view::{Progress, Work},
};
use anyhow::{Context, ensure};
use feed::{Fed, Feeder, Left};
use health::Health;
use http::Uri;
use hyper::body::Bytes;
use std::{
    io::{self, Write},
    net::SocketAddr,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};
use stop::{Signal, StopReason, Stopper};
use tokio::{sync::mpsc, task::spawn_blocking, time::Instant};
use tower::{Layer, retry::RetryLayer};
use tower_outbound::{Executor, RateLimiter, Shutdown, event::Http, executor::Monitor, retry::RetryPolicy};

/// Signals within this time after the first one are the same one.
const SAME_SIGNAL: Duration = Duration::from_millis(300);

const FAILED: u8 = 3;
const LOST: u8 = 4;
const PIPE_CLOSED: u8 = 141;

pub(crate) async fn run(args: Args, target: Target) -> anyhow::Result<ExitCode> {
    // The settings, the input and the output are checked before anything is sent.
    let bounds = Bounds::new(&args)?;
    if let Some(address) = args.serve {
        return serve(address, &bounds.of_local(&args.local), &args).await;
    }
    if args.view.dry_run {
        return dry_run(&args, target, &bounds).await;
    }
    let claim = Claim::new(&args, target.default_url())?;
    let done = claim.earlier(&args.files)?;
    let target = Arc::new(target);
    let options = input::Options::new(&args, target.clone());
    let mut requests = Requests::open(&options).await?;
    let is_surveyed = requests.is_rewindable();
    let surveyed = if is_surveyed {
        Some(survey(&mut requests, done.clone().unwrap_or_default(), &bounds, &args).await?)
    } else {
        None
    };
    let survey = surveyed.map(|(survey, _)| survey);
    let further = surveyed
        .map(|(_, sums)| bounds.further.min_time(&sums))
        .unwrap_or_default();
    let form = requests.form();
    ensure!(
        is_surveyed || args.files.on_malformed != OnMalformed::Refuse,
        "--on-malformed refuse needs an input that can be read twice, and {} cannot",
        args.files.input().display()
    );
    let requests = if is_surveyed {
        requests.again(&options).await?
    } else {
        requests
    };

    let target = if target.is_local() {
        Arc::new(target.at_local(local_provider(&bounds.of_local(&args.local), &args)?))
    } else {
        target
    };
    let client = client::reqwest(&target, &args.send)?;
    let limiter = limiter(&bounds, &args)?;
    let charges = Charges::new(limiter.clone(), &args.limits)?;
    let stopper = Stopper::new();
    let to_send = survey.map(|survey| survey.requests - survey.skipped);
    let min_time = survey.map(|survey| {
        bounds
            .min_time(survey.requests - survey.skipped, survey.tokens)
            .max(further)
    });
    let work = Work {
        requests: to_send,
        tokens: survey.map_or(0, |survey| survey.tokens),
        further,
    };
    let secrets = Secrets::of(&target.headers);
    let attempts = Arc::new(Attempts::new(secrets.clone()));
    let progress = Arc::new(Progress::new(work, bounds, attempts.clone(), &args));
    let spending = Spending::of(&args.view.cost);
    let health = Health::new(
        stopper.clone(),
        progress.clone(),
        limiter.clone(),
        &args.send,
        &target,
        secrets.clone(),
    );
    // Every request should succeed, however long that takes, so only the number of retries is limited: there is no
    // retry budget. A request that waits for a paused limiter makes no attempt, so a pause costs it no retry.
    let retries = RetryPolicy::new()
        .provider(args.send.provider())
        .max_retries(args.send.retries)
        .max_delay(args.send.max_wait)
        .budget(None);
    let executor = Executor::builder()
        .queue_capacity(args.limits.queue.get())
        .concurrency_limit(bounds.concurrency)
        .limiter(limiter.clone())
        // The tokens charged are an estimate. When the response reports the tokens used, the difference is settled.
        .estimate(charges.clone())
        .layer(RetryLayer::new(retries))
        // A response without a 2xx status counts as FAILED, so that --resume sends the request again.
        .describe(Http::default().fail_on(|status| !status.is_success()))
        .build(AttemptsLayer::new(attempts.clone(), charges).layer(client::service(
            client,
            limiter.clone(),
            &args.send,
            args.limits.feedback(),
            move |result| health.observe(result),
        )))?;
    let admission = Admission::new(args.files.memory, args.files.ordered);
    let output = claim.open(&args.files, done.as_ref(), &admission)?;

    announce(&progress, &args, &target, form, bounds, survey.zip(min_time));
    let (results, received) = mpsc::channel(64);
    let counts = Counts::new(spending.is_some(), secrets.clone());
    let writer = {
        let (progress, stopper) = (progress.clone(), stopper.clone());
        spawn_blocking(move || {
            let (counts, written) = output.write_all(received, &progress, counts);
            if written.is_err() {
                stopper.stop(StopReason::OutputFailed);
            }
            (counts, written)
        })
    };
    tokio::spawn(stop_on_signals(
        stopper.clone(),
        progress.clone(),
        executor.monitor(),
        args.send.drain,
    ));

    let begun = Instant::now();
    executor.start()?;
    let mut burst = TokenBurst::new(limiter.clone(), bounds, &args.limits);
    let left = Left::default();
    let feeder = Feeder {
        executor: &executor,
        target: &target,
        burst: &mut burst,
        own_budgets: OwnBudgets::of(&args.limits),
        progress: &progress,
        spending,
        results,
        stopper: stopper.clone(),
        left: left.clone(),
        is_surveyed,
        fails_malformed: args.files.on_malformed == OnMalformed::Fail,
        admission,
    };
    let monitor = executor.monitor();
    let (Fed { read, submitted, end }, ()) = tokio::select! {
        ended = async {
            let fed = feeder.feed(requests, done.unwrap_or_default()).await;
            (fed, drain(&executor, &stopper, &args.send).await)
        } => ended,
        () = progress.show(&monitor) => unreachable!("it never returns"),
    };
    // The writer ends when the last sender of results is dropped, which is after the last call has ended.
    let (counts, written) = writer.await?;
    progress.end();

    let reason = stopper.reason();
    // An input that is read once is known as far as it was read.
    let survey = survey.unwrap_or(read);
    let not_sent = if reason.is_some() {
        (survey.requests - survey.skipped).saturating_sub(submitted) + left.count()
    } else {
        0
    };
    let summary = Summary {
        survey,
        counts,
        attempts: attempts.counts(),
        recording: progress.recording(),
        bounds: burst.bounds(),
        elapsed: begun.elapsed(),
        not_sent,
    };
    let text = format!("results in {}\n{summary}", args.files.output().display());
    // A closed output, as of `head`, hides the summary and fails nothing.
    let _ = if args.files.writes_to_stdout() {
        writeln!(io::stderr(), "{text}")
    } else {
        writeln!(io::stdout(), "{text}")
    };
    if let Some(path) = &args.view.report {
        report::write(path, &summary)?;
    }
    match written {
        // The reader of the results, `head` for example, has closed the pipe.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(ExitCode::from(PIPE_CLOSED)),
        written => written.context("cannot write results")?,
    }
    let at_end = end? || is_surveyed;
    exit_code(reason, &summary, at_end)
}

/// Tells what the run is about to do.
fn announce(
    progress: &Progress,
    args: &Args,
    target: &Target,
    form: Form,
    bounds: Bounds,
    known: Option<(Survey, Duration)>,
) {
    if args.send.insecure {
        progress.note("WARNING: --insecure: certificates are not checked, so the key can be read on the way");
    }
    if args.view.quiet {
        return;
    }
    if let Some(note) = &target.note {
        progress.note(note);
    }
    progress.note(&form.to_string());
    progress.note(&match known {
        Some((survey, min_time)) => {
            let (to_send, tokens) = (survey.requests - survey.skipped, survey.tokens);
            let min_time = min_time.as_secs_f64();
            format!("{to_send} requests, {tokens} tokens: at least {min_time:.1} s at {bounds}")
        }
        None => format!("requests are read once, as they come, and sent at {bounds}"),
    });
}

/// How the run has ended, as the help describes it. `at_end` is whether it is known that nothing of the input is left
/// beside what the summary counts.
fn exit_code(reason: Option<StopReason>, summary: &Summary, at_end: bool) -> anyhow::Result<ExitCode> {
    Ok(match reason {
        _ if summary.lost() > 0 => ExitCode::from(LOST),
        Some(StopReason::Signal(signal)) => ExitCode::from(signal.exit_code()),
        Some(StopReason::Hopeless(text) | StopReason::MaxCost(text)) if summary.not_sent > 0 || !at_end => {
            anyhow::bail!("stopped early: {text}")
        }
        _ if summary.counts.failed > 0 => ExitCode::from(FAILED),
        _ => ExitCode::SUCCESS,
    })
}

/// Shows what a run would do. Sends nothing and writes no results.
async fn dry_run(args: &Args, target: Target, bounds: &Bounds) -> anyhow::Result<ExitCode> {
    let done = if args.files.resume {
        Claim::new(args, target.default_url())?.earlier(&args.files)?
    } else {
        None
    };
    let requests = Requests::open(&input::Options::new(args, target)).await?;
    let plan = Plan::of(requests, done.unwrap_or_default(), bounds, args).await?;
    let _ = writeln!(io::stdout(), "{plan}");
    Ok(ExitCode::SUCCESS)
}

/// Reads the whole input before anything is sent, so that malformed lines and the shortest possible time are reported
/// at the start. Requests that can never be sent have no part in the time. Returns also what the requests to send take of
/// the further limits.
async fn survey(
    requests: &mut Requests,
    mut done: Done,
    bounds: &Bounds,
    args: &Args,
) -> anyhow::Result<(Survey, FurtherSums)> {
    let mut survey = Survey::default();
    let mut sums = FurtherSums::default();
    while let Some(line) = requests.next().await? {
        match line {
            Ok(request) => {
                survey.requests += 1;
                let cost = cost_of(&request);
                if done.take(&request) {
                    survey.skipped += 1;
                } else if bounds.fits(request.tokens, &args.limits) && bounds.further.fits(&cost) {
                    bounds.further.add_cost(&cost, &mut sums);
                    survey.largest = survey.largest.max(request.tokens);
                    survey.tokens = survey.tokens.saturating_add(request.tokens);
                }
            }
            Err(malformed) => {
                survey.malformed += 1;
                let _ = writeln!(
                    io::stderr(),
                    "line {} is malformed: {}",
                    malformed.line,
                    malformed.reason
                );
            }
        }
    }
    ensure!(
        survey.malformed == 0 || args.files.on_malformed != OnMalformed::Refuse,
        "{} lines of {} are malformed; nothing was sent (--on-malformed skip sends the others)",
        survey.malformed,
        args.files.input().display()
    );
    if args.files.on_malformed == OnMalformed::Fail {
        // Each malformed line has a result.
        survey.requests += survey.malformed;
    }
    if !args.view.quiet {
        for note in requests.repeated_ids().into_iter().chain(done.notes()) {
            let _ = writeln!(io::stderr(), "{note}");
        }
    }
    Ok((survey, sums))
}

/// The limiter of this run, or the one that it shares with other runs.
#[cfg(feature = "redis")]
fn limiter(bounds: &Bounds, args: &Args) -> anyhow::Result<RateLimiter> {
    use tower_outbound::rate::redis;
    Ok(match (&args.limits.redis, &args.limits.quota) {
        (Some(url), Some(quota)) => redis::connect(url, quota, bounds.limits()).context("--redis")?,
        _ => RateLimiter::new(bounds.limits())?,
    })
}

#[cfg(not(feature = "redis"))]
fn limiter(bounds: &Bounds, args: &Args) -> anyhow::Result<RateLimiter> {
    ensure!(
        args.limits.redis.is_none(),
        "--redis: this program was built without it; build it with: cargo install --path bulk --features redis"
    );
    Ok(RateLimiter::new(bounds.limits())?)
}

/// Waits until all submitted requests have ended. When the run is stopped, those on the wire are finished, because they
/// are paid for, which takes no longer than `--timeout`. After a signal they get the time of `--drain` only.
async fn drain(executor: &Executor<Bytes, Bytes>, stopper: &Stopper, args: &SendArgs) {
    tokio::select! {
        _ = executor.stop(Shutdown::Graceful) => return,
        () = stopper.stopped() => {}
    }
    // A later stop replaces the time that an earlier one allows.
    tokio::select! {
        biased;
        () = stopper.signalled() => {}
        () = stopper.stopped_now() => {}
        _ = executor.stop(Shutdown::SentWithin(args.timeout)) => return,
    }
    tokio::select! {
        biased;
        () = stopper.stopped_now() => {
            executor.stop(Shutdown::Immediate).await;
        }
        _ = executor.stop(Shutdown::SentWithin(args.drain)) => {}
    }
}

/// Stops the run at the first signal, and cancels what is on the wire at the second.
async fn stop_on_signals(stopper: Stopper, progress: Arc<Progress>, monitor: Monitor, limit: Duration) {
    let mut first_at = None;
    let on_signal = |signal: Signal| {
        // `timeout` and the like send a signal to the program and to its group: what comes twice at once is one signal.
        if first_at.is_some_and(|at: Instant| at.elapsed() < SAME_SIGNAL) {
            return;
        }
        // The first signal does not cut off what is paid for, also if the run is stopped for another reason already.
        let is_first = first_at.is_none();
        first_at.get_or_insert_with(Instant::now);
        let on_wire = monitor.calling();
        progress.note(&if is_first {
            stopper.stop(StopReason::Signal(signal));
            format!(
                "{signal}: nothing more is sent; the {on_wire} requests on the wire get {limit:?} to finish, the others \
                 are left for --resume; {signal} again cancels"
            )
        } else {
            stopper.stop_now();
            format!("{signal}: cancelling the {on_wire} requests on the wire")
        });
    };
    if let Err(error) = stop::on_signals(on_signal).await {
        progress.note(&format!("signals end the program at once: {error}"));
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
    let _ = writeln!(io::stdout(), "{bounds}\ntry: bulk --url {}", provider.url());
    let stopper = Stopper::new();
    tokio::select! {
        served = provider.serve() => served?,
        stopped = stop::on_signals(|signal| { stopper.stop(StopReason::Signal(signal)); }) => stopped?,
        () = stopper.stopped() => {}
    }
    Ok(ExitCode::SUCCESS)
}
