//! Shows calls that are closures instead of http requests. Such calls suit anything that is not an HTTP client: an SDK,
//! a database, a command.
//!
//! What to watch: each status change of the three calls with its time. One call is answered, one fails, and one is
//! cancelled while it waits for the rate limit. After that come the details that the events recorded: a note that was
//! written inside a call, a response body (which is recorded only because of `describe`), and an error with its type
//! and cause. The password and the key in the message of the error are redacted.
//!
//! `cargo run --example closures`

use std::{error::Error, fmt, time::Duration};
use tokio::time::{Instant, sleep};
use tower_outbound::{
    Call, Executor, Rate, RequestStatus, Shutdown,
    event::{self, Http},
};

#[derive(Debug)]
struct SdkError(std::io::Error);

impl fmt::Display for SdkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the SDK gave up on https://user:password@api.example.com/?api_key=secret")
    }
}

impl Error for SdkError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.0)
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let executor = Executor::builder()
        .requests(Rate::per_second(20).burst(1))
        .describe(Http::default().response_body(|body: &String| body.as_str().into()))
        .build_for_closures::<String>()?;
    executor.start()?;

    // The subscription receives every status change of every call, until the executor is dropped.
    let mut updates = executor.monitor().subscribe();
    let begun = Instant::now();
    let timeline = tokio::spawn(async move {
        while let Some(update) = updates.recv().await {
            let update = update?;
            let id = update.event.request_id();
            println!("  {:>3} ms {:<10} {id}", begun.elapsed().as_millis(), update.status);
        }
        anyhow::Ok(())
    });

    let answers = Call::new(|| async {
        event::current()
            .expect("there is an event inside a call")
            .log("asking the SDK");
        sleep(Duration::from_millis(30)).await;
        Ok::<_, SdkError>((200, [("content-type", "text/plain")], String::from("42")))
    });
    let answers = answers
        .url("https://api.example.com/answer")
        .method("GET")
        .tokens(12)
        .request_id("answers");
    let fails = Call::new(|| async {
        let cause = std::io::Error::new(std::io::ErrorKind::ConnectionReset, "connection reset by peer");
        Err::<(u16, String), _>(SdkError(cause))
    });
    let hangs = Call::new(std::future::pending::<Result<(u16, String), SdkError>>);

    let answers = executor.submit(answers).await?;
    let fails = executor.submit(fails.request_id("fails")).await?;
    let hangs = executor.submit(hangs.request_id("hangs")).await?;
    let events = [answers.event().clone(), fails.event().clone(), hangs.event().clone()];

    println!("answered: {}", answers.await?.body());
    println!("failed:   {}", fails.await.expect_err("it fails"));
    hangs.cancel();
    drop(hangs);
    executor.stop(Shutdown::Graceful).await;
    println!("totals:   {:?}", executor.monitor().totals());

    let [answers, fails, hangs] = events.map(|event| event.snapshot());
    drop(executor);
    timeline.await??;
    println!("note:     {}", answers.logs[0].message);
    println!("body:     {:?}", answers.response_body);
    println!("error:    {:?}: {:?}", fails.error_type, fails.error_message);
    println!("cause:    {:?}", fails.error_details);
    use RequestStatus::{Cancelled, Completed, Failed};
    let ends = [answers.status, fails.status, hangs.status];
    anyhow::ensure!(ends == [Completed, Failed, Cancelled], "{ends:?}");
    anyhow::ensure!(answers.response_body == Some("42".into()), "{answers:?}");
    anyhow::ensure!(
        fails.error_details.as_deref() == Some("connection reset by peer"),
        "{fails:?}"
    );
    anyhow::ensure!(!format!("{fails:?}").contains("secret"), "{fails:?}");
    Ok(())
}
