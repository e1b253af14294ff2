//! A server on 127.0.0.1 whose answers a test chooses.

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::Request,
    http::{HeaderMap, Method, Version},
    response::{IntoResponse, Response},
};
use std::{
    future::Future,
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex},
    thread,
};

/// A request that has arrived.
#[derive(Clone, Debug)]
pub(crate) struct Arrived {
    pub(crate) method: Method,
    pub(crate) uri: String,
    pub(crate) version: Version,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
    /// How many requests with this body have arrived before.
    pub(crate) before: usize,
}

/// A running server. It ends with the process of the test.
pub(crate) struct Server {
    address: SocketAddr,
    arrived: Arc<Mutex<Vec<Arrived>>>,
}

impl Server {
    pub(crate) fn start<F, Fut>(answer: F) -> Self
    where
        F: Fn(Arrived) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = Response> + Send,
    {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let server = Self {
            address: listener.local_addr().unwrap(),
            arrived: Arc::default(),
        };
        let arrived = server.arrived.clone();
        let handle = move |request: Request<Body>| {
            let (answer, arrived) = (answer.clone(), arrived.clone());
            async move {
                let (parts, body) = request.into_parts();
                let body = to_bytes(body, usize::MAX).await.unwrap();
                let body = String::from_utf8(body.to_vec()).unwrap();
                let request = {
                    let mut arrived = arrived.lock().unwrap();
                    let before = arrived.iter().filter(|other| other.body == body).count();
                    let request = Arrived {
                        method: parts.method,
                        uri: parts.uri.to_string(),
                        version: parts.version,
                        headers: parts.headers,
                        body,
                        before,
                    };
                    arrived.push(request.clone());
                    request
                };
                answer(request).await
            }
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        thread::spawn(move || {
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                axum::serve(listener, Router::new().fallback(handle)).await.unwrap();
            });
        });
        server
    }

    /// The URL of the server, with `user` in it, such as `name:password@`.
    pub(crate) fn url_with(&self, user: &str) -> String {
        format!("http://{user}{}/v1/chat/completions", self.address)
    }

    pub(crate) fn url(&self) -> String {
        self.url_with("")
    }

    /// The URL of the server without the path of an endpoint.
    pub(crate) fn base_url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    pub(crate) fn arrived(&self) -> Vec<Arrived> {
        self.arrived.lock().unwrap().clone()
    }
}

/// A good answer.
pub(crate) fn good() -> Response {
    answer(
        200,
        r#"{"choices":[{"message":{"content":"hello"},"finish_reason":"stop"}],"usage":{"total_tokens":9}}"#,
    )
}

pub(crate) fn answer(status: u16, body: &'static str) -> Response {
    let status = axum::http::StatusCode::from_u16(status).unwrap();
    (status, [("content-type", "application/json")], body).into_response()
}

pub(crate) fn with_header(mut response: Response, name: &'static str, value: &'static str) -> Response {
    response.headers_mut().insert(name, value.parse().unwrap());
    response
}
