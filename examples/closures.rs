//! Calls that are closures, for whatever is no HTTP client: an SDK, a database, a command.
//!
//! Watch: the timeline of every event, the error's type and causes, a note taken inside a call, and a body that is
//! recorded because it was asked for.
//!
//! `cargo run --example closures`

use std::{error::Error, fmt, time::Duration};
use tokio::time::sleep;
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

    // Every change of every call, as it happens.
    let mut updates = executor.monitor().subscribe();
    tokio::spawn(async move {
        while let Ok(update) = updates.recv().await {
            println!("  {:<10} {}", update.status, update.event.request_id());
        }
    });

    let answers = Call::new(|| async {
        event::current()
            .expect("inside a call there is an event")
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
    println!("report:   {:?}", executor.stop(Shutdown::Graceful).await);

    let [answers, fails, hangs] = events.map(|event| event.snapshot());
    println!("note:     {}", answers.logs[0].message);
    println!("body:     {}", answers.response_body.clone().unwrap_or_default());
    println!(
        "error:    {:?} {:?}",
        fails.error_type.as_deref(),
        fails.error_message.as_deref()
    );
    println!("cause:    {:?}", fails.error_details.as_deref());
    let ends = [answers.status, fails.status, hangs.status];
    anyhow::ensure!(
        ends == [
            RequestStatus::Completed,
            RequestStatus::Failed,
            RequestStatus::Cancelled
        ],
        "{ends:?}"
    );
    Ok(())
}
