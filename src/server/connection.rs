//! Connections: accepted up to a number, cut off where a client is too slow, drained at the end.

use std::future::poll_fn;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Where requests come from.
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// How slow and how many clients may be.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    pub connections: usize,
    /// To send a request's head, from the end of the last one
    pub header_time: Duration,
    /// Without taking a byte of what is written to it
    pub stall_time: Duration,
    pub header_bytes: usize,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Listener {
    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // Tokens are small, and each is wanted at once.
                let _ = stream.set_nodelay(true);
                Box::new(stream)
            }
            Listener::Unix(listener) => Box::new(listener.accept().await?.0),
        })
    }
}

/// A certificate and its key, by their PEM files.
///
/// # Errors
/// A file that cannot be read or holds neither, or a key of another certificate.
pub fn tls(certificate: &Path, key: &Path) -> anyhow::Result<TlsAcceptor> {
    let of = |path: &Path| path.display().to_string();
    let certificates = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| of(certificate))?;
    anyhow::ensure!(
        !certificates.is_empty(),
        "{}: has no certificate in PEM form",
        of(certificate)
    );
    let private = PrivateKeyDer::from_pem_file(key).with_context(|| of(key))?;
    let provider = Arc::new(ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(certificates, private)
        .with_context(|| format!("{} and {}", of(certificate), of(key)))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Serves until `stop` becomes true; then waits for requests in work, at most `drain_time`.
pub async fn serve(
    listener: Listener,
    tls: Option<TlsAcceptor>,
    router: Router,
    limits: ConnectionLimits,
    mut stop: watch::Receiver<bool>,
    drain_time: Duration,
) {
    let places = Arc::new(Semaphore::new(limits.connections));
    loop {
        // Also while all places are taken: an end does not wait for one of them.
        let place = tokio::select! {
            place = places.clone().acquire_owned() => place,
            _ = stop.wait_for(|stop| *stop) => break,
        };
        let place = place.expect("the semaphore is never closed");
        let stream = tokio::select! {
            stream = listener.accept() => stream,
            _ = stop.wait_for(|stop| *stop) => break,
        };
        match stream {
            Ok(stream) => {
                let (router, stop, tls) = (router.clone(), stop.clone(), tls.clone());
                tokio::spawn(async move {
                    if let Some(stream) = secured(stream, tls, limits).await {
                        connection(stream, router, limits, stop, place).await;
                    }
                });
            }
            // Out of file descriptors, or the client left already: others may do better.
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
    drop(listener);
    let all = places.acquire_many(limits.connections as u32);
    // Whoever is not done by then is cut off as the program ends.
    let _ = tokio::time::timeout(drain_time, all).await;
}

/// The stream behind its handshake, if there is to be one; `None` if that fails or takes too long.
async fn secured(
    stream: Box<dyn Stream>,
    tls: Option<TlsAcceptor>,
    limits: ConnectionLimits,
) -> Option<Box<dyn Stream>> {
    let Some(tls) = tls else {
        return Some(stream);
    };
    let handshake = tokio::time::timeout(limits.header_time, tls.accept(stream)).await;
    Some(Box::new(handshake.ok()?.ok()?))
}

async fn connection(
    stream: Box<dyn Stream>,
    router: Router,
    limits: ConnectionLimits,
    mut stop: watch::Receiver<bool>,
    _place: OwnedSemaphorePermit,
) {
    let io = TokioIo::new(Unstalled::new(stream, limits.stall_time));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_time)
        .max_buf_size(limits.header_bytes)
        .max_headers(100)
        // A client that closes its side has left, also if it half-closes.
        .half_close(false)
        .serve_connection(io, TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    let mut stopping = false;
    loop {
        tokio::select! {
            // Errors are clients that left or broke off.
            _ = poll_fn(|context| connection.as_mut().poll(context)) => return,
            _ = stop.wait_for(|stop| *stop), if !stopping => {
                stopping = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

/// A stream that fails if a write makes no progress for too long.
struct Unstalled<S> {
    stream: S,
    patience: Duration,
    /// Since when a write waits, and till when it may
    deadline: Option<Pin<Box<Sleep>>>,
}

impl<S> Unstalled<S> {
    fn new(stream: S, patience: Duration) -> Self {
        Unstalled {
            stream,
            patience,
            deadline: None,
        }
    }

    fn watch<T>(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.deadline = None;
            return written;
        }
        let patience = self.patience;
        let new = || Box::pin(sleep_until(Instant::now() + patience));
        let deadline = self.deadline.get_or_insert_with(new);
        match deadline.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Unstalled<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Unstalled<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.watch(context, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        self.watch(context, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(context);
        self.watch(context, shut)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.watch(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
