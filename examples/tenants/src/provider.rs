//! A local provider that answers each request after 50 ms.

use axum::{Router, routing::any};
use std::time::Duration;
use tokio::{net::TcpListener, time::sleep};

/// Starts the provider, and returns its URL.
pub(crate) async fn start() -> anyhow::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let answer = async || sleep(Duration::from_millis(50)).await;
    let router = Router::new().fallback(any(answer));
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(format!("http://{address}"))
}
