//! The few system calls that the event loop needs and no crate of ours wraps, each in a safe function.
//!
//! Descriptors that come from a front end are shared with it: it can change their flags, `O_NONBLOCK` too, and what they refer to at
//! any time. So nothing here relies on such a flag (see [`notify`]).
#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

/// Words of a vhost-user message that are looked at before it is read: code, flags, size, and two of the payload.
const PEEKED_WORDS: usize = 5;
/// Length of the header of a vhost-user message.
const HEADER_LENGTH: usize = 12;
/// Longest payload of any message.
const MAX_PAYLOAD: usize = 4096;
/// Bit of the flags: the front end waits for an acknowledgement.
const NEED_REPLY: u32 = 1 << 3;
/// Most descriptors that the reader of messages takes with one. More would make it wait for a message that it has read already.
const MAX_DESCRIPTORS: usize = 32;

/// What waits to be read from the control socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peeked {
    /// No whole message.
    Nothing,
    /// The front end closed the socket.
    Closed,
    /// A message with more descriptors than any has, or than this process can take.
    TooManyDescriptors,
    /// A whole message.
    Message {
        /// Its code.
        code: u32,
        /// An acknowledgement is wanted.
        need_reply: bool,
        /// Its length with its header.
        length: usize,
        /// First word of the payload, or zero.
        index: u32,
        /// Second word of the payload, or zero.
        value: u32,
    },
}

/// Looks at the next message without reading it, and without blocking.
///
/// # Errors
/// When the socket is broken.
pub fn peek(socket: &impl AsRawFd) -> io::Result<Peeked> {
    let fd = socket.as_raw_fd();
    let mut words = [0u32; PEEKED_WORDS];
    let (got, has_descriptors) = match peek_words(fd, &mut words) {
        Ok((0, _)) => return Ok(Peeked::Closed),
        Ok(got) => got,
        Err(error) => {
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(Peeked::Nothing),
                io::ErrorKind::ConnectionReset => Ok(Peeked::Closed),
                _ => Err(error),
            };
        }
    };
    if got < HEADER_LENGTH {
        return Ok(Peeked::Nothing);
    }
    let mut queued: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    if unsafe { libc::ioctl(fd, libc::FIONREAD, &mut queued) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let [code, flags, size, index, value] = words;
    // A size beyond what any message may have is left to the reader of messages to refuse.
    let size = (size as usize).min(MAX_PAYLOAD);
    if usize::try_from(queued).unwrap_or(0) < HEADER_LENGTH + size {
        return Ok(Peeked::Nothing);
    }
    if has_descriptors && !has_few_descriptors(fd)? {
        return Ok(Peeked::TooManyDescriptors);
    }
    let payload = |word: u32, end: usize| if size >= end && got >= HEADER_LENGTH + end { word } else { 0 };
    Ok(Peeked::Message {
        code,
        need_reply: flags & NEED_REPLY != 0,
        length: HEADER_LENGTH + size,
        index: payload(index, 4),
        value: payload(value, 8),
    })
}

/// The first words that wait to be read, their length in bytes, and whether descriptors come with them.
fn peek_words(fd: RawFd, words: &mut [u32; PEEKED_WORDS]) -> io::Result<(usize, bool)> {
    let mut part = libc::iovec { iov_base: words.as_mut_ptr().cast(), iov_len: mem::size_of_val(words) };
    // SAFETY: `msghdr` is plain data, for which zeroes are valid.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    // SAFETY: the kernel writes at most the size of `words`; every bit pattern is a valid word. Without room for control data it
    // says that there is some, and makes no descriptors.
    let got = unsafe { libc::recvmsg(fd, &mut message, libc::MSG_PEEK | libc::MSG_DONTWAIT) };
    let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
    Ok((got, message.msg_flags & libc::MSG_CTRUNC != 0))
}

/// Control data of one message, aligned as the kernel wants it.
#[repr(C, align(8))]
struct Control<const N: usize>([u8; N]);

/// Whether all descriptors of the message that waits can be had.
fn has_few_descriptors(fd: RawFd) -> io::Result<bool> {
    let mut control =
        Control([0; mem::size_of::<libc::cmsghdr>() + MAX_DESCRIPTORS * mem::size_of::<RawFd>()]);
    let (found, is_cut) = peek_control(fd, &mut control.0)?;
    // They are copies of those that the reader of the message takes.
    drop(found);
    Ok(!is_cut)
}

