//! A server on loopback that responds properly, late, wrongly or not at all, depending on the path of the request.

use std::{io, net::SocketAddr, thread, time::Duration};
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
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start() -> Self {
        let (stop, stopped) = oneshot::channel::<()>();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let thread = thread::spawn(move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let serve = async {
                    let listener = TcpListener::from_std(listener).unwrap();
                    while let Ok((stream, _)) = listener.accept().await {
                        tokio::spawn(serve(stream));
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
async fn serve(mut stream: TcpStream) -> io::Result<()> {
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
        match path {
            "/slow" => {
                sleep(Duration::from_millis(20)).await;
                stream.write_all(WHOLE).await?;
            }
            // Sends nothing, and waits until the client closes the connection.
            "/stuck" => while stream.read_buf(&mut read).await? > 0 {},
            "/status" => stream.write_all(BUSY).await?,
            "/reset" => {
                // A connection that is closed with a linger time of zero is reset.
                stream.set_zero_linger()?;
                return Ok(());
            }
            "/half" => {
                stream.write_all(HALF).await?;
                return stream.shutdown().await;
            }
            "/malformed" => {
                stream.write_all(b"HTP/9.9 what? \x00\xff\r\n\r\n").await?;
                return stream.shutdown().await;
            }
            "/hangs-up" => return Ok(()),
            "/stream" => {
                stream.write_all(STREAM).await?;
                for _ in 0..5 {
                    sleep(Duration::from_millis(2)).await;
                    stream.write_all(PIECE).await?;
                }
                stream.write_all(END).await?;
            }
            _ => stream.write_all(WHOLE).await?,
        }
    }
}

/// The head of each response of the API, as chat APIs send it, without the line that says how long the body is.
macro_rules! head {
    ($status:literal, $content_type:literal) => {
        concat!(
            "HTTP/1.1 ",
            $status,
            "\r\ndate: Fri, 27 Nov 2026 20:00:00 GMT\r\ncontent-type: ",
            $content_type,
            "\r\nconnection: keep-alive\r\n\
             openai-organization: org-soak\r\n\
             openai-processing-ms: 312\r\n\
             openai-version: 2020-10-01\r\n\
             x-ratelimit-limit-requests: 5000\r\n\
             x-ratelimit-limit-tokens: 800000\r\n\
             x-ratelimit-remaining-requests: 4999\r\n\
             x-ratelimit-remaining-tokens: 799744\r\n\
             x-ratelimit-reset-requests: 12ms\r\n\
             x-ratelimit-reset-tokens: 19ms\r\n\
             x-request-id: req_8c2f4f7a0c9d4e5b8a1f3e2d1c0b9a87\r\n\
             set-cookie: __cf_bm=sk-soak-3141592653589793; path=/; HttpOnly; Secure\r\n\
             server: cloudflare\r\n"
        )
    };
}

/// A whole response, which reports a usage of 7 tokens.
const WHOLE: &[u8] = concat!(
    head!("200 OK", "application/json"),
    "content-length: 28\r\n\r\n{\"usage\":{\"total_tokens\":7}}"
)
.as_bytes();

const BUSY: &[u8] = concat!(head!("503 Busy", "application/json"), "content-length: 0\r\n\r\n").as_bytes();

/// A response that ends early.
const HALF: &[u8] = concat!(head!("200 OK", "application/json"), "content-length: 99\r\n\r\nhalf").as_bytes();

/// The head of a streamed response. `PIECE` and `END` are its further parts, and the end reports a usage of 9 tokens.
const STREAM: &[u8] = concat!(
    head!("200 OK", "text/event-stream"),
    "transfer-encoding: chunked\r\n\r\n"
)
.as_bytes();
const PIECE: &[u8] = b"c\r\ndata: word\n\n\r\n";
const END: &[u8] = b"24\r\ndata: {\"usage\":{\"total_tokens\":9}}\n\n\r\n0\r\n\r\n";
