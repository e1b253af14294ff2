//! A local provider that allows a number of requests per second, and answers further requests with 429.

use axum::{Router, extract::State, http::StatusCode, routing::post};
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// What the provider admits beyond the burst: the amount that flows in during this time. The provider needs it because
/// requests that are sent at even intervals do not arrive at even intervals.
const SLACK: Duration = Duration::from_millis(10);

pub(crate) struct Provider {
    address: SocketAddr,
    meter: Arc<Mutex<Meter>>,
}

/// A token bucket that counts in parts of a request, so that each nanosecond adds a whole number of parts.
struct Meter {
    per_second: u128,
    capacity: u128,
    level: u128,
    updated_at: Instant,
    admitted: u64,
    rejected: u64,
}

/// The number of parts of one request.
const PARTS: u128 = 1_000_000_000;

impl Provider {
    pub(crate) async fn start(per_second: u64, burst: u64) -> anyhow::Result<Self> {
        let per_second = u128::from(per_second);
        let capacity = u128::from(burst + 1) * PARTS + per_second * SLACK.as_nanos();
        let meter = Arc::new(Mutex::new(Meter {
            per_second,
            capacity,
            level: capacity,
            updated_at: Instant::now(),
            admitted: 0,
            rejected: 0,
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

    /// The number of requests that were answered with 429.
    pub(crate) fn rejected(&self) -> u64 {
        self.meter.lock().unwrap_or_else(PoisonError::into_inner).rejected
    }
}

async fn answer(State(meter): State<Arc<Mutex<Meter>>>) -> StatusCode {
    let mut meter = meter.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Instant::now();
    let gained = now.saturating_duration_since(meter.updated_at).as_nanos() * meter.per_second;
    meter.level = meter.capacity.min(meter.level + gained);
    meter.updated_at = now;
    if meter.level < PARTS {
        meter.rejected += 1;
        return StatusCode::TOO_MANY_REQUESTS;
    }
    meter.level -= PARTS;
    meter.admitted += 1;
    StatusCode::OK
}
