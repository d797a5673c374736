//! TLS 1.3 under the TCP binding: who is trusted, and the stream that encrypts what the frames say.
//!
//! An address with the scheme `tls` is reached in no other way, so nothing can talk a client out of encryption. Data is
//! copied once more on each side than on plain TCP, by the cipher.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, RootCertStore, ServerConfig,
    ServerConnection,
};
use thiserror::Error;

use crate::buffer::Segment;

/// Most bytes that wait, encrypted, for the network to take them; as many may wait for the handshake to end.
const BUFFER_LIMIT: usize = 1 << 20;
/// Bytes that are copied and encrypted, or decrypted and copied, at a time: the longest TLS record.
const PIECE: usize = 16 << 10;

/// Why certificates or keys are refused.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file cannot be read as what it should hold.
    #[error("{}: expected {expected}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        expected: &'static str,
        /// What the reader says.
        reason: String,
    },
    /// The certificate and key do not fit each other, or are of a kind that is not supported.
    #[error("{}: {reason}", path.display())]
    Identity {
        /// File of the certificate.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// No certificate authority is usable.
    #[error("{}: no usable certificate authority: {reason}", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// A session that will not come about, or was damaged: it helps little to try again before somebody changes a certificate, a clock or
/// the configuration.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("TLS: {0}")]
pub struct Distrust(String);

impl From<rustls::Error> for Distrust {
    fn from(error: rustls::Error) -> Self {
        let advice = match &error {
            rustls::Error::InvalidCertificate(reason) => match reason {
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                    "the peer's certificate has expired; renew it there, or look at the clock here"
                }
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                    "the peer's certificate is not valid yet; look at the clocks of both machines"
                }
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                    "the peer's certificate does not name the host of the address; use a name that it has, or give it one \
                     with this name"
                }
                // An authority that was made again under the same name has another key.
                CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                    "the peer's certificate is of no authority that is trusted here (tls-authorities)"
                }
                _ => "the peer's certificate is not accepted",
            },
            rustls::Error::AlertReceived(AlertDescription::CertificateRequired) => {
                "the peer wants a certificate; configure one (tls-certificate, tls-key)"
            }
            rustls::Error::AlertReceived(_) => "the peer refuses the session, its log says why",
            rustls::Error::InvalidMessage(_) => {
                "the peer does not speak TLS; look at the scheme of its address"
            }
            _ => return Self(error.to_string()),
        };
        Self(format!("{advice} ({error})"))
    }
}

/// A certificate chain and its private key, as PEM files.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IdentityFiles {
    /// The certificate, and those between it and the authority.
    pub certificate: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

impl IdentityFiles {
    fn load(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|e| TlsError::File {
            path: self.key.clone(),
            expected: "a private key in PEM form",
            reason: e.to_string(),
        })?;
        Ok((certificates(&self.certificate)?, key))
    }

    fn refused(&self, error: &dyn fmt::Display) -> TlsError {
        TlsError::Identity { path: self.certificate.clone(), reason: error.to_string() }
    }
}

/// How connections to `tls://` addresses are made: whom to trust, and who to be.
#[derive(Clone)]
pub struct ClientTls(Arc<ClientConfig>);

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientTls")
    }
}

impl ClientTls {
    /// Trusts nodes whose certificate comes from one of the authorities in the PEM file `authorities` and names the host
    /// of the address; shows `identity`, if there is one.
    ///
    /// # Errors
    /// When a file cannot be read, or does not hold what it should.
    pub fn load(authorities: &Path, identity: Option<&IdentityFiles>) -> Result<Self, TlsError> {
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| TlsError::Authority { path: authorities.to_owned(), reason: e.to_string() })?
            .with_root_certificates(roots(authorities)?);
        let config = match identity {
            None => builder.with_no_client_auth(),
            Some(files) => {
                let (chain, key) = files.load()?;
                builder.with_client_auth_cert(chain, key).map_err(|e| files.refused(&e))?
            }
        };
        Ok(Self(Arc::new(config)))
    }

    /// Begins a session on a connected stream with the node that `host`, a name or numeric address, stands for.
    pub(super) fn begin(&self, stream: TcpStream, host: &str) -> io::Result<TlsStream> {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|e| io::Error::new(ErrorKind::InvalidInput, format!("host '{host}': {e}")))?;
        let session = ClientConnection::new(Arc::clone(&self.0), name).map_err(io::Error::other)?;
        Ok(TlsStream::new(stream, session.into()))
    }
}

/// How a node serves connections to its `tls://` addresses.
#[derive(Clone)]
pub struct ServerTls(Arc<ServerConfig>);

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServerTls")
    }
}

