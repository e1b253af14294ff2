//! A local provider of APIs like those of real providers. It enforces its limits, reports them in the headers that a real provider uses,
//! and fails or delays some of its responses.

mod answer;
mod bucket;
mod headers;
mod meter;

use crate::{
    args::{Args, LocalArgs},
    limits::{Bounds, LOCAL_COST},
};
use answer::{Question, error, pieces};
use axum::{
    Router,
    extract::State,
    http::{HeaderMap, Request, StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use meter::Meter;
use std::{
    collections::HashMap,
    io,
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};
use tokio::time::sleep;
use tower_outbound::provider::Provider as Dialect;

/// The longest request that the provider reads, in bytes.
const MAX_BODY: usize = 256 << 20;

/// The pause in the middle of a slow response.
const SLOW: Duration = Duration::from_millis(400);

pub(crate) struct Provider {
    listener: TcpListener,
    address: SocketAddr,
    service: Service,
}

/// The state of the provider that all requests share.
struct Service {
    meter: Mutex<Meter>,
    dialect: Dialect,
    behaviour: LocalArgs,
}

// === impl Provider ===

impl Provider {
    pub(crate) fn bind(address: SocketAddr, bounds: &Bounds, args: &Args) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            address: listener.local_addr()?,
            listener,
            service: Service {
                meter: Mutex::new(Meter::new(bounds)),
                dialect: args.send.provider(),
                behaviour: args.local.clone(),
            },
        })
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/v1/chat/completions", self.address)
    }

    /// Serves requests until an error ends the server.
    pub(crate) async fn serve(self) -> io::Result<()> {
        let router = Router::new().fallback(answer).with_state(Arc::new(self.service));
        axum::serve(tokio::net::TcpListener::from_std(self.listener)?, router).await
    }

    /// Serves requests on a separate thread, so that a busy runtime of the client does not delay them.
    pub(crate) fn serve_on_own_thread(self) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        thread::Builder::new()
            .name("provider".into())
            .spawn(move || runtime.block_on(self.serve()))?;
        Ok(())
    }
}

async fn answer(State(service): State<Arc<Service>>, request: axum::extract::Request) -> Response {
    let Service {
        meter,
        dialect,
        behaviour,
    } = &*service;
    let (parts, body) = request.into_parts();
    let Ok(body) = axum::body::to_bytes(body, MAX_BODY).await else {
        let body = error("invalid_request_error", "too_large", "The request is too large.");
        return (StatusCode::PAYLOAD_TOO_LARGE, body).into_response();
    };
    let request = Request::from_parts(parts, body);
    let question = Question::read(&request, *dialect, behaviour.local_usage);
    let (admitted, seen, headers) = {
        let mut meter = meter.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = meter.see();
        if percent(behaviour.local_seed, seen, 0) < behaviour.local_faults {
            return fault();
        }
        let admitted = meter.admit(&question.cost(), &told_cost(request.headers()));
        (admitted, seen, meter.headers(*dialect))
    };
    let number = match admitted {
        Ok(number) => number,
        Err(rejection) => return (headers, rejection).into_response(),
    };
    sleep(latency(number)).await;
    if question.is_streamed() {
        return (headers, [(CONTENT_TYPE, "text/event-stream")], question.events()).into_response();
    }
    let whole = question.answer(number).to_string();
    let body = if percent(behaviour.local_seed, seen, 1) < behaviour.local_slow {
        let quarter = (0..=whole.len() / 4).rev().find(|at| whole.is_char_boundary(*at));
        let (first, rest) = whole.split_at(quarter.unwrap_or(0));
        pieces(vec![(Duration::ZERO, first.to_owned()), (SLOW, rest.to_owned())])
    } else {
        whole.into()
    };
    (headers, [(CONTENT_TYPE, "application/json")], body).into_response()
}

/// What the request takes of budgets with names of the user's own, as the header [`LOCAL_COST`] tells.
fn told_cost(headers: &HeaderMap) -> HashMap<String, u64> {
    let told = headers.get(LOCAL_COST).and_then(|told| told.to_str().ok());
    let amounts = told.unwrap_or_default().split(',').filter_map(|amount| {
        let (name, amount) = amount.trim().split_once('=')?;
        Some((name.to_owned(), amount.parse().ok()?))
    });
    amounts.collect()
}

/// A response with status 503, without a `retry-after`.
fn fault() -> Response {
    let body = error(
        "server_error",
        "overloaded",
        "The server is overloaded. Please try again later.",
    );
    (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
}

/// The latency of a response: between 40 and 120 ms, the same in every run.
fn latency(number: u64) -> Duration {
    Duration::from_micros(40_000 + mixed(number) % 80_000)
}

/// A pseudo-random number from 0 to 99, the same in every run with this seed. Different values of `stream` give
/// independent sequences.
fn percent(seed: u64, number: u64, stream: u64) -> u8 {
    (mixed(mixed(seed ^ (stream << 32)) ^ number) % 100) as u8
}

/// Mixes the bits of a number with the output function of the random generator SplitMix64.
fn mixed(number: u64) -> u64 {
    let mut mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latency_of_a_request_is_between_40_and_120_ms_in_every_run() {
        for number in 1..1_000 {
            assert!((40..=120).contains(&latency(number).as_millis()));
            assert_eq!(latency(number), latency(number));
        }
    }
}
