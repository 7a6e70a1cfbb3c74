//! Server-sent events: a body that a task writes, with pings while nothing else comes.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use hyper::body::Frame;
use serde_json::Value;
use tokio::sync::mpsc;

/// Events that may be on their way to a slow reader before their writer waits.
const IN_FLIGHT: usize = 32;

/// The writing end. Whoever writes learns that the reader has left.
pub struct SseWriter {
    chunks: mpsc::Sender<Bytes>,
    ping: &'static str,
    ping_every: Duration,
}

/// The reader is gone.
#[derive(Debug)]
pub struct Gone;

/// A comment, which every client skips.
pub const COMMENT_PING: &str = ": ping\n\n";

/// The response whose body `write` writes, in a task of its own. `ping` is sent when nothing else was
/// for so long.
pub fn respond<F>(
    ping: &'static str,
    ping_every: Duration,
    write: impl FnOnce(SseWriter) -> F,
) -> Response
where
    F: Future<Output = Result<(), Gone>> + Send + 'static,
{
    let (writer, response) = SseWriter::new(ping, ping_every);
    let written = write(writer);
    tokio::spawn(async move {
        // A reader that left needs no more.
        let _ = written.await;
    });
    response
}

impl SseWriter {
    fn new(ping: &'static str, ping_every: Duration) -> (Self, Response) {
        let (chunks, receiver) = mpsc::channel(IN_FLIGHT);
        let mut response = Response::new(Body::new(ChannelBody { receiver }));
        let headers = response.headers_mut();
        let event_stream = HeaderValue::from_static("text/event-stream");
        headers.insert(header::CONTENT_TYPE, event_stream);
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        // Proxies that buffer would hold tokens back.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        let writer = SseWriter {
            chunks,
            ping,
            ping_every,
        };
        (writer, response)
    }

    /// Waits for `next`, pinging meanwhile.
    ///
    /// # Errors
    /// [`Gone`] as soon as the reader has left; `next` is then dropped.
    pub async fn while_waiting<T>(&self, next: impl Future<Output = T>) -> Result<T, Gone> {
        tokio::pin!(next);
        loop {
            tokio::select! {
                biased;
                () = self.chunks.closed() => return Err(Gone),
                value = &mut next => return Ok(value),
                () = tokio::time::sleep(self.ping_every) => {
                    self.send(self.ping.into()).await?;
                }
            }
        }
    }

    /// `data: ...`
    ///
    /// # Errors
    /// [`Gone`] if nobody reads any more.
    pub async fn data(&self, value: &Value) -> Result<(), Gone> {
        self.send(format!("data: {value}\n\n")).await
    }

    /// `event: ...` and `data: ...`
    ///
    /// # Errors
    /// [`Gone`] if nobody reads any more.
    pub async fn event(&self, name: &str, value: &Value) -> Result<(), Gone> {
        self.send(format!("event: {name}\ndata: {value}\n\n")).await
    }

    /// `data: [DONE]`
    ///
    /// # Errors
    /// [`Gone`] if nobody reads any more.
    pub async fn done(&self) -> Result<(), Gone> {
        self.send("data: [DONE]\n\n".into()).await
    }

    async fn send(&self, text: String) -> Result<(), Gone> {
        let sent = self.chunks.send(text.into()).await;
        sent.map_err(|_| Gone)
    }
}

/// A body whose chunks come through a channel.
struct ChannelBody {
    receiver: mpsc::Receiver<Bytes>,
}

impl HttpBody for ChannelBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let chunk = self.receiver.poll_recv(context);
        chunk.map(|chunk| chunk.map(|bytes| Ok(Frame::data(bytes))))
    }
}