/// Descriptors of our own for those that come with the message that waits, as many as `control` has room for; and whether there are more.
fn peek_control(fd: RawFd, control: &mut [u8]) -> io::Result<(Vec<OwnedFd>, bool)> {
    let mut byte = 0u8;
    let mut part = libc::iovec { iov_base: std::ptr::from_mut(&mut byte).cast(), iov_len: 1 };
    // SAFETY: `msghdr` is plain data, for which zeroes are valid.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = control.len();
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the message refers to `byte` and `control`, which outlive the call, with their lengths.
    if unsafe { libc::recvmsg(fd, &mut message, flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut found = Vec::new();
    // SAFETY: the kernel filled in the control data and its length; CMSG_* stay within them, and the descriptors that come
    // with it are new ones of this process.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*header).cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
                let data: *const RawFd = libc::CMSG_DATA(header).cast();
                for index in 0..bytes / mem::size_of::<RawFd>() {
                    found.push(OwnedFd::from_raw_fd(data.add(index).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&message, header);
        }
    }
    Ok((found, message.msg_flags & libc::MSG_CTRUNC != 0))
}

/// Whether an answer can be sent without waiting for the front end to read earlier ones: a socket is writable while at least
/// three quarters of its buffer are free, which is more than any answer takes.
///
/// # Errors
/// When the socket is broken.
pub fn can_answer(socket: &impl AsRawFd) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one entry is given and there is one.
    match unsafe { libc::poll(&mut poll, 1, 0) } {
        0 => Ok(false),
        // An error of the socket is found by whoever sends.
        1.. => Ok(true),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sends bytes on a socket of the front end, and gives up rather than wait.
///
/// # Errors
/// When it is no socket, or is broken, or has no room for all of them.
pub fn send_now(socket: &impl AsRawFd, bytes: &[u8]) -> io::Result<()> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the kernel reads the length of `bytes`.
    let sent = unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
    match usize::try_from(sent) {
        Err(_) => Err(io::Error::last_os_error()),
        Ok(sent) if sent == bytes.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::WouldBlock.into()),
    }
}

/// Whether a descriptor is an eventfd. Asks the kernel for its name, and not whatever is behind it: a file of a file system in user
/// space could let us wait for ever.
#[must_use]
pub fn is_eventfd(descriptor: &impl AsRawFd) -> bool {
    let link = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
    std::fs::read_link(link).is_ok_and(|name| name.as_os_str() == "anon_inode:[eventfd]")
}

/// Adds one to an eventfd of the front end.
///
/// The front end can fill the counter up to its limit and take `O_NONBLOCK` away, and then the write waits for somebody to read.
/// [`Nudge`] ends that: [`io::ErrorKind::Interrupted`] says that it waited.
///
/// # Errors
/// When the write waited in vain, or the descriptor takes none.
pub fn notify(eventfd: &impl AsRawFd) -> io::Result<()> {
    let one = 1u64;
    // SAFETY: the kernel reads eight bytes.
    let written = unsafe { libc::write(eventfd.as_raw_fd(), std::ptr::from_ref(&one).cast(), 8) };
    match written {
        8 => Ok(()),
        // A counter at its limit: whoever reads it is notified already.
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            error => Err(error),
        },
    }
}

/// Ends whatever the thread waits for: while it is set, a signal comes once a second, which does nothing but that.
#[derive(Debug)]
pub struct Nudge(libc::timer_t);

// SAFETY: the timer belongs to the process, and its functions may be called from any thread.
unsafe impl Send for Nudge {}

