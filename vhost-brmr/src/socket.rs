//! The socket that front ends connect to: made with the right permissions, never stolen from a living process, and
//! closed before any connection is.
//!
//! A front end that loses its connection may connect again within microseconds, and cloud-hypervisor gives a disk up for good when
//! a connection that was made then breaks. While the old daemon still listens, such a connection lands in its queue and is
//! never accepted. So [`Listener`] is closed first in every orderly end, and is held at a descriptor number that the kernel
//! closes first when the process is killed.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::sys;

/// The kernel's limit of a socket's name (unix(7)), without the zero at its end.
const LONGEST_NAME: usize = 107;

/// Why there is no socket to listen on.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Somebody listens there.
    #[error("{0}: another process listens on this socket")]
    InUse(PathBuf),
    /// Something else has this name.
    #[error("{0}: exists and is not a socket; it is left alone")]
    NotSocket(PathBuf),
    /// The kernel refused.
    #[error("{path}: cannot {what}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// A listening socket, with its file if this process made one.
#[derive(Debug)]
pub struct Listener {
    /// Removed before the socket is closed: while the socket is open no other file can have its inode number.
    _file: Option<SocketFile>,
    socket: UnixListener,
}

impl Listener {
    /// Takes the socket over: it never blocks from here on, and is closed before other descriptors when this process is
    /// killed.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn new(file: Option<SocketFile>, socket: UnixListener) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let (socket, number) = sys::move_above(socket.into(), sys::HIGH_DESCRIPTOR);
        if let Err(error) = number {
            tracing::warn!(
                "the listening socket stays at descriptor {}: {error}; if this process is killed, a hypervisor that connects again \
                 at once may be cut off, which cloud-hypervisor takes for the end of its disk; raise the limit of open files",
                socket.as_raw_fd()
            );
        }
        Ok(Self { _file: file, socket: socket.into() })
    }

    /// Takes the next connection, if there is one.
    ///
    /// # Errors
    /// When there is none, or the kernel refuses.
    pub fn accept(&self) -> io::Result<UnixStream> {
        self.socket.accept().map(|(stream, _)| stream)
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// The file of a listening socket; removed when dropped.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl SocketFile {
    /// Whether a socket can be made at `path`: true if a stale one has to be removed first.
    ///
    /// # Errors
    /// When another process listens there, or something else has the name.
    pub fn check(path: &Path) -> Result<bool, SocketError> {
        let failed = |what| move |source| SocketError::Io { path: path.to_owned(), what, source };
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(failed("look at it")(error)),
            Ok(meta) if !meta.file_type().is_socket() => Err(SocketError::NotSocket(path.to_owned())),
            Ok(_) => match UnixStream::connect(path) {
                Ok(_) => Err(SocketError::InUse(path.to_owned())),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(true),
                Err(error) => Err(failed("find out whether somebody listens on it")(error)),
            },
        }
    }

    /// Listens on `path`, with these permissions. A socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// When somebody listens there, something else has the name, or the socket cannot be made.
    pub fn listen(path: &Path, mode: u32) -> Result<(Self, UnixListener), SocketError> {
        let failed = |what| move |source| SocketError::Io { path: path.to_owned(), what, source };
        if Self::check(path)? {
            fs::remove_file(path).map_err(failed("remove the stale socket"))?;
        }
        let listener = bind(path, mode).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => SocketError::InUse(path.to_owned()),
            _ => failed("listen on it")(error),
        })?;
        listener.set_nonblocking(true).map_err(failed("make it non-blocking"))?;
        let inode = fs::symlink_metadata(path).map_err(failed("look at it"))?.ino();
        Ok((Self { path: path.to_owned(), inode }, listener))
    }
}

/// Makes the socket under another name, and gives it its own when it listens: whoever waits for the file to be there can
/// connect at once, and nobody takes it for a stale one.
fn bind(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let temporary = path.with_file_name(format!(".{}", std::process::id()));
    if temporary.as_os_str().len() > LONGEST_NAME {
        return sys::with_mode(mode, || UnixListener::bind(path));
    }
    // One that is there is of a process that was killed here, and had the same number.
    let _ = fs::remove_file(&temporary);
    let listener = sys::with_mode(mode, || UnixListener::bind(&temporary))?;
    // Unlike a renamed file, a link takes no name from another daemon that starts at the same time.
    let linked = fs::hard_link(&temporary, path);
    let removed = fs::remove_file(&temporary);
    linked.and(removed).map(|()| listener)
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Whoever replaced the socket meanwhile keeps it.
        if fs::symlink_metadata(&self.path).is_ok_and(|meta| meta.ino() == self.inode) {
            // There is nobody left to tell of a failure, and the next start removes a stale socket.
            let _ = fs::remove_file(&self.path);
        }
    }
}
