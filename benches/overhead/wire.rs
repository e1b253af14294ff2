//! The processor time per request with a real HTTP client: hyper-util's client, over connections that are kept alive,
//! to a local server.
//!
//! The server is another process, whose processor time is not counted: this program, started with `--serve`.

use crate::{
    common::{median, process_cpu_time},
    contenders::{CAPACITY, UNREACHED, clones, concurrency, queue, rate},
    measure::Threads,
    traffic::{ANSWER, ANSWER_HEADERS, chat_request},
};
use bytes::Bytes;
use http::{Request, Response, Uri, header::DATE};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
};
use std::{
    convert::Infallible,
    future::Future,
    hint::black_box,
    io::{self, BufRead, BufReader, Read},
    net::SocketAddr,
    pin::Pin,
    process::{Child, Command, Stdio},
    time::Duration,
};
use tokio::net::TcpListener;
use tower::{Service, ServiceBuilder, ServiceExt};
use tower_outbound::{Executor, Rate};

/// The number of requests in flight.
const CALLERS: usize = 64;
/// The number of requests that each caller makes in one measurement.
const EACH: usize = 200;

type Run = Pin<Box<dyn Future<Output = ()>>>;

/// A stack around the client, which makes a number of requests to the URL with each caller.
struct Contender {
    name: &'static str,
    run: fn(Uri, usize) -> Run,
}

const CONTENDERS: [Contender; 4] = [
    Contender {
        name: "client",
        run: |url, each| Box::pin(requests(client(), url, each)),
    },
    Contender {
        name: "tower-stack",
        run: |url, each| {
            Box::pin(async move {
                let stack = ServiceBuilder::new()
                    .buffer(CAPACITY)
                    .concurrency_limit(CAPACITY)
                    .rate_limit(UNREACHED, Duration::from_secs(1))
                    .service(client());
                requests(stack, url, each).await;
            })
        },
    },
    Contender {
        name: "stack-without-events",
        run: |url, each| {
            Box::pin(async move {
                let stack = ServiceBuilder::new()
                    .layer(queue())
                    .layer(concurrency())
                    .layer(rate())
                    .service(client());
                requests(stack, url, each).await;
            })
        },
    },
    Contender {
        name: "executor",
        run: |url, each| {
            Box::pin(async move {
                let executor = Executor::builder()
                    .queue_capacity(CAPACITY)
                    .concurrency_limit(CAPACITY)
                    .requests(Rate::per_second(UNREACHED))
                    .tokens(Rate::per_second(UNREACHED))
                    .build(client())
                    .expect("the settings are valid");
                executor.start().expect("the executor is not running yet");
                requests(executor, url, each).await;
            })
        },
    },
];

/// Measures all contenders in turns, and prints the medians of the rounds.
pub(crate) fn compare(rounds: usize) {
    let server = Server::start().expect("the server starts");
    println!(
        "{:<32} {:>8} {:>8} {:>22}",
        "", "callers", "threads", "us of CPU per request"
    );
    let mut lines = Vec::new();
    for threads in Threads::ALL {
        let runtime = threads.build();
        let mut times = CONTENDERS.map(|_| Vec::with_capacity(rounds));
        for round in 0..rounds {
            for turn in 0..CONTENDERS.len() {
                let at = (turn + round) % CONTENDERS.len();
                let run = CONTENDERS[at].run;
                // The first requests are not measured: they open the connections of this run's client.
                let start = process_cpu_time();
                runtime.block_on(run(server.url(), 1));
                let warm = process_cpu_time();
                runtime.block_on(run(server.url(), EACH + 1));
                let (opening, all) = (warm - start, process_cpu_time() - warm);
                let used = all.saturating_sub(opening);
                times[at].push(used.as_secs_f64() * 1e6 / (CALLERS * EACH) as f64);
            }
        }
        for (contender, times) in CONTENDERS.iter().zip(&times) {
            println!(
                "{:<32} {CALLERS:>8} {:>8} {:>22.1}",
                contender.name,
                threads.name(),
                median(times.iter().copied())
            );
        }
        println!();
        for (name, peer) in [(3, 1), (2, 1), (1, 0), (3, 0)] {
            let ratio = median(times[name].iter().zip(&times[peer]).map(|(this, peer)| this / peer));
            let (name, peer) = (CONTENDERS[name].name, CONTENDERS[peer].name);
            lines.push(format!("cpu {name}/{peer} {CALLERS} {} = {ratio:.2}", threads.name()));
        }
    }
    lines.iter().for_each(|line| println!("{line}"));
}

type HttpClient = Client<HttpConnector, Full<Bytes>>;

fn client() -> HttpClient {
    Client::builder(TokioExecutor::new()).build_http()
}

/// Each caller makes `each` requests, one after the other, and reads the bodies of the responses to their ends.
async fn requests<S>(service: S, url: Uri, each: usize)
where
    S: Service<Request<Full<Bytes>>, Response = Response<Incoming>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: std::fmt::Debug + Send,
{
    let callers = clones(service, CALLERS).into_iter().map(|mut service| {
        let url = url.clone();
        tokio::spawn(async move {
            for _ in 0..each {
                let service = service.ready().await.expect("the service is ready");
                let response = service
                    .call(chat_request(url.clone()))
                    .await
                    .expect("the call succeeds");
                black_box(response.into_body().collect().await.expect("the body is read"));
            }
        })
    });
    for caller in callers.collect::<Vec<_>>() {
        caller.await.expect("no caller panics");
    }
}

// === The server ===

/// The process of the server. It is ended when dropped.
struct Server {
    process: Child,
    address: SocketAddr,
}

impl Server {
    fn start() -> io::Result<Self> {
        let mut process = Command::new(std::env::current_exe()?)
            .arg("--serve")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        let output = process.stdout.take().expect("the output is piped");
        BufReader::new(output).read_line(&mut line)?;
        let address = line.trim().parse().map_err(io::Error::other)?;
        Ok(Self { process, address })
    }

    fn url(&self) -> Uri {
        format!("http://{}/v1/chat/completions", self.address)
            .parse()
            .expect("the URL is valid")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Fails only if the process has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Serves the answer to every request, until the standard input is closed: that is when the process that started this
/// one has ended.
pub(crate) fn serve() {
    let runtime = Threads::One.build();
    std::thread::spawn(|| {
        let _ = io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        println!("{}", listener.local_addr().expect("the listener has an address"));
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                continue;
            };
            let _ = stream.set_nodelay(true);
            let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer));
            tokio::spawn(connection);
        }
    });
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let _ = request.into_body().collect().await;
    let mut response = Response::builder();
    // The server writes the date itself.
    for (name, value) in ANSWER_HEADERS.into_iter().filter(|(name, _)| *name != DATE) {
        response = response.header(name, value);
    }
    let body = Full::new(Bytes::from_static(ANSWER.as_bytes()));
    Ok(response.body(body).expect("the response is valid"))
}