impl ServerTls {
    /// Shows `identity`; with `client_authorities`, a PEM file, only clients and peers with a certificate of one of those
    /// authorities come in.
    ///
    /// # Errors
    /// When a file cannot be read, or does not hold what it should.
    pub fn load(identity: &IdentityFiles, client_authorities: Option<&Path>) -> Result<Self, TlsError> {
        let (chain, key) = identity.load()?;
        let builder = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| identity.refused(&e))?;
        let builder = match client_authorities {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let refused = |reason: String| TlsError::Authority { path: path.to_owned(), reason };
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots(path)?), provider())
                        .build()
                        .map_err(|e| refused(e.to_string()))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let config = builder.with_single_cert(chain, key).map_err(|e| identity.refused(&e))?;
        Ok(Self(Arc::new(config)))
    }

    /// Begins a session on an accepted stream.
    pub(super) fn begin(&self, stream: TcpStream) -> io::Result<TlsStream> {
        let session = ServerConnection::new(Arc::clone(&self.0)).map_err(io::Error::other)?;
        Ok(TlsStream::new(stream, session.into()))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let refused = |reason: String| TlsError::File {
        path: path.to_owned(),
        expected: "certificates in PEM form",
        reason,
    };
    let found: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|e| refused(e.to_string()))?;
    if found.is_empty() { Err(refused("there is none".to_owned())) } else { Ok(found) }
}

fn roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(path)? {
        store
            .add(certificate)
            .map_err(|e| TlsError::Authority { path: path.to_owned(), reason: e.to_string() })?;
    }
    Ok(store)
}

/// A TCP stream with a TLS session, which never blocks. Like the socket calls of plain TCP it takes from and fills
/// segments.
pub(super) struct TlsStream {
    stream: TcpStream,
    session: rustls::Connection,
    /// Decrypted bytes that nobody has taken.
    readable: usize,
    piece: Box<[u8]>,
}

impl TlsStream {
    fn new(stream: TcpStream, mut session: rustls::Connection) -> Self {
        session.set_buffer_limit(Some(BUFFER_LIMIT));
        Self { stream, session, readable: 0, piece: vec![0; PIECE].into_boxed_slice() }
    }

    pub(super) const fn socket(&self) -> &TcpStream {
        &self.stream
    }

    /// Whether something that was taken, or belongs to the session itself, waits for the network.
    pub(super) fn wants_to_send(&self) -> bool {
        self.session.wants_write()
    }

    /// Whether bytes are there that the socket does not show as readable.
    pub(super) const fn has_received(&self) -> bool {
        self.readable > 0
    }

    /// Takes as much of `segments` as there is room for and sends what the network takes; returns the bytes taken.
    pub(super) fn send(&mut self, segments: &[Segment]) -> io::Result<usize> {
        let mut taken = 0;
        for segment in segments {
            let mut offset = 0;
            while offset < segment.length() {
                let length = segment.part(offset, PIECE).copy_to(&mut self.piece);
                let written = self.session.writer().write(&self.piece[..length])?;
                if written == 0 && !self.push()? {
                    return if taken == 0 { Err(ErrorKind::WouldBlock.into()) } else { Ok(taken) };
                }
                taken += written;
                offset += written;
            }
        }
        self.push()?;
        Ok(taken)
    }

    /// Sends what is encrypted already; true when the network took anything.
    pub(super) fn push(&mut self) -> io::Result<bool> {
        let mut moved = false;
        while self.session.wants_write() {
            match self.session.write_tls(&mut self.stream) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(_) => moved = true,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(moved)
    }

    /// Fills `segments` with what has arrived; returns the bytes, zero when the peer closed. Without `pulls` it takes
    /// only what is decrypted already, and leaves the socket alone.
    pub(super) fn receive(&mut self, segments: &[Segment], pulls: bool) -> io::Result<usize> {
        let mut filled = 0;
        for segment in segments {
            let mut offset = 0;
            while offset < segment.length() {
                let room = PIECE.min(segment.length() - offset);
                match self.session.reader().read(&mut self.piece[..room]) {
                    Ok(0) => return Ok(filled),
                    Ok(length) => {
                        segment.part(offset, length).copy_from(&self.piece[..length]);
                        self.readable = self.readable.saturating_sub(length);
                        offset += length;
                        filled += length;
                    }
                    // The peer went away without the session's last word; frames tell whether anything is missing.
                    Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(filled),
                    Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                    Err(nothing) => match if pulls { self.pull() } else { Err(nothing) } {
                        Ok(()) => {}
                        Err(error) if error.kind() == ErrorKind::WouldBlock && filled > 0 => {
                            return Ok(filled);
                        }
                        Err(error) => return Err(error),
                    },
                }
            }
        }
        Ok(filled)
    }

    /// Reads from the socket once and decrypts.
    fn pull(&mut self) -> io::Result<()> {
        loop {
            match self.session.read_tls(&mut self.stream) {
                Ok(_) => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let state = self.session.process_new_packets();
        // An alert, too, that tells the peer what is wrong with it.
        let pushed = self.push();
        let state = state.map_err(|e| io::Error::new(ErrorKind::InvalidData, Distrust::from(e)))?;
        self.readable = state.plaintext_bytes_to_read();
        pushed.map(drop)
    }

    /// Says the session's last word, as far as the network takes it.
    pub(super) fn say_goodbye(&mut self) {
        self.session.send_close_notify();
        // The connection ends either way.
        let _ = self.push();
    }
}

#[cfg(test)]
mod tests;
