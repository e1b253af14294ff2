//! A `redis-server` process for one test. It listens on a free port of 127.0.0.1, saves nothing on disk by default, and
//! is killed when its [`Server`] is dropped.

#![allow(dead_code, unreachable_pub)]

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};
use tokio::time::Instant;

pub struct Server {
    child: Option<Child>,
    port: u16,
    first: Vec<String>,
    arguments: Vec<String>,
    directory: std::path::PathBuf,
}

impl Server {
    /// Starts a Redis server. Panics if `redis-server` is not installed; the tests that need one are therefore ignored
    /// by default.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts a Redis server with additional command-line arguments for `redis-server`.
    pub fn start_with(arguments: &[&str]) -> Self {
        Self::start_as(&[], arguments)
    }

    /// Starts a Redis server whose first arguments are `first`: the name of a file of settings, for example.
    pub fn start_as(first: &[&str], arguments: &[&str]) -> Self {
        let port = free_port();
        let directory = std::env::temp_dir().join(format!("tower-outbound-redis-{}-{port}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let mut server = Self {
            child: None,
            port,
            first: first.iter().map(|argument| (*argument).to_owned()).collect(),
            arguments: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
            directory,
        };
        server.restart();
        server
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the directory of the server's files, which is deleted with the server.
    pub fn directory(&self) -> &std::path::Path {
        &self.directory
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }

    pub fn id(&self) -> u32 {
        self.child.as_ref().expect("the server was killed").id()
    }

    /// Kills the Redis server with SIGKILL, so that it cannot save anything.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts the Redis server again on the same port, after killing it if it is running. The new process loads the
    /// data that the killed one has saved, if any.
    pub fn restart(&mut self) {
        self.kill();
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let mut child = Command::new(std::env::var("REDIS_SERVER").unwrap_or_else(|_| "redis-server".into()))
                .args(&self.first)
                .args(["--port", &self.port.to_string(), "--bind", "127.0.0.1"])
                .args(["--save", "", "--appendonly", "no", "--dir"])
                .arg(&self.directory)
                .args(&self.arguments)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("cannot run redis-server: install it, or set REDIS_SERVER to its path");
            while Instant::now() < until && child.try_wait().unwrap().is_none() {
                if self
                    .try_command(&["PING"])
                    .is_some_and(|reply| reply.starts_with("+PONG") || reply.starts_with("-NOAUTH"))
                {
                    self.child = Some(child);
                    return;
                }
                // Real time: the server is a process, and tells only by a reply that it has started.
                thread::sleep(Duration::from_millis(5));
            }
            let _ = child.kill();
            let _ = child.wait();
            assert!(Instant::now() < until, "redis-server did not start within 10 s");
        }
    }

    /// Sends a Redis command to the server over a new connection, and returns the reply undecoded.
    pub fn command(&self, words: &[&str]) -> String {
        self.try_command(words).expect("redis-server did not reply")
    }

    /// Sends several Redis commands over one connection, for example to authenticate first.
    pub fn commands(&self, commands: &[&[&str]]) {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).unwrap();
        for words in commands {
            send(&mut stream, words).expect("redis-server did not reply");
        }
    }

    fn try_command(&self, words: &[&str]) -> Option<String> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).ok()?;
        send(&mut stream, words)
    }

    /// Sends a signal to the server process: `STOP` freezes the process, `CONT` resumes it.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args([&format!("-{name}"), &self.id().to_string()])
            .status();
        assert!(status.unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Sends a command, and returns what the server replies first: up to 64 KiB.
fn send(stream: &mut TcpStream, words: &[&str]) -> Option<String> {
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    let mut command = format!("*{}\r\n", words.len());
    for word in words {
        command.push_str(&format!("${}\r\n{word}\r\n", word.len()));
    }
    stream.write_all(command.as_bytes()).ok()?;
    let mut reply = vec![0; 64 * 1024];
    let read = stream.read(&mut reply).ok()?;
    reply.truncate(read);
    String::from_utf8(reply).ok()
}

/// Returns a port of 127.0.0.1 that no process listens on.
pub fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}
