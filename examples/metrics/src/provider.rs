//! A local model: answers each request after 20 to 200 ms with its token usage, and every thirtieth with a 429.

use axum::{
    Router,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::post,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{net::TcpListener, time::sleep};

/// Starts the model, and returns its URL.
pub(crate) async fn start() -> anyhow::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let count = Arc::new(AtomicU64::new(0));
    let answer = move || {
        let number = count.fetch_add(1, Ordering::Relaxed) + 1;
        answer(number)
    };
    let router = Router::new().route("/v1/chat", post(answer));
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(format!("http://{address}/v1/chat"))
}

async fn answer(number: u64) -> Response {
    if number.is_multiple_of(30) {
        return (StatusCode::TOO_MANY_REQUESTS, [("retry-after-ms", "100")]).into_response();
    }
    sleep(Duration::from_millis(20 + number * 37 % 180)).await;
    let output = 20 + number * 53 % 200;
    let body = format!(r#"{{"usage":{{"prompt_tokens":100,"completion_tokens":{output}}}}}"#);
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}
