//! A local provider that allows so many requests a second, and answers 429 to whatever is more.

use axum::{Router, extract::State, http::StatusCode, routing::post};
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// How much more than the burst it lets pass, told as time: what is sent evenly does not arrive evenly.
const SLACK: Duration = Duration::from_millis(10);

pub(crate) struct Provider {
    address: SocketAddr,
    meter: Arc<Mutex<Meter>>,
}

/// An exact bucket, in parts of which each nanosecond brings a whole number.
struct Meter {
    per_second: u128,
    capacity: u128,
    level: u128,
    at: Instant,
    admitted: u64,
    refused: u64,
}

const PARTS: u128 = 1_000_000_000;

impl Provider {
    pub(crate) async fn start(per_second: u64, burst: u64) -> anyhow::Result<Self> {
        let per_second = u128::from(per_second);
        let capacity = u128::from(burst + 1) * PARTS + per_second * SLACK.as_nanos();
        let meter = Arc::new(Mutex::new(Meter {
            per_second,
            capacity,
            level: capacity,
            at: Instant::now(),
            admitted: 0,
            refused: 0,
        }));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let router = Router::new().route("/", post(answer)).with_state(meter.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(Self { address, meter })
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    pub(crate) fn admitted(&self) -> u64 {
        self.meter.lock().unwrap_or_else(PoisonError::into_inner).admitted
    }

    pub(crate) fn refused(&self) -> u64 {
        self.meter.lock().unwrap_or_else(PoisonError::into_inner).refused
    }
}

async fn answer(State(meter): State<Arc<Mutex<Meter>>>) -> StatusCode {
    let mut meter = meter.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Instant::now();
    let gained = now.saturating_duration_since(meter.at).as_nanos() * meter.per_second;
    meter.level = meter.capacity.min(meter.level + gained);
    meter.at = now;
    if meter.level < PARTS {
        meter.refused += 1;
        return StatusCode::TOO_MANY_REQUESTS;
    }
    meter.level -= PARTS;
    meter.admitted += 1;
    StatusCode::OK
}