impl Nudge {
    /// One for the calling thread; not set.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn new() -> io::Result<Self> {
        extern "C" fn nothing(_signal: libc::c_int) {}
        // SAFETY: the structures are plain data, for which zeroes are valid; each call gets valid pointers to them. The handler does
        // nothing. Without SA_RESTART a call that waits is not resumed.
        unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
            libc::sigemptyset(&mut action.sa_mask);
            if libc::sigaction(libc::SIGALRM, &action, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            let mut set: libc::sigset_t = mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, libc::SIGALRM);
            let failed = libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
            if failed != 0 {
                return Err(io::Error::from_raw_os_error(failed));
            }
            let mut event: libc::sigevent = mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = libc::SIGALRM;
            event.sigev_notify_thread_id = libc::gettid();
            let mut timer: libc::timer_t = std::ptr::null_mut();
            if libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self(timer))
        }
    }

    /// Sets it, or stops it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set(&self, on: bool) -> io::Result<()> {
        let period = libc::timespec { tv_sec: on.into(), tv_nsec: 0 };
        let times = libc::itimerspec { it_interval: period, it_value: period };
        // SAFETY: the timer is there as long as `self`, and `times` is read only.
        let failed = unsafe { libc::timer_settime(self.0, 0, &times, std::ptr::null_mut()) };
        if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Nudge {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and not used any more.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// Exit code when memory of the front end was taken away.
pub const MEMORY_LOST: u8 = 4;

/// Says on standard error why the process ends, and ends it, when it touches memory that is not there any more. `json` is the form of
/// the other lines of the log.
///
/// # Errors
/// When the kernel refuses.
pub fn explain_bus_errors(json: bool) -> io::Result<()> {
    let handler = if json { bus_error::<true> } else { bus_error::<false> };
    // SAFETY: `sigaction` is plain data, for which zeroes are valid. The handler makes only calls that a signal handler may.
    unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction =
            handler as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigemptyset(&mut action.sa_mask);
        let failed = libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
        if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// What the line says, in both forms.
macro_rules! bus_error_lines {
    ($text:literal) => {
        (
            concat!("ERROR ", $text, "\n"),
            concat!(
                "{\"level\":\"ERROR\",\"fields\":{\"message\":\"",
                $text,
                "\"},\"target\":\"vhost_brmr::sys\"}\n"
            ),
        )
    };
}

extern "C" fn bus_error<const JSON: bool>(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel gives a valid pointer to a handler with SA_SIGINFO.
    let code = unsafe { (*info).si_code };
    let (text, json) = match code {
        // A page that nobody has touched was found to be bad.
        libc::BUS_MCEERR_AO => return,
        libc::BUS_MCEERR_AR => bus_error_lines!(
            "ended: the machine reports a hardware error in memory that is in use (SIGBUS); see the kernel log for the module. The next \
             daemon serves the guest's requests in flight, if its hypervisor tracks them"
        ),
        _ => bus_error_lines!(
            "ended: memory that the front end shares with this daemon is gone (SIGBUS): the file behind guest memory, the dirty log or \
             the inflight region was cut short, or has no huge pages left. The pool is not harmed; the front end has to connect again"
        ),
    };
    let line = if JSON { json } else { text };
    // SAFETY: both calls may be made in a signal handler, and the line is a constant.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len());
        libc::_exit(MEMORY_LOST.into());
    }
}

/// Whether SIGTERM or SIGINT was sent and not taken: see [`StopSignals`].
#[must_use]
pub fn is_stop_pending() -> bool {
    // SAFETY: `sigset_t` is plain data that `sigpending` fills in.
    unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigpending(&mut set) == 0
            && (libc::sigismember(&set, libc::SIGTERM) == 1 || libc::sigismember(&set, libc::SIGINT) == 1)
    }
}

/// Takes a message that was peeked at, of this code and length, without a look at what it says; descriptors that come with it are
/// closed. With `acknowledge` the front end is told that all went well.
///
/// # Errors
/// When the socket is broken.
pub fn skip(socket: &impl AsRawFd, code: u32, length: usize, acknowledge: bool) -> io::Result<()> {
    let mut message = [0u8; HEADER_LENGTH + MAX_PAYLOAD];
    let length = length.min(message.len());
    // SAFETY: the kernel writes at most `length` bytes. Without room for control data it drops the descriptors.
    let got =
        unsafe { libc::recv(socket.as_raw_fd(), message.as_mut_ptr().cast(), length, libc::MSG_DONTWAIT) };
    if usize::try_from(got).ok() != Some(length) {
        return Err(io::Error::last_os_error());
    }
    if !acknowledge {
        return Ok(());
    }
    // Code, flags (version 1, an answer), length, and a zero of 64 bits.
    let answer = [code, 1 | 1 << 2, 8, 0, 0].map(u32::to_ne_bytes).concat();
    send_now(socket, &answer)
}

/// A descriptor of our own for the one that comes with the next message, which is left where it is. The `vhost` crate hands the
/// channel to the front end on in a type that can neither send a change of the configuration nor be asked for its socket.
///
/// # Errors
/// When the socket is broken, or the message brings no descriptor.
pub fn peek_descriptor(socket: &impl AsRawFd) -> io::Result<OwnedFd> {
    let mut control = Control([0; 64]);
    let (found, _) = peek_control(socket.as_raw_fd(), &mut control.0)?;
    found.into_iter().next().ok_or_else(|| io::Error::other("the message brings no descriptor"))
}

