//! Simulates a network that can fail: a TCP proxy that runs in the test process, between a client and a server.

#![allow(dead_code, unreachable_pub)]

use std::{collections::VecDeque, net::Ipv4Addr, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep_until},
};

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Network {
    Passes,
    /// The proxy delays all data by this time, in each direction. Data that is sent meanwhile is on its way at the same
    /// time, and does not overtake.
    Delays(Duration),
    /// The proxy accepts connections and data, and delivers nothing in either direction.
    BlackHole,
    /// The proxy delivers what the client sends, and drops what the server replies.
    HalfOpen,
    /// The proxy closes all open connections, and each new one as soon as it is accepted.
    Resets,
}

pub struct Proxy {
    port: u16,
    network: Arc<watch::Sender<Network>>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    pub async fn start(to: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let network = Arc::new(watch::Sender::new(Network::Passes));
        let mut tasks = JoinSet::new();
        let sender = network.clone();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let network = sender.subscribe();
                if *network.borrow() == Network::Resets {
                    drop(client);
                    continue;
                }
                let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, to)).await else {
                    continue;
                };
                let _ = (client.set_nodelay(true), server.set_nodelay(true));
                let (from_client, to_client) = client.into_split();
                let (from_server, to_server) = server.into_split();
                let back = network.clone();
                connections.spawn(async move {
                    tokio::select! {
                        () = copy(from_client, to_server, network, false) => {}
                        () = copy(from_server, to_client, back, true) => {}
                    }
                });
            }
        });
        Self {
            port,
            network,
            _tasks: tasks,
        }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }

    /// Returns what the network is set by, to set it from another task.
    pub fn network(&self) -> Arc<watch::Sender<Network>> {
        self.network.clone()
    }

    pub fn set(&self, network: Network) {
        self.network.send_replace(network);
    }
}

async fn copy(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut network: watch::Receiver<Network>,
    is_reply: bool,
) {
    let mut bytes = vec![0; 64 * 1024];
    // What is delayed, with the time when it is delivered.
    let mut on_its_way: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    loop {
        let next = on_its_way.front().map(|(at, _)| *at);
        let read = tokio::select! {
            read = from.read(&mut bytes) => read,
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                let (_, data) = on_its_way.pop_front().expect("something is on its way");
                if to.write_all(&data).await.is_err() {
                    return;
                }
                continue;
            }
            changed = network.changed() => {
                if changed.is_err() || *network.borrow() == Network::Resets {
                    return;
                }
                continue;
            }
        };
        let Ok(read @ 1..) = read else { return };
        let now = *network.borrow();
        let delay = match now {
            Network::Passes => Duration::ZERO,
            Network::Delays(delay) => delay,
            Network::BlackHole => continue,
            Network::HalfOpen if is_reply => continue,
            Network::HalfOpen => Duration::ZERO,
            Network::Resets => return,
        };
        if delay.is_zero() && on_its_way.is_empty() {
            if to.write_all(&bytes[..read]).await.is_err() {
                return;
            }
        } else {
            let last = on_its_way.back().map(|(at, _)| *at);
            let at = (Instant::now() + delay).max(last.unwrap_or_else(Instant::now));
            on_its_way.push_back((at, bytes[..read].to_vec()));
        }
    }
}
