//! The `redis-server` that the fleet starts, on a free port of 127.0.0.1, without data on disk.

use anyhow::{Context, bail};
use std::{net::Ipv4Addr, process::Stdio, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    time::sleep,
};

pub(crate) struct RedisServer {
    port: u16,
    child: Child,
}

impl RedisServer {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        // The listener found a free port, and is dropped, so that Redis can use the port.
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?.local_addr()?.port();
        Ok(Self {
            port,
            child: start(port).await?,
        })
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }

    /// Kills the server, as `kill -9` does.
    pub(crate) async fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill().await.context("cannot kill redis-server")
    }

    /// Starts the server again, without data.
    pub(crate) async fn restart(&mut self) -> anyhow::Result<()> {
        self.child = start(self.port).await?;
        Ok(())
    }
}

async fn start(port: u16) -> anyhow::Result<Child> {
    let mut child = Command::new("redis-server")
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1"])
        .args(["--save", "", "--appendonly", "no"])
        .current_dir(std::env::temp_dir())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .context(
            "redis-server cannot be started. Install it (Debian and Ubuntu: apt-get install redis-server; macOS: brew \
             install redis; or Valkey's valkey-server under the name redis-server), and run this again",
        )?;
    for _ in 0..500 {
        if let Some(status) = child.try_wait()? {
            bail!("redis-server ended right after its start: {status}");
        }
        if TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.is_ok() {
            return Ok(child);
        }
        sleep(Duration::from_millis(10)).await;
    }
    bail!("redis-server does not accept connections within 5 s")
}
