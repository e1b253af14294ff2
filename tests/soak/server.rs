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
            "/status" => {
                stream
                    .write_all(b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n")
                    .await?
            }
            "/reset" => {
                // A connection that is closed with a linger time of zero is reset.
                stream.set_zero_linger()?;
                return Ok(());
            }
            "/half" => {
                stream
                    .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nhalf")
                    .await?;
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

/// A whole response, which reports a usage of 7 tokens.
const WHOLE: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 28\r\n\r\n{\"usage\":{\"total_tokens\":7}}";

/// The head of a streamed response. `PIECE` and `END` are its further parts, and the end reports a usage of 9 tokens.
const STREAM: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
const PIECE: &[u8] = b"c\r\ndata: word\n\n\r\n";
const END: &[u8] = b"24\r\ndata: {\"usage\":{\"total_tokens\":9}}\n\n\r\n0\r\n\r\n";
