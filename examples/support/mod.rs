//! A small HTTP server of the examples' own, on 127.0.0.1.

#![allow(dead_code, unreachable_pub)]

use axum::{
    Json, Router,
    http::{HeaderMap, StatusCode},
    routing::any,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

/// Answers every request after 50 ms with a line of JSON. With `every`, each so many-th request is answered 503.
pub async fn server(every: Option<usize>) -> anyhow::Result<String> {
    let seen = Arc::new(AtomicUsize::new(0));
    let answer = move |headers: HeaderMap| async move {
        let number = seen.fetch_add(1, Ordering::Relaxed) + 1;
        tokio::time::sleep(Duration::from_millis(50)).await;
        let fails = every.is_some_and(|every| number.is_multiple_of(every));
        let status = if fails {
            StatusCode::SERVICE_UNAVAILABLE
        } else {
            StatusCode::OK
        };
        let authorized = headers.contains_key("authorization");
        (
            status,
            Json(serde_json::json!({ "request": number, "authorized": authorized })),
        )
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(any(answer))).await });
    Ok(format!("http://{address}"))
}

/// A reqwest client as a service from http requests to http responses.
pub fn reqwest_client()
-> impl tower::Service<http::Request<String>, Response = http::Response<reqwest::Body>, Error = reqwest::Error, Future: Send>
+ Clone
+ Send
+ Sync {
    let client = reqwest::Client::new();
    tower::service_fn(move |request: http::Request<String>| {
        let client = client.clone();
        async move {
            let request = reqwest::Request::try_from(request)?;
            Ok(client.execute(request).await?.into())
        }
    })
}
