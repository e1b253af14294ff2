//! Uses the layers inside another client library: async-openai sends its requests through any Tower service.
//!
//! What to watch: eight requests are made at once. They are sent in order, four per second and at most two at a time,
//! and the events count eight completed calls.
//!
//! `cargo run -p tower-outbound-async-openai`

use anyhow::ensure;
use async_openai::{
    Client,
    config::OpenAIConfig,
    middleware::{HttpRequestFactory, ReqwestService},
    types::chat::{ChatCompletionRequestMessage, CreateChatCompletionRequestArgs},
};
use axum::{Json, Router, routing::post};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::{task::JoinSet, time::Instant};
use tower::ServiceBuilder;
use tower_outbound::{
    ConcurrencyLimitLayer, Cost, EventLayer, Limits, QueueLayer, Rate, RateLimitLayer, RateLimiter,
    event::{Events, Nothing},
};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_second(4).burst(1)))?;
    let events = Events::new();
    let service = ServiceBuilder::new()
        .layer(EventLayer::queued().describe(Nothing).report_to(&events))
        .layer(QueueLayer::new(100)?)
        .layer(EventLayer::processing().describe(Nothing))
        .layer(ConcurrencyLimitLayer::new(2)?)
        .layer(RateLimitLayer::with_cost(limiter, |_: &HttpRequestFactory| {
            Cost::request()
        }))
        .layer(EventLayer::calling().describe(Nothing))
        .service(ReqwestService::new(reqwest::Client::new()));

    let config = OpenAIConfig::new().with_api_base(server().await?).with_api_key("none");
    let client = Client::with_config(config).with_http_service(service);
    let begun = Instant::now();
    let mut questions = JoinSet::new();
    for number in 1..=8 {
        let request = CreateChatCompletionRequestArgs::default()
            .model("small")
            .messages([ChatCompletionRequestMessage::User(format!("question {number}").into())])
            .build()?;
        let client = client.clone();
        questions.spawn(async move { client.chat().create(request).await });
    }
    while let Some(answer) = questions.join_next().await {
        let answer = answer??;
        let text = answer.choices[0].message.content.as_deref().unwrap_or_default();
        println!("{:>6.2?}  {text}", begun.elapsed());
    }
    println!("{:?}", events.totals());
    ensure!(events.totals().completed == 8, "{:?}", events.totals());
    ensure!(
        begun.elapsed() >= Duration::from_millis(1_740),
        "eight calls at four per second take 1.75 s"
    );
    Ok(())
}

/// Starts a server with as much of OpenAI's API as this example needs, and returns its URL.
async fn server() -> anyhow::Result<String> {
    let answer = async |Json(request): Json<Value>| {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let question = request["messages"][0]["content"].clone();
        Json(json!({
            "id": "1", "object": "chat.completion", "created": 0, "model": request["model"],
            "choices": [{
                "index": 0,
                "message": { "role": "assistant", "content": format!("an answer to {question}") },
                "finish_reason": "stop",
            }],
            "usage": { "prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2 },
        }))
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let router = Router::new().route("/v1/chat/completions", post(answer));
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(format!("http://{address}/v1"))
}
