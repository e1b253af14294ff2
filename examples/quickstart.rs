//! Sends ten calls through an executor with request and token limits.
//!
//! What to watch: each call has a request id as soon as it is submitted. The program awaits the end of each call
//! without polling a status, and prints the results in the order of the tasks.
//!
//! `cargo run --example quickstart`

mod support;

use http::Request;
use std::time::Duration;
use tower_outbound::{Call, Executor, Rate, RequestStatus};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = support::server(None).await?;

    // The limits allow at most 5 calls in flight, 10 requests per second and 10,000 tokens per minute.
    let executor = Executor::builder()
        .queue_capacity(500)
        .concurrency_limit(5)
        .requests(Rate::new(10, Duration::from_secs(1)))
        .tokens(Rate::new(10_000, Duration::from_secs(60)))
        .workers(3)
        .build(support::http_client())?;

    let events = executor
        .run(async move |executor| {
            // Submit ten calls.
            let mut events = Vec::new();
            for task in 0..10 {
                let request = Request::get(format!("{url}/data")).body(String::new())?;
                let call = executor
                    .submit(Call::from(request).tokens(5).metadata("task_id", task))
                    .await?;
                println!("Submitted task {task}, request_id: {}", call.request_id());
                events.push(call.event().clone());
            }

            // Wait until all calls have ended.
            for event in &events {
                event.finished().await;
            }
            anyhow::Ok(events)
        })
        .await??;

    // Print the results.
    for (task, event) in events.iter().enumerate() {
        let event = event.snapshot();
        match (event.status, event.response_status_code) {
            (RequestStatus::Completed, Some(code)) => {
                println!("Task {task} completed with status code: {code}")
            }
            _ => println!(
                "Task {task} failed: {} - {}",
                event.error_type.as_deref().unwrap_or("?"),
                event.error_message.as_deref().unwrap_or("?")
            ),
        }
        anyhow::ensure!(event.response_status_code == Some(200), "task {task} was not answered");
    }
    Ok(())
}
