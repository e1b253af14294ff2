//! Helpers that the examples share: small HTTP servers on 127.0.0.1, an HTTP client, and a retry policy.

#![allow(dead_code, unreachable_pub)]

use axum::{
    Json, Router,
    http::{HeaderMap, StatusCode, Uri},
    routing::any,
};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use std::{
    collections::HashMap,
    future,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant;
use tower::{BoxError, retry::Policy};

/// Starts a server and returns its URL. The server responds to each request after 50 ms with the number of the request
/// and the number of keys in its headers. If `every` is given, each request whose number is a multiple of `every` gets
/// a 503.
pub async fn server(every: Option<usize>) -> anyhow::Result<String> {
    let seen = Arc::new(AtomicUsize::new(0));
    let answer = move |headers: HeaderMap| async move {
        let number = seen.fetch_add(1, Ordering::Relaxed) + 1;
        tokio::time::sleep(Duration::from_millis(50)).await;
        let fails = every.is_some_and(|every| number % every == 0);
        let status = if fails {
            StatusCode::SERVICE_UNAVAILABLE
        } else {
            StatusCode::OK
        };
        let keys = ["authorization", "x-api-key"]
            .iter()
            .filter(|key| headers.contains_key(**key))
            .count();
        (status, Json(serde_json::json!({ "request": number, "keys": keys })))
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(any(answer))).await });
    Ok(format!("http://{address}"))
}

/// What a host has seen.
#[derive(Default)]
pub struct Host {
    pub fetched: Vec<Instant>,
    pub at_once: usize,
    pub most_at_once: usize,
}

/// What each host has seen, by the path of its pages.
pub type Hosts = Arc<Mutex<HashMap<String, Host>>>;

/// Starts a server that stands for many hosts, one for each path, and returns its URL. It responds after 50 ms.
pub async fn hosts() -> anyhow::Result<(String, Hosts)> {
    let hosts = Hosts::default();
    let seen = hosts.clone();
    let answer = move |uri: Uri| async move {
        let change = |change: fn(&mut Host)| change(seen.lock().unwrap().entry(uri.path().into()).or_default());
        change(|host| {
            host.fetched.push(Instant::now());
            host.at_once += 1;
            host.most_at_once = host.most_at_once.max(host.at_once);
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        change(|host| host.at_once -= 1);
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(any(answer))).await });
    Ok((format!("http://{address}"), hosts))
}

/// hyper's client: a Tower service from http requests to http responses.
pub fn http_client() -> Client<HttpConnector, String> {
    Client::builder(TokioExecutor::new()).build_http()
}

/// A retry policy: after a 503 a call is made again, at most this many times. Each call has its own clone of the
/// policy, which counts its retries.
#[derive(Clone)]
pub struct RetryOn503(pub u32);

impl<R> Policy<http::Request<String>, http::Response<R>, BoxError> for RetryOn503 {
    type Future = future::Ready<()>;

    fn retry(
        &mut self,
        _: &mut http::Request<String>,
        result: &mut Result<http::Response<R>, BoxError>,
    ) -> Option<Self::Future> {
        let retries = self.0 > 0 && result.as_ref().is_ok_and(|response| response.status() == 503);
        self.0 = self.0.saturating_sub(1);
        retries.then(|| future::ready(()))
    }

    fn clone_request(&mut self, request: &http::Request<String>) -> Option<http::Request<String>> {
        Some(request.clone())
    }
}
