//! A server on loopback that responds properly, late, wrongly or not at all, depending on the path of the request.

use crate::{fault, provider::Provider};
use std::{io, net::SocketAddr, sync::Arc, thread, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime,
    sync::oneshot,
    time::sleep,
};

/// A server with its own thread and runtime. When the server is dropped, both end.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) provider: Arc<Provider>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start() -> Self {
        let (stop, stopped) = oneshot::channel::<()>();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let provider = Arc::new(Provider::new());
        let limits = provider.clone();
        let thread = thread::spawn(move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let serve = async {
                    let listener = TcpListener::from_std(listener).unwrap();
                    while let Ok((stream, _)) = listener.accept().await {
                        tokio::spawn(serve(stream, limits.clone()));
                    }
                };
                tokio::select! {
                    () = serve => {}
                    _ = stopped => {}
                }
            });
        });
        Self {
            address,
            provider,
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// Serves one connection. Requests have no body, so each request ends with an empty line.
async fn serve(mut stream: TcpStream, provider: Arc<Provider>) -> io::Result<()> {
    let mut read = Vec::new();
    loop {
        let end = loop {
            if let Some(end) = read.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
            if stream.read_buf(&mut read).await? == 0 {
                return Ok(());
            }
        };
        let head = String::from_utf8_lossy(&read[..end]).into_owned();
        read.drain(..end);
        let path = head.split(' ').nth(1).unwrap_or_default();
        let usage = if path == "/stream" {
            fault::STREAM_USAGE
        } else {
            fault::USAGE
        };
        let (is_held, limits) = provider.take(usage, head.contains(fault::SCHEDULED));
        if !is_held {
            let rejected = response(
                "429 Too Many Requests",
                &limits,
                "application/json",
                "content-length: 0",
            );
            stream.write_all(rejected.as_bytes()).await?;
            continue;
        }
        let respond = |status, content_type, framing: &str| response(status, &limits, content_type, framing);
        match path {
            // Sends nothing, and waits until the client closes the connection.
            "/stuck" => while stream.read_buf(&mut read).await? > 0 {},
            "/status" => {
                let busy = respond("503 Busy", "application/json", "content-length: 0");
                stream.write_all(busy.as_bytes()).await?;
            }
            "/reset" => {
                // A connection that is closed with a linger time of zero is reset.
                stream.set_zero_linger()?;
                return Ok(());
            }
            "/half" => {
                // A response that ends early.
                let half = respond("200 OK", "application/json", "content-length: 99") + "half";
                stream.write_all(half.as_bytes()).await?;
                return stream.shutdown().await;
            }
            "/malformed" => {
                stream.write_all(b"HTP/9.9 what? \x00\xff\r\n\r\n").await?;
                return stream.shutdown().await;
            }
            "/hangs-up" => return Ok(()),
            "/stream" => {
                let begin = respond("200 OK", "text/event-stream", "transfer-encoding: chunked");
                stream.write_all(begin.as_bytes()).await?;
                for _ in 0..5 {
                    sleep(Duration::from_millis(2)).await;
                    stream.write_all(PIECE).await?;
                }
                let end = format!("data: {}\n\n", reported(usage));
                let end = format!("{:x}\r\n{end}\r\n0\r\n\r\n", end.len());
                stream.write_all(end.as_bytes()).await?;
            }
            path => {
                if path == "/slow" {
                    sleep(Duration::from_millis(20)).await;
                }
                let body = reported(usage);
                let length = format!("content-length: {}", body.len());
                let whole = respond("200 OK", "application/json", &length) + &body;
                stream.write_all(whole.as_bytes()).await?;
            }
        }
    }
}

/// The head of a response of the API, as chat APIs send it, with the provider's limits and the header that says how long
/// the body is.
fn response(status: &str, limits: &str, content_type: &str, framing: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\n\
         date: Fri, 27 Nov 2026 20:00:00 GMT\r\n\
         content-type: {content_type}\r\n\
         connection: keep-alive\r\n\
         anthropic-organization-id: 5b2c1c1e-9d0b-4c62-8f43-4f3e0c6f8d2a\r\n\
         {limits}\
         request-id: req_8c2f4f7a0c9d4e5b8a1f3e2d1c0b9a87\r\n\
         strict-transport-security: max-age=31536000; includeSubDomains; preload\r\n\
         cf-cache-status: DYNAMIC\r\n\
         set-cookie: __cf_bm=sk-soak-3141592653589793; path=/; HttpOnly; Secure\r\n\
         server: cloudflare\r\n\
         {framing}\r\n\r\n"
    )
}

/// The end of a body, which reports what the call has used.
fn reported((input, output): (u64, u64)) -> String {
    format!(r#"{{"usage":{{"input_tokens":{input},"output_tokens":{output}}}}}"#)
}

/// A part of the body of a streamed response.
const PIECE: &[u8] = b"c\r\ndata: word\n\n\r\n";
