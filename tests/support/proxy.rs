//! A wire that can be cut: a TCP proxy in this process.

#![allow(dead_code, unreachable_pub)]

use std::{net::Ipv4Addr, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Wire {
    Passes,
    /// Each way takes so long.
    Delays(Duration),
    /// Takes everything and delivers nothing.
    BlackHole,
    /// Delivers what is asked, and nothing of what is answered.
    HalfOpen,
    /// Cuts each connection at once.
    Resets,
}

pub struct Proxy {
    port: u16,
    wire: Arc<watch::Sender<Wire>>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    pub async fn start(to: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let wire = Arc::new(watch::Sender::new(Wire::Passes));
        let mut tasks = JoinSet::new();
        let sender = wire.clone();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let wire = sender.subscribe();
                if *wire.borrow() == Wire::Resets {
                    drop(client);
                    continue;
                }
                let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, to)).await else {
                    continue;
                };
                let _ = (client.set_nodelay(true), server.set_nodelay(true));
                let (from_client, to_client) = client.into_split();
                let (from_server, to_server) = server.into_split();
                let back = wire.clone();
                connections.spawn(async move {
                    tokio::select! {
                        () = carry(from_client, to_server, wire, false) => {}
                        () = carry(from_server, to_client, back, true) => {}
                    }
                });
            }
        });
        Self {
            port,
            wire,
            _tasks: tasks,
        }
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }

    pub fn set(&self, wire: Wire) {
        self.wire.send_replace(wire);
    }
}

async fn carry(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut wire: watch::Receiver<Wire>,
    is_answer: bool,
) {
    let mut bytes = vec![0; 64 * 1024];
    loop {
        let read = tokio::select! {
            read = from.read(&mut bytes) => read,
            changed = wire.changed() => {
                if changed.is_err() || *wire.borrow() == Wire::Resets {
                    return;
                }
                continue;
            }
        };
        let Ok(read @ 1..) = read else { return };
        let now = *wire.borrow();
        match now {
            Wire::Passes => {}
            Wire::Delays(delay) => tokio::time::sleep(delay).await,
            Wire::BlackHole => continue,
            Wire::HalfOpen if is_answer => continue,
            Wire::HalfOpen => {}
            Wire::Resets => return,
        }
        if to.write_all(&bytes[..read]).await.is_err() {
            return;
        }
    }
}