/// SIGTERM and SIGINT as a descriptor.
#[derive(Debug)]
pub struct StopSignals(OwnedFd);

impl StopSignals {
    /// Takes both signals away from their default action, for this thread and those it starts.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn new() -> io::Result<Self> {
        // SAFETY: `sigset_t` is plain data that `sigemptyset` initialises; both calls get a valid pointer to it.
        unsafe {
            let mut set: libc::sigset_t = mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, libc::SIGTERM);
            libc::sigaddset(&mut set, libc::SIGINT);
            let failed = libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            if failed != 0 {
                return Err(io::Error::from_raw_os_error(failed));
            }
            let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self(OwnedFd::from_raw_fd(fd)))
        }
    }

    /// Takes one signal, if there is one.
    #[must_use]
    pub fn take(&self) -> bool {
        let mut info = [0u8; mem::size_of::<libc::signalfd_siginfo>()];
        // SAFETY: the kernel writes at most the size of `info`.
        let got = unsafe { libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), info.len()) };
        got > 0
    }
}

impl AsRawFd for StopSignals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// The number that the listening socket is moved to, if the limit of open files allows it: above every number that this process
/// may come to use, and low enough that the kernel's table of descriptors takes 128 KiB.
///
/// Linux lets go of a killed process' files from the highest number to the lowest, as `close_files` queues them in ascending order on
/// a list that is worked off from its end.
pub const HIGH_DESCRIPTOR: RawFd = 16_000;

/// Moves a descriptor to the first free number from `number` on, or from just below the limit of open files where that is lower.
/// If that is not possible it stays where it is, and the error says why.
pub fn move_above(fd: OwnedFd, number: RawFd) -> (OwnedFd, io::Result<()>) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one `rlimit`.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 {
        return (fd, Err(io::Error::last_os_error()));
    }
    // A few numbers are left above it: more than one listener may be moved.
    let highest = RawFd::try_from(limit.rlim_cur).unwrap_or(RawFd::MAX).saturating_sub(16);
    let number = number.min(highest).max(0);
    // SAFETY: plain fcntl on a descriptor that is owned here.
    let moved = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, number) };
    if moved < 0 {
        return (fd, Err(io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is new and owned from here on. The old one is closed.
    (unsafe { OwnedFd::from_raw_fd(moved) }, Ok(()))
}

/// Raises the limit of open files as far as this process may.
///
/// # Errors
/// When the kernel refuses.
pub fn raise_descriptor_limit() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one `rlimit`.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the kernel reads one `rlimit`.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A socket that was inherited from whoever started this process.
#[derive(Debug)]
pub enum Inherited {
    /// It listens.
    Listener(UnixListener),
    /// It is connected.
    Stream(UnixStream),
}

/// Takes over an inherited socket. To be called once per descriptor, before anything else is opened.
///
/// # Errors
/// When it is no unix stream socket.
pub fn inherit(fd: RawFd) -> io::Result<Inherited> {
    let (domain, kind) = (socket_option(fd, libc::SO_DOMAIN)?, socket_option(fd, libc::SO_TYPE)?);
    if domain != libc::AF_UNIX || kind != libc::SOCK_STREAM {
        return Err(io::Error::other("not a unix stream socket"));
    }
    let listens = socket_option(fd, libc::SO_ACCEPTCONN)? != 0;
    // SAFETY: the descriptor is open, as its options could be read, and the caller hands it over.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: plain fcntl on a descriptor that is owned here. Keeps it from programs started later.
    unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    Ok(if listens { Inherited::Listener(owned.into()) } else { Inherited::Stream(owned.into()) })
}

fn socket_option(fd: RawFd, option: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut length = libc::socklen_t::try_from(mem::size_of_val(&value)).map_err(io::Error::other)?;
    // SAFETY: value and length are valid for writing, and length is the size of value.
    let failed = unsafe {
        let value = std::ptr::from_mut(&mut value).cast();
        libc::getsockopt(fd, libc::SOL_SOCKET, option, value, &mut length)
    };
    if failed != 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// Calls `create` with file permissions limited to `mode`, e.g. to make a socket that is never open to others, not even
/// for a moment. The mask belongs to the whole process: no other thread may make files meanwhile, and the daemon's never do.
pub fn with_mode<T>(mode: u32, create: impl FnOnce() -> T) -> T {
    // SAFETY: umask cannot fail and touches no memory.
    let before = unsafe { libc::umask(!mode & 0o777) };
    let made = create();
    // SAFETY: as above.
    unsafe { libc::umask(before) };
    made
}
