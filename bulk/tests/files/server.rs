//! A server of answers that are not JSON, or are JSON in an unusual way. It notes every request that arrives.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

/// A request as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Arrived {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: String,
    pub(crate) body: Vec<u8>,
}

/// A server on a port of its own, which answers by the path: see [`answer`].
pub(crate) struct Server {
    address: SocketAddr,
    arrived: Arc<Mutex<Vec<Arrived>>>,
}

pub(crate) const ODD_JSON: &str =
    "{\"z\": 1.10,\n \"a\": 123456789012345678901234567890, \"a\": \"\\u0000\",\n \"usage\": {\"total_tokens\": 12}}";

impl Server {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let arrived = Arc::<Mutex<Vec<_>>>::default();
        let notes = arrived.clone();
        // The threads end with the test.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let notes = notes.clone();
                thread::spawn(move || serve(&stream, &notes));
            }
        });
        Self { address, arrived }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) fn arrived(&self) -> Vec<Arrived> {
        self.arrived.lock().unwrap().clone()
    }
}

fn serve(stream: &TcpStream, notes: &Mutex<Vec<Arrived>>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut first = String::new();
        reader.read_line(&mut first).ok().filter(|length| *length > 0)?;
        let mut headers = String::new();
        let mut length = 0;
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok()?;
            if line.trim().is_empty() {
                break;
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().ok()?;
            }
            headers.push_str(&line);
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        let mut words = first.split(' ');
        let arrived = Arrived {
            method: words.next()?.into(),
            path: words.next()?.into(),
            headers,
            body,
        };
        notes.lock().unwrap().push(arrived.clone());
        let (status, headers, body) = answer(&arrived);
        let length = body.len();
        let head = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n{headers}\r\n");
        let mut writer = stream;
        writer.write_all(head.as_bytes()).ok()?;
        writer.write_all(&body).ok()?;
    }
}

fn answer(arrived: &Arrived) -> (&'static str, &'static str, Vec<u8>) {
    const JSON: &str = "content-type: application/json\r\nx-request-id: req_1\r\nset-cookie: secret\r\n";
    let good = || br#"{"usage":{"total_tokens":12}}"#.to_vec();
    match arrived.path.split(['?', '/']).nth(1).unwrap_or_default() {
        "odd" => ("200 OK", JSON, ODD_JSON.into()),
        "audio" => ("200 OK", "content-type: audio/mpeg\r\n", b"\xff\xfbID3".to_vec()),
        "text" => ("200 OK", "content-type: text/plain\r\n", b"7".to_vec()),
        "stream" => (
            "200 OK",
            "content-type: text/event-stream\r\n",
            b"data: {\"id\":\"a\",\"object\":\"chat.completion.chunk\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"he\"}}]}\n\n\
              data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"llo\"},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n"
                .to_vec(),
        ),
        "bad" => ("400 Bad Request", JSON, br#"{"error":{"message":"bad"}}"#.to_vec()),
        // The earlier a line stands in the input, the later it is answered.
        "late" => {
            let number: u64 = String::from_utf8_lossy(&arrived.body).chars().filter(char::is_ascii_digit).collect::<String>().parse().unwrap_or(0);
            thread::sleep(std::time::Duration::from_millis(40 * 10_u64.saturating_sub(number)));
            ("200 OK", JSON, good())
        }
        "slow" => {
            thread::sleep(std::time::Duration::from_secs(3));
            ("200 OK", JSON, good())
        }
        _ => ("200 OK", JSON, good()),
    }
}
